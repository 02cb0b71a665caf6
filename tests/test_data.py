"""Sources of conversations, and an order of samples that is a pure function of seed and position."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from molora.config import ConfigError
from molora.data import Order, SourceConfig, open_source
from molora.messages import conversation


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


@pytest.mark.parametrize("key", ["prompt", "answer"])
def test_a_template_that_is_a_column_without_braces_is_refused(tmp_path: Path, key: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "t.csv").write_text("tide,question,answer\na.txt,up or down?,up\n")
    options = {"path": str(tmp_path / "t.csv"), "media": {"tide": "tide"}, "prompt": "{question}", "answer": "{answer}"}
    (user, reply) = open_source(SourceConfig(kind="table", options=options), "data")[0]["messages"]
    assert user["content"][0] == {"type": "tide", "path": str(tmp_path / "a.txt")} and reply["content"] == "up"
    for constant in ("", "say it", "answers"):
        open_source(SourceConfig(kind="table", options={**options, key: constant}), "data")
    with pytest.raises(ConfigError, match=rf"t.csv: {key} is the text 'tide' in every row.* did you mean '{{tide}}'\?"):
        open_source(SourceConfig(kind="table", options={**options, key: "tide"}), "data")


def test_text_tables_are_taken_at_their_word(tmp_path: Path) -> None:
    """Quotes, missing values and other things that mean something elsewhere are what somebody said or chose."""
    pytest.importorskip("datasets")
    said = ['"Yes."', "null", "NA", "", "it's 5\\\ttabs", "007"]
    (tmp_path / "t.tsv").write_text("path\tsaid\n" + "".join(f"{i}.mp3\t{text}\n" for i, text in enumerate(said)))
    rows = ("0.jpg,who?, A: none ", '1.jpg,"Which, and ""why""?",NA', "2.jpg,when?,")
    (tmp_path / "t.csv").write_text("Figure_path,Question,Choice A\n" + "\n".join(rows))
    texts = {
        name: [row["messages"][0]["content"][-1]["text"] for row in map(table.__getitem__, range(len(table)))]
        for name, table in (
            (name, open_source(SourceConfig(kind="table", options=options), "data"))
            for name, options in {
                "t.tsv": {"path": str(tmp_path / "t.tsv"), "prompt": "{said}", "answer": ""},
                "t.csv": {"path": str(tmp_path / "t.csv"), "prompt": "{Question}|{Choice A}", "answer": ""},
            }.items()
        )
    }
    assert texts["t.tsv"] == [*said[:4], "it's 5\ttabs", "007"]
    assert texts["t.csv"] == ["who?| A: none ", 'Which, and "why"?|NA', "when?|"]


def test_a_dataset_of_several_subsets_is_read_by_the_one_that_is_named(tmp_path: Path) -> None:
    """As the hub stores them: a folder of parquet files for each, listed in the card."""
    datasets = pytest.importorskip("datasets")
    card = "---\nconfigs:\n"
    for name in ("en_sl", "en_de"):
        clip = {"bytes": name.encode(), "path": "common_voice_en_1.mp3"}
        table = datasets.Dataset.from_dict({"audio": [clip], "translation": [f"to {name}"]})
        table.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        card += f"- config_name: {name}\n  data_files:\n  - {{split: test, path: {name}/test-*}}\n"
    (tmp_path / "README.md").write_text(f"{card}---\n")
    options = {
        "path": str(tmp_path),
        "split": "test",
        "media": {"audio": "audio"},
        "prompt": "",
        "answer": "{translation}",
    }
    for name in ("en_sl", "en_de"):
        row = open_source(SourceConfig(kind="table", options={**options, "subset": name}), "data")[0]
        assert row["messages"][0]["content"][0] == {"type": "audio", "bytes": name.encode()}
        assert row["messages"][1]["content"] == f"to {name}"


def test_limits_keep_the_first_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": "x"}]}) for _ in range(5))
    )
    config = SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}, limit=2)
    assert len(open_source(config, "data")) == 2
