"""Rows of text files: a cell is the text that stands in the file, whoever wrote it, and a faulty row is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.formats import rows as module
from molora.data.formats.rows import MAX_DEPTH, CellRows, JsonRows, parse


def cells(tmp_path: Path, data: bytes | str, *, tabs: bool = False) -> list[list[str]]:
    path = tmp_path / "t"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    rows = CellRows(path, tabs=tabs)
    return [list(rows[row].values()) for row in range(len(rows))]


AWKWARD = [
    "007",
    "0.50",
    "+5",
    "-0",
    "1e5",
    "2024-01-02",
    "9" * 40,
    "NA",
    "null",
    "True",
    "",
    " x ",
    "C:\\",
    "\\frac{1}",
]
AWKWARD += [
    '5" pipe',
    '"',
    '""',
    '"quoted"',
    "a,b;c",
    "two\nlines",
    "two\r\nlines",
    "\n",
    "é😀",
    "\u2028x",
    "it's",
    "=1+1",
]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_what_the_writer_of_csv_wrote_is_what_is_read(tmp_path: Path, separator: str, quoting: Any, end: str) -> None:
    draw = random.Random(0)
    # A writer that ends lines in CR leaves LF without quotes.
    texts = [text for text in AWKWARD if end != "\r" or quoting == csv.QUOTE_ALL or "\n" not in text]
    table = [[*draw.choices(texts, k=2), "x"] for _ in range(60)] + [[text, text, "y"] for text in texts]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end).writerows([["a", "b", "c"], *table])
    assert cells(tmp_path, text.getvalue()) == table
    assert cells(tmp_path, text.getvalue().encode("utf-8-sig")) == table
    assert cells(tmp_path, text.getvalue().encode("utf-16")) == table
    assert cells(tmp_path, gzip.compress(text.getvalue().encode())) == table
    if separator == "\t":
        assert cells(tmp_path, text.getvalue(), tabs=True) == table
        one_line = [row for row in table if not set("\r\n\t") & set("".join(row))]
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", quoting=quoting, lineterminator=end).writerows([["a", "b", "c"], *one_line])
        assert cells(tmp_path, text.getvalue(), tabs=True) == one_line


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_cells_that_nobody_quoted_are_read_as_they_stand(tmp_path: Path, end: str) -> None:
    """As Common Voice, CoVoST and LaTeX are written: a line is a row, and quotes and backslashes are text."""
    said = ['"Yes."', '"Yes', 'Yes"', '"No," she "said"', "\\frac{1}{2}", "C:\\temp", "C:\\", "\\", '"a" b', "'", "007"]
    text = end.join(["path\tsaid", *(f"{i}.mp3\t{line}" for i, line in enumerate(said))])
    assert [row[1] for row in cells(tmp_path, text, tabs=True)] == said
    swapped = end.join(["said\tpath", *(f"{line}\t{i}.mp3" for i, line in enumerate(said))])
    assert [row[0] for row in cells(tmp_path, swapped, tabs=True)] == said


def test_a_tab_behind_a_backslash_is_text_where_the_cells_say_so(tmp_path: Path) -> None:
    assert cells(tmp_path, "a\tb\n1\tit's 5\\\ttabs\n2\tC:\\temp\n", tabs=True) == [
        ["1", "it's 5\ttabs"],
        ["2", "C:\\temp"],
    ]
    assert cells(tmp_path, "a\tb\nC:\\\tdrive\n", tabs=True) == [["C:\\", "drive"]]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a,b\n1,2\n\n \n3,4\n\n", [["1", "2"], ["3", "4"]]),  # empty lines
        ("a,b\n1,2,\n3,4,,\n", [["1", "2"], ["3", "4"]]),  # trailing commas in rows
        ("a,b,\n1,2,\n3,4\n", [["1", "2", ""], ["3", "4"]]),  # and in the names
        ("a,b\n1,2", [["1", "2"]]),  # no end of the last line
        ("a;b\n1,5;2\n", [["1,5", "2"]]),  # decimal commas
        ("sep=;\r\na;b\r\n1;2\r\n", [["1", "2"]]),  # Excel's own first line
        ("sep=\t\r\na,x\tb\r\n1\t2\r\n", [["1", "2"]]),
        ("\nsep=§\na§b\n1§2\n", [["1", "2"]]),
        ('"a;b",c\n1,2\n', [["1", "2"]]),  # a semicolon in a name
        ('a,b\n"1\n2\n\n3",4\n', [["1\n2\n\n3", "4"]]),  # an empty line in quotes
        ("a\n1\n2\n", [["1"], ["2"]]),  # one column
        ("\n\na,b\n1,2\n", [["1", "2"]]),  # empty lines before the names
        ('a,b\n1, "x"\n', [["1", ' "x"']]),  # a space before the quote: the cell begins with the space
    ],
)
def test_odd_csv_is_read_as_meant(tmp_path: Path, text: str, expected: list[list[str]]) -> None:
    assert cells(tmp_path, text) == expected


@pytest.mark.parametrize(
    "data, says",
    [
        (b"a,b\n1,2\n1,2,3\n", r"t, row 2: has 3 cells, but there are 2 column names: \['a', 'b'\]"),
        (b"a,b\n1,2\n1\n", "t, row 2: has 1 cells, but there are 2"),
        (b'a,b\n1,2\n"1,2\n3,4\n', "t, row 2: unexpected end of data; a cell that holds"),
        (b'a,b\n"say \\"hi\\"",2\n', "t, row 1: ',' expected after '\"'"),
        (b"a,b\ncaf\xe9,1\n", "t, row 1: byte 0xe9 .8 bytes from the start of the file. is not UTF-8; .*iconv"),
        (b"caf\xe9,b\n1,2\n", "t, the line of column names: byte 0xe9"),
        (b"a,b\n1,2\n\0,2\n", "t, row 2: a NUL byte"),
        ("a,b\n1,2\n".encode("utf-16-le"), "the line of column names: a NUL byte; .* UTF-16 without its mark"),
        ("a,b\n1,2\n".encode("utf-16")[:-1], "t: byte 17 is not UTF-16"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "t: cannot be unpacked"),
        (b"a,b\n", "t: no rows under the column names"),
        (b"\xef\xbb\xbf", "t: no rows$"),
        (b"", "t: no rows$"),
        (b"\n \n", "t: no rows$"),
        (b"PK\x03\x04\x14\x00,b\n", "a NUL byte"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cells(tmp_path, data)


def test_a_tsv_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="t, row 2: has 3 cells, but there are 2"):
        cells(tmp_path, "a\tb\n1\t2\n1\t2\t3\n", tabs=True)


def test_a_file_that_changes_under_a_run_is_not_read_on(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("a,b\n1,2\n3,4\n")
    rows = CellRows(tmp_path / "t", tabs=False)
    assert rows[1] == {"a": "3", "b": "4"}
    assert pickle.loads(pickle.dumps(rows))[1] == {"a": "3", "b": "4"}
    (tmp_path / "t").write_text("a,b\n11,2\n3,4\n")
    with pytest.raises(ValueError, match="has changed since it was opened"):
        rows[1]


def test_a_pipe_or_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "not a file"), (".", "not a file"), ("gone", "no such file")):
        for kind in (lambda path: CellRows(path, tabs=False), lambda path: JsonRows(path, numbers_as_text=True)):
            with pytest.raises(ConfigError, match=says):
                kind(tmp_path / name)


OBJECTS = [{"a": 'x\n, ]}[{ "q" \\', "b": [{"c": {}}, []]}, {"a": "é😀\u2028"}, {}, {"b": None}, {"a": "]\\" * 2500}]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_objects_are_read_one_a_line_or_in_one_list(tmp_path: Path, ascii: bool, encoding: str, packed: bool) -> None:
    lines = [json.dumps(value, ensure_ascii=ascii) for value in OBJECTS]
    texts = ["\n".join(lines), "\r\n\r\n".join(lines) + "\r\n", "[" + ",".join(lines) + "]"]
    texts += [json.dumps(OBJECTS, ensure_ascii=ascii, indent=2), " \n[\n" + "\n,\n".join(lines) + "\n]\n "]
    for text in texts:
        data = text.encode(encoding)
        (tmp_path / "t").write_bytes(gzip.compress(data) if packed else data)
        rows = JsonRows(tmp_path / "t", numbers_as_text=False)
        assert [rows[row] for row in range(len(rows))] == OBJECTS
        assert rows.columns(lambda names: False) == ["a", "b"]


def test_numbers_can_be_the_text_that_stands_in_the_file(tmp_path: Path) -> None:
    numbers = ["0.50", "-0", "1e5", "9" * 5000, "3.0", "1E+400"]
    (tmp_path / "t").write_text("\n".join(f'{{"a": {number}, "b": [{number}]}}' for number in numbers))
    rows = JsonRows(tmp_path / "t", numbers_as_text=True)
    assert [rows[row] for row in range(len(rows))] == [{"a": number, "b": [number]} for number in numbers]


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"a": 1', "here: not valid JSON"),
        ('{"a": 1} {"b": 2}', "not valid JSON .Extra data"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object"),
        ('{"a": NaN}', "NaN is no value of JSON"),
        ('{"a": -Infinity}', "-Infinity is no value of JSON"),
        ('{"a": "tab\there"}', "not valid JSON .Invalid control character"),
        ("{'a': 1}", "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ('{"a":' * 100_000, f"here: nested over {MAX_DEPTH} levels deep"),
        ("[" * 100_000, f"nested over {MAX_DEPTH} levels deep"),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", f"nested over {MAX_DEPTH} levels deep"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^here: .*{says.removeprefix('here: ')}"):
        parse(text.encode(), "here")


def test_brackets_in_texts_and_beside_each_other_are_not_nested() -> None:
    assert parse(json.dumps({"a": "[" * 1000 + '"'}).encode(), "") == {"a": "[" * 1000 + '"'}
    assert parse(json.dumps([[[]]] * 1000).encode(), "") == [[[]]] * 1000
    assert len(parse(f"{'[' * MAX_DEPTH}{']' * MAX_DEPTH}".encode(), "")) == 1


def test_half_an_emoji_becomes_the_replacement_character() -> None:
    text = r'{"\ud83d": ["half \ud83d", "\ude00", "whole \ud83d\ude00", "\\ud83d"]}'
    assert parse(text.encode(), "") == {"�": ["half �", "�", "whole 😀", "\\ud83d"]}


@pytest.mark.parametrize(
    "text, says",
    [
        ('[{"a": 1}, {"a": 2}', "t, row 3: the file ends inside its list"),
        ('[{"a": 1}, {"a": "x]', "t, row 2: the file ends inside its list"),
        ('[{"a": 1} {"a": 2}]', "t, row 2: expected objects with commas between them"),
        ('[{"a": 1},, {"a": 2}]', "t, row 2: expected objects"),
        ('[1, {"a": 2}]', "t, row 1: expected objects .*found '1,'"),
        ('[{"a": 1}, "x"]', "t, row 2: expected objects .*found ', \"x\"'"),
        ('[{"a": 1}]\n[{"a": 2}]', "t, row 2: expected objects"),
        ('[{"a": 1}, ]', "t, row 2: expected objects"),
        ("[]", "t: no rows"),
        ("[" * 100_000, f"t, row 1: nested over {MAX_DEPTH} levels deep"),
    ],
)
def test_a_list_that_is_broken_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=says):
        JsonRows(tmp_path / "t", numbers_as_text=False)


def test_a_row_of_another_kind_is_named_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_text('{"a": 1}\n7\n{"a": caf}\n')
    rows = JsonRows(tmp_path / "t", numbers_as_text=False)
    with pytest.raises(ValueError, match="t, row 2: expected an object, found int"):
        rows[1]
    with pytest.raises(ValueError, match="t, row 3: not valid JSON"):
        rows[2]


def test_a_row_may_not_be_larger_than_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 100)
    for text in ("a,b\n1,2\n" + "x" * 200, 'a,b\n1,2\n"' + "x\n" * 200):
        with pytest.raises(ConfigError, match="t, row 2: .*100 bytes"):
            cells(tmp_path, text)
    for text in ('{"a": 1}\n' + " " * 200 + "{}", '[{"a": 1}, {"a": "' + "x" * 200 + '"}]'):
        (tmp_path / "t").write_text(text)
        with pytest.raises(ConfigError, match="t, row 2: .*100"):
            JsonRows(tmp_path / "t", numbers_as_text=False)


def test_an_empty_cell_of_one_column_is_a_row_and_an_empty_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('q\n""\nx\n\n" "\n   \ny\n', encoding="utf-8")
    rows = CellRows(tmp_path / "t.csv", tabs=False)
    assert [rows[row]["q"] for row in range(len(rows))] == ["", "x", " ", "y"]


def test_json_that_is_no_row_is_told_what_a_row_is(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"q": "a"},\n', encoding="utf-8")
    says = "row 1: not valid JSON .Extra data at character 11.; a line holds one object, or the file one list of them"
    with pytest.raises(ValueError, match=says):
        JsonRows(tmp_path / "t.jsonl", numbers_as_text=False)[0]
