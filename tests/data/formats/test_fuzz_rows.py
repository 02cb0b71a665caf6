"""Files of rows with bytes changed: every one is read or refused in the project's own words, and nothing is made up.

MOLORA_FUZZ_CASES=10000 tries as many; the suite tries fewer. Known answers are read right before and after each round.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.messages import check
from molora.data.sources import SourceConfig, open_source
from molora.modality import MediaError

CASES = int(os.environ.get("MOLORA_FUZZ_CASES", "600"))

ROWS: list[dict[str, Any]] = [
    {"id": "a", "messages": [{"role": "user", "content": "one\nline"}, {"role": "assistant", "content": "007"}]},
    {
        "id": 7,
        "tags": ["x", "y"],
        "images": ["a.png", "https://x/b.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "é😀 <image>"}]},
            {"role": "assistant", "content": "yes", "train": False},
        ],
    },
    {
        "system": "Be brief.",
        "image": "c.png",
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "no", "loss": 1}],
    },
]
TABLE = [
    {"question": "Which?", "answer": "0.50", "image": "a.png"},
    {"question": 'the "first"', "answer": "+5", "image": ""},
    {"question": "C:\\temp", "answer": "\\frac{1}{2}", "image": "file:///d.png"},
]
# Pieces that break readers, put in or over what is there.
PIECES = [b'"', b"'", b"\\", b"\\u", b"\\ud83d", b"\n", b"\r", b"\t", b",", b";", b"{", b"}", b"[", b"]", b":", b"null"]
PIECES += [
    b"NaN",
    b"1e999",
    b"true",
    b"0.5",
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\x1f\x8b",
    b"\xe2\x80\xa8",
]
PIECES += [
    b"<image>",
    b'"weight": 2',
    b"train",
    b"~/",
    b"../",
    b"file://",
    b"data:,",
    b"sep=;\n",
    b"-",
    b" ",
    b'""',
    b"]" * 70,
]


def written(separator: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(TABLE[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(TABLE)
    return text.getvalue().encode()


LINES = "\n".join(json.dumps(row) for row in ROWS).encode()
FILES: dict[str, tuple[str, bytes]] = {
    "rows.jsonl": ("messages", LINES),
    "rows.json": ("messages", json.dumps(ROWS, indent=1, ensure_ascii=False).encode()),
    "t.jsonl": ("table", "\n".join(json.dumps(row) for row in TABLE).encode()),
    "t.json": ("table", json.dumps(TABLE).encode()),
    "t.csv": ("table", written(",")),
    "u.csv": ("table", written(";").decode().encode("utf-16")),
    "t.tsv": ("table", written("\t")),
}


def read(path: Path, kind: str) -> list[dict[str, Any] | str]:
    """The rows, or what each is refused with."""
    options: dict[str, Any] = {"path": str(path)}
    if kind == "table":
        options |= {"prompt": "{question}", "answer": "{answer}", "media": {"image": "image"}}
    try:
        source = open_source(SourceConfig(kind=kind, options=options), "data")
    except ConfigError as error:
        return [str(error)]
    found: list[dict[str, Any] | str] = []
    for row in range(len(source)):
        try:
            found.append(source[row])
        except (ConfigError, MediaError) as error:
            found.append(str(error))
        except ValueError as error:
            assert type(error) is ValueError, f"{type(error).__name__} is not for users"
            found.append(str(error))
    return found


def mutated(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((0, 0, 1, 1, 2, 8)))
        new = draw.choice(
            (b"", draw.choice(PIECES), bytes([draw.randrange(256)]), data[end : end + draw.randrange(20)])
        )
        data = data[:at] + new + data[end:]
    return data


def texts(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


@pytest.mark.parametrize("name", FILES)
def test_changed_files_are_read_or_refused_in_plain_words(tmp_path: Path, name: str) -> None:
    kind, data = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    right = read(path, kind)
    assert len(right) == 3 and all(isinstance(row, dict) for row in right)
    draw = random.Random(name)
    for case in range(CASES // len(FILES) + 1):
        changed = mutated(data, draw)
        path.write_bytes(changed)
        for row in read(path, kind):
            if isinstance(row, str):
                assert str(path) in row or "data source" in row, (case, changed, row)
                assert "Traceback" not in row and " object at 0x" not in row and len(row) < 2000, (case, row)
                continue
            check(row["messages"], None, "row")
            assert isinstance(row["id"], str) and all(isinstance(tag, str) for tag in row["tags"]), (case, row)
            texts(row).encode()  # what is read can be written: no half surrogates
            for python in ("None", "{'", "['"):  # Python's spelling of a value, unless the file spells it so
                assert python not in texts(row) or python.encode() in changed.replace(b"\0", b""), (case, changed, row)
    path.write_bytes(data)
    assert read(path, kind) == right


def cell_by_cell(rows: list[dict[str, str]], draw: random.Random) -> list[dict[str, str]]:
    """The rows with texts of all kinds in their cells."""
    alphabet = ["a", "0", ".", "\\", '"', '""', ",", ";", "é", "\u2028", "<image>", " ", "{", "}", "'", "-", "\n", "\t"]
    return [
        {
            "question": "".join(draw.choices(alphabet, k=draw.randrange(8))),
            "answer": f"a{draw.random()}{draw.choice(alphabet)}",
        }
        for _ in rows
    ]


WRITERS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "t.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows),
    "t.json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=2),
    "t.csv": lambda rows: quoted(rows, ","),
    "t.tsv": lambda rows: quoted(rows, "\t"),
}


def quoted(rows: list[dict[str, str]], separator: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("name", WRITERS)
def test_whatever_a_writer_put_into_a_cell_comes_out(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    for _ in range(CASES // 40 + 1):
        rows = cell_by_cell(TABLE * 3, draw)
        (tmp_path / name).write_text(WRITERS[name](rows), encoding="utf-8", newline="")
        options = {"path": str(tmp_path / name), "prompt": "Q: {question}", "answer": "{answer}"}
        source = open_source(SourceConfig(kind="table", options=options), "data")
        found = [source[row]["messages"] for row in range(len(source))]
        assert [(user["content"][0]["text"], said["content"]) for user, said in found] == [
            (f"Q: {row['question']}", row["answer"]) for row in rows
        ]
