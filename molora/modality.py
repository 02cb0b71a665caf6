"""The contract of a modality: what a plugin implements and what an encoder promises.

Letters: S frames, C encoder width, I items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class MediaError(ValueError):
    """A content part that cannot be decoded or used; the message says which part, why, and what to do."""


@dataclass(frozen=True)
class Prepared:
    """One item, decoded and ready for its encoder. `num_tokens` is exact: the number of backbone positions the prompt
    reserves for this item, known without weights."""

    tensors: dict[str, Tensor]
    num_tokens: int


@dataclass(frozen=True)
class Frames:
    """Encoder output of several items, packed along one axis: item i owns `lengths[i]` consecutive rows."""

    frames_SC: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """Where pretrained encoder weights came from, precisely enough to fetch the same bytes again."""

    source: str
    revision: str


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Options that say where pretrained weights come from: a hub id (`name`, at a `revision`) or a local `path`.
    Whoever opens a modality folder finds them among its options: a `path` is refused, and what is fetched from the hub
    has to be named by its commit."""

    name: str | None = None
    path: str | None = None
    revision: str | None = None
    pretrained: bool = True

    @property
    def fetches(self) -> bool:
        """Whether building the encoder reads files of the hub."""
        return self.path is None and self.name is not None


class Encoder(nn.Module):
    """Items of one modality to packed frames. An encoder is batch-invariant: an item's frames do not depend on the
    other items of the call, so it uses no batch statistics in training. `width` is C. `origin` is set only when the
    weights are pretrained and can be fetched again by revision."""

    width: int
    origin: Origin | None = None

    def forward(self, **collated: Tensor) -> Frames:
        """Takes what `Modality.collate` returned, moved to the encoder's device."""
        raise NotImplementedError

    def saved_config(self, with_weights: bool) -> Any:
        """The modality's config to save with this encoder; None for the one it was built from. With its weights saved
        beside it, the config should build the same modules from nothing outside itself; without them, it should name
        exactly the weights of `origin`."""
        return None


@runtime_checkable
class Modality(Protocol):
    """A kind of input that is not text. Weightless and picklable, so that data workers can hold one. `config_type` is a
    dataclass; a recipe's `options` are read into it, and the plugin is built as `Plugin(name, config)`. `part_type` is
    the content part it answers to, such as "image"."""

    config_type: ClassVar[type]
    part_type: ClassVar[str]
    name: str
    config: Any

    def load(self, part: Mapping[str, Any]) -> Any:
        """Decodes the media of a content part. Raises MediaError."""
        ...

    def prepare(self, item: Any, generator: torch.Generator | None = None) -> Prepared:
        """Turns a decoded item into tensors. `generator` drives augmentation; None means none. Raises MediaError."""
        ...

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """Joins I items into the tensors its encoder takes."""
        ...

    def build_encoder(self) -> Encoder:
        """Makes the encoder, with pretrained weights if the config names some. Under `torch.device("meta")` it makes
        the same modules, and fetches and reads no weights."""
        ...

    def projector(self, modalities: frozenset[str], /) -> str:
        """Names the projector for an item of a sample that has these modalities (its own included)."""
        ...

    def projectors(self) -> tuple[str, ...]:
        """Every name `projector` can return."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """A few content parts that `load` takes, the same every time, of different sizes, without files or network.
        With them `molora modality check` and `molora verify` can try the plugin."""
        ...


@runtime_checkable
class HasBlank(Protocol):
    """What a modality may have besides: items that say nothing, for baselines (`media: blank` of an evaluation)."""

    def blank(self, item: Any) -> Any:
        """An item of the same size, and so of as many tokens, that says nothing: a grey picture, silence."""
        ...
