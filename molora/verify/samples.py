"""Samples that promises are checked on: conversations made of texts and of the modalities' own examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, cycle, islice
from typing import Any

from molora.data.messages import Message
from molora.data.processor import SampleTooLong
from molora.inference.load import LoadedModel
from molora.modality import Modality
from molora.pack import Sample
from molora.routing import RoutingError

TEXTS = (
    "What is a sense?",
    "Count to three.",
    "A longer question, so that the samples differ in length: why is the sky blue?",
)
# Sets of modalities that are asked for a rule: all those of sixteen modalities, and of more the smaller ones.
_MAX_SETS = 2**16


def routed(loaded: LoadedModel, names: Iterable[str]) -> Iterator[frozenset[str]]:
    """The sets of these modalities that the model's router takes, the smaller ones first, beginning with none."""
    names = sorted(names)
    sets = chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))
    for modalities in map(frozenset, islice(sets, _MAX_SETS)):
        try:
            loaded.model.router.order(modalities)
        except RoutingError:
            continue
        yield modalities


def examples(
    models: Sequence[LoadedModel], sets: Sequence[frozenset[str]], count: int | None = None
) -> Iterator[tuple[frozenset[str], tuple[Sample, ...]]]:
    """Conversations of each of these sets of modalities in turn, `count` in all (by default one of each), as every
    model encodes them.

    They are made from what the first model's modalities bring as examples, so they are the same every time. One that
    is longer than a model takes is left out.
    """
    parts = {name: _examples(models[0].model.modalities[name]) for name in sorted(frozenset().union(*sets))}
    for index, modalities in enumerate(islice(cycle(sets), len(sets) if count is None else count)):
        messages = _conversation([parts[name] for name in sorted(modalities)], turn=index // len(sets))
        try:
            yield modalities, tuple(loaded.encode(messages, f"example {index}") for loaded in models)
        except SampleTooLong:
            continue


def _examples(modality: Modality) -> list[dict[str, Any]]:
    parts = modality.examples()
    types = {part["type"] for part in parts}
    if types != {modality.part_type}:
        raise ValueError(
            f"modality {modality.name!r}: its plugin's examples() are {len(parts)} parts of types {sorted(types)}; it "
            f"has to give some, of its own type {modality.part_type!r}"
        )
    return parts


def _conversation(parts: Sequence[Sequence[dict[str, Any]]], turn: int) -> list[Message]:
    """One example of each modality and a text; which, and in what order, changes from turn to turn."""
    left, chosen = turn, []
    for of_one_modality in parts:
        left, which = divmod(left, len(of_one_modality))
        chosen.append(of_one_modality[which])
    first = left % max(1, len(chosen))
    content = chosen[first:] + chosen[:first]
    content.insert(turn % (len(content) + 1), {"type": "text", "text": f"{TEXTS[turn % len(TEXTS)]} {turn}"})
    return [{"role": "user", "content": content}]
