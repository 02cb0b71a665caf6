"""Steps that choose among rows: by chance, and by what stands in their columns."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from molora.config import ConfigError, require
from molora.evaluate.normalise import normalise, words
from molora.synthetic.rows import Dropped, Row, RowByRow, Work, read_each, text_of, value_of


@dataclass(kw_only=True)
class DrawRowsConfig:
    """How many rows are drawn; all, if there are no more."""

    count: int

    def __post_init__(self) -> None:
        require(self, 1, "count")


class DrawRows:
    """Rows drawn by the workflow's seed, in the order in which they were."""

    config_type = DrawRowsConfig

    def __init__(self, config: DrawRowsConfig) -> None:
        self.config = config

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        draw = random.Random(work.seed_of("sample"))
        kept = {*draw.sample(range(len(rows)), min(self.config.count, len(rows)))}
        for number, row in enumerate(rows):
            yield row.having() if number in kept else Dropped(row, "not drawn")


@dataclass(kw_only=True)
class ShotsConfig:
    """Each row gets `count` texts of other rows' `column`, as a list in the column `into`; `take` is how many times
    each row is taken, with other texts each time."""

    column: str
    count: int = 3
    take: int = 1
    into: str = "shots"

    def __post_init__(self) -> None:
        require(self, 1, "count", "take")


class Shots:
    """Rows with examples that are drawn from the other rows, such as for a prompt of several."""

    config_type = ShotsConfig

    def __init__(self, config: ShotsConfig) -> None:
        self.config = config

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        rows, texts, dropped = read_each(rows, lambda row: text_of(config.column, row, "column"))
        yield from dropped
        if len(rows) <= config.count:
            raise ConfigError(f"count is {config.count}, and there are {len(rows)} rows to draw from; give more rows")
        for number, row in enumerate(rows):
            for again in range(config.take):
                draw = random.Random(work.seed_of("shots", row.id, again))
                drawn = draw.sample([other for other in range(len(rows)) if other != number], config.count)
                made = {config.into: [texts[other] for other in drawn]}
                yield row.part(again, {**row.columns, **made}) if config.take > 1 else row.having(**made)


@dataclass(kw_only=True)
class RuleConfig:
    """What a column has to hold. Its text has so many characters and words, in any script; `matches` is a regular
    expression that is found in it, `rejects` one that is not; it is `one_of` some texts. `at_least` and `at_most` are
    for numbers, and for texts that are one. `differs_from` names a column that must hold another text, but for case,
    spaces and a closing full stop. `most_repeated` is the share of the text's words, from 0 to 1, that may belong to
    four words in a row which stood there before, as in the loops that small models fall into."""

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    matches: str | None = None
    rejects: str | None = None
    one_of: list[str] | None = None
    at_least: float | None = None
    at_most: float | None = None
    differs_from: str | None = None
    most_repeated: float | None = None

    def __post_init__(self) -> None:
        require(self, 0, "min_characters", "max_characters", "min_words", "max_words", "most_repeated")
        check_bounds(self)
        for name in ("matches", "rejects"):
            pattern(getattr(self, name) or "", name)
        if all(value is None for value in vars(self).values()):
            raise ConfigError(f"says nothing; give one of {', '.join(vars(self))}")


@dataclass(kw_only=True)
class FilterConfig:
    """What each column has to hold, by its name."""

    rules: dict[str, RuleConfig]

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("rules: none; give a rule for a column at least")


class Filter(RowByRow):
    """Rows whose columns keep all rules."""

    config_type = FilterConfig

    def __init__(self, config: FilterConfig) -> None:
        self.config = config

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        for column, rule in self.config.rules.items():
            if fault := _fault(rule, column, row):
                yield Dropped(row, f"{column}: {fault}")
                return
        yield row.having()


def _fault(rule: RuleConfig, column: str, row: Row) -> str:
    """Which part of a rule a row breaks; nothing if none."""
    where = f"rules.{column}"
    if rule.at_least is not None or rule.at_most is not None:
        number = _number(value_of(column, row, where), column, row)
        if fault := out_of_bounds(number, rule.at_least, rule.at_most):
            return fault
    text = text_of(column, row, where)
    for kind, count in {"characters": len(text), "words": len(words(text))}.items():
        least, most = getattr(rule, f"min_{kind}"), getattr(rule, f"max_{kind}")
        if least is not None and count < least:
            return f"fewer than {least} {kind}"
        if most is not None and count > most:
            return f"more than {most} {kind}"
    if rule.matches is not None and not re.search(rule.matches, text):
        return f"does not match {rule.matches!r}"
    if rule.rejects is not None and re.search(rule.rejects, text):
        return f"matches {rule.rejects!r}"
    if rule.one_of is not None and text not in rule.one_of:
        return "none of the texts it may be"
    if rule.differs_from is not None:
        other = text_of(rule.differs_from, row, f"{where}.differs_from")
        if normalise(text) == normalise(other):
            return f"the same as {rule.differs_from}"
    if rule.most_repeated is not None and repeated(words(text)) > rule.most_repeated:
        return f"more than {rule.most_repeated:.0%} of it repeats"
    return ""


def out_of_bounds(number: float, at_least: float | None, at_most: float | None) -> str:
    """Which of two bounds a number breaks; nothing if none. What is not finite is within no bounds."""
    if not math.isfinite(number):
        return "not a finite number"
    if at_least is not None and number < at_least:
        return f"below {at_least:g}"
    return f"above {at_most:g}" if at_most is not None and number > at_most else ""


def check_bounds(config: Any) -> None:
    """Raises ConfigError for an `at_least` or `at_most` that no number is on one side of."""
    for name in ("at_least", "at_most"):
        value = getattr(config, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; give a finite number")


def _number(value: Any, column: str, row: Row) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {row.id}: {column}: {value!r:.80} is no number") from error


def repeated(pieces: Sequence[str], length: int = 4) -> float:
    """The share of words, from 0 to 1, in a run of `length` words that stands at an earlier place too."""
    seen: Counter[tuple[str, ...]] = Counter()
    inside: set[int] = set()
    for start in range(len(pieces) - length + 1):
        run = tuple(pieces[start : start + length])
        if seen[run]:
            inside.update(range(start, start + length))
        seen[run] += 1
    return len(inside) / len(pieces) if pieces else 0.0


def pattern(text: str, where: str) -> re.Pattern[str]:
    """A regular expression of a config. Raises ConfigError."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{where}: {text!r} is no regular expression ({error})") from error
