"""Rows of a table, whose content parts take several columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from molora.config import ConfigError
from molora.data import SourceConfig, open_source

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    from pyarrow import parquet

    rows = [
        {"id": "a", "wave": [[1.0, 2.0]], "rate": 5.0, "name": "up"},
        {"id": "b", "wave": [[3.0]], "rate": 6.0, "name": "on"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def source(path: Path, **more: object) -> SourceConfig:
    options = {"path": str(path), "parts": {"series": {"series": "wave", "sampling_hz": "rate"}}, "prompt": "{id}?"}
    return SourceConfig(kind="molora_signals.data:Columns", options={**options, "answer": "{name}", **more})


def test_a_part_takes_its_keys_from_columns(table: Path) -> None:
    rows = open_source(source(table), "here")
    question = [{"type": "series", "series": [[3.0]], "sampling_hz": 6.0}, {"type": "text", "text": "b?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "on"}]
    assert len(rows) == 2 and rows[1] == {"id": "b", "messages": messages, "tags": []}


def test_a_mistake_in_a_recipe_is_an_error_that_names_it(table: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.parquet: no such file"):
        open_source(source(table.with_name("gone.parquet")), "here")
    for more in ({"parts": {"series": {"series": "way"}}}, {"prompt": "{way}?"}, {"answer": "{way}"}):
        with pytest.raises(ConfigError, match=r"no column 'way'; columns are \['id', 'wave', 'rate', 'name'\]"):
            open_source(source(table, **more), "here")[0]
    with pytest.raises(ConfigError, match="promt"):
        open_source(source(table, promt="?"), "here")
