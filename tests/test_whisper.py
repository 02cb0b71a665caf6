"""Pretrained encoders of transformers: their own frames, whatever runs beside a clip, from the real formats."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from molora.encoders.whisper import PretrainedConfig, PretrainedEar
from molora.testing import assert_close

ARCHITECTURES = ("whisper", "wav2vec2_bert", "parakeet")


def clip(num_samples: int) -> Tensor:
    return 0.1 * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def same(features_SM: Tensor) -> Tensor:
    return features_SM


def save(folder: Path, architecture: str) -> Any:
    """A tiny checkpoint of the whole model, as it is published."""
    torch.manual_seed(0)
    if architecture == "whisper":
        config: Any = transformers.WhisperConfig(
            d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, dropout=0.1,
        )  # fmt: skip
        model: Any = transformers.WhisperForConditionalGeneration(config)
    elif architecture == "wav2vec2_bert":
        config = transformers.Wav2Vec2BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=32,
            feature_projection_input_dim=160, conv_depthwise_kernel_size=5, mask_time_prob=0.5, apply_spec_augment=True,
        )  # fmt: skip
        model = transformers.Wav2Vec2BertForCTC(config)
    else:
        encoder = {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
            "subsampling_conv_channels": 4, "conv_kernel_size": 5,
        }  # fmt: skip
        config = transformers.ParakeetCTCConfig(vocab_size=32, pad_token_id=0, encoder_config=encoder)
        model = transformers.ParakeetForCTC(config)
    model.eval().save_pretrained(folder)
    return model


def theirs(model: Any, architecture: str, wave_L: Tensor) -> Tensor:
    """What transformers' own extractor and encoder make of a clip."""
    if architecture == "whisper":
        found = transformers.WhisperFeatureExtractor()(wave_L.numpy(), sampling_rate=16_000, return_tensors="pt")
        return model.model.encoder(found["input_features"]).last_hidden_state[0, : -(-len(wave_L) // 320)]
    if architecture == "wav2vec2_bert":
        extractor: Any = transformers.SeamlessM4TFeatureExtractor()
        found = extractor([wave_L.numpy()], sampling_rate=16_000, return_tensors="pt")
        frames_SC = model.wav2vec2_bert(**found).last_hidden_state[0]
        return frames_SC[: int(found["attention_mask"].sum())]
    extractor = transformers.ParakeetFeatureExtractor()
    found = extractor([wave_L.numpy()], sampling_rate=16_000, return_tensors="pt")
    rows = int(found["attention_mask"].sum())
    return model.encoder(found["input_features"][:, :rows]).last_hidden_state[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_published_checkpoint_gives_its_own_frames(architecture: str, tmp_path: Path):
    model = save(tmp_path, architecture)
    ear = PretrainedEar(PretrainedConfig(architecture=architecture, path=str(tmp_path), pool=1))  # type: ignore[arg-type]
    encoder = ear.build_encoder().eval()
    prepared = ear.prepare(clip(33_440), same)
    frames = encoder(**ear.collate([prepared]))
    assert frames.lengths == (prepared.num_tokens,)
    assert_close(frames.frames_SC, theirs(model, architecture, clip(33_440)), 1e-5)
    pooled = PretrainedEar(PretrainedConfig(architecture=architecture, path=str(tmp_path), pool=3))  # type: ignore[arg-type]
    tokens_SC = pooled.build_encoder().eval()(**pooled.collate([pooled.prepare(clip(33_440), same)])).frames_SC
    assert_close(tokens_SC[1], frames.frames_SC[3:6].mean(0), 1e-5)
    assert len(tokens_SC) == -(-len(frames.frames_SC) // 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frames_depend_on_no_neighbour_and_on_no_chance(architecture: str, tmp_path: Path):
    save(tmp_path, architecture)
    ear = PretrainedEar(PretrainedConfig(architecture=architecture, path=str(tmp_path)))  # type: ignore[arg-type]
    ear = pickle.loads(pickle.dumps(ear))
    encoder = ear.build_encoder()
    prepared = [ear.prepare(clip(n), same) for n in (400, 16_000, 16_001, 20_333, 16_000, 700_000)]
    frames = encoder.train()(**ear.collate(prepared))
    assert frames.lengths == tuple(item.num_tokens for item in prepared)
    frames.frames_SC.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    encoder.eval()
    with torch.no_grad():
        for item, frames_SC in zip(prepared, frames.frames_SC.split(frames.lengths), strict=True):
            assert_close(frames_SC, encoder(**ear.collate([item])).frames_SC, 1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_saved_encoder_is_built_again_from_its_config_alone(architecture: str, tmp_path: Path):
    save(tmp_path, architecture)
    ear = PretrainedEar(PretrainedConfig(architecture=architecture, path=str(tmp_path)))  # type: ignore[arg-type]
    encoder = ear.build_encoder().eval()
    assert encoder.origin is None, "a folder cannot be fetched again"
    config = encoder.saved_config(with_weights=True)
    assert config.path is None and not config.pretrained
    again = PretrainedEar(config).build_encoder().eval()
    again.load_state_dict(encoder.state_dict())
    batch = ear.collate([ear.prepare(clip(9_000), same)])
    assert torch.equal(again(**batch).frames_SC, encoder(**batch).frames_SC)


def test_what_cannot_work_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="need either a name on the hub or a path"):
        PretrainedConfig(architecture="whisper")
    with pytest.raises(ValueError, match="cannot be loaded as whisper"):
        PretrainedEar(PretrainedConfig(architecture="whisper", path=str(tmp_path / "none"))).build_encoder()
    save(tmp_path, "whisper")
    with pytest.raises(ValueError, match="has 80 mel bins, num_mel_bins says 128"):
        PretrainedEar(PretrainedConfig(architecture="whisper", path=str(tmp_path), num_mel_bins=128)).build_encoder()
