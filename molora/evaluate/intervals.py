"""How sure a number of a metric is: intervals by bootstrap over the questions, and differences of two models.

Questions about the same picture, sound or other medium are drawn together, since their answers are not independent.

Where all answers are alike every resample gives one number, which says nothing. A share of the questions that is 0 or 1
then has the score interval of a proportion, and other numbers have none.

Letters: Q questions, G groups of questions, B resamples.
Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentiles) and 8.3 (groups);
Wilson, JASA 22 (1927), 209-212; of pairs Tango, Statistics in Medicine 17 (1998), 891-908.
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from molora.data.messages import media_parts
from molora.evaluate.metrics import Judged, Metric, Weighted, numbers_of

RESAMPLES = 1000
LEVEL = 0.95
# Resamples that differ by less give one number.
_ALIKE = 1e-9
# How many weights of questions are in memory at once.
_MAX_WEIGHTS = 2**22

Group = Callable[[Judged], Hashable]


class Interval(NamedTuple):
    """The ends of an interval, by default of 95 %."""

    low: float
    high: float


class Difference(NamedTuple):
    """By how much a number is above another, with the ends of the interval of the difference, by default of 95 %; None
    where it has none."""

    value: float
    low: float | None
    high: float | None


def medium_of(item: Judged) -> Hashable:
    """What questions about the same media share: the files or addresses of the media, or their content. A question
    without media shares nothing."""
    return tuple(_identity(part) for _, part in media_parts(item.messages)) or item.id


def _identity(part: Mapping[str, Any]) -> Hashable:
    place = part.get("path") or part.get("url")
    if isinstance(place, str) and "bytes" not in part:  # beside bytes it names a place in an archive
        return place
    return tuple((key, _digest(value)) for key, value in sorted(part.items()))


def _digest(value: Any) -> str:
    if isinstance(value, Mapping):  # as columns of datasets hold media
        return repr([(key, _digest(value[key])) for key in sorted(value)])
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    return repr(value) if content is None else hashlib.sha256(content).hexdigest()


def interval(
    metric: Metric,
    judged: Sequence[Judged],
    *,
    group: Group = medium_of,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Interval]:
    """The interval of each number of a metric over answered questions. Resamples in which nothing can be counted for a
    number are left out of its interval. A number that all resamples agree on has none, unless it is a share of the
    questions, and questions of fewer than two groups have none."""
    found, groups = _resampled(metric, [judged], group, resamples, seed)
    shares = {getattr(metric, "share", None): groups}
    ends = {name: _ends(values_B, level, shares.get(name), least=0.0) for name, (values_B,) in found.items()}
    return {name: Interval(*each) for name, each in ends.items() if each is not None}


def paired(
    metric: Metric,
    judged: Sequence[Judged],
    other: Sequence[Judged],
    *,
    group: Group = medium_of,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Difference]:
    """By how much each number of a metric is above that of other answers to the same questions. Both are resampled
    together, so that what is hard for both does not count. Raises ValueError for other questions."""
    others = {item.id: item for item in other}
    if single := {item.id for item in judged} ^ others.keys():
        raise ValueError(
            f"{len(single)} questions are answered on one side alone, such as {min(single)}; compare answers to the "
            "same questions"
        )
    other = [others[item.id] for item in judged]
    found, groups = _resampled(metric, [judged, other], group, resamples, seed)
    shares = {getattr(metric, "share", None): groups}
    differences = {}
    for name, (one_B, two_B) in found.items():
        ends = _ends(one_B - two_B, level, shares.get(name), least=-1.0)
        differences[name] = Difference(float(one_B[0] - two_B[0]), *(ends or (None, None)))
    return differences


def _ends(values_B: np.ndarray, level: float, groups: int | None, least: float) -> tuple[float, float] | None:
    """The interval of a number of which the first value is that over all questions, and the others are of resamples.
    Where these are alike, that of a share among so many `groups`, which is at `least` 0, or -1 for a difference."""
    value, drawn_B = float(values_B[0]), values_B[1:]
    low, high = np.nanquantile(drawn_B, [(1 - level) / 2, (1 + level) / 2]).tolist()
    if np.nanmax(drawn_B) - np.nanmin(drawn_B) > _ALIKE * max(1.0, abs(value)):
        return low, high
    if groups is None or value not in (-1, 0, 1):
        return None
    squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    reach = squared / (groups + squared) * (1 + abs(value) if least < 0 else 1)
    return max(least, value - reach), min(1.0, value + reach)


def _resampled(
    metric: Metric, sides: Sequence[Sequence[Judged]], group: Group, resamples: int, seed: int
) -> tuple[dict[str, list[np.ndarray]], int]:
    """The numbers that all sides have, by name: for every side those over all questions, and then those over the same
    draws of the questions. And how many groups of questions there are."""
    numbers: dict[Hashable, int] = {}
    group_Q = np.array([numbers.setdefault(group(item), len(numbers)) for item in sides[0]])
    if len(numbers) < 2:
        return {}, len(numbers)
    measures = [_measure(metric, side) for side in sides]
    draw = np.random.default_rng(seed)
    rows = max(1, _MAX_WEIGHTS // len(group_Q))
    chunks = [[measure(np.ones((1, len(group_Q)))) for measure in measures]]
    for start in range(0, resamples, rows):
        weights_BQ = _weights(draw, min(rows, resamples - start), len(numbers))[:, group_Q]
        chunks.append([measure(weights_BQ) for measure in measures])
    found = {
        name: [np.concatenate([chunk[side][name] for chunk in chunks]) for side in range(len(sides))]
        for name in chunks[0][0]
        if all(name in measured for measured in chunks[0])
    }
    found = {name: each for name, each in found.items() if not any(np.isnan(values_B[0]) for values_B in each)}
    return found, len(numbers)


def _weights(draw: np.random.Generator, number: int, groups: int) -> np.ndarray:
    """How often each group is drawn, (B, G)."""
    drawn_BG = draw.integers(0, groups, (number, groups)) + groups * np.arange(number)[:, None]
    return np.bincount(drawn_BG.ravel(), minlength=number * groups).reshape(number, groups).astype(float)


def _measure(metric: Metric, judged: Sequence[Judged]) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """What makes a metric's numbers of weights (B, Q): at once, or for a metric that cannot weigh questions, by scoring
    each resample."""
    if isinstance(metric, Weighted):
        return metric.weighted(judged)
    names = list(numbers_of(metric, judged))

    def scored(weights_BQ: np.ndarray) -> dict[str, np.ndarray]:
        found = []
        for weights_Q in weights_BQ:
            drawn = [item for item, times in zip(judged, weights_Q, strict=True) for _ in range(int(times))]
            found.append(numbers_of(metric, drawn))
        return {name: np.array([each.get(name, np.nan) for each in found]) for name in names}

    return scored
