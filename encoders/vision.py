"""The vision modality: pictures to dynamic-HD crops, crops to frames.

A picture is resized to a grid of crops, encoded crop by crop, and read row by row with a separator after each row; then
comes the whole picture at crop size, the global view, in the same way. Every picture costs its own crops and no more.

Letters: B crops, C encoder width (in `crops_BCHW`: colour channels), H and W rows and columns (of pixels in `crops`, of
patches in `valid`, of pooled frames elsewhere), I items, S frames.

Source: arXiv 2503.01743 §2.2.1; processing_phi4mm.py and modeling_phi4mm.py of microsoft/Phi-4-multimodal-instruct.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise, product
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.pictures import MAX_PIXELS, PICTURES, decode_picture
from molora.encoders.pretrained_files import to_save
from molora.encoders.vision_towers.convit import Convit
from molora.encoders.vision_towers.library import build_library_tower
from molora.encoders.vision_towers.tower import Built, TowerConfig
from molora.modality import Encoder, Frames, MediaError, Prepared

# Source: processing_phi4mm.py refuses a picture whose resized side is shorter.
MIN_SIDE_PIXELS = 10

# Beyond any tower; the side in pixels.
MAX_CROP_SIDE, MAX_CROPS = 8192, 1024

# Bounds the memory of one tower call; results do not depend on it.
CROPS_PER_CALL = 64

# Bicubic weights of the four pixels around a place half-way between two, in 32nds. Source:
# torch.nn.functional.interpolate (A = -0.75).
_HALF_WAY = (-3, 19, 19, -3)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`crop_pixels`: side of a crop, and of the global view. `max_crops`: most crops of a picture; 0: the global view
    alone, that is, one crop and no separator before it. `pool`: patches averaged into one frame, along a side.
    `max_pixels`: a larger picture is refused before it is decoded; at most 178,956,970, beyond which PIL opens none.

    Source of 448, 36 and 2: the released Phi-4-multimodal processor.
    """

    crop_pixels: int = 448
    max_crops: int = 36
    pool: int = 2
    max_pixels: int = 64_000_000
    tower: TowerConfig = field(
        default_factory=lambda: TowerConfig(kind="transformers", name="google/siglip-so400m-patch14-384")
    )

    def __post_init__(self) -> None:
        crop, most = self.crop_pixels, self.max_crops
        if crop > MAX_CROP_SIDE or most > MAX_CROPS:
            raise ValueError(f"crop_pixels is at most {MAX_CROP_SIDE} and max_crops {MAX_CROPS}, got {crop} and {most}")
        if self.pool < 1 or self.grid < self.pool:
            raise ValueError(
                f"a crop of {crop} pixels holds {self.grid} patches of {self.tower.stride} a side, "
                f"which cannot be pooled by {self.pool}: raise crop_pixels or lower pool"
            )
        if self.tower.kind == "convit" and crop % self.tower.stride:
            raise ValueError(f"crop_pixels is a multiple of 8 for a convit tower, got {crop}")
        if most < 0 or not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(
                f"max_crops is at least 0 and max_pixels from 1 to {MAX_PIXELS}, got {most} and {self.max_pixels}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of a crop."""
        return self.crop_pixels // self.tower.stride

    @property
    def side(self) -> int:
        """Frames along a side of a crop, after pooling."""
        return -(-self.grid // self.pool)


class Layout(NamedTuple):
    """How one picture lies on its crops: `rows` x `columns` of them, filled from the top left by `height` x `width`
    pixels, of which `valid_rows` x `valid_columns` patches count as picture and the rest as padding."""

    rows: int
    columns: int
    valid_rows: int
    valid_columns: int
    height: int
    width: int


def lay_out(width: int, height: int, config: VisionConfig) -> Layout:
    """Chooses the grid of crops for a picture of `width` x `height` pixels. Raises MediaError for one so long and thin
    that its short side would vanish."""
    crop, stride, grid = config.crop_pixels, config.tower.stride, config.grid
    rows, columns = _crops(width, height, crop, max(config.max_crops, 1))
    target_height, target_width = rows * crop, columns * crop
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        new_height, new_width = int(height * scale_width), target_width
    else:
        new_height, new_width = target_height, int(width * scale_height)
    if min(new_height, new_width) < MIN_SIDE_PIXELS:
        raise MediaError(
            f"{width} x {height} pixels is too long and thin: resized to fit its crops it would be "
            f"{new_width} x {new_height}, and no side may be under {MIN_SIDE_PIXELS}; cut or pad it"
        )
    # Where patches do not fill the crop, a sliver of picture could leave a crop without a single valid patch.
    hidden_rows = min((target_height - new_height) // stride, grid - 1)
    hidden_columns = min((target_width - new_width) // stride, grid - 1)
    return Layout(rows, columns, rows * grid - hidden_rows, columns * grid - hidden_columns, new_height, new_width)


def _crops(width: int, height: int, crop: int, limit: int) -> tuple[int, int]:
    """Rows and columns of crops. Over the limit, the grid of the nearest aspect ratio; of grids equally near, the
    largest that the picture fills by more than half, and of those with equally many crops, the widest."""
    rows, columns = -(-height // crop), -(-width // crop)
    if rows * columns <= limit:
        return rows, columns
    # By how many crops they have, and then by width, as they come.
    grids = sorted(((i, j) for i in range(1, limit + 1) for j in range(1, limit // i + 1)), key=math.prod)
    best, nearest = (1, 1), math.inf
    for i, j in grids:
        difference = abs(width / height - i / j)
        if difference < nearest or (difference == nearest and width * height > 0.5 * crop * crop * i * j):
            best, nearest = (j, i), difference
    return best


def _useful(layout: tuple[int, ...], config: VisionConfig) -> tuple[int, int]:
    """Rows and columns of pooled frames that hold picture, of a picture's `layout_4`."""
    rows, columns = (
        (crops - 1) * config.side + -(-(valid - (crops - 1) * config.grid) // config.pool)
        for crops, valid in zip(layout[:2], layout[2:], strict=True)
    )
    return rows, columns


class Vision:
    """Pictures as a modality; content parts of type `image`."""

    config_type: ClassVar[type] = VisionConfig
    part_type: ClassVar[str] = "image"

    def __init__(self, name: str, config: VisionConfig):
        self.name, self.config = name, config

    def load(self, part: Mapping[str, Any]) -> Image.Image:
        """Decodes the picture of a content part to upright 8-bit RGB on white; see `decode_picture`.

        The part has one of `path`, `url`, `base64` (or a data URI), `bytes`, `image` (a PIL image, any of the others,
        or a mapping of one, as columns of datasets are), `array`.

        Raises: MediaError that says which part, what is wrong with it, and what to do.
        """
        key, value = PICTURES.choose(PICTURES.flat(part))
        with PICTURES.named(key, value):
            image = decode_picture(key, value, self.config.max_pixels)
            lay_out(*image.size, self.config)
        return image

    def prepare(self, item: Image.Image, generator: torch.Generator | None = None) -> Prepared:
        """Cuts a picture into `crops_BCHW` (uint8) and `layout_4`: rows and columns of crops, then of valid patches.
        The encoder makes the global view, from the same pixels. No augmentation, so `generator` is not used. Raises
        MediaError for a picture that is too long and thin."""
        crop, layout = self.config.crop_pixels, lay_out(*item.size, self.config)
        picture = Image.new("RGB", (layout.columns * crop, layout.rows * crop), "white")
        picture.paste(item.resize((layout.width, layout.height), Image.Resampling.BILINEAR))
        crops = np.empty((layout.rows, layout.columns, 3, crop, crop), np.uint8)
        for channel, band in enumerate(picture.split()):  # by PIL, as a strided copy is slower
            rows_HW = np.asarray(band).reshape(layout.rows, crop, layout.columns, crop)
            crops[:, :, channel] = rows_HW.swapaxes(1, 2)
        num_tokens = self.config.side * (self.config.side + 1)
        if self.config.max_crops:
            rows, columns = _useful(layout[:4], self.config)
            num_tokens += 1 + rows * (columns + 1)
        crops_BCHW = torch.from_numpy(crops.reshape(-1, 3, crop, crop))
        return Prepared({"crops_BCHW": crops_BCHW, "layout_4": torch.tensor(layout[:4])}, num_tokens)

    def blank(self, item: Image.Image) -> Image.Image:
        """Grey of the same size."""
        return Image.new("RGB", item.size, "grey")

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """All crops in reading order, and a row of layout for each picture."""
        return {
            "crops_BCHW": torch.cat([item.tensors["crops_BCHW"] for item in prepared]),
            "layout_I4": torch.stack([item.tensors["layout_4"] for item in prepared]),
        }

    def build_encoder(self) -> VisionEncoder:
        """Makes the tower, pretrained if the config says so, with new separators. Raises ValueError for weights that
        cannot be found or do not fit the config."""
        tower = self.config.tower
        if tower.kind == "convit":
            built = Built(Convit(tower.convit, self.config.crop_pixels), None, tower)
        else:
            built = build_library_tower(tower, self.config.crop_pixels)
        return VisionEncoder(self.config, built)

    def projector(self, modalities: frozenset[str]) -> str:
        return "default"

    def projectors(self) -> tuple[str, ...]:
        return ("default",)

    def examples(self) -> list[dict[str, Any]]:
        """Coloured noise: a square of one crop, a wide picture and a tall one."""
        draw = np.random.default_rng(0)
        side = self.config.crop_pixels
        shapes = ((side, side, 3), (side, 2 * side - 3, 3), (2 * side + 5, side, 3))
        return [{"type": self.part_type, "array": draw.integers(0, 256, shape, dtype=np.uint8)} for shape in shapes]


class VisionEncoder(Encoder):
    """Crops of several pictures to packed frames, in the reference's order: crops, separator, global view. The tower's
    BatchNorm, if it has any, never sees batch statistics."""

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, config: VisionConfig, built: Built):
        super().__init__()
        self.config, self._scratch = config, built.scratch
        self.tower, self.origin, self.width = built.tower, built.origin, built.tower.width
        # The same whatever the seed: a pretrained encoder that stayed frozen is not saved, but fetched and built again.
        draw = torch.Generator().manual_seed(0)
        self.row_separator_C = nn.Parameter(0.02 * torch.randn(self.width, generator=draw, device="cpu"))
        self.view_separator_C = nn.Parameter(0.02 * torch.randn(self.width, generator=draw, device="cpu"))
        self.register_buffer("mean_C11", torch.tensor(self.tower.mean)[:, None, None])
        self.register_buffer("std_C11", torch.tensor(self.tower.std)[:, None, None])
        self.train(self.training)

    def train(self, mode: bool = True) -> VisionEncoder:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, crops_BCHW: Tensor, layout_I4: Tensor) -> Frames:  # type: ignore[override]
        layouts = [tuple(row) for row in layout_I4.tolist()]
        inputs_BCHW, valid, view_ids = self.inputs(crops_BCHW, layouts)
        frames_BHWC = self._encode(inputs_BCHW, valid)
        starts = _starts(layouts)
        items = []
        for layout, start, view in zip(layouts, starts, view_ids, strict=False):
            pieces = [self._read_rows(frames_BHWC[view])]
            if self.config.max_crops:
                separator_1C = self.view_separator_C.to(frames_BHWC.dtype)[None]
                pieces = [self._read_rows(self._join(frames_BHWC[start:], layout)), separator_1C, *pieces]
            items.append(torch.cat(pieces))
        return Frames(torch.cat(items), tuple(len(item) for item in items))

    def saved_config(self, with_weights: bool) -> VisionConfig:
        return replace(self.config, tower=to_save(self.config.tower, self._scratch, self.origin, with_weights))

    def inputs(
        self, crops_BCHW: Tensor, layouts: Sequence[tuple[int, ...]]
    ) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
        """What the tower takes, in fp32: the crops and, behind them, the global views; the rows and columns of valid
        patches of each; and for each picture, which of them is its global view."""
        whole = (self.config.grid, self.config.grid)
        valid = [whole] * len(crops_BCHW)
        if self.tower.masks and self.config.max_crops:
            valid = [size for layout in layouts for size in _valid_patches(layout, self.config.grid)]
        starts = _starts(layouts)
        # The only crop of a picture is its global view as well, if it is whole: one run serves both.
        is_view = [stop - start == 1 and valid[start] == whole for start, stop in pairwise(starts)]
        behind = count(len(crops_BCHW))
        view_ids = [start if alone else next(behind) for start, alone in zip(starts, is_view, strict=False)]
        # One tensor that is filled and changed in place: fresh memory costs more than the arithmetic.
        num_inputs = len(crops_BCHW) + is_view.count(False)
        pixels_BCHW = crops_BCHW.new_empty((num_inputs, *crops_BCHW.shape[1:]), dtype=torch.float32)
        pixels_BCHW[: len(crops_BCHW)] = crops_BCHW
        for layout, (start, stop), view in zip(layouts, pairwise(starts), view_ids, strict=True):
            if view >= len(crops_BCHW):
                _draw_view(crops_BCHW[start:stop], layout[0], layout[1], pixels_BCHW[view])
        pixels_BCHW.mul_(1 / (255 * self.std_C11)).sub_(self.mean_C11 / self.std_C11)
        return pixels_BCHW, valid + [whole] * (num_inputs - len(crops_BCHW)), view_ids

    def _encode(self, inputs_BCHW: Tensor, valid: Sequence[tuple[int, int]]) -> Tensor:
        """Crops to pooled frames. Padded crops run apart: whether attention is masked depends on no neighbour."""
        grid, frames = self.config.grid, []
        padded = [i for i, size in enumerate(valid) if size != (grid, grid)]
        full = [i for i, size in enumerate(valid) if size == (grid, grid)]
        for ids in (full, padded):
            for start in range(0, len(ids), CROPS_PER_CALL):
                chunk = ids[start : start + CROPS_PER_CALL]
                valid_BHW = None
                if ids is padded:
                    sizes_B2 = torch.tensor([valid[i] for i in chunk], device=inputs_BCHW.device)
                    steps = torch.arange(grid, device=inputs_BCHW.device)
                    rows_BH, columns_BW = (steps < sizes_B2[:, :1]), (steps < sizes_B2[:, 1:])
                    valid_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
                frames.append(self._pool(self.tower(inputs_BCHW[chunk].to(self.row_separator_C.dtype), valid_BHW)))
        back = torch.tensor(full + padded).argsort().to(inputs_BCHW.device)
        return torch.cat(frames)[back]

    def _pool(self, frames_BHWC: Tensor) -> Tensor:
        frames_BCHW = frames_BHWC.permute(0, 3, 1, 2)
        if missing := -frames_BHWC.shape[1] % self.config.pool:
            frames_BCHW = F.pad(frames_BCHW, (0, missing, 0, missing), mode="reflect")
        return F.avg_pool2d(frames_BCHW, self.config.pool).permute(0, 2, 3, 1)

    def _join(self, frames_BHWC: Tensor, layout: tuple[int, ...]) -> Tensor:
        """The frames of a picture's crops as one map, cut to the rows and columns that hold picture."""
        frames = frames_BHWC[: layout[0] * layout[1]].unflatten(0, layout[:2]).permute(0, 2, 1, 3, 4)
        rows, columns = _useful(layout, self.config)
        return frames.flatten(2, 3).flatten(0, 1)[:rows, :columns]

    def _read_rows(self, frames_HWC: Tensor) -> Tensor:
        """A map read row by row, with a separator after each."""
        separators = self.row_separator_C.to(frames_HWC.dtype).expand(len(frames_HWC), 1, -1)
        return torch.cat([frames_HWC, separators], dim=1).flatten(0, 1)


def _starts(layouts: Sequence[tuple[int, ...]]) -> list[int]:
    """Where the crops of each picture begin among all, and where the last ones end."""
    return [0, *accumulate(layout[0] * layout[1] for layout in layouts)]


def _draw_view(crops_BCHW: Tensor, rows: int, columns: int, view_CHW: Tensor) -> None:
    """Fills `view_CHW` with the whole picture, padding included, squeezed to one crop by bicubic interpolation, from 0
    to 255. Source: processing_phi4mm.py (no antialiasing). Crops are whole in number, so that only few pixels need to
    be read; their sums are exact."""
    picture_CHW = crops_BCHW.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    if rows > 1:
        height, width = view_CHW.shape[1], picture_CHW.shape[2]
        squeezed_CHW = picture_CHW.new_empty((3, height, width), dtype=torch.int16)
        _squeeze(picture_CHW, 1, rows, squeezed_CHW)
        picture_CHW = squeezed_CHW
    _squeeze(picture_CHW, 2, columns, view_CHW)
    view_CHW.div_(32 ** ((rows + 1) % 2 + (columns + 1) % 2))


def _squeeze(pixels_CHW: Tensor, axis: int, factor: int, squeezed_CHW: Tensor) -> None:
    """Fills a tensor with another whose one axis is `factor` times as long. The centre of a new pixel lies on an old
    one if the factor is odd, else half-way between two: then it is given in 32nds."""
    length = pixels_CHW.shape[axis]
    if factor % 2:
        rest_CHW = pixels_CHW.narrow(axis, factor // 2, length - factor // 2)
        squeezed_CHW.copy_(rest_CHW.unfold(axis, 1, factor)[..., 0])
        return
    padded_CHW = torch.cat([pixels_CHW.narrow(axis, 0, 1), pixels_CHW, pixels_CHW.narrow(axis, -1, 1)], axis)
    start = factor // 2 - 1
    windows = padded_CHW.narrow(axis, start, length + 2 - start).unfold(axis, 4, factor)
    pixel_CHW = torch.empty_like(squeezed_CHW)
    squeezed_CHW.zero_()
    for place, weight in enumerate(_HALF_WAY):
        squeezed_CHW.add_(pixel_CHW.copy_(windows[..., place]), alpha=weight)


def _valid_patches(layout: tuple[int, ...], grid: int) -> list[tuple[int, int]]:
    """Rows and columns of valid patches of each crop, in reading order."""
    rows, columns, valid_rows, valid_columns = layout
    heights = [min(grid, valid_rows - row * grid) for row in range(rows)]
    return list(product(heights, [min(grid, valid_columns - column * grid) for column in range(columns)]))
