"""The index of a data file: where its rows are, kept beside the file, or in the cache where nothing can be written.

An index is a safetensors file, which is mapped into memory and not read. It holds for a file of the size and the time
stamp that it names; for another it is made anew.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from molora.config import ConfigError
from molora.storage import cache_folder, save_tensors, write_atomically

FOLDER = ".molora-index"
_VERSION = "1"


class Scan(NamedTuple):
    """What was found in a data file: its number of rows, arrays of where they are, and what else is to be known."""

    num_rows: int
    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]


class State(NamedTuple):
    """What tells a data file from what it was before."""

    num_bytes: int
    changed_ns: int


@dataclass(frozen=True)
class Index:
    """The index of the data file at `path`. Its arrays are in `file`. A data file with a `fetch` may be taken away at
    any time, and `fetch` puts it back."""

    path: Path
    file: Path
    state: State
    num_rows: int
    about: Mapping[str, Any]
    fetch: Callable[[], object] | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays, mapped into memory for as long as they are used. Raises ConfigError if the index is gone."""
        try:
            with safe_open(self.file, "pt") as stored:
                return {name: stored.get_tensor(name).numpy() for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{self.file}: the index of {self.path} cannot be read ({error}); start again") from error

    def open(self) -> FileIO:
        """The data file. Raises ValueError if it has changed since it was indexed."""
        while True:
            try:
                file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
            except FileNotFoundError:
                if self.fetch is None:
                    raise
                self.fetch()
                continue
            if state_of(os.fstat(file.fileno())) == self.state:
                return file
            file.close()
            raise ValueError(f"data source {self.path}: has changed since it was opened; start again")


class DataFile:
    """An indexed file, read by offset, which processes that share it may do at the same time. One that may be taken
    away is open only while it is read, as its room on disk is free when nobody has it open. Raises ValueError if it has
    changed since it was indexed."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.file = index.open() if index.fetch is None else None

    def read(self, start: int, stop: int) -> bytes:
        """Bytes from `start` up to `stop`. Raises ValueError unless all are there: an index that came with the data may
        say anything."""
        if 0 <= start <= stop <= self.index.state.num_bytes:
            with self.index.open() if self.file is None else nullcontext(self.file) as file:
                data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start:
                return data
        raise ValueError(
            f"data source {self.index.path}: its index has a row from byte {start} to {stop}, and not all of them can "
            f"be read; remove {self.index.file}, and it is made anew"
        )

    def will_read(self, start: int, stop: int) -> None:
        """Has the system read bytes into its memory, without waiting for them."""
        if self.file is not None:
            os.posix_fadvise(self.file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def state_of(status: os.stat_result) -> State:
    return State(status.st_size, status.st_mtime_ns)


def read_index(path: Path, state: State | None = None) -> Index | None:
    """The index of a data file; None if there is none that holds for the file in a state, or as it is."""
    state = state or state_of(path.stat())
    for file in _places(path):
        try:
            with safe_open(file, "pt") as stored:
                written = stored.metadata() or {}
            about = json.loads(written["about"])
            if written["format_version"] == _VERSION and State(*about.pop("state")) == state:
                return Index(path, file, state, int(about.pop("num_rows")), about)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            continue  # not there, damaged or of another version: it is made anew
    return None


def write_index(path: Path, scan: Scan, state: State) -> None:
    """Keeps what was found in a data file in a state. Raises ConfigError if the index can be written nowhere."""
    about = json.dumps({**scan.about, "num_rows": scan.num_rows, "state": state})
    tensors = {name: torch.from_numpy(array) for name, array in scan.arrays.items()}
    save = partial(save_tensors, tensors, metadata={"format_version": _VERSION, "about": about})
    faults = []
    for file in _places(path):
        try:
            return write_atomically(file, save)
        except OSError as error:
            faults.append(f"{file.parent}: {error.strerror or error}")
    raise ConfigError(
        f"data source {path}: its index can be written nowhere ({'; '.join(faults)}); let MOLORA_CACHE name a folder "
        "that can be written"
    )


def _places(path: Path) -> tuple[Path, Path]:
    """Where the index of a data file may be: beside it, and in the cache."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    beside = path.parent / FOLDER / f"{path.name}.safetensors"
    return beside, cache_folder() / "index" / f"{name}.safetensors"
