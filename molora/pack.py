"""Sample and Pack: what the processor makes and what the model takes.

Letters: T tokens in a pack (or a sample), N samples, I items, S frames, C encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from molora.modality import Frames, Modality, Prepared


@dataclass(frozen=True)
class Item:
    """One prepared item of a sample, with the projector that its sample calls for; its frames, if they are known."""

    modality: str
    projector: str
    prepared: Prepared
    frames_SC: Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation as tensors. `modality_ids_T` is 0 on text and 1 + the modality's index in the processor on media
    positions; `targets_T` is True on tokens the model should learn to produce. Items are in reading order. Of a
    preference, `rejected` is the sample with the other answer."""

    id: str
    token_ids_T: Tensor
    modality_ids_T: Tensor
    targets_T: Tensor
    items: tuple[Item, ...] = ()
    rejected: Sample | None = None

    @classmethod
    def of_text(cls, id: str, token_ids: Sequence[int]) -> Sample:
        """Text by its token ids, none of which is a target."""
        token_ids_T = torch.tensor(token_ids, dtype=torch.long)
        return cls(id, token_ids_T, torch.zeros_like(token_ids_T), torch.zeros_like(token_ids_T, dtype=torch.bool))

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(item.modality for item in self.items)

    @property
    def num_targets(self) -> int:
        return int(self.targets_T[1:].sum())

    def __len__(self) -> int:
        return len(self.token_ids_T)

    def followed_by(self, token_ids: Sequence[int]) -> Sample:
        """The sample with text after it, such as an answer so far; none of its tokens is a target."""
        new = torch.tensor(token_ids, dtype=torch.long)
        return replace(
            self,
            token_ids_T=torch.cat([self.token_ids_T, new]),
            modality_ids_T=torch.cat([self.modality_ids_T, torch.zeros_like(new)]),
            targets_T=torch.zeros(len(self) + len(new), dtype=torch.bool),
        )


@dataclass(frozen=True)
class Media:
    """The items of one modality in a pack, in reading order: what their encoder takes, or the frames it gave before.
    `num_tokens` are what each item is said to give, `reserved` the positions that the prompts hold for all of them."""

    tensors: dict[str, Tensor]
    projectors: tuple[str, ...]
    num_tokens: tuple[int, ...]
    reserved: int
    frames: Frames | None = None

    def to(self, device: torch.device | str) -> Media:
        tensors = {key: value.to(device) for key, value in self.tensors.items()}
        frames = self.frames and replace(self.frames, frames_SC=self.frames.frames_SC.to(device))
        return replace(self, tensors=tensors, frames=frames)


@dataclass(frozen=True)
class Pack:
    """Samples concatenated along one token axis, no padding. `lengths` are tokens per sample. `gates` are what the
    router decided for each sample before, if they go on from a cache. `shared`: of each sample, one before it that
    begins with the same prompt and the tokens of that, or itself and 0; losses run such a prompt once. `targets_T`
    stays on the host."""

    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    modalities: tuple[frozenset[str], ...]
    token_ids_T: Tensor
    modality_ids_T: Tensor
    targets_T: Tensor
    media: Mapping[str, Media]
    gates: tuple[Tensor | None, ...] | None = None
    shared: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def position_ids_T(self) -> Tensor:
        """Positions restart at 0 in every sample."""
        return torch.cat([torch.arange(n, device=self.token_ids_T.device) for n in self.lengths])

    @property
    def sample_ids_T(self) -> Tensor:
        """Which sample a token belongs to, 0 … N-1."""
        lengths = torch.tensor(self.lengths, device=self.token_ids_T.device)
        return torch.repeat_interleave(torch.arange(len(self), device=lengths.device), lengths)

    def by_sample(self, values_T: Tensor) -> dict[str, Tensor]:
        """By the id of each sample, its share of values along the token axis."""
        return dict(zip(self.ids, values_T.split(self.lengths), strict=True))

    def to(self, device: torch.device | str) -> Pack:
        return replace(
            self,
            token_ids_T=self.token_ids_T.to(device),
            modality_ids_T=self.modality_ids_T.to(device),
            media={name: media.to(device) for name, media in self.media.items()},
        )


def collate(
    samples: Sequence[Sample], modalities: Mapping[str, Modality], order: Callable[[frozenset[str]], Any] | None = None
) -> Pack:
    """Concatenates samples into a pack, neighbours by `order` of their set of modalities (the router's `order`). The
    sort is stable and the ids travel along, so the caller finds each sample again by its id."""
    if not samples:
        raise ValueError("a pack needs at least one sample, got none")
    if order is not None:
        samples = sorted(samples, key=lambda sample: order(sample.modalities))
    media: dict[str, Media] = {}
    modality_ids_T = torch.cat([sample.modality_ids_T for sample in samples])
    for index, (name, modality) in enumerate(modalities.items(), start=1):
        items = [item for sample in samples for item in sample.items if item.modality == name]
        if items:
            known = [item.frames_SC for item in items if item.frames_SC is not None]
            whole = len(known) == len(items)
            media[name] = Media(
                tensors={} if whole else modality.collate([item.prepared for item in items]),
                projectors=tuple(item.projector for item in items),
                num_tokens=tuple(item.prepared.num_tokens for item in items),
                reserved=int((modality_ids_T == index).sum()),
                frames=Frames(torch.cat(known), tuple(len(frames_SC) for frames_SC in known)) if whole else None,
            )
    return Pack(
        ids=tuple(sample.id for sample in samples),
        lengths=tuple(len(sample) for sample in samples),
        modalities=tuple(sample.modalities for sample in samples),
        token_ids_T=torch.cat([sample.token_ids_T for sample in samples]),
        modality_ids_T=modality_ids_T,
        targets_T=torch.cat([sample.targets_T for sample in samples]),
        media=media,
    )
