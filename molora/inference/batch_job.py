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
from molora.data.messages import parts
from molora.data.sources import Source, SourceConfig, open_source
from molora.inference.answers import row_bytes, told_answer
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import load
from molora.interrupt import Stopped
from molora.pack import Sample
from molora.process import WAITING
from molora.received import read_json
from molora.storage import hold, write_atomically, write_json
from molora.terminal import progress

# What may change between two calls of a job: no answer depends on it.
_FREE = ("output", "actors", "cpus_per_actor", "gpus_per_actor", "rows_per_block", "retry_failed")
_FREE_IN_GENERATION = ("max_running_samples", "prefill_tokens", "chunk_tokens", "kv_cache_gib")
# Rows by which a job knows its rows again.
_COMPARED_ROWS = 100
_FILE = re.compile(r"(\d{12})-(\d{12})")  # of the rows from the one number on, up to the other


@dataclass(kw_only=True)
class BatchConfig:
    """Rows to answer, the model, and the folder where answers go.

    `rows` is a source as a recipe has it; `model`, `modalities` and `router` are what `molora.load` takes. Relative
    paths start from the folder that the job is started in, and every machine sees the same files. Each of the `actors`
    loads the model, with `cpus_per_actor` threads, and with as much of a GPU as `gpus_per_actor` says. A block has
    `rows_per_block` rows, which are answered and written together: what a kill loses. For each Ray has a task. With
    `retry_failed`, rows that have an error from an earlier call are answered again, and those alone of their blocks."""

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
        _keep_to_one_job(config, source, output / "batch.json")
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
                why = str(error).strip().splitlines()[-1]  # the last line of the traceback that Ray makes a text of
                told = f"output {output}: an actor fails: {why}; mend that"
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
            raise RuntimeError(f"Ray does not start: {error} The same call goes on from here; give it again") from error


class _Answering:
    """An actor: it opens model and rows once."""

    def __init__(self, config: BatchConfig, output: Path, trust: Sequence[str], folder: str) -> None:
        os.chdir(folder)
        self.config = config
        self.output = output
        self.source = open_source(config.rows, "rows")
        self.loaded = load(
            config.model,
            config.modalities,
            router=config.router,
            device=None if config.gpus_per_actor else "cpu",
            trust=trust,
            deterministic_batch=config.deterministic_batch,
        )

    def __call__(self, block: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[int]]:
        """Writes the answers to the rows of a block, but those that it has already; returns how many rows there are."""
        rows = range(int(block["begin"][0]), int(block["end"][0]))
        path = self.output / f"{rows.start:012}-{rows.stop:012}.{self.config.format}"
        kept = _table([path]).to_table().to_pylist() if path.exists() else []
        answers = self._answered(rows, [row for row in kept if row["error"] is None])
        if self.config.format == "jsonl":
            write_atomically(path, lambda file: file.write_bytes(b"".join(map(row_bytes, answers))))
        else:
            from pyarrow import Table
            from pyarrow.parquet import write_table

            write_atomically(path, lambda file: write_table(Table.from_pylist(answers, schema=_schema()), file))
        return {"rows": [len(rows)]}

    def _answered(self, rows: range, done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is told of each row, of which some are done. Answers are drawn by the row's id, as `molora generate`
        draws them, so rows that have the same id are answered one after the other."""
        found = {number: dict.fromkeys(_schema().names) | {"row": number} for number in rows}
        found |= {row["row"]: row for row in done}
        left = sorted(set(rows) - {row["row"] for row in done})
        while left:
            numbers: dict[str, int] = {}
            later: list[int] = []
            for answer in self.loaded.answers(
                self._samples(left, found, numbers, later), self.config.generation, keep_going=True
            ):
                told = {"error": _storable(answer.error)} if answer.error else told_answer(answer)
                found[numbers[answer.id]] |= told
            left = later
        return list(found.values())

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


def _prompt(row: Mapping[str, Any]) -> Sequence[Any]:
    """A row's conversation without the answer that rows to train on end with."""
    messages = row["messages"]
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _told_of_some(source: Source) -> str:
    """A hash of what some rows say, evenly chosen, and of the names of their media."""

    def said(number: int) -> list[Any]:
        row = source[number]
        shown = [
            part.get("text") or part.get("path") or part.get("url") for each in row["messages"] for part in parts(each)
        ]
        return [row["id"], *(each if isinstance(each, str) else None for each in shown)]

    chosen = np.linspace(0, len(source) - 1, min(len(source), _COMPARED_ROWS)).astype(int).tolist()
    found = [attempt(partial(said, number), "") for number in chosen]
    texts = [f"{each.error}" if isinstance(each, Failed) else repr(each) for each in found]
    return hashlib.sha256("\n".join(texts).encode(errors="backslashreplace")).hexdigest()


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
    elif (known := read_json(path)) != about:
        differ = ", ".join(sorted(key for key in about.keys() | known.keys() if about.get(key) != known.get(key)))
        raise ConfigError(f"output {path.parent}: has answers of another job, with other {differ}; give another folder")


def _left(total: int, per_block: int, output: Path) -> Iterator[range]:
    """The rows without a file, in blocks."""
    begin = 0
    for begun, ended in [*sorted(_rows_of(path) for path in _files(output)), (total, total)]:
        for first in range(begin, begun, per_block):
            yield range(first, min(first + per_block, begun))
        begin = ended


def _files(output: Path) -> list[Path]:
    return [path for path in output.iterdir() if _FILE.fullmatch(path.stem)]


def _rows_of(path: Path) -> tuple[int, int]:
    begin, end = map(int, path.stem.split("-"))
    return begin, end


def _table(paths: Sequence[Path]) -> Any:
    """Files of answers of one format, whose columns are read where they are asked for."""
    from pyarrow.dataset import dataset

    kind = {".jsonl": "json", ".parquet": "parquet"}[paths[0].suffix]
    return dataset(list(map(str, paths)), schema=_schema(), format=kind)


def _has_errors(path: Path) -> bool:
    errors = _table([path]).to_table(columns=["error"])["error"]
    return errors.null_count < len(errors)


def _counted(output: Path, total: int) -> BatchDone:
    """What the files hold. Raises RuntimeError unless that is every row once."""
    files = _table(_files(output))
    seen, answered = np.zeros(total, bool), 0
    failed, first_error = 0, None
    for batch in files.to_batches(columns=["row", "error"]):
        seen[batch["row"].to_numpy()] = True
        answered += batch.num_rows
        errors = batch["error"].drop_null()
        failed += len(errors)
        first_error = first_error or (errors[0].as_py() if len(errors) else None)
    num_seen = int(seen.sum())
    if not num_seen == answered == total:
        told = f"of {total} rows {total - num_seen} have no answer, and {answered - num_seen} answers are second ones"
        raise RuntimeError(f"{output}: {told}: files were changed; take the folder away and answer anew")
    return BatchDone(output, total, failed, first_error)
