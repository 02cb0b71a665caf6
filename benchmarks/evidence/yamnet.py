"""Sounds through YAMNet, a public tagger of AudioSet, as a frozen encoder: one frame for every 0.975 seconds.

Letters: L samples, N windows of a second, S frames, C width 1024.

Source: github.com/tensorflow/models, research/audioset/yamnet; layers and front end as its weights' meta.json says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.sound import load_sound
from molora.modality import Encoder, Frames, Prepared

WINDOW_SAMPLES, FRAME_SAMPLES, HOP_SAMPLES, FFT_SAMPLES, BANDS, PATCH_FRAMES = 15_600, 400, 160, 512, 64, 96
WIDTHS = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


@dataclass(frozen=True, kw_only=True)
class YamnetConfig:
    """`weights`: a safetensors file; None leaves the weights to be loaded."""

    weights: str | None = None


class Yamnet:
    """Clips that are no speech, each cut into windows of 0.975 seconds; content parts of type `sound`, so that a model
    may have speech beside them."""

    config_type: ClassVar[type] = YamnetConfig
    part_type: ClassVar[str] = "sound"

    def __init__(self, name: str, config: YamnetConfig) -> None:
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> Tensor:
        return load_sound(part)

    def blank(self, item: Tensor) -> Tensor:
        """Silence of the same length."""
        return torch.zeros_like(item)

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        windows_NL = F.pad(item, (0, -len(item) % WINDOW_SAMPLES)).view(-1, WINDOW_SAMPLES)
        return Prepared({"windows_NL": windows_NL}, len(windows_NL))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        windows = [item.tensors["windows_NL"] for item in prepared]
        return {"windows_NL": torch.cat(windows), "counts_I": torch.tensor([len(clip) for clip in windows])}

    def build_encoder(self) -> Encoder:
        encoder = YamnetEncoder(self.config)
        if self.config.weights is not None:
            encoder.load_state_dict(load_file(self.config.weights))
        return encoder

    def projector(self, company: frozenset[str]) -> str:
        return "default"

    def projectors(self) -> tuple[str, ...]:
        return ("default",)

    def examples(self) -> list[dict[str, Any]]:
        hiss = torch.randn(40_000, generator=torch.Generator().manual_seed(0)).numpy() / 10
        return [
            {"type": self.part_type, "array": hiss[:count], "sampling_rate": 16_000}
            for count in (4_000, WINDOW_SAMPLES, 40_000)
        ]


class Separable(nn.Module):
    """A convolution of each channel and one across channels, each followed by ReLU, padded as TensorFlow does."""

    def __init__(self, width: int, out_width: int, stride: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(width, width, 3, stride, groups=width)
        self.pw = nn.Conv2d(width, out_width, 1)

    def forward(self, map_NCHW: Tensor) -> Tensor:
        return F.relu(self.pw(F.relu(self.dw(_pad_same(map_NCHW, self.dw.stride[0])))))


def _pad_same(map_NCHW: Tensor, stride: int) -> Tensor:
    """What TensorFlow's SAME adds for a kernel of 3: the odd row and column come last."""
    pads = []
    for size in reversed(map_NCHW.shape[2:]):
        total = max(0, (-(-size // stride) - 1) * stride + 3 - size)
        pads += [total // 2, total - total // 2]
    return F.pad(map_NCHW, pads)


class YamnetEncoder(Encoder):
    width = WIDTHS[-1]
    window: Tensor

    def __init__(self, config: YamnetConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(FRAME_SAMPLES))
        self.mel = nn.Linear(FFT_SAMPLES // 2 + 1, BANDS, bias=False)
        self.stem = nn.Conv2d(1, 32, 3, 2)
        widths = (32, *WIDTHS)
        self.blocks = nn.Sequential(*map(Separable, widths, WIDTHS, STRIDES))
        self.classifier = nn.Linear(WIDTHS[-1], 521)
        # The front end is fixed, and no frame comes from the classifier.
        self.mel.requires_grad_(False)
        self.classifier.requires_grad_(False)

    def log_mel(self, windows_NL: Tensor) -> Tensor:
        """(N, 96, 64): logarithms of the magnitudes in each band."""
        framed = windows_NL.unfold(1, FRAME_SAMPLES, HOP_SAMPLES) * self.window
        return (self.mel(torch.fft.rfft(framed, FFT_SAMPLES).abs()) + 0.001).log()

    def forward(self, windows_NL: Tensor, counts_I: Tensor) -> Frames:  # type: ignore[override]
        patches_N1HW = self.log_mel(windows_NL)[:, None]
        map_NCHW = self.blocks(F.relu(self.stem(_pad_same(patches_N1HW, 2))))
        return Frames(map_NCHW.mean((2, 3)), tuple(counts_I.tolist()))

    def saved_config(self, with_weights: bool) -> YamnetConfig:
        return replace(self.config, weights=None) if with_weights else self.config
