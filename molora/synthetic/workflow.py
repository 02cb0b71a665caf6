"""Workflows: rows that models make, step by step, with where each comes from.

All that a workflow asks of models is kept in a file, and all else that its steps do depends on their rows and configs
alone. So a call that was stopped goes on by doing again what costs nothing, and ends with the same rows, in the same
order.
"""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from molora.config import ConfigError, build, did_you_mean, dump, plain, read, require
from molora.data.content import by_content
from molora.inference.answers import row_bytes
from molora.inference.load import load
from molora.interrupt import Stopped
from molora.plugins import find
from molora.seeding import seed_of
from molora.storage import hold, write_atomically, write_text
from molora.synthetic.kept import Kept, digest
from molora.synthetic.models import Model, ModelConfig, Opener, Prompt, Unanswered, open_models
from molora.synthetic.rows import FAULTY, UNANSWERED, DecodingConfig, Dropped, Reply, Request, Row, is_json
from molora.terminal import progress

# Of the ids of rows, and of columns that have the name of what every row has.
_OWN = ("id", "lineage")
# What models answered; a folder that has it is a workflow's.
_ANSWERS = "answers.jsonl"


@dataclass(kw_only=True)
class StepConfig:
    """A step: its `name`, its `kind`, a built-in name or a plugin, and its `options`. Its rows are those of the steps
    `after`, which come before it in the list; without `after`, of the one before it. Of several steps, all rows in
    their order, with the name of the step before each id."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    after: list[str] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w-]{0,63}", self.name):
            raise ConfigError(f"name: {self.name!r} is to name a file: give letters, digits, _ and -")


@dataclass(kw_only=True)
class WorkflowConfig:
    """A workflow that `molora make` runs. `output` is the folder that it writes: `rows.jsonl` has the rows of the last
    step, `steps/` those of every step, `dropped/` what each left out. `data_root` is for the workflow's own paths:
    `${data_root}/…`. `budget_tokens` is how many tokens its models may use, of prompts and answers, counting those of
    earlier calls."""

    output: str
    steps: list[StepConfig]
    models: dict[str, ModelConfig] = field(default_factory=dict)
    data_root: str | None = None
    seed: int = 0
    budget_tokens: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "budget_tokens")
        if not self.steps:
            raise ConfigError("steps: none; a workflow begins with one that reads rows, such as kind: table")
        for number, step in enumerate(self.steps):
            before = [each.name for each in self.steps[:number]]
            if step.name in before:
                raise ConfigError(f"steps.{number}.name: two steps are called {step.name!r}; rename one")
            if step.after == []:
                raise ConfigError(f"steps.{number}.after: names no step; name some, or leave it out for the one before")
            for name in step.after or ():
                if name not in before:
                    near = did_you_mean(name, before)
                    raise ConfigError(
                        f"steps.{number}.after: no step before it is called {name!r}; {near}".rstrip("; ")
                    )


@dataclass
class Done:
    """A step that was run: its rows, those that it left out, and what it asked of models."""

    config: StepConfig
    num_before: int
    rows: list[Row]
    dropped: list[Dropped]
    replies: list[Reply] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were left out for each reason, the most frequent first."""
        return dict(Counter(each.reason for each in self.dropped).most_common())

    @property
    def fault(self) -> str:
        """What the first row says of itself that a step or a model could do nothing with; where no row is left, the
        first row at all. Empty if there is none."""
        of_all = not self.rows
        for each in self.dropped:
            if of_all or each.reason.endswith((FAULTY, UNANSWERED)):
                where = f"row {each.row.id}: "
                return where + each.reason + (f": {each.detail.removeprefix(where)}" if each.detail else "")
        return ""


class OutOfBudget(ConfigError):
    """The next answer could take more tokens than the budget leaves."""


class Workflow:
    """The steps of a config, ready to run. Raises ConfigError, ImportError or ValueError for a step that cannot be
    found, has wrong options or asks a model that is not named; `where` is the config's file."""

    def __init__(self, config: WorkflowConfig, where: str, opener: Opener = load) -> None:
        self.config = config
        self.where = where
        self.folder = Path(config.output)
        try:
            self.models = open_models(config.models, opener)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        self.steps: list[Any] = []
        self.hashes: dict[str, str] = {}
        for number, step in enumerate(config.steps):
            self.steps.append(self._open(number, step))

    def run(self) -> list[Done]:
        """Runs all steps, and writes their rows. Raises OutOfBudget; what was answered is kept, and the same call with
        a larger budget goes on."""
        self._check_output()
        with hold(self.folder):
            self.kept = Kept(self.folder / _ANSWERS)
            for folder in ("steps", "dropped"):
                (self.folder / folder).mkdir(exist_ok=True)
            result = self.folder / "rows.jsonl"
            result.unlink(missing_ok=True)  # it is there when it is that of this config
            write_text(self.folder / "config.yaml", dump(self.config))
            done: dict[str, Done] = {}
            with progress() as bars, self._telling_how_to_go_on():
                for config, step in zip(self.config.steps, self.steps, strict=True):
                    done[config.name] = self._run(config, step, done, bars)
            self._sweep()
            last = done[self.config.steps[-1].name]
            write_atomically(result, lambda path: path.write_bytes(b"".join(self._lines(last))))
        return list(done.values())

    def _check_output(self) -> None:
        """Makes the folder. Raises ConfigError for one with files of somebody else, which could be written over."""
        self.folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        if others and _ANSWERS not in others:
            told = f"output {self.folder}: holds {others[0]}, and no {_ANSWERS} of a workflow"
            raise ConfigError(f"{self.where}: {told}; give a folder of its own")

    def _open(self, number: int, config: StepConfig) -> Any:
        where = f"{self.where}: steps.{number} ({config.name})"
        try:
            step_class: Any = find("step", config.kind).plugin
            options = build(step_class.config_type, config.options, "options")
            step = step_class(options)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        begins = getattr(step, "begins", False)
        if begins and config.after:
            raise ConfigError(f"{where}: a step that reads rows comes after none; leave `after` out")
        if not begins and number == 0:
            raise ConfigError(f"{where}: has no rows; begin with a step that reads some, such as kind: table")
        asked = list(getattr(step, "models", ()))
        for name in asked:
            if name not in self.models:
                near = did_you_mean(name, self.models)
                raise ConfigError(f"{where}: no model {name!r}; {near}models has {', '.join(self.models) or 'none'}")
            how = getattr(options, "decoding", None)
            try:
                self.models[name].check(how if isinstance(how, DecodingConfig) else DecodingConfig())
            except (OSError, ValueError) as error:
                raise ConfigError(f"{where}: model {name!r}: {error}") from error
        asks = {name: plain(self.config.models[name]) for name in asked}
        self.hashes[config.name] = digest(config.kind, plain(options), asks)[:12]
        return step

    def _run(self, config: StepConfig, step: Any, done: Mapping[str, Done], bars: Progress) -> Done:
        before = [] if getattr(step, "begins", False) else self._before(config, done)
        work = _Work(self, config.name, bars)
        found = Done(config, len(before), [], [], work.replies)
        with self._placed(config):
            for made in step.run(before, work):
                if isinstance(made, Dropped):
                    found.dropped.append(made)
                else:
                    found.rows.append(replace(made, place=f"{config.name}/{made.id}"))
            self._check(found)
            for folder, lines in {"steps": self._lines(found), "dropped": self._dropped_lines(found)}.items():
                data = b"".join(lines)
                path = self.folder / folder / f"{config.name}.jsonl"
                write_atomically(path, lambda temporary, data=data: temporary.write_bytes(data))
        return found

    @contextmanager
    def _placed(self, config: StepConfig) -> Iterator[None]:
        """Names the step in what it raises."""
        where = f"{self.where}: step {config.name}"
        try:
            yield
        except OutOfBudget as error:
            raise OutOfBudget(f"{where}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        except (ImportError, OSError):  # it says what to install, or which file
            raise
        except Exception as error:  # a plugin can fail in any way
            raise ConfigError(f"{where}: {type(error).__name__}: {error}; --debug shows where") from error

    def _before(self, config: StepConfig, done: Mapping[str, Done]) -> list[Row]:
        if config.after is None:
            return [*done.values()][-1].rows
        if len(config.after) == 1:
            return done[config.after[0]].rows
        return [replace(row, id=row.place) for name in config.after for row in done[name].rows]

    def _check(self, done: Done) -> None:
        """Raises ConfigError for rows whose ids or columns could not be told apart, and for what no file could hold."""
        seen: set[str] = set()
        for row in done.rows:
            if row.id in seen:
                raise ConfigError(f"two of its rows have the id {row.id!r}")
            seen.add(row.id)
            for name in _OWN:
                if name in row.columns:
                    told = f"row {row.id} has a column {name!r}, which every row has of its own"
                    raise ConfigError(f"{told}; give the column another name")
        for row in (*done.rows, *(each.row for each in done.dropped)):
            for name, value in row.columns.items():
                if not is_json(value):
                    told = (
                        f"row {row.id}: the column {name!r} holds NaN or an infinite number, which JSON does not have"
                    )
                    raise ConfigError(f"{told}; have the step drop the row, or write null")

    def _lines(self, done: Done) -> Iterator[bytes]:
        name = done.config.name
        for row in done.rows:
            lineage = {"step": name, "parents": [*row.parents], "config": self.hashes[name], "seed": self.config.seed}
            yield row_bytes({"id": row.id, **row.columns, "lineage": lineage})

    def _dropped_lines(self, done: Done) -> Iterator[bytes]:
        for dropped in done.dropped:
            row = dropped.row
            why = {"reason": dropped.reason, **({"detail": dropped.detail} if dropped.detail else {})}
            parents = [row.place] if row.place else [*row.parents]  # what no step made has no place
            yield row_bytes({"id": row.id, "dropped": why, **row.columns, "parents": parents})

    def _sweep(self) -> None:
        """Takes away the files of steps that the config does not have any more."""
        names = {f"{step.name}.jsonl" for step in self.config.steps}
        for folder in ("steps", "dropped"):
            for path in (self.folder / folder).glob("*.jsonl"):
                if path.name not in names:
                    path.unlink()

    @contextmanager
    def _telling_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as interrupt:
            told = f"stopped: what was answered is in {self.kept.path}; the same call goes on"
            raise Stopped(told, signal.SIGINT) from interrupt


class _Work:
    """What a workflow does for one of its steps."""

    def __init__(self, workflow: Workflow, name: str, bars: Progress) -> None:
        self.workflow = workflow
        self.name = name
        self.bars = bars
        self.replies: list[Reply] = []

    def seed_of(self, *key: int | str) -> int:
        return seed_of(self.workflow.config.seed, self.name, *key)

    def ask(self, model: str, requests: Sequence[Request], how: DecodingConfig) -> list[Reply]:
        """See `molora.synthetic.rows.Work`."""
        asked, seed, kept = self.workflow.models[model], self.workflow.config.seed, self.workflow.kept
        prompts = [(f"{self.name}/{row.id}/{number}", messages) for row, messages, number in requests]
        keys = [digest(asked.identity, plain(how), seed, id, by_content(messages)) for id, messages in prompts]
        replies: dict[str, Reply] = {key: Reply(**found) for key in keys if (found := kept.get(key))}
        bar = self.bars.add_task(self.name, total=len(keys), completed=len(replies), note=model)
        for start in range(0, len(keys), asked.per_round):
            places = [*range(start, min(start + asked.per_round, len(keys)))]
            while left := [place for place in places if keys[place] not in replies]:
                before = len(replies)
                try:
                    for given in self._answers(asked, [prompts[place] for place in left], how, bar):
                        found = {keys[left[number]]: reply for number, reply in given.items()}
                        if whole := {key: asdict(reply) for key, reply in found.items() if not reply.error}:
                            kept.keep(whole)
                        replies |= found
                except Unanswered as error:
                    row = requests[left[error.place]][0]
                    told = f"row {row.id}: {error}; what was answered is kept, and the same call goes on"
                    raise ValueError(told) from error
                if len(replies) == before:
                    raise self._out_of_budget()
        self.replies += [replies[key] for key in keys]
        return [replies[key] for key in keys]

    def _answers(
        self, asked: Model, prompts: Sequence[Prompt], how: DecodingConfig, bar: Any
    ) -> Iterator[dict[int, Reply]]:
        config = self.workflow.config
        room = None if config.budget_tokens is None else config.budget_tokens - self.workflow.kept.tokens
        return asked.answer(prompts, how, config.seed, room, lambda: self.bars.advance(bar))

    def _out_of_budget(self) -> OutOfBudget:
        used, budget = self.workflow.kept.tokens, self.workflow.config.budget_tokens
        return OutOfBudget(
            f"{used:,} of {budget:,} tokens (budget_tokens) are used, and the next answer may take more than are left; "
            "the same call with a larger budget goes on from there"
        )


def open_workflow(path: Path, overrides: Iterable[str] = (), opener: Opener = load) -> Workflow:
    """Reads the config of a workflow, and opens its steps. Raises what `Workflow` and `read` raise."""
    return Workflow(read(WorkflowConfig, path, overrides), str(path), opener)
