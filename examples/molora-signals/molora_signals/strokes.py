"""Pen strokes as a modality: a drawing as the pen went, read by a recurrent network in both directions.

Letters: N points, P patches, X values of a patch, I items, S frames, C width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from molora.modality import Encoder, Frames, MediaError, Prepared

# A point's place, the step to it and its milliseconds, and whether the pen came down.
VALUES = 6


@dataclass(frozen=True, kw_only=True)
class StrokesConfig:
    """The longer side of a drawing is `points_per_side` points, and `patch_points` of them become one token. Drawings
    of more than `max_points` are refused. In training a drawing is stretched and slanted by up to a share `slant`.
    `beside` maps a modality to the projector for strokes that share their sample with it; others take `default`."""

    points_per_side: int = 20
    patch_points: int = 4
    max_points: int = 4000
    width: int = 96
    layers: int = 2
    slant: float = 0.0
    beside: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.points_per_side, self.patch_points, self.max_points) < 1 or self.width % 2:
            raise ValueError(f"points and limits are at least 1, and width is even; got {self}")


class Strokes:
    """Drawings as a modality; content parts of type `strokes`."""

    config_type: ClassVar[type] = StrokesConfig
    part_type: ClassVar[str] = "strokes"

    def __init__(self, name: str, config: StrokesConfig) -> None:
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> list[Tensor]:
        """Reads `strokes`, a list of strokes of points [x, y, milliseconds], or the .json file `path` that holds one.

        Raises: MediaError that says what is wrong and what to do.
        """
        where = f"strokes part, path {part['path']!r}" if part.get("path") is not None else "strokes part"
        if (part.get("strokes") is None) == (part.get("path") is None):
            raise MediaError(f"{where}: give either `strokes` or `path`; it has {sorted(part)}")
        try:
            given = part["strokes"] if part.get("path") is None else json.loads(Path(part["path"]).read_bytes())
            strokes = [np.array(stroke, dtype=np.float64, order="C") for stroke in given]
        except (OSError, TypeError, ValueError) as error:
            raise MediaError(f"{where}: cannot be read as strokes of points [x, y, milliseconds]: {error}") from error
        for number, stroke in enumerate(strokes, 1):
            if stroke.ndim != 2 or stroke.shape[1] != 3:
                raise MediaError(f"{where}: stroke {number} has shape {stroke.shape}; give points x 3, one or more")
            if not (np.abs(stroke) < 1e30).all():
                raise MediaError(f"{where}: stroke {number} has missing, infinite or huge numbers; mend or drop them")
        points, most = sum(map(len, strokes)), self.config.max_points
        if not 0 < points <= most:
            raise MediaError(f"{where}: has {points} points; give at least 1, and at most max_points {most}")
        return [torch.from_numpy(stroke) for stroke in strokes]

    def prepare(self, item: list[Tensor], generator: torch.Generator | None = None) -> Prepared:
        """Points at equal distances along each stroke, cut into patches; the drawing is centred, its longer side 2."""
        slant_22 = torch.zeros(2, 2) if generator is None else 2 * torch.rand(2, 2, generator=generator) - 1
        places_N2 = torch.cat(item)[:, :2] @ (torch.eye(2) + self.config.slant * slant_22).double()
        low_2, high_2 = places_N2.amin(0), places_N2.amax(0)
        places_N2 = (2 * places_N2 - low_2 - high_2) / (high_2 - low_2).max().clamp(min=1e-9)
        points: list[np.ndarray] = []
        for stroke, places in zip(item, places_N2.split([len(stroke) for stroke in item]), strict=True):
            points.append(_evenly(np.c_[places.numpy(), stroke[:, 2].numpy()], 2 / self.config.points_per_side))
        points_N3 = np.concatenate(points)
        steps_N3 = np.diff(points_N3, axis=0, prepend=points_N3[:1])
        begins_N = np.concatenate([np.arange(len(stroke)) == 0 for stroke in points])
        milliseconds_N = np.arcsinh(steps_N3[:, 2] / 100)
        values_NV = np.c_[points_N3[:, :2], 5 * steps_N3[:, :2], milliseconds_N, begins_N]
        patch = self.config.patch_points
        patches_PX = F.pad(torch.from_numpy(values_NV).float(), (0, 0, 0, -len(values_NV) % patch)).view(
            -1, patch * VALUES
        )
        return Prepared({"patches_PX": patches_PX}, len(patches_PX))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        return {
            "patches_PX": torch.cat([item.tensors["patches_PX"] for item in prepared]),
            "lengths_I": torch.tensor([item.num_tokens for item in prepared]),
        }

    def build_encoder(self) -> Encoder:
        return StrokesEncoder(self.config)

    def projector(self, modalities: frozenset[str]) -> str:
        return next((name for modality, name in self.config.beside.items() if modality in modalities), "default")

    def projectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("default", *self.config.beside.values())))

    def examples(self) -> list[dict[str, Any]]:
        """A dot, a line, and a circle with a bar."""
        turns = [i * math.tau / 40 for i in range(41)]
        circle = [[50 + 30 * math.cos(turn), 50 + 30 * math.sin(turn), 100 * turn] for turn in turns]
        line = [[20.0, 50.0, 900.0], [80.0, 50.0, 1300.0]]
        return [{"type": "strokes", "strokes": strokes} for strokes in ([line[:1]], [line], [circle, line])]


def _evenly(points_N3: np.ndarray, spacing: float) -> np.ndarray:
    """Points on the same line at equal distances of at most `spacing`, with the time that the pen was there."""
    steps = np.hypot(*np.diff(points_N3[:, :2], axis=0, prepend=points_N3[:1, :2]).T)
    travelled_N = steps.cumsum()
    stops = np.linspace(0, travelled_N[-1], 1 + math.ceil(travelled_N[-1] / spacing))
    return np.stack([np.interp(stops, travelled_N, values) for values in points_N3.T], axis=1)


class StrokesEncoder(Encoder):
    """Recurrent layers, forwards and backwards, over the patches of each drawing; any lengths run without padding."""

    def __init__(self, config: StrokesConfig) -> None:
        super().__init__()
        self.width = config.width
        self.patches = nn.Linear(config.patch_points * VALUES, self.width)
        self.recurrent = nn.GRU(self.width, self.width // 2, config.layers, bidirectional=True)
        self.norm = nn.LayerNorm(self.width)

    def forward(self, patches_PX: Tensor, lengths_I: Tensor) -> Frames:  # type: ignore[override]
        lengths = lengths_I.tolist()
        drawings = pack_sequence(list(F.gelu(self.patches(patches_PX)).split(lengths)), enforce_sorted=False)
        frames_SC = torch.cat(unpack_sequence(self.recurrent(drawings)[0]))
        return Frames(self.norm(frames_SC), tuple(lengths))
