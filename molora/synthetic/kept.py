"""What a workflow has found out already, in a file that a kill takes no more from than its last line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.inference.answers import appending, written_rows

_RESULT = "round"


def digest(*values: Any) -> str:
    """A name for values of JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
