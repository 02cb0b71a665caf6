"""One training step of molora beside transformers + peft on the same mixed batch.

    python benchmarks/train_step.py [--dtype bfloat16] [--repeats 7] [--device cuda]

The batch: 2 pictures of 545 frames with 48 text tokens each, 6 text samples of 64 tokens, 8 targets in every sample.
The backbone: a random Llama of 12 layers, width 768, 32k vocabulary. Pictures enter as precomputed encoder frames, so
that the time is that of projector, backbone, adapter, loss and optimiser. A step is forward, backward and AdamW.

molora's side is `molora.train.loop.train_step`, packing included. The peer's is what is usually written with these
libraries: samples padded to the longest (once, outside the step), projected frames scattered into `inputs_embeds`,
sdpa, one adapter from `get_peft_model` for all samples, the loss from `labels`. Both train the adapter and the
projector on a frozen base, from the same initial weights.

Letters: N samples, T tokens of the longest sample, S frames, C frame width, D backbone width.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from molora.data.processor import Processor
from molora.modality import Encoder, Frames, Prepared
from molora.model import lora
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import byte_tokenizer
from molora.train.optim import PartConfig, count, set_trainable
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


class Peer:
    """The same samples through transformers and peft, padded."""

    def __init__(self, backbone: PreTrainedModel, samples: list[Sample], device: str, weights_of: MoLoRA) -> None:
        config = peft.LoraConfig(**LORA, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(backbone, config)
        peft.set_peft_model_state_dict(self.model, lora.adapter_tensors(weights_of.backbone.model, Pictures.name))
        projectors: Any = weights_of.projectors[Pictures.name]
        self.projector: nn.Module = copy.deepcopy(projectors["default"]).requires_grad_(True)

        def padded(rows: list[Tensor], padding: int) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=padding).to(device)

        self.token_ids_NT = padded([s.token_ids_T for s in samples], 0)
        self.is_media_NT = padded([s.modality_ids_T > 0 for s in samples], 0)
        self.mask_NT = padded([torch.ones_like(s.token_ids_T) for s in samples], 0)
        self.labels_NT = padded([s.token_ids_T.where(s.targets_T, -100) for s in samples], -100)
        self.frames_SC = torch.cat([item.prepared.tensors["frames_SC"] for s in samples for item in s.items]).to(device)
        trainable = [p for module in (self.model, self.projector) for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
        self.model.train()

    def loss(self, labels_NT: Tensor) -> Tensor:
        embeds_NTD = self.model.get_input_embeddings()(self.token_ids_NT)
        tokens_SD = self.projector(self.frames_SC).to(embeds_NTD.dtype)
        embeds_NTD = embeds_NTD.masked_scatter(self.is_media_NT[..., None], tokens_SD)
        output = self.model(inputs_embeds=embeds_NTD, attention_mask=self.mask_NT, labels=labels_NT, use_cache=False)
        return output.loss

    def step(self) -> None:
        self.loss(self.labels_NT).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def agreement(ours: Molora, peer: Peer) -> str:
    """One line that says how far loss and gradients of the picture samples differ; must run before the first step."""
    pictures = [index for index, sample in enumerate(ours.samples) if sample.items]
    pack = ours.processor.collate([ours.samples[index] for index in pictures]).to(ours.model.device)
    our_loss = ours.model.losses(pack).sums_N.sum() / (NUM_TARGETS * len(pictures))
    labels_NT = torch.full_like(peer.labels_NT, -100)
    labels_NT[pictures] = peer.labels_NT[pictures]
    peer_loss = peer.loss(labels_NT)
    our_loss.backward()
    peer_loss.backward()
    parts = ours.model.parts()
    mine = [p for part in ("adapters.vision", "projectors.vision.default") for p in parts[part].values()]
    theirs = peer.optimizer.param_groups[0]["params"]
    worst = max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in zip(mine, theirs, strict=True))
    for parameter in (*mine, *theirs):
        parameter.grad = None
    return (
        f"picture samples: loss {our_loss.item():.6f} molora, {peer_loss.item():.6f} peer; "
        f"largest relative gradient difference over {len(mine)} tensors {worst:.1e}"
    )


def milliseconds(step: Callable[[], Any], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each side, taken in turn (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    device, samples = arguments.device, make_samples()
    rows = []
    for dtype in arguments.dtype:
        backbone = make_backbone(device, getattr(torch, dtype))
        num_parameters = count(backbone.parameters())
        ours = Molora(copy.deepcopy(backbone), samples, device)
        peer = Peer(backbone, samples, device, weights_of=ours.model)
        print(f"{dtype}, {agreement(ours, peer)}", flush=True)
        times: list[tuple[float, float]] = []
        for turn in range(1 - WARMUPS, arguments.repeats + 1):
            times.append((milliseconds(ours.step, device), milliseconds(peer.step, device)))
            print(f"{dtype}, round {turn}: {times[-1][0]:.0f} ms molora, {times[-1][1]:.0f} ms peer", flush=True)
        our_ms, peer_ms = (statistics.median(side) for side in zip(*times[WARMUPS:], strict=True))
        ratios = [mine / theirs for mine, theirs in times[WARMUPS:]]
        rows.append((dtype, our_ms, peer_ms, our_ms / peer_ms, f"{min(ratios):.3f} to {max(ratios):.3f}"))
    print(f"\nbackbone {num_parameters:,} parameters, head not tied; {torch.get_num_threads()} threads, {device}")
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}\n"
    )
    print("dtype       molora ms   peer ms   ratio   ratios of single rounds")
    for dtype, our_ms, peer_ms, ratio, spread in rows:
        print(f"{dtype:<10} {our_ms:>10.0f} {peer_ms:>9.0f} {ratio:>7.3f}   {spread}")


if __name__ == "__main__":
    main()
