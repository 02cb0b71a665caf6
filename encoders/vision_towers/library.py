"""Towers of libraries: SigLIP from transformers, timm or open_clip, CLIP, and any other timm model.

The three SigLIP backends are taken apart into the same pieces (patch convolution, position table, blocks), so that
NaViT-style patch masks work for all of them and equal weights give equal frames, whoever published them.
"""

from dataclasses import replace

from molora.encoders.pretrained_files import (
    shapes_only,
)
from molora.encoders.vision_towers.open_clip_models import build_open_clip
from molora.encoders.vision_towers.siglip import build_siglip
from molora.encoders.vision_towers.timm_models import build_timm
from molora.encoders.vision_towers.tower import Built, TowerConfig


def build_library_tower(config: TowerConfig, crop_pixels: int) -> Built:
    """Builds the tower of kind `transformers`, `timm` or `open_clip`, with its weights if the config says so. Raises
    ValueError for weights that cannot be found, do not fit, or give another grid than `patch_pixels` promises."""
    if shapes_only():
        config = replace(config, pretrained=False)
    build = {"transformers": build_siglip, "timm": build_timm, "open_clip": build_open_clip}[config.kind]
    built = build(config, crop_pixels)
    if built.tower.grid != crop_pixels // config.stride:
        raise ValueError(
            f"tower {config.name or config.path or config.kind}: a crop of {crop_pixels} pixels gives a grid of "
            f"{built.tower.grid} frames a side, patch_pixels {config.stride} promises {crop_pixels // config.stride}; "
            "set patch_pixels to the tower's pixels per frame"
        )
    return built
