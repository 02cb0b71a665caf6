"""A page of docs/results: its JSON, which seeds are added to, and the page and figure that are drawn from the JSON."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import matplotlib.pyplot as plt

from benchmarks.evidence.work import Arm, Figure, Work, prepared
from molora.model.identity import weights_hash
from molora.storage import write_text

FORMAT_VERSION = "1.0"
HOME = Path(__file__).parents[2] / "docs/results"
COMMAND = "python -m benchmarks.evidence {page} --data-root DATA --backbone FOLDER --seeds {seeds}"


class Driver(Protocol):
    """A module that measures a page and says what its numbers mean. `BUDGET` are the numbers that its text names."""

    @property
    def TITLE(self) -> str: ...
    @property
    def QUESTION(self) -> str: ...
    @property
    def DATA(self) -> Sequence[str]: ...
    @property
    def RECIPES(self) -> Sequence[str]: ...
    @property
    def BUDGET(self) -> Mapping[str, Any]: ...
    @property
    def NOT_SHOWN(self) -> Sequence[str]: ...
    def measure(self, work: Work) -> Iterator[Arm]: ...

    def sections(self, results: Results) -> Iterator[str]: ...

    def draw(self, results: Results, path: Path) -> None: ...


class Results:
    """What the JSON of a page says."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.seeds = sorted(values["seeds"], key=int)

    def figures(self, arm: str, name: str, task: str, media: str = "as is") -> list[Figure]:
        """A figure of every seed that has it."""
        wanted = {"arm": arm, "name": name, "task": task, "media": media}
        return [
            Figure(**figure)
            for seed in self.seeds
            for each in self.values["seeds"][seed]["arms"]
            for figure in each["figures"]
            if wanted.items() <= figure.items()
        ]

    def mean(self, *wanted: str) -> float | None:
        """The mean of a figure over seeds; None where there is none."""
        found = self.figures(*wanted)
        return statistics.mean(figure.value for figure in found) if found else None

    def cell(self, *wanted: str, digits: int = 3) -> str:
        """A figure as a cell of a table: of one seed with its interval, of several their mean with the lowest and the
        highest end of their intervals."""
        found = self.figures(*wanted)
        if not found:
            return ""
        lows, highs = ([getattr(figure, end) for figure in found if getattr(figure, end) is not None] for end in _ENDS)
        value = f"{statistics.mean(figure.value for figure in found):.{digits}f}"
        return f"{value} ({min(lows):.{digits}f} to {max(highs):.{digits}f})" if lows else value

    def questions(self, *wanted: str) -> str:
        """How many questions a figure is of, in each seed."""
        counts = {figure.questions for figure in self.figures(*wanted) if figure.questions is not None}
        return ", ".join(map(str, sorted(counts)))

    def updates(self, arm: str, task: str) -> str:
        """The updates of an arm of a task and the samples of each, as one seed had them."""
        for each in self.values["seeds"][self.seeds[0]]["arms"]:
            if any(figure["arm"] == arm and figure["task"] == task for figure in each["figures"]):
                return ", ".join(f"{steps} x {samples}" for steps, samples in each["updates"].values())
        return ""

    def exact(self, arm: str) -> dict[str, list[Any]]:
        """What had to be exactly so in an arm, seed by seed."""
        found: dict[str, list[Any]] = {}
        for seed in self.seeds:
            for each in self.values["seeds"][seed]["arms"]:
                for key, value in each["exact"].items() if each["name"] == arm else ():
                    found.setdefault(key, []).append(value)
        return found


_ENDS = ("low", "high")
_ONE_SEED = (
    "What another training gives: all figures are of one seed. By the three of [interference](interference.md) "
    "trainings can differ by more than an interval is wide."
)
_OF_SEEDS = (
    " Values are means of seeds, with the lowest and the highest end of the seeds' intervals, which together are wider "
    "than an interval of 95 %."
)
# How the page calls what is asked without the medium.
BLIND = {
    "blank media": "blank",
    "media of other rows": "shuffled",
    "most frequent answer": "majority",
}


def measure(
    name: str, driver: Driver, seed: int, data_root: Path, backbone: Path, folder: Path, out: Path, *, tiny: bool
) -> None:
    """Measures one seed of a page, and puts each of its arms into the page's JSON when it is there."""
    about = prepared(data_root, folder / "data", list(driver.DATA))
    work = Work(folder / name / f"seed-{seed}", folder / "data", data_root, backbone, seed, tiny)
    path = out / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"seeds": {}}
    arms: list[dict[str, Any]] = []
    seeds = {**known["seeds"], str(seed): {"arms": arms}}
    values = {
        "format_version": FORMAT_VERSION,
        "page": name,
        "command": COMMAND.format(page=name, seeds=" ".join(sorted(seeds, key=int))),
        "backbone": {"name": "SmolLM2-135M-Instruct, fp32", "weights": weights_hash(backbone)},
        "data": about,
        "budget": json.loads(json.dumps(driver.BUDGET)),
        "seeds": dict(sorted(seeds.items(), key=lambda item: int(item[0]))),
    }
    for key in ("backbone", "data", "budget"):
        if key in known and known[key] != values[key]:
            told = f"its seeds were measured with another {key}: {known[key]}, now {values[key]}"
            raise ValueError(f"{path}: {told}; take the file and its runs away to begin anew")
    out.mkdir(parents=True, exist_ok=True)
    for arm in driver.measure(work):
        arms.append(_kept(arm))
        write_text(path, json.dumps(values, indent=1) + "\n")


def _kept(arm: Arm) -> dict[str, Any]:
    found = {key: value for key, value in asdict(arm.found).items() if key != "kept"}
    return {"name": arm.name, "processor_seconds": arm.processor_seconds, "machine": arm.machine, **found}


def write(name: str, driver: Driver, out: Path) -> Path:
    """Draws the page and its figure from the JSON."""
    values = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    results = Results(values)
    driver.draw(results, out / f"{name}.svg")
    write_text(page := out / f"{name}.md", "\n".join(_page(name, driver, results)))
    return page


def _page(name: str, driver: Driver, results: Results) -> Iterator[str]:
    values = results.values
    yield f"# {driver.TITLE}\n"
    yield f"<!-- Written by benchmarks.evidence from {name}.json. -->\n"
    yield f"{driver.QUESTION}\n"
    yield from driver.sections(results)
    yield f"![{driver.TITLE}]({name}.svg)\n"
    yield "## What this does not show\n"
    not_shown = [*driver.NOT_SHOWN, _ONE_SEED] if len(results.seeds) == 1 else driver.NOT_SHOWN
    yield "\n".join(f"- {line}" for line in not_shown) + "\n"
    yield "## How it was made\n"
    yield f"```\n{values['command']}\n```\n"
    recipes = ", ".join(f"`{recipe}.yaml`" for recipe in driver.RECIPES)
    yield f"Recipes in `benchmarks/evidence/recipes`: {recipes}. The backbone is {values['backbone']['name']}.\n"
    if values["budget"]:
        yield table(("budget", ""), [(key, _counts(value)) for key, value in values["budget"].items()])
    yield table(
        ("task", "data", "rows to train on", "held out"),
        [
            (task, about["about"], str(about["rows"]["train"]), str(about["rows"]["val"]))
            for task, about in values["data"].items()
        ],
    )
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for seed in results.seeds:
        for arm in values["seeds"][seed]["arms"]:
            machine = arm["machine"]
            said = f"{machine['processor']}, {machine['threads']} thread; torch {machine['torch']}"
            seconds[seed, said] += arm["processor_seconds"]
    yield table(
        ("seed", "minutes of processor time, without what came before a stop", "machine"),
        [(seed, f"{taken / 60:.0f}", said) for (seed, said), taken in seconds.items()],
    )
    of_seeds = _OF_SEEDS * (len(results.seeds) > 1)
    yield f"Numbers, file hashes and versions are in [{name}.json]({name}.json). Intervals are of 95 %, over the"
    yield f"questions of a seed, and say nothing of another training.{of_seeds}"
    yield ""


def _counts(value: Any) -> str:
    return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)


def compared(
    results: Results, arms: Mapping[str, Sequence[str]], metrics: Sequence[str] = ("exact_match",)
) -> Iterator[str]:
    """For each task, a table of its arms, with their updates and what they give without the medium."""
    for task, names in arms.items():
        yield f"## {task}\n"
        headings = ["arm", "updates x samples", "questions", *(metric.replace("_", " ") for metric in metrics)]
        rows = [
            (
                arm,
                results.updates(arm, task),
                results.questions(arm, metrics[0], task),
                *(results.cell(arm, metric, task) for metric in metrics),
            )
            for arm in names
        ]
        for said, media in BLIND.items():
            for arm in names:
                cells = [results.cell(arm, metric, task, media) for metric in metrics]
                told = said if media == "majority" else f"{arm}, {said}"
                row = (told, "", results.questions(arm, metrics[-1], task, media), *cells)
                if any(cells) and row not in rows:
                    rows.append(row)
        yield table(headings, rows)


def bars(results: Results, arms: Mapping[str, Sequence[str]], path: Path, metric: str = "exact_match") -> None:
    """A metric of each task's arms with its interval; the most frequent answer, if it has a figure, as a line."""
    figure, axes = plt.subplots(1, len(arms), figsize=(5 * len(arms), 3), layout="constrained", squeeze=False)
    shown = [found for task, names in arms.items() for arm in names for found in results.figures(arm, metric, task)]
    highest = max(
        [1.0, *(found.value if found.high is None else found.high for found in shown)]
    )  # error rates end late
    for ax, (task, names) in zip(axes[0], arms.items(), strict=True):
        for place, arm in enumerate(names):
            seeds = results.figures(arm, metric, task)
            for number, found in enumerate(seeds):
                low, high = (found.value if end is None else end for end in (found.low, found.high))
                reach = [[found.value - low], [high - found.value]]
                beside = place + 0.2 * (number - (len(seeds) - 1) / 2)
                ax.errorbar(found.value, beside, xerr=reach, fmt="o", markersize=4, capsize=2, color="C0")
            if len(seeds) > 1:
                ax.plot(results.mean(arm, metric, task), place, "|", color="black", markersize=18)
        majority = results.figures(names[0], metric, task, "majority")[:1]
        for found in majority:
            ax.axvline(found.value, color="grey", linestyle=":")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.02 * highest)
        upright = "\nupright: mean of seeds" * (len(results.seeds) > 1)
        dotted = "\ndotted: most frequent answer" * bool(majority)
        ax.set_xlabel(f"{task}: {metric.replace('_', ' ')}{upright}{dotted}")
    save_figure(figure, path)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(lines) + "\n"


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure so that the same numbers give the same file."""
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
