"""Rows of a file answered by several workers: together they give what one gives, and what lacks is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from molora.config import ConfigError
from molora.inference.answers import answer_file, answer_rows, shard_file
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.inference.shards import merge_answers
from molora.shard import Shard
from tests.inference.test_answers import FAULTS, ask, loaded_model, rows, write

# Drawn, so that an answer would differ if it depended on anything but its row.
DRAWN = GenerationConfig(max_new_tokens=6, temperature=1.0, seed=3, max_running_samples=2)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model()


@pytest.fixture
def shards(loaded: LoadedModel, tmp_path: Path) -> Path:
    """The file of the answers of three shards to ten rows, which is not made yet."""
    asked = [ask([float(index)], "x" * index) if index % 2 else ask("y" * index) for index in range(1, 11)]
    given = write(tmp_path / "in.jsonl", rows(*asked))
    for shard in Shard.all(3):
        assert answer_rows(lambda: loaded, given, tmp_path / "out.jsonl", DRAWN, shard=shard)
    return tmp_path / "out.jsonl"


def test_merged_shards_are_the_sorted_output_of_one_run(
    loaded: LoadedModel, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, one = shards.with_name("in.jsonl"), shards.with_name("one.jsonl")
    assert answer_rows(lambda: loaded, given, one, DRAWN)
    capsys.readouterr()
    assert merge_answers(given, shards, 3)
    assert " ".join(capsys.readouterr().out.split()) == f"{shards}: has the 10 rows of 3 shards"
    order = [json.loads(line)["id"] for line in given.read_bytes().splitlines()]
    lines = sorted(one.read_bytes().splitlines(True), key=lambda line: order.index(json.loads(line)["id"]))
    assert shards.read_bytes() == b"".join(lines) and len(lines) == 10


def test_a_shard_goes_on_where_it_stopped(loaded: LoadedModel, shards: Path) -> None:
    given, part = shards.with_name("in.jsonl"), shard_file(shards, Shard(1, 3))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with answer_file(given, shards, shard=Shard(1, 3)) as file:
        assert 0 < len(file.left) < 3 and set(file.left) < {1, 4, 7}
        file.fill(loaded, DRAWN)
    assert sorted(part.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_errors_are_merged_and_told(loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = write(tmp_path / "in.jsonl", rows("a", FAULTS["too long"][0], "c")), tmp_path / "out.jsonl"
    assert [answer_rows(lambda: loaded, given, out, DRAWN, shard=shard) for shard in Shard.all(2)] == [True, False]
    assert not merge_answers(given, out, 2)
    assert "1 of 3 rows have no answer but an error, the first is r1" in " ".join(capsys.readouterr().err.split())
    with answer_file(given, out) as file:
        assert file.left == [1]


def test_shards_of_other_models_or_settings_do_not_go_together(loaded: LoadedModel, tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", rows("a", "b")), tmp_path / "out.jsonl"
    for shard, model in zip(Shard.all(2), ("one", "other"), strict=True):
        assert answer_rows(lambda: loaded, given, out, DRAWN, shard=shard, notes={"drawn": {"model": model}})
    told = 'drawn otherwise in line 1: model is "one" there and "other" here; take it away'
    with pytest.raises(ConfigError, match=f"shard 1/2 has other answers: .*{told}"):
        merge_answers(given, out, 2)
    with (
        pytest.raises(ConfigError, match='line 1 was made otherwise: drawn.model is "one" there and "new" here; give'),
        answer_file(given, out, shard=Shard(0, 2), notes={"drawn": {"model": "new"}}),
    ):
        pass


def test_of_many_missing_shards_a_few_are_named(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"shard 3/1000 is missing.*shard 4/1000 is missing.*; and 995 more$"):
        merge_answers(shards.with_name("in.jsonl"), shards, 1000)


def place(out: Path, index: int) -> Path:
    return shard_file(out, Shard(index, 3))


SPOILT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda out: place(out, 1).unlink(), ["shard 1/3 is missing", "make it with --shard 1/3"]),
    "two missing": (
        lambda out: (place(out, 0).unlink(), place(out, 2).unlink()),
        ["shard 0/3 is missing", "shard 2/3 is missing"],
    ),
    "unfinished": (
        lambda out: place(out, 2).write_bytes(place(out, 2).read_bytes()[:-9]),
        ["shard 2/3 is unfinished: 1 of its 3 rows have no answer", "go on with --shard 2/3"],
    ),
    "copied over another": (
        lambda out: shutil.copy(place(out, 0), place(out, 1)),
        ["shard 1/3 is doubled", "out.shard-1-of-3.jsonl answers 'r0' in line 1"],
    ),
    "a row twice": (
        lambda out: place(out, 1).write_bytes(place(out, 1).read_bytes() * 2),
        ["shard 1/3 is doubled", "in line 4, and has it twice"],
    ),
    "of other messages": (
        lambda out: out.with_name("in.jsonl").write_text(out.with_name("in.jsonl").read_text().replace('"yy"', '"z"')),
        ["shard 1/3 is of other rows", "answers 'r1' in line", "asks something else now; take it away"],
    ),
    "no answers": (lambda out: place(out, 1).write_text("notes\n"), ["line 1 is no answer of molora"]),
    "merged already": (lambda out: out.write_text("mine\n"), ["is there already"]),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_shards_that_are_not_each_row_once_are_named_and_nothing_is_written(kind: str, shards: Path) -> None:
    spoil, told = SPOILT[kind]
    spoil(shards)
    before = {path.name: path.read_bytes() for path in shards.parent.iterdir()}
    with pytest.raises(ConfigError) as error:
        merge_answers(shards.with_name("in.jsonl"), shards, 3)
    assert all(part in str(error.value) for part in told), str(error.value)
    assert {path.name: path.read_bytes() for path in shards.parent.iterdir()} == before


def test_a_shard_in_use_is_not_merged(shards: Path) -> None:
    given = shards.with_name("in.jsonl")
    in_use = pytest.raises(ConfigError, match="out.shard-1-of-3.jsonl: in use by process")
    with answer_file(given, shards, shard=Shard(1, 3)), in_use:
        merge_answers(given, shards, 3)


def test_a_shard_does_not_go_on_from_another_ones_answers(shards: Path) -> None:
    shutil.copy(place(shards, 0), place(shards, 1))
    with (
        pytest.raises(ConfigError, match="answers 'r0', which is none of the rows of shard 1/3"),
        answer_file(shards.with_name("in.jsonl"), shards, shard=Shard(1, 3)),
    ):
        pass


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/3", "1/3/5", "0/0", ""])
def test_a_shard_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as I/N"):
        Shard.read(text)


def test_shards_are_every_row_once() -> None:
    assert Shard.read("2/3") == Shard(2, 3)
    for total in range(8):
        taken = [row for shard in Shard.all(3) for row in shard.rows(total)]
        assert sorted(taken) == list(range(total))
