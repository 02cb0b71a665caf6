"""Where a pretrained tower's weights come from, and how they are read and loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.encoders.pretrained_files import fetch, weight_files
from molora.encoders.vision_towers import open_clip_models
from molora.encoders.vision_towers.tower import TowerConfig
from molora.modality import Origin


def find_source(config: TowerConfig, repository: str | None) -> tuple[Path | None, Origin | None]:
    """The local folder or file to build from: `path`, or the repository's snapshot, fetched if need be."""
    if config.path is not None:
        path = Path(config.path)
        if not path.exists():
            raise ValueError(f"tower path {path}: no such file or folder")
        if path.is_file() and config.name is None and config.kind != "transformers":
            raise ValueError(f"tower path {path} is a file of weights: name says their architecture, give it too")
        if path.is_dir() and config.name is not None:
            raise ValueError(f"tower path {path} is a folder, which says what it holds: leave out name {config.name!r}")
        return path, None
    if repository is None:
        return None, None
    # Some repositories hold the same model once per library, in files named for the library.
    weights = open_clip_models.WEIGHTS_FILE if config.kind == "open_clip" else "model*.safetensors"
    return fetch(repository, config.revision, ["*.json", weights] if config.pretrained else ["*config.json"])


def read_weights(source: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """The tensors of a weights file, or of the safetensors files of a folder. A pickle is read only if it is named."""
    from safetensors.torch import load_file

    if source.is_file():
        if source.suffix == ".safetensors":
            return load_file(source)
        state = torch.load(source, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    return {key: value for file in weight_files(source, name) for key, value in load_file(file).items()}


def load_weights(model: nn.Module, state: dict[str, Tensor], unused: re.Pattern[str], where: str) -> None:
    """Loads a state dict in which every key counts but the ones known to be `unused`."""
    try:
        state = {key: value.float() for key, value in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{where}: weights of another shape: {error}") from error
    unexpected = [key for key in unexpected if not unused.match(key)]
    if missing or unexpected:
        raise ValueError(
            f"{where}: not the weights of this tower: {len(missing)} missing (such as {missing[:3]}), "
            f"{len(unexpected)} unexpected (such as {unexpected[:3]})"
        )


def blocks_kept(layer: int, depth: int, name: str) -> int:
    """How many blocks a tower needs so that `layer` is its last."""
    if not -depth <= layer:
        raise ValueError(f"tower {name}: layer {layer} asked for, but the tower has {depth} blocks")
    return depth + layer + 1


def resample(table_NC: Tensor, grid: int) -> Tensor:
    """A square position table at another grid, as timm does it (bicubic, antialiased)."""
    if len(table_NC) == grid * grid:
        return table_NC
    from timm.layers import pos_embed

    resample: Any = pos_embed.resample_abs_pos_embed
    return resample(table_NC[None], new_size=[grid, grid], num_prefix_tokens=0)[0]


def from_scratch(config: TowerConfig, **changes: Any) -> TowerConfig:
    return replace(config, path=None, revision=None, pretrained=False, **changes)
