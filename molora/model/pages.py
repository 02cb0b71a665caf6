"""The page pool: keys and values of all running samples, in tensors that are allocated once.

A layer has one tensor of pages for keys and one for values. A sample holds pages for all the tokens that it may come
to have, from the moment it enters to the moment it leaves, so its memory is certain and nothing is copied in between.
Layers with a sliding window hold the last tokens only: the pages of a sample are a ring there.

A sample that goes on from another's prompt shares the pages that the prompt fills, to which neither writes again, and
has a copy of the rest. It takes no more free pages than it would alone.

Letters: P pages, B tokens in a page, N samples, T tokens in a pack, G key/value heads, d head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from molora.model.attention import Noted, Paged, PageTable, Segments


def page_tokens(device_type: str) -> int:
    """Tokens in a page on a kind of device. The CPU attends to each page in turn: shorter pages take longer, longer
    ones leave more room unused. The kernel for CUDA takes multiples of 256."""
    return 256 if device_type == "cuda" else 64


@dataclass(frozen=True)
class KeptLayer:
    """What one layer keeps of every token, or of the last `window` tokens: G keys and G values."""

    window: int | None
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        numbers = self.key_shape[0] * self.key_shape[1] + self.value_shape[0] * self.value_shape[1]
        return numbers * self.dtype.itemsize


@dataclass(frozen=True)
class KeptLayers:
    """What the layers of a backbone keep, by layer index. Sizes of a pool follow from it before there is one. A pool of
    `num_pages` has so many in every layer without a window, and no more than `num_samples` can fill in the others."""

    layers: dict[int, KeptLayer]
    page_tokens: int

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    @property
    def windows(self) -> list[int | None]:
        return sorted({layer.window for layer in self.layers.values()}, key=lambda window: window or 0)

    def pages_of_window(self, window: int | None, num_pages: int, num_samples: int) -> int:
        return num_pages if window is None else min(num_pages, num_samples * self.pages_for(window))

    def num_bytes(self, num_pages: int, num_samples: int) -> int:
        """Bytes of a pool's keys and values."""
        pages = {window: self.pages_of_window(window, num_pages, num_samples) for window in self.windows}
        return self.page_tokens * sum(each.token_bytes * pages[each.window] for each in self.layers.values())

    def pages_within(self, num_bytes: int, num_samples: int, most: int) -> int:
        """Pages of the largest pool that takes at most so many bytes, and `most` pages."""
        few, many = 0, most
        while few < many:
            middle = (few + many + 1) // 2
            if self.num_bytes(middle, num_samples) <= num_bytes:
                few = middle
            else:
                many = middle - 1
        return few


@dataclass
class SamplePages:
    """What one sample holds of a pool: its pages, by window, in the order of its tokens, and how many of its tokens
    they have."""

    pages: dict[int | None, list[int]]
    length: int = 0


class PagePool:
    """Pages for `num_samples` samples at most, zeros where no sample has written. `like` gives the device."""

    def __init__(self, kept: KeptLayers, num_pages: int, num_samples: int, like: Tensor) -> None:
        self.kept = kept
        self.num_pages = num_pages
        counts = {window: kept.pages_of_window(window, num_pages, num_samples) for window in kept.windows}
        self._free = {window: list(range(count)) for window, count in counts.items()}
        # How many samples hold each page.
        self._holders: dict[int | None, Counter[int]] = {window: Counter() for window in counts}

        def pages(layer: KeptLayer, shape: tuple[int, int]) -> Tensor:
            return like.new_zeros((counts[layer.window], kept.page_tokens, *shape), dtype=layer.dtype)

        self.keys = {index: pages(layer, layer.key_shape) for index, layer in kept.layers.items()}
        self.values = {index: pages(layer, layer.value_shape) for index, layer in kept.layers.items()}

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys.values(), *self.values.values()))

    @property
    def num_free(self) -> dict[int | None, int]:
        """Pages that no sample holds, by window."""
        return {window: len(free) for window, free in self._free.items()}

    def fits(self, num_tokens: int) -> bool:
        """Whether a sample of so many tokens could be admitted if no other were there."""
        return self.kept.pages_for(num_tokens) <= self.num_pages

    def admit(self, num_tokens: int, shared: Mapping[int | None, list[int]] | None = None) -> SamplePages | None:
        """Pages for a sample that may come to have so many tokens, or None while too few are free. The first are those
        that it shares."""
        first = {window: (shared or {}).get(window, []) for window in self._free}
        needs = {w: self.kept.pages_for(num_tokens if w is None else min(num_tokens, w)) for w in self._free}
        if any(need - len(first[window]) > len(self._free[window]) for window, need in needs.items()):
            return None
        pages = {w: [*first[w], *self._take(w, need - len(first[w]))] for w, need in needs.items()}
        for window, its in pages.items():
            self._holders[window].update(its)
        return SamplePages(pages)

    def holds(self, sample: SamplePages, length: int) -> bool:
        """Whether a sample still has all that is read of its first `length` tokens by what follows them: no ring has
        come round since."""
        return all(window is None or sample.length <= max(window, length) for window in self._free)

    def branch(self, sample: SamplePages, length: int, num_tokens: int, *, rewrites: bool) -> SamplePages | None:
        """Pages for a sample that begins with the first `length` tokens of another, which `holds` them and may come to
        have as many; or None while too few are free. Full pages are shared where neither will write to them: not in a
        ring that comes round, and not if the two rewrite what they hold (`rewrites`). All else is copied."""
        full = {
            window: 0 if rewrites or (window is not None and window < num_tokens) else length // self.kept.page_tokens
            for window in self._free
        }
        branched = self.admit(num_tokens, {window: sample.pages[window][:count] for window, count in full.items()})
        if branched is None:
            return None
        branched.length = length
        for window, count in full.items():
            start = max(count * self.kept.page_tokens, 0 if window is None else length - window)
            source, target = (self.slots(each, window, start, length) for each in (sample, branched))
            for index in self._layers(window):
                for kept_PBGd in (self.keys[index], self.values[index]):
                    flat = kept_PBGd.flatten(0, 1)
                    flat.index_copy_(0, target.to(flat.device), flat[source.to(flat.device)])
        return branched

    def slots(self, sample: SamplePages, window: int | None, start: int, stop: int) -> Tensor:
        """Token slots of a sample's positions start:stop."""
        position, size = torch.arange(start, stop), self.kept.page_tokens
        if window is not None:
            position %= window
        return torch.tensor(sample.pages[window])[position // size] * size + position % size

    def _layers(self, window: int | None) -> list[int]:
        return [index for index, layer in self.kept.layers.items() if layer.window == window]

    def _take(self, window: int | None, count: int) -> list[int]:
        """Neighbouring pages if there are enough of them, which one view can show; else the first ones."""
        free, start = self._free[window], 0
        for index, (page, following) in enumerate(pairwise([*free, -1])):
            if index + 1 - start == count:
                break
            if following != page + 1:
                start = index + 1
        else:
            start = 0
        taken = free[start : start + count]
        del free[start : start + count]
        return taken

    def release(self, held: SamplePages) -> None:
        """Takes back the pages that no other sample holds, as zeros: attention reads whole pages, and what is no number
        survives a mask."""
        for window, pages in held.pages.items():
            self._holders[window].subtract(pages)
            left = [page for page in pages if not self._holders[window][page]]
            self._free[window] = sorted([*self._free[window], *left])
            for index in self._layers(window):
                left_P = torch.tensor(left, dtype=torch.long, device=self.keys[index].device)
                self.keys[index].index_fill_(0, left_P, 0)
                self.values[index].index_fill_(0, left_P, 0)
        held.pages = {}

    def feed(self, samples: Sequence[SamplePages], lengths: Sequence[int], ends: Sequence[int]) -> Feed:
        """What a forward of the next `lengths` tokens of some samples needs, which takes them in. `ends` are the tokens
        of each sample that are known by now."""
        return Feed(self, samples, lengths, ends)


@dataclass
class _Slots:
    """Where the tokens of a forward go in layers of one window, and where those are that they attend to, as token
    slots: by a table, or sample by sample, with the new tokens in layers without a window, without them in others."""

    write_T: Tensor
    # The tokens of the pack that are written; None for all: a ring has no room for more than its window.
    written_T: Tensor | None
    table: PageTable | None = None
    read: list[Tensor | slice] = field(default_factory=list)


class Feed(Cache):
    """The cache of one forward. What all layers of one window have in common is worked out once."""

    def __init__(
        self, pool: PagePool, samples: Sequence[SamplePages], lengths: Sequence[int], ends: Sequence[int]
    ) -> None:
        super().__init__(layers=[])
        self._pool = pool
        self._page_tokens = pool.kept.page_tokens
        self._lengths = tuple(lengths)
        before = [sample.length for sample in samples]
        # Prompts that begin here attend to themselves: nothing of the pool is read.
        self._fresh = not any(before)
        decodes = not self._fresh and all(before) and set(lengths) == {1}
        self.ends = None if self._fresh and tuple(ends) == self._lengths else tuple(ends)
        self._like = next(iter(pool.keys.values()))
        self._device = self._like.device
        positions = [p for start, count in zip(before, lengths, strict=True) for p in range(start, start + count)]
        self.position_ids_T = torch.tensor(positions, device=self._device)
        self._slots = {
            window: self._decoding(window, samples) if decodes else self._entering(window, samples)
            for window in pool.kept.windows
        }
        for sample, length in zip(samples, lengths, strict=True):
            sample.length += length

    def _decoding(self, window: int | None, samples: Sequence[SamplePages]) -> _Slots:
        """One token of every sample, which then reads all that it holds."""
        writes, used = [], []
        for sample in samples:
            page, place = divmod(sample.length if window is None else sample.length % window, self._page_tokens)
            writes.append(sample.pages[window][page] * self._page_tokens + place)
            used.append(sample.length + 1 if window is None else min(sample.length + 1, window))
        table = PageTable([sample.pages[window] for sample in samples], used, self._page_tokens, self._like)
        return _Slots(torch.tensor(writes, device=self._device), None, table)

    def _entering(self, window: int | None, samples: Sequence[SamplePages]) -> _Slots:
        """Parts of prompts, which read what their samples hold and themselves."""
        writes: list[Tensor] = []
        written: list[Tensor] = []
        read: list[Tensor | slice] = []
        start = 0
        for sample, length in zip(samples, self._lengths, strict=True):
            end = sample.length + length
            first = sample.length if window is None else max(sample.length, end - window)
            writes.append(self._pool.slots(sample, window, first, end))
            written.append(torch.arange(start + first - sample.length, start + length))
            start += length
            if self._fresh:
                continue
            if window is None:
                read.append(_as_slice(self._pool.slots(sample, None, 0, end), self._device))
            else:
                seen = max(0, sample.length - window + 1)
                read.append(self._pool.slots(sample, window, seen, sample.length).to(self._device))
        all_written = sum(map(len, written)) == start
        written_T = None if all_written else torch.cat(written).to(self._device)
        return _Slots(torch.cat(writes).to(self._device), written_T, None, read)

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Writes new keys and values (1, G, T, d) and returns what attention reads."""
        window = self._pool.kept.layers[layer_idx].window
        slots = self._slots[window]
        both = (key_states, self._pool.keys[layer_idx]), (value_states, self._pool.values[layer_idx])
        # A ring is read before it is written over.
        seen = [self._seen(new, kept, slots.read) for new, kept in both] if slots.read and window is not None else []
        for new, kept_PBGd in both:
            new_TGd = new[0].transpose(0, 1)
            if slots.written_T is not None:
                new_TGd = new_TGd[slots.written_T]
            kept_PBGd.flatten(0, 1).index_copy_(0, slots.write_T, new_TGd)
        if slots.table is not None:
            return Paged(both[0][1], slots.table), Paged(both[1][1], slots.table)
        if slots.read and window is None:
            seen = [
                Segments(kept.flatten(0, 1)[places].transpose(0, 1)[None] for places in slots.read) for _, kept in both
            ]
        return (seen[0], seen[1]) if seen else (key_states, value_states)

    def _seen(self, new: Tensor, kept_PBGd: Tensor, read: Sequence[Tensor | slice]) -> Segments:
        """What a ring has of every sample, and what is new."""
        kept = kept_PBGd.flatten(0, 1)
        parts = zip(read, new.split(self._lengths, dim=2), strict=True)
        return Segments(torch.cat([kept[slots].transpose(0, 1)[None], own], dim=2) for slots, own in parts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise RuntimeError("a pack has one length per sample; positions must be passed explicitly")


def _as_slice(places: Tensor, device: torch.device) -> Tensor | slice:
    """Token slots as a slice, which reads without a copy, if they are neighbours."""
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 == len(places) and bool((places.diff() == 1).all()):
        return slice(first, last + 1)
    return places.to(device)


class Surveyor(Cache):
    """The cache of a forward of one token that finds out what the layers keep."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._seen: dict[int, tuple[Noted, Tensor]] = {}

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Noted, Tensor]:
        self._seen[layer_idx] = Noted(key_states), value_states
        return self._seen[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def kept(self) -> KeptLayers:
        """What all layers were given for the token."""
        layers, device_type = {}, "cpu"
        for index, (key, value) in self._seen.items():
            (_, heads, _, width), (_, value_heads, _, value_width) = key.states.shape, value.shape
            layers[index] = KeptLayer(key.window, (heads, width), (value_heads, value_width), value.dtype)
            device_type = value.device.type
        return KeptLayers(layers, page_tokens(device_type))
