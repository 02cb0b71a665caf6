"""Pivotal tokens: those of a solution at which the probability that it ends right changes.

The probability behind a prefix is the share of right ones among solutions that are drawn from there. A stretch of
tokens is cut in two as long as the probabilities at its ends differ. Draws go on until an interval decides, and what is
found is drawn anew, so that a token is not found because its draws were lucky.

Source: Phi-4's technical report (arXiv 2412.08905, section 4.3), which draws a fixed number.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

from molora.config import ConfigError, require

# By how much the number of draws grows from look to look.
_GROWTH = 1.25
# Standard deviations of the half width of an interval that only has to show where to look.
_ROUGH = 2.0


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """A token is pivotal if the probability moves by `threshold` at it. Draws behind a prefix grow from `fewest` to
    `most` until an interval of the difference, of `confidence`, decides. A stretch of more than `stretch` tokens is cut
    in any case, as what moves in it there and back is not seen at its ends. Questions whose share of right answers is
    not from `lowest` to `highest` are not searched."""

    threshold: float = 0.2
    confidence: float = 0.975
    fewest: int = 16
    most: int = 160
    stretch: int = 32
    lowest: float = 0.2
    highest: float = 0.8

    def __post_init__(self) -> None:
        require(self, 2, "fewest")
        require(self, 1, "stretch")
        if self.most < self.fewest:
            raise ConfigError(f"most is {self.most}; give {self.fewest} or more, which are drawn in any case")
        if not 0 < self.threshold < 1:
            raise ConfigError(f"threshold is {self.threshold:g}; give a share above 0 and below 1")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence:g}; give a share from 0.5 to below 1")
        if not 0 <= self.lowest < self.highest <= 1:
            raise ConfigError(f"lowest is {self.lowest:g} and highest {self.highest:g}; give shares in this order")

    def looks(self, most: int | None = None) -> list[int]:
        """How many draws there are each time an interval is looked at."""
        most = min(most or self.most, self.most)
        counts = [min(self.fewest, most)]
        while counts[-1] < most:
            counts.append(min(math.ceil(_GROWTH * counts[-1]), most))
        return counts

    @property
    def deviations(self) -> float:
        """Standard deviations of an interval's half width."""
        return NormalDist().inv_cdf((1 + self.confidence) / 2)


@dataclass
class Prefix:
    """The first `length` tokens of a solution, and what was drawn from there: of each draw its first token and whether
    it ended right. At the end of the solution nothing is drawn, as `known` says how it ended."""

    length: int
    known: bool | None = None
    draws: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def right(self) -> int:
        return sum(right for _, right in self.draws)

    @property
    def share(self) -> float:
        if self.known is not None:
            return float(self.known)
        return self.right / len(self.draws) if self.draws else math.nan

    def interval(self, deviations: float) -> tuple[float, float]:
        """Where the probability lies: Wilson's score interval."""
        if self.known is not None:
            return self.share, self.share
        count, squared = len(self.draws), deviations**2
        middle = (self.right + squared / 2) / (count + squared)
        half = deviations / (count + squared) * math.sqrt(count * self.share * (1 - self.share) + squared / 4)
        return max(0.0, middle - half), min(1.0, middle + half)


def difference(before: Prefix, after: Prefix, deviations: float) -> tuple[float, float]:
    """Where the difference of two probabilities lies. Source: Newcombe (1998), method 10, of two score intervals."""
    (low, high), (other_low, other_high) = before.interval(deviations), after.interval(deviations)
    moved = after.share - before.share
    down = math.hypot(after.share - other_low, high - before.share)
    up = math.hypot(other_high - after.share, before.share - low)
    return moved - down, moved + up


class Pivot(NamedTuple):
    """Token number `place` of a solution, and draws before and behind it that did not find it."""

    place: int
    before: Prefix
    after: Prefix


# What a search waits for: prefixes, each with how many draws it is to have; and what the search finds in the end.
Wanted = list[tuple[Prefix, int]]
Found = dict[int, Prefix]


def differ(
    before: Prefix, after: Prefix, config: SearchConfig, *, least: float = 0.0, rough: int | None = None
) -> Generator[Wanted, None, bool]:
    """Whether the probability moves by more than `least` between two prefixes: draws until the interval decides, or
    until the last look, which goes by the estimate. A `rough` answer takes so many draws at most and looks at narrower
    intervals."""
    deviations = config.deviations if rough is None else _ROUGH
    for count in config.looks(rough):
        lacking = [(each, count) for each in (before, after) if each.known is None and len(each.draws) < count]
        if lacking:
            yield lacking
        low, high = difference(before, after, deviations)
        if low > least or high < -least:
            return True
        if max(-low, high) < config.threshold:
            return False
    return abs(after.share - before.share) >= config.threshold


def search(
    num_tokens: int, start: Prefix, ends_right: bool, config: SearchConfig
) -> Generator[Wanted, None, tuple[list[Pivot], Found]]:
    """Finds the pivotal tokens of a solution of `num_tokens`, whose `start` has no token. Yields what it wants to be
    drawn, and goes on when that is there. Returns the pivots in their order, and all prefixes that were looked at.

    Few draws show roughly where the probability moves. What they find is confirmed, and between two tokens that are
    found the probability is the same at both ends for sure, or is looked at again with twice as many draws."""
    prefixes: Found = {0: start, num_tokens: Prefix(num_tokens, known=ends_right)}
    pivots: dict[int, Pivot] = {}
    parts = math.ceil(num_tokens / config.stretch)
    cuts = [num_tokens * part // parts for part in range(parts + 1)]
    for cut in cuts[1:-1]:
        prefixes[cut] = Prefix(cut)
    half = config.threshold / 2
    unsure = [(first, last, config.fewest) for first, last in pairwise(cuts)]
    while unsure:
        first, last, draws = unsure.pop(0)
        found = []
        for token in (yield from _roughly(first, last, prefixes, config, draws)):
            if pivot := (yield from _confirmed(prefixes[token], prefixes[token + 1], config)):
                pivots[token] = pivot
                prefixes[token], prefixes[token + 1] = pivot.before, pivot.after
                found.append(token)
        ends = [first, *(end for token in found for end in (token, token + 1)), last]
        for one, other in zip(ends[::2], ends[1::2], strict=True):
            moves = one < other and (yield from differ(prefixes[one], prefixes[other], config, least=half))
            if moves and draws < config.most:
                unsure.append((one, other, min(2 * draws, config.most)))
    return [pivots[token] for token in sorted(pivots)], prefixes


def _roughly(
    first: int, last: int, prefixes: Found, config: SearchConfig, draws: int
) -> Generator[Wanted, None, list[int]]:
    """The tokens of a stretch at which the probability seems to move."""
    tokens = []
    stretches = [(first, last)]
    while stretches:
        first, last = stretches.pop()
        if not (yield from differ(prefixes[first], prefixes[last], config, rough=draws)):
            continue
        if last == first + 1:
            tokens.append(first)
            continue
        middle = (first + last) // 2
        prefixes.setdefault(middle, Prefix(middle))
        stretches += [(middle, last), (first, middle)]
    return tokens


def _confirmed(before: Prefix, after: Prefix, config: SearchConfig) -> Generator[Wanted, None, Pivot | None]:
    """The token between two prefixes, if draws that did not find it say so too: it moves the probability in the same
    direction, by the threshold as far as they tell, and by half of it for sure."""
    anew = [each if each.known is not None else Prefix(each.length) for each in (before, after)]
    surely = yield from differ(anew[0], anew[1], config, least=config.threshold / 2)
    moved, again = after.share - before.share, anew[1].share - anew[0].share
    return Pivot(before.length, *anew) if surely and abs(again) >= config.threshold and moved * again > 0 else None
