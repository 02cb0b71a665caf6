"""Open-vocabulary speech: sentences that nobody said before, in voices that nobody heard, written down."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.evidence.page import Results, bars, compared
from benchmarks.evidence.work import Arm, Work

TITLE = "Speech: sentences written down"
QUESTION = """\
Can a small Conformer that learns from scratch make a frozen language model write down what is said? It hears sentences
of children's stories, made by a speech synthesiser, on a processor. First its media tokens learn to be the embeddings
of the words, in phrases and then in sentences (`objective: words`), which runs no layer of the model; then the adapter
learns to write them down. It is asked sentences of other stories in other voices, the same with noise and rooms, and
speech that people read."""
DATA = ("speech",)
RECIPES = DATA
ARM = "words, then answers"
ARMS: dict[str, tuple[str, ...]] = dict.fromkeys(("held-out voices", "noise and rooms", "read speech"), (ARM,))
BUDGET: dict[str, int] = {}
METRICS = ("word_error_rate", "exact_match")
NOT_SHOWN = (
    "Speech of people: a synthesiser says the same word the same way in each of its voices, and nobody else does. The "
    "rate on read speech says how far that is.",
    "Rare words: those of children's stories are few.",
    "What more voices give: each sentence is spoken once, and new voices are understood far worse than those.",
    "A figure that nobody chose by: the last stage was added when 0.205 of the words were wrong.",
)


def measure(work: Work) -> Iterator[Arm]:
    yield work.trained(ARM, work.asked(work.recipe("speech")), "speech")


def sections(results: Results) -> Iterator[str]:
    yield from compared(results, ARMS, METRICS)


def draw(results: Results, path: Path) -> None:
    bars(results, ARMS, path, "word_error_rate")
