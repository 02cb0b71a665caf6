"""The text of an answer while its tokens come: which of it is final, and whether it is over."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def ends_at(decode: Decode, stops: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    """Says of an answer's tokens so far whether they complete one of the texts `stops`."""
    # The tokens of the longest, if each is a quarter of a character.
    last = 4 * max(map(len, stops), default=0)

    def is_over(tokens: Sequence[int]) -> bool:
        ending = decode(tokens[-last:]) if stops else ""
        return any(stop in ending for stop in stops)

    return is_over


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops` in it."""
    found = [text.find(stop) for stop in stops]
    return text[: min((place for place in found if place >= 0), default=None)]


class FinalText:
    """An answer's text in pieces that nothing takes back. With `strip`, the spaces around the answer are left out."""

    def __init__(self, decode: Decode, stops: Sequence[str] = (), *, strip: bool = False) -> None:
        self._decode = decode
        self._stops = stops
        self._strip = strip
        self._given = ""

    def piece(self, tokens: Sequence[int], finished: bool) -> str:
        """What has become final since the last call, of an answer with these tokens so far."""
        text = before(self._decode(tokens), self._stops)
        if self._strip:
            text = text.strip() if finished else text.lstrip()
        # A character that spans several tokens shows as U+FFFD until its last one.
        if not text.startswith(self._given) or (not finished and text.endswith("\ufffd")):
            return ""
        final = len(text)
        if not finished:
            final = min(final - self._open(text), len(text.rstrip()) if self._strip else final)
        piece = text[len(self._given) : final]
        self._given += piece
        return piece

    def _open(self, text: str) -> int:
        """How many characters at the end of a text may begin a stop."""
        begun = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max(begun, default=0)
