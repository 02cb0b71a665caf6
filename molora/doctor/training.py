"""What a recipe needs of a device's memory, in each of its stages and evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from molora.checkpoint.pretrained import fetch, load_tokenizer
from molora.config import ConfigError
from molora.data.processor import Processor, SampleTooLong
from molora.data.sources import EncodedSamples
from molora.doctor.answering import answering_moments
from molora.doctor.dry_run import DryRun, first_line, on_meta
from molora.doctor.needs import MemoryNeeds, Moment, Need, about, logits_of, size_of, weights
from molora.doctor.samples import full_pack, modality_sets, stand_in_processor, with_frames
from molora.inference.generate import GenerationConfig
from molora.media import MediaPolicy
from molora.modality import MediaError
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routing import name_of
from molora.seeding import seed_of
from molora.train.optim import PartOptimizer, set_trainable
from molora.train.recipe import Recipe, StageConfig
from molora.train.step import train_step

# Rows of a stage's data from which its packs are known.
_SAMPLED_ROWS = 64


def training_needs(recipe: Recipe, trust: Sequence[str] = ()) -> MemoryNeeds:
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
    moments, unknown = [], None
    cached = recipe.feature_cache is not None
    for index, (stage, (gradients, optimiser)) in enumerate(zip(recipe.stages, learned, strict=True)):
        set_trainable(model, stage.train, stage.steps, f"stages.{index}.train")
        sets = [modalities for modalities in modality_sets(model) if model.trains(modalities)] or modality_sets(model)
        full = [full_pack(model, modalities, stage) for modalities in sets]
        steps = [
            _step(
                dry,
                its,
                stage,
                cached,
                f"a pack of {len(its)} x {len(its[0]):,} tokens of {name_of(its[0].modalities)}",
            )
            for its in full
        ]
        most = max(steps, key=lambda needs: sum(need.num_bytes for need in needs))
        given = None
        try:
            samples, origin = _heaviest_step(model, recipe, index)
        except (ImportError, OSError, ValueError) as error:
            unknown = f"stages.{index}.data: {first_line(error)}"
        else:
            needs = _step(dry, samples, stage, cached, origin)
            given = Moment(f"stage {stage.name}, as its data are", (gradients, optimiser, *needs))
        moments.append(Moment(f"stage {stage.name}", (gradients, optimiser, *most), given))
    optimiser = max((optimiser for _, optimiser in learned), key=lambda need: need.num_bytes)
    for name, evaluation in recipe.evaluations.items():
        running = min(evaluation.max_running_samples, evaluation.data.limit or evaluation.max_running_samples)
        decoding = GenerationConfig(max_new_tokens=evaluation.max_new_tokens, max_running_samples=running)
        moment = max(answering_moments(dry, decoding, 0), key=lambda moment: moment.num_bytes)
        moments.append(Moment(f"evaluation {name}, {moment.name}", (optimiser, *moment.needs)))
    return MemoryNeeds(owned, tuple(moments), unknown=unknown)


def _learned(model: MoLoRA, stage: StageConfig, where: str) -> tuple[Need, Need]:
    """Gradients and the optimiser's state of what a stage trains, made by its optimisers on the meta device."""
    optimizers: dict[str, PartOptimizer] = set_trainable(model, stage.train, stage.steps, where)
    parameters = [p for optimizer in optimizers.values() for p in optimizer.parameters.values()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers.values():
        optimizer.optimizer.step()
    state = [tensor for optimizer in optimizers.values() for tensor in optimizer.tensors().values()]
    for parameter in parameters:
        parameter.grad = None
    gradients = Need("gradients", size_of(parameters), about(parameters))
    return gradients, Need("optimiser", size_of(state), f"of {', '.join(optimizers)}")


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
    size = stage.samples_per_step
    rows = size * min(stage.steps, max(1, _SAMPLED_ROWS // size))
    encoded = [dataset[k] for k in range(rows)]
    steps = [[each for each in encoded[k : k + size] if isinstance(each, Sample)] for k in range(0, rows, size)]

    def largest_pack(samples: list[Sample]) -> int:
        learning = [sample for sample in samples if model.trains(sample.modalities)]
        return max((sum(pack.lengths) for pack in processor.packs(learning, stage.tokens_per_pack)), default=0)

    samples = max(steps, key=largest_pack)
    if not samples:
        raise ConfigError(f"none of the first {rows} rows can be used")
    return samples, f"a pack of {largest_pack(samples):,} tokens, the largest from {rows} rows of its data"


def _step(dry: DryRun, samples: list[Sample], stage: StageConfig, cached: bool, pack: str) -> tuple[Need, ...]:
    """What a training step holds beside weights, gradients and optimiser: logits, and everything else."""
    model = dry.model
    if cached:
        samples = [with_frames(model, sample) for sample in samples]
    dry.gradients(p for parameters in model.parts().values() for p in parameters.values() if p.requires_grad)
    model.train()
    with dry:
        train_step(model, stand_in_processor(model), samples, stage.tokens_per_pack, {})
    full, checkpointing = dry.fullest, "on" if model.backbone.activation_checkpointing else "off"
    return (
        Need("logits", full.logits, logits_of(full.logits, "chunk by chunk", model)),
        Need("activations", full.num_bytes - full.logits, f"{pack}, checkpointing {checkpointing}"),
    )
