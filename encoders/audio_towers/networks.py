"""What pretrained audio networks have to say of themselves before their weights are there.

Letters: L samples, S steps (of features in `features`, of the network elsewhere), M features of a step, C width,
N windows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.logmel import num_frames
from molora.encoders.pretrained_files import check_options, load_transformers, num_kept, read_json, read_weights
from molora.encoders.sound import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ

# The extractors' filters and windows take memory as soon as they are made. Beyond any of theirs.
_MOST_FEATURES = {
    **{"feature_size": 1024, "num_mel_bins": 1024, "n_fft": 8192, "win_length": 8192, "hop_length": 8192},
    **{"chunk_length": 120, "stride": 64},
}


class Network:
    """A network without its weights: its sizes, how its features are made, and how its weights are stored.

    `arguments` and `feature_options` are all that tells it from another of its kind; `sizes` has only the blocks that
    are kept.
    """

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


class Whisper(Network):
    """Whisper's encoder: 50 frames a second, in windows of 30 s."""

    model_types = ("whisper",)
    size_keys = (
        *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "activation_function"),
        *("num_mel_bins", "max_source_positions"),
    )
    feature_keys = ("feature_size", "hop_length", "chunk_length", "n_fft")
    depth_key = "encoder_layers"
    prefixes = ("model.encoder.", "encoder.", "")

    @classmethod
    def types(cls) -> tuple[Any, Any, Any]:
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperConfig, WhisperFeatureExtractor, WhisperEncoder

    def _check(self) -> None:
        extractor, positions = self.extractor, self.sizes.max_source_positions
        check_bins(self.sizes.num_mel_bins, extractor.feature_size)
        if extractor.n_samples != 2 * extractor.hop_length * positions:
            raise ValueError(
                f"features: windows of {extractor.chunk_length} s have {extractor.n_samples} samples, but "
                f"max_source_positions {positions} needs {2 * extractor.hop_length * positions}"
            )
        self.window_steps = extractor.nb_max_frames

    def num_frames(self, num_samples: int) -> int:
        return -(-num_samples // (2 * self.extractor.hop_length))

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """Every window is padded with silence, as the network expects."""
        features_SM = torch.cat([self._extract(window_L).T for window_L in wave_L.split(self.extractor.n_samples)])
        valid = -(-len(wave_L) // self.extractor.hop_length)
        return torch.cat([augment(features_SM[:valid]), features_SM[valid:]])

    def frames(self, model: Any, features_NSM: Tensor) -> Tensor:
        return model(features_NSM.transpose(1, 2)).last_hidden_state

    def _finish(self, model: Any) -> nn.Module:
        # Fixed sinusoids: as a buffer, no recipe can train them by accident.
        table = model.embed_positions.weight.detach()
        del model.embed_positions.weight
        model.embed_positions.register_buffer("weight", table)
        if self.layer is not None:
            model.layer_norm = nn.Identity()
        return model


class Wav2Vec2Bert(Network):
    """Wav2Vec2-BERT: 50 frames a second, in windows of 20 s.

    Its extractor cuts a clip into the frames of Kaldi, as `log_mel` does (Source: SeamlessM4TFeatureExtractor).
    Convolutions that some fine-tuned checkpoints have behind the network, to shorten it, are left out.
    """

    model_types = ("wav2vec2-bert",)
    size_keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("feature_projection_input_dim", "conv_depthwise_kernel_size", "layer_norm_eps", "position_embeddings_type"),
        *("left_max_position_embeddings", "right_max_position_embeddings", "max_source_positions"),
        "rotary_embedding_base",
    )
    feature_keys = ("num_mel_bins", "stride")
    # The vector that stands for masked steps exists only if there are some.
    fixed: ClassVar[dict[str, Any]] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    prefixes = ("wav2vec2_bert.", "")
    blocks = "encoder.layers."
    unused = ("masked_spec_embed", "adapter.", "intermediate_ffn.")

    @classmethod
    def types(cls) -> tuple[Any, Any, Any]:
        from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

        return Wav2Vec2BertConfig, SeamlessM4TFeatureExtractor, Wav2Vec2BertModel

    def _check(self) -> None:
        stride = self.extractor.stride
        check_bins(self.sizes.feature_projection_input_dim, self.extractor.num_mel_bins * stride)
        # No longer windows: the learned distances take width x frames^2 numbers a block.
        self.window_steps = 20 * SAMPLE_RATE_HZ // (HOP_SAMPLES * stride)
        # A clip is normalised by its deviation, which takes two frames of bins.
        self._least = max(2, stride)

    def num_frames(self, num_samples: int) -> int:
        return max(num_frames(num_samples), self._least) // self.extractor.stride

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """Neighbouring frames of mel bins are one step; an odd last one, which the network would mask, is dropped."""
        shortest = FRAME_SAMPLES + (self._least - 1) * HOP_SAMPLES
        wave_L = F.pad(wave_L, (0, max(0, shortest - len(wave_L))))
        features_SM = self._extract(wave_L, pad_to_multiple_of=None)
        return augment(features_SM.reshape(-1, self.extractor.num_mel_bins)).reshape(features_SM.shape)


class Parakeet(Network):
    """Parakeet's encoder, a FastConformer: 12.5 frames a second, in windows of 40 s."""

    model_types = ("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt", "parakeet_encoder")
    size_keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("attention_bias", "convolution_bias", "conv_kernel_size", "num_mel_bins", "scale_input"),
        *("subsampling_factor", "subsampling_conv_channels", "max_position_embeddings"),
    )
    feature_keys = ("feature_size", "hop_length", "n_fft", "win_length", "preemphasis")
    prefixes = ("encoder.", "")

    @classmethod
    def types(cls) -> tuple[Any, Any, Any]:
        from transformers import ParakeetEncoder, ParakeetEncoderConfig, ParakeetFeatureExtractor

        return ParakeetEncoderConfig, ParakeetFeatureExtractor, ParakeetEncoder

    def _check(self) -> None:
        factor, bins = self.sizes.subsampling_factor, self.sizes.num_mel_bins
        check_bins(bins, self.extractor.feature_size)
        if factor < 2 or factor & (factor - 1) or bins % factor:
            raise ValueError(
                f"arguments: subsampling_factor is a power of 2 that divides the {bins} mel bins, got {factor}"
            )
        self.window_steps = 40 * SAMPLE_RATE_HZ // (self.extractor.hop_length * factor) * factor

    def num_frames(self, num_samples: int) -> int:
        return -(-(num_samples // self.extractor.hop_length) // self.sizes.subsampling_factor)

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """Without the last step, which the extractor marks as padding."""
        return augment(self._extract(wave_L)[: len(wave_L) // self.extractor.hop_length])
