"""Kaldi's data folders as conversations. Source: kaldi-asr.org/doc/data_prep.html."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.formats.opening import Needed
from molora.data.formats.rows import LineRows
from molora.data.formats.table import SegmentConfig, Table, TableConfig

TRANSCRIBE = "Transcribe the audio clip into text."

_WRITE_FILES = (
    "write the sound into a file of its own and give its path, as ESPnet's scripts/audio/format_wav_scp.sh does for a "
    "whole folder"
)


@dataclass(kw_only=True)
class KaldiConfig:
    """A data folder of Kaldi, each line of whose `text` is a row: an utterance's id and what is said. `wav.scp` has the
    path of each recording. Where there is a file `segments`, it says which seconds of which recording an utterance is;
    an end of -1 is the recording's. Other files of the folder are not read.

    Relative paths start from `media_root`, or from the data folder, though Kaldi's own start from where its scripts
    run. `prompt` and `answer` are templates over `id` and `text`.
    """

    path: str
    prompt: str = TRANSCRIBE
    answer: str = "{text}"
    media_root: str | None = None


class Kaldi(Table):
    """Utterances of a Kaldi data folder."""

    config_type = KaldiConfig

    def __init__(self, config: KaldiConfig) -> None:
        about = TableConfig(
            path=config.path,
            prompt=config.prompt,
            answer=config.answer,
            media={"audio": "audio"},
            segment=SegmentConfig(start="start", end="end"),
            media_root=config.media_root,
        )
        super().__init__(about, _Utterances(Path(os.path.expanduser(config.path))))


class _Utterances:
    """The lines of `text`, each with its recording and segment."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigError(f"data source {path}: no such folder; give the one that has wav.scp and text")
        self.path = path
        self.texts = LineRows(path / "text")
        if not len(self.texts):
            raise ConfigError(f"data source {path / 'text'}: no rows")
        self.recordings = LineRows(path / "wav.scp")
        self.recording_rows = self.recordings.by_first_word()
        self.segments = LineRows(path / "segments") if (path / "segments").exists() else None
        self.segment_rows = {} if self.segments is None else self.segments.by_first_word()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        where = self.where(row)
        id, *text = self.texts[row].split(maxsplit=1)
        recording, start, end = id, None, None
        if self.segments is not None:
            if id not in self.segment_rows:
                raise ValueError(f"{where}: {id!r:.80} is not in {self.segments.path}; add it, or take it out")
            where = self.segments.where(self.segment_rows[id])
            recording, start, end = self._segment(self.segments[self.segment_rows[id]], where)
        if recording not in self.recording_rows:
            raise ValueError(f"{where}: {recording!r:.80} is not in {self.recordings.path}; add it, or take it out")
        return {"id": id, "text": "".join(text).strip(), "audio": self._path(recording), "start": start, "end": end}

    def where(self, row: int) -> str:
        return self.texts.where(row)

    def folder(self, row: int) -> Path:
        return self.path.absolute()

    def columns(self, needed: Needed) -> list[str]:
        return ["id", "text", "audio", "start", "end"]

    def _segment(self, line: str, where: str) -> tuple[str, float, float | None]:
        """A recording's id, the start and the end, which is None for the recording's own."""
        cells = line.split()
        try:
            _, recording, start, end = cells
            begins, ends = float(start), float(end)
        except ValueError:
            raise ValueError(
                f"{where}: {line!r:.120}; a segment is the ids of an utterance and of its recording, a start and an "
                "end in seconds (a channel is not read: write each channel as a recording of its own)"
            ) from None
        return recording, begins, None if ends == -1 else ends

    def _path(self, recording: str) -> str:
        row = self.recording_rows[recording]
        where, line = self.recordings.where(row), self.recordings[row].strip()
        path = line[len(recording) :].strip()
        if path.endswith("|"):
            raise ValueError(f"{where}: a command, {path!r:.120}, and no command is run; {_WRITE_FILES}")
        if re.search(r"\.ark:\d+$", path):
            raise ValueError(f"{where}: {path!r:.120} lies inside an archive, which is not read; {_WRITE_FILES}")
        if not path:
            raise ValueError(f"{where}: no path behind {recording!r:.80}; write it there")
        return path
