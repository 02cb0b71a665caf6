"""What a run will need of a device's memory, counted before it starts and without its weights.

Models are built on the meta device by the code that builds real ones, and steps and answers run through them by the
code that runs real ones, with shapes and without values. So no size of a module or a tensor is written down here.

Letters: T tokens in a pack or sample, N samples, K positions with logits, V vocabulary.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub.errors import HfHubHTTPError
from rich.text import Text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from molora.assembly import Blueprint, RouterConfig, RouterPlan, assemble, blueprint, pick_device
from molora.backbone import Backbone, Identity, damage_named, fetch, load_tokenizer, read_config, read_dtype
from molora.cache import PackedCache
from molora.checkpoint import read_plan
from molora.config import ConfigError, build, options, read
from molora.data import EncodedSamples, step_loader
from molora.generate import GenerationConfig, generate
from molora.loading import locate
from molora.media import MediaPolicy
from molora.modality import MediaError, Modality
from molora.model import MoLoRA
from molora.optim import PartOptimizer, count, set_trainable
from molora.pack import Sample
from molora.processor import Processor, SampleTooLong
from molora.release import layout_of
from molora.routing import Flow, RoutingError, flowing
from molora.seeding import seed_of
from molora.terminal import console, print_table, say, styled
from molora.tiny import byte_tokenizer
from molora.train import Recipe, StageConfig, accelerator_on, recipe_router, train_step
from molora.trust import Untrusted

# Rows of a stage's data from which its packs are known.
_SAMPLED_ROWS = 64
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(kw_only=True)
class AnsweringConfig:
    """How a model will answer: that many conversations at a time, each with a prompt of `prompt_tokens`, media
    included. `dtype` casts the backbone."""

    prompt_tokens: int = 1024
    max_new_tokens: int = 128
    max_running_samples: int = 64
    dtype: str | None = None


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
class Fit:
    """What a run needs: its weights all the time, and its moments one after another. `process` is what the interpreter
    and its libraries take on a CPU; `unknown` says why there are no packs of its data."""

    weights: tuple[Need, ...]
    moments: tuple[Moment, ...]
    process: Need | None = None
    unknown: str | None = None

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


# A model without weights -----------------------------------------------------------------------------------------


def on_meta(
    source: Recipe | str | Path,
    modalities: Sequence[str | Path] = (),
    *,
    dtype: str | None = None,
    trust: Sequence[str] = (),
) -> MoLoRA:
    """The model of a recipe, of a run, or of a backbone (folder or hub id) with modality folders, on the meta device.

    It has every parameter and buffer, with shape and dtype, and none of their values. Of the hub it needs descriptions
    only: JSON files of the backbone, and JSON files of an encoder that is named there.

    Raises ConfigError or ValueError for what is missing, cannot be fetched, or cannot be built without weights.
    """
    if isinstance(source, Recipe):
        path, revision, dtype = source.backbone.path, source.backbone.revision, dtype or source.backbone.dtype
        router = recipe_router(source, trust)
        plans = {
            name: read_plan(Path(config.path), name, trust)
            if config.path is not None
            else blueprint(name, str(config.plugin), config.options, config.adapter, f"modalities.{name}")
            for name, config in source.modalities.items()
        }
    else:
        if layout_of(source) is not None:
            raise ConfigError(f"{source}: a release; make it a run first: molora convert phi4mm {source} runs/phi4mm")
        layout = locate(source, modalities)
        path, revision = layout.backbone, layout.revision
        dtype = dtype or (None if layout.run is None else layout.run.backbone["dtype"])
        router = RouterConfig() if layout.run is None else layout.run.router_plan(trust)
        plans = {name: read_plan(folder, name, trust) for name, folder in layout.folders.items()}
    with torch.device("meta"):
        return _assembled(_backbone(path, revision, dtype), plans, router)


def _backbone(source: str, revision: str | None, dtype: str | None) -> Backbone:
    try:
        folder = fetch(source, revision, weights=False)
        config = read_config(folder)
    except Untrusted:
        raise
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(
            f"backbone {source!r}: its config.json cannot be read, or fetched from the hub ({_first_line(error)}); "
            "check the name and the network, or give a local folder"
        ) from error
    if dtype is None and config.dtype is None:
        raise ConfigError(f"backbone {source!r}: its config.json names no dtype, and weights are not read; give dtype")
    cast = config.dtype if dtype is None else read_dtype(dtype)
    with damage_named(f"backbone {folder}"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=cast, attn_implementation="eager", trust_remote_code=False
        )
    # What a probe finds is a factor, which takes no memory.
    return Backbone(model, Identity(source, "", "", "", ""), probe={"embed_scale": 1.0})


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _assembled(backbone: Backbone, plans: Mapping[str, Blueprint], router: RouterConfig | RouterPlan) -> MoLoRA:
    try:
        return assemble(backbone, byte_tokenizer(), plans, router)[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"an encoder of {', '.join(plans)} cannot be built without weights: {error}; under "
            'torch.device("meta"), a build_encoder makes modules without reading weights or looking at values'
        ) from error


def _tensors(model: nn.Module) -> list[Tensor]:
    """Every parameter and buffer, each once."""
    return list({id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values())


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def weights(model: MoLoRA) -> tuple[Need, ...]:
    """What the parameters and buffers of a model take, part by part."""
    parts = model.parts()
    owners = {id(parameter): part for part, parameters in parts.items() for parameter in parameters.values()}
    for name, encoder in model.encoders.items():
        owners |= {id(buffer): f"encoders.{name}" for buffer in encoder.buffers()}
    owned: dict[str, list[Tensor]] = {part: [] for part in ("backbone", *parts)}
    for tensor in _tensors(model):
        owned.setdefault(owners.get(id(tensor), "backbone"), []).append(tensor)
    return tuple(Need(part, _size(tensors), _about(tensors)) for part, tensors in owned.items())


def _about(tensors: Iterable[Tensor]) -> str:
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
    return f"{count(parameters):,} parameters, {', '.join(dtypes)}" if parameters else "buffers"


# A run without values --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alive:
    """Bytes at one moment; `logits` is the share of tensors as wide as the vocabulary."""

    num_bytes: int = 0
    logits: int = 0


class DryRun(TorchDispatchMode):
    """Takes over a model on the meta device, lets it run on the CPU, and counts the bytes that its work keeps alive.

    What is computed from weights has shapes and no values (torch's fake tensors). All else, such as positions, lengths
    and pixels, is computed for real, as control flow depends on it. A value that nobody knows is read as True, 1.0 or
    0. Weights do not count, nor does what `owned` adds to them.
    """

    def __init__(self, model: MoLoRA) -> None:
        super().__init__()
        self.model = model
        self.alive = self.fullest = Alive()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._wide = model.backbone.vocab_size
        self._known: dict[int, Any] = {}
        stand_ins: dict[int, tuple[Tensor, Tensor]] = {}

        def stand_in(tensor: Tensor) -> Tensor:
            fake = FakeTensor(self._fake, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            # Layers that share a weight go on sharing it.
            return stand_ins.setdefault(id(tensor), (tensor, fake))[1]

        for module in model.modules():
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for name, value in [*own.items(), *vars(module).items()]:
                if isinstance(value, Tensor) and value.is_meta:
                    setattr(module, name, stand_in(value))
        self.owned(fake for _, fake in stand_ins.values())

    def owned(self, tensors: Iterable[Tensor]) -> None:
        """Leaves tensors out of the count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[id(storage)] = storage

    def gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives parameters the gradients that an earlier pack of a step leaves; they do not count."""
        for parameter in parameters:
            with self._fake:
                parameter.grad = torch.zeros_like(parameter)
            self.owned([parameter.grad])

    def __enter__(self) -> DryRun:
        gc.collect()
        self.fullest = self.alive
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if FakeTensor not in types:
            with unset_fake_temporarily():
                made = func(*args, **(kwargs or {}))
        elif func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        else:
            try:
                made = func(*args, **(kwargs or {}))
            except (RuntimeError, NotImplementedError) as error:
                raise RuntimeError(f"{func} gives no shape without values: {error}") from error
        tree_map_only(Tensor, self._count, made)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        num_bytes = storage.nbytes()
        logits = num_bytes if tensor.dim() and tensor.shape[-1] == self._wide else 0

        def gone(_: Any) -> None:
            del self._known[key]
            self.alive = Alive(self.alive.num_bytes - num_bytes, self.alive.logits - logits)

        # The storage itself, not the tensor: autograd keeps storages of tensors that Python has forgotten.
        self._known[key] = weakref.ref(storage, gone)
        self.alive = Alive(self.alive.num_bytes + num_bytes, self.alive.logits + logits)
        if self.alive.num_bytes > self.fullest.num_bytes:
            self.fullest = self.alive


# What is run -----------------------------------------------------------------------------------------------------


def fit_recipe(recipe: Recipe, trust: Sequence[str] = ()) -> Fit:
    """What a recipe needs in each of its stages and evaluations, in one process.

    Weights, gradients and the optimiser's state are exact. Activations are all else that a `train_step` holds at its
    fullest moment, kept for backward or just in use, if its pack is full: `tokens_per_pack` tokens of at most
    `samples_per_step` samples, each with the largest of its plugin's `examples` and text for the rest; of the sets of
    modalities that train something, the one that needs the most. Larger items than the examples need more in an encoder
    that trains, and shorter samples need less of everything. So a stage is counted twice: as above, and with the packs
    that the recipe's own data give in its first steps (the heaviest of them, from `_SAMPLED_ROWS` rows or so). If data
    cannot be opened here, `unknown` says why.

    On the CPU, activations were between 0.2 % below and 0.01 % above what the allocator gave out (tiny and small
    backbones, fp32 and bf16, with checkpointing and without). It is the CPU's path that is followed; the kernel that
    CUDA attends with, followed for the shape of Phi-4-mini, made no difference. What a GPU's context and its allocator
    take, and the optimiser's scratch there, come on top.

    Raises ConfigError or ValueError as `on_meta` does, and RuntimeError for layers whose shapes depend on values, or of
    which torch tells none (experts that are not in bf16).
    """
    model = on_meta(recipe, trust=trust)
    owned = weights(model)
    learned = [_learned(model, stage, f"stages.{index}.train") for index, stage in enumerate(recipe.stages)]
    dry = DryRun(model)
    model.backbone.activation_checkpointing = recipe.activation_checkpointing
    accelerator = accelerator_on(recipe.device)
    moments, unknown = [], None
    cached = recipe.feature_cache is not None
    for index, (stage, (gradients, optimiser)) in enumerate(zip(recipe.stages, learned, strict=True)):
        set_trainable(model, stage.train, stage.steps, f"stages.{index}.train")
        companies = [company for company in _companies(model) if model.trains(company)] or _companies(model)
        full = [full_pack(model, company, stage) for company in companies]
        packs = [f"a pack of {len(its)} x {len(its[0]):,} tokens of {_named(its[0].modalities)}" for its in full]
        steps = [_step(dry, its, stage, accelerator, cached, pack) for its, pack in zip(full, packs, strict=True)]
        hungriest = max(steps, key=lambda needs: sum(need.num_bytes for need in needs))
        given = None
        try:
            samples, origin = _heaviest_step(model, recipe, index)
        except (ImportError, OSError, ValueError) as error:
            unknown = f"stages.{index}.data: {_first_line(error)}"
        else:
            needs = _step(dry, samples, stage, accelerator, cached, origin)
            given = Moment(f"stage {stage.name}, as its data are", (gradients, optimiser, *needs))
        moments.append(Moment(f"stage {stage.name}", (gradients, optimiser, *hungriest), given))
    optimiser = max((optimiser for _, optimiser in learned), key=lambda need: need.num_bytes)
    for name, evaluation in recipe.evaluations.items():
        running = min(evaluation.max_running_samples, evaluation.data.limit or evaluation.max_running_samples)
        decoding = GenerationConfig(max_new_tokens=evaluation.max_new_tokens, max_running_samples=running)
        moment = max(_answering(dry, decoding, 0), key=lambda moment: moment.num_bytes)
        moments.append(Moment(f"evaluation {name}, {moment.name}", (optimiser, *moment.needs)))
    return Fit(owned, tuple(moments), unknown=unknown)


def fit_model(model: MoLoRA, config: AnsweringConfig) -> Fit:
    """What a model on the meta device needs to answer: at the prefill of all prompts, and at the last tokens.

    Keys and values are exactly what the cache holds at these moments. Prompts have an example of every modality that
    the router takes together, and text. The prefill was within 0.01 % of what the CPU's allocator gave out. What a step
    of decoding needs for itself is left out: little on the CPU; on CUDA, a layer's keys and values per query head.
    """
    owned = weights(model)
    decoding = GenerationConfig(max_new_tokens=config.max_new_tokens, max_running_samples=config.max_running_samples)
    return Fit(owned, _answering(DryRun(model), decoding, config.prompt_tokens))


def _learned(model: MoLoRA, stage: StageConfig, where: str) -> tuple[Need, Need]:
    """Gradients and the optimiser's state of what a stage trains, made by its optimisers on the meta device."""
    optimizers: dict[str, PartOptimizer] = set_trainable(model, stage.train, stage.steps, where)
    parameters = [p for optimizer in optimizers.values() for p in optimizer.parameters.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers.values():
        optimizer.optimizer.step()
    state = [tensor for optimizer in optimizers.values() for tensor in optimizer.tensors().values()]
    gradients = _size(parameter.grad for parameter in parameters if parameter.grad is not None)
    for parameter in parameters:
        parameter.grad = None
    return (
        Need("gradients", gradients, _about(parameters)),
        Need("optimiser", _size(state), f"of {', '.join(optimizers)}"),
    )


def _companies(model: MoLoRA) -> list[frozenset[str]]:
    """Sets of modalities that a sample may have: single ones, pairs, and all together, as far as they have a rule."""
    names = sorted(model.modalities)
    sizes = sorted({size for size in (1, 2, len(names)) if size <= len(names)})
    ruled = [
        company for size in sizes for company in map(frozenset, combinations(names, size)) if _ruled(model, company)
    ]
    return ruled or [frozenset()]


def _ruled(model: MoLoRA, company: frozenset[str]) -> bool:
    try:
        model.router.order(company)
    except RoutingError:
        return False
    return True


def _heaviest_step(model: MoLoRA, recipe: Recipe, index: int) -> tuple[list[Sample], str]:
    """The samples of the step with the largest pack, of the first steps of a stage; and what is to be said of them."""
    stage, path = recipe.stages[index], recipe.backbone.path
    tokenizer = load_tokenizer(fetch(path, recipe.backbone.revision, weights=False))
    policy = MediaPolicy(allow_urls=recipe.allow_urls, allow_private_addresses=recipe.allow_private_addresses)
    processor = Processor(tokenizer, model.modalities, model.router.order, model.backbone.max_tokens, policy)
    dataset = EncodedSamples(
        stage.data,
        processor,
        seed=seed_of(recipe.seed, stage.name),
        max_tokens=stage.tokens_per_pack,
        skips=(SampleTooLong, MediaError),
        where=f"stages.{index}.data",
    )
    number = min(stage.steps, max(1, _SAMPLED_ROWS // stage.samples_per_step))
    loader = step_loader(
        dataset,
        first_step=0,
        steps=number,
        samples_per_step=stage.samples_per_step,
        rank=0,
        ranks=1,
        workers=0,
    )
    steps = [[sample for sample in samples if isinstance(sample, Sample)] for samples in loader]

    def largest_pack(samples: list[Sample]) -> int:
        learning = [sample for sample in samples if model.trains(sample.modalities)]
        return max((sum(pack.lengths) for pack in processor.packs(learning, stage.tokens_per_pack)), default=0)

    samples = max(steps, key=largest_pack)
    if not samples:
        raise ConfigError(f"none of the first {number * stage.samples_per_step} rows can be used")
    rows = number * stage.samples_per_step
    return samples, f"a pack of {largest_pack(samples):,} tokens, the largest from {rows} rows of its data"


def _step(
    dry: DryRun, samples: list[Sample], stage: StageConfig, accelerator: Accelerator, cached: bool, pack: str
) -> tuple[Need, ...]:
    """What a training step holds beside weights, gradients and optimiser: logits, and everything else."""
    model = dry.model
    if cached:
        samples = [_with_frames(model, sample) for sample in samples]
    dry.gradients(p for parameters in model.parts().values() for p in parameters.values() if p.requires_grad)
    model.train()
    with dry:
        train_step(model, _processor(model), samples, stage.tokens_per_pack, {}, accelerator)
    full, checkpointing = dry.fullest, "on" if model.backbone.activation_checkpointing else "off"
    return (
        Need("logits", full.logits, _logits(full.logits, "chunk by chunk", model)),
        Need("activations", full.num_bytes - full.logits, f"{pack}, checkpointing {checkpointing}"),
    )


def _logits(num_bytes: int, how: str, model: MoLoRA) -> str:
    return f"{model.backbone.vocab_size:,} wide, {how}" if num_bytes else "none at the fullest moment"


def full_pack(model: MoLoRA, company: frozenset[str], stage: StageConfig) -> list[Sample]:
    """Samples that fill a pack of a stage, all the same: the largest examples of these modalities, and text."""
    most_tokens = min(stage.tokens_per_pack, model.backbone.max_tokens)
    shortest = _sample(model, company, 0, most_tokens)
    number = min(stage.samples_per_step, stage.tokens_per_pack // len(shortest))
    num_tokens = min(stage.tokens_per_pack // number, most_tokens)
    return _copies(_sample(model, company, num_tokens, most_tokens), number)


def _answering(dry: DryRun, config: GenerationConfig, prompt_tokens: int) -> tuple[Moment, Moment]:
    """What answering holds at its two fullest moments: all prompts in one pack, and every answer's last token."""
    model = dry.model
    company = max(_companies(model), key=len)
    sample = _sample(model, company, prompt_tokens, model.backbone.max_tokens, generate=True)
    number = config.max_running_samples
    with dry:
        steps = generate(model, _copies(sample, number), config)
        next(steps)
        begun, prefill = dry.alive, dry.fullest
    per_position = number * _cached_per_position(dry)
    at_first, at_last = (
        per_position * positions
        for positions in (len(sample), cached_positions(model.backbone, len(sample), config.max_new_tokens))
    )
    prompts = f"{number} x {len(sample):,} tokens of {_named(sample.modalities)}"
    answers = f"{prompts}, {config.max_new_tokens:,} new ones each, and room to grow"

    def moment(name: str, alive: Alive, cached: int, cached_origin: str, origin: str) -> Moment:
        logits = _logits(alive.logits, f"{number} at a time", model)
        needs = (
            Need("KV cache", cached, cached_origin),
            Need("logits", alive.logits, logits),
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
    sample = _sample(model, frozenset(), 0, model.backbone.max_tokens)
    with dry, torch.no_grad():
        model(_processor(model).collate([sample]), cache=cache)
    return _size(cache.tensors()) // len(sample)


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


def _processor(model: MoLoRA) -> Processor:
    """A processor whose tokenizer stands in for the backbone's: only how many tokens there are matters."""
    return Processor(byte_tokenizer(), model.modalities, model.router.order, sys.maxsize)


def _sample(
    model: MoLoRA, company: frozenset[str], num_tokens: int, most_tokens: int, *, generate: bool = False
) -> Sample:
    """A conversation about the largest example of each modality, or the smallest if that is too long, with text up to
    `num_tokens`. Raises SampleTooLong for one of more than `most_tokens`."""
    processor = _processor(model)
    examples = [_by_size(model.modalities[name]) for name in sorted(company)]
    length = 0
    for end in (-1, 0):
        parts = [parts[end] for parts in examples]
        shortest = len(_conversation(processor, parts, 1, generate))
        length = max(shortest, num_tokens)
        if length <= most_tokens:
            return _conversation(processor, parts, 1 + length - shortest, generate)
    raise SampleTooLong(
        f"a sample of {_named(company)} takes {length:,} tokens, but only {most_tokens:,} fit into a pack and the "
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


def _copies(sample: Sample, number: int) -> list[Sample]:
    return [replace(sample, id=str(index)) for index in range(number)]


def _with_frames(model: MoLoRA, sample: Sample) -> Sample:
    """With the frames of encoders that do not train, as the feature cache brings them."""
    items = []
    for item in sample.items:
        encoder: Any = model.encoders[item.modality]
        trains = any(parameter.requires_grad for parameter in encoder.parameters())
        frames_SC = None if trains else torch.zeros(item.prepared.num_tokens, encoder.width)
        items.append(replace(item, frames_SC=frames_SC))
    return replace(sample, items=tuple(items))


def _named(company: frozenset[str]) -> str:
    return "+".join(sorted(company)) or "text"


# What there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device, what is free of its memory, and how much it has."""

    name: str
    free_bytes: int
    num_bytes: int


def devices(kind: str) -> list[Device]:
    """This machine's devices of a kind, "cuda" or "cpu"."""
    if kind == "cpu":
        memory = psutil.virtual_memory()
        return [Device("CPU", memory.available, memory.total)]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Device(f"GPU {i}, {name}", *torch.cuda.mem_get_info(i)) for i, name in enumerate(names)]


def show(fit: Fit, there: Iterable[Device]) -> None:
    """Prints what is needed, within 80 columns, and beside it what each device has."""
    rows: list[tuple[str | Text, ...]] = []

    def add(title: str, needs: Iterable[Need], total: int, origin: str) -> None:
        rows.append((styled(title, "bold"),))
        for need in needs:
            rows.append((need.what, amount(need.num_bytes), need.origin))
        rows.append(("total", styled(amount(total), "bold"), origin))

    constant = (*fit.weights, fit.process) if fit.process else fit.weights
    add("weights", constant, fit.constant_bytes, "")
    for moment in fit.moments:
        for said in (moment, moment.given) if moment.given else (moment,):
            rows.append(())
            add(said.name, said.needs, fit.constant_bytes + said.num_bytes, "with the weights")
    print_table(("what", "how much", "where it comes from"), rows, wide="where it comes from", right=("how much",))
    say()
    if fit.unknown:
        say(f"The packs that its data give are not counted: {fit.unknown}")
    needed = f"{amount(fit.given_bytes)} needed"
    if any(moment.given for moment in fit.moments):
        needed += f" as its data are, {amount(fit.num_bytes)} with the largest packs that it allows"
    for device in there:
        fits = fit.given_bytes <= device.free_bytes
        mark, verdict = (styled("ok", "green"), "it fits") if fits else (styled("no", "red"), "it does not fit")
        has = f"{amount(device.free_bytes)} free of {amount(device.num_bytes)}"
        say(mark, f" {device.name}: {verdict}, {needed}, {has}")


def amount(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    unit, size = next((pair for pair in _UNITS if num_bytes >= pair[1]), _UNITS[-1])
    return f"{num_bytes / size:,.1f} {unit}" if num_bytes else "0"


def main(
    source: str,
    overrides: Sequence[str] = (),
    modalities: Sequence[str | Path] = (),
    device_memory_gib: float | None = None,
    trust: Sequence[str] = (),
) -> int:
    """Prints what a recipe (a YAML file, with its overrides) or a model needs. Returns 1 if it does not fit, else 0.

    `overrides` of a model are fields of AnsweringConfig. The device is the one the run would take, or any that has
    `device_memory_gib`.
    """
    transformers.logging.set_verbosity_error()
    libraries = psutil.Process().memory_info().rss
    name = None
    with console.status("building it without weights"):
        if Path(source).suffix in (".yaml", ".yml"):
            if modalities:
                raise ConfigError(f"{source}: a recipe names its modalities itself; --modality goes with a backbone")
            recipe = read(Recipe, source, overrides)
            name, fit = recipe.device, fit_recipe(recipe, trust)
        else:
            config = build(AnsweringConfig, options(overrides), "--fit")
            fit = fit_model(on_meta(source, modalities, dtype=config.dtype, trust=trust), config)
    kind = pick_device(name).type
    if kind == "cpu" and device_memory_gib is None:
        fit = replace(fit, process=Need("Python", libraries, "the interpreter and its libraries"))
    if device_memory_gib is None:
        there = devices(kind)
    else:
        num_bytes = int(device_memory_gib * 2**30)
        there = [Device("such a device", num_bytes, num_bytes)]
    show(fit, there)
    return int(fit.given_bytes > there[0].free_bytes)
