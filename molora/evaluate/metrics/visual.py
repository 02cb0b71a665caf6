"""Metrics of questions about pictures, documents and charts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from molora.config import ConfigError
from molora.evaluate.metrics import Judged, Mean, NoOptions

_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")
_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
# Words that the reference gives their apostrophe back, where exactly one is left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


class VqaAccuracy(Mean):
    """The accuracy of VQAv2: an answer that three people gave is right, and one that fewer gave is partly right,
    averaged over all choices of nine of the ten people. Case, articles, signs and words for numbers do not count.

    Source: VQAv2, vqaEval.py of github.com/GT-Vision-Lab/VQA (arXiv 1505.00468)."""

    config_type = NoOptions
    rates_each = True
    name = share = "vqa_accuracy"

    def __init__(self, config: NoOptions) -> None:
        self.whole = dict(_without_one_apostrophe(_CONTRACTIONS.split()))
        self.whole["somebody'd"] = "somebodyd"  # as the reference has it

    def values(self, judged: Sequence[Judged]) -> list[float]:
        self.check_questions(judged)
        return [self.value(item) for item in judged]

    def check_questions(self, judged: Sequence[Judged]) -> None:
        for item in judged:
            if len(item.answers) < 2:
                raise ValueError(
                    f"question {item.id}: has {len(item.answers)} answer; vqa_accuracy needs those of several people, "
                    "as `answers` of the row"
                )

    def value(self, item: Judged) -> float:
        answers = item.answers
        if len(set(answers)) > 1:
            answers = [_without_signs(answer) for answer in answers]
        same = answers.count(self.plain(item.answer))
        left, others = min(1, (same - 1) / 3), min(1, same / 3)
        return (same * left + (len(answers) - same) * others) / len(answers)

    def plain(self, answer: str) -> str:
        """An answer as it is compared."""
        words = _without_signs(re.sub(r"[\n\t]", " ", answer).strip()).lower().split()
        digits = (_DIGITS.get(word, word) for word in words)
        return " ".join(self.whole.get(word, word) for word in digits if word not in _ARTICLES)


def _without_one_apostrophe(words: Iterable[str]) -> Iterable[tuple[str, str]]:
    for word in words:
        yield from ((word[: found.start()] + word[found.end() :], word) for found in re.finditer("'", word))


def _without_signs(text: str) -> str:
    """Signs go where a space is beside one of them or a comma is inside a number, and become spaces elsewhere."""
    found, all_go = text, re.search(r"\d,\d", text) is not None
    for sign in _SIGNS:
        goes = all_go or f"{sign} " in text or f" {sign}" in text
        found = found.replace(sign, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", found)


@dataclass(kw_only=True)
class AnlsConfig:
    """`threshold` is the similarity below which an answer counts for nothing."""

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}; give a similarity from 0 to 1")


class Anls(Mean):
    """The average normalised Levenshtein similarity of DocVQA, to the nearest of the accepted answers, without case.

    Source: arXiv 1907.00490; where an answer is exactly as similar as the threshold says, it counts, as in the script
    of the Robust Reading Competition."""

    config_type = AnlsConfig
    rates_each = True
    name = share = "anls"

    def __init__(self, config: AnlsConfig) -> None:
        self.threshold = config.threshold
        try:
            from rapidfuzz.distance.Levenshtein import distance
        except ImportError as error:
            raise ImportError("ANLS needs rapidfuzz: pip install 'molora[metrics]'") from error
        self.distance = distance

    def values(self, judged: Sequence[Judged]) -> list[float]:
        found = (max(self.similarity(item.answer, each) for each in item.answers) for item in judged)
        return [value if value >= self.threshold else 0.0 for value in found]

    def similarity(self, answer: str, expected: str) -> float:
        longer = max(len(answer.upper()), len(expected.upper())) or 1  # with the spaces that the distance leaves out
        return 1 - self.distance(*(" ".join(text.lower().split()) for text in (answer, expected))) / longer


@dataclass(kw_only=True)
class RelaxedAccuracyConfig:
    """`tolerance` is the share of the expected number by which an answer may be off. `read` says what the answer is:
    `whole`, or `final`: what follows the last "answer is" or "answer:", for a model that reasons before it answers."""

    tolerance: float = 0.05
    read: Literal["whole", "final"] = "whole"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ConfigError(f"tolerance is {self.tolerance}; give a share from 0 to below 1")


class RelaxedAccuracy(Mean):
    """The relaxed accuracy of ChartQA: a number is right if it is near the expected one, and other answers if they are
    equal without case. A per cent sign divides by 100; an expected 0 is compared as text.

    Source: ChartQA (arXiv 2203.10244), computed as by metrics.py of github.com/google-research/pix2struct."""

    config_type = RelaxedAccuracyConfig
    rates_each = True
    name = share = "relaxed_accuracy"

    def __init__(self, config: RelaxedAccuracyConfig) -> None:
        self.config = config

    def values(self, judged: Sequence[Judged]) -> list[float]:
        answers = (final_answer(item.answer) if self.config.read == "final" else item.answer for item in judged)
        pairs = zip(judged, answers, strict=True)
        return [float(any(self.is_right(answer, each) for each in item.answers)) for item, answer in pairs]

    def is_right(self, answer: str, expected: str) -> bool:
        given, wanted = _number(answer), _number(expected)
        if given is not None and wanted:
            return abs(given - wanted) / abs(wanted) <= self.config.tolerance
        return answer.lower() == expected.lower()


def final_answer(text: str) -> str:
    """What follows the last "answer is" or "answer:" in its line, or the whole text, without marks around it."""
    before, *found = re.split(r"answer(?:\s+is|:)", text, flags=re.IGNORECASE)
    answer = found[-1].lstrip(" \t\n:*").partition("\n")[0] if found else before
    return answer.strip().removesuffix(".").strip("* ")


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
