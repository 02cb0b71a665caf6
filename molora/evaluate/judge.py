"""Evaluation by generation: the model answers, the answers are compared."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate.utils import gather_object

from molora.config import require
from molora.data.processor import Processor
from molora.data.sources import Source, SourceConfig, read_tags
from molora.inference.generate import Failed, GenerationConfig, Step, attempt, generate
from molora.model.molora import MoLoRA
from molora.pack import Sample

# Every character that Unicode calls a full stop, and those that close a sentence in scripts where none has that name.
FULL_STOPS = (
    ".\u0589\u06d4\u0701\u0702\u0964\u0965\u0f0d\u0f0e\u104b\u1362\u166e\u17d4\u17d5\u1803\u1809\u2cf9\u2cfe\u2e3c"
    "\u3002\ua4ff\ua60e\ua6f3\ufe12\ufe52\uff0e\uff61"
    "\U00011047\U00011141\U0001144b\U000115c2\U00016af5\U00016e98\U0001bc9f\U0001da88"
)
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u2060\ufeff]")
# Thai, Lao, Myanmar, Khmer, Javanese, Chinese characters, kana, bopomofo: written without spaces between words.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\ua980-\ua9ff\uaa60-\uaa7f\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_MAX_NAMED = 3


@dataclass(kw_only=True)
class EvaluationConfig:
    """Questions to answer. `without_media` leaves the media parts out, to see what the text alone gives away;
    `word_errors` adds the word error rate, for transcripts, `character_errors` the character error rate; `macro_f1` the
    mean F1 over the expected answers, each answer a class; `bleu` names the tokeniser of sacrebleu to count BLEU with,
    for translations: 13a, or for a language without spaces its own, such as zh and ja-mecab."""

    data: SourceConfig
    max_new_tokens: int = 16
    max_running_samples: int = 128
    without_media: bool = False
    word_errors: bool = False
    character_errors: bool = False
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
    """One answered question. `cut_off` says that a limit ended the answer, `error` why there is none."""

    id: str
    messages: list[dict[str, Any]]
    expected: str
    answer: str
    correct: bool
    tags: list[str] = field(default_factory=list)
    cut_off: bool = False
    error: str | None = None

    @property
    def row(self) -> int:
        """The number of its row in the source, from 0."""
        return int(self.id.partition(":")[0])


def normalise(text: str) -> str:
    """What exact match compares: composed characters without case, single spaces, no closing full stop of any script,
    and nothing that no one sees, such as marks of direction."""
    composed = unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).casefold()
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", composed)).strip().rstrip(FULL_STOPS).rstrip()


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
    strict: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> list[Judged]:
    """Answers this rank's share of the questions, in order. The last assistant message is the expected answer.

    A question that cannot be read, asked or answered is judged with its `error`; `strict` raises the first one's.
    """
    rows: dict[str, dict[str, Any]] = {}

    def prompts() -> Iterator[Sample | Failed]:
        for index in range(rank, len(source), ranks):
            unread = f"{index}:"
            row = attempt(partial(question, source, index, config.without_media), unread)
            if isinstance(row, Failed):
                rows[unread] = {"prompt": [], "expected": "", "tags": []}
                yield row
            else:
                rows[row["id"]] = row
                yield attempt(partial(processor.encode, row["prompt"], row["id"], generate=True), row["id"])

    answers: dict[str, list[int]] = defaultdict(list)
    last: dict[str, Step] = {}
    decoding = GenerationConfig(max_new_tokens=config.max_new_tokens, max_running_samples=config.max_running_samples)
    for step in generate(model, prompts(), decoding, keep_going=not strict):
        if step.finished is None or step.finished == "length":
            answers[step.id].append(step.token_id)
        if step.finished:
            last[step.id] = step
            advance()
    judged = []
    for id, row in rows.items():
        answer, error = processor.decode(answers[id]).strip(), last[id].error
        judged.append(
            Judged(
                id,
                row["prompt"],
                row["expected"],
                answer,
                error is None and exact_match(answer, row["expected"]),
                row["tags"],
                cut_off=last[id].finished == "length",
                error=None if error is None else str(error),
            )
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
        if other := next((part["type"] for part in expected if part["type"] != "text"), None):
            raise ValueError(f"evaluation row {index + 1}: the expected answer holds {other}; it can be text alone")
        expected = "".join(part["text"] for part in expected)
    tags = read_tags(row.get("tags"), f"evaluation row {index + 1}")
    return {"id": f"{index}:{row['id']}", "prompt": prompt, "expected": expected, "tags": tags}


def scores(judged: list[Judged], config: EvaluationConfig) -> dict[str, float]:
    """Rates over all questions that were answered and over those of each tag, with the counts.

    `failed` counts the questions that are in no rate, because they could not be asked or answered; `cut_off` the
    answers that a limit ended, which are in every rate. A rate without anything to count is left out.
    """
    answered = [item for item in judged if item.error is None]
    by_tag: dict[str, list[Judged]] = {"": answered}
    for item in answered:
        for tag in item.tags:
            by_tag.setdefault(tag, []).append(item)
    results: dict[str, float] = {}
    for tag, items in by_tag.items():
        rates: dict[str, float | None] = {}
        if items:
            rates["exact_match"] = sum(item.correct for item in items) / len(items)
            rates["word_error_rate"] = word_error_rate(items) if config.word_errors else None
            rates["character_error_rate"] = character_error_rate(items) if config.character_errors else None
            rates["macro_f1"] = macro_f1(items) if config.macro_f1 else None
            rates["bleu"] = bleu(items, config.bleu) if config.bleu is not None else None
        rates["questions"] = len(items)
        suffix = f"/{tag}" if tag else ""
        results |= {f"{name}{suffix}": rate for name, rate in rates.items() if rate is not None}
    results["failed"] = len(judged) - len(answered)
    results["cut_off"] = sum(item.cut_off for item in answered)
    return results


def complaints(name: str, judged: Sequence[Judged], config: EvaluationConfig) -> list[str]:
    """What one should know before one believes the scores of an evaluation."""
    told = []
    failed = [f"row {item.row + 1}: {item.error}" for item in judged if item.error is not None]
    cut_off = sum(item.cut_off for item in judged)
    if failed:
        named = "; ".join(failed[:_MAX_NAMED]) + ("; …" if len(failed) > _MAX_NAMED else "")
        told.append(f"{name}: {len(failed)} of {len(judged)} questions were not answered and are in no rate: {named}")
    if cut_off:
        told.append(
            f"{name}: {cut_off} of {len(judged) - len(failed)} answers were cut off at max_new_tokens "
            f"({config.max_new_tokens}), or where the backbone's context was full, and are judged as they are; raise "
            "max_new_tokens if answers may be longer, or make the prompts shorter"
        )
    return told


def words(text: str) -> list[str]:
    """The words of a text, for error rates: letters, marks and numbers of every script, without case, what stands in
    brackets left out (as Whisper does). Scripts that are written without spaces have a word for every character."""
    folded = unicodedata.normalize("NFKC", text.replace("\u200b", " ")).casefold()
    for opening, closing in (("[<[]", ">]"), ("[(]", ")")):  # searching what closes each would take for ever
        closed = max(map(folded.rfind, closing)) + 1
        folded = folded[:closed] + re.sub(opening, " ", folded[closed:])
    kept = re.sub(r"[<\[][^>\]]*[>\]]|\([^)]+?\)", "", folded)
    pieces: list[str] = []
    for character in unicodedata.normalize("NFKC", kept):
        kind = unicodedata.category(character)
        if kind == "Cf":  # joiners and marks of direction
            continue
        alone = _WITHOUT_SPACES.match(character) is not None
        if kind[0] == "M":
            pieces.append(character)
        elif kind[0] in "LN":
            border = alone or (pieces and _WITHOUT_SPACES.match(pieces[-1][-1]))
            pieces.append(f" {character}" if border else character)
        else:
            pieces.append(" ")
    return "".join(pieces).split()


def word_error_rate(judged: Sequence[Judged]) -> float | None:
    """Wrong, missing and added words for each expected one; None if none is expected. Raises ImportError without the
    `audio` extra."""
    return _error_rate([(words(item.expected), words(item.answer)) for item in judged])


def character_error_rate(judged: Sequence[Judged]) -> float | None:
    """Wrong, missing and added characters for each expected one, of the words and the spaces between them; scripts that
    are written without spaces have none. None if none is expected. Raises ImportError without the `audio` extra."""
    return _error_rate([(_characters(item.expected), _characters(item.answer)) for item in judged])


def _characters(text: str) -> list[str]:
    joined = " ".join(words(text))
    apart = _WITHOUT_SPACES.pattern
    return list(re.sub(rf"(?<={apart}) | (?={apart})", "", joined).replace(" ", "_"))


def _error_rate(pairs: Sequence[tuple[list[str], list[str]]]) -> float | None:
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("error rates need jiwer: pip install 'molora[audio]'") from error
    expected = sum(len(reference) for reference, _ in pairs)
    if not expected:
        return None
    added = sum(len(answer) for reference, answer in pairs if not reference)
    compared = [(" ".join(reference), " ".join(answer)) for reference, answer in pairs if reference]
    found = jiwer.process_words([reference for reference, _ in compared], [answer for _, answer in compared])
    return (found.substitutions + found.deletions + found.insertions + added) / expected


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
    """sacrebleu's BLEU. Raises ImportError without the `audio` extra, ValueError for a tokeniser it does not have, or
    whose library or model is not there."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'molora[audio]'") from error
    if tokeniser not in BLEU.TOKENIZERS:
        raise ValueError(f"bleu: sacrebleu has no tokeniser {tokeniser!r}; it has {', '.join(BLEU.TOKENIZERS)}")
    try:
        return BLEU(tokenize=tokeniser)
    except (ImportError, RuntimeError, OSError, SystemExit) as error:  # what fetches a model may end the process
        told = " ".join(str(error).split()) if not isinstance(error, SystemExit) else "its model cannot be fetched"
        raise ValueError(
            f"bleu: tokeniser {tokeniser!r} cannot be used here ({told:.300}); install what it needs, fetch its model "
            "where there is a network (sacrebleu keeps it under ~/.sacrebleu, or SACREBLEU), or give another, as 13a"
        ) from error


def gathered(judged: list[Judged]) -> list[Judged]:
    """Every rank's answers, in the order of the questions."""
    everyone: list[Judged] = gather_object(judged)
    return sorted(everyone, key=lambda item: item.row)
