"""Sounds and spoken digits through frozen public encoders, and through one that learns from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.evidence.page import Results, bars, compared
from benchmarks.evidence.probe import probe_frames
from benchmarks.evidence.work import Arm, Work

TITLE = "Sounds and spoken digits"
QUESTION = """\
How near does a frozen language model come to what a frozen encoder of sounds knows? It is asked what is heard, or which
digit is said, through a projector and an adapter that learn from 110 clips and from 1,500. A linear probe on the mean
frame of the same encoder and the same rows says what was to be had; a Conformer that learns from scratch, what a public
encoder is worth, and once more after it learned the words alone (`objective: words`)."""
DATA = ("sounds", "digits")
RECIPES = ("sounds", "digits", "conformer_digits", "conformer_words")
ARMS = {
    "sounds": ("frozen YAMNet", "linear probe of YAMNet"),
    "digits": (
        "frozen Keyword Transformer",
        "Conformer from scratch",
        "Conformer from scratch, words first",
        "linear probe of Keyword Transformer",
    ),
}
BUDGET: dict[str, int] = {}
NOT_SHOWN = (
    "Speakers that were never heard: all six speakers of the digits are in both splits.",
    "Sounds at large: 22 held-out clips leave an interval of some 30 points.",
    "What a public encoder is worth by itself: beside the frozen one twice as many updates were made as beside the one "
    "from scratch, and these were chosen when half as many had given 0.967.",
    "What a Conformer learns from more speech than this; the demo and its recipes train one for longer.",
)


def measure(work: Work) -> Iterator[Arm]:
    recipes = {name: work.asked(work.recipe(name)) for name in RECIPES}
    yield work.trained("frozen YAMNet", recipes["sounds"])
    yield work.figure("linear probe of YAMNet", partial(probe_frames, recipe=recipes["sounds"]))
    yield work.trained("frozen Keyword Transformer", recipes["digits"])
    yield work.figure("linear probe of Keyword Transformer", partial(probe_frames, recipe=recipes["digits"]))
    yield work.trained("Conformer from scratch", recipes["conformer_digits"])
    yield work.trained("Conformer from scratch, words first", recipes["conformer_words"], "conformer-words")


def sections(results: Results) -> Iterator[str]:
    yield from compared(results, ARMS)


def draw(results: Results, path: Path) -> None:
    bars(results, ARMS, path)
