"""Which source each sample comes from: shares that depend on seed and position alone."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from molora.config import ConfigError, require
from molora.seeding import seed_of

# A share of the samples, or what it is from given steps on: (step, share) pairs.
Weight = float | list[tuple[int, float]]

MAX_WEIGHT = 1e9


@dataclass(kw_only=True)
class MixtureConfig:
    """How a stage mixes its sources.

    `weights_of`: whether weights are shares of the samples or of the tokens. A share of tokens is divided by the mean
    length of 64 rows, spread over the source. With a `temperature` T each weight is multiplied by n^(1/T), where n is
    the number of rows: 1 mixes sources by their sizes, and a higher one more evenly. `batches`: a step has samples of
    all sources, or of one that is drawn for it.
    """

    weights_of: Literal["samples", "tokens"] = "samples"
    temperature: float | None = None
    batches: Literal["mixed", "one_source"] = "mixed"

    def __post_init__(self) -> None:
        require(self, 1, "temperature")


def check_weight(weight: Weight) -> None:
    """Raises ConfigError for a weight that means nothing."""
    if not isinstance(weight, list):
        if not 0 < weight <= MAX_WEIGHT:
            raise ConfigError(f"weight is {weight}; give a share above 0, up to {MAX_WEIGHT:g}, or take the source out")
        return
    steps = [step for step, _ in weight]
    if not steps or steps[0] != 0 or any(after <= before for before, after in pairwise(steps)):
        raise ConfigError(
            f"weight: the steps of its changes are {steps}; begin with step 0 and let them rise, such as "
            "[[0, 1.0], [1000, 0.2]]"
        )
    shares = [share for _, share in weight]
    if not all(0 <= share <= MAX_WEIGHT for share in shares) or not any(shares):
        raise ConfigError(
            f"weight: the shares are {shares}; give numbers from 0 to {MAX_WEIGHT:g}, one of them above 0"
        )


class Mixture:
    """The source of draw number d, and how many draws of that source come before it.

    `weights` are by source; those that change do so at multiples of `draws_per_step`. A source that `most` draws have
    been made of leaves the mixture. Draws come in blocks, and of those that are past only the counts are kept.
    """

    BLOCK = 4096

    def __init__(
        self, weights: Sequence[Weight], seed: int, *, most: Sequence[int | None] = (), draws_per_step: int = 1
    ) -> None:
        changes = [weight if isinstance(weight, list) else [(0, weight)] for weight in weights]
        self.starts = sorted({step * draws_per_step for change in changes for step, _ in change})
        self.shares = [
            torch.tensor(
                [change[bisect_right(change, start, key=lambda c: c[0] * draws_per_step) - 1][1] for change in changes],
                dtype=torch.float64,
            )
            for start in self.starts
        ]
        self.seed = seed
        unbounded = torch.iinfo(torch.long).max
        self.most = np.array([unbounded if bound is None else bound for bound in most] or [unbounded] * len(weights))
        self._before = [np.zeros(len(weights), dtype=np.int64)]
        self._at = -1
        self._sources: list[int] = []
        self._numbers: list[int] = []

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """The source of a draw, and the number of the draw among those of that source. Raises IndexError behind the
        last."""
        block, place = divmod(draw, self.BLOCK)
        if block != self._at:
            self._enter(block)
        if place >= len(self._sources):
            raise IndexError(f"no source has samples left at draw {draw}")
        return self._sources[place], self._numbers[place]

    def num_draws(self, wanted: int) -> int:
        """How many of the first `wanted` draws there are: all, unless no source is left before."""
        if all(bound > wanted for bound in self.most) and all(shares.any() for shares in self.shares):
            return wanted
        for block in range(-(-wanted // self.BLOCK)):
            self._enter(block)
            if len(self._sources) < self.BLOCK:
                return min(wanted, block * self.BLOCK + len(self._sources))
        return wanted

    def counts(self, wanted: int) -> list[int]:
        """How many of the first `wanted` draws are of each source."""
        block, place = divmod(wanted, self.BLOCK)
        self._enter(block)
        return (self._before[block] + np.bincount(self._drawn(block)[:place], minlength=len(self.most))).tolist()

    def _enter(self, block: int) -> None:
        while len(self._before) <= block:
            drawn = self._drawn(len(self._before) - 1)
            self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self.most)))
        sources = self._drawn(block)
        numbers = np.empty_like(sources)
        for source, before in enumerate(self._before[block]):
            places = np.flatnonzero(sources == source)
            numbers[places] = before + np.arange(len(places))
        self._at, self._sources, self._numbers = block, sources.tolist(), numbers.tolist()

    def _drawn(self, block: int) -> np.ndarray:
        """The sources of a block's draws; fewer than a block has where no source is left. What the weights are decides
        each draw, and nothing of the draws before it but which sources are used up."""
        first, place = block * self.BLOCK, 0
        sources = np.empty(self.BLOCK, dtype=np.int64)
        counts = self._before[block].copy()
        while place < self.BLOCK:
            phase = bisect_right(self.starts, first + place) - 1
            stop = self.BLOCK
            if phase + 1 < len(self.starts):
                stop = min(stop, self.starts[phase + 1] - first)
            shares = self.shares[phase] * torch.from_numpy(counts < self.most)
            if not shares.any():
                break
            generator = torch.Generator().manual_seed(seed_of(self.seed, "sources", block))
            drawn = torch.multinomial(shares, self.BLOCK, replacement=True, generator=generator).numpy()
            for source in np.flatnonzero(self.most - counts <= stop - place):
                of_source = place + np.flatnonzero(drawn[place:stop] == source)
                if len(of_source) > (left := self.most[source] - counts[source]):
                    stop = int(of_source[left])  # the first that the source has no sample for
            sources[place:stop] = drawn[place:stop]
            counts += np.bincount(drawn[place:stop], minlength=len(counts))
            place = stop
        return sources[:place]
