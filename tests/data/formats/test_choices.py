"""Several accepted answers and multiple choice: what rows of tables and conversations say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.sources import Source, SourceConfig, open_source


def table(folder: Path, row: dict[str, Any], **options: Any) -> Source:
    (folder / "t.jsonl").write_text(json.dumps(row), encoding="utf-8")
    options = {"path": str(folder / "t.jsonl"), "prompt": "{q}", **options}
    return open_source(SourceConfig(kind="table", options=options), "data")


def talk(folder: Path, **row: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "m.jsonl").write_text(json.dumps({"messages": messages, **row}), encoding="utf-8")
    return open_source(SourceConfig(kind="messages", options={"path": str(folder / "m.jsonl")}), "data")[0]


@pytest.mark.parametrize(
    ("options", "row", "learned", "answers"),
    [
        ({"answers": "all"}, {"all": ["x", "y", "x"]}, "x", ["x", "y", "x"]),
        ({"answers": "all", "answer": "{best}"}, {"all": ["x", "y", "x"], "best": "y"}, "y", ["y", "x", "x"]),
        ({"answers": "all", "answer": "It is {best}."}, {"all": ["x"], "best": "x"}, "It is x.", ["x"]),
        ({"answers": "all[*][answer]"}, {"all": [{"answer": "x"}, {"answer": "7"}]}, "x", ["x", "7"]),
        ({"answers": "all[text]"}, {"all": {"text": ["x"], "answer_start": [3]}}, "x", ["x"]),
        ({"answers": "all"}, {"all": '["x", "y"]'}, "x", ["x", "y"]),
        ({"answers": "all"}, {"all": "['x', \"it's\"]"}, "x", ["x", "it's"]),
        ({"answers": "all"}, {"all": [7, 0.5]}, "7", ["7", "0.5"]),
    ],
)
def test_all_accepted_answers_are_kept_with_the_learned_one_first(
    tmp_path: Path, options: dict[str, str], row: dict[str, Any], learned: str, answers: list[str]
) -> None:
    found = table(tmp_path, {"q": "q", **row}, **options)[0]
    assert found["messages"][-1]["content"] == learned
    assert found["answers"] == answers
    assert "choices" not in found


@pytest.mark.parametrize("said", [None, [], "x", "[", "[1,", [["x"]], [None], {"text": "x"}, "[" * 5000 + "]" * 5000])
def test_what_is_no_list_of_answers_is_refused_with_its_row(tmp_path: Path, said: Any) -> None:
    with pytest.raises(ValueError, match="t.jsonl, row 1: answers: "):
        table(tmp_path, {"q": "q", "all": said}, answers="all")[0]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"number": "right"}, 1),
        ({"number": "right"}, "1"),
        ({"letter": "right"}, "B"),
        ({"letter": "right"}, " b "),
        ({"text": "right"}, "two"),
        ({"text": "right[0]"}, ["two "]),
    ],
)
def test_the_right_option_is_said_by_its_number_letter_or_text(tmp_path: Path, choice: Any, said: Any) -> None:
    row = {"q": "Which?", "options": ["one", "two", "three"], "right": said}
    found = table(tmp_path, row, prompt="{q}\n{choices}", choices="options", choice=choice)[0]
    assert found["messages"][0]["content"][0]["text"] == "Which?\nA. one\nB. two\nC. three"
    assert found["messages"][1]["content"] == "B"
    assert (found["choices"], found["choice"]) == (["one", "two", "three"], 1)
    asked = {"prompt": "{q} {choices}", "choice_line": "({letter}) {choice};", "answer": "{letter}: {choice}"}
    found = table(tmp_path, row, choices="options", choice=choice, **asked)[0]
    assert found["messages"][0]["content"][0]["text"] == "Which? (A) one;\n(B) two;\n(C) three;"
    assert found["messages"][1]["content"] == "B: two"


@pytest.mark.parametrize("options", [None, "", [], "[]"])
def test_a_row_without_options_is_an_open_question(tmp_path: Path, options: Any) -> None:
    row = {"q": "How many?", "options": options, "right": "12"}
    for way in ("letter", "text", "number"):
        found = table(tmp_path, row, prompt="{q} {choices}", choices="options", choice={way: "right"})[0]
        assert found["messages"][0]["content"][0]["text"] == "How many? "
        assert found["messages"][1]["content"] == "12"
        assert "choices" not in found and "choice" not in found


def test_a_line_of_an_option_that_holds_braces_is_the_option(tmp_path: Path) -> None:
    row = {"q": "q", "options": ["{letter}", "{choice}"], "right": 0}
    found = table(tmp_path, row, prompt="{choices}", choices="options", choice={"number": "right"}, answer="{choice}")[
        0
    ]
    assert found["messages"][0]["content"][0]["text"] == "A. {letter}\nB. {choice}"
    assert found["messages"][1]["content"] == "{letter}"


def test_columns_of_a_tables_own_give_way_to_what_is_made_of_options(tmp_path: Path) -> None:
    row = {"q": "q", "choices": ["x", "y"], "letter": "own", "choice": "own"}
    found = table(tmp_path, row, prompt="{choices}", answer="{letter}{choice}", choices="choices", choice={"text": "q"})
    with pytest.raises(ValueError, match=r"row 1: choice: {q} is 'q', and the text of an option is one of x, y;"):
        found[0]
    row["q"] = "y"
    found = table(tmp_path, row, prompt="{choices}", answer="{letter}{choice}", choices="choices", choice={"text": "q"})
    assert [part["content"] for part in found[0]["messages"][1:]] == ["By"]


@pytest.mark.parametrize(
    ("row", "choice", "says"),
    [
        (
            {"options": ["a", "b"], "right": 2},
            "number",
            "choice: {right} is '2', and the number of an option is one of 0, 1",
        ),
        ({"options": ["a", "b"], "right": -1}, "number", "is '-1'"),
        ({"options": ["a", "b"], "right": "C"}, "letter", "is 'C', and the letter of an option is one of A, B;"),
        ({"options": ["a", "a"], "right": "a"}, "text", "one of a, a;"),
        ({"options": ["a", "b"], "right": None}, "letter", "choice: {right} is empty"),
        ({"options": ["a"], "right": 0}, "number", r"choices: \['a'\]; a question has from 2"),
        ({"options": ["a", ""], "right": 0}, "number", "none empty"),
        ({"options": {"A": "x"}, "right": 0}, "number", "choices: {options} is a group of A, not a list of texts"),
        ({"options": "one, two", "right": 0}, "number", "is text .'one, two'., not a list"),
        ({"options": [str(i) for i in range(27)], "right": 0}, "number", "from 2 to 26 options"),
    ],
)
def test_a_question_whose_options_cannot_be_read_is_refused_with_its_row(
    tmp_path: Path, row: dict[str, Any], choice: str, says: str
) -> None:
    with pytest.raises(ValueError, match=rf"t.jsonl, row 1: .*{says}"):
        table(tmp_path, {"q": "q", **row}, choices="options", choice={choice: "right"})[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "missing 'answer'"),
        ({"choices": "options"}, "give both choices"),
        ({"choice": {"number": "right"}}, "give both choices"),
        ({"choices": "options", "choice": {}}, "give one of number, letter and text"),
        ({"choices": "options", "choice": {"number": "right", "text": "right"}}, "give one of number, letter and text"),
        ({"choices": "option", "choice": {"number": "right"}}, "choices: no column 'option'; did you mean 'options'"),
        ({"choices": ["q", "x"], "choice": {"number": "right"}}, "choices: no column 'x'"),
        ({"answers": "all"}, "answers: no column 'all'"),
        ({"answer": "{q}", "tags": ["x"]}, "tags: no column 'x'"),
        ({"answer": "{letter}"}, "answer: no column 'letter'"),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there_is_refused(
    tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        table(tmp_path, {"q": "q", "options": ["a", "b"], "right": 0}, **options)


def test_tags_are_what_columns_hold_and_nothing_for_an_empty_one(tmp_path: Path) -> None:
    row = {"q": "q", "kind": "other", "none": None, "level": 3}
    assert table(tmp_path, row, answer="{q}", tags=["kind", "none", "level"])[0]["tags"] == ["other", "3"]
    with pytest.raises(ValueError, match="t.jsonl, row 1: tags: {kind} is a list of 1"):
        table(tmp_path, {**row, "kind": ["x"]}, answer="{q}", tags=["kind"])[0]


def test_conversations_say_their_answers_and_options_themselves(tmp_path: Path) -> None:
    found = talk(tmp_path, answers=["a", "b", "a"], choices=["x", "a"], choice=1)
    assert {key: found[key] for key in ("answers", "choices", "choice")} == {
        "answers": ["a", "b", "a"],
        "choices": ["x", "a"],
        "choice": 1,
    }
    assert {"answers", "choices", "choice"}.isdisjoint(
        talk(tmp_path, answers=None, choices=None, choice="about the row")
    )


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answers": "a"}, "answers: expected a list of texts, got 'a'"),
        ({"answers": []}, "answers: expected a list"),
        ({"choices": [1, 2], "choice": 0}, "choices: expected a list of texts"),
        ({"choices": ["x", "y"]}, "choice: None; it is the number"),
        ({"choices": ["x", "y"], "choice": 2}, "choice: 2; it is the number of the right one .* there are 2"),
        ({"choices": ["x", "y"], "choice": True}, "choice: True"),
        ({"choices": ["x", "y"], "choice": "x"}, "choice: 'x'"),
    ],
)
def test_answers_and_options_of_a_conversation_that_are_none_are_refused(
    tmp_path: Path, row: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=f"m.jsonl, row 1: {says}"):
        talk(tmp_path, **row)


def test_a_table_of_preferences_has_both_answers(tmp_path: Path) -> None:
    row = {"q": "q", "good": "yes", "bad": "no"}
    found = table(tmp_path, row, answer="{good}.", rejected="{bad}.")[0]
    assert [turn["content"] for turn in found["messages"][1:]] == ["yes."]
    assert [turn["content"] for turn in found["rejected"][1:]] == ["no."]
    assert found["rejected"][0] == found["messages"][0]
    with pytest.raises(ValueError, match="t.jsonl, row 1: rejected: is what was chosen too; leave the row out"):
        table(tmp_path, row, answer="{good}", rejected="{good}")[0]
    with pytest.raises(ConfigError, match="rejected: no column 'worse'"):
        table(tmp_path, row, answer="{good}", rejected="{worse}")


def test_of_two_options_the_other_one_is_what_was_rejected(tmp_path: Path) -> None:
    row = {"q": "q", "a": "yes", "b": "no", "c": "well", "better": 1}
    options: dict[str, Any] = {"choice": {"number": "better"}, "answer": "{choice}", "rejected": "{other}"}
    found = table(tmp_path, row, choices=["a", "b"], **options)[0]
    assert [found[key][1]["content"] for key in ("messages", "rejected")] == ["no", "yes"]
    with pytest.raises(ValueError, match="row 1: rejected: {other} is empty"):
        table(tmp_path, row, choices=["a", "b", "c"], **options)[0]
