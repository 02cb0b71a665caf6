"""`molora data check` finds every planted fault with its row and says what to do, and finds nothing in clean data."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molora.cli.commands import main
from molora.config import dump
from molora.data.sources import MessagesConfig, SourceConfig, mixed_order, open_source
from molora.data_tools.check import Outcome, check
from molora.data_tools.faults import KINDS, Fault
from molora.seeding import seed_of
from molora.testing import save_backbone
from molora.train.recipe import Recipe
from tests.data_tools.planted import ASKED, CASES, PLANTED, Planted, good, image, picture, recipe, row, turns, write

pytest.importorskip("soundfile")

TABMWP = Path(os.environ.get("MOLORA_TEST_DATA", "."), "tabmwp", "val.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, rows with every fault after rows without one, and an evaluation."""
    folder = tmp_path_factory.mktemp("check")
    save_backbone(folder / "backbone")
    of_source = {key: [case for case in CASES if case.source == key] for key in (PLANTED, ASKED)}
    write(folder / "planted.jsonl", [*good(folder), *(case.line(folder) for case in of_source[PLANTED])])
    asked = [row("asked question 0", "yes"), row("asked about a picture", "no", picture(folder, "asked"))]
    write(folder / "asked.jsonl", [*asked, *(case.line(folder) for case in of_source[ASKED])])
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> Outcome:
    return check(recipe(home), workers=0, show=False)


def places(home: Path) -> dict[str, int]:
    """The row, counted from 1, of each planted fault."""
    first = {PLANTED: len(list(good(home))), ASKED: 2}
    rows: dict[str, int] = {}
    for case in CASES:
        first[case.source] += 1
        rows[case.name] = first[case.source]
    return rows


def test_there_are_forty_faults_and_more() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_planted_fault_is_found_with_its_row_and_a_remedy(case: Planted, home: Path, found: Outcome) -> None:
    number = places(home)[case.name]
    of_row = [fault for fault in found.faults if (fault.source, fault.row) == (case.source, number)]
    assert [fault.kind for fault in of_row] == [case.kind], of_row
    (fault,) = of_row
    file = "planted.jsonl" if case.source == PLANTED else "asked.jsonl"
    assert fault.where == f"{home / file}, row {number}"
    assert case.words in fault.what
    assert fault.remedy == KINDS[case.kind].remedy
    assert fault.is_error == KINDS[case.kind].is_error


def test_nothing_is_found_in_rows_without_a_fault(home: Path, found: Outcome) -> None:
    planted = {(case.source, number) for case, number in zip(CASES, places(home).values(), strict=True)}
    assert {(fault.source, fault.row) for fault in found.faults} == planted
    assert not found.ok


@pytest.fixture
def clean(home: Path, tmp_path: Path) -> Recipe:
    """The recipe with rows without a fault."""
    (tmp_path / "backbone").symlink_to(home / "backbone")
    write(tmp_path / "planted.jsonl", list(good(tmp_path)))
    write(tmp_path / "asked.jsonl", [row("asked question 0", "yes"), row("asked question 1", "no")])
    return recipe(tmp_path)


def test_a_clean_recipe_has_no_findings(clean: Recipe) -> None:
    outcome = check(clean, show=False)
    assert outcome.ok and outcome.faults == []
    (asked, planted) = outcome.sources
    assert (asked.num_checked, planted.num_checked) == (2, 8)
    assert planted.rows_per_step == 6 and planted.epochs == pytest.approx(4 * 6 / 8)
    # 4 x 4 patches of 8 pixels a side of 16, and a separator a row; the hum of 0.25 s has 23 frames, eight to a token.
    assert planted.tokens["vision"] == 6 and planted.tokens["audio"] == 3
    assert planted.tokens.total() == sum(planted.lengths) and len(planted.lengths) == 8


def test_rows_and_epochs_of_a_mixture_are_those_of_the_order_of_training(clean: Recipe) -> None:
    stage = clean.stages[0]
    planted = stage.data["planted"]
    changing = replace(planted, weight=[(0, 1.0), (400, 0.25)])
    stage.data = {"one": changing, "two": replace(planted, limit=4, max_epochs=50)}
    stage.steps = 1000
    one, two = [each for each in check(clean, show=False).sources if each.named.stage is stage]
    sources = [open_source(config, "test") for config in stage.data.values()]
    seed = seed_of(clean.seed, stage.name)
    order = mixed_order(stage.data.values(), sources, stage.mixture, seed=seed, samples_per_step=6)
    taken = Counter(order[k][0] for k in range(6000))
    assert two.epochs == 50 == taken[1] / 4
    assert one.epochs == taken[0] / 8 and one.rows_per_step == taken[0] / 1000

    stage.data, stage.steps, stage.epochs = {"one": planted}, 0, 3.0
    (only,) = [each for each in check(clean, show=False).sources if each.named.stage is stage]
    assert (only.steps, only.epochs) == (4, 3.0)


def test_workers_find_the_same_in_the_same_order(home: Path, found: Outcome) -> None:
    assert check(recipe(home), workers=2, show=False) == found


def faults_of(recipe: Recipe) -> dict[str, list[Fault]]:
    faults: dict[str, list[Fault]] = {}
    for fault in check(recipe, show=False).faults:
        faults.setdefault(fault.kind, []).append(fault)
    return faults


def test_what_a_stage_leaves_out_is_no_error(clean: Recipe, home: Path) -> None:
    root = Path(clean.run).parent
    write(root / "planted.jsonl", [*good(root), row("long " * 25), row("gone?", "a", image("gone.png"))])
    stops = faults_of(clean)
    assert all(fault.is_error for kind in ("too long", "media") for fault in stops[kind])
    clean.stages[0].too_long = clean.stages[0].unusable = "skip"
    skips = faults_of(clean)
    assert not any(fault.is_error for kind in ("too long", "media") for fault in skips[kind])
    assert check(clean, show=False).ok


def test_a_source_whose_answers_are_all_the_same(clean: Recipe) -> None:
    root = Path(clean.run).parent
    write(root / "planted.jsonl", [row(f"question {index}", "yes") for index in range(5)])
    (fault,) = faults_of(clean)["same answer"]
    assert (fault.source, fault.row, fault.is_error) == (PLANTED, None, True)
    assert "5 rows" in fault.what


def test_rows_that_are_meant_to_ask_the_same_are_neither_contradictions_nor_leaks(clean: Recipe) -> None:
    root = Path(clean.run).parent
    write(root / "planted.jsonl", [row("tell a story", f"once {index}") for index in range(6)])
    write(root / "asked.jsonl", [row("tell a story", "once 4"), row("tell a story", "never")])
    faults = faults_of(clean)
    (same,) = faults.pop("same prompt")
    assert (same.source, same.row, same.is_error) == (PLANTED, None, False) and "5 of its 6 rows" in same.what
    assert [(fault.source, fault.row) for fault in faults.pop("contradiction")] == [(ASKED, 2)]
    assert [(fault.source, fault.row) for fault in faults.pop("leak")] == [(PLANTED, 5)]
    assert faults == {}


def test_a_turn_before_the_last_is_found_in_an_evaluation(clean: Recipe) -> None:
    root = Path(clean.run).parent
    talk = turns(("user", "hello"), ("assistant", "hi"), ("user", "asked question 1"), ("assistant", "a"))
    later = turns(("user", "asked question 0"), ("assistant", "yes"), ("user", "sure?"), ("assistant", "sure"))
    write(root / "planted.jsonl", [*good(root), talk, later])
    assert [fault.row for fault in faults_of(clean)["leak"]] == [10]


def test_a_source_that_does_not_open_and_the_others_are_checked(clean: Recipe) -> None:
    clean.stages[0].data["planted"].options["path"] = "nowhere.jsonl"
    outcome = check(clean, show=False)
    (fault,) = outcome.faults
    assert (fault.kind, fault.source) == ("source", PLANTED) and "no such file" in fault.what
    assert outcome.sources[0].num_checked == 2


def test_an_evaluation_without_media_is_asked_without_them(clean: Recipe) -> None:
    root = Path(clean.run).parent
    write(root / "asked.jsonl", [row("which colour?", "red", image("gone.png")), row("which form?", "round")])
    assert [fault.row for fault in faults_of(clean)["media"]] == [1]
    clean.evaluations["asked"].media = "none"
    assert faults_of(clean) == {}


class Choices:
    """A source of multiple choice; of its rows the first is right."""

    config_type = MessagesConfig

    def __init__(self, config: MessagesConfig) -> None:
        choices = ["a", "b"]
        self.rows = [
            {**row("one?", "b"), "choices": choices, "choice": 1, "answers": ["b", "B"]},
            {**row("two?", "b"), "choices": choices, "choice": 2},
            {**row("three?", "a"), "choices": choices},
            {**row("four?", "b"), "answers": ["a", "c"]},
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": str(row), **self.rows[row]}


def test_choices_and_answers_fit_each_other(clean: Recipe) -> None:
    clean.stages[0].data = {"planted": SourceConfig(kind=f"{__file__}:Choices", options={"path": ""})}
    faults = faults_of(clean)
    assert [(fault.row, fault.where) for fault in faults["choices"]] == [(n, f"{PLANTED}, row {n}") for n in (2, 3, 4)]
    assert ["choice is 2" in fault.what for fault in faults["choices"]] == [True, False, False]


def test_a_limit_reads_the_first_rows_only(home: Path) -> None:
    outcome = check(recipe(home), limit=2, show=False)
    assert [each.num_checked for each in outcome.sources] == [2, 2]
    assert outcome.faults == []


def test_media_given_in_the_row_are_looked_at(clean: Recipe) -> None:
    root = Path(clean.run).parent
    data = base64.b64encode((root / "good.png").read_bytes()).decode()
    write(root / "planted.jsonl", [*good(root), row("in the row?", "a", {"type": "image", "base64": data})])
    write(root / "asked.jsonl", [row("asked?", "yes", image("good.png")), row("what?", "no")])
    assert {fault.row for fault in faults_of(clean)["shared media"]} == {5, 9}


def test_the_command_prints_findings_and_writes_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(recipe(home)))
    arguments = ("data", "check", f"{tmp_path}/recipe.yaml", "--json", f"{tmp_path}/found.json")
    monkeypatch.setattr("sys.argv", ["molora", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    told = capsys.readouterr().out
    assert "stages.0 (tune): 4 steps of 6 samples" in told and "tokens of a row" in told
    assert KINDS["leak"].title in " ".join(told.split())
    lines = [line for line in told.splitlines() if str(home) not in line]
    assert max(map(len, lines)) <= 80
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["ok"] is False and len(written["faults"]) == len(CASES)
    assert all(fault["remedy"] and fault["where"] and fault["what"] for fault in written["faults"])
    for source in written["sources"]:
        assert sum(each["rows"] for each in source["tokens_of_a_row"]["histogram"]) == source["rows_usable"] > 0


@pytest.mark.skipif(not TABMWP.is_file(), reason="set MOLORA_TEST_DATA to a folder with tabmwp")
def test_real_rows_that_were_decoded_wrongly_are_found(clean: Recipe) -> None:
    """TabMWP has degree signs whose UTF-8 was read as Latin-1."""
    options = {"path": str(TABMWP), "prompt": "{question}\n{table}", "answer": "{answer}"}
    clean.evaluations["asked"].data = SourceConfig(kind="table", options=options)
    lines = TABMWP.read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, start=1) if "\u00c2\u00b0" in json.loads(line)["table"]}
    assert {fault.row for fault in faults_of(clean)["encoding"]} == wrong != set()


def test_both_answers_of_a_pair_are_looked_at(clean: Recipe, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no " * (n * 40 + 1)} for n in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (stage,) = clean.stages[:1]
    stage.objective, stage.tokens_per_pack = "preferences", 150
    stage.data = {"pairs": SourceConfig(kind="preferences", options={"path": str(tmp_path / "pairs.jsonl")})}
    (fault,) = faults_of(clean)["too long"]
    assert "row 3" in fault.where and "a pack of this stage holds 150" in fault.what
    stage.data = {
        "rows": SourceConfig(kind="messages", options={"path": str(tmp_path / "rows.jsonl")}),
    }
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    (fault,) = faults_of(clean)["refused"]
    assert "has no rejected answer" in fault.what
