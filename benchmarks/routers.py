"""One training step under each router, with four adapters: what deciding and mixing cost beside the table.

    python benchmarks/routers.py [--dtype bfloat16] [--repeats 7] [--device cuda]

The batch: two samples of each of four modalities, 256 frames and 48 text tokens each, 8 targets in every sample. The
backbone and the adapters are those of mixed_step.py. The table gives a sample the adapter of its modality; `sum` gives
it all four; the learned router chooses two of four for a sample, or for every token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from mixed_step import LEARNING_RATE, LORA, VOCAB_SIZE, WARMUPS, Pictures, make_backbone, milliseconds

from molora.config import build
from molora.data.processor import Processor
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.plugins import resolve
from molora.testing import byte_tokenizer
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

NAMES = ("first", "second", "third", "fourth")
# Precomputed frames again, under four names.
MODALITIES: dict[str, Pictures] = {name: type(name, (Pictures,), {"name": name, "part_type": name})() for name in NAMES}
NUM_FRAMES, TEXT_TOKENS, NUM_TARGETS = 256, 48, 8
LEARNED = {"modalities": list(NAMES), "candidates": "all", "top_k": 2, "balance": 0.01, "z": 0.001}
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "table": ("table", {}),
    "sum of four": ("sum", {"weights": {name: dict.fromkeys(NAMES, 0.25) for name in NAMES}}),
    "learned, sample": ("learned", LEARNED),
    "learned, token": ("learned", {**LEARNED, "scope": "token"}),
}


def make_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index in range(2 * len(NAMES)):
        name, length = NAMES[index % len(NAMES)], NUM_FRAMES + TEXT_TOKENS
        places = torch.arange(length)
        prepared = Pictures().prepare(torch.randn(NUM_FRAMES, 1152, generator=generator))
        samples.append(
            Sample(
                id=f"sample {index}",
                token_ids_T=torch.randint(VOCAB_SIZE, (length,), generator=generator),
                modality_ids_T=((places > 0) & (places <= NUM_FRAMES)).long() * (1 + NAMES.index(name)),
                targets_T=places >= length - NUM_TARGETS,
                items=(Item(name, "default", prepared),),
            )
        )
    return samples


class Step:
    """A training step of one model under one router."""

    def __init__(self, backbone: Any, plugin: str, options: dict[str, Any], device: str) -> None:
        router_class: Any = resolve("router", plugin)
        packed = Backbone(backbone, Identity("random", "", "", "", ""))
        router = router_class(NAMES, build(router_class.config_type, options, "router"), packed.width)
        adapters = {name: lora_config(LORA, name) for name in NAMES}
        self.model = MoLoRA(packed, MODALITIES, adapters, router)
        self.processor = Processor(byte_tokenizer(), MODALITIES, router.order, packed.max_tokens)
        learning = PartConfig(learning_rate=LEARNING_RATE, schedule="constant")
        trained = ["adapters", "projectors", *(["router"] if self.model.router_tensors() else [])]
        patterns = dict.fromkeys(trained, learning)
        self.optimizers = set_trainable(self.model, patterns, total_steps=1, where="benchmark")
        self.samples = make_samples()
        self.model.train()

    def __call__(self) -> None:
        train_step(self.model, self.processor, self.samples, 8192, self.optimizers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each router, taken in turn (default 7)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    arguments = parser.parse_args()
    backbone = make_backbone(arguments.device, getattr(torch, arguments.dtype))
    steps = {
        name: Step(copy.deepcopy(backbone), plugin, options, arguments.device)
        for name, (plugin, options) in ROUTERS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARMUPS + arguments.repeats):
        for name, step in steps.items():
            times[name].append(milliseconds(step, arguments.device))
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, {arguments.device}, torch {torch.__version__}")
    print("router             ms   ratio to table   ratios of single rounds")
    table = times["table"][WARMUPS:]
    for name, measured in times.items():
        mine = measured[WARMUPS:]
        ratios = sorted(a / b for a, b in zip(mine, table, strict=True))
        middle = f"{statistics.median(mine):>6.0f}{statistics.median(ratios):>13.3f}"
        print(f"{name:<16}{middle}      {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
