"""Routing: which adapter each token of a pack runs with, and how that reaches the layers.

Letters: T tokens in a pack, D backbone width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from molora.pack import Pack


class RoutingError(ValueError):
    """A set of modalities without a rule, or a rule that names an unknown adapter."""


class Slice(NamedTuple):
    """Tokens `start:stop` of a pack run with `adapter`; None is the bare backbone."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True)
class Routing:
    """One decision for one pack: slices in order that cover every token once."""

    slices: tuple[Slice, ...]

    @classmethod
    def by_sample(cls, adapters: tuple[str | None, ...], lengths: tuple[int, ...]) -> Routing:
        """Hard routing at sample scope; neighbours with the same adapter share a slice."""
        slices: list[Slice] = []
        start = 0
        for adapter, length in zip(adapters, lengths, strict=True):
            if slices and slices[-1].adapter == adapter:
                slices[-1] = Slice(adapter, slices[-1].start, start + length)
            else:
                slices.append(Slice(adapter, start, start + length))
            start += length
        return cls(tuple(slices))


class Router(Protocol):
    """Decides adapters; an `nn.Module`, called once per forward.

    `config_type` is a dataclass; a recipe's `router.options` are read into it, and the plugin is built as
    `Plugin(adapters, config)` with the names of the adapters there are.
    """

    config_type: ClassVar[type]

    def order(self, modalities: frozenset[str]) -> str:
        """The key by which samples are ordered in a pack. Raises RoutingError for a set without a rule."""
        ...

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        """Every adapter a sample with these modalities can run with."""
        ...

    def __call__(self, pack: Pack, embeds_TD: Tensor) -> Routing: ...


@dataclass(frozen=True)
class Flow:
    """What the layers need to know about the pack in flight. Immutable: recomputation restores the same object.

    `lengths` are the query tokens of each sample; `adapter slices` come with `routing` (None: bare backbone).
    """

    lengths: tuple[int, ...]
    routing: Routing | None = None


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
