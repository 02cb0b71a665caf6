"""Folders of pictures or clips as conversations: the name of a folder is a class, or a text lies beside each file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molora.config import ConfigError
from molora.data.formats.opening import Needed
from molora.data.formats.rows import MAX_ROW_BYTES
from molora.data.formats.table import Table, TableConfig
from molora.media import read_file
from molora.modality import MediaError

_ENDINGS = {
    "image": (".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"),
    "audio": (".aif", ".aiff", ".au", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav"),
}


@dataclass(kw_only=True)
class FolderConfig:
    """A folder of files of one type, at any depth, each of which is a row: `image` or `audio`, told by their endings.
    Links are followed, and names that begin with a dot left out.
    `prompt` and `answer` are templates over `{class}`, the name of the folder that a file lies in, `{text}`, what the
    text file of the same name beside it holds (a.jpg, a.txt), and `{name}`, its own name without the ending."""

    path: str
    part: Literal["image", "audio"]
    prompt: str
    answer: str


class Folder(Table):
    """Files of a folder, in the order of their paths."""

    config_type = FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        about = TableConfig(path=config.path, prompt=config.prompt, answer=config.answer, media={config.part: "path"})
        super().__init__(about, _Files(Path(os.path.expanduser(config.path)), config.part))


def files_below(root: Path) -> list[str]:
    """The files below a folder at any depth, as paths from it, in order. Links are followed, each folder once on a way
    down. What programs hide beside data, by a name that begins with a dot, is left out."""
    found: list[str] = []

    def walk(folder: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = os.path.join(folder, entry.name)
                if not entry.is_dir():
                    found.append(path)
                elif (key := (entry.stat().st_dev, entry.stat().st_ino)) not in above:
                    walk(path, above | {key})

    status = root.stat()
    walk("", frozenset({(status.st_dev, status.st_ino)}))
    return sorted(found)


class _Files:
    """The files of one type below a folder."""

    def __init__(self, root: Path, part: Literal["image", "audio"]) -> None:
        if not root.is_dir():
            raise ConfigError(f"data source {root}: no such folder")
        self.root = root.absolute()
        self.paths = [path for path in files_below(self.root) if path.lower().endswith(_ENDINGS[part])]
        if not self.paths:
            raise ConfigError(f"data source {root}: no {part} files, which end in {', '.join(_ENDINGS[part])}")
        self.reads_texts = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        path = Path(self.paths[row])
        values = {"id": path.as_posix(), "path": str(path), "name": path.stem, "class": path.parent.name or None}
        return {**values, "text": self._text(row)} if self.reads_texts else values

    def where(self, row: int) -> str:
        return str(self.root / self.paths[row])

    def folder(self, row: int) -> Path:
        return self.root

    def columns(self, needed: Needed) -> list[str]:
        names = ["id", "path", "name", "class", "text"]
        self.reads_texts = "text" in needed(names)
        return names

    def _text(self, row: int) -> str:
        path = (self.root / self.paths[row]).with_suffix(".txt")
        try:
            return read_file(path, MAX_ROW_BYTES).decode("utf-8-sig").strip()
        except MediaError as error:
            raise ValueError(f"{self.where(row)}: its text {path.name}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8; write the file as UTF-8") from error
