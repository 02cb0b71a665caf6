"""A model without weights, and work without values that counts the bytes it would take.

Models are built on the meta device by the code that builds real ones, and run by the code that runs real ones, with
shapes and without values. So no size of a module or a tensor is written down here.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from molora.checkpoint.assembly import BackboneConfig, assemble
from molora.checkpoint.opening import plan_model
from molora.checkpoint.pretrained import fetch
from molora.checkpoint.stock import damage_named, read_config, read_dtype
from molora.config import ConfigError
from molora.convert.release import layout_of
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization, without_weights
from molora.testing.tiny import byte_tokenizer
from molora.train.recipe import Recipe, plan_recipe


def on_meta(
    source: Recipe | str | Path,
    modalities: Sequence[str | Path] = (),
    *,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    trust: Sequence[str] = (),
) -> MoLoRA:
    """The model of a recipe, of a run, or of a backbone (folder or hub id) with modality folders, on the meta device.

    It has every parameter and buffer, with shape and dtype, and none of their values. Of the hub it needs descriptions
    only: JSON files of the backbone, and JSON files of an encoder that is named there.

    Raises FileNotFoundError for a backbone that is nowhere, ConfigError or ValueError for what else is missing, cannot
    be fetched, or cannot be built without weights.
    """
    if isinstance(source, Recipe):
        plan = plan_recipe(source, trust)
    elif layout_of(source) is not None:
        raise ConfigError(f"{source}: a release; make it a run first: molora convert phi4mm {source} runs/phi4mm")
    else:
        plan = plan_model(source, modalities, quantization=quantization, trust=trust)
    backbone = _backbone(plan.backbone, dtype or plan.backbone.dtype)
    with torch.device("meta"):
        try:
            return assemble(backbone, byte_tokenizer(), plan.modalities, plan.router, where=plan.where)[0]
        except (RuntimeError, NotImplementedError) as error:
            wrong = f"an encoder of {', '.join(plan.modalities)} cannot be built without weights: {error}"
            advice = "a build_encoder makes modules without reading weights or looking at values"
            raise ValueError(f'{wrong}; under torch.device("meta"), {advice}') from error


def _backbone(given: BackboneConfig, dtype: str | None) -> Backbone:
    source = given.path
    folder = fetch(source, given.revision, weights=False)
    config = read_config(folder)
    if dtype is None and config.dtype is None:
        raise ConfigError(f"backbone {source!r}: its config.json names no dtype, and weights are not read; give dtype")
    cast = config.dtype if dtype is None else read_dtype(dtype)
    with torch.device("meta"):
        with damage_named(f"backbone {folder}"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=cast, attn_implementation="eager", trust_remote_code=False
            )
        without_weights(model, given.quantization)
        # What a probe finds is a factor, which takes no memory.
        return Backbone(model, Identity(source, "", "", "", ""), probe={"embed_scale": 1.0})


@dataclass(frozen=True)
class Alive:
    """Bytes at one moment; `logits` is the share of tensors as wide as the vocabulary."""

    num_bytes: int = 0
    logits: int = 0


# The CPU's attention has the arguments of another kind, for which torch counts.
_COUNTED_AS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class DryRun(TorchDispatchMode):
    """Takes over a model on the meta device, lets it run on the CPU, and counts the bytes that its work keeps alive,
    and the floating-point operations (`flop`) of its products: matrices, convolutions and attention.

    What is computed from weights has shapes and no values (torch's fake tensors). All else, such as positions, lengths
    and pixels, is computed for real, as control flow depends on it. A value that nobody knows is read as True, 1.0 or
    0. Weights do not count, nor does what `owned` adds to them.
    """

    def __init__(self, model: MoLoRA) -> None:
        super().__init__()
        self.model = model
        self.alive = self.fullest = Alive()
        self.flop = 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._wide = model.backbone.vocab_size
        self._known: dict[int, Any] = {}
        stand_ins: dict[int, tuple[Tensor, Tensor]] = {}

        def stand_in(tensor: Tensor) -> Tensor:
            fake = FakeTensor(self._fake, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            # Layers that share a weight go on sharing it.
            return stand_ins.setdefault(id(tensor), (tensor, fake))[1]

        for module in model.modules():
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for name, value in [*own.items(), *vars(module).items()]:
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(module, name, stand_in(value))
        model.backbone.free_bytes = lambda: sys.maxsize  # nothing is taken
        model.find_parts()
        self.owned(fake for _, fake in stand_ins.values())

    def owned(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors out of the count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives parameters the gradients that an earlier pack of a step leaves; they do not count."""
        for parameter in parameters:
            with self._fake:
                parameter.grad = torch.zeros_like(parameter)
            self.owned([parameter.grad])

    def __enter__(self) -> DryRun:
        gc.collect()
        self.fullest, self.flop = self.alive, 0
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if FakeTensor not in types:
            with unset_fake_temporarily():
                made = func(*args, **(kwargs or {}))
        elif func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        else:
            try:
                made = func(*args, **(kwargs or {}))
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(f"{func} gives no shape without values: {error}") from error
        tree_map_only(Tensor, self._count, made)
        if formula := flop_registry.get(_COUNTED_AS.get(func._overloadpacket, func._overloadpacket)):
            self.flop += formula(*args, **(kwargs or {}), out_val=made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        num_bytes = storage.nbytes()
        logits = num_bytes if tensor.dim() and tensor.shape[-1] == self._wide else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive = Alive(self.alive.num_bytes - num_bytes, self.alive.logits - logits)

        # The storage itself, not the tensor: autograd keeps storages of tensors that Python has forgotten.
        self._known[key] = weakref.ref(storage, gone)
        self.alive = Alive(self.alive.num_bytes + num_bytes, self.alive.logits + logits)
        if self.alive.num_bytes > self.fullest.num_bytes:
            self.fullest = self.alive
