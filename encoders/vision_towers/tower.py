"""Towers: crops to a grid of frames.

Letters: B crops, C width, H and W rows and columns (of pixels in `crops`, of patches elsewhere), N patches, positions.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.encoders.pretrained_files import Layer, check_sizes, check_source, locate, num_kept
from molora.modality import Origin, WeightSource

Colour = tuple[float, float, float]

# Source: SigLIP's published preprocessing (google/siglip-*); pixels in [0, 1] become [-1, 1].
HALF: Colour = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True)
class ConvitConfig:
    """Sizes of the small tower that is trained from scratch."""

    width: int = 96
    depth: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        check_sizes("convit", vars(self))


@dataclass(frozen=True, kw_only=True)
class TowerConfig(WeightSource):
    """Which tower, and where its weights come from.

    `kind`: `transformers` (SigLIP), `timm` (SigLIP, CLIP or any other model), `open_clip` (CLIP, SigLIP or any other
    model with a timm trunk), `convit` (small, trained from scratch). `name`: a hub id; for timm also an architecture
    such as `vit_large_patch14_clip_336.openai`, for open_clip also a model such as `ViT-L-14-336`. `path`: a local
    folder in the library's own format, or a file of weights for the architecture that `name` (for transformers:
    `arguments`) describes. `revision`: branch, tag or commit on the hub. `pretrained` off: random weights.

    `layer` counts from the end: -1 is the output of the last block of the tower (of a convolutional net: stage), -2 of
    the one before; no norm is applied to it. `final`, for timm alone: what its model gives its pooling and classifier,
    after a last norm or a convolution of the head (MobileNetV2: 1,280 features, where stage -1 has 320).

    `patch_pixels`: pixels per frame along a side before pooling, 14 unless given, 8 for convit. `arguments` are sizes
    and parts of an architecture: those of SiglipVisionConfig, or of timm's models (`patch_size`, `embed_dim`, `depth`,
    `num_heads`, …; one that timm does not have is refused with the nearest name). Weights that timm's notes say want
    QuickGELU, as OpenAI's CLIP, get it under timm's plain names too, unless `arguments` name another `act_layer`.

    Source of layer -2: Phi-4-multimodal's `hidden_states[-2]`.
    """

    kind: str
    layer: Layer = -2
    patch_pixels: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    convit: ConvitConfig = field(default_factory=ConvitConfig)

    def __post_init__(self) -> None:
        kinds = ("transformers", "timm", "open_clip", "convit")
        if self.kind not in kinds:
            raise ValueError(f"kind: expected one of {', '.join(kinds)}, got {self.kind!r}")
        if self.kind == "convit" and (self.pretrained or self.name or self.path):
            raise ValueError("kind convit has no pretrained weights: set pretrained: false, and neither name nor path")
        if self.kind == "convit" and self.patch_pixels not in (None, 8):
            raise ValueError(f"patch_pixels is 8 for kind convit, got {self.patch_pixels}: leave it out")
        if self.kind in ("timm", "open_clip") and not (self.name or self.path):
            raise ValueError(f"kind {self.kind} needs a name or a path")
        if self.kind == "transformers" and self.pretrained and not (self.name or self.path):
            raise ValueError("kind transformers needs a name or a path, or pretrained: false and its arguments")
        if self.arguments and self.kind not in ("transformers", "timm"):
            raise ValueError(f"arguments are for kind transformers and timm, not {self.kind}")
        if self.layer == "final" and self.kind != "timm":
            raise ValueError(f"layer final is for kind timm, not {self.kind}: give a number, -1 being the last layer")
        check_source(self, self.layer)
        if self.patch_pixels is not None and self.patch_pixels < 1:
            raise ValueError(f"patch_pixels is at least 1, got {self.patch_pixels}")

    @property
    def fetches(self) -> bool:
        """Whether building the tower reads files of the hub; an architecture of a library is no hub id."""
        own = self.kind != "transformers" and not self.pretrained and "/" not in (self.name or "")
        return super().fetches and not own

    @property
    def stride(self) -> int:
        """Pixels per frame of the grid along a side."""
        return self.patch_pixels or (8 if self.kind == "convit" else 14)


class Tower(nn.Module):
    """Normalised crops of one size to a square grid of frames. `width` is C, `grid` the frames along a side, `mean` and
    `std` what its pixels in [0, 1] are normalised with. A tower that does not `mask` takes padding for picture."""

    width: int
    grid: int
    masks: bool = False
    mean: Colour = HALF
    std: Colour = HALF

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        """Returns frames_BHWC. `valid_BHW` is True on patches that hold picture; None means all do."""
        raise NotImplementedError


class Built(NamedTuple):
    """A tower, where its weights came from, and a config that builds the same shape from scratch, from nothing else."""

    tower: Tower
    origin: Origin | None
    scratch: TowerConfig


class PatchTower(Tower):
    """A vision transformer without class token, whatever library its pieces come from.

    Positions under a mask follow NaViT: the k-th of n valid rows (or columns) takes row floor(side * k / n) of the
    position table, and masked patches take position 0 and are hidden as keys. Attention is never causal.

    Source: arXiv 2503.01743 §2.2.1 and the SigLIP code of microsoft/Phi-4-multimodal-instruct (vision_siglip_navit.py).
    """

    masks = True

    def __init__(
        self,
        patch: nn.Conv2d,
        table_NC: Tensor,
        enter: nn.Module,
        blocks: Iterable[nn.Module],
        grid: int,
        leave: nn.Module | None = None,
    ):
        super().__init__()
        self.patch, self.enter, self.blocks = patch, enter, nn.ModuleList(blocks)
        self.leave = leave or nn.Identity()
        self.table_NC = nn.Parameter(table_NC.detach().clone())
        self.width, self.grid = table_NC.shape[1], grid
        self.side = round(len(table_NC) ** 0.5)

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        patches_BCHW = self.patch(crops_BCHW)
        frames_BNC = patches_BCHW.flatten(2).transpose(1, 2)
        mask_B11N = None if valid_BHW is None else valid_BHW.flatten(1)[:, None, None, :]
        all_1HW = patches_BCHW.new_ones((1, self.grid, self.grid), dtype=torch.bool)
        ids_BN = position_ids(all_1HW if valid_BHW is None else valid_BHW, self.side)
        frames_BNC = self.enter(frames_BNC + self.table_NC[ids_BN])
        for block in self.blocks:
            frames_BNC = block(frames_BNC, mask_B11N)
        return self.leave(frames_BNC).unflatten(1, (self.grid, self.grid))


def position_ids(valid_BHW: Tensor, side: int) -> Tensor:
    """Which of the `side` x `side` positions each patch takes, as ids_BN; see PatchTower."""
    rows_BH, columns_BW = _spread(valid_BHW.any(2), side), _spread(valid_BHW.any(1), side)
    return (rows_BH[:, :, None] * side + columns_BW[:, None, :]).where(valid_BHW, 0).flatten(1)


def _spread(valid_BN: Tensor, side: int) -> Tensor:
    steps = torch.arange(valid_BN.shape[1], device=valid_BN.device)
    return (steps * side // valid_BN.sum(1, keepdim=True)).clamp(max=side - 1)


class FeatureTower(Tower):
    """Any timm model through its feature API: a convolutional net's stage, a block of a ViT with a class token, or the
    final features of either. It knows no patch masks: the white padding of a crop is picture to it."""

    def __init__(self, model: Any, layer: Layer, crop_pixels: int, name: str):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"tower {name}: this timm model has no feature API (forward_intermediates); take another")
        self.final = layer == "final"
        num_kept(layer, len(model.feature_info), f"tower {name}")
        if self.final:
            model.reset_classifier(0)
        else:
            self.index = model.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)[0]
        self.model: Any = model
        self.mean, self.std = colours(model.pretrained_cfg)
        try:  # some families declare no shapes, or shapes of another crop size
            with torch.no_grad():
                _, rows, columns, self.width = self.eval()(torch.zeros(1, 3, crop_pixels, crop_pixels)).shape
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"tower {name} cannot take crops of {crop_pixels} pixels: {error}") from error
        if rows != columns:
            raise ValueError(f"tower {name}: a square crop gives a map of {rows} x {columns} frames, not a square")
        self.grid = rows

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        if self.final:
            return self._as_map(self.model.forward_features(crops_BCHW))
        (frames_BCHW,) = self.model.forward_intermediates(
            crops_BCHW, indices=[self.index], stop_early=True, intermediates_only=True
        )
        return frames_BCHW.permute(0, 2, 3, 1)

    def _as_map(self, features: Tensor) -> Tensor:
        """Final features as frames_BHWC. Families return a map with channels first or last, or rows of patches behind
        class tokens and registers."""
        if features.ndim == 3:
            patches_BNC = features[:, self.model.num_prefix_tokens :]
            side = math.isqrt(patches_BNC.shape[1])
            return patches_BNC.unflatten(1, (side, -1))
        return features if getattr(self.model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)


def colours(about: dict[str, Any]) -> tuple[Colour, Colour]:
    """The mean and the deviation of each colour channel that pictures are normalised by."""
    mean, std = tuple(map(float, about["mean"])), tuple(map(float, about["std"]))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"a tower for pictures takes 3 colour channels, this one is normalised by {mean} and {std}")
    return mean, std


def find_source(
    config: TowerConfig, repository: str | None, weights: str = "model*.safetensors"
) -> tuple[Path | None, Origin | None]:
    """The local folder or file to build from: `path`, or the repository's snapshot, fetched if need be. Some
    repositories hold the same model once per library, in files named for the library, as `weights` are."""
    found, origin = locate(config, repository, ["*.json", weights] if config.pretrained else ["*config.json"])
    if config.path is None or found is None:
        return found, origin
    if found.is_file() and config.name is None and config.kind != "transformers":
        raise ValueError(f"tower path {found} is a file of weights: name says their architecture, give it too")
    if found.is_dir() and config.name is not None:
        raise ValueError(f"tower path {found} is a folder, which says what it holds: leave out name {config.name!r}")
    return found, origin
