"""Metrics of answers that are right or wrong."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from molora.evaluate.metrics import Judged, NoOptions
from molora.evaluate.normalise import normalise


@dataclass
class ExactMatch:
    """The share of answers that equal the expected one, but for case, spaces and a closing full stop."""

    config: NoOptions
    config_type = NoOptions
    rates_each = True

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        return {"exact_match": sum(item.correct for item in judged) / len(judged)}


@dataclass
class MacroF1:
    """The mean F1 of the classes, which are the expected answers; an answer that is none of them is just a miss."""

    config: NoOptions
    config_type = NoOptions
    rates_each = True

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        expected = Counter(normalise(item.expected) for item in judged)
        answered = Counter(normalise(item.answer) for item in judged)
        right = Counter(normalise(item.expected) for item in judged if item.correct)
        scores = [2 * right[name] / (expected[name] + answered[name]) for name in expected]
        return {"macro_f1": sum(scores) / len(scores)}
