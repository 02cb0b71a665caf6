"""A batch job: the rows of any source answered by actors on a Ray cluster, into files that hold every row once.

Ray Data gives blocks of row numbers to the actors, and starts an actor that dies anew, with its block. A block's
answers become a file, whole or not at all, which is named by its rows: what is there is done, and a job that goes on
leaves it out.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.opening import locate, model_hashes, plan_model
from molora.checkpoint.pretrained import fetch
from molora.config import ConfigError, plain, require
from molora.convert.release import converted
from molora.data.content import by_content
from molora.data.sources import Source, SourceConfig, open_source
from molora.inference.answers import differences, row_bytes, told_answer
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import load
from molora.interrupt import Stopped
from molora.pack import Sample
from molora.process import WAITING
from molora.received import read_json
from molora.storage import hold, write_atomically, write_json
from molora.terminal import progress, warn

# What may change between two calls of a job: no answer depends on it.
_FREE = (
    *("output", "actors", "cpus_per_actor", "gpus_per_actor", "rows_per_block"),
    *("retry_failed", "allow_urls", "allow_private_addresses"),
)
_FREE_IN_GENERATION = ("max_running_samples", "prefill_tokens", "chunk_tokens", "kv_cache_gib")
# The environment variable that names a cluster.
_ADDRESS = "RAY_ADDRESS"
# Rows by which a job knows its rows again.
_COMPARED_ROWS = 100
# How often all rows of a block are tried together, and then one row, if whoever answers them dies over it.
_TRIES_TOGETHER = 2
_TRIES_OF_ROW = 2
# How often one after the other may die while it loads the model, before the job ends.
_TRIES_OF_LOADING = 3
_LOADING = "_tried-loading-*.json"
_FILE = re.compile(r"(\d{12})-(\d{12})")  # of the rows from the one number on, up to the other


@dataclass(kw_only=True)
class BatchConfig:
    """Rows to answer, the model, and the folder where answers go.

    `rows` is a source as a recipe has it; `model`, `modalities` and `router` are what `molora.load` takes. Relative
    paths start from the folder that the job is started in, and every machine sees the same files. Each of the `actors`
    loads the model, with `cpus_per_actor` threads, and with as much of a GPU as `gpus_per_actor` says. A block has
    `rows_per_block` rows, which are answered and written together: what a kill loses. For each Ray has a task. With
    `retry_failed`, rows that have an error from an earlier call are answered again, and those alone of their blocks.
    `allow_urls`: whether media may be fetched over HTTP; `allow_private_addresses`: from inside a network too."""

    model: str
    rows: SourceConfig
    output: str
    modalities: list[str] = field(default_factory=list)
    router: RouterConfig | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    deterministic_batch: bool = False
    format: Literal["parquet", "jsonl"] = "parquet"
    actors: int = 1
    cpus_per_actor: int = 1
    gpus_per_actor: float = 0.0
    rows_per_block: int = 256
    retry_failed: bool = False
    allow_urls: bool = False
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        require(self, 1, "actors", "cpus_per_actor", "rows_per_block")
        require(self, 0, "gpus_per_actor")


@dataclass(frozen=True)
class BatchDone:
    """What a job left in `folder`: so many rows, of which some have an error for an answer; the first of these."""

    folder: Path
    rows: int
    failed: int
    first_error: str | None


def answer_batch(config: BatchConfig, trust: Sequence[str] = ()) -> BatchDone:
    """Answers the rows that have no answer yet, with a bar. Ray starts here, or is the cluster that RAY_ADDRESS names.

    A row of the files has the row's number and id, what a row of `molora generate` tells of its answer, and an `error`,
    which is null but for a row that failed. Raises ConfigError or ValueError for rows or a model that cannot be opened,
    before anything is written, ConfigError for an output that cannot be made, has answers to other rows or of another
    model, or is in use; RuntimeError for an actor that fails and for files that were changed; Stopped after Ctrl-C."""
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
        import ray.exceptions  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"a batch job runs on Ray ({error}): pip install 'molora[ray]'") from error
    source = open_source(config.rows, "rows")
    total = len(source)
    if total == 0:
        raise ConfigError("rows: there are none; name rows to answer")
    _check_model(config, trust)
    output = Path(os.path.expanduser(config.output)).absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"output {output}: no folder can be made there ({error.strerror})"
        raise ConfigError(f"{told}; give a place that can be written") from error
    with hold(output):
        _keep_to_one_job(config, source, output / "_batch.json")
        for note in output.glob("_tried-*.json"):  # of a call that was stopped, which no row is to blame for
            note.unlink()
        left = list(_left(total, config.rows_per_block, output))
        if config.retry_failed:
            left += [range(*_rows_of(path)) for path in _files(output) if _has_errors(path)]
        with progress() as bars:
            num_left = sum(map(len, left))
            bar = bars.add_task("batch", total=total, completed=total - num_left, note="")
            try:
                for num_rows in _answered_blocks(config, output, trust, left) if left else ():
                    bars.advance(bar, num_rows)
            except KeyboardInterrupt as interrupt:
                num_done = total - sum(map(len, _left(total, config.rows_per_block, output)))
                told = f"stopped: {num_done} of {total} rows are done, in {output}"
                raise Stopped(f"{told}; the same call goes on with the others", signal.SIGINT) from interrupt
            except ray.exceptions.RayError as error:
                told = f"output {output}: an actor fails: {_told_by_ray(error)}; mend that"
                raise RuntimeError(f"{told}, and the same call goes on with the rows that are left") from error
        return _counted(output, total)


def _check_model(config: BatchConfig, trust: Sequence[str]) -> None:
    """Raises, as `load` does, for a model that no actor could open, as far as folders tell without weights."""
    plan = plan_model(converted(config.model), config.modalities, router=config.router, trust=trust)
    fetch(plan.backbone.path, plan.backbone.revision, weights=False)


def _answered_blocks(config: BatchConfig, output: Path, trust: Sequence[str], left: Sequence[range]) -> Iterator[int]:
    """Has blocks answered on Ray; yields the number of rows of each as it is done."""
    import pyarrow as pa
    import ray.data  # pyright: ignore[reportMissingImports]

    _start_quietly(ray)
    _check_machines(ray, config)
    blocks = [pa.table({"begin": [rows.start], "end": [rows.stop]}) for rows in left]
    answered = ray.data.from_arrow(blocks).map_batches(
        _Answering,
        fn_constructor_args=(config, output, trust, os.getcwd()),
        batch_size=1,  # each of one row, its block's; with GPUs Ray wants a number
        compute=ray.data.ActorPoolStrategy(size=config.actors),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        runtime_env={"env_vars": WAITING},
    )
    for done in answered.iter_batches(batch_size=None):
        yield int(np.sum(np.asarray(done["rows"])))


def _start_quietly(ray: Any) -> None:
    """Starts Ray, which tells nothing then but errors. Raises RuntimeError if it does not start."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.ERROR)
        except Exception as error:  # Ray has no kind of its own for it
            why = " ".join(str(error).split()).rstrip(".")
            if address := os.environ.get(_ADDRESS):
                told = f"{_ADDRESS} is {address!r}, and no cluster lets us in there: {why}; start one, or"
                raise RuntimeError(f"{told} set RAY_AUTH_MODE=token for one that asks for a token") from error
            raise RuntimeError(f"Ray does not start: {why}; the same call goes on from here, give it again") from error


def _check_machines(ray: Any, config: BatchConfig) -> None:
    """Raises ConfigError if no actor fits on this machine; warns if none does on those of a cluster, which may grow.
    Ray itself waits for ever."""
    wanted = {"CPU": config.cpus_per_actor, "GPU": config.gpus_per_actor}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(has.get(kind, 0) >= count for kind, count in wanted.items()) for has in machines):
        return
    most = {kind: max(has.get(kind, 0) for has in machines) for kind in wanted}
    told = f"cpus_per_actor is {wanted['CPU']} and gpus_per_actor {wanted['GPU']:g}"
    there = f"{most['CPU']:g} CPUs and {most['GPU']:g} GPUs at most"
    if os.environ.get(_ADDRESS):
        warn(f"{told}, and a machine of the cluster has {there}: the job waits until there is another")
    else:
        raise ConfigError(f"{told}, and this machine has {there}; give what it has")


def _told_by_ray(error: Exception) -> str:
    """What an actor raised, of the traceback that Ray makes a text of: what stands behind its last line of code."""
    lines = str(error).strip().splitlines()
    start = max((number + 1 for number, line in enumerate(lines) if line.startswith('  File "')), default=0)
    while start < len(lines) and lines[start].startswith("    "):
        start += 1
    return " ".join(" ".join(lines[start:]).split())


class _Answering:
    """An actor: it opens model and rows once."""

    def __init__(self, config: BatchConfig, output: Path, trust: Sequence[str], folder: str) -> None:
        os.chdir(folder)
        _note_loading(output, config.actors)
        self.config = config
        self.output = output
        self.source = open_source(config.rows, "rows")
        self.loaded = load(
            config.model,
            config.modalities,
            router=config.router,
            device=None if config.gpus_per_actor else "cpu",
            allow_urls=config.allow_urls,
            allow_private_addresses=config.allow_private_addresses,
            trust=trust,
            deterministic_batch=config.deterministic_batch,
        )
        for note in output.glob(_LOADING):
            note.unlink(missing_ok=True)

    def __call__(self, block: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[int]]:
        """Writes the answers to the rows of a block, but those that it has already; returns how many rows there are.

        A row may end the process, as when memory runs out. What is tried is noted beside the answers, so that the next
        process of this call finds the row, and leaves it with an error in the end."""
        rows = range(int(block["begin"][0]), int(block["end"][0]))
        path = self.output / f"{rows.start:012}-{rows.stop:012}.{self.config.format}"
        kept = _read(path).to_pylist() if path.exists() else []
        found = {row["row"]: row for row in kept if row["error"] is None}
        left = [number for number in rows if number not in found]
        note = self.output / f"_tried-{path.stem}.json"
        # Where a process died before: at all rows that were left (-1), or at one.
        died_at = read_json(note)["at"] if note.exists() else []
        together = len(died_at) < _TRIES_TOGETHER
        for some in [left] if together else [[number] for number in left]:
            if not together and died_at.count(some[0]) >= _TRIES_OF_ROW:
                told = f"the process died at this row, {_TRIES_OF_ROW} times, as when memory runs out"
                found[some[0]] = _blank(some[0]) | {"error": f"{told}; make its media smaller, or leave it out"}
                continue
            write_json(note, {"at": [*died_at, -1 if together else some[0]]})
            found |= self._answered(some)
        answers = [found[number] for number in rows]
        if self.config.format == "jsonl":
            write_atomically(path, lambda file: file.write_bytes(b"".join(map(row_bytes, answers))))
        else:
            from pyarrow import Table
            from pyarrow.parquet import write_table

            write_atomically(path, lambda file: write_table(Table.from_pylist(answers, schema=_schema()), file))
        note.unlink(missing_ok=True)
        return {"rows": [len(rows)]}

    def _answered(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """What is told of each row. Answers are drawn by the row's id, as `molora generate` draws them, so rows that
        have the same id are answered one after the other."""
        found = {number: _blank(number) for number in rows}
        left = rows
        while left:
            numbers: dict[str, int] = {}
            later: list[int] = []
            for answer in self.loaded.answers(
                self._samples(left, found, numbers, later), self.config.generation, keep_going=True
            ):
                told = {"error": _storable(answer.error)} if answer.error else told_answer(answer)
                found[numbers[answer.id]] |= told
            left = later
        return found

    def _samples(
        self, rows: Sequence[int], found: dict[int, dict[str, Any]], numbers: dict[str, int], later: list[int]
    ) -> Iterator[Sample]:
        """The rows as samples, with their `numbers` by id. What cannot be read has its error in what is `found`, and a
        row whose id is taken is one for `later`."""

        def sample(number: int) -> Sample | None:
            row = self.source[number]
            found[number]["id"] = _storable(row["id"])
            if numbers.setdefault(row["id"], number) != number:
                return None
            return self.loaded.encode(_prompt(row), row["id"])

        for number in rows:
            made = attempt(partial(sample, number), "")
            if made is None:
                later.append(number)
            elif isinstance(made, Failed):
                found[number]["error"] = _storable(made.error)
            else:
                yield made


def _note_loading(output: Path, actors: int) -> None:
    """Notes that an actor loads the model, until one has. Raises RuntimeError if others died over it: Ray would start
    them for ever."""
    before = len(list(output.glob(_LOADING)))
    if before >= actors - 1 + _TRIES_OF_LOADING:  # all other actors may be loading now
        told = f"the process died while it loaded the model, {_TRIES_OF_LOADING} times, as when memory runs out"
        raise RuntimeError(f"{told}; let fewer share a machine (more cpus_per_actor), or take a smaller model")
    write_json(output / _LOADING.replace("*", secrets.token_hex(8)), {})


def _prompt(row: Mapping[str, Any]) -> Sequence[Any]:
    """A row's conversation without the answer that rows to train on end with."""
    messages = row["messages"]
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _told_of_some(source: Source) -> str:
    """A hash of what some rows say and of what their media hold, evenly chosen."""

    def said(number: int) -> str:
        row = source[number]
        return repr([row["id"], by_content(row["messages"])])

    chosen = np.linspace(0, len(source) - 1, min(len(source), _COMPARED_ROWS)).astype(int).tolist()
    found = [attempt(partial(said, number), "") for number in chosen]
    texts = [f"{each.error}" if isinstance(each, Failed) else each for each in found]
    return hashlib.sha256("\n".join(texts).encode(errors="backslashreplace")).hexdigest()


def _blank(number: int) -> dict[str, Any]:
    """What is told of a row that has no answer yet."""
    return dict.fromkeys(_schema().names) | {"row": number}


def _storable(text: object) -> str:
    """A text as UTF-8, which has no halves of characters; JSON has."""
    return str(text).encode(errors="backslashreplace").decode()


def _schema() -> Any:
    import pyarrow as pa

    texts = [("id", pa.string()), ("answer", pa.string()), ("adapters", pa.list_(pa.string()))]
    counts = [("prompt_tokens", pa.int64()), ("answer_tokens", pa.int64())]
    return pa.schema([("row", pa.int64()), *texts, *counts, ("finished", pa.string()), ("error", pa.string())])


def _keep_to_one_job(config: BatchConfig, source: Source, path: Path) -> None:
    """Notes what is answered by which model; raises ConfigError if the output has answers to something else, or by
    another state of the model's parts that train, or of which nothing is known."""
    about = {key: value for key, value in plain(config).items() if key not in _FREE}
    about["generation"] = {
        key: about["generation"][key] for key in about["generation"] if key not in _FREE_IN_GENERATION
    }
    about["num_rows"] = len(source)
    about["some_rows"] = _told_of_some(source)
    about["weights"] = model_hashes(locate(converted(config.model), config.modalities))
    if not _files(path.parent):  # without answers it binds no one
        write_json(path, about)
    elif not path.is_file():
        raise ConfigError(
            f"output {path.parent}: has answers, and no {path.name} that says of what; give another folder"
        )
    elif differing := differences(read_json(path), about):
        raise ConfigError(
            f"output {path.parent}: has answers of another job: {'; '.join(differing)}; give another folder "
            f"(some_rows is a hash of what {_COMPARED_ROWS} rows say and show)"
        )


def _left(total: int, per_block: int, output: Path) -> Iterator[range]:
    """The rows without a file, in blocks."""
    begin = 0
    for begun, ended in [*map(_rows_of, _files(output)), (total, total)]:
        for first in range(begin, begun, per_block):
            yield range(first, min(first + per_block, begun))
        begin = ended


def _files(output: Path) -> list[Path]:
    return sorted(path for path in output.iterdir() if _FILE.fullmatch(path.stem))


def _rows_of(path: Path) -> tuple[int, int]:
    begin, end = map(int, path.stem.split("-"))
    return begin, end


def _has_errors(path: Path) -> bool:
    errors = _read(path, ["error"])["error"]
    return errors.null_count < len(errors)


def _read(path: Path, columns: list[str] | None = None) -> Any:
    """A file of answers as a table. Raises RuntimeError for one that is damaged."""
    from pyarrow import ArrowInvalid
    from pyarrow.dataset import dataset

    kind = {".jsonl": "json", ".parquet": "parquet"}[path.suffix]
    try:
        return dataset(str(path), schema=_schema(), format=kind).to_table(columns=columns)
    except ArrowInvalid as error:
        told = f"{path}: is damaged ({' '.join(str(error).split())})"
        raise RuntimeError(f"{told}; take it away, and the same call answers its rows again") from error


def _counted(output: Path, total: int) -> BatchDone:
    """What the files hold. Raises RuntimeError unless that is every row once."""
    ended, failed, first_error = 0, 0, None
    for path in _files(output):
        table, rows = _read(path, ["row", "error"]), range(*_rows_of(path))
        if rows.start != ended or table["row"].to_pylist() != list(rows):
            told = f"{path}: does not hold the rows from {ended} on up to {rows.stop - 1}, each once"
            raise RuntimeError(f"{told}: files were changed; take it away, and the same call answers what is missing")
        ended = rows.stop
        errors = table["error"].drop_null()
        failed += len(errors)
        first_error = first_error or (errors[0].as_py() if len(errors) else None)
    if ended != total:
        raise RuntimeError(f"{output}: rows from {ended} on have no file any more; the same call answers them")
    return BatchDone(output, total, failed, first_error)
