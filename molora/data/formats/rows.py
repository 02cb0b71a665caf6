"""Rows of text files: CSV, TSV, JSON and JSON Lines. A cell is the text that stands in the file; no type is guessed.

Rows are found once, by their offsets, so that a file need not fit in memory. Files are UTF-8. Those in UTF-16 (with its
mark) and those that are gzipped are unpacked into memory.
"""

import csv
import gzip
import io
import json
import mmap
import os
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from molora.config import ConfigError
from molora.received import once

MAX_ROW_BYTES = 2**26
MAX_UNPACKED_BYTES = 2**27
MAX_DEPTH = 64

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"

# A whole string without escapes, the quote before another, or a bracket.
_TOKENS = re.compile(rb'"[^"\\]*"|["\[\]{}]')
# Some of what a string holds: a match of millions of escapes would take gigabytes.
_IN_STRING = re.compile(rb'(?:[^"\\]+|\\.?){1,1000}', re.DOTALL)
# A string without escapes (to the end if nothing closes it), or text outside that is no bracket.
_NO_BRACKETS = re.compile(r'"[^"]*"?|[^"\[\]{}]+')
_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

# A number, the name of a file, or a sentence: rather a cell than the name of a column.
_CELL = re.compile(r"^[-+]?[\d.,]+$|\.(?:jpe?g|png|webp|gif|tiff?|wav|mp3|flac|ogg|opus)$|[?!.]$|^.{60}", re.I | re.S)

_Dialect = Callable[[Iterable[str]], Iterator[list[str]]]


def check_file(path: Path) -> None:
    """Raises ConfigError for what is no file; its rows are read more than once."""
    if not path.is_file():
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        why = "not a file, but a pipe or a device; write it to a file" if path.exists() else f"no such file{here}"
        if path.is_dir():
            why = "not a file, but a folder; name a file in it, or where several are read, such as shards, a pattern"
        raise ConfigError(f"data source {path}: {why}")


class _Rows:
    """Rows of one file by their offsets; so the file may not change meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.expanduser(path))
        check_file(self.path)
        with open(self.path, "rb") as file:
            head = file.read(3)
            self.state = self._state(file)
        self.unpacked: bytes | None = None
        if head.startswith(_GZIP):
            self.unpacked = self._gunzipped()
            head = self.unpacked[:3]
        if head.startswith(_UTF16_MARKS):
            self.unpacked = self._from_utf16()
            head = b""
        self.start = len(_UTF8_MARK) if head == _UTF8_MARK else 0
        self.starts, self.ends = array("Q"), array("Q")

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def next_row(self) -> str:
        """The row that is looked for, for errors."""
        return self.where(len(self.starts))

    def open(self) -> BinaryIO:
        if self.unpacked is not None:
            return io.BytesIO(self.unpacked)
        file = open(self.path, "rb")  # noqa: SIM115 (the caller closes it)
        if self._state(file) != self.state:
            file.close()
            raise ValueError(f"data source {self.path}: has changed since it was opened; start again")
        return file

    def read(self, start: int, end: int) -> bytes:
        with self.open() as file:
            file.seek(start)
            return file.read(end - start)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line from `start` on, with its offset; it ends in LF, CR or both."""
        with self.open() as file:
            offset = file.seek(self.start)
            while block := file.readline(MAX_ROW_BYTES + 1):
                if len(block) > MAX_ROW_BYTES:
                    raise ConfigError(f"{self.next_row()}: a line of over {MAX_ROW_BYTES} bytes, the most that is read")
                for line in block.splitlines(keepends=True):
                    yield offset, line
                    offset += len(line)

    def _gunzipped(self) -> bytes:
        try:
            with gzip.open(self.path) as file:
                return self._bounded(file.read(MAX_UNPACKED_BYTES + 1))
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"data source {self.path}: cannot be unpacked ({error}); download it again") from error

    def _from_utf16(self) -> bytes:
        if self.unpacked is None:
            with open(self.path, "rb") as file:
                self.unpacked = self._bounded(file.read(MAX_UNPACKED_BYTES + 1))
        try:
            return self.unpacked.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data source {self.path}: byte {error.start + 1} is not UTF-16, as its mark says; write it as UTF-8"
            ) from error

    def _bounded(self, data: bytes) -> bytes:
        if len(data) > MAX_UNPACKED_BYTES:
            raise ConfigError(
                f"data source {self.path}: over {MAX_UNPACKED_BYTES} bytes, the most that is unpacked into memory; "
                "give it unpacked and in UTF-8, which is read row by row"
            )
        return data

    @staticmethod
    def _state(file: BinaryIO) -> tuple[int, int]:
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns


class JsonRows(_Rows):
    """Objects, one a line or in one list, with numbers as the text that stands in the file if `numbers_as_text`."""

    def __init__(self, path: Path, *, numbers_as_text: bool) -> None:
        super().__init__(path)
        self.numbers_as_text = numbers_as_text
        for start, end in self.spans():
            if end - start > MAX_ROW_BYTES:
                raise ConfigError(f"{self.next_row()}: {end - start} bytes; a row has at most {MAX_ROW_BYTES}")
            self.starts.append(start)
            self.ends.append(end)
        if not self.starts:
            raise ConfigError(f"data source {path}: no rows")

    def spans(self) -> Iterator[tuple[int, int]]:
        """Where each object begins and ends."""
        with self.open() as file:
            file.seek(self.start)
            is_list = file.read(4096).lstrip().startswith(b"[")
        return self._in_list() if is_list else self._in_lines()

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        value = parse(self.read(self.starts[row], self.ends[row]), self.where(row), self.numbers_as_text)
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where(row)}: expected an object, found {type(value).__name__}")
        return value

    def columns(self, wanted: Callable[[Iterable[str]], object]) -> list[str]:
        """The keys of the rows, up to the row that completes what is wanted. A row that is faulty says so when it is
        read."""
        names: dict[str, None] = {}
        fault: ValueError | None = None
        for row in range(len(self)):
            try:
                names.update(dict.fromkeys(self[row]))
                if wanted(names):
                    break
            except ValueError as error:
                fault = fault or error
        if fault is not None and not names:
            raise ConfigError(f"no row can be read: {fault}") from fault
        lists = [key for key, value in (self[0] if len(self) == 1 and not fault else {}).items() if _is_rows(value)]
        if lists and not wanted(names):
            raise ConfigError(
                f"data source {self.path}: is one object, and its {' and '.join(lists)} a list of rows; write "
                f"`rows_under: {lists[0]}` to read these"
            )
        return list(names)

    def _in_lines(self) -> Iterator[tuple[int, int]]:
        for offset, line in self.lines():
            if line.strip():
                yield offset, offset + len(line)

    def _in_list(self) -> Iterator[tuple[int, int]]:
        """The items of the list that is the whole file. Its brackets are counted here, and `parse` reads the items."""
        with self.open() as file:
            data = self.unpacked or mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            depth, begin, end, position = 0, 0, self.start, self.start
            while token := _TOKENS.search(data, position, stop := position + MAX_ROW_BYTES + 1):
                bracket = data[token.start()]
                after = token.end()
                if bracket in b'"' and after == token.start() + 1:
                    after = _after_string(data, after, stop)
                if after - position > MAX_ROW_BYTES:
                    raise ConfigError(f"{self.next_row()}: a text of over {MAX_ROW_BYTES} bytes, the most that is read")
                position = after
                if bracket in b"[{":
                    if depth < 2:
                        begin = token.start()
                        self._check_between(data, end, begin, b"," if depth and self.starts else b"")
                        end = token.end()
                    depth += 1
                    if depth > MAX_DEPTH:
                        raise ConfigError(f"{self.next_row()}: nested over {MAX_DEPTH} levels deep")
                elif bracket in b"]}":
                    depth -= 1
                    if depth == 1:
                        end = token.end()
                        yield begin, end
                    elif depth == 0:
                        break
            if not token:
                raise ConfigError(f"{self.next_row()}: the file ends inside its list; it has been cut off")
            self._check_between(data, end, token.start(), b"")
            self._check_between(data, token.end(), len(data), b"")

    def _check_between(self, data: mmap.mmap | bytes, start: int, end: int, expected: bytes) -> None:
        text = data[start : min(end, start + 4096)].strip()
        if text != expected or end - start > 4096:
            found = text[:40].decode(errors="replace")
            raise ConfigError(f"{self.next_row()}: expected objects with commas between them, found {found!r}")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _after_string(data: mmap.mmap | bytes, position: int, stop: int) -> int:
    """Where a string ends that begins before `position`: behind its quote, or at `stop` or the end of the data."""
    stop = min(stop, len(data))
    while position < stop:
        inside = _IN_STRING.match(data, position, stop)
        if inside is None:
            return position + 1
        position = inside.end()
    return stop


class CellRows(_Rows):
    """Lines of cells under a line of column names.

    CSV: a cell in quotes may hold separators and line breaks, and doubles its quotes. The separator is a comma, or a
    semicolon or tab if the names have no comma.

    TSV: if every line, cut at its tabs, has a cell for every column, each line is a row, and quotes are text, unless
    the quotes inside them are doubled. The same if that holds once tabs behind a backslash are taken for text.
    Otherwise, and where the first name is in quotes, quotes are as in CSV. Backslashes are text.
    """

    def __init__(self, path: Path, *, tabs: bool) -> None:
        super().__init__(path)
        self.names: list[str] = []
        lines = ((offset, line) for offset, line in self.lines() if line.strip())
        offset, line = next(lines, (0, b""))
        named = re.fullmatch('sep=([^"]) *', line.decode(errors="replace").rstrip("\r\n"), re.IGNORECASE)
        if named:  # as Excel writes and reads
            self.start = offset + len(line)
            _, line = next(lines, (0, b""))
        first = line.decode(errors="replace")
        outside_quotes = re.sub('"[^"]*"', "", first)
        separator = named[1] if named else "\t" if tabs else next((s for s in ",;\t" if s in outside_quotes), ",")
        dialects: list[_Dialect] = [partial(_in_quotes, separator=separator)]
        if tabs and separator == "\t" and not first.startswith('"'):
            dialects = [partial(_in_lines, border=re.compile(border)) for border in (r"\t", r"(?<!\\)\t")] + dialects
        for self.dialect in dialects:
            try:
                self._scan()
                break
            except _Ragged:
                if self.dialect is dialects[-1]:
                    raise
        if not self.starts:
            raise ConfigError(f"data source {path}: no rows{' under the column names' if self.names else ''}")

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        text = _decoded(self.read(self.starts[row], self.ends[row]), self.starts[row], self.where(row))
        cells = next(self.dialect(io.StringIO(text, newline="")))
        return dict(zip(self.names, cells, strict=False))  # both may end in empty cells

    def columns(self, wanted: Callable[[Iterable[str]], object]) -> list[str]:
        """The column names. Raises ConfigError if one that is wanted is missing, and they look like cells."""
        odd = next((name for name in self.names if _CELL.search(name)), None)
        if odd is not None and not wanted(self.names):
            raise ConfigError(
                f"data source {self.path}: a column that is asked for is missing, and {odd!r:.80} looks like a cell, "
                f"not a name; is there no line of column names? Write one above the rows. There is {self.names}"
            )
        return self.names

    def next_row(self) -> str:
        return super().next_row() if self.names else f"{self.path}, the line of column names"

    def _scan(self) -> None:
        """Finds where each row is. Raises ConfigError for one that cannot be read."""
        self.names, self.starts, self.ends = [], array("Q"), array("Q")
        position = begin = self.start

        def lines() -> Iterator[str]:
            nonlocal position
            for offset, line in self.lines():
                position = offset + len(line)
                if position - begin > MAX_ROW_BYTES:
                    raise ConfigError(
                        f"{self.next_row()}: over {MAX_ROW_BYTES} bytes; is a quote not closed, or not doubled?"
                    )
                yield _decoded(line, offset, self.next_row())

        rows = self.dialect(lines())
        while True:
            begin = position
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise ConfigError(
                    f"{self.next_row()}: {error}; a cell that holds a separator, a quote or a line break stands in "
                    "quotes, and quotes inside it are doubled"
                ) from error
            empty = len(cells) < 2 and not "".join(cells).strip()
            if empty and not self.read(begin, position).strip():
                continue  # a line of nothing; an empty cell of one column stands in quotes
            if not self.names:
                self.names = cells
                continue
            width = len(self.names)
            if any(cells[width:]) or (len(cells) < width and any(self.names[len(cells) :])):
                raise _Ragged(
                    f"{self.next_row()}: has {len(cells)} cells, but there are {width} column names: {self.names}; put "
                    "a cell that holds the separator in quotes, or mend the row"
                )
            self.starts.append(begin)
            self.ends.append(position)


class LineRows(_Rows):
    """The lines of a file that are not empty, as text."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        for offset, line in self.lines():
            if line.strip():
                self.starts.append(offset)
                self.ends.append(offset + len(line))

    def __getitem__(self, row: int) -> str:
        text = _decoded(self.read(self.starts[row], self.ends[row]), self.starts[row], self.where(row))
        return text.rstrip("\r\n")

    def by_first_word(self) -> dict[str, int]:
        """Which row begins with each word. Raises ConfigError for two that begin with the same."""
        found: dict[str, int] = {}
        for offset, line in self.lines():
            if line.strip():
                word = _decoded(line.split(maxsplit=1)[0], offset, self.where(len(found)))
                if word in found:
                    raise ConfigError(
                        f"{self.where(len(found))}: {word!r:.80} stands in row {found[word] + 1} too; take one out"
                    )
                found[word] = len(found)
        return found


class _Ragged(ConfigError):
    """A row with another number of cells than there are columns."""


def parse(data: bytes, where: str, numbers_as_text: bool = False) -> Any:
    """The value of a JSON text. Half a surrogate pair becomes U+FFFD. Raises ValueError, beginning with `where`, for
    what is no JSON, for a key that stands twice, and for nesting over `MAX_DEPTH`."""
    text = _decoded(data, 0, where)
    if text.count("[") + text.count("{") > MAX_DEPTH:
        brackets = _NO_BRACKETS.sub("", text.replace("\\\\", "").replace('\\"', ""))
        if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MAX_DEPTH:
            raise ValueError(f"{where}: nested over {MAX_DEPTH} levels deep")
    numbers: dict[str, Any] = {"parse_int": str, "parse_float": str} if numbers_as_text else {}
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=_no_constant, **numbers)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON ({error.msg} at character {error.pos + 1}); a line holds one object, or the file "
            "one list of them"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    return _whole(value) if r"\ud" in text.lower() else value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON; write null, or leave the row out")


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def _decoded(data: bytes, offset: int, where: str) -> str:
    """Raises ConfigError naming the byte that is no UTF-8 text."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{where}: byte {data[error.start]:#04x} ({offset + error.start + 1} bytes from the start of the "
            f"{'file' if offset else 'row'}) is not UTF-8; write the file as UTF-8, for example with "
            "`iconv -f LATIN1 -t UTF-8`"
        ) from error
    if "\0" in text:
        raise ConfigError(f"{where}: a NUL byte; the file is no text, or is UTF-16 without its mark, or damaged")
    return text


def _in_quotes(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(max(MAX_ROW_BYTES, csv.field_size_limit()))  # pictures as text are longer than its 128 KiB
    return csv.reader(lines, delimiter=separator, strict=True)


def _in_lines(lines: Iterable[str], border: re.Pattern[str]) -> Iterator[list[str]]:
    escaped = border.pattern != r"\t"
    for line in lines:
        cells = border.split(line.rstrip("\r\n"))
        yield [_unquoted(cell.replace("\\\t", "\t") if escaped else cell) for cell in cells]


def _unquoted(cell: str) -> str:
    """What a cell in quotes holds, if it is one that a writer had to put in quotes or an empty one; else the cell."""
    if len(cell) < 2 or not (cell[0] == cell[-1] == '"'):
        return cell
    inner = cell[1:-1]
    is_written_so = not inner or ('""' in inner and '"' not in inner.replace('""', ""))
    return inner.replace('""', '"') if is_written_so else cell
