"""Rows of a list that stands under a key of a JSON file's one object, as many datasets are published."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.config import ConfigError, did_you_mean
from molora.data.formats.rows import JsonRows

# Train annotations of VQA are 354 MB; while items are looked for, the text is in memory twice.
MAX_LIST_BYTES = 2**32

_BLANKS = " \t\r\n"


class KeyedRows(JsonRows):
    """The objects of the list under `key`. The file is read once to find them, which takes as much memory as the file
    has bytes, and then row by row. `noted` is what each of them has under the key `note`."""

    def __init__(self, path: Path, key: str, *, numbers_as_text: bool, note: str | None = None) -> None:
        self.key = key
        self.note = note
        self.noted: list[Any] = []
        self.beside: dict[str, Any] = {}  # what stands before the list, by its key
        super().__init__(path, numbers_as_text=numbers_as_text)

    def where(self, row: int) -> str:
        return f"{self.path}, {self.key}, row {row + 1}"

    def spans(self) -> Iterator[tuple[int, int]]:
        with self.open() as file:
            file.seek(self.start)
            if len(data := file.read(MAX_LIST_BYTES + 1)) > MAX_LIST_BYTES:
                raise ConfigError(
                    f"{self.path}: over {MAX_LIST_BYTES} bytes, the most of which a list is read; write the list as "
                    "JSON Lines, an object a line"
                )
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{self.path}: byte {error.start + 1} is not UTF-8; write the file as UTF-8"
                ) from error
        at, offset = 0, self.start
        for begin, end, value in _items(text, self.key, self.beside, str(self.path)):
            if self.note is not None:
                self.noted.append(value.get(self.note) if isinstance(value, Mapping) else None)
            offset += len(text[at:begin].encode())
            length = len(text[begin:end].encode())
            yield offset, offset + length
            at, offset = end, offset + length


def _items(text: str, key: str, beside: dict[str, Any], where: str) -> Iterator[tuple[int, int, Any]]:
    """Where each item of the list under a key begins and ends, in characters, and the item. What stands before the list
    is put into `beside`, but for other lists. Raises ConfigError."""
    decoder = json.JSONDecoder()
    keys: list[str] = []
    try:
        at = _expect(text, 0, "{")
        while True:
            name, at = decoder.raw_decode(text, _after_blanks(text, at))
            keys.append(str(name))
            at = _after_blanks(text, _expect(text, at, ":"))
            if name == key:
                break
            value, at = decoder.raw_decode(text, at)
            if not isinstance(value, list):
                beside[str(name)] = value
            at = _after_blanks(text, at)
            if text[at : at + 1] != ",":
                near = did_you_mean(key, keys)
                raise ConfigError(f"{where}: has no key {key!r} at its top; {near}its keys are {', '.join(keys)}"[:600])
            at += 1
        at = _after_blanks(text, _expect(text, at, "["))
        while text[at : at + 1] != "]":
            value, end = decoder.raw_decode(text, at)
            yield at, end, value
            at = _after_blanks(text, end)
            if text[at : at + 1] != "]":
                at = _after_blanks(text, _expect(text, at, ","))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1})") from error
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep; is it the right file?") from None


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _BLANKS:
        at += 1
    return at


def _expect(text: str, at: int, token: str) -> int:
    """The place after a token that comes next."""
    at = _after_blanks(text, at)
    if text[at : at + 1] != token:
        raise json.JSONDecodeError(f"expected {token!r}, found {text[at : at + 20]!r}", text, at)
    return at + 1
