"""Pictures through a frozen public tower: what rank, projector and adapter are worth, and what fine-tuning costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.page import Results, bars, compared, table
from benchmarks.evidence.probe import probe_frames
from benchmarks.evidence.text import Texts, answers_kept
from benchmarks.evidence.work import Arm, Found, Work, updates
from molora.checkpoint.opening import open_model
from molora.data.sources import EncodedSamples
from molora.inference.load import LoadedModel
from molora.pack import Sample
from molora.seeding import seed_of
from molora.train.frame_cache import FeatureCache
from molora.train.optim import learning_rate
from molora.train.recipe import Recipe, plan_recipe

TITLE = "Pictures: a frozen tower, and what learns beside it"
QUESTION = """\
A frozen language model is told by a frozen MobileNetV2 what is in a picture of CIFAR-10. How near does it come to a
linear probe of the same features? What do the rank of the adapter and the projector alone give, what a tower that
learns from scratch, and what becomes of text when the language model itself is fine-tuned instead?"""
DATA = ("pictures",)
RECIPES = ("pictures", "convit_pictures")
ALL, PROBE_ALL = "frozen tower, rank 16, all rows", "linear probe, all rows"
RANKS = (4, 16, 64)
ALONE, SCRATCH, FULL = "projector alone", "tower from scratch", "all weights of the language model"
PROBE_FEW = "linear probe, the rows of the short arms"
# The short arms, which compare ways: as many updates each, on rows that no one sees twice.
STEPS, SAMPLES, QUESTIONS = 60, 16, 300
FULL_RATE = 5e-5
STORIES, ASKED = 16, 8
SHORT = (*(f"rank {rank}" for rank in RANKS), ALONE, SCRATCH, FULL)
STOCK = "stock transformers"
ARMS = {"pictures": (ALL, PROBE_ALL, *SHORT, PROBE_FEW)}
BUDGET = {
    "updates of the short arms": STEPS,
    "samples of each update": SAMPLES,
    "rows of their probe": STEPS * SAMPLES,
    "held-out questions of the short arms": QUESTIONS,
    "learning rate of full fine-tuning": FULL_RATE,
    "stories of text": STORIES,
    "text questions": ASKED,
}
NOT_SHOWN = (
    "The original pictures: these are JPEG copies, in which every model sees worse.",
    "A figure that nobody chose by: one pass over all rows gave 0.702, 3.4 points below the probe, and then a second "
    "pass was added.",
    "Questions about where things are: the tower's map is averaged to one frame.",
    "What full fine-tuning gives with a rate, a schedule or replayed text that were searched for; it has one common "
    "setting here.",
)


def measure(work: Work) -> Iterator[Arm]:
    frozen = work.recipe("pictures")
    yield work.figure(PROBE_ALL, partial(probe_frames, recipe=frozen))
    yield work.figure(PROBE_FEW, partial(probe_frames, recipe=frozen, rows=None if work.tiny else STEPS * SAMPLES))
    for rank in RANKS:
        adapter = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ".*_proj"}
        yield work.trained(f"rank {rank}", _short(work, _with_adapter(frozen, adapter)))
    yield work.trained(ALONE, _short(work, _with_adapter(frozen, None)))
    yield work.trained(SCRATCH, _short(work, work.recipe("convit_pictures")))
    yield work.arm("full", partial(_full, work, _short(work, _with_adapter(frozen, None))))
    yield work.trained(ALL, _twice(work.asked(frozen)), "all-rows")


def _twice(recipe: Recipe) -> Recipe:
    """The recipe with a second pass over the rows, in another order."""
    (stage,) = recipe.stages
    return replace(recipe, stages=[stage, replace(stage, name="again")])


def _short(work: Work, recipe: Recipe) -> Recipe:
    return work.asked(work.shortened(recipe, steps=STEPS, samples=SAMPLES), QUESTIONS, ("as is", "blank"))


def _with_adapter(recipe: Recipe, adapter: Mapping[str, Any] | None) -> Recipe:
    """The recipe with another adapter, or with none and the bare backbone."""
    (name,) = recipe.modalities
    (stage,) = recipe.stages
    train = {part: how for part, how in stage.train.items() if adapter or not part.startswith("adapters.")}
    modality = replace(recipe.modalities[name], adapter=adapter and dict(adapter))
    router = recipe.router if adapter else replace(recipe.router, options={"rules": {name: None}})
    return replace(recipe, modalities={name: modality}, stages=[replace(stage, train=train)], router=router)


def _full(work: Work, recipe: Recipe) -> Found:
    """What molora never does: the weights of the language model learn beside the projector, from the same samples and
    by the same losses."""
    (stage,) = recipe.stages
    model, processor = open_model(plan_recipe(recipe), "cpu")
    samples = EncodedSamples(
        stage.data,
        processor,
        seed=seed_of(work.seed, stage.name),
        max_tokens=stage.tokens_per_pack,
        skips=(),
        where="data",
        samples_per_step=stage.samples_per_step,
    )
    ((pattern, config),) = stage.train.items()
    projector = list(model.parts()[f"{pattern}.default"].values())
    groups = [(FULL_RATE, list(model.backbone.model.parameters())), (config.learning_rate, projector)]
    for parameter in (parameter for _, group in groups for parameter in group):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for rate, group in groups], betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    cache = FeatureCache(Path(str(recipe.feature_cache)), model)
    for step in range(stage.steps):
        numbers = range(step * stage.samples_per_step, (step + 1) * stage.samples_per_step)
        drawn = [sample for sample in map(samples.__getitem__, numbers) if isinstance(sample, Sample)]
        losses = model.losses(processor.collate(cache.fill(drawn)))
        (losses.sums_N.sum() / sum(losses.num_targets)).backward()
        for group, (rate, parameters) in zip(optimizer.param_groups, groups, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, config.max_gradient_norm)
            group["lr"] = learning_rate(replace(config, learning_rate=rate), step, stage.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loaded = LoadedModel(model.requires_grad_(False).eval(), processor)
    figures = work.score_in_memory(FULL, recipe.evaluations, loaded)
    text = Texts.of_work(work, STORIES, ASKED)
    before, _, stock = text.of_stock(STOCK, work.backbone)
    after, _, answers = text.of_molora(FULL, loaded)
    return Found([*figures, before, after, answers_kept(FULL, answers, stock)], updates=updates(recipe))


def sections(results: Results) -> Iterator[str]:
    yield from compared(results, ARMS)
    model, probe = (results.mean(arm, "exact_match", "pictures") for arm in (ALL, PROBE_ALL))
    if model is not None and probe is not None:
        yield f"With all rows the model is {100 * (model - probe):+.1f} points from the probe.\n"
    yield "## text\n"
    yield "Adapters leave text as it is, to the bit: see the page on interference. Fine-tuned weights do not.\n"
    yield table(
        ("model", "perplexity of stories", "share of answers kept"),
        [
            (
                arm,
                results.cell(arm, "perplexity", "text", "none", digits=2),
                results.cell(arm, "answers kept", "text", "none"),
            )
            for arm in (STOCK, FULL)
        ],
    )


def draw(results: Results, path: Path) -> None:
    bars(results, ARMS, path)
