"""Metrics as plugins: named in a recipe by name, file, module or entry point; old recipes' keys are still read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molora.config import ConfigError, build, dump, plain_yaml, read
from molora.evaluate.judge import Evaluation, EvaluationConfig, Evaluations
from molora.evaluate.metrics import Judged, Metric, NoOptions, open_metrics, scores
from molora.evaluate.metrics.text import ExactMatch
from molora.evaluate.questions import Question, judge, question
from molora.inference.load import Answer
from molora.plugin_kit import catalogue
from molora.plugins import available, resolve
from molora.synthetic.rated import open_verifier
from molora.train.recipe import Recipe

LENGTHS = """
from dataclasses import dataclass


@dataclass
class LengthsConfig:
    longest: int = 3


class Lengths:
    \"\"\"How long answers are. More is told in the manual.\"\"\"

    config_type = LengthsConfig

    def __init__(self, config):
        if config.longest < 1:
            raise ValueError(f"longest is {config.longest}; give 1 or more")
        self.longest = config.longest

    def score(self, judged):
        lengths = [len(item.answer) for item in judged]
        return {"mean_length": sum(lengths) / len(lengths), "too_long": sum(n > self.longest for n in lengths)}


class Nothing:
    config_type = LengthsConfig
"""
ASKED = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]
JUDGED = [Judged("0:a", [], "yes", "Yes.", True, ["short"]), Judged("1:b", [], "yes", "no way", False)]


@pytest.fixture
def lengths(tmp_path: Path) -> str:
    (tmp_path / "lengths.py").write_text(LENGTHS)
    return f"{tmp_path}/lengths.py:Lengths"


# Numbers of each built-in metric, for answers that all of them can score. `judge` needs a server: see test_judge_model;
# those of values need some: see test_verifiers.
NUMBERS = {
    "exact_match": {"exact_match"},
    "macro_f1": {"macro_f1"},
    "yes_no": {"yes_no_accuracy", "yes_no_precision", "yes_no_recall", "yes_no_f1", "yes_share"},
    "multiple_choice": {"multiple_choice", "no_choice"},
    "choice_likelihood": {"choice_likelihood"},
    "vqa_accuracy": {"vqa_accuracy"},
    "anls": {"anls"},
    "relaxed_accuracy": {"relaxed_accuracy"},
    "word_error_rate": {"word_error_rate"},
    "character_error_rate": {"character_error_rate"},
    "bleu": {"bleu"},
    "chrf": {"chrf"},
    "cider": {"cider"},
    "rouge": {"rouge_1", "rouge_2", "rouge_l", "rouge_l_sum"},
}
LIBRARY = {"anls": "rapidfuzz", "bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}


def test_built_in_metrics_have_their_names() -> None:
    named = {plugin.name for plugin in available("metric") if plugin.origin == "built-in"}
    assert named == {*NUMBERS, "judge", "number", "regular_expression", "math", "unit_tests"}


@pytest.mark.parametrize("name", NUMBERS)
def test_built_in_metrics_keep_the_contract(name: str) -> None:
    pytest.importorskip(LIBRARY.get(name, "jiwer"))
    several = {"answers": ["yes", "yes", "no"], "choices": ["yes", "no"], "choice": 0}
    judged = [replace(item, **several, likelihoods=[(-1.0, 1), (-2.0, 1)]) for item in JUDGED]
    (metric,) = open_metrics([name], "metrics")
    given: Metric = metric
    assert set(given.score(judged)) == NUMBERS[name] == set(given.score(judged[:1]))


def test_a_metric_of_a_file_gives_its_numbers_over_all_answers_and_by_tag(lengths: str) -> None:
    assert scores(JUDGED, open_metrics(["exact_match", {lengths: {"longest": 4}}], "metrics")) == {
        "exact_match": 0.5, "mean_length": 5, "too_long": 1, "questions": 2,
        "exact_match/short": 1, "mean_length/short": 4, "too_long/short": 0, "questions/short": 1,
        "failed": 0, "cut_off": 0,
    }  # fmt: skip


def test_a_metric_of_an_installed_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_lengths.py").write_text(LENGTHS)
    (tmp_path / "acme-1.0.dist-info").mkdir()
    (tmp_path / "acme-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    entries = "[molora.metrics]\nlengths = acme_lengths:Lengths\n"
    (tmp_path / "acme-1.0.dist-info" / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [metric.score(JUDGED)["too_long"] for metric in open_metrics(["lengths"], "metrics")] == [2]
    assert ("lengths", "acme", ("How long answers are",)) in [
        (entry.name, entry.origin, entry.columns) for entry in catalogue.metrics()
    ]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("exact_mach", "recipe: exact_mach: no metric is called 'exact_mach'; did you mean 'exact_match'\\?"),
        ({"lengths.py:Lengths": {"longest": 0}}, "longest is 0; give 1 or more"),
        ({"lengths.py:Lengths": {"longst": 3}}, "longst: no such key; did you mean 'longest'\\?"),
        ({"exact_match": {"case": True}}, "exact_match: .*case: no such key"),
        ("lengths.py:Nothing", "class Nothing lacks score, which every metric has"),
    ],
)
def test_a_mistake_is_named_where_the_metric_is(
    lengths: str, named: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        open_metrics([named], "recipe")


class Gives:
    """Whatever it is told to give."""

    config_type = NoOptions

    def __init__(self, numbers: Any) -> None:
        self.numbers = numbers

    def score(self, judged: Any) -> Any:
        return self.numbers


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"exact_match": 1.0}, "two numbers are called 'exact_match', by metric ExactMatch and by metric Gives"),
        ({"failed": 1.0}, "two numbers are called 'failed', by molora's own counts and by metric Gives"),
        (1.0, "metric Gives: score gives 1.0; give a mapping of names to numbers"),
        ({"a/b": 1.0}, "calls a number 'a/b'; a name is a text without a slash"),
        ({"mean": float("nan")}, "mean is nan; give a finite number or none"),
        ({"mean": "high"}, "mean is 'high'"),
        ({"mean": True}, "mean is True; give a finite number"),
    ],
)
def test_numbers_that_would_be_mistaken_are_refused(numbers: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        scores(JUDGED, [ExactMatch(NoOptions()), Gives(numbers)])


def test_what_a_metric_raises_is_told_with_its_name() -> None:
    class Broken(Gives):
        def score(self, judged: Any) -> Any:
            return {"x": {}["nothing"]}

    with pytest.raises(ValueError, match="metric Broken: KeyError: 'nothing'; --debug shows where"):
        scores(JUDGED, [Broken(None)])


def test_numbers_of_numpy_are_numbers() -> None:
    found = scores(JUDGED, [Gives({"half": np.float32(0.5), "two": np.int64(2)})])
    assert (found["half"], type(found["half"])) == (0.5, float) and json.loads(json.dumps(found)) == found


def test_the_metric_of_the_page_works_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/answers.md").read_text()
    _, page = page.split("### A metric of your own")
    page, each = page.split("### A metric that rates single answers")
    code, *recipes = re.findall(r"```python\n(.*?)```|    (metrics: [^\n]*lengths[^\n]*)\n", page, re.DOTALL)
    (tmp_path / "lengths.py").write_text(code[0])
    monkeypatch.chdir(tmp_path)
    named = [build(EvaluationConfig, {"data": {"kind": "x"}, **plain_yaml.parse(text)}, "page") for _, text in recipes]
    assert scores(JUDGED, open_metrics(named[0].metrics, "page"))["added_characters"] == (1 + 3) / 2
    (code,) = re.findall(r"```python\n(.*?)```", each, re.DOTALL)
    (tmp_path / "mentions.py").write_text(code)
    verifier = open_verifier("mentions.py:Mentions")
    asked = Question("q", ASKED, "yes", answers=["yes", "of course"])
    rated = [verifier.rate(asked, Answer("q", text, (), 0, (), "stop")) for text in ("Well, yes!", "no")]
    assert rated == [(1.0, True), (0.0, False)]


def test_an_answer_is_right_if_it_equals_one_that_is_accepted() -> None:
    rows: Any = [{"id": "q", "messages": ASKED, "answers": ["yes", "Of course!"]}, {"id": "r", "messages": ASKED}]
    asked = question(rows, 0)
    judged = [judge(asked, answer) for answer in ("of  course!", "Yes.", "no")]
    assert [item.correct for item in judged] == [True, True, False]
    assert {tuple(item.answers) for item in judged} == {("yes", "Of course!")}
    (exact_match, macro_f1) = open_metrics(["exact_match", "macro_f1"], "metrics")
    assert exact_match.score(judged) == {"exact_match": 2 / 3}
    assert macro_f1.score(judged) == {"macro_f1": pytest.approx(2 * 2 / (3 + 2))}  # both are answers of the class yes
    alone = question(rows, 1)
    assert judge(alone, "yes").answers == ["yes"] and not judge(alone, "of course!").correct


def test_no_metric_sees_a_question_that_failed(lengths: str) -> None:
    failed = Judged("2:c", [], "yes", "", False, error="no such picture")
    metrics = open_metrics([lengths], "metrics")
    assert scores([*JUDGED, failed], metrics) == {**scores(JUDGED, metrics), "failed": 1}
    assert scores([failed], metrics) == {"questions": 0, "failed": 1, "cut_off": 0}


OLD: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "a flag": ({"word_errors": True}, ["exact_match", "word_error_rate"], "metrics: [exact_match, word_error_rate]"),
    "all": (
        {"word_errors": True, "character_errors": True, "macro_f1": True, "bleu": "zh"},
        ["exact_match", "word_error_rate", "character_error_rate", "macro_f1", {"bleu": {"tokeniser": "zh"}}],
        "{bleu: {tokeniser: zh}}]",
    ),
    "as a run wrote them": (
        {"word_errors": False, "character_errors": False, "macro_f1": False, "bleu": None},
        ["exact_match"],
        "",
    ),
    "beside the list": (
        {"metrics": ["macro_f1"], "word_errors": True, "macro_f1": True},
        ["macro_f1", "word_error_rate"],
        "metrics: [macro_f1, word_error_rate]",
    ),
    "none": ({}, ["exact_match"], ""),
}


@pytest.mark.parametrize("kind", OLD)
def test_the_keys_of_old_recipes_are_read_and_one_line_says_what_to_write(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, metrics, says = OLD[kind]
    path = tmp_path / "recipe.yaml"
    path.write_text(dump({"evaluations": {"test": {"data": {"kind": "easy_vqa"}, **old}}}))
    evaluations = read(Evaluations, path)
    assert evaluations.evaluations["test"].metrics == metrics
    told = " ".join(capsys.readouterr().err.split())
    assert (says in told and told.count("warning: evaluations.test: ") == 1) if says else not told
    path.write_text(dump(evaluations))
    assert read(Evaluations, path) == evaluations and not capsys.readouterr().err


def test_an_old_key_that_is_no_flag_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluations.test.macro_f1: no such key"):
        build(Evaluations, {"evaluations": {"test": {"data": {"kind": "easy_vqa"}, "macro_f1": 3}}}, "recipe")


def test_reading_a_recipe_runs_no_metric_of_it(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    data = {"kind": "messages", "options": {"path": "none.jsonl"}}
    evaluation = {"data": data, "metrics": [f"{tmp_path}/evil.py:Metric"]}
    recipe = {"run": "r", "backbone": {"path": "b"}, "modalities": {}, "evaluations": {"test": evaluation}}
    stage = {"name": "s", "train": {}, "data": {}, "steps": 1, "samples_per_step": 1}
    build(Recipe, {**recipe, "stages": [stage]}, "recipe")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="evil.py has no 'Metric'"):
        Evaluation("test", build(EvaluationConfig, evaluation, "recipe"))
    assert (tmp_path / "ran").exists()


def test_the_members_asked_for_are_those_of_the_contract() -> None:
    assert resolve("metric", "molora.evaluate.metrics.translation:Bleu").__name__ == "Bleu"
    with pytest.raises(ConfigError, match="class Judged lacks config_type, score, which every metric has"):
        resolve("metric", "molora.evaluate.metrics:Judged")
