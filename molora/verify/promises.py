"""The promises, checked on a user's own model: what `molora verify` prints.

Letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, combinations, cycle, groupby, islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from molora.checkpoint.modality_folder import check_modality, read_about
from molora.checkpoint.pretrained import open_stock
from molora.data.messages import Message
from molora.data.processor import SampleTooLong
from molora.inference.generate import GenerationConfig, generate
from molora.inference.load import LoadedModel
from molora.modality import Modality
from molora.model.experts import Choices, routers
from molora.model.identity import weights_hash
from molora.model.lora import adapter_tensors
from molora.model.molora import MoLoRA
from molora.model.probe import decoder_layers, largest, stock_attention
from molora.pack import Pack, Sample, collate
from molora.received import read_tensors
from molora.routing import Flow, Routing, RoutingError
from molora.terminal import Finding, print_findings
from molora.verify.rounding import HALF, difference, in_fp32, measure

_TOLERANCE = 1e-5
_NEW_TOKENS = 4
# Sets of modalities that are asked for a rule: all those of sixteen modalities, and of more the smaller ones.
_MAX_SETS = 2**16
_MAX_EXAMPLES = 32
_TEXTS = (
    "What is a sense?",
    "Count to three.",
    "A longer question, so that the samples differ in length: why is the sky blue?",
)


def verify(loaded: LoadedModel, rows: Sequence[dict[str, Any]], folders: Mapping[str, Path]) -> bool:
    """Checks every promise as `promises` does and prints a table. Returns whether all that was checked holds."""
    return show("promise", promises(loaded, rows, folders))


def promises(loaded: LoadedModel, rows: Sequence[dict[str, Any]], folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Checks every promise on `rows` (conversations with media), a few texts and the modalities' own examples.

    `folders` are those that the modalities were loaded from. What is promised to the bit is compared to the bit. The
    rest is summed in another order, and is compared within 1e-5 in fp32. In half precision rounding is far larger, so
    there it may differ as far as the stock model itself, measured here, from its results in other shapes and in fp32;
    and it is computed in fp32 as well, layer by layer, which needs no second model.
    """
    samples = [loaded.encode([{"role": "user", "content": text}], f"text {i}") for i, text in enumerate(_TEXTS)]
    for index, row in enumerate(rows):
        prompt = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        samples.append(loaded.encode(prompt, f"row {index}"))
    known = routed(loaded, loaded.model.modalities)
    samples += [sample for _, (sample,) in examples([loaded], list(islice(known, _MAX_EXAMPLES)))]
    yield from _checks(loaded.model, samples, folders)


def show(heading: str, findings: Iterable[Finding]) -> bool:
    """Prints findings as a table within 80 columns. Returns whether none is broken."""
    return print_findings(heading, findings, ("holds", "BROKEN", "not checked"))


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
def _checks(model: MoLoRA, samples: list[Sample], folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Exact promises to the bit; the others within the tolerance of fp32, or of how far a half-precision model moves by
    itself, and then in fp32 too."""
    model.eval()
    texts = [sample for sample in samples if not sample.items]
    source = model.backbone.folder
    stock = open_stock(source, model.backbone.model.dtype).to(model.device).eval()  # pyright: ignore[reportArgumentType]
    stock.set_attn_implementation(stock_attention(stock))
    pack = collate(samples, model.modalities, model.router.order).to(model.device)
    packed = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))

    precisions = _precisions(model, stock, samples)
    yield from _frozen(model, stock, source, texts, precisions)
    yield from _no_interference(model, pack, packed)
    yield from _own_place(model, samples, pack, packed)
    for precision in precisions:
        yield _packed_as_alone(model, samples, pack, precision)
    counted = sum(len(sample.items) for sample in samples)
    yield Finding("4 tokens equal frames", f"{counted} items gave the tokens they reserved", True if counted else None)
    for precision in precisions:
        yield _cached_as_not(model, samples, precision)
    yield _whole(model, folders)
    for name, path in folders.items():
        users = [sample for sample in samples if model.router.adapters(sample.modalities) == {name}]
        if name not in model.adapters or not users:
            yield Finding("7 open ends", f"{name}: no sample uses its adapter", None)
            continue
        with warnings.catch_warnings():  # PEFT asks by a name that transformers has given up
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            peft: Any = PeftModel.from_pretrained(stock, str(path))
        for precision in precisions:
            yield _peft_as_ours(model, peft, name, users[0], precision)
        stock = peft.unload()


@dataclass(frozen=True)
class _Precision:
    """A dtype to compare in: what to call it, how far results may differ there, and why."""

    told: str
    tolerance: float
    reason: str
    fp32: bool = False

    @contextmanager
    def of(self, model: PreTrainedModel) -> Iterator[None]:
        with in_fp32(model) if self.fp32 else nullcontext():
            yield

    def check(self, promise: str, found: str, difference: float) -> Finding:
        return Finding(promise, f"{found} by {difference:.1e}{self.told} ({self.reason})", difference <= self.tolerance)


def _precisions(model: MoLoRA, stock: PreTrainedModel, samples: Sequence[Sample]) -> list[_Precision]:
    """The model's own dtype; and fp32, where what a fault does is not hidden by rounding."""
    allowed = f"allowed {_TOLERANCE:.0e}"
    if model.backbone.model.dtype not in HALF:
        return [_Precision("", _TOLERANCE, allowed)]
    fp32 = _Precision(" in fp32", _TOLERANCE, allowed, fp32=True)
    if routers(stock):  # rounding swaps experts that are close, and what follows is another computation
        return [fp32]
    own = measure(stock, [model.embed(_alone(model, sample)) for sample in samples])
    reason = f"the stock model: padded from alone by {own.shape:.1e}, from its own fp32 by {own.fp32:.1e}"
    return [_Precision("", own.most, reason), fp32]


def _frozen(
    model: MoLoRA, stock: Any, source: Path, texts: Sequence[Sample], precisions: Sequence[_Precision]
) -> Iterator[Finding]:
    yield Finding(
        "1 frozen", "backbone files have the recorded hash", weights_hash(source) == model.backbone.identity.weights
    )
    mine = {name.replace(".base_layer.", "."): value for name, value in model.backbone.model.state_dict().items()}
    same = all(torch.equal(mine[name], value) for name, value in stock.state_dict().items())
    yield Finding("1 frozen", "weights in memory equal those on disk to the bit", same)
    if stock.config._attn_implementation == "sdpa":
        pairs = list(_beside_stock(model, stock, texts))
        equal = [torch.equal(ours, theirs) for ours, theirs in pairs]
        yield Finding(
            "1 frozen", f"{sum(equal)} of {len(texts)} texts equal transformers (sdpa) to the bit", all(equal)
        )
        return
    for precision in precisions:  # caps and sinks are computed in another order
        with precision.of(model.backbone.model), precision.of(stock):
            worst = largest(difference(ours, theirs) for ours, theirs in _beside_stock(model, stock, texts))
        yield precision.check("1 frozen", f"{len(texts)} texts differ from transformers (eager)", worst)


def _beside_stock(model: MoLoRA, stock: Any, texts: Sequence[Sample]) -> Iterator[tuple[Tensor, Tensor]]:
    for text in texts:
        pack = _alone(model, text)
        yield model.logits(pack), stock(input_ids=pack.token_ids_T[None]).logits[0]


def _no_interference(model: MoLoRA, pack: Pack, packed: Mapping[str, Tensor]) -> Iterator[Finding]:
    modalities = dict(zip(pack.ids, pack.modalities, strict=True))
    bare = dict(zip(pack.ids, _bare_logits(model, pack).split(pack.lengths), strict=True))
    untouched = [torch.equal(packed[id], bare[id]) for id in pack.ids if not model.router.adapters(modalities[id])]
    found = f"{sum(untouched)} of {len(untouched)} samples without adapter equal the bare backbone's pack to the bit"
    yield Finding("2 no interference", found, all(untouched))
    stayed: list[bool] = []
    for name in model.modalities:
        with _negated(model, name):
            logits = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
        others = [id for id, its in modalities.items() if name not in its | model.router.adapters(its)]
        stayed += [torch.equal(logits[id], packed[id]) for id in others]
    found = f"a modality's weights negated: {sum(stayed)} of {len(stayed)} samples without it are equal to the bit"
    yield Finding("2 no interference", found, all(stayed) if stayed else None)


@contextmanager
def _negated(model: MoLoRA, name: str) -> Iterator[None]:
    """One modality with its tokens and its adapter turned around, which loses no bit."""
    changed = [
        parameter
        for part, parameters in model.parts().items()
        for key, parameter in parameters.items()
        if part.startswith(f"projectors.{name}.") or (part == f"adapters.{name}" and ".lora_B." in key)
    ]
    for parameter in changed:
        parameter.neg_()
    try:
        yield
    finally:
        for parameter in changed:
            parameter.neg_()


def _own_place(model: MoLoRA, samples: Sequence[Sample], pack: Pack, packed: Mapping[str, Tensor]) -> Iterator[Finding]:
    """What a sample is told of its place is the same in a pack, and what its neighbours hold does not reach it."""
    told = dict(zip(pack.ids, _told(model, pack), strict=True))
    equal = [_equal(_told(model, _alone(model, sample))[0], told[sample.id]) for sample in samples]
    yield Finding(
        "3 any mix, one batch", f"{sum(equal)} of {len(samples)} samples packed have their own positions", all(equal)
    )
    if routers(model.backbone.model):
        # Experts run on all tokens that chose them, so how many there are follows from the neighbours.
        yield Finding("3 any mix, one batch", "neighbours of experts move the order of their sums", None)
        return
    embeds_TD = model.embed(pack)
    equal = []
    for side in (0, 1):
        turned_T1 = (pack.sample_ids_T % 2 == side)[:, None]
        hidden_TD = model(pack, embeds_TD=embeds_TD.where(~turned_T1, -embeds_TD))
        logits = model.backbone.head(hidden_TD).split(pack.lengths)
        stayed = list(zip(pack.ids, logits, strict=True))[1 - side :: 2]
        equal += [torch.equal(logits_TV, packed[id]) for id, logits_TV in stayed]
    found = f"{sum(equal)} of {len(samples)} samples are equal to the bit when all of their neighbours change"
    yield Finding("3 any mix, one batch", found, all(equal))


def _told(model: MoLoRA, pack: Pack) -> list[list[Tensor]]:
    """Sample by sample, the positions and rotary embeddings that each layer gets."""
    given: list[Tensor] = []

    def keep(layer: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rotary = kwargs.get("position_embeddings")
        for tensor in (kwargs.get("position_ids"), *(rotary if isinstance(rotary, tuple) else (rotary,))):
            if tensor is not None and not any(tensor is known for known in given):
                given.append(tensor)

    layers = decoder_layers(model.backbone.model)
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    model(pack)
    for hook in hooks:
        hook.remove()
    by_tensor = [tensor.split(pack.lengths, dim=1) for tensor in given]
    return [[tensors[n] for tensors in by_tensor] for n in range(len(pack))]


def _equal(ours: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    return all(torch.equal(mine, its) for mine, its in zip(ours, reference, strict=True))


def _packed_as_alone(model: MoLoRA, samples: Sequence[Sample], pack: Pack, precision: _Precision) -> Finding:
    choices = Choices(model.backbone.model)
    with precision.of(model.backbone.model):
        with choices.keeping():
            alone = {sample.id: model.logits(_alone(model, sample)) for sample in samples}
        which = [list(alone).index(id) for id in pack.ids]
        with choices.again(which, pack.lengths):
            packed = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
    worst = largest(difference(packed[id], alone[id]) for id in pack.ids)
    return precision.check("3 any mix, one batch", f"{len(samples)} samples packed differ from alone", worst)


def _cached_as_not(model: MoLoRA, samples: Sequence[Sample], precision: _Precision) -> Finding:
    """Each token of an answer that was made with the cache is the likeliest after those before it without."""
    behind: list[float] = []
    with precision.of(model.backbone.model):
        answers: dict[str, list[int]] = {sample.id: [] for sample in samples}
        for step in generate(model, samples, GenerationConfig(max_new_tokens=_NEW_TOKENS)):
            answers[step.id].append(step.token_id)
        for sample in samples:
            answer = answers[sample.id]
            for logits_V, token in zip(_without_cache(model, sample, answer), answer, strict=True):
                behind.append(float((logits_V.max() - logits_V[token]) / logits_V.abs().max().clamp(min=1.0)))
    same = sum(lag == 0 for lag in behind)
    found = f"{same} of {len(behind)} cached tokens are a full forward's, the worst is behind"
    return precision.check("5 one path", found, largest(behind))


def _whole(model: MoLoRA, folders: Mapping[str, Path]) -> Finding:
    """Modality folders have the hashes that they list, and what runs is what they hold."""
    other: list[str] = []
    for name, path in folders.items():
        check_modality(path, model.backbone.identity)
        here = {
            "projector.safetensors": model.projectors[name].state_dict(),
            "encoder.safetensors": model.encoders[name].state_dict(),
            "adapter_model.safetensors": adapter_tensors(model.backbone.model, name),
        }
        for file in here.keys() & read_about(path)["files"].keys():
            tensors = read_tensors(path / file, path)
            mine = here[file]
            if mine.keys() != tensors.keys() or not all(
                torch.equal(mine[key].cpu(), tensor.to(mine[key].dtype)) for key, tensor in tensors.items()
            ):
                other.append(f"{name}/{file}")
    found = f"{len(folders)} modality folders whole, files as recorded"
    found += f"; the weights in memory are others than in {', '.join(sorted(other))}" if other else " and as in memory"
    return Finding("6 nothing lost", found, not other if folders else None)


def _peft_as_ours(model: MoLoRA, peft: Any, name: str, sample: Sample, precision: _Precision) -> Finding:
    pack = _alone(model, sample)
    embeds_TD = model.embed(pack)
    embeds_TD = embeds_TD.float() if precision.fp32 else embeds_TD
    with precision.of(peft.base_model.model):
        theirs = peft(inputs_embeds=embeds_TD[None]).logits[0]
    with precision.of(model.backbone.model):
        ours = model.backbone.head(model(pack, embeds_TD=embeds_TD))
    return precision.check("7 open ends", f"{name}: PEFT opens the folder, logits differ", difference(ours, theirs))


def _alone(model: MoLoRA, sample: Sample) -> Pack:
    return collate([sample], model.modalities).to(model.device)


def _bare_logits(model: MoLoRA, pack: Pack) -> Tensor:
    """The pack with every sample on the bare backbone."""
    flow = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    return model.backbone.head(model.backbone(model.embed(pack), pack.position_ids_T, flow))


def _without_cache(model: MoLoRA, sample: Sample, answer: Sequence[int]) -> Iterator[Tensor]:
    """The logits before each token of an answer, from forwards over all that came before it: one for tokens that share
    their rotary frequencies."""
    for _, group in groupby(range(len(answer)), key=lambda count: model.backbone.regime(len(sample) + count)):
        counts = list(group)
        longest = _longer(sample, answer[: counts[-1]])
        yield from model.logits(_alone(model, longest))[-len(counts) :]


def _longer(sample: Sample, answer: Sequence[int]) -> Sample:
    """The sample with what was answered so far."""
    new = torch.tensor(answer, dtype=torch.long)
    return replace(
        sample,
        token_ids_T=torch.cat([sample.token_ids_T, new]),
        modality_ids_T=torch.cat([sample.modality_ids_T, torch.zeros_like(new)]),
        targets_T=torch.zeros(len(sample) + len(new), dtype=torch.bool),
    )
