"""Shards: rows of tar, Parquet and JSONL files by number, through an index that holds for the files as they are."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from molora.cli.commands import app
from molora.config import ConfigError
from molora.data.index import build, tar
from molora.data.index.build import files_of, indexed
from molora.data.index.lines import LineRows
from molora.data.index.shards import Shards
from molora.data.index.stored import FOLDER, Scan, read_index, state_of, write_index
from molora.data.mixture import MixtureConfig
from molora.data.processor import Processor
from molora.data.sources import EncodedSamples, Source, SourceConfig, open_source
from molora.testing.tiny import byte_tokenizer

QUESTION = {"prompt": "{q}", "answer": "{a}"}


def write_tar(path: Path, rows: Sequence[tuple[str, Mapping[str, bytes]]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as file:
        for key, members in rows:
            for ending, data in members.items():
                about = tarfile.TarInfo(f"{key}.{ending}")
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    return path


def captions(path: Path, first: int, count: int) -> Path:
    """Rows of a caption, a picture of one kind or another, and an object."""
    return write_tar(
        path,
        [
            (
                f"some/{number:06}",
                {
                    "jpg" if number % 2 else "png": bytes([number % 256]) * (number + 1),
                    "txt": f"caption {number}".encode(),
                    "json": json.dumps({"number": number, "share": 1.50}).encode(),
                },
            )
            for number in range(first, first + count)
        ],
    )


def shards(path: Any, **options: Any) -> Source:
    return open_source(SourceConfig(kind="shards", options={"path": path, **options}), "data")


def write_lines(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"q": f"q{row}", "a": f"a{row}"}) for row in range(count)))
    return path


def write_parquet(path: Path, count: int, rows_per_group: int) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"q": [f"q{row}" for row in range(count)], "a": [f"a{row}" for row in range(count)]}
    parquet.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def test_the_members_of_a_tar_file_are_the_columns_of_its_rows(tmp_path: Path) -> None:
    for shard in range(3):
        captions(tmp_path / f"train-{shard:03}.tar", shard * 20, 20)
    source = shards(
        str(tmp_path / "train-{000..002}.tar"),
        prompt="number {json[number]}, {json[share]}?",
        answer="{txt}",
        media={"image": "jpg;png"},
    )
    assert len(source) == 60
    for row in (59, 0, 20, 33):
        user, assistant = source[row]["messages"]
        picture = {"type": "image", "bytes": bytes([row]) * (row + 1)}
        assert user["content"] == [picture, {"type": "text", "text": f"number {row}, 1.5?"}]
        assert assistant["content"] == f"caption {row}" and source[row]["id"] == f"some/{row:06}"
    assert isinstance(source, Shards)
    assert source.where(33) == f"{tmp_path}/train-001.tar, row 14 (some/000033)"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_what_is_no_row(tmp_path: Path, format: int) -> None:
    long = "/".join(["folder" * 5] * 6)
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("README", {}),
            (f"./{long}", {"txt": b"one", "cls": b"7"}),
            ("__meta__", {"json": b"{}"}),
            ("é", {"txt": b"two", "0.txt": b"inner"}),
        ],
        format,
    )
    with tarfile.open(path, "a", format=format) as file:
        file.addfile(tarfile.TarInfo("README"))
        folder = tarfile.TarInfo("empty.folder")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    source = shards(str(path), prompt="{txt}", answer="{cls}")
    assert [len(source), source[0]["id"], source[0]["messages"][1]["content"]] == [2, long, "7"]
    inner = shards(str(path), prompt="{txt}", answer="{0.txt}")[1]
    assert [inner["id"], inner["messages"][0]["content"][0]["text"], inner["messages"][1]["content"]] == [
        "é",
        "two",
        "inner",
    ]


def test_a_conversation_in_a_tar_file_names_its_media_or_has_a_place_for_them(tmp_path: Path) -> None:
    named = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "000.0.png"}, {"type": "image", "path": "b.png"}]},
            {"role": "assistant", "content": "yes"},
        ],
        "tags": ["t"],
    }
    placed = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}], "id": 5}
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("000", {"json": json.dumps(named).encode(), "0.png": b"zero"}),
            ("001", {"json": json.dumps(placed).encode(), "jpg": b"one"}),
        ],
    )
    source = shards(str(path))
    first, second = source[0]["messages"][0]["content"]
    assert (first, second["path"]) == ({"type": "image", "bytes": b"zero"}, str(tmp_path / "b.png"))
    assert (source[0]["id"], source[0]["tags"]) == ("000", ["t"])
    filled = shards(str(path), media={"image": "jpg"})[1]
    assert filled["messages"][0]["content"][0] == {"type": "image", "bytes": b"one"} and filled["id"] == "5"
    with pytest.raises(ValueError, match=r"b.tar, row 1 \(000\): .*places for media"):
        shards(str(write_tar(tmp_path / "b.tar", [("000", {"json": json.dumps(placed).encode()})])))[0]


def test_parquet_rows_come_from_their_groups_and_only_the_columns_asked_for(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["no", "yes"])})
    for number in range(2):
        columns = {"q": [f"q{number}.{row}" for row in range(25)], "a": [row % 2 for row in range(25)]}
        table = datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:]
        table = table.append_column("unread", pa.array([b"x" * 1000] * 25))
        parquet.write_table(table, tmp_path / f"part {number}.parquet", row_group_size=10)
    source = shards([str(tmp_path / "part 0.parquet"), str(tmp_path / "part 1.parquet")], **QUESTION)
    assert isinstance(source, Shards)
    assert [source[row]["messages"][1]["content"] for row in (0, 1, 49)] == ["no", "yes", "no"]
    assert source[25]["messages"][0]["content"][0]["text"] == "q1.0" and len(source) == 50
    assert source.blocks.ends.tolist() == [10, 20, 25, 35, 45, 50]
    source.will_read([range(10, 20), range(20, 25), range(35, 45)])
    rows = [source.rows.open[file] for file in (0, 1)]
    assert [reader.kept for reader in rows] == [2, 2] and rows[0].read == ["q", "a"]
    for row in (12, 22, 40, 36):
        assert source[row]["messages"][0]["content"][0]["text"] == f"q{row // 25}.{row % 25}"
    assert [sorted(reader.loaded) for reader in rows] == [[1, 2], [1]]
    source.will_read([range(0, 10)])
    assert [sorted(reader.loaded) for reader in rows] == [[], []]


def test_lines_with_and_without_a_mark_blank_ones_and_the_last_break(tmp_path: Path) -> None:
    rows = [json.dumps({"q": f"é{row}", "a": str(row)}, ensure_ascii=False) for row in range(4)]
    for name, data in {
        "plain": "\n".join(rows).encode(),
        "ended": ("\n".join(rows) + "\n").encode(),
        "marked": b"\xef\xbb\xbf" + "\r\n".join(rows).encode(),
        "blank": ("\n \n" + "\n\n\n".join(rows) + "\n\t\r\n\n").encode(),
    }.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        source = shards(str(tmp_path / f"{name}.jsonl"), **QUESTION)
        assert [source[row]["messages"][1]["content"] for row in range(len(source))] == ["0", "1", "2", "3"], name
        assert source[3]["messages"][0]["content"][0]["text"] == "é3"


def test_lines_are_found_wherever_a_chunk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", 30)
    whole = build.SCANS[".jsonl"](path).arrays["starts"].tolist()
    lines = path.read_bytes().splitlines(keepends=True)
    assert whole == [sum(map(len, lines[:row])) for row in range(31)]
    for size in (1, 2, 7, 23, 24, 25):
        monkeypatch.setattr("molora.data.index.lines._CHUNK_BYTES", size)
        assert build.SCANS[".jsonl"](path).arrays["starts"].tolist() == whole


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_an_index_holds_for_the_file_as_it_was_and_no_other(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"

    def write(count: int) -> None:
        if kind == "tar":
            captions(path, 0, count)
        elif kind == "parquet":
            write_parquet(path, count, 4)
        else:
            write_lines(path, count)

    write(10)
    assert read_index(path) is None
    indexed([path])
    stored = tmp_path / FOLDER / f"a.{kind}.safetensors"
    written = stored.stat().st_mtime_ns
    indexed([path])
    assert stored.stat().st_mtime_ns == written, "an index that holds is kept"
    os.utime(path, ns=(1, 1))
    assert read_index(path) is None, "the time stamp is another"
    indexed([path])

    templates = {"prompt": "{txt}", "answer": "{txt}"} if kind == "tar" else QUESTION
    opened: Any = shards(str(path), **templates)
    opened.rows.open.clear()
    opened.rows.last = None
    write(12)
    with pytest.raises(ValueError, match=rf"a.{kind}: has changed since it was opened; start again"):
        opened[0]
    assert len(shards(str(path), **templates)) == 12

    stored.write_bytes(stored.read_bytes()[:-9])
    assert len(shards(str(path), **templates)) == 12, "a damaged index is made anew"
    with safe_open(stored, "pt") as index:
        assert json.loads(index.metadata()["about"])["num_rows"] == 12


def test_an_index_that_says_what_is_not_there_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", 3)
    state = state_of(path.stat())
    for starts in ([0, 10, 20, 2**40], [-8, 10, 20, 30], [30, 20, 10, 0]):
        write_index(path, Scan(3, {"starts": np.array(starts)}, {}), state)
        rows = LineRows(indexed([path])[0], numbers_as_text=False)
        with pytest.raises(ValueError, match=r"a.jsonl: its index has a row from byte .* remove .*a.jsonl.safetensors"):
            rows[0 if starts[0] else 2]


def test_an_index_goes_to_the_cache_where_the_folder_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "a.jsonl", 5)
    (tmp_path / FOLDER).write_text("no folder")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    (index,) = indexed([path])
    assert index.file.is_relative_to(tmp_path / "cache") and len(shards(str(path), **QUESTION)) == 5
    path.write_text(path.read_text() + "\n" + path.read_text())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"a.jsonl: its index can be written nowhere .*MOLORA_CACHE"):
        indexed([path])


def damaged(path: Path, change: str) -> Path:
    data = bytearray(captions(path, 0, 6).read_bytes())
    with tarfile.open(path) as file:
        members = {member.name: member for member in file.getmembers()}
    member = members["some/000003.txt"]
    if change == "a header":
        data[member.offset + 100 : member.offset + 160] = b"?" * 60
    elif change == "cut in a member":
        del data[member.offset_data + 3 :]
    elif change == "cut behind a member":
        del data[member.offset_data + 512 :]
    elif change == "cut in a header":
        del data[member.offset_data + 700 :]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "change, member",
    [
        ("a header", "some/000003.jpg"),
        ("cut in a member", "some/000003.txt"),
        ("cut behind a member", "some/000003.txt"),
        ("cut in a header", "some/000003.txt"),
    ],
)
def test_a_damaged_tar_file_is_named_with_the_member(tmp_path: Path, change: str, member: str) -> None:
    path = damaged(tmp_path / "a.tar", change)
    with pytest.raises(ConfigError, match=rf"a.tar, behind member {member}: cannot be read as tar \(.*download it"):
        indexed([path])


def test_members_that_cannot_be_rows_are_named(tmp_path: Path) -> None:
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as file:
        for _ in range(2):
            file.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(ConfigError, match=r"twice.tar, member a.txt: is there twice"):
        tar.scan(twice)
    link = tmp_path / "link.tar"
    with tarfile.open(link, "w") as file:
        about = tarfile.TarInfo("b.txt")
        about.type, about.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(about)
    with pytest.raises(ConfigError, match=r"link.tar, member b.txt: is no plain file"):
        tar.scan(link)
    path = write_tar(tmp_path / "text.tar", [("k", {"txt": b"\xff", "json": b"{"})])
    with pytest.raises(ValueError, match=r"text.tar, row 1 \(k\), member k.txt: byte 1 is not UTF-8"):
        shards(str(path), prompt="{txt}", answer="{json}")[0]
    path = write_tar(tmp_path / "object.tar", [("k", {"json": b"{"})])
    with pytest.raises(ValueError, match=r"object.tar, row 1 \(k\), member k.json: not valid JSON"):
        shards(str(path))[0]


def test_what_cannot_be_indexed_says_why(tmp_path: Path) -> None:
    for name, data, told in (
        ("a.jsonl", b"\x1f\x8b....", "is gzipped"),
        ("a.tar", b"\x1f\x8b....", "is compressed"),
        ("b.tar", b"x" * 2000, "cannot be read as tar"),
        ("a.parquet", b"x" * 2000, "cannot be read as parquet"),
        ("c.jsonl", b"\n\n", "no rows"),
        ("a.csv", b"a,b", "its name does not end in one of .tar, .parquet, .jsonl, .ndjson"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=rf"{name}.*{told}"):
            shards(str(tmp_path / name))
    write_lines(tmp_path / "d.jsonl", 2)
    captions(tmp_path / "d.tar", 0, 2)
    with pytest.raises(ConfigError, match=r"has files of \.jsonl and \.tar"):
        shards(str(tmp_path / "d.*"))
    with pytest.raises(ConfigError, match="no such file"):
        shards(str(tmp_path / "nothing-*.tar"))
    with pytest.raises(ConfigError, match="give both prompt and answer"):
        shards(str(tmp_path / "d.tar"), prompt="{txt}")
    with pytest.raises(ConfigError, match=r"no column 'tx'; did you mean 'txt'"):
        shards(str(tmp_path / "d.tar"), prompt="{tx}", answer="{txt}")


def test_patterns_name_files_in_order(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "c"):
        write_lines(tmp_path / f"{name}.jsonl", 1)
    names = [path.stem for path in files_of([f"{tmp_path}/{{b,a}}-{{08..08}}.jsonl", f"{tmp_path}/a-{{09..10}}.jsonl"])]
    assert names == ["b-08", "a-08", "a-09", "a-10"]
    assert [path.stem for path in files_of([f"{tmp_path}/?.jsonl", f"{tmp_path}/a*"])] == ["c", "a-08", "a-09", "a-10"]
    with pytest.raises(ConfigError, match=r"a-11.jsonl: no such file"):
        files_of([f"{tmp_path}/a-{{10..11}}.jsonl"])


def test_large_files_are_indexed_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        captions(tmp_path / f"{number}.tar", number * 10, 10)
    monkeypatch.setattr(build, "_ONE_PROCESS_BYTES", 0)
    told: list[tuple[int, int]] = []
    found = indexed(files_of([f"{tmp_path}/*.tar"]), lambda done, missing: told.append((done, missing)))
    assert [index.num_rows for index in found] == [10] * 4 and told == [(done, 4) for done in range(5)]
    damaged(tmp_path / "2.tar", "a header")
    with pytest.raises(ConfigError, match=r"2.tar, behind member some/000003.jpg"):
        indexed(files_of([f"{tmp_path}/*.tar"]))


def test_the_command_indexes_what_is_missing(tmp_path: Path) -> None:
    for number in range(3):
        captions(tmp_path / f"{number}.tar", 0, 4)
    arguments = ["data", "index", f"{tmp_path}/{{0..2}}.tar"]
    assert "done: 12 rows in 3 files, 3 of them indexed anew" in CliRunner().invoke(app, arguments).output
    assert "done: 12 rows in 3 files, 0 of them indexed anew" in CliRunner().invoke(app, arguments).output


def first_answers(source: Source, rows: Sequence[int], results: Any) -> None:
    results.put([source[row]["messages"][1]["content"] for row in rows])


@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_workers_read_what_their_parent_has_open(tmp_path: Path, kind: str) -> None:
    if kind == "tar":
        captions(tmp_path / "a.tar", 0, 30)
    elif kind == "parquet":
        write_parquet(tmp_path / "a.parquet", 30, 7)
    else:
        write_lines(tmp_path / "a.jsonl", 30)
    answer = "{txt}" if kind == "tar" else "{a}"
    source = shards(str(tmp_path / f"a.{kind}"), prompt="?", answer=answer)
    rows = [29, 3, 17, 0]
    expected = [source[row]["messages"][1]["content"] for row in rows]
    forked = multiprocessing.get_context("fork")
    results: Any = forked.Queue()
    workers = [forked.Process(target=first_answers, args=(source, rows, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [expected, expected]
    sent = pickle.loads(pickle.dumps(source))  # as to a worker that is not forked
    assert [sent[row]["messages"][1]["content"] for row in rows] == expected
    for worker in workers:
        worker.join(60)


def test_a_limit_cuts_the_blocks_of_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", 30, 7)
    options = {"path": str(tmp_path / "a.parquet"), **QUESTION}
    for limit, ends in ((30, [7, 14, 21, 28, 30]), (21, [7, 14, 21]), (22, [7, 14, 21, 22]), (3, [3])):
        source: Any = open_source(SourceConfig(kind="shards", options=options, limit=limit), "data")
        assert source.blocks.ends.tolist() == ends and len(source) == limit
        assert source.where(0) == f"{tmp_path}/a.parquet, row 1"


def test_an_epoch_of_shards_has_every_row_and_is_told_to_the_system_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", 50)
    advised: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, length, advice: advised.append((start, length)))
    config = SourceConfig(
        kind="shards", options={"path": f"{tmp_path}/*.jsonl", **QUESTION}, rows_per_block=20, blocks_per_window=2
    )
    processor = Processor(byte_tokenizer(), {}, lambda names: (), sys.maxsize)
    samples = EncodedSamples({"d": config}, processor, seed=0, max_tokens=1000, skips=(), where="data")
    rows = [samples.order[k][1] for k in range(150)]
    assert sorted(rows) == list(range(150))
    size = (tmp_path / "0.jsonl").stat().st_size
    assert sum(length for _, length in advised) == 3 * size


def test_a_share_of_the_tokens_is_measured_on_rows_of_the_source(tmp_path: Path) -> None:
    for name, words in (("short", 2), ("long", 40)):
        rows = [json.dumps({"q": "word " * words, "a": "yes"}) for _ in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    configs = {
        name: SourceConfig(kind="shards", options={"path": f"{tmp_path}/{name}.jsonl", **QUESTION})
        for name in ("short", "long")
    }
    processor = Processor(byte_tokenizer(), {}, lambda names: (), sys.maxsize)

    def long_share(**mixture: Any) -> float:
        """The share of the tokens that come from the source of long rows."""
        samples = EncodedSamples(
            configs, processor, seed=0, max_tokens=10_000, skips=(), where="data", mixture=MixtureConfig(**mixture)
        )
        drawn = [samples.order[k][0] for k in range(2000)]
        lengths = {k: len(samples[k]) for k in (drawn.index(0), drawn.index(1))}  # pyright: ignore[reportArgumentType]
        short, long = (drawn.count(drawn[k]) * lengths[k] for k in (drawn.index(0), drawn.index(1)))
        return long / (short + long)

    assert long_share(weights_of="tokens") == pytest.approx(0.5, abs=0.05) and long_share() > 0.7
