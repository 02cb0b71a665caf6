"""Roll-outs go on where they stopped, draw the same whatever else runs, and give rows to learn from."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import molora
from molora.cli.commands import app
from molora.config import ConfigError
from molora.data.preferences import Preferences
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import Judged, NoOptions
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.interrupt import Stopped
from molora.synthetic.rated import open_verifier
from molora.synthetic.roll_out import Drawn, RollOut, accepted, pairs, success_rates
from molora.testing import save_backbone

HERE = Path(__file__)


class Even:
    """Right is what has an even number of letters."""

    config_type = NoOptions
    rates_each = True

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        return {"even": sum(len(item.answer) % 2 == 0 for item in judged) / len(judged)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return molora.load(save_backbone(tmp_path_factory.mktemp("model") / "backbone"), device="cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"id": f"r{n}", "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"}]}
        for n in range(5)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


# No answer of a random model ends by itself, and what a limit cuts off is not right.
CONFIG = GenerationConfig(max_new_tokens=6, temperature=1.0, seed=3, stop=("e", "a", "1"))


def draw(model: LoadedModel, rows: Path, output: Path, num_answers: int = 4, metric: str = "Even") -> RollOut:
    found = RollOut(rows, output, num_answers, open_verifier(f"{HERE}:{metric}"))
    with found.held():
        found.draw(model, CONFIG)
    return found


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_every_prompt_gets_its_answers_rated(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    found = draw(model, rows, tmp_path / "out.jsonl")
    answers = lines(tmp_path / "out.jsonl")
    assert set(answers) == {f"{n}:r{n}#{k}" for n in range(5) for k in range(4)}
    for row in answers.values():
        assert row["rating"] == float(len(row["answer"]) % 2 == 0) and row["adapters"] == []
        assert row["right"] == (row["rating"] == 1 and row["finished"] == "stop")
    assert len({row["answer"] for row in answers.values()}) > 5, "each answer is drawn by itself"
    drawn = list(found.drawn())
    assert [each.id for each in drawn] == [f"{n}:r{n}" for n in range(5)]
    assert sum(each.num_right for each in drawn) == sum(row["right"] for row in answers.values()) > 0


def test_a_prompt_is_embedded_once_for_all_its_answers(
    model: LoadedModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    embed = model.model.embed
    monkeypatch.setattr(model.model, "embed", lambda pack: embedded.append(len(pack)) or embed(pack))
    draw(model, rows, tmp_path / "out.jsonl")
    assert sum(embedded) == 5, "five rows, four answers each"


def test_what_was_stopped_goes_on_and_ends_the_same(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    draw(model, rows, tmp_path / "whole.jsonl")
    whole = lines(tmp_path / "whole.jsonl")
    written = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for kept in (0, 1, 7, 19):
        part = tmp_path / f"{kept}.jsonl"
        failed = json.dumps({"id": "4:r4#3", "error": "gone"}) + "\n"
        part.write_text("".join(written[:kept]) + failed * (kept == 7) + written[kept][:9])
        draw(model, rows, part)
        assert lines(part) == whole and len(part.read_text().splitlines()) == len(whole)


def test_more_answers_keep_the_ones_that_are_there(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    draw(model, rows, tmp_path / "out.jsonl", 2)
    two = lines(tmp_path / "out.jsonl")
    more = draw(model, rows, tmp_path / "out.jsonl", 4)
    four = lines(tmp_path / "out.jsonl")
    assert two.items() <= four.items() and len(four) == 20
    draw(model, rows, tmp_path / "other.jsonl", 4)
    assert lines(tmp_path / "other.jsonl") == four
    assert all(each.num_answers == 4 for each in more.drawn())


def drawn(right: Sequence[str], wrong: Sequence[str], count: int = 4, id: str = "0:a") -> Drawn:
    prompt = [{"role": "user", "content": "2 + 2?"}]
    return Drawn(id, prompt, [*right], [*wrong], count - len(wrong) if right else 0, count)


def test_rows_to_learn_from_are_read_by_their_sources(tmp_path: Path) -> None:
    one = drawn(["4", "four", "it is 4"], ["5", "six"])
    for path, kind, make in (("right", Messages, accepted), ("pairs", Preferences, pairs)):
        (tmp_path / path).write_text("\n".join(json.dumps(row) for row in make(one, 2, 0)))
        source = kind(MessagesConfig(path=str(tmp_path / path)))
        told = [source[index] for index in range(len(source))]
        assert len(told) == 2
        assert {row["messages"][-1]["content"] for row in told} < {"4", "four", "it is 4"}
        if kind is Preferences:
            assert {row["rejected"][-1]["content"] for row in told} == {"5", "six"}
    assert [*pairs(one, 2, 0)] == [*pairs(one, 2, 0)]
    assert len({json.dumps([*accepted(one, 1, seed)]) for seed in range(20)}) == 3, "which one is drawn"


def test_prompts_that_are_always_or_never_answered_give_no_pairs() -> None:
    assert [*pairs(drawn(["4"], []), 2, 0)] == [] == [*pairs(drawn([], ["5"]), 2, 0)]
    assert [*accepted(drawn([], ["5"]), 2, 0)] == []


def test_success_is_told_by_answers_and_by_prompts() -> None:
    everything = [drawn(["4"], []), drawn([], ["5"]), drawn(["4"], ["5", "6"])]
    assert success_rates(everything) == {
        "right": 0.5,
        "pass@4": pytest.approx(2 / 3),
        "always": pytest.approx(1 / 3),
        "sometimes": pytest.approx(1 / 3),
        "never": pytest.approx(1 / 3),
    }
    assert success_rates([]) == {}


def test_the_command_writes_rows_and_says_how_many(
    model: LoadedModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("out", "accepted", "pairs")}
    command = ["roll-out", str(model.layout.backbone), str(rows), str(files["out"]), "--metric", f"{HERE}:Even"]
    command += ["--accepted", str(files["accepted"]), "--pairs", str(files["pairs"]), "--max-new-tokens", "4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "right 0." in done.output and "pass@8" in done.output and f"{files['pairs']}: " in done.output
    assert len(lines(files["out"])) == 40
    monkeypatch.setattr("molora.inference.load.load", lambda *_, **__: pytest.fail("no model is needed"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and again.output.splitlines()[-3:] == done.output.splitlines()[-3:]


def test_ctrl_c_says_how_many_answers_are_drawn(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    found = RollOut(rows, tmp_path / "out.jsonl", 4, open_verifier(f"{HERE}:Even"))
    config = replace(CONFIG, max_running_samples=2)

    def interrupted(samples: Any, *given: Any, **more: Any) -> Any:
        for number, answer in enumerate(LoadedModel.answers(model, samples, *given, **more)):
            if number == 7:
                raise KeyboardInterrupt
            yield answer

    stopping = copy.copy(model)
    stopping.answers = interrupted
    with (
        pytest.raises(Stopped, match=r"7 of 20 answers are drawn, in .*out.jsonl; the same call goes on"),
        found.held(),
    ):
        found.draw(stopping, config)
    draw(model, rows, tmp_path / "out.jsonl")
    draw(model, rows, tmp_path / "whole.jsonl")
    assert lines(tmp_path / "out.jsonl") == lines(tmp_path / "whole.jsonl")


def test_answers_that_another_verifier_rated_are_not_mixed_with_this_ones(
    model: LoadedModel, rows: Path, tmp_path: Path
) -> None:
    draw(model, rows, tmp_path / "out.jsonl")
    other = open_verifier("regular_expression", options={"pattern": "a"})
    assert other.name != open_verifier("regular_expression", options={"pattern": "b"}).name
    assert other.name != open_verifier("regular_expression", 0.5, {"pattern": "a"}).name
    with (
        pytest.raises(ConfigError, match="line 1 was rated by '.*Even .*', and not by 'regular_expression"),
        RollOut(rows, tmp_path / "out.jsonl", 4, other).held(),
    ):
        pass


class Doubts(Even):
    """Rates no answer with an x, as a judge that says nothing."""

    parallel = 3

    def rate(self, item: Judged) -> float:
        if "x" in item.answer:
            raise ValueError("no score")
        return 0.5


def test_an_answer_that_cannot_be_rated_is_drawn_again(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    verifier = open_verifier(f"{HERE}:Doubts", 0.5)
    assert verifier.parallel == 3
    found = RollOut(rows, tmp_path / "out.jsonl", 8, verifier)
    with found.held():
        found.draw(model, GenerationConfig(max_new_tokens=12, temperature=1.0, seed=3))
    rated = lines(tmp_path / "out.jsonl").values()
    errors = [row for row in rated if "error" in row]
    assert 0 < len(errors) < 40 and all(row["error"] == "no score" for row in errors)
    assert all(row["rating"] == 0.5 for row in rated if "error" not in row)
    assert len(found.failed) == len(errors) == found.num_left


class Odd(Even):
    """Gives what is no rating, or raises, by the number of the question."""

    def score(self, judged: Sequence[Judged]) -> Any:
        row = judged[0].row
        if row == 1:
            raise KeyError("boom")
        if row == 2:
            raise ValueError
        return {"odd": math.nan} if row == 0 else {"odd": 1e300} if row == 3 else {}


def test_what_is_no_rating_is_an_error_that_says_what_it_is(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    found = draw(model, rows, tmp_path / "out.jsonl", 1, "Odd")
    told = {id: row["error"] for id, row in lines(tmp_path / "out.jsonl").items()}
    assert told == {
        "0:r0#0": "rated nan; a rating is from 0 to 1",
        "1:r1#0": "metric Odd: KeyError: 'boom'",
        "2:r2#0": "metric Odd: ValueError",
        "3:r3#0": "rated 1e+300; a rating is from 0 to 1",
        "4:r4#0": "metric Odd: score gives {}; give a number by its name",
    }
    assert found.num_left == 5


class Uninstalled(Even):
    """Needs what is not there."""

    def score(self, judged: Sequence[Judged]) -> Any:
        raise ImportError("needs more")


def test_what_a_metric_lacks_is_no_answers_fault(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="needs more"):
        draw(model, rows, tmp_path / "out.jsonl", 1, "Uninstalled")


def test_a_text_that_was_rated_both_ways_is_on_no_side(rows: Path, tmp_path: Path) -> None:
    rated = [("4", True), ("4", False), ("four", True), ("5", False), ("5", False)]
    written = [
        {"id": f"2:r2#{number}", "answer": text, "right": right, "rating": float(right)}
        for number, (text, right) in enumerate(rated)
    ]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (one,) = RollOut(rows, tmp_path / "out.jsonl", 5, open_verifier("exact_match")).drawn()
    assert (one.right, one.wrong, one.num_right) == (["four"], ["5"], 2)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs(one, 2, 0)] == [("four", "5")]


def changed(rows: Path, row: int, message: int, content: str) -> Path:
    """The rows with another message."""
    known = list(map(json.loads, rows.read_text().splitlines()))
    known[row]["messages"][message]["content"] = content
    rows.write_text("\n".join(map(json.dumps, known)))
    return rows


@pytest.mark.parametrize("message", [0, 1])
def test_answers_to_another_question_are_refused_and_left(
    model: LoadedModel, rows: Path, tmp_path: Path, message: int
) -> None:
    draw(model, rows, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(ConfigError, match="answers '3:r3#.', and that row asks something else now; give another out"):
        draw(model, changed(rows, 3, message, "other"), tmp_path / "out.jsonl", 8)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_answers_to_a_question_that_is_gone_are_refused_and_left(
    model: LoadedModel, rows: Path, tmp_path: Path
) -> None:
    draw(model, rows, tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_text()
    rows.write_text("\n".join(reversed(rows.read_text().splitlines())))
    with pytest.raises(ConfigError, match=r"line \d answers '\d:r\d#\d', which .*rows.jsonl has not; give another"):
        draw(model, rows, tmp_path / "out.jsonl", 8)
    assert (tmp_path / "out.jsonl").read_text() == before


def test_programs_are_rated_beside_each_other() -> None:
    assert open_verifier("unit_tests").parallel == os.cpu_count()


def test_rows_without_notes_go_on(model: LoadedModel, rows: Path, tmp_path: Path) -> None:
    draw(model, rows, tmp_path / "out.jsonl")
    old = [
        {key: value for key, value in row.items() if key not in ("asked", "drawn")}
        for row in lines(tmp_path / "out.jsonl").values()
    ]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old[:7]))
    assert draw(model, changed(rows, 0, 0, "other"), tmp_path / "out.jsonl").num_left == 0


def test_answers_of_another_model_or_settings_are_refused(
    model: LoadedModel, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model.layout is not None
    out, options = tmp_path / "out.jsonl", ["--max-new-tokens", "4", "--answers", "2"]
    command = ["roll-out", model.layout.backbone, str(rows), str(out)]
    assert CliRunner().invoke(app, [*command, *options]).exit_code == 0
    more = CliRunner().invoke(app, [*command, *options[:2], "--answers", "3", "--max-running-samples", "2"])
    assert more.exit_code == 0 and len(lines(out)) == 15
    before = out.read_text()
    monkeypatch.setattr("molora.inference.load.load", lambda *_, **__: pytest.fail("no model is needed"))
    for given, says in (
        (["--max-new-tokens", "5"], "max_new_tokens is 4 there and 5 here"),
        (["--temperature", "1.5", "--seed", "2"], "temperature is 0.8 there and 1.5 here; seed is 0 there and 2 here"),
        (["--top-p", "0.5"], "top_p is 1.0 there and 0.5 here"),
        (["--rule", "text=none"], "model is "),
    ):
        refused = CliRunner().invoke(app, [*command, *options, *given])
        assert refused.exit_code == 1 and f"line 1 was drawn otherwise: {says}" in str(refused.exception)
        assert "give the same model and options, or another output" in str(refused.exception)
    command[1] = str(save_backbone(tmp_path / "other", seed=7))
    refused = CliRunner().invoke(app, [*command, *options])
    assert "line 1 was drawn otherwise: model is " in str(refused.exception) and out.read_text() == before


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("roll-out", ["--accepted", "rows.jsonl"], "--accepted rows.jsonl: is rows.jsonl, where the rows come from"),
        ("roll-out", ["--pairs", "out.jsonl"], "--pairs out.jsonl: is the file of output too"),
        ("roll-out", ["--pairs", "x", "--accepted", "./x"], "--pairs x: is the file of --accepted too"),
        ("pivot", ["--rows", "x", "--pairs", "x"], "--pairs x: is the file of --rows too"),
        ("pivot", ["--page", "out.jsonl"], "--page out.jsonl: is the file of output too"),
        ("pivot", ["--page", "none/page.html"], "--page none/page.html: no folder none; make it first"),
    ],
)
def test_an_output_that_would_replace_another_file_is_refused_before_a_model_is_loaded(
    model: LoadedModel,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    options: list[str],
    says: str,
) -> None:
    assert model.layout is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("molora.inference.load.load", lambda *_, **__: pytest.fail("no model is needed"))
    before = rows.read_text()
    refused = CliRunner().invoke(app, [command, model.layout.backbone, "rows.jsonl", "out.jsonl", *options])
    assert refused.exit_code == 1 and says in str(refused.exception)
    assert rows.read_text() == before and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("multiple_choice", "rows.jsonl: question 0:r0: choice is None of 0 choices; .* needs the options of the row"),
        ("number", "rows.jsonl: question 0:r0: expects 'x'; number needs one number there; mend the rows, or give"),
        ("yes_no", "question 0:r0: expects 'x'; yes_no is for yes and no alone"),
        ("vqa_accuracy", "question 0:r0: has 1 answer; vqa_accuracy needs those of several people"),
    ],
)
def test_questions_that_a_metric_cannot_rate_are_told_before_anything_is_drawn(
    rows: Path, tmp_path: Path, metric: str, says: str
) -> None:
    with (
        pytest.raises(ConfigError, match=says),
        RollOut(rows, tmp_path / "out.jsonl", 2, open_verifier(metric)).held(),
    ):
        pass


def test_open_questions_may_stand_among_multiple_choice(rows: Path, tmp_path: Path) -> None:
    known = list(map(json.loads, rows.read_text().splitlines()))
    known[3] |= {"choices": ["x", "y"], "choice": 0}
    rows.write_text("\n".join(map(json.dumps, known)))
    with RollOut(rows, tmp_path / "out.jsonl", 2, open_verifier("multiple_choice")).held():
        pass


def test_what_cannot_be_rolled_out_is_told(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric: 'word_error_rate' does not rate an answer by its text"):
        open_verifier("word_error_rate")
    exact = open_verifier("exact_match")
    with pytest.raises(ConfigError, match="where the rows come from"), RollOut(rows, rows, 2, exact).held():
        pass
    (tmp_path / "notes.jsonl").write_text('{"note": 1}\n')
    with (
        pytest.raises(ConfigError, match="line 1 is no answer"),
        RollOut(rows, tmp_path / "notes.jsonl", 2, exact).held(),
    ):
        pass
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(ValueError, match="asked.jsonl: .*row 1: must end with an assistant message"):
        RollOut(tmp_path / "asked.jsonl", tmp_path / "out.jsonl", 2, exact)
