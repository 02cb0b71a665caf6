"""Evaluation by generation: the model answers, the answers are compared."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import gather_object

from molora.config import require
from molora.data import Source, SourceConfig
from molora.generate import GenerationConfig, generate
from molora.model import MoLoRA
from molora.pack import Sample
from molora.processor import Processor


@dataclass(kw_only=True)
class EvaluationConfig:
    """Questions to answer. `without_media` leaves the media parts out, to see what the text alone gives away;
    `word_errors` adds the word error rate, for transcripts; `macro_f1` the mean F1 over the expected answers, each
    answer a class; `bleu` names the tokeniser of sacrebleu to count BLEU with, for translations: 13a, or for a language
    without spaces its own, such as zh and ja-mecab."""

    data: SourceConfig
    max_new_tokens: int = 16
    max_running_samples: int = 128
    without_media: bool = False
    word_errors: bool = False
    macro_f1: bool = False
    bleu: str | None = None

    def __post_init__(self) -> None:
        require(self, 1, "max_new_tokens", "max_running_samples")
        if self.bleu is not None:
            bleu_metric(self.bleu)  # what it lacks is said before the model answers, not after


@dataclass(kw_only=True)
class Evaluations:
    """What `molora eval` reads of a config, which may be a recipe."""

    evaluations: dict[str, EvaluationConfig]


@dataclass(frozen=True)
class Judged:
    """One answered question."""

    id: str
    messages: list[dict[str, Any]]
    expected: str
    answer: str
    correct: bool
    tags: list[str] = field(default_factory=list)


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing full stop: what exact match ignores."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def exact_match(answer: str, expected: str) -> bool:
    return normalise(answer) == normalise(expected)


def judge(
    model: MoLoRA,
    processor: Processor,
    source: Source,
    config: EvaluationConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> list[Judged]:
    """Answers this rank's share of the questions, in order. The last assistant message is the expected answer."""
    rows: dict[str, dict[str, Any]] = {}

    def prompts() -> Iterator[Sample]:
        for index in range(rank, len(source), ranks):
            row = question(source, index, config.without_media)
            rows[row["id"]] = row
            yield processor.encode(row["prompt"], row["id"], generate=True)

    answers: dict[str, list[int]] = defaultdict(list)
    decoding = GenerationConfig(max_new_tokens=config.max_new_tokens, max_running_samples=config.max_running_samples)
    for step in generate(model, prompts(), decoding):
        if step.finished != "stop":
            answers[step.id].append(step.token_id)
        if step.finished:
            advance()
    judged = []
    for id, row in rows.items():
        answer = processor.decode(answers[id]).strip()
        judged.append(
            Judged(id, row["prompt"], row["expected"], answer, exact_match(answer, row["expected"]), row["tags"])
        )
    return judged


def question(source: Source, index: int, without_media: bool) -> dict[str, Any]:
    """Splits a row into prompt and expected answer; the id gains the row number, so that it is unique."""
    row = source[index]
    *prompt, last = row["messages"]
    if last["role"] != "assistant" or not prompt:
        raise ValueError(f"evaluation row {index + 1}: must end with an assistant message, the expected answer")
    if without_media:
        prompt = [
            m if isinstance(m["content"], str) else {**m, "content": [p for p in m["content"] if p["type"] == "text"]}
            for m in prompt
        ]
    expected = last["content"]
    if not isinstance(expected, str):
        expected = "".join(part["text"] for part in expected if part["type"] == "text")
    return {"id": f"{index}:{row['id']}", "prompt": prompt, "expected": expected, "tags": row.get("tags", [])}


def scores(judged: list[Judged], config: EvaluationConfig) -> dict[str, float]:
    """Rates over all questions and over those of each tag, with the counts."""
    by_tag: dict[str, list[Judged]] = {"": judged}
    for item in judged:
        for tag in item.tags:
            by_tag.setdefault(tag, []).append(item)
    results: dict[str, float] = {}
    for tag, items in by_tag.items():
        suffix = f"/{tag}" if tag else ""
        results[f"exact_match{suffix}"] = sum(item.correct for item in items) / max(1, len(items))
        if config.word_errors:
            results[f"word_error_rate{suffix}"] = word_error_rate(items)
        if config.macro_f1:
            results[f"macro_f1{suffix}"] = macro_f1(items)
        if config.bleu is not None:
            results[f"bleu{suffix}"] = bleu(items, config.bleu)
        results[f"questions{suffix}"] = len(items)
    return results


def word_error_rate(judged: Sequence[Judged]) -> float:
    """Wrong, missing and added words for each expected one, by jiwer, after Whisper's basic normalisation (lower case,
    no punctuation). Raises ImportError without the `audio` extra."""
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("word error rates need jiwer: pip install 'molora[audio]'") from error
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    plain = BasicTextNormalizer()
    return jiwer.wer([plain(item.expected).strip() for item in judged], [plain(item.answer).strip() for item in judged])


def macro_f1(judged: Sequence[Judged]) -> float:
    """The mean F1 of the classes, which are the expected answers; an answer that is none of them is just a miss."""
    expected = Counter(normalise(item.expected) for item in judged)
    answered = Counter(normalise(item.answer) for item in judged)
    right = Counter(normalise(item.expected) for item in judged if item.correct)
    return sum(2 * right[name] / (expected[name] + answered[name]) for name in expected) / max(1, len(expected))


def bleu(judged: Sequence[Judged], tokeniser: str) -> float:
    """BLEU of all answers together against one expected answer each, from 0 to 100, by sacrebleu."""
    answers, expected = [item.answer for item in judged], [item.expected for item in judged]
    return bleu_metric(tokeniser).corpus_score(answers, [expected]).score


def bleu_metric(tokeniser: str) -> Any:
    """sacrebleu's BLEU. Raises ImportError without the `audio` extra, ValueError for a tokeniser it does not have."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'molora[audio]'") from error
    if tokeniser not in BLEU.TOKENIZERS:
        raise ValueError(f"bleu: sacrebleu has no tokeniser {tokeniser!r}; it has {', '.join(BLEU.TOKENIZERS)}")
    return BLEU(tokenize=tokeniser)


def gathered(judged: list[Judged]) -> list[Judged]:
    """Every rank's answers, in the order of the questions."""
    everyone: list[Judged] = gather_object(judged)
    return sorted(everyone, key=lambda item: int(item.id.partition(":")[0]))
