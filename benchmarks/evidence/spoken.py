"""Sentences of stories and phrases of them, spoken by espeak-ng: rows to train on, and three held-out sets to ask.

Nobody is heard in two splits: held-out sentences are of other stories, and no sentence of a story that is trained on;
their voices are others too. `read` is speech that people read, in English.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from molora.data.speech import HELD_OUT_VOICES, TRAINING_VOICES, clip, draw_utterance
from molora.seeding import seed_of
from molora.storage import write_text

SYSTEM = "Write down what is said."
ABOUT = (
    "sentences of 3 to 10 words of TinyStories (CDLA-Sharing-1.0), each spoken once by espeak-ng in one of 136 voices, "
    "most with noise or a room, and a phrase of 1 to 3 words of each, spoken alone with neither; held out are "
    "sentences of other stories in 48 other voices"
)
WORDS, PHRASE_WORDS = range(3, 11), range(1, 4)
HELD_OUT = 400


def write(data_root: Path, draft: Path, clips: Path) -> dict[str, Any]:
    """Writes as JSONL `phrases`, `train`, `val` (held out, without noise or room), `noisy` (held out, with them as in
    training) and `read`; clips go to a folder of their own, which survives a stop. Returns what is known of them."""
    sources = {split: data_root / f"tinystories/{split}.jsonl" for split in ("train", "val")}
    known = _sentences(sources["train"])
    unknown = [sentence for sentence in _sentences(sources["val"]) if sentence not in set(known)][:HELD_OUT]
    spoken = {
        "phrases": _spoken(known, TRAINING_VOICES, False, clips, said=_phrase),
        "train": _spoken(known, TRAINING_VOICES, True, clips),
        "val": _spoken(unknown, HELD_OUT_VOICES, False, clips),
        "noisy": _spoken(unknown, HELD_OUT_VOICES, True, clips),
        "read": _read(data_root / "read_speech"),
    }
    counts = {}
    for name, rows in spoken.items():
        lines = [f"{json.dumps(row)}\n" for row in rows]
        write_text(draft / f"{name}.jsonl", "".join(lines))
        counts[name] = len(lines)
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources.values()}
    files = {str(path.relative_to(data_root)): hash for path, hash in hashes.items()}
    return {"about": ABOUT, "files": files, "rows": counts}


def _sentences(path: Path) -> list[str]:
    """The sentences of stories as they are answered, each once: lower case, no marks but the apostrophe; in an order
    that is random."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", json.loads(line)["text"].replace("\u2019", "'")):
            said = re.sub(r"[,.!?\"\u201c\u201d]", "", sentence).strip().lower()
            if re.fullmatch("[a-z' ]+", said) and len(said.split()) in WORDS:
                found[" ".join(said.split())] = None
    return sorted(found, key=lambda said: hashlib.sha256(said.encode()).digest())


def _phrase(sentence: str) -> str:
    """A few neighbouring words of a sentence."""
    draw, words = random.Random(seed_of("phrase", sentence)), sentence.split()
    count = draw.choice(PHRASE_WORDS)
    first = draw.randrange(len(words) - count + 1)
    return " ".join(words[first : first + count])


def _spoken(
    sentences: Sequence[str], voices: Sequence[str], acoustics: bool, clips: Path, said: Callable[[str], str] = str
) -> Iterator[dict[str, Any]]:
    for number, sentence in enumerate(sentences):
        text = said(sentence)
        path = clip(draw_utterance(text, voices, acoustics, "speech", sentence), clips)
        yield _row(str(number), path, text)


def _read(folder: Path) -> Iterator[dict[str, Any]]:
    for split in ("train", "val"):
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            about = json.loads(line)
            if about["language"] == "en":
                yield _row(about["id"], folder / about["audio"], about["text"])


def _row(id: str, path: Path, said: str) -> dict[str, Any]:
    asked = [{"type": "audio", "path": str(path.resolve())}]
    turns = {"system": SYSTEM, "user": asked, "assistant": said}
    return {"id": id, "messages": [{"role": role, "content": content} for role, content in turns.items()]}
