"""Signals that nobody built into molora: heart beats, and strokes of a racket, by the plugins of examples/."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.evidence.page import Results, bars, compared
from benchmarks.evidence.probe import probe_values
from benchmarks.evidence.work import Arm, Work

TITLE = "Modalities from plugins: heart beats and strokes of a racket"
QUESTION = """\
Does a modality that a user writes work on a real language model? A plugin of a file (`examples/molora-signals`) gives
it series of numbers. Its small encoder, projector and adapter learn from scratch, together. Logistic regression on the
numbers themselves is the plain way."""
DATA = ("beats", "rackets")
RECIPES = DATA
PLAIN = "logistic regression on the samples"
ARMS = {"beats": ("plugin", PLAIN), "rackets": ("plugin", PLAIN)}
BUDGET: dict[str, int] = {}
NOT_SHOWN = (
    "Other people's hearts: all beats are of one patient, and rare kinds of beats have a handful of rows, so that the "
    "macro-F1 says little.",
    "The best that these signals allow: neither the encoder nor the regression was tuned.",
)


def measure(work: Work) -> Iterator[Arm]:
    for task in DATA:
        recipe = work.asked(work.recipe(task))
        yield work.trained("plugin", recipe, f"plugin-{task}")
        yield work.figure(PLAIN, partial(probe_values, recipe=recipe), f"regression-{task}")


def sections(results: Results) -> Iterator[str]:
    yield from compared(results, ARMS, ("exact_match", "macro_f1"))


def draw(results: Results, path: Path) -> None:
    bars(results, ARMS, path)
