"""Steps that a workflow begins with: rows of tables and of data sources."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from molora.config import require
from molora.data.formats.opening import open_rows
from molora.data.formats.table import row_id
from molora.data.messages import parts
from molora.data.sources import SourceConfig, open_source
from molora.synthetic.rows import Dropped, Row, Work, made_of_each, texts_of


@dataclass(kw_only=True)
class ReadTableConfig:
    """A parquet, CSV, TSV, JSON or JSONL file, or a dataset of the hub, as for the data source `table`. `columns` makes
    each column of a template over the table's, such as "{answers[0]}"; without it all columns are read as they are.
    `limit` keeps the first rows only."""

    path: str
    columns: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    rows_under: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        require(self, 1, "limit")


class ReadTable:
    """The rows of a table, with its columns."""

    config_type = ReadTableConfig
    begins = True

    def __init__(self, config: ReadTableConfig) -> None:
        self.texts = texts_of(config.columns, "columns")
        self.rows, found = open_rows(config, list)
        self.range = found[: config.limit]

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        if not self.texts:
            yield from self.read()
            return
        for made in made_of_each([*self.read()], lambda row: [self.made_of(row)]):
            yield from made

    def read(self) -> Iterator[Row]:
        for number in self.range:
            where = self.rows.where(number)
            values = dict(self.rows[number])
            id = row_id(values.pop("id", None), number, where)
            yield Row(id, _plain(values, where), (where,), folder=self.rows.folder(number))

    def made_of(self, row: Row) -> Row:
        return replace(row, columns={name: text.of(row) for name, text in self.texts.items()})


class ReadConversations:
    """The rows of any data source. `messages` is the conversation without its last answer, which is the column
    `answer`; `question` is the text of what is asked last. `answers`, `choices`, `choice` and `tags` are there where
    the source tells them."""

    config_type = SourceConfig
    begins = True

    def __init__(self, config: SourceConfig) -> None:
        self.source: Any = open_source(config, "source")

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        for number in range(len(self.source)):
            told = dict(self.source[number])
            id = str(told.pop("id"))
            where = self.source.where(number) if hasattr(self.source, "where") else f"row {number + 1}"
            *asked, last = told.pop("messages")
            if last["role"] != "assistant":
                asked, last = [*asked, last], None
            columns: dict[str, Any] = {"messages": asked}
            if asked:
                columns["question"] = _said(asked[-1])
            if last is not None:
                columns["answer"] = _said(last)
            columns |= {name: value for name, value in told.items() if value not in ([], None)}
            yield Row(id, _plain(columns, where), (where,))


def _said(message: Any) -> str:
    return "".join(part["text"] for part in parts(message) if part["type"] == "text").strip()


def _plain(columns: dict[str, Any], where: str) -> dict[str, Any]:
    """The columns as JSON has them, where NaN and numbers without end are null. Raises ValueError for what no JSON
    holds, such as the bytes of a picture."""
    try:
        return json.loads(json.dumps(columns), parse_constant=lambda _: None)
    except TypeError as error:
        raise ValueError(
            f"{where}: {error}; rows of a workflow hold text and paths of media: `molora data convert` writes media as "
            "files"
        ) from error
