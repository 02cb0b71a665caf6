"""Datasets as their projects publish them: each trains unchanged with a recipe of at most twenty lines, and a row that
is made wrong is named by its file and place."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from molora.config import read
from molora.data.sources import SourceConfig, open_source
from molora.modality import MediaError
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe
from tests.data.formats.published import ALL, Published, captions_beside, esc50, replace

EACH = pytest.mark.parametrize("published", ALL, ids=lambda published: published.name)
MODALITIES = {
    "vision": "{crop_pixels: 32, max_crops: 0, pool: 4, tower: {kind: convit, pretrained: false, "
    "convit: {width: 16, depth: 1, heads: 2}}}",
    "audio": "{tower: {conformer: {width: 16, blocks: 1, heads: 2, mlp_width: 32, subsampling_channels: 8}}}",
}
RECIPE = """run: run
backbone: {{path: {backbone}}}
modalities:
  {medium}:
    plugin: {medium}
    options: {options}
    adapter: {{r: 4, target_modules: all-linear}}
stages:
  - name: learn
    train: {{projectors: {{learning_rate: 1e-3}}, adapters: {{learning_rate: 1e-3}}}}
    steps: 2
    samples_per_step: 3
    data:
      rows:
{source}
"""
MAX_LINES = 20


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def folder(published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a dataset was unpacked."""
    monkeypatch.chdir(tmp_path)
    published.write(tmp_path)
    return tmp_path


def recipe(published: Published, folder: Path, backbone: Path | str) -> Recipe:
    text = RECIPE.format(
        backbone=backbone,
        medium=published.medium,
        options=MODALITIES[published.medium],
        source=textwrap.indent(published.source, " " * 8),
    )
    assert len(text.splitlines()) <= MAX_LINES, text
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return read(Recipe, folder / "recipe.yaml", ["device=cpu"])


def rows(config: SourceConfig) -> list[dict[str, Any]]:
    source = open_source(config, "data")
    return [source[row] for row in range(len(source))]


@EACH
def test_what_a_project_publishes_trains_unchanged_with_a_short_recipe(
    published: Published, folder: Path, backbone: Path
) -> None:
    config = recipe(published, folder, backbone)
    assert [row["messages"][-1]["content"] for row in rows(config.stages[0].data["rows"])] == published.answers
    run = train(config, show=False)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@EACH
def test_a_wrong_row_is_named_by_its_file_and_place(published: Published, folder: Path) -> None:
    published.spoil(folder)
    config = recipe(published, folder, "backbone").stages[0].data["rows"]
    with pytest.raises(ValueError, match=published.says):
        rows(config)


def broken(name: str, folder: Path, backbone: Path) -> str:
    """What a training says of a published dataset whose media were changed."""
    (published,) = (each for each in ALL if each.name == name)
    with pytest.raises(ValueError) as told:
        train(recipe(published, folder, backbone), show=False)
    return str(told.value)


def test_a_training_names_the_row_of_a_medium_that_it_cannot_use(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    esc50(tmp_path)
    (tmp_path / "audio/1-100038-A-14.wav").write_bytes(b"no sound")
    said = broken("esc50", tmp_path, backbone)
    assert said.startswith("stages.0.data.rows, row 2: meta/esc50.csv, row 2: sample rows/1@0: ")
    assert "1-100038-A-14.wav': cannot be decoded" in said


def test_a_training_fetches_no_url_that_a_row_names(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    esc50(tmp_path)
    replace("meta/esc50.csv", "1-100038-A-14.wav", "http://127.0.0.1:9/a.wav")(tmp_path)
    said = broken("esc50", tmp_path, backbone)
    assert ": meta/esc50.csv, row 2: " in said and "URLs are not fetched unless you allow it" in said


def test_a_row_that_only_a_step_meets_is_named_by_its_file_too(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training tries a few rows before its first step, and not those between."""
    monkeypatch.chdir(tmp_path)
    captions_beside(tmp_path, 100)
    (tmp_path / "pictures/41.jpg").write_bytes(b"no picture")
    (published,) = (each for each in ALL if each.name == "captions_beside")
    config = recipe(published, tmp_path, backbone)
    config.stages[0].samples_per_step = 50
    with pytest.raises(MediaError, match=r"data source 'rows', row \d+: /.*/pictures/41.jpg: sample rows/"):
        train(config, show=False)
