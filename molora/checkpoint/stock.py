"""What transformers opens from a folder, without running code of its own: a causal LM, its config and its tokenizer.

A config.json may name no code, no sizes beyond those of any model, and only values of the kinds read.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molora.config import ConfigError
from molora.model.quantization import Quantization, quantizer, settle
from molora.plugins import Untrusted
from molora.received import is_number, read_json, shard_names

_DTYPES = {
    **{"float32": torch.float32, "fp32": torch.float32, "float": torch.float32},
    **{"bfloat16": torch.bfloat16, "bf16": torch.bfloat16},
    **{"float16": torch.float16, "fp16": torch.float16, "half": torch.float16},
    **{"float64": torch.float64, "fp64": torch.float64, "double": torch.float64},
}
_COPY = "copy the file again from where it came from"
# What transformers computes with by itself; other ways are kernels, which it may fetch from the hub.
_EXPERTS = ("None", "eager", "grouped_mm", "batched_mm")
# What settings in config.json hold, by how that is called, and those that molora reads, of which some may be null.
_HOLDS: dict[str, Callable[[Any], bool]] = {
    "a whole number over 0": lambda value: type(value) is int and value > 0,
    "a whole number": lambda value: type(value) is int and value >= 0,
    "a finite number": is_number,
    "a number over 0": lambda value: is_number(value) and value > 0,
    "a token id, a list of them": lambda value: all(
        type(i) is int for i in (value if isinstance(value, list) else [value])
    ),
    "a list of names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
}
_NEVER_NULL = {
    "a whole number over 0": "hidden_size vocab_size num_hidden_layers num_attention_heads max_position_embeddings",
    "a number over 0": "rope_theta",
}
_NULL_TOO = {
    "a whole number over 0": "num_key_value_heads head_dim attention_chunk_size original_max_position_embeddings",
    "a whole number": "sliding_window",
    "a finite number": "logit_scale logits_scaling final_logit_softcapping attn_logit_softcapping",
    "a number over 0": "partial_rotary_factor factor",
    "a token id, a list of them": "eos_token_id",
    "a list of names": "layer_types",
}
# Beyond those of any model; transformers builds them before it compares them with the weights.
_MAX_LAYERS = 1000
_MAX_WIDTH = 2**25
_MAX_WHOLE = 2**53
_LAYERS = re.compile(r"layers?$|layers_per")
_WIDTH = re.compile(r"size|dim|width|head|expert|rank|hidden|inner|embd|^d_")


def read_dtype(given: str, key: str = "dtype") -> torch.dtype:
    """The floating-point type that a word means. Raises ConfigError for any other word."""
    found = _DTYPES.get(given.lower().removeprefix("torch."))
    if found is None:
        words = ", ".join(_DTYPES)
        raise ConfigError(f"{key} {given!r} is none that a backbone runs in; give one of {words}, or leave it out")
    return found


def open_stock(
    folder: Path,
    dtype: torch.dtype | str,
    quantization: Quantization = "none",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal LM of a folder as transformers has it, with eager attention. Raises OSError, ValueError, and
    ImportError for a library that is missing."""
    how = quantizer(quantization)
    config = read_config(folder)
    # Some released configs name flash attention. Where that is not installed, its kernel would be fetched. What
    # config.json says wins over an argument, but not over the config's own attribute.
    config._attn_implementation = "eager"
    # What is quantised as it is read is put where it shall be; else torch moves it, tensor by tensor.
    more = {"quantization_config": how, "device_map": {"": device}} if how else {}
    model, about = _opened(
        AutoModelForCausalLM, folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **more
    )
    if missing := sorted(about["missing_keys"]):
        raise ValueError(
            f"backbone {folder}: its weights lack {len(missing)} tensors that config.json asks for, such as "
            f"{missing[0]}, and transformers would make them up; copy the whole folder again"
        )
    if how:
        settle(model)
        return model
    return model.to(device)  # pyright: ignore[reportArgumentType]


def read_config(folder: Path) -> Any:
    """The config of a folder as transformers has it. Raises OSError, ValueError."""
    config = _opened(AutoConfig, folder)
    check_kinds(config.to_dict(), folder / "config.json", config.attribute_map)
    return config


def check_folder(folder: Path) -> None:
    """Raises ValueError if transformers would open what is no regular file here, or weights that are not hashed."""
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"backbone {folder}: {path.name} is no regular file, or a link to nowhere; take it away")
    if (folder / "adapter_config.json").exists():
        told = f"backbone {folder}: holds adapter_config.json, so transformers would open the model that it names"
        raise ValueError(f"{told}; take the adapter's files away, and name the folder of the whole model")
    if other := read_json(folder / "config.json").get("transformers_weights"):
        told = f"backbone {folder}: transformers_weights in config.json names {other!r:.80}"
        raise ValueError(f"{told}; take it out, and call the weights model.safetensors")
    for name in sorted(shard_names(folder)):
        if any(folder.glob("*.safetensors")) and not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; copy the whole folder, in which it holds part of the weights")


def _opened(auto: Any, folder: Path, **options: Any) -> Any:
    """What a class of transformers makes of a folder, without running code of it. Raises OSError, ValueError."""
    with damage_named(f"backbone {folder}"):
        return auto.from_pretrained(folder, trust_remote_code=False, **options)


@contextlib.contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Makes a ConfigError that names the file or folder of whatever transformers' classes raise over it."""
    try:
        yield
    except (ConfigError, OSError, MemoryError):
        raise
    except Exception as error:  # files that are damaged or edited end in errors of every kind there
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        ask = "is it whole, and made for this version of it?"
        raise ConfigError(f"{where}: transformers cannot open it ({told}); {ask}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises OSError, ValueError for what is damaged or has no chat template."""
    tokenizer = _opened(AutoTokenizer, folder)
    if tokenizer.chat_template is None:
        raise ValueError(f"backbone {folder}: its tokenizer has no chat template; add one (chat_template.jinja)")
    if not is_number(tokenizer.model_max_length):
        told = f"{folder / 'tokenizer_config.json'}: model_max_length is {tokenizer.model_max_length!r:.80}"
        raise ConfigError(f"{told}, expected a number; {_COPY}")
    return tokenizer


def check_code(config: Mapping[str, Any], where: str) -> None:
    """Raises Untrusted for a config.json that names a library or a kernel, which transformers would import or fetch."""
    for key, value in config.items():
        if key == "quantization_config" and value:
            told = f"{where}: quantization_config wants a library to unpack the weights with"
            raise Untrusted(f"{told}; molora reads weights as they are: give the model before it was quantised")
        kernels = "attn_implementation" in key and "/" in str(value)
        if kernels or ("experts_implementation" in key and str(value) not in _EXPERTS):
            told = f"{where}: {key} is {value!r:.80}, code that would be fetched and run"
            raise Untrusted(f"{told}; take {key} out, which changes no weight")
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
                raise ConfigError(f"{path}: {key} is {value!r:.80}, allowed {most:,} at most; {_COPY}")


def check_kinds(config: Mapping[str, Any], path: Path, called: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError for a value of another kind than molora reads, there or among the settings of the text model
    or of RoPE. `called` are settings that a family of models has another name for."""
    for null, settings in ((False, _NEVER_NULL), (True, _NULL_TOO)):
        for what, names in settings.items():
            for key in ((called or {}).get(name, name) for name in names.split()):
                value = config.get(key)
                if key in config and not (_HOLDS[what](value) or (null and value is None)):
                    told = f"{path}: {key} is {value!r:.80}, expected {what}"
                    raise ConfigError(f"{told}{', or null' if null else ''}; {_COPY}")
    for key, value in config.items():
        if isinstance(value, Mapping) and re.fullmatch("text_config|rope_.*|.*_attention", key):
            check_kinds(value, path)
