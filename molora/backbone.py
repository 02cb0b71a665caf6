"""The backbone: a frozen causal LM from transformers, identified by hash and probed once before it is trusted.

Letters: T tokens in a pack, K positions, D backbone width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from molora import attention
from molora.cache import PackedCache
from molora.config import ConfigError
from molora.experts import Choices
from molora.prompt import ChatTemplate
from molora.received import TensorFile, read_json, shard_names, stamps
from molora.rotary import wrap_rotary
from molora.routing import Flow, current_flow, flowing
from molora.storage import cache_folder, read_cached_json, write_cached
from molora.terminal import warn
from molora.trust import check_backbone

FORMAT_VERSION = 2
# What is fetched of a model on the hub; no pickles, no code.
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
# A probe longer than this is not worth its time; windows beyond it stay unexercised.
_PROBE_TOKENS = 8192
# Logits of all positions are gigabytes with a large vocabulary; final hidden states are compared at every position.
_PROBE_LOGITS = 16
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
}
_PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Settings in config.json that no logit depends on, or that have a hash of their own.
_SILENT = re.compile(
    r"_.*|architectures|auto_map|transformers_version|(torch_)?dtype|use_cache|.*dropout.*|.*pdrop|.*_token_ids?|"
    r"initializer_range|id2label|label2id|problem_type|tokenizer_class|return_dict|output_.*|chunk_size_feed_forward|"
    r"router_aux_loss_coef|gradient_checkpointing|rope_.*|partial_rotary_factor|original_max_position_embeddings",
    re.DOTALL,  # each "dropout" of a long name would be tried if the rest could hold no line break
)
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
        lambda value: value is None or _is_number(value),
        "a finite number, or null",
    ),
    (("rope_theta",), lambda value: _is_number(value) and value > 0, "a number over 0"),
    (
        ("partial_rotary_factor", "factor"),
        lambda value: value is None or (_is_number(value) and value > 0),
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
# File systems tell times apart that are as far apart as this.
_TICK_SECONDS = 0.02


class BackboneRefused(ValueError):
    """A causal LM that cannot run packed samples exactly; the message says why."""


@dataclass(frozen=True)
class Identity:
    """What a modality was trained on. Other weights, settings or another tokenizer are another backbone.

    `settings` are those of config.json that logits depend on, with the defaults of those that it leaves out, by name;
    those of inner configs have a dot. What only one of two versions of transformers knows is not compared.
    """

    source: str
    weights: str
    rope: str
    tokenizer: str
    template: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, other: Mapping[str, Any], where: str) -> list[str]:
        """Compares with a recorded identity; returns warnings, raises ValueError for another backbone."""
        for key, what in (
            ("weights", "other backbone weights"),
            ("rope", "another RoPE configuration"),
            ("tokenizer", "another tokenizer"),
        ):
            if other.get(key) != getattr(self, key):
                raise ValueError(
                    f"{where}: trained with {what} ({key} hash {other.get(key)!s:.12}, source "
                    f"{other.get('source')!r:.200}) than the backbone given has ({getattr(self, key)[:12]}, source "
                    f"{self.source!r}); load it on the backbone it was trained on"
                )
        settings = other.get("settings")  # which folders of older versions lack
        then, now = settings if isinstance(settings, Mapping) else {}, self.settings
        if changed := [
            f"{key} was {then[key]!r:.80}, is {now[key]!r:.80}"
            for key in sorted(then.keys() & now.keys())
            if then[key] != now[key]
        ]:
            raise ValueError(
                f"{where}: trained with other settings in the backbone's config.json than {self.source!r} has: "
                f"{'; '.join(changed[:8])}; put them back, or load it on the backbone it was trained on"
            )
        if other.get("template") != self.template:
            return [f"{where}: trained with another chat template; answers may suffer"]
        return []


class Backbone(nn.Module):
    """A frozen causal LM that runs packs. Always in eval mode, whatever `train` is told.

    Raises BackboneRefused if the model cannot run packed samples exactly.
    """

    def __init__(self, model: PreTrainedModel, identity: Identity, *, probe: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.identity = identity
        self.folder = Path(identity.source)
        self.revision: str | None = None
        self.model = model.requires_grad_(False).eval()
        stock = _run_stock(model) if probe is None else None
        attention.register()
        model.set_attn_implementation(attention.NAME)
        self.rotary = wrap_rotary(model)
        self.activation_checkpointing = False
        # Renamed in transformers 5.24, which Python 3.10 does not get.
        parameters = inspect.signature(decoder(model).forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        for layer in decoder_layers(model):
            layer.forward = self._checkpointed(layer.forward)
        self.probe = probe or {}
        if stock is not None:
            self.probe = self._compare(stock)
        self.embed_scale: float = self.probe["embed_scale"]
        self.turn_ends: frozenset[int] = frozenset()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def num_embeddings(self) -> int:
        """Token ids that have an embedding; some tokenizers know more."""
        weight: Any = self.model.get_input_embeddings().weight
        return len(weight)

    @property
    def max_tokens(self) -> int:
        """The context length in tokens; dynamic RoPE stretches the one it was trained with."""
        stretch = [rotary.stretch for rotary in self.rotary]
        return int(self.config.max_position_embeddings * max([1.0, *stretch]))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer: the generation config's and `turn_ends`, those of the chat template."""
        return self.configured_stop_ids | self.turn_ends

    @property
    def configured_stop_ids(self) -> frozenset[int]:
        """The generation config's, which know more than the model config's."""
        generation = self.model.generation_config
        eos = generation.eos_token_id if generation is not None else self.config.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or ())

    def stop_at(self, turn_ends: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Stops answers at these tokens too; returns warnings where the generation config says otherwise."""
        self.turn_ends = turn_ends

        def named(ids: frozenset[int]) -> str:
            known = {id: tokenizer.convert_ids_to_tokens(id) for id in sorted(ids)}
            return ", ".join(f"{token} ({id})" for id, token in known.items()) or "nothing"

        warnings = []
        configured = self.configured_stop_ids
        if not turn_ends <= configured:
            warnings.append(
                f"backbone {self.identity.source}: its generation config stops at {named(configured)}, but its chat "
                f"template ends turns with {named(turn_ends)}; answers end at either"
            )
        if unknown := {id for id in configured if not 0 <= id < self.vocab_size}:
            warnings.append(
                f"backbone {self.identity.source}: its generation config stops at {sorted(unknown)}, which its "
                f"{self.vocab_size} tokens do not have"
            )
        return warnings

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode."""
        return super().train(False)

    def regime(self, length: int) -> tuple[int, ...]:
        """Changes exactly when a sample growing to `length` tokens changes its rotary frequencies."""
        return tuple(number for rotary in self.rotary for number in rotary.regimes(length))

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """The model's own input embeddings, (T, D)."""
        return self.model.get_input_embeddings()(token_ids_T)

    def forward(
        self, embeds_TD: Tensor, position_ids_T: Tensor, flow: Flow, cache: PackedCache | None = None
    ) -> Tensor:
        """Final hidden states (T, D) of a pack of embeddings."""
        with flowing(flow):
            output = decoder(self.model)(
                inputs_embeds=embeds_TD[None],
                position_ids=position_ids_T[None],
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            )
        return output.last_hidden_state[0]

    def head(self, hidden_KD: Tensor) -> Tensor:
        """Logits (K, V)."""
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal LM has a head"
        logits = head(hidden_KD)
        # What the classes of Cohere, Granite and Gemma do after their head; the probe finds any other habit.
        if scale := getattr(self.config, "logit_scale", None):
            logits = logits * scale
        if scaling := getattr(self.config, "logits_scaling", None):
            logits = logits / scaling
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def _compare(self, stock: _Stock) -> dict[str, Any]:
        """Runs the probe's samples alone and packed, and compares with what the stock model gave."""
        name = type(self.model).__name__
        lengths = [len(ids) for ids in stock.samples]
        tolerance = _PROBE_TOLERANCE[self.model.dtype]
        try:
            alone = [self._hidden(stock, [index]) for index in range(len(lengths))]
            packed = self._hidden(stock, range(len(lengths))).split(lengths)
        except NotImplementedError as error:
            raise BackboneRefused(f"{name}: {error}") from error
        differences: dict[str, float] = {}
        for how, ours in (("alone", alone), ("packed", packed)):
            logits = [self.head(hidden_TD[-_PROBE_LOGITS:]) for hidden_TD in ours]
            pairs = [*zip(ours, stock.hidden, strict=True), *zip(logits, stock.logits, strict=True)]
            differences[how] = worst = largest(
                float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs
            )
            if not worst <= tolerance:
                types = ", ".join(sorted(set(getattr(self.config, "layer_types", None) or ["full_attention"])))
                raise BackboneRefused(
                    f"{name} gives other logits {how} than in transformers: relative difference {worst:.2g}, allowed "
                    f"{tolerance:.0e}, for samples of {lengths} tokens (layer types: {types}; {_mixers(self.model)})"
                )
        return {"embed_scale": stock.embed_scale, "lengths": lengths, "differences": differences}

    def _hidden(self, stock: _Stock, which: Sequence[int]) -> Tensor:
        """Of some of the probe's samples in a pack, with the experts that the stock model chose for them."""
        samples = [stock.samples[index] for index in which]
        lengths = tuple(len(ids) for ids in samples)
        positions = torch.cat([torch.arange(length, device=samples[0].device) for length in lengths])
        with stock.choices.again(which, lengths):
            return self(self.embed(torch.cat(samples)), positions, Flow(lengths))

    def _checkpointed(self, forward: Any) -> Any:
        # transformers checkpoints only in training mode, which a frozen backbone never is.
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self.activation_checkpointing and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            flow = current_flow()

            def again(*args: Any, **kwargs: Any) -> Any:
                with flowing(flow):
                    return forward(*args, **kwargs)

            return checkpoint(again, *args, use_reentrant=False, **kwargs)

        return run


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is NaN, which `max` may pass over."""
    return float(torch.tensor([*values], dtype=torch.float64).max())


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM without its head; some classes call themselves their decoder."""
    found = model.get_decoder()
    return found if found is not model else model.get_submodule("model")


def stock_attention(model: PreTrainedModel) -> str:
    """The attention of transformers that computes all of a model: scores in full are gigabytes for a long sample, but
    only eager attention knows caps and sinks."""
    capped = getattr(model.config, "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def load_backbone(
    source: str, *, dtype: str | None = None, revision: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Backbone, PreTrainedTokenizerBase]:
    """Opens a causal LM and its tokenizer from a folder or the hub, frozen, hashed and probed.

    `dtype` such as "bfloat16" casts the weights; by default they keep their stored dtype.

    Raises FileNotFoundError, ValueError for what cannot be read, BackboneRefused for what cannot be run.
    """
    folder = fetch(source, revision)
    stamps = _stamps(folder)
    tokenizer = load_tokenizer(folder)
    identity, remembered = _identify(folder, source, tokenizer)
    transformers.logging.disable_progress_bar()  # the hub's bar for downloads has been shown; loading is quick
    model = open_stock(folder, "auto" if dtype is None else read_dtype(dtype)).to(device)  # pyright: ignore[reportArgumentType]
    if _stamps(folder) != stamps:
        raise ValueError(f"backbone {folder}: was written to while it was opened; let what writes it finish")
    key = f"{transformers.__version__} {torch.__version__} {model.dtype} {torch.device(device).type}"
    probes = remembered["probes"]
    backbone = Backbone(model, identity, probe=probes.get(key))
    backbone.folder = folder
    backbone.revision = None if Path(source).is_dir() else folder.name  # the hub's cache names it by its commit
    for warning in backbone.stop_at(ChatTemplate(tokenizer).turn_ends(), tokenizer):
        warn(warning)
    if key not in probes:
        probes[key] = backbone.probe
        _remember(folder, remembered)
    return backbone, tokenizer


def read_dtype(given: str, key: str = "dtype") -> torch.dtype:
    """The floating-point type that a word means. Raises ConfigError for any other word."""
    found = _DTYPES.get(given.lower().removeprefix("torch."))
    if found is None:
        words = ", ".join(_DTYPES)
        raise ConfigError(f"{key} {given!r} is none that a backbone runs in; give one of {words}, or leave it out")
    return found


def fetch(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: `source` itself, or what the hub has under that id, with its `weights` or without.

    Raises FileNotFoundError, ValueError for a folder that is not as it should be, and the hub's own errors.
    """
    folder = Path(source)
    if not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"backbone {source!r}: no such folder")
        wanted = [pattern for pattern in _FILES if weights or pattern != "*.safetensors"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"backbone {folder}: no config.json; expected a folder that transformers can open")
    _check_folder(folder)
    path = folder / "config.json"
    config = read_json(path)
    check_backbone(config, f"backbone {folder}: config.json")
    _check_bounds(config, path)
    _check_read(config, path)
    return folder


def _check_bounds(config: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for sizes and numbers of layers beyond those of any model."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_bounds(value, path)
            continue
        most = _MAX_LAYERS if _LAYERS.search(key) else _MAX_WIDTH if _WIDTH.search(key) else _MAX_WHOLE
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > most:
                raise ConfigError(
                    f"{path}: {key} is {value!r:.80}, allowed {most:,} at most; copy the file again from where it came "
                    "from"
                )


def _check_read(config: Mapping[str, Any], path: Path, called: Mapping[str, str] | None = None) -> None:
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
            _check_read(value, path)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_folder(folder: Path) -> None:
    """Raises ValueError if transformers would open anything but regular files of this folder, or other weights than
    those that are hashed."""
    for path in folder.iterdir():
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"backbone {folder}: {path.name} is no regular file, or a link to nowhere; take it away")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"backbone {folder}: holds adapter_config.json, so transformers would open the model that it names; "
            "take the adapter's files away, and name the folder of the whole model"
        )
    if other := read_json(folder / "config.json").get("transformers_weights"):
        raise ValueError(
            f"backbone {folder}: transformers_weights in config.json names {other!r:.80}; take it out, and call the "
            "weights model.safetensors"
        )
    for name in sorted(shard_names(folder)):
        if any(folder.glob("*.safetensors")) and not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing; copy the whole folder, in which it holds part of the weights")


def identify(folder: Path, source: str) -> Identity:
    """What the backbone in a folder is, without loading its weights. Raises ValueError for what cannot be read."""
    return _identify(folder, source, load_tokenizer(folder))[0]


def open_stock(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """The causal LM of a folder as transformers has it, with eager attention. Raises OSError, ValueError."""
    config = read_config(folder)
    # Some released configs name flash attention. Where that is not installed, its kernel would be fetched. What
    # config.json says wins over an argument, but not over the config's own attribute.
    config._attn_implementation = "eager"
    model, about = _opened(
        AutoModelForCausalLM, folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(about["missing_keys"]):
        raise ValueError(
            f"backbone {folder}: its weights lack {len(missing)} tensors that config.json asks for, such as "
            f"{missing[0]}, and transformers would make them up; copy the whole folder again"
        )
    return model


def read_config(folder: Path) -> Any:
    """The config of a folder as transformers has it. Raises OSError, ValueError."""
    config = _opened(AutoConfig, folder)
    _check_read(config.to_dict(), folder / "config.json", config.attribute_map)
    return config


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
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{where}: transformers cannot open it ({told:.300}); is it whole, and made for this version of it?"
        ) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises OSError, ValueError for what is damaged or has no chat template."""
    tokenizer = _opened(AutoTokenizer, folder)
    if tokenizer.chat_template is None:
        raise ValueError(f"backbone {folder}: its tokenizer has no chat template; add one (chat_template.jinja)")
    if not _is_number(tokenizer.model_max_length):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: model_max_length is {tokenizer.model_max_length!r:.80}, expected a "
            "number; copy the file again from where it came from"
        )
    return tokenizer


def weights_hash(folder: Path) -> str:
    """SHA-256 over the sorted (name, dtype, shape, SHA-256 of the bytes) of a folder's safetensors.

    Raises ValueError if the folder has none.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(
            f"{folder}: no .safetensors weights (molora reads no pickles); save the model with safetensors"
        )
    lines = []
    for shard in shards:
        with TensorFile(shard) as file:
            for name, digest in file.hashes():
                entry = file.entries[name]
                lines.append(f"{name} {entry.dtype} {[*entry.shape]} {digest}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _stamps(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Of the files that decide about logits."""
    folder = folder.resolve()
    return stamps([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _memory(folder: Path) -> Path:
    """Where hashes and probe results of this folder's present files are remembered."""
    key = _digest([str(folder.resolve()), _stamps(folder), FORMAT_VERSION])
    return cache_folder() / "backbones" / f"{key}.json"


def _remember(folder: Path, value: Mapping[str, Any]) -> None:
    write_cached(_memory(folder), lambda path: path.write_text(json.dumps(value, indent=2), encoding="utf-8"))


def _remembered(folder: Path) -> dict[str, Any]:
    """The hash of the weights and the results of probes; a file of the cache that is damaged is made anew."""
    found = read_cached_json(_memory(folder)) or {}
    weights, probes = found.get("weights"), found.get("probes")
    if not (isinstance(weights, str) and re.fullmatch("[0-9a-f]{64}", weights) and isinstance(probes, dict)):
        time.sleep(_TICK_SECONDS)  # so that a write from now on has another time
        return {"weights": weights_hash(folder), "probes": {}}
    return {"weights": weights, "probes": {key: probe for key, probe in probes.items() if _is_probe(probe)}}


def _is_probe(probe: object) -> bool:
    scale = probe.get("embed_scale") if isinstance(probe, dict) else None
    return isinstance(scale, float) and math.isfinite(scale)


def _settings(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a model that its logits depend on."""
    for key, value in config.items():
        if not _SILENT.fullmatch(str(key)):
            if isinstance(value, Mapping):
                yield from _settings(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", value


def _identify(folder: Path, source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Identity, dict[str, Any]]:
    remembered = _remembered(folder)
    config = read_json(folder / "config.json")
    whole = read_config(folder).to_dict()
    rope_keys = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    identity = Identity(
        source=source,
        weights=remembered["weights"],
        rope=_digest({key: config.get(key) for key in rope_keys}),
        tokenizer=_digest(vocabulary),
        template=_digest(tokenizer.chat_template),
        settings=json.loads(json.dumps(dict(_settings(whole)), default=str)),
    )
    return identity, remembered


@dataclass(frozen=True)
class _Stock:
    """What transformers itself gives on the probe's samples."""

    samples: list[Tensor]
    hidden: list[Tensor]
    logits: list[Tensor]
    choices: Choices
    embed_scale: float


@torch.no_grad()
def _run_stock(model: PreTrainedModel) -> _Stock:
    """Runs the probe's samples one by one through the untouched model. Raises BackboneRefused."""
    name = type(model).__name__
    layers = decoder_layers(model)
    if getattr(model, "_is_stateful", False):
        raise BackboneRefused(f"{name} keeps a recurrent state ({_mixers(model)}), which samples in a pack would share")
    if not model._can_set_attn_implementation() or not layers:
        raise BackboneRefused(
            f"{name} has attention code of its own ({_mixers(model)}) instead of transformers' attention interface, so "
            "samples in a pack could see each other"
        )
    generator = torch.Generator().manual_seed(0)
    samples = [
        torch.randint(model.config.vocab_size, (length,), generator=generator).to(model.device)
        for length in _probe_lengths(model.config)
    ]
    entered: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden: list[Tensor] = []

    def keep_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0][0])
        return (args[0][:, -_PROBE_LOGITS:],)

    head: Any = model.get_output_embeddings()
    head_hook = head.register_forward_pre_hook(keep_last)
    model.set_attn_implementation(stock_attention(model))
    choices = Choices(model)
    with choices.keeping():
        logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples]
    hook.remove()
    head_hook.remove()
    scale = _embed_scale(name, model.get_input_embeddings()(samples[0]), entered[0][0])
    return _Stock(samples, hidden, logits, choices, scale)


def _mixers(model: nn.Module) -> str:
    names = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in names if "Attention" in name or "Mixer" in name))


def _probe_lengths(config: Any) -> tuple[int, ...]:
    """A few tokens, something in between, and more than every window and RoPE switch that fits."""
    edges = [getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        edges.append(parameters.get("original_max_position_embeddings"))
    limit = min(config.max_position_embeddings, _PROBE_TOKENS)
    longest = max([edge + 9 for edge in edges if edge and edge + 9 <= limit], default=min(limit, 40))
    return tuple(sorted({min(5, limit), max(1, longest // 2), longest}))


def _embed_scale(name: str, embedded_TD: Tensor, entered_TD: Tensor) -> float:
    """The factor between the embedding module's output and what the first layer receives."""
    scale = float((entered_TD.double() * embedded_TD.double()).sum() / embedded_TD.double().square().sum())
    if not torch.allclose(entered_TD, embedded_TD * scale, rtol=1e-2, atol=1e-4):
        raise BackboneRefused(f"{name} transforms its input embeddings before the first layer by more than a factor")
    return 1.0 if torch.equal(entered_TD, embedded_TD) else scale
