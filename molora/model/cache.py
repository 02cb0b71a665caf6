"""Keys and values of running samples, one segment per sample and layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import Cache

from molora.model.attention import Segments
from molora.routing import current_flow

# Tokens that a growing segment has room for, at the least.
_LEAST_ROOM = 32


class _Segment:
    """A (1, G, K, d) tensor that grows along K; its buffer has room to spare, so that appending stays cheap."""

    def __init__(self, start: Tensor) -> None:
        self.buffer = start.clone()
        self.length = start.shape[2]

    def append(self, new: Tensor) -> None:
        length = self.length + new.shape[2]
        if length > self.buffer.shape[2]:
            batch, heads, _, width = self.buffer.shape
            room = max(_LEAST_ROOM, length // 4)  # doubling would hold a long prompt twice
            grown = self.buffer.new_empty(batch, heads, length + room, width)
            grown[:, :, : self.length] = self.buffer[:, :, : self.length]
            self.buffer = grown
        self.buffer[:, :, self.length : length] = new
        self.length = length

    def view(self) -> Tensor:
        return self.buffer[:, :, : self.length]


class PackedCache(Cache):
    """A key/value cache whose samples have their own lengths and come and go while the others run. Stock caches hold a
    padded batch and so cannot hold a packed prefill. Every key is kept; windows are applied where attention reads
    them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._segments: dict[tuple[str, int], list[_Segment]] = {}  # of keys and of values, by layer

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Segments, Segments]:
        """Appends each sample's new keys and values (1, G, T, d) and returns all of them, segment by segment."""
        flow = current_flow()
        if flow is None:
            raise RuntimeError("PackedCache was used outside a molora forward: the pack's sample lengths are unknown")
        keys = self._extend(("keys", layer_idx), key_states.split(flow.lengths, dim=2))
        return keys, self._extend(("values", layer_idx), value_states.split(flow.lengths, dim=2))

    def _extend(self, which: tuple[str, int], new: Sequence[Tensor]) -> Segments:
        segments = self._segments.setdefault(which, [])
        if not segments:
            segments.extend(_Segment(tensor) for tensor in new)
        else:
            for segment, tensor in zip(segments, new, strict=True):
                segment.append(tensor)
        return Segments(segment.view() for segment in segments)

    def select(self, samples: Sequence[int]) -> None:
        """Keeps only these samples, in this order."""
        for which, segments in self._segments.items():
            self._segments[which] = [segments[sample] for sample in samples]

    def split(self) -> list[PackedCache]:
        """One cache for each sample, which goes on with the same keys and values."""
        caches = [PackedCache() for _ in next(iter(self._segments.values()), ())]
        for sample, cache in enumerate(caches):
            cache._segments = {which: [segments[sample]] for which, segments in self._segments.items()}
        return caches

    def join(self, other: PackedCache) -> None:
        """Appends the samples of another cache after this one's."""
        for which, segments in other._segments.items():
            self._segments.setdefault(which, []).extend(segments)

    def tensors(self) -> Iterator[Tensor]:
        """Every buffer, with its room for tokens to come."""
        return (segment.buffer for segments in self._segments.values() for segment in segments)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise RuntimeError("a packed cache has one length per sample; positions must be passed explicitly")
