"""What a workflow has found out already, in a file that a kill takes no more from than its last line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.messages import Message, Part
from molora.inference.answers import appending, written_rows
from molora.received import file_hash, stamps

_RESULT = "round"


def digest(*values: Any) -> str:
    """A name for values of JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def by_content(messages: Sequence[Message]) -> list[Message]:
    """Messages with the hashes of their media's files in place of the paths, as what a digest depends on. What is no
    file that can be read, such as a URL, stands as it is."""
    return [{**message, "content": _by_content(message["content"])} for message in messages]


def _by_content(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [{key: _hashed(key, value, part) for key, value in part.items()} for part in content]


def _hashed(key: str, value: Any, part: Part) -> Any:
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


class Kept:
    """Results by the digest of what they depend on. Those that are kept in one call are there together or not at all.
    The file is made if it is not there. Raises ConfigError for one that holds anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.found: dict[str, Any] = {}
        for _, row in written_rows(path, str(path), _RESULT, how="take the file away, or give another output"):
            if not isinstance(row.get(_RESULT), Mapping):
                raise ConfigError(f"{path}: holds other rows than a workflow keeps; give another output")
            self.found.update(row[_RESULT])

    def get(self, key: str) -> Any:
        """What is kept under a digest; None if nothing is."""
        return self.found.get(key)

    def keep(self, results: Mapping[str, Any]) -> None:
        """Writes results by their digests."""
        with appending(self.path) as write:
            write({"id": next(iter(results)), _RESULT: dict(results)})
        self.found.update(results)

    @property
    def tokens(self) -> int:
        """Tokens that were used for all that is kept, of prompts and answers."""
        return sum(each.get("prompt_tokens", 0) + each.get("answer_tokens", 0) for each in self.found.values())
