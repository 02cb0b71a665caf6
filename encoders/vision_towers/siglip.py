"""SigLIP's tower from transformers, taken apart into the pieces of a PatchTower."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from molora.encoders.pretrained_files import check_keys, check_sizes, read_json
from molora.encoders.vision_towers.tower import HALF, Built, PatchTower, TowerConfig, colours
from molora.encoders.vision_towers.tower_weights import (
    blocks_kept,
    find_source,
    from_scratch,
    load_weights,
    read_weights,
    resample,
)

# Of SiglipVisionConfig; its image and patches are given by the crop.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def build_siglip(config: TowerConfig, crop_pixels: int) -> Built:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    name = config.path or config.name or "from scratch"
    source, origin = find_source(config, config.name)
    folder = source if source is not None and source.is_dir() else None
    if folder is None:
        known = [item.name for item in dataclasses.fields(SiglipVisionConfig)]
        check_keys("tower arguments", "SiglipVisionConfig", config.arguments, known)
        check_sizes("tower arguments", config.arguments)
        sizes: Any = SiglipVisionConfig(**{"image_size": crop_pixels, "patch_size": config.stride, **config.arguments})
    elif config.arguments:
        raise ValueError(f"tower {name}: its folder describes the architecture; leave out arguments")
    else:
        found = read_json(folder / "config.json")
        if found.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise ValueError(f"tower {name}: holds a {found.get('model_type')} model; kind transformers takes siglip")
        found = found.get("vision_config", found)
        check_sizes(f"{folder / 'config.json'}", {key: found[key] for key in _SIZES if key in found})
        sizes = SiglipVisionConfig.from_dict(found)

    depth = sizes.num_hidden_layers
    blocks = blocks_kept(config.layer, depth, name)
    sizes.num_hidden_layers, sizes.vision_use_head, sizes._attn_implementation = blocks, False, "sdpa"
    weights = source if config.pretrained else None
    with nullcontext() if weights is None else torch.device("meta"):  # random weights of this size take half a minute
        model: Any = SiglipVisionModel(sizes)
    model.post_layernorm = nn.Identity()
    if weights is not None:
        dropped = "".join(rf"|encoder\.layers\.{index}\." for index in range(blocks, depth))
        unused = r"text_model\.|head\.|post_layernorm\.|logit_scale$|logit_bias$|embeddings\.position_ids$" + dropped
        state = {key.removeprefix("vision_model."): value for key, value in read_weights(weights).items()}
        load_weights(model, state, re.compile(unused), str(weights))

    grid = crop_pixels // model.config.patch_size
    table_NC = resample(model.embeddings.position_embedding.weight, grid)
    tower = PatchTower(model.embeddings.patch_embedding, table_NC, nn.Identity(), model.encoder.layers, grid)
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        about = read_json(folder / "preprocessor_config.json")
        tower.mean, tower.std = colours({"mean": about.get("image_mean", HALF), "std": about.get("image_std", HALF)})
    keys = (*_SIZES, "hidden_act", "layer_norm_eps")
    arguments = {key: getattr(sizes, key) for key in keys} | {"num_hidden_layers": depth}
    return Built(tower, origin, from_scratch(config, name=None, arguments=arguments))
