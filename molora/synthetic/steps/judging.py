"""Steps that judge answers: against each other, and against what is right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Real
from typing import Any, Literal

from molora.config import ConfigError
from molora.evaluate.metrics import Named, numbers_of, open_metrics
from molora.evaluate.metrics.values import decimals_in
from molora.evaluate.normalise import normalise
from molora.evaluate.questions import Question, judge
from molora.synthetic.rows import Dropped, Row, RowByRow, Text, Work, texts_of_list
from molora.synthetic.steps.choosing import check_bounds, out_of_bounds


@dataclass(kw_only=True)
class VoteConfig:
    """`column` holds a list of answers, of which the one that most agree on becomes the column `into`. They agree by
    their `text`, but for case, spaces and a closing full stop, or by the last `number` in it. `at_least` is the share
    of the answers that must agree; an answer without a number agrees with none. Where two lead, the row is dropped."""

    column: str
    into: str = "answer"
    by: Literal["text", "number"] = "text"
    at_least: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.at_least <= 1:
            raise ConfigError(f"at_least is {self.at_least}; give a share, from 0 to 1")


class Vote(RowByRow):
    """The answer of the majority, and `agreement`, the share of the answers that it has.

    Source: self-consistency (arXiv 2203.11171)."""

    config_type = VoteConfig

    def __init__(self, config: VoteConfig) -> None:
        self.config = config

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        answers = texts_of_list(config.column, row, "column")
        groups: dict[Any, list[str]] = {}
        for answer in answers:
            key = normalise(answer) if config.by == "text" else last_number(answer)
            if key not in ("", None):
                groups.setdefault(key, []).append(answer)
        ranked = sorted(groups.items(), key=lambda group: -len(group[1]))  # stable: the first that was said leads
        if not ranked:
            yield Dropped(row, "no answer to count")
            return
        key, same = ranked[0]
        share = len(same) / len(answers)
        if share < config.at_least:
            yield Dropped(row, f"less than {config.at_least:.0%} agree", f"{share:.2f}")
        elif len(ranked) > 1 and len(ranked[1][1]) == len(same):
            yield Dropped(row, "two answers lead", f"{same[0]!r} and {ranked[1][1][0]!r}"[:200])
        else:
            said = decimal_text(key) if config.by == "number" else same[0]
            yield row.having(**{config.into: said, "agreement": share, "agreeing": same})


def last_number(text: str) -> Decimal | None:
    """The last number in a text."""
    found = [value for value, _ in decimals_in(text) if value.is_finite()]
    return found[-1] if found else None


def decimal_text(value: Decimal) -> str:
    """A number with all its digits, and no zeros behind them."""
    text = f"{abs(value) if value == 0 else value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(kw_only=True)
class VerifyConfig:
    """`metric` rates `answer` against `expected`, both templates, or against each text of the list in the column
    `answers`: a metric's name, or a name with options. Its first number becomes the column `into`, and the row stays if
    that is `at_least` and `at_most` what they say; give one at least. A row that the metric cannot rate is dropped: a
    metric of multiple choice needs the columns `choices` and `choice`, the number of the right one from 0. A model
    that judges is no metric here, as its answers would not be kept: it is an `ask` step."""

    metric: Named
    answer: str
    expected: str | None = None
    answers: str | None = None
    into: str = "rating"
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.expected is None) == (self.answers is None):
            raise ConfigError("give either expected or answers")
        if self.at_least is None and self.at_most is None:
            raise ConfigError("give at_least or at_most, or the metric decides about nothing")
        check_bounds(self)


class Verify(RowByRow):
    """Rows whose answer a metric rates well enough: exact match, a word error rate, chrF of a translation and back."""

    config_type = VerifyConfig

    def __init__(self, config: VerifyConfig) -> None:
        self.config = config
        self.rates = config.into
        (metric,) = open_metrics([config.metric], "metric")
        self.metric: Any = metric
        if getattr(metric, "needs", None):
            raise ConfigError(f"metric: {config.metric!r} rates an answer by more than its text")
        if hasattr(metric, "rate"):  # what a server answers must be kept, and counted in the budget
            told = "asks a model; let an `ask` step ask it, and a `filter` behind that decide"
            raise ConfigError(f"metric: {config.metric!r:.80} {told}")
        self.answer = Text(config.answer, "answer")
        self.expected = None if config.expected is None else Text(config.expected, "expected")

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        if self.expected is not None:
            accepted = [self.expected.of(row)]
        else:
            accepted = texts_of_list(config.answers or "", row, "answers")
        if not accepted:
            yield Dropped(row, "nothing to compare with")
            return
        messages = row.columns.get("messages")
        prompt = messages if isinstance(messages, list) else []
        choices, choice = choices_of(row)
        asked = Question(row.id, prompt, accepted[0], answers=accepted, choices=choices, choice=choice)
        if hasattr(self.metric, "check_questions"):  # its ValueError drops the row
            self.metric.check_questions([judge(asked, asked.expected)])
        numbers = numbers_of(self.metric, [judge(asked, self.answer.of(row))])
        rating = next(iter(numbers.values()), None)
        if not isinstance(rating, Real) or not math.isfinite(rating):
            yield Dropped(row, "the metric gives no finite number", f"it gives {rating!r}"[:200])
            return
        rating = float(rating)
        if fault := out_of_bounds(rating, config.at_least, config.at_most):
            yield Dropped(replace(row, columns={**row.columns, config.into: rating}), f"rated {fault}")
        else:
            yield row.having(**{config.into: rating})


def choices_of(row: Row) -> tuple[list[str], int | None]:
    """A row's `choices`, and `choice`, the number of the right one, also as a table has it: as text. Nothing, if it has
    not both."""
    choices, choice = row.columns.get("choices"), row.columns.get("choice")
    if not isinstance(choices, list) or not re.fullmatch(r"\d{1,9}", str(choice), re.ASCII):
        return [], None
    return [str(each) for each in choices], int(str(choice))
