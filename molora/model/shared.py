"""Neighbours in a pack that begin with one prompt, as the options of a question or the two answers of a preference do:
the prompt runs once for all.

Letters: T tokens in a pack, K of them that run, P places, D backbone width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache

from molora.model.attention import Segments
from molora.pack import Item, Pack, Sample
from molora.routing import Flow, Routing

if TYPE_CHECKING:
    from molora.model.molora import MoLoRA


def shared_prompts(model: MoLoRA, samples: Sequence[Sample], prompts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Of each sample, the one before it that begins with the same prompt, and the tokens of it; itself and 0 if none
    does. `prompts` are the tokens that each sample may share."""
    found: list[tuple[int, int]] = []
    first = 0
    for index, (sample, count) in enumerate(zip(samples, prompts, strict=True)):
        if index == first or prompts[first] != count or not _begin_alike(model, samples[first], sample, count):
            first, count = index, 0
        found.append((first, count))
    return tuple(found)


def hidden_at(model: MoLoRA, pack: Pack, embeds_TD: Tensor, routing: Routing, places_P: Tensor) -> Tensor:
    """Final hidden states (P, D) at places of a pack, whose shared prompts run once.

    The router decided for whole samples: by its contract what follows a prompt does not change how the prompt runs.
    """
    if not any(count for _, count in pack.shared):
        return model(pack, embeds_TD=embeds_TD, routing=routing)[places_P.to(model.device)]
    # By token of the pack, the one that runs for it.
    runs_T = torch.arange(sum(pack.lengths))
    starts = [0, *accumulate(pack.lengths)]
    for start, (first, count) in zip(starts, pack.shared, strict=False):
        runs_T[start : start + count] = torch.arange(starts[first], starts[first] + count)
    running_K = runs_T.unique()
    on_device_K = running_K.to(model.device)
    lengths = [length - count for length, (_, count) in zip(pack.lengths, pack.shared, strict=True)]
    hidden_KD = model.backbone(
        embeds_TD[on_device_K],
        pack.position_ids_T[on_device_K],
        Flow(
            tuple(length for length in lengths if length),
            routing.only(running_K),
            tuple(end for end, length in zip(pack.lengths, lengths, strict=True) if length),
        ),
        _Branches(lengths, pack.shared),
    )
    return hidden_KD[torch.searchsorted(running_K, runs_T[places_P]).to(model.device)]


def _begin_alike(model: MoLoRA, one: Sample, other: Sample, count: int) -> bool:
    """Whether two samples have a prompt of `count` tokens in common, with the same media and rotary frequencies."""
    return (
        torch.equal(one.token_ids_T[:count], other.token_ids_T[:count])
        and torch.equal(one.modality_ids_T[:count], other.modality_ids_T[:count])
        and len(one.items) == len(other.items)
        and all(map(_are_equal, one.items, other.items))
        and model.backbone.regime(len(one)) == model.backbone.regime(len(other))
    )


def _are_equal(one: Item, other: Item) -> bool:
    mine, its = one.prepared.tensors, other.prepared.tensors
    return (one.modality, one.projector, mine.keys()) == (other.modality, other.projector, its.keys()) and all(
        mine[key] is its[key] or torch.equal(mine[key], its[key]) for key in mine
    )


class _Branches(Cache):
    """The cache of one forward, in which a sample's keys and values come after those that it shares."""

    def __init__(self, lengths: Sequence[int], shared: Sequence[tuple[int, int]]) -> None:
        super().__init__(layers=[])
        self._lengths = list(lengths)
        self._shared = shared

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Segments, Segments]:
        return self._joined(key_states), self._joined(value_states)

    def _joined(self, states: Tensor) -> Segments:
        """Keys or values (1, G, K, d) as those that each sample with tokens of its own reads."""
        own = states.split(self._lengths, dim=2)
        return Segments(
            torch.cat([own[first][:, :, :count], each], dim=2) if count else each
            for each, length, (first, count) in zip(own, self._lengths, self._shared, strict=True)
            if length
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise RuntimeError("a pack has one length per sample; positions must be passed explicitly")
