"""What is compared when answers are: texts without what makes no difference, their words and characters."""

import re
import unicodedata

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


def normalise(text: str) -> str:
    """What exact match compares: composed characters without case, single spaces, no closing full stop of any script,
    and nothing that no one sees, such as marks of direction."""
    composed = unicodedata.normalize("NFC", _INVISIBLE.sub("", text)).casefold()
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", composed)).strip().rstrip(FULL_STOPS).rstrip()


def exact_match(answer: str, expected: str) -> bool:
    return normalise(answer) == normalise(expected)


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
        if kind[0] == "M":
            pieces.append(character)
        elif kind[0] in "LN":
            border = _WITHOUT_SPACES.match(character) or (pieces and _WITHOUT_SPACES.match(pieces[-1][-1]))
            pieces.append(f" {character}" if border else character)
        else:
            pieces.append(" ")
    return "".join(pieces).split()


def characters(text: str) -> list[str]:
    """The characters of the words of a text and the spaces between them, which stand as `_`; scripts that are written
    without spaces have none."""
    joined = " ".join(words(text))
    apart = _WITHOUT_SPACES.pattern
    return list(re.sub(rf"(?<={apart}) | (?={apart})", "", joined).replace(" ", "_"))
