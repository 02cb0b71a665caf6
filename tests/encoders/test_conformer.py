"""The Conformer: the reference on equal weights, and no influence from neighbours or padding."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import Phi4MultimodalAudioConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioModel

from molora.encoders.audio_towers import conformer
from molora.encoders.audio_towers.conformer import Conformer, ConformerConfig, num_encoded
from molora.encoders.logmel import num_frames
from molora.testing import assert_close

SMALL = ConformerConfig(width=32, blocks=3, heads=4, mlp_width=48, subsampling_channels=16)


def small(seed: int = 0, config: ConformerConfig = SMALL) -> Conformer:
    """A Conformer whose biases and tables are not zero, so that nothing hides."""
    torch.manual_seed(seed)
    model = Conformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def features(num: int, seed: int = 0) -> Tensor:
    return 12 + 4 * torch.randn(num, 80, generator=torch.Generator().manual_seed(seed))


def encode(model: Conformer, clips: Sequence[Tensor]) -> list[Tensor]:
    frames = model(torch.cat(list(clips)), [len(clip) for clip in clips])
    assert frames.lengths == tuple(num_encoded(len(clip)) for clip in clips)
    return list(frames.frames_SC.split(frames.lengths))


def reference(model: Conformer, config: ConformerConfig) -> Phi4MultimodalAudioModel:
    theirs = Phi4MultimodalAudioModel(
        Phi4MultimodalAudioConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_blocks=config.blocks,
            num_attention_heads=config.heads,
            ext_pw_out_channel=config.width,
            depthwise_separable_out_channel=config.width,
            kernel_size=config.kernel_size,
            nemo_conv_channels=config.subsampling_channels,
            bias_max_distance=config.max_distance,
        )
    )
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


@pytest.mark.parametrize("num", [1, 7, 8, 9, 98, 731, 4000, 4001, 4498, 8003])
@torch.no_grad()
def test_one_clip_equals_transformers_on_the_same_weights(num: int):
    """4,498 frames are 45 s: two windows, the second filled up with zeros that it sees."""
    model = small()
    clip_SM = features(num)
    theirs_SC = reference(model, SMALL)(clip_SM[None], None)[0]
    assert_close(encode(model, [clip_SM])[0], theirs_SC, 1e-5)


@torch.no_grad()
def test_wider_kernels_and_short_tables_equal_transformers_too():
    config = ConformerConfig(
        width=32, blocks=2, heads=2, mlp_width=48, subsampling_channels=8, kernel_size=9, max_distance=20
    )
    model = small(1, config)
    clip_SM = features(500)
    assert_close(encode(model, [clip_SM])[0], reference(model, config)(clip_SM[None], None)[0], 1e-5)


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_neighbours_or_on_padding():
    model = small()
    clips = [features(num, seed=num) for num in (1, 5, 98, 99, 100, 101, 102, 103, 104, 731, 3999, 4001, 4498, 12_345)]
    alone = [encode(model, [clip])[0] for clip in clips]
    for shuffle in range(3):
        order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(shuffle)).tolist()
        for index, frames_SC in zip(order, encode(model, [clips[i] for i in order]), strict=True):
            assert_close(frames_SC, alone[index], 1e-5)


def test_gradients_of_a_clip_do_not_depend_on_its_neighbours():
    model = small()
    clips = [features(num, seed=num) for num in (37, 98, 260)]

    def gradients(together: bool) -> dict[str, Tensor]:
        model.zero_grad()
        frames = encode(model, clips) if together else [encode(model, [clip])[0] for clip in clips]
        sum(piece.square().mean() for piece in frames).backward()  # type: ignore[union-attr]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients(True), gradients(False)
    assert together.keys() == apart.keys() == dict(model.named_parameters()).keys()
    for name, gradient in together.items():
        assert_close(gradient, apart[name], 1e-5)


@torch.no_grad()
def test_half_an_hour_runs_window_by_window(monkeypatch: pytest.MonkeyPatch):
    """No call sees more frames than the limit, and the limit changes nothing."""
    model = small()
    sizes: list[int] = []
    encode_windows = model._encode

    def watched(windows: Sequence[conformer._Window]) -> list[Tensor]:
        sizes.append(len(windows) * max(window.num_filled for window in windows))
        return encode_windows(windows)

    monkeypatch.setattr(model, "_encode", watched)
    clip_SM = features(num_frames(30 * 60 * 16_000))
    frames_SC = encode(model, [clip_SM])[0]
    assert len(frames_SC) == 22_500
    assert len(sizes) > 1 and max(sizes) <= conformer._FRAMES_PER_CALL
    monkeypatch.setattr(conformer, "_FRAMES_PER_CALL", 500)
    assert_close(encode(model, [clip_SM])[0], frames_SC, 1e-5)


@pytest.mark.parametrize("bad", [{"width": 30}, {"blocks": 0}, {"max_distance": 0}, {"kernel_size": 0}])
def test_sizes_that_cannot_work_are_refused(bad: dict[str, int]):
    with pytest.raises(ValueError, match="conformer: "):
        ConformerConfig(**{"width": 32, "heads": 4, **bad})
