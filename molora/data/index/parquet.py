"""Parquet by row groups, which are read whole: the few that are in use are kept in memory."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molora.config import ConfigError
from molora.data.formats.opening import named_value
from molora.data.index.stored import Index, Scan


def scan(path: Path) -> Scan:
    """Finds the row groups of a file. Raises ConfigError for what is no Parquet."""
    return scan_opened(path, path)


def scan_opened(file: Any, path: Path) -> Scan:
    """The same of a file that is open, and called `path` in errors."""
    about = _open(file, path).metadata
    groups = [about.row_group(number) for number in range(about.num_row_groups)]
    filled = [(number, group) for number, group in enumerate(groups) if group.num_rows]
    arrays = {
        "groups": np.array([number for number, _ in filled], dtype=np.int64),
        "ends": np.cumsum([group.num_rows for _, group in filled], dtype=np.int64),
        "num_bytes": np.array([group.total_byte_size for _, group in filled], dtype=np.int64),
    }
    return Scan(about.num_rows, arrays, {"columns": list(about.schema.to_arrow_schema().names)})


def _open(file: Any, path: Path, metadata: Any = None) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install 'molora[datasets]'") from error
    try:
        return parquet.ParquetFile(file, metadata=metadata, pre_buffer=False)
    except Exception as error:  # pyarrow's own, of many kinds
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"data source {path}: cannot be read as parquet ({reason}); download it again") from error


class ParquetRows:
    """The rows of one file, of the columns that are asked for."""

    def __init__(self, index: Index) -> None:
        from datasets import Features, Value

        self.name = str(index.path)
        self.index = index
        with index.open() as file:
            opened = _open(file, index.path)
            self.metadata, schema = opened.metadata, opened.schema_arrow
        self.file = _open(index.path, index.path, self.metadata) if index.fetch is None else None
        arrays = index.arrays()
        self.groups: list[int] = arrays["groups"].tolist()
        self.ends: list[int] = arrays["ends"].tolist()
        features = Features.from_arrow_schema(schema)
        # Values of other types are as they are stored.
        self.features = {
            name: feature
            for name, feature in features.items()
            if not isinstance(feature, Value) or feature.dtype in ("float16", "float32")
        }
        self.names: list[str] = list(index.about["columns"])
        self.read: list[str] | None = None
        self.loaded: OrderedDict[int, list[tuple[str, list[Any]]]] = OrderedDict()
        self.kept = 2

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        at = bisect_right(self.ends, row)
        place = row - (self.ends[at - 1] if at else 0)
        return {name: cells[place] for name, cells in self._group(at)}

    def _group(self, at: int) -> list[tuple[str, list[Any]]]:
        """The columns of a row group as values, which takes less time for all at once."""
        if at in self.loaded:
            self.loaded.move_to_end(at)
            return self.loaded[at]
        while len(self.loaded) >= self.kept:
            self.loaded.popitem(last=False)
        try:
            table = self._read_group(self.groups[at])
        except Exception as error:  # pyarrow's own, of many kinds
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"data source {self.name}, row group {self.groups[at] + 1}: cannot be read ({reason}); download "
                "the file again"
            ) from error
        columns = {name: table[name].to_pylist() for name in table.column_names}
        for name in self.features.keys() & columns.keys():
            columns[name] = [named_value(value, self.features[name]) for value in columns[name]]
        self.loaded[at] = list(columns.items())
        return self.loaded[at]

    def _read_group(self, number: int) -> Any:
        if self.file is not None:
            return self.file.read_row_group(number, columns=self.read, use_threads=False)
        with self.index.open() as file:
            opened = _open(file, self.index.path, self.metadata)
            return opened.read_row_group(number, columns=self.read, use_threads=False)

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"

    def columns(self, wanted: Callable[[Iterable[str]], Any]) -> list[str]:
        """All columns; those that are wanted, or one, are read from then on."""
        if wanted_names := wanted(self.names):
            self.read = [name for name in self.names if name in wanted_names]
        return self.names

    def will_read(self, rows: list[range]) -> None:
        """Keeps the row groups that come next, and drops others."""
        wanted: set[int] = set()
        for each in rows:
            wanted.update(range(bisect_right(self.ends, each.start), bisect_right(self.ends, each.stop - 1) + 1))
        self.kept = max(2, len(wanted))
        for at in self.loaded.keys() - wanted:
            del self.loaded[at]

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
