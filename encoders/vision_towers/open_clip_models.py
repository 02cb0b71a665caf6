"""open_clip's models in timm's terms: where their weights are, and what their vision side is."""

from collections.abc import Mapping
from typing import Any

from molora.encoders.pretrained_files import (
    read_json,
    read_weights,
)
from molora.encoders.vision_towers.timm_models import timm_trunk, unknown_model
from molora.encoders.vision_towers.tower import Built, TowerConfig, find_source

_WEIGHTS = "open_clip_model.safetensors"

# What a vision transformer of open_clip may set. Patch drop-out, pooling and what follows it leave the frames alone.
_KNOWN = {
    *("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio"),
    *("patch_dropout", "pool_type", "final_ln_after_pool", "output_tokens"),
}


def build_open_clip(config: TowerConfig, crop_pixels: int) -> Built:
    repository = config.name
    if repository and "/" not in repository:
        repository = _repository(repository) if config.pretrained and not config.path else None
    source, origin = find_source(config, repository, _WEIGHTS)
    if source is not None and source.is_dir():
        found = read_json(source / "open_clip_config.json")
    else:
        found = {"model_cfg": _model_config(config.name or "")}
    about = {key: value for key, value in found.get("preprocess_cfg", {}).items() if key in ("mean", "std")}
    architecture, arguments, prefix = as_timm(found["model_cfg"], str(source or config.name))
    state = None
    if source is not None and config.pretrained:
        weights = read_weights(source, _WEIGHTS)
        if not (state := {key: value for key, value in weights.items() if key.startswith(prefix)}):
            raise ValueError(f"{source}: no weight starts with {prefix!r}: not the weights of this open_clip model")
    return timm_trunk(config, crop_pixels, architecture, arguments, about, state, origin)


def _model_config(name: str) -> dict[str, Any]:
    """The config of one of open_clip's own models. Raises ValueError for a name that it does not have."""
    library = _open_clip()
    config = library.get_model_config(name)
    if config is None:
        raise unknown_model("open_clip", name, library.list_models())
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
    Raises ValueError for a vision side that timm has not. open_clip's own vision transformer is CLIP's: timm has it,
    and renames its weights as it reads them. Source: defaults from open_clip's CLIPVisionCfg (open_clip/model.py)."""
    vision = model["vision_cfg"]
    if vision.get("timm_model_name"):
        pool = {"global_pool": vision["timm_pool"]} if vision.get("timm_pool") else {}
        return vision["timm_model_name"], {"num_classes": 0, **pool}, "visual.trunk."
    foreign = sorted(key for key, value in vision.items() if key not in _KNOWN and value)
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
