"""Metrics of multiple-choice questions: by what the model answers, and by how probable it finds each option."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Literal

import numpy as np

from molora.evaluate.metrics import Counted, Judged, Mean, NoOptions, ratio
from molora.evaluate.normalise import normalise


class MultipleChoice(Counted):
    """The share of answers that name the right option, and of those that name none (`no_choice`), which are wrong. The
    option that an answer names is found by the first of these rules that finds one; where it finds several, the last
    counts. The answer is an option, or its letter, as exact match compares them; has a letter in brackets, as (B); has
    a letter that stands alone; begins with a letter and a full stop, colon or bracket; has the text of an option in it.
    Of sets that have both kinds, a question without options is right where exact match says so.

    Source: MMMU, parse_multi_choice_response of eval_utils.py, which guesses where no rule finds an option."""

    config_type = NoOptions
    rates_each = True
    share = "multiple_choice"

    def __init__(self, config: NoOptions) -> None:
        pass

    def check_questions(self, judged: Sequence[Judged]) -> None:
        for item in [item for item in judged if not _is_open(item)] or judged[:1]:
            right_choice(item)

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        return np.array([self._counted(item) for item in judged])

    def _counted(self, item: Judged) -> tuple[bool, bool, int]:
        if _is_open(item):
            return item.correct, False, 1
        right, named = right_choice(item), named_choice(item.answer, item.choices)
        return named == right, named is None, 1

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        right, none, questions = sums_BK.T
        return {"multiple_choice": ratio(right, questions), "no_choice": ratio(none, questions)}


def _is_open(item: Judged) -> bool:
    """Whether a question says nothing of options."""
    return not item.choices and item.choice is None


def right_choice(item: Judged) -> int:
    """The index of the right option. Raises ValueError for a question without options."""
    if item.choice is None or not 0 <= item.choice < len(item.choices):
        raise ValueError(
            f"question {item.id}: choice is {item.choice} of {len(item.choices)} choices; a multiple-choice metric "
            "needs the options of the row as `choices`, and the index of the right one as `choice`"
        )
    return item.choice


def named_choice(answer: str, choices: Sequence[str]) -> int | None:
    """The index of the option that an answer names, if it names one; see `MultipleChoice` for the rules."""
    letters = ascii_uppercase[: len(choices)]
    for names in (choices, letters):
        same = [index for index, name in enumerate(names) if normalise(answer) == normalise(name)]
        if same:
            return same[-1]
    for sign in ",.!?;:'":
        answer = answer.strip(sign)
    padded = f" {answer} "
    for text, names in (
        (padded, [f"({letter})" for letter in letters]),
        (padded, [f" {letter} " for letter in letters]),
        (answer[:2], [f"{letter}{sign}" for sign in ".:)" for letter in letters]),
        (padded.lower(), [choice.lower() for choice in choices]),
    ):
        places = [(text.rfind(name), index) for index, name in enumerate(names) if name and name in text]
        if places:
            last = max(place for place, _ in places)
            return next(index for place, index in places if place == last) % len(letters)
    return None


def continuations(item: Judged) -> list[str]:
    """What the model could answer to name each option, as the expected answer does: by its text or by its letter."""
    expected = normalise(item.expected)
    right = right_choice(item)
    for names in (item.choices, ascii_uppercase[: len(item.choices)]):
        if normalise(names[right]) == expected:
            return list(names)
    raise ValueError(
        f"question {item.id}: expects {item.expected!r:.60}, which is neither the right option, "
        f"{item.choices[right]!r:.60}, nor its letter, {ascii_uppercase[right]}; likelihoods need one of them"
    )


def as_if_likely(item: Judged) -> Judged:
    """The question as if the model had found the right one of its choices the most probable."""
    return replace(item, likelihoods=[(0.0 if index == item.choice else -1.0, 1) for index in range(len(item.choices))])


@dataclass(kw_only=True)
class ChoiceLikelihoodConfig:
    """`per` says what the log-probability of an option is divided by before options are compared: by nothing (`text`),
    by its `character`s, or by its `token`s."""

    per: Literal["text", "character", "token"] = "text"


class ChoiceLikelihood(Mean):
    """The share of questions whose right option is the one that the model finds the most probable answer. Options are
    scored by their texts, or by their letters where the expected answer is a letter.

    Source: lm-evaluation-harness, whose acc is `per: text` and acc_norm `per: character`."""

    config_type = ChoiceLikelihoodConfig
    needs = "likelihoods"

    def __init__(self, config: ChoiceLikelihoodConfig) -> None:
        self.per = config.per
        self.name = self.share = "choice_likelihood" if config.per == "text" else f"choice_likelihood_per_{config.per}"

    def values(self, judged: Sequence[Judged]) -> list[float]:
        return [float(self.likeliest(item) == right_choice(item)) for item in judged]

    def likeliest(self, item: Judged) -> int:
        """The index of the option that the model finds the most probable; the first of equals."""
        texts = continuations(item)
        if len(item.likelihoods) != len(texts):
            raise ValueError(
                f"question {item.id}: has {len(item.likelihoods)} likelihoods of {len(texts)} choices; evaluate the "
                "model with choice_likelihood among the metrics"
            )
        scores = []
        for text, (log_probability, num_tokens) in zip(texts, item.likelihoods, strict=True):
            scores.append(log_probability / {"text": 1, "character": len(text), "token": num_tokens}[self.per])
        return int(np.argmax(scores))
