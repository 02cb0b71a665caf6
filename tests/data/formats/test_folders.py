"""Files below a folder, as people have them: linked, dotted, hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.formats.folders import files_below
from molora.data.sources import Source, SourceConfig, open_source


def opened(kind: str, **options: Any) -> Source:
    return open_source(SourceConfig(kind=kind, options=options), "data")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_links_are_followed_and_hidden_names_left_out(tmp_path: Path) -> None:
    root = tmp_path / ".kept"
    touch(
        root / "b.v2/x.1.JPG", root / "b.v2/.x.jpg", root / ".thumbs/t.jpg", root / "é ü/y.jpg", tmp_path / "far/z.jpg"
    )
    (root / "a link").symlink_to(tmp_path / "far")
    (root / "again").symlink_to("a link")
    (root / "b.v2" / "up").symlink_to(root)
    (root / "é ü" / "file.jpg").symlink_to(tmp_path / "far/z.jpg")
    (root / "nowhere").symlink_to("gone")
    below = ["a link/z.jpg", "again/z.jpg", "b.v2/x.1.JPG", "nowhere", "é ü/file.jpg", "é ü/y.jpg"]
    assert files_below(root) == below
    source = opened("folder", path=str(root), part="image", prompt="{name}?", answer="{class}!")
    rows = [source[row] for row in range(len(source))]
    assert [row["id"] for row in rows] == [path for path in below if path != "nowhere"]
    assert [row["messages"][1]["content"] for row in rows] == ["a link!", "again!", "b.v2!", "é ü!", "é ü!"]
    assert rows[2]["messages"][0]["content"][1]["text"] == "x.1?"


def test_a_text_lies_beside_a_file_whose_name_has_dots(tmp_path: Path) -> None:
    touch(tmp_path / "a.b.jpg")
    (tmp_path / "a.b.txt").write_text("\ufeffwhat it shows\r\n", encoding="utf-8")
    source = opened("folder", path=str(tmp_path), part="image", prompt="?", answer="{text}")
    assert source[0]["messages"][1]["content"] == "what it shows"


def test_transcripts_of_linked_folders_are_read_and_resource_forks_are_not(tmp_path: Path) -> None:
    (tmp_path / "disk" / "84" / "121").mkdir(parents=True)
    (tmp_path / "disk" / "84" / "121" / "84-121.trans.txt").write_text("84-121-0000 GO DO\n")
    (tmp_path / "disk" / "84" / "121" / "._84-121.trans.txt").write_bytes(b"\0\xff")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "84").symlink_to(tmp_path / "disk" / "84")
    source = opened("transcripts", path=str(tmp_path / "set"))
    (row,) = (source[row] for row in range(len(source)))
    assert row["messages"][1]["content"] == "GO DO"
    assert row["messages"][0]["content"][0]["path"] == str(tmp_path / "set/84/121/84-121-0000.flac")


@pytest.mark.parametrize("cells", ["a.png,What is it?", "7,a cat", f"{'word ' * 20},b"])
def test_a_table_without_column_names_is_told(tmp_path: Path, cells: str) -> None:
    (tmp_path / "a.csv").write_text(f"{cells}\nb.png,Who?\n")
    with pytest.raises(ConfigError, match=r"a.csv: a column .* looks like a cell.*Write one above the rows"):
        opened("table", path=str(tmp_path / "a.csv"), prompt="{question}", answer="{answer}")
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(ConfigError, match="no column 'questoin'; did you mean 'question'"):
        opened("table", path=str(tmp_path / "b.csv"), prompt="{questoin}", answer="{answer}")
