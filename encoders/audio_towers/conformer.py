"""The Conformer: log-mel features to a frame every 80 ms, in windows of 40 s.

Modules are named as in transformers' Phi4MultimodalAudioModel, so that its weights fit as they are.

Letters: N windows, S frames (of features in `features`, of the encoder elsewhere), M mel bins, C width (in
`maps`: channels), H heads.

Source: arXiv 2503.01743 §2.2.2 and speech_conformer_encoder.py of microsoft/Phi-4-multimodal-instruct.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from molora.encoders.logmel import NUM_MEL_BINS
from molora.encoders.pretrained_files import check_sizes
from molora.modality import Frames

REDUCTION = 8
WINDOW_FRAMES = 500

# Ordinary speech in log-mel features; what a Conformer that starts from scratch normalises with.
_MEL_MEAN, _MEL_STD = 12.0, 4.0

# Bounds the memory of one call: clips are cut into windows, and windows of like length run together.
_FRAMES_PER_CALL = 8 * WINDOW_FRAMES


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Sizes of a Conformer; the defaults are Phi-4-Multimodal's. `max_distance`: how far, in frames, the learned
    attention bias tells distances apart."""

    width: int = 1024
    blocks: int = 24
    heads: int = 16
    mlp_width: int = 1536
    kernel_size: int = 3
    subsampling_channels: int = 1024
    max_distance: int = 500

    def __post_init__(self) -> None:
        check_sizes("conformer", vars(self))
        if min(vars(self).values()) < 1 or self.width % self.heads:
            raise ValueError(f"conformer: every size is at least 1, and width is a multiple of heads; got {self}")


def num_encoded(num_frames: int) -> int:
    """Frames of the encoder for a clip's frames of features."""
    return -(-num_frames // REDUCTION)


class Conformer(nn.Module):
    """Packed features (S, M) of clips to packed frames (S, C).

    A clip's frames depend on that clip alone: what pads it to its neighbours' length is set to zero before every
    convolution and hidden as a key. A clip of more than one window is filled up with zeros to whole windows, which the
    last window does see, as in the reference; that is part of the clip's own computation. Windows do not see each
    other, except that the subsampling runs before the cut.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.width = config.width
        self.encoder_embedding = Normalisation()
        self.embed = Subsampling(config)
        self._add_blocks(config)

    def _add_blocks(self, config: ConformerConfig) -> None:
        self.relative_attention_bias_layer = DistanceBias(config)
        self.encoders = nn.ModuleList(Block(config) for _ in range(config.blocks))

    def forward(self, features_SM: Tensor, lengths: Sequence[int]) -> Frames:
        """`lengths` are the frames of features of each clip."""
        windows = [window for clip_SM in features_SM.split(list(lengths)) for window in _cut(clip_SM)]
        order = sorted(range(len(windows)), key=lambda index: len(windows[index].features_SM))
        frames: list[Tensor] = [features_SM] * len(windows)
        while order:
            longest = windows[order[-1]].num_frames
            group = order[-max(1, _FRAMES_PER_CALL // longest) :]
            del order[-len(group) :]
            for index, frames_SC in zip(group, self._encode([windows[i] for i in group]), strict=True):
                frames[index] = frames_SC
        return Frames(torch.cat(frames), tuple(num_encoded(length) for length in lengths))

    def _encode(self, windows: Sequence[_Window]) -> list[Tensor]:
        """Windows to their frames, each without what fills it up."""
        features_NSM = pad_sequence([window.features_SM for window in windows], batch_first=True)
        lengths_N = torch.tensor([len(window.features_SM) for window in windows], device=features_NSM.device)
        frames_NSC = self.embed(self.encoder_embedding(features_NSM), lengths_N)
        pieces = [frames_SC[w.skip : w.skip + w.num_frames] for w, frames_SC in zip(windows, frames_NSC, strict=True)]
        filled = [F.pad(piece, (0, 0, 0, w.num_filled - len(piece))) for w, piece in zip(windows, pieces, strict=True)]
        frames_NSC = pad_sequence(filled, batch_first=True)
        steps = torch.arange(frames_NSC.shape[1], device=frames_NSC.device)
        padding_NS = steps >= torch.tensor([w.num_filled for w in windows], device=frames_NSC.device)[:, None]
        frames_NSC = self._blocks(frames_NSC, padding_NS)
        return [frames_SC[: w.num_frames] for w, frames_SC in zip(windows, frames_NSC, strict=True)]

    def _blocks(self, frames_NSC: Tensor, padding_NS: Tensor) -> Tensor:
        bias_HSS = self.relative_attention_bias_layer(frames_NSC.shape[1])
        mask_NHSS = bias_HSS.masked_fill(padding_NS[:, None, None, :], float("-inf"))
        for block in self.encoders:
            frames_NSC = block(frames_NSC, mask_NHSS)
        return frames_NSC


class _Window(NamedTuple):
    """Features of one window, which give `num_frames` after the first `skip`; `num_filled` with zeros after them."""

    features_SM: Tensor
    skip: int
    num_frames: int
    num_filled: int


def _cut(clip_SM: Tensor) -> list[_Window]:
    """A clip's windows. All but the first begin one encoder frame early: the subsampling reads across the cut."""
    num_frames, windows = num_encoded(len(clip_SM)), []
    for start in range(0, num_frames, WINDOW_FRAMES):
        stop, skip = min(start + WINDOW_FRAMES, num_frames), int(start > 0)
        features_SM = clip_SM[(start - skip) * REDUCTION : stop * REDUCTION]
        windows.append(_Window(features_SM, skip, stop - start, min(num_frames, WINDOW_FRAMES)))
    return windows


class Normalisation(nn.Module):
    """Features minus their mean, times the inverse of their standard deviation; both are stored, not trained."""

    global_mean: Tensor
    global_invstd: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("global_mean", torch.full((NUM_MEL_BINS,), _MEL_MEAN))
        self.register_buffer("global_invstd", torch.full((NUM_MEL_BINS,), 1 / _MEL_STD))

    def forward(self, features_NSM: Tensor) -> Tensor:
        return (features_NSM - self.global_mean) * self.global_invstd


class Subsampling(nn.Module):
    """Three strided convolutions over time and frequency, the last two depthwise-separable: 8 frames become one."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        channels = config.subsampling_channels
        layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.ReLU()]
        for _ in range(2):
            depthwise = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels)
            layers += [depthwise, nn.Conv2d(channels, channels, 1), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.out = nn.Linear(channels * NUM_MEL_BINS // REDUCTION, config.width)

    def forward(self, features_NSM: Tensor, lengths_N: Tensor) -> Tensor:
        # Channels lie next to each other in memory from the start, or every convolution would copy its input.
        maps_NCSM = features_NSM[..., None].permute(0, 3, 1, 2) * _inside(lengths_N, features_NSM)
        for layer in self.conv:
            if isinstance(layer, nn.ReLU):
                # Alone, a clip would have nothing behind it but the convolution's own padding of zeros.
                lengths_N = (lengths_N + 1) // 2
                maps_NCSM = maps_NCSM.mul_(_inside(lengths_N, maps_NCSM[:, 0])).relu_()
            else:
                maps_NCSM = layer(maps_NCSM)
        return self.out(maps_NCSM.transpose(1, 2).flatten(2))


def _inside(lengths_N: Tensor, frames_NSM: Tensor) -> Tensor:
    """1 where a clip has frames and 0 behind them, (N, 1, S, 1)."""
    steps = torch.arange(frames_NSM.shape[1], device=frames_NSM.device)
    return (steps < lengths_N[:, None])[:, None, :, None].to(frames_NSM.dtype)


class DistanceBias(nn.Module):
    """A learned attention bias for each head and signed distance, clamped at the table's ends."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.bias_values = nn.Embedding(2 * config.max_distance, config.heads)
        nn.init.normal_(self.bias_values.weight, std=0.02)

    def forward(self, num_frames: int) -> Tensor:
        """Returns (H, S, S): query, key."""
        steps = torch.arange(num_frames, device=self.bias_values.weight.device)
        distances = (steps[None, :] - steps[:, None]).clamp(-self.max_distance, self.max_distance - 1)
        return self.bias_values(distances + self.max_distance).permute(2, 0, 1)


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each added to what it read; then a norm."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.feed_forward_in, self.feed_forward_out = FeedForward(config), FeedForward(config)
        self.layer_norm_att, self.layer_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.self_attn = Attention(config)
        self.conv = Convolution(config)

    def forward(self, frames_NSC: Tensor, mask_NHSS: Tensor) -> Tensor:
        frames_NSC = frames_NSC + 0.5 * self.feed_forward_in(frames_NSC)
        frames_NSC = frames_NSC + self.self_attn(self.layer_norm_att(frames_NSC), mask_NHSS)
        frames_NSC = frames_NSC + self.conv(frames_NSC)
        return self.layer_norm(frames_NSC + 0.5 * self.feed_forward_out(frames_NSC))


class FeedForward(nn.Module):
    """Norm, and a gated MLP whose second half gates the first."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.width)
        self.gate_up_proj = nn.Linear(config.width, 2 * config.mlp_width)
        self.down_proj = nn.Linear(config.mlp_width, config.width)

    def forward(self, frames_NSC: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(self.layer_norm(frames_NSC)).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))


class Attention(nn.Module):
    """Full attention inside a window, with the bias as mask."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)
        self.v_proj, self.o_proj = nn.Linear(config.width, config.width), nn.Linear(config.width, config.width)

    def forward(self, frames_NSC: Tensor, mask_NHSS: Tensor) -> Tensor:
        query, key, value = (
            projection(frames_NSC).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_NHSS.to(query.dtype))
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Norm, a gated pointwise convolution, a causal depthwise-separable one, another pointwise one. Only past frames
    are read, so that padding, which comes last, reaches no frame that counts."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.width)
        self.glu = GatedPointwise(config.width)
        depthwise = nn.Conv1d(config.width, config.width, config.kernel_size, groups=config.width)
        pointwise = nn.Conv1d(config.width, config.width, 1)
        self.dw_sep_conv_1d = nn.ModuleDict({"dw_conv": depthwise, "pw_conv": pointwise})
        self.ext_pw_conv_1d = nn.Conv1d(config.width, config.width, 1)
        self.past = config.kernel_size - 1

    def forward(self, frames_NSC: Tensor) -> Tensor:
        frames_NCS = self.glu(self.layer_norm(frames_NSC)).transpose(1, 2)
        frames_NSC = self.dw_sep_conv_1d["dw_conv"](F.pad(frames_NCS, (self.past, 0))).transpose(1, 2)
        frames_NSC = F.silu(_pointwise(self.dw_sep_conv_1d["pw_conv"], frames_NSC))
        return _pointwise(self.ext_pw_conv_1d, frames_NSC)


class GatedPointwise(nn.Module):
    """A pointwise convolution to twice the width; the second half gates the first, both with a bias of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ext_pw_conv_1d = nn.Conv1d(width, 2 * width, 1)
        self.b1, self.b2 = nn.Parameter(torch.zeros(1, width, 1)), nn.Parameter(torch.zeros(1, width, 1))

    def forward(self, frames_NSC: Tensor) -> Tensor:
        value, gate = _pointwise(self.ext_pw_conv_1d, frames_NSC).chunk(2, dim=-1)
        return (value + self.b1.squeeze(2)) * F.silu(gate + self.b2.squeeze(2))


def _pointwise(convolution: nn.Module, frames_NSC: Tensor) -> Tensor:
    """A convolution of one step is a linear layer; as such it needs no transposition."""
    assert isinstance(convolution, nn.Conv1d)
    return F.linear(frames_NSC, convolution.weight.squeeze(2), convolution.bias)
