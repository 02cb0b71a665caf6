"""What answering needs of a device's memory.

Letters: N samples, K positions with logits, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from molora.doctor.dry_run import Alive, DryRun
from molora.doctor.needs import MemoryNeeds, Moment, Need, logits_of, size_of, weights
from molora.doctor.samples import copies, largest_sample, modality_sets, stand_in_processor
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.cache import PackedCache
from molora.model.molora import MoLoRA
from molora.routing import Flow, flowing, name_of


@dataclass(kw_only=True)
class AnsweringConfig:
    """How a model will answer: `max_running_samples` conversations at a time, each with a prompt of `prompt_tokens`,
    media included, and `max_new_tokens` of answer. `dtype` casts the backbone."""

    prompt_tokens: int = 1024
    max_new_tokens: int = 128
    max_running_samples: int = 64
    dtype: str | None = None


def answering_needs(model: MoLoRA, config: AnsweringConfig) -> MemoryNeeds:
    """What a model on the meta device needs to answer: at the prefill of all prompts, and at the last tokens.

    Keys and values are exactly what the cache holds at these moments. Prompts have an example of every modality that
    the router takes together, and text. The prefill was within 0.01 % of what the CPU's allocator gave out. What a step
    of decoding needs for itself is left out: little on the CPU; on CUDA, a layer's keys and values per query head.
    """
    owned = weights(model)
    decoding = GenerationConfig(max_new_tokens=config.max_new_tokens, max_running_samples=config.max_running_samples)
    return MemoryNeeds(owned, answering_moments(DryRun(model), decoding, config.prompt_tokens))


def answering_moments(dry: DryRun, config: GenerationConfig, prompt_tokens: int) -> tuple[Moment, Moment]:
    """What answering holds at its two fullest moments: all prompts in one pack, and every answer's last token."""
    model = dry.model
    modalities = max(modality_sets(model), key=len)
    sample = largest_sample(model, modalities, prompt_tokens, model.backbone.max_tokens, generate=True)
    number = config.max_running_samples
    with dry:
        steps = generate(model, copies(sample, number), config)
        next(steps)
        begun, prefill = dry.alive, dry.fullest
    per_position = number * _cached_per_position(dry)
    at_first, at_last = (
        per_position * positions
        for positions in (len(sample), cached_positions(model.backbone, len(sample), config.max_new_tokens))
    )
    prompts = f"{number} x {len(sample):,} tokens of {name_of(sample.modalities)}"
    answers = f"{prompts}, {config.max_new_tokens:,} new ones each, and room to grow"

    def moment(name: str, alive: Alive, cached: int, cached_origin: str, origin: str) -> Moment:
        needs = (
            Need("KV cache", cached, cached_origin),
            Need("logits", alive.logits, logits_of(alive.logits, f"{number} at a time", model)),
            Need("activations", alive.num_bytes - alive.logits - at_first, origin),
        )
        return Moment(name, needs)

    return (
        moment("prefill", prefill, at_first, prompts, "of all prompts in one pack"),
        moment("last tokens", begun, at_last, answers, "the prompts' embeddings"),
    )


def _cached_per_position(dry: DryRun) -> int:
    """Bytes of keys and values of one position of one sample, over all layers."""
    model, cache = dry.model.eval(), PackedCache()
    sample = largest_sample(model, frozenset(), 0, model.backbone.max_tokens)
    with dry, torch.no_grad():
        model(stand_in_processor(model).collate([sample]), cache=cache)
    return size_of(cache.tensors()) // len(sample)


def cached_positions(backbone: Backbone, prompt_tokens: int, new_tokens: int) -> int:
    """Positions that the cache has room for when a sample's last token has been chosen: its buffers grow as they
    fill, and begin anew where a sample changes its rotary frequencies."""

    def extend(cache: PackedCache, tokens: int) -> PackedCache:
        states = torch.empty((1, 1, tokens, 1), device="meta")
        with flowing(Flow((tokens,))):
            cache.update(states, states, 0)
        return cache

    cache = extend(PackedCache(), prompt_tokens)
    for length in range(prompt_tokens + 1, min(prompt_tokens + new_tokens, backbone.max_tokens)):
        crosses = backbone.regime(length) != backbone.regime(length - 1)
        cache = extend(PackedCache(), length) if crosses else extend(cache, 1)
    return next(cache.tensors()).shape[2]
