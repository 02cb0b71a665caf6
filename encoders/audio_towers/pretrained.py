"""Pretrained audio encoders of transformers: Whisper, Wav2Vec2-BERT and Parakeet (a FastConformer).

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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.encoders.audio_towers.network import Network
from molora.encoders.audio_towers.parakeet import Parakeet
from molora.encoders.audio_towers.wav2vec2_bert import Wav2Vec2Bert
from molora.encoders.audio_towers.whisper import Whisper
from molora.encoders.pretrained_files import check_source, from_scratch, locate, shapes_only, to_save
from molora.modality import Encoder, Frames, Origin, Prepared, WeightSource

# Bounds the memory of one call: it takes as much as this many whole windows.
_WINDOWS_PER_CALL = 4

_DESCRIPTIONS = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json")
# Whisper's repositories hold the same weights under other names, in fp32, too.
_WEIGHTS = ("model.safetensors", "model-*.safetensors")

_NETWORKS: dict[str, type[Network]] = {"whisper": Whisper, "wav2vec2_bert": Wav2Vec2Bert, "parakeet": Parakeet}


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
        if self.pool < 1:
            raise ValueError(f"pool is at least 1, got {self.pool}")
        check_source(self, self.layer)


class PretrainedFeatures:
    """The weightless half of a pretrained encoder. It reads the network's sizes when first used, from the hub or the
    folder if the config names one. Pickled after that, it brings them along."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    def prepare(self, wave_L: Tensor, augment: Callable[[Tensor], Tensor]) -> Prepared:
        """Makes features of a waveform in [-1, 1] at 16 kHz, of at least 400 samples. `augment` gets the features of
        the clip as mel bins, (S, M), without what pads them."""
        network, _ = self._network
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
        """Makes the network, with its weights if it is pretrained. Raises ValueError for weights that cannot be found
        or do not fit."""
        config, (network, origin) = self.config, self._network
        folder = None
        if config.pretrained and not shapes_only():
            # The commit that the sizes came from, even if the branch has moved since.
            pinned = config if origin is None else replace(config, revision=origin.revision)
            folder, _ = locate(pinned, config.name, [*_DESCRIPTIONS, *_WEIGHTS])
        return PretrainedEncoder(config, network, network.build(folder), origin)

    @cached_property
    def _network(self) -> tuple[Network, Origin | None]:
        """The network without its weights, and the commit that its sizes came from."""
        config = self.config
        network = _NETWORKS[config.architecture]
        folder, origin = locate(config, config.name, _DESCRIPTIONS)
        if folder is None:
            return network(config.arguments, config.features, config.layer), None
        return network(*network.read_options(folder), config.layer), origin


class PretrainedEncoder(Encoder):
    """Features of clips to packed frames. The network stays in eval mode: its dropout, layer dropout, time masks and
    batch statistics, all of which would make a clip's frames random or dependent on others, are off in training too.
    Gradients flow as ever."""

    def __init__(self, config: PretrainedConfig, network: Network, model: nn.Module, origin: Origin | None) -> None:
        super().__init__()
        self.config, self.origin, self._network = config, origin, network
        self.width = network.sizes.hidden_size
        self.model: Any = model
        self.train(self.training)

    def train(self, mode: bool = True) -> PretrainedEncoder:
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, features_SM: Tensor, lengths_I: Tensor, frames_I: Tensor) -> Frames:  # type: ignore[override]
        cuts = [clip_SM.split(self._network.window_steps) for clip_SM in features_SM.split(lengths_I.tolist())]
        frames = iter(self._encode([window_SM for cut in cuts for window_SM in cut]))
        clips = []
        for cut, length in zip(cuts, frames_I.tolist(), strict=True):
            # Whisper's last window is padded: what the padding gave comes last and is left out.
            clip_SC = torch.cat([next(frames) for _ in cut])[:length]
            clips.append(F.avg_pool1d(clip_SC.T[None], self.config.pool, ceil_mode=True)[0].T)
        return Frames(torch.cat(clips), tuple(len(clip_SC) for clip_SC in clips))

    def saved_config(self, with_weights: bool) -> PretrainedConfig:
        network = self._network
        scratch = from_scratch(self.config, arguments=network.arguments, features=network.feature_options)
        return to_save(self.config, scratch, self.origin, with_weights)

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
