"""Routing: which adapter each token of a pack runs with, and how that reaches the layers.

Letters: T tokens in a pack or slice, K chosen tokens, N samples, D backbone width, E adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from molora.pack import Pack


# What text alone is called: the set without modalities.
TEXT = "text"


class RoutingError(ValueError):
    """A set of modalities without a rule, or a rule that names an unknown adapter."""


def modality_set(key: str, where: str) -> frozenset[str]:
    """The set that "audio+vision" means; "text" is text alone, the empty set. Raises RoutingError for a key without
    names."""
    names = frozenset(name.strip() for name in key.split("+") if name.strip())
    if not names:
        raise RoutingError(f"router {where}: {key!r} names no modality; a rule for text alone is written {TEXT!r}")
    return frozenset() if names == {TEXT} else names


def name_of(modalities: Iterable[str]) -> str:
    """What a set of modalities is called, such as "audio+vision"; none is "text"."""
    return "+".join(sorted(modalities)) or TEXT


def check_part(name: str) -> None:
    """Raises ValueError for a name under which torch's modules cannot hold a part of the model."""
    if "." in name or hasattr(nn.ModuleDict(), name):
        why = "torch allows no dot in the name of a module, and none that nn.ModuleDict has for itself, such as keys"
        raise ValueError(f"{name!r:.80} cannot name a modality or a projector: {why}; take another name")


class Slice(NamedTuple):
    """Tokens `start:stop` of a pack run with the sum of `adapters`; none is the bare backbone. `weights_TE` says how
    much of each adapter each token takes; None is all of every one."""

    adapters: tuple[str, ...]
    start: int
    stop: int
    weights_TE: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """One decision for one pack: slices in order that cover every token once. `gates` are, sample by sample, what a
    router of scope `sample` decided and wants to be told again when the sample goes on from a cache. `losses_N` is what
    a router that learns adds to the mean loss of every sample."""

    slices: tuple[Slice, ...]
    gates: tuple[Tensor | None, ...] | None = None
    losses_N: Tensor | None = None

    @classmethod
    def by_sample(cls, adapters: Sequence[tuple[str, ...]], lengths: Sequence[int]) -> Routing:
        """Hard routing at sample scope; neighbours with the same adapters share a slice."""
        return cls(tuple(Slice(chosen, start, stop) for chosen, start, stop, _ in runs(adapters, lengths)))

    def part(self, start: int, stop: int) -> Routing:
        """The same decision for tokens `start:stop` of its pack, as slices of a pack of these tokens alone."""
        slices = []
        for piece in self.slices:
            first, after = max(piece.start, start), min(piece.stop, stop)
            if first < after:
                weights_TE = piece.weights_TE
                if weights_TE is not None:
                    weights_TE = weights_TE[first - piece.start : after - piece.start]
                slices.append(Slice(piece.adapters, first - start, after - start, weights_TE))
        return Routing(tuple(slices))

    def only(self, chosen_K: Tensor) -> Routing:
        """The same decision for some tokens of its pack, in rising order, as slices of a pack of these alone."""
        slices = []
        for piece in self.slices:
            first, after = torch.searchsorted(chosen_K, torch.tensor([piece.start, piece.stop])).tolist()
            if first < after:
                weights_TE = piece.weights_TE
                if weights_TE is not None:
                    weights_TE = weights_TE[(chosen_K[first:after] - piece.start).to(weights_TE.device)]
                slices.append(Slice(piece.adapters, first, after, weights_TE))
        return Routing(tuple(slices))


K = TypeVar("K")


def runs(keys: Sequence[K], lengths: Sequence[int]) -> Iterator[tuple[K, int, int, slice]]:
    """Neighbouring samples of equal key: the key, their tokens' start and stop, and which samples they are."""
    start = first = 0
    for key, group in groupby(keys):
        after = first + len(list(group))
        stop = start + sum(lengths[first:after])
        yield key, start, stop, slice(first, after)
        start, first = stop, after


class Router(Protocol):
    """Decides adapters; an `nn.Module`, called once per forward. `config_type` is a dataclass; a recipe's
    `router.options` are read into it, and the plugin is built as `Plugin(adapters, config, width)` with the names of
    the adapters there are and the backbone's width D. Text alone runs on the bare backbone, unless an option of the
    router names an adapter for it."""

    config_type: ClassVar[type]

    def order(self, modalities: frozenset[str]) -> str:
        """The key by which samples are ordered in a pack. Raises RoutingError for a set without a rule."""
        ...

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        """Every adapter a sample with these modalities can run with."""
        ...

    def learns(self, modalities: frozenset[str]) -> bool:
        """Whether such a sample runs through the router's own parameters."""
        ...

    def __call__(self, pack: Pack, embeds_TD: Tensor) -> Routing: ...


@dataclass(frozen=True)
class Flow:
    """What the layers need to know about the pack in flight. Immutable: recomputation restores the same object.
    `lengths` are the query tokens of each sample; the adapters come with `routing` (None: bare backbone). `ends` are
    the lengths of the samples themselves where only a part of each is in the pack: all tokens that are known of it,
    those of other forwards too. None: every sample is there from its first token to its last."""

    lengths: tuple[int, ...]
    routing: Routing | None = None
    ends: tuple[int, ...] | None = None


_flow: ContextVar[Flow | None] = ContextVar("molora_flow", default=None)


def current_flow() -> Flow | None:
    return _flow.get()


@contextmanager
def flowing(flow: Flow | None) -> Iterator[None]:
    """Makes `flow` what the layers see inside the block."""
    token = _flow.set(flow)
    try:
        yield
    finally:
        _flow.reset(token)
