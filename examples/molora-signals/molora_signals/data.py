"""A data source whose content parts are made of several columns, which a signal and its rate need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from molora.config import ConfigError


@dataclass(kw_only=True)
class ColumnsConfig:
    """A parquet file of one-turn conversations.

    `parts` maps a part type to its keys, and each key to the column that holds its value, such as
    {"series": {"series": "acceleration", "sampling_hz": "rate"}}. `prompt` and `answer` are templates over columns.
    """

    path: str
    parts: dict[str, dict[str, str]]
    prompt: str
    answer: str


class Columns:
    """Rows of a table as conversations, held in memory."""

    config_type: ClassVar[type] = ColumnsConfig

    def __init__(self, config: ColumnsConfig) -> None:
        import pyarrow.parquet

        self.config = config
        if not Path(config.path).is_file():
            raise ConfigError(f"data source {config.path}: no such file")
        self.rows: list[dict[str, Any]] = pyarrow.parquet.read_table(config.path).to_pylist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        config, values = self.config, self.rows[row]
        try:
            content = [
                {"type": part_type, **{key: values[column] for key, column in keys.items()}}
                for part_type, keys in config.parts.items()
            ]
            content.append({"type": "text", "text": config.prompt.format(**values)})
            answer = config.answer.format(**values)
        except KeyError as error:
            raise ConfigError(f"data source {config.path}: no column {error}; columns are {list(values)}") from error
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"id": str(values.get("id", row)), "messages": messages, "tags": []}
