"""Recipes: everything a run is made of, where the run of one stands, and what may change before it goes on."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from molora.checkpoint.assembly import BackboneConfig, Blueprint, ModalityConfig, RouterConfig, blueprint, router_plan
from molora.checkpoint.modality_folder import read_plan
from molora.checkpoint.opening import ModelPlan
from molora.checkpoint.run_folder import read_run, read_state_about
from molora.checkpoint.trust import remember
from molora.config import ConfigError, build, environment_in, plain, require
from molora.data.processor import SampleTooLong
from molora.data.sources import SourceConfig
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.metrics import specs_of
from molora.media import MediaPolicy
from molora.modality import MediaError
from molora.plugins import Kind, find
from molora.received import check_name
from molora.train.step import PartConfig, learning_rate

# What may change once a run has begun, as all that is done would have been the same. Of a recipe, only these must stay:
_KEPT = ("seed", "modalities", "router")
# Of a stage that has begun all must, but for what it evaluates, what would have stopped the run before, and `steps`.
_FREE_IN_STAGE = ("steps", "evaluate_every_steps")
_FREE_FROM_ERROR = ("too_long", "unusable")


@dataclass(kw_only=True)
class StageConfig:
    """What trains (name pattern to how), on what, for how long. Samples of a step are packed up to `tokens_per_pack`;
    several packs are accumulated. A sample longer than a pack is `too_long`, one whose media cannot be used is
    `unusable`: either stops the run, or is left out and counted. `start_from` maps a part that trains to the part whose
    weights it begins with."""

    name: str
    train: dict[str, PartConfig]
    data: dict[str, SourceConfig]
    steps: int
    samples_per_step: int
    tokens_per_pack: int = 8192
    too_long: Literal["error", "skip"] = "error"
    unusable: Literal["error", "skip"] = "error"
    evaluate_every_steps: int = 0
    start_from: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self, 1, "steps", "samples_per_step", "tokens_per_pack")
        require(self, 0, "evaluate_every_steps")


@dataclass(kw_only=True)
class Recipe:
    """Everything a run is made of.

    `run` is the folder it writes; `data_root` is for the recipe's own paths: `${data_root}/…`. `data_workers` processes
    prepare data beside each that trains. `feature_cache` is a folder that keeps the frames of frozen encoders, for
    later epochs and other runs. With `activation_checkpointing` layers are computed again in the backward pass, which
    takes less memory. `device` is torch's name for one, by default the GPU if there is one. `allow_urls`: whether media
    may be fetched over HTTP; `allow_private_addresses`: from inside a network too. `allow_changed_environment`: whether
    a run may go on with other versions, threads or processes than it began with, and so to other results.
    """

    run: str
    backbone: BackboneConfig
    modalities: dict[str, ModalityConfig]
    stages: list[StageConfig]
    router: RouterConfig = field(default_factory=RouterConfig)
    evaluations: dict[str, EvaluationConfig] = field(default_factory=dict)
    data_root: str | None = None
    seed: int = 0
    save_every_steps: int = 100
    log_every_steps: int = 1
    data_workers: int = 0
    activation_checkpointing: bool = False
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
        require(self, 1, "save_every_steps", "log_every_steps")
        require(self, 0, "data_workers")
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
        "modality": (config.plugin for config in recipe.modalities.values()),
        "router": [recipe.router.plugin],
        "source": (source.kind for source in sources),
        "metric": (spec for one in recipe.evaluations.values() for spec, _ in specs_of(one.metrics)),
    }
    for kind, specs in named.items():
        for spec in filter(None, specs):
            remember(find(kind, spec))


def skipped_errors(stage: StageConfig) -> tuple[type[ValueError], ...]:
    """The errors of samples that a stage leaves out."""
    choices = ((SampleTooLong, stage.too_long), (MediaError, stage.unusable))
    return tuple(error for error, choice in choices if choice == "skip")


@dataclass
class Position:
    """Where a run stands: the stage, the steps of it that are done, the updates each part has taken in it, and the
    evaluations to do before it goes on."""

    stage: int = 0
    step: int = 0
    part_steps: dict[str, int] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)


def environment(**more: Any) -> dict[str, Any]:
    """What must stay the same for a resumed run to equal one that was never stopped."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        **more,
    }


def resumed_position(state: Path, recipe: Recipe) -> Position:
    """Where a run stands. Raises ConfigError naming the settings in which the recipe differs from what was done."""
    about = read_state_about(state)
    # Built again, so that a setting that is younger than the run has its default.
    then = build(Recipe, about["recipe"], f"{state}: recipe")
    steps = [stage.steps for stage in then.stages] + [1]  # after the last stage none is done
    if about["stage"] >= len(steps) or about["step"] >= steps[about["stage"]]:
        raise ValueError(
            f"{state / 'state.json'}: stage {about['stage']} and step {about['step']} are none of its recipe, whose "
            f"stages have {', '.join(map(str, steps[:-1]))} steps; copy it again, or give another run folder"
        )
    position = Position(about["stage"], about["step"], about["part_steps"], about.get("evaluate", []))
    if changed := _changes(then, recipe, position):
        raise ConfigError(
            f"{recipe.run}: this run was begun with other settings: {'; '.join(changed)}. Give the recipe another run "
            "folder, or restore the settings to go on"
        )
    last = position.stage - 1  # a stage that was at its end may have got more steps
    if position.step == 0 and 0 <= last < len(recipe.stages) and recipe.stages[last].steps > steps[last]:
        position.stage, position.step = last, steps[last]
    return position


def _changes(then: Recipe, now: Recipe, position: Position) -> list[str]:
    """Settings that changed and must not, each with both values and, for a schedule, why."""
    begun = position.stage + (position.step > 0)
    # What came from the environment is compared as it is written, or by its value, as older states have it.
    found = []
    for as_values in (plain, asdict):
        before, after = (json.loads(json.dumps(as_values(recipe))) for recipe in (then, now))
        for old, new in zip(before["stages"], after["stages"], strict=False):
            for key in (*_FREE_IN_STAGE, *(key for key in _FREE_FROM_ERROR if old[key] == "error")):
                del old[key], new[key]
        for recipe in (before, after):
            recipe["stages"] = dict(enumerate(recipe["stages"][:begun]))
        was, has = ({key: recipe[key] for key in (*_KEPT, "stages")} for recipe in (before, after))
        found.append(list(differences(was, has)))
    changed = min(found, key=len)
    for index, (old, new) in enumerate(zip(then.stages[:begun], now.stages[:begun], strict=False)):
        done = position.step if index == position.stage else old.steps
        if old.steps != new.steps and (why := _other_past(old, new, done, last=index == begun - 1)):
            changed.append(f"stages.{index}.steps: was {old.steps}, is {new.steps}, but {why}")
    return changed


def _other_past(old: StageConfig, new: StageConfig, done: int, last: bool) -> str:
    """Why another number of steps would have changed what a run has done; empty if it would not have."""
    if not last:
        return "a later stage began from its end"
    if new.steps <= done:
        return f"{done} steps of it are done"
    for name, config in old.train.items():
        for step in range(done):
            was, would = (learning_rate(config, step, stage.steps) for stage in (old, new))
            if was != would:
                return (
                    f"the {config.schedule} schedule of {name} runs over all steps, so that step {step + 1} would have "
                    f"had a learning rate of {would:.9g}, not {was:.9g}; keep {old.steps}, and add a stage to go on"
                )
    return ""


def differences(then: Mapping[Any, Any], now: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """The innermost settings that differ, each with both values."""
    for name in {**then, **now}:
        if all(isinstance(side.get(name), Mapping) for side in (then, now)):
            yield from differences(then[name], now[name], f"{above}{name}.")
        elif (name in then) != (name in now) or then[name] != now[name]:
            was, has = (f"{side[name]!r:.200}" if name in side else "not set" for side in (then, now))
            yield f"{above}{name}: was {was}, is {has}"
