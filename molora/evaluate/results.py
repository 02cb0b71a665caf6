"""The evaluations of a model: asked or scored again, compared, shown as a table, and kept in the run's
evaluation.json."""

import json
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
from molora.evaluate.intervals import Difference, Interval, interval, paired
from molora.evaluate.judge import Evaluation, EvaluationConfig, complaints
from molora.evaluate.metrics import COUNTS, Judged, Metric, by_tag, open_metrics, scores
from molora.evaluate.normalise import exact_match
from molora.evaluate.predictions import open_predictions, read_predictions
from molora.inference.load import LoadedModel
from molora.storage import hold, read_json, write_json
from molora.terminal import console, print_table, progress, say, warn

_LOCK_TRIES = 50


@dataclass(frozen=True)
class Result:
    """An evaluation with its answers, the adapters that each ran with, and what its metrics make of them. `beside` is
    the evaluation that this one is a baseline of. `majority` is what the most frequent expected answer would get."""

    name: str
    config: EvaluationConfig
    metrics: Sequence[Metric]
    judged: Sequence[Judged]
    adapters: Sequence[Sequence[str]] = ()
    beside: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The model that is evaluated, by its `source` and the modalities and rules beside it, and the folder of its
    answers, by default `predictions` in a run."""

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

    def about(self, config: EvaluationConfig) -> dict[str, Any]:
        """What answers are of: this state of the model, and the settings that change answers."""
        model = {**model_hashes(locate(converted(self.source), self.modalities)), "rules": list(self.rules)}
        return {"model": model, "settings": settings_of(config)}


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
    console.stderr = place.run is None
    ready = [(Evaluation(name, config), beside) for name, config, beside in _each(evaluations)]
    loaded = load()
    environment = {
        **{"molora": molora.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        **{"device": loaded.model.device.type, "dtype": str(loaded.model.backbone.model.dtype)},
        "deterministic_batch": loaded.model.deterministic_batch,
    }
    results = []
    with progress() as bars:
        for evaluation, beside in ready:
            name, adapters = evaluation.name, []
            if place.folder is None:
                judged = evaluation.run(loaded, bars, strict=strict)
            else:
                about = {**place.about(evaluation.config), "environment": environment}
                with open_predictions(place.folder, name, about, len(evaluation.source), anew=anew) as predictions:
                    judged = evaluation.run(loaded, bars, strict=strict, predictions=predictions)
                    predictions.settle(judged)
                judged, adapters = read_predictions(place.folder, name, about, "evaluate it again")
            results.append(_result(name, evaluation.config, judged, adapters, beside))
            _record(place, results[-1])
    return results


def rescore_model(place: Place, evaluations: Mapping[str, EvaluationConfig]) -> list[Result]:
    """What evaluations get for the answers that are kept, without the model. Raises ConfigError for answers that are
    missing, or of another state of the model or other settings."""
    if place.folder is None:
        raise ConfigError(f"--rescore: {place.source} is no run; name the folder of its answers with --predictions")
    console.stderr = place.run is None
    results = []
    for name, config, beside in _each(evaluations):
        how = "leave --rescore out to ask the model"
        judged, adapters = read_predictions(place.folder, name, place.about(config), how)
        results.append(_result(name, config, judged, adapters, beside))
    for result in results:
        _record(place, result)
    return results


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


def _result(
    name: str,
    config: EvaluationConfig,
    judged: Sequence[Judged],
    adapters: Sequence[Sequence[str]],
    beside: str | None,
) -> Result:
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
        majority = {key: value for key, value in guessed.items() if key in found and not _is_count(key)}
    return Result(name, config, metrics, judged, adapters, beside, found, intervals, majority)


def as_majority(judged: Sequence[Judged]) -> list[Judged]:
    """The questions as if the most frequent expected answer had been given to each."""
    (answer, _), *_ = Counter(item.expected for item in judged).most_common(1)
    return [
        replace(item, answer=answer, correct=any(exact_match(answer, each) for each in item.answers or [item.expected]))
        for item in judged
    ]


def _is_count(metric: str) -> bool:
    return metric.partition("/")[0] in COUNTS


def _record(place: Place, result: Result) -> None:
    """Keeps what a run got in its evaluation.json, and says what goes from there."""
    if place.run is None:
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


@dataclass(frozen=True)
class Comparison:
    """An evaluation of two models on the same questions: scores of both, and the differences of the first from the
    second. `left_out` counts the questions that one of them did not answer."""

    name: str
    here: dict[str, float]
    there: dict[str, float]
    differences: dict[str, Difference]
    left_out: int


def compare(results: Sequence[Result], other: Path) -> list[Comparison]:
    """Results beside those of another run, from the answers that are kept there. Raises ConfigError for answers that
    are not there, or of other questions or settings."""
    comparisons = []
    for result in results:
        how = f"evaluate it too, with the same config: molora eval {other} …"
        about = {"settings": settings_of(result.config)}
        there, _ = read_predictions(other / "predictions", result.name, about, how)
        pairs = pair(result.judged, there, f"{other}: evaluation {result.name!r}")
        both = [pair for pair in pairs if pair[0].error is None and pair[1].error is None]
        if not both:
            raise ConfigError(f"{other}: evaluation {result.name!r}: no question was answered by both models")
        ours, theirs = [one for one, _ in both], [two for _, two in both]
        comparisons.append(
            Comparison(
                result.name,
                scores(ours, result.metrics),
                scores(theirs, result.metrics),
                differences(ours, theirs, result.metrics),
                len(pairs) - len(both),
            )
        )
    return comparisons


def differences(ours: Sequence[Judged], theirs: Sequence[Judged], metrics: Sequence[Metric]) -> dict[str, Difference]:
    """By how much the first answers are above the second to the same questions, by metric."""
    return {name: value for metric in metrics for name, value in paired(metric, ours, theirs).items()}


def pair(ours: Sequence[Judged], theirs: Sequence[Judged], where: str) -> list[tuple[Judged, Judged]]:
    """The same questions, answered twice. Raises ConfigError for questions that differ."""
    others = {item.id: item for item in theirs}
    if len(ours) != len(theirs):
        raise ConfigError(f"{where} has {len(theirs)} questions, and here are {len(ours)}; evaluate both anew")
    for item in ours:
        other = others.get(item.id)
        if other is None or item.expected != other.expected:
            told = f"expects {item.expected!r:.60} here and "
            told = "is not there" if other is None else f"{told}{other.expected!r:.60} there"
            raise ConfigError(f"{where}: question {item.id!r} {told}; evaluate both anew on the same data")
    return [(item, others[item.id]) for item in ours]


def show(results: Sequence[Result], place: Place) -> None:
    """Prints a table of scores, each with its interval and followed by its baselines, and then what one should know
    before one believes them. The scores of a model that is no run are printed as JSON too, alone on standard output."""
    rows: list[Sequence[str]] = []
    for result in results:
        if result.beside is not None:
            continue
        baselines = [other for other in results if other.beside == result.name]
        for metric, value in result.scores.items():
            rows.append((result.name, metric, shown(metric, value), _ends(result.intervals.get(metric)), ""))
            if _is_count(metric):
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


def show_comparisons(comparisons: Sequence[Comparison], other: Path) -> None:
    """Prints the scores of two models beside each other, with their differences."""
    rows = [
        (
            one.name,
            metric,
            shown(metric, value),
            shown(metric, one.there[metric]),
            f"{value - one.there[metric]:+.4f}",
            _ends(one.differences[metric][1:] if metric in one.differences else None),
        )
        for one in comparisons
        for metric, value in one.here.items()
        if metric in one.there and not _is_count(metric)
    ]
    headings = ("evaluation", "metric", "here", "there", "difference", "95 % interval")
    print_table(headings, rows, right=("here", "there", "difference"))
    say(f"there is {other}; a difference whose interval holds 0 may be chance")
    for one in comparisons:
        if one.left_out:
            warn(f"{one.name}: {one.left_out} questions that one of both did not answer are in no difference")


def _beside(label: str, metric: str, value: float, other: float, ends: Interval | None) -> Sequence[str]:
    return (label, metric, shown(metric, other), _ends(ends), f"{value - other:+.4f}")


def shown(metric: str, value: float) -> str:
    """A number of a metric as it is printed."""
    return f"{value:.0f}" if _is_count(metric) else f"{value:.4f}"


def _ends(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
