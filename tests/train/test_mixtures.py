"""Training on mixtures of shards: a run that is killed takes the samples that it would have taken."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molora.checkpoint.opening import open_model
from molora.config import ConfigError, build, dump
from molora.data.sources import EncodedSamples, SourceConfig
from molora.received import read_json
from molora.seeding import seed_of
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe, plan_recipe
from molora.train.step import TrainingError

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["molora.train.loop", "molora.testing", "molora.data.index.shards", "pyarrow.parquet"])
STEPS, SAMPLES_PER_STEP = 120, 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, and rows of numbers in tar files, Parquet and JSONL."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("mixtures")
    save_backbone(folder / "backbone")
    for shard in range(3):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as file:
            for row in range(30):
                about = tarfile.TarInfo(f"{shard}{row:02}.json")
                data = json.dumps(talk(shard * 30 + row)).encode()
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    columns = {"q": [f"question {row}" for row in range(70)], "a": [f"answer {row}" for row in range(70)]}
    parquet.write_table(pa.table(columns), folder / "table.parquet", row_group_size=8)
    for part in range(2):
        rows = [json.dumps({"id": f"{part}.{row}", **talk(row)}) for row in range(25)]
        (folder / f"part-{part}.jsonl").write_text("\n".join(rows))
    return folder


def talk(number: int) -> dict[str, Any]:
    content = [{"type": "numbers", "numbers": [number / 100, 0.5]}, {"type": "text", "text": f"question {number}"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": str(number)}]}


def recipe(home: Path, run: Path, workers: int = 0, **changes: Any) -> Recipe:
    """Three weighted sources of shards, one of them used up on the way, one less frequent from step 15 on."""
    data: dict[str, Any] = {
        "tar": {"kind": "shards", "weight": 2.0, "options": {"path": f"{home}/shard-{{0..2}}.tar"}},
        "table": {
            "kind": "shards",
            "options": {"path": f"{home}/table.parquet", "prompt": "{q}", "answer": "{a}"},
            "weight": [[0, 3.0], [15, 0.5]],
            "blocks_per_window": 2,
        },
        "lines": {"kind": "shards", "options": {"path": f"{home}/part-*.jsonl"}, "max_epochs": 1},
    }
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}
    stage = {
        "name": "tune",
        "train": {"adapters.*": {"learning_rate": 1e-2}, "projectors": {"learning_rate": 1e-3}},
        "data": data,
        "steps": STEPS,
        "samples_per_step": SAMPLES_PER_STEP,
        **changes,
    }
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {"numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter}},
        "stages": [stage],
        "save_every_steps": 3,
        "data_workers": workers,
        "device": "cpu",
    }
    return build(Recipe, values, "test recipe")


def run_rank(path: Path, told: Path, environment: dict[str, str]) -> None:
    """In a process of its own: `molora train`, as a launcher starts it."""
    from molora.config import read

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of its data workers, as in a process that a launcher starts
    os.environ.update(environment)
    with open(told, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train(read(Recipe, path), show=False)


def two_ranks(path: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: list[Any] = []
    for rank in "01":
        environment = {**group, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(FORKS.Process(target=run_rank, args=(path, path.with_name(f"rank {rank}"), environment)))
        ranks[-1].start()
    return ranks


def rows_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("seconds")} for line in lines]


def steps_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def expected_digests(config: Recipe) -> list[str]:
    """What each step's samples are called, worked out from the order alone."""
    stage = config.stages[0]
    _, processor = open_model(plan_recipe(config), "cpu")
    samples = EncodedSamples(
        stage.data,
        processor,
        seed=seed_of(config.seed, stage.name),
        max_tokens=stage.tokens_per_pack,
        skips=(),
        where="data",
        mixture=stage.mixture,
        samples_per_step=stage.samples_per_step,
    )
    digests = []
    for step in range(stage.steps):
        ids = []
        for k in range(step * stage.samples_per_step, (step + 1) * stage.samples_per_step):
            source, row, epoch = samples.order[k]
            ids.append(f"{samples.names[source]}/{samples.sources[source][row]['id']}@{epoch}")
        digests.append(hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16])
    return digests


def test_two_ranks_killed_at_ten_moments_take_the_samples_of_a_run_that_was_not(home: Path, tmp_path: Path) -> None:
    straight, killed = (recipe(home, tmp_path / name, workers=1) for name in ("straight", "killed"))
    for name, config in (("straight", straight), ("killed", killed)):
        (tmp_path / f"{name}.yaml").write_text(dump(config))
    for process in two_ranks(tmp_path / "straight.yaml"):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / "rank 0").read_text()[-3000:]

    moments = random.Random(3)
    for _ in range(10):
        goal = steps_logged(tmp_path / "killed") + moments.randint(0, 5)
        ranks = two_ranks(tmp_path / "killed.yaml")
        deadline = time.monotonic() + 300
        while steps_logged(tmp_path / "killed") < goal:
            assert all(process.is_alive() for process in ranks), (tmp_path / "rank 0").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        for process in moments.sample(ranks, 2):
            process.kill()
        for process in ranks:
            process.join(300)
            assert process.exitcode == -signal.SIGKILL, "it was over before it was killed"
    for process in two_ranks(tmp_path / "killed.yaml"):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / "rank 0").read_text()[-3000:]

    ours, expected = rows_of(tmp_path / "killed"), rows_of(tmp_path / "straight")
    assert [row["samples_digest"] for row in expected] == expected_digests(straight)
    assert ours == expected
    weights, as_expected = (
        load_file(tmp_path / name / f"state/step-{STEPS}/weights.safetensors") for name in ("killed", "straight")
    )
    assert all(torch.equal(value, as_expected[key]) for key, value in weights.items()) and weights


def test_a_stage_that_its_sources_do_not_last_for_is_told_before_training(home: Path, tmp_path: Path) -> None:
    lines = {"kind": "shards", "options": {"path": f"{home}/part-*.jsonl"}, "max_epochs": 2}
    config = recipe(home, tmp_path / "run", data={"lines": lines}, steps=20)
    with pytest.raises(
        ConfigError, match=r"stages.0.data: the sources are used up after 100 samples \(16 steps of 6\).*has 20 steps"
    ):
        train(config, show=False)
    assert not (tmp_path / "run").exists()


def broken(home: Path, folder: Path) -> dict[str, SourceConfig]:
    """Rows of which every fifth has numbers that cannot be read."""
    rows = [talk(row) for row in range(40)]
    for row in rows[::5]:
        row["messages"][0]["content"][0]["numbers"] = "none"
    (folder / "broken.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"rows": SourceConfig(kind="shards", options={"path": str(folder / "broken.jsonl")})}


def test_broken_items_are_counted_up_to_a_limit_that_stops_the_run(home: Path, tmp_path: Path) -> None:
    changes = {"unusable": "skip", "steps": 12}
    config = recipe(home, tmp_path / "free", **changes)
    config.stages[0].data = broken(home, tmp_path)
    train(config, show=False)
    rows = rows_of(tmp_path / "free")
    skipped = [reason for row in rows for reason in row.get("skipped_because", [])]
    assert len(skipped) == sum(row["skipped"] for row in rows) > 8

    config = recipe(home, tmp_path / "limited", skip_limit=len(skipped), **changes)
    config.stages[0].data = broken(home, tmp_path)
    train(config, show=False)
    assert rows_of(tmp_path / "limited") == rows

    limit = len(skipped) // 2
    config = recipe(home, tmp_path / "stopped", skip_limit=limit, **changes)
    config.stages[0].data = broken(home, tmp_path)
    with pytest.raises(TrainingError, match=rf"samples of stage tune could not be used, and its skip_limit is {limit}"):
        train(config, show=False)
    done = len(rows_of(tmp_path / "stopped"))
    (state,) = (tmp_path / "stopped/state").iterdir()
    about = read_json(state / "state.json")
    counted = [reason for row in rows[: about["step"]] for reason in row.get("skipped_because", [])]
    assert about["skipped"] == counted and counted, "the count goes on where it was"
    with pytest.raises(TrainingError) as raised:
        train(config, show=False)
    listed = [reason for row in rows[: done + 1] for reason in row.get("skipped_because", [])]
    assert str(raised.value).split("\n  ")[1:] == listed

    config.stages[0].skip_limit = None
    train(config, show=False)
    assert rows_of(tmp_path / "stopped") == rows
