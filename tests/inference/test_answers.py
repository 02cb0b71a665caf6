"""Rows of a file answered into another: nothing is lost, mixed up or overwritten, and a bad row stands alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import ConfigError
from molora.data.processor import Processor
from molora.inference.answers import answer_file, check_outputs
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.modality import Prepared
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer, tiny_model

GREEDY = GenerationConfig(max_new_tokens=4)


class Moody(Numbers):
    """Fails where its numbers say so: 13 while it collates, 17 in its encoder's input, 19 with an error of its own."""

    def load(self, part: Any) -> list[float]:
        numbers = super().load(part)
        if 19 in numbers:
            raise KeyError("nineteen")
        return numbers

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        if any((p.tensors["values"] == 13).any() for p in prepared):
            raise IndexError("thirteen")
        collated = super().collate(prepared)
        collated["values"] = torch.where(collated["values"] == 17, torch.nan, collated["values"])
        return collated


def loaded_model() -> LoadedModel:
    modalities: Any = {"numbers": Moody("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": ["qkv_proj"]}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model("phi4-mini"), Identity("test", "", "", "", ""))
    model = MoLoRA(backbone, modalities, adapters, TableRouter(list(adapters), TableConfig()))
    return LoadedModel(model, Processor(byte_tokenizer(), modalities, model.router.order, backbone.max_tokens))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model()


def ask(*content: Any) -> list[dict[str, Any]]:
    kinds = {list: "numbers", str: "text"}
    return [{"role": "user", "content": [{"type": kinds[type(c)], kinds[type(c)]: c} for c in content]}]


FAULTS: dict[str, tuple[Any, str]] = {
    "a plugin that raises in load": (ask([19.0]), "modality numbers fails on it: KeyError: 'nineteen'"),
    "a plugin that raises in collate": (ask([13.0]), "IndexError: thirteen"),
    "media that are no numbers": (ask([17.0]), "logits are not finite"),
    "too long": (ask("x" * 300), "at most 256 fit"),
    "much too long": (ask("x" * 1_000_000), "1,000,000 characters of text"),
    "many parts": ([{"role": "user", "content": [{"type": "text", "text": ""}] * 999}], "has 999 parts"),
    "many messages": (ask("a") * 999, "has 999 messages"),
    "too many numbers": (ask([1.0] * 300), "300 tokens (300 of media)"),
    "media without a rule": (
        [{"role": "user", "content": [{"type": "numbers", "numbers": [1]}, {"type": "letters", "letters": "a"}]}],
        "no routing rule",
    ),
    "half a character": (ask("a\ud83d"), r"half of one"),
    "a missing file": ([{"role": "user", "content": [{"type": "numbers", "path": "none.json"}]}], "none.json"),
    "an answer at the end": ([*ask("a"), {"role": "assistant", "content": "b"}], "nothing to generate"),
    "an unknown part": ([{"role": "user", "content": [{"type": "smell", "smell": "rose"}]}], "no modality answers"),
    "no messages": ([], "at least one message"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("running", [1, 3, 16])
def test_a_bad_sample_is_its_own_result_and_its_neighbours_are_answered_as_without_it(
    loaded: LoadedModel, fault: str, running: int
) -> None:
    bad, says = FAULTS[fault]
    good = [ask("what is it?"), ask([0.5, 1.0], "and this?"), ask("a"), ask([2.0], "b")]
    config = GenerationConfig(max_new_tokens=4, max_running_samples=running)
    expected = loaded.generate(good, config)
    given = loaded.generate([*good[:2], bad, *good[2:]], config, errors="return")
    assert says in str(given[2]) and isinstance(given[2], ValueError)
    assert [*given[:2], *given[3:]] == expected
    with pytest.raises(ValueError, match="sample 2"):
        loaded.generate([*good[:2], bad, *good[2:]], config)


def test_an_error_of_all_samples_is_no_samples_fault(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded.model, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        loaded.generate([ask("a"), ask("b")], errors="return")


def test_two_samples_of_one_id_are_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="two samples have the id 'x'"):
        list(loaded.answers(loaded.encode(ask(text), "x") for text in "ab"))


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows(*texts: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "messages": text if isinstance(text, list) else ask(text)} for i, text in enumerate(texts)]


def fill(loaded: LoadedModel, given: Path, out: Path, **more: Any) -> tuple[dict[str, dict[str, Any]], str]:
    with answer_file(given, out) as file:
        file.fill(loaded, GREEDY, **more)
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}, file.faults()


def test_a_bad_row_has_its_error_for_an_answer_and_is_tried_again(loaded: LoadedModel, tmp_path: Path) -> None:
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(given, [*rows("a", FAULTS["too long"][0], "c")[:2], "{no JSON", *rows("", "", "", "d")[3:]])
    answers, faults = fill(loaded, given, out)
    assert set(answers) == {"r0", "r1", "row 3", "r3"}
    assert "answer" in answers["r0"] and "answer" in answers["r3"] and answers["r0"]["finished"] == "length"
    assert set(answers["r1"]) == {"id", "messages", "error"} and "at most 256 fit" in answers["r1"]["error"]
    assert answers["row 3"]["messages"] is None and "in.jsonl" in answers["row 3"]["error"]
    assert "2 of 4 rows have no answer but an error" in faults and "r1: " in faults
    write(given, rows("a", "mended", "c", "d"))
    mended, faults = fill(loaded, given, out)
    assert faults == "" and set(mended) == {"r0", "r1", "r2", "r3"} and all("answer" in row for row in mended.values())
    assert mended["r0"] == answers["r0"]


def test_strict_stops_at_the_first_bad_row_and_keeps_what_is_finished(loaded: LoadedModel, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", rows("a", "b", FAULTS["too long"][0], "d"))
    out = tmp_path / "out.jsonl"
    one_at_a_time = GenerationConfig(max_new_tokens=2, max_running_samples=1)
    with pytest.raises(ValueError, match="sample r2: .* at most 256 fit"), answer_file(given, out) as file:
        file.fill(loaded, one_at_a_time, strict=True)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["r0", "r1"]


def test_a_kill_at_any_byte_loses_at_most_the_line_that_was_written(loaded: LoadedModel, tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", rows("a", "é", FAULTS["too long"][0])), tmp_path / "out.jsonl"
    answers, _ = fill(loaded, given, out)
    whole = out.read_bytes()
    for length in range(0, len(whole), 29):
        out.write_bytes(whole[:length])
        assert fill(loaded, given, out)[0] == answers


def test_halves_of_characters_and_control_characters_in_ids_survive(loaded: LoadedModel, tmp_path: Path) -> None:
    ids = ["\x1b[2J", "a\nb", "\u2028", "\ud800", "null", "", "é" * 500]
    given = write(tmp_path / "in.jsonl", [{"id": id, "messages": ask("x")} for id in ids])
    # Half a character cannot be written, and an empty id is none.
    expected = {"\ud800": "\ufffd", "": "5"}
    assert set(fill(loaded, given, tmp_path / "out.jsonl")[0]) == {expected.get(id, id) for id in ids}


def test_a_missing_and_a_null_id_are_the_rows_number(loaded: LoadedModel, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [{"messages": ask("a")}, {"messages": ask("b")}])
    assert len(fill(loaded, given, tmp_path / "out.jsonl")[0]) == 2


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "the input": (lambda out: (out.unlink(), os.link(out.parent / "in.jsonl", out)), "where the rows come from"),
    "a link to the input": (lambda out: (out.unlink(), out.symlink_to("in.jsonl")), "where the rows come from"),
    "somebody's notes": (lambda out: out.write_text("dear diary\n"), "line 1 is no answer of molora: b'dear diary"),
    "notes without a line break": (lambda out: out.write_text("dear diary"), "line 1 is no answer of molora"),
    "other rows": (lambda out: out.write_text('{"id": "r0", "messages": []}\n'), "line 1 is no answer of molora"),
    "a number": (lambda out: out.write_text('{"id": "r0", "answer": "x"}\n7\n'), "line 2 is no answer of molora"),
    "an id that is no text": (lambda out: out.write_text('{"id": 7, "answer": "x"}\n'), "line 1 is no answer"),
    "bytes": (lambda out: out.write_bytes(b"\xff\x00\x80\n"), "line 1 is no answer of molora"),
    "deep JSON": (lambda out: out.write_text("[" * 100_000 + "\n"), "line 1 is no answer of molora"),
    "an answer twice": (
        lambda out: out.write_text('{"id": "r0", "answer": "x"}\n{"id": "r0", "answer": "y"}\n'),
        "lines 1 and 2 both answer 'r0'",
    ),
    "a folder": (lambda out: (out.unlink(), out.mkdir()), "is no file"),
    "a pipe": (lambda out: (out.unlink(), os.mkfifo(out)), "is no file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_output_that_is_not_ours_is_refused_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", rows("a"))
    (out := tmp_path / "out.jsonl").touch()
    make, says = FOREIGN[kind]
    make(out)
    before = out.read_bytes() if out.is_file() else b""
    with pytest.raises(ConfigError) as refused, answer_file(given, out):
        pass
    assert says in str(refused.value)
    assert (out.read_bytes() if out.is_file() else b"") == before


def test_empty_lines_of_the_output_are_passed_over(loaded: LoadedModel, tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", rows("a", "b")), tmp_path / "out.jsonl"
    out.write_text('\n  \n{"id": "r0", "answer": "x"}\n\n')
    with answer_file(given, out) as file:
        assert file.left == [1]


def test_an_output_in_use_says_by_whom(tmp_path: Path) -> None:
    given, out = write(tmp_path / "in.jsonl", rows("a")), tmp_path / "out.jsonl"
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    in_use = pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on")
    with answer_file(given, out), in_use, answer_file(given, tmp_path / "link.jsonl"):
        pass


def test_ids_that_are_not_unique_are_named_with_their_rows(tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [*rows("a", "b"), *rows("c")])
    with pytest.raises(ConfigError, match="rows 1 and 3 are both 'r0'"), answer_file(given, tmp_path / "out.jsonl"):
        pass


def test_a_missing_folder_is_named_before_the_model_is_opened(tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", rows("a"))
    with pytest.raises(ConfigError, match="no folder"), answer_file(given, tmp_path / "none" / "out.jsonl"):
        pass


@pytest.mark.parametrize("ids", [["a", "b", "c"], [None] * 3])
def test_answers_to_other_messages_are_refused_and_left(
    loaded: LoadedModel, tmp_path: Path, ids: Sequence[str | None]
) -> None:
    def asked(*texts: str) -> Path:
        made = [{"id": id, "messages": ask(text)} for id, text in zip(ids, texts, strict=True)]
        return write(tmp_path / "in.jsonl", made)

    out = tmp_path / "out.jsonl"
    fill(loaded, asked("one", "two", "x" * 300), out)
    before = out.read_bytes()
    other = ids[1] or "1"
    with pytest.raises(ConfigError, match=f"line . answers '{other}', .* asks something else now; give another output"):
        fill(loaded, asked("one", "other", "short"), out)
    assert out.read_bytes() == before
    answers, _ = fill(loaded, asked("one", "two", "short"), out)
    assert len(answers) == 3 and all("answer" in row for row in answers.values())


def make_places(folder: Path) -> None:
    (folder / "in.jsonl").write_text("{}\n")
    (folder / "old.jsonl").write_text("old\n")
    os.link(folder / "old.jsonl", folder / "hard.jsonl")
    (folder / "soft.jsonl").symlink_to("old.jsonl")
    (folder / "nowhere.jsonl").symlink_to("new.jsonl")
    (folder / "folder").mkdir()
    (folder / "there").symlink_to(folder)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ({"output": "out.jsonl", "--a": "./in.jsonl"}, "--a in.jsonl: is in.jsonl, where the rows come from"),
        ({"output": "out.jsonl", "--a": "there/out.jsonl"}, "--a there/out.jsonl: is the file of output too; give"),
        ({"output": "old.jsonl", "--a": "hard.jsonl"}, "--a hard.jsonl: is the file of output too"),
        ({"--a": "soft.jsonl", "--b": "old.jsonl"}, "--b old.jsonl: is the file of --a too"),
        ({"--a": "new.jsonl", "--b": "nowhere.jsonl"}, "--b nowhere.jsonl: is the file of --a too"),
        ({"--a": None, "--b": "folder"}, "--b folder: is no file; name one"),
        ({"--b": "none/out.jsonl"}, "--b none/out.jsonl: no folder none; make it first"),
        ({"--b": "old.jsonl/out.jsonl"}, r"--b old.jsonl/out.jsonl: cannot be written \(Not a directory\); give"),
        ({"--b": "/proc/out.jsonl"}, "--b /proc/out.jsonl: cannot be written"),
        ({"--b": "x" * 300}, "cannot be written .File name too long"),
    ],
)
def test_outputs_that_would_replace_something_or_cannot_be_written_are_told(
    outputs: dict[str, str | None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_places(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=says):
        check_outputs(
            Path("in.jsonl"), {called: None if path is None else Path(path) for called, path in outputs.items()}
        )
    assert sorted(os.listdir(tmp_path)) == before and Path("old.jsonl").read_text() == "old\n"


def test_outputs_with_a_place_each_are_taken_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_places(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    check_outputs(Path("in.jsonl"), {"output": Path("old.jsonl"), "--a": Path("new.jsonl"), "--b": Path("folder/new")})
    assert sorted(os.listdir(tmp_path)) == before and not os.listdir("folder")


def test_a_faulty_row_keeps_its_id_and_takes_nobody_elses(loaded: LoadedModel, tmp_path: Path) -> None:
    given = write(
        tmp_path / "in.jsonl",
        [{"id": "row 3", "messages": ask("a")}, {"id": "q", "messages": []}, "{broken", {"id": "w", "messages": 7}],
    )
    answers = fill(loaded, given, tmp_path / "out.jsonl")[0]
    assert answers.keys() == {"row 3", "q", "row 3 of the file", "w"}
    assert [("error" in answers[id]) for id in ("row 3", "q", "w")] == [False, True, True]
