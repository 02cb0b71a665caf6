"""Intervals hold the true value as often as they say, whatever the metric; pairs and groups are drawn together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.evaluate.intervals import Interval, interval, medium_of, paired
from molora.evaluate.metrics import Judged, Metric, Named, NoOptions, open_metrics

SIMULATIONS = 1000
RESAMPLES = 400


def opened(named: Named) -> Metric:
    (metric,) = open_metrics([named], "metrics")
    return metric


def answered(index: int, right: bool, picture: int | None = None) -> Judged:
    content = [] if picture is None else [{"type": "image", "path": f"{picture}.png"}]
    asked = [{"role": "user", "content": [*content, {"type": "text", "text": "?"}]}]
    return Judged(f"{index}:", asked, "yes", "yes" if right else "no", right)


def alone(item: Judged) -> str:
    """The group of a question that shares nothing with another."""
    return item.id


def covered(
    simulate: Callable[[np.random.Generator, int], Sequence[float]], truth: float, times: int = SIMULATIONS
) -> float:
    """The share of simulations whose interval, low and high, holds the truth."""
    draw = np.random.default_rng(0)
    ends = [simulate(draw, seed) for seed in range(times)]
    return sum(low <= truth <= high for low, high in ends) / times


def test_the_interval_of_a_mean_covers_what_it_says() -> None:
    metric, questions = opened("exact_match"), 200
    right = [answered(index, True) for index in range(questions)]
    wrong = [answered(index, False) for index in range(questions)]

    def simulate(draw: np.random.Generator, seed: int) -> Interval:
        correct = (draw.random(questions) < 0.7).tolist()
        judged = [right[index] if correct[index] else wrong[index] for index in range(questions)]
        return interval(metric, judged, resamples=RESAMPLES, seed=seed, group=alone)["exact_match"]

    assert 0.93 <= covered(simulate, 0.7) <= 0.97


class ErrorsPerWord:
    """The rate of a corpus: errors and words of each question are numbers in its answer and its expected answer."""

    config_type = NoOptions

    def score(self, judged: Sequence[Judged]) -> Mapping[str, float]:
        return {"rate": sum(int(item.answer) for item in judged) / sum(int(item.expected) for item in judged)}


def test_the_interval_of_a_rate_over_a_corpus_covers_what_it_says() -> None:
    """A plugin's metric without weights is scored on every resample."""
    metric, questions = ErrorsPerWord(), 60

    def simulate(draw: np.random.Generator, seed: int) -> Interval:
        words = draw.integers(5, 25, questions)
        errors = draw.binomial(words, 0.1)
        judged = [Judged(f"{i}:", [], str(words[i]), str(errors[i]), False) for i in range(questions)]
        return interval(metric, judged, resamples=100, seed=seed, group=alone)["rate"]

    assert 0.92 <= covered(simulate, 0.1, times=200) <= 0.98


def test_questions_about_one_picture_are_drawn_together_and_cover_what_they_say() -> None:
    metric, pictures, questions_each = opened("exact_match"), 60, 3
    both = [
        [answered(index, right, index // questions_each) for index in range(pictures * questions_each)]
        for right in (False, True)
    ]

    picture_of = {item.id: medium_of(item) for item in both[0]}

    def simulate(draw: np.random.Generator, seed: int, group: Mapping[str, Any] = picture_of) -> Interval:
        chance = draw.beta(1, 1, pictures).repeat(questions_each)  # an easy picture is easy for all its questions
        judged = [both[int(draw.random() < chance[index])][index] for index in range(len(chance))]
        drawn = interval(metric, judged, resamples=RESAMPLES, seed=seed, group=lambda item: group[item.id])
        return drawn["exact_match"]

    assert 0.93 <= covered(simulate, 0.5) <= 0.97
    id_of = {id: id for id in picture_of}
    assert covered(lambda draw, seed: simulate(draw, seed, id_of), 0.5, times=200) < 0.91


def test_a_difference_of_two_models_covers_what_it_says_and_is_narrower_for_pairs() -> None:
    metric, questions = opened("exact_match"), 200
    both = [[answered(index, right) for index in range(questions)] for right in (False, True)]
    widths = []

    def simulate(draw: np.random.Generator, seed: int) -> Sequence[float]:
        hard = draw.random(questions) < 0.5  # hard questions are hard for both
        one, other = (
            draw.random(questions) < np.where(hard, 0.3, 0.95),
            draw.random(questions) < np.where(hard, 0.2, 0.9),
        )
        judged, against = ([both[int(side[index])][index] for index in range(questions)] for side in (one, other))
        found = paired(metric, judged, against[::-1], resamples=RESAMPLES, seed=seed, group=alone)["exact_match"]
        assert found.value == pytest.approx(one.mean() - other.mean())
        assert found.low is not None and found.high is not None
        if seed < 20:
            single = interval(metric, judged, resamples=RESAMPLES, seed=seed, group=alone)["exact_match"]
            widths.append((found.high - found.low) / ((single.high - single.low) * 2**0.5))
        return found.low, found.high

    assert 0.93 <= covered(simulate, 0.075) <= 0.97
    assert np.mean(widths) < 0.85


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "its", "home", "near", "our", "old", "barn"]


def texts(number: int) -> list[Judged]:
    draw = np.random.default_rng(1)
    items = []
    for index in range(number):
        expected = list(draw.choice(WORDS, draw.integers(4, 12)))
        answer = [word if draw.random() < 0.8 else "owl" for word in expected]
        expected, answer = " ".join(expected), " ".join(answer)
        items.append(Judged(f"{index}:", [], expected, answer, expected == answer))
    return items


@pytest.mark.parametrize(
    "named", ["word_error_rate", "character_error_rate", "bleu", "chrf", "macro_f1", "exact_match", "rouge"]
)
def test_weights_are_what_scoring_the_repeated_answers_gives(named: str) -> None:
    """What resamples weigh is the metric itself: a question counted twice is as two equal questions."""
    pytest.importorskip({"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu"}.get(named, "jiwer"))
    metric: Any = opened(named)
    judged = texts(12)
    weights_BQ = np.random.default_rng(2).integers(0, 3, (5, 12)).astype(float)
    weighed = metric.weighted(judged)(weights_BQ)
    for place, weights_Q in enumerate(weights_BQ):
        repeated = [item for item, times in zip(judged, weights_Q, strict=True) for _ in range(int(times))]
        assert {name: values_B[place] for name, values_B in weighed.items()} == pytest.approx(metric.score(repeated))


def test_what_cannot_be_counted_has_no_interval() -> None:
    metric = opened("yes_no")
    no = [answered(index, False) for index in range(4)]
    found = interval(metric, [*no, answered(4, True)])
    assert found["yes_no_accuracy"].low == 0.0 < found["yes_no_accuracy"].high
    assert "yes_no_precision" not in found, "where yes was said at all, it was right, which says nothing"
    assert "yes_no_precision" not in interval(metric, no)
    assert interval(metric, no[:1]) == {} == interval(metric, [])
    same_picture = [answered(index, index > 1, picture=0) for index in range(4)]
    assert interval(metric, same_picture) == {}


def wilson(right: int, questions: int, truth: float) -> float:
    """By how many standard errors of the truth a share is off it, squared."""
    return (right / questions - truth) ** 2 / (truth * (1 - truth) / questions)


def tango(above: int, below: int, pairs: int, truth: float) -> float:
    """The same for a difference of pairs, of which some are above and some below, by the likeliest shares of both."""
    b, c = -above - below + (2 * pairs - above + below) * truth, -below * truth * (1 - truth)
    lower = ((b * b - 8 * pairs * c) ** 0.5 - b) / (4 * pairs)
    return (above - below - pairs * truth) ** 2 / (pairs * (2 * lower + truth * (1 - truth)))


@pytest.mark.parametrize("level", [0.95, 0.8])
@pytest.mark.parametrize("questions", [2, 20, 500])
def test_where_all_answers_are_alike_a_share_has_its_score_interval(questions: int, level: float) -> None:
    metric = opened("exact_match")
    squared = {0.95: 1.959964, 0.8: 1.281552}[level] ** 2
    right, wrong = ([answered(index, is_right) for index in range(questions)] for is_right in (True, False))
    low, high = interval(metric, right, level=level)["exact_match"]
    assert high == 1 and wilson(questions, questions, low) == pytest.approx(squared, rel=1e-5)
    assert interval(metric, wrong, level=level)["exact_match"] == (0, pytest.approx(1 - low))
    value, low, high = paired(metric, right, wrong, level=level)["exact_match"]
    assert (value, high) == (1, 1) and low is not None
    assert tango(questions, 0, questions, low) == pytest.approx(squared, rel=1e-5)
    assert paired(metric, wrong, right, level=level)["exact_match"] == (-1, -1, pytest.approx(-low))
    for same in (right, wrong):
        value, low, high = paired(metric, same, same, level=level)["exact_match"]
        assert value == 0 and high is not None and low == -high
        assert tango(0, 0, questions, high) == pytest.approx(squared, rel=1e-5)
    same_pictures = [answered(index, True, picture=index // 2) for index in range(2 * questions)]
    assert interval(metric, same_pictures, level=level) == interval(metric, right, level=level), "a picture counts once"


def test_a_number_that_is_no_share_and_the_same_everywhere_has_no_interval() -> None:
    pytest.importorskip("jiwer")
    metric, judged = opened("word_error_rate"), [answered(index, True) for index in range(20)]
    assert interval(metric, judged) == {}
    assert paired(metric, judged, judged) == {"word_error_rate": (0, None, None)}
    assert interval(opened("macro_f1"), judged) == {}, "of one class"
    assert interval(opened("anls"), judged)["anls"].high == 1


def test_the_seed_settles_the_draws_and_the_level_the_width() -> None:
    pytest.importorskip("sacrebleu")
    metric, judged = opened("chrf"), texts(50)
    first = interval(metric, judged)["chrf"]
    assert first == interval(metric, judged)["chrf"] != interval(metric, judged, seed=1)["chrf"]
    narrow = interval(metric, judged, level=0.5)["chrf"]
    assert first.low < narrow.low < narrow.high < first.high


def test_answers_to_other_questions_are_not_compared() -> None:
    judged = [answered(index, True) for index in range(3)]
    with pytest.raises(ValueError, match="1 questions are answered on one side alone, such as 2:"):
        paired(opened("exact_match"), judged, judged[:2])


def test_what_questions_share_is_their_media_by_place_or_content() -> None:
    one, other = answered(0, True, 1), answered(1, False, 1)
    assert medium_of(one) == medium_of(other) != medium_of(answered(2, True, 2))
    assert medium_of(answered(3, True)) != medium_of(answered(4, True))

    def shown(id: str, **medium: Any) -> Any:
        return medium_of(Judged(id, [{"role": "user", "content": [{"type": "image", **medium}]}], "yes", "yes", True))

    grey, white = (Image.new("L", (2, 2), colour) for colour in (128, 255))
    for key, value, same, different in (
        ("base64", "aGk=", "aGk=", "aG8="),
        ("bytes", b"hi", b"hi", b"ho"),
        ("image", grey, grey.copy(), white),
        ("array", np.zeros(3), np.zeros(3), np.ones(3)),
        ("image", {"bytes": b"hi", "path": "0.png"}, {"path": "0.png", "bytes": b"hi"}, {"bytes": b"ho", "path": None}),
    ):
        assert shown("0:", **{key: value}) == shown("1:", **{key: same}) != shown("2:", **{key: different})
    assert shown("0:", path="0.png", bytes=b"hi") != shown("1:", path="0.png", bytes=b"ho")
