"""Where the bytes of a content part come from, whatever the medium."""

from __future__ import annotations

import base64
import http.client
import os
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from molora.modality import MediaError

DOWNLOAD_TIMEOUT_SECONDS = 30

# What the sources that hold a file may be given as.
FILE_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str, os.PathLike),
    "url": (str,),
    "base64": (str,),
    "bytes": (bytes, bytearray, memoryview),
}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the parts of one medium may be given as, and how far a file may be fetched from.

    `part_type` names the medium in messages and is itself a source, of anything; `noun` is what one of it is called.
    `max_file_bytes`: a larger file is refused. `allow_urls`: whether `url` may fetch over HTTP. `media_root`: a folder
    that relative paths start from and that no path may leave.
    """

    part_type: str
    noun: str
    keys: tuple[str, ...]
    max_file_bytes: int
    allow_urls: bool
    media_root: str | None

    def choose(self, part: Mapping[str, Any]) -> tuple[str, Any]:
        """The one source that a part has and its value. Under `part_type`, the source that its value turns out to be;
        that key again if it is none of the others.

        Raises: MediaError for a part with no source or with several.
        """
        given = [key for key in self.keys if part.get(key) is not None]
        if len(given) != 1:
            raise MediaError(
                f"an {self.part_type} part needs exactly one of {', '.join(self.keys)}; it has {given or sorted(part)}"
            )
        key, value = given[0], part[given[0]]
        if key != self.part_type:
            return key, value
        if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
            return "url", value
        kinds = {"path": FILE_TYPES["path"], "bytes": FILE_TYPES["bytes"], "array": (np.ndarray, Tensor)}
        return next((name for name, types in kinds.items() if isinstance(value, types)), key), value

    def read(self, key: str, value: Any) -> bytes:
        """The bytes of the file that `path`, `url`, `base64` (or a data URI) or `bytes` gives.

        Raises: MediaError for one that cannot be read, is not allowed, is empty or too large.
        """
        if not isinstance(value, FILE_TYPES[key]):
            wanted = " or ".join(kind.__name__ for kind in FILE_TYPES[key])
            raise MediaError(f"is given as {wanted}, not {type(value).__name__}")
        data = getattr(self, f"_read_{key}")(value)
        if not data:
            raise MediaError("is empty, 0 bytes; write or download it again")
        if len(data) > self.max_file_bytes:
            raise MediaError(f"is over {self.max_file_bytes} bytes; shrink it")
        return data

    @contextmanager
    def named(self, key: str, value: Any) -> Iterator[None]:
        """Says in every MediaError inside which part it is about."""
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.part_type} part, {_label(key, value)}: {error}") from error.__cause__

    def _read_path(self, value: Any) -> bytes:
        path = Path(value) if self.media_root is None else Path(self.media_root, value)
        try:
            if self.media_root is None or path.resolve().is_relative_to(Path(self.media_root).resolve()):
                with path.open("rb") as file:
                    return file.read(self.max_file_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            reason = error.strerror if isinstance(error, OSError) else error
            raise MediaError(f"{reason} ({path.absolute()}); check the path and media_root") from error
        raise MediaError(f"leads out of media_root {self.media_root}; move the file inside, or change media_root")

    def _read_url(self, value: str) -> bytes:
        if value.startswith("data:"):
            return self._read_base64(value)
        if not self.allow_urls:
            raise MediaError(f"allow_urls is off; download the {self.noun} and give its path, or turn allow_urls on")
        if not value.startswith(("http://", "https://")):
            raise MediaError("only http, https and data URLs are fetched; for a local file give its path")
        request = urllib.request.Request(value, headers={"User-Agent": "molora"})
        try:
            with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
                return response.read(self.max_file_bytes + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise MediaError(f"cannot be fetched ({error}); check the address and the network") from error

    def _read_base64(self, value: str) -> bytes:
        head, comma, text = value.partition(",") if value.startswith("data:") else ("", "", value)
        if head and not (comma and head.endswith(";base64")):
            raise MediaError(f"a data URI holds a {self.noun} as data:{self.part_type}/...;base64,...")
        try:
            return base64.b64decode("".join(text.split()), validate=True)
        except ValueError as error:
            raise MediaError(f"is not base64 ({error}); encode the file's bytes") from error

    def _read_bytes(self, value: bytes | bytearray | memoryview) -> bytes:
        return bytes(value)


def _label(key: str, value: Any) -> str:
    """Which part an error is about, without pouring its data into the message."""
    if key == "path" or (key == "url" and not str(value).startswith("data:")):
        return f"{key} {str(value)[:200]!r}"
    if isinstance(value, (str, bytes)):
        return f"{key} of {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{key} {value.dtype} of shape {tuple(value.shape)}"
    return f"{key} {type(value).__name__}"
