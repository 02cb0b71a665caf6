"""Parakeet's encoder, a FastConformer: 12.5 frames a second, in windows of 40 s.

Letters: L samples, S steps, M features of a step, N windows.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from molora.encoders.audio_towers.network import Network, check_bins
from molora.encoders.sound import SAMPLE_RATE_HZ


class Parakeet(Network):
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
