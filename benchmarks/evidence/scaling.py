"""Figures against the number of training rows, beside a linear probe of the same frames and rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.evidence.page import Results, save_figure, table
from benchmarks.evidence.probe import probe_frames
from benchmarks.evidence.work import Arm, Work

TITLE = "Scaling: figures against the number of training rows"
QUESTION = """\
How much data does a new sense take? Each model makes as many updates, on the first rows of its task, and only the
number of these rows differs. A linear probe of the same frozen frames learns the same rows."""
ROWS = {"pictures": (100, 400, 1600), "digits": (50, 200, 800)}
DATA = tuple(ROWS)
RECIPES = DATA
STEPS, SAMPLES, QUESTIONS = 100, 16, 300
BUDGET = {
    "updates of each model": STEPS,
    "samples of each update": SAMPLES,
    "held-out questions": QUESTIONS,
}
NOT_SHOWN = (
    "What more updates give where rows are many: all models make as many, and see the 1,600 pictures once and the 800 "
    "clips twice.",
    "What the models answer without media; the pages on pictures and on sounds have that.",
    "The tasks' ends: sets are cut where a processor can follow, not where figures stop rising.",
)


def measure(work: Work) -> Iterator[Arm]:
    for task, counts in ROWS.items():
        recipe = work.recipe(task)
        (stage,) = recipe.stages
        ((name, source),) = stage.data.items()
        for count in counts:
            cut = replace(recipe, stages=[replace(stage, data={name: replace(source, limit=count)})])
            cut = work.asked(work.shortened(cut, steps=STEPS, samples=SAMPLES), QUESTIONS, ("as is",))
            yield work.trained(_arm(count), cut, f"{task}-{count}")
            yield work.figure(_probe(count), partial(probe_frames, recipe=cut), f"probe-{task}-{count}")


def _arm(count: int) -> str:
    return f"{count} rows"


def _probe(count: int) -> str:
    return f"linear probe, {count} rows"


def sections(results: Results) -> Iterator[str]:
    for task, counts in ROWS.items():
        yield f"## {task}\n"
        rows = [
            (str(count), *(results.cell(arm, "exact_match", task) for arm in (_arm(count), _probe(count))))
            for count in counts
        ]
        majority = results.cell(_arm(counts[0]), "exact_match", task, "majority")
        yield table(("rows", "exact match", "linear probe"), [*rows, ("most frequent answer", majority, "")])


def draw(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(1, len(ROWS), figsize=(10, 3.5), layout="constrained", squeeze=False)
    for ax, (task, counts) in zip(axes[0], ROWS.items(), strict=True):
        for number, (label, arm_of) in enumerate((("molora", _arm), ("linear probe", _probe))):
            found = [(n, each) for n in counts for each in results.figures(arm_of(n), "exact_match", task)]
            values = [each.value for _, each in found]
            below = [each.value - (each.value if each.low is None else each.low) for _, each in found]
            above = [(each.value if each.high is None else each.high) - each.value for _, each in found]
            ax.errorbar(
                [n for n, _ in found], values, [below, above], fmt="o", color=f"C{number}", capsize=3, label=label
            )
            means = [results.mean(arm_of(n), "exact_match", task) for n in counts]
            ax.plot(counts, [float("nan") if mean is None else mean for mean in means], color=f"C{number}")
        ax.set_xscale("log")
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_xticks([], minor=True)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(f"{task}: training rows")
        ax.set_ylabel("exact match")
        ax.legend(fontsize="small")
    save_figure(figure, path)
