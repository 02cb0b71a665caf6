"""What a backbone's config.json may say: no code, no sizes beyond those of any model, values of the kinds read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.plugins import Untrusted

# What transformers computes with by itself; other ways are kernels, which it may fetch from the hub.
_EXPERTS = ("None", "eager", "grouped_mm", "batched_mm")
# Settings in config.json that molora reads, what holds them, and how that is called.
_READ: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
        lambda value: type(value) is int and value > 0,
        "a whole number over 0",
    ),
    (
        ("num_key_value_heads", "head_dim", "attention_chunk_size", "original_max_position_embeddings"),
        lambda value: value is None or (type(value) is int and value > 0),
        "a whole number over 0, or null",
    ),
    (
        ("sliding_window",),
        lambda value: value is None or (type(value) is int and value >= 0),
        "a whole number, or null",
    ),
    (
        ("logit_scale", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping"),
        lambda value: value is None or is_number(value),
        "a finite number, or null",
    ),
    (("rope_theta",), lambda value: is_number(value) and value > 0, "a number over 0"),
    (
        ("partial_rotary_factor", "factor"),
        lambda value: value is None or (is_number(value) and value > 0),
        "a number over 0, or null",
    ),
    (
        ("eos_token_id",),
        lambda value: value is None or all(type(id) is int for id in (value if isinstance(value, list) else [value])),
        "a token id, a list of them, or null",
    ),
    (
        ("layer_types",),
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of names, or null",
    ),
)
# Beyond those of any model; transformers builds them before it compares them with the weights.
_MAX_LAYERS = 1000
_MAX_WIDTH = 2**25
_MAX_WHOLE = 2**53
_LAYERS = re.compile(r"layers?$|layers_per")
_WIDTH = re.compile(r"size|dim|width|head|expert|rank|hidden|inner|embd|^d_")


def check_code(config: Mapping[str, Any], where: str) -> None:
    """Raises Untrusted for a config.json that names a library or a kernel, which transformers would import or fetch."""
    for key, value in config.items():
        if key == "quantization_config" and value:
            raise Untrusted(
                f"{where}: quantization_config wants a library to unpack the weights with; molora reads weights as "
                "they are: give the model before it was quantised"
            )
        kernels = "attn_implementation" in key and "/" in str(value)
        experts = "experts_implementation" in key and str(value) not in _EXPERTS
        if kernels or experts:
            raise Untrusted(
                f"{where}: {key} is {value!r:.80}, code that would be fetched and run; take {key} out, which changes "
                "no weight"
            )
        if isinstance(value, Mapping):
            check_code(value, where)


def check_bounds(config: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for sizes and numbers of layers beyond those of any model."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_bounds(value, path)
            continue
        most = _MAX_LAYERS if _LAYERS.search(key) else _MAX_WIDTH if _WIDTH.search(key) else _MAX_WHOLE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ConfigError(
                    f"{path}: {key} is {value!r:.80}, allowed {most:,} at most; copy the file again from where it came "
                    "from"
                )


def check_kinds(config: Mapping[str, Any], path: Path, called: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for a value of another kind than molora reads, there or among the settings of the text model
    or of RoPE. `called` are settings that a family of models has another name for."""
    for names, fits, what in _READ:
        for key in ((called or {}).get(name, name) for name in names):
            if key in config and not fits(config[key]):
                raise ConfigError(
                    f"{path}: {key} is {config[key]!r:.80}, expected {what}; copy the file again from where it came "
                    "from"
                )
    for key, value in config.items():
        if isinstance(value, Mapping) and re.fullmatch("text_config|rope_.*|.*_attention", key):
            check_kinds(value, path)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
