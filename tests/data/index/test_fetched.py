"""Shards of a dataset of the hub: fetched when they are read, one ahead, within a budget, in an order that holds."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from molora.config import ConfigError
from molora.data.index.shards import Shards
from molora.data.loader import step_loader
from molora.data.order import Blocks, Order
from molora.data.processor import Processor
from molora.data.sources import EncodedSamples, SourceConfig, open_source, rows_at_hand
from molora.testing.tiny import byte_tokenizer
from tests.local_hub import COMMIT, LocalHub

FILES, ROWS = 6, 40
PATHS = [f"data/part-{number}.jsonl" for number in range(FILES)]


def lines(number: int, rows: int = ROWS) -> bytes:
    return b"".join(json.dumps({"q": f"{number}.{row}", "a": "yes " * 50}).encode() + b"\n" for row in range(rows))


SIZE = len(lines(0))


def tar_of(number: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in range(4):
            for ending, data in (("txt", f"{number}.{row}".encode()), ("cls", b"7")):
                about = tarfile.TarInfo(f"{row:03}.{ending}")
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return file.getvalue()


def parquet_of(number: int) -> bytes:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(
        pa.table({"q": [f"{number}.{row}" for row in range(10)], "a": ["b"] * 10}), file, row_group_size=4
    )
    return file.getvalue()


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repositories: dict[str, Mapping[str, bytes]] = {
        "someone/lines": {"README.md": b"#", **{path: lines(number) for number, path in enumerate(PATHS)}},
        "someone/mixed": {"a.jsonl": lines(0), "b.tar": tar_of(0), "deep/er/c.tar": tar_of(1), "notes.txt": b""},
        "someone/tars": {f"{number}.tar": tar_of(number) for number in range(2)},
        "someone/groups": {f"{number}.parquet": parquet_of(number) for number in range(4)},
        "someone/evil": {"../../outside.jsonl": lines(0)},
    }
    with LocalHub(repositories) as hub:
        hub.use(monkeypatch)
        yield hub


def config(path: Any, gib: float | None = 1.0, **options: Any) -> SourceConfig:
    given = {"path": path, "prompt": "{q}", "answer": "{a}", "disk_gib": gib, **options}
    return SourceConfig(kind="shards", options={key: value for key, value in given.items() if value is not None})


def opened(path: Any, gib: float | None = 1.0, **options: Any) -> Shards:
    source = open_source(config(path, gib, **options), "data.x")
    assert isinstance(source, Shards)
    return source


def asked(source: Any, row: int) -> str:
    return source[row]["messages"][0]["content"][-1]["text"]


def on_disk(source: Shards) -> list[Path]:
    assert source.rows.fetched is not None
    return [place for place in source.rows.fetched.sizes if place.exists()]


def test_rows_of_the_hub_are_those_of_the_files(local: LocalHub, tmp_path: Path) -> None:
    source = opened("hf://datasets/someone/lines/data/*.jsonl")
    assert [asked(source, row) for row in range(len(source))] == [
        f"{n}.{row}" for n in range(FILES) for row in range(ROWS)
    ]
    assert sorted(local.fetched()) == PATHS, "each is fetched once"
    assert source.where(ROWS) == f"{tmp_path}/cache/shards/someone--lines@{COMMIT[:12]}/data/part-1.jsonl, row 1"
    assert source.provenance() == {"files": [], "fingerprint": f"someone/lines@{COMMIT}"}
    local.asked.clear()
    again = opened(["hf://datasets/someone/lines/data/part-{3..4}.jsonl"])
    assert [asked(again, 0), asked(again, ROWS)] == ["3.0", "4.0"] and local.fetched() == [], "they are still there"


def test_tar_files_and_parquet_of_the_hub(local: LocalHub) -> None:
    tars = opened("hf://datasets/someone/tars", prompt="{txt}", answer="{cls}")
    assert [asked(tars, row) for row in (0, 7)] == ["0.0", "1.3"]
    local.asked.clear()
    groups = opened(f"hf://datasets/someone/groups@{COMMIT}/[0-2].parquet")
    assert [index.num_rows for index in groups.rows.indexes] == [10] * 3 and groups.blocks.ends[:4].tolist() == [
        4,
        8,
        10,
        14,
    ]
    assert all(not place.name.startswith(("1", "2")) for place in on_disk(groups)), (
        "the ends of files are enough for an index"
    )
    assert [asked(groups, row) for row in (29, 0, 15)] == ["2.9", "0.0", "1.5"]
    for place in on_disk(groups):
        place.unlink()
    assert [asked(groups, row) for row in (0, 9, 29)] == ["0.0", "0.9", "2.9"]
    assert asked(pickle.loads(pickle.dumps(groups)), 12) == "1.2"


@pytest.mark.parametrize("held", [3, 4])
def test_shards_are_within_the_budget_and_fetched_once_an_epoch(local: LocalHub, held: int) -> None:
    gib = (held + 0.5) * SIZE / 2**30
    order_of = {"seed": 3, "max_tokens": 10_000, "skips": (), "where": "data"}
    processor = Processor(byte_tokenizer(), {}, lambda names: (), sys.maxsize)
    samples = EncodedSamples({"x": config("hf://datasets/someone/lines/data/*", gib)}, processor, **order_of)
    (source,) = samples.sources
    assert isinstance(source, Shards)
    assert len(on_disk(source)) == held
    rows: list[int] = []
    fetches = []
    for k in range(2 * FILES * ROWS):
        _, row, _ = samples.order[k]
        rows.append(row)
        asked(source, row)
        if source.rows.fetched is not None and source.rows.fetched.ahead:
            source.rows.fetched.ahead.join()
        assert sum(place.stat().st_size for place in on_disk(source)) <= gib * 2**30
        if k == FILES * ROWS - 1:
            fetches = local.fetched()
    assert sorted(rows[: FILES * ROWS]) == sorted(rows[FILES * ROWS :]) == list(range(FILES * ROWS))
    files = [row // ROWS for row in rows]
    assert all(len(set(files[start : start + ROWS])) == 1 for start in range(0, len(files), ROWS)), "file after file"
    assert len(fetches) <= 2 * FILES, "once for the index, and once for the epoch"
    local.asked.clear()
    whole = EncodedSamples({"x": config("hf://datasets/someone/lines/data/*")}, processor, **order_of)
    assert [whole.order[k][1] for k in range(len(rows))] == rows, "the order knows no budget"


def test_the_next_file_is_fetched_while_one_is_read(local: LocalHub) -> None:
    source = opened("hf://datasets/someone/lines", (3.5 * SIZE) / 2**30)
    order = Order(
        [len(source)], [1.0], 0, blocks=[source.blocks], will_read=lambda _, rows, behind: told.append((rows, behind))
    )
    told: list[tuple[list[range], range | None]] = []
    files = [order[k][1] // ROWS for k in range(FILES * ROWS + 1)][::ROWS]
    assert [behind.start // ROWS for _, behind in told if behind][:FILES] == files[1:]
    for place in on_disk(source):
        place.unlink()
    rows, behind = told[0]
    fetched = source.rows.fetched
    assert behind is not None and fetched is not None and fetched.ahead is not None
    fetched.ahead.join(30)  # the last one of indexing: one file is fetched ahead at a time
    source.will_read(rows)
    source.will_fetch(behind)
    fetched.ahead.join(30)
    local.asked.clear()
    assert asked(source, behind.start) == f"{files[1]}.0" and local.fetched() == []


def test_data_workers_share_what_one_of_them_fetches(local: LocalHub) -> None:
    gib = (3.5 * SIZE) / 2**30
    processor = Processor(byte_tokenizer(), {}, lambda names: (), sys.maxsize)

    def ids(workers: int, first_step: int = 0) -> list[list[str]]:
        samples = EncodedSamples(
            {"x": config("hf://datasets/someone/lines/data/*", gib)},
            processor,
            seed=1,
            max_tokens=10_000,
            skips=(),
            where="data",
            samples_per_step=8,
        )
        steps = step_loader(
            samples, first_step=first_step, steps=40, samples_per_step=8, rank=0, ranks=1, workers=workers
        )
        return [[sample.id for sample in step] for step in steps]

    alone = ids(0)
    local.asked.clear()
    assert ids(2) == alone and len(local.fetched()) <= 2 * FILES + 2
    assert ids(2, first_step=23) == alone[23:], "a run that resumes"


def test_a_file_that_goes_away_is_fetched_again_and_one_that_cannot_be_is_one_error(
    local: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    source = opened("hf://datasets/someone/lines")
    for place in on_disk(source):
        place.unlink()
    assert asked(source, 0) == "0.0"
    for place in on_disk(source):
        place.unlink()
    local.broken["data/part-0.jsonl"] = 500
    with pytest.raises(
        ConfigError, match=r"lines@1{12}, data/part-0.jsonl: cannot be fetched \(.*500.*start again when"
    ):
        source[0]
    assert asked(source, ROWS) == "1.0"
    local.broken["data/part-0.jsonl"] = 0
    assert asked(source, 0) == "0.0"


def test_without_the_hub_what_is_there_is_read(local: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened("hf://datasets/someone/lines")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    local.asked.clear()
    source = opened("hf://datasets/someone/lines")
    assert len(source) == len(first) and asked(source, ROWS) == "1.0" and not local.asked
    on_disk(source)[0].unlink()
    with pytest.raises(
        ConfigError, match=r"part-0.jsonl: cannot be fetched \(the hub is not asked, as HF_HUB_OFFLINE says"
    ):
        source[0]
    with pytest.raises(ConfigError, match=r"someone/tars: cannot be listed \(the hub is not asked"):
        opened("hf://datasets/someone/tars", prompt="{txt}", answer="{cls}")


@pytest.mark.parametrize("dataset, told", [("lines", "data/part-3.jsonl"), ("tars", "1.tar"), ("groups", "2.parquet")])
def test_a_connection_that_breaks_is_one_error_and_what_is_whole_stays(
    local: LocalHub, monkeypatch: pytest.MonkeyPatch, dataset: str, told: str
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    local.cut.add(told)
    templates: Any = {"prompt": "{txt}", "answer": "{cls}"} if dataset == "tars" else {}
    with pytest.raises(ConfigError, match=rf"{told}.*cannot be (fetched|read)"):
        opened(f"hf://datasets/someone/{dataset}", **templates)
    local.cut.clear()
    assert len(opened(f"hf://datasets/someone/{dataset}", **templates))


def test_a_cache_that_cannot_be_written_is_told(
    local: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="someone/lines@1{12}: nothing can be kept in .*let MOLORA_CACHE name"):
        opened("hf://datasets/someone/lines")


def test_what_a_kill_left_is_removed(local: LocalHub) -> None:
    source = opened("hf://datasets/someone/lines")
    assert source.rows.fetched is not None
    folder = source.rows.fetched.folder
    for place in on_disk(source):
        place.unlink()
    (folder / ".coming" / "data").mkdir(parents=True)
    (folder / ".coming" / "data" / "half").write_bytes(b"x")
    assert asked(source, 0) == "0.0"
    assert not (folder / ".coming").exists()


@pytest.mark.parametrize(
    "path, gib, told",
    [
        (
            "hf://datasets/someone/lines/data/*",
            2.5 * SIZE / 2**30,
            "disk_gib is .* 3 files are on disk at a time.* raise",
        ),
        (
            "hf://datasets/someone/lines/data/*.tar",
            1,
            r"\*.tar: no such file in the dataset, which has README.md, data/",
        ),
        ("hf://datasets/someone/lines/*", 1, "README.md does not end in one of .tar, .parquet"),
        ("hf://datasets/someone/mixed", 1, r"has files of \.jsonl and \.tar; make a source of each"),
        ("hf://datasets/someone/mixed/*", 1, "notes.txt does not end in one of"),
        ("hf://datasets/someone/nothing/*.tar", 1, "cannot be listed .RepositoryNotFoundError.* check the name"),
        ("hf://datasets/someone/evil", 1, "is no path of a dataset's file"),
        ("hf://someone/lines/a.tar", 1, "names no dataset; write hf://datasets/OWNER/NAME"),
        ("hf://datasets/lines", 1, "write hf://datasets/OWNER/NAME@REVISION"),
        (["hf://datasets/someone/lines", "here.jsonl"], 1, "is of more than one place; make a source of each"),
        (["hf://datasets/someone/lines", "hf://datasets/someone/tars"], 1, "is of more than one place"),
        ("here.jsonl", 1, "disk_gib is for datasets of the hub"),
        ("hf://datasets/someone/lines", 0, "disk_gib is 0.*above 0"),
    ],
)
def test_what_cannot_be_fetched_says_so_before_anything_is(local: LocalHub, path: Any, gib: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        opened(path, gib)
    assert local.fetched() == []


def test_patterns_of_folders(local: LocalHub) -> None:
    tars = {"prompt": "{txt}", "answer": "{cls}"}
    for path, count in (("*.tar", 1), ("**/*.tar", 2), ("deep/*/c.tar", 1), ("**/c.tar", 1), ("{b,deep/er/c}.tar", 2)):
        assert len(opened(f"hf://datasets/someone/mixed/{path}", 1.0, **tars).rows.indexes) == count, path


def test_a_limit_and_rows_at_hand(local: LocalHub) -> None:
    source = open_source(
        SourceConfig(kind="shards", options=config("hf://datasets/someone/lines").options, limit=ROWS + 5), "data.x"
    )
    blocks: Blocks = source.blocks  # pyright: ignore[reportAttributeAccessIssue]
    assert blocks.file_ends is not None and blocks.file_ends.tolist() == [ROWS, ROWS + 5]
    assert rows_at_hand(source) == range(ROWS)


def test_files_are_whole_in_any_order_of_blocks() -> None:
    ends = np.array([3, 5, 9, 12, 13, 20])
    blocks = Blocks(ends, 2, np.array([5, 12, 20]))
    order = Order([20], [1.0], 7, blocks=[blocks])
    for epoch in range(3):
        rows = [order[k][1] for k in range(epoch * 20, epoch * 20 + 20)]
        assert sorted(rows) == list(range(20))
        files = np.searchsorted(np.array([5, 12, 20]), rows, side="right")
        assert sum(files[1:] != files[:-1]) == 2, "file after file"


def test_the_command_asks_the_hub_that_the_environment_names(local: LocalHub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "molora", "data", "index", "hf://datasets/someone/lines", "--disk-gib", "1"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert f"done: {FILES * ROWS} rows in {FILES} files, {FILES} of them indexed anew" in done.stdout, done.stderr
