"""The promises, checked on a user's own model: what `molora verify` prints.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, cycle, islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from molora.backbone import weights_hash
from molora.checkpoint import read_blueprint
from molora.generate import GenerationConfig, generate
from molora.loading import LoadedModel
from molora.messages import Message
from molora.modality import Modality
from molora.model import MoLoRA
from molora.pack import Pack, Sample, collate
from molora.processor import SampleTooLong
from molora.routing import Flow, Routing, RoutingError
from molora.terminal import print_table, styled

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_NEW_TOKENS = 4
# Sets of modalities that are asked for a rule: all those of sixteen modalities, and of more the smaller ones.
_MAX_SETS = 2**16
_MAX_EXAMPLES = 32
_TEXTS = (
    "What is a sense?",
    "Count to three.",
    "A longer question, so that the samples differ in length: why is the sky blue?",
)


@dataclass(frozen=True)
class Check:
    """One checked promise: what was found, and whether it holds. None: nothing here to check it with."""

    promise: str
    found: str
    holds: bool | None


def verify(loaded: LoadedModel, rows: Sequence[dict[str, Any]], folders: Mapping[str, Path]) -> bool:
    """Checks every promise on `rows` (conversations with media), a few texts and the modalities' own examples, and
    prints a table.

    `folders` are those that the modalities were loaded from. Returns whether all that was checked holds.
    """
    samples = [loaded.encode([{"role": "user", "content": text}], f"text {i}") for i, text in enumerate(_TEXTS)]
    for index, row in enumerate(rows):
        prompt = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        samples.append(loaded.encode(prompt, f"row {index}"))
    known = routed(loaded, loaded.model.modalities)
    samples += [sample for _, (sample,) in examples([loaded], list(islice(known, _MAX_EXAMPLES)))]
    return show("promise", _checks(loaded.model, samples, folders))


def show(heading: str, checks: Iterable[Check]) -> bool:
    """Prints checks as a table within 80 columns. Returns whether none is broken."""
    marks = {True: ("holds", "green"), False: ("BROKEN", "red"), None: ("not checked", "yellow")}
    checks = list(checks)
    print_table((heading, "found", ""), [(c.promise, c.found, styled(*marks[c.holds])) for c in checks])
    return all(check.holds is not False for check in checks)


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
        turn = index // len(sets)
        messages = _conversation([parts[name] for name in sorted(modalities)], turn)
        try:
            encoded = tuple(loaded.encode(messages, f"example {index}") for loaded in models)
        except SampleTooLong:
            continue
        yield modalities, encoded


def _examples(modality: Modality) -> list[dict[str, Any]]:
    parts = modality.examples()
    if {part["type"] for part in parts} != {modality.part_type}:
        raise ValueError(
            f"modality {modality.name!r}: its plugin's examples() are {len(parts)} parts of types "
            f"{sorted({part['type'] for part in parts})}; it has to give some, of its own type {modality.part_type!r}"
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
    content.insert(turn % (len(content) + 1), {"type": "text", "text": f"{_TEXTS[turn % len(_TEXTS)]} {turn}"})
    return [{"role": "user", "content": content}]


@torch.no_grad()
def _checks(model: MoLoRA, samples: list[Sample], folders: Mapping[str, Path]) -> Iterator[Check]:
    model.eval()
    texts = [sample for sample in samples if not sample.items]
    media = [sample for sample in samples if sample.items]
    source = Path(model.backbone.identity.source)
    tolerance = _TOLERANCE[model.backbone.model.dtype]
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=model.backbone.model.dtype, attn_implementation="sdpa")
    stock = stock.to(model.device).eval()  # pyright: ignore[reportArgumentType]

    if source.is_dir():
        yield Check(
            "1 frozen", "backbone files have the recorded hash", weights_hash(source) == model.backbone.identity.weights
        )
    mine = {name.replace(".base_layer.", "."): value for name, value in model.backbone.model.state_dict().items()}
    same = all(torch.equal(mine[name], value) for name, value in stock.state_dict().items())
    yield Check("1 frozen", "weights in memory equal those on disk to the bit", same)
    equal = [
        torch.equal(model.logits(_alone(model, s)), stock(input_ids=s.token_ids_T[None].to(model.device)).logits[0])
        for s in texts
    ]
    yield Check("1 frozen", f"{sum(equal)} of {len(texts)} texts equal transformers (sdpa) to the bit", all(equal))

    pack = collate(samples, model.modalities, model.router.order).to(model.device)
    packed = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
    bare = dict(zip(pack.ids, _bare_logits(model, pack).split(pack.lengths), strict=True))
    untouched = [torch.equal(packed[s.id], bare[s.id]) for s in samples if not model.router.adapters(s.modalities)]
    found = f"{sum(untouched)} of {len(untouched)} samples without adapter equal the bare backbone's pack to the bit"
    yield Check("2 no interference", found, all(untouched))

    worst = max(_difference(packed[s.id], model.logits(_alone(model, s))) for s in samples)
    found = f"{len(samples)} samples packed differ from alone by at most {worst:.1e} (allowed {tolerance:.0e})"
    yield Check("3 any mix, one batch", found, worst <= tolerance)

    counted = sum(len(s.items) for s in media)
    yield Check("4 tokens equal frames", f"{counted} items gave the tokens they reserved", True if counted else None)

    answers: dict[str, list[int]] = {sample.id: [] for sample in samples}
    for step in generate(model, samples, GenerationConfig(max_new_tokens=_NEW_TOKENS)):
        answers[step.id].append(step.token_id)
    same_tokens = [answers[s.id] == _decode_without_cache(model, s, len(answers[s.id])) for s in samples]
    found = f"{sum(same_tokens)} of {len(samples)} cached answers equal full forwards"
    # In half precision two tokens may tie within rounding, so that only fp32 can promise equal tokens.
    exact = model.backbone.model.dtype in (torch.float32, torch.float64)
    yield Check("5 one path", found, all(same_tokens) if exact else None)

    for name, path in folders.items():
        read_blueprint(path, model.backbone.identity, name)
    yield Check(
        "6 nothing lost", f"{len(folders)} modality folders whole, files as recorded", True if folders else None
    )

    for name, path in folders.items():
        users = [s for s in media if model.router.adapters(s.modalities) == {name}]
        if name not in model.adapters or not users:
            yield Check("7 open ends", f"{name}: no sample uses its adapter", None)
            continue
        with warnings.catch_warnings():  # PEFT asks by a name that transformers has given up
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            peft: Any = PeftModel.from_pretrained(stock, str(path))
        sample = _alone(model, users[0])
        theirs = peft(inputs_embeds=model.embed(sample)[None]).logits[0]
        stock = peft.unload()
        difference = _difference(model.logits(sample), theirs)
        yield Check(
            "7 open ends", f"{name}: PEFT opens the folder, logits differ by {difference:.1e}", difference <= tolerance
        )


def _alone(model: MoLoRA, sample: Sample) -> Pack:
    return collate([sample], model.modalities).to(model.device)


def _difference(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0))


def _bare_logits(model: MoLoRA, pack: Pack) -> Tensor:
    """The pack with every sample on the bare backbone."""
    flow = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    return model.backbone.head(model.backbone(model.embed(pack), pack.position_ids_T, flow))


def _decode_without_cache(model: MoLoRA, sample: Sample, count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        new = torch.tensor(answer, dtype=torch.long)
        longer = replace(
            sample,
            token_ids_T=torch.cat([sample.token_ids_T, new]),
            modality_ids_T=torch.cat([sample.modality_ids_T, torch.zeros_like(new)]),
            targets_T=torch.zeros(len(sample) + len(new), dtype=torch.bool),
        )
        answer.append(int(model.logits(_alone(model, longer))[-1].argmax()))
    return answer
