"""Answers compared, and scores by tag."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest

from molora.config import ConfigError, build
from molora.data import SourceConfig
from molora.evaluate import EvaluationConfig, Judged, bleu, exact_match, macro_f1, question, scores, word_error_rate


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [("Yes.", "yes", True), (" a  red\ncircle ", "a red circle", True), ("yes", "no", False), ("", "yes", False)],
)
def test_exact_match_ignores_case_spaces_and_a_full_stop(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) == same


def test_scores_count_by_tag() -> None:
    judged = [Judged(str(i), [], "x", "x", i < 3, ["a"] if i % 2 else ["a", "b"]) for i in range(4)]
    assert scores(judged, EvaluationConfig(data=SourceConfig(kind="messages"))) == {
        "exact_match": 0.75,
        "questions": 4,
        "exact_match/a": 0.75,
        "questions/a": 4,
        "exact_match/b": 1.0,
        "questions/b": 2,
    }


def rows(several: list[dict[str, Any]]) -> Any:
    """A list is source enough."""
    return several


def test_a_question_without_media_keeps_its_text() -> None:
    picture, text = {"type": "image", "path": "x.png"}, {"type": "text", "text": "what?"}
    row: dict[str, Any] = {
        "id": "r",
        "messages": [{"role": "user", "content": [picture, text]}, {"role": "assistant", "content": "x"}],
    }
    assert question(rows([row]), 0, without_media=True)["prompt"] == [{"role": "user", "content": [text]}]
    assert question(rows([row]), 0, without_media=False)["prompt"][0]["content"] == [picture, text]
    with pytest.raises(ValueError, match="row 1: must end with an assistant message"):
        question(rows([{"id": "r", "messages": row["messages"][:1]}]), 0, without_media=False)


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
    config = EvaluationConfig(data=SourceConfig(kind="messages"), macro_f1=True)
    assert scores(judged, config)["macro_f1"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    missed = Judged("late", [], "late", "normal", False)
    assert macro_f1([*judged, missed]) == pytest.approx((6 / 9 + 2 / 3 + 0) / 3)


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
    config = EvaluationConfig(data=SourceConfig(kind="messages"), bleu="13a")
    tagged = [replace(judged[0], tags=["cats"]), judged[1]]
    assert scores(tagged, config) == {
        "exact_match": 0.0, "bleu": bleu(judged, "13a"), "questions": 2,
        "exact_match/cats": 0.0, "bleu/cats": bleu(judged[:1], "13a"), "questions/cats": 1,
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
        build(EvaluationConfig, {"data": {"kind": "messages"}, "bleu": "jp"}, "recipe")


def test_a_missing_sacrebleu_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ImportError, match=r"BLEU needs sacrebleu: pip install 'molora\[audio\]'"):
        EvaluationConfig(data=SourceConfig(kind="messages"), bleu="13a")
