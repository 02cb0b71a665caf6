"""The promises, checked on a user's own model and on samples made for it: what `molora verify` prints.

Letters: T tokens, V vocabulary.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, combinations, cycle, groupby, islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from molora.checkpoint.modality_folder import check_modality, read_about
from molora.checkpoint.stock import open_stock
from molora.data.messages import Message
from molora.data.processor import SampleTooLong
from molora.inference.generate import GenerationConfig, generate
from molora.inference.load import LoadedModel
from molora.modality import Modality
from molora.model.experts import Choices, routers
from molora.model.identity import weights_hash
from molora.model.lora import adapter_tensors
from molora.model.molora import MoLoRA
from molora.model.probe import decoder_layers, difference, largest, stock_attention
from molora.model.quantization import plain_tensors
from molora.pack import Pack, Sample, collate
from molora.received import read_tensors
from molora.routing import Flow, Routing, RoutingError
from molora.terminal import Finding, print_findings
from molora.verify.rounding import precisions

TEXTS = (
    "What is a sense?",
    "Count to three.",
    "A longer question, so that the samples differ in length: why is the sky blue?",
)
# Sets of modalities that are asked for a rule: all those of sixteen modalities, and of more the smaller ones.
_MAX_SETS = 2**16
_NEW_TOKENS = 4
_MAX_EXAMPLES = 32


def verify(loaded: LoadedModel, rows: Sequence[dict[str, Any]], folders: Mapping[str, Path]) -> bool:
    """Checks every promise as `promises` does and prints a table. Returns whether all that was checked holds."""
    return show("promise", promises(loaded, rows, folders))


def show(heading: str, findings: Iterable[Finding]) -> bool:
    """Prints findings as a table within 80 columns. Returns whether none is broken."""
    return print_findings(heading, findings, ("holds", "BROKEN", "not checked"))


@torch.no_grad()
def promises(loaded: LoadedModel, rows: Sequence[dict[str, Any]], folders: Mapping[str, Path]) -> Iterator[Finding]:
    """Checks every promise on `rows` (conversations with media), a few texts and the modalities' own examples.

    `folders` are those that the modalities were loaded from. What is promised to the bit is compared to the bit. The
    rest is summed in another order, and is compared within 1e-5 in fp32. In half precision rounding is far larger, so
    there it may differ as far as the stock model itself, measured here, from its results in other shapes and in fp32;
    and it is computed in fp32 as well, layer by layer, which needs no second model.
    """
    samples = [loaded.encode([{"role": "user", "content": text}], f"text {i}") for i, text in enumerate(TEXTS)]
    for index, row in enumerate(rows):
        prompt = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        samples.append(loaded.encode(prompt, f"row {index}"))
    known = routed(loaded, loaded.model.modalities)
    samples += [sample for _, (sample,) in examples([loaded], list(islice(known, _MAX_EXAMPLES)))]
    checked = _Checked(loaded.model.eval(), samples, folders)
    for promise in (frozen, no_interference, any_mix, tokens_equal_frames, one_path, nothing_lost, open_ends):
        yield from promise(checked)


class _Checked:
    """A model, the stock model beside it, and samples: alone, and in one pack with its logits by sample."""

    def __init__(self, model: MoLoRA, samples: Sequence[Sample], folders: Mapping[str, Path]) -> None:
        self.model, self.samples, self.folders = model, samples, folders
        self.source = model.backbone.folder
        dtype, quantization = model.backbone.model.dtype, model.backbone.identity.quantization
        self.stock: Any = open_stock(self.source, dtype, quantization, model.device).eval()
        self.stock.set_attn_implementation(stock_attention(self.stock))
        self.pack = collate(samples, model.modalities, model.router.order).to(model.device)
        self.packed = self.logits()
        self.precisions = precisions(self.stock, self.prompts())

    def prompts(self) -> Iterator[Tensor]:
        """The embeddings (T, D) of each sample."""
        return (self.model.embed(self.alone(sample)) for sample in self.samples)

    def logits(self) -> dict[str, Tensor]:
        """The logits of the samples in the pack, by their ids."""
        return self.pack.by_sample(self.model.logits(self.pack))

    def alone(self, sample: Sample) -> Pack:
        return collate([sample], self.model.modalities).to(self.model.device)


def frozen(checked: _Checked) -> Iterator[Finding]:
    model, stock, promise = checked.model, checked.stock, "1 frozen"
    whole = weights_hash(checked.source) == model.backbone.identity.weights
    yield Finding(promise, "backbone files have the recorded hash", whole)
    mine = {name.replace(".base_layer.", "."): value for name, value in model.backbone.model.state_dict().items()}
    same = all(
        torch.equal(ours, theirs)
        for name, value in stock.state_dict().items()
        for ours, theirs in zip(plain_tensors(mine[name]), plain_tensors(value), strict=True)
    )
    yield Finding(promise, "weights in memory equal those on disk to the bit", same)
    texts = [checked.alone(sample) for sample in checked.samples if not sample.items]
    dressed = model.router.adapters(frozenset())
    what = f"texts without adapter {', '.join(sorted(dressed))}" if dressed else "texts"

    def beside_stock() -> Iterator[tuple[Tensor, Tensor]]:
        for text in texts:
            bare = Routing.by_sample([()], text.lengths) if dressed else None
            ours = model.backbone.head(model(text, routing=bare))
            yield ours, stock(input_ids=text.token_ids_T[None]).logits[0]

    if stock.config._attn_implementation == "sdpa":
        equal = [torch.equal(ours, theirs) for ours, theirs in beside_stock()]
        found = f"{sum(equal)} of {len(texts)} {what} equal transformers (sdpa) to the bit"
        yield Finding(promise, found, all(equal))
        return
    for precision in checked.precisions:  # caps and sinks are computed in another order
        with precision.of(model.backbone.model), precision.of(stock):
            worst = largest(difference(ours, theirs) for ours, theirs in beside_stock())
        yield precision.check(promise, f"{len(texts)} {what} differ from transformers (eager)", worst)


def no_interference(checked: _Checked) -> Iterator[Finding]:
    model, pack, packed, promise = checked.model, checked.pack, checked.packed, "2 no interference"
    modalities = dict(zip(pack.ids, pack.modalities, strict=True))
    flow = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    bare = pack.by_sample(model.backbone.head(model.backbone(model.embed(pack), pack.position_ids_T, flow)))
    untouched = [torch.equal(packed[id], bare[id]) for id in pack.ids if not model.router.adapters(modalities[id])]
    found = f"{sum(untouched)} of {len(untouched)} samples without adapter equal the bare backbone's pack to the bit"
    yield Finding(promise, found, all(untouched))
    stayed: list[bool] = []
    for name in {**model.modalities, **model.adapters}:
        with _negated(model, name):
            logits = checked.logits()
        others = [id for id, its in modalities.items() if name not in its | model.router.adapters(its)]
        stayed += [torch.equal(logits[id], packed[id]) for id in others]
    found = f"a modality's weights negated: {sum(stayed)} of {len(stayed)} samples without it are equal to the bit"
    yield Finding(promise, found, all(stayed) if stayed else None)


@contextmanager
def _negated(model: MoLoRA, name: str) -> Iterator[None]:
    """One modality with its tokens and its adapter turned around, which loses no bit."""
    prefix, adapter = f"projectors.{name}.", f"adapters.{name}"
    named = [(part, key, each) for part, parameters in model.parts().items() for key, each in parameters.items()]
    changed = [each for part, key, each in named if part.startswith(prefix) or (part == adapter and ".lora_B." in key)]
    for parameter in changed:
        parameter.neg_()
    try:
        yield
    finally:
        for parameter in changed:
            parameter.neg_()


def any_mix(checked: _Checked) -> Iterator[Finding]:
    """What a sample is told of its place is the same in a pack, and what its neighbours hold does not reach it."""
    model, pack, samples, promise = checked.model, checked.pack, checked.samples, "3 any mix, one batch"
    told = dict(zip(pack.ids, _places(model, pack), strict=True))
    alone = {sample.id: _places(model, checked.alone(sample))[0] for sample in samples}
    equal = [all(torch.equal(*pair) for pair in zip(alone[id], told[id], strict=True)) for id in pack.ids]
    yield Finding(promise, f"{sum(equal)} of {len(samples)} samples packed have their own positions", all(equal))
    if routers(model.backbone.model):
        # Experts run on all tokens that chose them, so how many there are follows from the neighbours.
        yield Finding(promise, "neighbours of experts move the order of their sums", None)
    else:
        embeds_TD = model.embed(pack)
        equal = []
        for side in (0, 1):
            turned_T1 = (pack.sample_ids_T % 2 == side)[:, None]
            hidden_TD = model(pack, embeds_TD=embeds_TD.where(~turned_T1, -embeds_TD))
            logits = pack.by_sample(model.backbone.head(hidden_TD))
            equal += [torch.equal(logits[id], checked.packed[id]) for id in pack.ids[1 - side :: 2]]
        found = f"{sum(equal)} of {len(samples)} samples are equal to the bit when all of their neighbours change"
        yield Finding(promise, found, all(equal))
    for precision in checked.precisions:
        choices = Choices(model.backbone.model)
        with precision.of(model.backbone.model):
            with choices.keeping():
                alone = {sample.id: model.logits(checked.alone(sample)) for sample in samples}
            which = [list(alone).index(id) for id in pack.ids]
            with choices.again(which, pack.lengths):
                packed = checked.logits()
        worst = largest(difference(packed[id], alone[id]) for id in pack.ids)
        yield precision.check(promise, f"{len(samples)} samples packed differ from alone", worst)


def _places(model: MoLoRA, pack: Pack) -> list[list[Tensor]]:
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


def tokens_equal_frames(checked: _Checked) -> Iterator[Finding]:
    """The forwards until here have compared the two; an item of which they differ is an error."""
    count = sum(len(sample.items) for sample in checked.samples)
    yield Finding("4 tokens equal frames", f"{count} items gave the tokens they reserved", True if count else None)


def one_path(checked: _Checked) -> Iterator[Finding]:
    """Each token of an answer that was made with the cache is the likeliest after those before it without."""
    for precision in checked.precisions:
        behind: list[float] = []
        with precision.of(checked.model.backbone.model):
            answers: dict[str, list[int]] = {sample.id: [] for sample in checked.samples}
            for step in generate(checked.model, checked.samples, GenerationConfig(max_new_tokens=_NEW_TOKENS)):
                answers[step.id].append(step.token_id)
            for sample in checked.samples:
                answer = answers[sample.id]
                for logits_V, token in zip(_without_cache(checked, sample, answer), answer, strict=True):
                    behind.append(float((logits_V.max() - logits_V[token]) / logits_V.abs().max().clamp(min=1.0)))
        same = sum(lag == 0 for lag in behind)
        found = f"{same} of {len(behind)} cached tokens are a full forward's, the worst is behind"
        yield precision.check("5 one path", found, largest(behind))


def _without_cache(checked: _Checked, sample: Sample, answer: Sequence[int]) -> Iterator[Tensor]:
    """The logits before each token of an answer, from forwards over all that came before it: one for tokens that share
    their rotary frequencies."""
    regime = checked.model.backbone.regime
    for _, group in groupby(range(len(answer)), key=lambda count: regime(len(sample) + count)):
        counts = list(group)
        longest = sample.followed_by(answer[: counts[-1]])
        yield from checked.model.logits(checked.alone(longest))[-len(counts) :]


def nothing_lost(checked: _Checked) -> Iterator[Finding]:
    """Modality folders have the hashes that they list, and what runs is what they hold."""
    model, folders = checked.model, checked.folders
    other: list[str] = []
    for name, path in folders.items():
        check_modality(path, model.backbone.identity)
        here = {"adapter_model.safetensors": adapter_tensors(model.backbone.model, name)}
        if name in model.modalities:
            here["projector.safetensors"] = model.projectors[name].state_dict()
            here["encoder.safetensors"] = model.encoders[name].state_dict()
        for file in here.keys() & read_about(path)["files"].keys():
            tensors, mine = read_tensors(path / file, path), here[file]
            if mine.keys() != tensors.keys() or not all(
                torch.equal(mine[key].cpu(), tensor.to(mine[key].dtype)) for key, tensor in tensors.items()
            ):
                other.append(f"{name}/{file}")
    found = f"{len(folders)} modality folders whole, files as recorded"
    found += f"; the weights in memory are others than in {', '.join(sorted(other))}" if other else " and as in memory"
    yield Finding("6 nothing lost", found, not other if folders else None)


def open_ends(checked: _Checked) -> Iterator[Finding]:
    model, stock, promise = checked.model, checked.stock, "7 open ends"
    for name, path in checked.folders.items():
        users = [sample for sample in checked.samples if model.router.adapters(sample.modalities) == {name}]
        if name not in model.adapters or not users:
            yield Finding(promise, f"{name}: no sample uses its adapter", None)
            continue
        pack = checked.alone(users[0])
        for fp32 in [precision.fp32 for precision in checked.precisions]:
            with warnings.catch_warnings():  # PEFT asks by a name that transformers has given up
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
                # By default PEFT computes adapters in fp32 beside a backbone in half precision; molora does not.
                peft: Any = PeftModel.from_pretrained(stock, str(path), autocast_adapter_dtype=fp32)
            # An adapter's products are rounded as well, so its own results move further than the stock model's.
            own = precisions(peft.base_model.model, checked.prompts())
            precision = next(each for each in own if each.fp32 == fp32)
            embeds_TD = model.embed(pack)
            embeds_TD = embeds_TD.float() if fp32 else embeds_TD
            with precision.of(peft.base_model.model):
                theirs = peft(inputs_embeds=embeds_TD[None]).logits[0]
            with precision.of(model.backbone.model):
                ours = model.backbone.head(model(pack, embeds_TD=embeds_TD))
            differs = difference(ours, theirs)
            yield precision.check(promise, f"{name}: PEFT opens the folder, logits differ", differs)
            stock = peft.unload()


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
    model encodes them. They are made from what the first model's modalities bring as examples, so they are the same
    every time. One that is longer than a model takes is left out."""
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
        wrong = f"modality {modality.name!r}: its plugin's examples() are {len(parts)} parts of types {sorted(types)}"
        raise ValueError(f"{wrong}; it has to give some, of its own type {modality.part_type!r}")
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
