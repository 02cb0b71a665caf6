"""Routed LoRA: PEFT's LoRA layers, with a forward that gives every token of a pack its own adapter.

PEFT injects, initialises, names, saves and loads; only the forward is ours.

Letters: T tokens in a pack or slice, D input width, O output width, R rank, E adapters.
"""

import hashlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from molora.config import ConfigError, did_you_mean
from molora.model.experts import untargetable
from molora.received import MAX_JSON_BYTES, check_hash, is_number, parse_json, read_bytes
from molora.routing import Slice, current_flow
from molora.storage import check_shapes

# PEFT writes a model's adapter tensors under this prefix, whatever the model.
_PREFIX = "base_model.model."
# Initialisations that keep the backbone's weights as they are; the others subtract the adapter from them.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")
_REFUSED = {
    "bias": ("none", "trains the frozen backbone's biases"),
    "modules_to_save": (None, "trains copies of frozen layers"),
    "lora_bias": (False, "a bias has no routed form"),
    "target_parameters": (None, "fused expert weights have no routed form"),
    "trainable_token_indices": (None, "trains the frozen embedding"),
    "layer_replication": (None, "changes the backbone"),
    "megatron_config": (None, "names a module to import"),
}
# What PEFT writes for its own way of opening a model, which is not molora's.
_OF_PEFT_ALONE = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("task_type", "peft_version", "runtime_config"),
)
_MAX_TARGETS = 4096
_MAX_PATTERN_LENGTH = 4096
_FEW = 100
# A higher one is allowed where a layer's smaller width is.
_MAX_RANK = 1024
_MAX_MATCHING_SECONDS = 2
# Tries patterns as PEFT does, in a process of its own, as nothing else stops one that takes for ever.
_MATCH = """
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
patterns, keys, names, linear = json.load(sys.stdin)
for pattern in patterns + keys:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        sys.exit(f"{pattern!r:.200} is no regular expression: {error}")
for name in names:
    for pattern in patterns:
        re.fullmatch(pattern, name)
for name in linear:
    for key in keys:
        re.match(rf"(.*\\.)?({key})$", name)
"""


class _Share(NamedTuple):
    """One adapter's share in the output of a layer, for the tokens of a slice. `kept_TD` is what dropout keeps of the
    adapter's input, scaled."""

    adapter: str
    tokens: slice
    scaling: float
    a_RD: Tensor
    b_OR: Tensor
    gates_T1: Tensor | None
    kept_TD: Tensor | None


def _add_shares(out: Tensor, x: Tensor, shares: Sequence[_Share]) -> tuple[Tensor, list[Tensor]]:
    """Adds every adapter's share to a frozen layer's output (…, T, O) of x (…, T, D), in place; returns with it each
    share's input in the adapter's rank (T, R), before gates."""
    x_TD, out_TO = x.flatten(0, -2), out.flatten(0, -2)
    lows = []
    for share in shares:
        low_TR = F.linear(_kept(x_TD, share), share.a_RD)
        lows.append(low_TR)
        gated_TR = low_TR if share.gates_T1 is None else low_TR * share.gates_T1.to(low_TR.dtype)
        out_TO[share.tokens].addmm_(gated_TR, share.b_OR.T, alpha=share.scaling)
    return out, lows


def _kept(x_TD: Tensor, share: _Share) -> Tensor:
    """An adapter's input: its tokens, less what dropout takes."""
    return x_TD[share.tokens] if share.kept_TD is None else x_TD[share.tokens] * share.kept_TD


class _AddAdapters(torch.autograd.Function):
    """`_add_shares` with its gradients: no copy of the layer's output and none of its gradient, whatever the slices."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, shares: list[_Share], *learned: Tensor | None) -> Tensor:
        """`learned` are A, B and gates of every share in turn, as their gradients are wanted."""
        out, lows = _add_shares(out, x, shares)
        # What a share keeps of its input is large: only saved tensors are let go by activation checkpointing.
        ctx.save_for_backward(x, *lows, *(share.kept_TD for share in shares))
        ctx.shares = [share._replace(kept_TD=None) for share in shares]
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in learned]
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *saved = ctx.saved_tensors
        count = len(ctx.shares)
        of_x = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        of_learned: list[Tensor | None] = []
        for index, (share, low_TR, kept_TD) in enumerate(zip(ctx.shares, saved[:count], saved[count:], strict=True)):
            of_a, of_b, _ = ctx.needs_input_grad[3 + 3 * index : 6 + 3 * index]
            of_out_TO = gradient.flatten(0, -2)[share.tokens]
            of_low_TR = of_gated_TR = of_out_TO @ share.b_OR * share.scaling
            gated_TR, of_gates_T1 = low_TR, None
            if share.gates_T1 is not None:
                gates_T1 = share.gates_T1.to(low_TR.dtype)
                of_low_TR, gated_TR = of_gated_TR * gates_T1, low_TR * gates_T1
                of_gates_T1 = (of_gated_TR * low_TR).sum(1, keepdim=True)
            x_TD = _kept(x.flatten(0, -2), share._replace(kept_TD=kept_TD))
            of_learned.append(of_low_TR.T @ x_TD if of_a else None)
            of_learned.append(of_out_TO.T @ gated_TR * share.scaling if of_b else None)
            of_learned.append(of_gates_T1)
            if of_x is not None:
                of_x_TD = of_x.flatten(0, -2)[share.tokens]
                if kept_TD is None:
                    of_x_TD.addmm_(of_low_TR, share.a_RD)
                else:
                    of_x_TD.addcmul_(of_low_TR @ share.a_RD, kept_TD)
        cast = [None if g is None else g.to(dtype) for g, dtype in zip(of_learned, ctx.dtypes, strict=True)]
        return gradient, of_x, None, *cast


class RoutedLinear(LoraLinear):
    """A frozen linear layer with several adapters, of which each slice of a pack uses those its routing names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By adapter and dtype: which weights were cast, and their casts.
        self._casts: dict[tuple[str, torch.dtype], tuple[Any, Tensor, Tensor]] = {}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (…, T, D) to (…, T, O); tokens of a bare slice get exactly what the frozen layer gives."""
        flow = current_flow()
        if flow is None:
            raise RuntimeError("a routed layer ran outside a molora forward: no routing says which adapter to use")
        out = self.base_layer(x)
        routing = flow.routing
        if routing is None or not any(name in self.lora_A for piece in routing.slices for name in piece.adapters):
            return out
        if (num_tokens := x.shape[:-1].numel()) != routing.slices[-1].stop:
            told = f"a routed layer received {num_tokens} tokens but the pack has {routing.slices[-1].stop}"
            raise RuntimeError(f"{told}: layers that regroup tokens (such as experts) cannot carry routed adapters")
        shares = [share for piece in routing.slices for share in self._shares(piece, x)]
        if not torch.is_grad_enabled():
            return _add_shares(out, x, shares)[0]
        learned = [tensor for share in shares for tensor in self._learned(share)]
        return _AddAdapters.apply(out, x, shares, *learned)  # pyright: ignore[reportReturnType]

    def _shares(self, piece: Slice, x: Tensor) -> Iterator[_Share]:
        """What each adapter of a slice does in this layer."""
        for index, name in enumerate(piece.adapters):
            if name in self.lora_A:
                tokens = slice(piece.start, piece.stop)
                drop: Any = self.lora_dropout[name]
                kept_TD = None
                if drop.training and isinstance(drop, nn.Dropout):
                    kept_TD = drop(x.new_ones(piece.stop - piece.start, x.shape[-1]))
                gates_T1 = None if piece.weights_TE is None else piece.weights_TE[:, index, None]
                yield _Share(name, tokens, self.scaling[name], *self.adapter_weights(name, x.dtype), gates_T1, kept_TD)

    def _learned(self, share: _Share) -> tuple[Tensor, Tensor, Tensor | None]:
        """What may have a gradient of a share: A (R, D) and B (O, R) as they are stored, and its gates (T, 1)."""
        sides: Any = self.lora_A, self.lora_B
        return sides[0][share.adapter].weight, sides[1][share.adapter].weight, share.gates_T1

    def adapter_weights(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, D) and B (O, R) of an adapter, without a graph; casts are kept until the weights change."""
        sides: Any = self.lora_A, self.lora_B
        a_RD, b_OR = (side[name].weight.detach() for side in sides)
        if a_RD.dtype == dtype:
            return a_RD, b_OR
        state = [(weight.untyped_storage(), weight._version) for weight in (a_RD, b_OR)]
        if self._casts.get((name, dtype), (None,))[0] != state:
            self._casts[name, dtype] = state, a_RD.to(dtype), b_OR.to(dtype)
        return self._casts[name, dtype][1:]

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("adapters of a routed model cannot be merged: each sample needs its own")

    unmerge = merge

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            raise RuntimeError("adapters of a routed model cannot be disabled globally: route samples to none instead")


def lora_config(options: Mapping[str, Any], where: str) -> LoraConfig:
    """Reads PEFT's LoraConfig options, refusing what routing cannot honour. Raises ConfigError."""
    known = LoraConfig.__dataclass_fields__
    for key in options:
        if key not in known:
            raise ConfigError(f"{where}.{key}: {did_you_mean(key, known)}PEFT's LoraConfig has no such option")
    return _config(options, where)


def _config(options: Mapping[str, Any], where: str) -> LoraConfig:
    if not options.get("target_modules"):
        raise ConfigError(f"{where}.target_modules: missing; name the backbone's linear layers to adapt")
    _check_values(options, where)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # of PEFT, about what is refused below
            config = LoraConfig(**{**options, "task_type": "CAUSAL_LM"})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise ConfigError(f"{where}: PEFT refuses these options: {error}") from error
    check_config(config, where)
    return config


def _check_values(options: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for numbers out of bounds, names that are none, and lists and patterns that are too long."""

    def rank(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def names(value: object) -> bool:
        some = [value] if isinstance(value, str) else value
        return (
            isinstance(some, (list, tuple, set))
            and len(some) <= _MAX_TARGETS
            and all(isinstance(name, str) and 0 < len(name) <= _MAX_PATTERN_LENGTH for name in some)
        )

    def by_name(value: object, valid: Callable[[object], bool]) -> bool:
        return isinstance(value, Mapping) and (not value or names([*value])) and all(map(valid, value.values()))

    def layers(value: object) -> bool:
        some = [value] if isinstance(value, int) else value
        return isinstance(some, (list, tuple)) and len(some) <= _MAX_TARGETS and all(isinstance(n, int) for n in some)

    several = f"one pattern or a list of names, at most {_MAX_TARGETS} of at most {_MAX_PATTERN_LENGTH} characters"
    numbers = f"numbers by name; names as {several}"
    words = "the name of the list of layers, such as layers"
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (rank, "a whole number over 0"),
        "lora_alpha": (is_number, "a finite number"),
        "lora_dropout": (lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
        "target_modules": (lambda value: not value or names(value), several),
        "exclude_modules": (lambda value: not value or names(value), several),
        "rank_pattern": (lambda value: by_name(value, rank), numbers),
        "alpha_pattern": (lambda value: by_name(value, is_number), numbers),
        "layers_pattern": (lambda value: not value or (names(value) and not re.search(r"\W", "".join(value))), words),
        "layers_to_transform": (layers, f"at most {_MAX_TARGETS} whole numbers"),
    }
    for key, (fits, what) in checks.items():
        if options.get(key) is not None and not fits(options[key]):
            raise ConfigError(f"{where}.{key}: {options[key]!r:.80} is refused; write {what}")


def _check_patterns(config: LoraConfig, layers: list[str], linear: list[str], where: str) -> None:
    """Tries every regular expression on the layers' names. Raises ConfigError for one that is none or never ends."""
    whole = [config.target_modules, config.exclude_modules]
    patterns = [pattern for pattern in whole if isinstance(pattern, str) and pattern]
    keys = sorted({*(config.rank_pattern or ()), *(config.alpha_pattern or ())})
    if not patterns and len(keys) < _FEW and all(re.fullmatch(r"[\w.]+", key) for key in keys):
        return
    command = [sys.executable, "-I", "-S", "-c", _MATCH, str(_MAX_MATCHING_SECONDS)]
    given = json.dumps([patterns, keys, layers, linear])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        written = ", ".join(map(repr, [*patterns, *keys]))
        why = f"{written:.200}: matching the backbone's layers takes over {_MAX_MATCHING_SECONDS} s; name the layers"
        if done.returncode == 1:  # it could say why
            why = (done.stderr.strip().splitlines() or [why])[-1]
        raise ConfigError(f"{where}: a pattern of target_modules, exclude_modules or rank_pattern is refused: {why}")


def _check_rank(config: LoraConfig, path: str, layer: nn.Linear, where: str) -> None:
    """Raises ConfigError for a rank whose matrices would be larger than any use, before they take memory."""
    ranks = config.rank_pattern or {}
    rank = ranks.get(get_pattern_key([*ranks], path), config.r)
    most = max(min(layer.in_features, layer.out_features), _MAX_RANK)
    if rank > most:
        raise ConfigError(f"{where}.r: rank {rank} at {path}, allowed {most} there; lower r, or rank_pattern")


def check_config(config: LoraConfig, where: str) -> None:
    """Raises ConfigError for variants of LoRA that have no routed form or would change the backbone."""
    for key, (harmless, why) in _REFUSED.items():
        value = getattr(config, key, harmless)
        if value != harmless and value:
            raise ConfigError(f"{where}.{key}: {value!r} is refused: {why}")
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ConfigError(
            f"{where}.init_lora_weights: {config.init_lora_weights!r} is refused, since it changes the frozen weights "
            f"or needs data; use one of {list(_INITIALISATIONS)}"
        )
    for name, field in LoraConfig.__dataclass_fields__.items():
        if field.metadata.get("is_lora_variant") and getattr(config, name):
            raise ConfigError(f"{where}.{name}: this LoRA variant has no routed form")


def inject(model: nn.Module, name: str, config: LoraConfig, where: str) -> None:
    """Adds adapter `name` to a frozen causal LM in place; its parameters are fp32. Raises ConfigError when a target
    hits no linear layer or hits one that cannot be routed."""
    given = config.target_modules
    targets = given if isinstance(given, str) else sorted(given or ())
    layers = {path: _base(module) for path, module in model.named_modules()}
    head = _base(model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    mixture = untargetable(model)
    linear = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}
    fit = (path for path, layer in linear.items() if layer is not head and path not in mixture)
    here = sorted({path.rsplit(".", 1)[-1] for path in fit})
    _check_patterns(config, [*layers], [*linear], where)
    every_linear = str(targets).lower() == "all-linear"
    for path, layer in linear.items():
        if (every_linear and layer is not head) or check_target_module_exists(config, path):
            _check_rank(config, path, layer, where)
    for path, what in mixture.items():
        if (every_linear and path in linear) or check_target_module_exists(config, path):
            raise ConfigError(
                f"{where}.target_modules: {targets!r} hits {path}, {what} of a mixture of experts, which cannot carry "
                f"a routed adapter; target attention only; linear layers here: {here}"
            )
    config._register_custom_module({nn.Linear: RoutedLinear})
    try:
        with warnings.catch_warnings():
            # Several adapters on one model are the point here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, model, adapter_name=name)
    except ValueError as error:
        raise ConfigError(f"{where}.target_modules: {targets!r} hits nothing; linear layers here: {here}") from error
    hit = {path: module for path, module in model.named_modules() if name in getattr(module, "lora_A", ())}
    if isinstance(targets, list):
        missed = [t for t in targets if not any(path == t or path.endswith(f".{t}") for path in hit)]
        if missed:
            raise ConfigError(f"{where}.target_modules: {missed} hit no layer; linear layers here: {here}")
    for path, module in model.named_modules():
        layer = _base(module)
        if isinstance(module, LoraLayer) and (layer is head or not isinstance(module, RoutedLinear)):
            kind = "the output head" if layer is head else type(layer).__name__
            raise ConfigError(f"{where}.target_modules: {path} is {kind}, which cannot carry a routed adapter")
    for parameter in adapter_parameters(model, name).values():
        parameter.data = parameter.data.float()


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under PEFT's file names without the prefix: `….q_proj.lora_A.weight`."""
    return {
        f"{path}.{side}.weight": getattr(module, side)[name].weight
        for path, module in model.named_modules()
        if isinstance(module, RoutedLinear) and name in module.lora_A
        for side in ("lora_A", "lora_B")
    }


def set_dropout(model: nn.Module, training: bool) -> None:
    """Adapters' dropout is the only thing inside the backbone that knows training from evaluation."""
    for module in model.modules():
        if isinstance(module, RoutedLinear):
            module.lora_dropout.train(training)


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of `adapter_model.safetensors` as PEFT names them."""
    return {_PREFIX + path: p.detach() for path, p in adapter_parameters(model, name).items()}


def adapter_json(config: LoraConfig, base_model: str) -> str:
    """The text of `adapter_config.json`; `base_model` is the backbone's hub id or folder."""
    values = {**config.to_dict(), "base_model_name_or_path": base_model, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return json.dumps(plain, indent=2, sort_keys=True)


def read_adapter(folder: Path, sha256: str | None = None, listed: Path | None = None) -> LoraConfig:
    """Reads `adapter_config.json`, as PEFT or molora wrote it, with the hash that `listed` gives it. Raises ConfigError
    or ValueError."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; is {folder} an adapter folder?")
    data = read_bytes(path, MAX_JSON_BYTES, folder)
    if sha256 is not None:
        check_hash(hashlib.sha256(data).hexdigest(), sha256, path, listed or path)
    options = parse_json(data, str(path))
    kind = options.pop("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type is {kind!r:.80}, expected LORA")
    # Another version of PEFT may write what this one does not know; that is harmless only where it is off.
    for key in sorted(options.keys() - LoraConfig.__dataclass_fields__.keys()):
        if options.pop(key):
            told = f"{path}.{key}: this PEFT's LoraConfig has no such option"
            raise ConfigError(f"{told}; upgrade peft, or take it out if no output depends on it")
    options = {key: value for key, value in options.items() if key not in _OF_PEFT_ALONE}
    config = _config(options, str(path))
    config.inference_mode = False
    return config


def load_exactly(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies `tensors` into `parameters` of the same names and shapes. Raises ValueError listing every difference."""
    found, expected = ({key: tensor.shape for key, tensor in side.items()} for side in (tensors, parameters))
    check_shapes(found, expected, where)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
