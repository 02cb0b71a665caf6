"""A backbone whose decoder layers lie in shards over the ranks of a training, by torch's FSDP2.

A layer is put together by all ranks at once, for its forward and again for its backward. So every rank has to run the
layers as often as the others, whatever samples it has.

Letters: T tokens in a pack, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molora.model.probe import decoder, decoder_layers
from molora.ranks import Ranks


def shard(model: PreTrainedModel, ranks: Ranks) -> None:
    """Leaves this rank its shard of every decoder layer, and puts the model on its device, layer by layer. Embeddings,
    the head and what is between them and the layers are there whole, and so is what is put into the layers later."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    rest = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    # Has no shards of its own: it fetches the next layer while one computes.
    fully_shard(decoder(model), mesh=mesh, ignored_params=rest)
    model.to(ranks.device)  # pyright: ignore[reportArgumentType]


class _OutOfStep(BaseException):
    """This rank failed inside the layers, where the others wait for it. Not an Exception, as those are taken for the
    fault of a sample, and the samples after it are gone on with."""


class Steps:
    """Keeps ranks in step that share layers. `idle_pass` takes one token through the layers, forward, and with True
    backward too."""

    def __init__(self, ranks: Ranks, idle_pass: Callable[[bool], None]) -> None:
        self._ranks = ranks
        self._idle_pass = idle_pass
        self._announced = False

    def run(self, layers: Callable[..., Tensor], embeds_TD: Tensor, *more: Any) -> Tensor:
        """`layers` of embeddings and more, told to the other ranks where they cannot know of it."""
        if torch.is_grad_enabled() and not embeds_TD.requires_grad:
            # Else a rank would go back to the first layer that trains for its samples, and others further.
            embeds_TD = embeds_TD.detach().requires_grad_()
        if not self._announced:
            return layers(embeds_TD, *more)
        self._announce(1)
        try:
            return layers(embeds_TD, *more)
        except Exception as error:
            raise _OutOfStep from error

    def catch_up(self, passes: int, *, backward: bool) -> None:
        """Idle passes before the `passes` that this rank is going to make, if another one makes more."""
        for _ in range(max(self._ranks.gather([passes])) - passes):
            self._idle_pass(backward)

    @contextmanager
    def at_will(self) -> Iterator[None]:
        """While entered, a rank makes as many passes as it likes, forward alone; when it leaves, it goes along with
        those of the others. Raises RuntimeError for an error inside the layers, after which no rank can go on."""
        self._announced = True
        try:
            yield
            while self._announce(0):
                self._idle_pass(False)
        except _OutOfStep as failure:
            error = failure.__cause__
            raise RuntimeError(f"in layers that all ranks share: {type(error).__name__}: {error}") from error
        finally:
            self._announced = False

    def _announce(self, passes: int) -> bool:
        """Says whether this rank makes another pass; returns whether any does."""
        return bool(self._ranks.sum(torch.tensor([passes], device=self._ranks.device)).item())
