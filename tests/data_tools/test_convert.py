"""What `molora data convert` writes is the same conversation, with the same media, when it is read again."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from molora.cli.commands import main
from molora.config import ConfigError, build, dump
from molora.data.messages import media_parts
from molora.data.sources import Messages, MessagesConfig, Source, SourceConfig, open_source
from molora.data_tools.convert import convert
from molora.plugins import find
from molora.storage import write_folder
from tests.data_tools.planted import clip, picture, recipe, row, write

pytest.importorskip("soundfile")


class Objects:
    """A source whose media are objects in memory, of every kind."""

    config_type = MessagesConfig

    def __init__(self, config: MessagesConfig) -> None:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG")
        Path(config.path).write_bytes(file.getvalue())
        hum = np.sin(np.arange(4000) / 20)
        self.media: list[dict[str, Any]] = [
            {"type": "image", "path": config.path},
            {"type": "image", "bytes": file.getvalue()},
            {"type": "image", "image": {"bytes": file.getvalue(), "path": "old name.jpg"}},
            {"type": "image", "image": config.path},
            {"type": "image", "array": pixels},
            {"type": "image", "image": Image.fromarray(pixels[..., 0])},
            {"type": "image", "array": torch.from_numpy(pixels).movedim(-1, 0)},
            {"type": "image", "url": "https://example.com/a.png"},
            {"type": "audio", "array": hum.astype(np.float32), "sampling_rate": 8000},
            {"type": "audio", "array": (0.5 * hum).astype(np.float64), "sampling_rate": 16_000},
            {"type": "audio", "audio": {"array": (20_000 * hum).astype(np.int16), "sampling_rate": 16_000}},
            {"type": "numbers", "numbers": [1.5, 2.0]},
        ]

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, row: int) -> dict[str, Any]:
        content = [{"type": "text", "text": "before <image>"}, self.media[row], {"type": "text", "text": "é after"}]
        answer = {"role": "assistant", "content": f"answer {row}", "train": row % 2 == 0}
        messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}, answer]
        return {"id": f"row {row}", "messages": messages, "tags": ["odd"] * (row % 2)}


KIND = f"{__file__}:Objects"


def config(folder: Path) -> SourceConfig:
    return SourceConfig(kind=KIND, options={"path": str(folder / "a.jpg")})


def decoded(part: Mapping[str, Any]) -> Any:
    """What a modality makes of a part; the part itself where none is needed to read it."""
    if part["type"] == "numbers" or "url" in part:
        return part
    modality_class: Any = find("modality", {"image": "vision", "audio": "audio"}[part["type"]]).plugin
    item = modality_class(part["type"], build(modality_class.config_type, {}, "options")).load(part)
    return item if isinstance(item, Tensor) else np.asarray(item)


def without_media(row: Mapping[str, Any]) -> Any:
    messages = [
        {**message, "content": [part if part["type"] == "text" else part["type"] for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in row["messages"]
    ]
    return {**row, "messages": messages}


def assert_same(source: Source, again: Source) -> None:
    assert len(source) == len(again)
    for index in range(len(source)):
        before, after = source[index], again[index]
        assert without_media(before) == without_media(after)
        for (_, part), (_, other) in zip(media_parts(before["messages"]), media_parts(after["messages"]), strict=True):
            one, two = decoded(part), decoded(other)
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, two, rtol=0, atol=0)
            else:
                np.testing.assert_equal(one, two)


def messages(path: Path) -> Messages:
    return Messages(MessagesConfig(path=str(path), media_root=str(path.parent)))


def test_jsonl_is_read_again_as_it_was(tmp_path: Path) -> None:
    written = convert({"objects": config(tmp_path)}, tmp_path / "new", show=False)
    source = open_source(config(tmp_path), "test")
    assert (written.num_rows, written.num_media) == (len(source), len(source))
    assert_same(source, messages(tmp_path / "new" / "objects.jsonl"))
    # The JPEG is there once for all of its four rows, byte for byte.
    (jpeg,) = (tmp_path / "new" / "objects.media").glob("*.jpg")
    assert jpeg.read_bytes() == (tmp_path / "a.jpg").read_bytes()


def test_what_was_converted_is_converted_to_the_same(tmp_path: Path) -> None:
    convert({"objects": config(tmp_path)}, tmp_path / "once", show=False)
    path = tmp_path / "once" / "objects.jsonl"
    again = {"objects": SourceConfig(kind="messages", options={"path": str(path)})}
    convert(again, tmp_path / "twice", show=False)
    folders = (tmp_path / "once", tmp_path / "twice")
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
    assert files[0] == files[1]
    assert path.read_bytes() == (tmp_path / "twice" / "objects.jsonl").read_bytes()


def test_shards_are_read_again_as_they_were(tmp_path: Path) -> None:
    convert({"objects": config(tmp_path)}, tmp_path / "new", rows_per_shard=5, show=False)
    shards = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert shards == ["objects-000000.tar", "objects-000001.tar", "objects-000002.tar"]
    again = SourceConfig(kind="shards", options={"path": str(tmp_path / "new" / "objects-*.tar")})
    assert_same(open_source(config(tmp_path), "test"), open_source(again, "test"))


def rows_with_faults(folder: Path) -> dict[str, SourceConfig]:
    """Four rows: one without its picture, one that is whole, one of another shape, and another whole one."""
    picture(folder, "there")
    shown = [[{"type": "image", "path": f"{name}.png"}] for name in ("gone", "there")]
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": each}, {"role": "assistant", "content": "a"}]} for each in shown
    ]
    write(folder / "rows.jsonl", [*rows, {"messages": 7}, rows[1]])
    return {"rows": SourceConfig(kind="messages", options={"path": str(folder / "rows.jsonl")})}


@pytest.mark.parametrize("rows_per_shard", [None, 1])
def test_rows_that_cannot_be_written_are_left_out_and_told(tmp_path: Path, rows_per_shard: int | None) -> None:
    written = convert(rows_with_faults(tmp_path), tmp_path / "new", rows_per_shard=rows_per_shard, show=False)
    assert (written.num_rows, written.num_media, written.num_left_out) == (2, 2, 2)
    assert re.search(r"rows.jsonl, row 1: message 0, part 0 \(image\): .*gone.png", written.why[0])
    assert "rows.jsonl, row 3: " in written.why[1]
    if rows_per_shard is None:
        assert [messages(tmp_path / "new" / "rows.jsonl")[row]["id"] for row in range(2)] == ["1", "3"]
    else:
        shards = SourceConfig(kind="shards", options={"path": str(tmp_path / "new" / "rows-00000{0,1}.tar")})
        assert [open_source(shards, "test")[row]["id"] for row in range(2)] == ["1", "3"]


def test_where_no_row_can_be_left_out_nothing_is_left(tmp_path: Path) -> None:
    rows = rows_with_faults(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: message 0, part 0 \(image\): .*gone.png"):
        convert(rows, tmp_path / "new", strict=True, show=False)
    with pytest.raises(ValueError, match=r"none of 1 rows can be written; the first: .*gone.png"):
        convert(rows, tmp_path / "new", limit=1, show=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    rows = rows_with_faults(tmp_path)
    if os.fork() == 0:
        with write_folder(tmp_path / "new") as draft:
            (draft / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    left = set(tmp_path.glob(".molora-*.tmp"))
    assert len(left) == 1
    with write_folder(tmp_path / "other") as living:
        convert(rows, tmp_path / "new", show=False)
        assert set(tmp_path.glob(".molora-*.tmp")) == {living}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"rows.jsonl", "rows.media"}


def test_the_command_tells_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_with_faults(tmp_path)
    monkeypatch.setattr("sys.argv", ["molora", "data", "convert", f"{tmp_path}/rows.jsonl", f"{tmp_path}/new"])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "left out: " in told and "gone.png" in told


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        convert({"objects": config(tmp_path)}, tmp_path, show=False)


def test_the_command_converts_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"id": str(number), "messages": turns} for number in range(3)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"{tmp_path}/talk.jsonl", f"{tmp_path}/new", "--limit", "2"]
    monkeypatch.setattr("sys.argv", ["molora", "data", "convert", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code and "2 rows, 0 media" in " ".join(capsys.readouterr().out.split())
    assert [messages(tmp_path / "new" / "talk.jsonl")[row]["id"] for row in range(2)] == ["0", "1"]


def test_the_command_converts_every_source_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "planted.jsonl", [row("one?", "1", picture(tmp_path, "one")), row("two?", "2")])
    write(tmp_path / "asked.jsonl", [row("three?", "3", clip(tmp_path, "three"))])
    (tmp_path / "recipe.yaml").write_text(dump(recipe(tmp_path)))
    arguments = [f"{tmp_path}/recipe.yaml", f"{tmp_path}/new", "seed=1"]
    monkeypatch.setattr("sys.argv", ["molora", "data", "convert", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, capsys.readouterr().err
    for name, source in (("planted", "stages.0.planted"), ("asked", "evaluations.asked")):
        assert_same(messages(tmp_path / f"{name}.jsonl"), messages(tmp_path / "new" / f"{source}.jsonl"))


def test_a_source_whose_name_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="becomes part of a path"):
        convert({"../out": config(tmp_path)}, tmp_path / "new", show=False)
    assert not (tmp_path / "new").exists()


def test_preferences_are_read_again_as_they_were(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    asked = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    row = {"id": "a", "prompt": [*earlier, {"role": "user", "content": asked}], "chosen": "red", "rejected": "blue"}
    turns = [{"role": "assistant", "content": "no"}, {"role": "user", "content": "no?"}]
    longer = {"prompt": "what?", "chosen": [*turns, {"role": "assistant", "content": "yes"}], "rejected": "blue"}
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, (row, {"id": "b", **longer}))))
    options = {"path": str(tmp_path / "pairs.jsonl")}
    before = open_source(SourceConfig(kind="preferences", options=options), "test")[1]
    convert({"pairs": SourceConfig(kind="preferences", options=options)}, tmp_path / "out", show=False)
    (tmp_path / "a.png").unlink()
    options = {"path": str(tmp_path / "out/pairs.jsonl")}
    converted = open_source(SourceConfig(kind="preferences", options=options), "test")
    assert converted[1] == before, "an answer may be several turns"
    again = converted[0]
    for side, answer in (("messages", "red"), ("rejected", "blue")):
        assert [each["role"] for each in again[side]] == ["user", "assistant", "user", "assistant"]
        assert again[side][1]["train"] is False and again[side][3]["content"] == answer
        assert Path(again[side][2]["content"][0]["path"]).is_relative_to(tmp_path / "out")
