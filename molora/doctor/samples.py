"""Samples that stand in for a recipe's data: the largest examples of its modalities, and text up to any length."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from molora.data.processor import Processor, SampleTooLong
from molora.modality import Modality
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routing import RoutingError, name_of
from molora.testing.tiny import byte_tokenizer
from molora.train.recipe import StageConfig


def modality_sets(model: MoLoRA) -> list[frozenset[str]]:
    """Sets of modalities that a sample may have: single ones, pairs, and all together, as far as they have a rule."""
    names = sorted(model.modalities)
    sizes = sorted({size for size in (1, 2, len(names)) if size <= len(names)})
    sets = [frozenset(some) for size in sizes for some in combinations(names, size)]
    return [some for some in sets if _ruled(model, some)] or [frozenset()]


def _ruled(model: MoLoRA, modalities: frozenset[str]) -> bool:
    try:
        model.router.order(modalities)
    except RoutingError:
        return False
    return True


def full_pack(model: MoLoRA, modalities: frozenset[str], stage: StageConfig) -> list[Sample]:
    """Samples that fill a pack of a stage, all the same: the largest examples of these modalities, and text."""
    most_tokens = min(stage.tokens_per_pack, model.backbone.max_tokens)
    shortest = largest_sample(model, modalities, 0, most_tokens)
    number = min(stage.samples_per_step, stage.tokens_per_pack // len(shortest))
    num_tokens = min(stage.tokens_per_pack // number, most_tokens)
    return copies(largest_sample(model, modalities, num_tokens, most_tokens), number)


def stand_in_processor(model: MoLoRA) -> Processor:
    """A processor whose tokenizer stands in for the backbone's: only how many tokens there are matters."""
    return Processor(byte_tokenizer(), model.modalities, model.router.order, sys.maxsize)


def largest_sample(
    model: MoLoRA, modalities: frozenset[str], num_tokens: int, most_tokens: int, *, generate: bool = False
) -> Sample:
    """A conversation about the largest example of each modality, or the smallest if that is too long, with text up to
    `num_tokens`. Raises SampleTooLong for one of more than `most_tokens`."""
    processor = stand_in_processor(model)
    examples = [_by_size(model.modalities[name]) for name in sorted(modalities)]
    length = 0
    for end in (-1, 0):
        parts = [parts[end] for parts in examples]
        shortest = len(_conversation(processor, parts, 1, generate))
        length = max(shortest, num_tokens)
        if length <= most_tokens:
            return _conversation(processor, parts, 1 + length - shortest, generate)
    raise SampleTooLong(
        f"a sample of {name_of(modalities)} takes {length:,} tokens, but only {most_tokens:,} fit into a pack and the "
        "backbone's context; raise tokens_per_pack, or ask for fewer tokens"
    )


def _by_size(modality: Modality) -> list[dict[str, Any]]:
    return sorted(modality.examples(), key=lambda part: modality.prepare(modality.load(part)).num_tokens)


def _conversation(processor: Processor, parts: Sequence[Mapping[str, Any]], num_letters: int, generate: bool) -> Sample:
    """Every letter is a token: of the answer, or of a question that has none yet."""
    text = "a" * num_letters
    question = {"role": "user", "content": [*parts, {"type": "text", "text": text if generate else "a"}]}
    messages = [question] if generate else [question, {"role": "assistant", "content": text}]
    return processor.encode(messages, "0", generate=generate)


def copies(sample: Sample, number: int) -> list[Sample]:
    return [replace(sample, id=str(index)) for index in range(number)]


def with_frames(model: MoLoRA, sample: Sample) -> Sample:
    """With the frames of encoders that do not train, as the feature cache brings them."""
    items = []
    for item in sample.items:
        encoder: Any = model.encoders[item.modality]
        trains = any(parameter.requires_grad for parameter in encoder.parameters())
        frames_SC = None if trains else torch.zeros(item.prepared.num_tokens, encoder.width)
        items.append(replace(item, frames_SC=frames_SC))
    return replace(sample, items=tuple(items))
