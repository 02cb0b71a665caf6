"""Shards: many large files of rows, read through their indexes."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from molora.config import ConfigError
from molora.data.formats.table import Table, TableConfig, row_id
from molora.data.index.build import files_of, indexed
from molora.data.index.fetched import fetched
from molora.data.index.lines import LineRows
from molora.data.index.parquet import ParquetRows
from molora.data.index.stored import Index
from molora.data.index.tar import TarRows
from molora.data.messages import conversation, media_parts, rooted
from molora.data.order import Blocks
from molora.data.sources import read_tags
from molora.shard import is_first_process
from molora.terminal import say

# A block is what a disk or a network reads at a stretch; the blocks of a window lie in the system's memory together.
_BLOCK_BYTES = 2**22
_BLOCK_ROWS = 1024
_BLOCKS_PER_WINDOW = 16
# Row groups of Parquet lie in the memory of each process that reads.
_WINDOW_BYTES = 2**28
_OPEN_FILES = 64


@dataclass(kw_only=True)
class ShardsConfig:
    """Shards of rows: tar files of webdataset, Parquet files or JSONL, all of one kind.

    `path` names them, one or a list: `train-{0000..0099}.tar` is a hundred files, and * and ? stand for what is there.
    Their rows are conversations, as `messages` reads them, or with `prompt` and `answer` those of a table, as `table`
    reads them. In a tar file the columns are the endings of its members, such as txt, json and jpg, and a conversation
    stands in the member that ends in json; its paths may name other members of the row.

    `media` maps a part type to the column that holds it; "jpg;png" is the first of these that a row has.

    `hf://datasets/OWNER/NAME@REVISION/train-*.tar` names files of the hub. They are fetched when they are read, the
    next one meanwhile, and those needed longest ago are removed, so that all take at most `disk_gib` in the cache (by
    default 20).
    """

    path: str | list[str]
    prompt: str | None = None
    answer: str | None = None
    media: dict[str, str] = field(default_factory=dict)
    media_root: str | None = None
    disk_gib: float | None = None

    def __post_init__(self) -> None:
        if self.disk_gib is not None and not self.disk_gib > 0:
            raise ConfigError(f"disk_gib is {self.disk_gib}; expected a number of GiB above 0")
        if (self.prompt is None) != (self.answer is None):
            raise ConfigError("give both prompt and answer, or neither where the rows are conversations")


class Shards:
    """Conversations from shards. Where rows are is found once, by an index of each file: `molora data index` makes it
    ahead. Parquet files need the `datasets` extra."""

    config_type = ShardsConfig

    def __init__(self, config: ShardsConfig) -> None:
        self.media = config.media
        self.media_root = Path(os.path.expanduser(config.media_root)) if config.media_root else None
        paths = [config.path] if isinstance(config.path, str) else config.path
        in_table = config.prompt is not None
        self.rows = _Files(paths, config.media.values(), in_table, config.disk_gib)
        self.blocks = self.rows.blocks()
        self.table: Table | None = None
        if config.prompt is not None and config.answer is not None:
            columns = TableConfig(
                path=", ".join(paths),
                prompt=config.prompt,
                answer=config.answer,
                media=dict(config.media),
                media_root=config.media_root,
            )
            self.table = Table(columns, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.table[row] if self.table is not None else self._conversation(row)

    def where(self, row: int) -> str:
        """The file and row, for errors."""
        return self.rows.where(row)

    def provenance(self) -> dict[str, Any]:
        """The files, or their commit on the hub, for the card of a run."""
        if self.rows.fetched is not None:
            return {"files": [], "fingerprint": f"{self.rows.fetched.repository}@{self.rows.fetched.commit}"}
        return {"files": [index.path for index in self.rows.indexes]}

    def will_read(self, rows: list[range]) -> None:
        """Has the system read what comes next."""
        self.rows.will_read(rows)

    def will_fetch(self, rows: range) -> None:
        """Has the file of some rows fetched from the hub."""
        self.rows.will_fetch(rows)

    def _conversation(self, row: int) -> dict[str, Any]:
        where = self.rows.where(row)
        columns = self.rows[row]
        values: Any = columns
        if self.rows.in_members:
            values = columns.get("json")
            if not isinstance(values, Mapping):
                raise ValueError(
                    f"{where}: no member that ends in .json and holds a conversation; give prompt and answer"
                )
            values = {"id": columns["id"], **values}
        values = {**values, **{kind: columns.get(column) for kind, column in self.media.items()}}
        messages = conversation(values, where)
        if self.rows.in_members:
            _put_members(messages, columns)
        return {
            "id": row_id(values.get("id"), row, where),
            "messages": rooted(messages, self.rows.folder(row), self.media_root, where),
            "tags": read_tags(values.get("tags"), where),
        }


def _put_members(messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> None:
    """Puts the bytes of a row's members in place of paths that name them."""
    key = columns["id"]
    members = {f"{key}.{ending}".rpartition("/")[2]: value for ending, value in columns.items() if ending != "id"}
    for _, part in media_parts(messages):
        if isinstance(part, dict) and isinstance(data := members.get(str(part.get("path"))), bytes):
            del part["path"]
            part["bytes"] = data


def _all(names: Iterable[str]) -> None:
    """What a table that reads every column needs."""


class _Files:
    """The rows of all files, one after the other. A few files are open at a time, in each process by itself."""

    def __init__(self, patterns: Sequence[str], columns: Iterable[str], in_table: bool, disk_gib: float | None) -> None:
        self.fetched = fetched(patterns, disk_gib)
        paths = files_of(patterns) if self.fetched is None else list(self.fetched.sizes)
        kinds = {path.suffix.lower() for path in paths}
        if len(kinds) > 1:
            raise ConfigError(
                f"data source {', '.join(patterns)}: has files of {' and '.join(sorted(kinds))}; make a source of each"
            )
        self.name = ", ".join(patterns)
        self.in_members = kinds == {".tar"}
        self.in_groups = kinds == {".parquet"}
        indexes = indexed(paths, self._tell) if self.fetched is None else self.fetched.indexed(self._tell)
        self.indexes = [index for index in indexes if index.num_rows]
        self.ends = list(accumulate(index.num_rows for index in self.indexes))
        self.folders = [index.path.absolute().parent for index in self.indexes]
        if not self.ends:
            raise ConfigError(f"data source {self.name}: no rows")
        self.either = {column: column.split(";") for column in columns if ";" in column and self.in_members}
        self.in_table = in_table
        self.wanted: Callable[[Iterable[str]], Any] = _all
        self.process = os.getpid()
        self.open: OrderedDict[int, Any] = OrderedDict()
        self.last: tuple[int, Any, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is not forked: the files that are open stay here."""
        return {**vars(self), "open": OrderedDict(), "last": None}

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        rows, place = self._at(row)
        values = rows[place]
        if self.either:
            chosen = {
                column: next((values[name] for name in names if values.get(name) is not None), None)
                for column, names in self.either.items()
            }
            return {**values, **chosen}
        return values

    def where(self, row: int) -> str:
        rows, place = self._at(row)
        return rows.where(place)

    def folder(self, row: int) -> Path:
        return self.folders[self._find(row)[0]]

    def columns(self, needed: Callable[[Iterable[str]], Any]) -> list[str]:
        """The columns of any file. Those that are needed are read from each."""
        self.wanted = needed
        if self.in_members:
            names = dict.fromkeys(["id", *(ending for index in self.indexes for ending in index.about["endings"])])
        else:
            names = dict.fromkeys(self._opened(0).columns(needed))
        return [*names, *self.either]

    def will_read(self, rows: list[range]) -> None:
        of_file: dict[int, list[range]] = {}
        for each in rows:
            while each:
                file, first = self._find(each.start)
                stop = min(each.stop, self.ends[file])
                of_file.setdefault(file, []).append(range(first, first + stop - each.start))
                each = range(stop, each.stop)
        self.last = None
        if self.fetched is not None:
            self.fetched.note(self.indexes[file].path for file in of_file)
        for file in self.open.keys() | of_file.keys():
            self._opened(file).will_read(of_file.get(file, []))

    def will_fetch(self, rows: range) -> None:
        if self.fetched is not None:
            self.fetched.fetch_ahead(self.indexes[self._find(rows.start)[0]].path)

    def blocks(self) -> Blocks:
        """Blocks that lie in one file each, of about the same number of bytes; in Parquet row groups."""
        ends: list[np.ndarray] = []
        group_bytes = 0
        for index, end in zip(self.indexes, self.ends, strict=True):
            if self.in_groups:
                arrays = index.arrays()
                ends.append(arrays["ends"] + (end - index.num_rows))
                group_bytes = max(group_bytes, int(arrays["num_bytes"].max(initial=0)))
            else:
                row_bytes = max(1, index.state.num_bytes // index.num_rows)
                rows = min(_BLOCK_ROWS, max(1, _BLOCK_BYTES // row_bytes))
                inner = np.arange(rows, index.num_rows, rows)
                ends.append(np.append(inner, index.num_rows) + (end - index.num_rows))
        per_window = _BLOCKS_PER_WINDOW
        if self.in_groups:
            per_window = max(1, min(per_window, _WINDOW_BYTES // max(1, group_bytes)))
        return Blocks(np.concatenate(ends), per_window, None if self.fetched is None else np.array(self.ends))

    def _find(self, row: int) -> tuple[int, int]:
        file = bisect_right(self.ends, row)
        return file, row - (self.ends[file - 1] if file else 0)

    def _at(self, row: int) -> tuple[Any, int]:
        """The rows of the file that a row is in, and its number there; a row is asked for several times in turn."""
        if self.last is None or self.last[0] != row or self.process != os.getpid():
            file, place = self._find(row)
            self.last = row, self._opened(file), place
        return self.last[1], self.last[2]

    def _opened(self, file: int) -> Any:
        """The rows of a file. What was open in another process is not touched."""
        if self.process != os.getpid():
            self.process, self.open = os.getpid(), OrderedDict()
        if file in self.open:
            self.open.move_to_end(file)
            return self.open[file]
        while len(self.open) >= _OPEN_FILES:
            self.open.popitem(last=False)[1].close()
        self.open[file] = self._open(self.indexes[file])
        return self.open[file]

    def _open(self, index: Index) -> Any:
        if self.in_members:
            return TarRows(index, self.in_table)
        if not self.in_groups:
            return LineRows(index, self.in_table)
        rows = ParquetRows(index)
        rows.columns(self.wanted)
        return rows

    def _tell(self, done: int, missing: int) -> None:
        if not done and is_first_process():
            files = "1 file" if missing == 1 else f"{missing:,} files"
            if self.fetched is not None and not self.in_groups:
                files += f", for which all {sum(self.fetched.sizes.values()) / 2**30:,.2g} GiB are fetched"
            say(f"{self.name}: finding the rows of {files}, once (`molora data index` does it ahead)")
