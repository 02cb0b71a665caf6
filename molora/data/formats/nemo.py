"""NeMo's manifests as conversations. Source: docs.nvidia.com/nemo-framework, ASR datasets."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.data.formats.kaldi import TRANSCRIBE
from molora.data.formats.opening import Needed
from molora.data.formats.rows import JsonRows
from molora.data.formats.table import SegmentConfig, Table, TableConfig


@dataclass(kw_only=True)
class NemoConfig:
    """A manifest of NeMo: JSON lines, each with `audio_filepath` and, for a part of that file, `offset` and `duration`
    in seconds. Without an offset the part begins with the file, and without both it is the file. `prompt` and `answer`
    are templates over all keys, such as `{text}`, or `{question}` and `{answer}`. Relative paths start from the
    manifest's folder, or from `media_root`, which no path may leave."""

    path: str
    prompt: str = TRANSCRIBE
    answer: str = "{text}"
    media_root: str | None = None


class Nemo(Table):
    """Rows of a NeMo manifest."""

    config_type = NemoConfig

    def __init__(self, config: NemoConfig) -> None:
        about = TableConfig(
            path=config.path,
            prompt=config.prompt,
            answer=config.answer,
            media={"audio": "audio_filepath"},
            segment=SegmentConfig(start="offset", duration="duration"),
            media_root=config.media_root,
        )
        super().__init__(about, _Manifest(Path(config.path)))


class _Manifest:
    """The rows of a manifest, in which offset and duration may be missing."""

    def __init__(self, path: Path) -> None:
        self.rows = JsonRows(path, numbers_as_text=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        values = self.rows[row]
        path = values.get("audio_filepath")
        if not isinstance(path, str) or not path:
            raise ValueError(f"{self.where(row)}: audio_filepath: expected a path, got {path!r:.80}")
        return values

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def folder(self, row: int) -> Path:
        return self.rows.path.absolute().parent

    def columns(self, needed: Needed) -> list[str]:
        def with_times(names: Any) -> list[str]:
            return list(dict.fromkeys([*names, "offset", "duration"]))

        return with_times(self.rows.columns(lambda names: needed(with_times(names))))
