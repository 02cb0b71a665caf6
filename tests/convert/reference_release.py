"""Small random checkpoints of Phi-4-multimodal in both of its layouts: real names, real files, tiny widths.

Source: names and counts are those of the released repository and of transformers' Phi4MultimodalForCausalLM.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    Phi4MultimodalVisionConfig,
)

from tests.convert.reference_tokenizer import save_reference_tokenizer

DECODER_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
ADAPTERS = {"vision": ("vision-lora", 4, 8, 0.0), "speech": ("speech-lora", 6, 12, 0.01)}
NATIVE_TARGETS = r"model\.layers\.\d+\.((self_attn\.(qkv|o)_proj)|(mlp\.(gate_up|down)_proj))"


@dataclass(frozen=True)
class Sizes:
    """Depths, and widths of backbone, tower and conformer; `switch` is where the frequencies change."""

    layers: int = 2
    vision_layers: int = 3
    audio_blocks: int = 2
    width: int = 32
    mlp: int = 48
    heads: int = 2
    tower_width: int = 32
    tower_mlp: int = 40
    ear_width: int = 32
    ear_mlp: int = 24
    ear_channels: int = 8
    bias_distance: int = 12
    vocab_size: int = 200064
    switch: int = 4096

    @property
    def rope(self) -> dict[str, Any]:
        half = int(self.width // self.heads * 0.75) // 2
        return {"type": "longrope", "short_factor": [1.0] * half, "long_factor": [1.2 + i for i in range(half)]}


FULL_DEPTH = Sizes(layers=32, vision_layers=27, audio_blocks=24, width=8, mlp=6, heads=1, tower_width=16, tower_mlp=6)


def native_config(sizes: Sizes) -> Any:
    config: Any = Phi4MultimodalConfig
    return config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        rope_scaling=sizes.rope,
        rope_theta=10000.0,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=sizes.switch,
        tie_word_embeddings=True,
        sliding_window=262144,
        vision_config=Phi4MultimodalVisionConfig(
            hidden_size=sizes.tower_width,
            intermediate_size=sizes.tower_mlp,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=16,
        ),
        audio_config=Phi4MultimodalAudioConfig(
            hidden_size=sizes.ear_width,
            intermediate_size=sizes.ear_mlp,
            num_blocks=sizes.audio_blocks,
            num_attention_heads=2,
            ext_pw_out_channel=sizes.ear_width,
            depthwise_separable_out_channel=sizes.ear_width,
            nemo_conv_channels=sizes.ear_channels,
            bias_max_distance=sizes.bias_distance,
        ),
    )


def _randomise(name: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Values large enough that a wrong name shows, in the range of what the tensor stands for."""
    noise = torch.randn(tensor.shape, generator=draw)
    if name.endswith("global_mean"):
        return 12 + noise
    if name.endswith("global_invstd"):
        return 0.25 + 0.02 * noise
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * noise
    return noise * (0.1 if tensor.ndim == 1 or min(tensor.shape) == 1 else 0.5 / math.sqrt(tensor[0].numel()))


def save_native(
    folder: Path, sizes: Sizes | None = None, *, dtype: torch.dtype = torch.float32, shard: str = "8MB"
) -> None:
    """A checkpoint as transformers and PEFT themselves write it, with adapters in folders, processor and tokenizer."""
    sizes = sizes or Sizes()
    draw = torch.Generator().manual_seed(0)
    model: Any = Phi4MultimodalForCausalLM(native_config(sizes))
    state = {name: _randomise(name, tensor, draw) for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for path, rank, alpha, dropout in ADAPTERS.values():
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=NATIVE_TARGETS, task_type="CAUSAL_LM"
        )
        adapted: Any = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = _randomise(name, parameter, draw).to(dtype)
        adapted.save_pretrained(folder / path)
        model = adapted.unload()
    save_reference_tokenizer(folder)
    slots = {"image_token": "<|endoftext10|>", "audio_token": "<|endoftext11|>"}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, extra_special_tokens=slots)
    processor = Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(dynamic_hd=36), Phi4MultimodalFeatureExtractor(), tokenizer
    )
    processor.save_pretrained(folder)


def hub_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the hub's layout."""
    width, head = sizes.width, sizes.width // sizes.heads
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab_size, width),
        "model.norm.weight": (width,),
    }
    linears = dict(
        zip(
            DECODER_LINEARS,
            ((width + 2 * head, width), (width, width), (2 * sizes.mlp, width), (width, sizes.mlp)),
            strict=True,
        )
    )
    for layer in range(sizes.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (width,)
        for name, (out, into) in linears.items():
            stem = f"model.layers.{layer}.{name}"
            shapes[f"{stem}.base_layer.weight"] = (out, into)
            for adapter, (_, rank, _, _) in ADAPTERS.items():
                shapes[f"{stem}.lora_A.{adapter}.weight"] = (rank, into)
                shapes[f"{stem}.lora_B.{adapter}.weight"] = (out, rank)
    both = {**_hub_vision(sizes), **_hub_audio(sizes)}
    return shapes | {f"model.embed_tokens_extend.{name}": shape for name, shape in both.items()}


def _linear(stem: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (out, into), f"{stem}.bias": (out,)}


def _norm(stem: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.weight": (width,), f"{stem}.bias": (width,)}


def _hub_vision(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    c, mlp = sizes.tower_width, sizes.tower_mlp
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (c, 3, 14, 14),
        "embeddings.patch_embedding.bias": (c,),
        "embeddings.position_embedding.weight": (1024, c),
    }
    for layer in range(sizes.vision_layers):
        stem = f"encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= _norm(f"{stem}.{norm}", c)
        for side in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{stem}.self_attn.{side}", c, c)
        shapes |= _linear(f"{stem}.mlp.fc1", mlp, c) | _linear(f"{stem}.mlp.fc2", c, mlp)
    shapes |= _norm("post_layernorm", c) | {"head.probe": (1, 1, c)}
    shapes |= {"head.attention.in_proj_weight": (3 * c, c), "head.attention.in_proj_bias": (3 * c,)}
    shapes |= _linear("head.attention.out_proj", c, c) | _norm("head.layernorm", c)
    shapes |= _linear("head.mlp.fc1", mlp, c) | _linear("head.mlp.fc2", c, mlp)
    shapes = {f"img_processor.{name}": shape for name, shape in shapes.items()}
    shapes |= {"glb_GN": (1, 1, c), "sub_GN": (1, 1, 1, c)}
    shapes |= _linear("img_projection.0", sizes.width, c) | _linear("img_projection.2", sizes.width, sizes.width)
    return {f"image_embed.{name}": shape for name, shape in shapes.items()}


def _hub_audio(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    c, mlp, channels = sizes.ear_width, sizes.ear_mlp, sizes.ear_channels
    shapes: dict[str, tuple[int, ...]] = {
        "encoder_embedding.global_mean": (80,),
        "encoder_embedding.global_invstd": (80,),
        "embed.conv.0.weight": (channels, 1, 3, 3),
        "embed.conv.0.bias": (channels,),
        "relative_attention_bias_layer.bias_values.weight": (2 * sizes.bias_distance, 2),
    }
    for depthwise, pointwise in ((2, 3), (5, 6)):
        shapes |= {
            f"embed.conv.{depthwise}.weight": (channels, 1, 3, 3),
            f"embed.conv.{depthwise}.bias": (channels,),
            f"embed.conv.{pointwise}.weight": (channels, channels, 1, 1),
            f"embed.conv.{pointwise}.bias": (channels,),
        }
    shapes |= _linear("embed.out", c, 10 * channels)
    for block in range(sizes.audio_blocks):
        stem = f"encoders.{block}"
        for side in ("feed_forward_in", "feed_forward_out"):
            shapes |= _norm(f"{stem}.{side}.layer_norm", c)
            shapes |= _linear(f"{stem}.{side}.net.0.linear", 2 * mlp, c) | _linear(f"{stem}.{side}.net.2", c, mlp)
        for norm in ("layer_norm_att", "layer_norm", "conv.layer_norm"):
            shapes |= _norm(f"{stem}.{norm}", c)
        for side in ("linear_q", "linear_k", "linear_v", "linear_out"):
            shapes |= _linear(f"{stem}.self_attn.{side}", c, c)
        shapes |= {f"{stem}.conv.glu.{bias}": (1, c, 1) for bias in ("b1", "b2")}
        for name, shape in (
            ("glu.ext_pw_conv_1d", (2 * c, c, 1)),
            ("dw_sep_conv_1d.dw_conv", (c, 1, 3)),
            ("dw_sep_conv_1d.pw_conv", (c, c, 1)),
            ("ext_pw_conv_1d", (c, c, 1)),
        ):
            shapes |= {f"{stem}.conv.{name}.weight": shape, f"{stem}.conv.{name}.bias": shape[:1]}
    shapes = {f"encoder.{name}": shape for name, shape in shapes.items()}
    for key in ("speech", "vision"):
        shapes |= _linear(f"audio_projection.{key}.0", sizes.width, c)
        shapes |= _linear(f"audio_projection.{key}.2", sizes.width, sizes.width)
    return {f"audio_embed.{name}": shape for name, shape in shapes.items()}


def hub_config(sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """config.json with the keys of the released one."""
    loras = {
        f"{name}_lora": {
            "dp": dropout,
            "layer": r"layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj))",
            "lora_alpha": alpha,
            "r": rank,
        }
        for name, (_, rank, alpha, dropout) in ADAPTERS.items()
    }
    return loras | {
        "architectures": ["Phi4MMForCausalLM"],
        "model_type": "phi4mm",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "audio_processor": {
            "config": {
                "activation": "swish",
                "activation_checkpointing": {"interval": 1, "module": "transformer", "offload": False},
                "attention_dim": sizes.ear_width,
                "attention_heads": 2,
                "batch_norm": False,
                "bias_in_glu": True,
                "causal": True,
                "chunk_size": -1,
                "cnn_layer_norm": True,
                "conv_activation": "swish",
                "conv_glu_type": "swish",
                "depthwise_multiplier": 1,
                "depthwise_seperable_out_channel": sizes.ear_width,
                "dropout_rate": 0.0,
                "encoder_embedding_config": {"input_size": 80},
                "ext_pw_kernel_size": 1,
                "ext_pw_out_channel": sizes.ear_width,
                "input_layer": "nemo_conv",
                "input_size": 80,
                "kernel_size": 3,
                "left_chunk": 18,
                "linear_units": sizes.ear_mlp,
                "nemo_conv_settings": {"conv_channels": sizes.ear_channels},
                "num_blocks": sizes.audio_blocks,
                "relative_attention_bias_args": {"t5_bias_max_distance": sizes.bias_distance, "type": "t5"},
                "time_reduction": 8,
            },
            "name": "cascades",
        },
        "auto_map": {"AutoConfig": "configuration_phi4mm.Phi4MMConfig"},
        "bos_token_id": 199999,
        "embd_layer": {
            "audio_embd_layer": {
                "compression_rate": 8,
                "downsample_rate": 1,
                "embedding_cls": "audio",
                "projection_cls": "mlp",
                "use_conv_downsample": False,
                "use_qformer": False,
            },
            "embedding_cls": "image_audio",
            "image_embd_layer": {
                "crop_size": 448,
                "embedding_cls": "tune_image",
                "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
        },
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": sizes.switch,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": sizes.rope,
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.1",
        "use_cache": True,
        "vocab_size": sizes.vocab_size,
        "_attn_implementation": "flash_attention_2",
    }


def save_hub(folder: Path, sizes: Sizes | None = None, *, dtype: torch.dtype = torch.bfloat16, shards: int = 3) -> None:
    """A checkpoint in the layout of the released repository: three shards with an index, adapters among the weights."""
    sizes = sizes or Sizes()
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    names = hub_shapes(sizes)
    tensors = {name: _randomise(name, torch.empty(shape), draw).to(dtype) for name, shape in names.items()}
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    weight_map = {name: files[index * shards // len(names)] for index, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(hub_config(sizes, dtype)))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 199999, "eos_token_id": [200020, 199999], "pad_token_id": 199999})
    )
    (folder / "preprocessor_config.json").write_text(json.dumps({"dynamic_hd": 36}))
    save_reference_tokenizer(folder)
