"""The log-mel front end: the reference's figures, transformers' extractor, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi4MultimodalFeatureExtractor

from molora.encoders.logmel import _mel_KM, log_mel, num_frames


def tone(rate_hz: int, hertz: float = 440.0, seconds: float = 1.0) -> Tensor:
    return torch.tensor(0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate_hz * seconds)) / rate_hz))


def noise(num_samples: int, seed: int = 0) -> Tensor:
    return torch.tensor((np.random.RandomState(seed).randn(num_samples) * 0.1).astype(np.float32))


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98), (480_000, 2998), (640_000, 3998), (960_000, 5998)],
)
def test_a_clip_has_the_reference_number_of_frames(samples: int, frames: int):
    assert num_frames(samples) == frames
    if 0 < frames < 100:
        assert len(log_mel([noise(samples)])) == frames


def test_the_mel_matrix_has_the_reference_taps():
    mel_MK = _mel_KM(torch.device("cpu")).T
    assert mel_MK.shape == (80, 257)
    assert float(mel_MK.sum()) == pytest.approx(241.49892, abs=1e-4)
    taps = (mel_MK > 0).sum(1).tolist()
    assert taps[:10] == [1, 2, 1, 1, 2, 2, 2, 2, 2, 1]
    assert taps[-3:] == [15, 15, 15]
    assert mel_MK[0].nonzero().flatten().tolist() == [1]
    assert float(mel_MK[0, 1]) == pytest.approx(0.57565, abs=1e-5)
    assert mel_MK[79].nonzero().flatten().tolist() == list(range(231, 246))
    wanted = {231: 0.114768, 232: 0.243214, 238: 0.996555, 245: 0.131453}
    assert {k: float(mel_MK[79, k]) for k in wanted} == pytest.approx(wanted, abs=1e-5)


def test_a_tone_gives_the_reference_features():
    features_SM = log_mel([tone(16_000)])
    assert features_SM.shape == (98, 80)
    assert float(features_SM.mean()) == pytest.approx(13.21802, abs=1e-4)
    assert float(features_SM.std(correction=0)) == pytest.approx(2.975661, abs=1e-4)
    assert int(features_SM[0].argmax()) == 15
    first = [11.461669, 12.030835, 12.81029, 13.193143, 12.3140335, 11.607764]
    assert features_SM[0, :6].tolist() == pytest.approx(first, abs=1e-4)


def test_noise_gives_the_reference_features():
    features_SM = log_mel([noise(16_000)])
    assert float(features_SM.mean()) == pytest.approx(20.455385, abs=1e-4)
    assert float(features_SM.std(correction=0)) == pytest.approx(3.1894174, abs=1e-4)
    points = [float(features_SM[0, 0]), float(features_SM[50, 40]), float(features_SM[97, 79])]
    assert points == pytest.approx([13.908736, 20.722868, 24.82947], abs=1e-4)


def test_silence_is_exactly_zero():
    assert torch.equal(log_mel([torch.zeros(16_000)]), torch.zeros(98, 80))


def test_narrowband_gives_the_reference_features():
    features_SM = log_mel([tone(8_000)], narrowband=True)
    assert features_SM.shape == (98, 80)
    assert float(features_SM.mean()) == pytest.approx(10.761383, abs=1e-4)
    assert int(features_SM[0].argmax()) == 15
    assert float(features_SM[0, 15]) == pytest.approx(25.166481, abs=1e-4)
    assert float((features_SM == 0).float().mean()) == pytest.approx(0.225, abs=1e-3)


def test_features_agree_with_transformers_where_its_mel_matrix_does():
    waves = [noise(20_000 + 1_237 * i, seed=i) for i in range(3)]
    extractor = Phi4MultimodalFeatureExtractor()
    ours = log_mel(waves).split([num_frames(len(wave)) for wave in waves])
    for wave, mine_SM in zip(waves, ours, strict=True):
        theirs_SM = extractor(wave.numpy(), sampling_rate=16_000, return_tensors="pt")["audio_input_features"][0]
        difference_SM = (mine_SM - theirs_SM)[:, :79].abs()
        # Theirs transforms in fp64: in fp32 a bin far below the frame's loudest keeps fewer digits.
        assert float(difference_SM.max()) < 2e-3 and float(difference_SM.mean()) < 5e-5, (
            difference_SM.max(),
            difference_SM.mean(),
        )
        # Its highest triangle takes one more bin of the spectrum than the released model's processor.
        assert float((mine_SM[:, 79] - theirs_SM[:, 79]).abs().max()) < 0.05


def test_packed_clips_have_the_features_they_have_alone():
    waves = [noise(400 + 977 * i, seed=i) for i in range(8)] + [noise(700_000, seed=9)]
    packed = log_mel(waves).split([num_frames(len(wave)) for wave in waves])
    for wave, features_SM in zip(waves, packed, strict=True):
        torch.testing.assert_close(features_SM, log_mel([wave]), atol=1e-5, rtol=0)
