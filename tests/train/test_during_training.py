"""What a run tells while it trains and leaves behind: epochs, losses by source, seconds by phase, the best step, sample
answers, trackers, the card."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import molora
from molora.checkpoint.opening import open_model
from molora.config import ConfigError, build
from molora.data.mixture import MixtureConfig
from molora.data.sources import SourceConfig, open_source
from molora.evaluate.metrics import Judged, NoOptions
from molora.evaluate.predictions import keep_predictions, read_predictions
from molora.received import read_json
from molora.testing import save_backbone
from molora.train import trackers
from molora.train.card import HASHED_BYTES, about_source
from molora.train.loop import _Run, train
from molora.train.optim import PartConfig, set_trainable
from molora.train.phases import PHASES, PhaseClock
from molora.train.recipe import Recipe, StageConfig, count_steps, plan_recipe
from molora.train.resume import planned_steps
from molora.train.step import train_step


class Drawn:
    """A metric that goes up and down from one evaluation to the next, and depends on the answers alone."""

    config_type = NoOptions

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        answers = "\n".join(item.answer for item in judged)
        return {"drawn": int(hashlib.sha256(answers.encode()).hexdigest()[:6], 16) / 16**6}


def write_rows(path: Path, count: int, said: str = "question") -> None:
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            content: list[dict[str, Any]] = [{"type": "text", "text": f"{said} {index}"}]
            if index % 2 == 0:
                content.insert(0, {"type": "numbers", "numbers": [0.1 * index, 0.5]})
            turns = [{"role": "user", "content": content}, {"role": "assistant", "content": str(index % 7)}]
            file.write(json.dumps({"id": f"row {index}", "messages": turns}) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("during")
    save_backbone(folder / "backbone")
    write_rows(folder / "many.jsonl", 24)
    write_rows(folder / "few.jsonl", 6, "other")
    write_rows(folder / "test.jsonl", 9, "*is* | <b>")
    return folder


def rows_of(path: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "messages", "options": {"path": str(path)}, **more}


def recipe(home: Path, run: Path, **changes: Any) -> Recipe:
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
    part = {"learning_rate": 1e-2, "schedule": "constant"}
    stage = {
        "name": "tune",
        "train": {"projectors": part, "adapters": part},
        "data": {
            "many": rows_of(home / "many.jsonl", weight=3.0, licence="CC BY 4.0"),
            "few": rows_of(home / "few.jsonl"),
        },
        "steps": 6,
        "samples_per_step": 4,
        "evaluate_every_steps": 2,
    }
    evaluation = {
        "data": rows_of(home / "test.jsonl"),
        "max_new_tokens": 4,
        "metrics": ["exact_match", f"{__file__}:Drawn"],
    }
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {"numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter}},
        "stages": [{**stage, **changes.pop("stage", {})}],
        "evaluations": {"test": evaluation},
        "save_every_steps": 2,
        "device": "cpu",
        **changes,
    }
    return build(Recipe, values, "test recipe")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in log_of(run) if "samples" in row]


class Broken(Exception):
    """What ends a run in the middle."""


def train_until(config: Recipe, step: int) -> None:
    """Trains and breaks off after that step was logged, so that what was logged after the last state is there."""
    inner = _Run._asked_to_stop

    def breaking(self: _Run) -> int:
        if self._steps_done() == step:
            self.log.lengths()
            raise Broken
        return inner(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_asked_to_stop", breaking)
        with pytest.raises(Broken):
            train(config, show=False)


# Epochs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "weights", "num_rows", "steps"),
    [
        (1, [1.0], [40], 5),
        (3, [0.3], [40], 15),  # one source is the whole, whatever its weight
        (1, [1.0], [41], 6),
        (0.5, [1.0], [40], 3),
        (0.001, [1.0], [40], 1),
        (2, [1.0, 1.0], [40, 80], 40),  # 160 samples an epoch, of which each source gives 80
        (1, [3.0, 1.0], [24, 6], 4),  # 32 samples: 24 and 8
        (10, [0.1, 0.2, 0.7], [10, 20, 70], 125),
    ],
)
def test_epochs_in_steps(epochs: float, weights: list[float], num_rows: list[int], steps: int) -> None:
    data = {str(i): SourceConfig(kind="messages", weight=weight) for i, weight in enumerate(weights)}
    stage = StageConfig(name="s", train={}, data=data, epochs=epochs, samples_per_step=8)
    assert count_steps(stage, {str(i): number for i, number in enumerate(num_rows)}) == steps


def test_a_temperature_changes_how_long_an_epoch_is() -> None:
    data = {name: SourceConfig(kind="messages") for name in ("few", "many")}
    rows = {"few": 10, "many": 160}
    for temperature, samples in ((None, 320), (1.0, 170), (2.0, 200)):  # shares of many: 1/2, 16/17, 4/5
        mixture = MixtureConfig(temperature=temperature)
        stage = StageConfig(name="s", train={}, data=data, epochs=1.0, samples_per_step=1, mixture=mixture)
        assert count_steps(stage, rows) == samples


@pytest.mark.parametrize(
    ("source", "says"),
    [({"weight": [(0, 1.0), (10, 2.0)]}, "a weight that changes"), ({"max_epochs": 2}, "max_epochs")],
)
def test_epochs_need_shares_that_stay(source: dict[str, Any], says: str) -> None:
    data = {"few": SourceConfig(kind="messages", **source), "many": SourceConfig(kind="messages")}
    with pytest.raises(ValueError, match=f"epochs: 2, but data.few has {says}; give steps instead"):
        StageConfig(name="s", train={}, data=data, epochs=2.0, samples_per_step=1)
    StageConfig(name="s", train={}, data=data, steps=2, samples_per_step=1)


@pytest.mark.parametrize("lengths", [{}, {"steps": 3, "epochs": 1.0}])
def test_a_stage_has_steps_or_epochs(lengths: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="steps is . and epochs .; give one of the two"):
        StageConfig(name="s", train={}, data={}, samples_per_step=8, **lengths)
    with pytest.raises(ConfigError, match="epochs is -1"):
        StageConfig(name="s", train={}, data={}, samples_per_step=8, epochs=-1.0)


def test_epochs_train_as_many_steps_do(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_epochs = recipe(home, tmp_path / "epochs", stage={"steps": 0, "epochs": 0.75})
    train(by_epochs)
    told = " ".join(capsys.readouterr().out.split())
    assert "tune: 6 steps of 4 samples 0.75 epochs: source many, 24 rows, 0.75 times" in told
    train(recipe(home, tmp_path / "steps"), show=False)
    rows = steps_of(tmp_path / "epochs")
    assert [row.pop("epoch") for row in rows] == pytest.approx([(step + 1) / 8 for step in range(6)])
    assert rows == steps_of(tmp_path / "steps")
    again = molora.config.read(Recipe, tmp_path / "epochs/config.yaml")
    assert (again.stages[0].steps, again.stages[0].epochs) == (0, 0.75)


def test_a_run_goes_on_for_the_epochs_that_it_counted(home: Path, tmp_path: Path) -> None:
    changes = {
        "stage": {"steps": 0, "epochs": 1.5, "data": {"many": rows_of(tmp_path / "rows.jsonl")}},
        "evaluations": {},
    }
    write_rows(tmp_path / "rows.jsonl", 24)
    train(recipe(home, tmp_path / "straight", **changes), show=False)
    broken = recipe(home, tmp_path / "broken", **changes)
    train_until(broken, 5)
    write_rows(tmp_path / "rows.jsonl", 32)
    assert planned_steps(broken, tmp_path / "broken/state/step-4") == [9], "what a run counted does not change"
    assert planned_steps(broken, None) == [12]
    write_rows(tmp_path / "rows.jsonl", 24)
    train(broken, show=False)
    assert steps_of(tmp_path / "broken") == steps_of(tmp_path / "straight")
    broken.stages[0].epochs = 2.0  # where the learning rates allow it, a stage may be longer
    train(broken, show=False)
    assert [row["epoch"] for row in steps_of(tmp_path / "broken")] == pytest.approx(
        [(step + 1) / 6 for step in range(12)]
    )
    broken.stages[0].epochs = 0.5
    with pytest.raises(ConfigError, match="stages.0.epochs, in steps: was 12, is 3, but 12 steps of it are done"):
        train(broken, show=False)


# Rows of the log ----------------------------------------------------------------------------------------------------


def test_a_step_tells_the_loss_of_each_source(home: Path, tmp_path: Path) -> None:
    model, processor = open_model(plan_recipe(recipe(home, tmp_path / "run")), "cpu")
    still = {"projectors": PartConfig(learning_rate=0.0)}
    rows = [json.loads(line) for line in (home / "many.jsonl").read_text().splitlines()]
    samples = [
        processor.encode(row["messages"], f"{'a/b' if index % 3 else 'other'}/{row['id']}@0")
        for index, row in enumerate(rows)
    ]

    def row_of(chosen: list[Any]) -> dict[str, Any]:
        return train_step(model, processor, chosen, 200, set_trainable(model, still, 1, "test"))

    together = row_of(samples)
    assert {key for key in together if key.startswith("source_")} == {
        f"source_{what}/{name}" for what in ("loss", "targets") for name in ("a", "other")
    }
    for name in ("a", "other"):
        alone = row_of([sample for sample in samples if sample.id.startswith(f"{name}/")])
        groups = [key.removeprefix("loss/") for key in alone if key.startswith("loss/")]
        targets = sum(alone[f"targets/{group}"] for group in groups)
        loss = sum(alone[f"loss/{group}"] * alone[f"targets/{group}"] for group in groups) / targets
        assert len(groups) == 2 and together[f"source_targets/{name}"] == targets
        assert together[f"source_loss/{name}"] == pytest.approx(loss, rel=1e-5)


def test_seconds_by_phase_add_up_and_frames_are_apart(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "run", evaluations={}), show=False)
    for row in log_of(tmp_path / "run"):
        phases = [row[f"seconds/{phase}"] for phase in PHASES]
        assert sum(phases) == pytest.approx(row["seconds"]) and all(seconds >= 0 for seconds in phases)
        assert (row["seconds/encoding"] > 0) == ("targets/numbers" in row)
    assert {"targets/numbers" in row for row in log_of(tmp_path / "run")} == {True}
    totals = read_json(tmp_path / "run/state/step-6/state.json")["totals"][0]
    assert totals["seconds"]["forward"] == pytest.approx(sum(r["seconds/forward"] for r in log_of(tmp_path / "run")))


def test_the_clock_gives_time_to_the_innermost_encoder() -> None:
    clock, encoder = PhaseClock(torch.device("cpu")), nn.Sequential(nn.Linear(1, 1))
    clock.watch([encoder, encoder[0]])
    encoder(torch.ones(1))  # before a step begins, as in an evaluation
    assert clock.marks == []
    clock.start("loading")
    clock.to("forward")
    encoder(torch.ones(1))
    with pytest.raises(RuntimeError):
        encoder(torch.ones(2))
    assert [phase for phase, _ in clock.marks] == [
        *("loading", "forward", "encoding", "encoding", "encoding", "forward"),
        *("encoding", "encoding", "encoding", "forward"),
    ]
    seconds = clock.read()
    assert list(seconds) == list(PHASES) and seconds["encoding"] > 0 and seconds["backward"] == 0


def test_the_end_of_a_stage_tells_where_its_seconds_went(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(home, tmp_path / "run", evaluations={}))
    told = " ".join(capsys.readouterr().out.split())
    shares = re.search(r"tune: 6 steps in [\d.,]+ s: (.*?other \d+%)", told)
    assert shares and [part.split()[0] for part in shares[1].split(", ")] == list(PHASES)
    assert 97 <= sum(int(share) for share in re.findall(r"(\d+)%", shares[1])) <= 103


def test_tensorboard_shows_the_same_questions_each_time_as_they_are_written(home: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(home, tmp_path / "run"), show=False)
    (path,) = (tmp_path / "run/tensorboard").iterdir()
    events = EventAccumulator(str(path), size_guidance={"tensors": 0}).Reload()
    shown = events.Tensors("test/answers/text_summary")
    assert [event.step for event in shown] == [2, 4, 6]
    tables = [event.tensor_proto.string_val[0].decode().splitlines() for event in shown]
    questions = [[line.split(" | ")[0] for line in table[2:]] for table in tables]
    assert questions[0] == questions[1] == questions[2]
    assert questions[0] == [
        f"| {'(numbers) ' if n % 2 == 0 else ''}&#42;is&#42; &#124; &#60;b&#62; {n}" for n in (0, 2, 5, 8)
    ]
    assert [event.step for event in events.Scalars("test/exact_match")] == [2, 4, 6]
    assert len(events.Scalars("source_loss/many")) == 6


def test_the_answers_of_each_evaluation_are_kept_and_those_of_lost_steps_are_not(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "straight"), show=False)
    kept = tmp_path / "straight/predictions"
    assert sorted(path.name for path in kept.iterdir()) == ["step-2", "step-4", "step-6"]
    for step in (2, 4, 6):
        judged = read_predictions(kept / f"step-{step}", "test", {"step": step}, "train")
        (row,) = (row for row in log_of(tmp_path / "straight") if row["step"] == step and "test/drawn" in row)
        assert Drawn(NoOptions()).score(judged)["drawn"] == row["test/drawn"] and len(judged) == 9
        assert [item.adapters for item in judged[:2]] == [["numbers"], []]
    broken = recipe(home, tmp_path / "broken")
    train_until(broken, 5)
    shutil.copytree(tmp_path / "broken/predictions/step-4", tmp_path / "broken/predictions/step-8")
    train(broken, show=False)
    for path in sorted(kept.glob("*/test.jsonl")):
        assert path.read_bytes() == (tmp_path / "broken/predictions" / path.relative_to(kept)).read_bytes()
    assert not (tmp_path / "broken/predictions/step-8").exists()


def test_media_of_all_steps_lie_in_one_folder(home: Path, tmp_path: Path) -> None:
    from PIL import Image

    items = [
        Judged(
            f"{row}:q",
            [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4), "red")}]}],
            *("yes", "no", False),
        )
        for row in range(2)
    ]
    for step in (1, 2):
        keep_predictions(tmp_path / f"step-{step}", "test", {"step": step}, items, tmp_path)
    assert len(list(tmp_path.rglob("*.png"))) == 1
    (part,) = read_predictions(tmp_path / "step-2", "test", {"step": 2}, "train")[1].messages[0]["content"]
    assert Image.open(part["path"]).getpixel((0, 0)) == (255, 0, 0)


def test_tensorboard_can_be_left_out(home: Path, tmp_path: Path) -> None:
    train(recipe(home, tmp_path / "run", trackers=[]), show=False)
    assert len(log_of(tmp_path / "run")) == 9 and not (tmp_path / "run/tensorboard").exists()


# The best step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("highest", [True, False])
def test_the_best_step_is_kept_and_opens_like_a_run(
    home: Path, tmp_path: Path, highest: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = {"evaluation": "test", "metric": "drawn", "highest": highest}
    config = recipe(home, tmp_path / "run", keep_best=keep)
    train(config)
    values = {row["step"]: row["test/drawn"] for row in log_of(tmp_path / "run") if "test/drawn" in row}
    assert len(set(values.values())) == 3, "the metric tells the steps apart"
    step = (max if highest else min)(values, key=lambda step: values[step])
    best = tmp_path / "run/best"
    assert read_json(best / "best.json") == {
        **{"format_version": "1.0", **keep, "step": step, "stage": "tune", "value": values[step]}
    }
    told = " ".join(capsys.readouterr().out.split())
    assert f"the best was step {step}, with test/drawn {values[step]:.4f}; it is in {best}" in told
    weights = load_file(best / f"state/step-{step}/weights.safetensors")
    parts = molora.load(best).model.parts()
    found = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    assert weights and all(torch.equal(found[name], value) for name, value in weights.items())
    # Training can go on from there, to the same end.
    config.run = str(best)
    train(config, show=False)
    last = load_file(tmp_path / "run/state/step-6/weights.safetensors")
    again = load_file(best / "state/step-6/weights.safetensors")
    assert all(torch.equal(again[name], value) for name, value in last.items())


def test_the_best_step_survives_a_break(home: Path, tmp_path: Path) -> None:
    keep = {"evaluation": "test", "metric": "drawn", "highest": True}
    straight = train(recipe(home, tmp_path / "straight", keep_best=keep), show=False)
    broken = recipe(home, tmp_path / "broken", keep_best=keep)
    for step in (3, 5):
        train_until(broken, step)
    train(broken, show=False)
    files = {
        str(path.relative_to(straight)): path.read_bytes()
        for path in sorted((straight / "best").rglob("*"))
        if path.is_file() and path.name != "state.json"
    }
    assert len(files) > 5
    assert {name: (tmp_path / "broken" / name).read_bytes() for name in files} == files
    about = [read_json(run / "state/step-6/state.json") for run in (straight, tmp_path / "broken")]
    assert about[0]["best"] == about[1]["best"] == {**about[0]["best"], "stage": "tune"}


def test_what_keep_best_names_is_there(home: Path, tmp_path: Path) -> None:
    keep = {"evaluation": "test", "metric": "exact_match", "highest": True}
    with pytest.raises(ConfigError, match=r"keep_best.evaluation: 'tset' is none; did you mean 'test'"):
        recipe(home, tmp_path / "run", keep_best={**keep, "evaluation": "tset"})
    with pytest.raises(
        ConfigError, match=r"gives no 'exactmatch'; did you mean 'exact_match'\? it gives cut_off, drawn"
    ):
        train(recipe(home, tmp_path / "run", keep_best={**keep, "metric": "exactmatch"}), show=False)
    assert not (tmp_path / "run").exists()
    train(recipe(home, tmp_path / "run", keep_best=keep), show=False)
    with pytest.raises(ConfigError, match=r"keep_best.highest: was True, is False"):
        train(recipe(home, tmp_path / "run", keep_best={**keep, "highest": False}), show=False)
    with pytest.raises(ConfigError, match=r"evaluations.test.max_new_tokens: was 4, is 5"):
        other = recipe(home, tmp_path / "run", keep_best=keep)
        other.evaluations["test"].max_new_tokens = 5
        train(other, show=False)


# Trackers -----------------------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a tracker's service: the rows that were given to each run of it."""

    rows: dict[str, list[tuple[int, tuple[str, ...]]]]

    def __init__(self, id: str) -> None:
        self.id = id

    def log(self, values: dict[str, float], step: int) -> None:
        names = tuple(sorted(key for key in values if not key.startswith("seconds")))
        self.rows.setdefault(self.id, []).append((step, names))

    def finish(self) -> None: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    Recorded.rows = {}
    monkeypatch.setattr(trackers.Trackers, "_begin", lambda self, name, id: Recorded(f"{name} {id}"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return Recorded


def test_a_tracker_gets_every_row_once_however_often_training_stops(
    home: Path, tmp_path: Path, recorded: type[Recorded]
) -> None:
    changes = {"trackers": ["wandb", "trackio"], "save_every_steps": 3}
    train(recipe(home, tmp_path / "straight", **changes), show=False)
    (first, second) = recorded.rows.values()
    assert first == second and len(first) == 9
    recorded.rows = {}
    broken = recipe(home, tmp_path / "broken", **changes)
    for step in (4, 4, 5, 5, 6):
        train_until(broken, step)
    train(broken, show=False)
    assert set(map(tuple, recorded.rows.values())) == {tuple(first)}
    assert {id.split()[0] for id in recorded.rows} == {"wandb", "trackio"} and len(recorded.rows) == 2
    assert log_of(tmp_path / "broken")[-1]["step"] == 6 and len(log_of(tmp_path / "broken")) == 9


def test_a_run_from_nothing_is_another_run_of_the_tracker(home: Path, tmp_path: Path, recorded: type[Recorded]) -> None:
    config = recipe(home, tmp_path / "run", trackers=["trackio"])
    train_until(config, 1)
    train(config, show=False)
    assert [len(rows) for rows in recorded.rows.values()] == [1, 9]
    train(config, show=False)
    assert [len(rows) for rows in recorded.rows.values()] == [1, 9]


def test_a_tracker_that_is_added_later_gets_the_rows_to_come(
    home: Path, tmp_path: Path, recorded: type[Recorded]
) -> None:
    config = recipe(home, tmp_path / "run")
    train_until(config, 3)
    config.trackers = ["tensorboard", "trackio"]
    train(config, show=False)
    (rows,) = recorded.rows.values()
    assert [step for step, _ in rows] == [2, 3, 4, 4, 5, 6, 6]  # the evaluation of the state that it went on from


def test_a_tracker_that_fails_is_told_and_training_goes_on(
    home: Path, tmp_path: Path, recorded: type[Recorded], capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: Recorded, values: dict[str, float], step: int) -> None:
        if step == 3:
            raise ConnectionError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorded, "log", failing)
        train(recipe(home, tmp_path / "run", trackers=["trackio"]), show=False)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("trackio failed at step 3 (ConnectionError: no network) and gets no more rows") == 1
    assert len(log_of(tmp_path / "run")) == 9


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_missing_is_told_before_anything_is_opened(home: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    config = recipe(home, tmp_path / "run", trackers=[name], backbone={"path": str(tmp_path / "none")})
    with pytest.raises(ImportError, match=rf"trackers: {name} is not installed: pip install 'molora\[{name}\]'"):
        train(config, show=False)
    with pytest.raises(ConfigError, match=r"trackers.*did you mean 'wandb'\?"):
        recipe(home, tmp_path / "run", trackers=["wandbb"])


def test_trackio_goes_on_with_one_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    config = recipe(home, tmp_path / "run", trackers=["trackio"], save_every_steps=3, tracker_project="tried")
    train_until(config, 5)
    train(config, show=False)
    (name,) = SQLiteStorage.get_runs("tried")
    logged = SQLiteStorage.get_logs("tried", name)
    ours = [row for row in logged if "loss/text" in row or "test/drawn" in row]
    assert [row["step"] for row in ours] == [row["step"] for row in log_of(tmp_path / "run")]


def test_wandb_offline_goes_on_with_one_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = recipe(home, tmp_path / "run", trackers=["wandb"], save_every_steps=3)
    train_until(config, 5)
    train(config, show=False)
    ids = {path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {read_json(tmp_path / "run/trackers.json")["trackers"]["wandb"]["id"]}


# The card -----------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_trained_on_what(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run", stage={"steps": 0, "epochs": 0.75})
    train(config, show=False)
    card, page = read_json(tmp_path / "run/card.json"), (tmp_path / "run/card.md").read_text()
    (stage,) = card["stages"]
    assert (card["steps"], card["planned_steps"], stage["counted_steps"]) == (6, 6, 6)
    sources = stage["sources"]
    assert sources["many"]["rows"] == 24 and sources["many"]["licence"] == "CC BY 4.0" and not sources["few"]["licence"]
    for name in ("many", "few"):
        digest = hashlib.sha256((home / f"{name}.jsonl").read_bytes()).hexdigest()
        assert sources[name]["sha256"] == sources[name]["files"][0]["sha256"] == digest and digest[:12] in page
        told = sum(row.get(f"source_targets/{name}", 0) for row in steps_of(tmp_path / "run"))
        assert sources[name]["target_tokens"] == told > 0
    assert sum(source["samples"] for source in sources.values()) == 24
    last = log_of(tmp_path / "run")[-1]
    assert card["evaluations"]["test"]["scores"] == {k[5:]: v for k, v in last.items() if k.startswith("test/")}
    assert f"| test | 6 | drawn | {last['test/drawn']:.4f} |" in page
    about = read_json(tmp_path / "run/modalities/numbers/modality.json")
    assert card["backbone"]["weights"] == about["backbone"]["weights"] and about["backbone"]["weights"] in page
    assert card["command"] == f"molora train {tmp_path / 'run/config.yaml'}" and f"`{card['command']}`" in page
    assert card["environment"]["versions"]["torch"] in torch.__version__
    assert set(stage["seconds"]) == {*PHASES, "evaluation"}


def test_a_card_tells_of_a_modality_that_was_taken_over(home: Path, tmp_path: Path) -> None:
    first = train(recipe(home, tmp_path / "first", evaluations={}), show=False)
    folder = first / "modalities/numbers"
    second = recipe(home, tmp_path / "second", evaluations={}, modalities={"numbers": {"path": str(folder)}})
    train(second, show=False)
    taken = read_json(tmp_path / "second/card.json")["modalities"]["numbers"]["taken_from"]
    assert taken["sha256"] == hashlib.sha256((folder / "modality.json").read_bytes()).hexdigest()
    assert taken["path"] == str(folder)


def test_a_card_is_of_the_last_state_and_stays_as_it_is(home: Path, tmp_path: Path) -> None:
    config = recipe(home, tmp_path / "run", evaluations={})
    straight = train(recipe(home, tmp_path / "straight", evaluations={}), show=False)
    train_until(config, 3)
    assert not (tmp_path / "run/card.json").exists()
    train(config, show=False)
    cards = [read_json(run / "card.json") for run in (straight, tmp_path / "run")]
    for card in cards:
        for key in ("run", "command", "recipe"):
            del card[key]
        del card["stages"][0]["seconds"]
    assert cards[0] == cards[1]
    (tmp_path / "run/card.md").write_text("read")
    train(config, show=False)
    assert (tmp_path / "run/card.md").read_text() == "read"
    (tmp_path / "run/card.json").unlink()  # as a kill before the card leaves it
    train(config, show=False)
    assert (tmp_path / "run/card.md").read_text() != "read"


def test_data_are_hashed_by_content_and_large_ones_by_name_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("1.tar", "0.tar"):
        (tmp_path / "shards" / name).write_text(name * 3)
    config = SourceConfig(kind="x", options={"path": str(tmp_path / "shards"), "split": str(tmp_path / "shards/0.tar")})
    whole = about_source(config)
    assert [Path(file["path"]).name for file in whole["files"]] == ["0.tar", "1.tar"]
    assert whole["hashed"] == "content" and whole["bytes"] == 30
    globbed = SourceConfig(kind="x", options={"files": [{"path": str(tmp_path / "shards/*.tar")}]})
    assert about_source(globbed)["sha256"] == whole["sha256"]
    (tmp_path / "shards/.molora-0123456789abcdef.tmp").mkdir()
    (tmp_path / "shards/.molora-0123456789abcdef.tmp/new").write_text("what another process is writing")
    assert about_source(config) == whole
    (tmp_path / "shards/1.tar").write_text("another text...")
    assert about_source(config)["sha256"] != whole["sha256"]
    assert HASHED_BYTES == 2**30
    monkeypatch.setattr("molora.train.card.HASHED_BYTES", 29)
    large = about_source(config)
    assert large["hashed"] == "names and sizes" and large["files"][0]["sha256"] is None
    (tmp_path / "shards/1.tar").write_text("1.tar" * 3)
    assert about_source(config)["sha256"] == large["sha256"]


def test_a_source_may_say_where_its_rows_are_from() -> None:
    class Told(list[Any]):
        def provenance(self) -> dict[str, Any]:
            return {"fingerprint": "abc", "licence": "MIT", "files": []}

    told = about_source(SourceConfig(kind="x"), Told([1, 2]))  # pyright: ignore[reportArgumentType]
    assert (told["rows"], told["fingerprint"], told["licence"], told["sha256"]) == (2, "abc", "MIT", None)
    stated = about_source(SourceConfig(kind="x", licence="CC0"), Told([1]))  # pyright: ignore[reportArgumentType]
    assert stated["licence"] == "CC0"


def test_a_dataset_tells_its_licence_and_its_commit(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    url = f"hf://datasets/org/name@{'0a' * 20}/data/train.parquet"
    told = datasets.DatasetInfo(license="cc0-1.0", download_checksums={url: {"num_bytes": 1, "checksum": None}})
    datasets.Dataset.from_dict({"q": ["a", "b"], "a": ["1", "2"]}, info=told).save_to_disk(tmp_path / "saved")
    options = {"path": str(tmp_path / "saved"), "prompt": "{q}", "answer": "{a}"}
    config = SourceConfig(kind="table", options=options, limit=1)
    about = about_source(config, open_source(config, "data"))
    assert (about["rows"], about["licence"], about["fingerprint"]) == (1, "cc0-1.0", f"org/name@{'0a' * 20}")
    assert {Path(file["path"]).suffix for file in about["files"]} == {".arrow", ".json"}


def test_a_state_of_older_code_goes_on(home: Path, tmp_path: Path) -> None:
    straight = train(recipe(home, tmp_path / "straight"), show=False)
    config = recipe(home, tmp_path / "run")
    train_until(config, 3)
    path = tmp_path / "run/state/step-2/state.json"
    about = read_json(path)
    for key in ("steps", "best", "totals"):
        del about[key]
    for key in ("keep_best", "trackers", "tracker_project"):
        del about["recipe"][key]
    for stage in about["recipe"]["stages"]:
        del stage["epochs"]
        for source in stage["data"].values():
            del source["licence"]
    path.write_text(json.dumps(about))
    config.stages[0].data["few"].licence = "MIT"  # said later, and no other data
    train(config, show=False)
    assert steps_of(tmp_path / "run") == steps_of(straight)
    assert read_json(tmp_path / "run/card.json")["stages"][0]["counted_steps"] == 4
    assert "counted over 4 of them" in (tmp_path / "run/card.md").read_text()
