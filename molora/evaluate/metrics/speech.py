"""Error rates of transcripts."""

from collections.abc import Sequence

from molora.evaluate.metrics import Judged, NoOptions
from molora.evaluate.normalise import characters, words


class WordErrorRate:
    """Wrong, missing and added words for each expected one."""

    config_type = NoOptions
    name = "word_error_rate"
    pieces = staticmethod(words)

    def __init__(self, config: NoOptions) -> None:
        try:
            import jiwer
        except ImportError as error:
            raise ImportError("error rates need jiwer: pip install 'molora[audio]'") from error
        self.compare = jiwer.process_words

    def score(self, judged: Sequence[Judged]) -> dict[str, float]:
        pairs = [(self.pieces(item.expected), self.pieces(item.answer)) for item in judged]
        expected = sum(len(reference) for reference, _ in pairs)
        if not expected:
            return {}
        added = sum(len(answer) for reference, answer in pairs if not reference)
        compared = [(" ".join(reference), " ".join(answer)) for reference, answer in pairs if reference]
        found = self.compare([reference for reference, _ in compared], [answer for _, answer in compared])
        return {self.name: (found.substitutions + found.deletions + found.insertions + added) / expected}


class CharacterErrorRate(WordErrorRate):
    """Wrong, missing and added characters for each expected one, of the words and the spaces between them."""

    name = "character_error_rate"
    pieces = staticmethod(characters)
