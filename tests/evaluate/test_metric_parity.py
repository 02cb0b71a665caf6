"""Built-in metrics give the figures of the code that their authors published, to the last digit that it prints.

Where that code is no library, its figures for these answers were computed with it and stand here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.evaluate.metrics import Judged, Named, open_metrics, scores
from molora.evaluate.metrics.writing import caption_words
from molora.evaluate.normalise import exact_match


def judged(answer: str, *accepted: str, id: str = "0:", **more: Any) -> Judged:
    correct = any(exact_match(answer, each) for each in accepted)
    return Judged(id, [], accepted[0], answer, correct, answers=list(accepted), **more)


def measured(items: list[Judged], *named: Named) -> dict[str, float]:
    found = scores(items, open_metrics(named, "metrics"))
    return {name: value for name, value in found.items() if name not in ("questions", "failed", "cut_off")}


# Figures of vqaEval.py of GT-Vision-Lab/VQA at c4e6a0e.
VQA = [
    ("red", ["red"] * 10, 1.0),
    ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
    ("red", ["red"] * 2 + ["dark red"] * 8, 0.6),
    ("red", ["red"] + ["blue"] * 9, 0.3),
    ("The Two Dogs!", ["2 dogs"] * 4 + ["two dogs"] * 6, 1.0),
    ("it isnt", ["it isn't"] * 5 + ["no"] * 5, 1.0),
    ("1,000", ["1000"] * 9 + ["1,000"], 1.0),
    ("left/right", ["left right"] * 2 + ["left/right"] * 2 + ["left"] * 6, 1.0),
    ("t-shirt", ["t shirt"] * 10, 1.0),
    ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1.0),
    ("u.s.", ["us"] * 6 + ["usa"] * 4, 1.0),
    ("2.5", ["2.5"] * 10, 1.0),
    ("none", ["0"] * 3 + ["none"] * 7, 0.9),
    ("a", ["a"] * 10, 0.0),
    ("whats up", ["what's up"] * 2 + ["hi"] * 8, 0.6),
]


@pytest.mark.parametrize(("answer", "accepted", "value"), VQA)
def test_vqa_accuracy_is_that_of_vqav2(answer: str, accepted: list[str], value: float) -> None:
    assert measured([judged(answer, *accepted)], "vqa_accuracy") == {"vqa_accuracy": pytest.approx(value, abs=1e-12)}


def test_vqa_accuracy_is_the_mean_over_questions_and_needs_the_answers_of_several_people() -> None:
    items = [judged(answer, *accepted, id=f"{i}:") for i, (answer, accepted, _) in enumerate(VQA)]
    assert measured(items, "vqa_accuracy") == {"vqa_accuracy": pytest.approx(0.82)}
    with pytest.raises(ValueError, match="question 7:x: has 1 answer; vqa_accuracy needs those of several people"):
        measured([judged("red", "red", id="7:x")], "vqa_accuracy")


# Figures of `anls` of lmms-eval 0.7.3, api/metrics.py, which is the script of the competition.
ANLS = [
    ("Crown Prince", ["crown prince"], 1.0),
    ("crown princes", ["Crown Prince", "king"], 1 - 1 / 13),
    ("abcd", ["abxy"], 0.5),
    ("abc", ["axy"], 0.0),
    ("a  b", ["a b"], 1.0),
    ("", [""], 1.0),
    ("12/05/1998", ["12/06/1998", "12.05.98"], 0.9),
]


@pytest.mark.parametrize(("answer", "accepted", "value"), ANLS)
def test_anls_is_that_of_docvqa(answer: str, accepted: list[str], value: float) -> None:
    assert measured([judged(answer, *accepted)], "anls") == {"anls": pytest.approx(value, abs=1e-12)}


def test_the_threshold_of_anls_is_an_option() -> None:
    assert measured([judged("abc", "axy")], {"anls": {"threshold": 0.3}}) == {"anls": pytest.approx(1 / 3)}
    with pytest.raises(ConfigError, match="anls: .*threshold is 50.0; give a similarity from 0 to 1"):
        open_metrics([{"anls": {"threshold": 50}}], "recipe")


# What relaxed_correctness of pix2struct's metrics.py says.
RELAXED = [
    ("105", "100", True),
    ("105.01", "100", False),
    ("95", "100", True),
    ("5%", "0.05", True),
    ("5", "5%", False),
    ("0", "0", True),
    ("0.0", "0", False),
    ("1e2", "100", True),
    ("1,000", "1000", False),
    ("Blue", "blue", True),
    ("-96", "-100", True),
    ("nan", "100", False),
    ("blue.", "blue", False),
]


@pytest.mark.parametrize(("answer", "expected", "right"), RELAXED)
def test_relaxed_accuracy_is_that_of_chartqa(answer: str, expected: str, right: bool) -> None:
    assert measured([judged(answer, expected)], "relaxed_accuracy") == {"relaxed_accuracy": float(right)}


def test_relaxed_accuracy_can_read_what_follows_the_reasoning() -> None:
    reasoned = "2010 has 40 and 2011 has 2 more.\n**Answer:** **42**."
    assert measured([judged(reasoned, "42")], "relaxed_accuracy") == {"relaxed_accuracy": 0.0}
    for answer in (
        reasoned,
        "I think the answer is 41.",
        "The answer is: 43",
        "42",
        "answer is 7. No, the answer is 42",
        "Answer:\n42",
    ):
        assert measured([judged(answer, "42")], {"relaxed_accuracy": {"read": "final"}}) == {"relaxed_accuracy": 1.0}
    narrow: Named = {"relaxed_accuracy": {"tolerance": 0.01, "read": "final"}}
    assert measured([judged("The answer is 41", "42", "41")], narrow) == {"relaxed_accuracy": 1.0}
    assert measured([judged("The answer is 41", "42")], narrow) == {"relaxed_accuracy": 0.0}


OPTIONS = ["a red fox", "blue", "12", "green tea"]
# MMMU's parse_multi_choice_response finds the same in the first seven, and guesses in all others.
NAMED = [
    ("The answer is (B) since (C) is no colour, so (B).", 1),
    ("I think B is right , or C , no , it is D", 3),
    ("B.", 1),
    ("It could be C or A \u2014 A it is", 0),
    ("the picture shows a cup of green tea on a table", 3),
    ("one may say blue first, but the cup holds green tea", 3),
    ("(A) or (D)?", 3),
    ("blue", 1),
    ("Blue.", 1),
    ("b", 1),
    ("D) green tea", 3),
    ("C: twelve", 2),
    ("It is blue", 1),
    ("I do not know", None),
    ("", None),
    ("Before", None),
]


@pytest.mark.parametrize(("answer", "found"), NAMED)
def test_multiple_choice_finds_the_option_that_an_answer_names(answer: str, found: int | None) -> None:
    for choice in range(len(OPTIONS)):
        item = judged(answer, OPTIONS[choice], choices=OPTIONS, choice=choice)
        wanted = {"multiple_choice": float(found == choice), "no_choice": float(found is None)}
        assert measured([item], "multiple_choice") == wanted


def test_an_open_question_among_multiple_choice_counts_by_exact_match() -> None:
    options = judged("B", OPTIONS[1], choices=OPTIONS, choice=1)
    asked = [options, judged("42", "42", id="3:q"), judged("41", "42", id="4:q")]
    assert measured(asked, "multiple_choice") == {"multiple_choice": pytest.approx(2 / 3), "no_choice": 0.0}
    with pytest.raises(ValueError, match="question 3:q: choice is 4 of 2 choices; .*needs the options of the row"):
        measured([judged("B", "B", id="3:q", choices=["a", "b"], choice=4)], "multiple_choice")


def test_choices_are_compared_by_likelihood_as_lm_eval_does() -> None:
    # acc takes the largest log-probability; acc_norm divides by the characters.
    item = judged("", "ab", choices=["ab", "abcdefghij"], choice=0, likelihoods=[(-4.0, 2), (-5.0, 3)])
    other = judged("", "B", id="1:", choices=["x", "y"], choice=1, likelihoods=[(-2.0, 1), (-1.0, 1)])
    assert measured([item, other], "choice_likelihood") == {"choice_likelihood": 1.0}
    for per, first in (("character", 0.0), ("token", 0.0)):
        assert measured([item, other], {"choice_likelihood": {"per": per}}) == {
            f"choice_likelihood_per_{per}": (first + 1) / 2
        }
    with pytest.raises(ValueError, match="question 0:: has 0 likelihoods of 2 choices"):
        measured([judged("", "ab", choices=["ab", "c"], choice=0)], "choice_likelihood")
    with pytest.raises(
        ValueError, match="expects 'the first', which is neither the right option, 'ab', nor its letter, A"
    ):
        measured([judged("", "the first", choices=["ab", "c"], choice=0)], "choice_likelihood")


def test_yes_and_no_are_counted_as_pope_counts_them() -> None:
    pairs = [
        *([("yes", "Yes, there is.")] * 5),
        *([("yes", "There is no dog. Yes.")] * 3),
        *([("no", "No")] * 4),
        *([("no", "It is not there")] * 2),
        *([("no", "nope")] * 2),
    ]
    items = [judged(answer, expected, id=f"{i}:") for i, (expected, answer) in enumerate(pairs)]
    assert measured(items, "yes_no") == {
        "yes_no_accuracy": 11 / 16, "yes_no_precision": 5 / 7, "yes_no_recall": 5 / 8, "yes_no_f1": 2 / 3,
        "yes_share": 7 / 16,
    }  # fmt: skip
    assert "yes_no_precision" not in measured([judged("No", "no")], "yes_no")
    with pytest.raises(ValueError, match="question 0:: expects 'maybe'; yes_no is for yes and no alone"):
        measured([judged("yes", "maybe")], "yes_no")


SPOKEN = [
    (
        "Mr. Smith's colour isn't grey, he paid twenty five dollars.",
        "mister smith is color is not gray he paid $25",
    ),
    (
        "I'm gonna organise it (laughs), um, on the 3rd of May 1,984.",
        "i am going to organize it on the third of may 1984",
    ),
    ("She won't have been there at five thirty p.m.", "she will not have been their at 530 pm"),
    ("[music] Hello -- world!", "hello word"),
]


@pytest.mark.parametrize(
    ("normaliser", "words", "characters"),
    [
        ("whisper_english", 0.11764705882352941, 0.027972027972027972),
        ("basic", 0.6578947368421053, 0.389937106918239),
        ("none", 0.8571428571428571, 0.5240641711229946),
    ],
)
def test_error_rates_are_jiwers_over_what_whispers_normalisers_give(
    normaliser: str, words: float, characters: float, tmp_path: Path
) -> None:
    """Figures of jiwer 4.0 over the normalisers of openai-whisper 20250625."""
    pytest.importorskip("jiwer")
    spellings = {"colour": "color", "grey": "gray", "organise": "organize"}
    (tmp_path / "normalizer.json").write_text(json.dumps(spellings))
    options = {"normaliser": normaliser, "spellings": str(tmp_path)}
    items = [judged(answer, expected, id=f"{i}:") for i, (expected, answer) in enumerate(SPOKEN)]
    assert measured(items, {"word_error_rate": options}, {"character_error_rate": options}) == {
        "word_error_rate": pytest.approx(words, abs=1e-12),
        "character_error_rate": pytest.approx(characters, abs=1e-12),
    }


def test_whispers_spellings_that_are_not_there_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jiwer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named: Named = {"word_error_rate": {"normaliser": "whisper_english", "spellings": "openai/no-such-model"}}
    with pytest.raises(ConfigError, match="word_error_rate: spellings: no normalizer.json of 'openai/no-such-model'"):
        open_metrics([named], "recipe")
    (tmp_path / "normalizer.json").write_text("{")
    named["word_error_rate"]["spellings"] = str(tmp_path)
    with pytest.raises(ConfigError, match="give a folder that has it"):
        open_metrics([named], "recipe")


CAPTIONS = [
    ("A woman stands in the dining area at the table.", [
        "A room with chairs, a table, and a woman in it.", "A woman standing in a kitchen by a window",
        "A person standing at a table in a room.", "A living area with a television and a table",
    ]),
    ("A big brown bear's asleep on the grass", [
        "A bear doesn't move on the green grass.", "A big bear lies on the grass", "The brown bear (asleep) rests.",
        "Grass with a bear on it",
    ]),
    ("a man rides a well-worn bicycle", [
        "A man on a bicycle.", "A man rides a bicycle down a street", "Someone is riding a well-worn bicycle",
        "A cyclist in the street",
    ]),
]  # fmt: skip


def test_cider_is_that_of_pycocoevalcap() -> None:
    """Figures of PTBTokenizer and Cider of pycocoevalcap 1.2."""
    items = [judged(answer, *accepted, id=f"{i}:") for i, (answer, accepted) in enumerate(CAPTIONS)]
    assert measured(items, "cider") == {"cider": pytest.approx(1.6562483692495353, abs=1e-12)}


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog doesn't like the well-lit black-and-white room.",
         "a man 's dog does n't like the well-lit black-and-white room"),
        ("It's 5:30 p.m. and she's on U.S. Route 66!", "it 's 5:30 p.m. and she 's on u.s. route 66"),
        ("A red/blue bus (number 7) costs $3.50, i.e. 50% off.",
         "a red/blue bus -lrb- number 7 -rrb- costs $ 3.50 i.e. 50 % off"),
        ("two t-shirts & a 'stop' sign", "two t-shirts & a stop sign"),
        ("Don't cannot gonna wanna", "do n't can not gon na wan na"),
        ("Mr. Smith's cat -- the 1980's look... isn't it?", "mr. smith 's cat the 1980 's look is n't it"),
        ("A dog\u2019s bowl \u2014 \"hello\" caf\u00e9", "a dog 's bowl hello caf\u00e9"),
        ("a 5-year-old's cake; a man w/ hat", "a 5-year-old 's cake a man w / hat"),
        ("he'll I'd we've they're I'm", "he 'll i 'd we 've they 're i 'm"),
    ],
)  # fmt: skip
def test_the_words_of_captions_are_those_of_stanfords_tokenizer(caption: str, words: str) -> None:
    """What PTBTokenizer of pycocoevalcap 1.2 makes of them."""
    assert " ".join(caption_words(caption)) == words


TRANSLATED = [
    ("The dog bit the man.", ["The dog bit the man.", "The dog had bitten the man."]),
    ("It wasn't surprising.", ["It was not unexpected.", "No one was surprised."]),
    ("The man had just bitten him.", ["The man bit him first."]),
]


@pytest.mark.parametrize(
    ("named", "library"),
    [
        ("bleu", ("bleu", "BLEU", {})),
        ("chrf", ("chrf", "CHRF", {})),
        ({"chrf": {"word_order": 2}}, ("chrf", "CHRF", {"word_order": 2})),
    ],
)
def test_bleu_and_chrf_are_sacrebleus_over_all_accepted_answers(named: Named, library: tuple[str, str, Any]) -> None:
    module, cls, options = library
    metric = getattr(pytest.importorskip(f"sacrebleu.metrics.{module}"), cls)(**options)
    items = [judged(answer, *accepted, id=f"{i}:") for i, (answer, accepted) in enumerate(TRANSLATED)]
    streams = [[accepted[0] for _, accepted in TRANSLATED], [*(a[1] for _, a in TRANSLATED[:2]), None]]
    wanted = metric.corpus_score([answer for answer, _ in TRANSLATED], streams).score
    assert measured(items, named) == {module: wanted} and 0 < wanted < 100


def test_rouge_is_googles() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    kinds = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_l_sum": "rougeLsum"}
    texts = [("The cats sat down.\nThey slept.", ["The cat sat.\nIt slept.", "The cats slept down there"]),
             ("A dog ran home", ["Dogs run home"])]  # fmt: skip
    items = [judged(answer, *accepted, id=f"{i}:") for i, (answer, accepted) in enumerate(texts)]
    for stemmer in (False, True):
        google = scorer.RougeScorer(list(kinds.values()), use_stemmer=stemmer)
        found = [google.score_multi(accepted, answer) for answer, accepted in texts]
        assert measured(items, {"rouge": {"stemmer": stemmer}}) == {
            name: pytest.approx(sum(each[kind].fmeasure for each in found) / 2) for name, kind in kinds.items()
        }
