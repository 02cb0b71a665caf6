"""The audio modality: clips to features, features to frames.

Letters: L samples, S frames of features, M features of a frame, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from molora.encoders.audio_towers.conformer import Conformer, ConformerConfig, num_encoded
from molora.encoders.audio_towers.pretrained import PretrainedConfig, PretrainedFeatures
from molora.encoders.audio_towers.torchaudio_conformer import TorchaudioConformer
from molora.encoders.logmel import log_mel, num_frames
from molora.encoders.sound import MIN_SAMPLES, SAMPLE_RATE_HZ, load_sound, resample
from molora.modality import Encoder, Frames, Prepared

# The most that `max_seconds` may be, since a received folder sets it.
MAX_SECONDS = 4 * 3600.0


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to clips; evaluation never does.

    `speeds`: one is drawn for a clip, which is then played that much faster. SpecAugment sets `time_masks` stretches of
    up to `time_mask_frames` frames and `bin_masks` bands of up to `bin_mask_bins` bins to the clip's mean.
    Source: arXiv 1904.08779 (SpecAugment); Ko et al., Interspeech 2015 (speed perturbation by 0.9, 1.0 and 1.1).
    """

    speeds: list[float] = field(default_factory=list)
    time_masks: int = 0
    time_mask_frames: int = 40
    bin_masks: int = 0
    bin_mask_bins: int = 15

    def __post_init__(self) -> None:
        if any(not 0.5 <= speed <= 2 for speed in self.speeds):
            raise ValueError(f"augment.speeds lie between 0.5 and 2, got {list(self.speeds)}")
        if min(self.time_masks, self.time_mask_frames, self.bin_masks, self.bin_mask_bins) < 0:
            raise ValueError(f"augment: numbers and widths of masks are at least 0, got {self}")


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """`kind`: `conformer` is the reference's, `torchaudio` has torchaudio's blocks after the same subsampling;
    both start from scratch, with the sizes in `conformer`. `pretrained` is described in its own section."""

    kind: Literal["conformer", "torchaudio", "pretrained"] = "conformer"
    conformer: ConformerConfig = field(default_factory=ConformerConfig)
    pretrained: PretrainedConfig | None = None

    def __post_init__(self) -> None:
        if (self.kind == "pretrained") != (self.pretrained is not None):
            raise ValueError(f"tower: kind {self.kind!r} and section `pretrained` do not fit; kind pretrained has it")


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """`beside` maps a modality to the projector for clips that share their sample with it; others take `default`. The
    first entry that applies decides. `max_seconds`: a longer clip is refused before it is decoded; at most four
    hours.

    Source of `beside`: Phi-4-Multimodal (arXiv 2503.01743) has a second audio projector beside a picture. Source of
    half an hour: its model card.
    """

    tower: TowerConfig = field(default_factory=TowerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    beside: dict[str, str] = field(default_factory=dict)
    max_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds <= MAX_SECONDS:
            raise ValueError(f"max_seconds is above 0 and at most {MAX_SECONDS:g}, got {self.max_seconds}")


class Audio:
    """Clips as a modality; content parts of type `audio`."""

    config_type: ClassVar[type] = AudioConfig
    part_type: ClassVar[str] = "audio"
    # Of what `load` returns, so that tools can play it and listen to it.
    sampling_rate_hz: ClassVar[int] = SAMPLE_RATE_HZ

    def __init__(self, name: str, config: AudioConfig) -> None:
        self.name, self.config = name, config
        self.pretrained = None if config.tower.pretrained is None else PretrainedFeatures(config.tower.pretrained)

    def load(self, part: Mapping[str, Any]) -> Tensor:
        """Decodes the clip of a content part to a mono waveform (L,) in fp32 at 16 kHz; see `load_sound`."""
        return load_sound(part, max_seconds=self.config.max_seconds)

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        """Turns a waveform into the features of its encoder, augmented if there is a `generator`."""
        config = self.config.augment
        if generator is not None and config.speeds:
            speed = config.speeds[int(torch.randint(len(config.speeds), (), generator=generator))]
            if len(faster := resample(item, round(SAMPLE_RATE_HZ * speed))) >= MIN_SAMPLES:
                item = faster

        def augment(features_SM: Tensor) -> Tensor:
            return features_SM if generator is None else spec_augment(features_SM, config, generator)

        if self.pretrained is not None:
            return self.pretrained.prepare(item, augment)
        return Prepared({"features_SM": augment(log_mel([item]))}, num_encoded(num_frames(len(item))))

    def blank(self, item: Tensor) -> Tensor:
        """Silence of the same length."""
        return torch.zeros_like(item)

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        """All frames of features in order, and what says where clips begin."""
        if self.pretrained is not None:
            return self.pretrained.collate(prepared)
        features = [item.tensors["features_SM"] for item in prepared]
        return {"features_SM": torch.cat(features), "lengths_I": torch.tensor([len(clip_SM) for clip_SM in features])}

    def build_encoder(self) -> PretrainedAudioEncoder | ConformerEncoder:
        """Makes the encoder. Raises ValueError for pretrained weights that cannot be found or do not fit."""
        if self.pretrained is not None:
            return PretrainedAudioEncoder(self.config, self.pretrained.build_encoder())
        return ConformerEncoder(self.config.tower)

    def projector(self, modalities: frozenset[str]) -> str:
        return next((name for modality, name in self.config.beside.items() if modality in modalities), "default")

    def projectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("default", *self.config.beside.values())))

    def examples(self) -> list[dict[str, Any]]:
        """A short hum, a rising one and a long hiss."""
        seconds = [torch.arange(int(n * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ for n in (0.3, 1.37)]
        hum, rise = (0.3 * torch.sin(2 * torch.pi * 220 * s * (1 + k * s)) for k, s in enumerate(seconds))
        hiss = 0.1 * torch.randn(int(2.5 * SAMPLE_RATE_HZ), generator=torch.Generator().manual_seed(0))
        about = {"type": self.part_type, "sampling_rate": SAMPLE_RATE_HZ}
        return [{**about, "array": wave.numpy()} for wave in (hum, rise, hiss)]


def spec_augment(features_SM: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Hides stretches of time and bands of bins behind the clip's mean."""
    features_SM, mean = features_SM.clone(), features_SM.mean()
    kinds = ((config.time_masks, config.time_mask_frames), (config.bin_masks, config.bin_mask_bins))
    for axis, (masks, widest) in enumerate(kinds):
        length = features_SM.shape[axis]
        for _ in range(masks):
            width = int(torch.randint(min(widest, length) + 1, (), generator=generator))
            start = int(torch.randint(length - width + 1, (), generator=generator))
            features_SM.narrow(axis, start, width).fill_(mean)
    return features_SM


class PretrainedAudioEncoder(Encoder):
    """A pretrained encoder, saved with the options of this modality."""

    def __init__(self, config: AudioConfig, network: Encoder) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.width, self.origin = network.width, network.origin

    def forward(self, **collated: Tensor) -> Frames:
        return self.network(**collated)

    def saved_config(self, with_weights: bool) -> AudioConfig:
        tower = replace(self.config.tower, pretrained=self.network.saved_config(with_weights))
        return replace(self.config, tower=tower)


class ConformerEncoder(Encoder):
    """A Conformer that starts from scratch."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.conformer = {"conformer": Conformer, "torchaudio": TorchaudioConformer}[config.kind](config.conformer)
        self.width = config.conformer.width

    def forward(self, features_SM: Tensor, lengths_I: Tensor) -> Frames:  # type: ignore[override]
        return self.conformer(features_SM, lengths_I.tolist())
