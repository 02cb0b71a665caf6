"""The feature cache: the same run to the bit, and never stale frames."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.checkpoint.opening import open_model
from molora.config import build
from molora.model.molora import MoLoRA
from molora.pack import collate
from molora.testing import save_backbone
from molora.train.frame_cache import FeatureCache
from molora.train.loop import _Run, train
from molora.train.recipe import Recipe, plan_recipe

STEPS = 6


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def recipe(tmp_path: Path, backbone: Path) -> Callable[..., Recipe]:
    rows = [
        {
            "id": f"{i}",
            "messages": [
                {"role": "user", "content": [{"type": "numbers", "numbers": [i / 8, 0.5, -i / 4][: 1 + i % 3]}]},
                {"role": "assistant", "content": f"{i} is it"},
            ],
        }
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(name: str, **settings: Any) -> Recipe:
        values = {
            "run": str(tmp_path / name),
            "backbone": {"path": str(backbone)},
            "modalities": {
                "numbers": {
                    "plugin": "molora.testing:Numbers",
                    "adapter": {"r": 2, "target_modules": ["qkv_proj"]},
                }
            },
            "stages": [
                {
                    "name": "only",
                    "train": {"projectors.*": {"learning_rate": 1e-2}, "adapters.*": {"learning_rate": 1e-2}},
                    "data": {"rows": {"kind": "messages", "options": {"path": str(tmp_path / "rows.jsonl")}}},
                    "steps": STEPS,
                    "samples_per_step": 4,
                }
            ],
            "device": "cpu",
            **settings,
        }
        return build(Recipe, values, "recipe")

    return make


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss/numbers"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run / "modalities").rglob("*.safetensors")))


def test_a_run_that_finds_its_frames_equals_one_that_makes_them_to_the_bit(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cold = train(recipe("cold", feature_cache=str(cache)), show=False)
    assert len(list(cache.rglob("*.safetensors"))) == 8, "an item is kept once, however often it is seen"
    encoded: list[str] = []
    monkeypatch.setattr(MoLoRA, "frames", lambda self, item: encoded.append(item.modality))
    warm = train(recipe("warm", feature_cache=str(cache)), show=False)
    assert not encoded
    monkeypatch.undo()

    # The cache is emptied before every step, so that nothing is ever read.
    step = _Run._step

    def forgetful(self: _Run, *args: Any) -> dict[str, Any]:
        shutil.rmtree(tmp_path / "forgotten", ignore_errors=True)
        return step(self, *args)

    monkeypatch.setattr(_Run, "_step", forgetful)
    anew = train(recipe("anew", feature_cache=str(tmp_path / "forgotten")), show=False)
    assert losses(cold) == losses(warm) == losses(anew) and len(losses(cold)) == STEPS
    assert weights(cold) == weights(warm) == weights(anew)


def test_a_run_with_the_cache_follows_one_without(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Without it, the items of a pack are encoded together, which may round differently."""
    ours = train(recipe("with", feature_cache=str(tmp_path / "cache")), show=False)
    assert losses(ours) == pytest.approx(losses(train(recipe("without"), show=False)), rel=1e-5)


def test_frames_are_never_stale(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Other weights, other options and another item are other files; another training state is not."""
    model, processor = open_model(plan_recipe(recipe("any")), "cpu")

    def files(scale: float, number: float) -> int:
        model.modalities["numbers"].config.scale = scale
        content = [{"type": "numbers", "numbers": [number, 2.0]}]
        sample = processor.encode([{"role": "user", "content": content}], "x", generate=True)
        (filled,) = FeatureCache(tmp_path / "cache", model).fill([sample])
        item = filled.items[0]
        assert item.frames_SC is not None
        alone = model.encoders["numbers"](**model.modalities["numbers"].collate([item.prepared])).frames_SC
        assert torch.equal(item.frames_SC, alone)
        assert torch.equal(
            model.embed(collate([filled], model.modalities)), model.embed(collate([sample], model.modalities))
        )
        return len(list((tmp_path / "cache").rglob("*.safetensors")))

    with torch.no_grad():
        assert files(1.0, 3.0) == files(1.0, 3.0) == 1
        assert files(1.0, 4.0) == 2
        assert files(2.0, 3.0) == 3
        next(model.encoders["numbers"].parameters()).add_(1.0)
        assert files(2.0, 3.0) == 4


def test_an_encoder_that_trains_is_not_cached(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    model, processor = open_model(plan_recipe(recipe("any")), "cpu")
    next(model.encoders["numbers"].parameters()).requires_grad_(True)
    content = [{"type": "numbers", "numbers": [1.0]}]
    sample = processor.encode([{"role": "user", "content": content}], "x", generate=True)
    (filled,) = FeatureCache(tmp_path / "cache", model).fill([sample])
    assert filled.items[0].frames_SC is None and not (tmp_path / "cache").exists()


def test_frames_that_cannot_be_kept_or_read_are_made_again(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    blocked = losses(train(recipe("blocked", feature_cache=str(tmp_path / "file")), show=False))
    assert capsys.readouterr().err.count("nothing can be kept there") >= 1
    kept = losses(train(recipe("kept", feature_cache=str(tmp_path / "frames")), show=False))
    for path, size in zip(sorted((tmp_path / "frames").rglob("*.safetensors")), (0, 50, -1, 7) * 2, strict=False):
        path.write_bytes(path.read_bytes()[:size])
    again = losses(train(recipe("again", feature_cache=str(tmp_path / "frames")), show=False))
    assert blocked == kept == again
