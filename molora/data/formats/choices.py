"""Questions with several accepted answers, and multiple choice."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, NamedTuple

from molora.config import ConfigError
from molora.data.formats.templates import Place, as_text, described, find_place

# What templates may name beside the columns where a question has options: all of them, the right one, its letter, and
# the other one of two.
MADE = ("choices", "choice", "letter", "other")

_MAX_LIST_CHARACTERS = 2**16


@dataclass(kw_only=True)
class ChoiceConfig:
    """Which column says what option is right, and how: by its `number`, counted from 0, its `letter` or its `text`."""

    number: str | None = None
    letter: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if len(self.given) != 1:
            raise ConfigError("choice: give one of number, letter and text, and the column that has it")

    @property
    def given(self) -> list[tuple[str, str]]:
        """The one way that is given, and its column."""
        ways = {"number": self.number, "letter": self.letter, "text": self.text}
        return [(way, column) for way, column in ways.items() if column is not None]


class Chosen(NamedTuple):
    """The options of a question, and which of them is right. An open question has no options, and its answer is what
    was `said`."""

    texts: list[str]
    right: int
    said: str

    @property
    def made(self) -> dict[str, str]:
        """The right option, its letter and the other one, by the names in `MADE`."""
        if not self.texts:
            return {"choice": self.said, "letter": self.said}
        other = {"other": self.texts[1 - self.right]} if len(self.texts) == 2 else {}
        return {"choice": self.texts[self.right], "letter": ascii_uppercase[self.right], **other}

    @property
    def judged(self) -> dict[str, Any]:
        """What a row says of the options of its question."""
        return {"choices": self.texts, "choice": self.right} if self.texts else {}


class Choices:
    """The options of each row. They stand in a column that is a list, or in a column each."""

    def __init__(self, options: str | list[str], choice: ChoiceConfig, line: str) -> None:
        self.columns = [options] if isinstance(options, str) else options
        self.is_list = isinstance(options, str)
        ((self.way, self.column),) = choice.given
        self.line = line
        self.options: list[Place] = []
        self.right: Place | None = None

    @property
    def fields(self) -> list[str]:
        """The places that are read."""
        return [*self.columns, self.column]

    def bind(self, names: Sequence[str], where: str) -> None:
        """Finds the columns. Raises ConfigError if one is missing."""
        self.options = [find_place(column, names, f"{where}: choices") for column in self.columns]
        self.right = find_place(self.column, names, f"{where}: choice")

    def read(self, values: Mapping[str, Any], where: str) -> Chosen:
        """The options of a row. Raises ValueError for a single one, and for a right one that is none of them."""
        assert self.right is not None, "bind comes first"
        said = self.right.text(values, f"{where}: choice").strip()
        if self.is_list:
            value = self.options[0].value(values, f"{where}: choices")
            texts = texts_of(value, self.options[0].name, f"{where}: choices") if value not in (None, "") else []
        else:
            cells = [place.value(values, where) for place in self.options]
            while cells and (cells[-1] is None or cells[-1] == "" or cells[-1] != cells[-1]):  # NaN is not itself
                cells.pop()  # a question with fewer options than there are columns
            named = zip(cells, self.options, strict=False)
            texts = [as_text(cell, place.name, f"{where}: choices") for cell, place in named]
        if not texts:
            return Chosen([], 0, said)
        if not 2 <= len(texts) <= len(ascii_uppercase) or not all(texts):
            raise ValueError(
                f"{where}: choices: {texts!r:.200}; a question has from 2 to {len(ascii_uppercase)} options, none empty"
            )
        return Chosen(texts, self._index(said, texts, f"{where}: choice"), said)

    def lines(self, chosen: Chosen) -> str:
        """All options, one a line."""
        pairs = zip(ascii_uppercase, chosen.texts, strict=False)
        return "\n".join(self.line.replace("{letter}", letter).replace("{choice}", text) for letter, text in pairs)

    def _index(self, said: str, texts: Sequence[str], where: str) -> int:
        if self.way == "text":
            known = [text.strip() for text in texts]
        elif self.way == "letter":
            known = list(ascii_uppercase[: len(texts)])
            said = said.upper()
        else:
            known = [str(number) for number in range(len(texts))]
        if known.count(said) != 1:
            raise ValueError(
                f"{where}: {{{self.column}}} is {said!r:.80}, and the {self.way} of an option is one of "
                f"{', '.join(known)}"[:400]
                + "; choice says how the column names the right option: by its number from 0, its letter or its text"
            )
        return known.index(said)


def texts_of(value: Any, name: str, where: str) -> list[str]:
    """The texts in a cell that is a list, or text that spells one as JSON or Python write it. Raises ValueError."""
    if isinstance(value, str) and value.lstrip().startswith("[") and len(value) <= _MAX_LIST_CHARACTERS:
        value = _spelled(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: {{{name}}} is {described(value)}, not a list of texts")
    return [as_text(item, f"{name}[{i}]", where) for i, item in enumerate(value)]


def _spelled(text: str) -> Any:
    """The list that a text spells; the text itself if it spells none."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # MemoryError: nested too deep for Python
            continue
    return text


def judged_by(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a row of conversations says of its last answer: `answers`, all accepted ones, and `choices` with `choice`,
    the options and the number of the right one. Raises ValueError for what is none of these."""
    found: dict[str, Any] = {}
    for key in ("answers", "choices"):
        if (value := row.get(key)) is not None:
            if not _are_texts(value):
                raise ValueError(f"{where}: {key}: expected a list of texts, got {value!r:.80}")
            found[key] = list(value)
    if "choices" in found:
        choice, count = row.get("choice"), len(found["choices"])
        if type(choice) is not int or not 0 <= choice < count:
            raise ValueError(
                f"{where}: choice: {choice!r:.80}; it is the number of the right one of the choices, counted from 0, "
                f"and there are {count}"
            )
        found["choice"] = choice
    return found


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
