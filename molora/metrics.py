"""The metrics of a run, as JSON rows and TensorBoard events, which resuming cuts back to where a state was saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from molora.storage import sync


class MetricsLog:
    """`metrics.jsonl` and `tensorboard/`, written by the main process."""

    def __init__(self, run: Path, accelerator: Accelerator) -> None:
        self.run = run
        self.accelerator = accelerator
        self.file: TextIO | None = None

    def open(self) -> None:
        """Goes on writing after what is there."""
        self.accelerator.init_trackers("tensorboard")
        if self.accelerator.is_main_process:
            self.file = open(self.run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (`close` closes it)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row with its `step`; its numbers go to TensorBoard too."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
            self.accelerator.log(numbers, step=row["step"])

    def lengths(self) -> dict[str, int]:
        """Bytes of every log file, safely on disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())
            writer: Any = self.accelerator.get_tracker("tensorboard", unwrap=True)
            writer.flush()
        return {str(path.relative_to(self.run)): path.stat().st_size for path in self._paths()}

    def truncate(self, lengths: Mapping[str, int]) -> None:
        """Forgets what was logged after a state was saved, so that no step is logged twice."""
        if not self.accelerator.is_main_process:
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
        if self.file is not None:
            self.file.close()
        self.accelerator.end_training()
