"""A batch job on Ray answers every row once, as one process does, whatever dies meanwhile.

ROWS=100000 makes it as large; see EXPERIMENTS.md.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
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

from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.config import ConfigError, build
from molora.inference.batch_job import BatchConfig, answer_batch
from molora.testing import save_backbone

pytest.importorskip("ray.data")
read_table = pytest.importorskip("pyarrow.parquet").read_table
pytestmark = pytest.mark.filterwarnings("ignore")  # what Ray has to say

ROWS = int(os.environ.get("ROWS", 240))
ROWS_PER_BLOCK, DRIVERS, ACTORS, SECONDS = (8, 1, 1, 0) if ROWS < 1000 else (256, 2, ROWS, 10)


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


def save_numbers(home: Path, folder: Path, more: float = 0.0) -> Path:
    """A modality folder, whose adapter has `more` in every number."""
    plan = blueprint("numbers", "molora.testing:Numbers", {}, {"r": 2, "target_modules": ["qkv_proj"]}, "here")
    model, _ = assemble(*load_backbone(str(home / "backbone")), {"numbers": plan}, RouterConfig())
    for parameter in model.parts()["adapters.numbers"].values():
        parameter.data.add_(more)
    save_modality(model, "numbers", plan, folder, {})
    return folder


def answers_in(folder: Path) -> dict[int, dict[str, Any]]:
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


def told_when_stopped(path: Path, answers: Path) -> str:
    """What a job says that is stopped, as by Ctrl-C in a terminal, once it has answered something or fails."""
    job = subprocess.Popen(
        [sys.executable, "-m", "molora", "batch", str(path)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    while job.poll() is None and not list(answers.glob("*.parquet")):
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    return " ".join(job.communicate()[1].split())


def actors_of(driver: psutil.Process) -> Iterator[psutil.Process]:
    for process in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "_Answering" in process.name() or "_Answering" in " ".join(process.cmdline()):
                yield process


def memory_of(driver: psutil.Process) -> int:
    """What a driver and all that it started have for themselves."""
    held = 0
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            held += process.memory_full_info().uss
    return held


def test_every_row_is_answered_once_though_actors_and_the_driver_are_killed(home: Path, tmp_path: Path) -> None:
    path, answers = tmp_path / "batch.yaml", tmp_path / "job"
    path.write_text(json.dumps(config(home, tmp_path / "job", actors=2)))
    assert "the same call goes on" in told_when_stopped(path, answers)
    draw = random.Random(0)
    drivers, actors, before, last = 0, 0, 0, time.monotonic()
    held: list[float] = []  # by the driver and all that it started, in MB, since the last driver began
    job, starts = start(path), 1
    while (ended := job.poll()) != 0:
        if ended is not None:  # killed, or because Ray took more than its 30 seconds to start
            job, starts = start(path), starts + 1
            assert starts < 8
        time.sleep(0.1)
        files = len(list(answers.glob("*.parquet")))
        if files == before or time.monotonic() < last + SECONDS:  # each gets something done
            continue
        held.append(memory_of(psutil.Process(job.pid)) / 1e6)
        if drivers < DRIVERS and files > (drivers + 1) * ROWS / ROWS_PER_BLOCK / (DRIVERS + 2):
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
            drivers += 1
            held.clear()
        elif actors < ACTORS and (running := list(actors_of(psutil.Process(job.pid)))):
            draw.choice(running).kill()
            actors += 1
        before, last = files, time.monotonic()
    print(f"{actors} actors and {drivers} drivers were killed; MB held: {', '.join(f'{each:.0f}' for each in held)}")
    assert drivers == DRIVERS and actors
    found, expected = answers_in(answers), of_one_process(home)
    assert read_table(answers).num_rows == ROWS  # molora's own files there are no part of it
    assert len(found) == ROWS == len(expected)
    for number, row in enumerate(expected):
        del row["messages"], row["drawn"]
        assert {key: found[number][key] for key in row} == row


@pytest.fixture(scope="module")
def ray_ends() -> Iterator[None]:
    """What tests start in this process is not left to those of other modules."""
    import ray  # pyright: ignore[reportMissingImports]

    yield
    ray.shutdown()


@pytest.mark.usefixtures("ray_ends")
def test_rows_that_fail_have_their_error_and_a_job_keeps_to_its_model(home: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "good", "messages": [{"role": "user", "content": "hello"}]},
        {"id": "half \ud83d", "messages": [{"role": "user", "content": [{"type": "smell", "path": "smell"}]}]},
        {"id": "good", "messages": [{"role": "user", "content": "again"}]},
        {"id": "empty", "messages": []},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config(tmp_path, tmp_path / "job", model=str(home / "backbone"), format="jsonl")
    (tmp_path / "smell").write_text("of roses")
    (tmp_path / "job").mkdir()
    (tmp_path / "job/_batch.json").write_text("{}")  # of another job, which has left no answer
    done = answer_batch(build(BatchConfig, values, "test"))
    assert (done.rows, done.failed) == (4, 2)
    found = answers_in(done.folder)
    assert [found[number]["id"] for number in range(3)] == ["good", "half \ufffd", "good"]
    assert "smell" in found[1]["error"]
    for number in (0, 2):
        assert found[number]["error"] is None and found[number]["finished"] in ("length", "stop")
    before = {path: path.stat().st_mtime_ns for path in done.folder.iterdir()}
    assert answer_batch(build(BatchConfig, {**values, "actors": 2}, "test")) == done
    assert {path: path.stat().st_mtime_ns for path in done.folder.iterdir()} == before
    (whole,) = done.folder.glob("*.jsonl")
    lines = whole.read_text().splitlines(keepends=True)
    for changed in (lines[:1] * 257 + lines[1:], lines[1:], lines[::-1]):
        whole.write_text("".join(changed))
        with pytest.raises(RuntimeError, match=r"0004\.jsonl: does not hold the rows from 0 on up to 3, each once"):
            answer_batch(build(BatchConfig, values, "test"))
    whole.write_text("".join(lines)[:-9])
    with pytest.raises(RuntimeError, match=r"0004\.jsonl: is damaged .*; take it away, and the same call answers its"):
        answer_batch(build(BatchConfig, values, "test"))
    other = "generation.max_new_tokens is 2 there and 3 here; deterministic_batch is false there and true here; give"
    with pytest.raises(ConfigError, match=f"has answers of another job: {other}"):
        more = {"generation": {**values["generation"], "max_new_tokens": 3}, "deterministic_batch": True}
        answer_batch(build(BatchConfig, {**values, **more}, "test"))
    (tmp_path / "smell").write_text("of another thing under the same name")
    with pytest.raises(ConfigError, match="has answers of another job: some_rows is "):
        answer_batch(build(BatchConfig, values, "test"))
    (tmp_path / "smell").write_text("of roses")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "id": "other"}) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="has answers of another job: some_rows is .* there and .* here"):
        answer_batch(build(BatchConfig, values, "test"))
    (tmp_path / "job/_batch.json").unlink()
    with pytest.raises(ConfigError, match=r"has answers, and no _batch\.json that says of what"):
        answer_batch(build(BatchConfig, values, "test"))


@pytest.mark.usefixtures("ray_ends")
def test_rows_that_failed_are_answered_again_and_no_others(home: Path, tmp_path: Path) -> None:
    rows = [{"id": text[:3], "messages": [{"role": "user", "content": text}]} for text in ("one", "two" * 80, "three")]
    rows.append({"id": "empty", "messages": []})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config(tmp_path, tmp_path / "job", model=str(home / "backbone"), rows_per_block=3)
    small = {**values["generation"], "kv_cache_gib": 48 * 2**-20}  # three pages
    assert answer_batch(build(BatchConfig, {**values, "generation": small}, "test")).failed == 2
    before = answers_in(tmp_path / "job")
    assert "raise it" in before[1]["error"] and before[2]["error"] is None
    with pytest.raises(ConfigError, match=r"gpus_per_actor 2, and this machine has \d+ CPUs and 0 GPUs at most"):
        answer_batch(build(BatchConfig, {**values, "retry_failed": True, "gpus_per_actor": 2}, "test"))
    retried = build(BatchConfig, {**values, "retry_failed": True}, "test")
    done = answer_batch(retried)
    after = answers_in(tmp_path / "job")
    assert (done.rows, done.failed) == (4, 1) and after[1]["finished"] == "length"
    assert [after[number] for number in (0, 2, 3)] == [before[number] for number in (0, 2, 3)]
    shutil.rmtree(tmp_path / "job")
    answer_batch(build(BatchConfig, values, "test"))
    assert answers_in(tmp_path / "job") == after


@pytest.mark.usefixtures("ray_ends")
def test_rows_to_train_on_are_asked_without_their_answers_on_what_ray_calls_a_gpu(home: Path, tmp_path: Path) -> None:
    """Ray counts GPUs that it is told of, whether they are there or not."""
    import ray  # pyright: ignore[reportMissingImports]

    ray.shutdown()
    ray.init(num_gpus=1, logging_level=logging.ERROR)
    (tmp_path / "rows.csv").write_text("q,a\nwhat is 1?,one\nwhat is 2?,two\n")
    rows = {"kind": "table", "options": {"path": str(tmp_path / "rows.csv"), "prompt": "{q}", "answer": "{a}"}}
    values = config(home, tmp_path / "job", rows=rows, gpus_per_actor=0.5, rows_per_block=1)
    done = answer_batch(build(BatchConfig, values, "test"))
    assert (done.rows, done.failed) == (2, 0)
    ray.shutdown()


@pytest.mark.usefixtures("ray_ends")
def test_what_an_actor_fails_on_is_told_in_a_sentence(home: Path, tmp_path: Path) -> None:
    save_numbers(home, tmp_path / "numbers")
    for weights in (tmp_path / "numbers").rglob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8])
    values = config(home, tmp_path / "job", modalities=[str(tmp_path / "numbers")])
    with pytest.raises(RuntimeError, match=r"job: an actor fails: .*\.safetensors.*; mend that, and"):
        answer_batch(build(BatchConfig, values, "test"), ["molora.testing:Numbers"])


SOURCE = """
import os, shutil, signal
from pathlib import Path
from molora.data.sources import Messages, MessagesConfig

class Ends(Messages):
    config_type = MessagesConfig

    def __getitem__(self, row):
        if row == 2 and os.getpid() != int(Path(__file__).with_name("driver").read_text()):
            for note in Path(__file__).parent.glob("job/_tried-*.json"):
                shutil.copy(note, Path(__file__).with_name("stopped"))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(row)

class Raises(Messages):
    config_type = MessagesConfig

    def __init__(self, config):
        super().__init__(config)
        if os.getpid() != int(Path(__file__).with_name("driver").read_text()):
            raise RuntimeError("the first line\\n    and the second")

class Heavy(Messages):
    config_type = MessagesConfig

    def __init__(self, config):
        super().__init__(config)
        if os.getpid() != int(Path(__file__).with_name("driver").read_text()):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("ray_ends")
def test_a_row_that_ends_its_process_has_an_error_and_the_others_their_answers(home: Path, tmp_path: Path) -> None:
    (tmp_path / "driver").write_text(str(os.getpid()))
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "stopped").mkdir()
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)[:5]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    rows = {"kind": f"{tmp_path / 'source.py'}:Ends", "options": {"path": str(tmp_path / "rows.jsonl")}}
    done = answer_batch(build(BatchConfig, config(home, tmp_path / "job", rows=rows, rows_per_block=4), "test"))
    assert (done.rows, done.failed) == (5, 1)
    assert done.first_error and done.first_error.startswith("the process died at this row, 2 times, as when memory")
    assert len(list((tmp_path / "stopped").glob("_tried-*"))) == 1  # what a job leaves that is stopped at row 2
    plain = config(home, tmp_path / "stopped", rows={**rows, "kind": "messages"}, rows_per_block=4)
    assert answer_batch(build(BatchConfig, plain, "test")).failed == 0
    found, expected = answers_in(tmp_path / "job"), answers_in(tmp_path / "stopped")
    assert [found[number] for number in (0, 1, 3, 4)] == [expected[number] for number in (0, 1, 3, 4)]
    assert not list(tmp_path.glob("*/_tried-*"))
    raises = config(home, tmp_path / "other", rows={**rows, "kind": f"{tmp_path / 'source.py'}:Raises"})
    with pytest.raises(RuntimeError, match="an actor fails: RuntimeError: the first line and the second; mend that"):
        answer_batch(build(BatchConfig, raises, "test"))


@pytest.mark.usefixtures("ray_ends")
def test_a_job_ends_whose_actors_die_while_they_load(home: Path, tmp_path: Path) -> None:
    (tmp_path / "driver").write_text(str(os.getpid()))
    (tmp_path / "source.py").write_text(SOURCE)
    rows = {"kind": f"{tmp_path / 'source.py'}:Heavy", "options": {"path": str(home / "rows.jsonl")}}
    heavy = build(BatchConfig, config(home, tmp_path / "job", rows=rows), "test")
    with pytest.raises(RuntimeError, match="an actor fails: .*died while it loaded.*, 3 times.*let fewer share"):
        answer_batch(heavy)
    assert len(list((tmp_path / "job").glob("_tried-loading-*"))) == 3  # which do not count for another call
    plain = config(home, tmp_path / "job", rows={**rows, "kind": "messages"})
    assert answer_batch(build(BatchConfig, plain, "test")).failed == 0
    assert not list((tmp_path / "job").glob("_tried-*"))


@pytest.mark.parametrize(
    ("model", "output", "told"),
    [
        ("nowhere/at/all", "job", "no such folder"),
        ("backbone", "rows.jsonl", "no folder can be made there"),
    ],
)
def test_nothing_is_begun_that_cannot_be_done(home: Path, model: str, output: str, told: str) -> None:
    with pytest.raises((ValueError, OSError), match=told):
        answer_batch(build(BatchConfig, config(home, home / output, model=str(home / model)), "test"))
    assert not (home / "job").exists()


@pytest.mark.usefixtures("ray_ends")
def test_answers_are_of_one_state_of_a_modality(home: Path, tmp_path: Path) -> None:
    folder = save_numbers(home, tmp_path / "numbers")
    (tmp_path / "rows.jsonl").write_text('{"id": "one", "messages": [{"role": "user", "content": "hello"}]}\n')
    values = config(tmp_path, tmp_path / "job", model=str(home / "backbone"), modalities=[str(folder)])
    job = build(BatchConfig, values, "test")
    assert answer_batch(job, ["molora.testing:Numbers"]).rows == 1
    shutil.rmtree(folder)
    save_numbers(home, folder, more=1.0)
    with pytest.raises(ConfigError, match=r"has answers of another job: weights\.numbers is "):
        answer_batch(job, ["molora.testing:Numbers"])
