"""The metrics of a run, as JSON rows and TensorBoard events, which resuming cuts back to where a state was saved."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from molora.ranks import Ranks
from molora.storage import sync


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/`, written by the main process, each row at once and without a thread of its
    own: a full disk is an error of the row that did not fit."""

    def __init__(self, run: Path, ranks: Ranks) -> None:
        self.run = run
        self.ranks = ranks
        self.rows: BinaryIO | None = None
        self.events: BinaryIO | None = None

    def open(self) -> None:
        """Goes on writing after what is there."""
        if self.ranks.is_main:
            folder = self.run / "tensorboard"
            folder.mkdir(exist_ok=True)
            # Unbuffered, so that closing has nothing left to write.
            self.rows = open(self.run / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (`close` closes it)
            name = f"events.out.tfevents.{time.time_ns() // 10**9}.molora.{os.getpid()}"
            self.events = open(folder / name, "ab", buffering=0)  # noqa: SIM115
            self._write_event(file_version="brain.Event:2")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row with its `step`; its numbers go to TensorBoard too."""
        if self.rows is not None:
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

            _Appending(self.rows).write((json.dumps(row) + "\n").encode())
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
            values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
            self._write_event(step=row["step"], summary=Summary(value=values))

    def _write_event(self, **values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self.events is not None, "the log is open"
        RecordWriter(_Appending(self.events)).write(Event(wall_time=time.time(), **values).SerializeToString())

    def lengths(self) -> dict[str, int]:
        """Bytes of every log file, safely on disk."""
        for file in (self.rows, self.events):
            if file is not None:
                os.fsync(file.fileno())
        return {str(path.relative_to(self.run)): path.stat().st_size for path in self._paths()}

    def truncate(self, lengths: Mapping[str, int]) -> None:
        """Forgets what was logged after a state was saved, so that no step is logged twice."""
        if not self.ranks.is_main:
            return
        for path in self._paths():
            length = lengths.get(str(path.relative_to(self.run)), 0)
            if length == 0:
                path.unlink()
            else:
                os.truncate(path, length)
                sync(path)

    def _paths(self) -> list[Path]:
        events = sorted((self.run / "tensorboard").rglob("events.*"))
        return [path for path in [self.run / "metrics.jsonl", *events] if path.is_file()]

    def close(self) -> None:
        for file in (self.rows, self.events):
            if file is not None:
                file.close()


class _Appending:
    """An unbuffered file that takes all of the data: what a disk has no room for is an error only when nothing more
    fits."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.file.write(data) :]
