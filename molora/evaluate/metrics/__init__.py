"""Metrics: what turns the answers of an evaluation into numbers. The contract of all; the built-in ones lie beside it.

Letters: Q questions, K counts of a question, B resamples of the questions.

A recipe names metrics as it names other plugins: by a built-in name, by `path/to/file.py:Class`, by
`package.module:Class`, or by a name that an installed package declares in the entry-point group `molora.metrics`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import numpy as np

from molora.config import ConfigError, build
from molora.plugins import find

# A metric as a recipe names it: by its name, or by its name with its options.
Named = str | dict[str, dict[str, Any]]

# What every evaluation counts, whatever its metrics.
COUNTS = ("questions", "failed", "cut_off")


@dataclass(frozen=True)
class Judged:
    """One answered question. `cut_off` says that a limit ended the answer, `error` why there is none. `answers` are all
    that are accepted, of which `expected` is one. A multiple-choice question has its options as `choices`, and `choice`
    is the index of the right one. If a metric needs them, `likelihoods` has for each of the `choices` the natural
    logarithm of its probability as the answer, and the number of its tokens. `adapters` are those that it ran with."""

    id: str
    messages: list[dict[str, Any]]
    expected: str
    answer: str
    correct: bool
    tags: list[str] = field(default_factory=list)
    cut_off: bool = False
    error: str | None = None
    answers: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    choice: int | None = None
    likelihoods: list[tuple[float, int]] = field(default_factory=list)
    adapters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.answers:
            object.__setattr__(self, "answers", [self.expected])

    @property
    def row(self) -> int:
        """The number of its row in the source, from 0."""
        return int(self.id.partition(":")[0])


class Metric(Protocol):
    """Compares answers with the expected ones; built as `Plugin(config)`, with a recipe's options read into its
    `config_type`. Building it raises ImportError or ValueError for what the metric needs and does not find, so that
    this is told before the model answers. A class that says `needs = "likelihoods"` gets answers with `likelihoods`.
    One that says `rates_each = True` has as its first number over one question how right that answer is, from 0 to 1;
    it is also shown what the most frequent answer would get. One with a method `rate(judged)` says this of a question
    where it is dear. `parallel` threads may rate at a time. One that says `share = NAME` has as that number the mean
    over the questions of one from 0 to 1; it has an interval where all answers are right, or all wrong, too. One with a
    method `check_questions(judged)` raises ValueError there for questions that it can rate no answer to; before a
    roll-out it is shown all of them, with the expected answers."""

    config_type: type

    def score(self, judged: Sequence[Judged]) -> Mapping[str, float]:
        """Numbers by name over one or more answered questions. What nothing can be counted for is left out."""
        ...


@dataclass
class NoOptions:
    """The options of a metric that has none."""


class Weighted(ABC):
    """A metric that can count a question more than once, as a bootstrap does, without reading its answer again."""

    @abstractmethod
    def weighted(self, judged: Sequence[Judged]) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
        """Reads the answers, and returns what makes numbers by name (B,) of the weights (B, Q) of the questions. What
        nothing can be counted for is NaN."""

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        found = self.weighted(judged)(np.ones((1, len(judged))))
        return {name: float(values_B[0]) for name, values_B in found.items() if not np.isnan(values_B[0])}


class Counted(Weighted):
    """A metric that is a function of what is counted for each question and summed over the questions."""

    @abstractmethod
    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        """What is counted for each question, (Q, K)."""

    @abstractmethod
    def of_sums(self, sums_BK: np.ndarray) -> Mapping[str, np.ndarray]:
        """The numbers by name, (B,), that sums of the counts give."""

    def weighted(self, judged: Sequence[Judged]) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
        counts_QK = np.asarray(self.counts(judged), dtype=float)
        return lambda weights_BQ: self.of_sums(weights_BQ @ counts_QK)


class Mean(Counted):
    """A metric that is the mean of a number for each question."""

    name: str

    @abstractmethod
    def values(self, judged: Sequence[Judged]) -> Sequence[float]:
        """The number of each question."""

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        return np.array([(value, 1.0) for value in self.values(judged)])

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: ratio(sums_BK[:, 0], sums_BK[:, 1])}


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above` by `below`, NaN where there is nothing to divide by."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below != 0)


def specs_of(named: Iterable[Named]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The metrics that a recipe names, each with its options."""
    for metric in named:
        yield from [(metric, {})] if isinstance(metric, str) else metric.items()


def open_metrics(named: Iterable[Named], where: str) -> list[Metric]:
    """Builds the metrics that a recipe names in `where`. Raises ConfigError for one that cannot be found or has wrong
    options, ImportError for what one needs."""
    metrics: list[Metric] = []
    for spec, options in specs_of(named):
        try:
            metric_class: Any = find("metric", spec).plugin
            metrics.append(metric_class(build(metric_class.config_type, options, "its options")))
        except ValueError as error:
            kind = type(error) if isinstance(error, ConfigError) else ConfigError
            raise kind(f"{where}: {spec}: {error}") from error
    return metrics


def scores(judged: Sequence[Judged], metrics: Iterable[Metric]) -> dict[str, float]:
    """The metrics over all questions that were answered and over those of each tag, with the counts. `failed` counts
    the questions that no metric sees, because they could not be asked or answered; `cut_off` the answers that a limit
    ended, which every metric sees. Raises ValueError for a metric that gives no numbers."""
    metrics = list(metrics)
    answered = [item for item in judged if item.error is None]
    results: dict[str, float] = {}
    for tag, items in by_tag(answered).items():
        found = {**_scored(items, metrics), "questions": len(items)}
        results |= {f"{name}/{tag}" if tag else name: value for name, value in found.items()}
    results["failed"] = len(judged) - len(answered)
    results["cut_off"] = sum(item.cut_off for item in answered)
    return results


def numbers_of(metric: Metric, judged: Sequence[Judged]) -> Mapping[str, Any]:
    """What a metric gives. Raises ValueError that names it for whatever it raises, and for what is no mapping."""
    called = type(metric).__name__
    try:
        given: Any = metric.score(judged)
    except (ValueError, ImportError):  # it says what is wrong with a question, or what to install
        raise
    except Exception as error:  # a plugin can fail in any way
        raise ValueError(f"metric {called}: {type(error).__name__}: {error}; --debug shows where") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"metric {called}: score gives {given!r:.60}; give a mapping of names to numbers")
    return given


def by_tag(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """All of them, under the empty name, and those of each tag."""
    tagged = {"": list(judged)}
    for item in judged:
        for tag in item.tags:
            tagged.setdefault(tag, []).append(item)
    return tagged


def _scored(items: Sequence[Judged], metrics: Iterable[Metric]) -> dict[str, float]:
    """Every metric's numbers. Raises ValueError for what is no number, and for a name that is taken."""
    found: dict[str, float] = {}
    owners: dict[str, str] = dict.fromkeys(COUNTS, "molora's own counts")
    for metric in metrics if items else ():
        called = type(metric).__name__
        for name, value in numbers_of(metric, items).items():
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(f"metric {called}: calls a number {name!r}; a name is a text without a slash")
            if name in owners:
                both = f"two numbers are called {name!r}, by {owners[name]} and by metric {called}"
                raise ValueError(f"{both}; leave one of them out, or rename it")
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"metric {called}: {name} is {value!r}; give a finite number or none")
            found[name] = value if isinstance(value, int) else float(value)  # numpy's too
            owners[name] = f"metric {called}"
    return found
