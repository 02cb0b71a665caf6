"""Where a run stands, and what may change before it goes on."""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from molora.checkpoint.run_folder import read_state_about
from molora.config import ConfigError, build, plain
from molora.train.optim import learning_rate
from molora.train.recipe import Recipe, StageConfig

# What may change once a run has begun, as all that is done would have been the same. Of a recipe, only these must stay:
_KEPT = ("seed", "modalities", "router")
# Of a stage that has begun all must, but for what it evaluates, what would have stopped the run before, and `steps`.
_FREE_IN_STAGE = ("steps", "evaluate_every_steps", "skip_limit")
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
    evaluate, skipped = about.get("evaluate", []), about.get("skipped", [])
    position = Position(about["stage"], about["step"], about["part_steps"], evaluate, skipped)
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
