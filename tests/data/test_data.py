"""Sources of conversations, and an order of samples that is a pure function of seed and position."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError, build
from molora.data.loader import step_loader
from molora.data.messages import conversation
from molora.data.processor import Processor
from molora.data.sources import (
    EncodedSamples,
    MessagesConfig,
    Order,
    Skipped,
    Source,
    SourceConfig,
    open_source,
)
from molora.modality import MediaError
from molora.testing.tiny import byte_tokenizer


def test_every_row_comes_once_in_an_epoch_and_epochs_differ() -> None:
    order = Order([7], [1.0], seed=3)
    epochs = [[order[7 * epoch + k] for k in range(7)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(row for _, row, _ in epoch) == list(range(7))
        assert {e for _, _, e in epoch} == {number}
    assert len({tuple(row for _, row, _ in epoch) for epoch in epochs}) == 3


def test_the_order_is_the_same_from_anywhere() -> None:
    forwards = Order([50, 3, 1000], [1.0, 2.0, 0.5], seed=1)
    sequence = [forwards[k] for k in range(9000)]
    for start in (0, 4095, 4096, 8191, 8999):
        assert Order([50, 3, 1000], [1.0, 2.0, 0.5], seed=1)[start] == sequence[start]
    assert [Order([50, 3, 1000], [1.0, 2.0, 0.5], seed=2)[k] for k in range(50)] != sequence[:50]


def test_sources_come_by_weight() -> None:
    order = Order([10, 10], [3.0, 1.0], seed=0)
    share = sum(order[k][0] == 0 for k in range(8000)) / 8000
    assert share == pytest.approx(0.75, abs=0.02)


def test_messages_are_read_by_row_with_media_beside_the_file(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "path": "x.png"}]}], "tags": ["t"]},
        {
            "image": "y.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}],
        },
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    source = open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}), "data")
    assert len(source) == 2
    assert source[0]["messages"][0]["content"][0]["path"] == str(tmp_path / "x.png")
    assert source[0]["id"] == "a" and source[0]["tags"] == ["t"]
    content = source[1]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image", "text"] and content[0]["path"] == str(tmp_path / "y.png")


def test_a_row_that_is_no_conversation_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": []\n{"prompt": "x"}\n')
    source = open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}), "data")
    with pytest.raises(ValueError, match="row 1: not valid JSON"):
        source[0]
    with pytest.raises(ValueError, match="row 2: neither 'messages' nor 'conversations'"):
        source[1]
    with pytest.raises(ValueError, match="expected an object"):
        conversation([], "here")  # pyright: ignore[reportArgumentType]


def test_unknown_kinds_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.kind: no source is called 'mesages'; did you mean 'messages'"):
        open_source(SourceConfig(kind="mesages"), "data")
    with pytest.raises(ConfigError, match="~nobody-of-that-name/rows.jsonl"):
        open_source(SourceConfig(kind="messages", options={"path": "~nobody-of-that-name/rows.jsonl"}), "data")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no rows"):
        open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / "empty.jsonl")}), "data")


def test_limits_keep_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": "x"}]}) for _ in range(5))
    )
    config = SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}, limit=2)
    assert len(open_source(config, "data")) == 2


def test_a_limit_or_weight_that_means_nothing_is_refused_with_its_key() -> None:
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"data: d: limit is {limit}"):
            build(dict[str, SourceConfig], {"d": {"kind": "messages", "limit": limit}}, "data")
    for weight in (0.0, -1.0, float("nan"), float("inf"), 2e9):
        with pytest.raises(ConfigError, match=f"data: d: weight is {weight}"):
            build(dict[str, SourceConfig], {"d": {"kind": "messages", "weight": weight}}, "data")


def rows_of(tmp_path: Path, *rows: Any, name: str = "rows.jsonl", **options: Any) -> Source:
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    return open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / name), **options}), "data")


ASKED = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("value, id", [(None, "1"), ("", "1"), ("a", "a"), (7, "7"), (0, "0"), (1.5, "1.5")])
def test_an_id_is_text_or_a_number_or_the_rows_number(tmp_path: Path, value: Any, id: str) -> None:
    assert rows_of(tmp_path, {"messages": ASKED}, {"id": value, "messages": ASKED})[1]["id"] == id


@pytest.mark.parametrize("value, tags", [(None, []), ("", []), ("a", ["a"]), (["a", "b", "a", ""], ["a", "b"])])
def test_tags_are_names_or_one_name_or_none(tmp_path: Path, value: Any, tags: list[str]) -> None:
    assert rows_of(tmp_path, {"tags": value, "messages": ASKED})[0]["tags"] == tags


@pytest.mark.parametrize(
    "about", [{"id": True}, {"id": [1]}, {"id": {}}, {"tags": {"a": 1}}, {"tags": [1]}, {"tags": 7}]
)
def test_other_ids_and_tags_are_refused_with_their_row(tmp_path: Path, about: dict[str, Any]) -> None:
    (key,) = about
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: {key}: expected"):
        rows_of(tmp_path, {**about, "messages": ASKED})[0]


def test_messages_stand_in_a_list_too_packed_or_not(tmp_path: Path) -> None:
    data = json.dumps([{"messages": ASKED}, {"messages": [{"role": "user", "content": "y"}]}], indent=1).encode()
    for name, content in (("a.json", data), ("[v2] b.JSON.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        source = open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / name)}), "data")
        assert [source[row]["messages"][0]["content"] for row in range(len(source))] == ["x", "y"]


def test_media_start_from_media_root_and_stay_in_it(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    shown = [{"messages": [{"role": "user", "content": [{"type": "image", "path": path}]}]} for path in ("a", "../a")]
    source = rows_of(tmp_path, *shown, media_root=str(tmp_path / "media"))
    assert source[0]["messages"][0]["content"][0]["path"] == str((tmp_path / "media/a").resolve())
    with pytest.raises(MediaError, match=r"rows.jsonl, row 2: message 0, part 0 \(image\): '../a' leads out of"):
        source[1]


def samples(folder: Path, *, skips: tuple[type[ValueError], ...] = (), rows: list[Any], **options: Any) -> Any:
    """Samples of a file of rows, in the order of an epoch."""
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = SourceConfig(kind="messages", options={"path": str(folder / "rows.jsonl"), **options})
    processor = Processor(byte_tokenizer(), {}, lambda company: (), 1000)
    return EncodedSamples({"d": config}, processor, seed=0, max_tokens=1000, skips=skips, where="data")


def test_a_medium_out_of_bounds_can_be_left_out_and_other_faults_cannot(tmp_path: Path) -> None:
    outside = {"messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]}
    found = samples(tmp_path, rows=[outside], skips=(MediaError,), media_root=str(tmp_path))[0]
    assert isinstance(found, Skipped) and "leads out of media_root" in found.reason
    with pytest.raises(MediaError, match="rows.jsonl, row 1: message 0, part 0"):
        samples(tmp_path, rows=[outside], media_root=str(tmp_path))[0]
    with pytest.raises(ValueError, match="rows.jsonl, row 1: neither 'messages'"):
        samples(tmp_path, rows=[{}], skips=(MediaError,))[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_error_and_no_traceback(tmp_path: Path, workers: int) -> None:
    order = {"first_step": 0, "steps": 1, "samples_per_step": 1, "rank": 0, "ranks": 1}
    with pytest.raises(ValueError) as raised:
        list(step_loader(samples(tmp_path, rows=[{"messages": "hello"}]), **order, workers=workers))
    assert str(raised.value).endswith("row 1: messages: expected a list of at least one turn, got 'hello'")


class Broken:
    """A plugin's source that fails in its own way."""

    config_type = MessagesConfig

    def __init__(self, config: MessagesConfig) -> None: ...

    def __len__(self) -> int:
        return 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        raise KeyError("wave")


def test_a_plugins_source_that_fails_is_named_with_its_row() -> None:
    config = SourceConfig(kind=f"{__name__}:Broken", options={"path": "x"})
    processor = Processor(byte_tokenizer(), {}, lambda company: (), 1000)
    source = EncodedSamples({"d": config}, processor, seed=0, max_tokens=9, skips=(), where="data")
    with pytest.raises(ValueError, match="data source 'd', row 1: KeyError: 'wave'"):
        source[0]
