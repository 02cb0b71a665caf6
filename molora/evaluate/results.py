"""The evaluations of a model: run, shown as a table, and kept in the run's evaluation.json."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.checkpoint.opening import model_hashes
from molora.config import ConfigError, plain
from molora.evaluate.judge import Evaluation, EvaluationConfig, complaints
from molora.evaluate.metrics import COUNTS
from molora.inference.load import LoadedModel
from molora.storage import hold, read_json, write_json
from molora.terminal import console, print_table, progress, warn

_LOCK_TRIES = 50


def evaluate_model(
    load: Callable[[], LoadedModel],
    source: Path,
    evaluations: Mapping[str, EvaluationConfig],
    *,
    rules: Sequence[str] = (),
    strict: bool = False,
) -> bool:
    """Runs evaluations on the model that `load` opens, and prints their scores. Returns whether no question failed.
    Results of a run, the folder `source`, are recorded in its evaluation.json, with the `rules` that its router was
    given. Those of another model are printed as JSON, alone on standard output."""
    if not evaluations:
        raise ConfigError("evaluations: none given; name at least one")
    is_run = (source / "molora.json").is_file()
    console.stderr = not is_run
    ready = [Evaluation(name, config) for name, config in evaluations.items()]
    loaded = load()
    about = {**model_hashes(loaded.layout), "rules": list(rules)}
    results: dict[str, dict[str, float]] = {}
    told: list[str] = []
    with progress() as bars:
        for evaluation in ready:
            judged = evaluation.run(loaded, bars, strict=strict)
            scored = {evaluation.name: evaluation.scores(judged)}
            results |= scored
            told += complaints(evaluation.name, judged, evaluation.config)
            if is_run:
                told += record(source / "evaluation.json", about, scored, {evaluation.name: plain(evaluation.config)})
    rows = [
        (name, metric, f"{value:.0f}" if metric.partition("/")[0] in COUNTS else f"{value:.4f}")
        for name, metrics in results.items()
        for metric, value in metrics.items()
    ]
    print_table(("evaluation", "metric", "value"), rows)
    for complaint in told:
        warn(complaint)
    if not is_run:
        print(json.dumps(results))
    return not any(metrics["failed"] for metrics in results.values())


def record(
    path: Path, model: Mapping[str, Any], results: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any]
) -> list[str]:
    """Adds results to those in a file, with the settings of each evaluation. Returns what is to be told of results that
    go, because another `model` or other settings gave them."""
    for again in reversed(range(_LOCK_TRIES)):
        try:
            with hold(path):
                known = read_json(path) if path.is_file() else {}
                old, of_old = known.get("evaluations", {}), known.get("settings", {})
                kept, of_kept = (old, of_old) if known.get("model") == model else ({}, {})
                now = {"evaluations": {**kept, **results}, "settings": {**of_kept, **settings}}
                write_json(path, {"format_version": "1.0", "model": model, **now})
                gone = sorted(old.keys() - kept.keys() - results.keys())
                told = [f"took out {', '.join(gone)}, which another state of the model gave"] if gone else []
                other = [name for name in settings if of_kept.get(name, settings[name]) != settings[name]]
                told += [f"{name} was of other settings before; another name keeps both" for name in other]
                return [f"{path.name}: {each}" for each in told]
        except ConfigError:  # another evaluation of the run ends at the same moment
            if not again:
                raise
            time.sleep(0.1)
    raise AssertionError("the last try returns or raises")
