"""The evaluations of a model: asked or scored again, compared, shown as a table, and kept in the run's
evaluation.json; and the answers that it gave while it was trained."""

import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import molora
from molora.checkpoint.opening import locate, model_hashes
from molora.config import ConfigError, plain
from molora.convert.release import converted
from molora.evaluate.intervals import Interval, interval
from molora.evaluate.judge import Evaluation, EvaluationConfig, complaints
from molora.evaluate.metrics import COUNTS, Judged, Metric, by_tag, open_metrics, scores
from molora.evaluate.normalise import exact_match
from molora.evaluate.predictions import keep_predictions, merge_predictions, open_predictions, read_predictions
from molora.inference.load import LoadedModel
from molora.shard import ALL_ROWS, Shard
from molora.storage import hold, read_json, write_json
from molora.terminal import console, print_table, progress, say, warn

_LOCK_TRIES = 50
# What the folder of answers of a step of a training is called.
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Result:
    """An evaluation with its answers, and what its metrics make of them. `beside` is the evaluation that this one is a
    baseline of. `majority` is what the most frequent expected answer would get."""

    name: str
    config: EvaluationConfig
    metrics: Sequence[Metric]
    judged: Sequence[Judged]
    beside: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The model that is evaluated, by its `source` and the modalities and rules beside it, and the folder of its
    answers: by default `predictions` in a run, where `step-N` has those that it gave at a step of its training."""

    source: str
    modalities: Sequence[Path] = ()
    rules: Sequence[str] = ()
    predictions: Path | None = None

    @property
    def run(self) -> Path | None:
        """The run folder, if the model is one."""
        path = Path(self.source)
        return path if (path / "molora.json").is_file() else None

    @property
    def folder(self) -> Path | None:
        """Where answers are kept."""
        return self.predictions or (None if self.run is None else self.run / "predictions")

    @property
    def step(self) -> int | None:
        """The step of the run's training whose answers these are; None for answers of the model as it is."""
        if self.run is None or self.predictions is None:
            return None
        folder = self.predictions.resolve()
        named = _STEP.fullmatch(folder.name)
        return int(named[1]) if named and folder.parent == (self.run / "predictions").resolve() else None

    @property
    def told(self) -> str:
        """Whose answers these are, in a few words."""
        return self.source if self.step is None else f"{self.source} at step {self.step}"

    def about(self, config: EvaluationConfig) -> dict[str, Any]:
        """What answers are of: this state of the model, or that of a step, and the settings that change answers."""
        if self.step is not None:
            return {"step": self.step, "settings": settings_of(config)}
        model = {**model_hashes(locate(converted(self.source), self.modalities)), "rules": list(self.rules)}
        return {"model": model, "settings": settings_of(config)}


def environment_of(loaded: LoadedModel) -> dict[str, Any]:
    """What answers depend on beside the model."""
    return {
        **{"molora": molora.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        **{"device": loaded.model.device.type, "dtype": str(loaded.model.backbone.model.dtype)},
        "deterministic_batch": loaded.model.deterministic_batch,
    }


def keep_step(
    run: Path, step: int, name: str, config: EvaluationConfig, loaded: LoadedModel, judged: Sequence[Judged]
) -> None:
    """Keeps the answers that a run gave at a step of its training, when its folder holds that state of the model."""
    place = Place(str(run))
    config = replace(config, media=config.asked_with[0])
    about = {"step": step, **place.about(config), "environment": environment_of(loaded)}
    folder = run / "predictions"
    keep_predictions(folder / f"step-{step}", name, about, judged, folder)


def forget_steps(run: Path, after: int) -> None:
    """Removes the answers of later steps, from which a run does not go on."""
    for folder in (run / "predictions").glob("step-*"):
        if (named := _STEP.fullmatch(folder.name)) and int(named[1]) > after:
            shutil.rmtree(folder)


def settings_of(config: EvaluationConfig) -> dict[str, Any]:
    """The settings that change answers."""
    return {name: value for name, value in plain(config).items() if name in ("data", "media", "max_new_tokens")}


def evaluate_model(
    load: Callable[[], LoadedModel],
    place: Place,
    evaluations: Mapping[str, EvaluationConfig],
    *,
    strict: bool = False,
    anew: bool = False,
) -> list[Result]:
    """Runs evaluations on the model that `load` opens. Answers are kept as they come, so that the next call goes on
    from there; with `anew` it does not. What a run gets is recorded in its evaluation.json."""
    results = []
    for evaluation, beside, judged in _asked(load, place, evaluations, ALL_ROWS, strict, anew):
        results.append(_result(evaluation.name, evaluation.config, judged, beside))
        _record(place, results[-1])
    return results


def evaluate_shard(
    load: Callable[[], LoadedModel],
    place: Place,
    evaluations: Mapping[str, EvaluationConfig],
    shard: Shard,
    *,
    strict: bool = False,
    anew: bool = False,
) -> bool:
    """Asks the model a shard of the questions, and keeps the answers for `merge_evaluations`; else as `evaluate_model`.
    Returns whether all have an answer. Raises ConfigError for a model that is no run, if no folder is named."""
    _folder(place, "--shard")
    whole = True
    for evaluation, _, judged in _asked(load, place, evaluations, shard, strict, anew):
        failed = sum(item.error is not None for item in judged)
        whole = whole and not failed
        told = f"{evaluation.name}: shard {shard} has {len(judged) - failed} of {len(judged)} answers"
        say(f"{told}; when all have theirs, --merge {shard.count} puts them together")
    return whole


def merge_evaluations(place: Place, evaluations: Mapping[str, EvaluationConfig], count: int) -> list[Result]:
    """What evaluations get for the answers of `count` shards, which become the model's answers, without the model.
    Raises ConfigError that names the shards that are missing or wrong."""
    folder = _folder(place, "--merge")
    for name, config, _ in _each(evaluations):
        merge_predictions(folder, name, place.about(config), len(Evaluation(name, config).source), count)
    return rescore_model(place, evaluations)


def _folder(place: Place, option: str) -> Path:
    """Where answers are kept. Raises ConfigError where they are not."""
    if place.folder is None:
        raise ConfigError(f"{option}: {place.source} is no run; name the folder of its answers with --predictions")
    return place.folder


def _asked(
    load: Callable[[], LoadedModel],
    place: Place,
    evaluations: Mapping[str, EvaluationConfig],
    shard: Shard,
    strict: bool,
    anew: bool,
) -> Iterator[tuple[Evaluation, str | None, list[Judged]]]:
    """Each evaluation, what it is beside, and its answers."""
    if place.step is not None:
        raise ConfigError(
            f"--predictions {place.predictions}: has what the model answered at step {place.step} of its training; add "
            "--rescore to score these answers, or name another folder"
        )
    console.stderr = place.run is None
    ready = [(Evaluation(name, config), beside) for name, config, beside in _each(evaluations)]
    for evaluation, _ in ready:
        evaluation.try_metrics()
    loaded = load()
    with progress() as bars:
        for evaluation, beside in ready:
            if place.folder is None:
                yield evaluation, beside, evaluation.run(loaded, bars, strict=strict)
                continue
            about = {**place.about(evaluation.config), "environment": environment_of(loaded)}
            name = evaluation.name if shard.count == 1 else shard.name(evaluation.name)
            num_questions = len(shard.rows(len(evaluation.source)))
            with open_predictions(place.folder, name, about, num_questions, anew=anew) as predictions:
                judged = evaluation.run(loaded, bars, shard=shard, strict=strict, predictions=predictions)
                predictions.settle(judged)
            yield evaluation, beside, read_predictions(place.folder, name, about, "evaluate it again")


def rescore_model(place: Place, evaluations: Mapping[str, EvaluationConfig]) -> list[Result]:
    """What evaluations get for the answers that are kept, without the model. Raises ConfigError for answers that are
    missing, or of another state of the model or other settings."""
    folder = _folder(place, "--rescore")
    console.stderr = place.run is None
    how = "leave --rescore out to ask the model"
    if place.step is not None:
        say(f"the answers of {place.told}")
        evaluations = asked_first(evaluations)
        how = f"score them as the training did: molora eval {place.run} {place.run}/config.yaml --rescore …"
    results = []
    for name, config, beside in _each(evaluations):
        judged = read_predictions(folder, name, place.about(config), how)
        results.append(_result(name, config, judged, beside))
    for result in results:
        _record(place, result)
    return results


def asked_first(evaluations: Mapping[str, EvaluationConfig]) -> dict[str, EvaluationConfig]:
    """Evaluations without their baselines."""
    return {name: replace(config, media=config.asked_with[0]) for name, config in evaluations.items()}


def _each(evaluations: Mapping[str, EvaluationConfig]) -> Iterator[tuple[str, EvaluationConfig, str | None]]:
    """Every evaluation and each of its baselines, with the name of what it is beside. Raises ConfigError."""
    if not evaluations:
        raise ConfigError("evaluations: none given; name at least one")
    named: set[str] = set()
    for name, config in evaluations.items():
        for each, asked in config.each(name).items():
            if each in named:
                raise ConfigError(f"evaluations: two are called {each!r}, one of them for its `media`; rename one")
            named.add(each)
            yield each, asked, None if each == name else name


def _result(name: str, config: EvaluationConfig, judged: Sequence[Judged], beside: str | None) -> Result:
    metrics = open_metrics(config.metrics, f"evaluations.{name}.metrics")
    answered = [item for item in judged if item.error is None]
    found = scores(judged, metrics)
    intervals = {
        f"{key}/{tag}" if tag else key: ends
        for tag, items in by_tag(answered).items()
        for metric in (metrics if items else ())
        for key, ends in interval(metric, items).items()
    }
    rating = [metric for metric in metrics if getattr(metric, "rates_each", False)]
    majority = {}
    if rating and answered and beside is None:
        guessed = scores(as_majority(answered), rating)
        majority = {key: value for key, value in guessed.items() if key in found and not is_count(key)}
    return Result(name, config, metrics, judged, beside, found, intervals, majority)


def as_majority(judged: Sequence[Judged]) -> list[Judged]:
    """The questions as if the most frequent expected answer had been given to each."""
    (answer, _), *_ = Counter(item.expected for item in judged).most_common(1)
    return [
        replace(item, answer=answer, correct=any(exact_match(answer, each) for each in item.answers or [item.expected]))
        for item in judged
    ]


def is_count(metric: str) -> bool:
    return metric.partition("/")[0] in COUNTS


def _record(place: Place, result: Result) -> None:
    """Keeps what a run got in its evaluation.json, and says what goes from there."""
    if place.run is None or place.step is not None:
        return
    model = place.about(result.config)["model"]
    told = record(
        place.run / "evaluation.json",
        model,
        {result.name: result.scores},
        {result.name: plain(result.config)},
        intervals={result.name: {key: list(ends) for key, ends in result.intervals.items()}},
        majority={result.name: result.majority},
    )
    for each in told:
        warn(each)


def record(
    path: Path,
    model: Mapping[str, Any],
    results: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
    **more: Mapping[str, Any],
) -> list[str]:
    """Adds results to those in a file, with the settings of each evaluation, and `more` about them by its name. Returns
    what is to be told of results that go, because another `model` or other settings gave them."""
    for again in reversed(range(_LOCK_TRIES)):
        try:
            with hold(path):
                known = read_json(path) if path.is_file() else {}
                same = known.get("model") == model
                old = {name: known.get(name, {}) for name in ("evaluations", "settings", *more)}
                kept = old if same else {name: {} for name in old}
                new = {"evaluations": results, "settings": settings, **more}
                now = {name: {**kept[name], **values} for name, values in new.items()}
                write_json(path, {"format_version": "1.0", "model": model, **now})
                gone = sorted(old["evaluations"].keys() - kept["evaluations"].keys() - results.keys())
                told = [f"took out {', '.join(gone)}, which another state of the model gave"] if gone else []
                other = [name for name in settings if kept["settings"].get(name, settings[name]) != settings[name]]
                told += [f"{name} was of other settings before; another name keeps both" for name in other]
                return [f"{path.name}: {each}" for each in told]
        except ConfigError:  # another evaluation of the run ends at the same moment
            if not again:
                raise
            time.sleep(0.1)
    raise AssertionError("the last try returns or raises")


def show(results: Sequence[Result], place: Place) -> None:
    """Prints a table of scores, each with its interval and followed by its baselines, and then what one should know
    before one believes them. The scores of a model that is no run are printed as JSON too, alone on standard output."""
    rows: list[Sequence[str]] = []
    for result in results:
        if result.beside is not None:
            continue
        baselines = [other for other in results if other.beside == result.name]
        for metric, value in result.scores.items():
            rows.append((result.name, metric, shown(metric, value), told_ends(result.intervals.get(metric)), ""))
            if is_count(metric):
                continue
            for other in baselines:
                if metric in other.scores:
                    label = f"  {other.name.removeprefix(result.name).strip(' ()')}"
                    rows.append(_beside(label, metric, value, other.scores[metric], other.intervals.get(metric)))
            if metric in result.majority:
                rows.append(_beside("  majority answer", metric, value, result.majority[metric], None))
    headings = ("evaluation", "metric", "value", "95 % interval", "difference")
    used = [index for index in range(len(headings)) if index < 3 or any(row[index] for row in rows)]
    print_table(
        [headings[index] for index in used],
        [[row[index] for index in used] for row in rows],
        right=("value", "difference"),
    )
    for result in results:
        for complaint in complaints(result.name, result.judged, result.config):
            warn(complaint)
    if place.run is None:
        print(json.dumps({result.name: result.scores for result in results}))


def _beside(label: str, metric: str, value: float, other: float, ends: Interval | None) -> Sequence[str]:
    return (label, metric, shown(metric, other), told_ends(ends), f"{value - other:+.4f}")


def shown(metric: str, value: float) -> str:
    """A number of a metric as it is printed."""
    return f"{value:.0f}" if is_count(metric) else f"{value:.4f}"


def told_ends(ends: Sequence[float | None] | None) -> str:
    """The ends of an interval as they are printed, nothing for none."""
    return "" if ends is None or None in ends else f"{ends[0]:.4f} to {ends[1]:.4f}"
