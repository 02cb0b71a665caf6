"""Towers: crops to a grid of frames. SigLIP from transformers, timm or open_clip, CLIP, and any other timm model.

The three SigLIP backends are taken apart into the same pieces (patch convolution, position table, blocks), so that
NaViT-style patch masks work for all of them and equal weights give equal frames, whoever published them.

Letters: B crops, C width, H and W rows and columns (of pixels in `crops`, of patches elsewhere), N patches, positions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.config import did_you_mean
from molora.encoders.pretrained_files import check_keys, check_sizes, fetch, read_json, shapes_only, weight_files
from molora.encoders.vision_towers import open_clip_models
from molora.modality import Origin, WeightSource

Colour = tuple[float, float, float]

# Source: SigLIP's published preprocessing (google/siglip-*); pixels in [0, 1] become [-1, 1].
HALF: Colour = (0.5, 0.5, 0.5)

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
    *("use_rot_pos_emb"),
)
# What a folder of timm's says of its weights, for timm to read them by. What else it may say is where to get others.
_TIMM_ABOUT = ("tag", "num_classes", "input_size", "fixed_input_size", "mean", "std", "first_conv", "classifier")


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
    the one before; no norm is applied to it. `patch_pixels`: pixels per frame along a side before pooling, 14 unless
    given, 8 for convit. `arguments` are sizes and parts of an architecture:
    those of SiglipVisionConfig, or of timm's models as `_TIMM_ARGUMENTS` lists them. Weights that timm's notes say want
    QuickGELU, as OpenAI's CLIP, get it under timm's plain names too, unless `arguments` name another `act_layer`.

    Source of layer -2: Phi-4-multimodal's `hidden_states[-2]`.
    """

    kind: str
    layer: int = -2
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
        if self.revision is not None and (self.path or not self.name):
            raise ValueError(f"revision {self.revision!r} is for weights named on the hub: give a name and no path")
        if self.layer >= 0:
            raise ValueError(f"layer counts from the end and is negative, -1 being the last; got {self.layer}")
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


# Of SiglipVisionConfig; its image and patches are given by the crop.
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


class Tower(nn.Module):
    """Normalised crops of one size to a square grid of frames.

    `width` is C, `grid` the frames along a side, `mean` and `std` what its pixels in [0, 1] are normalised with.
    A tower that does not `mask` takes padding for picture.
    """

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


def build_library_tower(config: TowerConfig, crop_pixels: int) -> Built:
    """Builds the tower of kind `transformers`, `timm` or `open_clip`, with its weights if the config says so.

    Raises: ValueError for weights that cannot be found, do not fit, or give another grid than `patch_pixels` promises.
    """
    if shapes_only():
        config = replace(config, pretrained=False)
    built = {"transformers": _transformers, "timm": _timm, "open_clip": _open_clip}[config.kind](config, crop_pixels)
    if built.tower.grid != crop_pixels // config.stride:
        raise ValueError(
            f"tower {config.name or config.path or config.kind}: a crop of {crop_pixels} pixels gives a grid of "
            f"{built.tower.grid} frames a side, patch_pixels {config.stride} promises {crop_pixels // config.stride}; "
            "set patch_pixels to the tower's pixels per frame"
        )
    return built


class PatchTower(Tower):
    """A vision transformer without class token, whatever library its pieces come from.

    Positions under a mask follow NaViT: the k-th of n valid rows (or columns) takes row floor(side * k / n) of the
    position table, and masked patches take position 0 and are hidden as keys. Attention is never causal.

    Source: arXiv 2503.01743 §2.2.1 and the SigLIP code of microsoft/Phi-4-multimodal-instruct (vision_siglip_navit.py).
    """

    masks = True

    def __init__(self, patch: nn.Conv2d, table_NC: Tensor, enter: nn.Module, blocks: Iterable[nn.Module], grid: int):
        super().__init__()
        self.patch = patch
        self.table_NC = nn.Parameter(table_NC.detach().clone())
        self.enter = enter
        self.blocks = nn.ModuleList(blocks)
        self.width = table_NC.shape[1]
        self.side = round(len(table_NC) ** 0.5)
        self.grid = grid

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        patches_BCHW = self.patch(crops_BCHW)
        frames_BNC = patches_BCHW.flatten(2).transpose(1, 2)
        if valid_BHW is None:
            ids_BN = position_ids(patches_BCHW.new_ones((1, self.grid, self.grid), dtype=torch.bool), self.side)
            mask_B11N = None
        else:
            ids_BN = position_ids(valid_BHW, self.side)
            mask_B11N = valid_BHW.flatten(1)[:, None, None, :]
        frames_BNC = self.enter(frames_BNC + self.table_NC[ids_BN])
        for block in self.blocks:
            frames_BNC = block(frames_BNC, mask_B11N)
        return frames_BNC.unflatten(1, (self.grid, self.grid))


def position_ids(valid_BHW: Tensor, side: int) -> Tensor:
    """Which of the `side` x `side` positions each patch takes, as ids_BN; see PatchTower."""
    rows_B, columns_B = valid_BHW.any(2).sum(1), valid_BHW.any(1).sum(1)
    ids_BHW = _spread(rows_B, valid_BHW.shape[1], side)[:, :, None] * side
    ids_BHW = ids_BHW + _spread(columns_B, valid_BHW.shape[2], side)[:, None, :]
    return ids_BHW.where(valid_BHW, 0).flatten(1)


def _spread(count_B: Tensor, length: int, side: int) -> Tensor:
    steps = torch.arange(length, device=count_B.device)
    return (steps * side // count_B[:, None]).clamp(max=side - 1)


class FeatureTower(Tower):
    """Any timm model through its feature API: a convolutional net's stage, or a block of a ViT with a class token.

    It knows no patch masks: the white padding of a crop is picture to it.
    """

    def __init__(self, model: Any, layer: int, crop_pixels: int, name: str):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"tower {name}: this timm model has no feature API (forward_intermediates); take another")
        count = len(model.feature_info)
        if not -count <= layer:
            raise ValueError(f"tower {name}: layer {layer} asked for, but the model has {count} feature layers")
        self.index = model.prune_intermediate_layers([layer], prune_norm=True, prune_head=True)[0]
        self.model: Any = model
        self.mean, self.std = _colours(model.pretrained_cfg)
        try:  # some families declare no shapes, or shapes of another crop size
            with torch.no_grad():
                _, rows, columns, self.width = self.eval()(torch.zeros(1, 3, crop_pixels, crop_pixels)).shape
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"tower {name} cannot take crops of {crop_pixels} pixels: {error}") from error
        if rows != columns:
            raise ValueError(f"tower {name}: a square crop gives a map of {rows} x {columns} frames, not a square")
        self.grid = rows

    def forward(self, crops_BCHW: Tensor, valid_BHW: Tensor | None = None) -> Tensor:
        (frames_BCHW,) = self.model.forward_intermediates(
            crops_BCHW, indices=[self.index], stop_early=True, intermediates_only=True
        )
        return frames_BCHW.permute(0, 2, 3, 1)


def _transformers(config: TowerConfig, crop_pixels: int) -> Built:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    name = config.path or config.name or "from scratch"
    source, origin = _source(config, config.name)
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
    blocks = _kept(config.layer, depth, name)
    sizes.num_hidden_layers, sizes.vision_use_head, sizes._attn_implementation = blocks, False, "sdpa"
    weights = source if config.pretrained else None
    with nullcontext() if weights is None else torch.device("meta"):  # random weights of this size take half a minute
        model: Any = SiglipVisionModel(sizes)
    model.post_layernorm = nn.Identity()
    if weights is not None:
        dropped = "".join(rf"|encoder\.layers\.{index}\." for index in range(blocks, depth))
        unused = r"text_model\.|head\.|post_layernorm\.|logit_scale$|logit_bias$|embeddings\.position_ids$" + dropped
        state = {key.removeprefix("vision_model."): value for key, value in _read(weights).items()}
        _load(model, state, re.compile(unused), str(weights))

    grid = crop_pixels // model.config.patch_size
    table_NC = _resample(model.embeddings.position_embedding.weight, grid)
    tower = PatchTower(model.embeddings.patch_embedding, table_NC, nn.Identity(), model.encoder.layers, grid)
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        about = read_json(folder / "preprocessor_config.json")
        tower.mean, tower.std = _colours({"mean": about.get("image_mean", HALF), "std": about.get("image_std", HALF)})
    keys = (*_SIZES, "hidden_act", "layer_norm_eps")
    arguments = {key: getattr(sizes, key) for key in keys} | {"num_hidden_layers": depth}
    return Built(tower, origin, _from_scratch(config, name=None, arguments=arguments))


def _timm(config: TowerConfig, crop_pixels: int) -> Built:
    import timm

    name = config.name or ""
    repository = name if "/" in name else None
    if name and repository is None:
        if not timm.is_model(name):
            near = did_you_mean(name, timm.list_models(), at_most=3)
            raise ValueError(f"timm has no model {name!r}; {near}timm.list_models() has their names")
        if config.pretrained and not config.path:
            repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
            if repository is None:
                raise ValueError(f"tower {name}: timm knows no weights of that name on the hub; give a file in path")
    source, origin = _source(config, repository)
    if source is None or source.is_file():
        state = _read(source) if source is not None and config.pretrained else None
        arguments = {**_activation(name), **config.arguments}
        return _timm_trunk(config, crop_pixels, name, arguments, {}, state, origin)
    found = read_json(source / "config.json")
    if "architecture" not in found:
        raise ValueError(f"{source / 'config.json'}: names no timm 'architecture'; this is no folder that timm saved")
    about = {key: value for key, value in {**found.get("pretrained_cfg", {}), **found}.items() if key in _TIMM_ABOUT}
    architecture = found["architecture"]
    tagged = f"{architecture}.{about.get('tag')}"
    arguments = {**_activation(tagged), **found.get("model_args", {}), **config.arguments}
    state = _read(source) if config.pretrained else None
    return _timm_trunk(config, crop_pixels, architecture, arguments, about, state, origin)


def _activation(architecture: str) -> dict[str, str]:
    """The activation that an architecture's weights want, where timm says in a note that they want another than its.

    Source: timm's `notes` on weights trained with QuickGELU (timm/models/vision_transformer.py).
    """
    import timm

    about: Any = timm.models.get_pretrained_cfg(architecture) if timm.models.is_model_pretrained(architecture) else None
    quick = about is not None and any("quickgelu" in note.lower() for note in about.notes or ())
    return {"act_layer": "quick_gelu"} if quick else {}


def _open_clip(config: TowerConfig, crop_pixels: int) -> Built:
    repository = config.name
    if config.name and "/" not in config.name:
        wanted = config.pretrained and not config.path
        repository = open_clip_models.repository(config.name) if wanted else None
    source, origin = _source(config, repository)
    about: dict[str, Any] = {}
    if source is not None and source.is_dir():
        found = read_json(source / open_clip_models.CONFIG_FILE)
        model = found["model_cfg"]
        about = {key: found["preprocess_cfg"][key] for key in ("mean", "std") if key in found.get("preprocess_cfg", {})}
    else:
        model = open_clip_models.model_config(config.name or "")
    architecture, arguments, prefix = open_clip_models.as_timm(model, str(source or config.name))
    state = None
    if source is not None and config.pretrained:
        weights = _read(source, open_clip_models.WEIGHTS_FILE)
        state = {key: value for key, value in weights.items() if key.startswith(prefix)}
        if not state:
            raise ValueError(f"{source}: no weight starts with {prefix!r}: not the weights of this open_clip model")
    return _timm_trunk(config, crop_pixels, architecture, arguments, about, state, origin)


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
    check_keys(f"tower {name}: arguments", "timm", arguments, _TIMM_ARGUMENTS)
    check_sizes(f"tower {name}: arguments", arguments)
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
    scratch = _from_scratch(config, kind="timm", name=architecture, arguments=dict(arguments))
    if not _is_patch_transformer(model):
        return Built(FeatureTower(model, config.layer, crop_pixels, name), origin, scratch)
    blocks = model.blocks[: _kept(config.layer, len(model.blocks), name)]
    enter = nn.Sequential(model.pos_drop, model.norm_pre)
    tower = PatchTower(model.patch_embed.proj, model.pos_embed[0], enter, blocks, model.patch_embed.grid_size[0])
    tower.mean, tower.std = _colours(model.pretrained_cfg)
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
        raise ValueError(
            f"tower {name}: its description asks for {count} numbers and its weights hold {held}; take another"
        )


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


def _kept(layer: int, depth: int, name: str) -> int:
    """How many blocks a tower needs so that `layer` is its last."""
    if not -depth <= layer:
        raise ValueError(f"tower {name}: layer {layer} asked for, but the tower has {depth} blocks")
    return depth + layer + 1


def _resample(table_NC: Tensor, grid: int) -> Tensor:
    """A square position table at another grid, as timm does it (bicubic, antialiased)."""
    if len(table_NC) == grid * grid:
        return table_NC
    from timm.layers import pos_embed

    resample: Any = pos_embed.resample_abs_pos_embed
    return resample(table_NC[None], new_size=[grid, grid], num_prefix_tokens=0)[0]


def _from_scratch(config: TowerConfig, **changes: Any) -> TowerConfig:
    return replace(config, path=None, revision=None, pretrained=False, **changes)


def _colours(about: dict[str, Any]) -> tuple[Colour, Colour]:
    mean, std = tuple(map(float, about["mean"])), tuple(map(float, about["std"]))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"a tower for pictures takes 3 colour channels, this one is normalised by {mean} and {std}")
    return mean, std


def _source(config: TowerConfig, repository: str | None) -> tuple[Path | None, Origin | None]:
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


def _read(source: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    """The tensors of a weights file, or of the safetensors files of a folder. A pickle is read only if it is named."""
    from safetensors.torch import load_file

    if source.is_file():
        if source.suffix == ".safetensors":
            return load_file(source)
        state = torch.load(source, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    return {key: value for file in weight_files(source, name) for key, value in load_file(file).items()}


def _load(model: nn.Module, state: dict[str, Tensor], unused: re.Pattern[str], where: str) -> None:
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
