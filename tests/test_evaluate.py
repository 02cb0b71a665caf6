"""Answers compared, and scores by tag."""

from __future__ import annotations

from typing import Any

import pytest

from molora.data import SourceConfig
from molora.evaluate import EvaluationConfig, Judged, exact_match, macro_f1, question, scores, word_error_rate


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
