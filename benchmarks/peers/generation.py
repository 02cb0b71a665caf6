"""Answers of mixed batches beside transformers' generate: grouped by modality, and with PEFT's `adapter_names`.

Letters: N samples, T tokens of the longest, D backbone width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import work
from benchmarks.peers.measure import Machine, Result, Row, Setup, in_turns
from benchmarks.peers.models import Shape, make_samples, open_ours, open_theirs
from benchmarks.peers.training import GROUPS, padded_inputs
from molora.inference.generate import GenerationConfig, generate
from molora.model.molora import MoLoRA
from molora.pack import Sample

NEW_TOKENS, MOST_TOKENS = 32, 64

Answers = dict[str, list[int]]


@dataclass
class Ours:
    """molora's answers; `decode_seconds` of the last call are those after every sample's first token."""

    model: MoLoRA
    max_new_tokens: int
    decode_seconds: list[float] = field(default_factory=list)

    def answer(self, samples: Sequence[Sample]) -> Answers:
        config = GenerationConfig(max_new_tokens=self.max_new_tokens, max_running_samples=len(samples))
        answers: Answers = {sample.id: [] for sample in samples}
        begun, started = 0, 0.0
        for step in generate(self.model, samples, config):
            begun += not answers[step.id]
            answers[step.id].append(step.token_id)
            if begun == len(samples) and not started:
                started = time.perf_counter()
        self.decode_seconds.append(time.perf_counter() - started)
        return answers


class Theirs:
    """transformers' generate. Prompts are embedded before it, as a batch with pictures would project clips otherwise,
    and padded on the left."""

    def __init__(self, setup: Setup, samples: Sequence[Sample], ours: MoLoRA) -> None:
        self.model = open_theirs(setup.folder, setup.dtype, setup.device).eval()
        # PEFT keeps adapters in fp32, which is right for training; here they are as narrow as the backbone.
        self.model.to(setup.dtype)
        self.native = self.model.base_model.model
        self.ours, self.device = ours, setup.device
        self.samples = list(samples)

    def embed(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Embeddings (N, T, D) and mask (N, T) of prompts of one modality, padded on the left."""
        config = self.native.config
        rows = []
        for sample in samples:  # texts beside media are of any length, and the model's own splice takes one batch
            batch = padded_inputs([sample], self.ours, config, self.device)
            rows.append(batch["input_ids"][0])
        longest = max(map(len, rows))
        ids_NT = torch.stack([F.pad(row, (longest - len(row), 0), value=config.pad_token_id) for row in rows])
        mask_NT = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        media = padded_inputs(samples, self.ours, config, self.device)
        embeds_NTD = self.native.model.embed_tokens(ids_NT)
        for kind in ("image", "audio"):
            given = {key: value for key, value in media.items() if key.startswith(kind)}
            if given:
                embeds_NTD = self.native.model.embed_tokens_extend(ids_NT, embeds_NTD, **given)
        return embeds_NTD, mask_NT

    @torch.no_grad()
    def _generate(self, samples: Sequence[Sample], max_new_tokens: int, **more: Any) -> Answers:
        embeds_NTD, mask_NT = self.embed(samples)
        rows = self.model.generate(
            inputs_embeds=embeds_NTD, attention_mask=mask_NT, max_new_tokens=max_new_tokens, do_sample=False, **more
        )
        return {sample.id: row.tolist() for sample, row in zip(samples, rows, strict=True)}

    def grouped(self, max_new_tokens: int) -> Answers:
        """A batch per adapter."""
        answers: Answers = {}
        for name in GROUPS:
            group = [s for s in self.samples if s.modalities == (frozenset({name}) if name else frozenset())]
            if not group:
                continue
            if name:
                self.model.set_adapter(name)
                answers |= self._generate(group, max_new_tokens)
            else:
                with self.model.disable_adapter():
                    answers |= self._generate(group, max_new_tokens)
        return answers

    def together(self, max_new_tokens: int) -> Answers:
        """One batch, each sample with its adapter."""
        names = [next(iter(sample.modalities), "__base__") for sample in self.samples]
        return self._generate(self.samples, max_new_tokens, adapter_names=names)


def same_answers(what: str, mine: Answers, theirs: Answers, exact: bool) -> str:
    """A line for the report. Raises RuntimeError if an answer in fp32 has another token."""
    cut = {id: tokens[: len(mine[id])] for id, tokens in theirs.items()}  # behind a stop token there is only padding
    same = sum(mine[id] == cut[id] for id in mine)
    if exact and same < len(mine):
        wrong = next(id for id in mine if mine[id] != cut[id])
        raise RuntimeError(
            f"{what}: {wrong} is answered {mine[wrong][:8]}… by molora and {cut[wrong][:8]}… by its peer"
        )
    return f"{what}: {same} of {len(mine)} answers have the same tokens"


def mixed_batch(setup: Setup) -> list[Result]:
    """The eight samples of the training comparison, 32 tokens each."""
    ours = Ours(open_ours(setup.folder, setup.dtype, setup.device).model, NEW_TOKENS)
    samples = make_samples(ours.model, Shape())
    theirs = Theirs(setup, samples, ours.model)
    sides: dict[str, Callable[[], Answers]] = {
        "molora": lambda: ours.answer(samples),
        "peer, grouped": lambda: theirs.grouped(NEW_TOKENS),
        "peer, adapter_names": lambda: theirs.together(NEW_TOKENS),
    }
    mine, *others = (answer() for answer in sides.values())
    exact = setup.dtype == torch.float32
    checks = [same_answers(side, mine, other, exact) for side, other in zip(list(sides)[1:], others, strict=True)]
    machine = Machine(setup.dtype, setup.device)
    taken = in_turns(work.with_products(sides), setup.rounds, setup.device, machine)
    flop = work.answer_flop(ours.model, samples, [len(mine[sample.id]) for sample in samples])
    rows = [Row(side, seconds, flop) for side, seconds in taken.items()]
    about = f"2 pictures, 3 clips, 3 texts, {NEW_TOKENS} tokens each"
    return [setup.result("generation, 8 x 32", about, checks, rows, machine)]


def requests(setup: Setup) -> list[Result]:
    """64 requests with prompts of unequal lengths and answers that end by themselves, and the bandwidth of decoding."""
    ours = Ours(open_ours(setup.folder, setup.dtype, setup.device).model, MOST_TOKENS)
    samples = _unequal(make_samples(ours.model, Shape(pictures=8, clips=24, texts=32, text_alone=240)))
    theirs = Theirs(setup, samples, ours.model)
    # A fortieth of all tokens end an answer, so that answers are of any length up to the limit.
    vocab_size = ours.model.backbone.vocab_size
    stops = list(range(300, 300 + vocab_size // 40))
    for generation in (ours.model.backbone.model.generation_config, theirs.native.generation_config):
        generation.eos_token_id, generation.pad_token_id = stops, 0
    sides: dict[str, Callable[[], Answers]] = {
        "molora": lambda: ours.answer(samples),
        "peer, grouped": lambda: theirs.grouped(MOST_TOKENS),
    }
    mine, other = (answer() for answer in sides.values())
    checks = [same_answers("peer, grouped", mine, other, setup.dtype == torch.float32)]
    machine = Machine(setup.dtype, setup.device)
    ours.decode_seconds.clear()
    taken = in_turns(sides, setup.rounds, setup.device, machine)
    lengths = [len(mine[sample.id]) for sample in samples]
    prompts = [len(sample) for sample in samples]
    flop = work.answer_flop(ours.model, samples, lengths)
    rows = [Row(side, seconds, flop) for side, seconds in taken.items()]
    about = (
        f"64 requests, prompts of {min(prompts)} to {max(prompts)} tokens, "
        f"answers of {min(lengths)} to {max(lengths)}, {sum(lengths):,} in all"
    )
    read = work.decode_bytes(ours.model, prompts, lengths)
    flop = work.decode_flop(ours.model, samples, lengths)
    decode = [Row("molora, decoding alone", ours.decode_seconds[-setup.rounds :], flop, read)]
    return [
        setup.result("generation, 64 requests", about, checks, rows, machine),
        setup.result("decoding, 64 requests", about, checks, decode, machine),
    ]


def _unequal(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with texts cut to different lengths, in an order that mixes kinds."""
    draw = torch.Generator().manual_seed(1)
    cut = []
    for sample in samples:
        num_media = sum(item.prepared.num_tokens for item in sample.items)
        num_text = len(sample) - num_media
        length = num_media + int(torch.randint(num_text // 8, num_text + 1, (), generator=draw))
        tensors = {key: getattr(sample, key)[:length] for key in ("token_ids_T", "modality_ids_T", "targets_T")}
        cut.append(replace(sample, **tensors))
    return [cut[index] for index in torch.randperm(len(cut), generator=draw).tolist()]
