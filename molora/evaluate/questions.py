"""Questions of an evaluation: what a row asks, and how an answer to it is judged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora.data.messages import parts
from molora.data.sources import Source, read_tags
from molora.evaluate.blind import Media, treated
from molora.evaluate.metrics import Judged
from molora.evaluate.normalise import exact_match


@dataclass(frozen=True)
class Question:
    """What a row asks: its prompt, and what is known of the right answer."""

    id: str
    prompt: list[dict[str, Any]]
    expected: str
    tags: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    choice: int | None = None


def question(source: Source, index: int, media: Media = "as is") -> Question:
    """Splits a row into prompt and expected answer; the id gains the row number, so that it is unique."""
    row = source[index]
    *prompt, last = row["messages"]
    where = f"evaluation row {index + 1}"
    if last["role"] != "assistant" or not prompt:
        raise ValueError(f"{where}: must end with an assistant message, the expected answer")
    if media != "as is":
        prompt = treated(prompt, source, index, media)
    if other := next((part["type"] for part in parts(last) if part["type"] != "text"), None):
        raise ValueError(f"{where}: the expected answer holds {other}; it can be text alone")
    expected = "".join(part["text"] for part in parts(last))
    return Question(
        id=f"{index}:{row['id']}",
        prompt=prompt,
        expected=expected,
        tags=read_tags(row.get("tags"), where),
        answers=list(row.get("answers") or [expected]),
        choices=list(row.get("choices") or []),
        choice=row.get("choice"),
    )


def judge(
    asked: Question,
    answer: str,
    *,
    cut_off: bool = False,
    error: str | None = None,
    likelihoods: Iterable[Sequence[Any]] = (),
    adapters: Iterable[str] = (),
) -> Judged:
    """A question with its answer, which is right if it equals one that is accepted."""
    correct = error is None and any(exact_match(answer, accepted) for accepted in asked.answers or [asked.expected])
    return Judged(
        id=asked.id,
        messages=asked.prompt,
        expected=asked.expected,
        answer=answer,
        correct=correct,
        tags=asked.tags,
        cut_off=cut_off,
        error=error,
        answers=asked.answers,
        choices=asked.choices,
        choice=asked.choice,
        likelihoods=[(log_probability, num_tokens) for log_probability, num_tokens in likelihoods],
        adapters=list(adapters),
    )
