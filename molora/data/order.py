"""An order of samples that is a pure function of seed and position. As it needs no state, training resumes anywhere and
any rank or worker can compute its share."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from molora.data.mixture import Mixture, Weight
from molora.seeding import seed_of


@dataclass(frozen=True)
class Blocks:
    """Rows that are read together: where each block of consecutive rows ends, and how many blocks are mixed with each
    other. Where whole files have to be fetched, `file_ends` is where their rows end: no block lies in two of them, and
    the rows of a file come together."""

    ends: np.ndarray
    per_window: int
    file_ends: np.ndarray | None = None


def even_blocks(num_rows: int, rows_per_block: int, per_window: int) -> Blocks:
    """Blocks of the same number of rows, the last one smaller."""
    ends = np.arange(rows_per_block, num_rows + rows_per_block, rows_per_block)
    return Blocks(np.minimum(ends, num_rows), per_window)


class Order:
    """Which row of which source is sample number k: sources by weight, each shuffled anew in every epoch.

    A source with `blocks` is shuffled by blocks, so that what is read lies together: blocks come in a new order in
    every epoch, and the rows of a window of blocks are mixed. `will_read` is called with a source and the ranges of
    rows of each window that the order enters, and with the rows of the file behind them if files have to be fetched.
    `max_epochs` of a source bounds its samples. With `one_source` all
    samples of a step are of one source.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[Weight],
        seed: int,
        *,
        samples_per_step: int = 1,
        max_epochs: Sequence[int | None] = (),
        blocks: Sequence[Blocks | None] = (),
        one_source: bool = False,
        will_read: Callable[[int, list[range], range | None], None] | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.samples_per_draw = samples_per_step if one_source else 1
        most = [
            None if epochs is None else epochs * length // self.samples_per_draw
            for epochs, length in zip(max_epochs or [None] * len(lengths), lengths, strict=True)
        ]
        self.mixture = Mixture(weights, seed, most=most, draws_per_step=samples_per_step // self.samples_per_draw)
        self._shuffles: list[_Shuffle] = [
            _ShuffledRows(length, (seed, "rows", source))
            if of_source is None
            else _ShuffledBlocks(of_source, (seed, "blocks", source), will_read and partial(will_read, source))
            for source, (length, of_source) in enumerate(
                zip(lengths, blocks or [None] * len(self.lengths), strict=True)
            )
        ]

    def __getitem__(self, k: int) -> tuple[int, int, int]:
        """Sample number k as (source, row, epoch of that source). Raises IndexError behind the last sample."""
        draw, place = divmod(k, self.samples_per_draw)
        source, number = self.mixture[draw]
        epoch, position = divmod(number * self.samples_per_draw + place, self.lengths[source])
        return source, self._shuffles[source].row(epoch, position), epoch

    def dealt(self, step: int, samples_per_step: int, rank: int, ranks: int) -> list[int]:
        """The numbers of a step's samples that a rank takes. Each source's are dealt in turn: how long they are is not
        known yet, and those of one source are more alike."""
        samples = range(step * samples_per_step, (step + 1) * samples_per_step)
        by_source = sorted(samples, key=lambda k: self.mixture[k // self.samples_per_draw][0])
        return sorted(by_source[rank::ranks])

    def num_samples(self, wanted: int) -> int:
        """How many of the first `wanted` samples there are: all, unless every source is used up before."""
        draws = self.mixture.num_draws(-(-wanted // self.samples_per_draw))
        return min(wanted, draws * self.samples_per_draw)

    def counts(self, wanted: int) -> list[int]:
        """How many of the first `wanted` samples are of each source."""
        draws = self.mixture.counts(-(-wanted // self.samples_per_draw))
        return [count * self.samples_per_draw for count in draws]


class _Shuffle(Protocol):
    def row(self, epoch: int, position: int) -> int: ...


class _ShuffledRows:
    """All rows of an epoch, shuffled by one table."""

    def __init__(self, num_rows: int, key: tuple[int, str, int]) -> None:
        self.num_rows = num_rows
        self.key = key
        self._epoch = -1
        self._table = torch.empty(0, dtype=torch.long)

    def row(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._table = _permutation(self.num_rows, (*self.key, epoch))
            self._epoch = epoch
        return int(self._table[position])


class _ShuffledBlocks:
    """The blocks of an epoch in a shuffled order, and the rows of each window of them shuffled. Its tables have an
    entry for every block and for every row of one window."""

    def __init__(
        self,
        blocks: Blocks,
        key: tuple[int, str, int],
        will_read: Callable[[list[range], range | None], None] | None,
    ) -> None:
        self.starts = np.concatenate([[0], blocks.ends[:-1]])
        self.lengths = np.diff(blocks.ends, prepend=0)
        self.per_window = blocks.per_window
        self.file_ends = blocks.file_ends
        self.key = key
        self.will_read = will_read
        self._epoch = -1
        self._first = self._last = 0  # the positions of the window
        self._rows: list[int] = []

    def row(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._plan(epoch)
        if not self._first <= position < self._last:
            self._enter(bisect_right(self._window_ends, position))
        return self._rows[position - self._first]

    def _plan(self, epoch: int) -> None:
        """The blocks in the order of an epoch, the first block of each window, and the position where it ends. A window
        ends where a file does."""
        order = _permutation(len(self.lengths), (*self.key, epoch)).numpy()
        places = np.arange(len(order))
        begins = 0
        if self.file_ends is not None:
            of_block = np.searchsorted(self.file_ends, self.starts[order], side="right")
            files = np.argsort(self._files(epoch))[of_block]
            by_file = np.argsort(files, kind="stable")
            order, files = order[by_file], files[by_file]
            begins = np.searchsorted(files, files)
        self._order = order
        self._window_starts = np.append(np.flatnonzero((places - begins) % self.per_window == 0), len(order))
        self._window_ends = np.cumsum(self.lengths[order])[self._window_starts[1:] - 1].tolist()
        self._epoch, self._first, self._last = epoch, 0, 0

    def _files(self, epoch: int) -> np.ndarray:
        """The files in the order of an epoch."""
        assert self.file_ends is not None
        return _permutation(len(self.file_ends), (*self.key, epoch, "files")).numpy()

    def _enter(self, window: int) -> None:
        blocks = self._order[self._window_starts[window] : self._window_starts[window + 1]]
        places = zip(self.starts[blocks].tolist(), self.lengths[blocks].tolist(), strict=True)
        ranges = [range(start, start + length) for start, length in places]
        rows = np.concatenate([np.arange(each.start, each.stop) for each in ranges])
        self._rows = rows[_permutation(len(rows), (*self.key, self._epoch, "window", window)).numpy()].tolist()
        self._first = self._window_ends[window - 1] if window else 0
        self._last = self._first + len(rows)
        if self.will_read is not None:
            self.will_read(sorted(ranges, key=lambda each: each.start), self._behind(ranges[-1].start))

    def _behind(self, row: int) -> range | None:
        """The rows of the file that comes after the one with a row; None if no files are fetched."""
        if self.file_ends is None:
            return None
        files = self._files(self._epoch)
        (at,) = np.flatnonzero(files == np.searchsorted(self.file_ends, row, side="right")).tolist()
        file = int(files[at + 1] if at + 1 < len(files) else self._files(self._epoch + 1)[0])
        return range(int(self.file_ends[file - 1]) if file else 0, int(self.file_ends[file]))


def _permutation(size: int, key: tuple[int | str, ...]) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(*key)))
