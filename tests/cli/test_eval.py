"""`molora eval` as a user meets it: answers kept, scored again, beside baselines and another run, and a page."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molora.inference import answers
from molora.inference.answers import row_bytes
from molora.terminal import console
from tests.cli.test_cli import RECIPE, run_cli

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True)
def output_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command about a model that is no run turns its tables to standard error, for as long as the process lasts."""
    monkeypatch.setattr(console, "stderr", False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, trained on a question about each of four pictures, one for a step longer."""
    from molora.testing import save_backbone

    folder = tmp_path_factory.mktemp("eval")
    save_backbone(folder / "backbone")
    rows = []
    for index, colour in enumerate(COLOURS):
        Image.new("RGB", (16, 24), colour).save(folder / f"{colour}.png")
        content = [{"type": "image", "path": f"{colour}.png"}, {"type": "text", "text": f"what {index}?"}]
        answer = "that" if index else "this"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": f"row {index}", "messages": messages, "tags": ["odd"] if index % 2 else []}))
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE.format(home=folder).partition("evaluations:")[0] + "device: cpu\n")
    for name, steps in (("run", 2), ("longer", 3)):
        overrides = (f"run={folder / name}", f"stages.0.steps={steps}")
        assert run_cli("train", str(folder / "recipe.yaml"), *overrides) == 0
    return folder


def evaluate(home: Path, *options: str, run: str = "run", name: str = "test", **settings: Any) -> int:
    data = {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}
    config = home / "evaluations.yaml"
    config.write_text(json.dumps({"evaluations": {name: {"data": data, "max_new_tokens": 2, **settings}}}))
    return run_cli("eval", str(home / run), str(config), *options)


def recorded(home: Path, run: str = "run") -> dict[str, Any]:
    return json.loads((home / run / "evaluation.json").read_text())


def test_answers_are_scored_again_without_the_model_by_other_metrics_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(home) == 0
    before = recorded(home)["evaluations"]["test"]
    weights = shutil.move(home / "backbone/model.safetensors", tmp_path)
    try:
        assert evaluate(home, "--rescore") == 0
        assert recorded(home)["evaluations"]["test"] == before
        assert evaluate(home, "--rescore", metrics=["exact_match", "character_error_rate"]) == 0
        found = recorded(home)["evaluations"]["test"]
        assert found.items() > before.items() and "character_error_rate/odd" in found
        capsys.readouterr()
        assert evaluate(home, "--rescore", max_new_tokens=3) == 1
        assert "settings.max_new_tokens is 2 there and 3 here; leave --rescore out" in " ".join(
            capsys.readouterr().err.split()
        )
        assert evaluate(home, "--rescore", name="other") == 1
        assert "no answers of evaluation 'other' are kept there" in " ".join(capsys.readouterr().err.split())
        assert evaluate(home, "--rescore", "--anew") == 1
        assert evaluate(home, "--anew") == 1, "the model cannot be opened"
    finally:
        shutil.move(weights, home / "backbone")


def test_an_evaluation_again_asks_nothing_unless_it_is_told_to(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(home, name="again") == 0
    path = home / "run/predictions/again.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "answer": "this"}) + "\n" for row in rows))
    capsys.readouterr()
    assert evaluate(home, name="again") == 0
    assert "has 4 of 4 answers of this model already; --anew asks again" in " ".join(capsys.readouterr().out.split())
    assert recorded(home)["evaluations"]["again"]["exact_match"] == 0.25, "of the answers that are kept"
    assert evaluate(home, "--anew", name="again") == 0
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


@pytest.mark.parametrize("damaged", ["jsonl", "json"])
def test_damaged_answers_are_told_and_asked_again_on_demand(
    home: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(home, name="hurt") == 0
    path = home / f"run/predictions/hurt.{damaged}"
    whole = path.read_text()
    path.write_text(whole.replace("{", "{{", 1))
    capsys.readouterr()
    assert evaluate(home, name="hurt") == 1 == evaluate(home, "--rescore", name="hurt")
    told = " ".join(capsys.readouterr().err.split())
    assert f"hurt.{damaged}: " in told and told.count("ask all questions again with --anew") == 2
    assert evaluate(home, "--anew", name="hurt") == 0 and path.read_text() == whole


def test_an_interrupt_says_what_is_answered_and_how_to_go_on(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / "run/predictions/stopped.jsonl"

    def interrupting(row: Any) -> bytes:
        if path.stat().st_size:
            os.kill(os.getpid(), signal.SIGINT)
        return row_bytes(row)

    monkeypatch.setattr(answers, "row_bytes", interrupting)
    capsys.readouterr()
    assert evaluate(home, name="stopped") == 130
    monkeypatch.undo()
    done = len(path.read_text().splitlines())
    told = f"stopped: {done} of 4 questions are answered, in {path}; the same call goes on with the others"
    assert 0 < done < 4 and told in " ".join(capsys.readouterr().err.split())
    assert evaluate(home, name="stopped") == 0
    assert f"has {done} of 4 answers" in " ".join(capsys.readouterr().out.split())


def test_baselines_stand_beside_the_score(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(home, name="blind", media=["as is", "none", "blank", "shuffled"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    found = recorded(home)
    names = {"blind", "blind (none)", "blind (blank)", "blind (shuffled)"}
    assert names <= found["evaluations"].keys()
    assert {f"{name}.jsonl" for name in names} <= {path.name for path in (home / "run/predictions").iterdir()}
    table = [line.split() for line in told.splitlines()]
    assert [row[0] for row in table if row[1:2] == ["exact_match"]] == ["blind", "none", "blank", "shuffled"]
    assert found["majority"]["blind"]["exact_match"] == 0.75, "three of four answers are `that`"
    score = found["evaluations"]["blind"]["exact_match"]
    assert ["majority", "answer", "exact_match", "0.7500", f"{score - 0.75:+.4f}"] in table
    low, high = found["intervals"]["blind"]["exact_match"]
    assert low <= score <= high

    def asked(name: str) -> list[Any]:
        lines = (home / f"run/predictions/{name}.jsonl").read_text().splitlines()
        content = [json.loads(line)["messages"][0]["content"] for line in lines]
        return [[Path(part.get("path", "")).stem for part in parts if part["type"] == "image"] for parts in content]

    assert asked("blind") == asked("blind (blank)") == [[colour] for colour in COLOURS]
    assert asked("blind (none)") == [[], [], [], []]
    assert all(one != other for one, other in zip(asked("blind (shuffled)"), asked("blind"), strict=True))


def test_two_runs_are_compared_on_the_same_questions(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(home / "longer")
    assert evaluate(home, "--against", other, name="both") == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "no answers of evaluation 'both' are kept there; evaluate it too, with the same config: molora eval" in told
    assert not (home / "run/predictions/both.jsonl").exists(), "told before a question is asked"
    assert evaluate(home, run="longer", name="both") == 0
    assert evaluate(home, name="both") == 0
    path = home / "longer/predictions/both.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "answer": row["expected"]}) + "\n" for row in rows))
    here = home / "run/predictions/both.jsonl"
    ours = [json.loads(line) for line in here.read_text().splitlines()]
    here.write_text("".join(json.dumps({**row, "answer": "this"}) + "\n" for row in ours))
    capsys.readouterr()
    assert evaluate(home, "--against", other, "--rescore", name="both") == 0
    told = capsys.readouterr().out
    assert max(len(line) for line in told.splitlines() if str(home) not in line) <= 80
    row = next(
        line.split()
        for line in told.splitlines()
        if line.split()[1:3] == ["exact_match", "0.2500"][:2] and "1.0000" in line
    )
    assert row[2:5] == ["0.2500", "1.0000", "-0.7500"]
    written = json.loads((home / "run/predictions/against/both.json").read_text())
    assert (written["here"], written["there"], written["left_out"]) == (str(home / "run"), other, 0)
    assert written["scores"]["there"]["exact_match"] == 1 and written["differences"]["exact_match"]["value"] == -0.75
    assert f"{written['differences']['exact_match']['low']:.4f}" in row
    page = (home / "run/predictions/both.html").read_text()
    assert f"Beside {other}" in page and "<data>-0.7500</data>" in page
    (home / "rows.jsonl").write_text((home / "rows.jsonl").read_text().replace('"this"', '"those"'))
    try:
        assert evaluate(home, "--against", other, name="both") == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "question '0:row 0' expects 'those' here and 'this' there; evaluate both anew on the same data" in told
    finally:
        (home / "rows.jsonl").write_text((home / "rows.jsonl").read_text().replace('"those"', '"this"'))


def test_metrics_that_cannot_work_are_told_before_the_model_is_opened(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.inference.load.load", lambda *_, **__: pytest.fail("the model is opened"))
    for metrics, says in (
        (["exact_match", "exact_match"], "two numbers are called 'exact_match', by metric ExactMatch and by metric Ex"),
        (["vqa_accuracy"], "evaluations.early.metrics: question 0:row 0: has 1 answer; vqa_accuracy needs those of"),
        ("exact_match", "write a list, as [exact_match]"),
    ):
        assert evaluate(home, name="early", metrics=metrics) == 1
        assert says in " ".join(capsys.readouterr().err.split())
    assert evaluate(home, "--against", str(home / "none"), name="early") == 1
    assert "none: no such folder; name a run, or a folder of answers" in " ".join(capsys.readouterr().err.split())


def test_a_model_that_is_no_run_keeps_answers_where_it_is_told_to(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modality = ("--modality", str(home / "run/modalities/vision"))
    assert evaluate(home, *modality, "--predictions", str(tmp_path), run="backbone", name="alone") == 0
    assert {"alone.jsonl", "alone.json", "alone.html"} == {path.name for path in tmp_path.iterdir()}
    first = json.loads(capsys.readouterr().out)
    assert evaluate(home, *modality, "--predictions", str(tmp_path), "--rescore", run="backbone", name="alone") == 0
    assert json.loads(capsys.readouterr().out) == first
    assert evaluate(home, *modality, "--rescore", run="backbone", name="alone") == 1
    assert "is no run; name the folder of its answers with --predictions" in " ".join(capsys.readouterr().err.split())


def test_a_name_that_is_no_file_name_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(home, name="../../elsewhere") == 1
    assert "becomes part of a path" in " ".join(capsys.readouterr().err.split())


def test_answers_of_a_step_are_scored_shown_and_compared(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training asks with the first of several `media`."""
    run = tmp_path / "run"
    asked = {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}
    given = {"held_out": {"data": asked, "max_new_tokens": 2, "media": ["shuffled", "none"]}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((home / "recipe.yaml").read_text() + f"evaluations: {json.dumps(given)}\n")
    overrides = (f"run={run}", "stages.0.steps=3", "stages.0.evaluate_every_steps=2")
    assert run_cli("train", str(recipe), *overrides) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["held_out/exact_match"] for row in logged if "held_out/exact_match" in row}
    assert scores.keys() == {2, 3}
    again, config = ("--rescore", "--predictions", str(run / "predictions/step-2")), str(run / "config.yaml")
    capsys.readouterr()
    assert run_cli("eval", str(run), config, *again, "--against", str(run / "predictions/step-3")) == 0
    told = capsys.readouterr().out
    assert "step 2" in told and ["held_out", "exact_match", f"{scores[2]:.4f}"] in [
        line.split()[:3] for line in told.splitlines()
    ]
    assert {path.name for path in (run / "predictions/step-2").iterdir()} == {
        *("held_out.jsonl", "held_out.json", "held_out.html", "against")
    }
    assert "at step 2" in (run / "predictions/step-2/held_out.html").read_text()
    assert not (run / "evaluation.json").exists(), "which tells of the model as it is"
    assert run_cli("eval", str(run), config, "--against", str(run / "predictions/step-3")) == 0
    rows = [(run / f"predictions/{place}held_out.jsonl").read_text() for place in ("", "step-3/")]
    assert rows[0] == rows[1], "nothing was trained since"
    assert run_cli("eval", str(run), config, *again[1:]) == 1
    assert "add --rescore to score these answers" in " ".join(capsys.readouterr().err.split())
    assert run_cli("eval", str(run), config, *again, "evaluations.held_out.max_new_tokens=3") == 1
    assert "settings.max_new_tokens is 2 there and 3 here; score them as the training did" in " ".join(
        capsys.readouterr().err.split()
    )


def test_shards_of_an_evaluation_are_merged_to_what_one_call_gives(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"name": "sharded", "media": ["as is", "none"], "metrics": ["exact_match", "character_error_rate"]}
    assert evaluate(home, "--anew", **asked) == 0
    folder = home / "run" / "predictions"
    files = [folder / f"sharded{beside}.jsonl" for beside in ("", " (none)")]
    one = [(path.read_bytes(), path.with_suffix(".json").read_bytes()) for path in files]
    before = recorded(home)
    for path in files:
        path.unlink()
    assert evaluate(home, "--shard", "0/3", **asked) == 0
    assert evaluate(home, "--merge", "3", **asked) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "shard 1/3 is missing" in told and "shard 2/3 is missing" in told and "shard 0/3 is" not in told
    for index in (1, 2):
        assert evaluate(home, "--shard", f"{index}/3", **asked) == 0
    weights = shutil.move(home / "backbone/model.safetensors", tmp_path)
    try:
        assert evaluate(home, "--merge", "3", **asked) == 0
    finally:
        shutil.move(weights, home / "backbone")
    assert [(path.read_bytes(), path.with_suffix(".json").read_bytes()) for path in files] == one
    assert recorded(home) == before
    shutil.copy(folder / "sharded.shard-0-of-3.jsonl", folder / "sharded.shard-2-of-3.jsonl")
    assert evaluate(home, "--merge", "3", **asked) == 1
    assert "shard 2/3 is doubled" in " ".join(capsys.readouterr().err.split())
    assert evaluate(home, "--merge", "3", **{**asked, "max_new_tokens": 3}) == 1
    assert "max_new_tokens is 2 there and 3 here" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_go_with_shards_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, told in (
        (("--shard", "0/3", "--merge", "3"), "puts parts together; give one"),
        (("--shard", "0/3", "--rescore"), "merge them first"),
        (("--merge", "3", "--anew"), "leave --rescore and --anew out"),
        (("--shard", "3/3"), "write it as I/N"),
    ):
        assert evaluate(home, *options) == 1
        assert told in " ".join(capsys.readouterr().err.split())
