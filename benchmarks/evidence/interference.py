"""What a modality costs the others: adapters of their own, beside what people do today on the same data and budget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks.evidence.page import Results, save_figure, table
from benchmarks.evidence.text import Texts, answers_kept, equal_share, logits
from benchmarks.evidence.work import Arm, Figure, Found, Work, combined, file_hashes
from molora.checkpoint.assembly import ModalityConfig, RouterConfig
from molora.data.sources import open_source
from molora.inference.load import LoadedModel
from molora.train.optim import PartConfig
from molora.train.recipe import Recipe

TASKS = ("digits", "sounds", "pictures")
ANOTHER = "beats"
TITLE = "Interference: what a new sense costs the others"
QUESTION = """\
A frozen language model learns three tasks, each by a modality with an adapter of its own, and then a fourth. What
becomes of each task, and of text, when the others are installed, removed or trained? The same data and the same number
of updates go to what people do today: one LoRA for all tasks at once, one LoRA trained task after task, and separate
LoRAs merged into one."""
DATA = (*TASKS, ANOTHER)
RECIPES = DATA
# The budget of a task, the same in every arm.
STEPS, SAMPLES, ANOTHER_STEPS = 48, 8, 8
QUESTIONS = {"digits": 60, "sounds": 22, "pictures": 60}
PROJECTOR = PartConfig(learning_rate=1e-3, warmup_steps=5)
ADAPTER = PartConfig(learning_rate=5e-4, warmup_steps=5)
# The one adapter of the arms that share one is named after the first modality, as every adapter belongs to one.
SHARED = TASKS[0]
STORIES, ASKED, LOGITS = 16, 8, 8
BUDGET = {
    "updates of each task, in every arm": STEPS,
    "samples of each update": SAMPLES,
    "updates of the fourth task": ANOTHER_STEPS,
    "held-out questions": QUESTIONS,
    "stories of text": STORIES,
    "text questions": ASKED,
    "prompts of each task whose logits are compared": LOGITS,
}
NOT_SHOWN = (
    "How well a task can be learned: the budget is small, so that all arms fit on a processor; other pages have the "
    "figures of longer trainings.",
    "Cures for forgetting, such as replaying earlier rows or distilling; the arms are the plain ways.",
    "Larger models and ranks, and whether tasks that share an adapter help one another: intervals are too wide.",
    "Routers that learn: here the kind of input decides which adapter runs.",
)
ARMS = ("alone", "together", "after a fourth", "one shared LoRA", "one LoRA, task after task", "merged LoRAs")
OURS = ("together", "others removed", "after a fourth")


def measure(work: Work) -> Iterator[Arm]:
    return _Arms(work).run()


class _Arms:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.texts = Texts.of_work(work, STORIES, ASKED)
        self.recipes = {task: self._recipe(task, STEPS) for task in TASKS}

    def _recipe(self, task: str, steps: int) -> Recipe:
        recipe = self.work.shortened(self.work.recipe(task), steps=steps, samples=SAMPLES)
        stage = replace(
            recipe.stages[0],
            train={part: ADAPTER if part.startswith("adapters.") else PROJECTOR for part in recipe.stages[0].train},
        )
        return self.work.asked(replace(recipe, stages=[stage]), QUESTIONS.get(task), ("as is",))

    def folder(self, task: str) -> Path:
        return self.work.folder / f"alone-{task}" / "modalities" / task

    def run(self) -> Iterator[Arm]:
        arm = self.work.arm
        yield (stock := arm("stock transformers", self.stock))
        yield (alone := arm("alone", self.alone))
        yield arm("together", lambda: self.together(stock.found.kept, alone.found))
        yield arm("others removed", lambda: self.removed(alone.found.kept))
        yield arm("after a fourth", lambda: self.another(stock.found.kept, alone.found))
        yield arm("one shared LoRA", lambda: self.shared(stock.found.kept))
        yield arm("one LoRA, task after task", lambda: self.sequential(stock.found.kept))
        yield arm("merged LoRAs", lambda: self.merged(stock.found.kept))

    def stock(self) -> Found:
        figure, hashes, answers = self.texts.of_stock("stock transformers", self.work.backbone)
        return Found([figure], kept={"stories": hashes, "answers": answers})

    def alone(self) -> Found:
        figures, kept = [], {"logits": {}, "files": {}}
        for task, recipe in self.recipes.items():
            run = self.work.train(f"alone-{task}", recipe)
            figures += self.work.score("alone", recipe.evaluations, run)
            kept["logits"][task] = self.logits(self.work.load(self.folder(task)), task)
            kept["files"][task] = file_hashes(self.folder(task))
        return Found(figures, kept=kept)

    def together(self, stock: Mapping[str, Any], alone: Found) -> Found:
        folders = [self.folder(task) for task in TASKS]
        return self._compared("together", self.work.load(*folders), folders, stock, alone)

    def removed(self, alone: Mapping[str, Any]) -> Found:
        equal = {}
        for gone in TASKS:
            left = [task for task in TASKS if task != gone]
            loaded = self.work.load(*map(self.folder, left))
            found = [each for task in left for each in self.logits(loaded, task)]
            equal[gone] = equal_share(found, [each for task in left for each in alone["logits"][task]])
        return Found([], exact={"logits equal to alone, without": equal})

    def another(self, stock: Mapping[str, Any], alone: Found) -> Found:
        recipe = self._recipe(ANOTHER, ANOTHER_STEPS)
        saved = {task: ModalityConfig(path=str(self.folder(task))) for task in TASKS}
        run = self.work.train("another", replace(recipe, modalities={**saved, **recipe.modalities}))
        folders = [run / "modalities" / task for task in (*TASKS, ANOTHER)]
        found = self._compared("after a fourth", self.work.load(*folders), folders, stock, alone)
        now = {task: file_hashes(run / "modalities" / task) for task in TASKS}
        found.exact["files equal to alone"] = equal_share(list(now.items()), list(alone.kept["files"].items()))
        return found

    def _compared(
        self, arm: str, loaded: LoadedModel, folders: Sequence[Path], stock: Mapping[str, Any], alone: Found
    ) -> Found:
        """Figures of all tasks and of text, and how many of their logits and answers are what they were."""
        media = ("as is", "blank") if arm == "together" else ("as is",)
        recipe = self.work.asked(combined(self.recipes.values()), media=media)
        figures = self.work.score_together(arm, recipe.evaluations, loaded, folders)
        same = [figure for figure in figures if replace(figure, arm="alone") in alone.figures]
        figure, hashes, answers = self.texts.of_molora(arm, loaded)
        exact = {
            "figures equal to alone": f"{len(same)} of {len(alone.figures)}",
            "logits equal to alone": {
                task: equal_share(self.logits(loaded, task), alone.kept["logits"][task]) for task in TASKS
            },
            "texts with the logits of transformers": equal_share(hashes, stock["stories"]),
            "texts answered as by transformers": equal_share(answers, stock["answers"]),
        }
        return Found([*figures, figure, answers_kept(arm, answers, stock["answers"])], exact)

    @torch.no_grad()
    def logits(self, loaded: LoadedModel, task: str) -> list[str]:
        """The hash of the logits of each of some held-out prompts, alone in a pack."""
        source = open_source(self.recipes[task].evaluations[task].data, task)
        prompts = [source[row]["messages"][:-1] for row in range(min(2 if self.work.tiny else LOGITS, len(source)))]
        samples = [loaded.encode(prompt, str(number)) for number, prompt in enumerate(prompts)]
        return [hashlib.sha256(logits(loaded, sample).numpy().tobytes()).hexdigest() for sample in samples]

    def _one_adapter(self) -> Recipe:
        """All tasks in one recipe with one adapter; its stages train it and what each task has of its own."""
        recipe = combined(self.recipes.values())
        modalities = {
            name: config if name == SHARED else replace(config, adapter=None)
            for name, config in recipe.modalities.items()
        }
        stages = []
        for stage in recipe.stages:
            own = {part: how for part, how in stage.train.items() if not part.startswith("adapters.")}
            stages.append(replace(stage, train={**own, f"adapters.{SHARED}": ADAPTER}))
        rules = {task: SHARED for task in TASKS if task != SHARED}
        return replace(recipe, modalities=modalities, stages=stages, router=RouterConfig(options={"rules": rules}))

    def shared(self, stock: Mapping[str, Any]) -> Found:
        """One adapter on a mixture of all rows, an equal part of each task in its steps."""
        recipe = self._one_adapter()
        stage = replace(
            recipe.stages[0],
            name="mixture",
            steps=sum(stage.steps for stage in recipe.stages),
            train={part: how for stage in recipe.stages for part, how in stage.train.items()},
            data={stage.name: stage.data["rows"] for stage in recipe.stages},
        )
        run = self.work.train("shared", replace(recipe, stages=[stage]))
        figures = self.work.score("one shared LoRA", recipe.evaluations, run)
        return self._with_text("one shared LoRA", figures, stock, [run / "modalities" / SHARED])

    def sequential(self, stock: Mapping[str, Any]) -> Found:
        """One adapter, task after task, beginning with the one that the first task has alone; after each, the figures
        of those that it has learned by then."""
        recipe = self._one_adapter()
        saved = ModalityConfig(path=str(self.folder(SHARED)))
        recipe = replace(recipe, modalities={**recipe.modalities, SHARED: saved}, stages=recipe.stages[1:])
        arm, figures, run = "one LoRA, task after task", [], self.work.folder / "sequential"
        for number, stage in enumerate(recipe.stages, start=1):
            self.work.train(run.name, replace(recipe, stages=recipe.stages[:number]))
            name = arm if stage is recipe.stages[-1] else f"{arm}: after {stage.name}"
            learned = {task: recipe.evaluations[task] for task in TASKS[: number + 1]}
            figures += self.work.score(name, learned, run)
        return self._with_text(arm, figures, stock, [run / "modalities" / SHARED])

    def merged(self, stock: Mapping[str, Any]) -> Found:
        """The mean of the adapters, for every task."""
        folders = [self.folder(task) for task in TASKS]
        mean = dict.fromkeys(TASKS, 1 / len(TASKS))
        router = RouterConfig(plugin="sum", options={"weights": dict.fromkeys(TASKS, mean)})
        evaluations = combined(self.recipes.values()).evaluations
        loaded = self.work.load(*folders, router=router)
        figures = self.work.score_together("merged LoRAs", evaluations, loaded, folders)
        return self._with_text("merged LoRAs", figures, stock, folders)

    def _with_text(self, arm: str, figures: list[Figure], stock: Mapping[str, Any], folders: Sequence[Path]) -> Found:
        figure, answers = self.texts.of_adapters(arm, self.work.backbone, folders)
        return Found([*figures, figure, answers_kept(arm, answers, stock["answers"])])


def sections(results: Results) -> Iterator[str]:
    yield "## Exactly the same\n"
    yield (
        "Modalities were trained one by one (alone). Then all were installed, each in turn was removed, and a fourth "
        "was trained beside them. Counts are of what is the same to the bit, seed by seed.\n"
    )
    rows = []
    for arm in OURS:
        for key, values in results.exact(arm).items():
            rows.append((arm, key, "; ".join(map(_said, values))))
    yield table(("arm", "what", "the same"), rows)
    yield "## What each task gets right\n"
    yield (
        "Exact match on held-out rows. An answer to a text question is kept if all of its tokens are those that the "
        "bare backbone gives.\n"
    )
    headings = ("arm", *TASKS, "text: perplexity", "text: share of answers kept")
    rows = [(arm, *(results.cell(arm, "exact_match", task) for task in TASKS), *_text(results, arm)) for arm in ARMS]
    baselines = [
        (name, *(results.cell("together", "exact_match", task, media) for task in TASKS), "", "")
        for name, media in (("blank medium, together", "blank"), ("most frequent answer", "majority"))
    ]
    stock = ("stock transformers", *[""] * len(TASKS), *_text(results, "stock transformers"))
    yield table(headings, [*rows, *baselines, stock])
    shared, alone = ([results.mean(arm, "exact_match", task) for task in TASKS] for arm in (ARMS[3], ARMS[0]))
    above = sum(one > other for one, other in zip(shared, alone, strict=True) if one is not None and other is not None)
    yield f"The mean of one shared LoRA is above that of alone for {above} of {len(TASKS)} tasks.\n"
    yield "One LoRA, task after task: exact match of each task after each training.\n"
    steps = [
        (TASKS[0], "alone"),
        *((task, f"{ARMS[4]}: after {task}") for task in TASKS[1:-1]),
        (TASKS[-1], ARMS[4]),
    ]
    yield table(
        ("after", *TASKS),
        [
            (
                task,
                *(results.cell(arm, "exact_match", each) for each in TASKS[: number + 1]),
                *[""] * (len(TASKS) - 1 - number),
            )
            for number, (task, arm) in enumerate(steps)
        ],
    )


def _said(value: str | Mapping[str, str]) -> str:
    return value if isinstance(value, str) else ", ".join(f"{key} {each}" for key, each in value.items())


def _text(results: Results, arm: str) -> tuple[str, str]:
    figures = (("perplexity", 2), ("answers kept", 3))
    perplexity, kept = (results.cell(arm, name, "text", "none", digits=digits) for name, digits in figures)
    return perplexity, kept


def draw(results: Results, path: Path) -> None:
    """Exact match that each task loses beside what it has alone, by seed and as a mean, and the perplexity of text."""
    arms = ARMS[1:]
    places = np.arange(len(TASKS))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained")
    left.axhline(0, color="grey", linewidth=0.8)
    for number, arm in enumerate(arms):
        aside = places + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
        lost = []
        for place, task in zip(aside, TASKS, strict=True):
            sides = (results.figures(each, "exact_match", task) for each in ("alone", arm))
            by_seed = [before.value - now.value for before, now in zip(*sides, strict=False)]
            left.scatter([place] * len(by_seed), by_seed, 12, f"C{number}", alpha=0.5)
            lost.append(np.mean(by_seed) if by_seed else np.nan)
        left.scatter(aside, lost, 120, f"C{number}", marker="_", linewidths=3, label=arm)
        left.vlines(aside, 0, lost, f"C{number}", linewidth=2)
    left.set_xticks(places, TASKS)
    left.set_ylabel("exact match lost beside alone")
    left.legend(fontsize="small")
    bars = [results.mean(arm, "perplexity", "text", "none") for arm in ("stock transformers", *arms)]
    colours = ["grey", *(f"C{number}" for number in range(len(arms)))]
    right.barh(["stock", *arms], [np.nan if value is None else value for value in bars], color=colours)
    right.invert_yaxis()
    right.set_xlabel("perplexity of text")
    save_figure(figure, path)
