"""Metrics of answers that are right or wrong."""

from collections.abc import Callable, Sequence

import numpy as np

from molora.evaluate.metrics import Counted, Judged, Mean, NoOptions, Weighted, ratio
from molora.evaluate.normalise import normalise


class ExactMatch(Mean):
    """The share of answers that equal one of the accepted ones, but for case, spaces and a closing full stop."""

    config_type = NoOptions
    rates_each = True
    name = share = "exact_match"

    def __init__(self, config: NoOptions) -> None:
        pass

    def values(self, judged: Sequence[Judged]) -> list[float]:
        return [float(item.correct) for item in judged]


class MacroF1(Weighted):
    """The mean F1 of the classes, which are the expected answers; an answer that is none of them is just a miss."""

    config_type = NoOptions
    rates_each = True

    def __init__(self, config: NoOptions) -> None:
        pass

    def weighted(self, judged: Sequence[Judged]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        names = [normalise(item.expected) for item in judged]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        expected_Q = np.array([numbers[name] for name in names])
        right_Q = np.array([item.correct for item in judged])
        answered = (numbers.get(normalise(item.answer), len(numbers)) for item in judged)  # the last is no class
        # An accepted answer beside the expected one is an answer with the expected one's class.
        answered_Q = np.where(right_Q, expected_Q, np.fromiter(answered, int, len(judged)))

        def count(class_Q: np.ndarray, weights_Q: np.ndarray) -> np.ndarray:
            return np.bincount(class_Q, weights_Q, len(numbers) + 1)[:-1]

        def mean_f1(weights_Q: np.ndarray) -> float:
            expected = count(expected_Q, weights_Q)
            f1 = ratio(2 * count(expected_Q, weights_Q * right_Q), expected + count(answered_Q, weights_Q))
            return float(f1[expected > 0].mean())

        return lambda weights_BQ: {"macro_f1": np.array([mean_f1(weights_Q) for weights_Q in weights_BQ])}


class YesNo(Counted):
    """Accuracy, precision, recall and F1 of yes-or-no questions, where yes counts as found, and the share of yes among
    the answers. An answer is no if its first sentence has the word no, No or not; any other is yes.

    Source: POPE, evaluate.py (arXiv 2305.10355)."""

    config_type = NoOptions
    rates_each = True
    share = "yes_no_accuracy"

    def __init__(self, config: NoOptions) -> None:
        pass

    def check_questions(self, judged: Sequence[Judged]) -> None:
        for item in judged:
            _expects_yes(item)

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        rows = []
        for item in judged:
            is_yes, says_yes = _expects_yes(item), _says_yes(item.answer)
            rows.append((is_yes and says_yes, says_yes and not is_yes, is_yes and not says_yes, 1))
        return np.array(rows)

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        found, wrong, missed, questions = sums_BK.T
        return {
            "yes_no_accuracy": ratio(questions - wrong - missed, questions),
            "yes_no_precision": ratio(found, found + wrong),
            "yes_no_recall": ratio(found, found + missed),
            "yes_no_f1": ratio(2 * found, 2 * found + wrong + missed),
            "yes_share": ratio(found + wrong, questions),
        }


def _expects_yes(item: Judged) -> bool:
    expected = normalise(item.expected)
    if expected not in ("yes", "no"):
        raise ValueError(f"question {item.id}: expects {item.expected!r:.40}; yes_no is for yes and no alone")
    return expected == "yes"


def _says_yes(answer: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)
