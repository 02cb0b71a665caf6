"""torchaudio's blocks: equal to torchaudio alone, independent of neighbours where torchaudio is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molora.encoders.audio_towers.conformer import ConformerConfig
from molora.encoders.audio_towers.torchaudio_conformer import TorchaudioConformer
from molora.testing import assert_close

CONFIG = ConformerConfig(width=32, blocks=2, heads=4, mlp_width=48, subsampling_channels=8, kernel_size=7)


def features(num: int) -> Tensor:
    return 12 + 4 * torch.randn(num, 80, generator=torch.Generator().manual_seed(num))


@pytest.fixture
def model() -> TorchaudioConformer:
    torch.manual_seed(0)
    model = TorchaudioConformer(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def test_one_clip_equals_torchaudio(model: TorchaudioConformer):
    features_SM = features(731)
    lengths_N = torch.tensor([731])
    subsampled_NSC = model.embed(model.encoder_embedding(features_SM[None]), lengths_N)
    theirs_NSC, _ = model.blocks(subsampled_NSC, torch.tensor([subsampled_NSC.shape[1]]))
    assert_close(model(features_SM, [731]).frames_SC, theirs_NSC[0], 1e-5)


@torch.no_grad()
def test_a_clip_depends_on_no_neighbour_though_in_torchaudio_it_does(model: TorchaudioConformer):
    clips = [features(num) for num in (9, 98, 101, 731, 4100)]
    frames = model(torch.cat(clips), [len(clip) for clip in clips])
    for clip, frames_SC in zip(clips, frames.frames_SC.split(frames.lengths), strict=True):
        assert_close(frames_SC, model(clip, [len(clip)]).frames_SC, 1e-5)

    short_SC, long_SC = torch.randn(10, 32), torch.randn(30, 32)
    padded_NSC = torch.nn.utils.rnn.pad_sequence([short_SC, long_SC], batch_first=True)
    theirs_NSC, _ = model.blocks(padded_NSC, torch.tensor([10, 30]))
    alone_NSC, _ = model.blocks(short_SC[None], torch.tensor([10]))
    assert float((theirs_NSC[0, :10] - alone_NSC[0]).abs().max()) > 1e-2


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel_size is odd, got 4"):
        TorchaudioConformer(ConformerConfig(width=32, heads=4, kernel_size=4))
