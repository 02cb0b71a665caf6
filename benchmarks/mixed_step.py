"""A training step on a small backbone and a mixed batch, which other benchmarks here share.

The batch: 2 pictures of 545 frames with 48 text tokens each, 6 text samples of 64 tokens, 8 targets in every sample.
The backbone: a random Llama of 12 layers, width 768, 32k vocabulary. Pictures enter as precomputed encoder frames, so
that the time is that of projector, backbone, adapter, loss and optimiser. A step is forward, backward and AdamW.

Letters: T tokens of a sample, S frames, C frame width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from molora.data.processor import Processor
from molora.modality import Encoder, Frames, Prepared
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import byte_tokenizer
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

NUM_PICTURES, PICTURE_TOKENS, PICTURE_TEXT_TOKENS = 2, 545, 48
NUM_TEXTS, TEXT_TOKENS = 6, 64
NUM_TARGETS = 8
VOCAB_SIZE = 32_000
# The width of a SigLIP so400m tower.
FRAME_WIDTH = 1152
LORA = {
    "r": 16,
    "lora_alpha": 32,
    # Every linear layer of the decoder, as in Phi-4-Multimodal. B starts off zero, or the comparison would not see A.
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "init_lora_weights": False,
}
LEARNING_RATE = 1e-5
WARMUPS = 2


@dataclass
class NoOptions:
    """Precomputed frames need none."""


class PrecomputedFrames(Encoder):
    """An encoder whose work was done before."""

    width = FRAME_WIDTH

    def forward(self, **collated: Tensor) -> Frames:
        return Frames(collated["frames_SC"], tuple(collated["lengths"].tolist()))


class Pictures:
    """A modality whose items are encoder frames, one token each."""

    config_type: ClassVar[type] = NoOptions
    part_type: ClassVar[str] = "image"
    name = "vision"
    config = NoOptions()

    def load(self, part: Mapping[str, Any]) -> Tensor:
        return part["frames_SC"]

    def prepare(self, item: Tensor, generator: torch.Generator | None = None) -> Prepared:
        return Prepared({"frames_SC": item}, num_tokens=len(item))

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        return {
            "frames_SC": torch.cat([p.tensors["frames_SC"] for p in prepared]),
            "lengths": torch.tensor([p.num_tokens for p in prepared]),
        }

    def build_encoder(self) -> Encoder:
        return PrecomputedFrames()

    def projector(self, company: frozenset[str]) -> str:
        return "default"

    def projectors(self) -> tuple[str, ...]:
        return ("default",)

    def examples(self) -> list[dict[str, Any]]:
        return [{"type": self.part_type, "frames_SC": torch.ones(count, FRAME_WIDTH)} for count in (1, 7)]


def make_backbone(device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama with a head of its own and grouped-query attention in Phi-4-mini's proportion, 3 to 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa")
    return model.to(device, dtype).eval()


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    pictures, samples = Pictures(), []
    for index in range(NUM_PICTURES + NUM_TEXTS):
        num_frames = PICTURE_TOKENS if index < NUM_PICTURES else 0
        length = num_frames + (PICTURE_TEXT_TOKENS if num_frames else TEXT_TOKENS)
        places = torch.arange(length)
        items = ()
        if num_frames:
            prepared = pictures.prepare(torch.randn(num_frames, FRAME_WIDTH, generator=generator))
            items = (Item(pictures.name, pictures.projector(frozenset()), prepared),)
        samples.append(
            Sample(
                id=f"sample {index}",
                token_ids_T=torch.randint(VOCAB_SIZE, (length,), generator=generator),
                modality_ids_T=((places > 0) & (places <= num_frames)).long(),
                targets_T=places >= length - NUM_TARGETS,
                items=items,
            )
        )
    return samples


class Molora:
    """The step of `molora.train.loop`."""

    def __init__(self, backbone: PreTrainedModel, samples: list[Sample], device: str) -> None:
        adapters = {Pictures.name: lora_config(LORA, "adapter")}
        router = TableRouter(list(adapters), TableConfig())
        packed = Backbone(backbone, Identity("random", "", "", "", ""))
        self.model = MoLoRA(packed, {Pictures.name: Pictures()}, adapters, router)
        self.processor = Processor(byte_tokenizer(), self.model.modalities, router.order, packed.max_tokens)
        self.samples = samples
        patterns = {
            pattern: PartConfig(learning_rate=LEARNING_RATE, schedule="constant", beta2=0.999)
            for pattern in ("adapters", "projectors")
        }
        self.optimizers = set_trainable(self.model, patterns, total_steps=1, where="benchmark")
        self.model.train()

    def step(self) -> dict[str, Any]:
        return train_step(self.model, self.processor, self.samples, 8192, self.optimizers)


def milliseconds(step: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)
