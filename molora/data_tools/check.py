"""A recipe's data checked row by row, in parallel, and then across rows: copies, contradictions, leaks."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset

from molora.config import ConfigError
from molora.data.sources import Source, mixed_order, open_source
from molora.data_tools.faults import KINDS, Fault
from molora.data_tools.opening import Named, open_processor, sources_of
from molora.data_tools.rows import Examiner, Facts
from molora.interrupt import leave_interrupts_to_parent
from molora.seeding import seed_of
from molora.terminal import progress
from molora.train.recipe import Recipe, count_steps

# Rows that a worker takes at once. Media that they share are decoded once and kept until the last of them is done.
_ROWS_AT_ONCE = 16
# From fewer rows, starting workers takes longer than the work.
_ROWS_FOR_WORKERS = 256
# Fewer rows that ask or answer the same may be chance.
_ENOUGH_ROWS = 4


@dataclass
class Checked:
    """What was found of one source: how many rows there are and were read, and of those that can be used, the tokens of
    each and their sums by modality. Its stage makes so many `steps`, which take `rows_per_step` of it, and so many
    `epochs`."""

    named: Named
    num_rows: int = 0
    num_checked: int = 0
    lengths: list[int] = field(default_factory=list)
    tokens: Counter[str] = field(default_factory=Counter)
    num_targets: int = 0
    steps: int | None = None
    rows_per_step: float | None = None
    epochs: float | None = None


@dataclass
class Outcome:
    """The sources that were checked, evaluations first, and every fault."""

    sources: list[Checked]
    faults: list[Fault]

    @property
    def ok(self) -> bool:
        """Whether nothing would stop or spoil training."""
        return not any(fault.is_error for fault in self.faults)


def check(
    recipe: Recipe,
    *,
    limit: int | None = None,
    trust: Sequence[str] = (),
    workers: int | None = None,
    show: bool = True,
) -> Outcome:
    """Reads every row of every source that a recipe names, up to `limit` of each, decodes its media, and finds what
    would stop or spoil training. `workers` processes do it, by default one for each core.

    Raises ConfigError, ValueError or OSError for a recipe whose model cannot be opened, and ImportError for a library
    that its data need.
    """
    outcome = Outcome([], [])
    sources: list[tuple[Checked, Source]] = []
    for named in sources_of(recipe):
        checked = Checked(named)
        outcome.sources.append(checked)
        try:
            source = open_source(named.config, named.key)
            checked.num_rows = len(source)
            if not checked.num_rows:
                raise ConfigError(f"{named.key}: no rows")
        except (ValueError, OSError) as error:
            what = str(error).removeprefix(f"{named.key}: ")
            outcome.faults.append(Fault(kind="source", source=named.key, where=named.key, what=what))
            continue
        sources.append((checked, source))
    processor, _ = open_processor(recipe, trust)
    across = _Across(outcome)
    with progress(shown=show) as bars:
        for checked, facts in _examined(Examiner(processor), sources, limit, workers, bars):
            _count(checked, facts)
            outcome.faults += facts.faults
            across.add(checked.named, facts)
    across.close()
    _plan_stages(recipe, sources)
    order = {kind: index for index, kind in enumerate(KINDS)}
    outcome.faults.sort(key=lambda fault: (not fault.is_error, order[fault.kind]))
    return outcome


def _plan_stages(recipe: Recipe, sources: Sequence[tuple[Checked, Source]]) -> None:
    """How many rows of each source a step takes, in the mean over its stage, and how often the stage goes through it.
    Counted in the order that training takes; a stage of which a source does not open has none."""
    for stage in recipe.stages:
        of_stage = [(checked, source) for checked, source in sources if checked.named.stage is stage]
        if len(of_stage) < len(stage.data):
            continue
        order = mixed_order(
            stage.data.values(),
            [source for _, source in of_stage],
            stage.mixture,
            seed=seed_of(recipe.seed, stage.name),
            samples_per_step=stage.samples_per_step,
            mean_tokens=[fmean(checked.lengths or [1.0]) for checked, _ in of_stage]
            if stage.mixture.weights_of == "tokens"
            else (),
        )
        num_rows = dict(zip(stage.data, (checked.num_rows for checked, _ in of_stage), strict=True))
        steps = count_steps(stage, num_rows)
        counts = order.counts(steps * stage.samples_per_step)
        for (checked, _), count in zip(of_stage, counts, strict=True):
            checked.steps, checked.rows_per_step = steps, count / steps
            checked.epochs = count / checked.num_rows


def _count(checked: Checked, facts: Facts) -> None:
    checked.num_checked += 1
    if facts.tokens:
        checked.lengths.append(sum(facts.tokens.values()))
        checked.tokens.update(facts.tokens)
        checked.num_targets += facts.num_targets


@dataclass(eq=False)
class _Rows(Dataset[Any]):
    """Rows of all sources by (source, row), examined. An error that stops takes the place of the facts: a worker that
    raises one adds its traceback."""

    examiner: Examiner
    sources: Sequence[tuple[Checked, Source]]

    def __getitems__(self, places: list[tuple[int, int]]) -> list[tuple[int, Facts]] | ImportError:
        index = places[0][0]
        checked, source = self.sources[index]
        try:
            found = self.examiner.examine(checked.named, source, [row for _, row in places])
        except ImportError as error:
            return error
        return [(index, facts) for facts in found]


def _examined(
    examiner: Examiner,
    sources: Sequence[tuple[Checked, Source]],
    limit: int | None,
    workers: int | None,
    bars: Progress,
) -> Iterator[tuple[Checked, Facts]]:
    """The facts of every row, in order, with a bar for each source."""
    counts = [checked.num_rows if limit is None else min(limit, checked.num_rows) for checked, _ in sources]
    batches = (
        [(index, row) for row in range(start, min(start + _ROWS_AT_ONCE, count))]
        for index, count in enumerate(counts)
        for start in range(0, count, _ROWS_AT_ONCE)
    )
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sum(counts) >= _ROWS_FOR_WORKERS else 0
    loader = DataLoader(
        _Rows(examiner, sources),
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=leave_interrupts_to_parent,
        prefetch_factor=4 if workers else None,
    )
    names = [checked.named.key for checked, _ in sources]
    tasks = [bars.add_task(name, total=count, note="") for name, count in zip(names, counts, strict=True)]
    for found in loader:
        if isinstance(found, ImportError):
            raise found
        for index, facts in found:
            yield sources[index][0], facts
        bars.advance(tasks[found[0][0]], len(found))


def _as_it_is(found: Any) -> Any:
    return found


class _Across:
    """What is seen only across rows. Evaluations come before what trains."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        # By what an evaluation asks: the first row that does, and the answers that are expected of all that do.
        self.asked: dict[bytes, tuple[str, set[bytes | None]]] = {}
        self.shown: dict[bytes, str] = {}
        self.ids: dict[tuple[str, str], str] = {}
        self.rows: dict[tuple[str, bytes], str] = {}
        self.answered: dict[tuple[str, bytes], tuple[bytes, str]] = {}
        self.answers: dict[str, Counter[bytes]] = {}
        self.contradictions: dict[str, list[Fault]] = {}

    def add(self, named: Named, facts: Facts) -> None:
        """Compares a row with those before it."""
        key = named.key
        if facts.id is not None:
            first = self.ids.setdefault((key, facts.id), facts.where)
            if first != facts.where:
                self._add(named, facts, "repeated id", f"{facts.id!r:.60} is the id of {first} too")
        if facts.whole is None:
            return
        if named.evaluation is not None:
            for turn in facts.turns:
                self.asked.setdefault(turn, (facts.where, set()))[1].add(facts.answer)
            self.shown.update(dict.fromkeys(facts.media, facts.where))
        else:
            self._find_leaks(named, facts)
        if facts.answer is None:
            return
        self.answers.setdefault(key, Counter())[facts.answer] += 1
        same = self.rows.setdefault((key, facts.whole), facts.where)
        answer, where = self.answered.setdefault((key, facts.turns[-1]), (facts.answer, facts.where))
        if same != facts.where:
            self._add(named, facts, "repeated row", f"the same as {same}")
        elif answer != facts.answer:
            told = f"{where} asks the same, with another answer"
            self.contradictions.setdefault(key, []).append(_fault(named, facts, "contradiction", told))

    def close(self) -> None:
        """Finds what takes all rows of a source to be seen."""
        for key, answers in self.answers.items():
            num_rows, contradictions = answers.total(), self.contradictions.get(key, [])
            if len(answers) == 1 and num_rows >= _ENOUGH_ROWS:
                what = f"each of its {num_rows:,} rows has the same answer"
                self.outcome.faults.append(Fault(kind="same answer", source=key, where=key, what=what))
            if num_rows >= _ENOUGH_ROWS and 2 * len(contradictions) > num_rows:
                what = f"{len(contradictions):,} of its {num_rows:,} rows ask what a row before them asks"
                fault = Fault(kind="same prompt", source=key, where=key, what=what, is_error=False)
                self.outcome.faults.append(fault)
            else:
                self.outcome.faults += contradictions

    def _find_leaks(self, named: Named, facts: Facts) -> None:
        for turn in facts.turns:
            where, expected = self.asked.get(turn, ("", set()))
            # Where an evaluation asks one thing in several rows, as "tell a story", it is the answer that tells them.
            if where and (len(expected) == 1 or (turn == facts.turns[-1] and facts.answer in expected)):
                self._add(named, facts, "leak", f"{where} asks the same")
                return
        for medium in facts.media:
            if where := self.shown.get(medium):
                self._add(named, facts, "shared media", f"{where} shows the same")
                return

    def _add(self, named: Named, facts: Facts, kind: str, what: str) -> None:
        self.outcome.faults.append(_fault(named, facts, kind, what))


def _fault(named: Named, facts: Facts, kind: str, what: str) -> Fault:
    return Fault(
        kind=kind,
        source=named.key,
        where=facts.where,
        what=what,
        row=facts.row + 1,
        id=facts.id,
        is_error=KINDS[kind].is_error,
    )
