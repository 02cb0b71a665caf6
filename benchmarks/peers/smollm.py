"""A small released language model on both sides: its decoding, one answer at a time, and a step of short samples.

Letters: T tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import molora
from benchmarks.peers import work
from benchmarks.peers.generation import Ours, same_answers
from benchmarks.peers.measure import Machine, Result, Row, Setup, in_turns, name_of
from benchmarks.peers.models import never_stop
from benchmarks.peers.training import TOKENS_PER_PACK, train_light_parts
from molora.checkpoint.assembly import blueprint
from molora.data.processor import Processor
from molora.inference.load import LoadedModel
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import byte_tokenizer
from molora.train.step import train_step

PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
NEW_TOKENS = 48
NUM_SAMPLES, TEXT_TOKENS, NUM_TARGETS = 32, 39, 3
LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
# The demo's eyes: a picture of 64 pixels is 6 tokens.
TOWER = {"kind": "convit", "pretrained": False, "convit": {"width": 96, "depth": 3, "heads": 4}}
VISION = {"crop_pixels": 64, "max_crops": 0, "pool": 4, "tower": TOWER}


def open_smollm(setup: Setup) -> LoadedModel:
    """The language model alone."""
    return molora.load(setup.smollm, dtype=name_of(setup.dtype), device=setup.device)


def decode_alone(setup: Setup) -> list[Result]:
    """One answer at a time: prompt and 48 tokens through molora and through transformers' generate."""
    loaded = open_smollm(setup)
    peer: Any = AutoModelForCausalLM.from_pretrained(setup.smollm, dtype=setup.dtype, attn_implementation="sdpa")
    peer.to(setup.device)
    sample = loaded.encode([{"role": "user", "content": PROMPT}])
    never_stop(loaded.model.backbone.model)
    never_stop(peer)
    loaded.model.backbone.turn_ends = frozenset()
    ours = Ours(loaded.model, NEW_TOKENS)
    ids_1T = sample.token_ids_T[None].to(setup.device)
    mask_1T = torch.ones_like(ids_1T)

    @torch.no_grad()
    def theirs() -> dict[str, list[int]]:
        rows = peer.generate(ids_1T, attention_mask=mask_1T, max_new_tokens=NEW_TOKENS, do_sample=False)
        return {sample.id: rows[0, len(sample) :].tolist()}

    mine = ours.answer([sample])
    checks = [same_answers("transformers' generate", mine, theirs(), setup.dtype == torch.float32)]
    machine = Machine(setup.dtype, setup.device)
    ours.decode_seconds.clear()
    sides: dict[str, Callable[[], object]] = {"molora": lambda: ours.answer([sample]), "transformers": theirs}
    taken = in_turns(work.with_products(sides), setup.rounds, setup.device, machine)
    read = work.decode_bytes(loaded.model, [len(sample)], [NEW_TOKENS])
    # Both sides read the same; the prompt's own pass is in the time and not in the bytes.
    rows = [Row(side, seconds, read_bytes=read) for side, seconds in taken.items()]
    about = f"SmolLM2-135M-Instruct, a prompt of {len(sample)} tokens, {NEW_TOKENS} new ones"
    return [setup.result("decoding one sample", about, checks, rows, machine)]


def short_samples(setup: Setup) -> list[Result]:
    """A training step of 32 samples of 45 tokens, each with a small picture; adapter and projector train."""
    loaded = open_smollm(setup)
    vision: Any = blueprint("vision", "vision", VISION, None, "benchmark").modality
    router = TableRouter(["vision"], TableConfig())
    model = MoLoRA(loaded.model.backbone, {"vision": vision}, {"vision": lora_config(LORA, "benchmark")}, router)
    processor = Processor(byte_tokenizer(), model.modalities, router.order, model.backbone.max_tokens)
    optimizers = train_light_parts(model)
    model.train()
    draw, noise = torch.Generator().manual_seed(0), np.random.default_rng(0)
    samples = []
    for index in range(NUM_SAMPLES):
        pixels = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        item = Item("vision", "default", vision.prepare(vision.load({"type": "image", "array": pixels})))
        length = item.prepared.num_tokens + TEXT_TOKENS
        ids_T, places_T = torch.randint(300, 40_000, (length,), generator=draw), torch.arange(length)
        marks_T = (places_T < item.prepared.num_tokens).long()
        samples.append(Sample(f"sample {index}", ids_T, marks_T, places_T >= length - NUM_TARGETS, (item,)))
    machine = Machine(setup.dtype, setup.device)
    step: Callable[[], object] = lambda: train_step(model, processor, samples, TOKENS_PER_PACK, optimizers)  # noqa: E731
    taken = in_turns(work.with_products({"molora": step}), setup.rounds, setup.device, machine)
    flop = work.step_flop(model, samples)
    rows = [Row(side, seconds, flop) for side, seconds in taken.items()]
    about = f"SmolLM2-135M-Instruct, {len(samples)} samples of {len(samples[0])} tokens"
    return [setup.result("training step, short samples", about, [], rows, machine)]
