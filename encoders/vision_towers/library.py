"""Towers of libraries: SigLIP from transformers, timm or open_clip, CLIP, and any other timm model.

The three SigLIP backends are taken apart into the same pieces (patch convolution, position table, blocks), so that
NaViT-style patch masks work for all of them and equal weights give equal frames, whoever published them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.config import did_you_mean
from molora.encoders.pretrained_files import (
    check_options,
    check_sizes,
    from_scratch,
    load_transformers,
    locate,
    num_kept,
    read_json,
    read_weights,
    shapes_only,
)
from molora.encoders.vision_towers.tower import HALF, Built, FeatureTower, PatchTower, TowerConfig, colours
from molora.modality import Origin

# Of SiglipVisionConfig; its image and patches are given by the crop.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")

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
    "use_rot_pos_emb",
)

# What a folder of timm's says of its weights, for timm to read them by. What else it may say is where to get others.
_TIMM_ABOUT = ("tag", "num_classes", "input_size", "fixed_input_size", "mean", "std", "first_conv", "classifier")

_OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"

# What a vision transformer of open_clip may set. Patch drop-out, pooling and what follows it leave the frames alone.
_OPEN_CLIP_KNOWN = {
    *("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"),
    *("patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens"),
}


def build_library_tower(config: TowerConfig, crop_pixels: int) -> Built:
    """Builds the tower of kind `transformers`, `timm` or `open_clip`, with its weights if the config says so. Raises
    ValueError for weights that cannot be found, do not fit, or give another grid than `patch_pixels` promises."""
    if shapes_only():
        config = replace(config, pretrained=False)
    build = {"transformers": _build_siglip, "timm": _build_timm, "open_clip": _build_open_clip}[config.kind]
    built = build(config, crop_pixels)
    if built.tower.grid != crop_pixels // config.stride:
        raise ValueError(
            f"tower {config.name or config.path or config.kind}: a crop of {crop_pixels} pixels gives a grid of "
            f"{built.tower.grid} frames a side, patch_pixels {config.stride} promises {crop_pixels // config.stride}; "
            "set patch_pixels to the tower's pixels per frame"
        )
    return built


def _find_source(
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


def _build_siglip(config: TowerConfig, crop_pixels: int) -> Built:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    name = config.path or config.name or "from scratch"
    source, origin = _find_source(config, config.name)
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


def _build_timm(config: TowerConfig, crop_pixels: int) -> Built:
    import timm

    name = config.name or ""
    repository = name if "/" in name else None
    if name and repository is None:
        if not timm.is_model(name):
            raise _unknown_model("timm", name, timm.list_models())
        if config.pretrained and not config.path:
            repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
            if repository is None:
                raise ValueError(f"tower {name}: timm knows no weights of that name on the hub; give a file in path")
    source, origin = _find_source(config, repository)
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
    return _timm_trunk(config, crop_pixels, found["architecture"], arguments, about, state, origin)


def _activation(architecture: str) -> dict[str, str]:
    """The activation that an architecture's weights want, where timm says in a note that they want another than its.
    Source: timm's `notes` on weights trained with QuickGELU (timm/models/vision_transformer.py)."""
    import timm

    about: Any = timm.models.get_pretrained_cfg(architecture) if timm.models.is_model_pretrained(architecture) else None
    quick = about is not None and any("quickgelu" in note.lower() for note in about.notes or ())
    return {"act_layer": "quick_gelu"} if quick else {}


def _build_open_clip(config: TowerConfig, crop_pixels: int) -> Built:
    repository = config.name
    if repository and "/" not in repository:
        repository = _repository(repository) if config.pretrained and not config.path else None
    source, origin = _find_source(config, repository, _OPEN_CLIP_WEIGHTS)
    if source is not None and source.is_dir():
        found = read_json(source / "open_clip_config.json")
    else:
        found = {"model_cfg": _model_config(config.name or "")}
    about = {key: value for key, value in found.get("preprocess_cfg", {}).items() if key in ("mean", "std")}
    architecture, arguments, prefix = as_timm(found["model_cfg"], str(source or config.name))
    state = None
    if source is not None and config.pretrained:
        weights = read_weights(source, _OPEN_CLIP_WEIGHTS)
        if not (state := {key: value for key, value in weights.items() if key.startswith(prefix)}):
            raise ValueError(f"{source}: no weight starts with {prefix!r}: not the weights of this open_clip model")
    return _timm_trunk(config, crop_pixels, architecture, arguments, about, state, origin)


def _model_config(name: str) -> dict[str, Any]:
    """The config of one of open_clip's own models. Raises ValueError for a name that it does not have."""
    library = _open_clip()
    config = library.get_model_config(name)
    if config is None:
        raise _unknown_model("open_clip", name, library.list_models())
    return config


def _repository(name: str) -> str:
    """The hub repository with the weights of one of open_clip's own models. Raises ValueError if not just one has."""
    _model_config(name)
    library = _open_clip()
    tags = library.list_pretrained_tags_by_model(name)
    repositories = [library.get_pretrained_cfg(name, tag).get("hf_hub", "").rstrip("/") for tag in tags]
    if len(tags) != 1 or repositories[0].count("/") != 1:
        raise ValueError(
            f"open_clip model {name!r} has weights under the tags {', '.join(tags) or '(none)'}; "
            "name one hub repository in name, or a file in path"
        )
    return repositories[0]


def as_timm(model: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any], str]:
    """The timm architecture of a model's vision side, its arguments, and what the names of its weights start with.
    Raises ValueError for a vision side that timm has not.

    open_clip's own vision transformer is CLIP's: timm has it, and renames its weights as it reads them.
    Source: defaults from open_clip's CLIPVisionCfg (open_clip/model.py).
    """
    vision = model["vision_cfg"]
    if vision.get("timm_model_name"):
        pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
        return vision["timm_model_name"], {"num_classes": 0, **pool}, "visual.trunk."
    foreign = sorted(key for key, value in vision.items() if key not in _OPEN_CLIP_KNOWN and value)
    if not isinstance(vision.get("layers", 12), int):
        foreign.append("layers")
    if foreign:
        given = ", ".join(f"{key} {vision[key]!r}" for key in foreign)
        raise ValueError(
            f"tower {where}: its vision side is neither a timm model nor a plain vision transformer ({given}); "
            "take a CLIP ViT or a SigLIP of open_clip"
        )
    width = vision.get("width", 768)
    arguments = {
        "patch_size": vision.get("patch_size", 16),
        "embed_dim": width,
        "depth": vision.get("layers", 12),
        "num_heads": width // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "num_classes": model["embed_dim"],
    }
    return "vit_large_patch14_clip_336.openai", arguments, "visual."


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("a model named by open_clip needs open_clip: pip install 'molora[open_clip]'") from error
    return open_clip


def _unknown_model(library: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a model that a library does not have, with the nearest names that it has."""
    near = did_you_mean(name, known, at_most=3)
    return ValueError(f"{library} has no model {name!r}; {near}{library}.list_models() has their names")


def _timm_trunk(
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
    blocks = model.blocks[: num_kept(config.layer, len(model.blocks), f"tower {name}")]
    enter = nn.Sequential(model.pos_drop, model.norm_pre)
    tower = PatchTower(model.patch_embed.proj, model.pos_embed[0], enter, blocks, model.patch_embed.grid_size[0])
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
