"""What the parts of one medium may be given as, and their bytes."""

import base64
import os
import stat
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from molora.media.policy import FILE_TYPES, SCHEMES, check_size, label, no_file, policy, scheme
from molora.media.urls import fetch
from molora.modality import MediaError

# Keys beside a source that ask for another picture or clip than the whole one.
_CHANGE = (
    *("bbox", "box", "crop", "duration", "end", "end_seconds", "offset"),
    *("resized_height", "resized_width", "start", "start_seconds"),
)


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the parts of one medium may be given as. `part_type` names the medium in messages and is itself a source, of
    anything. `max_file_bytes`: a larger file is refused. `part_of`: keys beside a source that ask for a part of it,
    which the medium's reader honours."""

    part_type: str
    keys: tuple[str, ...]
    max_file_bytes: int
    part_of: tuple[str, ...] = ()

    def flat(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part with what a mapping under `part_type` holds, such as {bytes, path} of a dataset's column, beside the
        rest. A path there is only the name that the file once had if its content stands beside it."""
        value = part.get(self.part_type)
        if not isinstance(value, Mapping):
            return part
        inner = {key: item for key, item in value.items() if item is not None}
        if "bytes" in inner or "array" in inner:
            inner.pop("path", None)
        return {**{key: item for key, item in part.items() if key != self.part_type}, **inner}

    def choose(self, part: Mapping[str, Any]) -> tuple[str, Any]:
        """The one source that a part has and its value. Under `part_type`, the source that its value turns out to be;
        that key again if it is none of the others. Raises MediaError for a part with no source or with several."""
        if unread := sorted(key for key in _CHANGE if key not in self.part_of and part.get(key) is not None):
            instead = f"give {' and '.join(self.part_of)}, or " if self.part_of else ""
            raise MediaError(
                f"has {', '.join(unread)}, which nothing reads and would change what is seen or heard; {instead}change "
                "the file"
            )
        given = [key for key in self.keys if part.get(key) is not None]
        if len(given) != 1:
            raise MediaError(
                f"an {self.part_type} part needs exactly one of {', '.join(self.keys)}; it has {given or sorted(part)}"
            )
        key, value = given[0], part[given[0]]
        if key != self.part_type:
            return key, value
        if isinstance(value, str) and (value[:5].lower() == "data:" or scheme(value) in SCHEMES):
            return "url", value
        kinds = {"path": FILE_TYPES["path"], "bytes": FILE_TYPES["bytes"], "array": (np.ndarray, Tensor, list, tuple)}
        return next((name for name, types in kinds.items() if isinstance(value, types)), key), value

    def read(self, key: str, value: Any) -> bytes:
        """The bytes of the file that `path`, `url`, `base64` (or a data URI) or `bytes` gives. Raises MediaError for
        one that cannot be read, is not allowed, is empty or too large."""
        if not isinstance(value, FILE_TYPES[key]):
            wanted = " or ".join(kind.__name__ for kind in FILE_TYPES[key])
            raise MediaError(f"is given as {wanted}, not {type(value).__name__}")
        if key == "bytes":
            check_size(memoryview(value).nbytes, self.max_file_bytes)
            data = bytes(value)
        elif key == "path":
            data = read_file(value, self.max_file_bytes)
        elif isinstance(value, str) and value[:5].lower() == "data:":
            data = _read_data_uri(value, self.max_file_bytes)
        elif key == "base64":
            data = _read_base64(value, self.max_file_bytes)
        else:
            data = fetch(value, self.max_file_bytes)
        if not data:
            raise MediaError("is empty, 0 bytes; write or download it again")
        return data

    @contextmanager
    def named(self, key: str, value: Any) -> Iterator[None]:
        """Says in every MediaError inside which part it is about."""
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.part_type} part, {label(key, value)}: {error}") from error.__cause__


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file, never beyond the size it says, since some files of the system have no end. Raises
    MediaError as `open_file` does, and for a file that is shorter than it says."""
    with open_file(path, max_bytes) as (file, num_bytes):
        try:
            data = file.read(num_bytes)
        except OSError as error:
            raise _unread(path, error) from error
    if len(data) < num_bytes:
        raise MediaError(f"ends after {len(data)} of its {num_bytes} bytes; is it being written? try again")
    return data


@contextmanager
def open_file(path: str | os.PathLike[str], max_bytes: int) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file and its size in bytes. It is opened without waiting, so that no pipe or device can hold it up.
    Raises MediaError for one that cannot be read, is no regular file, too large, or not allowed."""
    policy().check_paths()
    try:
        # The caller's `with` closes it.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))  # noqa: SIM115
    except IsADirectoryError:
        raise MediaError(no_file(stat.S_IFDIR)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise _unread(path, error) from error
    with file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(no_file(status.st_mode))
        check_size(status.st_size, max_bytes)
        yield file, status.st_size


def _unread(path: str | os.PathLike[str], error: Exception) -> MediaError:
    reason = error.strerror if isinstance(error, OSError) else error
    return MediaError(f"{reason} ({Path(path).absolute()}); check the path")


def _read_data_uri(value: str, max_bytes: int) -> bytes:
    head, comma, text = value.partition(",")
    if not comma:
        raise MediaError("is a data URI without a comma; write data:TYPE;base64,TEXT")
    if head.rstrip().lower().endswith(";base64"):
        # Percent signs are no base64, so what they stand for is looked up first.
        return _read_base64(urllib.parse.unquote(text) if "%" in text else text, max_bytes)
    check_size(len(text) - 2 * text.count("%"), max_bytes)
    return urllib.parse.unquote_to_bytes(text)


def _read_base64(text: str, max_bytes: int) -> bytes:
    """Both alphabets are read, and padding may be left out, as web and mail programs write it."""
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    check_size(len(text) * 3 // 4, max_bytes)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise MediaError(f"is not base64 ({error}); encode the file's bytes") from error
