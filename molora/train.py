"""Training: a recipe is a list of stages, a stage a list of what trains; every step is the same few lines."""

from __future__ import annotations

import difflib
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from molora import lora
from molora.assembly import (
    BackboneConfig,
    Blueprint,
    ModalityConfig,
    RouterConfig,
    RouterPlan,
    assemble,
    blueprint,
    pick_device,
    router_plan,
)
from molora.backbone import load_backbone
from molora.checkpoint import (
    check_encoder,
    check_modality,
    copy_modality,
    latest_state,
    load_modality,
    load_router,
    read_about,
    read_plan,
    read_run,
    read_state,
    read_state_about,
    save_modality,
    save_state,
    tensor_hash,
    write_run,
)
from molora.config import ConfigError, build, dump, environment_in, plain, require
from molora.data import EncodedSamples, Skipped, SourceConfig, open_source, step_loader
from molora.evaluate import EvaluationConfig, complaints, gathered, judge, scores
from molora.features import FeatureCache
from molora.interrupt import Interrupt, Stopped
from molora.media import MediaPolicy
from molora.metrics import MetricsLog
from molora.modality import MediaError
from molora.model import MoLoRA
from molora.optim import PartConfig, PartOptimizer, count, learning_rate, matches, set_trainable
from molora.pack import Pack, Sample
from molora.plugins import Kind, find
from molora.preflight import Trial
from molora.processor import Processor, SampleTooLong
from molora.received import check_name, read_json
from molora.routing import Routing
from molora.seeding import seed_of
from molora.storage import hold, write_json, write_text
from molora.terminal import progress, say, warn
from molora.trust import remember

# What a full disk, a quota or a limit on the size of files says.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved stays as it is."""


class EvaluationFailed(RuntimeError):
    """Training is done and saved, and an evaluation failed; running the recipe again runs those of the end alone."""

    exit_code = 2


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

    `run` is the folder it writes; `data_root` is for the recipe's own paths: `${data_root}/…`. `feature_cache` is a
    folder that keeps the frames of frozen encoders, for later epochs and other runs. `allow_urls`: whether media may be
    fetched over HTTP; `allow_private_addresses`: from inside a network too.
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


def train(recipe: Recipe, *, show: bool = True, trust: Sequence[str] = ()) -> Path:
    """Runs a recipe to its end, going on from the latest state if the run has one. Returns the run folder.

    What the recipe names may run, and is trusted from then on; plugins that a folder it names (`path`) names in turn
    may run if `trust` names them, as in `molora.load`.

    Once training begins, the first SIGINT or SIGTERM saves after the step under way and raises Stopped, a second one
    acts at once.

    Raises ConfigError for a recipe that cannot work, ValueError for data that cannot be used, TrainingError when
    training must stop, EvaluationFailed when it is done and an evaluation is not.
    """
    accelerator = accelerator_on(recipe.device)
    folder = Path(recipe.run)
    try:
        state = latest_state(folder)
    except (OSError, ValueError) as error:  # such as a name that no file system takes
        raise ConfigError(f"run: {recipe.run:.200} cannot be made ({error!s:.200}); give another run=") from error
    position = _Position() if state is None else _checked_position(state, recipe)
    trials = _open_sources(recipe, position)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run: {folder} cannot be made ({error}); give another run=") from error
    with hold(folder):
        if latest_state(folder) != state:
            raise ConfigError(f"{folder}: another process trained it meanwhile; start again to go on from there")
        run = _Run(recipe, accelerator, position, show and accelerator.is_main_process, trust)
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
        raise EvaluationFailed(
            f"{folder}: trained to the end and saved, but {'; '.join(run.failed)}. {again}; evaluations before the end "
            "are not made up for"
        )
    return folder


def accelerator_on(name: str | None) -> Accelerator:
    """accelerate on the device that a recipe names, or on the one that it finds. Raises ConfigError."""
    if name is None:
        return Accelerator()
    device = pick_device(name)
    if device.type != "cpu" and device.index is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(f"device: {name} is one device, and every rank has its own; give {device.type}")
        torch.accelerator.set_device_index(device.index)
    accelerator = Accelerator(cpu=device.type == "cpu")
    if accelerator.device.type != device.type:
        raise ConfigError(f"device: is {name}, but accelerate runs this process on {accelerator.device}; give that one")
    return accelerator


def _checked_position(state: Path, recipe: Recipe) -> _Position:
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
    if changed := _changes(then, recipe, _Position(about["stage"], about["step"])):
        raise ConfigError(
            f"{recipe.run}: this run was begun with other settings: {'; '.join(changed)}. Give the recipe another run "
            "folder, or restore the settings to go on"
        )
    return _position(about, recipe)


def _skips(stage: StageConfig) -> tuple[type[ValueError], ...]:
    """The errors of samples that a stage leaves out."""
    choices = ((SampleTooLong, stage.too_long), (MediaError, stage.unusable))
    return tuple(error for error, choice in choices if choice == "skip")


def _open_sources(recipe: Recipe, position: _Position) -> dict[str, Trial]:
    """Every source that is still needed, opened and tried, by its key in the recipe. Raises ConfigError, ValueError."""
    trials: dict[str, Trial] = {}
    for index, stage in list(enumerate(recipe.stages))[position.stage :]:
        for name, config in stage.data.items():
            where = f"stages.{index}.data.{name}"
            trials[where] = Trial(where, config, skips=_skips(stage))
    for name, evaluation in recipe.evaluations.items():
        if trials or name in position.evaluate:
            where = f"evaluations.{name}.data"
            trials[where] = Trial(where, evaluation.data, evaluation=evaluation)
    return trials


def build_model(
    recipe: Recipe, device: torch.device, trust: Sequence[str] = ()
) -> tuple[MoLoRA, Processor, dict[str, Blueprint]]:
    """The model a recipe describes, before training, with its processor and blueprints. `trust` as in `train`."""
    plans: dict[str, Blueprint] = {}
    saved: dict[str, Path] = {}
    for name, config in recipe.modalities.items():  # first, since a backbone takes long
        if config.path is not None:
            saved[name] = Path(config.path)
            try:
                plans[name] = read_plan(saved[name], name, trust)
            except ConfigError as error:
                raise type(error)(f"modalities.{name}.path: {error}") from error
        else:
            plans[name] = blueprint(name, str(config.plugin), config.options, config.adapter, f"modalities.{name}")
    router = recipe_router(recipe, trust)
    backbone, tokenizer = load_backbone(
        recipe.backbone.path, dtype=recipe.backbone.dtype, revision=recipe.backbone.revision, device=device
    )
    for name, folder in saved.items():
        for warning in check_modality(folder, backbone.identity):
            warn(warning)
        check_encoder(plans[name], folder)
    where = "router" if recipe.router.path is None else str(Path(recipe.router.path) / "molora.json")
    model, processor = assemble(
        backbone,
        tokenizer,
        plans,
        router,
        seed=recipe.seed,
        where=where,
        media_policy=MediaPolicy(allow_urls=recipe.allow_urls, allow_private_addresses=recipe.allow_private_addresses),
    )
    for name, folder in saved.items():
        load_modality(model, name, folder)
    if recipe.router.path is not None:
        load_router(model, Path(recipe.router.path))
    return model, processor, plans


def recipe_router(recipe: Recipe, trust: Sequence[str] = ()) -> RouterPlan:
    """The router's plugin and options, the recipe's own or those of the run it names. `trust` as in `train`."""
    router = recipe.router
    if router.path is None:
        return router_plan(router)
    if router != RouterConfig(path=router.path):
        raise ConfigError(f"router: path {router.path!r} brings plugin and options with it; leave them out")
    return read_run(Path(router.path)).router_plan(trust)


def remember_plugins(recipe: Recipe) -> None:
    """Trusts the files and modules that a recipe of the user's names, wherever folders made with them name them."""
    sources = [source for stage in recipe.stages for source in stage.data.values()]
    sources += [evaluation.data for evaluation in recipe.evaluations.values()]
    named: dict[Kind, Iterable[str | None]] = {
        "modality": (config.plugin for config in recipe.modalities.values()),
        "router": [recipe.router.plugin],
        "source": (source.kind for source in sources),
    }
    for kind, specs in named.items():
        for spec in filter(None, specs):
            remember(find(kind, spec))


def describe(model: MoLoRA, stage: StageConfig) -> None:
    """Prints what trains in a stage and what is frozen."""
    say(f"{stage.name}: {stage.steps} steps of {stage.samples_per_step} samples")
    for part, parameters in model.parts().items():
        training = count(p for p in parameters.values() if p.requires_grad)
        word = "trains" if training else "frozen"
        say(f"  {word}  {part:<24} {training or count(parameters.values()):>12,} parameters")
    say(f"  frozen  {'backbone':<24} {count(_frozen(model)):>12,} parameters")


def check_start(model: MoLoRA, start_from: Mapping[str, str], where: str) -> None:
    """Raises ConfigError for parts of `start_from` that are not there, differ or do not train."""
    parts = model.parts()
    for target, source in start_from.items():
        if unknown := sorted({target, source} - parts.keys()):
            near = _nearest(unknown[0], list(parts))
            raise ConfigError(f"{where}: no part {unknown}{near} the parts of this model are {sorted(parts)}")
        shapes = [{key: tuple(p.shape) for key, p in parts[part].items()} for part in (target, source)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"{where}: {target} cannot start from {source}: {shapes[0]} and {shapes[1]} differ")
        if not all(p.requires_grad for p in parts[target].values()):
            raise ConfigError(f"{where}: {target} does not train in this stage, so nothing may change it")


def copy_parts(model: MoLoRA, start_from: Mapping[str, str]) -> None:
    """Gives parts the weights of others."""
    parts = model.parts()
    with torch.no_grad():
        for target, source in start_from.items():
            for key, parameter in parts[target].items():
                parameter.copy_(parts[source][key])


def _frozen(model: MoLoRA) -> list[Tensor]:
    adapters = {id(p) for name in model.adapters for p in lora.adapter_parameters(model.backbone.model, name).values()}
    return [p for p in model.backbone.parameters() if id(p) not in adapters]


def train_step(
    model: MoLoRA,
    processor: Processor,
    samples: Sequence[Sample],
    tokens_per_pack: int,
    optimizers: Mapping[str, PartOptimizer],
    accelerator: Accelerator,
) -> dict[str, Any]:
    """One update from this rank's samples of a global step; returns the step's metrics, the same on every rank.

    Each sample's loss is divided by the global target tokens of its group (its set of modalities), and each part is
    reduced, clipped and stepped on its own, so nothing shared couples modalities that train together.
    """
    targets: dict[frozenset[str], int] = {}
    for counted in gather_object([{sample.modalities: 0 for sample in samples}]):
        targets.update(counted)
    for sample in samples:
        targets[sample.modalities] += sample.num_targets
    groups = sorted(targets, key=sorted)
    totals: Any = accelerator.reduce(torch.tensor([float(targets[g]) for g in groups], device=model.device), "sum")
    targets = {group: int(total) for group, total in zip(groups, totals.tolist(), strict=True)}
    sums = dict.fromkeys(groups, 0.0)
    shares: list[tuple[str, dict[str, float]]] = []
    trained = {group: model.trains(group) for group in groups}
    for trains in (False, True):
        chosen = [sample for sample in samples if trained[sample.modalities] == trains]
        for pack in processor.packs(chosen, tokens_per_pack):
            pack = pack.to(model.device)
            with nullcontext() if trains else torch.no_grad():
                losses = model.losses(pack)
                shares_N = torch.tensor([1 / max(1, targets[m]) for m in pack.modalities], device=model.device)
                counts_N = torch.tensor(losses.num_targets, device=model.device)
                loss = ((losses.sums_N + losses.router_N * counts_N) * shares_N).sum()
            if trains and loss.isfinite():
                loss.backward()
            for modalities, value in zip(pack.modalities, losses.sums_N.tolist(), strict=True):
                sums[modalities] += value
            shares += routed_shares(pack, losses.routing)
    reduced: Any = accelerator.reduce(
        torch.tensor([sums[g] for g in groups], device=model.device, dtype=torch.float64), "sum"
    )
    means = {g: value / max(1, targets[g]) for g, value in zip(groups, reduced.tolist(), strict=True)}
    if not all(math.isfinite(mean) for mean in means.values()):
        ids = ", ".join(sample.id for sample in samples[:4])
        shown = {"+".join(sorted(g)) or "text": mean for g, mean in means.items()}
        raise TrainingError(
            f"the loss is not finite ({shown}); stopped before the optimiser. The step's samples: {ids}, …"
        )
    row: dict[str, Any] = {}
    for group, mean in means.items():
        name = "+".join(sorted(group)) or "text"
        row[f"loss/{name}"], row[f"targets/{name}"] = mean, targets[group]
    shares = gather_object(shares)
    samples_of = Counter(name for name, _ in shares)
    for name, taken in shares:
        for adapter, share in taken.items():
            key = f"routing/{name}/{adapter}"
            row[key] = row.get(key, 0.0) + share / samples_of[name]
    present = frozenset().union(*(model.parts_of(group) for group in groups if targets[group]))
    for part, optimizer in optimizers.items():
        if part in present:
            _reduce_gradients(optimizer, accelerator)
            row[f"gradient_norm/{part}"], row[f"learning_rate/{part}"] = optimizer.step()
    return row


def routed_shares(pack: Pack, routing: Routing) -> list[tuple[str, dict[str, float]]]:
    """For each sample that a router gave weights: its modalities, and the mean weight of each adapter that it took."""
    shares = []
    ends = list(itertools.accumulate(pack.lengths))
    for piece in routing.slices:
        if piece.weights_TE is not None:
            inside = [n for n, end in enumerate(ends) if piece.start < end <= piece.stop]
            weights = piece.weights_TE.detach().split([pack.lengths[n] for n in inside])
            for n, weights_TE in zip(inside, weights, strict=True):
                means = weights_TE.mean(0).tolist()
                shares.append(("+".join(sorted(pack.modalities[n])), dict(zip(piece.adapters, means, strict=True))))
    return shares


def _reduce_gradients(optimizer: PartOptimizer, accelerator: Accelerator) -> None:
    """Sums a part's gradients over ranks in one flat tensor; a rank without the part contributes zeros."""
    parameters = list(optimizer.parameters.values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    summed: Any = accelerator.reduce(flat, "sum")
    for parameter, gradient in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


@dataclass
class _Position:
    """Where a run stands: the stage, the steps of it that are done, the updates each part has taken in it, and the
    evaluations to do before it goes on."""

    stage: int = 0
    step: int = 0
    part_steps: dict[str, int] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)


def _position(about: Mapping[str, Any], recipe: Recipe) -> _Position:
    """Where the run of a state stands for a recipe, which may give more steps to a stage that was at its end."""
    position = _Position(about["stage"], about["step"], about["part_steps"], about.get("evaluate", []))
    last = position.stage - 1
    if position.step == 0 and 0 <= last < len(recipe.stages):
        steps = about["recipe"]["stages"][last]["steps"]
        if recipe.stages[last].steps > steps:
            position.stage, position.step = last, steps
    return position


def environment(model: MoLoRA, accelerator: Accelerator) -> dict[str, Any]:
    """What must stay the same for a resumed run to equal one that was never stopped."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": accelerator.device.type,
        "dtype": str(model.backbone.model.dtype),
        "threads": torch.get_num_threads(),
        "ranks": accelerator.num_processes,
    }


class _Run:
    """A recipe in progress: the model, where it stands, and what it leaves on disk."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        position: _Position,
        show: bool,
        trust: Sequence[str],
    ) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.interrupt = Interrupt()
        self.show = show
        self.router = recipe_router(recipe, trust)
        self.folder = Path(recipe.run)
        self.model, self.processor, self.plans = build_model(recipe, accelerator.device, trust)
        self.model.backbone.activation_checkpointing = recipe.activation_checkpointing
        self.pristine = {name: tensor_hash(encoder.state_dict()) for name, encoder in self.model.encoders.items()}
        self.log = MetricsLog(self.folder, accelerator)
        self.bars = progress(shown=show)
        self.position = position
        self.optimizers: dict[str, PartOptimizer] = {}
        self.optimizer_tensors: dict[str, Tensor] = {}
        self.features: FeatureCache | None = None
        self.failed: list[str] = []

    def begin(self, state: Path | None, trials: Mapping[str, Trial]) -> None:
        """Tries all that is to come on the model, opens the run folder and puts the latest state back, if there is
        one."""
        self._try_stages(trials)
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
        if self.accelerator.is_main_process:
            remember_plugins(self.recipe)
            write_text(self.folder / "config.yaml", dump(self.recipe))
            if state:  # a kill may have come between the state and the folders made from it
                self._export()
        self.accelerator.wait_for_everyone()
        self.log.open()

    def _try_stages(self, trials: Mapping[str, Trial]) -> None:
        """Raises ConfigError or ValueError for what the model of a recipe cannot do."""
        _check_names(self.recipe, self.model)
        for index, stage in enumerate(self.recipe.stages):
            set_trainable(self.model, stage.train, stage.steps, f"stages.{index}.train")
            check_start(self.model, stage.start_from, f"stages.{index}.start_from")
            for name in stage.data:
                if trial := trials.get(f"stages.{index}.data.{name}"):
                    trial.encode(self.processor, stage.tokens_per_pack)
        for name in self.recipe.evaluations:
            if trial := trials.get(f"evaluations.{name}.data"):
                trial.encode(self.processor, 0)

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
                skips=_skips(stage),
                where=f"stages.{index}.data",
            ),
            first_step=first_step,
            steps=stage.steps,
            samples_per_step=stage.samples_per_step,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
            workers=self.recipe.data_workers,
        )
        if self.show:
            describe(self.model, stage)
        bar = self.bars.add_task(stage.name, total=stage.steps, completed=first_step, note="")
        for step, encoded in enumerate(loader, start=first_step):
            row = self._step(stage, step, encoded)
            notes = [f"{key[5:]} {value:.3f}" for key, value in row.items() if key.startswith("loss/")]
            notes += [f"{row['skipped']} samples skipped"] if row["skipped"] else []
            self.bars.update(bar, advance=1, note=", ".join(notes))
            finished = step + 1 == stage.steps
            self.position = _Position(index + 1) if finished else _Position(index, step + 1)
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
        return next((number for number in gather_object([self.interrupt.number]) if number), 0)

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
        torch.manual_seed(seed_of(self.recipe.seed, stage.name, "step", step, self.accelerator.process_index))
        self.model.train()
        samples = [sample for sample in encoded if isinstance(sample, Sample)]
        if self.features is not None:
            samples = self.features.fill(samples)
        row = train_step(self.model, self.processor, samples, stage.tokens_per_pack, self.optimizers, self.accelerator)
        ids = sorted(gather_object([sample.id for sample in samples]))
        row["samples"] = len(ids)
        row["samples_digest"] = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        reasons = sorted(gather_object([sample.reason for sample in encoded if isinstance(sample, Skipped)]))
        row["skipped"] = len(reasons)
        if reasons:
            row["skipped_because"] = reasons
        row["seconds"] = time.monotonic() - started
        return row

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
        if ended and self.accelerator.is_main_process:
            path = self._state() / "state.json"
            write_json(path, {**read_json(path), "evaluate": left, "logs": self.log.lengths()})

    def _evaluate(self, name: str, config: EvaluationConfig) -> tuple[dict[str, Any], str | None]:
        """An evaluation's row of the log; and what was wrong, the same on every rank."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        judged, fault, results = [], None, {}
        try:
            source = open_source(config.data, f"evaluations.{name}.data")
            bar = self.bars.add_task(name, total=len(range(rank, len(source), ranks)), note="")

            def advance() -> None:
                if self.interrupt.number and ranks == 1:
                    self._stop(self.interrupt.number)
                self.bars.advance(bar)

            judged = judge(self.model, self.processor, source, config, rank=rank, ranks=ranks, advance=advance)
            self.bars.remove_task(bar)
        except Exception as error:  # whatever an evaluation does wrong, the training goes on
            fault = f"{type(error).__name__}: {error}"
        faults = [other for other in gather_object([fault]) if other is not None]
        if not faults:
            try:
                everyone = gathered(judged)
                results = scores(everyone, config)
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
        if self.accelerator.is_main_process:
            save_state(
                self.folder,
                self._state().name,
                {
                    "weights": self._trained(),
                    "optimizer": {k: v for o in self.optimizers.values() for k, v in o.tensors().items()},
                },
                {
                    **asdict(self.position),
                    "recipe": plain(self.recipe),
                    "backbone": asdict(self.model.backbone.identity),
                    "environment": environment(self.model, self.accelerator),
                    "logs": self.log.lengths(),
                },
            )
            self._export()
        self.accelerator.wait_for_everyone()

    def _export(self) -> None:
        """Writes the modality folders and what makes the folder a run."""
        trained = {parameter.split(".")[1] for parameter in self._trained()}
        for name, plan in self.plans.items():
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
            self.router,
            dtype=self.recipe.backbone.dtype,
            revision=self.model.backbone.revision,
            learned=self.model.router_tensors(),
        )

    def _trained(self) -> dict[str, Tensor]:
        """Every weight that a stage up to the run's position trains; the others are as the recipe built them."""
        return self._matching(itertools.chain(*(s.train for s in self.recipe.stages[: self.position.stage + 1])))

    def _matching(self, patterns: Iterable[str]) -> dict[str, Tensor]:
        """The weights that one of the patterns matches."""
        patterns = list(patterns)
        return {
            f"{part}.{key}": parameter
            for part, parameters in self.model.parts().items()
            for key, parameter in parameters.items()
            if any(matches(pattern, f"{part}.{key}") for pattern in patterns)
        }

    def _restore(self, state: Path) -> None:
        """Puts a saved state back. Raises ConfigError naming what differs from the run that saved it."""
        about, tensors = read_state(state)
        for warning in self.model.backbone.identity.check(about["backbone"], str(state)):
            if self.show:
                warn(warning)
        then, now = about["environment"], environment(self.model, self.accelerator)
        different = [f"{key} {then.get(key)!r} then, {now[key]!r} now" for key in now if now[key] != then.get(key)]
        if different and not self.recipe.allow_changed_environment:
            dtype = str(then.get("dtype")).removeprefix("torch.")
            back = f"give backbone.dtype={dtype} as it was, or " if now["dtype"] != then.get("dtype") else ""
            raise ConfigError(
                f"{self.folder}: resuming exactly needs the environment it was saved in ({'; '.join(different)}); "
                f"{back}set allow_changed_environment=true to go on all the same"
            )
        try:
            trained_then = [stage["train"] for stage in about["recipe"]["stages"][: about["stage"] + 1]]
            lora.load_exactly(self._matching(itertools.chain(*trained_then)), tensors["weights"], str(state))
        except ValueError as error:
            raise ConfigError(f"{error}; did the plugin's code change? give another run=") from error
        self.optimizer_tensors = tensors["optimizer"]
        self.log.truncate(about["logs"])


# What may change once a run has begun, as all that is done would have been the same. Of a recipe, only these must stay:
_KEPT = ("seed", "modalities", "router")
# Of a stage that has begun all must, but for what it evaluates, what would have stopped the run before, and `steps`.
_FREE_IN_STAGE = ("evaluate_every_steps",)
_FREE_FROM_ERROR = ("too_long", "unusable")


def _changes(then: Recipe, now: Recipe, position: _Position) -> list[str]:
    """Settings that changed and must not, each with both values and, for a schedule, why."""
    begun = position.stage + (position.step > 0)
    # What came from the environment is compared as it is written, or by its value, as older states have it.
    found = []
    for as_values in (plain, asdict):
        before, after = (json.loads(json.dumps(as_values(recipe))) for recipe in (then, now))
        for old, new in zip(before["stages"], after["stages"], strict=False):
            free = {"steps", *_FREE_IN_STAGE, *(key for key in _FREE_FROM_ERROR if old[key] == "error")}
            for key in free:
                del old[key], new[key]
        kept = [
            {**{key: recipe[key] for key in _KEPT}, "stages": dict(enumerate(recipe["stages"][:begun]))}
            for recipe in (before, after)
        ]
        found.append(list(_differences(kept[0], kept[1])))
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


def _check_names(recipe: Recipe, model: MoLoRA) -> None:
    """Raises ConfigError for modalities that the recipe's rules name and that are not there."""
    known = sorted(model.modalities)
    for name in sorted(getattr(model.router, "named", frozenset()) - set(known)) if recipe.router.path is None else ():
        raise ConfigError(f"router.options: a rule names modality {name!r}{_nearest(name, known)} there is {known}")
    for owner, modality in model.modalities.items():
        others = [other for other in known if other != owner]
        for name in getattr(modality.config, "beside", None) or ():
            if name not in others and (near := _nearest(name, others)) != ";":
                raise ConfigError(f"modalities.{owner}.options.beside: names modality {name!r}{near} there is {others}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ";"


def _differences(then: Mapping[Any, Any], now: Mapping[Any, Any], above: str = "") -> Iterator[str]:
    """The innermost settings that differ, each with both values."""
    for name in {**then, **now}:
        if all(isinstance(side.get(name), Mapping) for side in (then, now)):
            yield from _differences(then[name], now[name], f"{above}{name}.")
        elif (name in then) != (name in now) or then[name] != now[name]:
            was, has = (f"{side[name]!r:.200}" if name in side else "not set" for side in (then, now))
            yield f"{above}{name}: was {was}, is {has}"
