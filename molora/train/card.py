"""The card of a run: what was trained on what, for how long and with which result, as card.json and card.md."""

import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from molora.checkpoint.format import FORMAT_VERSION
from molora.checkpoint.modality_folder import read_about
from molora.config import build, dump, plain
from molora.data.formats.folders import files_below
from molora.data.sources import EncodedSamples, Source, SourceConfig
from molora.model.molora import MoLoRA
from molora.received import file_hash, read_json
from molora.storage import write_json, write_text
from molora.train.optim import count, matches
from molora.train.phases import PHASES
from molora.train.recipe import Recipe, StageConfig
from molora.train.resume import Best
from molora.train.step import source_of

# Files of a source are hashed whole up to so many bytes in all, which takes seconds; larger ones by names and sizes.
HASHED_BYTES = 2**30
_LISTED_FILES = 100
# Options of sources whose values are files or folders.
_FILE_KEYS = ("path", "paths", "file", "files", "folder", "manifest", "questions", "annotations")
_LIBRARIES = ("molora", "torch", "transformers", "peft", "accelerate", "safetensors")


@dataclass
class Totals:
    """What a stage has seen and spent: steps that were counted, samples, samples left out and target tokens by source,
    seconds by phase; and what its sources are."""

    steps: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], ids: Sequence[str], skipped: Sequence[str]) -> None:
        """Counts a step by its row of the log, the ids of its samples, and those of samples that were left out."""
        self.steps += 1
        for counts, seen in ((self.samples, ids), (self.skipped, skipped)):
            for source, number in Counter(source_of(id) or "" for id in seen).items():
                counts[source] = counts.get(source, 0) + number
        for key, value in row.items():
            kind, _, name = key.partition("/")
            if kind == "source_targets":
                self.targets[name] = self.targets.get(name, 0) + value
            elif kind == "seconds" and name:
                self.spend(name, value)

    def spend(self, what: str, seconds: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + seconds

    def shares(self) -> str:
        """The seconds of the steps and what part of them each phase took, in words."""
        whole = sum(self.seconds.get(phase, 0.0) for phase in PHASES)
        taken = [f"{phase} {self.seconds.get(phase, 0.0) / max(whole, 1e-9):.0%}" for phase in PHASES]
        return f"{self.steps} steps in {whole:,.1f} s: {', '.join(taken)}"


def about_sources(stage: StageConfig, samples: EncodedSamples) -> dict[str, Any]:
    """What the sources of a stage are, by name."""
    opened = zip(samples.names, samples.sources, strict=True)
    return {name: about_source(stage.data[name], source) for name, source in opened}


def about_source(config: SourceConfig, source: Source | None = None) -> dict[str, Any]:
    """What a source is: its kind and options, its rows, the licence that the recipe or the source itself states, and a
    hash. If its `provenance` does not tell its files, they are those that its options name. Media that the rows name
    are not hashed."""
    told: Mapping[str, Any] = source.provenance() if source is not None and hasattr(source, "provenance") else {}  # pyright: ignore[reportAttributeAccessIssue]
    files = [Path(path) for path in told.get("files", _files(plain(config.options)))]
    return {
        **{key: value for key, value in plain(config).items() if key != "licence"},
        "licence": config.licence or told.get("licence"),
        "fingerprint": told.get("fingerprint"),
        **({} if source is None else {"rows": len(source)}),
        **_hashed(files),
    }


def _files(options: Any, key: str = "") -> Iterator[Path]:
    """The files that options name, under keys that say so; those in a folder as `files_below` finds them."""
    items = options.items() if isinstance(options, Mapping) else ((key, each) for each in options)
    for name, value in items:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _files(value, name)
        elif isinstance(value, str) and name in _FILE_KEYS:
            for path in map(Path, sorted(glob.glob(os.path.expanduser(value))) or [os.path.expanduser(value)]):
                inside = [path / each for each in files_below(path)] if path.is_dir() else [path]
                yield from (each for each in inside if each.is_file())


def _hashed(files: Sequence[Path]) -> dict[str, Any]:
    """Files with their sizes and hashes, and one hash of all: of one file its own, of several that of the lines
    `<hash or nothing> <bytes> <path>`."""
    if not files:
        return {"files": [], "bytes": 0, "sha256": None, "hashed": None}
    sizes = [path.stat().st_size for path in files]
    whole = sum(sizes) <= HASHED_BYTES
    hashes = [file_hash(path) if whole else None for path in files]
    entries = [
        {"path": str(path), "bytes": size, "sha256": sha256}
        for path, size, sha256 in zip(files, sizes, hashes, strict=True)
    ]
    lines = "\n".join(f"{each['sha256'] or ''} {each['bytes']} {each['path']}" for each in entries)
    of_all = hashes[0] if len(files) == 1 and whole else hashlib.sha256(lines.encode()).hexdigest()
    hashed = "content" if whole else "names and sizes"
    return {"files": entries[:_LISTED_FILES], "bytes": sum(sizes), "sha256": of_all, "hashed": hashed}


def read_so_far(about: Mapping[str, Any], state: Path, totals: Sequence[Totals]) -> tuple[Best | None, list[Totals]]:
    """The best evaluation and the totals of the stages in a state; new `totals` where an older one has none. Raises
    ConfigError for a state that is damaged."""
    best = about.get("best") and build(Best, about["best"], f"{state}: best")
    found = [build(Totals, each, f"{state}: totals") for each in about.get("totals", [])]
    return best, [*found[: len(totals)], *totals[len(found) :]]


def is_of(run: Path, steps: int) -> bool:
    """Whether the card in a run folder tells of so many steps."""
    path = run / "card.json"
    return path.is_file() and read_json(path).get("steps") == steps


def write_card(
    recipe: Recipe,
    model: MoLoRA,
    steps_done: int,
    stages: Sequence[tuple[StageConfig, int, Totals]],
    best: Best | None,
    environment: Mapping[str, Any],
) -> None:
    """Writes the card of a run, whose `stages` have so many steps and totals."""
    facts = _facts(recipe, model, steps_done, stages, best, environment)
    run = Path(recipe.run)
    write_text(run / "card.md", _template().render(facts, recipe=dump(recipe).strip()))
    write_json(run / "card.json", facts)


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    page = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    page.filters["cell"] = lambda value: " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
    return page.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))


def _facts(
    recipe: Recipe,
    model: MoLoRA,
    steps_done: int,
    stages: Sequence[tuple[StageConfig, int, Totals]],
    best: Best | None,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    backbone = model.backbone
    began = [stage for stage in stages if stage[2].steps]
    return {
        "format_version": FORMAT_VERSION,
        "run": recipe.run,
        "steps": steps_done,
        "planned_steps": sum(steps for _, steps, _ in stages),
        "command": _command(recipe),
        "backbone": {
            **{key: value for key, value in asdict(backbone.identity).items() if key != "settings"},
            "parameters": model.num_backbone_parameters(),
            "dtype": str(backbone.model.dtype).removeprefix("torch."),
            "revision": backbone.revision,
        },
        "modalities": {name: _about_modality(recipe, model, name) for name in recipe.modalities},
        "router": plain(recipe.router),
        "stages": [_about_stage(model, *stage) for stage in began],
        "evaluations": _results(recipe),
        "best": best and recipe.keep_best and {**asdict(recipe.keep_best), **asdict(best)},
        "seed": recipe.seed,
        "environment": {**environment, **_machine(model.device)},
        "recipe": plain(recipe),
    }


def _about_modality(recipe: Recipe, model: MoLoRA, name: str) -> dict[str, Any]:
    """A modality, and the folder that it was taken over from, if it was, with the hash of its modality.json."""
    config = recipe.modalities[name]
    parts = {part: count(values.values()) for part, values in model.parts().items() if name in part.split(".")[1:2]}
    parent = None
    if config.path is not None:
        path = Path(config.path) / "modality.json"
        parent = {"path": config.path, "sha256": file_hash(path), "plugin": read_about(Path(config.path))["plugin"]}
    plugin = config.plugin if parent is None else parent["plugin"]
    return {"plugin": plugin, "taken_from": parent, "parameters": parts}


def _about_stage(model: MoLoRA, stage: StageConfig, steps: int, totals: Totals) -> dict[str, Any]:
    trained = {
        part: sum(
            p.numel() for key, p in values.items() if any(matches(pattern, f"{part}.{key}") for pattern in stage.train)
        )
        for part, values in model.parts().items()
    }
    sources = {}
    for name, about in totals.data.items():
        seen, rows = totals.samples.get(name, 0), about["rows"]
        skipped, targets = totals.skipped.get(name, 0), totals.targets.get(name, 0)
        times = (seen + skipped) / rows
        sources[name] = {**about, "samples": seen, "skipped": skipped, "target_tokens": targets, "times": times}
    return {
        "name": stage.name,
        "steps": steps,
        "counted_steps": totals.steps,
        "epochs": stage.epochs or None,
        "samples_per_step": stage.samples_per_step,
        "trained": {part: number for part, number in trained.items() if number},
        "sources": sources,
        "seconds": totals.seconds,
    }


def _results(recipe: Recipe) -> dict[str, Any]:
    """The last figures of each evaluation, from the log, with the step they are of and the data that gave them."""
    found: dict[str, Any] = {}
    for line in (Path(recipe.run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, config in recipe.evaluations.items() if "samples" not in row else ():
            scores = {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}
            if scores:
                found[name] = {"step": row["step"], "scores": scores, "data": config.data}
    return {name: {**result, "data": about_source(result["data"])} for name, result in found.items()}


def _machine(device: torch.device) -> dict[str, Any]:
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "platform": platform.platform(terse=True),
        "cpu": _cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": cuda and cuda.name,
        "gpu_memory_gib": cuda and round(cuda.total_memory / 2**30, 1),
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)},
    }


def _cpu() -> str:
    """What the processor is called, on Linux; else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _command(recipe: Recipe) -> str:
    """The command as it was given or, from Python, one that does the same."""
    program = Path(sys.argv[0]).name
    if program in ("molora", "__main__.py") and sys.argv[1:2] == ["train"]:
        return shlex.join(["molora", *sys.argv[1:]])
    return shlex.join(["molora", "train", str(Path(recipe.run) / "config.yaml")])
