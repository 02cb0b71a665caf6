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

from molora.checkpoint.format import FORMAT_VERSION, tensor_hash
from molora.checkpoint.modality_folder import copy_modality, read_about, save_modality
from molora.checkpoint.opening import open_model
from molora.checkpoint.run_folder import latest_state, read_state, save_state, write_run
from molora.config import ConfigError, dump, plain
from molora.data.loader import step_loader
from molora.data.processor import SampleTooLong
from molora.data.sources import EncodedSamples, Skipped
from molora.evaluate.judge import Evaluation, EvaluationConfig, complaints
from molora.evaluate.metrics import Judged
from molora.evaluate.results import forget_steps, keep_step
from molora.heartbeat import together
from molora.inference.load import LoadedModel
from molora.interrupt import Interrupt, Stopped
from molora.model import lora
from molora.model.quantization import library_version
from molora.pack import Sample
from molora.ranks import Ranks, launched_ranks
from molora.received import read_json
from molora.seeding import seed_of
from molora.storage import hold, settle, write_folder, write_json, write_text
from molora.terminal import progress, say, warn
from molora.train.card import Totals, about_sources, is_of, read_so_far, write_card
from molora.train.frame_cache import FeatureCache
from molora.train.log import MetricsLog
from molora.train.optim import PartOptimizer, copy_parts, matches, set_trainable
from molora.train.phases import PhaseClock
from molora.train.preference import Reference, preference_step
from molora.train.preflight import Trial, describe, open_trials, try_model, words_of
from molora.train.recipe import Recipe, StageConfig, plan_recipe, remember_plugins, skipped_errors
from molora.train.resume import Best, Position, check_environment, environment, planned_steps, resumed_position
from molora.train.step import TrainingError, check_skipped, train_step
from molora.train.trackers import check_trackers
from molora.train.words import Words

# What a full disk, a quota or a limit on the size of files says.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class EvaluationFailed(RuntimeError):
    """Training is done and saved, and an evaluation failed; running the recipe again runs those of the end alone."""

    exit_code = 2


def train(recipe: Recipe, *, show: bool = True, trust: Sequence[str] = ()) -> Path:
    """Runs a recipe to its end, going on from the latest state if the run has one. Returns the run folder.

    What the recipe names may run, and is trusted from then on; plugins that a folder it names (`path`) names in turn
    may run if `trust` names them, as in `molora.load`.

    Once training begins, the first SIGINT, SIGTERM or SIGUSR1 that any rank gets saves after the step under way and
    raises Stopped on all of them; a second acts.

    Raises ConfigError for a recipe that cannot work, ValueError for data that cannot be used, TrainingError when
    training must stop, EvaluationFailed when it is done and an evaluation is not, RankDied without another process.
    """
    ranks = launched_ranks(recipe.device)
    with together(ranks):
        return _train(recipe, ranks, show and ranks.is_main, trust)


def _train(recipe: Recipe, ranks: Ranks, show: bool, trust: Sequence[str]) -> Path:
    folder = Path(recipe.run)
    try:
        state = latest_state(folder)
    except (OSError, ValueError) as error:  # such as a name that no file system takes
        raise ConfigError(f"run: {recipe.run:.200} cannot be made ({error!s:.200}); give another run=") from error
    check_trackers(recipe.trackers)
    steps = planned_steps(recipe, state)
    position = Position() if state is None else resumed_position(state, recipe, steps)
    trials = open_trials(recipe, steps, position)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run: {folder} cannot be made ({error}); give another run=") from error
    with hold(folder):
        if latest_state(folder) != state:
            raise ConfigError(f"{folder}: another process trained it meanwhile; start again to go on from there")
        run = _Run(recipe, steps, ranks, position, show, trust)
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

    def __init__(
        self, recipe: Recipe, steps: list[int], ranks: Ranks, position: Position, show: bool, trust: Sequence[str]
    ) -> None:
        self.recipe = recipe
        self.steps = steps  # of each stage
        self.ranks = ranks
        self.interrupt = Interrupt()
        self.show = show
        self.folder = Path(recipe.run)
        self.plan = plan_recipe(recipe, trust)
        shards = ranks if recipe.shard_backbone and ranks.count > 1 else None
        self.model, self.processor = open_model(self.plan, ranks.device, shards)
        self.model.backbone.activation_checkpointing = recipe.activation_checkpointing
        self.pristine = {name: tensor_hash(encoder.state_dict()) for name, encoder in self.model.encoders.items()}
        self.log = MetricsLog(recipe, ranks)
        self.clock = PhaseClock(ranks.device)
        self.clock.watch(self.model.encoders.values())
        self.totals = [Totals() for _ in recipe.stages]
        self.best: Best | None = None
        self.bars = progress(shown=show)
        self.position = position
        self.optimizers: dict[str, PartOptimizer] = {}
        self.optimizer_tensors: dict[str, Tensor] = {}
        self.features: FeatureCache | None = None
        self.reference: Reference | None = None
        self.reference_tensors: dict[str, Tensor] = {}
        self.failed: list[str] = []

    def begin(self, state: Path | None, trials: Mapping[str, Trial]) -> None:
        """Tries all that is to come on the model, opens the run folder and puts the latest state back, if any."""
        try_model(self.recipe, self.steps, self.model, self.processor, trials)
        if state:
            self._restore(state)
        else:
            self.log.truncate({})
        if self.show and state:
            done, total = self._steps_done(), sum(self.steps)
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
            forget_steps(self.folder, after=self._steps_done())
            if state:  # a kill may have come between the state and the folders made from it
                self._export(self.folder)
        self.ranks.wait()
        self.log.open(resumes=state is not None)

    def _steps_done(self) -> int:
        return sum(self.steps[: self.position.stage]) + self.position.step

    def go_on(self) -> None:
        """Does what is left: evaluations that were due when the run stopped, the stages to come, and the card."""
        due = bool(self.position.evaluate)
        self._evaluate_due()
        for index in range(self.position.stage, len(self.recipe.stages)):
            self.run_stage(index)
        if self.ranks.is_main and (due or not is_of(self.folder, self._steps_done())):
            self._write_card()
        if self.show and self.best and (keep := self.recipe.keep_best):
            told = f"step {self.best.step}, with {keep.evaluation}/{keep.metric} {self.best.value:.4f}"
            say(f"the best was {told}; it is in {self.folder / 'best'}")

    def run_stage(self, index: int) -> None:
        """Trains a stage from where the run stands to the stage's end."""
        stage, steps, totals = self.recipe.stages[index], self.steps[index], self.totals[index]
        first_step = self.position.step
        # Words alone do not make a model answer, so its answers are not asked for before a stage of them.
        speaks = stage.objective != "words" or index + 1 == len(self.recipe.stages)
        self.optimizers = set_trainable(self.model, stage.train, steps, f"stages.{index}.train")
        self.model.train()
        if not first_step:
            copy_parts(self.model, stage.start_from)
        for part, optimizer in self.optimizers.items() if first_step else ():
            optimizer.load(self.optimizer_tensors, self.position.part_steps.get(part, 0))
        self.reference = None
        if stage.objective == "preferences" and stage.preference.reference:
            self.reference = Reference(self.model, self.reference_tensors if first_step else None)
        self.words = words_of(stage, self.model, self.processor, f"stages.{index}")
        if self.recipe.feature_cache is not None:
            self.features = FeatureCache(Path(self.recipe.feature_cache), self.model)
        samples = EncodedSamples(
            stage.data,
            self.processor,
            seed=seed_of(self.recipe.seed, stage.name),
            max_tokens=stage.tokens_per_pack,
            skips=skipped_errors(stage),
            where=f"stages.{index}.data",
            mixture=stage.mixture,
            samples_per_step=stage.samples_per_step,
            pairs=stage.objective == "preferences",
        )
        if self.ranks.is_main and not totals.data:
            totals.data = about_sources(stage, samples)
        loader = step_loader(
            samples,
            first_step=first_step,
            steps=steps,
            samples_per_step=stage.samples_per_step,
            rank=self.ranks.index,
            ranks=self.ranks.count,
            workers=self.recipe.data_workers,
        )
        if self.show:
            describe(self.model, stage, steps, samples.num_rows)
        bar = self.bars.add_task(stage.name, total=steps, completed=first_step, note="")
        self.clock.start("loading")
        for step, encoded in enumerate(loader, start=first_step):
            row = self._step(stage, step, encoded)
            if stage.epochs:
                row["epoch"] = stage.epochs * (step + 1) / steps
            skipped = check_skipped(self.folder, stage, self.position.skipped, row)
            notes = [f"{key[5:]} {value:.3f}" for key, value in row.items() if key.startswith("loss/")]
            notes += [f"{row['skipped']} samples skipped"] if row["skipped"] else []
            self.bars.update(bar, advance=1, note=", ".join(notes))
            finished = step + 1 == steps
            self.position = Position(index + 1) if finished else Position(index, step + 1, skipped=skipped)
            if (finished and speaks) or (stage.evaluate_every_steps and (step + 1) % stage.evaluate_every_steps == 0):
                self.position.evaluate = list(self.recipe.evaluations)
            if (step + 1) % self.recipe.log_every_steps == 0:
                self.log.write({**self._about(), **row})
            stopping = self._asked_to_stop()
            if finished or stopping or self.position.evaluate or (step + 1) % self.recipe.save_every_steps == 0:
                self._save()
            if stopping:
                self._stop(stopping)
            self._evaluate_due()
            self.clock.start("loading")
        if self.show:
            say(f"{stage.name}: {totals.shares()}")
        if self.ranks.is_main:
            self._write_card()

    def _stage(self) -> int:
        """The stage of the last step that was done."""
        return self.position.stage - (self.position.step == 0)

    def _about(self) -> dict[str, Any]:
        """What every row of the log says: the stage and the step of the run that it is about."""
        return {"stage": self.recipe.stages[self._stage()].name, "step": self._steps_done()}

    def _asked_to_stop(self) -> int:
        """The signal that asked a rank to stop, the same on every rank; 0 if none did."""
        return next(filter(None, self.ranks.gather([self.interrupt.number])), 0)

    def stop_if_asked(self) -> None:
        """Raises Stopped if a signal asked for it."""
        if number := self._asked_to_stop():
            self._stop(number)

    def _stop(self, number: int) -> None:
        """Says once, not on every rank, how the run, which is saved, goes on."""
        at = f"step {self._steps_done()} of {sum(self.steps)}"
        told = f"stopped by {signal.Signals(number).name} after {at}, which is saved"
        how = f"go on with: molora train {self.folder / 'config.yaml'}"
        if self.ranks.count > 1:
            how = f"start it again as you did, in {self.ranks.count} processes, and it goes on"
        raise Stopped(f"{told}; {how}" if self.ranks.is_main else "", number)

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
        self.clock.to("other")
        # Dropout is the one thing drawn from the global generator; seeding it per step needs no state to resume.
        torch.manual_seed(seed_of(self.recipe.seed, stage.name, "step", step, self.ranks.index))
        if not self.model.training:  # an evaluation came before; to walk through all modules takes milliseconds
            self.model.train()
        if self.words is not None and stage.too_long == "skip":
            encoded = [_said(self.words, each) for each in encoded]
        samples = [sample for sample in encoded if isinstance(sample, Sample)]
        if self.features is not None:
            self.clock.to("encoding")
            samples = self.features.fill(samples)
        with_what = (self.model, self.processor, samples, stage.tokens_per_pack, self.optimizers)
        try:
            if stage.objective == "preferences":
                row = preference_step(*with_what, stage.preference, self.reference, self.ranks, self.clock)
            else:
                row = train_step(*with_what, self.ranks, self.clock, self.words)
        except TrainingError as error:
            raise TrainingError(f"stage {stage.name}, step {self._steps_done() + 1}: {error}") from error
        ids = sorted(self.ranks.gather([sample.id for sample in samples]))
        row["samples"] = len(ids)
        row["samples_digest"] = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        skipped = self.ranks.gather([(each.reason, each.id) for each in encoded if isinstance(each, Skipped)])
        row["skipped"] = len(skipped)
        if skipped:
            row["skipped_because"] = sorted(reason for reason, _ in skipped)
        seconds = self.clock.read()
        row["seconds"] = sum(seconds.values())
        row |= {f"seconds/{phase}": value for phase, value in seconds.items()}
        self.totals[self.position.stage].add(row, ids, [id for _, id in skipped])
        return row

    def _evaluate_due(self) -> None:
        """Runs the evaluations that are due. What fails is told and logged, and stops nothing: all is saved already."""
        if not self.position.evaluate:
            return
        left: list[str] = []
        started = time.monotonic()
        for name in self.position.evaluate:
            if name in self.recipe.evaluations:
                row, fault = self._evaluate(name, self.recipe.evaluations[name])
                self.log.write({**self._about(), **row})
                if not fault:
                    self._keep_if_best(name, row)
                if fault:
                    left.append(name)
                    self.failed.append(f"evaluation {name} at step {self._steps_done()} failed: {fault}")
                    if self.show:
                        warn(self.failed[-1])
        self.totals[self._stage()].spend("evaluation", time.monotonic() - started)
        ended = self.position.stage == len(self.recipe.stages)
        self.position.evaluate = left if ended else []
        if ended and self.ranks.is_main:
            path = self._state() / "state.json"
            write_json(path, {**read_json(path), **self._so_far(), "evaluate": left})

    def _keep_if_best(self, name: str, row: Mapping[str, Any]) -> None:
        """Puts the model, and the state that was saved before an evaluation, into `best/` if its row says so. A run
        that is killed meanwhile evaluates again, and so decides the same."""
        keep = self.recipe.keep_best
        if keep is None or keep.evaluation != name:
            return
        value = row.get(f"{keep.evaluation}/{keep.metric}")
        if value is None:
            if self.show:
                warn(f"keep_best: at step {self._steps_done()} {keep.evaluation} gave no {keep.metric}")
            return
        if self.best is not None and not (value > self.best.value if keep.highest else value < self.best.value):
            return
        self.best = Best(self._steps_done(), self.recipe.stages[self._stage()].name, value)
        if self.ranks.is_main:
            with write_folder(self.folder / "best") as draft:
                self._export(draft)
                shutil.copytree(self._state(), draft / "state" / self._state().name)
                settle(draft / "state" / self._state().name)
                write_json(draft / "best.json", {"format_version": FORMAT_VERSION, **asdict(keep), **asdict(self.best)})

    def _evaluate(self, name: str, config: EvaluationConfig) -> tuple[dict[str, Any], str | None]:
        """An evaluation's row of the log; and what was wrong, the same on every rank."""
        left, fault, evaluation, judged, results = 0, None, None, [], {}
        loaded = LoadedModel(self.model, self.processor)

        def stop_if_asked() -> None:
            if self.interrupt.number:
                raise Stopped("", self.interrupt.number)

        with self.model.backbone.passes_at_will():
            try:
                evaluation = Evaluation(name, config)
                judged = evaluation.run(loaded, self.bars, shard=self.ranks.shard, before_each=stop_if_asked)
            except Stopped as stopped:
                left = stopped.number
            except Exception as error:  # whatever an evaluation does wrong, the training goes on
                fault = f"{type(error).__name__}: {error}"
        if number := next(filter(None, self.ranks.gather([left])), 0):
            self._stop(number)
        faults = [other for other in self.ranks.gather([fault]) if other is not None]
        if evaluation is not None and not faults:
            everyone = sorted(self.ranks.gather(judged), key=lambda item: item.row)
            try:
                results = self._scored(evaluation, loaded, everyone) if self.ranks.is_main else {}
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
            results, fault = self.ranks.gather([(results, fault)])[0]  # those of the main process
            faults = [] if fault is None else [fault]
        if faults:
            return {f"{name}/error": faults[0]}, faults[0]
        return {f"{name}/{key}": value for key, value in results.items()}, None

    def _scored(self, evaluation: Evaluation, loaded: LoadedModel, judged: Sequence[Judged]) -> dict[str, float]:
        """The scores of all answers to an evaluation, which are kept and shown."""
        name, config = evaluation.name, evaluation.config
        keep_step(self.folder, self._steps_done(), name, config, loaded, judged)
        self.log.write_answers(self._steps_done(), name, judged)
        if self.show:
            for complaint in complaints(name, judged, config):
                warn(complaint)
        return evaluation.scores(judged)

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
                "steps": self.steps,
                **self._so_far(),
            }
            tensors = {"weights": self._trained(), "optimizer": moments}
            if self.reference is not None and self.position.step:
                tensors["reference"] = self.reference.tensors
            save_state(self.folder, self._state().name, tensors, about)
            self._export(self.folder)
        self.ranks.wait()

    def _so_far(self) -> dict[str, Any]:
        """What a state says of what a run has given: how long its logs are, its best evaluation, what was seen."""
        best = None if self.best is None else asdict(self.best)
        return {"logs": self.log.lengths(), "best": best, "totals": [asdict(totals) for totals in self.totals]}

    def _write_card(self) -> None:
        of_stages = list(zip(self.recipe.stages, self.steps, self.totals, strict=True))
        write_card(self.recipe, self.model, self._steps_done(), of_stages, self.best, self._environment())

    def _export(self, run: Path) -> None:
        """Writes the modality folders and what makes a folder a run."""
        trained = {parameter.split(".")[1] for parameter in self._trained()}
        for name, plan in self.plan.modalities.items():
            source = self.recipe.modalities[name].path
            folder = run / "modalities" / name
            if source is not None and name not in trained and read_about(Path(source))["name"] == name:
                # Saved again it would be the same modality in other bytes: they name the backbone's path, for one.
                copy_modality(Path(source), folder)
            else:
                save_modality(self.model, name, plan, folder, self.pristine)
        write_run(
            run,
            self.model.backbone.identity,
            list(self.plan.modalities),
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
        quantised = library_version(self.recipe.backbone.quantization)
        return environment(device=device, dtype=dtype, ranks=self.ranks.count, quantization=quantised)

    def _restore(self, state: Path) -> None:
        """Puts a saved state back. Raises ConfigError naming what differs from the run that saved it."""
        about, tensors = read_state(state)
        for warning in self.model.backbone.identity.check(about["backbone"], str(state)):
            if self.show:
                warn(f"{state}: {warning}")
        if not self.recipe.allow_changed_environment:
            check_environment(about["environment"], self._environment(), self.folder)
        try:
            trained_then = [stage["train"] for stage in about["recipe"]["stages"][: about["stage"] + 1]]
            lora.load_exactly(self._matching(trained_then), tensors["weights"], str(state))
        except ValueError as error:
            raise ConfigError(f"{error}; did the plugin's code change? give another run=") from error
        self.optimizer_tensors = tensors["optimizer"]
        self.reference_tensors = tensors.get("reference", {})
        self.best, self.totals = read_so_far(about, state, self.totals)
        self.log.truncate(about["logs"])


def _said(words: Words, sample: Sample | Skipped) -> Sample | Skipped:
    """A sample of a stage of words, left out if its media cannot say its answer."""
    if isinstance(sample, Sample):
        try:
            words.of(sample)
        except SampleTooLong as error:
            return Skipped(sample.id, str(error))
    return sample
