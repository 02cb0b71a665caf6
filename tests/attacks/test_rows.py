"""What a stranger's file of rows may not do: read elsewhere, reach objects, fill the memory, or take for ever."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.formats.rows import MAX_ROW_BYTES, MAX_UNPACKED_BYTES
from molora.data.messages import media
from molora.data.sources import SourceConfig, open_source
from molora.modality import MediaError


def read(kind: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    source = open_source(SourceConfig(kind=kind, options={"path": str(path), **options}), "data")
    return [source[row] for row in range(len(source))]


def table(path: Path, prompt: str = "{q}", **options: Any) -> list[dict[str, Any]]:
    return read("table", path, prompt=prompt, answer="x", **options)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that rows must not reach, beside the folder of their media, which has a way out."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media/link").symlink_to(tmp_path)
    (tmp_path / "media/file").symlink_to(tmp_path / "secret.png")
    (tmp_path / "media2").mkdir()
    path = tmp_path / "secret.png"
    path.write_bytes(b"secret")
    return path


OUTSIDE = [
    "../secret.png",
    "x/../../secret.png",
    "{absolute}",
    "file://{absolute}",
    "file:{absolute}",
    "FILE://LOCALHOST{absolute}",
    "file://{escaped}",
    "link/secret.png",
    "file",
    "~/secret.png",
    "../media2/x.png",
    "./././link/./secret.png",
    "/proc/self/environ",
    "/dev/zero",
]


@pytest.mark.parametrize("given", OUTSIDE)
@pytest.mark.parametrize("way", ["path", "url", "image", "image_url", "column", "table"])
def test_no_path_leads_out_of_media_root(
    tmp_path: Path, secret: Path, given: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = given.format(absolute=secret, escaped=str(secret).replace("/", "/%2e/").replace("s", "%73"))
    bound = {"media_root": str(tmp_path / "media")}
    rows = tmp_path / "rows.jsonl"
    if way == "table":
        rows.write_text(json.dumps({"q": "q", "image": given}))
        attempt = lambda: table(rows, media={"image": "image"}, **bound)  # noqa: E731
    else:
        part = {"type": way, way: {"url": given}} if way == "image_url" else {"type": "image", way: given}
        row: dict[str, Any] = {"messages": [{"role": "user", "content": [part]}]}
        if way == "column":
            row = {"images": [given], "messages": [{"role": "user", "content": "<image>"}]}
        rows.write_text(json.dumps(row))
        attempt = lambda: read("messages", rows, **bound)  # noqa: E731
    with pytest.raises(MediaError, match=r"rows.jsonl, row 1: message 0, part 0 \(image\): .* leads out of media_root"):
        attempt()


@pytest.mark.parametrize(
    "template",
    [
        "{q.__class__.__init__.__globals__}",
        "{q.__class__.__mro__[1].__subclasses__}",
        "{q[__class__]}",
        "{q!a}",
        "{q:{q}}",
        "{q:999999999999}",
        "{0.__class__}",
        "{self}",
        "{q.format}",
        "{n[0].__doc__}",
    ],
)
def test_templates_reach_no_objects_and_make_no_padding(tmp_path: Path, template: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"q": "999999999999", "n": ["x"]}')
    with pytest.raises(ValueError, match=r"t.jsonl.*prompt: .*(is no column|no column|no item)"):
        table(tmp_path / "t.jsonl", template)


def test_a_template_of_nothing_but_items_is_looked_at_once(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"q": "x"}')
    with pytest.raises(ConfigError, match=r"no column '\[a\]"):
        table(tmp_path / "t.jsonl", "{" + "[a]" * 300_000 + "x}")


def test_a_number_beyond_every_row_is_no_number_of_one(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"q": ["x"]}')
    with pytest.raises(ValueError, match="row 1: .*no item '9999"):
        table(tmp_path / "t.jsonl", "{q[" + "9" * 5000 + "]}")
    with pytest.raises(ConfigError, match="write a name, or a slice"):
        table(tmp_path / "t.jsonl", split="train[:" + "9" * 400 + "%]")


@pytest.mark.parametrize("end", ["!", "=!", "\n= !"])
def test_what_is_nearly_base64_is_looked_at_once(end: str) -> None:
    text = "iVBORw0KGg" + "A" * 54 + " " * 1_000_000 + end
    assert media("image", text) == {"type": "image", "path": text}


def test_what_a_cell_says_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("q\n{q.__class__} {{x}} %s ${y}\n")
    assert table(tmp_path / "t.csv")[0]["messages"][0]["content"][-1]["text"] == "{q.__class__} {{x}} %s ${y}"


BOMBS = {
    "deep objects": '{"messages":' * 2_000_000,
    "deep lists": '{"messages":' + "[" * 20_000_000,
    "closed and deep": "[" * 500_000 + "]" * 500_000,
    "a long number": '{"messages":' + "9" * 2_000_000 + "}",
    "an exponent": '{"messages": 1e999999999}',
    "quotes without end": '[{"a": "' + '\\"' * 4_000_000,
    "backslashes": '[{"a": "' + "\\" * 8_000_001,
    "escapes by the million": '[{"a": "' + '\\"' * 8_000_000 + '"}]',
    "a key many times": "{" + ",".join(['"messages": 1'] * 500_000) + "}",
    "the last of many keys twice": "{" + "".join(f'"{i}": 1,' for i in range(500_000)) + '"499999": 1}',
    "unclosed lists in a list": "[" + "[[]," * 3_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("kind", ["messages", "table"])
def test_a_bomb_in_json_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "t.json").write_text(BOMBS[name])
    with pytest.raises(ValueError, match=r"t.json, row 1: |t.json: "):
        read("messages", tmp_path / "t.json") if kind == "messages" else table(tmp_path / "t.json")


def sparse(path: Path, head: bytes, size: int) -> None:
    """A file of a size that takes no room on the disk: what was not written reads as zeros."""
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json"])
@pytest.mark.parametrize("head", [b"", b"q,a\n", b'q,a\n"', b'{"q": "', b'[{"q": "'])
def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, name: str, head: bytes) -> None:
    sparse(tmp_path / name, head, 20 * MAX_ROW_BYTES)
    with pytest.raises(ValueError, match=rf"{name}.*(over|NUL|no rows|cut off|\d+ bytes)"):
        table(tmp_path / name)


@pytest.mark.parametrize("line", [b'x,"', b'"x\n', b'","\n', b'""\n"x'])
def test_a_quote_that_is_never_closed_ends_in_an_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(b'q,a\n"' + line * 400_000)
    with pytest.raises(ConfigError, match="t.csv, row "):
        table(tmp_path / "t.csv")


def bomb(path: Path, unit: bytes, size: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(size // len(unit)):
            file.write(unit)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz", "t.tsv"])
def test_a_packed_bomb_is_not_unpacked(tmp_path: Path, name: str) -> None:
    bomb(tmp_path / name, b"q,a\n" * 2**18, 2 * MAX_UNPACKED_BYTES)
    with pytest.raises(ConfigError, match=f"{name}: over {MAX_UNPACKED_BYTES} bytes"):
        table(tmp_path / name)


def test_a_column_of_a_million_names_is_read_and_not_quadratic(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(f"c{i}" for i in range(300_000)) + "\n" + "," * 299_999 + "\n")
    with pytest.raises(ConfigError, match="no column 'q'"):
        table(tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["pipe.csv", "pipe.jsonl", "pipe.parquet"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="not a file"):
        table(tmp_path / name)
    with pytest.raises(ConfigError, match="not a file"):
        read("messages", tmp_path / name)


def test_ids_and_tags_that_are_whole_documents_are_refused(tmp_path: Path) -> None:
    for about in ({"id": {"a": ["x"] * 10_000}}, {"tags": [["x"]] * 10_000}):
        (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}], **about}))
        with pytest.raises(ValueError, match=r"t.jsonl, row 1: (id|tags): expected .{,150}$"):
            read("messages", tmp_path / "t.jsonl")


def test_a_folder_of_data_runs_no_code(tmp_path: Path, canary: Path) -> None:
    """A loading script beside the data, as datasets once ran."""
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "train.csv").write_text("q\nx\n")
    with pytest.raises(ConfigError, match="set: cannot be opened by datasets .*scripts are no longer supported"):
        table(folder)
