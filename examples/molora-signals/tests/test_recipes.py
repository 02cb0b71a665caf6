"""The recipes run, on tables made here; real data, where there are some, fit their plugins."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.checkpoint.assembly import blueprint
from molora.config import read
from molora.data import open_source
from molora.received import file_hash
from molora.testing import save_backbone
from molora.train import Recipe, train

pyarrow = pytest.importorskip("pyarrow")

RECIPES = Path(__file__).parents[1] / "recipes"
DATA = Path(os.environ.get("MOLORA_TEST_DATA", "."))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and a table of six rows for every recipe."""
    from pyarrow import parquet

    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "backbone")
    draw = np.random.default_rng(0)
    tables: dict[str, list[dict[str, Any]]] = {"ecg5000": [], "racket_sports": [], "omniglot_strokes": []}
    for row in range(6):
        name = {"id": str(row), "label_name": ("rest", "work")[row % 2]}
        tables["ecg5000"].append({**name, "series": draw.normal(size=30 + row).tolist()})
        tables["racket_sports"].append({**name, "series": draw.normal(size=(6, 9 + row)).tolist(), "sampling_hz": 10.0})
        picture = io.BytesIO()
        Image.fromarray(draw.integers(0, 2, (35, 35)).astype(bool)).save(picture, "PNG")
        pen = draw.normal(size=(1 + row % 2, 5, 3)).tolist()
        tables["omniglot_strokes"].append({"alphabet": "Greek", "image": picture.getvalue(), "strokes": pen})
    for name, rows in tables.items():
        (home / name).mkdir()
        for split in ("train", "val"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), home / name / f"{split}.parquet")
    return home


def run(home: Path, name: str, *more: str) -> Path:
    recipe = read(
        Recipe,
        RECIPES / f"{name}.yaml",
        [
            f"data_root={home}",
            f"backbone.path={home / 'backbone'}",
            f"run={home / 'runs' / name}",
            "stages.0.steps=2",
            "stages.0.samples_per_step=4",
            *more,
        ],
    )
    return train(recipe, show=False)


def evaluated(folder: Path) -> dict[str, Any]:
    """What the run's evaluations found."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {key: value for row in rows for key, value in row.items() if key.endswith(("/questions", "/macro_f1"))}


@pytest.mark.parametrize("name", ["ecg5000", "racket_sports"])
def test_a_recipe_for_signals_trains_and_evaluates(home: Path, name: str) -> None:
    found = evaluated(run(home, name))
    assert found.keys() == {"held_out/questions", "held_out/macro_f1"} and found["held_out/questions"] == 6


def test_strokes_and_drawings_train_apart_and_join_without_touching_vision(home: Path) -> None:
    apart = [run(home, name) for name in ("strokes", "drawings")]
    folders = [folder / "modalities" / name for folder, name in zip(apart, ("strokes", "vision"), strict=True)]
    together = run(
        home,
        "drawings_and_strokes",
        f"modalities.strokes.path={folders[0]}",
        f"modalities.vision.path={folders[1]}",
    )
    changed = {
        f"{folder.name}/{path.name}"
        for folder in folders
        for path in folder.iterdir()
        if file_hash(path) != file_hash(together / "modalities" / folder.name / path.name)
    }
    assert changed == {"strokes/modality.json", "strokes/projector.safetensors"}
    assert evaluated(together) == {"both/questions": 6, "strokes/questions": 6, "drawings/questions": 6}


@pytest.mark.skipif(not (DATA / "ecg5000").is_dir(), reason="set MOLORA_TEST_DATA to a folder with ecg5000")
@pytest.mark.parametrize("name", ["ecg5000", "racket_sports", "strokes"])
def test_every_row_of_the_real_data_is_taken(name: str) -> None:
    recipe = read(Recipe, RECIPES / f"{name}.yaml", [f"data_root={DATA}"])
    ((modality, config),) = recipe.modalities.items()
    plugin: Any = blueprint(modality, str(config.plugin), config.options, None, "here").modality
    (evaluation,) = recipe.evaluations.values()
    for data in (*recipe.stages[0].data.values(), evaluation.data):
        source = open_source(data, "here")
        parts = (source[row]["messages"][0]["content"][0] for row in range(len(source)))
        tokens = [plugin.prepare(plugin.load(part)).num_tokens for part in parts]
        assert 0 < min(tokens) <= max(tokens) < 200
