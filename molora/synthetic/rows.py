"""Rows that a workflow makes, where each comes from, and the contract of the steps that make them."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from molora.config import ConfigError, did_you_mean, require
from molora.data.formats.templates import Place, Template, as_text, place_in
from molora.data.messages import Message, media, rooted

Made = TypeVar("Made")

# Why a row is dropped that a step cannot make anything of, and one that a model has no answer to.
FAULTY, UNANSWERED = "faulty", "cannot be answered"
# What the id of a row has behind that of the row it is a part of: which part.
_MARK = "#"


@dataclass(frozen=True)
class Row:
    """A row with its columns, which are values of JSON. Its id is its own among the rows of a step. `parents` are the
    places of the rows, or of the row of a file, that it was made of; `place` is its own, which the workflow sets.
    Relative paths in its columns start from `folder`, that of the table it comes from, or from the current one."""

    id: str
    columns: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    place: str = ""
    folder: Path | None = None

    def having(self, /, **columns: Any) -> Row:
        """The row that a step makes of this one, with more columns or others."""
        return self.with_only({**self.columns, **columns})

    def with_only(self, columns: Mapping[str, Any]) -> Row:
        """The row that a step makes of this one, with these columns alone."""
        return Row(self.id, columns, (self.place,), folder=self.folder)

    def part(self, number: int, columns: Mapping[str, Any]) -> Row:
        """The row number `number`, from 0, of several that a step makes of this one, with these columns alone."""
        return replace(self.with_only(columns), id=f"{self.id}{_MARK}{number}")


@dataclass(frozen=True)
class Dropped:
    """A row that a step leaves out. Rows are counted by `reason`; `detail` is what is true of this one alone."""

    row: Row
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Reply:
    """A model's answer, ended by itself ("stop"), by a limit ("length") or by a server's filter ("content_filter"). If
    `error` is not empty, there is none."""

    text: str
    finished: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How a model of a workflow answers. `temperature` 0 takes the likeliest tokens; `top_p` draws among the likeliest
    up to that mass. An answer ends before the first of the texts `stop`. `schema`, a JSON schema, and `regex` hold
    answers to a form; give one of them at most."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    stop: list[str] = field(default_factory=list)
    schema: dict[str, Any] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        require(self, 1, "max_new_tokens")
        require(self, 0, "temperature")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; give a share above 0, and 1 at most")
        if self.schema is not None and self.regex is not None:
            raise ConfigError("give schema or regex, not both")


# Messages, and the number of the answer to them: that of a turn, or of several answers to one prompt.
Request = tuple[Row, Sequence[Message], int]


class Work(Protocol):
    """What a workflow does for its steps."""

    name: str

    def seed_of(self, *key: int | str) -> int:
        """A seed of this step, by the workflow's seed and names."""
        ...

    def ask(self, model: str, requests: Sequence[Request], how: DecodingConfig) -> list[Reply]:
        """The replies of a model, which the config names, in the order of the requests. What was answered before, in
        this call or an earlier one of the same workflow, is not asked again; the draws of a reply depend on the
        workflow's seed, the step, the row's id and the request's number alone."""
        ...


class Step(Protocol):
    """Makes rows of rows; built as `Plugin(config)`, with the workflow's options read into its `config_type`.

    What a step makes depends on the rows, its config and `work` alone, so that a workflow that was stopped makes the
    same again. A row that is left out is yielded as `Dropped`. A step that says `begins = True` has no rows before it.
    `models` are the names of the workflow's models that it asks, `rates` a column with a number that it decides by, of
    rows that it drops too, which the report shows the spread of. Building it raises ImportError or ValueError for what
    it needs and does not find, so that this is told before any model is asked."""

    config_type: type

    def run(self, rows: Sequence[Row], work: Work) -> Iterable[Row | Dropped]: ...


class RowByRow(ABC):
    """A step that makes of each row what does not depend on the others; see `made_of_each` for what it may raise."""

    @abstractmethod
    def made_of(self, row: Row, work: Work) -> Iterable[Row | Dropped]: ...

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        for made in made_of_each(rows, lambda row: self.made_of(row, work)):
            yield from made


class NoColumn(ConfigError):
    """A row has no column of the name `column`."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


def made_of_each(rows: Sequence[Row], make: Callable[[Row], Iterable[Made]]) -> Iterator[list[Made | Dropped]]:
    """What `make` makes of each row, one after the other. A row that it raises ValueError for is dropped as faulty, and
    one that lacks a column which another row has is dropped for that. Raises NoColumn for a column that no row has, and
    any other ConfigError of `make`."""
    known: set[str] = set()
    for row in rows:
        try:
            made: list[Made | Dropped] = [*make(row)]
        except NoColumn as error:
            known = known or {name for other in rows for name in other.columns}
            if place_in(error.column, known) is None:
                raise
            made = [Dropped(row, f"no column {error.column!r}")]
        except ConfigError:
            raise
        except ValueError as error:
            made = [Dropped(row, FAULTY, str(error))]
        yield made


def read_each(rows: Sequence[Row], read: Callable[[Row], str]) -> tuple[list[Row], list[str], list[Dropped]]:
    """The rows whose text `read` can read, those texts, and the other rows, dropped; see `made_of_each`."""
    could: list[Row] = []
    texts: list[str] = []
    dropped: list[Dropped] = []
    for row, (made,) in zip(rows, made_of_each(rows, lambda row: [read(row)]), strict=True):
        if isinstance(made, Dropped):
            dropped.append(made)
        else:
            could.append(row)
            texts.append(made)
    return could, texts, dropped


class Text:
    """A template over the columns of rows, such as "{question}" or "{answers[0]}"."""

    def __init__(self, text: str, where: str) -> None:
        self.template = Template(text, where)
        self.bound: tuple[str, ...] | None = None

    def of(self, row: Row) -> str:
        """Raises NoColumn for a column that the row has not, ValueError for one that holds no text."""
        if self.bound != (names := tuple(row.columns)):
            self.template.places = [place_of(name, row, self.template.where) for name in self.template.fields]
            self.bound = names
        return self.template.fill(row.columns, f"row {row.id}")


def texts_of(templates: Mapping[str, str], where: str) -> dict[str, Text]:
    """Templates by name, each with its name in errors."""
    return {name: Text(text, f"{where}.{name}") for name, text in templates.items()}


def place_of(name: str, row: Row, where: str) -> Place:
    """The column, or what is inside, that a config names. Raises NoColumn."""
    if (place := place_in(name, row.columns)) is None:
        near = did_you_mean(name, row.columns)
        told = f"{where}: no column {name!r}; {near}row {row.id} has {', '.join(row.columns) or 'none'}"
        raise NoColumn(told, name)
    return place


def value_of(name: str, row: Row, where: str) -> Any:
    """What a row has in a column, or inside it. Raises NoColumn for a column that the row has not."""
    return place_of(name, row, where).value(row.columns, f"row {row.id}")


def text_of(name: str, row: Row, where: str) -> str:
    """The same as text. Raises ValueError for a value that is none."""
    return as_text(value_of(name, row, where), name, f"row {row.id}")


def with_media(row: Row, columns: Mapping[str, str]) -> tuple[Row, list[dict[str, Any]]]:
    """The media that a config names, a column by its part type: the row with absolute paths in these columns, and a
    part of each. Raises ValueError for a column that holds no text, and for a path that cannot be one."""
    content = [media(kind, text_of(column, row, f"media.{kind}")) for kind, column in columns.items()]
    at_home([{"role": "user", "content": content}], row)
    paths = zip(columns.values(), content, strict=True)
    found = {column: part["path"] for column, part in paths if "path" in part and column in row.columns}
    return replace(row, columns={**row.columns, **found}), content


def at_home(messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    """Makes the paths in a row's messages absolute."""
    return rooted(messages, row.folder or Path.cwd(), None, f"row {row.id}")


def list_of(name: str, row: Row, where: str) -> list[Any]:
    """The same as a list. Raises ValueError for a value that is none."""
    value = value_of(name, row, where)
    if not isinstance(value, list):
        raise ValueError(f"row {row.id}: {name}: expected a list, got {value!r:.80}")
    return value


def is_json(value: Any) -> bool:
    """Whether JSON can hold what a value is made of: it has no NaN, and no number without end."""
    return all(math.isfinite(inner) for inner in _leaves(value) if isinstance(inner, float))


def texts_of_list(name: str, row: Row, where: str) -> list[str]:
    """The same as the texts of a list. Raises ValueError for a value that is none, and for an item that is no text."""
    return [as_text(item, f"{name}[{i}]", f"row {row.id}") for i, item in enumerate(list_of(name, row, where))]


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, those of lists and mappings too."""
    return (inner for inner in _leaves(value) if isinstance(inner, str))


def written_in(value: Any) -> Iterator[str]:
    """Every text in a value, and what is no text as JSON writes it."""
    return (inner if isinstance(inner, str) else json.dumps(inner) for inner in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    else:
        yield value
