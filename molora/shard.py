"""One of several workers that go through the same rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from molora.config import ConfigError

_GIVEN = re.compile(r"(\d{1,9})/(\d{1,9})")


def is_first_process() -> bool:
    """Whether this process is the first of those that a launcher such as torchrun started, or was started by none."""
    return int(os.environ.get("RANK", 0)) == 0


@dataclass(frozen=True)
class Shard:
    """Every `count`-th row, from row `index` on. By itself it is all rows."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def read(cls, text: str) -> Shard:
        """The shard that is written I/N. Raises ConfigError."""
        given = _GIVEN.fullmatch(text)
        if given is None or int(given[1]) >= int(given[2]):
            raise ConfigError(f"--shard {text:.40}: write it as I/N; of three they are 0/3, 1/3 and 2/3")
        return cls(int(given[1]), int(given[2]))

    @classmethod
    def all(cls, count: int) -> Iterator[Shard]:
        """The shards that are all rows together."""
        return (cls(index, count) for index in range(count))

    def rows(self, total: int) -> range:
        """Its rows, of so many."""
        return range(self.index, total, self.count)

    def name(self, name: str) -> str:
        """The name of its part of what is called `name`."""
        return f"{name}.shard-{self.index}-of-{self.count}"


ALL_ROWS = Shard()
_MOST_TOLD = 5


def unmergeable(problems: Sequence[str], count: int) -> str:
    """What is wrong with so many shards, of which the first few are named."""
    more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
    return f"the {count} shards cannot be merged: {'; '.join(problems[:_MOST_TOLD])}{more}"
