"""Whisper's encoder: 50 frames a second, in windows of 30 s.

Letters: L samples, S steps, M features of a step, N windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molora.encoders.audio_towers.network import Network, check_bins


class Whisper(Network):
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
