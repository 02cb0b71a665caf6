"""SigLIP's tower from transformers, taken apart into the pieces of a PatchTower."""

from dataclasses import fields
from typing import Any

from torch import nn

from molora.encoders.pretrained_files import (
    check_options,
    check_sizes,
    from_scratch,
    load_transformers,
    num_kept,
    read_json,
    read_weights,
)
from molora.encoders.vision_towers.tower import HALF, Built, PatchTower, TowerConfig, colours, find_source

# Of SiglipVisionConfig; its image and patches are given by the crop.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def build_siglip(config: TowerConfig, crop_pixels: int) -> Built:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    name = config.path or config.name or "from scratch"
    source, origin = find_source(config, config.name)
    folder = source if source is not None and source.is_dir() else None
    if folder is None:
        known = [item.name for item in fields(SiglipVisionConfig)]
        check_options("tower arguments", "SiglipVisionConfig", config.arguments, known)
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
    blocks = num_kept(config.layer, depth, f"tower {name}")
    sizes.num_hidden_layers, sizes.vision_use_head, sizes._attn_implementation = blocks, False, "sdpa"
    if source is not None and config.pretrained:
        later = (f"encoder.layers.{index}." for index in range(blocks, depth))
        unused = ("head.", "embeddings.position_ids", *later)
        state = read_weights(source, prefixes=("vision_model.", ""), unused=unused)
        model: Any = load_transformers(SiglipVisionModel, sizes, state, str(source))
    else:
        model = SiglipVisionModel(sizes)

    grid = crop_pixels // model.config.patch_size
    table_NC = model.embeddings.position_embedding.weight
    if len(table_NC) != grid * grid:  # resampled as timm does it: bicubic, antialiased
        from timm.layers import pos_embed

        resample: Any = pos_embed.resample_abs_pos_embed
        table_NC = resample(table_NC[None], new_size=[grid, grid], num_prefix_tokens=0)[0]
    tower = PatchTower(model.embeddings.patch_embedding, table_NC, nn.Identity(), model.encoder.layers, grid)
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        about = read_json(folder / "preprocessor_config.json")
        tower.mean, tower.std = colours({"mean": about.get("image_mean", HALF), "std": about.get("image_std", HALF)})
    arguments = {key: getattr(sizes, key) for key in (*_SIZES, "hidden_act", "layer_norm_eps")}
    return Built(tower, origin, from_scratch(config, arguments=arguments | {"num_hidden_layers": depth}))
