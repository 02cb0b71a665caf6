"""Roll-outs: several answers drawn for each prompt, those that are right told from those that are wrong.

What is right is what a metric says of one answer, so that any metric that rates single answers serves. The answers
become rows to learn from: the right ones, or pairs of a right and a wrong one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import Metric, Named, open_metrics
from molora.evaluate.questions import Question, judge, question
from molora.inference.answers import answered_ids, appending, row_bytes, written_rows
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel
from molora.pack import Sample
from molora.seeding import seed_of
from molora.storage import hold, write_atomically
from molora.terminal import progress

# What the id of an answer has behind that of its prompt: which of the prompt's answers it is.
_MARK = "#"


@dataclass(frozen=True)
class Verifier:
    """A metric that rates single answers; one that gets `at_least` is right, if no limit cut it off."""

    metric: Metric
    at_least: float

    def rate(self, asked: Question, answer: Answer) -> tuple[float, bool]:
        """How right an answer is, from 0 to 1, and whether that is enough."""
        judged = judge(asked, answer.text, cut_off=answer.finished == "length", adapters=answer.adapters)
        rating = float(next(iter(self.metric.score([judged]).values())))
        return rating, rating >= self.at_least and not judged.cut_off


def open_verifier(named: Named, at_least: float = 1.0) -> Verifier:
    """Raises ConfigError for a metric that does not rate single answers from their text, and ImportError for what it
    needs."""
    (metric,) = open_metrics([named], "metric")
    if not getattr(metric, "rates_each", False) or getattr(metric, "needs", None):
        raise ConfigError(f"metric: {named!r} does not rate an answer by its text; take one such as exact_match")
    return Verifier(metric, at_least)


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
    def held(self) -> Iterator[None]:
        """Keeps other processes from the output, and finds what is done. Raises ConfigError for an output that holds
        anything but answers."""
        if self.output.exists() and self.output.samefile(self.messages):
            raise ConfigError(f"output {self.output}: is where the rows come from; give it another name")
        with hold(self.output):
            self.done = answered_ids(self.output, "answer")
            yield

    def ids_of(self, asked: Question) -> list[str]:
        return [f"{asked.id}{_MARK}{number}" for number in range(self.num_answers)]

    def draw(self, loaded: LoadedModel, config: GenerationConfig, verifier: Verifier) -> None:
        """Draws the answers that are not there yet, each written as it is finished. Its seed is that of the config and
        its id, so that it is the same whenever and beside whatever it is drawn."""
        waiting: dict[str, Question] = {}
        total = len(self.questions) * self.num_answers

        def samples() -> Iterator[Sample | Failed]:
            for asked in self.questions:
                left = [id for id in self.ids_of(asked) if id not in self.done]
                if not left:
                    continue
                sample = attempt(partial(loaded.encode, asked.prompt, asked.id), asked.id)
                for id in left:
                    waiting[id] = asked
                    yield replace(sample, id=id)

        with progress() as bars, appending(self.output) as write:
            done = sum(id in self.done for asked in self.questions for id in self.ids_of(asked))
            bar = bars.add_task("roll-out", total=total, completed=done, note="")
            for answer in loaded.answers(samples(), config, keep_going=True):
                asked = waiting.pop(answer.id)
                if answer.error is not None:
                    write({"id": answer.id, "error": str(answer.error)})
                    self.failed.append(f"{answer.id}: {answer.error}")
                else:
                    rating, right = verifier.rate(asked, answer)
                    told = {"answer": answer.text, "rating": rating, "right": right, "finished": answer.finished}
                    write({"id": answer.id, **told, "adapters": list(answer.adapters)})
                    self.done.add(answer.id)
                bars.advance(bar)

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
