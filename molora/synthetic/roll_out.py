"""Roll-outs: several answers drawn for each prompt, those that are right told from those that are wrong.

The answers become rows to learn from: the right ones, or pairs of a right and a wrong one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from molora.evaluate.questions import Question
from molora.inference.answers import appending
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import Answer, LoadedModel
from molora.pack import Sample
from molora.seeding import seed_of
from molora.synthetic.rated import RatedFile, Verifier
from molora.terminal import progress

# What a verifier says of an answer, or why it says nothing.
_Rated = tuple[float, bool] | Failed

# What the id of an answer has behind that of its prompt: which of the prompt's answers it is.
_MARK = "#"


@dataclass(frozen=True)
class Drawn:
    """A prompt with what was drawn for it: answers that are right and answers that are wrong, none twice. A text that
    was rated both ways is in neither."""

    id: str
    prompt: list[dict[str, Any]]
    right: list[str]
    wrong: list[str]
    num_right: int
    num_answers: int


class RollOut(RatedFile):
    """The questions of a file, and the file of so many answers to each."""

    result = "answer"

    def __init__(
        self,
        messages: Path,
        output: Path,
        num_answers: int,
        verifier: Verifier,
        drawn_by: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        super().__init__(messages, output, verifier, verifier.name, drawn_by)
        self.num_answers = num_answers

    @property
    def told(self) -> str:
        return f"{self.num_answers_in_all - self.num_left} of {self.num_answers_in_all} answers are drawn"

    def question_of(self, id: str) -> str:
        return id.rpartition(_MARK)[0]

    def ids_of(self, asked: Question) -> list[str]:
        return [f"{asked.id}{_MARK}{number}" for number in range(self.num_answers)]

    @property
    def num_answers_in_all(self) -> int:
        return len(self.questions) * self.num_answers

    @property
    def num_left(self) -> int:
        """The answers that are not there yet."""
        return sum(id not in self.done for asked in self.questions for id in self.ids_of(asked))

    def draw(self, loaded: LoadedModel, config: GenerationConfig) -> None:
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

        with progress() as bars, appending(self.output) as write, ThreadPoolExecutor(self.verifier.parallel) as threads:
            drawn = self.num_answers_in_all - self.num_left
            bar = bars.add_task("roll-out", total=self.num_answers_in_all, completed=drawn, note="")

            def finish(answer: Answer, coming: Future[_Rated] | Failed) -> None:
                rated = coming if isinstance(coming, Failed) else coming.result()
                if isinstance(rated, Failed):
                    write({"id": answer.id, "error": str(rated.error)})
                    self.failed.append(f"{answer.id}: {rated.error}")
                else:
                    rating, right = rated
                    told = {"answer": answer.text, "rating": rating, "right": right, "finished": answer.finished}
                    notes = self.notes(self.question_of(answer.id))
                    write({"id": answer.id, **told, "adapters": list(answer.adapters), **notes})
                    self.done.add(answer.id)
                bars.advance(bar)

            being_rated: deque[tuple[Answer, Future[_Rated] | Failed]] = deque()
            try:
                for answer in loaded.answers(samples(), config, keep_going=True):
                    asked = waiting.pop(answer.id)
                    if answer.error is not None:
                        being_rated.append((answer, Failed(answer.id, answer.error)))
                    else:
                        rate = partial(self.verifier.rate, asked, answer)
                        being_rated.append((answer, threads.submit(attempt, rate, answer.id)))
                    while being_rated and (isinstance(being_rated[0][1], Failed) or being_rated[0][1].done()):
                        finish(*being_rated.popleft())
            finally:  # also of a draw that is stopped: what was drawn is not lost
                for each in being_rated:
                    finish(*each)

    def drawn(self) -> Iterator[Drawn]:
        """The prompts that have all their answers, in the order of their rows."""
        rows = self.rows()
        for asked in self.questions:
            answers = [rows[id] for id in self.ids_of(asked) if "answer" in rows.get(id, ())]
            if len(answers) < self.num_answers:
                continue
            right, wrong = (
                dict.fromkeys(each["answer"] for each in answers if each["right"] == side) for side in (True, False)
            )
            only_right = [text for text in right if text not in wrong]
            only_wrong = [text for text in wrong if text not in right]
            num_right = sum(each["right"] for each in answers)
            yield Drawn(asked.id, asked.prompt, only_right, only_wrong, num_right, len(answers))


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
