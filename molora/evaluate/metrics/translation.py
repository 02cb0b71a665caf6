"""Metrics of translations, by sacrebleu."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from molora.config import ConfigError
from molora.evaluate.metrics import Counted, Judged


class _BySacrebleu(Counted):
    """A metric of sacrebleu's over all answers together, against all accepted ones of each."""

    name: str
    # sacrebleu's own bootstrap adds up the statistics of sentences by the same two methods.
    metric: Any

    def counts(self, judged: Sequence[Judged]) -> np.ndarray:
        references = list(zip_longest(*(item.answers for item in judged)))  # None where a question has fewer
        return np.array(self.metric._extract_corpus_statistics([item.answer for item in judged], references))

    def of_sums(self, sums_BK: np.ndarray) -> dict[str, np.ndarray]:
        return {self.name: np.array([self.metric._compute_score_from_stats(list(sums_K)).score for sums_K in sums_BK])}


@dataclass(kw_only=True)
class BleuConfig:
    """`tokeniser` is sacrebleu's: 13a, or for a language without spaces its own, such as zh and ja-mecab."""

    tokeniser: str = "13a"


class Bleu(_BySacrebleu):
    """BLEU of all answers together against the accepted answers of each, from 0 to 100, by sacrebleu."""

    config_type = BleuConfig
    name = "bleu"

    def __init__(self, config: BleuConfig) -> None:
        try:
            from sacrebleu.metrics.bleu import BLEU
        except ImportError as error:
            raise ImportError("BLEU needs sacrebleu: pip install 'molora[audio]'") from error
        if config.tokeniser not in BLEU.TOKENIZERS:
            there = ", ".join(BLEU.TOKENIZERS)
            raise ValueError(f"sacrebleu has no tokeniser {config.tokeniser!r}; it has {there}")
        try:
            self.metric = BLEU(tokenize=config.tokeniser)
        except (ImportError, RuntimeError, OSError, SystemExit) as error:  # what fetches a model may end the process
            told = " ".join(str(error).split()) if not isinstance(error, SystemExit) else "its model cannot be fetched"
            raise ValueError(
                f"tokeniser {config.tokeniser!r} cannot be used here ({told:.300}); install what it needs, fetch its "
                "model where there is a network (sacrebleu keeps it under ~/.sacrebleu, or SACREBLEU), or give "
                "another, as 13a"
            ) from error


@dataclass(kw_only=True)
class ChrfConfig:
    """`word_order` is the longest sequence of words that is counted beside those of characters: 0 for chrF, 2 for
    chrF++."""

    word_order: int = 0

    def __post_init__(self) -> None:
        if self.word_order < 0:
            raise ConfigError(f"word_order is {self.word_order}; give 0 for chrF, 2 for chrF++")


class Chrf(_BySacrebleu):
    """chrF of all answers together against the accepted answers of each, from 0 to 100, by sacrebleu; with
    `word_order: 2` it is chrF++."""

    config_type = ChrfConfig
    name = "chrf"

    def __init__(self, config: ChrfConfig) -> None:
        try:
            from sacrebleu.metrics.chrf import CHRF
        except ImportError as error:
            raise ImportError("chrF needs sacrebleu: pip install 'molora[audio]'") from error
        self.metric = CHRF(word_order=config.word_order)
