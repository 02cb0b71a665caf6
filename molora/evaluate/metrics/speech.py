"""Error rates of transcripts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from molora.evaluate.metrics import Counted, Judged, ratio
from molora.evaluate.normalise import characters, words
from molora.hub import fetch_file


@dataclass(kw_only=True)
class ErrorRateConfig:
    """`normaliser` says what of a text is compared: `words`, molora's own, which leaves out case, punctuation and what
    stands in brackets, in every script; `whisper_english` and `basic`, those of Whisper, whose rates papers print; or
    `none`, the words as they are. `spellings` is where `whisper_english` finds its British and American spellings: a
    Whisper model of the hub, or a folder with its normalizer.json."""

    normaliser: Literal["words", "whisper_english", "basic", "none"] = "words"
    spellings: str = "openai/whisper-tiny"


class WordErrorRate(Counted):
    """Wrong, missing and added words for each expected one, as jiwer counts them."""

    config_type = ErrorRateConfig
    name = "word_error_rate"

    def __init__(self, config: ErrorRateConfig) -> None:
        try:
            import jiwer
        except ImportError as error:
            raise ImportError("error rates need jiwer: pip install 'molora[audio]'") from error
        self.compare = jiwer.process_words
        self.normalise = _normaliser(config)

    def pieces(self, text: str) -> list[str]:
        """What is compared of a text, one by one."""
        return words(text) if self.normalise is None else self.normalise(text).split()

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        pairs = [(self.pieces(item.expected), self.pieces(item.answer)) for item in judged]
        # Where nothing was to be said, every answered word is an added one; jiwer refuses such pairs.
        wrong = [len(answer) for _, answer in pairs]
        spoken = [index for index, (expected, _) in enumerate(pairs) if expected]
        if spoken:
            expected, answers = ([" ".join(pairs[index][side]) for index in spoken] for side in (0, 1))
            found = self.compare(expected, answers)
            for index, chunks in zip(spoken, found.alignments, strict=True):
                steps = (chunk for chunk in chunks if chunk.type != "equal")
                wrong[index] = sum(
                    max(step.ref_end_idx - step.ref_start_idx, step.hyp_end_idx - step.hyp_start_idx) for step in steps
                )
        return np.array([(count, len(said)) for count, (said, _) in zip(wrong, pairs, strict=True)])

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: ratio(sums_BK[:, 0], sums_BK[:, 1])}


class CharacterErrorRate(WordErrorRate):
    """Wrong, missing and added characters for each expected one, of the words and the spaces between them."""

    name = "character_error_rate"

    def pieces(self, text: str) -> list[str]:
        if self.normalise is None:
            return characters(text)
        return ["_" if character == " " else character for character in " ".join(super().pieces(text))]


def _normaliser(config: ErrorRateConfig) -> Callable[[str], str] | None:
    """What makes the compared text of a text; None for molora's own words. Raises ValueError for what is missing."""
    if config.normaliser == "words":
        return None
    if config.normaliser == "none":
        return str
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return (
        BasicTextNormalizer() if config.normaliser == "basic" else EnglishTextNormalizer(_spellings(config.spellings))
    )


def _spellings(where: str) -> dict[str, str]:
    """American spellings by British ones, which transformers has no copy of."""
    path = Path(where).expanduser() / "normalizer.json"
    try:
        if not path.is_file():
            path = fetch_file(where, "normalizer.json")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"spellings: no normalizer.json of {where!r} ({told:.300}); give a folder that has it, such as one that a "
            "Whisper model was downloaded to, or the normaliser `basic`"
        ) from error
