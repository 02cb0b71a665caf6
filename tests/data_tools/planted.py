"""Rows with one fault each, the recipe that reads them, and rows without a fault."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from molora.config import build
from molora.train.recipe import Recipe

RATE_HZ = 16_000
TOKENS_PER_PACK = 120
PLANTED, ASKED = "stages.0.data.planted", "evaluations.asked.data"


@dataclass(frozen=True)
class Planted:
    """A faulty row of a source, by what it is called: the line (made in the folder of the media), and what is found."""

    name: str
    line: Callable[[Path], Any]
    kind: str
    words: str
    source: str = PLANTED


def row(question: str, answer: str = "yes", *media: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [*media, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **more}


def turns(*spoken: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in spoken]}


def image(path: str) -> dict[str, Any]:
    return {"type": "image", "path": path}


def audio(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "audio", "path": path, **more}


def picture(folder: Path, name: str, *, size: tuple[int, int] = (24, 20), colour: int | None = None) -> dict[str, Any]:
    """A picture that differs from those of other names."""
    draw = np.random.default_rng(sum(map(ord, name)))
    pixels = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if colour is not None:
        pixels[:] = colour
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return image(f"{name}.png")


def clip(
    folder: Path, name: str, samples: np.ndarray | None = None, rate_hz: int = RATE_HZ, **more: Any
) -> dict[str, Any]:
    """A clip, of a hum that differs from those of other names unless its samples are given."""
    if samples is None:
        seconds = np.arange(RATE_HZ // 4) / RATE_HZ
        samples = 0.4 * np.sin(2 * np.pi * (200 + sum(map(ord, name))) * seconds)
    with wave.open(str(folder / f"{name}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return audio(f"{name}.wav", **more)


def damaged(folder: Path, name: str, change: Callable[[bytes], bytes]) -> dict[str, Any]:
    picture(folder, name)
    path = folder / f"{name}.png"
    path.write_bytes(change(path.read_bytes()))
    return image(path.name)


def hum(loud: float, seconds: float = 0.25) -> np.ndarray:
    return np.clip(loud * np.sin(2 * np.pi * 300 * np.arange(int(RATE_HZ * seconds)) / RATE_HZ), -1, 1)


def clipped(share: float) -> np.ndarray:
    samples = hum(0.4)
    samples[: int(share * len(samples))] = 1.0
    return samples


def trained(answer: str, train: Any) -> dict[str, Any]:
    made = row(f"shall {answer} be learned?", answer)
    made["messages"][1]["train"] = train
    return made


def no_json(path: Path) -> str:
    return '{"messages": [{"role": "user", '


def cut_clip(folder: Path) -> dict[str, Any]:
    clip(folder, "cut off")
    path = folder / "cut off.wav"
    path.write_bytes(path.read_bytes()[:2000])
    return audio(path.name)


# By kind, each in a row of its own.
CASES = [
    Planted("cut-off JSON", no_json, "unreadable", "not valid JSON"),
    Planted("a list", lambda _: ["messages"], "unreadable", "expected an object"),
    Planted("no messages", lambda _: {"text": "hello"}, "unreadable", "neither 'messages' nor 'conversations'"),
    Planted("empty messages", lambda _: {"messages": []}, "unreadable", "expected a list of at least one turn"),
    Planted("unknown role", lambda _: turns(("narrator", "once"), ("assistant", "yes")), "unreadable", "narrator"),
    Planted("Latin-1", lambda _: '{"messages": "caf\xe9"}'.encode("latin-1"), "unreadable", "is not UTF-8"),
    Planted("NUL byte", lambda _: b'{"messages": "\0"}', "unreadable", "a NUL byte"),
    Planted("key twice", lambda _: '{"messages": [], "messages": []}', "unreadable", "messages"),
    Planted(
        "train of a user",
        lambda _: {"messages": [{"role": "user", "content": "a", "train": True}]},
        "unreadable",
        "only what an assistant says",
    ),
    Planted(
        "column that changes what is learned",
        lambda _: row("which is better?", chosen="this"),
        "unreadable",
        "'chosen'",
    ),
    Planted(
        "more markers than media",
        lambda f: {**turns(("user", "<image><image>?"), ("assistant", "a")), "images": [picture(f, "one")["path"]]},
        "unreadable",
        "2 places for media",
    ),
    Planted(
        "more media than markers",
        lambda f: {**turns(("user", "what?"), ("assistant", "a")), "image": picture(f, "two")["path"]},
        "unreadable",
        "0 places for media",
    ),
    Planted("missing picture", lambda _: row("where is it?", "a", image("nowhere.png")), "media", "nowhere.png"),
    Planted(
        "cut-off picture",
        lambda f: row("is it cut?", "a", damaged(f, "cut", lambda data: data[:300])),
        "media",
        "cannot be decoded",
    ),
    Planted(
        "text named as a picture",
        lambda f: row("is it text?", "a", damaged(f, "text", lambda _: b"hello")),
        "media",
        "cannot be decoded",
    ),
    Planted(
        "empty picture file",
        lambda f: row("is it empty?", "a", damaged(f, "empty", lambda _: b"")),
        "media",
        "is empty, 0 bytes",
    ),
    Planted("folder as a picture", lambda _: row("a folder?", "a", image(".")), "media", "is a folder"),
    Planted(
        "no base64", lambda _: row("base64?", "a", {"type": "image", "base64": "?" * 80}), "media", "is not base64"
    ),
    Planted(
        "long and thin picture",
        lambda f: row("thin?", "a", picture(f, "thin", size=(900, 3))),
        "media",
        "too long and thin",
    ),
    Planted(
        "path out of the folder",
        lambda _: row("outside?", "a", image("../../secret.png")),
        "media",
        "leads out of media_root",
    ),
    Planted(
        "clip of no samples", lambda f: row("nothing?", "a", clip(f, "nothing", np.zeros(0))), "media", "has no samples"
    ),
    Planted(
        "clip of a moment", lambda f: row("a moment?", "a", clip(f, "moment", hum(0.4, 0.01))), "media", "is the least"
    ),
    Planted(
        "wrong rate",
        lambda f: row("which rate?", "a", clip(f, "rate", hum(0.4), 8000, sampling_rate=16_000)),
        "media",
        "8000 Hz beside a sampling_rate of 16000",
    ),
    Planted("far too loud", lambda f: row("loud?", "a", clip(f, "loud", clipped(0.5))), "media", "is clipped: 50%"),
    Planted("cut-off clip", lambda f: row("cut clip?", "a", cut_clip(f)), "media", "cut off"),
    Planted(
        "URL",
        lambda _: row("a URL?", "a", {"type": "image", "url": "https://example.com/a.png"}),
        "url",
        "https://example.com/a.png",
    ),
    Planted("unknown part", lambda _: row("a film?", "a", {"type": "video", "path": "a.mp4"}), "part", "video"),
    Planted("no rule", lambda f: row("both?", "a", picture(f, "both"), clip(f, "both")), "rule", "audio+vision"),
    Planted(
        "assistant first",
        lambda _: turns(("assistant", "hello"), ("user", "hi"), ("assistant", "a")),
        "roles",
        "no user turn stands before it",
    ),
    Planted(
        "two users",
        lambda _: turns(("user", "hello"), ("user", "there"), ("assistant", "a")),
        "roles",
        "messages 0 and 1 are both the user's",
    ),
    Planted(
        "no answer",
        lambda _: turns(("user", "hello"), ("assistant", "hi"), ("user", "more")),
        "roles",
        "ends with message 2",
    ),
    Planted(
        "late system message",
        lambda _: turns(("user", "s"), ("system", "be kind"), ("assistant", "a")),
        "roles",
        "stands first or not at all",
    ),
    Planted("empty answer", lambda _: row("say nothing", " "), "empty answer", "message 1 (assistant) is empty"),
    Planted(
        "empty prompt", lambda _: turns(("user", "  "), ("assistant", "a")), "empty prompt", "message 0 (user) is empty"
    ),
    Planted("nothing learned", lambda _: trained("nothing", False), "nothing learned", "no answer of it is learned"),
    Planted("longer than a pack", lambda _: row("long " * 25, "a"), "too long", f"holds {TOKENS_PER_PACK}"),
    Planted("longer than the context", lambda _: row("longer " * 50, "a"), "too long", "at most 256 fit"),
    Planted("marker on a line of its own", lambda _: row("what is heard?\n<audio>"), "marker", "'<audio>'"),
    Planted("marker without a medium", lambda _: row("<image>\nwhat is this?"), "marker", "'<image>'"),
    Planted("special token", lambda _: row("<|user|>hi<|end|>"), "special token", "'<|user|>'"),
    Planted("wrongly decoded", lambda _: row("a cafÃ© there?"), "encoding", "cafÃ©"),
    Planted("replacement character", lambda _: row("a caf\ufffd here?"), "encoding", "caf\ufffd"),
    Planted(
        "silent clip", lambda f: row("silence?", "a", clip(f, "silent", np.zeros(4000))), "silent", "0 in every sample"
    ),
    Planted(
        "clip that is somewhat too loud",
        lambda f: row("louder?", "a", clip(f, "louder", clipped(0.03))),
        "clipped",
        "3.0% of its samples",
    ),
    Planted("tiny picture", lambda f: row("tiny?", "a", picture(f, "tiny", size=(12, 12))), "tiny", "12 x 12 pixels"),
    Planted("grey picture", lambda f: row("grey?", "a", picture(f, "grey", colour=128)), "one colour", "of one colour"),
    Planted("same id", lambda _: row("whose id is it?", id="good 0"), "repeated id", "'good 0'"),
    Planted("same row", lambda _: row("Good question 0", "answer 0"), "repeated row", "the same as"),
    Planted("other answer", lambda _: row("good question 1", "another"), "contradiction", "with another answer"),
    Planted(
        "asked by an evaluation",
        lambda _: row("  Asked QUESTION 0.", "learned"),
        "leak",
        "asked.jsonl, row 1 asks the same",
    ),
    Planted(
        "asked about the same picture",
        lambda f: row("asked about a picture", "learned", picture(f, "asked")),
        "leak",
        "asked.jsonl, row 2",
    ),
    Planted(
        "shown by an evaluation",
        lambda f: row("another question", "learned", picture(f, "asked")),
        "shared media",
        "asked.jsonl, row 2 shows",
    ),
    Planted(
        "long expected answer",
        lambda _: row("how long?", "as long as that"),
        "long answer",
        "15 tokens, max_new_tokens is 8",
        ASKED,
    ),
    Planted(
        "question without an answer",
        lambda _: turns(("user", "asked into the void")),
        "roles",
        "ends with message 0",
        ASKED,
    ),
    Planted(
        "picture that is asked about and missing",
        lambda _: row("which?", "a", image("gone.png")),
        "media",
        "gone.png",
        ASKED,
    ),
    Planted("prompt that fills the context", lambda _: row("full " * 50, "a"), "context", "the context has 256", ASKED),
]


def good(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows without a fault: text, pictures, clips, several turns."""
    for index in range(4):
        yield row(f"good question {index}", f"answer {index}", id=f"good {index}")
    yield row("what is on it?", "noise", picture(folder, "good"))
    yield row("may a page have <audio> in it, or <b>?", "it may")
    yield row("what is heard?", "a hum", clip(folder, "good", sampling_rate=RATE_HZ))
    talk = turns(("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"))["messages"]
    yield {"messages": [{"role": "system", "content": "be brief"}, *talk]}


def write(path: Path, lines: list[Any]) -> None:
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in texts) + b"\n")


def recipe(home: Path, **changes: Any) -> Recipe:
    def rows(name: str) -> dict[str, Any]:
        return {"kind": "messages", "options": {"path": str(home / f"{name}.jsonl"), "media_root": str(home)}}

    adapter = {"r": 2, "lora_alpha": 4, "target_modules": ["qkv_proj"]}
    small = {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 16, "subsampling_channels": 8, "max_distance": 20}
    tower = {"kind": "convit", "pretrained": False, "convit": {"width": 8, "depth": 1, "heads": 2}}
    crops = {"crop_pixels": 16, "max_crops": 0, "pool": 1, "tower": tower}
    values = {
        "run": str(home / "run"),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {
            "vision": {"plugin": "vision", "options": crops, "adapter": adapter},
            "audio": {"plugin": "audio", "options": {"tower": {"conformer": small}}, "adapter": adapter},
        },
        "stages": [
            {
                "name": "tune",
                "train": {"adapters": {"learning_rate": 1e-3}},
                "data": {"planted": rows("planted")},
                "steps": 4,
                "samples_per_step": 6,
                "tokens_per_pack": TOKENS_PER_PACK,
            }
        ],
        "evaluations": {"asked": {"data": rows("asked"), "max_new_tokens": 8}},
        **changes,
    }
    return build(Recipe, values, "test recipe")
