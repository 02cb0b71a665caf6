"""Where a run stands, and what may change before it goes on."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from molora.checkpoint.run_folder import read_state_about
from molora.config import ConfigError, build, plain
from molora.data.sources import open_source
from molora.train.optim import PartConfig, learning_rate
from molora.train.recipe import Recipe, StageConfig, count_steps

# What may change once a run has begun, as all that is done would have been the same. Of a recipe, only these must stay,
# and the quantization of its backbone:
_KEPT = ("seed", "modalities", "router", "keep_best")
# Of a stage that has begun all must, but for what it evaluates, what would have stopped the run before, and its length.
_FREE_IN_STAGE = ("steps", "epochs", "evaluate_every_steps", "skip_limit")
_FREE_FROM_ERROR = ("too_long", "unusable")


@dataclass
class Position:
    """Where a run stands: the stage, the steps of it that are done, the updates each part has taken in it, the
    evaluations to do before it goes on, and why samples of the stage were left out, if their number has a limit."""

    stage: int = 0
    step: int = 0
    part_steps: dict[str, int] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Best:
    """The evaluation that `keep_best` of a recipe asks for: the step of the run, in which stage, and the value."""

    step: int
    stage: str
    value: float


def environment(**more: Any) -> dict[str, Any]:
    """What must stay the same for a resumed run to equal one that was never stopped."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        **more,
    }


def check_environment(then: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Raises ConfigError if a run cannot go on exactly in the environment that is here now."""
    if different := [f"{key} {then.get(key)!r} then, {now[key]!r} now" for key in now if now[key] != then.get(key)]:
        dtype = str(then.get("dtype")).removeprefix("torch.")
        back = f"give backbone.dtype={dtype} as it was, or " if now["dtype"] != then.get("dtype") else ""
        told = f"{run}: resuming exactly needs the environment it was saved in ({'; '.join(different)})"
        raise ConfigError(f"{told}; {back}set allow_changed_environment=true to go on all the same")


def planned_steps(recipe: Recipe, state: Path | None) -> list[int]:
    """The steps of each stage. Of one that counts epochs as the state has them, if the stage is the same; its sources
    are opened else, and their rows counted. Raises ConfigError for a source that cannot be opened, or has no rows."""
    then, steps = _stages_then(state) if state else ([], [])
    planned = []
    for index, stage in enumerate(recipe.stages):
        if index < len(then) and stage.epochs and _counted(then[index]) == _counted(stage):
            planned.append(steps[index])
            continue
        num_rows = {}
        for name, config in stage.data.items() if stage.epochs else ():
            where = f"stages.{index}.data.{name}"
            num_rows[name] = len(open_source(config, where))
            if not num_rows[name]:
                raise ConfigError(f"{where}: no rows")
        planned.append(count_steps(stage, num_rows))
    return planned


def _stages_then(state: Path) -> tuple[list[StageConfig], list[int]]:
    """The stages of the recipe in a state, and the steps of each. Raises ValueError for a state that is damaged."""
    about = read_state_about(state)
    # Built again, so that a setting that is younger than the run has its default.
    then = build(Recipe, about["recipe"], f"{state}: recipe")
    steps = about.get("steps", [stage.steps for stage in then.stages])  # older states count no epochs
    whole = isinstance(steps, list) and all(type(number) is int and number > 0 for number in steps)
    if not whole or len(steps) != len(then.stages):
        told = f"steps is {steps!r:.80}, expected a number for each of {len(then.stages)} stages"
        raise ValueError(f"{state / 'state.json'}: {told}; copy it again")
    return then.stages, steps


def _counted(stage: StageConfig) -> list[Any]:
    """What the steps of a stage that counts epochs depend on, but for the files of its sources."""
    sources = {name: {**plain(source), "licence": None} for name, source in stage.data.items()}
    return [stage.epochs, stage.samples_per_step, plain(stage.mixture), json.loads(json.dumps(sources))]


def resumed_position(state: Path, recipe: Recipe, steps: Sequence[int]) -> Position:
    """Where a run stands, whose recipe now plans `steps` for its stages. Raises ConfigError naming the settings in
    which the recipe differs from what was done."""
    about = read_state_about(state)
    then = build(Recipe, about["recipe"], f"{state}: recipe")
    before = [*_stages_then(state)[1], 1]  # after the last stage none is done
    if about["stage"] >= len(before) or about["step"] >= before[about["stage"]]:
        raise ValueError(
            f"{state / 'state.json'}: stage {about['stage']} and step {about['step']} are none of its recipe, whose "
            f"stages have {', '.join(map(str, before[:-1]))} steps; copy it again, or give another run folder"
        )
    evaluate, skipped = about.get("evaluate", []), about.get("skipped", [])
    position = Position(about["stage"], about["step"], about["part_steps"], evaluate, skipped)
    changed = _changes(then, recipe, position) + _other_lengths(then, recipe, position, before, steps)
    if changed:
        raise ConfigError(
            f"{recipe.run}: this run was begun with other settings: {'; '.join(changed)}. Give the recipe another run "
            "folder, or restore the settings to go on"
        )
    last = position.stage - 1  # a stage that was at its end may have got more steps
    if position.step == 0 and 0 <= last < len(recipe.stages) and steps[last] > before[last]:
        position.stage, position.step = last, before[last]
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
            for source in (*old["data"].values(), *new["data"].values()):
                del source["licence"]  # it is told, and changes nothing
        for recipe in (before, after):
            recipe["stages"] = dict(enumerate(recipe["stages"][:begun]))
            # Its path may change, as its weights are compared by their hash; its dtype is part of the environment.
            recipe["backbone"] = {"quantization": recipe["backbone"]["quantization"]}
        was, has = ({key: recipe[key] for key in (*_KEPT, "backbone", "stages")} for recipe in (before, after))
        if then.keep_best is not None:  # its values are compared with those to come
            name = then.keep_best.evaluation
            for values, recipe in ((was, before), (has, after)):
                asked = {**recipe["evaluations"].get(name, {})}
                asked.pop("max_running_samples", None)  # which is a matter of memory
                values["evaluations"] = {name: asked}
        found.append(list(differences(was, has)))
    return min(found, key=len)


def _other_lengths(
    then: Recipe, now: Recipe, position: Position, before: Sequence[int], after: Sequence[int]
) -> list[str]:
    """Stages that have begun and are of another length now, so that what was done would have been other."""
    begun = position.stage + (position.step > 0)
    changed = []
    for index, (was, has) in enumerate(zip(before[:begun], after, strict=False)):
        done = position.step if index == position.stage else was
        if was != has and (why := _other_past(then.stages[index].train, was, has, done, last=index == begun - 1)):
            key = "epochs" if now.stages[index].epochs else "steps"
            counted = f"stages.{index}.{key}" + (", in steps" if key == "epochs" else "")
            changed.append(f"{counted}: was {was}, is {has}, but {why}")
    return changed


def _other_past(parts: Mapping[str, PartConfig], was: int, has: int, done: int, last: bool) -> str:
    """Why another number of steps would have changed what a run has done; empty if it would not have."""
    if not last:
        return "a later stage began from its end"
    if has <= done:
        return f"{done} steps of it are done"
    for name, config in parts.items():
        for step in range(done):
            rate, would = (learning_rate(config, step, steps) for steps in (was, has))
            if rate != would:
                return (
                    f"the {config.schedule} schedule of {name} runs over all steps, so that step {step + 1} would have "
                    f"had a learning rate of {would:.9g}, not {rate:.9g}; keep {was}, and add a stage to go on"
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
