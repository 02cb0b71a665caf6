"""Metrics of translations."""

from collections.abc import Sequence
from dataclasses import dataclass

from molora.evaluate.metrics import Judged


@dataclass(kw_only=True)
class BleuConfig:
    """`tokeniser` is sacrebleu's: 13a, or for a language without spaces its own, such as zh and ja-mecab."""

    tokeniser: str = "13a"


class Bleu:
    """BLEU of all answers together against one expected answer each, from 0 to 100, by sacrebleu."""

    config_type = BleuConfig

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

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        answers, expected = [item.answer for item in judged], [item.expected for item in judged]
        return {"bleu": self.metric.corpus_score(answers, [expected]).score}
