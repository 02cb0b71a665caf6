"""What every page does: arms trained by molora's recipes and scored by its evaluations, each kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import molora
from benchmarks.evidence import rows
from benchmarks.peers.measure import environment
from molora.checkpoint.assembly import RouterConfig
from molora.config import read
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.results import Place, Result, evaluate_model
from molora.inference.load import LoadedModel
from molora.storage import write_text
from molora.train.loop import train
from molora.train.recipe import Recipe

RECIPES = Path(__file__).parent / "recipes"
# What a tiny form of a page trains and asks.
TINY_STEPS, TINY_SAMPLES, TINY_QUESTIONS = 1, 2, 2


@dataclass(frozen=True)
class Figure:
    """A number of an arm: what it measures (`name`), on which task, and what was asked with (`media`: as is, blank,
    shuffled, or majority for the most frequent answer), with its 95 % interval and the number of questions."""

    arm: str
    name: str
    task: str
    value: float
    low: float | None = None
    high: float | None = None
    questions: int | None = None
    media: str = "as is"


@dataclass(frozen=True)
class Found:
    """What an arm found: figures, what has to be exactly so (`exact`), and what later arms compare with (`kept`).
    `updates` are the steps of each stage and the samples of a step."""

    figures: list[Figure]
    exact: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    updates: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """An arm with what it found, where, and the processor time that it took since it was last stopped."""

    name: str
    found: Found
    processor_seconds: float
    machine: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One seed of a page. Runs and arms are below `folder`, rows, weights and frames in `data`."""

    folder: Path
    data: Path
    data_root: Path
    backbone: Path
    seed: int
    tiny: bool

    def recipe(self, name: str) -> Recipe:
        """A recipe of `recipes/`, on the backbone and data of this work."""
        given = [f"data_root={self.data}", f"backbone.path={self.backbone}", f"seed={self.seed}"]
        recipe = read(Recipe, RECIPES / f"{name}.yaml", given)
        return self.shortened(recipe, steps=TINY_STEPS, samples=TINY_SAMPLES) if self.tiny else recipe

    def shortened(self, recipe: Recipe, *, steps: int, samples: int) -> Recipe:
        """The recipe with stages of so many steps and samples; in the tiny form, no more than that takes, and with the
        tiny tokenizer, whose tokens are letters and no pieces of words."""
        changes: dict[str, Any] = {"steps": steps, "samples_per_step": samples}
        if self.tiny:
            changes = {"steps": TINY_STEPS, "samples_per_step": TINY_SAMPLES, "vocabulary": None}
        return replace(recipe, stages=[replace(stage, **changes) for stage in recipe.stages])

    def asked(self, recipe: Recipe, questions: int | None = None, media: Sequence[str] | None = None) -> Recipe:
        """The recipe with evaluations of so many questions, each asked with each of `media`; None: as it says."""
        limit = TINY_QUESTIONS if self.tiny else questions
        return replace(
            recipe,
            evaluations={
                name: replace(
                    each,
                    media=each.media if media is None else list(media),
                    data=replace(each.data, limit=limit or each.data.limit),
                )
                for name, each in recipe.evaluations.items()
            },
        )

    def train(self, name: str, recipe: Recipe) -> Path:
        """The run of a recipe, which goes on if it was stopped. It is evaluated afterwards."""
        run = self.folder / name
        return train(replace(recipe, run=str(run), evaluations={}), show=False)

    def load(self, *folders: Path, router: RouterConfig | None = None) -> LoadedModel:
        """The backbone with modality folders."""
        return molora.load(self.backbone, list(folders), router=router, device="cpu")

    def score(self, arm: str, evaluations: Mapping[str, EvaluationConfig], run: Path) -> list[Figure]:
        """The figures of a run. Answers that are there already are not asked for again."""
        results = evaluate_model(partial(molora.load, run, device="cpu"), Place(str(run)), evaluations)
        return [figure for result in results for figure in figures_of(arm, result)]

    def score_together(
        self, arm: str, evaluations: Mapping[str, EvaluationConfig], loaded: LoadedModel, folders: Sequence[Path]
    ) -> list[Figure]:
        """The figures of the backbone with modality folders, as `loaded`; answers are kept as those of a run are."""
        place = Place(str(self.backbone), folders, predictions=self.folder / "predictions" / arm)
        return [
            figure
            for result in evaluate_model(lambda: loaded, place, evaluations)
            for figure in figures_of(arm, result)
        ]

    def score_in_memory(
        self, arm: str, evaluations: Mapping[str, EvaluationConfig], loaded: LoadedModel
    ) -> list[Figure]:
        """The figures of a model that lies in no folder, so that no answers are kept."""
        results = evaluate_model(lambda: loaded, Place(str(self.backbone)), evaluations)
        return [figure for result in results for figure in figures_of(arm, result)]

    def arm(self, name: str, make: Callable[[], Found]) -> Arm:
        """What an arm finds, from its file if it was there before."""
        path = self.folder / "arms" / f"{name}.json"
        if not path.is_file():
            print(f"{self.folder.parent.name}, seed {self.seed}: {name}", flush=True)
            begun = time.process_time()
            found = make()
            arm = Arm(name, found, round(time.process_time() - begun, 1), environment("cpu"))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(asdict(arm), indent=1))
        values = json.loads(path.read_text(encoding="utf-8"))
        figures = [Figure(**figure) for figure in values["found"]["figures"]]
        return Arm(**{**values, "found": Found(**{**values["found"], "figures": figures})})

    def trained(self, name: str, recipe: Recipe, key: str | None = None) -> Arm:
        """An arm that is a recipe, trained and evaluated; its file and run are named `key`, or as the arm is."""
        key = key or name.replace(" ", "-")

        def make() -> Found:
            run = self.train(key, recipe)
            return Found(self.score(name, recipe.evaluations, run), updates=updates(recipe))

        return self.arm(key, make)

    def figure(self, name: str, make: Callable[[str], Figure], key: str | None = None) -> Arm:
        """An arm that is one figure, which `make` makes of its name."""
        return self.arm(key or name.replace(" ", "-"), lambda: Found([make(name)]))


def updates(recipe: Recipe) -> dict[str, tuple[int, int]]:
    return {stage.name: (stage.steps, stage.samples_per_step) for stage in recipe.stages}


def figures_of(arm: str, result: Result) -> list[Figure]:
    """An evaluation's scores with their intervals, and what the most frequent answer would get."""
    task = result.beside or result.name
    media = str(result.config.asked_with[0])
    count = int(result.scores["questions"])
    if result.scores["failed"]:
        failed = f"{result.scores['failed']:.0f} of {len(result.judged)}"
        raise RuntimeError(
            f"{arm}: {failed} questions of {task} were not answered; their errors are in its predictions"
        )
    figures = []
    for metric in (name for name in result.scores if name not in ("questions", "failed", "cut_off")):
        low, high = result.intervals.get(metric, (None, None))
        figures.append(Figure(arm, metric, task, result.scores[metric], low, high, count, media))
        if metric in result.majority:
            figures.append(Figure(arm, metric, task, result.majority[metric], questions=count, media="majority"))
    return figures


def combined(recipes: Iterable[Recipe]) -> Recipe:
    """The modalities, stages and evaluations of several recipes in one."""
    recipes = list(recipes)
    return replace(
        recipes[0],
        modalities={name: config for recipe in recipes for name, config in recipe.modalities.items()},
        stages=[stage for recipe in recipes for stage in recipe.stages],
        evaluations={name: config for recipe in recipes for name, config in recipe.evaluations.items()},
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """Every file of a modality folder, by its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepared(data_root: Path, data: Path, tasks: list[str]) -> dict[str, Any]:
    """Writes what recipes read: rows of the tasks, and the public encoders. Returns what is known of the tasks."""
    data.mkdir(parents=True, exist_ok=True)
    rows.copy_encoders(data_root, data)
    return rows.prepare(data_root, data, tasks)
