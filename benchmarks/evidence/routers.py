"""Which adapters a message with a picture and a spoken digit should run with: a table, a sum, and gates that learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.page import Results, bars, compared, table
from benchmarks.evidence.work import Arm, Work, combined
from molora.checkpoint.assembly import ModalityConfig, RouterConfig
from molora.data.sources import SourceConfig
from molora.train.optim import PartConfig
from molora.train.recipe import Recipe

TITLE = "Routers: two modalities in one message"
QUESTION = """\
A message holds a picture and a spoken digit, and both are asked for. Each modality learned alone before, with an
adapter of its own. Which adapters should such a message run with? A table names one of them, a sum takes both, and a
learned router reads gates from the message, one for all of it or one for each token. The same joint training goes to
each: the projectors, and the router where it learns; no adapter changes."""
PAIR = ("pictures", "digits")
BOTH = "pictures+digits"
DATA = (*PAIR, BOTH)
RECIPES = PAIR
STEPS, JOINT_STEPS, SAMPLES, QUESTIONS = 80, 60, 8, 150
LEARNED = {"modalities": list(PAIR), "rules": {BOTH: PAIR[0]}}
ROUTERS = {
    "table: the adapter of pictures": RouterConfig(options={"rules": {BOTH: PAIR[0]}}),
    "table: the adapter of digits": RouterConfig(options={"rules": {BOTH: PAIR[1]}}),
    "sum of both": RouterConfig(plugin="sum"),
    "learned, sample by sample": RouterConfig(plugin="learned", options={**LEARNED, "scope": "sample"}),
    "learned, token by token": RouterConfig(plugin="learned", options={**LEARNED, "scope": "token"}),
}
ARMS = {BOTH: tuple(ROUTERS)}
PROJECTOR, GATES = PartConfig(learning_rate=1e-3, warmup_steps=5), PartConfig(learning_rate=1e-2, warmup_steps=5)
BUDGET = {
    "updates of each modality alone": STEPS,
    "updates together": JOINT_STEPS,
    "samples of each update": SAMPLES,
    "held-out questions": QUESTIONS,
}
NOT_SHOWN = (
    "Natural messages: picture and digit have nothing to do with each other, and the answer is one word of each.",
    "What joint training of the adapters would give; then a modality alone would no longer be what it was.",
)


def measure(work: Work) -> Iterator[Arm]:
    alone = [
        work.asked(work.shortened(work.recipe(task), steps=STEPS, samples=SAMPLES), QUESTIONS, ("as is",))
        for task in PAIR
    ]
    for task, recipe in zip(PAIR, alone, strict=True):
        yield work.trained("alone", recipe, f"alone-{task}")
    for name, router in ROUTERS.items():
        yield work.trained(name, _joint(work, combined(alone), router))


def _joint(work: Work, recipe: Recipe, router: RouterConfig) -> Recipe:
    saved = {task: ModalityConfig(path=str(work.folder / f"alone-{task}/modalities/{task}")) for task in PAIR}
    train = {f"projectors.{task}": PROJECTOR for task in PAIR}
    if router.plugin == "learned":
        train["router"] = GATES
    rows = {split: _rows(work, split) for split in ("train", "val")}
    stage = replace(recipe.stages[0], name="both", train=train, data={"rows": rows["train"]})
    evaluation = replace(recipe.evaluations[PAIR[0]], max_new_tokens=10, media=["as is", "blank", "shuffled"])
    joint = replace(
        recipe,
        modalities=saved,
        router=router,
        stages=[stage],
        evaluations={BOTH: replace(evaluation, data=rows["val"])},
    )
    return work.asked(work.shortened(joint, steps=JOINT_STEPS, samples=SAMPLES), QUESTIONS)


def _rows(work: Work, split: str) -> SourceConfig:
    return SourceConfig(kind="messages", options={"path": str(work.data / BOTH / f"{split}.jsonl")})


def sections(results: Results) -> Iterator[str]:
    yield from compared(results, ARMS)
    yield "## Each alone\n"
    rows = [(task, results.cell("alone", "exact_match", task)) for task in PAIR]
    yield table(("what the adapters had learned", "exact match"), rows)


def draw(results: Results, path: Path) -> None:
    bars(results, ARMS, path)
