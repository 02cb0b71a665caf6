"""Steps that drop rows for what they have in common with others: with earlier rows, and with test sets."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from molora.config import ConfigError, require
from molora.data.formats.opening import open_rows
from molora.evaluate.normalise import normalise, words
from molora.synthetic.rows import Dropped, Row, RowByRow, Text, Work, read_each, value_of, written_in


@dataclass(kw_only=True)
class DeduplicateConfig:
    """`columns` are compared, joined; numbers and others that are no text as JSON writes them. Rows are duplicates if
    they are equal but for case, spaces and a closing full stop, or if the share that their runs of `characters`
    characters have in common (Jaccard's) is `similarity` or more; without `similarity` only equal rows are."""

    columns: list[str]
    similarity: float | None = 0.7
    characters: int = 5

    def __post_init__(self) -> None:
        require(self, 1, "characters")
        if not self.columns:
            raise ConfigError("columns: none; name what is compared")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise ConfigError(f"similarity is {self.similarity}; give a number above 0, and 1 at most")


class Deduplicate:
    """Rows that no earlier one is a duplicate of. No pair is missed, as with hashes: the rows to compare are found by
    an index of each one's rarest runs.

    Source: prefix filtering (Bayardo et al., 2007, "Scaling Up All Pairs Similarity Search")."""

    config_type = DeduplicateConfig

    def __init__(self, config: DeduplicateConfig) -> None:
        self.config = config

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        rows, texts, dropped = read_each(rows, lambda row: normalise(_joined(row, self.config.columns)))
        yield from dropped
        kept_texts: dict[str, Row] = {}
        index = None if self.config.similarity is None else _Near(texts, self.config.similarity, self.config.characters)
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if text in kept_texts:
                yield Dropped(row, "the same as an earlier row", kept_texts[text].place)
            elif index and (near := index.earlier(number)) is not None:
                yield Dropped(row, "much like an earlier row", rows[near].place)
            else:
                kept_texts[text] = row
                if index:
                    index.keep(number)
                yield row.having()


class _Near:
    """Finds, among texts that were kept, one that is near another."""

    def __init__(self, texts: Sequence[str], similarity: float, size: int) -> None:
        self.similarity = similarity
        self.runs = [_runs(text, size) for text in texts]
        counts = Counter(run for runs in self.runs for run in runs)
        self.rarest = [sorted(runs, key=lambda run: (counts[run], run)) for runs in self.runs]
        self.kept: defaultdict[str, list[int]] = defaultdict(list)

    def earlier(self, number: int) -> int | None:
        """The first kept text that is as similar to text `number` as is asked for."""
        runs = self.runs[number]
        for other in sorted({other for run in self._prefix(number) for other in self.kept[run]}):
            common = len(runs & self.runs[other])
            if common >= self.similarity * (len(runs) + len(self.runs[other]) - common) - 1e-9:
                return other
        return None

    def keep(self, number: int) -> None:
        for run in self._prefix(number):
            self.kept[run].append(number)

    def _prefix(self, number: int) -> list[str]:
        """The rarest runs of a text, of which one at least is among those of every text that is similar enough: such a
        text has `similarity` of its runs at least."""
        runs = self.rarest[number]
        return runs[: len(runs) - math.ceil(self.similarity * len(runs) - 1e-9) + 1]


def _runs(text: str, size: int) -> frozenset[str]:
    return frozenset(text[start : start + size] for start in range(max(len(text) - size, 0) + 1))


@dataclass(kw_only=True)
class TestSetConfig:
    """A table, opened as that of the step `table`, and the `text` of its rows to look for, a template over its columns:
    "{question} {answer}"."""

    path: str
    text: str
    rows_under: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    __test__ = False  # no tests of pytest's


@dataclass(kw_only=True)
class DecontaminateConfig:
    """`sets` are test sets by name. A row is dropped if so many `words` in a row, in any of its `columns` (or in any
    column), stand in a row of a test set too; a test row of fewer words counts whole, if it has `least_words`."""

    sets: dict[str, TestSetConfig]
    columns: list[str] = field(default_factory=list)
    words: int = 13
    least_words: int = 5

    def __post_init__(self) -> None:
        require(self, 1, "words", "least_words")
        if not self.sets:
            raise ConfigError("sets: none; name a test set at least")


class Decontaminate(RowByRow):
    """Rows that have no run of words in common with a test set. Case, punctuation and spaces make no difference.

    Source: n-grams of 13 words, as in GPT-3 (arXiv 2005.14165, appendix C)."""

    config_type = DecontaminateConfig

    def __init__(self, config: DecontaminateConfig) -> None:
        self.config = config
        # Runs of words, by their number, each with the set that has it.
        self.known: dict[int, dict[tuple[str, ...], str]] = {}
        for name, given in config.sets.items():
            for pieces in _test_rows(given, f"sets.{name}"):
                length = min(config.words, len(pieces))
                if length >= config.least_words:
                    found = self.known.setdefault(length, {})
                    found.update((run, found.get(run, name)) for run in _word_runs(pieces, length))

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        columns = self.config.columns or row.columns
        for text in (text for name in columns for text in written_in(value_of(name, row, "columns"))):
            pieces = words(text)
            for length, known in self.known.items():
                for run in _word_runs(pieces, length):
                    if run in known:
                        yield Dropped(row, f"in test set {known[run]}", " ".join(run))
                        return
        yield row.having()


def _test_rows(config: TestSetConfig, where: str) -> Iterator[list[str]]:
    template = Text(config.text, f"{where}.text")
    rows, numbers = open_rows(config, list)
    for number in numbers:
        yield words(template.of(Row(str(number), rows[number])))


def _word_runs(pieces: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    for start in range(len(pieces) - length + 1):
        yield tuple(pieces[start : start + length])


def _joined(row: Row, columns: Iterable[str]) -> str:
    values: list[Any] = [value_of(name, row, "columns") for name in columns]
    return "\n".join(written_in(values))
