"""Answers compared, and scores by tag."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.sources import SourceConfig
from molora.evaluate.judge import EvaluationConfig, complaints
from molora.evaluate.metrics import Judged, Named, open_metrics, scores
from molora.evaluate.normalise import FULL_STOPS, exact_match, words
from molora.evaluate.questions import question
from molora.evaluate.results import record


def measured(judged: list[Judged], *named: Named) -> dict[str, float]:
    """The numbers of some metrics over all answers."""
    return scores(judged, open_metrics(named, "metrics"))


def word_error_rate(judged: list[Judged]) -> float | None:
    return measured(judged, "word_error_rate").get("word_error_rate")


def character_error_rate(judged: list[Judged]) -> float | None:
    return measured(judged, "character_error_rate").get("character_error_rate")


def bleu(judged: list[Judged], tokeniser: str) -> float:
    return measured(judged, {"bleu": {"tokeniser": tokeniser}})["bleu"]


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [("Yes.", "yes", True), (" a  red\ncircle ", "a red circle", True), ("yes", "no", False), ("", "yes", False)],
)
def test_exact_match_ignores_case_spaces_and_a_full_stop(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) == same


def test_scores_count_by_tag() -> None:
    judged = [Judged(str(i), [], "x", "x", i < 3, ["a"] if i % 2 else ["a", "b"]) for i in range(4)]
    assert measured(judged, "exact_match") == {
        "exact_match": 0.75,
        "questions": 4,
        "exact_match/a": 0.75,
        "questions/a": 4,
        "exact_match/b": 1.0,
        "questions/b": 2,
        "failed": 0,
        "cut_off": 0,
    }


ASKED = {"role": "user", "content": "what?"}
ANSWERED = {"role": "assistant", "content": "this"}


def rows(several: list[dict[str, Any]]) -> Any:
    """A list is source enough."""
    return several


def test_a_question_without_media_keeps_its_text() -> None:
    picture, text = {"type": "image", "path": "x.png"}, {"type": "text", "text": "what?"}
    row: dict[str, Any] = {
        "id": "r",
        "messages": [{"role": "user", "content": [picture, text]}, {"role": "assistant", "content": "x"}],
    }
    assert question(rows([row]), 0, "none").prompt == [{"role": "user", "content": [text]}]
    assert question(rows([row]), 0).prompt[0]["content"] == [picture, text]
    with pytest.raises(ValueError, match="row 1: must end with an assistant message"):
        question(rows([{"id": "r", "messages": row["messages"][:1]}]), 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "image", "path": "x"}]}]}, "holds image"),
        ({"messages": [ASKED, ANSWERED], "tags": {"a": 1}}, "row 1: tags: expected a list of texts"),
    ],
)
def test_a_row_of_a_plugins_source_is_checked_too(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question(rows([{"id": "0", **row}]), 0)


def test_tags_of_a_plugins_source_are_read_as_those_of_files() -> None:
    given = {"id": "0", "messages": [ASKED, ANSWERED], "tags": ["", "a", "a"]}
    assert question(rows([given]), 0).tags == ["a"]
    assert question(rows([{**given, "tags": "abc"}]), 0).tags == ["abc"]


def test_word_errors_are_counted_over_all_answers_without_punctuation() -> None:
    pairs = [("what is the red shape?", "What is the red shape"), ("is there a circle?", "is there circle"), ("no", "")]
    judged = [Judged(str(i), [], expected, answer, False) for i, (expected, answer) in enumerate(pairs)]
    assert word_error_rate(judged) == pytest.approx(2 / 10)


def test_macro_f1_weighs_rare_answers_like_frequent_ones() -> None:
    # Four of six beats are right. Normal: precision 3/4, recall 3/4. Early: 1/1 and 1/2. Late: never answered.
    pairs = [("normal", "Normal.")] * 3 + [("normal", "a beat"), ("early", "early"), ("early", "normal")]
    judged = [
        Judged(str(i), [], expected, answer, exact_match(answer, expected))
        for i, (expected, answer) in enumerate(pairs)
    ]
    assert measured(judged, "macro_f1")["macro_f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    missed = Judged("late", [], "late", "normal", False)
    assert measured([*judged, missed], "macro_f1")["macro_f1"] == pytest.approx((6 / 9 + 2 / 3 + 0) / 3)


def translated(*pairs: tuple[str, str]) -> list[Judged]:
    """Pairs of expected and given answers."""
    return [
        Judged(str(i), [], expected, answer, exact_match(answer, expected))
        for i, (expected, answer) in enumerate(pairs)
    ]


def test_bleu_is_counted_over_all_answers_together() -> None:
    pytest.importorskip("sacrebleu")
    judged = translated(
        ("the cat sat on the mat", "the cat sat on a mat"), ("it is very cold today", "it is cold today")
    )
    # n-grams of one to four words: 9 of 10, 5 of 8, 2 of 6 and 1 of 4 are right; 10 words for 11 expected.
    precisions = (9 / 10) * (5 / 8) * (2 / 6) * (1 / 4)
    assert bleu(judged, "13a") == pytest.approx(100 * precisions**0.25 * math.exp(1 - 11 / 10))
    tagged = [replace(judged[0], tags=["cats"]), judged[1]]
    assert measured(tagged, "exact_match", "bleu") == {
        "exact_match": 0.0, "bleu": bleu(judged, "13a"), "questions": 2,
        "exact_match/cats": 0.0, "bleu/cats": bleu(judged[:1], "13a"), "questions/cats": 1,
        "failed": 0, "cut_off": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tokeniser", "expected", "answer"),
    [
        ("zh", "她明天会来北京看我们。", "她明天会来上海看我们。"),
        ("ja-mecab", "彼女は明日東京に来ます。", "彼女は明日京都に来ます。"),
    ],
)
def test_languages_without_spaces_need_their_tokeniser(tokeniser: str, expected: str, answer: str) -> None:
    pytest.importorskip("sacrebleu")
    assert bleu(translated((expected, answer)), "13a") == 0.0
    assert 20 < bleu(translated((expected, answer)), tokeniser) < 90
    assert bleu(translated((expected, expected)), tokeniser) == pytest.approx(100)


def test_an_unknown_tokeniser_is_refused_where_it_is_written() -> None:
    pytest.importorskip("sacrebleu")
    with pytest.raises(ConfigError, match="recipe: bleu: sacrebleu has no tokeniser 'jp'; it has .*ja-mecab"):
        open_metrics([{"bleu": {"tokeniser": "jp"}}], "recipe")


def test_a_missing_sacrebleu_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"BLEU needs sacrebleu: pip install 'molora\[audio\]'"):
        open_metrics(["bleu"], "recipe")


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("caf\u00e9", "cafe\u0301", True),
        ("Ti\u1ebfng Vi\u1ec7t", "Tie\u0302\u0301ng Vie\u0323\u0302t", True),
        ("\ud55c\uad6d", unicodedata.normalize("NFD", "\ud55c\uad6d"), True),
        ("\u7ea2\u8272\u3002", "\u7ea2\u8272", True),
        ("\u8d64\uff61", "\u8d64", True),
        ("\u0939\u093e\u0901\u0964", "\u0939\u093e\u0901", True),
        ("\u06c1\u0627\u06ba\u06d4", "\u06c1\u0627\u06ba", True),
        ("\u12a0\u12ce\u1362", "\u12a0\u12ce", True),
        ("\u1794\u17b6\u1791\u17d4", "\u1794\u17b6\u1791", True),
        ("\u0561\u0575\u0578\u0589", "\u0561\u0575\u0578", True),
        ("yes .", "Yes", True),
        ("yes\u200f", "\ufeffyes", True),
        ("STRASSE", "Stra\u00dfe", True),
        ("\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03cc\u03c2", False),  # the accent is part of the word
        ("\u039f\u0394\u03cc\u03a3", "\u03bf\u03b4\u03cc\u03c2", True),
        ("yes?", "yes", False),
        ("x\u00b2", "x2", False),
        ("resume", "r\u00e9sum\u00e9", False),
        ("\u0e2a\u0e35", "\u0e2a\u0e34", False),
        ("**yes**", "yes", False),
    ],
)
def test_exact_match_holds_across_normal_forms_and_scripts(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) == exact_match(expected, answer) == same


def test_every_full_stop_of_unicode_is_one() -> None:
    named = {c for c in map(chr, range(0x110000)) if "FULL STOP" in unicodedata.name(c, "")}
    assert {c for c in named if unicodedata.category(c) == "Po"} <= set(FULL_STOPS)
    assert not set(FULL_STOPS) & set("?!\u061f\uff1f,\u3001")


def distance(expected: list[str], answer: list[str]) -> int:
    """Levenshtein's, as it is taught."""
    row = list(range(len(answer) + 1))
    for i, one in enumerate(expected, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(answer, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


# Expected and given, and the words as someone who reads the language counts them: all, and those that are wrong.
LANGUAGES: dict[str, tuple[str, str, int, int]] = {
    "English": ("Don't stop, please!", "dont stop please", 4, 2),
    "German": ("Gr\u00fc\u00dfe an M\u00fcller.", "gr\u00fcsse an muller", 3, 1),
    "French": ("L'\u00e9t\u00e9 est fini.", "l'e\u0301te\u0301 est fini", 4, 0),
    "Vietnamese, decomposed": ("Ti\u1ebfng Vi\u1ec7t", "Tie\u0302\u0301ng Vie\u0323\u0302t", 2, 0),
    "Vietnamese, another tone": ("m\u00e1 m\u00e0", "m\u00e1 m\u1ea3", 2, 1),
    "Turkish": ("\u0130stanbul \u0131l\u0131k", "\u0130STANBUL \u0131l\u0131k", 2, 0),
    "Greek": (
        "\u039f\u03b4\u03cc\u03c2 \u03b1\u03c5\u03c4\u03ae",
        "\u03bf\u03b4\u03cc\u03c3 \u03b1\u03c5\u03c4\u03b7",
        2,
        1,
    ),
    "Russian": (
        "\u0401\u043b\u043a\u0430, \u0441\u0442\u043e\u0439!",
        "\u0451\u043b\u043a\u0430 \u0441\u0442\u043e\u0438",
        2,
        1,
    ),
    "Hindi": (
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902\u0964",
        "\u0939\u0928\u0926\u0940 \u092e\u0947\u0902",
        2,
        1,
    ),
    "Bengali": (
        "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be\u0964",
        "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7",
        2,
        1,
    ),
    "Tamil": (
        "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf",
        "\u0ba4\u0bae\u0bb4 \u0bae\u0bca\u0bb4\u0bbf",
        2,
        1,
    ),
    "Arabic with vowels": (
        "\u0643\u064e\u062a\u064e\u0628\u064e \u0627\u0644\u062f\u0631\u0633",
        "\u0643\u062a\u0628 \u0627\u0644\u062f\u0631\u0633",
        2,
        1,
    ),
    "Persian with a joiner": (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0628\u0631\u0648\u0645",
        "\u0645\u06cc\u062e\u0648\u0627\u0647\u0645 \u0628\u0631\u0648",
        2,
        1,
    ),
    "Hebrew": (
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05dc\u05da",
        "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \u05dc\u05d4",
        2,
        1,
    ),
    "Korean": (
        "\ud55c\uad6d\uc5b4 \ubb38\uc7a5",
        unicodedata.normalize("NFD", "\ud55c\uad6d\uc5b4 \ubb38\uc791"),
        2,
        1,
    ),
    "Amharic": ("\u12a0\u121b\u122d\u129b \u1290\u12cd\u1362", "\u12a0\u121b\u122d\u129b \u1290\u12ed", 2, 1),
    "Georgian": (
        "\u10d3\u10d8\u10d0\u10ee, \u10d2\u10db\u10d0\u10d3\u10da\u10dd\u10d1\u10d7",
        "\u10d3\u10d8\u10d0\u10ee",
        2,
        1,
    ),
    # Written without spaces: a character with its marks is a word.
    "Chinese": ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u574f \u4e16 \u754c", 4, 1),
    "Japanese": ("\u3053\u308c\u306f\u304c\u304d\u3067\u3059", "\u3053\u308c\u306f\u304b\u304d\u3067\u3059", 7, 1),
    "Thai": ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e34", 4, 1),
    "Khmer": ("\u1797\u17b6\u179f\u17b6", "\u1797\u17b6\u179f", 2, 1),
    "Burmese": ("\u1019\u103c\u1014\u103a\u1019\u102c", "\u1019\u103c\u1014\u103a", 3, 1),
    "Lao": ("\u0ea5\u0eb2\u0ea7", "\u0ea5\u0eb2", 3, 1),
    "Chinese with English": ("\u6253\u5f00 Wi Fi \u8bbe\u7f6e", "\u6253\u5f00wi fi\u8bbe\u5907", 6, 1),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_word_errors_are_what_a_reader_of_the_language_counts(language: str) -> None:
    expected, answer, number, wrong = LANGUAGES[language]
    assert len(words(expected)) == number and distance(words(expected), words(answer)) == wrong
    assert word_error_rate([Judged("0:", [], expected, answer, False)]) == pytest.approx(wrong / number)


def test_error_rates_are_jiwers_and_english_words_are_whispers() -> None:
    jiwer = pytest.importorskip("jiwer")
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()
    pairs = [
        ("Mr. Smith (laughs) isn't here, is he?", "mister smith isnt here is he"),
        ("It costs $5.50 \u2014 or \u20ac7!", "it costs 5 50 or 7"),
        ("[music] The year 1984, A.M. & P.M.", "the year 84 am and pm"),
        ("a-b_c/d", "a b c d e"),
    ]
    judged = [Judged(f"{i}:", [], expected, answer, False) for i, (expected, answer) in enumerate(pairs)]
    for text in (text for pair in pairs for text in pair):
        assert words(text) == plain(text).split()
    texts = [" ".join(words(one)) for one, _ in pairs], [" ".join(words(other)) for _, other in pairs]
    assert word_error_rate(judged) == pytest.approx(jiwer.wer(*texts))
    assert character_error_rate(judged) == pytest.approx(jiwer.cer(*texts))


@pytest.mark.parametrize(
    ("expected", "answer", "rate"),
    [
        ("abc", "abd", 1 / 3),
        ("ab cd", "abcd", 1 / 5),
        ("\u4f60\u597d", "\u4f60 \u597d\u3002", 0),
        ("\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0e2a\u0e27\u0e2a\u0e14\u0e35", 1 / 6),
        ("caf\u00e9", "cafe\u0301", 0),
        ("a", "abc", 2),
        ("", "abc", None),
        ("?!", "", None),
    ],
)
def test_character_errors_count_letters_and_marks(expected: str, answer: str, rate: float | None) -> None:
    found = character_error_rate([Judged("0:", [], expected, answer, False)])
    assert found is rate is None or found == pytest.approx(rate)


def test_what_is_said_where_nothing_was_to_be_said_counts_as_added_words() -> None:
    judged = [Judged("0:", [], "one two", "one two", True), Judged("1:", [], "", "three", False)]
    assert word_error_rate(judged) == pytest.approx(1 / 2)


def test_a_question_that_failed_is_in_no_rate_and_is_named_with_its_row() -> None:
    judged = [
        Judged("0:a", [], "x", "x", True, ["t"]),
        Judged("1:b", [], "x", "", False, ["t"], error="no such picture"),
        Judged("2:", [], "", "", False, cut_off=True, error="not valid JSON"),
        Judged("3:d", [], "x", "xx", False, cut_off=True),
    ]
    config = EvaluationConfig(data=SourceConfig(kind="messages"), max_new_tokens=2)
    assert measured(judged, "exact_match") == {
        "exact_match": 0.5,
        "questions": 2,
        "exact_match/t": 1.0,
        "questions/t": 1,
        "failed": 2,
        "cut_off": 1,
    }
    failed, cut_off = complaints("test", judged, config)
    assert "2 of 4 questions" in failed and "row 2: no such picture; row 3: not valid JSON" in failed
    assert "1 of 2 answers were cut off at max_new_tokens (2)" in cut_off
    assert measured(judged[1:3], "exact_match") == {"questions": 0, "failed": 2, "cut_off": 0}
    assert complaints("test", judged[:1], config) == []
    (blinded,) = complaints("test", judged[:1], replace(config, media="blank"))
    assert blinded.startswith("test: no question has a medium that could be blank")


@pytest.mark.parametrize("ends", [SystemExit(1), RuntimeError("mecab-ko is not\ninstalled"), OSError("no network")])
def test_a_tokeniser_that_cannot_be_used_is_told_when_the_recipe_is_read(
    monkeypatch: pytest.MonkeyPatch, ends: BaseException
) -> None:
    tokenisers = pytest.importorskip("sacrebleu.metrics.bleu")

    def fails(name: str) -> None:
        raise ends

    monkeypatch.setattr(tokenisers, "_get_tokenizer", fails)
    with pytest.raises(ConfigError, match="tokeniser 'flores200' cannot be used here .*or give another, as 13a"):
        open_metrics([{"bleu": {"tokeniser": "flores200"}}], "evaluations.x.metrics")


def test_results_of_one_model_gather_and_those_of_another_go(tmp_path: Path) -> None:
    path, one, other = tmp_path / "evaluation.json", {"vision": "1"}, {"vision": "2"}
    seeing, blind = {"media": "as is"}, {"media": "none"}
    assert record(path, one, {"a": {"exact_match": 1.0}}, {"a": seeing}) == []
    assert record(path, one, {"b": {"exact_match": 0.5}}, {"b": blind}) == []
    assert json.loads(path.read_text())["settings"] == {"a": seeing, "b": blind}
    assert set(json.loads(path.read_text())["evaluations"]) == {"a", "b"}
    assert record(path, one, {"a": {"exact_match": 0.0}}, {"a": seeing}) == []
    assert json.loads(path.read_text())["evaluations"] == {"a": {"exact_match": 0.0}, "b": {"exact_match": 0.5}}
    (told,) = record(path, one, {"a": {"exact_match": 0.4}}, {"a": blind})
    assert told == "evaluation.json: a was of other settings before; another name keeps both"
    (told,) = record(path, other, {"b": {"exact_match": 0.1}}, {"b": blind})
    assert told == "evaluation.json: took out a, which another state of the model gave"
    assert json.loads(path.read_text())["evaluations"] == {"b": {"exact_match": 0.1}}
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]
