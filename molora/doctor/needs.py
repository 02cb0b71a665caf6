"""What training and answering need of a device's memory, moment by moment, with the largest samples that they allow.

Letters: N samples, K positions with logits, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from molora.checkpoint.pretrained import fetch
from molora.checkpoint.stock import load_tokenizer
from molora.config import ConfigError
from molora.data.processor import Processor, SampleTooLong
from molora.data.sources import EncodedSamples, open_source, rows_at_hand
from molora.doctor.dry_run import Alive, DryRun, on_meta
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.questions import question
from molora.inference.generate import GenerationConfig, attempt, generate, pages_configured, tokens_kept
from molora.media import MediaPolicy
from molora.modality import MediaError, Modality
from molora.model.molora import MoLoRA
from molora.model.pages import KeptLayers, page_tokens
from molora.model.probe import decoder_layers
from molora.model.quantization import Quantization
from molora.pack import Sample
from molora.routing import RoutingError, name_of
from molora.seeding import seed_of
from molora.testing.tiny import byte_tokenizer
from molora.train.optim import PartOptimizer, count, set_trainable
from molora.train.preference import Reference, preference_step
from molora.train.preflight import words_of
from molora.train.recipe import Recipe, StageConfig, count_steps
from molora.train.step import train_step
from molora.train.words import Words

# Rows of the data of a stage, or of an evaluation, from which its packs and prompts are known.
_SAMPLED_ROWS = 64

# Of so many tokens are the samples by which a recipe's model is told how much of a conversation fits in memory.
_HELD_TOKENS = 1024


@dataclass(frozen=True)
class Need:
    """Something that takes memory, how much, and where the number comes from."""

    what: str
    num_bytes: int
    origin: str


@dataclass(frozen=True)
class Moment:
    """What some work holds beside the weights when it holds the most; `given` is the same with the packs that the data
    of a stage give, where `needs` are those of the largest packs that its recipe allows."""

    name: str
    needs: tuple[Need, ...]
    given: Moment | None = None

    @property
    def num_bytes(self) -> int:
        return sum(need.num_bytes for need in self.needs)


@dataclass(frozen=True)
class StageWork:
    """How many steps a stage has, and the floating-point operations of the products of a mean one, in one process, most
    of them of a dtype."""

    name: str
    num_steps: int
    step_flop: float
    dtype: torch.dtype


@dataclass(frozen=True)
class MemoryNeeds:
    """What a run needs: its weights all the time, and its moments one after another; and the work of the stages whose
    data are known. `process` is what the interpreter and its libraries take on a CPU; `unknown` says which data are not
    counted, and why; `held` how many samples some memory for keys and values is enough for."""

    weights: tuple[Need, ...]
    moments: tuple[Moment, ...]
    work: tuple[StageWork, ...] = ()
    process: Need | None = None
    unknown: tuple[str, ...] = ()
    held: str = ""

    @property
    def weight_bytes(self) -> int:
        return sum(need.num_bytes for need in self.weights)

    @property
    def constant_bytes(self) -> int:
        """Bytes that are there at any moment."""
        return self.weight_bytes + (self.process.num_bytes if self.process else 0)

    @property
    def num_bytes(self) -> int:
        """Bytes at the fullest moment, with the largest packs that a recipe allows."""
        return self.constant_bytes + max(moment.num_bytes for moment in self.moments)

    @property
    def given_bytes(self) -> int:
        """Bytes at the fullest moment, with packs as the data give them."""
        return self.constant_bytes + max((moment.given or moment).num_bytes for moment in self.moments)


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def weights(model: MoLoRA, shards: int = 1) -> tuple[Need, ...]:
    """What the parameters and buffers of a model take, part by part, whose layers lie in so many shards."""
    parts = model.parts()
    owners = {id(parameter): part for part, parameters in parts.items() for parameter in parameters.values()}
    for name, encoder in model.encoders.items():
        owners |= {id(buffer): f"encoders.{name}" for buffer in encoder.buffers()}
    owned: dict[str, list[Tensor]] = {part: [] for part in ("backbone", *parts)}
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        owned.setdefault(owners.get(id(tensor), "backbone"), []).append(tensor)
    needs = [Need(part, size_of(tensors), about(tensors)) for part, tensors in owned.items()]
    if shards > 1:
        elsewhere = sum(size_of(layer) - _shard_bytes(layer, shards) for layer in _frozen_layers(model))
        origin = f"{needs[0].origin}, of layers one of {shards} shards"
        needs[0] = replace(needs[0], num_bytes=needs[0].num_bytes - elsewhere, origin=origin)
    return tuple(needs)


def _frozen_layers(model: MoLoRA) -> list[list[Tensor]]:
    """The backbone's own parameters in each of its decoder layers."""
    others = {id(parameter) for parameters in model.parts().values() for parameter in parameters.values()}
    layers = decoder_layers(model.backbone.model)
    return [[parameter for parameter in layer.parameters() if id(parameter) not in others] for layer in layers]


def _shard_bytes(tensors: Iterable[Tensor], shards: int) -> int:
    """What one of so many shards of tensors takes: they are cut along their first axis, filled up to equal lengths."""
    return sum(-(-len(tensor) // shards) * tensor[0].nbytes for tensor in tensors)


def gathered(model: MoLoRA, shards: int) -> tuple[Need, ...]:
    """What layers in shards take at most while they are put together and compute."""
    if shards == 1:
        return ()
    largest = max(shards * _shard_bytes(layer, shards) for layer in _frozen_layers(model))
    return (Need("whole layers", 5 * largest, "five at most, which come together, compute or wait to be let go"),)


def about(tensors: Iterable[Tensor]) -> str:
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    if not parameters:
        return "buffers"
    packed = any(not parameter.is_floating_point() for parameter in parameters)
    return f"{count(parameters):,} {'numbers as they are packed' if packed else 'parameters'}, {', '.join(dtypes)}"


def logits_of(num_bytes: int, how: str, model: MoLoRA) -> str:
    return f"{model.backbone.vocab_size:,} wide, {how}" if num_bytes else "none at the fullest moment"


@dataclass(kw_only=True)
class AnsweringConfig:
    """How a model will answer: `max_running_samples` conversations at a time, each with a prompt of `prompt_tokens`,
    media included, and `max_new_tokens` of answer; fewer at a time if `kv_cache_gib` has no room for as many. `dtype`
    casts the backbone; `quantization` is as in a recipe."""

    prompt_tokens: int = 1024
    max_new_tokens: int = 128
    max_running_samples: int = 64
    kv_cache_gib: float | None = None
    dtype: str | None = None
    quantization: Quantization | None = None


def answering_needs(model: MoLoRA, config: AnsweringConfig, device_type: str = "cpu") -> MemoryNeeds:
    """What a model on the meta device needs to answer on a kind of device, "cpu" or "cuda": at the prefill of all
    prompts, and at the last tokens.

    Keys and values are exactly what the pool of pages takes, which is allocated before the first token. Prompts have an
    example of every modality that the router takes together, and text. The prefill was within 0.01 % of what the CPU's
    allocator gave out. What a step of decoding needs for itself is left out: little on the CPU; on CUDA with a torch
    before 2.13, a layer's keys and values once more.

    Raises ConfigError if not even one such sample has room in `kv_cache_gib`.
    """
    owned, dry = weights(model), DryRun(model)
    decoding = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        max_running_samples=config.max_running_samples,
        kv_cache_gib=config.kv_cache_gib,
    )
    prompts = copies(_largest_prompt(model, config.prompt_tokens), config.max_running_samples)
    moments = answering_moments(dry, decoding, prompts, device_type)
    tokens = min(config.prompt_tokens + config.max_new_tokens, model.backbone.max_tokens)
    return MemoryNeeds(owned, moments, held=_held(dry, config.kv_cache_gib or 1.0, tokens, device_type))


def _held(dry: DryRun, kv_cache_gib: float, tokens: int, device_type: str) -> str:
    """How many samples of a length some memory for keys and values is enough for."""
    number = _samples_within(kv_cache_gib, _kept(dry, device_type), tokens)
    told = f"kv_cache_gib={kv_cache_gib:g} of molora.GenerationConfig holds keys and values of {number:,} x {tokens:,}"
    return f"{told} tokens, prompt and answer together"


def _kept(dry: DryRun, device_type: str) -> KeptLayers:
    """What the layers keep of a token, in the pages of a kind of device."""
    with dry:
        kept = dry.model.backbone.kept_layers()
    return replace(kept, page_tokens=page_tokens(device_type))


def _samples_within(kv_cache_gib: float, kept: KeptLayers, tokens: int) -> int:
    return int(kv_cache_gib * 2**30) // kept.num_bytes(kept.pages_for(tokens), 1)


def _largest_prompt(model: MoLoRA, num_tokens: int) -> Sample:
    """A prompt of so many tokens, or of the media alone if these are more."""
    modalities = max(modality_sets(model), key=len)
    return largest_sample(model, modalities, num_tokens, model.backbone.max_tokens, generate=True)


def answering_moments(
    dry: DryRun, config: GenerationConfig, samples: Sequence[Sample], device_type: str
) -> tuple[Moment, Moment]:
    """What answering samples together, of which the first is the longest, holds at its two fullest moments: all prompts
    in one pack, and every answer's last token."""
    model = dry.model
    most_tokens = model.backbone.max_tokens
    tokens = [tokens_kept(len(sample), config.max_new_tokens, most_tokens) for sample in samples]
    kept = _kept(dry, device_type)
    if config.kv_cache_gib is not None:
        number = _samples_within(config.kv_cache_gib, kept, tokens[0])
        if not number:
            least = kept.num_bytes(kept.pages_for(tokens[0]), 1) / 2**30
            raise ConfigError(
                f"kv_cache_gib: {config.kv_cache_gib:g}, but {tokens[0]:,} tokens of a sample take {least:.3g}"
            )
        samples, tokens = samples[:number], tokens[:number]
    number, lengths = len(samples), [len(sample) for sample in samples]
    with dry:
        steps = generate(model, samples, config)
        next(steps)
        begun, prefill = dry.alive, dry.fullest
        dry_kept = model.backbone.kept_layers()

    def pool_bytes(kept: KeptLayers) -> int:
        enough = sum(map(kept.pages_for, tokens))
        num_pages = enough if config.kv_cache_gib is None else pages_configured(kept, config, most_tokens)
        return kept.num_bytes(num_pages, config.max_running_samples)

    dry_cached, cached = pool_bytes(dry_kept), pool_bytes(kept)
    shortest = "" if min(lengths) == lengths[0] else f"{min(lengths):,} to "
    names = name_of(frozenset[str]().union(*(sample.modalities for sample in samples)))
    prompts = f"{number} x {shortest}{lengths[0]:,} tokens of {names}"
    pages = f"{prompts}, {config.max_new_tokens:,} new ones each, in pages of {kept.page_tokens}"
    pack = min(config.prefill_tokens, sum(lengths))

    def moment(name: str, alive: Alive, logits: int, origin: str) -> Moment:
        needs = (
            Need("KV cache", cached, pages),
            Need("logits", logits, logits_of(logits, f"{number} at a time", model)),
            Need("activations", alive.num_bytes - alive.logits - dry_cached, origin),
        )
        return Moment(name, needs)

    last_logits = number * model.backbone.vocab_size * model.backbone.model.dtype.itemsize
    return (
        moment(
            "prefill", prefill, prefill.logits, f"of {pack:,} tokens of the prompts, of which as many enter at once"
        ),
        moment("last tokens", begun, last_logits, "the prompts' embeddings"),
    )


def training_needs(
    recipe: Recipe, trust: Sequence[str] = (), device_type: str = "cpu", processes: int = 1
) -> MemoryNeeds:
    """What a recipe needs in each of its stages and evaluations, in each of so many processes that train together, on a
    kind of device, "cpu" or "cuda".

    Weights, gradients and the optimiser's state are exact. Activations are all else that a `train_step` holds at its
    fullest moment, kept for backward or just in use, if its pack is full: `tokens_per_pack` tokens of at most
    `samples_per_step` samples, each with the largest of its plugin's `examples` and text for the rest; of the sets of
    modalities that train something, the one that needs the most. Larger items need more in an encoder that trains,
    shorter samples less of everything. So a stage is counted twice: as above, and with the heaviest pack that its own
    data give in `_SAMPLED_ROWS` rows or so, by the step of its objective. If data cannot be opened here,
    `unknown` says why.

    On the CPU, activations were between 0.2 % below and 0.01 % above what the allocator gave out (tiny and small
    backbones, fp32 and bf16, with checkpointing and without). It is the CPU's path that is followed; the kernel that
    CUDA attends with, followed for the shape of Phi-4-mini, made no difference. What a GPU's context and its allocator
    take, and the optimiser's scratch there, come on top.

    Raises ConfigError or ValueError as `on_meta` does, and RuntimeError for layers whose shapes depend on values, or of
    which torch tells none (experts that are not in bf16).
    """
    model = on_meta(recipe, trust=trust)
    shards = processes if recipe.shard_backbone else 1
    owned, layers = weights(model, shards), gathered(model, shards)
    learned = [_learned(model, stage, f"stages.{index}.train") for index, stage in enumerate(recipe.stages)]
    dry = DryRun(model)
    model.backbone.activation_checkpointing = recipe.activation_checkpointing
    moments, work, unknown = [], [], []
    cached = recipe.feature_cache is not None
    for index, (stage, held) in enumerate(zip(recipe.stages, learned, strict=True)):
        set_trainable(model, stage.train, 1, f"stages.{index}.train")
        sets = [modalities for modalities in modality_sets(model) if model.trains(modalities)] or modality_sets(model)
        steps: list[tuple[Need, ...]] = []
        for full in [full_pack(model, modalities, stage, processes) for modalities in sets]:
            pack = f"a pack of {len(full)} x {len(full[0]):,} tokens of {name_of(full[0].modalities)}"
            steps.append((*_step(dry, full, stage, cached, pack), *layers))
        most = max(steps, key=lambda needs: sum(need.num_bytes for need in needs))
        given = None
        try:
            taken = _steps_of_data(model, recipe, index, processes)
        except (ImportError, OSError, ValueError) as error:
            unknown.append(_untold(f"stages.{index}.data", error))
        else:
            needs = _step(dry, taken.heaviest, stage, cached, taken.origin, taken.words)
            work.append(StageWork(stage.name, taken.num_steps, dry.flop * taken.mean_share, model.backbone.model.dtype))
            given = Moment(f"stage {stage.name}, as its data are", (*held, *needs, *layers))
        moments.append(Moment(f"stage {stage.name}", (*held, *most), given))
        if processes > 1:
            parts = [size_of(p for p in part.values() if p.requires_grad) for part in model.parts().values()]
            sums = Need("sums", 2 * max(parts), "of the gradients of the largest part, with those that are sent")
            moments.append(Moment(f"stage {stage.name}, between the processes", (*held, sums)))
    optimiser = max((held[1] for held in learned), key=lambda need: need.num_bytes)
    for name, evaluation in recipe.evaluations.items():
        decoding = GenerationConfig(
            max_new_tokens=evaluation.max_new_tokens, max_running_samples=evaluation.max_running_samples
        )
        where, told = f"evaluations.{name}.data", f"evaluation {name}, as its data are"
        try:
            prompts = _prompts_of_data(model, recipe, evaluation, where, processes)
        except (ImportError, OSError, ValueError) as error:
            unknown.append(_untold(where, error))
            running = min(decoding.max_running_samples, -(-(evaluation.data.limit or sys.maxsize) // processes))
            prompts, told = copies(_largest_prompt(model, 0), running), f"evaluation {name}"
        moment = max(answering_moments(dry, decoding, prompts, device_type), key=lambda moment: moment.num_bytes)
        moments.append(Moment(f"{told}, {moment.name}", (optimiser, *moment.needs, *layers)))
    tokens = min(_HELD_TOKENS, model.backbone.max_tokens)
    return MemoryNeeds(
        owned, tuple(moments), tuple(work), unknown=tuple(unknown), held=_held(dry, 1.0, tokens, device_type)
    )


def _untold(where: str, error: Exception) -> str:
    """Why the data at a key of the recipe tell nothing, in one line."""
    first_line, _, _ = str(error).strip().partition("\n")
    return first_line if first_line.startswith(where) else f"{where}: {first_line}"


def _learned(model: MoLoRA, stage: StageConfig, where: str) -> tuple[Need, ...]:
    """Gradients and the optimiser's state of what a stage trains, made by its optimisers on the meta device, and the
    copy of it that preferences are measured by."""
    optimizers: dict[str, PartOptimizer] = set_trainable(model, stage.train, 1, where)
    parameters = [p for optimizer in optimizers.values() for p in optimizer.parameters.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers.values():
        optimizer.optimizer.step()
    state = [tensor for optimizer in optimizers.values() for tensor in optimizer.tensors().values()]
    for parameter in parameters:
        parameter.grad = None
    gradients = Need("gradients", size_of(parameters), about(parameters))
    held = gradients, Need("optimiser", size_of(state), f"of {', '.join(optimizers)}")
    if stage.objective == "preferences" and stage.preference.reference:
        return *held, Need("reference", size_of(parameters), "what trains, as it was when the stage began")
    return held


@dataclass(frozen=True)
class _Steps:
    """Of the steps of a stage, as its data are: how many there are, the samples that one process takes of the one with
    the largest pack, what is to be said of it, what share of its tokens a mean step has in the process that has the
    most, and what says their words in a stage of words."""

    num_steps: int
    heaviest: list[Sample]
    origin: str
    mean_share: float
    words: Words | None


def _steps_of_data(model: MoLoRA, recipe: Recipe, index: int, processes: int) -> _Steps:
    """What the first rows of a stage's data tell of its steps."""
    stage, processor = recipe.stages[index], _processor_of(model, recipe)
    seed, where, skips = seed_of(recipe.seed, stage.name), f"stages.{index}.data", (SampleTooLong, MediaError)
    size, most = stage.samples_per_step, stage.tokens_per_pack
    dataset = EncodedSamples(
        stage.data,
        processor,
        seed=seed,
        max_tokens=most,
        skips=skips,
        where=where,
        mixture=stage.mixture,
        samples_per_step=size,
        pairs=stage.objective == "preferences",
    )
    num_steps = count_steps(stage, dataset.num_rows)
    rows = size * min(num_steps, max(1, _SAMPLED_ROWS // size))
    encoded = [dataset[k] for k in range(rows)]
    answers = [(each, each.rejected) if isinstance(each, Sample) else () for each in encoded]
    steps = [
        [one for k in dataset.order.dealt(step, size, rank, processes) for one in answers[k] if one is not None]
        for step in range(rows // size)
        for rank in range(processes)
    ]

    def largest_pack(samples: list[Sample]) -> int:
        learning = [sample for sample in samples if model.trains(sample.modalities)]
        return max((sum(pack.lengths) for pack in processor.packs(learning, most)), default=0)

    heaviest = max(steps, key=largest_pack)
    if not heaviest:
        raise ConfigError(f"none of the first {rows} rows can be used")
    origin = f"a pack of {largest_pack(heaviest):,} tokens, the largest from {rows} rows of its data"
    tokens = [sum(map(len, samples)) for samples in steps]
    slowest = [max(tokens[step : step + processes]) for step in range(0, len(tokens), processes)]
    model.backbone.stop_at(processor.template.turn_ends(), processor.tokenizer)
    words = words_of(stage, model, processor, f"stages.{index}")
    return _Steps(num_steps, heaviest, origin, sum(slowest) / len(slowest) / sum(map(len, heaviest)), words)


def _prompts_of_data(
    model: MoLoRA, recipe: Recipe, evaluation: EvaluationConfig, where: str, processes: int
) -> list[Sample]:
    """The prompts that an evaluation answers together in one of so many processes, the longest first: those of its
    data, or the longest of `_SAMPLED_ROWS` rows spread over them, again and again where more run than these."""
    processor, source = _processor_of(model, recipe), open_source(evaluation.data, where)
    there = len(rows_at_hand(source))
    rows = sorted({number * there // _SAMPLED_ROWS for number in range(_SAMPLED_ROWS)}) if there else []

    def prompt(row: int) -> Sample:
        asked = question(source, row, evaluation.asked_with[0])
        return processor.encode(asked.prompt, asked.id, generate=True)

    encoded = [attempt(partial(prompt, row), str(row)) for row in rows]
    longest = sorted((each for each in encoded if isinstance(each, Sample)), key=len, reverse=True)
    if not longest:
        raise ConfigError(f"none of {len(rows)} rows can be used")
    running = min(evaluation.max_running_samples, -(-len(source) // processes))
    again = [copies(sample, -(-running // len(longest))) for sample in longest]
    together = [sample for samples in again for sample in samples]
    return [replace(sample, id=str(index)) for index, sample in enumerate(together[:running])]


def _processor_of(model: MoLoRA, recipe: Recipe) -> Processor:
    """The processor that a recipe's data are encoded by."""
    tokenizer = load_tokenizer(fetch(recipe.backbone.path, recipe.backbone.revision, weights=False))
    policy = MediaPolicy(allow_urls=recipe.allow_urls, allow_private_addresses=recipe.allow_private_addresses)
    return Processor(tokenizer, model.modalities, model.router.order, model.backbone.max_tokens, policy)


def _step(
    dry: DryRun, samples: list[Sample], stage: StageConfig, cached: bool, pack: str, words: Words | None = None
) -> tuple[Need, ...]:
    """What a training step holds beside weights, gradients, optimiser and reference: logits, and everything else. It is
    one of `words` if these are given, one of preferences for pairs, and else one of answers."""
    model = dry.model
    if cached:
        samples = [with_frames(model, sample) for sample in samples]
    dry.gradients(p for parameters in model.parts().values() for p in parameters.values() if p.requires_grad)
    model.train()
    processor, pairs = stand_in_processor(model), [sample for sample in samples if sample.rejected is not None]
    with dry:
        if pairs:
            reference = Reference(model) if stage.preference.reference else None
            dry.owned([] if reference is None else reference.tensors.values())
            preference_step(model, processor, pairs, stage.tokens_per_pack, {}, stage.preference, reference)
        else:
            train_step(model, processor, samples, stage.tokens_per_pack, {}, words=words)
    full, checkpointing = dry.fullest, "on" if model.backbone.activation_checkpointing else "off"
    return (
        Need("logits", full.logits, logits_of(full.logits, "chunk by chunk", model)),
        Need("activations", full.num_bytes - full.logits, f"{pack}, checkpointing {checkpointing}"),
    )


def modality_sets(model: MoLoRA) -> list[frozenset[str]]:
    """Sets of modalities that a sample may have: single ones, pairs, and all together, as far as they have a rule; none
    where text runs with an adapter, or where there is no other."""
    names = sorted(model.modalities)
    sets = [frozenset(some) for size in sorted({1, 2, len(names)}) for some in combinations(names, size)]
    text = [frozenset[str]()] if model.router.adapters(frozenset()) else []
    return [*text, *(some for some in sets if _ruled(model, some))] or [frozenset()]


def _ruled(model: MoLoRA, modalities: frozenset[str]) -> bool:
    try:
        model.router.order(modalities)
    except RoutingError:
        return False
    return True


def full_pack(model: MoLoRA, modalities: frozenset[str], stage: StageConfig, processes: int = 1) -> list[Sample]:
    """Samples that fill a pack of a stage in one of so many processes, all the same: the largest examples of these
    modalities, and text."""
    most_tokens = min(stage.tokens_per_pack, model.backbone.max_tokens)
    shortest = largest_sample(model, modalities, 0, most_tokens)
    answers = -(-stage.samples_per_step // processes) * (2 if stage.objective == "preferences" else 1)
    number = min(answers, stage.tokens_per_pack // len(shortest))
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
    wrong = f"a sample of {name_of(modalities)} takes {length:,} tokens, but only {most_tokens:,} fit into a pack"
    raise SampleTooLong(f"{wrong} and the backbone's context; raise tokens_per_pack, or ask for fewer tokens")


def _by_size(modality: Modality) -> list[dict[str, Any]]:
    return sorted(modality.examples(), key=lambda part: modality.prepare(modality.load(part)).num_tokens)


def _conversation(processor: Processor, parts: Sequence[Mapping[str, Any]], num_letters: int, generate: bool) -> Sample:
    """Every letter is a token: of the answer, or of a question that has none yet."""
    text = "a" * num_letters
    question = {"role": "user", "content": [*parts, {"type": "text", "text": text if generate else "a"}]}
    messages = [question] if generate else [question, {"role": "assistant", "content": text}]
    return processor.encode(messages, "0", generate=generate)


def copies(sample: Sample, number: int) -> list[Sample]:
    """Samples that are alike and share nothing, so that each reads its prompt."""
    return [replace(sample, id=str(index), token_ids_T=sample.token_ids_T.clone()) for index in range(number)]


def with_frames(model: MoLoRA, sample: Sample) -> Sample:
    """With the frames of encoders that do not train, as the feature cache brings them."""
    items = []
    for item in sample.items:
        encoder: Any = model.encoders[item.modality]
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            item = replace(item, frames_SC=torch.zeros_like(model.frames(item).frames_SC, device="cpu"))
        items.append(item)
    return replace(sample, items=tuple(items))
