"""What a backbone is: hashes of its weights, rotary settings, tokenizer and template, and the settings of its config.

Hashes of weights and results of the probe are remembered in the cache, by the files that gave them.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from molora.model.quantization import Quantization
from molora.received import TensorFile, read_json, stamps
from molora.storage import cache_folder, read_cached_json, write_cached

FORMAT_VERSION = 2
# Settings in config.json that no logit depends on, or that have a hash of their own.
_SILENT = re.compile(
    r"_.*|architectures|auto_map|transformers_version|(torch_)?dtype|use_cache|.*dropout.*|.*pdrop|.*_token_ids?|"
    r"initializer_range|id2label|label2id|problem_type|tokenizer_class|return_dict|output_.*|chunk_size_feed_forward|"
    r"router_aux_loss_coef|gradient_checkpointing|rope_.*|partial_rotary_factor|original_max_position_embeddings",
    re.DOTALL,  # each "dropout" of a long name would be tried if the rest could hold no line break
)
_HASHED = {"weights": "other backbone weights", "rope": "another RoPE configuration", "tokenizer": "another tokenizer"}
# By how much the loss of answers was higher than on the quantization that was trained on, for that and the other one.
# Measured once, on SmolLM2-135M and easy-VQA; EXPERIMENTS.md says how.
_HIGHER_LOSS = {("nf4", "none"): "7 %", ("none", "nf4"): "13 %"}
# File systems tell times apart that are as far apart as this.
_TICK_SECONDS = 0.02


@dataclass(frozen=True)
class Identity:
    """What a modality was trained on. Other weights, settings or another tokenizer are another backbone. `settings` are
    those of config.json that logits depend on, with the defaults of those that it leaves out, by name; those of inner
    configs have a dot. What only one of two versions of transformers knows is not compared. The hash of the weights is
    that of the stored tensors; `quantization` is how they run, and another one is the same backbone."""

    source: str
    weights: str
    rope: str
    tokenizer: str
    template: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantization: Quantization = "none"

    def check(self, other: Mapping[str, Any], where: str) -> list[str]:
        """Compares with an identity recorded in the file `where`; returns what to warn of, without that name. Raises
        ValueError for another backbone."""
        for key, what in _HASHED.items():
            if other.get(key) != getattr(self, key):
                raise ValueError(
                    f"{where}: trained with {what} ({key} hash {other.get(key)!s:.12}, source "
                    f"{other.get('source')!r:.200}) than the backbone given has ({getattr(self, key)[:12]}, source "
                    f"{self.source!r}); load it on the backbone it was trained on"
                )
        settings = other.get("settings")  # which folders of older versions lack
        then, now = settings if isinstance(settings, Mapping) else {}, self.settings
        other_keys = (key for key in sorted(then.keys() & now.keys()) if then[key] != now[key])
        if changed := [f"{key} was {then[key]!r:.80}, is {now[key]!r:.80}" for key in other_keys]:
            raise ValueError(
                f"{where}: trained with other settings in the backbone's config.json than {self.source!r} has: "
                f"{'; '.join(changed[:8])}; put them back, or load it on the backbone it was trained on"
            )
        warnings = []
        if other.get("template") != self.template:
            warnings.append("trained with another chat template; answers may suffer")
        if (then := str(other.get("quantization", "none"))) != self.quantization:
            higher = _HIGHER_LOSS.get((then, self.quantization))
            suffer = "answers may suffer" if higher is None else f"in a trial the loss of answers was {higher} higher"
            told = f"trained on a backbone with quantization {then:.80}, and this one has {self.quantization}"
            warnings.append(f"{told}; {suffer}")
        return warnings


def weights_hash(folder: Path) -> str:
    """SHA-256 over the sorted (name, dtype, shape, SHA-256 of the bytes) of a folder's safetensors. Raises ValueError
    if the folder has none."""
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


def describe(
    folder: Path, source: str, tokenizer: PreTrainedTokenizerBase, whole: PretrainedConfig
) -> tuple[Identity, dict[str, Any]]:
    """The identity of the backbone in a folder, and what is remembered of it. `whole` is its config with defaults."""
    remembered = _remembered(folder)
    config = read_json(folder / "config.json")
    rope_keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    identity = Identity(
        source=source,
        weights=remembered["weights"],
        rope=_digest({key: config.get(key) for key in (*rope_keys, "original_max_position_embeddings")}),
        tokenizer=_digest(vocabulary),
        template=_digest(tokenizer.chat_template),
        settings=json.loads(json.dumps(dict(_settings(whole.to_dict())), default=str)),
    )
    return identity, remembered


def weight_stamps(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """Of the files that decide about logits."""
    folder = folder.resolve()
    return stamps([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _memory(folder: Path) -> Path:
    """Where hashes and probe results of this folder's present files are remembered."""
    key = _digest([str(folder.resolve()), weight_stamps(folder), FORMAT_VERSION])
    return cache_folder() / "backbones" / f"{key}.json"


def remember(folder: Path, value: Mapping[str, Any]) -> None:
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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
