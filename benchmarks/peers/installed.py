"""What modalities cost that a batch does not use, and what it costs to mix those that it does.

Modalities here are lists of numbers with a one-layer encoder, so that what is timed is the backbone and its adapters.
All models share the backbone's tensors. The first row of each result is what the others are compared to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.peers.measure import Machine, Result, Row, Setup, check, in_turns, relative_difference
from benchmarks.peers.training import ALLOWED, TOKENS_PER_PACK, train_light_parts
from molora.data.processor import Processor
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Numbers, NumbersConfig, byte_tokenizer
from molora.train.step import train_step

LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "init_lora_weights": False,  # B is not zero, so that adapters count
}
NUM_NUMBERS, NUM_TARGETS = 64, 8
NEW_TOKENS = 16


def load_stock(setup: Setup) -> Any:
    """The backbone as transformers opens it."""
    stock: Any = AutoModelForCausalLM.from_pretrained(setup.folder / "run" / "backbone", dtype=setup.dtype)
    return stock.to(setup.device)


class Installed:
    """A model with so many modalities beside a backbone whose tensors it shares."""

    def __init__(self, stock: Any, count: int) -> None:
        shared = {id(tensor): tensor for tensor in (*stock.parameters(), *stock.buffers())}
        # What the probe finds is known: it tries thousands of tokens, and here once for each of many models.
        probe = {"embed_scale": 1.0}
        backbone = Backbone(copy.deepcopy(stock, shared), Identity("random", "", "", "", ""), probe=probe)
        names = [f"sense{index}" for index in range(count)]
        modalities = {name: _sense(name) for name in names}
        router = TableRouter(names, TableConfig())
        self.model = MoLoRA(backbone, modalities, {name: lora_config(LORA, name) for name in names}, router)
        self.processor = Processor(byte_tokenizer(), modalities, router.order, backbone.max_tokens)
        self.optimizers = train_light_parts(self.model) if names else {}

    def samples(self, kinds: Sequence[int | None], length: int) -> list[Sample]:
        """Samples of `length` tokens, each with the numbers of one modality, or None for text alone."""
        draw = torch.Generator().manual_seed(0)
        made = []
        for index, kind in enumerate(kinds):
            ids_T = torch.randint(300, self.model.backbone.vocab_size, (length,), generator=draw)
            places_T = torch.arange(length)
            items: tuple[Item, ...] = ()
            if kind is not None:
                modality: Any = self.model.modalities[f"sense{kind}"]
                numbers = torch.randn(NUM_NUMBERS, generator=draw).tolist()
                items = (Item(modality.name, "default", modality.prepare(numbers)),)
            is_media_T = (places_T < NUM_NUMBERS) & (kind is not None)
            marks_T = is_media_T.long() * (1 + (kind or 0))
            made.append(Sample(f"sample {index}", ids_T, marks_T, places_T >= length - NUM_TARGETS, items))
        return made

    def step(self, samples: Sequence[Sample]) -> dict[str, Any]:
        self.model.train()
        return train_step(self.model, self.processor, samples, TOKENS_PER_PACK, self.optimizers)

    @torch.no_grad()
    def losses(self, samples: Sequence[Sample]) -> Tensor:
        """The loss of each sample in one pack, in the order of the samples."""
        pack = self.processor.collate(samples).to(self.model.device)
        by_id = dict(zip(pack.ids, self.model.losses(pack).sums_N, strict=True))
        return torch.stack([by_id[sample.id] for sample in samples])

    def answers(self, samples: Sequence[Sample]) -> list[tuple[str, int]]:
        steps = generate(self.model, samples, GenerationConfig(max_new_tokens=NEW_TOKENS))
        return [(step.id, step.token_id) for step in steps]


def _sense(name: str) -> Numbers:
    kind: Any = type(name, (Numbers,), {"part_type": name})
    return kind(name, NumbersConfig())


def text_only(setup: Setup) -> list[Result]:
    """Texts through the bare backbone and through models with 1, 4 and 16 modalities: metrics of a training step, and
    answers."""
    stock = load_stock(setup)
    models = {"bare backbone": Installed(stock, 0)}
    models |= {f"{count} installed": Installed(stock, count) for count in (1, 4, 16)}
    texts = next(iter(models.values())).samples([None] * 8, 96)
    losses = {name: model.step(texts)["loss/text"] for name, model in models.items()}
    answers = {name: model.answers(texts) for name, model in models.items()}
    different = sum(answer != answers["bare backbone"] for answer in answers.values())
    checks = [
        check("losses of all models", max(losses.values()) - min(losses.values()), 0.0),
        check("models whose answers are not the bare backbone's", different, 0.0),
    ]
    results = []
    for name, work in (
        ("texts alone, training metrics", lambda model: lambda: model.step(texts)),
        ("texts alone, generation", lambda model: lambda: model.answers(texts)),
    ):
        sides: dict[str, Callable[[], object]] = {side: work(model) for side, model in models.items()}
        rows = [Row(side, seconds) for side, seconds in in_turns(sides, setup.rounds, setup.device).items()]
        results.append(setup.result(name, "8 texts of 96 tokens", checks, rows))
    return results


def mixed(setup: Setup) -> list[Result]:
    """A training step of 16 samples with 1 to 16 adapters among them; one of two adapters with 2 to 16 installed."""
    stock = load_stock(setup)
    models = {count: Installed(stock, count) for count in (2, 4, 8, 16)}
    full = models[16]
    batches = {count: full.samples([index % count for index in range(16)], 96) for count in (1, 2, 4, 8, 16)}
    together, two = full.losses(batches[16]), {count: model.losses(batches[2]) for count, model in models.items()}
    alone = torch.cat([full.losses([sample]) for sample in batches[16]])
    checks = [check("losses, each sample alone", relative_difference(together, alone), ALLOWED[setup.dtype])]
    sides: dict[str, Callable[[], object]] = {
        f"{count} adapters in the batch": lambda batch=batch: full.step(batch) for count, batch in batches.items()
    }
    machine = Machine(setup.dtype, setup.device)
    taken = in_turns(sides, setup.rounds, setup.device, machine)
    rows = [Row(side, taken[side], at=count) for side, count in zip(sides, batches, strict=True)]
    about = "16 samples of 96 tokens, 16 modalities installed"
    results = [setup.result("mixed batch", about, checks, rows, machine)]

    worst = max(float((losses - two[2]).abs().max()) for losses in two.values())
    checks = [check("losses of all models", worst, 0.0)]
    sides = {f"{count} installed": lambda model=model: model.step(batches[2]) for count, model in models.items()}
    taken = in_turns(sides, setup.rounds, setup.device)
    rows = [Row(side, taken[side], at=count) for side, count in zip(sides, models, strict=True)]
    about = "16 samples of 96 tokens with two adapters"
    results.append(setup.result("installed modalities", about, checks, rows))
    return results
