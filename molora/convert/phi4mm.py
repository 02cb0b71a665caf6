"""Phi-4-multimodal in our terms: a backbone of the Phi-3 class, vision, audio, and a place for every released tensor.

The hub's layout (model type `phi4mm`) holds both adapters among its weights; that of transformers (`phi4_multimodal`)
holds each in a folder of its own. Names of transformers' Phi4MultimodalForCausalLM are called native here.

Source: config.json, modeling_phi4mm.py and the weights' index of microsoft/Phi-4-multimodal-instruct.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Phi3Config,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalVisionConfig,
)

from molora.checkpoint.assembly import Blueprint, blueprint
from molora.config import ConfigError

Layout = Literal["hub", "native"]

# Our modalities, with the folder and the name that the adapter of each has in the release.
ADAPTERS = {"vision": ("vision-lora", "vision"), "audio": ("speech-lora", "speech")}
# A regular expression over whole names, since the towers have layers of the same last names.
TARGETS = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(gate_up_proj|down_proj))"
# The same in the hub's config, whose code searches names with it inside the decoder alone.
_HUB_TARGETS = r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))"
UNUSED_FILE = "backbone/phi4mm/unused.safetensors"
_STOP_IDS = [199999, 200020]
_PEFT = "base_model.model."
_EXTENSION = "model.embed_tokens_extend."
_TOWER = f"{_EXTENSION}image_embed.img_processor."
# What the hub's code knows and its config.json does not say. Source: vision_siglip_navit.py.
_HUB_TOWER = {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "feature_layer": -2}
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
    (rf"^({TARGETS})\.weight$", r"\1.base_layer.weight"),
)


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: its file in a run with its name and shape there, and its names and shape in the layouts.
    `file` is a path in the run's folder, "backbone" for the shards there. An adapter's native name begins with its
    own."""

    file: str
    name: str
    shape: tuple[int, ...]
    native: str
    hub: str
    released_shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def of_adapter(self) -> bool:
        return self.file.endswith("/adapter_model.safetensors")

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

    def check_settings(self, path: Path) -> None:
        """Raises ConfigError for settings that our modules lack."""
        vision, audio = self.config.vision_config, self.config.audio_config
        for what, value, expected in (
            ("vision image_size", vision.image_size, vision.crop_size),
            ("audio input_size", audio.input_size, 80),
            ("audio time_reduction", audio.time_reduction, 8),
            ("audio downsample_rate", audio.downsample_rate, 1),
            ("audio chunk_size", audio.chunk_size, -1),
            ("audio bias_symmetric", audio.bias_symmetric, False),
            ("audio depthwise_multiplier", audio.depthwise_multiplier, 1),
            ("audio activation", audio.activation, "swish"),
            ("audio conv_activation", audio.conv_activation, "swish"),
            ("audio conv_glu_type", audio.conv_glu_type, "swish"),
        ):
            if value != expected:
                raise ConfigError(f"{path}: {what} is {value!r}; the modules here are for {expected!r}, as released")

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
        plans = [blueprint(name, name, options[name], None, name) for name in ADAPTERS]
        return {plan.plugin: replace(plan, adapter=self.adapters[plan.plugin]) for plan in plans}

    def places(self) -> list[Place]:
        """Where every tensor lies; native names and shapes are those of transformers' own class."""
        plans = self.blueprints()
        with torch.device("meta"):
            reference = Phi4MultimodalForCausalLM(self.config).state_dict()
            backbone = AutoModelForCausalLM.from_config(self.backbone_config(), trust_remote_code=False).state_dict()
            encoders = {
                name: plan.modality.build_encoder().state_dict() for name, plan in plans.items() if plan.modality
            }
        if self.config.tie_word_embeddings:
            del reference["lm_head.weight"], backbone["lm_head.weight"]
        ours = {name: ("backbone", name, tensor.shape) for name, tensor in backbone.items()}
        for modality, tensors in encoders.items():
            file = f"modalities/{modality}/encoder.safetensors"
            for name, tensor in tensors.items():
                for pattern, native in _ENCODERS[modality]:  # what the release does not hold fits none
                    if re.match(pattern, name):
                        ours[re.sub(f"^{pattern}", native, name)] = (file, name, tensor.shape)
            file = f"modalities/{modality}/projector.safetensors"
            for key, layers in _PROJECTORS[modality].items():
                for layer, stem in zip(("up", "down"), layers, strict=True):
                    for kind in ("weight", "bias"):
                        native = f"{_EXTENSION}{stem}.{kind}"
                        ours[native] = (file, f"{key}.{layer}.{kind}", reference[native].shape)
        places = []
        for native, tensor in reference.items():
            # What we have no use for is what no logit depends on.
            file, name, shape = ours.pop(native, (UNUSED_FILE, native, tensor.shape))
            places.append(Place(file, name, tuple(shape), native, _hub_name(native), tuple(tensor.shape)))
        assert not ours, f"names that transformers' class does not have: {sorted(ours)[:3]}"
        for modality, config in self.adapters.items():
            places += _adapter_places(modality, config.r, backbone)
        return places


def _adapter_places(modality: str, rank: int, backbone: Mapping[str, Tensor]) -> Iterator[Place]:
    folder, theirs = ADAPTERS[modality]
    for weight, tensor in backbone.items():
        layer = weight.removesuffix(".weight")
        if re.fullmatch(TARGETS, layer):
            for side, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
                name = f"{_PEFT}{layer}.lora_{side}.weight"
                file = f"modalities/{modality}/adapter_model.safetensors"
                hub = f"{layer}.lora_{side}.{theirs}.weight"
                yield Place(file, name, shape, f"{folder}/{name}", hub, shape)


def _hub_name(native: str) -> str:
    for pattern, replacement in _NATIVE_TO_HUB:
        native = re.sub(pattern, replacement, native)
    return native


def from_hub(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """The hub's config.json in transformers' words. The tower's sizes, which only the hub's code knows, are read off
    its weights' `shapes`."""
    tower = {"crop_size": values["embd_layer"]["image_embd_layer"]["crop_size"], **_HUB_TOWER}
    patch, fc1 = f"{_TOWER}embeddings.patch_embedding.weight", f"{_TOWER}encoder.layers.0.mlp.fc1.weight"
    if patch in shapes and fc1 in shapes:
        tower["hidden_size"], _, tower["patch_size"], _ = shapes[patch]
        tower["intermediate_size"] = shapes[fc1][0]
        layer = re.compile(rf"{re.escape(_TOWER)}encoder\.layers\.(\d+)\.")
        tower["num_hidden_layers"] = 1 + max(int(m[1]) for key in shapes if (m := layer.match(key)))
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


def to_hub(release: Release) -> dict[str, Any]:
    """A release's config.json in the hub's layout."""
    config = release.config
    vision, audio, rope = config.vision_config, config.audio_config, dict(config.rope_parameters)
    factors = {key: rope[key] for key in ("short_factor", "long_factor") if key in rope}
    # The code is the hub's own; a name before the dashes says from which repository it is taken.
    code = "microsoft/Phi-4-multimodal-instruct--"
    image = {"embedding_cls": "tune_image", "crop_size": vision.crop_size, "projection_cls": "mlp"}
    image |= {"use_hd_transform": True, "with_learnable_separator": True, "hd_transform_order": "sub_glb"}
    image |= {"image_token_compression_cls": "avg_pool_2d"}
    sound = {"embedding_cls": "audio", "projection_cls": "mlp", "use_qformer": False, "use_conv_downsample": False}
    sound |= {"compression_rate": audio.time_reduction, "downsample_rate": audio.downsample_rate}
    ear = {theirs: getattr(audio, ours) for theirs, ours in _AUDIO_KEYS.items()}
    ear |= {"input_layer": "nemo_conv", "encoder_embedding_config": {"input_size": audio.input_size}}
    ear |= {"nemo_conv_settings": {"conv_channels": audio.nemo_conv_channels}, "ext_pw_kernel_size": 1}
    ear |= {"relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": audio.bias_max_distance}}
    ear |= {"bias_in_glu": True, "causal": True, "batch_norm": False, "cnn_layer_norm": True}
    return {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "auto_map": {
            "AutoConfig": f"{code}configuration_phi4mm.Phi4MMConfig",
            "AutoModelForCausalLM": f"{code}modeling_phi4mm.Phi4MMForCausalLM",
        },
        **{key: getattr(config, key) for key in _TEXT_KEYS},
        "eos_token_id": _STOP_IDS[0],
        **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias"), False),
        "torch_dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": rope.get("partial_rotary_factor"),
        "rope_scaling": {"type": rope["rope_type"], **factors},
        "embd_layer": {"embedding_cls": "image_audio", "image_embd_layer": image, "audio_embd_layer": sound},
        "audio_processor": {"name": "cascades", "config": ear},
    }


def adapters_to_hub(release: Release, given: Mapping[str, Any]) -> dict[str, Any]:
    """The hub's config with the adapters' sizes in it, which may have changed in training."""
    loras = {}
    for name, (_, theirs) in ADAPTERS.items():
        adapter = release.adapters[name]
        sizes = {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "dp": adapter.lora_dropout}
        loras[f"{theirs}_lora"] = {"layer": _HUB_TARGETS, **given.get(f"{theirs}_lora", {}), **sizes}
    return {**given, **loras}
