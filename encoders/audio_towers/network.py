"""A pretrained network of transformers that hears, before its weights.

Letters: L samples, S steps (of features in `features`, of the network elsewhere), M features of a step, C width,
N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from molora.encoders.pretrained_files import check_keys, check_sizes, read_json, weight_files
from molora.encoders.sound import SAMPLE_RATE_HZ

# The extractors' filters and windows take memory as soon as they are made. Beyond any of theirs.
_MOST_FEATURES = {
    **{"feature_size": 1024, "num_mel_bins": 1024, "n_fft": 8192, "win_length": 8192, "hop_length": 8192},
    **{"chunk_length": 120, "stride": 64},
}


class Classes(NamedTuple):
    """The classes of transformers that make a network's sizes, its features, and itself."""

    sizes: Any
    extractor: Any
    model: Any


class Network:
    """A network without its weights: its sizes, how it hears, and how its weights are stored.

    `arguments` and `sound` are all that tells it from another of its kind; `sizes` has only the blocks that are kept.
    """

    model_types: ClassVar[tuple[str, ...]]
    size_keys: ClassVar[tuple[str, ...]]
    sound_keys: ClassVar[tuple[str, ...]]
    fixed: ClassVar[dict[str, Any]] = {}
    depth_key: ClassVar[str] = "num_hidden_layers"
    # Where the encoder is in a checkpoint, first match first; its blocks; and what is stored there and not wanted.
    prefixes: ClassVar[tuple[str, ...]]
    blocks: ClassVar[str] = "layers."
    unused: ClassVar[tuple[str, ...]] = ()

    window_steps: int

    def __init__(self, arguments: dict[str, Any], sound: dict[str, Any], layer: int | None) -> None:
        from huggingface_hub.errors import StrictDataclassError

        classes = self.classes()
        check_keys("arguments", classes.sizes.__name__, arguments, self.size_keys)
        check_keys("features", classes.extractor.__name__, sound, self.sound_keys)
        check_sizes("arguments", arguments)
        for key, value in sound.items():
            most = _MOST_FEATURES.get(key)
            if most is not None and not (type(value) is int and 1 <= value <= most):
                raise ValueError(f"features: {key} is {value!r:.80}, expected a whole number from 1 to {most}")
        try:
            self.sizes: Any = classes.sizes(**arguments, **self.fixed)
        except StrictDataclassError as error:
            raise ValueError(f"arguments: {classes.sizes.__name__} refuses them: {error}") from error
        self.extractor: Any = classes.extractor(**sound)
        self.arguments = {key: getattr(self.sizes, key) for key in self.size_keys}
        self.sound = {key: getattr(self.extractor, key) for key in self.sound_keys}
        self.layer = layer
        self.depth = getattr(self.sizes, self.depth_key)
        if layer is not None:
            if not -self.depth <= layer:
                raise ValueError(f"layer {layer} asked for, but the network has {self.depth} blocks")
            setattr(self.sizes, self.depth_key, self.depth + layer + 1)
        width, heads = self.sizes.hidden_size, self.sizes.num_attention_heads
        if width % heads:
            raise ValueError(f"arguments: a width of {width} is not a multiple of {heads} attention heads")
        self._check()

    @classmethod
    def classes(cls) -> Classes:
        """What it is made of in transformers."""
        raise NotImplementedError

    def _check(self) -> None:
        """Raises ValueError if sizes and features do not go together."""
        raise NotImplementedError

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip, before pooling."""
        raise NotImplementedError

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """What the network reads, as features_SM."""
        raise NotImplementedError

    def frames(self, model: Any, features_NSM: Tensor) -> Tensor:
        """Runs windows of one length; returns frames_NSC."""
        return model(features_NSM).last_hidden_state

    def build(self) -> nn.Module:
        """The network with random weights."""
        return self._finish(self.classes().model(self.sizes))

    def load(self, folder: Path) -> nn.Module:
        """The network with the weights of a folder, in fp32. Raises ValueError if some are missing or do not fit."""
        kept = getattr(self.sizes, self.depth_key)
        unused = (*self.unused, *(f"{self.blocks}{index}." for index in range(kept, self.depth)))
        state = _read_weights(folder, self.prefixes, unused)
        model, report = self.classes().model.from_pretrained(
            None,
            config=self.sizes,
            state_dict=state,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # so that the report names them
            output_loading_info=True,
            trust_remote_code=False,
        )
        kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
        found = {kind: sorted(report[keys]) for kind, keys in kinds.items()}
        if any(found.values()):
            counts = ", ".join(f"{len(keys)} {kind} (such as {keys[:3]})" for kind, keys in found.items() if keys)
            raise ValueError(f"{folder}: not the weights of this network: {counts}")
        return self._finish(model)

    def _finish(self, model: Any) -> nn.Module:
        return model

    def _extract(self, wave_L: Tensor, **options: Any) -> Tensor:
        inputs = self.extractor(wave_L.numpy(), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", **options)
        return inputs["input_features"][0]


def check_bins(reads: int, made: int) -> None:
    if reads != made:
        raise ValueError(f"the network reads {reads} features a step, its feature extractor makes {made}")


def read_sizes(folder: Path, kind: type[Network]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a folder says of its network and of its feature extractor, reduced to what matters to the encoder."""
    found = read_json(folder / "config.json")
    if found.get("model_type") not in kind.model_types:
        raise ValueError(
            f"{folder / 'config.json'}: holds a {found.get('model_type')} model, "
            f"this architecture takes {' or '.join(kind.model_types)}"
        )
    found = found.get("encoder_config", found)
    if (found.get("subsampling_conv_kernel_size", 3), found.get("subsampling_conv_stride", 2)) != (3, 2):
        raise ValueError(f"{folder / 'config.json'}: only a subsampling with kernel 3 and stride 2 can be counted")
    sound, extractor = _read_sound(folder), kind.classes().extractor.__name__
    made_by = sound.get("feature_extractor_type", extractor)
    if made_by != extractor or sound.get("sampling_rate", SAMPLE_RATE_HZ) != SAMPLE_RATE_HZ:
        raise ValueError(
            f"{folder}: its features are made by {made_by} at {sound.get('sampling_rate')} Hz, "
            f"expected {extractor} at {SAMPLE_RATE_HZ} Hz"
        )
    return (
        {key: found[key] for key in kind.size_keys if key in found},
        {key: sound[key] for key in kind.sound_keys if key in sound},
    )


def _read_sound(folder: Path) -> dict[str, Any]:
    """The feature extractor's description: in a file of its own, or in that of the processor it belongs to."""
    if (folder / "processor_config.json").is_file():
        found = read_json(folder / "processor_config.json")
        if "feature_extractor" in found:
            return found["feature_extractor"]
    return read_json(folder / "preprocessor_config.json")


def _read_weights(folder: Path, prefixes: Sequence[str], unused: tuple[str, ...]) -> dict[str, Tensor]:
    """The encoder's tensors in a folder, under the encoder's own names; others are not read."""
    from safetensors import safe_open

    where: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    prefix = next(prefix for prefix in prefixes if any(key.startswith(prefix) for key in where) or not prefix)
    state: dict[str, Tensor] = {}
    for path in dict.fromkeys(where.values()):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping, though it has keys
                if key.startswith(prefix) and not key.removeprefix(prefix).startswith(unused):
                    state[key.removeprefix(prefix)] = file.get_tensor(key)
    return state
