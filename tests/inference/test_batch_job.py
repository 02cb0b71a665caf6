"""A batch job on Ray answers every row once, as one process does, whatever dies meanwhile.

ROWS=100000 makes it as large; see EXPERIMENTS.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from molora.config import ConfigError, build
from molora.inference.batch_job import BatchConfig, answer_batch
from molora.testing import save_backbone

pytest.importorskip("ray.data")
pytestmark = pytest.mark.filterwarnings("ignore")  # what Ray has to say

ROWS = int(os.environ.get("ROWS", 240))
ROWS_PER_BLOCK, DRIVERS, ACTORS, SECONDS = (40, 1, 1, 0) if ROWS < 1000 else (256, 2, ROWS, 10)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone and rows of short questions."""
    folder = tmp_path_factory.mktemp("batch")
    save_backbone(folder / "backbone")
    with open(folder / "rows.jsonl", "w") as file:
        for number in range(ROWS):
            row = {"id": f"question {number}", "messages": [{"role": "user", "content": f"what is {number}?"}]}
            file.write(json.dumps(row) + "\n")
    return folder


def config(home: Path, output: Path, **changes: Any) -> dict[str, Any]:
    rows = {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}
    values = {"model": str(home / "backbone"), "rows": rows, "output": str(output), "rows_per_block": ROWS_PER_BLOCK}
    return {**values, "generation": {"max_new_tokens": 2, "temperature": 1.0}, **changes}


def answers_in(folder: Path) -> dict[int, dict[str, Any]]:
    from pyarrow.parquet import read_table

    rows = [row for path in folder.glob("*.parquet") for row in read_table(path).to_pylist()]
    rows += [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert len({row["row"] for row in rows}) == len(rows), "a row is answered twice"
    return {row["row"]: row for row in rows}


def of_one_process(home: Path) -> list[dict[str, Any]]:
    command = ["-m", "molora", "generate", str(home / "backbone"), "--messages", str(home / "rows.jsonl")]
    command += ["--output", str(home / "answers.jsonl"), "--max-new-tokens", "2", "--temperature", "1"]
    subprocess.run([sys.executable, *command], check=True)
    rows = map(json.loads, (home / "answers.jsonl").read_text().splitlines())
    return sorted(rows, key=lambda row: int(row["id"].removeprefix("question ")))


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "molora", "batch", str(path)], start_new_session=True)


def actors_of(driver: psutil.Process) -> Iterator[psutil.Process]:
    for process in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_Answering" in process.name() or "_Answering" in " ".join(process.cmdline()):
                yield process


def test_every_row_is_answered_once_though_actors_and_the_driver_are_killed(home: Path, tmp_path: Path) -> None:
    path, answers = tmp_path / "batch.yaml", tmp_path / "job"
    path.write_text(json.dumps(config(home, tmp_path / "job", actors=2)))
    draw = random.Random(0)
    drivers, actors, before, last = 0, 0, 0, time.monotonic()
    job, starts = start(path), 1
    while (ended := job.poll()) != 0:
        if ended is not None:  # killed, or because Ray took more than its 30 seconds to start
            job, starts = start(path), starts + 1
            assert starts < 8
        time.sleep(0.1)
        files = len(list(answers.glob("*.parquet")))
        if files == before or time.monotonic() < last + SECONDS:  # each gets something done
            continue
        if drivers < DRIVERS and files > (drivers + 1) * ROWS / ROWS_PER_BLOCK / (DRIVERS + 2):
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            drivers += 1
        elif actors < ACTORS and (running := list(actors_of(psutil.Process(job.pid)))):
            draw.choice(running).kill()
            actors += 1
        before, last = files, time.monotonic()
    print(f"{actors} actors and {drivers} drivers were killed")
    assert drivers == DRIVERS and actors
    found, expected = answers_in(answers), of_one_process(home)
    assert len(found) == ROWS == len(expected)
    for number, row in enumerate(expected):
        del row["messages"]
        assert {key: found[number][key] for key in row} == row


@pytest.fixture
def ray_ends() -> Iterator[None]:
    """What a test starts in this process is not left to those that come."""
    import ray  # pyright: ignore[reportMissingImports]

    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_ends")
def test_rows_that_fail_have_their_error_and_a_job_keeps_to_its_model(home: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "good", "messages": [{"role": "user", "content": "hello"}]},
        {"id": "half \ud83d", "messages": [{"role": "user", "content": [{"type": "smell", "path": "\ud83d"}]}]},
        {"id": "good", "messages": [{"role": "user", "content": "again"}]},
        {"id": "empty", "messages": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config(tmp_path, tmp_path / "job", model=str(home / "backbone"), format="jsonl")
    done = answer_batch(build(BatchConfig, values, "test"))
    assert (done.rows, done.failed) == (4, 3)
    found = answers_in(done.folder)
    assert [found[number]["id"] for number in range(3)] == ["good", "half \ufffd", "good"]
    assert found[0]["error"] is None and found[0]["finished"] in ("length", "stop")
    assert "smell" in found[1]["error"] and "rows 1 and 3 have the id 'good'" in found[2]["error"]
    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    assert answer_batch(build(BatchConfig, {**values, "actors": 2}, "test")) == done
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} == before
    with pytest.raises(ConfigError, match="has answers of another job, with other deterministic_batch, generation"):
        more = {"generation": {"max_new_tokens": 3}, "deterministic_batch": True}
        answer_batch(build(BatchConfig, {**values, **more}, "test"))
