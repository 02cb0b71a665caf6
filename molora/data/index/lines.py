"""JSON Lines by offset."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molora.config import ConfigError
from molora.data.formats.rows import MAX_ROW_BYTES, parse
from molora.data.index.stored import DataFile, Index, Scan

_UTF8_MARK = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 2**24
_LF = 10
_SHORTEST_ROW_BYTES = len('{"messages": []}')


def scan(path: Path) -> Scan:
    """Finds the lines of a file; empty ones are no rows."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(3)
        if head.startswith(_GZIP):
            raise ConfigError(f"data source {path}: is gzipped, so that no row can be read by itself; unpack it")
        offset = file.seek(len(_UTF8_MARK) if head == _UTF8_MARK else 0)
        found = [np.array([offset])]
        while chunk := file.read(_CHUNK_BYTES):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == _LF) + offset + 1)
            offset += len(chunk)
        bounds = np.concatenate(found)
        if bounds[-1] != offset:  # the last line has no line break
            bounds = np.append(bounds, offset)
        rows = _filled(file.fileno(), bounds)
    longest = int(np.diff(bounds).max(initial=0))
    if longest > MAX_ROW_BYTES:
        row = int(np.diff(bounds).argmax())
        raise ConfigError(f"{path}, line {row + 1}: {longest} bytes; a row has at most {MAX_ROW_BYTES}")
    return Scan(len(rows), {"starts": np.append(bounds[rows], bounds[-1])}, {})


def _filled(descriptor: int, bounds: np.ndarray) -> np.ndarray:
    """The numbers of the lines that hold more than blanks. Only short ones are looked at: a long line of blanks is
    refused when it is read."""
    filled = np.ones(len(bounds) - 1, dtype=bool)
    for line in np.flatnonzero(np.diff(bounds) < _SHORTEST_ROW_BYTES).tolist():
        filled[line] = bool(os.pread(descriptor, int(bounds[line + 1] - bounds[line]), int(bounds[line])).strip())
    return np.flatnonzero(filled)


class LineRows:
    """The rows of one file. With `numbers_as_text` numbers are the text that stands in the file."""

    def __init__(self, index: Index, numbers_as_text: bool) -> None:
        self.name = str(index.path)
        self.numbers_as_text = numbers_as_text
        self.file = DataFile(index)
        self.starts = index.arrays()["starts"]

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        data = self.file.read(self.starts.item(row), self.starts.item(row + 1))
        value = parse(data, self.where(row), self.numbers_as_text)
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where(row)}: expected an object, found {type(value).__name__}")
        return value

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1}"

    def columns(self, wanted: Callable[[Iterable[str]], object]) -> list[str]:
        """The keys of the first rows, up to the row that completes what is wanted."""
        names: dict[str, None] = {}
        for row in range(min(len(self.starts) - 1, 1000)):
            names.update(dict.fromkeys(self[row]))
            if wanted(names):
                break
        return list(names)

    def will_read(self, rows: list[range]) -> None:
        for each in rows:
            self.file.will_read(self.starts.item(each.start), self.starts.item(each.stop))

    def close(self) -> None:
        self.file.close()
