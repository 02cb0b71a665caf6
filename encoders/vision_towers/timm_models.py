"""Towers of timm's models, under timm's names and open_clip's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from molora.config import did_you_mean
from molora.encoders.pretrained_files import (
    check_options,
    from_scratch,
    num_kept,
    read_json,
    read_weights,
)
from molora.encoders.vision_towers.tower import Built, FeatureTower, PatchTower, TowerConfig, colours, find_source
from molora.modality import Origin

# What may be said of a timm model: its sizes and parts. timm.create_model takes more, such as a file to unpickle.
# Source: VisionTransformer (timm/models/vision_transformer.py), and what its convolutional and windowed models share.
_TIMM_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values"),
    *("class_token", "pos_embed", "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm"),
    *("pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "strict_img_size", "norm_layer", "act_layer"),
    *("embed_norm_layer", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "depths", "dims", "window_size", "output_stride", "ls_init_value"),
    *("norm_eps", "layers", "cardinality", "base_width", "stem_width", "stem_type", "use_fc_norm", "rope_type"),
    *("use_rot_pos_emb", "pad_type", "bn_eps"),
)

# What a folder of timm's says of its weights, for timm to read them by. What else it may say is where to get others.
_TIMM_ABOUT = ("tag", "num_classes", "input_size", "fixed_input_size", "mean", "std", "first_conv", "classifier")


def build_timm(config: TowerConfig, crop_pixels: int) -> Built:
    import timm

    name = config.name or ""
    repository = name if "/" in name else None
    if name and repository is None:
        if not timm.is_model(name):
            raise unknown_model("timm", name, timm.list_models())
        if config.pretrained and not config.path:
            repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
            if repository is None:
                raise ValueError(f"tower {name}: timm knows no weights of that name on the hub; give a file in path")
    source, origin = find_source(config, repository)
    found: dict[str, Any] = {"architecture": name}
    tagged, about = name, {}
    if source is not None and source.is_dir():
        found = read_json(file := source / "config.json")
        if "architecture" not in found:
            raise ValueError(f"{file}: names no timm 'architecture'; this is no folder that timm saved")
        said = {**found.get("pretrained_cfg", {}), **found}
        about = {key: said[key] for key in _TIMM_ABOUT if key in said}
        tagged = f"{found['architecture']}.{about.get('tag')}"
    arguments = {**_activation(tagged), **found.get("model_args", {}), **config.arguments}
    state = read_weights(source) if source is not None and config.pretrained else None
    return timm_trunk(config, crop_pixels, found["architecture"], arguments, about, state, origin)


def _activation(architecture: str) -> dict[str, str]:
    """The activation that an architecture's weights want, where timm says in a note that they want another than its.
    Source: timm's `notes` on weights trained with QuickGELU (timm/models/vision_transformer.py)."""
    import timm

    about: Any = timm.models.get_pretrained_cfg(architecture) if timm.models.is_model_pretrained(architecture) else None
    quick = about is not None and any("quickgelu" in note.lower() for note in about.notes or ())
    return {"act_layer": "quick_gelu"} if quick else {}


def unknown_model(library: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a model that a library does not have, with the nearest names that it has."""
    near = did_you_mean(name, known, at_most=3)
    return ValueError(f"{library} has no model {name!r}; {near}{library}.list_models() has their names")


def timm_trunk(
    config: TowerConfig,
    crop_pixels: int,
    architecture: str,
    arguments: dict[str, Any],
    about: dict[str, Any],
    state: dict[str, Tensor] | None,
    origin: Origin | None,
) -> Built:
    """Builds a timm architecture, loads `state` into it, and makes the tower that suits it."""
    import timm

    name = config.path or config.name or architecture
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ValueError(f"tower {name}: timm has no architecture {architecture!r:.80}; take another model")
    check_options(f"tower {name}: arguments", "timm", arguments, _TIMM_ARGUMENTS)
    # timm stops checking keys when the number of classes differs from the weights', so we never let it differ.
    classes = {"num_classes": arguments["num_classes"]} if "num_classes" in arguments else {}
    overlay = {**about, **classes, **({} if state is None else {"state_dict": state})}
    registered = timm.models.get_pretrained_cfg(architecture)
    fixed = about.get("fixed_input_size", registered is not None and registered.fixed_input_size)
    # Built at the size of the crops, so that a position table is resampled once or, if it fits, not at all.
    size = {"img_size": crop_pixels} if fixed else {}
    if state is not None and origin is not None:
        _check_filled(architecture, {**size, **arguments}, state, name)
    try:
        model: Any = timm.create_model(
            architecture, pretrained=state is not None, pretrained_cfg_overlay=overlay, **{**size, **arguments}
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"tower {name}: timm cannot build or load {architecture!r}: {error}") from error
    model.pretrained_cfg.pop("state_dict", None)
    if hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(crop_pixels, crop_pixels))
    scratch = from_scratch(config, kind="timm", name=architecture, arguments=dict(arguments))
    if not _is_patch_transformer(model):
        return Built(FeatureTower(model, config.layer, crop_pixels, name), origin, scratch)
    leave = model.norm if config.layer == "final" else None
    blocks = model.blocks[: num_kept(config.layer, len(model.blocks), f"tower {name}")]
    enter = nn.Sequential(model.pos_drop, model.norm_pre)
    grid = model.patch_embed.grid_size[0]
    tower = PatchTower(model.patch_embed.proj, model.pos_embed[0], enter, blocks, grid, leave)
    tower.mean, tower.std = colours(model.pretrained_cfg)
    return Built(tower, origin, scratch)


def _check_filled(architecture: str, arguments: dict[str, Any], state: dict[str, Tensor], name: str) -> None:
    """Raises ValueError for a model of far more numbers than its fetched weights hold, before memory is taken for it.
    Position tables and patches that are resampled are larger than those in the file."""
    import timm

    with torch.device("meta"):
        try:
            model: Any = timm.create_model(architecture, **arguments)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"tower {name}: timm cannot build {architecture!r}: {error}") from error
    count, held = (sum(tensor.numel() for tensor in side.values()) for side in (model.state_dict(), state))
    if count > 4 * held + 2**24:
        raise ValueError(f"tower {name}: its config asks for {count} numbers and its weights hold {held}; take another")


def _is_patch_transformer(model: Any) -> bool:
    """Whether a timm model is nothing but patches, a position table and blocks, as SigLIP is."""
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer

    return (
        isinstance(model, VisionTransformer)
        and isinstance(model.patch_embed, PatchEmbed)
        and isinstance(model.patch_embed.norm, nn.Identity)
        and model.pos_embed is not None
        and not model.num_prefix_tokens
    )
