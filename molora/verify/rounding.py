"""Rounding: a half-precision model run in fp32, and how far its own results move in half precision.

Letters: T tokens of a sample, D backbone width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molora.model.experts import routers
from molora.model.probe import decoder_layers, difference, largest
from molora.terminal import Finding

HALF = (torch.bfloat16, torch.float16)
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Precision:
    """A dtype to compare in: what to call it, how far results may differ there, and why."""

    told: str
    tolerance: float
    reason: str
    fp32: bool = False

    def of(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return in_fp32(model) if self.fp32 else nullcontext()

    def check(self, promise: str, found: str, difference: float) -> Finding:
        return Finding(promise, f"{found} by {difference:.1e}{self.told} ({self.reason})", difference <= self.tolerance)


def precisions(stock: PreTrainedModel, samples: Iterable[Tensor]) -> list[Precision]:
    """The model's own dtype; and fp32, where what a fault does is not hidden by rounding. Samples as in `measure`."""
    allowed = f"allowed {_TOLERANCE:.0e}"
    if stock.dtype not in HALF:
        return [Precision("", _TOLERANCE, allowed)]
    fp32 = Precision(" in fp32", _TOLERANCE, allowed, fp32=True)
    if routers(stock):  # rounding swaps experts that are close, and what follows is another computation
        return [fp32]
    own = measure(stock, samples)
    reason = f"the stock model: padded from alone by {own.shape:.1e}, from its own fp32 by {own.fp32:.1e}"
    return [Precision("", own.most, reason), fp32]


@dataclass(frozen=True)
class Rounding:
    """How far the stock model's results on some samples differ from its own: in a batch of another shape (beside a
    padded row), and from its own in fp32."""

    shape: float
    fp32: float

    @property
    def most(self) -> float:
        """How far two ways of computing one result may differ: each is as far from the exact one as the stock model."""
        return largest((self.shape, 2 * self.fp32))


@torch.no_grad()
def measure(stock: PreTrainedModel, samples: Iterable[Tensor]) -> Rounding:
    """How far the results of a half-precision causal LM move on samples, each given by its embeddings (T, D)."""
    found = [_measure(stock, embeds_TD) for embeds_TD in samples]
    return Rounding(largest(rounding.shape for rounding in found), largest(rounding.fp32 for rounding in found))


def _measure(stock: Any, embeds_TD: Tensor) -> Rounding:
    alone_TV = stock(inputs_embeds=embeds_TD[None]).logits[0]
    # A sample of half the length, padded to the same one: a longer row could change dynamic rotary frequencies.
    half = max(1, len(embeds_TD) // 2)
    shorter_TD = embeds_TD.clone()
    shorter_TD[half:] = 0
    mask = torch.ones(2, len(embeds_TD), dtype=torch.long, device=embeds_TD.device)
    mask[1, half:] = 0
    beside_TV = stock(inputs_embeds=torch.stack([embeds_TD, shorter_TD]), attention_mask=mask).logits[0]
    with in_fp32(stock):
        exact_TV = stock(inputs_embeds=embeds_TD.float()[None]).logits[0]
    return Rounding(difference(beside_TV, alone_TV), difference(alone_TV, exact_TV))


@contextmanager
def in_fp32(model: PreTrainedModel) -> Iterator[None]:
    """Lets a half-precision causal LM compute in fp32: each decoder layer is cast while it runs, the rest throughout.
    So it takes the largest layer, embeddings and head in fp32, and no second model. Afterwards every tensor is the very
    one that it was."""
    undo: dict[nn.Module, Callable[[], None]] = {}

    def before(layer: nn.Module, args: Any) -> None:
        undo[layer] = _cast(_tensors(layer))

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        undo.pop(layer)()

    layers = decoder_layers(model)
    hooks = [layer.register_forward_pre_hook(before) for layer in layers]
    hooks += [layer.register_forward_hook(after, always_call=True) for layer in layers]
    inside = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    undo_rest = _cast(tensor for tensor in _tensors(model) if id(tensor) not in inside)
    try:
        yield
    finally:
        undo_rest()
        for hook in hooks:
            hook.remove()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _cast(tensors: Iterable[Tensor]) -> Callable[[], None]:
    """Makes half-precision tensors fp32 in place; returns what makes them as they were."""
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in HALF]
    for tensor, data in kept:
        tensor.data = data.float()

    def undo() -> None:
        for tensor, data in kept:
            tensor.data = data

    return undo
