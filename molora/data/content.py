"""What media hold, in place of where they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from molora.data.messages import Message, Part
from molora.received import file_hash, stamps


def by_content(messages: Sequence[Message]) -> list[Message]:
    """Messages with the hashes of their media in place of paths, bytes and arrays, as what a digest depends on. What is
    no file that can be read, such as a URL, stands as it is."""
    return [{**message, "content": _by_content(message["content"])} for message in messages]


def _by_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{key: _hashed(key, value, part) for key, value in part.items()} for part in content]


def _hashed(key: str, value: Any, part: Part) -> Any:
    if isinstance(value, Mapping):  # as columns of datasets hold media
        return {inner: _hashed(inner, each, part) for inner, each in value.items()}
    if isinstance(value, bytes) or hasattr(value, "tobytes"):
        return hashlib.sha256(value if isinstance(value, bytes) else value.tobytes()).hexdigest()
    if not isinstance(value, str) or part["type"] == "text" or key not in ("path", part["type"]):
        return value
    with suppress(OSError, ValueError):
        (stamp,) = stamps([Path(value)])
        return _hash(*stamp)
    return value


@cache
def _hash(path: str, *stamp: int) -> str:
    """The hash of a file, which is read again when its stamp is another."""
    return file_hash(Path(path))
