"""Rows of preferences, in the formats that trainers and APIs write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molora.data.preferences import Preferences, both_sides
from molora.data.sources import MessagesConfig

ASKED = {"role": "user", "content": "2 + 2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
EARLIER = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
HUMAN = {"from": "human", "value": "<image>2 + 2?"}


def read(tmp_path: Path, row: dict[str, Any]) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    return Preferences(MessagesConfig(path=str(path)))[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASKED], "chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": [ASKED, FOUR], "rejected": [ASKED, FIVE]},
        {"prompt": "2 + 2?", "chosen": [ASKED, FOUR], "rejected": [ASKED, FIVE]},
        {"prompt": [ASKED], "chosen": [ASKED, FOUR], "rejected": [ASKED, FIVE]},
        {"messages": [ASKED], "chosen": FOUR, "rejected": FIVE},
        {
            "conversations": [{"from": "human", "value": "2 + 2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"input": {"messages": [ASKED]}, "preferred_output": [FOUR], "non_preferred_output": [FIVE]},
    ],
    ids=[
        *("text", "turns", "whole conversations", "and a text", "and turns", "messages", "llamafactory", "openai"),
    ],
)
def test_formats_are_read_as_one(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(tmp_path, {"id": "a", "tags": ["sums"], **row})
    assert found == {"id": "a", "tags": ["sums"], "messages": [ASKED, FOUR], "rejected": [ASKED, FIVE]}


def test_what_was_said_before_is_not_learned(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": [*EARLIER, ASKED], "chosen": "4", "rejected": "5"})
    assert [message.get("train") for message in found["messages"]] == [None, False, None, None]
    whole = read(tmp_path, {"chosen": [*EARLIER, ASKED, FOUR], "rejected": [*EARLIER, ASKED, FIVE]})
    assert whole == found


def test_media_stand_in_columns_or_in_the_prompt(tmp_path: Path) -> None:
    columns = {"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "4"}, "images": ["a.png"]}
    found = read(tmp_path, {**columns, "rejected": {"from": "gpt", "value": "<image>"}})
    part = {"type": "image", "path": str(tmp_path / "a.png")}
    for side, answer in (("messages", "4"), ("rejected", "<image>")):
        assert found[side][0]["content"] == [part, {"type": "text", "text": "2 + 2?"}]
        assert found[side][1]["content"] == answer
    asked = {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "2 + 2?"}]}
    inline = read(tmp_path, {"prompt": [asked], "chosen": "4", "rejected": "5"})
    assert inline["messages"][0]["content"][0] == part == inline["rejected"][0]["content"][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "expected an object, found list"),
        ({"prompt": "a", "chosen": "b"}, "no rejected; a preference has both answers"),
        ({"prompt": "a"}, "no chosen and no rejected"),
        ({"prompt": "a", "messages": [ASKED], "chosen": "b", "rejected": "c"}, "has messages and prompt, each"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "prompt: expected a text, a turn or a list of turns, got 7"),
        ({"prompt": "a", "chosen": [], "rejected": "c"}, "chosen: expected a text, a turn or a list of turns"),
        ({"chosen": "b", "rejected": "c"}, "chosen and rejected begin with different turns, and nothing says what was"),
        ({"chosen": [ASKED, FOUR], "rejected": [ASKED, FOUR, ASKED]}, "one side is the beginning of the other"),
        ({"input": "a", "chosen": "b", "rejected": "c"}, "input: expected an object with messages, got 'a'"),
    ],
)
def test_what_is_no_preference_is_told(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^here: {message}"):
        both_sides(row, "here")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same; take the row out"),
        ({"prompt": "a", "chosen": "4", "rejected": {"from": "gpt", "value": "4"}}, "chosen and rejected are the same"),
        ({"prompt": [ASKED], "chosen": [HUMAN], "rejected": "5"}, "chosen has nothing to learn; its answer is to be"),
        ({"prompt": "a", "chosen": "4", "rejected": {**FIVE, "train": False}}, "rejected has nothing to learn"),
        (
            {"input": {"messages": [ASKED], "tools": [{"name": "f"}]}, "preferred_output": "4", "rejected": "5"},
            "the column 'tools' would change what is told",
        ),
    ],
)
def test_what_cannot_be_preferred_is_told(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        read(tmp_path, row)
