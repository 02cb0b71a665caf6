"""Backbones whose linear layers are stored in 4 or 8 bits, by transformers' own quantisers.

Letters: T tokens in a pack, D input width, O output width.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

# `none` is as stored; `nf4` is that of QLoRA (arXiv 2305.14314), blocks of 64 and scales in 8 bits; `int8` has a scale
# for each output. Both are of weights alone: with activations in 8 bits too, as LLM.int8 has them, a difference in the
# last bit becomes one of a whole step, so that a sample would depend on the shape of its pack.
Quantization = Literal["none", "nf4", "int8"]

_LIBRARY = {"nf4": "bitsandbytes", "int8": "torchao"}
_BLOCK = 64
_OUTER_BLOCK = 256


def quantizer(quantization: Quantization) -> Any:
    """What `from_pretrained` takes as its quantization_config; None for weights as they are stored. Raises ImportError
    without the library."""
    if quantization == "none":
        return None
    library_version(quantization)
    if quantization == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def library_version(quantization: Quantization) -> str | None:
    """The library that quantises, and its version, on which results depend; None for `none`. Raises ImportError."""
    if quantization == "none":
        return None
    library = _LIBRARY[quantization]
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError as error:
        told = f"backbone.quantization: {quantization} needs {library}, which is not installed"
        raise ImportError(f"{told}; pip install 'molora[quantization]'") from error


def settle(model: PreTrainedModel) -> None:
    """Makes the quantised layers of a model that transformers opened compute in the dtype of what they get, keep their
    weights as they are, and hold no float copy of them for the backward pass."""
    for module in model.modules():
        layer: Any = module
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.compute_dtype, layer.compute_type_is_set = None, True
            # On some CPUs bitsandbytes would put the weights into another order at the first forward without a graph,
            # round their scales to bf16 for good, and compute in bf16 there and not in training.
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, nn.Linear) and hasattr(layer.weight, "qdata"):
            layer.forward = _Forgetful(layer)


class _Forgetful:
    """The forward of an 8-bit layer. With a graph, torchao would keep a float copy of every weight until backward."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.stock = layer.forward

    def __call__(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            return _FrozenProduct.apply(input, self)  # pyright: ignore[reportReturnType]
        return self.stock(input)


class _FrozenProduct(torch.autograd.Function):
    """x (…, T, D) to (…, T, O) through a frozen layer, whose float weights are made again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: _Forgetful) -> Tensor:
        ctx.layer = product.layer
        return product.stock(x).clone()  # of a view no adapter's share could be added in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ ctx.layer.weight.dequantize().to(gradient.dtype), None


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight is stored in: itself, or those of its quantised form."""
    weight: Any = tensor
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(weight, name))
    else:
        yield weight
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.absmax, state.code, state.offset) if part is not None)
        state = state.state2


def num_weights(tensor: Tensor) -> int:
    """How many numbers a weight stands for, of which the packed ones of 4 bits share bytes."""
    state = getattr(tensor, "quant_state", None)
    return tensor.numel() if state is None else state.shape.numel()


def without_weights(model: PreTrainedModel, quantization: Quantization) -> None:
    """Gives the layers of a model on the meta device, which were built as they are without quantisation, the sizes that
    they have with it."""
    if quantization == "none":
        return
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, nn.Linear) and should_convert_module(path, kept):
            model.set_submodule(path, _OnMeta(layer, quantization))


class _OnMeta(nn.Linear):
    """A quantised layer without values, as large as its stored tensors and what its forward and backward take."""

    def __init__(self, layer: nn.Linear, quantization: Quantization) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=layer.weight.dtype)
        self.bias = layer.bias
        num_weights = self.weight.numel()
        num_blocks = -(-num_weights // _BLOCK)
        sizes = {
            "nf4": [
                (torch.uint8, (num_weights + 1) // 2),
                (torch.uint8, num_blocks),
                # The values that 4 bits and 8 bits stand for, the scales of the scales, and their mean.
                (torch.float32, 16 + 256 + -(-num_blocks // _OUTER_BLOCK) + 1),
            ],
            "int8": [(torch.int8, num_weights), (torch.float32, self.out_features), (torch.int8, self.out_features)],
        }[quantization]
        stored = [torch.empty(size, dtype=dtype, device="meta") for dtype, size in sizes]
        self.weight = nn.Parameter(stored[0], requires_grad=False)
        for index, tensor in enumerate(stored[1:]):
            self.register_buffer(f"scales_{index}", tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return _MetaProduct.apply(x, self.in_features, self.out_features, self.bias)  # pyright: ignore[reportReturnType]


class _MetaProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, in_features: int, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.sizes = out_features, in_features
        return F.linear(x, x.new_empty(ctx.sizes), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ gradient.new_empty(ctx.sizes), None, None, None
