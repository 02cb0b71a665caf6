"""Where a pretrained tower's weights come from, and its position table at another grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from molora.encoders.pretrained_files import locate
from molora.encoders.vision_towers import open_clip_models
from molora.encoders.vision_towers.tower import TowerConfig
from molora.modality import Origin


def find_source(config: TowerConfig, repository: str | None) -> tuple[Path | None, Origin | None]:
    """The local folder or file to build from: `path`, or the repository's snapshot, fetched if need be."""
    # Some repositories hold the same model once per library, in files named for the library.
    weights = open_clip_models.WEIGHTS_FILE if config.kind == "open_clip" else "model*.safetensors"
    found, origin = locate(config, repository, ["*.json", weights] if config.pretrained else ["*config.json"])
    if config.path is not None and found is not None:
        if found.is_file() and config.name is None and config.kind != "transformers":
            raise ValueError(f"tower path {found} is a file of weights: name says their architecture, give it too")
        if found.is_dir() and config.name is not None:
            raise ValueError(
                f"tower path {found} is a folder, which says what it holds: leave out name {config.name!r}"
            )
    return found, origin


def resample(table_NC: Tensor, grid: int) -> Tensor:
    """A square position table at another grid, as timm does it (bicubic, antialiased)."""
    if len(table_NC) == grid * grid:
        return table_NC
    from timm.layers import pos_embed

    resample: Any = pos_embed.resample_abs_pos_embed
    return resample(table_NC[None], new_size=[grid, grid], num_prefix_tokens=0)[0]
