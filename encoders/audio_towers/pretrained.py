"""Pretrained ears: the encoders of Whisper, Wav2Vec2-BERT and Parakeet (a FastConformer), from transformers.

Features are made by transformers' own extractors, over the whole clip, and cut into windows, because the networks are
made for speech of half a minute. Their masks let padding through in places, so nothing is padded: only windows of equal
length share a call, and a clip's frames do not depend on its neighbours.

Letters: L samples, S steps (of features in `features`, of the network elsewhere), M features of a step, C width,
I clips, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.pretrained_files import check_keys, check_sizes, fetch, read_json, shapes_only, weight_files
from molora.encoders.sound import SAMPLE_RATE_HZ
from molora.modality import Encoder, Frames, Origin, Prepared, WeightSource

# Bounds the memory of one call: it takes as much as this many whole windows.
_WINDOWS_PER_CALL = 4

_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json")
# The extractors' filters and windows take memory as soon as they are made. Beyond any of theirs.
_MOST_FEATURES = {
    **{"feature_size": 1024, "num_mel_bins": 1024, "n_fft": 8192, "win_length": 8192, "hop_length": 8192},
    **{"chunk_length": 120, "stride": 64},
}
# Whisper's repositories hold the same weights under other names, in fp32, too.
_WEIGHTS = ("model.safetensors", "model-*.safetensors")


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig(WeightSource):
    """Which network, and where its weights come from.

    `architecture`: `whisper` (50 frames a second, in windows of 30 s), `wav2vec2_bert` (50, 20 s) or `parakeet` (12.5,
    40 s). `name`: a hub id, such as `openai/whisper-small`, `facebook/w2v-bert-2.0` or `nvidia/parakeet-ctc-1.1b`.
    `path`: a local folder that transformers saved, its preprocessor_config.json included. `revision`: branch, tag or
    commit on the hub. `pretrained` off: random weights; `arguments` then go to the architecture's config class, and
    `features` to its feature extractor.

    `pool`: frames averaged into one; the last one of a clip averages what is left. `layer` counts from the end: -1 is
    the output of the last block, -2 of the one before, and no norm is applied to it. Without it, the network's own
    output.
    """

    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    pool: int = 1
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in _NETWORKS:
            raise ValueError(f"architecture: expected one of {', '.join(_NETWORKS)}, got {self.architecture!r}")
        if self.pretrained and (self.name is None) == (self.path is None):
            raise ValueError(
                f"architecture {self.architecture} needs a name on the hub or a path, one of them; "
                "or pretrained: false, for random weights"
            )
        if not self.pretrained and (self.name is not None or self.path is not None):
            raise ValueError("pretrained: false takes sizes from arguments: leave out name and path")
        if self.pretrained and (self.arguments or self.features):
            raise ValueError("pretrained weights bring their own sizes: leave out arguments and features")
        if self.revision is not None and self.name is None:
            raise ValueError(f"revision {self.revision!r} is for weights named on the hub: give a name and no path")
        if self.pool < 1:
            raise ValueError(f"pool is at least 1, got {self.pool}")
        if self.layer is not None and self.layer >= 0:
            raise ValueError(f"layer counts from the end and is negative, -1 being the last; got {self.layer}")


class PretrainedEar:
    """The weightless half of a pretrained encoder.

    It reads the network's sizes when first used, from the hub or the folder if the config names one. Pickled after
    that, it brings them along.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def prepare(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Prepared:
        """Makes features of a waveform in [-1, 1] at 16 kHz, of at least 400 samples.

        `augment` gets the features of the clip as mel bins, (S, M), without what pads them.
        """
        network = self._known.network
        num_frames = network.num_frames(len(wave_L))
        tensors = {"features_SM": network.features(wave_L, augment), "num_frames": torch.tensor(num_frames)}
        return Prepared(tensors, -(-num_frames // self.config.pool))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """Features end to end, the steps of features of each clip, and the frames of each before pooling."""
        features = [item.tensors["features_SM"] for item in prepared]
        return {
            "features_SM": torch.cat(features),
            "lengths_I": torch.tensor([len(clip_SM) for clip_SM in features]),
            "frames_I": torch.stack([item.tensors["num_frames"] for item in prepared]),
        }

    def build_encoder(self) -> PretrainedEncoder:
        """Makes the network, with its weights if it is pretrained.

        Raises: ValueError for weights that cannot be found or do not fit.
        """
        config, (network, origin) = self.config, self._known
        if not config.pretrained or shapes_only():
            model = network.build()
        else:
            # The commit that the sizes came from, even if the branch has moved since.
            folder, _ = _fetch(config if origin is None else replace(config, revision=origin.revision), _WEIGHTS)
            model = network.load(folder)
        return PretrainedEncoder(config, network, model, origin)

    @cached_property
    def _known(self) -> _Known:
        config = self.config
        kind = _NETWORKS[config.architecture]
        if not config.pretrained:
            return _Known(kind(config.arguments, config.features, config.layer), None)
        folder, origin = _fetch(config, ())
        return _Known(kind(*_read_sizes(folder, kind), config.layer), origin)


class PretrainedEncoder(Encoder):
    """Features of clips to packed frames.

    The network stays in eval mode: its dropout, layer dropout, time masks and batch statistics, all of which would make
    a clip's frames random or dependent on others, are off in training too. Gradients flow as ever.
    """

    def __init__(self, config: PretrainedConfig, network: _Network, model: nn.Module, origin: Origin | None) -> None:
        super().__init__()
        self.config = config
        self.origin = origin
        self.width = network.sizes.hidden_size
        self.model: Any = model
        self._network = network
        self.train(self.training)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, features_SM: Tensor, lengths_I: Tensor, frames_I: Tensor) -> Frames:  # type: ignore[override]
        cuts = [clip_SM.split(self._network.window_steps) for clip_SM in features_SM.split(lengths_I.tolist())]
        frames = iter(self._encode([window_SM for cut in cuts for window_SM in cut]))
        clips = [torch.cat([next(frames) for _ in cut]) for cut in cuts]
        # Whisper's last window is padded: what the padding gave comes last and is left out.
        clips = [self._pool(clip_SC[:length]) for clip_SC, length in zip(clips, frames_I.tolist(), strict=True)]
        return Frames(torch.cat(clips), tuple(len(clip_SC) for clip_SC in clips))

    def saved_config(self, with_weights: bool) -> PretrainedConfig:
        """The ear's config to save with this encoder. With its weights beside it, one that builds the same modules from
        scratch, without the hub or any file; else the one it was built from, pinned to the commit of its origin."""
        if with_weights:
            sizes = {"arguments": self._network.arguments, "features": self._network.sound}
            return replace(self.config, name=None, path=None, revision=None, pretrained=False, **sizes)
        return self.config if self.origin is None else replace(self.config, revision=self.origin.revision)

    def _encode(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """Frames of each window; windows of equal length share a call."""
        by_length: dict[int, list[int]] = {}
        for index, window_SM in enumerate(windows):
            by_length.setdefault(len(window_SM), []).append(index)
        frames = list(windows)
        for length, ids in by_length.items():
            most = _WINDOWS_PER_CALL * self._network.window_steps // length
            for start in range(0, len(ids), most):
                chunk = ids[start : start + most]
                features_NSM = torch.stack([windows[index] for index in chunk]).to(self.model.dtype)
                for index, frames_SC in zip(chunk, self._network.frames(self.model, features_NSM), strict=True):
                    frames[index] = frames_SC
        return frames

    def _pool(self, frames_SC: Tensor) -> Tensor:
        return F.avg_pool1d(frames_SC.T[None], self.config.pool, ceil_mode=True)[0].T


class _Classes(NamedTuple):
    """The classes of transformers that make a network's sizes, its features, and itself."""

    sizes: Any
    extractor: Any
    model: Any


class _Network:
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
    def classes(cls) -> _Classes:
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


class _Whisper(_Network):
    model_types = ("whisper",)
    size_keys = (
        *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "activation_function"),
        *("num_mel_bins", "max_source_positions"),
    )
    sound_keys = ("feature_size", "hop_length", "chunk_length", "n_fft")
    depth_key = "encoder_layers"
    prefixes = ("model.encoder.", "encoder.", "")

    @classmethod
    def classes(cls) -> _Classes:
        from transformers import WhisperConfig, WhisperFeatureExtractor
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return _Classes(WhisperConfig, WhisperFeatureExtractor, WhisperEncoder)

    def _check(self) -> None:
        extractor, positions = self.extractor, self.sizes.max_source_positions
        _check_bins(self.sizes.num_mel_bins, extractor.feature_size)
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
        windows = [self._extract(window_L).T for window_L in wave_L.split(self.extractor.n_samples)]
        features_SM = torch.cat(windows)
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


class _Wav2Vec2Bert(_Network):
    """Convolutions that some fine-tuned checkpoints have behind the network, to shorten it, are left out."""

    model_types = ("wav2vec2-bert",)
    size_keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("feature_projection_input_dim", "conv_depthwise_kernel_size", "layer_norm_eps", "position_embeddings_type"),
        *("left_max_position_embeddings", "right_max_position_embeddings", "max_source_positions"),
        "rotary_embedding_base",
    )
    sound_keys = ("num_mel_bins", "stride")
    # The vector that stands for masked steps exists only if there are some.
    fixed: ClassVar[dict[str, Any]] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    prefixes = ("wav2vec2_bert.", "")
    blocks = "encoder.layers."
    unused = ("masked_spec_embed", "adapter.", "intermediate_ffn.")

    # Source: SeamlessM4TFeatureExtractor of transformers (Kaldi's frames).
    FRAME_SAMPLES: ClassVar[int] = 400
    HOP_SAMPLES: ClassVar[int] = 160
    # The learned distances take width x frames^2 numbers a block.
    WINDOW_SECONDS: ClassVar[int] = 20

    @classmethod
    def classes(cls) -> _Classes:
        from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel

        return _Classes(Wav2Vec2BertConfig, SeamlessM4TFeatureExtractor, Wav2Vec2BertModel)

    def _check(self) -> None:
        stride = self.extractor.stride
        _check_bins(self.sizes.feature_projection_input_dim, self.extractor.num_mel_bins * stride)
        self.window_steps = self.WINDOW_SECONDS * SAMPLE_RATE_HZ // (self.HOP_SAMPLES * stride)
        # A clip is normalised by its deviation, which takes two frames of bins.
        self._least = max(2, stride)

    def num_frames(self, num_samples: int) -> int:
        num_bins_frames = (num_samples - self.FRAME_SAMPLES) // self.HOP_SAMPLES + 1
        return max(num_bins_frames, self._least) // self.extractor.stride

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """Neighbouring frames of mel bins are one step; an odd last one, which the network would mask, is dropped."""
        shortest = self.FRAME_SAMPLES + (self._least - 1) * self.HOP_SAMPLES
        wave_L = F.pad(wave_L, (0, max(0, shortest - len(wave_L))))
        features_SM = self._extract(wave_L, pad_to_multiple_of=None)
        return augment(features_SM.reshape(-1, self.extractor.num_mel_bins)).reshape(features_SM.shape)


class _Parakeet(_Network):
    model_types = ("parakeet_ctc", "parakeet_rnnt", "parakeet_tdt", "parakeet_encoder")
    size_keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("attention_bias", "convolution_bias", "conv_kernel_size", "num_mel_bins", "scale_input"),
        *("subsampling_factor", "subsampling_conv_channels", "max_position_embeddings"),
    )
    sound_keys = ("feature_size", "hop_length", "n_fft", "win_length", "preemphasis")
    prefixes = ("encoder.", "")

    WINDOW_SECONDS: ClassVar[int] = 40

    @classmethod
    def classes(cls) -> _Classes:
        from transformers import ParakeetEncoder, ParakeetEncoderConfig, ParakeetFeatureExtractor

        return _Classes(ParakeetEncoderConfig, ParakeetFeatureExtractor, ParakeetEncoder)

    def _check(self) -> None:
        factor, bins = self.sizes.subsampling_factor, self.sizes.num_mel_bins
        _check_bins(bins, self.extractor.feature_size)
        if factor < 2 or factor & (factor - 1) or bins % factor:
            raise ValueError(
                f"arguments: subsampling_factor is a power of 2 that divides the {bins} mel bins, got {factor}"
            )
        self.window_steps = self.WINDOW_SECONDS * SAMPLE_RATE_HZ // (self.extractor.hop_length * factor) * factor

    def num_frames(self, num_samples: int) -> int:
        return -(-(num_samples // self.extractor.hop_length) // self.sizes.subsampling_factor)

    def features(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Tensor:
        """Without the last step, which the extractor marks as padding."""
        return augment(self._extract(wave_L)[: len(wave_L) // self.extractor.hop_length])


_NETWORKS: dict[str, type[_Network]] = {
    "whisper": _Whisper,
    "wav2vec2_bert": _Wav2Vec2Bert,
    "parakeet": _Parakeet,
}


class _Known(NamedTuple):
    """A network's sizes, and the commit they came from."""

    network: _Network
    origin: Origin | None


def _check_bins(reads: int, made: int) -> None:
    if reads != made:
        raise ValueError(f"the network reads {reads} features a step, its feature extractor makes {made}")


def _fetch(config: PretrainedConfig, weights: Sequence[str]) -> tuple[Path, Origin | None]:
    """The local folder to read from: `path`, or the repository's snapshot, fetched if need be."""
    if config.path is not None:
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(f"path {folder}: no such folder; give the folder that transformers saved")
        return folder, None
    assert config.name is not None
    return fetch(config.name, config.revision, [*_DESCRIPTIONS, *weights])


def _read_sizes(folder: Path, kind: type[_Network]) -> tuple[dict[str, Any], dict[str, Any]]:
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
