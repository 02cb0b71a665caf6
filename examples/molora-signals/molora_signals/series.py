"""Time series as a modality: signals of one or several channels, and a small convolutional transformer over them.

Letters: K channels, L samples, P patches, M values of a summary, I items, S frames, C width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from molora.modality import Encoder, Frames, MediaError, Prepared


@dataclass(frozen=True, kw_only=True)
class SeriesConfig:
    """`patch_samples` become one token. Signals beyond `max_channels` and `max_samples` are refused. `sampling_hz` is
    the rate of parts that name none. In training up to a share `crop` is cut off, and every channel gains noise of
    `jitter` times its own deviation."""

    patch_samples: int = 10
    max_channels: int = 8
    max_samples: int = 2000
    sampling_hz: float | None = None
    width: int = 64
    layers: int = 2
    heads: int = 4
    crop: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if min(self.patch_samples, self.max_channels, self.max_samples) < 1 or not 0 <= self.crop < 1:
            raise ValueError(f"patches and limits are at least 1, and crop is from 0 to under 1; got {self}")


class Series:
    """Signals as a modality; content parts of type `series`."""

    config_type: ClassVar[type] = SeriesConfig
    part_type: ClassVar[str] = "series"

    def __init__(self, name: str, config: SeriesConfig) -> None:
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> tuple[Tensor, float]:
        """Reads `series` (a list of channels, or one list) or the file `path`, and `sampling_hz`.

        A .json file holds what `series` would, a .npy file channels x samples, a .csv file a line for every sample and
        a column for every channel, without a header. Raises: MediaError that says what is wrong and what to do.
        """
        where = f"series part, path {part['path']!r}" if part.get("path") is not None else "series part"
        try:
            values_KL = np.atleast_2d(np.array(_numbers(part), dtype=np.float64, order="C"))
        except (OSError, TypeError, ValueError) as error:
            raise MediaError(f"{where}: cannot be read as channels of equally many numbers: {error}") from error
        if values_KL.ndim > 2 or not values_KL.size:
            raise MediaError(f"{where}: has shape {values_KL.shape}; give channels x samples, at least one of each")
        for noun, found in zip(("channels", "samples"), values_KL.shape, strict=True):
            if found > (most := getattr(self.config, f"max_{noun}")):
                raise MediaError(f"{where}: has {found} {noun}, over max_{noun} {most}; cut it, or raise the limit")
        if wrong := np.count_nonzero(~(np.abs(values_KL) < 1e30)):  # their squares must stay finite
            raise MediaError(f"{where}: {wrong} of {values_KL.size} values are missing, infinite or huge; mend them")
        rate_hz = part.get("sampling_hz", self.config.sampling_hz)
        if not isinstance(rate_hz, (int, float, np.integer, np.floating)) or not 0 < rate_hz < math.inf:
            raise MediaError(f"{where}: sampling_hz is {rate_hz!r}; give samples a second, above 0")
        return torch.from_numpy(values_KL), float(rate_hz)

    def blank(self, item: tuple[Tensor, float]) -> tuple[Tensor, float]:
        """A signal of the same length that does not move."""
        return torch.zeros_like(item[0]), item[1]

    def prepare(self, item: tuple[Tensor, float], generator: torch.Generator | None = None) -> Prepared:
        """Every channel at mean 0 and deviation 1, and a summary of what that took away: each channel's presence, mean
        and deviation (both through asinh), and the logarithm of the rate."""
        values_KL, rate_hz = item
        if generator is not None:
            values_KL = self._augmented(values_KL, generator)
        absent = self.config.max_channels - len(values_KL)
        deviation_K, mean_K = torch.std_mean(values_KL, 1, correction=0)
        # A channel that does not move has a deviation of nothing but rounding, which must not be magnified.
        shape_KL = (values_KL - mean_K[:, None]) / deviation_K.maximum(1e-9 * mean_K.abs() + 1e-30)[:, None]
        channels_3K = F.pad(torch.stack([torch.ones_like(mean_K), mean_K.asinh(), deviation_K.asinh()]), (0, absent))
        summary_M = torch.cat([channels_3K.flatten(), torch.tensor([math.log(rate_hz)])])
        tensors = {"samples_LK": F.pad(shape_KL.T, (0, absent)).float(), "summary_M": summary_M.float()}
        return Prepared(tensors, 1 + math.ceil(shape_KL.shape[1] / self.config.patch_samples))

    def _augmented(self, values_KL: Tensor, generator: torch.Generator) -> Tensor:
        cut, start = torch.rand(2, generator=generator).tolist()
        dropped = int(cut * self.config.crop * values_KL.shape[1])
        values_KL = values_KL.narrow(1, int(start * (dropped + 1)), values_KL.shape[1] - dropped)
        noise_KL = torch.randn(values_KL.shape, generator=generator) * values_KL.std(1, correction=0, keepdim=True)
        return values_KL + self.config.jitter * noise_KL

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        samples = [item.tensors["samples_LK"] for item in prepared]
        summaries_IM = torch.stack([item.tensors["summary_M"] for item in prepared])
        lengths_I = torch.tensor([len(samples_LK) for samples_LK in samples])
        return {"samples_LK": torch.cat(samples), "summaries_IM": summaries_IM, "lengths_I": lengths_I}

    def build_encoder(self) -> Encoder:
        return SeriesEncoder(self.config)

    def projector(self, modalities: frozenset[str]) -> str:
        return "default"

    def projectors(self) -> tuple[str, ...]:
        return ("default",)

    def examples(self) -> list[dict[str, Any]]:
        """Noise: one channel of three samples, one of several patches, and as many channels as there may be."""
        draw, config = np.random.default_rng(0), self.config
        shapes = ((3,), (min(120, config.max_samples),), (config.max_channels, min(47, config.max_samples)))
        return [{"type": "series", "series": draw.normal(size=shape).tolist(), "sampling_hz": 50} for shape in shapes]


def _numbers(part: Mapping[str, Any]) -> Any:
    if (part.get("series") is None) == (part.get("path") is None):
        raise ValueError(f"it needs either `series` or `path` and has {sorted(part)}")
    if part.get("series") is not None:
        return part["series"]
    path = Path(part["path"])
    readers = {".json": json.load, ".npy": np.load, ".csv": lambda file: np.loadtxt(file, delimiter=",", ndmin=2).T}
    if path.suffix not in readers:
        raise ValueError(f"a file is {', '.join(readers)}, not {path.suffix!r}")
    with path.open("rb") as file:
        return readers[path.suffix](file)


class SeriesEncoder(Encoder):
    """Two convolutions, a mean over each patch, and a transformer over the summary and the patches. Padding is zero
    before every convolution, hidden from attention and left out of the frames."""

    def __init__(self, config: SeriesConfig) -> None:
        super().__init__()
        self.width = width = config.width
        self.patch_samples = patch = config.patch_samples
        self.conv1 = nn.Conv1d(config.max_channels, width, 5, padding=2)
        self.conv2 = nn.Conv1d(width, width, 5, padding=2)
        self.summary = nn.Linear(3 * config.max_channels + 1, width)
        self.places_SC = nn.Parameter(0.02 * torch.randn(1 + math.ceil(config.max_samples / patch), width))
        each = nn.TransformerEncoderLayer(width, config.heads, 4 * width, 0, "gelu", norm_first=True, batch_first=True)
        self.blocks = nn.TransformerEncoder(each, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, samples_LK: Tensor, summaries_IM: Tensor, lengths_I: Tensor) -> Frames:  # type: ignore[override]
        samples_ILK = pad_sequence(list(samples_LK.split(lengths_I.tolist())), batch_first=True)
        samples_IKL = F.pad(samples_ILK.transpose(1, 2), (0, -samples_ILK.shape[1] % self.patch_samples))
        real_I1L = torch.arange(samples_IKL.shape[2], device=lengths_I.device) < lengths_I[:, None, None]
        edges_ICL = F.gelu(self.conv1(samples_IKL)) * real_I1L
        edges_ICL = F.gelu(self.conv2(edges_ICL)) * real_I1L
        patches_IPC = F.avg_pool1d(edges_ICL, self.patch_samples).transpose(1, 2)
        frames_ISC = torch.cat([self.summary(summaries_IM)[:, None], patches_IPC], 1)
        frames_ISC = frames_ISC + self.places_SC[: frames_ISC.shape[1]]
        counts_I = 1 + (lengths_I + self.patch_samples - 1) // self.patch_samples
        padding_IS = torch.arange(frames_ISC.shape[1], device=lengths_I.device) >= counts_I[:, None]
        frames_ISC = self.blocks(frames_ISC, src_key_padding_mask=padding_IS)
        return Frames(frames_ISC[~padding_IS], tuple(counts_I.tolist()))
