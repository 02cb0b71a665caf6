"""Indexes of many files, made in parallel where they are missing."""

import glob
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from molora.config import ConfigError
from molora.data.formats.rows import check_file
from molora.data.index import lines, parquet, tar
from molora.data.index.stored import Index, Scan, read_index, state_of, write_index

# How to find the rows of a file, by the ending of its name.
SCANS: dict[str, Callable[[Path], Scan]] = {
    ".tar": tar.scan,
    ".parquet": parquet.scan,
    ".jsonl": lines.scan,
    ".ndjson": lines.scan,
}

# Less is scanned sooner than processes start.
_ONE_PROCESS_BYTES = 2**27
_MAX_FILES = 10**6
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def files_of(patterns: Iterable[str]) -> list[Path]:
    """The files that paths mean: {0000..0099} and {a,b} stand for each of these, *, ? and [] for what is there.

    Raises: ConfigError for a pattern that no file answers to, for what is no file, and for a file of another kind.
    """
    found: list[Path] = []
    for pattern in patterns:
        for path in expanded(os.path.expanduser(pattern)):
            matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ConfigError(
                    f"data source {path}: no such file{'' if os.path.isabs(path) else f' in {Path.cwd()}'}"
                )
            found += map(Path, matches)
            if len(found) > _MAX_FILES:
                raise ConfigError(f"data source {pattern}: over {_MAX_FILES} files; write fewer and larger ones")
    for path in found:
        check_file(path)
        if path.suffix.lower() not in SCANS:
            raise ConfigError(
                f"data source {path}: its name does not end in one of {', '.join(SCANS)}, whose rows can be indexed"
            )
    return found


def expanded(pattern: str) -> Iterator[str]:
    """A path for everything that its braces stand for, in order."""
    braces = _BRACES.search(pattern)
    if not braces:
        yield pattern
        return
    first, last, names = braces.groups()
    if names is None:
        if int(last) - int(first) >= _MAX_FILES:
            raise ConfigError(f"data source {pattern}: over {_MAX_FILES} files; write fewer and larger ones")
        pieces: Iterable[str] = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        pieces = names.split(",")
    for piece in pieces:
        yield from expanded(pattern[: braces.start()] + piece + pattern[braces.end() :])


def indexed(paths: Sequence[Path], told: Callable[[int, int], object] = lambda done, missing: None) -> list[Index]:
    """The index of each file. Those that are missing or out of date are made, in several processes if they are large.

    `told` is called with the number of indexes made and to make, before the first and after each. Raises ConfigError
    for a file that cannot be indexed, and for an index that can be written nowhere.
    """
    indexes = {path: read_index(path) for path in paths}
    missing = [path for path, index in indexes.items() if index is None]
    if missing:
        told(0, len(missing))
    for done, path in enumerate(_made(missing), start=1):
        indexes[path] = read_index(path)
        told(done, len(missing))
    found = [index for path in paths if (index := indexes[path])]
    if len(found) < len(paths):
        gone = next(path for path in paths if indexes[path] is None)
        raise ConfigError(f"data source {gone}: changes while it is indexed; index it when it is complete")
    return found


def _made(paths: Sequence[Path]) -> Iterator[Path]:
    """Makes and writes the index of each file."""
    # pyarrow's threads do not survive a fork, and the row groups of a file are found in no time.
    here = [path for path in paths if path.suffix.lower() == ".parquet"]
    elsewhere = [path for path in paths if path not in here]
    if len(elsewhere) < 2 or sum(path.stat().st_size for path in elsewhere) < _ONE_PROCESS_BYTES:
        here, elsewhere = list(paths), []
    yield from map(_make, here)
    if elsewhere:
        workers = min(len(elsewhere), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            yield from pool.map(_make, elsewhere)


def _make(path: Path) -> Path:
    state = state_of(path.stat())
    scan = SCANS[path.suffix.lower()](path)
    if state_of(path.stat()) != state:
        raise ConfigError(f"data source {path}: changed while it was indexed; index it when it is complete")
    write_index(path, scan, state)
    return path
