"""The audio modality: token counts, company, augmentation, and its encoder."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from molora.config import build
from molora.encoders.audio import Audio, AudioConfig, AugmentConfig, spec_augment
from molora.modality import Modality
from molora.testing import assert_close

pytest.importorskip("torchaudio")

SIZES = {"width": 32, "blocks": 2, "heads": 4, "mlp_width": 48, "subsampling_channels": 8, "kernel_size": 3}


def audio(**options: Any) -> Audio:
    return Audio("audio", build(AudioConfig, {"tower": {"conformer": SIZES}, **options}, "audio"))


def clip(num_samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["conformer", "torchaudio"])
@torch.no_grad()
def test_tokens_are_frames_and_depend_on_no_neighbour(kind: str):
    modality = audio(tower={"kind": kind, "conformer": SIZES})
    assert isinstance(modality, Modality)
    encoder = modality.build_encoder().eval()
    sizes = (400, 559, 560, 1_679, 1_680, 16_000, 33_333, 700_000)
    prepared = [modality.prepare(clip(size, size)) for size in sizes]
    assert [item.num_tokens for item in prepared[:3]] == [1, 1, 1]
    assert prepared[5].num_tokens == 13
    frames = encoder(**modality.collate(prepared))
    assert frames.lengths == tuple(item.num_tokens for item in prepared)
    for item, frames_SC in zip(prepared, frames.frames_SC.split(frames.lengths), strict=True):
        assert_close(frames_SC, encoder(**modality.collate([item])).frames_SC, 1e-5)


def test_a_part_is_loaded_by_its_own_type():
    wave = clip(800).numpy()
    loaded = audio().load({"type": "audio", "array": wave, "sampling_rate": 16_000})
    np.testing.assert_array_equal(loaded.numpy(), wave)
    assert Audio.part_type == "audio"


def test_company_decides_the_projector():
    modality = audio(beside={"vision": "vision", "touch": "other"})
    assert modality.projectors() == ("default", "vision", "other")
    assert modality.projector(frozenset({"audio"})) == "default"
    assert modality.projector(frozenset({"audio", "vision"})) == "vision"
    assert modality.projector(frozenset({"audio", "touch", "vision"})) == "vision"
    assert audio().projectors() == ("default",)


def test_augmentation_comes_from_the_generator_alone_and_not_at_all_without():
    modality = audio(augment={"speeds": [0.9, 1.0, 1.1], "time_masks": 2, "bin_masks": 2})
    plain = audio().prepare(clip(16_000)).tensors["features_SM"]
    assert torch.equal(modality.prepare(clip(16_000)).tensors["features_SM"], plain)
    drawn = []
    for seed in (1, 1, 2, 3, 4, 5):
        prepared = modality.prepare(clip(16_000), torch.Generator().manual_seed(seed))
        features_SM = prepared.tensors["features_SM"]
        assert prepared.num_tokens == -(-len(features_SM) // 8)
        drawn.append(features_SM)
    assert torch.equal(drawn[0], drawn[1])
    assert {len(features_SM) for features_SM in drawn} == {89, 98, 109}


def test_the_shortest_clip_survives_being_sped_up():
    modality = audio(augment={"speeds": [1.1]})
    assert modality.prepare(clip(400), torch.Generator().manual_seed(0)).num_tokens == 1


def test_masks_hide_no_more_than_they_may_behind_the_mean():
    features_SM = torch.rand(200, 80)
    config = AugmentConfig(time_masks=2, time_mask_frames=10, bin_masks=1, bin_mask_bins=5)
    for seed in range(20):
        masked_SM = spec_augment(features_SM, config, torch.Generator().manual_seed(seed))
        hidden = masked_SM != features_SM
        assert torch.all(masked_SM[hidden] == features_SM.mean())
        assert int(hidden.all(1).sum()) <= 20 and int(hidden.all(0).sum()) <= 5
    assert spec_augment(torch.rand(3, 80), config, torch.Generator().manual_seed(0)).shape == (3, 80)


def test_it_travels_to_data_workers():
    modality = pickle.loads(pickle.dumps(audio(beside={"vision": "vision"})))
    assert modality.prepare(clip(800)).num_tokens == 1


@torch.no_grad()
def test_a_pretrained_encoder_is_an_encoder_like_any_other():
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    pretrained = {"architecture": "whisper", "pretrained": False, "arguments": sizes, "pool": 4}
    modality = audio(tower={"kind": "pretrained", "pretrained": pretrained}, augment={"speeds": [0.9]})
    encoder = modality.build_encoder().eval()
    prepared = [modality.prepare(clip(16_000)), modality.prepare(clip(16_000), torch.Generator().manual_seed(0))]
    assert [item.num_tokens for item in prepared] == [13, 14]
    assert encoder(**modality.collate(prepared)).lengths == (13, 14)
    saved = encoder.saved_config(with_weights=True)
    assert isinstance(saved, AudioConfig) and saved.augment == modality.config.augment
    again = Audio("audio", build(AudioConfig, asdict(saved), "saved")).build_encoder().eval()
    again.load_state_dict(encoder.state_dict())
    batch = modality.collate(prepared)
    assert torch.equal(again(**batch).frames_SC, encoder(**batch).frames_SC)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"augment": {"speeds": [0.1]}}, "speeds lie between 0.5 and 2"),
        ({"augment": {"time_masks": -1}}, "at least 0"),
        ({"tower": {"kind": "ear"}}, "kind"),
        ({"tower": {"kind": "pretrained"}}, "kind pretrained has it"),
        ({"tower": {"conformer": {"width": 33}}}, "width is a multiple of heads"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        audio(**options)
