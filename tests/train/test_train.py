"""Training resumes exactly after a kill at any instant, and does not depend on how it is spread over processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora import heartbeat
from molora.checkpoint.assembly import BackboneConfig
from molora.checkpoint.opening import open_model
from molora.cli.commands import main
from molora.config import ConfigError, build, dump
from molora.data.sources import SourceConfig
from molora.evaluate.metrics import Judged, NoOptions
from molora.interrupt import Stopped
from molora.pack import collate
from molora.received import read_json
from molora.storage import hold
from molora.testing import save_backbone
from molora.train.loop import EvaluationFailed, _Run, train
from molora.train.optim import PartConfig, set_trainable
from molora.train.recipe import Recipe, plan_recipe
from molora.train.step import TrainingError, train_step

FORKS = multiprocessing.get_context("forkserver")
TENSORBOARD = ["tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"]
FORKS.set_forkserver_preload(["molora.cli.commands", "molora.train.loop", "molora.testing", *TENSORBOARD])


class Answered:
    """A metric that is another number for other answers."""

    config_type = NoOptions

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        answers = "\n".join(item.answer for item in judged)
        return {"answered": int(hashlib.sha256(answers.encode()).hexdigest()[:6], 16) / 16**6}


METRICS = ["exact_match", f"{__file__}:Answered"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("train"))


def write_home(folder: Path) -> Path:
    """A tiny backbone and a few rows of text, numbers and letters."""
    save_backbone(folder / "backbone")
    generator = random.Random(0)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for index in range(40):
            numbers = [round(generator.random(), 2) for _ in range(generator.randint(1, 4))]
            content: list[dict[str, Any]] = [{"type": "text", "text": f"question {index}"}]
            if index % 3 == 0:
                content.insert(0, {"type": "numbers", "numbers": numbers})
            if index % 4 == 0:
                content.insert(0, {"type": "letters", "letters": "abc"[: 1 + index % 3]})
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(max(numbers))}]
            file.write(
                json.dumps({"id": f"row {index}", "messages": messages, "tags": ["even"[: index % 2 * 4] or "odd"]})
                + "\n"
            )
    return folder


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(home, tmp_path_factory.mktemp("finished") / "run"), show=False)


def recipe(home: Path, run: Path, **changes: Any) -> Recipe:
    rows = {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}}
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {
            "numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter},
            "letters": {"plugin": "molora.testing:Letters", "adapter": adapter},
        },
        "router": {"options": {"rules": {"numbers+letters": "numbers"}}},
        "stages": [
            {
                "name": "align",
                "train": {
                    "encoders": {"learning_rate": 1e-2},
                    "projectors": {"learning_rate": 1e-2, "warmup_steps": 2},
                },
                "data": rows,
                "steps": 5,
                "samples_per_step": 6,
            },
            {
                "name": "tune",
                "train": {"adapters.*": {"learning_rate": 1e-2}, "projectors.numbers": {"learning_rate": 1e-3}},
                "data": rows,
                "steps": 7,
                "samples_per_step": 6,
                "tokens_per_pack": 120,
                "evaluate_every_steps": 3,
            },
        ],
        "evaluations": {"rows": {"data": {**rows["rows"], "limit": 4}, "max_new_tokens": 2, "metrics": METRICS}},
        "save_every_steps": 2,
        "device": "cpu",
        **changes,
    }
    return build(Recipe, values, "test recipe")


def outcome(run: Path) -> dict[str, Any]:
    """Everything that must be equal to the bit: final state, exported files and every metric but the times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (state,) = (run / "state").iterdir()
    about = {key: value for key, value in read_json(state / "state.json").items() if key not in ("logs", "recipe")}
    for totals in about["totals"]:
        assert totals.pop("seconds").keys() >= {"loading", "forward"} or not totals["steps"]
    best = [path for path in sorted((run / "best").rglob("*")) if path.is_file() and path.name != "state.json"]
    return {
        "rows": [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows],
        "state": about,
        "tensors": {
            p.name: {k: v.tolist() for k, v in load_file(p).items()} for p in sorted(state.glob("*.safetensors"))
        },
        "files": {
            str(p.relative_to(run)): p.read_bytes()
            for p in [*sorted((run / "modalities").rglob("*")), *best]
            if p.is_file()
        },
    }


def run_alone(recipe: Recipe, die_at_replace: int | None) -> None:
    """In a process of its own: trains, and with `die_at_replace` kills itself at that rename of a file."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # as in conftest.py: a kill takes nothing from the disk
    die_at(die_at_replace)
    train(recipe, show=False)


def die_at(replace_number: int | None) -> None:
    """Lets this process kill itself at that rename of a file."""
    replace: Callable[..., None] = os.replace
    count = 0

    def dying_replace(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == replace_number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = dying_replace


def spawn(recipe: Recipe, die_at_replace: int | None = None) -> Any:
    process = FORKS.Process(target=run_alone, args=(recipe, die_at_replace))
    process.start()
    return process


def run_command(
    arguments: list[str], told: Path, environment: dict[str, str], die_at_replace: int | None = None
) -> None:
    """In a process of its own: `molora` with these arguments and what it says in a file, as a launcher starts it but
    with the libraries imported before. With `die_at_replace` it kills itself at that rename of a file. A rank leaves a
    file when it has met the others."""
    start = heartbeat._Beats.start

    def leave_mark(beats: Any) -> None:
        start(beats)
        met(told).touch()

    heartbeat._Beats.start = leave_mark  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # as in conftest.py: a kill takes nothing from the disk
    die_at(die_at_replace)
    os.environ.update(environment)
    with open(told, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["molora", *arguments]
    main()


def met(told: Path) -> Path:
    """The file that says that the rank which tells in this one has met the others."""
    return told.with_name(f"{told.name} met")


def outcome_in_spite_of_kills(straight: Recipe, killed: Recipe) -> dict[str, Any]:
    """The outcome of a run, which is the same to the bit for one that is killed twenty times: ten times in the middle
    of saves, ten at any time, in turn."""
    warm = FORKS.Process(target=int)  # imports the libraries, which no later process waits for
    warm.start()
    warm.join()
    started = time.monotonic()
    first = spawn(straight)
    first.join()
    assert first.exitcode == 0
    took = time.monotonic() - started
    expected, run = outcome(Path(straight.run)), Path(killed.run)
    moments = random.Random(7)
    kills = 0
    for attempt in range(200):
        in_a_save = attempt % 2 == 0
        process = spawn(killed, moments.randint(1, 30) if in_a_save else None)
        process.join(None if in_a_save else moments.uniform(0.3, 0.8) * took)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        kills += process.exitcode == -signal.SIGKILL
        if kills == 20:
            break
        if process.exitcode == 0:  # it finished: begin again, so that there is something left to kill
            assert outcome(run) == expected
            subprocess.run(["rm", "-r", run], check=True)
    assert kills == 20
    last = spawn(killed)
    last.join()
    assert last.exitcode == 0
    ours = outcome(run)
    for key in expected:
        assert ours[key] == expected[key], f"{key} differ after {kills} kills"
    return ours


def test_a_run_killed_at_twenty_moments_ends_like_one_that_was_not(home: Path, tmp_path: Path) -> None:
    keep = {"evaluation": "rows", "metric": "answered", "highest": True}
    straight, killed = (recipe(home, tmp_path / name, keep_best=keep) for name in ("straight", "killed"))
    ours = outcome_in_spite_of_kills(straight, killed)
    steps = [(row["step"], "rows/exact_match" in row) for row in ours["rows"]]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    assert "best/best.json" in ours["files"] and ours["state"]["best"]["step"] in range(1, 13)


def test_a_finished_run_does_nothing_more(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(home, tmp_path / "run"), show=False)
    before = outcome(tmp_path / "run")
    capsys.readouterr()
    train(recipe(home, tmp_path / "run"))
    assert outcome(tmp_path / "run") == before
    told = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'run'}: trained already, 12 of 12 steps; give another run= to train anew" in told


def test_a_run_of_another_encoder_is_told_from_a_broken_one(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "run"), show=False)
    (state,) = (tmp_path / "run" / "state").iterdir()
    weights = load_file(state / "weights.safetensors")
    name = next(key for key in weights if key.startswith("encoders.numbers"))
    save_file({**weights, name: torch.zeros(3, 1, 2)}, state / "weights.safetensors")
    about = tmp_path / "run/modalities/numbers/modality.json"
    (tmp_path / "plugin.py").write_text(
        "from torch import nn\nfrom molora.testing import Numbers\nclass Deeper(Numbers):\n"
        "    def build_encoder(self):\n        encoder = super().build_encoder()\n"
        "        encoder.head = nn.Linear(1, 1)\n        return encoder\n"
    )
    about.write_text(json.dumps({**read_json(about), "plugin": f"{tmp_path / 'plugin.py'}:Deeper"}))
    with pytest.raises(
        ValueError, match=r"missing head.bias; missing head.weight; did the plugin's code change\? train"
    ):
        molora.load(tmp_path / "run", trust=[f"{tmp_path / 'plugin.py'}:Deeper"])
    with pytest.raises(
        ConfigError, match=f"do not fit: {name} is .*; did the plugin's code change\\? give another run="
    ):
        train(recipe(home, tmp_path / "run"), show=False)


def test_what_does_not_train_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    values = asdict(recipe(home, tmp_path / "run"))
    values["stages"] = values["stages"][1:]
    train(build(Recipe, values, "test"), show=False)
    frozen = build(Recipe, {**values, "run": str(tmp_path / "other")}, "test")
    frozen.stages[0].steps = 1
    frozen.stages[0].train = {"adapters.letters": next(iter(frozen.stages[0].train.values()))}
    train(frozen, show=False)
    first, second = tmp_path / "run" / "modalities", tmp_path / "other" / "modalities"
    for name in ("encoder.safetensors",):
        assert (first / "numbers" / name).read_bytes() == (second / "numbers" / name).read_bytes()
    for name in ("adapter_model.safetensors", "projector.safetensors"):
        assert (first / "numbers" / name).read_bytes() != (second / "numbers" / name).read_bytes()


def in_processes(recipe_path: Path, count: int = 2, *, launched: bool = False) -> None:
    """Trains in several processes: launched by torchrun, or forked with what it would set."""
    if launched:
        port = free_port()
        launcher = ["torch.distributed.run", f"--nproc-per-node={count}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", *launcher, "-m", "molora", "train", str(recipe_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("done: ") == 1
        return
    for rank, process in enumerate(started(recipe_path, count)):
        process.join(300)
        told = recipe_path.with_name(f"rank {rank}").read_text()
        assert process.exitcode == 0, told[-3000:]
        assert told.count("done: ") == (rank == 0)


def started(recipe_path: Path, count: int, die_at_replace: int | None = None) -> list[Any]:
    """So many processes that train together, each of which tells in a file `rank N` beside the recipe. With
    `die_at_replace` the first, which saves, kills itself at that rename of a file."""
    ranks = []
    for rank, environment in enumerate(environments(count)):
        told = recipe_path.with_name(f"rank {rank}")
        met(told).unlink(missing_ok=True)
        dies = die_at_replace if rank == 0 else None
        ranks.append(FORKS.Process(target=run_command, args=(["train", str(recipe_path)], told, environment, dies)))
        ranks[-1].start()
    return ranks


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher sets for each of several processes."""
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


COMPARED = ("loss/", "routing/", "source_loss/")
LEARNED = {
    "plugin": "learned",
    "options": {"modalities": ["letters", "numbers"], "scope": "token", "balance": 0.1, "z": 0.01},
}


@pytest.mark.parametrize("learned", [False, True], ids=["table", "learned router, activation checkpointing"])
def test_two_processes_train_like_one(home: Path, tmp_path: Path, learned: bool) -> None:
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
    modality = {"plugin": "molora.testing:Numbers", "adapter": adapter}
    rows = {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}}
    letters = {**modality, "plugin": "molora.testing:Letters"}
    # Two samples a step: a rank often has text alone, or none of a modality that the other rank has.
    stage = {
        "name": "tune",
        "train": {name: {"learning_rate": 3e-3} for name in ("encoders", "projectors", "adapters")},
        "data": rows,
        "steps": 100,
        "samples_per_step": 2,
    }
    changes = {
        "modalities": {"numbers": modality, "letters": letters},
        "stages": [stage],
        "evaluations": {},
        "save_every_steps": 50,
    }
    if learned:
        stage["train"]["router"] = {"learning_rate": 3e-3}
        changes |= {"router": LEARNED, "activation_checkpointing": True}
    one, two = recipe(home, tmp_path / "one", **changes), recipe(home, tmp_path / "two", **changes)
    train(one, show=False)
    (tmp_path / "two.yaml").write_text(dump(two))
    in_processes(tmp_path / "two.yaml", launched=not learned)
    ours, theirs = outcome(tmp_path / "two")["rows"], outcome(tmp_path / "one")["rows"]
    assert len(ours) == len(theirs) == 100
    alone = 0
    for row, expected in zip(ours, theirs, strict=True):
        assert row["samples_digest"] == expected["samples_digest"]
        losses = {key: value for key, value in expected.items() if key.startswith(COMPARED)}
        alone += len(losses) > 1 and "loss/text" in losses
        assert {key for key in row if key.startswith(COMPARED)} == losses.keys()
        assert row["source_targets/rows"] == expected["source_targets/rows"]
        for key, value in losses.items():
            assert abs(row[key] - value) <= 1e-5 * max(1.0, abs(value)), f"step {row['step']}: {key}"
    assert alone > 10, "in no step did one rank see text alone"
    assert learned == any("routing/letters+numbers/letters" in row for row in theirs)


def test_what_a_router_learned_is_saved_resumed_and_taken_over(home: Path, tmp_path: Path) -> None:
    stage: dict[str, Any] = {
        "name": "tune",
        "train": {"router": {"learning_rate": 0.1}, "adapters": {"learning_rate": 1e-2}},
        "data": {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}},
        "steps": 6,
        "samples_per_step": 6,
    }
    changes = {"router": LEARNED, "stages": [stage], "evaluations": {}}
    whole = train(recipe(home, tmp_path / "whole", **changes), show=False)
    learned = load_file(whole / "router.safetensors")
    assert any(tensor.abs().max() > 0.1 for tensor in learned.values())

    halves = recipe(home, tmp_path / "halves", **{**changes, "stages": [{**stage, "steps": 6}]})
    stopped = _Run._save

    def stop_after_four(self: _Run) -> None:
        stopped(self)
        if self.position.step == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_save", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            train(halves, show=False)
    resumed = load_file(train(halves, show=False) / "router.safetensors")
    assert all(torch.equal(resumed[key], value) for key, value in learned.items())

    opened = molora.load(whole)
    assert all(torch.equal(value, learned[key]) for key, value in opened.model.router_tensors().items())
    frozen = {**stage, "train": {"adapters": {"learning_rate": 1e-2}}}
    after = train(
        recipe(home, tmp_path / "after", router={"path": str(whole)}, stages=[frozen], evaluations={}), show=False
    )
    assert (after / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="brings plugin and options with it"):
        train(recipe(home, tmp_path / "both", router={**LEARNED, "path": str(whole)}), show=False)


def test_modalities_trained_together_get_the_updates_they_get_alone(home: Path, tmp_path: Path) -> None:
    # A sample that holds both couples them by its content; all others must not.
    lines = (home / "rows.jsonl").read_text().splitlines()
    apart = [line for line in lines if not ('"numbers"' in line and '"letters"' in line)]
    assert len(apart) < len(lines)
    (tmp_path / "apart.jsonl").write_text("\n".join(apart))
    rows = {"rows": {"kind": "messages", "options": {"path": str(tmp_path / "apart.jsonl")}}}
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"]}
    modalities = {
        "numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter},
        "letters": {"plugin": "molora.testing:Letters", "adapter": adapter},
    }

    def trained(name: str, parts: list[str]) -> Path:
        stage = {
            "name": "tune",
            "train": {
                f"{kind}.{part}": {"learning_rate": 3e-3}
                for kind in ("encoders", "projectors", "adapters")
                for part in parts
            },
            "data": rows,
            "steps": 30,
            "samples_per_step": 8,
        }
        changes = {"modalities": modalities, "stages": [stage], "evaluations": {}, "save_every_steps": 30}
        train(recipe(home, tmp_path / name, **changes), show=False)
        return tmp_path / name / "modalities"

    both, only = trained("both", ["numbers", "letters"]), trained("only", ["letters"])
    ours = load_file(both / "letters" / "adapter_model.safetensors")
    expected = load_file(only / "letters" / "adapter_model.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(ours[name], tensor, atol=1e-5), name


def test_a_step_gives_a_modality_the_update_it_gets_without_the_others(home: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    outcomes = []
    for together in (True, False):
        config = recipe(home, tmp_path / "run")
        model, processor = open_model(plan_recipe(config), "cpu")
        patterns = {"encoders": PartConfig(learning_rate=1e-3), "projectors": PartConfig(learning_rate=1e-3)}
        optimizers = set_trainable(model, patterns, 10, "test")
        samples = [processor.encode(row["messages"], row["id"]) for row in rows]
        letters = frozenset({"letters"})
        chosen = [s for s in samples if s.modalities == letters or (together and "letters" not in s.modalities)]
        assert {s.modalities == letters for s in chosen} == ({True, False} if together else {True})
        row = train_step(model, processor, chosen, 4096, optimizers)
        outcomes.append((row, {n: p.clone() for n, p in model.projectors["letters"].named_parameters()}))
    (ours, weights), (expected, expected_weights) = outcomes
    for key in (
        "loss/letters",
        "targets/letters",
        "gradient_norm/projectors.letters.default",
        "gradient_norm/encoders.letters",
    ):
        assert ours[key] == pytest.approx(expected[key], rel=1e-5), key
    for name, weight in weights.items():
        assert torch.allclose(weight, expected_weights[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages: none given"),
        ({"modalities": {"numbers": {}}}, "modalities.numbers: give either plugin"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(home, tmp_path / "run", **changes), show=False)


def test_a_wrong_data_source_is_told_before_what_trains(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[0].data["rows"].kind = "mesages"
    with pytest.raises(ConfigError, match=r"stages.0.data.rows.kind: no source is called 'mesages'"):
        train(config)
    assert "parameters" not in capsys.readouterr().out


def test_a_source_of_the_users_that_fails_is_named(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from molora.testing import NumbersConfig as Options\n\n\nclass Rows:\n    config_type = Options\n\n"
        "    def __init__(self, config): ...\n    def __len__(self): return 1\n"
        "    def __getitem__(self, row): return {}['messages']\n"
    )
    config = recipe(home, tmp_path / "run")
    config.stages[0].data = {"mine": SourceConfig(kind=f"{file}:Rows")}
    with pytest.raises(ValueError, match=r"stages.0.data.mine, row 1: KeyError: 'messages'"):
        train(config, show=False)


def test_a_pattern_that_trains_nothing_is_refused(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[0].train = {"encoder.numbers": config.stages[0].train["encoders"]}
    with pytest.raises(ConfigError, match=r"stages.0.train: \['encoder.numbers'\] train nothing; the parts"):
        train(config, show=False)


def test_a_part_starts_from_another(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run", evaluations={})
    config.stages = config.stages[:1]
    config.stages[0].steps = 1
    config.stages[0].train = {"projectors.letters": PartConfig(learning_rate=1e-12)}
    config.stages[0].start_from = {"projectors.letters.default": "projectors.numbers.default"}
    train(config, show=False)
    started, source = (
        load_file(tmp_path / "run" / "modalities" / name / "projector.safetensors") for name in ("letters", "numbers")
    )
    assert started.keys() == source.keys()
    for key, weight in started.items():
        assert torch.allclose(weight, source[key], atol=1e-9), key


@pytest.mark.parametrize(
    ("start_from", "message"),
    [
        ({"projectors.letters": "projectors.numbers.default"}, r"no part \['projectors.letters'\]; did you mean"),
        ({"projectors.letters.default": "encoders.numbers"}, "cannot start from encoders.numbers: .* differ"),
        ({"adapters.letters": "adapters.numbers"}, "adapters.letters does not train in this stage"),
    ],
)
def test_a_part_starts_from_one_like_it_and_trains(
    home: Path, tmp_path: Path, start_from: dict[str, str], message: str
) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[0].start_from = start_from
    with pytest.raises(ConfigError, match=f"stages.0.start_from: .*{message}"):
        train(config, show=False)


@pytest.mark.parametrize("vocabulary", [None, 256])
def test_a_stage_of_words_teaches_media_to_say_the_answer_and_runs_no_layer(
    home: Path, tmp_path: Path, vocabulary: int | None
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[{"type": "letters", "letters": letters}] for letters in ("abc", "cab", "bca", "acb") * 4]
    with path.open("w") as file:
        for content in rows:
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content[0]["letters"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    stage = {
        "name": "words",
        "objective": "words",
        "vocabulary": vocabulary,
        "train": {kind: {"learning_rate": 1e-2, "schedule": "constant"} for kind in ("encoders", "projectors.letters")},
        "data": {"rows": {"kind": "messages", "options": {"path": str(path)}}},
        "steps": 60,
        "samples_per_step": 8,
    }
    config = recipe(home, tmp_path / "run", stages=[stage], evaluations={})
    train(config, show=False)
    loaded = molora.load(tmp_path / "run")
    for content in rows[:4]:
        sample = loaded.encode([{"role": "user", "content": content}], "row")
        embeds_TD = loaded.model.embed(collate([sample], loaded.model.modalities))
        nearest = torch.cdist(embeds_TD[sample.modality_ids_T > 0], loaded.model.backbone.embeddings_VD).argmin(1)
        assert loaded.processor.tokenizer.decode(nearest) == content[0]["letters"]


def test_a_stage_of_words_leaves_out_what_its_media_cannot_say_and_is_not_asked(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = [{"type": "letters", "letters": "abc"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": said}]}
        for said in ("abc", "abcabc")
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = recipe(home, tmp_path / "run")
    stage = replace(
        config.stages[0],
        objective="words",
        train={"projectors.letters": PartConfig(learning_rate=1e-3)},
        data={"rows": SourceConfig(kind="messages", options={"path": str(path)})},
        steps=2,
        samples_per_step=2,
        evaluate_every_steps=0,
    )
    answers = replace(stage, name="answers", objective="answers")
    with pytest.raises(ValueError, match="its 3 media tokens cannot say its 6 words, which need 6; train it by"):
        train(replace(config, stages=[stage, answers]), show=False)
    run = train(
        replace(config, run=str(tmp_path / "other"), stages=[replace(stage, too_long="skip"), answers]), show=False
    )
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in log if "samples" in row]
    assert [(row["stage"], row["samples"], row["skipped"]) for row in steps] == [
        *[(stage.name, 1, 1)] * 2,
        *[("answers", 2, 0)] * 2,
    ]
    assert {row["step"] for row in log if any("exact_match" in key for key in row)} == {4}


@pytest.mark.parametrize("part", ["adapters.letters", "*"])
def test_adapters_do_not_learn_by_words(home: Path, tmp_path: Path, part: str) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[0].objective = "words"
    config.stages[0].train[part] = PartConfig(learning_rate=1e-3)
    with pytest.raises(
        ConfigError, match=r"stages.0.train: \['adapters.letters'.*\] learn nothing by `objective: words`"
    ):
        train(config, show=False)


def test_a_changed_recipe_does_not_go_on(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "run"), show=False)
    with pytest.raises(ConfigError, match="begun with other settings: seed: was 0, is 1. Give"):
        train(recipe(home, tmp_path / "run", seed=1), show=False)
    before = outcome(tmp_path / "run")
    changed = recipe(home, tmp_path / "run")
    changed.stages[0].samples_per_step = 7
    changed.modalities["numbers"].options = {"scale": 0.5}
    message = (
        r"settings: modalities.numbers.options.scale: was not set, is 0.5; stages.0.samples_per_step: was 6, is 7\. "
    )
    with pytest.raises(ConfigError, match=message):
        train(changed, show=False)
    assert outcome(tmp_path / "run") == before


def test_a_setting_that_is_younger_than_the_run_has_its_default(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    train(config, show=False)
    (state,) = (tmp_path / "run" / "state").iterdir()
    about = read_json(state / "state.json")
    del about["recipe"]["stages"][0]["unusable"]
    (state / "state.json").write_text(json.dumps(about))
    train(config, show=False)
    config.stages[0].samples_per_step = 7
    with pytest.raises(ConfigError, match="settings: stages.0.samples_per_step: was 6, is 7"):
        train(config, show=False)


def test_another_environment_does_not_go_on_unless_told(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    train(config, show=False)
    (state,) = (tmp_path / "run" / "state").iterdir()
    about = read_json(state / "state.json")
    about["environment"]["threads"] = 64
    (state / "state.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="threads 64 then, 1 now"):
        train(config, show=False)
    config.allow_changed_environment = True
    train(config, show=False)


def test_a_run_of_another_dtype_is_told_how_to_go_back(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "run"), show=False)
    changed = recipe(home, tmp_path / "run", backbone={"path": str(home / "backbone"), "dtype": "bfloat16"})
    with pytest.raises(ConfigError, match="dtype .*; give backbone.dtype=float32 as it was, or set allow_changed"):
        train(changed, show=False)


def test_a_chat_template_that_changed_before_a_resume_is_told(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "backbone", tmp_path / "backbone")
    config = recipe(home, tmp_path / "run", backbone={"path": str(tmp_path / "backbone")})
    train(config, show=False)
    capsys.readouterr()
    (template,) = (tmp_path / "backbone").glob("chat_template.jinja")
    template.write_text(template.read_text() + "\n{# another #}")
    train(config)
    assert "trained with another chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about.pop("recipe"), "lacks recipe"),
        (lambda about: about.pop("stage"), "lacks stage"),
        (lambda about: about.pop("part_steps"), "lacks part_steps"),
        (lambda about: about.pop("logs"), "lacks logs"),
        (lambda about: about.update(stage="1"), "stage is '1', expected a whole number"),
        (lambda about: about.update(step=-1), "step is -1, expected a count"),
        (lambda about: about.update(step=True), "step is True, expected a count"),
        (lambda about: about.update(stage=9), "stage 9 and step 0 are none of its recipe, .* have 5, 7 steps"),
        (lambda about: about.update(step=99), "stage 2 and step 99 are none"),
        (lambda about: about.update(environment=[]), "environment is \\[\\], expected values by name"),
        (lambda about: about["part_steps"].update(x=None), "part_steps.x is None, expected a count"),
        (lambda about: about["logs"].update({"metrics.jsonl": 0.5}), "logs.metrics.jsonl is 0.5, expected a count"),
        (lambda about: about.update(evaluate="rows"), "evaluate is 'rows', expected names"),
        (lambda about: about["recipe"].pop("stages"), "stages"),
    ],
)
def test_a_state_that_was_damaged_is_one_error(
    home: Path, finished: Path, tmp_path: Path, change: Callable[[Any], object], said: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (state,) = (run / "state").iterdir()
    about = read_json(state / "state.json")
    change(about)
    (state / "state.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"state.*{said}"):
        train(recipe(home, run), show=False)


@pytest.mark.parametrize("device", ["cpuu", "meta", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(home: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device: '{device}' is none of this machine"):
        train(recipe(home, tmp_path / "run", device=device), show=False)
    with pytest.raises(ConfigError, match=f"device: '{device}' is none of this machine"):
        molora.load(home / "backbone", device=device)


def test_a_loss_that_is_not_finite_stops_before_the_optimiser(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[0].train["projectors"].learning_rate = float("inf")
    with pytest.raises(TrainingError, match=r"stage align, step 2: the loss is not finite \(.*Lower the learning rate"):
        train(config, show=False)


@pytest.mark.parametrize(
    ("option", "content", "tokens_per_pack", "says"),
    [
        ("too_long", "x" * 400, 8192, r"sample rows/1@0: has \d+ tokens .*at most 256 fit"),
        ("too_long", "x" * 200, 200, r"sample rows/1@0: has 206 tokens, but a pack of this stage holds 200; raise"),
        ("unusable", [{"type": "letters", "letters": ""}], 8192, r"sample rows/1@0: message 0, part 0 .*no letters"),
    ],
    ids=["longer than the backbone takes", "longer than a pack", "without usable media"],
)
def test_samples_that_cannot_be_learned_from_stop_the_run_or_are_counted(
    home: Path, tmp_path: Path, option: str, content: Any, tokens_per_pack: int, says: str
) -> None:
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "odd.jsonl").write_text("\n".join([(home / "rows.jsonl").read_text().splitlines()[0], json.dumps(row)]))
    config = recipe(home, tmp_path / "run", evaluations={})
    config.stages = config.stages[:1]
    config.stages[0].data["rows"].options["path"] = str(tmp_path / "odd.jsonl")
    config.stages[0].tokens_per_pack = tokens_per_pack
    other = {"too_long": "unusable", "unusable": "too_long"}[option]
    setattr(config.stages[0], other, "skip")
    with pytest.raises(ValueError, match=f"stages.0.data.rows, row 2: .*odd.jsonl, row 2: {says}"):
        train(config, show=False)
    setattr(config.stages[0], other, "error")
    setattr(config.stages[0], option, "skip")
    train(config, show=False)
    rows = outcome(tmp_path / "run")["rows"]
    assert sum(r["skipped"] for r in rows) == 15 and all(r["samples"] + r["skipped"] == 6 for r in rows)
    reasons = [reason for r in rows for reason in r.get("skipped_because", [])]
    assert len(reasons) == 15 and all(re.search(says.replace("@0", r"@\d+"), reason) for reason in reasons)


# Tried before anything trains ---------------------------------------------------------------------------------------


def rows_of(path: Path, count: int, broken: range = range(0)) -> dict[str, Any]:
    """A source of rows of letters; those in `broken` have none."""
    letters = [{"type": "letters", "letters": "" if index in broken else "abc"} for index in range(count)]
    turns = [[{"role": "user", "content": [part]}, {"role": "assistant", "content": "y"}] for part in letters]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return {"kind": "messages", "options": {"path": str(path)}}


def table(folder: Path, **options: str) -> dict[str, Any]:
    (folder / "rows.csv").write_text("question,answer\nwhat?,this\n")
    given = {"path": str(folder / "rows.csv"), "prompt": "{question}", "answer": "{answer}", **options}
    return {"kind": "table", "options": given}


ADAPTER = {"r": 4, "target_modules": ["qkv_proj"]}

# What is wrong in a recipe whose backbone is not there, so that the error shows what was tried before it.
MISTAKES: list[tuple[str, Any, str]] = [
    ("the file of a stage", ("data", {"kind": "messages", "options": {"path": "gone.jsonl"}}), r"data\.d.*gone.jsonl"),
    (
        "the file of an evaluation",
        ("evaluation", {"kind": "messages", "options": {"path": "gone.jsonl"}}),
        "gone.jsonl",
    ),
    ("a kind of source", ("evaluation", {"kind": "tabel"}), r"evaluations.t.data.kind: .*did you mean 'table'"),
    ("a column of a stage", ("data", {"answer": "{anser}"}), r"stages.0.data.d.*anser"),
    ("a column of an evaluation", ("evaluation", {"prompt": "{qestion}"}), r"evaluations.t.data.*qestion"),
    ("a modality's folder", ("modalities", {"numbers": {"path": "gone"}}), r"modalities.numbers.path: gone: not a mod"),
    ("a router's run", ("router", {"path": "gone"}), "gone: not a run folder"),
    (
        "an option of an adapter",
        ("modalities", {"numbers": {"plugin": "molora.testing:Numbers", "adapter": {**ADAPTER, "lora_alfa": 8}}}),
        r"modalities.numbers.adapter.lora_alfa: .*did you mean 'lora_alpha'",
    ),
    (
        "a file that a plugin opens",
        ("modalities", {"numbers": {"plugin": "PLUGIN:Labelled", "options": {"more": {"labels": "gone.txt"}}}}),
        r"modalities.numbers.options.more.labels: .*gone.txt",
    ),
]


@pytest.mark.parametrize(("what", "change", "says"), MISTAKES, ids=[what for what, *_ in MISTAKES])
def test_a_mistake_is_told_before_the_backbone_is_opened(
    home: Path, tmp_path: Path, what: str, change: tuple[str, Any], says: str
) -> None:
    config = recipe(home, tmp_path / "run")
    where, value = change
    (tmp_path / "plugin.py").write_text(
        "from dataclasses import dataclass, field\nfrom pathlib import Path\nfrom molora.testing import Numbers\n"
        "@dataclass\nclass Config:\n    scale: float = 1.0\n    projector_beside: None = None\n"
        "    more: dict[str, str] = field(default_factory=dict)\n"
        "class Labelled(Numbers):\n    config_type = Config\n"
        "    def __init__(self, name, config):\n        super().__init__(name, config)\n"
        "        Path(config.more['labels']).read_text()\n"
    )
    changes: dict[str, Any] = {"backbone": {"path": str(tmp_path / "no-backbone")}}
    if where in ("data", "evaluation"):
        source = value if "kind" in value else table(tmp_path, **value)
        if where == "data":
            stage = {"name": "s", "train": {"projectors": {"learning_rate": 1e-3}}, "steps": 1, "samples_per_step": 1}
            changes |= {"stages": [{**stage, "data": {"d": source}}]}
        else:
            changes |= {"evaluations": {"t": {"data": source}}}
    else:
        changes |= {where: json.loads(json.dumps(value).replace("PLUGIN", str(tmp_path / "plugin.py")))}
    with pytest.raises(ConfigError, match=says):
        train(recipe(home, tmp_path / "run", **changes), show=False)
    assert not (tmp_path / "run/state").exists() and not (tmp_path / "run/config.yaml").exists()
    with pytest.raises(FileNotFoundError, match="no-backbone"):
        config.backbone.path = str(tmp_path / "no-backbone")
        train(config, show=False)


def test_rows_that_cannot_be_encoded_stop_a_run_before_its_first_step(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run", evaluations={})
    config.stages[0].data["rows"].options = rows_of(tmp_path / "rows.jsonl", 5, range(4, 5))["options"]
    with pytest.raises(ValueError, match=r"stages.0.data.rows, row 5: .*no letters"):
        train(config, show=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_an_evaluation_may_have_a_bad_row_and_not_bad_rows_alone(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    evaluation = config.evaluations["rows"]
    evaluation.data.limit = None
    evaluation.data.options = rows_of(tmp_path / "rows.jsonl", 40, range(40))["options"]
    with pytest.raises(ValueError, match=r"evaluations.rows.data: none of the 32 rows tried can be used"):
        train(config, show=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_rules_name_modalities_that_are_there(home: Path, tmp_path: Path) -> None:
    rules = {"numbers+letters": "numbers", "numbers+leters": "letters"}
    with pytest.raises(ConfigError, match=r"names modality 'leters'; did you mean 'letters'\? there is"):
        train(recipe(home, tmp_path / "run", router={"options": {"rules": rules}}), show=False)
    weights = {"leters+numbers": {"numbers": 1.0}}
    with pytest.raises(ConfigError, match=r"names modality 'leters'; did you mean 'letters'"):
        train(recipe(home, tmp_path / "run", router={"plugin": "sum", "options": {"weights": weights}}), show=False)
    learned = {"modalities": ["letters", "numbers"], "rules": {"leters+numbers": "numbers"}}
    with pytest.raises(ValueError, match=r"rules name modalities \['leters'\]"):
        train(recipe(home, tmp_path / "run", router={"plugin": "learned", "options": learned}), show=False)


def test_a_later_stage_is_tried_before_the_first(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    config.stages[1].train = {"adapter.letters": config.stages[1].train["adapters.*"]}
    with pytest.raises(ConfigError, match=r"stages.1.train: \['adapter.letters'\] train nothing"):
        train(config, show=False)
    config = recipe(home, tmp_path / "run")
    config.stages[1].start_from = {"adapters.letters": "adapters.number"}
    with pytest.raises(ConfigError, match=r"stages.1.start_from: no part .*did you mean 'adapters.numbers'"):
        train(config, show=False)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("bf16", "bfloat16"), ("torch.bfloat16", "bfloat16"), ("FP32", "float32"), ("half", "float16"), (None, None)],
)
def test_a_dtype_is_read_in_its_usual_spellings(given: str | None, dtype: str | None) -> None:
    assert BackboneConfig(path="x", dtype=given).dtype == dtype


@pytest.mark.parametrize("given", ["int8", "nn", "float8_e4m3fn", "", "auto", "Tensor"])
def test_a_dtype_that_no_backbone_runs_in_is_refused(home: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"backbone: dtype {given!r} is none that .* give one of float32, fp32, .*bf16"
    ):
        recipe(home, tmp_path / "run", backbone={"path": "x", "dtype": given})
    if given:
        with pytest.raises(ConfigError, match=f"dtype {given!r}"):
            molora.load(home / "backbone", dtype=given)


# Going on -----------------------------------------------------------------------------------------------------------

FLAKY = """
from pathlib import Path
from molora.data.sources import Messages
class Flaky(Messages):
    def __len__(self):
        if Path("{broken}").exists() and Path("{run}/state").exists():
            raise RuntimeError("the server is down")
        return super().__len__()
"""


def test_an_evaluation_that_fails_costs_nothing_but_itself(home: Path, tmp_path: Path) -> None:
    broken, run = tmp_path / "broken", tmp_path / "run"
    broken.touch()
    (tmp_path / "flaky.py").write_text(FLAKY.format(broken=broken, run=run))
    config = recipe(home, run)
    config.evaluations["flaky"] = build(type(config.evaluations["rows"]), asdict(config.evaluations["rows"]), "test")
    config.evaluations["flaky"].data.kind = f"{tmp_path / 'flaky.py'}:Flaky"
    with pytest.raises(
        EvaluationFailed,
        match=r"flaky at step 12 .*server is down\. Run it again to evaluate flaky only; ",
    ):
        train(config, show=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "flaky/error" in row] == [5, 8, 11, 12]
    assert sum("rows/exact_match" in row and row["step"] == 12 for row in rows) == 1, "what worked is not done again"
    weights = {path: path.read_bytes() for path in sorted((run / "modalities").rglob("*.safetensors"))}
    broken.unlink()
    train(config, show=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12 and "flaky/exact_match" in rows[-1]
    assert sum("samples_digest" in row for row in rows) == 12, "no step was trained again"
    assert {path: path.read_bytes() for path in weights} == weights


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_says_so_and_the_run_goes_on_exactly(home: Path, tmp_path: Path, number: int) -> None:
    config = recipe(home, tmp_path / "run", save_every_steps=1000, evaluations={}, data_workers=1)
    config.stages[1].steps = 400
    config.stages[1].samples_per_step = 2
    (tmp_path / "recipe.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "molora", "train", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 20):
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number, told
    (state,) = (tmp_path / "run/state").iterdir()
    done = int(state.name.removeprefix("step-"))
    name = signal.Signals(number).name
    assert f"stopped by {name} after step {done} of 405, which is saved; go on with: molora train " in told
    assert 20 < done < 405 and log.read_text().count("\n") == done

    config.run, config.stages[1].steps = str(tmp_path / "short"), 6
    straight = outcome(train(config, show=False))
    interrupted = recipe(home, tmp_path / "interrupted", save_every_steps=1000, evaluations={})
    interrupted.stages[1].steps, interrupted.stages[1].samples_per_step = 6, 2
    with pytest.MonkeyPatch.context() as patch:
        step = _Run._step

        def signalled(self: _Run, stage: Any, at: int, encoded: Any) -> dict[str, Any]:
            if at == 3:
                signal.raise_signal(number)
            return step(self, stage, at, encoded)

        patch.setattr(_Run, "_step", signalled)
        for _ in interrupted.stages:
            with pytest.raises(Stopped):
                train(interrupted, show=False)
    assert outcome(train(interrupted, show=False)) == straight


def test_what_failed_in_the_middle_is_not_said_to_be_repeated(home: Path, tmp_path: Path) -> None:
    def failing_once(self: _Run, name: str, config: Any) -> tuple[dict[str, Any], str | None]:
        return ({}, "no network") if self._steps_done() == 8 else evaluate(self, name, config)

    evaluate = _Run._evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_evaluate", failing_once)
        with pytest.raises(EvaluationFailed, match="rows at step 8 failed: no network. At the end all evaluations wor"):
            train(recipe(home, tmp_path / "run"), show=False)
    assert read_json(tmp_path / "run/state/step-12/state.json")["evaluate"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_acts_at_once_and_one_in_the_last_evaluation_is_honoured(
    home: Path, tmp_path: Path, number: int
) -> None:
    config = recipe(home, tmp_path / "run")
    handler = signal.getsignal(number)
    begin, evaluate = _Run.begin, _Run._evaluate

    def noting(self: _Run, *given: Any) -> None:
        assert signal.getsignal(number) == handler, "a signal acts at once while the model is opened"
        begin(self, *given)

    def signalled(self: _Run, name: str, of: Any) -> tuple[dict[str, Any], str | None]:
        found = evaluate(self, name, of)
        if self._steps_done() == 12:
            signal.raise_signal(number)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "begin", noting)
        patch.setattr(_Run, "_evaluate", signalled)
        with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name} after step 12 of 12"):
            train(config, show=False)
    assert signal.getsignal(number) == handler
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    assert rows == (train(config, show=False) / "metrics.jsonl").read_text(), "nothing was left to do"


def constant(home: Path, run: Path, steps: int, **changes: Any) -> Recipe:
    """A recipe whose last stage has the same learning rates however many steps it has."""
    config = recipe(home, run, **changes)
    config.stages[0].steps = 2
    for part in config.stages[1].train.values():
        part.schedule, part.warmup_steps = "constant", 2
    config.stages[1].steps = steps
    return config


def test_a_finished_run_goes_on_for_more_steps_as_if_it_had_not_stopped(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(constant(home, tmp_path / "whole", 9), show=False)
    train(constant(home, tmp_path / "parts", 4), show=False)
    later = constant(home, tmp_path / "parts", 9, save_every_steps=3, log_every_steps=1)
    later.stages[1].unusable = "skip"  # the steps that are done had no such sample
    capsys.readouterr()
    train(later)
    assert f"{tmp_path / 'parts'}: resuming from step 6 of 11, in stage tune" in " ".join(
        capsys.readouterr().out.split()
    )
    ours, expected = outcome(tmp_path / "parts"), outcome(tmp_path / "whole")
    # The shorter run was evaluated at its end, which was no end of the longer one.
    ours["rows"] = [row for row in ours["rows"] if not ("rows/exact_match" in row and row["step"] == 6)]
    for key in expected:
        assert ours[key] == expected[key], key


def test_a_stage_is_added_to_a_finished_run(home: Path, tmp_path: Path) -> None:
    whole = recipe(home, tmp_path / "whole")
    first = recipe(home, tmp_path / "parts")
    first.stages = first.stages[:1]
    train(whole, show=False)
    train(first, show=False)
    train(recipe(home, tmp_path / "parts"), show=False)
    ours, expected = outcome(tmp_path / "parts"), outcome(tmp_path / "whole")
    assert ours == expected


def test_more_steps_that_would_have_changed_the_past_are_refused(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    train(config, show=False)
    config.stages[1].steps = 20
    with pytest.raises(
        ConfigError,
        match=r"stages.1.steps: was 7, is 20, but the cosine schedule of adapters.\* runs over all steps, so that "
        r"step 2 would have had a learning rate of 0.00\d+, not 0.00\d+; keep 7, and add a stage",
    ):
        train(config, show=False)
    config.stages[1].steps = 7
    config.stages[0].steps = 6
    with pytest.raises(ConfigError, match=r"stages.0.steps: was 5, is 6, but a later stage began from its end"):
        train(config, show=False)
    config.stages[0].steps, config.stages[1].steps = 5, 6
    with pytest.raises(ConfigError, match=r"stages.1.steps: was 7, is 6, but 7 steps of it are done"):
        train(config, show=False)


def test_a_run_folder_in_use_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run"), pytest.raises(ConfigError, match=f"run: in use by process {os.getpid()} on "):
        train(recipe(home, tmp_path / "run"), show=False)
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_full_disk_leaves_the_last_state_whole(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for stages, size, says in ((1, 10_000, "Nothing was saved before it: make room"), (2, 30_000, r"step-5 is whole")):
        config.stages = recipe(home, tmp_path / "run").stages[:stages]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(TrainingError, match=rf"no room to write .* a state of this run takes 0.\d MiB.*{says}"):
                train(config, show=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if stages == 1:
            train(config, show=False)
    train(config, show=False)
    train(recipe(home, tmp_path / "straight"), show=False)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")


def test_tensorboard_reads_what_was_logged(home: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = recipe(home, tmp_path / "run", evaluations={})
    config.stages = config.stages[:1]
    train(config, show=False)
    (path,) = (tmp_path / "run/tensorboard").iterdir()
    events = EventAccumulator(str(path)).Reload()
    rows = outcome(tmp_path / "run")["rows"]
    assert [(event.step, event.value) for event in events.Scalars("loss/text")] == [
        (row["step"], pytest.approx(row["loss/text"])) for row in rows if "loss/text" in row
    ]
