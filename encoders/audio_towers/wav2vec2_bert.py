"""Wav2Vec2-BERT: 50 frames a second, in windows of 20 s.

Its extractor cuts a clip into the frames of Kaldi, as `log_mel` does (Source: SeamlessM4TFeatureExtractor).

Letters: L samples, S steps, M features of a step, N windows.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from molora.encoders.audio_towers.network import Network, check_bins
from molora.encoders.logmel import num_frames
from molora.encoders.sound import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE_HZ


class Wav2Vec2Bert(Network):
    """Convolutions that some fine-tuned checkpoints have behind the network, to shorten it, are left out."""

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
