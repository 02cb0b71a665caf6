"""Two models on the same questions: the differences of their scores, shown and kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molora.config import ConfigError
from molora.evaluate.intervals import Difference, paired
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.metrics import Judged, Metric, scores
from molora.evaluate.predictions import read_predictions
from molora.evaluate.results import Place, Result, asked_first, is_count, settings_of, shown, told_ends
from molora.storage import write_json
from molora.terminal import print_table, say, warn


@dataclass(frozen=True)
class Comparison:
    """An evaluation of two models on the same questions: scores of both, and the differences of the first from the
    second. `left_out` counts the questions that one of them did not answer; `answers` are those of the `other`."""

    name: str
    other: Path
    here: dict[str, float]
    there: dict[str, float]
    differences: dict[str, Difference]
    left_out: int
    answers: Sequence[Judged]


def answers_of(other: Path, evaluations: Mapping[str, EvaluationConfig]) -> dict[str, list[Judged]]:
    """The answers to evaluations, each as it is asked first, that `other` keeps: a run, or a folder of answers, such as
    `predictions/step-N` of one. Raises ConfigError for answers that are not there, or of other settings."""
    if not other.is_dir():
        raise ConfigError(f"--against {other}: no such folder; name a run, or a folder of answers")
    place = Place(str(other))
    how = "evaluate that model too, with the same config"
    if place.run is not None:
        how = f"evaluate it too, with the same config: molora eval {other} …"
    return {
        name: read_predictions(place.folder or other, name, {"settings": settings_of(config)}, how)
        for name, config in asked_first(evaluations).items()
    }


def compare(results: Sequence[Result], other: Path, answers: Mapping[str, Sequence[Judged]]) -> list[Comparison]:
    """Results, but for baselines, beside the `answers` of another model to the same questions. Raises ConfigError for
    other questions."""
    comparisons = []
    for result in results:
        if result.beside is not None:
            continue
        there = answers[result.name]
        pairs = pair(result.judged, there, f"{other}: evaluation {result.name!r}")
        both = [pair for pair in pairs if pair[0].error is None and pair[1].error is None]
        if not both:
            raise ConfigError(f"{other}: evaluation {result.name!r}: no question was answered by both models")
        ours, theirs = [one for one, _ in both], [two for _, two in both]
        found = differences(ours, theirs, result.metrics)
        of_both = scores(ours, result.metrics), scores(theirs, result.metrics)
        comparisons.append(Comparison(result.name, other, *of_both, found, len(pairs) - len(both), there))
    return comparisons


def keep_comparisons(comparisons: Sequence[Comparison], place: Place) -> None:
    """Writes each comparison into `against/NAME.json` in the folder of answers, if there is one."""
    if place.folder is None:
        return
    for one in comparisons:
        path = place.folder / "against" / f"{one.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format_version": "1.0", "here": place.told, "there": str(one.other), "left_out": one.left_out}
        found = {metric: difference._asdict() for metric, difference in one.differences.items()}
        write_json(path, {**about, "scores": {"here": one.here, "there": one.there}, "differences": found})
        say(f"differences from {one.other}: {path}")


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


def show_comparisons(comparisons: Sequence[Comparison], other: Path) -> None:
    """Prints the scores of two models beside each other, with their differences."""
    rows = [
        (
            one.name,
            metric,
            shown(metric, value),
            shown(metric, one.there[metric]),
            f"{value - one.there[metric]:+.4f}",
            told_ends(one.differences[metric][1:] if metric in one.differences else None),
        )
        for one in comparisons
        for metric, value in one.here.items()
        if metric in one.there and not is_count(metric)
    ]
    headings = ("evaluation", "metric", "here", "there", "difference", "95 % interval")
    print_table(headings, rows, right=("here", "there", "difference"))
    say(f"there is {other}; a difference whose interval holds 0 may be chance")
    for one in comparisons:
        if one.left_out:
            warn(f"{one.name}: {one.left_out} questions that one of both did not answer are in no difference")
