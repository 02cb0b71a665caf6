"""Draws that a verifier rates, and the file that they go to: what roll-outs and searches for pivotal tokens share.

What is right is what a metric says of one answer, so that any metric that rates single answers serves.
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.config import ConfigError, plain
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import open_metrics
from molora.evaluate.questions import Question, judge, question
from molora.inference.answers import answered_ids, check_outputs, differences, other_row_now, row_bytes, written_rows
from molora.inference.drawn import digest
from molora.inference.load import Answer
from molora.interrupt import Stopped
from molora.storage import hold, write_atomically

_ANOTHER = "or another output"


@dataclass(frozen=True)
class Verifier:
    """A metric that rates single answers; one that gets `at_least` is right, if no limit cut it off. `name` tells the
    metric, its options and the bound from all others."""

    name: str
    metric: Any
    at_least: float

    @property
    def parallel(self) -> int:
        """How many answers it rates at a time."""
        return getattr(self.metric, "parallel", 1)

    def check(self, questions: Iterable[Question], where: Path) -> None:
        """Raises ConfigError for questions of a file that the metric cannot rate any answer to."""
        if hasattr(self.metric, "check_questions"):
            try:
                self.metric.check_questions([judge(asked, asked.expected) for asked in questions])
            except Exception as error:  # a plugin can fail in any way
                raise ConfigError(f"{where}: {self._told(error)}; mend the rows, or give another metric") from error

    def rate(self, asked: Question, answer: Answer) -> tuple[float, bool]:
        """How right an answer is, from 0 to 1, and whether that is enough. Raises ValueError for an answer that cannot
        be rated, whatever the metric raises; ImportError for what is not installed."""
        judged = judge(asked, answer.text, cut_off=answer.finished == "length", adapters=answer.adapters)
        try:
            rating = float(self._rating(judged))
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(self._told(error)) from error
        if not 0 <= rating <= 1:  # NaN too
            raise ValueError(f"rated {rating:g}; a rating is from 0 to 1")
        return rating, rating >= self.at_least and not judged.cut_off

    def _rating(self, judged: Any) -> Any:
        if hasattr(self.metric, "rate"):
            return self.metric.rate(judged)
        numbers = self.metric.score([judged])
        if not isinstance(numbers, Mapping) or not numbers:
            raise ValueError(
                f"metric {type(self.metric).__name__}: score gives {numbers!r:.60}; give a number by its name"
            )
        return next(iter(numbers.values()))

    def _told(self, error: Exception) -> str:
        """What a metric says, with the kind of the error where the text alone says nothing."""
        if isinstance(error, ValueError) and str(error):
            return str(error)
        return f"metric {type(self.metric).__name__}: {type(error).__name__}" + (f": {error}" if str(error) else "")


def open_verifier(spec: str, at_least: float = 1.0, options: Mapping[str, Any] | None = None) -> Verifier:
    """Raises ConfigError for a metric that does not rate single answers from their text, and ImportError for what it
    needs."""
    (metric,) = open_metrics([{spec: dict(options or {})}], "metric")
    rates = hasattr(metric, "rate") or getattr(metric, "rates_each", False)
    if not rates or getattr(metric, "needs", None):
        raise ConfigError(f"metric: {spec!r} does not rate an answer by its text; take one such as exact_match")
    pinned = {**plain(getattr(metric, "config", None) or {}), **(options or {}), "at_least": at_least}
    return Verifier(f"{spec} {digest(pinned)}", metric, at_least)


class RatedFile(ABC):
    """The questions of a file, and the file that what is drawn for them goes to, which goes on where it stopped. Each
    of its rows notes what was asked, what draws depend on beside that, which `drawn_by` says, and the `name` of what
    rated them. Raises ValueError for a question that cannot be read, or does not end with an answer."""

    # The key of a row that says that it is done.
    result: str

    def __init__(
        self, messages: Path, output: Path, verifier: Verifier, name: str, drawn_by: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.messages, self.output = messages, output
        self.verifier, self.name, self.drawn_by = verifier, name, drawn_by
        self.how: Mapping[str, Any] = {}
        self.questions = _read_questions(messages)
        self.asked = {asked.id: _asked(asked) for asked in self.questions}
        self.done: set[str] = set()
        self.failed: list[str] = []

    @contextmanager
    def held(self, made: Mapping[str, Path | None] | None = None) -> Iterator[None]:
        """Keeps other processes from the output, and finds what is done. `made` are other files that will be written,
        by what they are called. Raises ConfigError for files that cannot be written, for questions that cannot be
        rated, and for an output that holds anything but such rows, or some of other questions, another verifier, model
        or settings; Stopped after Ctrl-C."""
        check_outputs(self.messages, {"output": self.output, **(made or {})})
        self.verifier.check(self.questions, self.messages)
        self.how = self.drawn_by()
        with hold(self.output):
            self.done = answered_ids(self.output, self.result, self._check)
            try:
                yield
            except KeyboardInterrupt as interrupt:
                told = f"stopped: {self.told}, in {self.output}"
                raise Stopped(f"{told}; the same call goes on with the others", signal.SIGINT) from interrupt

    @property
    @abstractmethod
    def told(self) -> str:
        """How much is done."""

    def question_of(self, id: str) -> str:
        """The id of the question that the row `id` is about."""
        return id

    def notes(self, question_id: str) -> dict[str, Any]:
        """What a row notes beside its result."""
        return {"asked": self.asked[question_id], "drawn": self.how, "verifier": self.name}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of the output, by their ids."""
        return {row["id"]: row for _, row in written_rows(self.output, f"output {self.output}", self.result)}

    def _check(self, number: int, row: Mapping[str, Any]) -> None:
        """Raises ConfigError for a row that is done but not by what is asked here, as far as it has notes."""
        where = f"output {self.output}: line {number}"
        if row.get("verifier", self.name) != self.name:
            told = f"{where} was rated by {row['verifier']!r:.200}, and not by {self.name!r}"
            raise ConfigError(f"{told}; give the same metric and options, {_ANOTHER}")
        if "drawn" in row and (differing := differences(row["drawn"], self.how)):
            told = f"{where} was drawn otherwise: {'; '.join(differing)}"
            raise ConfigError(f"{told}; give the same model and options, {_ANOTHER}")
        asked = self.asked.get(self.question_of(row["id"]))
        if asked is None:
            told = f"{where} answers {row['id']!r:.200}, which {self.messages} has not"
            raise ConfigError(f"{told}; give another output, or the old rows")
        if row.get("asked", asked) != asked:
            raise ConfigError(f"output {self.output}: {other_row_now(number, row['id'])}")


def _read_questions(messages: Path) -> list[Question]:
    source = Messages(MessagesConfig(path=str(messages)))
    questions = []
    for index in range(len(source)):
        row = {index: source[index]}
        try:
            questions.append(question(row, index))
        except ValueError as error:
            raise ValueError(f"{messages}: {error}") from error
    return questions


def _asked(asked: Question) -> str:
    return digest([asked.prompt, asked.expected, asked.answers, asked.choices, asked.choice])


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes a file of rows in one step; returns how many there are."""
    lines = [row_bytes(row) for row in rows]
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(lines)))
    return len(lines)
