"""What each step makes of its rows, and which of them it leaves out, by itself."""

from __future__ import annotations

import json
import random
from math import nan
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError, build
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import NoOptions
from molora.evaluate.normalise import words
from molora.plugins import available, find
from molora.seeding import seed_of
from molora.synthetic.rows import DecodingConfig, Dropped, Reply, Request, Row
from molora.synthetic.steps.choosing import repeated
from molora.synthetic.steps.judging import decimal_text, last_number


class Alone:
    """A workflow of one step."""

    name = "step"

    def seed_of(self, *key: int | str) -> int:
        return seed_of(0, *key)

    def ask(self, model: str, requests: list[Request], how: DecodingConfig) -> list[Reply]:
        raise AssertionError("this step asks nobody")


ROLE = {"model": "m", "system": ""}


def run(kind: str, rows: list[dict[str, Any]], /, **options: Any) -> tuple[list[Row], list[Dropped]]:
    step_class: Any = find("step", kind).plugin
    step = step_class(build(step_class.config_type, options, kind))
    before = [Row(str(n), columns, place=f"before/{n}") for n, columns in enumerate(rows)]
    made = [*step.run(before, Alone())]
    for row in made:
        if isinstance(row, Row) and rows:
            assert row.parents and all(parent.startswith("before/") for parent in row.parents)
    return [row for row in made if isinstance(row, Row)], [row for row in made if isinstance(row, Dropped)]


def texts(rows: list[Row], column: str = "text") -> list[Any]:
    return [row.columns[column] for row in rows]


def test_every_built_in_step_has_a_docstring_and_a_contract() -> None:
    for plugin in available("step"):
        assert find("step", plugin.name).plugin.__doc__


def test_tables_are_read_with_all_columns_or_with_those_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.write_text('{"id": "a", "q": "one", "n": {"x": ["y", 2]}}\n{"id": "b", "q": "two", "n": null}\n')
    rows, _ = run("table", [], path=str(path))
    assert [row.id for row in rows] == ["a", "b"] and texts(rows, "q") == ["one", "two"]
    assert rows[0].columns["n"] == {"x": ["y", "2"]} and rows[0].parents == (f"{path}, row 1",)
    rows, _ = run("table", [], path=str(path), columns={"text": "{q}: {n[x][0]}"}, split="train[:1]")
    assert texts(rows) == ["one: y"] and [*rows[0].columns] == ["text"]


def test_a_row_without_a_column_is_left_out_if_another_has_it(tmp_path: Path) -> None:
    rows = [{"extra": "x"}, {"q": "one", "w": ["a", "b"]}, {"q": None, "w": ["a", "b"]}, {"q": "two", "w": ["a", "b"]}]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    steps = {
        "compose": {"columns": {"text": "{q}"}},
        "shots": {"column": "q", "count": 1},
        "filter": {"rules": {"q": {"min_words": 1}}},
        "choices": {"right": "{q}", "wrong": "w", "num_wrong": 1},
        "table": {"path": str(path), "columns": {"text": "{q}"}},
    }
    for kind, options in steps.items():
        made, dropped = run(kind, [] if kind == "table" else rows, **options)
        assert [row.id for row in made] == ["1", "3"], kind
        assert [each.reason for each in dropped] == ["no column 'q'", "faulty"], kind
    made, dropped = run("deduplicate", rows, columns=["q"])
    assert [row.id for row in made] == ["1", "2", "3"] and [each.reason for each in dropped] == ["no column 'q'"]
    with pytest.raises(ConfigError, match="columns: no column 'p'; .*row 0 has extra"):
        run("deduplicate", rows, columns=["p"])


@pytest.mark.parametrize("name", ["self", "columns", "row"])
def test_a_column_may_have_any_name(name: str) -> None:
    ((made,), _) = run("vote", [{"all": ["a"]}], column="all", into=name)
    assert made.columns[name] == "a"


def test_conversations_of_any_source_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    path.write_text(json.dumps({"id": "a", "messages": said, "answers": ["four", "4"], "tags": ["sum"]}))
    (row,), _ = run("conversations", [], kind="messages", options={"path": str(path)})
    assert row.columns["messages"] == said[:1] and row.columns["question"] == "2 + 2?"
    assert row.columns["answer"] == "4" and row.columns["answers"] == ["four", "4"] and row.columns["tags"] == ["sum"]


def test_rows_are_drawn_in_their_order() -> None:
    rows = [{"text": str(n)} for n in range(50)]
    kept, dropped = run("sample", rows, count=20)
    assert len(kept) == 20 and len(dropped) == 30 and texts(kept) == sorted(texts(kept), key=int)
    assert texts(kept) != [str(n) for n in range(20)]
    assert len(run("sample", rows[:3], count=20)[0]) == 3


def test_each_row_gets_examples_of_the_others() -> None:
    rows = [{"text": str(n)} for n in range(6)]
    made, _ = run("shots", rows, column="text", count=3)
    assert len(made) == 6
    for row in made:
        assert len({*row.columns["shots"], row.columns["text"]}) == 4
    twice, _ = run("shots", rows, column="text", count=3, take=2, into="others")
    assert [row.id for row in twice][:3] == ["0#0", "0#1", "1#0"]
    assert any(a.columns["others"] != b.columns["others"] for a, b in zip(twice[::2], twice[1::2], strict=True))
    with pytest.raises(ConfigError, match="count is 3, and there are 3 rows"):
        run("shots", rows[:3], column="text")


@pytest.mark.parametrize(
    ("rule", "kept", "reason"),
    [
        ({"min_words": 3}, ["one two three", "two  three four five"], "text: fewer than 3 words"),
        ({"max_words": 3}, ["", "one two three"], "text: more than 3 words"),
        ({"min_characters": 14}, ["two  three four five"], "text: fewer than 14 characters"),
        ({"max_characters": 13}, ["", "one two three"], "text: more than 13 characters"),
        ({"matches": "^one"}, ["one two three"], "text: does not match '^one'"),
        ({"rejects": "four|^$"}, ["one two three"], "text: matches 'four|^$'"),
        ({"one_of": ["", "one"]}, [""], "text: none of the texts it may be"),
        ({"differs_from": "other"}, ["", "two  three four five"], "text: the same as other"),
    ],
)
def test_rows_that_break_a_rule_are_left_out(rule: dict[str, Any], kept: list[str], reason: str) -> None:
    rows = [{"text": text, "other": "One two Three."} for text in ("", "one two three", "two  three four five")]
    found, dropped = run("filter", rows, rules={"text": rule})
    assert texts(found) == kept and {each.reason for each in dropped} == {reason}


def test_numbers_have_bounds_and_what_is_none_is_a_fault_of_its_row() -> None:
    rows = [{"score": value} for value in (1, "2.5", 4.0, "many", None)]
    found, dropped = run("filter", rows, rules={"score": {"at_least": 2, "at_most": 3}})
    assert texts(found, "score") == ["2.5"]
    assert [each.reason for each in dropped] == ["score: below 2", "score: above 3", "faulty", "faulty"]
    assert "'many' is no number" in dropped[2].detail


def test_loops_are_seen_in_any_script() -> None:
    assert repeated(words("one two three four five six seven eight")) == 0
    assert repeated(words("a cat sat down and a cat sat down and a cat sat down and")) > 0.6
    assert repeated(words("我喜欢猫我喜欢猫我喜欢猫我喜欢猫")) > 0.7
    found, _ = run("filter", [{"text": "go on and on " * 9}, {"text": "go"}], rules={"text": {"most_repeated": 0.5}})
    assert texts(found) == ["go"]


SEEDS = [
    "Write a short poem about the sea in winter.",
    "Explain to a child why the sky is blue.",
    "List three animals that live in the desert.",
    "Übersetze den Satz ins Englische.",
    "解释为什么天空是蓝色的。",
]


def planted(text: str, draw: random.Random) -> str:
    """The text with one of what makes no difference, or little."""
    return draw.choice(
        [
            text.upper(),
            f"  {text}\n",
            text.replace(" ", "  "),
            text.rstrip(".。"),
            text[:-1] + "!",
            f"{text} ?",
            text.replace("a", "á", 1),
        ]
    )


def test_planted_duplicates_are_all_removed_and_nothing_else() -> None:
    draw = random.Random(0)
    rows = [*SEEDS, *(planted(draw.choice(SEEDS), draw) for _ in range(200))]
    kept, dropped = run("deduplicate", [{"text": text} for text in rows], columns=["text"], similarity=0.6)
    assert texts(kept) == SEEDS and len(dropped) == 200
    places = {f"before/{n}" for n in range(len(SEEDS))}
    assert {each.detail for each in dropped} <= places, "each names the row that it is a duplicate of"
    exact, _ = run("deduplicate", [{"text": text} for text in rows], columns=["text"], similarity=None)
    assert len(SEEDS) < len(exact) < 60


def test_near_rows_are_those_that_comparing_all_pairs_finds() -> None:
    draw = random.Random(1)
    rows = ["".join(draw.choice("abcd") for _ in range(draw.randint(0, 30))) for _ in range(300)]
    kept: list[str] = []
    for text in rows:
        runs = {text[k : k + 2] for k in range(max(len(text) - 2, 0) + 1)}
        others = [{other[k : k + 2] for k in range(max(len(other) - 2, 0) + 1)} for other in kept]
        if text not in kept and not any(len(runs & other) / len(runs | other) >= 0.5 for other in others):
            kept.append(text)
    found, _ = run("deduplicate", [{"text": text} for text in rows], columns=["text"], similarity=0.5, characters=2)
    assert texts(found) == kept and 30 < len(kept) < 270


def test_planted_leaks_are_all_removed_and_nothing_else(tmp_path: Path) -> None:
    draw = random.Random(0)
    vocabulary = [f"word{n}" for n in range(500)]

    def text(count: int) -> list[str]:
        return [draw.choice(vocabulary) for _ in range(count)]

    tests = [text(40) for _ in range(20)] + [text(7) for _ in range(5)]
    path = tmp_path / "test.jsonl"
    path.write_text("\n".join(json.dumps({"q": " ".join(words[:3]), "a": " ".join(words[3:])}) for words in tests))
    clean = [text(60) for _ in range(100)]
    rows = [{"text": " ".join(words), "messages": []} for words in clean]
    for number, leak in enumerate(tests):
        start = draw.randrange(len(leak) - 12) if len(leak) > 13 else 0
        said = [word.upper() if n % 3 == 0 else f"{word}," for n, word in enumerate(leak[start : start + 13])]
        turn = {"role": "user", "content": [{"type": "text", "text": " ".join(["so", *said, "then"])}]}
        rows.append({"text": "", "messages": [turn]} if number % 2 else {"text": turn["content"][0]["text"]})
    sets = {"planted": {"path": str(path), "text": "{q} {a}"}}
    kept, dropped = run("decontaminate", rows, sets=sets)
    assert texts(kept) == [" ".join(words) for words in clean]
    assert {each.reason for each in dropped} == {"in test set planted"} and len(dropped) == len(tests)
    # A run of one word fewer is none.
    almost, _ = run("decontaminate", [{"text": " ".join(leak[:12])} for leak in tests[:20]], sets=sets)
    assert len(almost) == 20


def test_values_that_are_no_text_are_compared_too(tmp_path: Path) -> None:
    values = [1, 2, True, False, 1.5, 1, None, True, {"a": [1, 2]}, {"a": [1, 3]}]
    made, dropped = run("deduplicate", [{"text": value} for value in values], columns=["text"], similarity=None)
    assert texts(made) == [1, 2, True, False, 1.5, None, {"a": [1, 2]}, {"a": [1, 3]}]
    assert [each.row.id for each in dropped] == ["5", "7"]
    path = tmp_path / "test.jsonl"
    path.write_text('{"answer": 1234567}')
    sets = {"planted": {"path": str(path), "text": "{answer}"}}
    made, dropped = run("decontaminate", [{"text": 1234567}, {"text": 7654321}], sets=sets, least_words=1)
    assert texts(made) == [7654321] and [each.reason for each in dropped] == ["in test set planted"]


def test_a_long_text_becomes_passages_of_whole_sentences() -> None:
    sentences = [" ".join([f"s{n}"] * (n % 7 + 3)) + "." for n in range(30)]
    (row,) = [{"text": " ".join(sentences), "title": "t"}]
    made, _ = run("passages", [row], column="text", max_words=20, min_words=1)
    assert " ".join(texts(made, "passage")) == row["text"]
    assert all(len(words(text)) <= 20 and text.endswith(".") for text in texts(made, "passage"))
    assert [row.id for row in made] == [f"0#{n}" for n in range(len(made))] and "text" not in made[0].columns
    few, _ = run("passages", [row], column="text", max_words=20, min_words=1, at_most=2)
    assert texts(few, "passage") == texts(made, "passage")[:2]
    none, dropped = run("passages", [{"text": "Too short."}], column="text")
    assert none == [] and dropped[0].reason == "no passage of 30 words"


def test_columns_are_composed_and_left_out() -> None:
    rows = [{"a": "1", "b": ["x", "y"], "c": True}]
    (made,), _ = run("compose", rows, columns={"d": " {a}-{b[1]} {c} "}, drop=["a"])
    assert made.columns == {"b": ["x", "y"], "c": True, "d": "1-y true"}
    (made,), _ = run("compose", rows, columns={"d": "{{{a}}}"}, only=["c"])
    assert made.columns == {"c": True, "d": "{1}"}
    faulty, dropped = run("compose", rows, columns={"d": "{b}"})
    assert faulty == [] and dropped[0].reason == "faulty" and "{b} is a list of 2, not text" in dropped[0].detail


def test_texts_are_taken_out_of_answers() -> None:
    said = "Q: How many?\nA: Two.\n\nQ: Why?\nA: Because."
    pattern = r"^Q: (?P<question>.*?)\nA: (?P<answer>.*?)$"
    (first,), _ = run("extract", [{"text": said}], column="text", pattern=pattern)
    assert (first.columns["question"], first.columns["answer"]) == ("How many?", "Two.")
    (last,), _ = run("extract", [{"text": said}], column="text", pattern=pattern, last=True)
    assert last.columns["question"] == "Why?"
    (every,), _ = run("extract", [{"text": said}], column="text", pattern=pattern, every=True)
    assert every.columns["question"] == ["How many?", "Why?"] and every.columns["answer"] == ["Two.", "Because."]
    none, dropped = run("extract", [{"text": "No."}], column="text", pattern=pattern)
    assert none == [] and dropped[0].reason == "nothing to take out of text"


@pytest.mark.parametrize("said", ["no", "{", '{"a": 1', '{"a": 1}', '{"a": null, "b": 2}', '["a"]', "{" * 9999])
def test_json_that_lacks_something_is_left_out(said: str) -> None:
    kept, dropped = run("extract", [{"text": said}], column="text", keys=["a", "b"])
    assert kept == [] and len(dropped) == 1


def test_json_is_found_in_a_text() -> None:
    (made,), _ = run(
        "extract", [{"text": 'Here: {"a": 1, "b": ["x"], "c": 3} and so on'}], column="text", keys=["a", "b"]
    )
    assert made.columns["a"] == 1 and made.columns["b"] == ["x"] and "c" not in made.columns


def test_items_of_a_list_become_rows() -> None:
    made, dropped = run("spread", [{"all": ["A", "b", "a.", " ", "c"], "k": 1}, {"all": []}], column="all", into="one")
    assert texts(made, "one") == ["A", "b", "c"] and [row.id for row in made] == ["0#0", "0#1", "0#2"]
    assert all(row.columns["k"] == 1 and "all" not in row.columns for row in made)
    assert [each.reason for each in dropped] == ["all is empty"]
    assert texts(run("spread", [{"all": ["A", "b"]}], column="all", into="one", at_most=1)[0], "one") == ["A"]


def test_choices_are_shuffled_and_the_right_one_is_known() -> None:
    rows = [{"a": f"right{n}", "w": ["wrong", "Wrong.", f"Right{n}", "bad", "worse", "worst"]} for n in range(40)]
    made, _ = run("choices", rows, right="{a}", wrong="w")
    for number, row in enumerate(made):
        assert row.columns["choices"][row.columns["choice"]] == f"right{number}"
        assert sorted(row.columns["choices"]) == sorted([f"right{number}", "wrong", "bad", "worse"])
        assert row.columns["options"].splitlines()["ABCD".index(row.columns["letter"])].endswith(f"right{number}")
    assert {row.columns["letter"] for row in made} == {*"ABCD"}
    _, dropped = run("choices", [{"a": "x", "w": ["X", "y", "y"]}], right="{a}", wrong="w")
    assert dropped[0].reason == "fewer than 3 wrong options"


def test_conversations_are_rows_that_training_reads(tmp_path: Path) -> None:
    rows = [{"q": "What?", "a": "This.", "clip": "a.wav", "tags": ["t"]}, {"q": "Who?", "a": " ", "clip": "b.wav"}]
    options = {"user": "{q}", "assistant": "{a}", "system": "Be brief.", "media": {"audio": "clip"}}
    made, dropped = run("conversation", rows, **options, keep=["tags"])
    assert [each.reason for each in dropped] == ["what the assistant says is empty"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": made[0].id, **made[0].columns}))
    told = Messages(MessagesConfig(path=str(path)))[0]
    assert told["tags"] == ["t"] and [each["role"] for each in told["messages"]] == ["system", "user", "assistant"]
    assert told["messages"][1]["content"][1] == {"type": "text", "text": "What?"}
    assert told["messages"][1]["content"][0]["type"] == "audio"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 4.", "4"),
        ("1,234.50 in all", "1234.5"),
        ("from 3 to -2e3", "-2000"),
        ("none", ""),
        ("$12.", "12"),
        ("5/0", ""),
        ("-0", "0"),
    ],
)
def test_the_last_number_is_found(text: str, number: str) -> None:
    found = last_number(text)
    assert ("" if found is None else decimal_text(found)) == number


def test_the_majority_decides() -> None:
    rows = [
        {"all": ["It is 4.", "so 4.0", "5", "?"]},
        {"all": ["4", "5", "4", "5"]},
        {"all": ["1", "2", "3", "4"]},
        {"all": ["none", "nothing"]},
    ]
    kept, dropped = run("vote", rows, column="all", by="number", at_least=0.5)
    (row,) = kept
    assert (row.columns["answer"], row.columns["agreement"]) == ("4", 0.5)
    assert row.columns["agreeing"] == ["It is 4.", "so 4.0"]
    assert [each.reason for each in dropped] == ["two answers lead", "less than 50% agree", "no answer to count"]
    (row,), _ = run("vote", [{"all": ["Yes.", "yes", "no"]}], column="all", at_least=0.6)
    assert row.columns["answer"] == "Yes."


@pytest.mark.parametrize("number", ["1234567890123", "123456789012345678901234567890123", "0.1234567890123456789"])
def test_long_numbers_are_compared_and_shown_with_all_digits(number: str) -> None:
    near = f"{number[:-1]}{9 - int(number[-1])}"
    (made,), _ = run("vote", [{"all": [number, f"It is {number}.", near]}], column="all", by="number")
    assert made.columns["answer"] == number and made.columns["agreeing"] == [number, f"It is {number}."]


class Erratic:
    """Gives what stands in the answer, unless that is a text."""

    config_type = NoOptions

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Any) -> dict[str, float]:
        if judged[0].answer.isalpha() and judged[0].answer not in ("nan", "inf"):
            raise KeyError(judged[0].answer)
        return {"read": float(judged[0].answer)}


def test_a_number_that_is_not_finite_is_within_no_bound() -> None:
    rows = [{"s": value} for value in ("nan", "inf", "-inf", "1e999", "7", "3")]
    for rule in ({"at_least": 5}, {"at_most": 10}, {"at_least": 5, "at_most": 10}):
        kept, dropped = run("filter", rows, rules={"s": rule})
        assert texts(kept, "s") == (["7", "3"] if "at_least" not in rule else ["7"])
        assert [each.reason for each in dropped][:4] == ["s: not a finite number"] * 4
    metric = f"{__file__}:Erratic"
    kept, dropped = run("verify", rows, metric=metric, answer="{s}", expected="x", at_least=5, at_most=10)
    assert texts(kept, "rating") == [7.0]
    assert [each.reason for each in dropped] == ["the metric gives no finite number"] * 4 + ["rated below 5"]
    assert dropped[0].detail == "it gives nan" and "rating" not in dropped[0].row.columns
    for text in ('{"a": NaN}', '{"a": [1e999]}'):
        assert run("extract", [{"text": text}], column="text", keys=["a"])[0] == []


class Dear(Erratic):
    """Says of one answer at a time how right it is, as a model that judges."""

    def rate(self, judged: Any) -> float:
        raise AssertionError("asked")


def test_a_metric_that_fails_leaves_out_the_row() -> None:
    rows = [{"s": "7"}, {"s": "seven"}]
    kept, dropped = run("verify", rows, metric=f"{__file__}:Erratic", answer="{s}", expected="x", at_least=5)
    assert len(kept) == 1 and dropped[0].reason == "faulty" and "KeyError: 'seven'" in dropped[0].detail


def test_choices_of_a_table_are_rated_by(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    asked = [
        {"choices": ["red", "blue"], "choice": 1, "said": "It is blue."},
        {"choices": ["red", "blue"], "choice": 1, "said": "(A)"},
        {"choices": ["red", "blue"], "choice": "B", "said": "(B)"},
        {"choices": None, "choice": None, "said": "(B)"},
        {"choices": ["red", "blue"], "choice": 2, "said": "(B)"},
    ]
    path.write_text("\n".join(json.dumps({**row, "right": "B"}) for row in asked))
    rows = [dict(row.columns) for row in run("table", [], path=str(path))[0]]
    options = {"metric": "multiple_choice", "answer": "{said}", "expected": "{right}", "at_least": 1.0}
    kept, dropped = run("verify", rows, **options)
    assert texts(kept, "said") == ["It is blue."]
    assert [each.reason for each in dropped] == ["rated below 1", *["faulty"] * 3]
    assert all("needs the options of the row as `choices`, and the index of" in each.detail for each in dropped[1:])


def test_a_row_that_a_metric_cannot_rate_is_left_out() -> None:
    rows = [{"said": "7", "right": "7"}, {"said": "7", "right": "seven"}]
    kept, dropped = run("verify", rows, metric="number", answer="{said}", expected="{right}", at_most=1.0)
    assert len(kept) == 1 and dropped[0].reason == "faulty" and "'seven'" in dropped[0].detail


def test_a_metric_decides() -> None:
    rows = [{"said": "Paris.", "right": "paris"}, {"said": "Rome", "right": "Paris"}]
    kept, dropped = run("verify", rows, metric="exact_match", answer="{said}", expected="{right}", at_least=1.0)
    assert texts(kept, "rating") == [1.0] and [each.reason for each in dropped] == ["rated below 1"]
    rows = [{"said": "the cat sat", "all": ["a cat sat down", "the cat sat"]}]
    kept, _ = run("verify", rows, metric="exact_match", answer="{said}", answers="all", at_least=1.0, into="right")
    assert texts(kept, "right") == [1.0]


def test_a_word_error_rate_has_a_highest_value() -> None:
    pytest.importorskip("jiwer")
    rows = [{"said": said, "text": "what colour is the circle"} for said in ("What colour is the circle?", "a circle")]
    kept, dropped = run("verify", rows, metric="word_error_rate", answer="{said}", expected="{text}", at_most=0.2)
    assert texts(kept, "rating") == [0.0] and [each.reason for each in dropped] == ["rated above 0.2"]
    assert dropped[0].row.columns["rating"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("filter", {"rules": {}}, "rules: none"),
        ("filter", {"rules": {"a": {}}}, "says nothing"),
        ("filter", {"rules": {"a": {"matches": "("}}}, "matches: .* is no regular expression"),
        ("deduplicate", {"columns": []}, "columns: none"),
        ("deduplicate", {"columns": ["a"], "similarity": 2.0}, "similarity is 2.0"),
        ("decontaminate", {"sets": {}}, "sets: none"),
        ("extract", {"column": "a", "pattern": "b"}, "has no named group"),
        ("extract", {"column": "a"}, "give either pattern or keys"),
        ("compose", {"drop": ["a"], "only": ["b"]}, "give drop or only"),
        ("choices", {"right": "a", "wrong": "b", "num_wrong": 40}, "num_wrong is 40"),
        ("choices", {"right": "a", "wrong": "b", "line": "{leter}"}, "line: no column 'leter'; did you mean 'letter'"),
        ("vote", {"column": "a", "at_least": 2.0}, "at_least is 2.0"),
        ("verify", {"metric": "exact_match", "answer": "a", "expected": "b"}, "give at_least or at_most"),
        ("verify", {"metric": "exact_match", "answer": "a", "expected": "b", "at_least": nan}, "at_least is nan"),
        ("filter", {"rules": {"a": {"at_most": nan}}}, "at_most is nan"),
        ("verify", {"metric": "exact_match", "answer": "a", "at_least": 1.0}, "give either expected or answers"),
        ("verify", {"metric": "choice_likelihood", "answer": "a", "expected": "b", "at_least": 1.0}, "by more than"),
        ("ask", {"model": "m"}, "give prompt, messages or both"),
        ("ask", {"model": "m", "prompt": "p", "decoding": {"schema": {}, "regex": "a"}}, "give schema or regex"),
        ("ask", {"model": "m", "prompt": "p", "decoding": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ("ask", {"model": "m", "prompt": "p", "decoding": {"top_p": 0.0}}, "top_p is 0"),
        ("dialogue", {"roles": {"a": ROLE}}, "roles: give two"),
        ("dialogue", {"roles": dict.fromkeys("ab", ROLE), "turns": 3}, "turns is 3: the last .*; give 2 or 4"),
        ("dialogue", {"roles": dict.fromkeys("abc", ROLE), "turns": 4}, "turns is 4: the last .*; give 3 or 5"),
        ("verify", {"metric": f"{__file__}:Dear", "answer": "", "expected": "", "at_least": 1}, "asks a model; let"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(kind: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run(kind, [], **options)
