"""A public pretrained encoder behind a small plugin: its published logits, and a recipe that leaves it frozen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molora.checkpoint.assembly import blueprint
from molora.config import read
from molora.modality import Modality
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe

DATA = Path(os.environ.get("MOLORA_TEST_DATA", "."))
WEIGHTS = DATA / "weights/kwt1"
EXAMPLE = Path(__file__).parents[1] / "examples/keyword_transformer"
PLUGIN = f"{EXAMPLE / 'keyword_transformer.py'}:KeywordTransformer"

pytest.importorskip("torchaudio")
needs_data = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="set MOLORA_TEST_DATA to a folder with weights/kwt1")


@needs_data
@torch.no_grad()
def test_the_encoder_gives_the_published_logits() -> None:
    weights = {"weights": str(WEIGHTS / "model.safetensors")}
    modality = blueprint("audio", PLUGIN, weights, None, "here").modality
    assert isinstance(modality, Modality)
    encoder: Any = modality.build_encoder()
    parity = np.load(WEIGHTS / "parity.npz")
    logits = encoder.head(encoder.encode(torch.from_numpy(parity["waveform"])[None])[:, 0])[0]
    np.testing.assert_allclose(logits.numpy(), parity["logits"], atol=1e-4)
    prepared = [modality.prepare(torch.randn(n)) for n in (400, 16_000, 16_001)]
    assert encoder(**modality.collate(prepared)).lengths == tuple(p.num_tokens for p in prepared) == (14, 14, 28)


@needs_data
def test_the_recipe_trains_beside_the_frozen_encoder(tmp_path: Path) -> None:
    recipe = read(
        Recipe,
        EXAMPLE / "fsdd.yaml",
        [
            f"data_root={DATA}",
            f"run={tmp_path / 'run'}",
            f"feature_cache={tmp_path / 'features'}",
            f"backbone.path={save_backbone(tmp_path / 'backbone')}",
            f"modalities.audio.plugin={PLUGIN}",
            "stages.0.steps=2",
            "stages.0.evaluate_every_steps=0",
            "stages.0.samples_per_step=4",
            "evaluations.held_out.data.limit=4",
        ],
    )
    run = train(recipe, show=False)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 8
    assert (run / "modalities/audio/encoder.safetensors").is_file()
