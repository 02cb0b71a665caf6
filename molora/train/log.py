"""The metrics of a run, as JSON rows and TensorBoard events, which resuming cuts back to where a state was saved."""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from molora.data.messages import parts
from molora.evaluate.metrics import Judged
from molora.ranks import Ranks
from molora.storage import sync
from molora.train.recipe import Recipe
from molora.train.trackers import Place, Trackers

# Questions of an evaluation whose answers TensorBoard shows, from its first to its last.
SHOWN_ANSWERS = 4
# What Markdown reads as more than text, or HTML does.
_MARKUP = re.compile(r"[\\`*_\[\]<>|&~!#\r\n]")


class MetricsLog:
    """`metrics.jsonl` and, if the recipe names it, `tensorboard/`, written by the main process, each row at once and
    without a thread of its own: a full disk is an error of the row that did not fit. Other trackers get it too."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self.run = Path(recipe.run)
        self.ranks = ranks
        self.trackers = Trackers(recipe)
        self.with_events = "tensorboard" in recipe.trackers
        self.rows: BinaryIO | None = None
        self.events: BinaryIO | None = None
        self.logged: Place = (0, 0)  # before it was cut back
        self.last: Place = (0, 0)

    def open(self, *, resumes: bool) -> None:
        """Goes on writing after what is there."""
        if self.ranks.is_main:
            # Unbuffered, so that closing has nothing left to write.
            self.rows = open(self.run / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115 (`close` closes it)
            if self.with_events:
                folder = self.run / "tensorboard"
                folder.mkdir(exist_ok=True)
                name = f"events.out.tfevents.{time.time_ns() // 10**9}.molora.{os.getpid()}"
                self.events = open(folder / name, "ab", buffering=0)  # noqa: SIM115
                self._write_event(file_version="brain.Event:2")
            self.trackers.open(resumes, self.logged)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row with its `step`; its numbers go to TensorBoard and the other trackers too."""
        if self.rows is not None:
            _Appending(self.rows).write((json.dumps(row) + "\n").encode())
            step = row["step"]
            self.last = (step, self.last[1] + 1 if step == self.last[0] else 1)
            numbers = {key: value for key, value in row.items() if isinstance(value, (int, float)) and key != "step"}
            if self.events is not None:
                from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

                values = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
                self._write_event(step=step, summary=Summary(value=values))
            self.trackers.write(self.last, numbers)

    def write_answers(self, step: int, evaluation: str, judged: Sequence[Judged]) -> None:
        """Shows a few answers of an evaluation in TensorBoard as text, to the same questions each time."""
        if self.events is not None and judged:
            from torch.utils.tensorboard.summary import text

            places = sorted({i * (len(judged) - 1) // max(1, SHOWN_ANSWERS - 1) for i in range(SHOWN_ANSWERS)})
            rows = [_answer_row(judged[place]) for place in places]
            table = "\n".join(["| question | expected | answer |", "|---|---|---|", *rows])
            self._write_event(step=step, summary=text(f"{evaluation}/answers", table))

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
        self.logged = _last_place(self.run / "metrics.jsonl")
        for path in self._paths():
            length = lengths.get(str(path.relative_to(self.run)), 0)
            if length == 0:
                path.unlink()
            else:
                os.truncate(path, length)
                sync(path)
        self.last = _last_place(self.run / "metrics.jsonl")

    def _paths(self) -> list[Path]:
        events = sorted((self.run / "tensorboard").rglob("events.*"))
        return [path for path in [self.run / "metrics.jsonl", *events] if path.is_file()]

    def close(self) -> None:
        for file in (self.rows, self.events):
            if file is not None:
                file.close()
        self.trackers.close()


def _last_place(path: Path) -> Place:
    """The place of the last whole row of a metrics.jsonl."""
    steps = []
    for line in reversed(path.read_bytes().splitlines() if path.is_file() else []):
        try:
            step = json.loads(line)["step"]
        except ValueError:  # a kill left a part of it
            continue
        if steps and step != steps[0]:
            break
        steps.append(step)
    return (steps[0], len(steps)) if steps else (0, 0)


def _answer_row(item: Judged) -> str:
    """A question with its answer as a row of a Markdown table; media are told by their type and file."""
    turns = []
    for message in item.messages:
        for part in parts(message):
            named = Path(path).name if isinstance(path := part.get("path"), str) else ""
            turns.append(part["text"] if part["type"] == "text" else f"({part['type']} {named})".replace(" )", ")"))
    answer = item.answer if item.error is None else f"no answer: {item.error}"
    return "| " + " | ".join(map(_as_text, (" ".join(turns), item.expected, answer))) + " |"


def _as_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _MARKUP.sub(lambda match: " " if match[0] in "\r\n" else f"&#{ord(match[0])};", text)


class _Appending:
    """An unbuffered file that takes all of the data: what a disk has no room for is an error only when nothing more
    fits."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.file.write(data) :]
