"""Workflows: the same rows whatever stopped them, each with where it comes from, and no more tokens than allowed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from typer.testing import CliRunner

import molora
from molora.cli.commands import app
from molora.config import ConfigError, plain_yaml
from molora.evaluate.metrics import NoOptions
from molora.inference.load import LoadedModel
from molora.synthetic.rows import Dropped, Row, Work
from molora.synthetic.workflow import OutOfBudget, Workflow, open_workflow
from molora.synthetic.workflow_report import report, spread
from molora.testing import save_backbone

HERE = Path(__file__)


class Shout:
    """A step of somebody else: texts in capitals, and none twice."""

    config_type = NoOptions

    def __init__(self, config: NoOptions) -> None: ...

    def run(self, rows: Sequence[Row], work: Work) -> Iterable[Row | Dropped]:
        seen: set[str] = set()
        for row in rows:
            said = row.columns["question"].upper()
            yield Dropped(row, "said before") if said in seen else row.having(question=said)
            seen.add(said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return molora.load(save_backbone(tmp_path_factory.mktemp("model") / "backbone"), device="cpu")


@pytest.fixture
def seeds(tmp_path: Path) -> Path:
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(json.dumps({"id": f"r{n}", "question": f"{n}?"}) for n in range(6)))
    return path


# No answer of a random model ends by itself.
DECODING = {"max_new_tokens": 20, "temperature": 1.0, "stop": [*ascii_lowercase]}


def config(model: LoadedModel, seeds: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Two answers for each question, a second thought about each, and those that are not empty."""
    return {
        "output": str(output),
        "models": {"writer": {"local": {"path": model.layout.backbone, "answers_per_round": 5}}},
        "steps": [
            {"name": "seeds", "kind": "table", "options": {"path": str(seeds)}},
            {
                "name": "answers",
                "kind": "ask",
                "options": {"model": "writer", "prompt": "{question}", "answers": 2, "decoding": DECODING},
            },
            {"name": "each", "kind": "spread", "options": {"column": "answer", "into": "first"}},
            {
                "name": "revised",
                "kind": "ask",
                "options": {"model": "writer", "prompt": "{first}, {question}", "into": "second", "decoding": DECODING},
            },
        ],
        **more,
    }


def opened(model: LoadedModel, values: dict[str, Any], tmp_path: Path) -> Workflow:
    path = tmp_path / "workflow.yaml"
    path.write_text(plain_yaml.write(values))
    return open_workflow(path, (), lambda *_, **__: model)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder: Path) -> dict[str, bytes]:
    """Everything that a workflow makes, but for what it keeps of answers."""
    files = (path for path in folder.rglob("*.jsonl") if path.name != "answers.jsonl" or path.parent != folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_row_leads_back_to_a_row_of_the_file(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    opened(model, config(model, seeds, tmp_path / "out", seed=3), tmp_path).run()
    made = rows(tmp_path / "out/rows.jsonl")
    assert len(made) > 6 and len({row["id"] for row in made}) == len(made)
    places = {
        f"{name}/{row['id']}": row
        for name in ("seeds", "answers", "each", "revised")
        for row in rows(tmp_path / f"out/steps/{name}.jsonl")
    }
    for row in made:
        assert row["second"] and row["lineage"]["seed"] == 3
        steps, parent = ["revised"], row["lineage"]["parents"]
        while parent[0] in places:
            found = places[parent[0]]
            assert found["question"] == row["question"]
            steps.append(found["lineage"]["step"])
            parent = found["lineage"]["parents"]
        assert steps == ["revised", "each", "answers", "seeds"]
        assert parent == [f"{seeds}, row {int(row['question'][:-1]) + 1}"]
    left_out = rows(tmp_path / "out/dropped/answers.jsonl") + rows(tmp_path / "out/dropped/revised.jsonl")
    assert all(row["dropped"]["reason"] in ("cut off by max_new_tokens", "the answer is empty") for row in left_out)
    spread = rows(tmp_path / "out/steps/each.jsonl")
    assert len(made) + len(rows(tmp_path / "out/dropped/revised.jsonl")) == len(spread)


def test_a_kill_at_any_byte_of_what_is_kept_changes_nothing(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    opened(model, config(model, seeds, tmp_path / "whole"), tmp_path).run()
    whole, kept = written(tmp_path / "whole"), (tmp_path / "whole/answers.jsonl").read_bytes()
    draw = random.Random(0)
    for number in range(4):
        part = tmp_path / f"part{number}"
        part.mkdir()
        (part / "answers.jsonl").write_bytes(kept[: draw.randrange(len(kept))])
        opened(model, config(model, seeds, part), tmp_path).run()
        assert written(part) == whole
        assert (part / "answers.jsonl").read_bytes() == kept, "a round has the same neighbours again"


def test_a_workflow_that_is_killed_ten_times_makes_what_it_makes_undisturbed(
    model: LoadedModel, seeds: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    opened(model, config(model, seeds, tmp_path / "whole"), tmp_path).run()
    took = time.monotonic() - begin
    killed = opened(model, config(model, seeds, tmp_path / "killed"), tmp_path)
    draw, fork = random.Random(1), multiprocessing.get_context("fork")
    for _ in range(10):
        process = fork.Process(target=killed.run)
        process.start()
        process.join(draw.uniform(0, took))
        process.kill()
        process.join()
    opened(model, config(model, seeds, tmp_path / "killed"), tmp_path).run()
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


def test_what_was_answered_is_not_asked_again(
    model: LoadedModel, seeds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(model, seeds, tmp_path / "out")
    opened(model, values, tmp_path).run()
    before = written(tmp_path / "out")
    asked: list[str] = []
    answers: Callable[..., Any] = LoadedModel.answers

    def counted(self: LoadedModel, samples: Iterable[Any], *arguments: Any, **more: Any) -> Any:
        samples = [*samples]
        asked.extend(sample.id for sample in samples)
        return answers(self, samples, *arguments, **more)

    monkeypatch.setattr(LoadedModel, "answers", counted)
    opened(model, values, tmp_path).run()
    assert asked == [] and written(tmp_path / "out") == before
    # A step between two others leaves their answers as they were; another prompt is asked anew.
    rule = {"name": "some", "kind": "filter", "options": {"rules": {"question": {"rejects": "[024]"}}}}
    values["steps"].insert(3, rule)
    opened(model, values, tmp_path).run()
    made = rows(tmp_path / "out/rows.jsonl")
    assert asked == [] and made and {row["question"] for row in made} <= {"1?", "3?", "5?"}
    values["steps"][4]["options"]["prompt"] = "{question}, {first}"
    opened(model, values, tmp_path).run()
    assert asked and all(id.startswith("revised/") for id in asked)


def test_another_seed_draws_other_answers(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    made = {}
    for seed in (0, 1, 0):
        opened(model, config(model, seeds, tmp_path / str(seed), seed=seed), tmp_path).run()
        found = [row["second"] for row in rows(tmp_path / f"{seed}/rows.jsonl")]
        assert made.setdefault(seed, found) == found
    assert made[0] != made[1]


def test_a_budget_is_kept_and_a_larger_one_goes_on(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    workflow = opened(model, config(model, seeds, tmp_path / "whole"), tmp_path)
    workflow.run()
    whole, used = written(tmp_path / "whole"), workflow.kept.tokens
    for budget in (used // 3, 2 * used // 3):
        stopped = opened(model, config(model, seeds, tmp_path / "part", budget_tokens=budget), tmp_path)
        with pytest.raises(OutOfBudget, match=rf"step \w+: [\d,]+ of {budget:,} tokens .* a larger budget goes on"):
            stopped.run()
        assert 0 < stopped.kept.tokens <= budget
        assert not (tmp_path / "part/rows.jsonl").exists(), "there are rows where a workflow has ended"
    opened(model, config(model, seeds, tmp_path / "part", budget_tokens=2 * used), tmp_path).run()
    assert written(tmp_path / "part") == whole


def test_rows_of_several_steps_come_together(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    values = config(model, seeds, tmp_path / "out")
    both = {"name": "both", "kind": "deduplicate", "options": {"columns": ["question"]}, "after": ["answers", "seeds"]}
    loud = {"name": "loud", "kind": f"{HERE}:Shout"}
    values["steps"] = [*values["steps"][:2], both, loud]
    opened(model, values, tmp_path).run()
    made = rows(tmp_path / "out/rows.jsonl")
    assert {row["question"] for row in made} == {f"{n}?" for n in range(6)}
    answered = rows(tmp_path / "out/steps/answers.jsonl")
    assert [row["id"] for row in made[: len(answered)]] == [f"answers/{row['id']}" for row in answered]
    assert made[0]["lineage"]["step"] == "loud" and made[0]["lineage"]["parents"] == [f"both/{made[0]['id']}"]


def test_answers_have_the_form_that_is_asked_for(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    values = config(model, seeds, tmp_path / "out")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    schema["additionalProperties"] = False
    decoding = {"max_new_tokens": 60, "temperature": 1.0}
    asked = [
        {"model": "writer", "prompt": "{question}", "decoding": {**decoding, "schema": schema}},
        {"model": "writer", "prompt": "{question}", "decoding": {**decoding, "regex": "[0-9]{1,3}"}, "into": "number"},
    ]
    values["steps"] = [
        values["steps"][0],
        {"name": "json", "kind": "ask", "options": asked[0]},
        {"name": "read", "kind": "extract", "options": {"column": "answer", "keys": ["yes"]}},
        {"name": "number", "kind": "ask", "options": asked[1]},
    ]
    opened(model, values, tmp_path).run()
    made = rows(tmp_path / "out/rows.jsonl")
    assert len(made) == 6
    assert all(isinstance(row["yes"], bool) and row["number"].isdecimal() for row in made)


def test_a_dialogue_has_its_turns_and_each_role_its_side(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    values = config(model, seeds, tmp_path / "out")
    roles = {name: {"model": "writer", "system": f"{name} {{question}}"} for name in ("pupil", "teacher", "parent")}
    # The longest that a prompt of this model may be leaves room for few turns.
    decoding = {"max_new_tokens": 5, "temperature": 1.0}
    for names in (("pupil", "teacher"), ("pupil", "teacher", "parent")):
        turns = 4 if len(names) == 2 else 3
        options = {"roles": {name: roles[name] for name in names}, "turns": turns, "opening": "Why {question}"}
        options |= {"decoding": decoding, "cut_off": "keep"}
        values["steps"][1:] = [{"name": "talk", "kind": "dialogue", "options": options}]
        opened(model, values, tmp_path).run()
        made = rows(tmp_path / "out/rows.jsonl")
        assert len(made) + len(rows(tmp_path / "out/dropped/talk.jsonl")) == 6 and made
        for row in made:
            said = row["messages"]
            assert [each["role"] for each in said] == ["user", "assistant"] * (turns // 2)
            if len(names) == 2:
                assert said[0]["content"] == f"Why {row['question']}"
            else:
                assert said[0]["content"].startswith("pupil: ") and "parent: " in said[1]["content"]


def test_the_command_runs_a_workflow(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    path = tmp_path / "workflow.yaml"
    path.write_text(plain_yaml.write(config(model, seeds, tmp_path / "out")))
    done = CliRunner().invoke(app, ["make", str(path), "steps.0.options.limit=2"])
    assert done.exit_code == 0, done.output
    assert {row["question"] for row in rows(tmp_path / "out/steps/seeds.jsonl")} == {"0?", "1?"}
    found = json.loads((tmp_path / "out/report.json").read_text())
    again = CliRunner().invoke(app, ["make", str(path), "steps.0.options.limit=2"])
    assert again.output.splitlines()[-1] == done.output.splitlines()[-1]
    assert json.loads((tmp_path / "out/report.json").read_text()) == found
    assert found["steps"][0]["rows"] == 2 and found["rows"] == found["steps"][-1]["rows"]
    for before, step in itertools.pairwise(found["steps"]):
        assert step["before"] == before["rows"]
        assert sum(step["dropped"].values()) == round((1 - step["accepted"]) * step["before"])
    assert found["steps"][1]["answers"] == 4 and found["tokens"] >= found["steps"][1]["prompt_tokens"]
    page = (tmp_path / "out/report.md").read_text()
    assert "| answers | ask | 2 |" in page and "| second |" in page


def test_what_left_no_row_is_told(
    model: LoadedModel, seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {
        "asked": (
            "ask",
            {"model": "writer", "prompt": "{question}" + "long " * 2000},
            "row r0: cannot be answered: .*",
        ),
        "made": (
            "compose",
            {"columns": {"text": "{question[0]}"}},
            "row r0: faulty: {question\\[0\\]}: no item '0' in text",
        ),
        "kept": ("filter", {"rules": {"question": {"min_words": 9}}}, "row r0: question: fewer than 9 words"),
    }
    for name, (kind, options, told) in steps.items():
        values = config(model, seeds, tmp_path / name)
        values["steps"][1:] = [{"name": name, "kind": kind, "options": options}]
        values["steps"].append({"name": "last", "kind": "sample", "options": {"count": 2}})
        found = report(workflow := opened(model, values, tmp_path), workflow.run())
        assert re.match(told, found["steps"][1]["fault"]) and "fault" not in found["steps"][2]
        said = f"{name}: {told}.*; see .*dropped/{name}.jsonl"
        assert re.search(said, " ".join(capsys.readouterr().out.split()))
        assert re.search(said, (tmp_path / name / "report.md").read_text())


def test_one_row_of_many_that_is_faulty_is_told_and_what_a_rule_leaves_out_is_not(
    model: LoadedModel, seeds: Path, tmp_path: Path
) -> None:
    with seeds.open("a") as file:
        file.write('\n{"id": "empty", "question": null}')
    values = config(model, seeds, tmp_path / "out")
    values["steps"][1:] = [
        {"name": "kept", "kind": "filter", "options": {"rules": {"question": {"matches": "[1-5]"}}}},
        {"name": "again", "kind": "filter", "options": {"rules": {"question": {"matches": "[2-5]"}}}},
    ]
    found = report(workflow := opened(model, values, tmp_path), workflow.run())
    assert (
        found["steps"][1]["fault"].startswith("row empty: faulty: {question} is empty")
        and "fault" not in found["steps"][2]
    )


def test_diversity_is_zero_where_all_is_the_same(model: LoadedModel) -> None:
    assert spread(model, ["a b", "a b", "a b"]) == pytest.approx(0, abs=1e-6)
    assert spread(model, ["a b"]) == spread(model, []) == 0
    alike, apart = spread(model, ["aaab", "aaac"]), spread(model, ["aaaa", "zzzz"])
    assert 0 < alike < apart


def changed(values: dict[str, Any], place: str, value: Any) -> None:
    *steps, last = place.split(".")
    inner: Any = values
    for step in steps:
        inner = inner[int(step)] if step.isdecimal() else inner[step]
    if isinstance(inner, list):
        inner[int(last)] = value
    else:
        inner[last] = value


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("steps", [], "steps: none"),
        ("steps.1.name", "a/b", "steps.1: name: 'a/b' is to name a file"),
        ("steps.1.name", "seeds", "steps.1.name: two steps are called 'seeds'"),
        ("steps.1.after", ["sedes"], "steps.1.after: no step before it is called 'sedes'; did you mean 'seeds'"),
        ("steps.1.kind", "aks", r"steps.1 \(answers\): no step is called 'aks'; did you mean 'ask'"),
        ("steps.1.options.model", "wirter", r"steps.1 \(answers\): no model 'wirter'; did you mean 'writer'"),
        ("steps.1.options.promt", "x", r"steps.1 \(answers\): options: promt: no such key; did you mean 'prompt'"),
        ("steps.1.options.prompt", "{", r"steps.1 \(answers\): prompt: '{'"),
        ("steps.1.options.prompt", "{qestion}", "step answers: prompt: no column 'qestion'; did you mean 'question'"),
        ("models.writer.local.path", "./none", r"steps.1 \(answers\): model 'writer': .*'./none': no such folder"),
        ("models.writer.local.modalities", ["none"], r"steps.1 \(answers\): model 'writer': none"),
        ("steps.0.options.path", "none.jsonl", r"steps.0 \(seeds\): .*none.jsonl"),
        ("steps.0.after", ["seeds"], "steps.0.after: no step before it"),
        ("steps.2.after", [], "steps.2.after: names no step; name some, or leave it out"),
        ("steps.0.kind", "filter", r"steps.0 \(seeds\)"),
        ("models.writer", {}, "models.writer: give either local"),
        ("steps.2.options.into", "lineage", "step each: row r0#0 has a column 'lineage'"),
        ("budget_tokens", 0, "budget_tokens is 0"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    model: LoadedModel, seeds: Path, tmp_path: Path, place: str, value: Any, told: str
) -> None:
    values = config(model, seeds, tmp_path / "out")
    changed(values, place, value)
    with pytest.raises(ConfigError, match=f"workflow.yaml: .*{told}"):
        opened(model, values, tmp_path).run()


@pytest.mark.parametrize("form", [{"regex": "("}, {"schema": {"type": "nothing"}}])
def test_a_form_that_cannot_be_followed_is_told_before_anything_is_asked(
    model: LoadedModel, seeds: Path, tmp_path: Path, form: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    values = config(model, seeds, tmp_path / "out")
    values["steps"][3]["options"]["decoding"] = {"max_new_tokens": 8, **form}
    with pytest.raises(ConfigError, match=r"steps.3 \(revised\): model 'writer': .* cannot be followed"):
        opened(model, values, tmp_path)


class Faulty(Shout):
    """A step that fails as its mood takes it."""

    def run(self, rows: Sequence[Row], work: Work) -> Iterable[Row | Dropped]:
        yield rows[0].having(question={1, 2}) if len(rows) < 3 else rows[len(rows)]


@pytest.mark.parametrize(("limit", "told"), [(6, "IndexError: list index"), (2, "TypeError: .* set is not JSON")])
def test_a_step_that_fails_is_named(model: LoadedModel, seeds: Path, tmp_path: Path, limit: int, told: str) -> None:
    values = config(model, seeds, tmp_path / "out")
    values["steps"][0]["options"]["limit"] = limit
    values["steps"][1:] = [{"name": "odd", "kind": f"{HERE}:Faulty"}]
    with pytest.raises(ConfigError, match=rf"workflow.yaml: step odd: {told}.*; --debug shows where"):
        opened(model, values, tmp_path).run()


class Divides(Shout):
    """A step that makes what JSON does not have."""

    def run(self, rows: Sequence[Row], work: Work) -> Iterable[Row | Dropped]:
        for number, row in enumerate(rows):
            yield row.having(share=[0.5, float("nan") if number == 4 else 1.0])


def test_a_step_that_makes_nan_is_named(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    values = config(model, seeds, tmp_path / "out")
    values["steps"][1:] = [{"name": "odd", "kind": f"{HERE}:Divides"}]
    with pytest.raises(
        ConfigError, match="step odd: row r4: the column 'share' holds NaN .* drop the row, or write null"
    ):
        opened(model, values, tmp_path).run()
    assert not (tmp_path / "out/rows.jsonl").exists()


def test_nan_of_a_table_is_null(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    path = tmp_path / "seeds.parquet"
    parquet.write_table(pyarrow.table({"question": ["1?", "2?"], "score": [float("nan"), 0.5]}), path)
    values = config(model, seeds, tmp_path / "out")
    values["steps"] = [{"name": "seeds", "kind": "table", "options": {"path": str(path)}}]
    report(workflow := opened(model, values, tmp_path), workflow.run())
    assert [row["score"] for row in rows(tmp_path / "out/rows.jsonl")] == [None, 0.5]


class Extreme:
    """A metric with ratings that no ranges can be made of."""

    config_type = NoOptions

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Any) -> dict[str, float]:
        return {"extreme": 1e300}


def test_ratings_of_any_size_are_reported(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    values = config(model, seeds, tmp_path / "out")
    options = {"metric": f"{HERE}:Extreme", "answer": "{question}", "expected": "x", "at_least": 1.0}
    values["steps"][1:] = [{"name": "rated", "kind": "verify", "options": options}]
    found = report(workflow := opened(model, values, tmp_path), workflow.run())
    assert found["steps"][1]["ratings"] == {"column": "rating", "edges": [1e300, 1e300], "kept": [6], "dropped": [0]}


def test_a_folder_with_other_files_is_left_as_it_is(model: LoadedModel, seeds: Path, tmp_path: Path) -> None:
    (tmp_path / "mine/steps").mkdir(parents=True)
    (tmp_path / "mine/rows.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="output .*mine: holds rows.jsonl, and no answers.jsonl .* folder of its own"):
        opened(model, config(model, seeds, tmp_path / "mine"), tmp_path).run()
    assert (tmp_path / "mine/rows.jsonl").read_text() == "mine"


def test_rows_that_cannot_be_told_apart_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text('{"id": "a", "question": "1?"}\n{"id": "a", "question": "2?"}\n')
    with pytest.raises(ConfigError, match="step seeds: two of its rows have the id 'a'"):
        opened(model, config(model, seeds, tmp_path / "out"), tmp_path).run()
    (tmp_path / "out/answers.jsonl").write_text('{"note": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is no round of molora"):
        opened(model, config(model, seeds, tmp_path / "out"), tmp_path).run()
