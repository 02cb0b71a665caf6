"""The model and the batch that both sides get: a random Phi-4-multimodal of chosen sizes, saved once, opened by each.

transformers writes the checkpoint, molora converts it, and each side opens its own copy of the same tensors.

Letters: T tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalVisionConfig,
)

import molora
from molora.convert.phi4mm import ADAPTERS, TARGETS
from molora.convert.release import import_release
from molora.inference.load import LoadedModel
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.testing import byte_tokenizer

SAMPLE_RATE_HZ = 16_000
CROP_PIXELS = 448
# transformers' names of the projectors, by the names of molora's parts.
PROJECTORS = {
    "projectors.vision.default": ("image_embed.img_projection_up", "image_embed.img_projection_down"),
    "projectors.audio.default": ("audio_embed.up_proj_for_speech", "audio_embed.down_proj_for_speech"),
}


@dataclass(frozen=True)
class Sizes:
    """Depths and widths of backbone, vision tower and Conformer, and the rank of both adapters."""

    layers: int = 12
    width: int = 768
    mlp_width: int = 2048
    heads: int = 12
    kv_heads: int = 4
    vocab_size: int = 32_000
    tower_layers: int = 6
    tower_width: int = 384
    ear_blocks: int = 6
    ear_width: int = 256
    rank: int = 16


SIZES = {
    "small": Sizes(),
    "tiny": Sizes(
        layers=2, width=64, mlp_width=96, heads=4, kv_heads=2, vocab_size=512,
        tower_layers=2, tower_width=32, ear_blocks=2, ear_width=32, rank=4,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """How many samples of each kind are in a batch, and how many tokens of text each has. A picture is a square of one
    crop, which is 545 tokens; a clip of 5 s is 63."""

    pictures: int = 2
    clips: int = 3
    texts: int = 3
    text_beside_media: int = 40
    text_alone: int = 64
    targets: int = 8


def make_config(sizes: Sizes) -> Any:
    """The last two token ids stand for pictures and clips."""
    tokenizer = byte_tokenizer()
    half = int(sizes.width // sizes.heads * 0.75) // 2
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
    config: Any = Phi4MultimodalConfig
    return config(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        rope_parameters=rope | {"short_factor": [1.0] * half, "long_factor": [1.2 + i for i in range(half)]},
        sliding_window=262_144,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")],
        **dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.eos_token_id),
        vision_config=Phi4MultimodalVisionConfig(
            hidden_size=sizes.tower_width,
            intermediate_size=4 * sizes.tower_width,
            num_hidden_layers=sizes.tower_layers,
            num_attention_heads=max(1, sizes.tower_width // 64),
            # The released model reads the last layer but one, and transformers computes the last in vain.
            feature_layer=-1,
            image_token_id=sizes.vocab_size - 1,
        ),
        audio_config=Phi4MultimodalAudioConfig(
            hidden_size=sizes.ear_width,
            intermediate_size=4 * sizes.ear_width,
            num_blocks=sizes.ear_blocks,
            num_attention_heads=max(1, sizes.ear_width // 64),
            ext_pw_out_channel=sizes.ear_width,
            depthwise_separable_out_channel=sizes.ear_width,
            nemo_conv_channels=sizes.ear_width,
            bias_max_distance=500,
            audio_token_id=sizes.vocab_size - 2,
        ),
    )


def save_checkpoint(folder: Path, sizes: Sizes) -> None:
    """Writes `folder`/native as transformers and PEFT do, and `folder`/run as molora converts it."""
    native = folder / "native"
    model: Any = Phi4MultimodalForCausalLM(make_config(sizes))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = _drawn(name, parameter, draw)
    model.save_pretrained(native)
    byte_tokenizer().save_pretrained(native)
    for path, _ in ADAPTERS.values():
        config = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        adapted: Any = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = _drawn(name, parameter, draw)
        adapted.save_pretrained(native / path)
        model = adapted.unload()
    import_release(native, folder / "run")


def _drawn(name: str, tensor: Tensor, draw: torch.Generator) -> Tensor:
    """Values that keep activations near one. transformers starts the towers' attention off with a deviation of one, at
    which differences of rounding grow from layer to layer."""
    if "norm" in name:
        return tensor.data
    noise = torch.randn(tensor.shape, generator=draw)
    if tensor.ndim == 1 or min(tensor.shape) == 1 or "embed_tokens." in name:
        return noise * 0.05
    # What an adapter adds is small beside the layer's own output, as it is in one that was trained.
    size = 0.05 if "lora_B" in name else 0.7
    return noise * (size / math.sqrt(tensor[0].numel()))


def never_stop(model: Any) -> None:
    """Lets no token end an answer, so that an answer has as many tokens on both sides."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0


def open_ours(folder: Path, dtype: torch.dtype, device: str) -> LoadedModel:
    loaded = molora.load(folder / "run", dtype=str(dtype).removeprefix("torch."), device=device)
    never_stop(loaded.model.backbone.model)
    loaded.model.backbone.turn_ends = frozenset()
    return loaded


def open_theirs(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """transformers' model with PEFT's adapters `vision` and `audio`, both open to training, as are the projectors."""
    native = folder / "native"
    model: Any = Phi4MultimodalForCausalLM.from_pretrained(native, dtype=dtype, attn_implementation="sdpa")
    for module in model.model.embed_tokens_extend.image_embed.modules():
        # transformers calls the tower's attention causal, and under sdpa it is, when no crop is padded.
        if hasattr(module, "is_causal"):
            module.is_causal = False
    names = {name: native / path for name, (path, _) in ADAPTERS.items()}
    never_stop(model)
    adapted: Any = PeftModel.from_pretrained(model, names["vision"], adapter_name="vision", is_trainable=True)
    adapted.load_adapter(names["audio"], adapter_name="audio", is_trainable=True)
    return adapted.to(device)


def trained_parameters(theirs: Any) -> dict[str, nn.Parameter]:
    """What trains on both sides, by molora's full names: both adapters, and the projectors that the batch needs."""
    found = {}
    for name, parameter in theirs.named_parameters():
        for adapter in ADAPTERS:
            if f".{adapter}.weight" in name:
                path = name.removeprefix("base_model.model.").replace(f".{adapter}.weight", ".weight")
                found[f"adapters.{adapter}.{path}"] = parameter
    extension = theirs.base_model.model.model.embed_tokens_extend
    for part, layers in PROJECTORS.items():
        for key, path in zip(("up", "down"), layers, strict=True):
            layer = extension.get_submodule(path)
            found |= {f"{part}.{key}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")}
    return found


def make_samples(model: MoLoRA, shape: Shape, seed: int = 0) -> list[Sample]:
    """Samples of random tokens, pictures and clips of noise. Media stand first in a sample, its targets last."""
    draw = torch.Generator().manual_seed(seed)
    noise = np.random.default_rng(seed)
    kinds = ["vision"] * shape.pictures + ["audio"] * shape.clips + [""] * shape.texts
    samples = []
    for index, kind in enumerate(kinds):
        items: tuple[Item, ...] = ()
        num_text = shape.text_beside_media if kind else shape.text_alone
        if kind:
            modality: Any = model.modalities[kind]
            prepared = modality.prepare(modality.load(_medium(kind, noise)))
            items = (Item(kind, modality.projector(frozenset({kind})), prepared),)
        num_media = sum(item.prepared.num_tokens for item in items)
        token_ids_T = torch.randint(300, model.backbone.vocab_size - 2, (num_media + num_text,), generator=draw)
        modality_ids_T = torch.zeros_like(token_ids_T)
        modality_ids_T[:num_media] = 1 + list(model.modalities).index(kind) if kind else 0
        targets_T = torch.arange(len(token_ids_T)) >= len(token_ids_T) - shape.targets
        samples.append(Sample(f"{kind or 'text'} {index}", token_ids_T, modality_ids_T, targets_T, items))
    return samples


def _medium(kind: str, noise: np.random.Generator) -> Mapping[str, Any]:
    if kind == "vision":
        pixels = noise.integers(0, 256, (CROP_PIXELS, CROP_PIXELS, 3), dtype=np.uint8)
        return {"type": "image", "image": Image.fromarray(pixels)}
    wave = 0.1 * noise.standard_normal(5 * SAMPLE_RATE_HZ).astype(np.float32)
    return {"type": "audio", "array": wave, "sampling_rate": SAMPLE_RATE_HZ}
