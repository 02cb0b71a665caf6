"""Clips with files of transcripts, as LibriSpeech and LJSpeech are published, as conversations."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.formats.folders import files_below
from molora.data.formats.kaldi import TRANSCRIBE
from molora.data.formats.opening import TextFiles
from molora.data.formats.rows import LineRows
from molora.data.formats.table import Table, TableConfig
from molora.data.formats.templates import Template


@dataclass(kw_only=True)
class TranscriptsConfig:
    """Files of transcripts without a line of column names. `path` is one, or a folder where those called `files` are
    looked for at any depth.

    `names` are the columns of each line, with `separator` between them; where that is a blank, the last takes the rest
    of the line. `medium` is the template of a path, from the folder of the transcript file or from `media_root`, and
    `part` its type. What is set here already is LibriSpeech's; LJSpeech's metadata.csv has `separator: "|"`,
    `names: [id, written, text]` and `medium: "wavs/{id}.wav"`.
    """

    path: str
    files: str = "*.trans.txt"
    separator: str = " "
    names: list[str] = field(default_factory=lambda: ["id", "text"])
    medium: str = "{id}.flac"
    part: str = "audio"
    prompt: str = TRANSCRIBE
    answer: str = "{text}"
    media_root: str | None = None

    def __post_init__(self) -> None:
        if not self.separator or not self.names:
            raise ConfigError("separator and names: give the text between two cells, and a name for each")
        if not Template(self.medium, "medium").fields:
            raise ConfigError(f"medium is {self.medium!r} in every row; write a column into it, such as {{id}}.flac")


class Transcripts(Table):
    """Lines of transcript files."""

    config_type = TranscriptsConfig

    def __init__(self, config: TranscriptsConfig) -> None:
        path = Path(os.path.expanduser(config.path))
        paths = [path]
        if path.is_dir():
            paths = [path / each for each in files_below(path) if fnmatchcase(Path(each).name, config.files)]
        files = [_Lines(LineRows(each), config) for each in paths]
        if not any(map(len, files)):
            there = f"no file called {config.files} in it" if not paths else "no rows"
            raise ConfigError(f"data source {path}: {there}")
        about = TableConfig(
            path=config.path,
            prompt=config.prompt,
            answer=config.answer,
            media={config.part: config.medium},
            media_root=config.media_root,
        )
        super().__init__(about, TextFiles(files))


class _Lines:
    """The lines of one file, in cells."""

    def __init__(self, lines: LineRows, config: TranscriptsConfig) -> None:
        self.lines = lines
        self.path = lines.path
        self.separator = config.separator
        self.names = config.names

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        line = self.lines[row]
        cells = line.split(self.separator, len(self.names) - 1 if self.separator == " " else -1)
        if len(cells) != len(self.names):
            raise ValueError(
                f"{self.where(row)}: has {len(cells)} cells with {self.separator!r} between them, but there are "
                f"{len(self.names)} names: {', '.join(self.names)}"
            )
        return dict(zip(self.names, cells, strict=True))

    def where(self, row: int) -> str:
        return self.lines.where(row)

    def columns(self, wanted: Callable[[Iterable[str]], object]) -> list[str]:
        return self.names
