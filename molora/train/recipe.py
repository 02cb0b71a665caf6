"""Recipes: everything a run is made of."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from molora.checkpoint.assembly import BackboneConfig, Blueprint, ModalityConfig, RouterConfig, blueprint, router_plan
from molora.checkpoint.modality_folder import read_plan
from molora.checkpoint.opening import ModelPlan
from molora.checkpoint.run_folder import read_run
from molora.checkpoint.trust import remember
from molora.config import ConfigError, did_you_mean, environment_in, require
from molora.data.mixture import MixtureConfig
from molora.data.processor import SampleTooLong
from molora.data.sources import SourceConfig
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.metrics import specs_of
from molora.media import MediaPolicy
from molora.modality import MediaError
from molora.plugins import Kind, find
from molora.received import check_name
from molora.routing import TEXT
from molora.train.optim import PartConfig
from molora.train.preference_losses import PreferenceConfig

Objective = Literal["answers", "words", "preferences"]


@dataclass(kw_only=True)
class StageConfig:
    """What trains (name pattern to how), on what, for how long: for `steps` steps, or for `epochs` epochs. Of one
    source, an epoch is all of its rows once. Of several, it lasts until each has given as many samples as it has rows,
    by their weights; all but the one that takes longest come again in it. A part of an epoch is allowed.

    Every step takes `samples_per_step` samples, over all processes, packed up to `tokens_per_pack`; several packs are
    accumulated. Evaluations run at the end of every stage but one of words that others follow, and after every
    `evaluate_every_steps` steps if that is above 0. A sample longer than a pack, or with more words than its media can
    say, is `too_long`; one whose media cannot be used is `unusable`: either stops the run, or is left out and counted.
    When more than `skip_limit` were left out, the run stops and lists them. `start_from` maps a part that trains to the
    part whose weights it begins with. `mixture` is how the sources are mixed.

    The `objective` is what is learned. By `answers` the backbone gives them. By `words` the media tokens of a sample
    come to be the embeddings of its answer's tokens, in their order (CTC): no layer of the backbone runs, so a step
    costs little more than the encoder does, and no adapter trains. With a `vocabulary` answers
    are spelled with so many first tokens of the tokenizer, which are pieces of words: speech with thousands of words is
    learned so. By `preferences` the chosen answer comes to be likelier than the rejected one, beside what both were
    when the stage began; `preference` says by which losses."""

    name: str
    train: dict[str, PartConfig]
    data: dict[str, SourceConfig]
    steps: int = 0
    epochs: float = 0.0
    samples_per_step: int
    tokens_per_pack: int = 8192
    too_long: Literal["error", "skip"] = "error"
    unusable: Literal["error", "skip"] = "error"
    skip_limit: int | None = None
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    evaluate_every_steps: int = 0
    objective: Objective = "answers"
    vocabulary: int | None = None
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    start_from: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, 1, "samples_per_step", "tokens_per_pack")
        require(self, 0, "steps", "epochs", "evaluate_every_steps", "skip_limit")
        if self.objective != "preferences" and self.preference != PreferenceConfig():
            raise ValueError(f"preference: is for `objective: preferences`, and this stage learns {self.objective}")
        if self.objective != "words" and self.vocabulary is not None:
            raise ValueError(f"vocabulary: is for `objective: words`, and this stage learns {self.objective}")
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"steps is {self.steps} and epochs {self.epochs:g}; give one of the two, and the other as 0"
            )
        for name, source in self.data.items() if self.epochs else ():
            for what, changes in (
                ("a weight that changes", isinstance(source.weight, list)),
                ("max_epochs", source.max_epochs is not None),
                ("shares of the tokens", self.mixture.weights_of == "tokens" and len(self.data) > 1),
            ):
                if changes:
                    raise ValueError(f"epochs: {self.epochs:g}, but data.{name} has {what}; give steps instead")


@dataclass(kw_only=True)
class KeepBest:
    """The model is kept in `best/` of the run as it was when `metric` of `evaluation` was highest or, where `highest`
    is false as for error rates, lowest; of equal values the first is kept. A metric of a tag is written
    `exact_match/TAG`."""

    evaluation: str
    metric: str
    highest: bool


@dataclass(kw_only=True)
class Recipe:
    """Everything a run is made of.

    `run` is the folder it writes; `data_root` is for the recipe's own paths: `${data_root}/…`. `seed` decides how new
    weights start, the order of samples and what is drawn for them. The state to resume from is saved every
    `save_every_steps`, a row of metrics.jsonl written every `log_every_steps`. `trackers` get the rows too, wandb and
    trackio in their project `tracker_project`. `keep_best` keeps the best model that was evaluated beside the last one.
    `data_workers` processes prepare data beside each that trains. `feature_cache` is a folder that keeps the frames of
    frozen encoders, for later epochs and other runs. With `activation_checkpointing` layers are computed again in the
    backward pass, which takes less memory. With `shard_backbone` each of several processes holds a share of every
    decoder layer, which is whole only while it computes. `device` is torch's name for one, by default the GPU if there
    is one. `allow_urls`: whether media may be fetched over HTTP; `allow_private_addresses`: from inside a network too.
    `allow_changed_environment`: whether a run may go on with other versions, threads or processes than it began with,
    and so to other results.
    """

    run: str
    backbone: BackboneConfig
    modalities: dict[str, ModalityConfig]
    stages: list[StageConfig]
    router: RouterConfig = field(default_factory=RouterConfig)
    evaluations: dict[str, EvaluationConfig] = field(default_factory=dict)
    keep_best: KeepBest | None = None
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    tracker_project: str = "molora"
    data_root: str | None = None
    seed: int = 0
    save_every_steps: int = 100
    log_every_steps: int = 1
    data_workers: int = 0
    activation_checkpointing: bool = False
    shard_backbone: bool = False
    feature_cache: str | None = None
    allow_urls: bool = False
    allow_private_addresses: bool = False
    device: str | None = None
    allow_changed_environment: bool = False

    def __post_init__(self) -> None:
        named = [("modalities", self.modalities), ("evaluations", self.evaluations)]
        for where, names in (*named, ("stages", [stage.name for stage in self.stages])):
            for name in names:
                check_name(name, where)
        if not self.stages:
            raise ValueError("stages: none given; a recipe trains at least one stage")
        if self.keep_best is not None and (name := self.keep_best.evaluation) not in self.evaluations:
            near = did_you_mean(name, self.evaluations)
            raise ValueError(f"keep_best.evaluation: {name!r} is none; {near}there is {sorted(self.evaluations)}")
        require(self, 1, "save_every_steps", "log_every_steps")
        require(self, 0, "data_workers")
        if self.shard_backbone and self.backbone.quantization != "none":
            raise ValueError(
                f"shard_backbone: a backbone with quantization {self.backbone.quantization} is not cut into shards; "
                "leave one of the two out"
            )
        given_away = [*((m.options, m.adapter) for m in self.modalities.values()), self.router.options]
        if secret := next(environment_in(given_away), None):
            raise ValueError(
                f"{secret} stands among the options of a modality or router, whose folders are given to others and "
                "would hold its value; write the value itself if it may be known"
            )


def plan_recipe(recipe: Recipe, trust: Sequence[str] = ()) -> ModelPlan:
    """The model that a recipe describes, before training. `trust` as in `train`. Raises ConfigError, ValueError."""
    plans: dict[str, Blueprint] = {}
    saved: dict[str, Path] = {}
    for name, config in recipe.modalities.items():
        if config.path is not None:
            saved[name] = Path(config.path)
            try:
                plans[name] = read_plan(saved[name], name, trust)
            except ConfigError as error:
                raise type(error)(f"modalities.{name}.path: {error}") from error
        else:
            plans[name] = blueprint(name, str(config.plugin), config.options, config.adapter, f"modalities.{name}")
    router = recipe.router
    if router.path is None:
        chosen, where, learned = router_plan(router), "router", None
    elif router != RouterConfig(path=router.path):
        raise ConfigError(f"router: path {router.path!r} brings plugin and options with it; leave them out")
    else:
        learned = Path(router.path)
        chosen, where = read_run(learned).router_plan(trust), str(learned / "molora.json")
    policy = MediaPolicy(allow_urls=recipe.allow_urls, allow_private_addresses=recipe.allow_private_addresses)
    return ModelPlan(recipe.backbone, plans, chosen, where, saved, learned, seed=recipe.seed, media_policy=policy)


def remember_plugins(recipe: Recipe) -> None:
    """Trusts the files and modules that a recipe of the user's names, wherever folders made with them name them."""
    sources = [source for stage in recipe.stages for source in stage.data.values()]
    sources += [evaluation.data for evaluation in recipe.evaluations.values()]
    named: dict[Kind, Iterable[str | None]] = {
        "modality": (config.plugin for config in recipe.modalities.values() if config.plugin != TEXT),
        "router": [recipe.router.plugin],
        "source": (source.kind for source in sources),
        "metric": (spec for one in recipe.evaluations.values() for spec, _ in specs_of(one.metrics)),
    }
    for kind, specs in named.items():
        for spec in filter(None, specs):
            remember(find(kind, spec))


def count_steps(stage: StageConfig, num_rows: Mapping[str, int]) -> int:
    """The steps of a stage whose sources have so many rows, by name."""
    if stage.steps:
        return stage.steps
    shares = shares_of(stage, num_rows)
    samples = stage.epochs * max(num_rows[name] / share for name, share in shares.items())
    return max(1, math.ceil(round(samples / stage.samples_per_step, 6)))  # the last digits of a float add no step


def shares_of(stage: StageConfig, num_rows: Mapping[str, int]) -> dict[str, float]:
    """What part of the samples each source of a stage that counts epochs gives."""
    power = 0.0 if stage.mixture.temperature is None else 1 / stage.mixture.temperature
    weights = {name: float(stage.data[name].weight) * num_rows[name] ** power for name in stage.data}  # pyright: ignore[reportArgumentType]
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def skipped_errors(stage: StageConfig) -> tuple[type[ValueError], ...]:
    """The errors of samples that a stage leaves out."""
    choices = ((SampleTooLong, stage.too_long), (MediaError, stage.unusable))
    return tuple(error for error, choice in choices if choice == "skip")
