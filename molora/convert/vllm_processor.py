"""Phi-4-multimodal's processor with the names that vLLM's model of it reads. `molora convert vllm` puts a copy of this
file beside the weights, where transformers finds it; so it imports nothing of molora.

Source: vllm/model_executor/models/phi4mm.py, of vLLM 0.33.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, Phi4MultimodalProcessor


class Phi4MMProcessor(Phi4MultimodalProcessor):
    """transformers' processor, called as vLLM calls the one of the released repository: `audios` are pairs of samples
    and their rate in Hz, and of `text` only the tokens are wanted."""

    def __call__(
        self, text: Any = None, images: Any = None, audios: Sequence[tuple[Any, int]] = (), **options: Any
    ) -> BatchFeature:
        data: dict[str, Any] = {} if text is None else dict(self.tokenizer(text))
        # vLLM counts pictures by their sizes, also where there is none.
        data["image_sizes"] = torch.empty(0, 2, dtype=torch.long)
        if images:
            pictures = self.image_processor(images, return_tensors="pt")
            data["input_image_embeds"] = pictures["image_pixel_values"]
            data |= {name: pictures[name] for name in ("image_sizes", "image_attention_mask")}
        if audios:
            # Alone, as frames at the end of a shorter clip differ in a batch.
            audio_processor: Any = self.audio_processor  # pyright: ignore[reportAttributeAccessIssue]
            clips = [audio_processor(clip, sampling_rate=rate, return_tensors="pt") for clip, rate in audios]
            features = [clip["audio_input_features"][0] for clip in clips]
            data["input_audio_embeds"] = pad_sequence(features, batch_first=True)
        return BatchFeature(data)
