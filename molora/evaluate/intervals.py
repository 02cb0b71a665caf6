"""How sure a number of a metric is: intervals by bootstrap over the questions, and differences of two models.

Questions about the same picture, sound or other medium are drawn together, since their answers are not independent.

Letters: Q questions, G groups of questions, B resamples.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 (percentiles) and 8.3 (groups).
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from molora.data.messages import media_parts
from molora.evaluate.metrics import Judged, Metric, Weighted

RESAMPLES = 1000
LEVEL = 0.95
# How many weights of questions are in memory at once.
_MAX_WEIGHTS = 2**22

Group = Callable[[Judged], Hashable]


class Interval(NamedTuple):
    """The ends of an interval, by default of 95 %."""

    low: float
    high: float


class Difference(NamedTuple):
    """By how much a number is above another, with the ends of the interval of the difference, by default of 95 %."""

    value: float
    low: float
    high: float


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
    number are left out of its interval. Questions of fewer than two groups have no interval."""
    found = _resampled(metric, [judged], group, resamples, seed)
    return {name: Interval(*_ends(values_B[1:], level)) for name, (values_B,) in found.items()}


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
    found = {
        name: one_B - two_B
        for name, (one_B, two_B) in _resampled(metric, [judged, other], group, resamples, seed).items()
    }
    return {name: Difference(float(above_B[0]), *_ends(above_B[1:], level)) for name, above_B in found.items()}


def _ends(values_B: np.ndarray, level: float) -> list[float]:
    return np.nanquantile(values_B, [(1 - level) / 2, (1 + level) / 2]).tolist()


def _resampled(
    metric: Metric, sides: Sequence[Sequence[Judged]], group: Group, resamples: int, seed: int
) -> dict[str, list[np.ndarray]]:
    """The numbers that all sides have, by name: for every side those over all questions, and then those over the same
    draws of the questions."""
    numbers: dict[Hashable, int] = {}
    group_Q = np.array([numbers.setdefault(group(item), len(numbers)) for item in sides[0]])
    if len(numbers) < 2:
        return {}
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
    return {name: each for name, each in found.items() if not any(np.isnan(values_B[0]) for values_B in each)}


def _weights(draw: np.random.Generator, number: int, groups: int) -> np.ndarray:
    """How often each group is drawn, (B, G)."""
    drawn_BG = draw.integers(0, groups, (number, groups)) + groups * np.arange(number)[:, None]
    return np.bincount(drawn_BG.ravel(), minlength=number * groups).reshape(number, groups).astype(float)


def _measure(metric: Metric, judged: Sequence[Judged]) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """What makes a metric's numbers of weights (B, Q): at once, or for a metric that cannot weigh questions, by scoring
    each resample."""
    if isinstance(metric, Weighted):
        return metric.weighted(judged)
    names = list(metric.score(judged))

    def scored(weights_BQ: np.ndarray) -> dict[str, np.ndarray]:
        found = []
        for weights_Q in weights_BQ:
            drawn = [item for item, times in zip(judged, weights_Q, strict=True) for _ in range(int(times))]
            found.append(metric.score(drawn))
        return {name: np.array([each.get(name, np.nan) for each in found]) for name in names}

    return scored
