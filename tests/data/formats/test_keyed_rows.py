"""Lists under a key of a JSON file: every item is where it stands, whatever else the file holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.formats import keyed_rows as module
from molora.data.formats.keyed_rows import KeyedRows
from molora.data.sources import SourceConfig, open_source


def keyed(folder: Path, text: str | bytes, key: str = "data", **options: Any) -> KeyedRows:
    path = folder / "t.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return KeyedRows(path, key, numbers_as_text=False, **options)


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_items_are_those_that_json_reads(tmp_path: Path, indent: int | None, ascii_only: bool) -> None:
    draw = random.Random(0)
    texts = ["", "é😀\u2028", '"', "]}", "\\", '{"data": [', "plain", "data"]
    rows = [{"id": i, "t": draw.choice(texts), "n": [draw.choice(texts), {"data": [1]}]} for i in range(50)]
    value = {"ü": {"data": [1, 2]}, "licenses": rows[:3], "split": "val", "data": rows, "after": rows}
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    found = keyed(tmp_path, text, note="id")
    assert [found[row] for row in range(len(found))] == rows
    assert found.noted == list(range(50))
    assert found.beside == {"ü": {"data": [1, 2]}, "split": "val"}
    assert found.where(3) == f"{tmp_path / 't.json'}, data, row 4"
    marked = keyed(tmp_path, b"\xef\xbb\xbf" + text.encode())
    assert [marked[row] for row in range(len(marked))] == rows


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"dta": []}', "has no key 'data' at its top; did you mean 'dta'. its keys are dta"),
        ("[1]", "not valid JSON .expected '{', found '.1.'"),
        ('{"data": {}}', "expected '.', found '{}}' at character 10"),
        ('{"data": [{"a": 1}', "expected ',', found '' at character 19"),
        ('{"data": [{"a": 1} {"a": 2}]}', "expected ','"),
        ('{"data": [{"a": tru}]}', "not valid JSON"),
        ('{"data": []}', "no rows"),
        ('{"data": [' + "[" * 100_000, "nested too deep"),
        (b'{"data": ["\xff"]}', "byte 12 is not UTF-8"),
    ],
)
def test_a_file_without_the_list_says_why(tmp_path: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        keyed(tmp_path, text)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LIST_BYTES", 20)
    assert len(keyed(tmp_path, '{"data": [{"a": 1}]}')) == 1
    with pytest.raises(ConfigError, match="over 20 bytes, .* write the list as JSON Lines"):
        keyed(tmp_path, '{"data": [{"a": 10}]}')


def test_an_item_that_is_no_object_is_named_when_it_is_read(tmp_path: Path) -> None:
    rows = keyed(tmp_path, '{"data": [{"id": 1}, 7]}', note="id")
    assert rows.noted == [1, None]
    with pytest.raises(ValueError, match=r"t.json, data, row 2: expected an object, found int"):
        rows[1]


def test_a_table_says_under_which_key_its_rows_stand(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"data": [{"q": 0.50, "a": "x"}]}')
    options = {"path": str(tmp_path / "t.json"), "prompt": "{q}", "answer": "{a}", "rows_under": "data"}
    row = open_source(SourceConfig(kind="table", options=options), "data")[0]
    assert row["messages"][0]["content"][0]["text"] == "0.50"
    (tmp_path / "t.csv").write_text("q,a\n1,2\n")
    with pytest.raises(ConfigError, match="t.csv: rows_under is a key of a JSON file, and this is none"):
        open_source(SourceConfig(kind="table", options={**options, "path": str(tmp_path / "t.csv")}), "data")


def test_a_file_whose_rows_stand_under_a_key_says_so(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"about": {"year": 2024}, "data": [{"q": "a", "a": "b"}]}))
    options: dict[str, Any] = {"path": str(tmp_path / "t.json"), "prompt": "{q}", "answer": "{a}"}
    with pytest.raises(
        ConfigError, match="t.json: is one object, and its data a list of rows; write `rows_under: data`"
    ):
        open_source(SourceConfig(kind="table", options=options), "data")
    assert len(open_source(SourceConfig(kind="table", options={**options, "rows_under": "data"}), "data")) == 1


def test_questions_of_ones_own_need_no_answer_type_and_say_how_pictures_are_called(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"questions": [{"question_id": 1, "image_id": 7, "question": "?"}]}))
    answers = {"question_id": 1, "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}]}
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [answers]}))
    options = {"questions": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json")}
    with pytest.raises(ConfigError, match=r"q.json: has no data_subtype.*say in picture how yours are called"):
        open_source(SourceConfig(kind="vqa", options=options), "data")
    source = open_source(SourceConfig(kind="vqa", options={**options, "picture": "{image_id}.png"}), "data")
    assert source[0]["messages"][0]["content"][0]["path"] == str(tmp_path / "7.png") and source[0]["tags"] == []
