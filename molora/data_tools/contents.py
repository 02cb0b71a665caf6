"""What is odd about texts, turns and decoded media, though nothing refuses it.

Letters: L samples of a clip.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molora.data.messages import Message, parts

# A kind of `faults.KINDS`, and what was found.
Odd = tuple[str, str]

# A picture with a shorter side is hardly ever one that somebody wanted to ask about, but an icon or a tracking pixel.
_TINY_PIXELS = 16
# Channels of a picture that differ by no more are one colour: JPEG makes a flat grey uneven by a few steps.
_ONE_COLOUR_STEPS = 8
# -60 dB of full scale: the noise of a quiet room is louder.
_SILENT_PEAK = 1e-3
# Samples in runs of three or more at full scale; `Audio` refuses clips of which 5 % are.
_FULL_SCALE = 0.999
_CLIPPED_RUN = 3
_CLIPPED_SHARE = 0.01

# How data sets of other projects mark the place of a medium in a text. Tags of HTML are markers where a line begins or
# ends with one; in a sentence they are what it is about.
_MARKERS = re.compile(
    r"<(?:image|speech|sound|ImageHere|image_placeholder)>|<\|(?:image|audio|video)(?:_\d+|_pad)?\|>"
    r"|^\s*<(?:audio|video|img)>|<(?:audio|video|img)>\s*$",
    re.MULTILINE,
)
# UTF-8 that was read as Latin-1 or Windows-1252, such as "Ã©" for "é", and what is put for bytes that are no text.
_WRONGLY_DECODED = re.compile("\ufffd|Ã[\x80-\xbf]|Â[\x80-\xbf]|â€[\x80-\x9f™œžš˜“”¦¢]|ð[\x90-\x9fŸ][\x80-\xbf]")


def odd_turns(messages: Sequence[Message]) -> Iterator[Odd]:
    """Turns that are empty or stand in a wrong order."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        yield "roles", f"message {roles.index('system', 1)} is the system's, which stands first or not at all"
    spoken = [(index, role) for index, role in enumerate(roles) if role != "system"]
    if not spoken:
        yield "roles", "nothing but a system message"
        return
    if spoken[0][1] == "assistant":
        yield "roles", f"message {spoken[0][0]} is the assistant's, and no user turn stands before it"
    for (_, before), (index, role) in pairwise(spoken):
        if role == before:
            yield "roles", f"messages {index - 1} and {index} are both the {role}'s"
    if spoken[-1][1] != "assistant":
        yield "roles", f"ends with message {spoken[-1][0]}, the {spoken[-1][1]}'s, and not with an answer"
    for index, message in enumerate(messages):
        has_media = any(part["type"] != "text" for part in parts(message))
        if has_media or _text(message).strip():
            continue
        if message["role"] == "user":
            yield "empty prompt", f"message {index} (user) is empty"
        elif message["role"] == "assistant" and message.get("train") is not False:
            yield "empty answer", f"message {index} (assistant) is empty"


def odd_texts(messages: Sequence[Message], special_tokens: re.Pattern[str] | None) -> Iterator[Odd]:
    """Texts that hold markers, special tokens, or characters that were decoded wrongly."""
    for index, message in enumerate(messages):
        text, here = _text(message), f"message {index} ({message['role']})"
        if message["role"] == "user" and (found := _MARKERS.search(text)):
            yield "marker", f"{here} has the text {found[0].strip()!r}, and no medium stands for it"
        elif special_tokens and (found := special_tokens.search(text)):
            yield "special token", f"{here} spells {found[0]!r}"
        if found := _WRONGLY_DECODED.search(text):
            around = text[max(0, found.start() - 12) : found.end() + 12]
            yield "encoding", f"{here} has {found[0]!r} in {around!r}"


def special_tokens_of(tokenizer: Any) -> re.Pattern[str] | None:
    """What spells a special token of a tokenizer; None if it has none."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def odd_item(item: Any, is_sound: bool) -> Iterator[Odd]:
    """What is odd about a decoded picture, or a waveform (L,) if the item `is_sound`."""
    if isinstance(item, Image.Image):
        if min(item.size) < _TINY_PIXELS:
            yield "tiny", f"{item.width} x {item.height} pixels"
        elif all(high - low <= _ONE_COLOUR_STEPS for low, high in _extrema(item)):
            yield "one colour", f"{item.width} x {item.height} pixels of one colour"
    elif is_sound and isinstance(item, Tensor) and item.ndim == 1 and len(item):
        peak = float(item.abs().max())
        if peak < _SILENT_PEAK:
            loud = f"{20 * np.log10(peak):.0f} dB of full scale" if peak else "0 in every sample"
            yield "silent", f"its loudest sample is {loud}"
        elif (share := _share_at_full_scale(item)) > _CLIPPED_SHARE:
            yield "clipped", f"{share:.1%} of its samples lie in runs at full scale"


def _share_at_full_scale(wave_L: Tensor) -> float:
    full_L = wave_L.abs() >= _FULL_SCALE
    if int(full_L.sum()) < _CLIPPED_RUN:
        return 0.0
    starts_L = full_L.unfold(0, _CLIPPED_RUN, 1).all(dim=1)
    in_runs_L = torch.zeros_like(full_L)
    for offset in range(_CLIPPED_RUN):
        in_runs_L[offset : offset + len(starts_L)] |= starts_L
    return float(in_runs_L.float().mean())


def _extrema(picture: Image.Image) -> Sequence[tuple[float, float]]:
    found: Any = picture.getextrema()
    return found if isinstance(found[0], tuple) else (found,)


def _text(message: Message) -> str:
    return "".join(part["text"] for part in parts(message) if part["type"] == "text")
