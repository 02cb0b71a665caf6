"""Phi-4-multimodal: its released checkpoints, in either layout, to a run of ours and back.

The hub's layout (model type `phi4mm`) holds both adapters among its weights; that of transformers (`phi4_multimodal`)
holds each in a folder of its own. Either becomes a backbone of transformers' Phi-3 class, the modalities vision and
audio, and a table of rules. What the model never runs (the tower's last layer, its norm and its pooling head) and what
only describes the release are kept beside the backbone, so that a run can be written in either layout again.

Source: config.json, modeling_phi4mm.py and the weights' index of microsoft/Phi-4-multimodal-instruct; transformers'
Phi4MultimodalForCausalLM, whose names of tensors are called native here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3Config,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    Phi4MultimodalVisionConfig,
)

from molora import lora
from molora.assembly import Blueprint, RouterConfig, blueprint
from molora.backbone import fetch, identify
from molora.checkpoint import (
    check_format,
    describe_modality,
    files_in,
    read_blueprint,
    read_run,
    tensor_hash,
    write_run,
)
from molora.config import ConfigError
from molora.storage import read_json, read_tensors, write_atomically, write_json, write_tensors, write_text
from molora.terminal import console

Layout = Literal["hub", "native"]

FORMAT_VERSION = "1.0"
_MODEL_TYPES: dict[str, Layout] = {"phi4mm": "hub", "phi4_multimodal": "native"}
# Our modalities, with the folder and the name that the adapter of each has in the release.
_ADAPTERS = {"vision": ("vision-lora", "vision"), "audio": ("speech-lora", "speech")}
# A picture beside a clip takes the vision adapter; the two are never summed. Source: `InputMode` of modeling_phi4mm.py.
_RULES = {"audio+vision": "vision"}
# A regular expression over whole names, since the towers have layers of the same last names.
_TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
# The same in the hub's config, whose code searches names with it inside the decoder alone.
_HUB_TARGETS = r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"
_PEFT = "base_model.model."
_EXTENSION = "model.embed_tokens_extend."
_TOWER = f"{_EXTENSION}image_embed.img_processor."
# Kept in the backbone's folder: what the release held besides.
_KEPT, _UNUSED, _ABOUT, _FILES = "phi4mm", "unused.safetensors", "about.json", "files"
_INDEX = "model.safetensors.index.json"
# Files that belong to the backbone alone; the others of a release describe the whole.
_BACKBONE_FILE = re.compile(
    r"(tokenizer.*\.json|vocab\.json|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|generation_config\.json)$"
)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_MAX_SHARD_BYTES = 2 * 10**9
_MAX_NAMED = 8
# What the hub's code knows and its config.json does not say. Source: vision_siglip_navit.py, processing_phi4mm.py.
_HUB_TOWER = {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "feature_layer": -2}
_MAX_CROPS = 36
_STOP_IDS = [199999, 200020]
_IMAGE_SLOT, _AUDIO_SLOT = 200010, 200011
# The vision encoder keeps the colours that it normalises with; the release leaves them to its processor.
_COLOURS = {f"modalities/vision/encoder.safetensors:{name}": (3, 1, 1) for name in ("mean_C11", "std_C11")}
_TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "original_max_position_embeddings"),
    *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "sliding_window", "bos_token_id", "pad_token_id"),
    *("attention_dropout", "embd_pdrop", "resid_pdrop", "use_cache"),
)
# Settings of the audio encoder by their names in the two layouts.
_AUDIO_KEYS = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "linear_units": "intermediate_size",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
    **{key: key for key in ("activation", "chunk_size", "conv_activation", "conv_glu_type", "depthwise_multiplier")},
    **{key: key for key in ("dropout_rate", "ext_pw_out_channel", "input_size", "kernel_size", "left_chunk")},
    **{key: key for key in ("num_blocks", "time_reduction")},
}

# Ours to native: a pattern of our tensor's name, by file, and what it is there.
_ENCODERS: dict[str, tuple[tuple[str, str], ...]] = {
    "vision": (
        (r"tower\.patch\.", f"{_TOWER}embeddings.patch_embedding."),
        (r"tower\.table_NC$", f"{_TOWER}embeddings.position_embedding.weight"),
        (r"tower\.blocks\.", f"{_TOWER}encoder.layers."),
        (r"row_separator_C$", f"{_EXTENSION}image_embed.sub_img_feature_extensor"),
        (r"view_separator_C$", f"{_EXTENSION}image_embed.global_img_feature_extensor"),
    ),
    "audio": ((r"conformer\.", f"{_EXTENSION}audio_embed.encoder."),),
}
_PROJECTORS: dict[str, dict[str, tuple[str, str]]] = {
    "vision": {"default": ("image_embed.img_projection_up", "image_embed.img_projection_down")},
    "audio": {
        "default": ("audio_embed.up_proj_for_speech", "audio_embed.down_proj_for_speech"),
        "vision": ("audio_embed.up_proj_for_vision_speech", "audio_embed.down_proj_for_vision_speech"),
    },
}
_NATIVE_TO_HUB = (
    (r"(image_embed\.)img_projection_up", r"\1img_projection.0"),
    (r"(image_embed\.)img_projection_down", r"\1img_projection.2"),
    (r"(image_embed\.)global_img_feature_extensor", r"\1glb_GN"),
    (r"(image_embed\.)sub_img_feature_extensor", r"\1sub_GN"),
    (r"(audio_embed\.)up_proj_for_vision_speech", r"\1audio_projection.vision.0"),
    (r"(audio_embed\.)down_proj_for_vision_speech", r"\1audio_projection.vision.2"),
    (r"(audio_embed\.)up_proj_for_speech", r"\1audio_projection.speech.0"),
    (r"(audio_embed\.)down_proj_for_speech", r"\1audio_projection.speech.2"),
    (r"(audio_embed\.encoder\.encoders\.\d+\.feed_forward_(?:in|out)\.)gate_up_proj", r"\1net.0.linear"),
    (r"(audio_embed\.encoder\.encoders\.\d+\.feed_forward_(?:in|out)\.)down_proj", r"\1net.2"),
    (r"(audio_embed\.encoder\.encoders\.\d+\.self_attn\.)([qkv])_proj", r"\1linear_\2"),
    (r"(audio_embed\.encoder\.encoders\.\d+\.self_attn\.)o_proj", r"\1linear_out"),
    (rf"^({_TARGETS})\.weight$", r"\1.base_layer.weight"),
)


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: its file in a run with its name and shape there, and its names and shape in the layouts.

    `file` is a path in the run's folder, "backbone" standing for the shards there. An adapter's native name begins with
    its folder.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    native: str
    hub: str
    released_shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.file}:{self.name}"

    def named(self, layout: Layout) -> str:
        return self.hub if layout == "hub" else self.native


@dataclass(frozen=True)
class Release:
    """What a checkpoint holds, in the words of transformers' config, and what becomes of it here."""

    config: Any
    adapters: Mapping[str, LoraConfig]
    max_crops: int

    def backbone_config(self) -> Phi3Config:
        keys = (*_TEXT_KEYS, "rope_parameters", "eos_token_id", "dtype")
        return Phi3Config(**{key: getattr(self.config, key) for key in keys}, architectures=["Phi3ForCausalLM"])

    def blueprints(self) -> dict[str, Blueprint]:
        """The two modalities before their weights."""
        vision, audio = self.config.vision_config, self.config.audio_config
        keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
        tower = {
            "kind": "transformers",
            "pretrained": False,
            "layer": vision.feature_layer,
            "patch_pixels": vision.patch_size,
            "arguments": {key: getattr(vision, key) for key in (*keys, "layer_norm_eps")},
        }
        conformer = {
            "width": audio.hidden_size,
            "blocks": audio.num_blocks,
            "heads": audio.num_attention_heads,
            "mlp_width": audio.intermediate_size,
            "kernel_size": audio.kernel_size,
            "subsampling_channels": audio.nemo_conv_channels,
            "max_distance": audio.bias_max_distance,
        }
        options = {
            "vision": {"crop_pixels": vision.crop_size, "max_crops": self.max_crops, "tower": tower},
            "audio": {"tower": {"conformer": conformer}, "beside": {"vision": "vision"}},
        }
        return {
            name: replace(blueprint(name, name, options[name], None, name), adapter=self.adapters[name])
            for name in _ADAPTERS
        }

    def places(self) -> list[Place]:
        """Where every tensor lies; native names and shapes are those of transformers' own class."""
        plans = self.blueprints()
        with torch.device("meta"):
            reference = Phi4MultimodalForCausalLM(self.config).state_dict()
            backbone = AutoModelForCausalLM.from_config(self.backbone_config()).state_dict()
            encoders = {name: plan.modality.build_encoder().state_dict() for name, plan in plans.items()}
        if self.config.tie_word_embeddings:
            del reference["lm_head.weight"], backbone["lm_head.weight"]
        ours = {name: ("backbone", name, tensor.shape) for name, tensor in backbone.items()}
        for modality, tensors in encoders.items():
            file = f"modalities/{modality}/encoder.safetensors"
            for name, tensor in tensors.items():
                ours |= dict.fromkeys(_encoder_names(modality, name), (file, name, tensor.shape))
            file = f"modalities/{modality}/projector.safetensors"
            for key, layers in _PROJECTORS[modality].items():
                for layer, stem in zip(("up", "down"), layers, strict=True):
                    for kind in ("weight", "bias"):
                        native = f"{_EXTENSION}{stem}.{kind}"
                        ours[native] = (file, f"{key}.{layer}.{kind}", reference[native].shape)
        places = []
        for native, tensor in reference.items():
            # What we have no use for is what no logit depends on.
            unused = (f"backbone/{_KEPT}/{_UNUSED}", native, tensor.shape)
            file, name, shape = ours.pop(native, unused)
            places.append(Place(file, name, tuple(shape), native, _hub_name(native), tuple(tensor.shape)))
        assert not ours, f"names that transformers' class does not have: {sorted(ours)[:_MAX_NAMED]}"
        for modality, config in self.adapters.items():
            places += _adapter_places(modality, config.r, backbone)
        return places


def _adapter_places(modality: str, rank: int, backbone: Mapping[str, Tensor]) -> Iterator[Place]:
    folder, theirs = _ADAPTERS[modality]
    for weight, tensor in backbone.items():
        layer = weight.removesuffix(".weight")
        if re.fullmatch(_TARGETS, layer):
            for side, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
                name = f"{_PEFT}{layer}.lora_{side}.weight"
                file = f"modalities/{modality}/adapter_model.safetensors"
                hub = f"{layer}.lora_{side}.{theirs}.weight"
                yield Place(file, name, shape, f"{folder}/{name}", hub, shape)


def _encoder_names(modality: str, name: str) -> list[str]:
    """The native name of an encoder's tensor; none for what the release does not hold."""
    return [re.sub(f"^{ours}", native, name) for ours, native in _ENCODERS[modality] if re.match(ours, name)]


def _hub_name(native: str) -> str:
    for pattern, replacement in _NATIVE_TO_HUB:
        native = re.sub(pattern, replacement, native)
    return native


class _Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name, read one by one. Each file has a prefix for its names.

    Raises ValueError for a file that is not whole, and for a name that two files hold.
    """

    def __init__(self, files: Mapping[Path, str]) -> None:
        self._found: dict[str, tuple[Any, str]] = {}
        for path, prefix in files.items():
            try:
                file: Any = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
            for name in file.keys():  # noqa: SIM118  (the file itself is no iterable)
                if f"{prefix}{name}" in self._found:
                    raise ValueError(f"{path}: tensor {name} is in another file too; copy the folder again")
                self._found[f"{prefix}{name}"] = file, name

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def shape(self, key: str) -> tuple[int, ...]:
        file, name = self._found[key]
        return tuple(file.get_slice(name).get_shape())

    def dtype(self, key: str) -> str:
        file, name = self._found[key]
        return file.get_slice(name).get_dtype()

    def __getitem__(self, key: str) -> Tensor:
        file, name = self._found[key]
        return file.get_tensor(name)

    def check(self, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Raises ValueError listing what is unknown, missing, of another shape, or no float."""
        problems = [f"unexpected {key}" for key in sorted(self._found.keys() - expected.keys())]
        problems += [f"missing {key}" for key in sorted(expected.keys() - self._found.keys())]
        for key in sorted(expected.keys() & self._found.keys()):
            if self.shape(key) != expected[key]:
                problems.append(f"{key} is {self.shape(key)}, expected {expected[key]}")
            elif self.dtype(key) not in _DTYPES:
                problems.append(f"{key} is stored as {self.dtype(key)}, expected one of {', '.join(_DTYPES)}")
        if problems:
            shown = "; ".join(problems[:_MAX_NAMED])
            more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
            raise ValueError(f"{where}: the tensors do not fit its config: {shown}{more}")


# From a release to a run ----------------------------------------------------------------------------------------


def layout_of(source: str | Path) -> Layout | None:
    """In which layout a folder, or what the hub has under an id, holds Phi-4-multimodal; None if it is another."""
    path = Path(source) / "config.json"
    if not path.is_file():
        if Path(source).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            return None
        try:
            path = Path(hf_hub_download(str(source), path.name))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
            return None  # whoever opens it as a backbone says what is wrong
    return _MODEL_TYPES.get(read_json(path).get("model_type", ""))


def opened(source: str | Path) -> str | Path:
    """A released checkpoint as the run that it was converted to, once, in the cache; anything else as it is."""
    if layout_of(source) is None:
        return source
    folder = fetch(str(source))
    stamps = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.resolve().rglob("*.safetensors"))]
    key = hashlib.sha256(json.dumps([stamps, FORMAT_VERSION]).encode()).hexdigest()
    run = Path(os.environ.get("MOLORA_CACHE", "~/.cache/molora")).expanduser() / _KEPT / key
    if not (run / "molora.json").is_file():
        console.print(f"converting {source}, this once, to {run}", highlight=False)
        import_release(source, run)
    return run


def import_release(source: str | Path, run: Path) -> None:
    """Converts a released checkpoint (a folder or hub id) to a run, tensor by tensor, each with its bytes and dtype.

    Raises: ConfigError or ValueError for what is no such checkpoint, has settings that our modules lack, or holds
    tensors that are unknown, missing or of another shape; nothing is written then.
    """
    layout = layout_of(source)
    if layout is None:
        raise ConfigError(
            f"{source}: not Phi-4-multimodal (its config.json has none of the model types {', '.join(_MODEL_TYPES)}); "
            "name a folder or hub id with the released checkpoint"
        )
    if run.exists() and (
        (run / "molora.json").exists() or {p.name for p in run.iterdir()} - {"backbone", "modalities"}
    ):
        raise ConfigError(f"{run}: is there already; name a folder that is not")
    folder = fetch(str(source))
    tensors, release = _read_release(folder, layout)
    places = release.places()
    tensors.check({place.named(layout): place.released_shape for place in places}, str(folder))

    for file, group in itertools.groupby(sorted(places, key=lambda place: place.file), key=lambda place: place.file):
        here = {place.name: place for place in group}
        if file == "backbone":
            sizes = {name: _num_bytes(place.shape, tensors.dtype(place.named(layout))) for name, place in here.items()}
            _write_shards(run / file, sizes, lambda name, here=here: tensors[here[name].named(layout)])
        elif file.endswith("adapter_model.safetensors") and layout == "native":
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                adapter = folder / _ADAPTERS[Path(file).parent.name][0] / name
                write_atomically((run / file).with_name(name), partial(shutil.copyfile, adapter))
        else:
            values = {name: tensors[place.named(layout)].reshape(place.shape) for name, place in here.items()}
            added = {key.partition(":")[2]: shape for key, shape in _COLOURS.items() if key.startswith(f"{file}:")}
            write_tensors(run / file, values | {name: torch.full(shape, 0.5) for name, shape in added.items()})

    backbone = run / "backbone"
    write_text(backbone / "config.json", release.backbone_config().to_json_string())
    for path in files_in(folder):
        if path.suffix != ".safetensors" and path.name != _INDEX:
            there = backbone if _BACKBONE_FILE.match(path.name) else backbone / _KEPT / _FILES
            write_atomically(there / path.name, partial(shutil.copyfile, path))
    write_json(
        backbone / _KEPT / _ABOUT,
        {
            "format_version": FORMAT_VERSION,
            "layout": layout,
            "config": json.loads(release.config.to_json_string(use_diff=False)),
            "max_crops": release.max_crops,
            "dtypes": {place.native: tensors.dtype(place.named(layout)) for place in places},
        },
    )
    _describe_run(run, release, layout, str(source))


def _describe_run(run: Path, release: Release, layout: Layout, source: str) -> None:
    """Writes what makes the folders modalities, and all of it a run."""
    identity = identify(run / "backbone", str(run / "backbone"))
    for name, plan in release.blueprints().items():
        folder = run / "modalities" / name
        if layout == "hub":
            write_text(folder / "adapter_config.json", lora.adapter_json(release.adapters[name], source))
        encoder = read_tensors(folder / "encoder.safetensors")
        widths = {"vision": release.config.vision_config.hidden_size, "audio": release.config.audio_config.hidden_size}
        files = ["encoder.safetensors", "projector.safetensors", "adapter_model.safetensors", "adapter_config.json"]
        describe_modality(
            folder,
            plan,
            plan.modality.config,
            (widths[name], release.config.hidden_size),
            identity,
            tensor_hash(encoder),
            None,
            files,
        )
    write_run(run, identity, list(_ADAPTERS), RouterConfig(options={"rules": _RULES}))


def _read_release(folder: Path, layout: Layout) -> tuple[_Tensors, Release]:
    """The tensors of a release and what they are. Raises ConfigError for settings that our modules lack."""
    path = folder / "config.json"
    values = read_json(path)
    index = folder / _INDEX
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = {folder / name: "" for name in sorted(names)}
    if layout == "native":
        files |= {folder / f / "adapter_model.safetensors": f"{f}/" for f, _ in _ADAPTERS.values()}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing; copy the whole release, in which it holds part of the weights")
    tensors = _Tensors(files)
    if layout == "hub":
        adapters = {
            name: lora.lora_config(
                {
                    "r": values[f"{theirs}_lora"]["r"],
                    "lora_alpha": values[f"{theirs}_lora"]["lora_alpha"],
                    "lora_dropout": values[f"{theirs}_lora"]["dp"],
                    "target_modules": _TARGETS,
                },
                f"{path}: {theirs}_lora",
            )
            for name, (_, theirs) in _ADAPTERS.items()
        }
        config = _from_hub(values, tensors)
    else:
        adapters = {name: lora.read_adapter(folder / f) for name, (f, _) in _ADAPTERS.items()}
        config = Phi4MultimodalConfig.from_dict(values)
    _check_settings(config, path)
    return tensors, Release(config, adapters, _max_crops(folder))


def _from_hub(values: Mapping[str, Any], tensors: _Tensors) -> Any:
    """The hub's config in transformers' words; the tower's sizes are read off its weights, as the hub's code knows them
    by itself."""
    tower = {"crop_size": values["embd_layer"]["image_embd_layer"]["crop_size"], **_HUB_TOWER}
    patch, fc1 = f"{_TOWER}embeddings.patch_embedding.weight", f"{_TOWER}encoder.layers.0.mlp.fc1.weight"
    if patch in tensors and fc1 in tensors:
        tower["hidden_size"], _, tower["patch_size"], _ = tensors.shape(patch)
        tower["intermediate_size"] = tensors.shape(fc1)[0]
        layer = re.compile(rf"{re.escape(_TOWER)}encoder\.layers\.(\d+)\.")
        tower["num_hidden_layers"] = 1 + max(int(m[1]) for key in tensors if (m := layer.match(key)))
    given = values["audio_processor"]["config"]
    ear = {ours: given[theirs] for theirs, ours in _AUDIO_KEYS.items() if theirs in given}
    return Phi4MultimodalConfig(
        **{key: values[key] for key in _TEXT_KEYS if key in values},
        **{key: values[key] for key in ("rope_scaling", "rope_theta", "partial_rotary_factor") if key in values},
        eos_token_id=_STOP_IDS,
        dtype=values.get("torch_dtype", values.get("dtype")),
        vision_config=Phi4MultimodalVisionConfig(**tower, image_size=tower["crop_size"]),
        audio_config=Phi4MultimodalAudioConfig(
            **ear,
            nemo_conv_channels=given["nemo_conv_settings"]["conv_channels"],
            bias_max_distance=given["relative_attention_bias_args"]["t5_bias_max_distance"],
            downsample_rate=values["embd_layer"]["audio_embd_layer"]["downsample_rate"],
        ),
    )


def _check_settings(config: Any, path: Path) -> None:
    vision, audio = config.vision_config, config.audio_config
    for what, value, expected in (
        ("vision image_size", vision.image_size, vision.crop_size),
        ("audio input_size", audio.input_size, 80),
        ("audio time_reduction", audio.time_reduction, 8),
        ("audio downsample_rate", audio.downsample_rate, 1),
        ("audio chunk_size", audio.chunk_size, -1),
        ("audio bias_symmetric", audio.bias_symmetric, False),
        ("audio depthwise_multiplier", audio.depthwise_multiplier, 1),
        *(("audio " + key, getattr(audio, key), "swish") for key in ("activation", "conv_activation", "conv_glu_type")),
    ):
        if value != expected:
            raise ConfigError(f"{path}: {what} is {value!r}; the modules here are for {expected!r}, as released")


def _max_crops(folder: Path) -> int:
    """The most crops of a picture, from the processor's settings, which either layout may leave out."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values)
            if "dynamic_hd" in values:
                return int(values["dynamic_hd"])
    return _MAX_CROPS


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * _DTYPES[dtype].itemsize


def _write_shards(folder: Path, sizes: Mapping[str, int], read: Callable[[str], Tensor]) -> None:
    """Writes tensors of `sizes` bytes in files of limited size, with an index if there are several."""
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and size + sum(sizes[n] for n in shards[-1]) > _MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    count, weight_map = len(shards), {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        values = {name: read(name).contiguous() for name in names}
        write_atomically(folder / file, lambda path, values=values: save_file(values, path, {"format": "pt"}))
        del values
    if count > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


# From a run to a release ----------------------------------------------------------------------------------------


def export_release(run: Path, folder: Path, layout: Layout | None = None) -> None:
    """Writes a run of the imported model, trained further or not, as a checkpoint in either layout; None: its own.

    Tensors get the dtypes that the release had. Adapters also become folders that PEFT reads, in both layouts.

    Raises: ConfigError or ValueError for a run that the released model cannot be.
    """
    about_run = read_run(run)
    backbone, folders = Path(about_run.backbone_source()), about_run.modality_folders()
    kept = backbone / _KEPT
    if not (kept / _ABOUT).is_file():
        raise ConfigError(
            f"{run}: its backbone {backbone} was not imported (no {_KEPT}/{_ABOUT} there); only runs on a backbone "
            "from `molora convert phi4mm` can be written as a release"
        )
    if set(folders) != set(_ADAPTERS):
        raise ConfigError(
            f"{run}: has the modalities {', '.join(sorted(folders))}; the released model holds exactly "
            f"{', '.join(sorted(_ADAPTERS))}: make a run of these, with the others by `path:`"
        )
    if about_run.router.plugin != "table" or about_run.router.options.get("rules", {}) != _RULES:
        raise ConfigError(
            f"{run}: routes by {about_run.router.plugin} {about_run.router.options}; the released model always routes "
            f"by the table with rules {_RULES}, and would answer otherwise"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is there already and not empty; name another folder")
    identity = identify(backbone, str(backbone))
    adapters = {}
    for name, path in folders.items():
        plan, _ = read_blueprint(path, identity, name)
        if plan.adapter is None or not (path / "encoder.safetensors").is_file():
            raise ConfigError(f"{path}: has no adapter or no encoder of its own, which a release holds")
        adapters[name] = plan.adapter
    about = read_json(kept / _ABOUT)
    check_format(about, kept / _ABOUT)
    own: Layout = about["layout"]
    layout = layout or own
    release = Release(Phi4MultimodalConfig.from_dict(about["config"]), adapters, about["max_crops"])

    places = release.places()
    files = dict.fromkeys(sorted(backbone.glob("*.safetensors")), "backbone:")
    files |= {
        backbone / place.file.removeprefix("backbone/"): f"{place.file}:" for place in places if _KEPT in place.file
    }
    for name, path in folders.items():
        for file in ("encoder", "projector", "adapter_model"):
            files[path / f"{file}.safetensors"] = f"modalities/{name}/{file}.safetensors:"
    tensors = _Tensors(files)
    tensors.check({place.key: place.shape for place in places} | _COLOURS, str(run))

    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    baked = {place.named(layout): place for place in places if layout == "hub" or "-lora/" not in place.native}
    # An adapter trained here may target more, or with another rank; what the release did not have keeps our dtype.
    dtypes = {name: about["dtypes"].get(place.native, tensors.dtype(place.key)) for name, place in baked.items()}

    def read(name: str) -> Tensor:
        place = baked[name]
        return tensors[place.key].reshape(place.released_shape).to(_DTYPES[dtypes[name]])

    sizes = {name: _num_bytes(place.shape, dtypes[name]) for name, place in baked.items()}
    _write_shards(draft, sizes, read)
    for name, path in folders.items():
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            write_atomically(draft / _ADAPTERS[name][0] / file, partial(shutil.copyfile, path / file))
    for path in [p for p in files_in(backbone) if _BACKBONE_FILE.match(p.name)]:
        write_atomically(draft / path.name, partial(shutil.copyfile, path))
    if layout == own:
        for path in files_in(kept / _FILES):
            write_atomically(draft / path.name, partial(shutil.copyfile, path))
    else:
        _describe_release(draft, release, layout)
    if layout == "hub":  # which holds the adapters' sizes in its config
        values = read_json(draft / "config.json")
        for name, (_, theirs) in _ADAPTERS.items():
            ours = {"r": adapters[name].r, "lora_alpha": adapters[name].lora_alpha, "dp": adapters[name].lora_dropout}
            values[f"{theirs}_lora"] = {"layer": _HUB_TARGETS, **values.get(f"{theirs}_lora", {}), **ours}
        write_json(draft / "config.json", values)
    os.replace(draft, folder)


def _describe_release(folder: Path, release: Release, layout: Layout) -> None:
    """Config and processor of a layout that the model did not come in, as its own tools write them."""
    config = release.config
    if layout == "native":
        config.architectures = [Phi4MultimodalForCausalLM.__name__]
        config.save_pretrained(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        slots = {"image_token": _IMAGE_SLOT, "audio_token": _AUDIO_SLOT}
        slots = {name: tokenizer.convert_ids_to_tokens(id) for name, id in slots.items()}
        tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=slots)
        image_processor = Phi4MultimodalImageProcessor(dynamic_hd=release.max_crops)
        processor = Phi4MultimodalProcessor(image_processor, Phi4MultimodalFeatureExtractor(), tokenizer)
        processor.chat_template = tokenizer.chat_template
        processor.save_pretrained(folder)
        return
    vision, audio, rope = config.vision_config, config.audio_config, dict(config.rope_parameters)
    files = {
        "AutoConfig": "configuration_phi4mm.Phi4MMConfig",
        "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM",
    }
    write_json(
        folder / "config.json",
        {
            "architectures": ["Phi4MMForCausalLM"],
            "model_type": "phi4mm",
            # The code is the hub's own; a name before the dashes says from which repository it is taken.
            "auto_map": {key: f"microsoft/Phi-4-multimodal-instruct--{value}" for key, value in files.items()},
            **{key: getattr(config, key) for key in _TEXT_KEYS},
            "eos_token_id": _STOP_IDS[0],
            "attention_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
            "rope_theta": rope.get("rope_theta"),
            "partial_rotary_factor": rope.get("partial_rotary_factor"),
            "rope_scaling": {
                "type": rope["rope_type"],
                **{key: rope[key] for key in ("short_factor", "long_factor") if key in rope},
            },
            "embd_layer": {
                "embedding_cls": "image_audio",
                "image_embd_layer": {
                    "embedding_cls": "tune_image",
                    "crop_size": vision.crop_size,
                    "use_hd_transform": True,
                    "with_learnable_separator": True,
                    "hd_transform_order": "sub_glb",
                    "projection_cls": "mlp",
                    "image_token_compression_cls": "avg_pool_2d",
                },
                "audio_embd_layer": {
                    "embedding_cls": "audio",
                    "compression_rate": audio.time_reduction,
                    "downsample_rate": audio.downsample_rate,
                    "projection_cls": "mlp",
                    "use_qformer": False,
                    "use_conv_downsample": False,
                },
            },
            "audio_processor": {
                "name": "cascades",
                "config": {
                    **{theirs: getattr(audio, ours) for theirs, ours in _AUDIO_KEYS.items()},
                    "input_layer": "nemo_conv",
                    "encoder_embedding_config": {"input_size": audio.input_size},
                    "nemo_conv_settings": {"conv_channels": audio.nemo_conv_channels},
                    "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": audio.bias_max_distance},
                    "bias_in_glu": True,
                    "causal": True,
                    "batch_norm": False,
                    "cnn_layer_norm": True,
                    "ext_pw_kernel_size": 1,
                },
            },
        },
    )
    write_json(folder / "preprocessor_config.json", {"dynamic_hd": release.max_crops})
