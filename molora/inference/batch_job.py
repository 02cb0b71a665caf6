"""A batch job: the rows of any source answered by actors of Ray Data, into files that together hold every row once.

Ray gives blocks of row numbers to actors, and writes the answers to each as a file. The numbers are noted before a file
is written, and as done when it is whole, so that a job that goes on knows which files to take away and which rows are
left. An actor that dies is replaced, and its block is answered again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from molora.checkpoint.assembly import RouterConfig
from molora.config import ConfigError, plain, require
from molora.data.sources import SourceConfig, open_source
from molora.inference.answers import told_answer
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import load
from molora.pack import Sample
from molora.process import WAITING
from molora.received import read_json
from molora.storage import hold, write_json

if TYPE_CHECKING:
    from pyarrow import Table
    from ray.data import Datasource

# The column that Ray knows rows by: their numbers, from 0.
_ROW = "row"
# What may change between two calls of a job: no answer depends on it.
_FREE = ("output", "actors", "cpus_per_actor", "gpus_per_actor", "rows_per_block")
_FREE_IN_GENERATION = ("max_running_samples", "prefill_tokens", "chunk_tokens", "kv_cache_gib")
# For tasks that count and write beside actors, which may have taken all CPUs.
_LITTLE = {"num_cpus": 0.01}


@dataclass(kw_only=True)
class BatchConfig:
    """Rows to answer, the model, and the folder where answers go.

    `rows` is a source as a recipe has it; `model`, `modalities` and `router` are what `molora.load` takes. Relative
    paths start from the folder that the job is started in, and every machine sees the same files. Each of the `actors`
    loads the model, with `cpus_per_actor` threads, and with as much of a GPU as `gpus_per_actor` says. A block has
    `rows_per_block` rows, which are answered and written together: what a kill loses. For each Ray has a task."""

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
    """Answers the rows that have no answer yet. Ray starts here, or is the cluster that RAY_ADDRESS names.

    A row of the files has the row's number and id, what a row of `molora generate` tells of its answer, and an `error`,
    which is null but for a row that failed. Raises ConfigError for rows that cannot be opened, for an output with
    answers to other rows or of another model, or in use; RuntimeError if a row has no answer in the end, or two."""
    try:
        import ray.data
        from ray.data.checkpoint import CheckpointConfig
    except ImportError as error:
        raise ImportError(f"a batch job runs on Ray ({error}): pip install 'molora[ray]'") from error
    total = len(open_source(config.rows, "rows"))
    if total == 0:
        raise ConfigError("rows: there are none; name rows to answer")
    output = Path(os.path.expanduser(config.output)).absolute()
    output.mkdir(parents=True, exist_ok=True)
    answers, done = output / "answers", output / "done"
    with hold(output):
        _keep_to_one_job(config, total, output / "batch.json")
        if _num_done(done) < total:
            ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
                id_column=_ROW, checkpoint_path=str(done), delete_checkpoint_on_success=False
            )
            numbers = ray.data.read_datasource(
                _numbers(total, config.rows_per_block),
                override_num_blocks=-(-total // config.rows_per_block),  # which Ray would cut further
                ray_remote_args=_LITTLE,
            )
            answered = numbers.map_batches(
                _Answering,
                fn_constructor_args=(config, trust, os.getcwd()),
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(size=config.actors),
                num_cpus=config.cpus_per_actor,
                num_gpus=config.gpus_per_actor,
                runtime_env={"env_vars": WAITING},
            )
            write = answered.write_parquet if config.format == "parquet" else answered.write_json
            write(str(answers), ray_remote_args=_LITTLE)
        return _counted(config.format, answers, total)


class _Answering:
    """An actor: it opens model and rows once."""

    def __init__(self, config: BatchConfig, trust: Sequence[str], folder: str) -> None:
        os.chdir(folder)
        self.generation = config.generation
        self.source = open_source(config.rows, "rows")
        self.loaded = load(
            config.model,
            config.modalities,
            router=config.router,
            device=None if config.gpus_per_actor else "cpu",
            trust=trust,
            deterministic_batch=config.deterministic_batch,
        )

    def __call__(self, block: Mapping[str, np.ndarray[Any, Any]]) -> Table:
        """The rows with these numbers, answered; drawn by their ids, as `molora generate` does."""
        from pyarrow import Table

        found: dict[int, dict[str, Any]] = {}
        numbers: dict[str, int] = {}

        def sample(number: int) -> Sample:
            row = self.source[number]
            found[number]["id"] = row["id"]
            if (first := numbers.setdefault(row["id"], number)) != number:
                raise ValueError(
                    f"rows {first + 1} and {number + 1} have the id {row['id']!r}; give each one of its own"
                )
            return self.loaded.encode(row["messages"], row["id"])

        def samples() -> Iterator[Sample]:
            for number in block[_ROW].tolist():
                found[number] = {_ROW: number}
                made = attempt(partial(sample, number), "")
                if isinstance(made, Failed):
                    found[number]["error"] = made.error
                else:
                    yield made

        for answer in self.loaded.answers(samples(), self.generation, keep_going=True):
            found[numbers[answer.id]] |= told_answer(answer) if answer.error is None else {"error": answer.error}
        return Table.from_pylist([_storable(row) for row in found.values()], schema=_schema())


def _storable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose texts are UTF-8, which has no halves of characters; JSON has."""
    return {
        key: str(value).encode(errors="backslashreplace").decode() if isinstance(value, str | Exception) else value
        for key, value in row.items()
    }


def _schema() -> Any:
    import pyarrow as pa

    texts = [("id", pa.string()), ("answer", pa.string()), ("adapters", pa.list_(pa.string()))]
    counts = [("prompt_tokens", pa.int64()), ("answer_tokens", pa.int64())]
    return pa.schema([(_ROW, pa.int64()), *texts, *counts, ("finished", pa.string()), ("error", pa.string())])


def _numbers(total: int, per_block: int) -> Datasource:
    """The numbers of all rows for Ray to read, a task for each block of them."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def block(begin: int) -> list[Any]:
        return [pa.table({_ROW: np.arange(begin, min(begin + per_block, total))})]

    class Numbers(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return 8 * total

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            known = {"input_files": None, "exec_stats": None}
            sizes = {begin: min(per_block, total - begin) for begin in range(0, total, per_block)}
            return [
                ReadTask(partial(block, begin), BlockMetadata(num_rows=size, size_bytes=8 * size, **known))
                for begin, size in sizes.items()
            ]

    return Numbers()


def _keep_to_one_job(config: BatchConfig, total: int, path: Path) -> None:
    """Notes what is answered by which model; raises ConfigError if the output has answers to something else."""
    about = {key: value for key, value in plain(config).items() if key not in _FREE}
    about["generation"] = {
        key: about["generation"][key] for key in about["generation"] if key not in _FREE_IN_GENERATION
    }
    about["num_rows"] = total
    if not path.exists():
        write_json(path, about)
    elif (known := read_json(path)) != about:
        differ = ", ".join(sorted(key for key in about.keys() | known.keys() if about.get(key) != known.get(key)))
        raise ConfigError(f"output {path.parent}: has answers of another job, with other {differ}; give another folder")


def _num_done(done: Path) -> int:
    """Rows that are noted as done; none if a file was being written when the job was ended, which Ray clears away."""
    from pyarrow.parquet import read_metadata

    files = list(done.glob("*.parquet"))
    if any(file.name.endswith(".pending.parquet") for file in files):
        return 0
    return sum(read_metadata(file).num_rows for file in files)


def _counted(format: str, answers: Path, total: int) -> BatchDone:
    """What the files hold. Raises RuntimeError unless that is every row once."""
    from pyarrow.dataset import dataset

    files = dataset(answers, schema=_schema(), format="json" if format == "jsonl" else format)
    seen = np.zeros(total, np.uint8)
    failed, first_error = 0, None
    for batch in files.to_batches(columns=[_ROW, "error"]):
        np.add.at(seen, batch[_ROW].to_numpy(), 1)
        errors = batch["error"].drop_null()
        failed += len(errors)
        first_error = first_error or (errors[0].as_py() if len(errors) else None)
    if (wrong := np.flatnonzero(seen != 1)).size:
        told = f"{wrong.size} of {total} rows have no answer or two, the first is row {wrong[0] + 1}"
        raise RuntimeError(f"{answers}: {told}; take the folder away and answer anew")
    return BatchDone(answers, total, failed, first_error)
