"""Roll-outs: several answers drawn for each prompt, those that are right told from those that are wrong.

What is right is what a metric says of one answer, so that any metric that rates single answers serves. The answers
become rows to learn from: the right ones, or pairs of a right and a wrong one.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from molora.config import ConfigError, plain
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import open_metrics
from molora.evaluate.questions import Question, judge, question
from molora.inference.answers import answered_ids, appending, row_bytes, written_rows
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel
from molora.interrupt import Stopped
from molora.pack import Sample
from molora.seeding import seed_of
from molora.storage import hold, write_atomically
from molora.terminal import progress

# What the id of an answer has behind that of its prompt: which of the prompt's answers it is.
_MARK = "#"


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

    def rate(self, asked: Question, answer: Answer) -> tuple[float, bool]:
        """How right an answer is, from 0 to 1, and whether that is enough. Raises ValueError for an answer that cannot
        be rated."""
        judged = judge(asked, answer.text, cut_off=answer.finished == "length", adapters=answer.adapters)
        if hasattr(self.metric, "rate"):
            rating = float(self.metric.rate(judged))
        else:
            rating = float(next(iter(self.metric.score([judged]).values())))
        return rating, rating >= self.at_least and not judged.cut_off


def open_verifier(spec: str, at_least: float = 1.0, options: Mapping[str, Any] | None = None) -> Verifier:
    """Raises ConfigError for a metric that does not rate single answers from their text, and ImportError for what it
    needs."""
    (metric,) = open_metrics([{spec: dict(options or {})}], "metric")
    rates = hasattr(metric, "rate") or getattr(metric, "rates_each", False)
    if not rates or getattr(metric, "needs", None):
        raise ConfigError(f"metric: {spec!r} does not rate an answer by its text; take one such as exact_match")
    pinned = {**plain(getattr(metric, "config", None) or {}), **(options or {}), "at_least": at_least}
    digest = hashlib.sha256(json.dumps(pinned, sort_keys=True).encode()).hexdigest()[:12]
    return Verifier(f"{spec} {digest}", metric, at_least)


@dataclass(frozen=True)
class Drawn:
    """A prompt with what was drawn for it: answers that are right and answers that are wrong, none twice."""

    id: str
    prompt: list[dict[str, Any]]
    right: list[str]
    wrong: list[str]
    num_right: int
    num_answers: int


class RollOut:
    """The rows of a file, so many answers for each, and the file that they go to. Raises ValueError for a row that
    cannot be read, or does not end with an answer."""

    def __init__(self, messages: Path, output: Path, num_answers: int) -> None:
        self.messages, self.output, self.num_answers = messages, output, num_answers
        source = Messages(MessagesConfig(path=str(messages)))
        self.questions = [question(source, index) for index in range(len(source))]
        self.done: set[str] = set()
        self.failed: list[str] = []

    @contextmanager
    def held(self, verifier: Verifier) -> Iterator[None]:
        """Keeps other processes from the output, and finds what is done. Raises ConfigError for an output that holds
        anything but answers, or some that another verifier rated; Stopped after Ctrl-C."""
        if self.output.exists() and self.output.samefile(self.messages):
            raise ConfigError(f"output {self.output}: is where the rows come from; give it another name")
        with hold(self.output):
            self.done = answered_ids(self.output, "answer")
            if self.done:
                check_made_by(self.output, "answer", verifier.name)
            try:
                yield
            except KeyboardInterrupt as interrupt:
                done = self.num_answers_in_all - self.num_left
                told = f"stopped: {done} of {self.num_answers_in_all} answers are drawn, in {self.output}"
                raise Stopped(f"{told}; the same call goes on with the others", signal.SIGINT) from interrupt

    def ids_of(self, asked: Question) -> list[str]:
        return [f"{asked.id}{_MARK}{number}" for number in range(self.num_answers)]

    @property
    def num_answers_in_all(self) -> int:
        return len(self.questions) * self.num_answers

    @property
    def num_left(self) -> int:
        """The answers that are not there yet."""
        return sum(id not in self.done for asked in self.questions for id in self.ids_of(asked))

    def draw(self, loaded: LoadedModel, config: GenerationConfig, verifier: Verifier) -> None:
        """Draws the answers that are not there yet. Each is rated while others are drawn, and then written. Its seed is
        that of the config and its id, so that it is the same whenever and beside whatever it is drawn."""
        waiting: dict[str, Question] = {}

        def samples() -> Iterator[Sample | Failed]:
            for asked in self.questions:
                left = [id for id in self.ids_of(asked) if id not in self.done]
                if not left:
                    continue
                sample = attempt(partial(loaded.encode, asked.prompt, asked.id), asked.id)
                for id in left:
                    waiting[id] = asked
                    yield replace(sample, id=id)

        with progress() as bars, appending(self.output) as write, ThreadPoolExecutor(verifier.parallel) as threads:
            drawn = self.num_answers_in_all - self.num_left
            bar = bars.add_task("roll-out", total=self.num_answers_in_all, completed=drawn, note="")

            def finish(answer: Answer, rated: Future[tuple[float, bool]] | None) -> None:
                error = answer.error if rated is None else rated.exception()
                if rated is None or error is not None:
                    write({"id": answer.id, "error": str(error)})
                    self.failed.append(f"{answer.id}: {error}")
                else:
                    rating, right = rated.result()
                    told = {"answer": answer.text, "rating": rating, "right": right, "finished": answer.finished}
                    write({"id": answer.id, **told, "adapters": list(answer.adapters), "verifier": verifier.name})
                    self.done.add(answer.id)
                bars.advance(bar)

            being_rated: deque[tuple[Answer, Future[tuple[float, bool]] | None]] = deque()
            try:
                for answer in loaded.answers(samples(), config, keep_going=True):
                    asked = waiting.pop(answer.id)
                    rated = None if answer.error is not None else threads.submit(verifier.rate, asked, answer)
                    being_rated.append((answer, rated))
                    while being_rated and (being_rated[0][1] is None or being_rated[0][1].done()):
                        finish(*being_rated.popleft())
            finally:  # also of a draw that is stopped: what was drawn is not lost
                for each in being_rated:
                    finish(*each)

    def drawn(self) -> Iterator[Drawn]:
        """The prompts that have all their answers, in the order of their rows."""
        rows = {row["id"]: row for _, row in written_rows(self.output, f"output {self.output}")}
        for asked in self.questions:
            answers = [rows[id] for id in self.ids_of(asked) if "answer" in rows.get(id, ())]
            if len(answers) < self.num_answers:
                continue
            texts = {
                right: [*dict.fromkeys(each["answer"] for each in answers if each["right"] == right)]
                for right in (True, False)
            }
            num_right = sum(each["right"] for each in answers)
            yield Drawn(asked.id, asked.prompt, texts[True], texts[False], num_right, len(answers))


def check_made_by(output: Path, result: str, name: str) -> None:
    """Raises ConfigError if a row of an output, each with `result`, says that another verifier than `name` rated it."""
    for number, row in written_rows(output, f"output {output}", result):
        if row.get("verifier", name) != name:
            told = f"line {number} was rated by {row['verifier']!r:.200}, and not by {name!r}"
            raise ConfigError(f"output {output}: {told}; give the same metric and options, or another output")


def accepted(drawn: Drawn, most: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of messages with right answers to a prompt, at most so many, drawn by the seed and the prompt's id."""
    for number, text in enumerate(_some(drawn.right, most, seed, drawn.id)):
        messages = [*drawn.prompt, {"role": "assistant", "content": text}]
        yield {"id": f"{drawn.id}{_MARK}{number}", "messages": messages}


def pairs(drawn: Drawn, most: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of preferences, each a right and a wrong answer to a prompt, at most so many, no answer in two of them."""
    right, wrong = (_some(texts, most, seed, drawn.id) for texts in (drawn.right, drawn.wrong))
    for number, (chosen, rejected) in enumerate(zip(right, wrong, strict=False)):
        id = f"{drawn.id}{_MARK}{number}"
        yield {"id": id, "prompt": drawn.prompt, "chosen": chosen, "rejected": rejected}


def _some(texts: Sequence[str], most: int, seed: int, id: str) -> list[str]:
    return random.Random(seed_of(seed, "roll-out", id)).sample(texts, min(most, len(texts)))


def write_rows(path: Path, rows: Iterator[Mapping[str, Any]]) -> int:
    """Writes a file of rows in one step; returns how many there are."""
    lines = [row_bytes(row) for row in rows]
    write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(lines)))
    return len(lines)


def success_rates(everything: Sequence[Drawn]) -> dict[str, float]:
    """The share of answers that are right; of prompts with one that is (`pass@n`); and of those of which all are, some
    and none. Nothing if no prompt has all its answers."""
    if not everything:
        return {}
    shares = [drawn.num_right / drawn.num_answers for drawn in everything]
    count: Callable[[Callable[[float], bool]], float] = lambda is_so: sum(map(is_so, shares)) / len(shares)  # noqa: E731
    return {
        "right": sum(shares) / len(shares),
        f"pass@{everything[0].num_answers}": count(lambda share: share > 0),
        "always": count(lambda share: share == 1),
        "sometimes": count(lambda share: 0 < share < 1),
        "never": count(lambda share: share == 0),
    }
