"""Tar files of webdataset: members whose names begin alike are one row, and nothing is unpacked.

The key of a row is a member's path up to the first dot of its name; what follows the dot is the member's ending, and
the column that holds its content.
"""

import tarfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from molora.config import ConfigError
from molora.data.formats.rows import MAX_ROW_BYTES, parse
from molora.data.index.stored import DataFile, Index, Scan

# Endings of members that hold text, by their last part; webdataset reads these as text too.
_TEXT = ("caption", "class", "cls", "count", "id", "inx", "md", "text", "transcript", "txt")
# Endings of what is no data of a row, such as __key__.
_RESERVED = "__"
_MAX_MEMBER_BYTES = 2**31
# How files of gzip, bzip2, xz and zstd begin.
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"(\xb5")


def scan(path: Path) -> Scan:
    """Finds the members of a tar file, and which of them make a row. Raises ConfigError naming the member where the
    file is damaged."""
    offsets, sizes, endings, firsts, key_ends = (array("q") for _ in range(5))
    numbers: dict[str, int] = {}
    keys = bytearray()
    last_key: str | None = None
    in_row: set[int] = set()
    for member in _members(path):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, dot, ending = name.partition(".")
        if not (stem and dot and ending) or name.startswith(_RESERVED):
            continue  # as webdataset does: README, .hidden, __meta__
        key = f"{folder}{slash}{stem}"
        if key != last_key:
            last_key, in_row = key, set()
            firsts.append(len(offsets))
            keys += key.encode(errors="surrogateescape")
            key_ends.append(len(keys))
        number = numbers.setdefault(ending, len(numbers))
        if number in in_row:
            raise ConfigError(f"data source {path}, member {member.name}: is there twice in one row; write it once")
        in_row.add(number)
        offsets.append(member.offset_data)
        sizes.append(member.size)
        endings.append(number)
    firsts.append(len(offsets))
    arrays = {"firsts": firsts, "offsets": offsets, "sizes": sizes, "endings": endings, "key_ends": key_ends}
    found: dict[str, np.ndarray] = {name: np.array(values, dtype=np.int64) for name, values in arrays.items()}
    found["keys"] = np.array(keys, dtype=np.uint8)
    return Scan(len(firsts) - 1, found, {"endings": list(numbers)})


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file. Raises ConfigError for a damaged one, and for one that is compressed."""
    last = ""
    with open(path, "rb") as file:
        if file.read(2) in _COMPRESSED:
            raise ConfigError(
                f"data source {path}: is compressed, so that no row can be read by itself; unpack it to .tar"
            )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members.clear()  # or they are all kept  # pyright: ignore[reportAttributeAccessIssue]
                    last = member.name
                    if member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        raise ConfigError(
                            f"data source {path}, member {last}: is no plain file, but a link, a device or sparse; "
                            "write the file itself"
                        )
                    if member.size > _MAX_MEMBER_BYTES:
                        raise ConfigError(
                            f"data source {path}, member {last}: {member.size} bytes; at most {_MAX_MEMBER_BYTES} are "
                            "read"
                        )
                    yield member
                # tarfile takes whatever is no header for the end.
                file.seek(tar.offset)
                end = file.read(tarfile.BLOCKSIZE)
        except tarfile.TarError as error:
            raise ConfigError(_damaged(path, last, str(error))) from error
    if end != bytes(tarfile.BLOCKSIZE):
        what = "the file is cut off" if len(end) < tarfile.BLOCKSIZE else f"no header at byte {tar.offset}"
        raise ConfigError(_damaged(path, last, what))


def _damaged(path: Path, last: str, what: str) -> str:
    place = f"behind member {last}" if last else "at its start"
    return f"data source {path}, {place}: cannot be read as tar ({what}); write it again, or download it again"


class TarRows:
    """The rows of one file. Text members are text, members of JSON what they say, others bytes; `id` is the key. With
    `numbers_as_text` numbers of JSON are the text that stands in the file."""

    def __init__(self, index: Index, numbers_as_text: bool) -> None:
        self.name = str(index.path)
        self.numbers_as_text = numbers_as_text
        self.file = DataFile(index)
        self.endings: list[str] = list(index.about["endings"])
        arrays = index.arrays()
        self.firsts, self.offsets, self.sizes = arrays["firsts"], arrays["offsets"], arrays["sizes"]
        self.ending_numbers, self.key_ends, self.keys = arrays["endings"], arrays["key_ends"], arrays["keys"]

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        first, end = self.firsts[row : row + 2].tolist()
        offsets, sizes = self.offsets[first:end].tolist(), self.sizes[first:end].tolist()
        start = offsets[0]
        data = self.file.read(start, offsets[-1] + sizes[-1])
        values: dict[str, Any] = {"id": self._key(row)}
        for offset, size, number in zip(offsets, sizes, self.ending_numbers[first:end].tolist(), strict=True):
            ending = self.endings[number]
            values[ending] = self._content(row, ending, data[offset - start : offset - start + size])
        return values

    def _content(self, row: int, ending: str, data: bytes) -> Any:
        kind = ending.rpartition(".")[2].lower()
        where = f"{self.where(row)}, member {self._key(row)}.{ending}"
        if kind == "json":
            if len(data) > MAX_ROW_BYTES:
                raise ValueError(f"{where}: {len(data)} bytes; JSON has at most {MAX_ROW_BYTES}")
            return parse(data, where, self.numbers_as_text)
        if kind in _TEXT:
            try:
                return data.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8; write it as UTF-8") from error
        return data

    def _key(self, row: int) -> str:
        start = int(self.key_ends[row - 1]) if row else 0
        return bytes(self.keys[start : self.key_ends[row]]).decode(errors="replace")

    def where(self, row: int) -> str:
        return f"{self.name}, row {row + 1} ({self._key(row)})"

    def columns(self, wanted: object) -> list[str]:
        """The endings of its members, and the id."""
        return ["id", *(ending for ending in self.endings if ending != "id")]

    def will_read(self, rows: list[range]) -> None:
        for each in rows:
            first, end = self.firsts.item(each.start), self.firsts.item(each.stop) - 1
            self.file.will_read(self.offsets.item(first), self.offsets.item(end) + self.sizes.item(end))

    def close(self) -> None:
        self.file.close()
