"""Shards read through their index: memory, the time to the first sample, and the speed beside that of reading the same
files from their beginning to their end.

    python benchmarks/large_data.py [--rows 1000000] [--picture-bytes 4096] [--folder DIR] [--rounds 3] [--json FILE]

Rows are made in a temporary folder, a third each in webdataset tars (a caption, an object and bytes of a picture), in
Parquet and in JSONL, 16 files of each kind. Nothing is decoded but the rows: what is measured is how they are found.

- memory: of this process, once a tenth of the samples of an epoch are read and at its end; all pages that it has
  mapped count, those of the index included.
- first sample: a new process imports molora and opens the three sources, whose indexes are there, up to the first
  sample. `import` is the part that a process needs to import molora, which has nothing to do with the data.
- speed: rows a second, in the order of training (blocks shuffled, and the rows of a window) and one after the other,
  beside the same rows read sequentially by the library of the format (tarfile, pyarrow, lines of a file) and made into
  the same conversations. `raw` is the speed of reading the files' bytes and making nothing of them. All are done in
  turns, once with the files in the system's memory and once without (`cold`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import parquet

from molora.data.formats.rows import parse
from molora.data.index.build import files_of, indexed
from molora.data.mixture import MixtureConfig
from molora.data.sources import SourceConfig, mixed_order, open_source

FILES = 16
ANSWER = "an answer that is about as long as a caption of a picture is, or a short question of a conversation"
OPTIONS: dict[str, dict[str, Any]] = {
    "tar": {"prompt": "{json[question]}", "answer": "{txt}", "media": {"image": "jpg"}},
    "parquet": {"prompt": "{question}", "answer": "{answer}", "media": {"image": "picture"}},
    "jsonl": {"prompt": "{question}", "answer": "{answer}"},
}


def write(folder: Path, num_rows: int, picture_bytes: int) -> None:
    """Files of each kind, of `num_rows` rows together."""
    pictures = np.random.default_rng(0).integers(0, 256, (256, picture_bytes), dtype=np.uint8)
    rows = num_rows // len(OPTIONS) // FILES
    for file in range(FILES):
        numbers = range(file * rows, (file + 1) * rows)
        with tarfile.open(folder / f"{file:03}.tar", "w") as tar:
            for number in numbers:
                members = {
                    "json": json.dumps({"question": f"question {number}?"}).encode(),
                    "txt": f"{number}: {ANSWER}".encode(),
                    "jpg": pictures[number % 256].tobytes(),
                }
                for ending, data in members.items():
                    about = tarfile.TarInfo(f"{number:09}.{ending}")
                    about.size = len(data)
                    tar.addfile(about, io.BytesIO(data))
        columns = {
            "question": [f"question {number}?" for number in numbers],
            "answer": [f"{number}: {ANSWER}" for number in numbers],
            "picture": [pictures[number % 256].tobytes() for number in numbers],
        }
        # Bytes that repeat would lie in a dictionary, and the file would be no larger than that.
        parquet.write_table(pa.table(columns), folder / f"{file:03}.parquet", row_group_size=1000, use_dictionary=False)
        with open(folder / f"{file:03}.jsonl", "w") as lines:
            for number in numbers:
                more = {"source": "a column that nobody reads " * 8}
                lines.write(
                    json.dumps({"question": f"question {number}?", "answer": f"{number}: {ANSWER}", **more}) + "\n"
                )


def config(folder: Path, kind: str) -> SourceConfig:
    return SourceConfig(kind="shards", options={"path": f"{folder}/*.{kind}", **OPTIONS[kind]})


def sequential(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows as the format's library reads them from the beginning to the end."""
    for path in sorted(folder.glob(f"*.{kind}")):
        if kind == "tar":
            yield from _of_tar(path)
        elif kind == "parquet":
            for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000, use_threads=False):
                yield from batch.to_pylist()
        else:
            with open(path, "rb") as lines:
                for line in lines:
                    yield parse(line, str(path), numbers_as_text=True)


def _of_tar(path: Path) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {}
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            key, _, ending = member.name.partition(".")
            if row and row["id"] != key:
                yield row
                row = {}
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            row |= {
                "id": key,
                ending: parse(data, key) if ending == "json" else data if ending == "jpg" else data.decode(),
            }
    yield row


def conversations(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The same conversations as the source makes, from rows that are read sequentially."""
    table: Any = open_source(config(folder, kind), "data")
    rows = _OneByOne(sequential(folder, kind), table.table.rows)
    table.table.rows = rows
    for row in range(len(table)):
        yield table[row]


class _OneByOne:
    """Rows in the order in which they are asked for."""

    def __init__(self, rows: Iterator[dict[str, Any]], files: Any) -> None:
        self.rows = rows
        self.where = files.where
        self.folder = files.folder

    def __getitem__(self, row: int) -> dict[str, Any]:
        return next(self.rows)


def in_order(folder: Path, kind: str, shuffled: bool) -> Iterator[dict[str, Any]]:
    """An epoch of a source: in the order of training, or one row after the other."""
    source: Any = open_source(config(folder, kind), "data")
    order = mixed_order(
        [config(folder, kind)],
        [source],
        MixtureConfig(),
        seed=0,
        samples_per_step=1,
        will_read=lambda _, rows: source.will_read(rows),
    )
    for k in range(len(source)):
        yield source[order[k][1] if shuffled else k]


def raw(folder: Path, kind: str) -> Iterator[bytes]:
    """The bytes of the files, in pieces of a megabyte."""
    for path in sorted(folder.glob(f"*.{kind}")):
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(2**20):
                yield piece


def seconds(rows: Iterator[Any], folder: Path, kind: str, cold: bool) -> float:
    for path in folder.glob(f"*.{kind}"):
        with open(path, "rb") as file:
            advice = os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_WILLNEED
            os.posix_fadvise(file.fileno(), 0, 0, advice)
            while not cold and file.read(2**24):
                pass
    started = time.perf_counter()
    for _ in rows:
        pass
    return time.perf_counter() - started


def speeds(folder: Path, kind: str, rounds: int) -> dict[str, Any]:
    """Rows a second, and our share of the sequential speed, by round."""
    num_rows = len(open_source(config(folder, kind), "data"))
    found: dict[str, Any] = {}
    for cold in (False, True):
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "raw": lambda: raw(folder, kind),
            "sequential": lambda: conversations(folder, kind),
            "shuffled": lambda: in_order(folder, kind, True),
            "in order": lambda: in_order(folder, kind, False),
        }
        taken = {name: [] for name in ways}
        for _ in range(rounds):
            for name, rows in ways.items():
                taken[name].append(seconds(rows(), folder, kind, cold))
        ratios = {
            f"{name}, of {base}": statistics.median(a / b for a, b in zip(taken[base], taken[name], strict=True))
            for name in ("shuffled", "in order")
            for base in ("sequential", "raw")
        }
        found["cold" if cold else "warm"] = {
            **{f"{name}, rows a second": round(num_rows / statistics.median(each)) for name, each in taken.items()},
            **{name: round(ratio, 3) for name, ratio in ratios.items()},
        }
    return found


def memory(folder: Path) -> dict[str, Any]:
    """The memory of this process while it reads all three sources, mixed by size."""
    configs = [config(folder, kind) for kind in OPTIONS]
    sources: list[Any] = [open_source(each, "data") for each in configs]
    order = mixed_order(
        configs,
        sources,
        MixtureConfig(temperature=1),
        seed=0,
        samples_per_step=1,
        will_read=lambda source, rows: sources[source].will_read(rows),
    )
    num_rows, process = sum(map(len, sources)), psutil.Process()
    resident = []
    for k in range(num_rows):
        source, row, _ = order[k]
        sources[source][row]
        if (k + 1) % (num_rows // 10) == 0:
            resident.append(process.memory_info().rss / 2**20)
    return {
        "MiB after each tenth": [round(each, 1) for each in resident],
        "growth": round(max(resident) / resident[0] - 1, 4),
    }


_FIRST = """
import sys, time
started = time.perf_counter()
from molora.data.mixture import MixtureConfig
from molora.data.sources import SourceConfig, mixed_order, open_source
import datasets, pyarrow.parquet
imported = time.perf_counter()
configs = [SourceConfig(**each) for each in {configs}]
sources = [open_source(each, "data") for each in configs]
order = mixed_order(configs, sources, MixtureConfig(), seed=0, samples_per_step=1,
    will_read=lambda source, rows: getattr(sources[source], "will_read", len)(rows))
source, row, _ = order[{at}]
sources[source][row]
print(imported - started, time.perf_counter() - imported)
"""


def first_sample(folder: Path, at: int) -> dict[str, Any]:
    """Seconds to sample number `at` in a new process."""
    configs = [{"kind": "shards", "options": config(folder, kind).options} for kind in OPTIONS]
    code = _FIRST.format(configs=configs, at=at)
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {"import, seconds": round(float(told[-2]), 3), "first sample, seconds": round(float(told[-1]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--picture-bytes", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="of an earlier call: its files are used again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.jsonl")):
            write(folder, arguments.rows, arguments.picture_bytes)
            os.sync()
        found: dict[str, Any] = {
            "bytes": {kind: sum(p.stat().st_size for p in folder.glob(f"*.{kind}")) for kind in OPTIONS}
        }
        for kind in OPTIONS:
            started = time.perf_counter()
            indexed(files_of([f"{folder}/*.{kind}"]))
            found[f"{kind}: index, seconds"] = round(time.perf_counter() - started, 2)
        print(json.dumps(found, indent=1), flush=True)
        found["start"] = first_sample(folder, 0)
        found["start at sample 900,000"] = first_sample(folder, 900_000)
        print(json.dumps({name: found[name] for name in list(found)[-2:]}, indent=1), flush=True)
        found["memory"] = memory(folder)
        print(json.dumps(found["memory"], indent=1), flush=True)
        for kind in OPTIONS:
            found[f"{kind}: speed"] = speeds(folder, kind, arguments.rounds)
            print(kind, json.dumps(found[f"{kind}: speed"], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
