"""Intervals of scores by bootstrap over questions, and of differences between two models on the same questions."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from molora.evaluate.metrics import Judged, Metric

_RESAMPLES = 1000
_LEVEL = 0.95


class Interval(NamedTuple):
    """The ends of a 95 % interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """By how much one is above another, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def interval(metric: Metric, judged: Sequence[Judged]) -> dict[str, Interval]:
    return {name: _ends(each[None, :])[0] for name, each in _each(metric, judged).items()}


def paired(metric: Metric, judged: Sequence[Judged], other: Sequence[Judged]) -> dict[str, Difference]:
    one, two = _each(metric, judged), _each(metric, other)
    return {
        name: Difference(float((one[name] - two[name]).mean()), *_ends((one[name] - two[name])[None, :])[0])
        for name in one
    }


def _each(metric: Metric, judged: Sequence[Judged]) -> Mapping[str, np.ndarray]:
    if not getattr(metric, "rates_each", False):
        return {}
    rows = [metric.score([item]) for item in judged]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _ends(values_XN: np.ndarray) -> list[Interval]:
    draw = np.random.default_rng(0)
    rows, number = values_XN.shape[0], values_XN.shape[1]
    means = np.stack([values_XN[:, draw.integers(0, number, number)].mean(1) for _ in range(_RESAMPLES)])
    share = (1 - _LEVEL) / 2
    ends = np.quantile(means, [share, 1 - share], axis=0)
    return [Interval(float(ends[0, row]), float(ends[1, row])) for row in range(rows)]
