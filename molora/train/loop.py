"""Training: a recipe is a list of stages, a stage a list of what trains; every step is the same few lines."""

import errno
import hashlib
import shutil
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.checkpoint.format import tensor_hash
from molora.checkpoint.modality_folder import copy_modality, read_about, save_modality
from molora.checkpoint.opening import open_model
from molora.checkpoint.run_folder import latest_state, read_state, save_state, write_run
from molora.config import ConfigError, dump, plain
from molora.data.loader import step_loader
from molora.data.sources import EncodedSamples, Skipped
from molora.evaluate.judge import Evaluation, EvaluationConfig, complaints
from molora.inference.load import LoadedModel
from molora.interrupt import Interrupt, Stopped
from molora.model import lora
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.ranks import Ranks, launched_ranks
from molora.received import read_json
from molora.seeding import seed_of
from molora.storage import hold, write_json, write_text
from molora.terminal import progress, say, warn
from molora.train.frame_cache import FeatureCache
from molora.train.log import MetricsLog
from molora.train.optim import PartOptimizer, copy_parts, count, matches, set_trainable
from molora.train.preflight import Trial, open_trials, try_model
from molora.train.recipe import Recipe, StageConfig, plan_recipe, remember_plugins, skipped_errors
from molora.train.resume import Position, environment, resumed_position
from molora.train.step import TrainingError, train_step

# What a full disk, a quota or a limit on the size of files says.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class EvaluationFailed(RuntimeError):
    """Training is done and saved, and an evaluation failed; running the recipe again runs those of the end alone."""

    exit_code = 2


def train(recipe: Recipe, *, show: bool = True, trust: Sequence[str] = ()) -> Path:
    """Runs a recipe to its end, going on from the latest state if the run has one. Returns the run folder.

    What the recipe names may run, and is trusted from then on; plugins that a folder it names (`path`) names in turn
    may run if `trust` names them, as in `molora.load`.

    Once training begins, the first SIGINT or SIGTERM saves after the step under way and raises Stopped; a second acts.

    Raises ConfigError for a recipe that cannot work, ValueError for data that cannot be used, TrainingError when
    training must stop, EvaluationFailed when it is done and an evaluation is not.
    """
    ranks = launched_ranks(recipe.device)
    folder = Path(recipe.run)
    try:
        state = latest_state(folder)
    except (OSError, ValueError) as error:  # such as a name that no file system takes
        raise ConfigError(f"run: {recipe.run:.200} cannot be made ({error!s:.200}); give another run=") from error
    position = Position() if state is None else resumed_position(state, recipe)
    trials = open_trials(recipe, position)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run: {folder} cannot be made ({error}); give another run=") from error
    with hold(folder):
        if latest_state(folder) != state:
            raise ConfigError(f"{folder}: another process trained it meanwhile; start again to go on from there")
        run = _Run(recipe, ranks, position, show and ranks.is_main, trust)
        try:
            run.begin(state, trials)
            with run.bars, run.interrupt:
                run.go_on()
            run.stop_if_asked()  # when no step was left to stop after
        except OSError as error:
            if not any(error.errno == number or f"(os error {number})" in str(error) for number in _NO_ROOM):
                raise
            raise TrainingError(run.no_room(error)) from error
        finally:
            run.log.close()
    if run.failed:
        due = run.position.evaluate
        again = f"Run it again to evaluate {', '.join(due)} only" if due else "At the end all evaluations worked"
        told = f"{folder}: trained to the end and saved, but {'; '.join(run.failed)}. {again}"
        raise EvaluationFailed(f"{told}; evaluations before the end are not made up for")
    return folder


class _Run:
    """A recipe in progress: the model, where it stands, and what it leaves on disk."""

    def __init__(self, recipe: Recipe, ranks: Ranks, position: Position, show: bool, trust: Sequence[str]) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.interrupt = Interrupt()
        self.show = show
        self.folder = Path(recipe.run)
        self.plan = plan_recipe(recipe, trust)
        self.model, self.processor = open_model(self.plan, ranks.device)
        self.model.backbone.activation_checkpointing = recipe.activation_checkpointing
        self.pristine = {name: tensor_hash(encoder.state_dict()) for name, encoder in self.model.encoders.items()}
        self.log = MetricsLog(self.folder, ranks)
        self.bars = progress(shown=show)
        self.position = position
        self.optimizers: dict[str, PartOptimizer] = {}
        self.optimizer_tensors: dict[str, Tensor] = {}
        self.features: FeatureCache | None = None
        self.failed: list[str] = []

    def begin(self, state: Path | None, trials: Mapping[str, Trial]) -> None:
        """Tries all that is to come on the model, opens the run folder and puts the latest state back, if any."""
        try_model(self.recipe, self.model, self.processor, trials)
        if state:
            self._restore(state)
        else:
            self.log.truncate({})
        if self.show and state:
            done, total = self._steps_done(), sum(stage.steps for stage in self.recipe.stages)
            if self.position.stage < len(self.recipe.stages):
                name = self.recipe.stages[self.position.stage].name
                say(f"{self.folder}: resuming from step {done} of {total}, in stage {name}")
            elif self.position.evaluate:
                say(f"{self.folder}: trained already; evaluating {', '.join(self.position.evaluate)}")
            else:
                say(f"{self.folder}: trained already, {done} of {total} steps; give another run= to train anew")
        if self.ranks.is_main:
            remember_plugins(self.recipe)
            write_text(self.folder / "config.yaml", dump(self.recipe))
            if state:  # a kill may have come between the state and the folders made from it
                self._export()
        self.ranks.wait()
        self.log.open()

    def _steps_done(self) -> int:
        return sum(stage.steps for stage in self.recipe.stages[: self.position.stage]) + self.position.step

    def go_on(self) -> None:
        """Does what is left: evaluations that were due when the run stopped, and the stages to come."""
        self._evaluate_due()
        for index in range(self.position.stage, len(self.recipe.stages)):
            self.run_stage(index)

    def run_stage(self, index: int) -> None:
        """Trains a stage from where the run stands to the stage's end."""
        stage = self.recipe.stages[index]
        first_step = self.position.step
        self.optimizers = set_trainable(self.model, stage.train, stage.steps, f"stages.{index}.train")
        if not first_step:
            copy_parts(self.model, stage.start_from)
        for part, optimizer in self.optimizers.items() if first_step else ():
            optimizer.load(self.optimizer_tensors, self.position.part_steps.get(part, 0))
        if self.recipe.feature_cache is not None:
            self.features = FeatureCache(Path(self.recipe.feature_cache), self.model)
        loader = step_loader(
            EncodedSamples(
                stage.data,
                self.processor,
                seed=seed_of(self.recipe.seed, stage.name),
                max_tokens=stage.tokens_per_pack,
                skips=skipped_errors(stage),
                where=f"stages.{index}.data",
                mixture=stage.mixture,
                samples_per_step=stage.samples_per_step,
            ),
            first_step=first_step,
            steps=stage.steps,
            samples_per_step=stage.samples_per_step,
            rank=self.ranks.index,
            ranks=self.ranks.count,
            workers=self.recipe.data_workers,
        )
        if self.show:
            describe(self.model, stage)
        bar = self.bars.add_task(stage.name, total=stage.steps, completed=first_step, note="")
        for step, encoded in enumerate(loader, start=first_step):
            row = self._step(stage, step, encoded)
            skipped = self._skipped(stage, row)
            notes = [f"{key[5:]} {value:.3f}" for key, value in row.items() if key.startswith("loss/")]
            notes += [f"{row['skipped']} samples skipped"] if row["skipped"] else []
            self.bars.update(bar, advance=1, note=", ".join(notes))
            finished = step + 1 == stage.steps
            self.position = Position(index + 1) if finished else Position(index, step + 1, skipped=skipped)
            if finished or (stage.evaluate_every_steps and (step + 1) % stage.evaluate_every_steps == 0):
                self.position.evaluate = list(self.recipe.evaluations)
            if (step + 1) % self.recipe.log_every_steps == 0:
                self.log.write({**self._about(), **row})
            stopping = self._asked_to_stop()
            if finished or stopping or self.position.evaluate or (step + 1) % self.recipe.save_every_steps == 0:
                self._save()
            if stopping:
                self._stop(stopping)
            self._evaluate_due()

    def _about(self) -> dict[str, Any]:
        """What every row of the log says: the stage and the step of the run that it is about."""
        index = self.position.stage - (self.position.step == 0)
        return {"stage": self.recipe.stages[index].name, "step": self._steps_done()}

    def _asked_to_stop(self) -> int:
        """The signal that asked a rank to stop, the same on every rank; 0 if none did."""
        return next((number for number in self.ranks.gather([self.interrupt.number]) if number), 0)

    def stop_if_asked(self) -> None:
        """Raises Stopped if a signal asked for it."""
        if number := self._asked_to_stop():
            self._stop(number)

    def _stop(self, number: int) -> None:
        """Says how the run, which is saved, goes on."""
        at = f"step {self._steps_done()} of {sum(stage.steps for stage in self.recipe.stages)}"
        told = f"stopped by {signal.Signals(number).name} after {at}, which is saved"
        how = f"go on with: molora train {self.folder / 'config.yaml'}"
        raise Stopped(f"{told}; {how}", number)

    def no_room(self, error: OSError) -> str:
        """What a full disk means for the run."""
        state, free = latest_state(self.folder), shutil.disk_usage(self.folder).free
        size = sum(p.numel() * p.element_size() for p in self._trained().values()) * 3  # with AdamW's two moments
        at = "nothing was saved before it" if state is None else f"{state} is whole, and the run goes on from it"
        return (
            f"{self.folder}: no room to write ({error}); {free / 2**20:,.0f} MiB are free, and a state of this run "
            f"takes {size / 2**20:,.1f} MiB or more. {at[0].upper()}{at[1:]}: make room (or raise the "
            "quota, or the limit on file sizes), and start it again"
        )

    def _step(self, stage: StageConfig, step: int, encoded: Sequence[Sample | Skipped]) -> dict[str, Any]:
        started = time.monotonic()
        # Dropout is the one thing drawn from the global generator; seeding it per step needs no state to resume.
        torch.manual_seed(seed_of(self.recipe.seed, stage.name, "step", step, self.ranks.index))
        self.model.train()
        samples = [sample for sample in encoded if isinstance(sample, Sample)]
        if self.features is not None:
            samples = self.features.fill(samples)
        row = train_step(self.model, self.processor, samples, stage.tokens_per_pack, self.optimizers, self.ranks)
        ids = sorted(self.ranks.gather([sample.id for sample in samples]))
        row["samples"] = len(ids)
        row["samples_digest"] = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        reasons = sorted(self.ranks.gather([sample.reason for sample in encoded if isinstance(sample, Skipped)]))
        row["skipped"] = len(reasons)
        if reasons:
            row["skipped_because"] = reasons
        row["seconds"] = time.monotonic() - started
        return row

    def _skipped(self, stage: StageConfig, row: Mapping[str, Any]) -> list[str]:
        """Why samples of a stage were left out up to a step, if their number has a limit. Raises TrainingError if it is
        passed: the data are not what was expected."""
        if stage.skip_limit is None:
            return []
        skipped = [*self.position.skipped, *row.get("skipped_because", [])]
        if len(skipped) > stage.skip_limit:
            raise TrainingError(
                f"{self.folder}: {len(skipped)} samples of stage {stage.name} could not be used, and its skip_limit is "
                f"{stage.skip_limit}; mend them, or raise it:\n  " + "\n  ".join(skipped)
            )
        return skipped

    def _evaluate_due(self) -> None:
        """Runs the evaluations that are due. What fails is told and logged, and stops nothing: all is saved already."""
        if not self.position.evaluate:
            return
        left: list[str] = []
        for name in self.position.evaluate:
            if name in self.recipe.evaluations:
                row, fault = self._evaluate(name, self.recipe.evaluations[name])
                self.log.write({**self._about(), **row})
                if fault:
                    left.append(name)
                    self.failed.append(f"evaluation {name} at step {self._steps_done()} failed: {fault}")
                    if self.show:
                        warn(self.failed[-1])
        ended = self.position.stage == len(self.recipe.stages)
        self.position.evaluate = left if ended else []
        if ended and self.ranks.is_main:
            path = self._state() / "state.json"
            write_json(path, {**read_json(path), "evaluate": left, "logs": self.log.lengths()})

    def _evaluate(self, name: str, config: EvaluationConfig) -> tuple[dict[str, Any], str | None]:
        """An evaluation's row of the log; and what was wrong, the same on every rank."""
        fault, evaluation, judged, results = None, None, [], {}

        def stop_if_asked() -> None:
            if self.interrupt.number and self.ranks.count == 1:
                self._stop(self.interrupt.number)

        try:
            evaluation = Evaluation(name, config)
            loaded = LoadedModel(self.model, self.processor)
            judged = evaluation.run(loaded, self.bars, ranks=self.ranks, before_each=stop_if_asked)
        except Exception as error:  # whatever an evaluation does wrong, the training goes on
            fault = f"{type(error).__name__}: {error}"
        faults = [other for other in self.ranks.gather([fault]) if other is not None]
        if evaluation is not None and not faults:
            try:
                everyone = sorted(self.ranks.gather(judged), key=lambda item: item.row)
                results = evaluation.scores(everyone)
                if self.show:
                    for complaint in complaints(name, everyone, config):
                        warn(complaint)
            except Exception as error:  # the same answers, so the same error on every rank
                faults = [f"{type(error).__name__}: {error}"]
        if faults:
            return {f"{name}/error": faults[0]}, faults[0]
        return {f"{name}/{key}": value for key, value in results.items()}, None

    def _state(self) -> Path:
        """The folder of the state at the run's position."""
        return self.folder / "state" / f"step-{self._steps_done()}"

    def _save(self) -> None:
        self.position.part_steps = {part: optimizer.steps_taken for part, optimizer in self.optimizers.items()}
        if self.ranks.is_main:
            moments = {k: v for optimizer in self.optimizers.values() for k, v in optimizer.tensors().items()}
            about = {
                **asdict(self.position),
                "recipe": plain(self.recipe),
                "backbone": asdict(self.model.backbone.identity),
                "environment": self._environment(),
                "logs": self.log.lengths(),
            }
            tensors = {"weights": self._trained(), "optimizer": moments}
            save_state(self.folder, self._state().name, tensors, about)
            self._export()
        self.ranks.wait()

    def _export(self) -> None:
        """Writes the modality folders and what makes the folder a run."""
        trained = {parameter.split(".")[1] for parameter in self._trained()}
        for name, plan in self.plan.modalities.items():
            source = self.recipe.modalities[name].path
            folder = self.folder / "modalities" / name
            if source is not None and name not in trained and read_about(Path(source))["name"] == name:
                # Saved again it would be the same modality in other bytes: they name the backbone's path, for one.
                copy_modality(Path(source), folder)
            else:
                save_modality(self.model, name, plan, folder, self.pristine)
        write_run(
            self.folder,
            self.model.backbone.identity,
            list(self.model.modalities),
            self.plan.router,
            dtype=self.recipe.backbone.dtype,
            revision=self.model.backbone.revision,
            learned=self.model.router_tensors(),
        )

    def _trained(self) -> dict[str, Tensor]:
        """Every weight that a stage up to the run's position trains; the others are as the recipe built them."""
        return self._matching([stage.train for stage in self.recipe.stages[: self.position.stage + 1]])

    def _matching(self, stages: Iterable[Iterable[str]]) -> dict[str, Tensor]:
        """The weights that one of the stages' patterns matches."""
        patterns = [pattern for stage in stages for pattern in stage]
        return {
            f"{part}.{key}": parameter
            for part, parameters in self.model.parts().items()
            for key, parameter in parameters.items()
            if any(matches(pattern, f"{part}.{key}") for pattern in patterns)
        }

    def _environment(self) -> dict[str, Any]:
        device, dtype = self.ranks.device.type, str(self.model.backbone.model.dtype)
        return environment(device=device, dtype=dtype, ranks=self.ranks.count)

    def _restore(self, state: Path) -> None:
        """Puts a saved state back. Raises ConfigError naming what differs from the run that saved it."""
        about, tensors = read_state(state)
        for warning in self.model.backbone.identity.check(about["backbone"], str(state)):
            if self.show:
                warn(warning)
        then, now = about["environment"], self._environment()
        different = [f"{key} {then.get(key)!r} then, {now[key]!r} now" for key in now if now[key] != then.get(key)]
        if different and not self.recipe.allow_changed_environment:
            dtype = str(then.get("dtype")).removeprefix("torch.")
            back = f"give backbone.dtype={dtype} as it was, or " if now["dtype"] != then.get("dtype") else ""
            told = f"{self.folder}: resuming exactly needs the environment it was saved in ({'; '.join(different)})"
            raise ConfigError(f"{told}; {back}set allow_changed_environment=true to go on all the same")
        try:
            trained_then = [stage["train"] for stage in about["recipe"]["stages"][: about["stage"] + 1]]
            lora.load_exactly(self._matching(trained_then), tensors["weights"], str(state))
        except ValueError as error:
            raise ConfigError(f"{error}; did the plugin's code change? give another run=") from error
        self.optimizer_tensors = tensors["optimizer"]
        self.log.truncate(about["logs"])


def describe(model: MoLoRA, stage: StageConfig) -> None:
    """Prints what trains in a stage and what is frozen."""
    say(f"{stage.name}: {stage.steps} steps of {stage.samples_per_step} samples")
    backbone = count(model.backbone.parameters())
    for part, parameters in model.parts().items():
        training = count(p for p in parameters.values() if p.requires_grad)
        word = "trains" if training else "frozen"
        say(f"  {word}  {part:<24} {training or count(parameters.values()):>12,} parameters")
        backbone -= count(parameters.values()) if part.startswith("adapters.") else 0  # which lie in its layers
    say(f"  frozen  {'backbone':<24} {backbone:>12,} parameters")
