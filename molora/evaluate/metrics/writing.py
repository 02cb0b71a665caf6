"""Metrics of captions and summaries."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from molora.evaluate.metrics import Counted, Judged, Mean, NoOptions, ratio

_LONGEST = 4
_SIGMA = 6.0

# The words of the Penn Treebank, as far as captions have them: titles and abbreviations with their full stops, numbers,
# words with what joins them, what contractions are made of, and signs that are no punctuation.
_WORD = re.compile(
    r"(?:mr|mrs|ms|dr|prof|st|jr|sr|vs)\.|(?:[^\W\d]\.){2,}|can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|"
    r"n't\b|'(?:s|m|d|ll|re|ve)\b|'\d\ds?\b|(?:(?<!\S)[-+])?\d+(?:[.,:/]\d+)*\w*(?:-\w+)*|"
    r"\w+?(?=n't\b)|\w+(?:[-/&]\w+)*|[$%&#/*=@+()\[\]{}]"
)
# The reference leaves out signs of punctuation, but not brackets, whose names its tokenizer writes in lower case.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

Grams = Counter[tuple[str, ...]]


class Cider(Mean):
    """CIDEr-D of captions against all accepted answers of each, from 0 to 10. Rare words count more; how rare a word is
    comes from the accepted answers of the questions that are scored together.

    Source: arXiv 1411.5726, computed as by cider_scorer.py of github.com/salaniz/pycocoevalcap; its words come from
    Stanford's tokenizer, which `caption_words` follows."""

    config_type = NoOptions
    name = "cider"

    def __init__(self, config: NoOptions) -> None:
        pass

    def values(self, judged: Sequence[Judged]) -> list[float]:
        expected = [[_grams(answer) for answer in item.answers] for item in judged]
        questions = Counter(gram for each in expected for gram in set().union(*each))

        def weigh(grams: Grams) -> list[dict[tuple[str, ...], float]]:
            """The grams of a text by their length, each with its weight."""
            weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
            for gram, count in grams.items():
                weights[len(gram) - 1][gram] = count * (math.log(len(judged)) - math.log(max(1, questions[gram])))
            return weights

        values = []
        for item, each in zip(judged, expected, strict=True):
            answer = _grams(item.answer)
            weighed = weigh(answer)
            similar = [_similarity(weighed, weigh(grams), _pairs(answer) - _pairs(grams)) for grams in each]
            values.append(10 * sum(similar) / len(similar))
        return values


def _similarity(answer: Iterable[dict[tuple[str, ...], float]], expected: Iterable[dict], longer: int) -> float:
    """The mean over the lengths of grams of the clipped cosine, less for a text that is `longer` or shorter."""
    cosines = []
    for given, wanted in zip(answer, expected, strict=True):
        product = sum(min(weight, wanted.get(gram, 0.0)) * wanted.get(gram, 0.0) for gram, weight in given.items())
        norms = math.hypot(*given.values()) * math.hypot(*wanted.values())
        cosines.append(product / norms if norms else product)
    return sum(cosines) / len(cosines) * math.exp(-(longer**2) / (2 * _SIGMA**2))


def _grams(text: str) -> Grams:
    """How often each sequence of one to four words is in a text."""
    words = caption_words(text)
    sizes = range(1, _LONGEST + 1)
    return Counter(tuple(words[at : at + size]) for size in sizes for at in range(len(words) - size + 1))


def _pairs(grams: Grams) -> int:
    """The number of pairs of neighbours, which the reference takes for the length of a text."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def caption_words(text: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    words: list[str] = _WORD.findall(text.lower().replace("\u2019", "'"))
    return [_BRACKETS.get(word, word) for word in words]


@dataclass(kw_only=True)
class RougeConfig:
    """`stemmer` says whether English words are compared by their stems."""

    stemmer: bool = False


class Rouge(Counted):
    """ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum of English summaries, from 0 to 1: the mean F1, each against the
    accepted answer that gives most. Letters beyond a to z are no part of words.

    Source: ROUGE (Lin, 2004), by Google's rouge-score."""

    config_type = RougeConfig
    kinds = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    names = ("rouge_1", "rouge_2", "rouge_l", "rouge_l_sum")

    def __init__(self, config: RougeConfig) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("ROUGE needs rouge-score: pip install 'molora[metrics]'") from error
        self.scorer = RougeScorer(self.kinds, use_stemmer=config.stemmer)

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        found = (self.scorer.score_multi(item.answers, item.answer) for item in judged)
        return np.array([[*(each[kind].fmeasure for kind in self.kinds), 1.0] for each in found])

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        return {name: ratio(sums_BK[:, place], sums_BK[:, -1]) for place, name in enumerate(self.names)}
