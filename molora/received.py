"""Files that others may have made: names that are names, bounded JSON, and tensors that are hashed as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The largest JSON of a real model is the list of its tensors, a few MiB.
MAX_JSON_BYTES = 2**24
MAX_JSON_DEPTH = 100
MAX_NAME_LENGTH = 128
SHARD_INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 2**22
# By safetensors' names: bits of a value, and torch's dtype where it has one that molora computes with.
_DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    **{"BOOL": (8, torch.bool), "U8": (8, torch.uint8), "I8": (8, torch.int8), "I16": (16, torch.int16)},
    **{"I32": (32, torch.int32), "I64": (64, torch.int64), "F16": (16, torch.float16), "BF16": (16, torch.bfloat16)},
    **{"F32": (32, torch.float32), "F64": (64, torch.float64), "C64": (64, torch.complex64)},
    **{"U16": (16, torch.uint16), "U32": (32, torch.uint32), "U64": (64, torch.uint64)},
    **{"F8_E4M3": (8, torch.float8_e4m3fn), "F8_E5M2": (8, torch.float8_e5m2), "F8_E8M0": (8, None)},
    **{"F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz), "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz)},
    **{"F4": (4, None), "F6_E2M3": (6, None), "F6_E3M2": (6, None)},
}
# What weights are stored as.
FLOATS = ("F32", "BF16", "F16", "F64")


def check_name(name: object, where: str) -> str:
    """A name that becomes part of a path. Raises ValueError for what could lead elsewhere or hide."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: {name!r:.80} is no name; write a text of one or more characters")
    if re.search(r"[/\\]", name) or name.startswith(".") or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise ValueError(
            f"{where}: {name!r:.80} is no name; it becomes part of a path, so it has at most {MAX_NAME_LENGTH} "
            f"characters (this one has {len(name)}), does not start with a dot and holds no slash, backslash or "
            "control character"
        )
    return name


def open_file(path: Path, folder: Path | None = None) -> FileIO:
    """Opens a regular file, unbuffered; one of a received `folder` may be a link only to a place inside it. A snapshot
    in the hub's cache is a folder of links to the blobs beside it, which count as inside. Raises OSError, ValueError
    for what is no file, and for a link that leads out."""
    real = Path(os.path.realpath(path))
    if folder is not None:
        home = Path(os.path.realpath(folder))
        inside = [home, *(above.parent / "blobs" for above in home.parents if above.name == "snapshots")]
        if not any(real.is_relative_to(place) for place in inside):
            raise ValueError(f"{path}: leads out of {folder}, to {real}, and is not followed; put a copy in its place")
    descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: is no regular file; put the file itself there")
    return open(descriptor, "rb", buffering=0)


def read_bytes(path: Path, max_bytes: int, folder: Path | None = None) -> bytes:
    """A whole file. Raises OSError, ValueError for what is no file or too large."""
    with open_file(path, folder) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{path}: has {size} bytes, allowed {max_bytes}; is it the right file?")
        return b"".join(_chunks(file, size))


def _chunks(file: FileIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes of a file, or fewer where it ends."""
    while size > 0 and (chunk := file.read(min(size, _CHUNK_BYTES))):
        yield chunk
        size -= len(chunk)


def file_hash(path: Path, folder: Path | None = None) -> str:
    """SHA-256 of a regular file. Raises OSError, ValueError for what is no file, and for a link out of `folder`."""
    with open_file(path, folder) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_file(source: Path, to: Path, *, folder: Path, sha256: str | None = None, where: Path | None = None) -> None:
    """Copies the bytes of a file of `folder`. Raises OSError, ValueError for what is no file, for a link out of
    `folder`, and for another hash than `where` lists."""
    digest = hashlib.sha256()
    with open_file(source, folder) as file, open(to, "wb") as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
    if sha256 is not None:
        check_hash(digest.hexdigest(), sha256, source, where or source)


def check_hash(found: str, expected: str, path: Path, where: Path) -> None:
    """Raises ValueError if a file has another SHA-256 than the one that `where` lists."""
    if found != expected:
        why = "it was changed, or a run was stopped while writing the folder (resuming that run writes it again)"
        raise ValueError(f"{path}: does not have the hash in {where}; {why}")


def read_json(path: Path, folder: Path | None = None) -> dict[str, Any]:
    """Raises ValueError naming the file if it is not a JSON object within bounds."""
    return read_json_bytes(path, folder)[0]


def read_json_bytes(path: Path, folder: Path | None = None) -> tuple[dict[str, Any], bytes]:
    """What `read_json` reads, and the very bytes that it is made of."""
    data = read_bytes(path, MAX_JSON_BYTES, folder)
    return parse_json(data, str(path)), data


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object from bytes. Raises ValueError for anything else, NaN, a key given twice, or deep nesting."""
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"{where}: nested deeper than {MAX_JSON_DEPTH} levels; is it the right file?") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not JSON but binary (byte {error.start} is no UTF-8); copy it again") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(value).__name__}")
    if is_deep(value):
        raise ValueError(f"{where}: nested deeper than {MAX_JSON_DEPTH} levels; is it the right file?")
    return value


def is_deep(value: dict[str, Any]) -> bool:
    """Whether JSON is nested deeper than `MAX_JSON_DEPTH` levels."""
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner = chain.from_iterable(outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object. Raises ValueError for a key that stands twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name!r:.80} stands twice in one object")
    return value


def _finite(constant: str) -> float:
    if constant == "NaN":  # infinities stand in configs of transformers
        raise ValueError("NaN is no number")
    return float(constant)


class Entry(NamedTuple):
    """A tensor in a safetensors file: its dtype by safetensors' name, its shape and where its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, held open, whose header was checked. `entries` are in the order of their bytes. Raises
    OSError, ValueError naming the file for what is not whole safetensors: nothing is allocated before."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        self.path = path
        self._file = open_file(path, folder)
        try:
            self._start = _stamp(self._file.fileno())
            self._header = self._read_header()
            self.entries = self._read_entries()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def check_dtypes(self, expected: Mapping[str, torch.dtype]) -> None:
        """Raises ValueError for the first tensor that would become another kind of number; FLOATS are one kind."""
        for name, entry in self.entries.items():
            into = expected[name]
            same = [key for key, (_, dtype) in _DTYPES.items() if dtype == into]
            allowed = FLOATS if into.is_floating_point else same
            if entry.dtype not in allowed:
                told = f"{self.path}: {name} is stored as {entry.dtype}, expected {' or '.join(allowed)}"
                raise ValueError(f"{told}; get the file as it was saved")

    def tensors(self, sha256: str | None = None, where: Path | None = None) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time. With `sha256`, the hash of the very bytes that they were made of is compared
        in the end. Raises ValueError if it differs, or if the file was written to meanwhile."""
        digest = hashlib.sha256(self._header)
        self._file.seek(len(self._header))
        for name, entry in self.entries.items():
            bytes_B = self._read(entry)
            digest.update(bytes_B.numpy().data)
            yield name, self._shaped(name, bytes_B)
        self._check_unchanged()
        if sha256 is not None:
            check_hash(digest.hexdigest(), sha256, self.path, where or self.path)

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        self._file.seek(len(self._header) + self.entries[name].start)
        return self._shaped(name, self._read(self.entries[name]))

    def hashes(self) -> Iterator[tuple[str, str]]:
        """SHA-256 of every tensor's bytes, by its name."""
        self._file.seek(len(self._header))
        for name, entry in self.entries.items():
            digest = hashlib.sha256()
            size = 0
            for chunk in _chunks(self._file, entry.stop - entry.start):
                digest.update(chunk)
                size += len(chunk)
            self._check_read(size, entry)
            yield name, digest.hexdigest()
        self._check_unchanged()

    def _read(self, entry: Entry) -> Tensor:
        bytes_B = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        view = bytes_B.numpy().data
        size = 0
        while size < len(view) and (count := self._file.readinto(view[size : size + _CHUNK_BYTES])):
            size += count
        self._check_read(size, entry)
        return bytes_B

    def _shaped(self, name: str, bytes_B: Tensor) -> Tensor:
        entry = self.entries[name]
        dtype = _DTYPES[entry.dtype][1]
        if dtype is None:
            raise ValueError(f"{self.path}: {name} is stored as {entry.dtype}, which torch cannot hold; save it as F32")
        return bytes_B.view(dtype).view(entry.shape)

    def _check_read(self, size: int, entry: Entry) -> None:
        if size != entry.stop - entry.start:
            raise ValueError(f"{self.path}: ended while it was read; let what writes it finish, and try again")

    def _check_unchanged(self) -> None:
        if _stamp(self._file.fileno()) != self._start:
            raise ValueError(f"{self.path}: was written to while it was read; let what writes it finish, and try again")

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self.path}: not a whole safetensors file ({why}); copy it again")

    def _cut(self, needed: int) -> ValueError:
        size = os.fstat(self._file.fileno()).st_size
        return self._broken(f"it has {size} bytes of {needed}; was its download interrupted?")

    def _read_header(self) -> bytes:
        length = self._file.read(8)
        if len(length) < 8:
            raise self._cut(8)
        count = int.from_bytes(length, "little")
        if count > MAX_JSON_BYTES:
            raise self._broken(f"a header of {count} bytes, allowed {MAX_JSON_BYTES}")
        header = length + b"".join(_chunks(self._file, count))
        if len(header) < 8 + count:
            raise self._cut(8 + count)
        return header

    def _read_entries(self) -> dict[str, Entry]:
        values = parse_json(self._header[8:], f"{self.path}: header")
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._broken("__metadata__ is no list of texts by name")
        if strange := next((name for name in values if not name.isprintable()), None):
            raise self._broken(f"{strange!r:.80} is no name of a tensor")
        entries = [(name, self._entry(name, value)) for name, value in values.items()]
        entries.sort(key=lambda pair: (pair[1].start, pair[1].stop))
        at = 0
        for name, entry in entries:
            if entry.start != at:
                raise self._broken(f"{name!r:.80} begins at byte {entry.start}, the tensor before it ends at {at}")
            at = entry.stop
        needed, size = len(self._header) + at, os.fstat(self._file.fileno()).st_size
        if size < needed:
            raise self._cut(needed)
        if size > needed:
            raise self._broken(f"{size - needed} bytes after its last tensor")
        return dict(entries)

    def _entry(self, name: str, value: Any) -> Entry:
        try:
            dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
            numbers = [*shape, start, stop]
            if len(numbers) > 66 or any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise self._broken(f"{name!r:.80} has no dtype, shape and data_offsets") from None
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{self.path}: {name!r:.80} has dtype {dtype!r:.20}; known are {', '.join(_DTYPES)}")
        bits = math.prod(shape) * _DTYPES[dtype][0]
        if bits != 8 * (stop - start):
            needed = f"{name!r:.80} of {dtype} {shape!r:.80} needs {Decimal(bits) / 8:.6g} bytes"
            raise self._broken(f"{needed}, its offsets give {stop - start}")
        return Entry(dtype, tuple(shape), start, stop)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, as which a bool does not count."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int, int, int]]:
    """What changes when a file is written or replaced, even by one of the same size whose time was set back."""
    return [(str(path), *_stamp(path)) for path in paths]


def _stamp(file: Path | int) -> tuple[int, int, int, int]:
    found = os.stat(file)
    return found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def shard_names(folder: Path, name: str = "model.safetensors") -> set[str]:
    """The files of a model's tensors that its library opens: those in the index of `name`, or `name` itself. Raises
    ValueError for an index that names no files."""
    path = folder / f"{name}.index.json"
    if not path.is_file():
        return {name}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f'{path}: "weight_map" is no list of files by tensor; copy it again')
    return {check_name(name, f"{path}: weight_map") for name in weight_map.values()}


def read_tensors(path: Path, folder: Path | None = None) -> dict[str, Tensor]:
    """Raises ValueError naming the file if it is not whole safetensors."""
    with TensorFile(path, folder) as file:
        return dict(file.tensors())


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> Iterator[tuple[str, Tensor]]:
    """The same tensors. Raises ValueError for the first that holds NaN or infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not (finite := tensor.float().isfinite()).all():
            told = f"{where}: {name} holds {int((~finite).sum())} numbers of {tensor.numel()} that are NaN or infinite"
            raise ValueError(f"{told}; every answer would be: get a sound copy")
        yield name, tensor


def listed_files(value: object, where: Path) -> Mapping[str, str]:
    """The "files" that a description lists: SHA-256 by plain name. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f'{where}: "files" is no list of hashes by name; copy it again from where it was written')
    for name, sha256 in value.items():
        check_name(name, f'{where}: "files"')
        if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f'{where}: "files": {name} has no SHA-256 but {sha256!r:.80}; copy it again')
    return value
