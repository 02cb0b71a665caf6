"""What a pretrained audio network has to say of itself before its weights are there.

Letters: L samples, S steps (of features in `features`, of the network elsewhere), M features of a step, C width,
N windows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from molora.encoders.pretrained_files import check_options, load_transformers, num_kept, read_json, read_weights
from molora.encoders.sound import SAMPLE_RATE_HZ

# The extractors' filters and windows take memory as soon as they are made. Beyond any of theirs.
_MOST_FEATURES = {
    **{"feature_size": 1024, "num_mel_bins": 1024, "n_fft": 8192, "win_length": 8192, "hop_length": 8192},
    **{"chunk_length": 120, "stride": 64},
}


class Network:
    """A network without its weights: its sizes, how its features are made, and how its weights are stored. `arguments`
    and `feature_options` are all that tells it from another of its kind; `sizes` has only the blocks that are kept."""

    model_types: ClassVar[tuple[str, ...]]
    size_keys: ClassVar[tuple[str, ...]]
    feature_keys: ClassVar[tuple[str, ...]]
    fixed: ClassVar[dict[str, Any]] = {}
    depth_key: ClassVar[str] = "num_hidden_layers"
    # Where the encoder is in a checkpoint, first match first; its blocks; and what is stored there and not wanted.
    prefixes: ClassVar[tuple[str, ...]]
    blocks: ClassVar[str] = "layers."
    unused: ClassVar[tuple[str, ...]] = ()

    window_steps: int

    def __init__(self, arguments: dict[str, Any], features: dict[str, Any], layer: int | None) -> None:
        from huggingface_hub.errors import StrictDataclassError

        sizes_type, extractor_type, _ = self.types()
        check_options("arguments", sizes_type.__name__, arguments, self.size_keys)
        for key, most in _MOST_FEATURES.items():
            if key in features and not (type(value := features[key]) is int and 1 <= value <= most):
                raise ValueError(f"features: {key} is {value!r:.80}, expected a whole number from 1 to {most}")
        check_options("features", extractor_type.__name__, features, self.feature_keys)
        try:
            self.sizes: Any = sizes_type(**arguments, **self.fixed)
        except StrictDataclassError as error:
            raise ValueError(f"arguments: {sizes_type.__name__} refuses them: {error}") from error
        self.extractor: Any = extractor_type(**features)
        self.arguments = {key: getattr(self.sizes, key) for key in self.size_keys}
        self.feature_options = {key: getattr(self.extractor, key) for key in self.feature_keys}
        self.layer = layer
        self.depth = getattr(self.sizes, self.depth_key)
        if layer is not None:
            setattr(self.sizes, self.depth_key, num_kept(layer, self.depth, sizes_type.__name__))
        width, heads = self.sizes.hidden_size, self.sizes.num_attention_heads
        if width % heads:
            raise ValueError(f"arguments: a width of {width} is not a multiple of {heads} attention heads")
        self._check()

    @classmethod
    def types(cls) -> tuple[Any, Any, Any]:
        """The classes of transformers that make its sizes, its features, and itself."""
        raise NotImplementedError

    @classmethod
    def read_options(cls, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a folder says of the network and of its feature extractor, reduced to what matters to the encoder."""
        found = read_json(folder / "config.json")
        if found.get("model_type") not in cls.model_types:
            raise ValueError(
                f"{folder / 'config.json'}: holds a {found.get('model_type')} model, "
                f"this architecture takes {' or '.join(cls.model_types)}"
            )
        found = found.get("encoder_config", found)
        if (found.get("subsampling_conv_kernel_size", 3), found.get("subsampling_conv_stride", 2)) != (3, 2):
            raise ValueError(f"{folder / 'config.json'}: only a subsampling with kernel 3 and stride 2 can be counted")
        # In the description of the processor that the extractor belongs to, or in a file of its own.
        processor = folder / "processor_config.json"
        features = read_json(processor).get("feature_extractor") if processor.is_file() else None
        if features is None:
            features = read_json(folder / "preprocessor_config.json")
        extractor = cls.types()[1].__name__
        made_by = features.get("feature_extractor_type", extractor)
        if made_by != extractor or features.get("sampling_rate", SAMPLE_RATE_HZ) != SAMPLE_RATE_HZ:
            raise ValueError(
                f"{folder}: its features are made by {made_by} at {features.get('sampling_rate')} Hz, "
                f"expected {extractor} at {SAMPLE_RATE_HZ} Hz"
            )
        arguments = {key: found[key] for key in cls.size_keys if key in found}
        return arguments, {key: features[key] for key in cls.feature_keys if key in features}

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

    def build(self, folder: Path | None) -> nn.Module:
        """The network with the weights of a folder, in fp32, or without one with random ones. Raises ValueError if some
        are missing or do not fit."""
        *_, model_type = self.types()
        if folder is None:
            return self._finish(model_type(self.sizes))
        kept = getattr(self.sizes, self.depth_key)
        unused = (*self.unused, *(f"{self.blocks}{index}." for index in range(kept, self.depth)))
        state = read_weights(folder, prefixes=self.prefixes, unused=unused)
        return self._finish(load_transformers(model_type, self.sizes, state, str(folder)))

    def _finish(self, model: Any) -> nn.Module:
        return model

    def _extract(self, wave_L: Tensor, **options: Any) -> Tensor:
        inputs = self.extractor(wave_L.numpy(), sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt", **options)
        return inputs["input_features"][0]


def check_bins(reads: int, made: int) -> None:
    if reads != made:
        raise ValueError(f"the network reads {reads} features a step, its feature extractor makes {made}")
