"""Places in the columns of a row, and texts made of them: a recipe says `{answers[0]}`, a row has `answers`."""

import datetime
import decimal
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from molora.config import ConfigError, did_you_mean

# A step that stands for every item of a list.
EVERY = "*"


class Place:
    """A column, or what is inside: `answers[0]`, `translation[en]`, or of every item in a list `answers[*][text]`."""

    def __init__(self, name: str, column: str, steps: Sequence[str]) -> None:
        self.name = name
        self.column = column
        self.steps = steps

    def value(self, values: Mapping[str, Any], where: str) -> Any:
        """What a row has there. Raises ValueError for an item that is not there."""
        return self._inside(values.get(self.column), self.steps, where)

    def text(self, values: Mapping[str, Any], where: str) -> str:
        """The cell as text. Raises ValueError for a cell that is none."""
        return as_text(self.value(values, where), self.name, where)

    def _inside(self, value: Any, steps: Sequence[str], where: str) -> Any:
        for i, step in enumerate(steps):
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, (list, tuple)) and step == EVERY:
                return [self._inside(item, steps[i + 1 :], where) for item in value]
            elif isinstance(value, (list, tuple)) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
                value = value[int(step)]
            else:
                raise ValueError(f"{where}: {{{self.name}}}: no item {step[:80]!r} in {described(value)}")
        return value


class Template:
    """Text with columns in braces. It reads columns and their items, and nothing else of what a row holds."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.literals = [""]
        self.fields: list[str] = []
        self.places: list[Place] = []
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{where}: {text!r}: {error}; write a brace that is text twice") from error
        for literal, name, form, conversion in pieces:
            self.literals[-1] += literal
            if name is not None:
                name += f"!{conversion}" if conversion else ""
                self.fields.append(name + (f":{form}" if form else ""))
                self.literals.append("")

    def bind(self, names: Sequence[str]) -> None:
        """Finds the column of each field. Raises ConfigError if there is none."""
        self.places = [find_place(name, names, self.where, "{") for name in self.fields]

    def fill(self, values: Mapping[str, Any], where: str) -> str:
        """The text for a row. Raises ValueError for a column that holds no text."""
        filled = [place.text(values, where) for place in self.places]
        return "".join(piece for pair in zip(self.literals, [*filled, ""], strict=True) for piece in pair)


def place_in(name: str, names: Iterable[str]) -> Place | None:
    """The place that a recipe names, if its column is among the names."""
    if name in names:
        return Place(name, name, ())
    # From the end, as otherwise each bracket would be tried as the first.
    steps = re.match(r"(?:\][^\[\]]+\[)*", name[::-1])
    start = len(name) - (steps.end() if steps else 0)
    if start < len(name) and name[:start] in names:
        return Place(name, name[:start], re.findall(r"\[([^\[\]]+)\]", name[start:]))
    return None


def find_place(name: str, names: Sequence[str], where: str, brace: str = "") -> Place:
    """The place that a recipe names. Raises ConfigError if it is no column, nor an item of one."""
    if not name:
        raise ConfigError(f"{where}: {{}} names no column; columns are {names}")
    place = place_in(name, names)
    if not place:
        check_column(re.sub(r"[.\[!:].*", "", name, flags=re.DOTALL) or name, names, where)
        end = "}" if brace else ""
        raise ConfigError(
            f"{where}: {brace}{name}{end} is no column, nor an item of one, such as {brace}answers[0]{end} or "
            f"{brace}translation[en]{end}; columns are {names}"
        )
    check_column(place.column, names, where)
    return place


def check_column(column: str, names: Sequence[str], where: str) -> None:
    """Raises ConfigError unless one column has this name."""
    if (count := list(names).count(column)) > 1:
        raise ConfigError(f"{where}: {count} columns are called {column!r}; give each a name of its own")
    if not count:
        near = did_you_mean(column, names)
        raise ConfigError(f"{where}: no column {column!r}; {near}columns are {list(names)}")


def as_text(value: Any, name: str, where: str) -> str:
    """A cell as text. Raises ValueError for a cell that is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"  # as in JSON
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)) and not is_nan:
        return str(value)
    advice = ""
    if isinstance(value, (list, tuple)):
        first = name.replace(f"[{EVERY}]", "[0]") if f"[{EVERY}]" in name else f"{name}[0]"
        advice = f"write {{{first}}} for the first of them, or "
    elif isinstance(value, Mapping) and value:
        advice = f"write {{{name}[{next(iter(value))}]}} for one of them, or "
    raise ValueError(f"{where}: {{{name}}} is {described(value)}, not text; {advice}mend the row, or leave it out")


def described(value: Any) -> str:
    """What a cell holds, in words."""
    if value is None or isinstance(value, float):
        return "empty"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a group of {', '.join(map(str, value))}"[:200]
    return f"text ({value[:40]!r})" if isinstance(value, str) else f"of type {type(value).__name__}"
