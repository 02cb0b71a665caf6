"""Tiny real things to try others with: backbones of many families, a byte tokenizer, modalities.

Letters: I items, S frames, C encoder width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from molora.modality import Encoder, Frames, MediaError, Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
# A switch and a window that a test can cross in a few dozen tokens.
ROPE_SWITCH = 24
WINDOW = 16
MAX_TOKENS = 256


def _longrope(rotated_width: int, **more: Any) -> dict[str, Any]:
    half = rotated_width // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [1.5 + i for i in range(half)], **more}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ROPE_SWITCH, **factors}


def _family(name: str) -> tuple[str, dict[str, Any]]:
    """The name that transformers' classes begin with, and the settings that make the family itself."""
    heads: dict[str, Any] = {"head_dim": 8}
    windows = {**heads, "sliding_window": WINDOW}
    layers = {"layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_local_experts": 4}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    mini = {"rope_parameters": _longrope(6, partial_rotary_factor=0.75), "tie_word_embeddings": True}
    moe = {"rope_parameters": _longrope(8, short_mscale=1.1, long_mscale=1.3), "num_experts_per_tok": 2}
    llama4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": WINDOW}
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", heads),
        "llama-dynamic": ("Llama", {"rope_parameters": dynamic, "max_position_embeddings": 32}),
        "qwen3": ("Qwen3", heads),
        "gemma2": ("Gemma2", {**windows, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
        "gemma3": ("Gemma3", {**windows, **layers, "query_pre_attn_scalar": 8}),
        "phi3": ("Phi3", {"sliding_window": WINDOW}),
        "phi4-mini": ("Phi3", {**mini, "original_max_position_embeddings": ROPE_SWITCH}),
        "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}),
        "phimoe": ("Phimoe", {**experts, **moe}),
        "gpt-oss": ("GptOss", {**windows, **layers, **experts, "rope_parameters": plain}),
        "granite": ("Granite", {"embedding_multiplier": 12.0, "logits_scaling": 3.0}),
        "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
        "falcon": ("Falcon", {}),
        "mamba": ("Mamba", {}),
        "llama4": ("Llama4", {**heads, **llama4}),
    }
    return families[name]


def tiny_model(family: str, seed: int = 0, max_tokens: int = MAX_TOKENS) -> PreTrainedModel:
    """A random causal LM of a family, two layers of width 32, in fp32."""
    import transformers  # takes long, and a data worker that has one of the modalities below needs no models

    name, settings = _family(family)
    model_class = getattr(transformers, f"{name}ForCausalLM")
    shape: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    if family not in ("bloom", "falcon", "mamba"):
        shape |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": max_tokens}
        # Large enough for attention to matter: at 0.02 a broken mask would hide in the rounding.
        shape |= {"initializer_range": 0.1, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 256)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**(shape | settings))).eval()
    model.generation_config.eos_token_id = [256, 260]
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens, with a chat template in Phi-4-mini's manner."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_backbone(folder: Path, family: str = "phi4-mini", seed: int = 0) -> Path:
    """Writes a tiny backbone folder that transformers opens."""
    tiny_model(family, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@dataclass(kw_only=True)
class NumbersConfig:
    """`scale` multiplies the numbers; `projector_beside` names modalities beside which another projector is used."""

    scale: float = 1.0
    projector_beside: list[str] | None = None


class Numbers:
    """A modality whose item is a list of numbers, one token each: the smallest real plugin."""

    config_type: ClassVar[type] = NumbersConfig
    part_type: ClassVar[str] = "numbers"

    def __init__(self, name: str, config: NumbersConfig) -> None:
        self.name = name
        self.config = config

    def load(self, part: Mapping[str, Any]) -> list[float]:
        numbers = _given(part, "numbers")
        if not (isinstance(numbers, list) and numbers and all(isinstance(n, (int, float)) for n in numbers)):
            wrong = f"numbers part {dict(part)!r}: no numbers"
            raise MediaError(f"{wrong}; give {{'type': 'numbers', 'numbers': [1.0, …]}}")
        return list(numbers)

    def prepare(self, item: list[float], generator: torch.Generator | None = None) -> Prepared:
        return Prepared({"values": torch.tensor(item) * self.config.scale}, num_tokens=len(item))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        values = torch.cat([p.tensors["values"] for p in prepared])
        return {"values": values, "lengths": torch.tensor([p.num_tokens for p in prepared])}

    def build_encoder(self) -> Encoder:
        return _NumbersEncoder()

    def projector(self, modalities: frozenset[str]) -> str:
        return "beside" if modalities & set(self.config.projector_beside or ()) else "default"

    def projectors(self) -> tuple[str, ...]:
        return ("beside", "default") if self.config.projector_beside else ("default",)

    def examples(self) -> list[dict[str, Any]]:
        return [{"type": "numbers", "numbers": numbers} for numbers in ([0.5], [1.0, -2.0, 0.25], [0.0] * 5)]


class Letters(Numbers):
    """The same under another part type, to have a second modality."""

    part_type: ClassVar[str] = "letters"

    def load(self, part: Mapping[str, Any]) -> list[float]:
        letters = _given(part, "letters")
        if not (isinstance(letters, str) and letters):
            raise MediaError(f"letters part {dict(part)!r}: no letters; give {{'type': 'letters', 'letters': 'abc'}}")
        return [float(ord(letter) - ord("a")) / 26 for letter in letters]

    def examples(self) -> list[dict[str, Any]]:
        return [{"type": "letters", "letters": letters} for letters in ("a", "sense", "zebra")]


def _given(part: Mapping[str, Any], key: str) -> Any:
    """What a part has under a key, or the JSON file that its `path` names. Raises MediaError."""
    if part.get("path") is None:
        return part.get(key)
    try:
        return json.loads(Path(part["path"]).read_bytes())
    except (OSError, TypeError, ValueError) as error:
        raise MediaError(f"{key} part: {part['path']!r} is no JSON file of {key}: {error}") from error


class _NumbersEncoder(Encoder):
    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Linear(1, self.width)

    def forward(self, **collated: Tensor) -> Frames:
        frames_SC = torch.tanh(self.frames(collated["values"][:, None]))
        return Frames(frames_SC, tuple(collated["lengths"].tolist()))
