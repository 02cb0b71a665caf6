"""Sources of conversations, and an order of samples that is a pure function of seed and position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from molora.config import ConfigError
from molora.data import Order, SourceConfig, conversation, open_source


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
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no rows"):
        open_source(SourceConfig(kind="messages", options={"path": str(tmp_path / "empty.jsonl")}), "data")


def test_a_table_of_encoded_pictures_becomes_conversations(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    picture = (tmp_path / "x.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [picture], "question": ["what?"], "answer": ["that"]})
    table.to_parquet(tmp_path / "t.parquet")
    options = {
        "path": str(tmp_path / "t.parquet"),
        "media": {"image": "image"},
        "prompt": "{question}",
        "answer": "{answer}",
    }
    row = open_source(SourceConfig(kind="table", options=options), "data")[0]
    content = row["messages"][0]["content"]
    assert content[0] == {"type": "image", "bytes": picture} and content[1]["text"] == "what?"
    assert row["messages"][1] == {"role": "assistant", "content": "that"}
    with pytest.raises(ConfigError, match="no column 'picture'"):
        open_source(SourceConfig(kind="table", options={**options, "media": {"image": "picture"}}), "data")


def test_limits_keep_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": "x"}]}) for _ in range(5))
    )
    config = SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}, limit=2)
    assert len(open_source(config, "data")) == 2
