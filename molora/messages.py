"""Messages: Hugging Face chat messages with content parts, checked once, and the border formats that become them.

A message is {"role", "content"}, and `train: false` where a turn is not to be learned. Content is text or a list of
parts: {"type": "text", "text": ...} or media, such as {"type": "image", "path": ...}, whose type a modality answers to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Part = Mapping[str, Any]

ROLES = ("system", "user", "assistant")

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_MARKED_TYPES = ("image", "audio", "video")


def check(messages: Sequence[Message], part_types: Mapping[str, str], where: str) -> None:
    """Raises ValueError unless `messages` is a conversation whose parts `part_types` (type -> modality) can serve."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: expected a list of at least one message, got {messages!r:.80}")
    for i, message in enumerate(messages):
        here = f"{where}: message {i}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{here}: expected a mapping with role and content, got {message!r:.80}")
        surplus = sorted(k for k, v in message.items() if k not in ("role", "content", "train") and v is not None)
        if surplus:
            raise ValueError(f"{here}: has {', '.join(surplus)}; a message has role, content and train, nothing else")
        if message.get("role") not in ROLES:
            raise ValueError(f"{here}: role {message.get('role')!r} is none of {', '.join(ROLES)}")
        if not isinstance(message.get("train"), (bool, type(None))):
            raise ValueError(f"{here}: train: expected true or false, got {message['train']!r}")
        if not isinstance(message.get("content"), (str, list, tuple)):
            raise ValueError(f"{here}: content: expected text or a list of parts, got {message.get('content')!r:.80}")
        for j, part in enumerate(parts(message)):
            _check_part(part, part_types, f"{here}, part {j}")


def _check_part(part: Part, part_types: Mapping[str, str], here: str) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f"{here}: expected a mapping with a type, got {part!r:.80}")
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{here}: text: expected text, got {part.get('text')!r:.80}")
    elif part["type"] not in part_types:
        there = ", ".join(f"{kind} ({modality})" for kind, modality in part_types.items())
        raise ValueError(
            f"{here}: no modality answers to parts of type {part['type']!r}; there are text{there and ', '}{there}"
        )


def parts(message: Message) -> Sequence[Part]:
    """The content of a message as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def media_parts(messages: Sequence[Message]) -> Iterator[tuple[str, Part]]:
    """Every part that is not text, in reading order, with words for errors that say where it is."""
    for i, message in enumerate(messages):
        for j, part in enumerate(parts(message)):
            if part["type"] != "text":
                yield f"message {i}, part {j} ({part['type']})", part


def from_llava(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages of a LLaVA row: `conversations` of from/value, `<image>` markers, and `image`, one or a list.

    Raises: ValueError for an unknown speaker or when markers and media differ in number.
    """
    return _from_marked(row.get("conversations"), row, "{}", where)


def from_sharegpt(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Messages of a ShareGPT row: `conversations` of from/value or `messages` of role/content, with markers `<image>`,
    `<audio>`, `<video>` and columns `images`, `audios`, `videos`.

    Raises: ValueError for an unknown speaker or when markers and media differ in number.
    """
    turns = row["conversations"] if "conversations" in row else row.get("messages")
    return _from_marked(turns, row, "{}s", where)


def from_openai(messages: Sequence[Message], where: str) -> list[dict[str, Any]]:
    """Messages of OpenAI's chat format: `image_url`, `audio_url`, `video_url` and `input_audio` parts.

    Raises: ValueError for a media part without its media.
    """
    return [
        {
            **message,
            "content": [_from_openai_part(part, f"{where}: message {i}, part {j}") for j, part in enumerate(content)],
        }
        if isinstance(content := message.get("content"), (list, tuple))
        else dict(message)
        for i, message in enumerate(messages)
    ]


def media(kind: str, value: Any) -> dict[str, Any]:
    """A content part from what a dataset column or a URL field holds: a path, a URL, a data URI, bytes, a mapping of
    these (as undecoded Hugging Face columns have), or an object such as a PIL image or an array."""
    if isinstance(value, Mapping):
        given = {key: item for key, item in value.items() if item is not None}
        if "bytes" in given or "array" in given:
            given.pop("path", None)  # only the name that the file once had
        return {"type": kind, **given}
    if isinstance(value, (bytes, bytearray)):
        return {"type": kind, "bytes": bytes(value)}
    if not isinstance(value, str):
        return {"type": kind, kind: value}
    if value.startswith("data:"):
        return {"type": kind, "base64": value.partition(",")[2]}
    if value.startswith(("http://", "https://")):
        return {"type": kind, "url": value}
    return {"type": kind, "path": value.removeprefix("file://")}


def _from_marked(turns: Any, row: Mapping[str, Any], column: str, where: str) -> list[dict[str, Any]]:
    """Turns whose user text holds markers, each replaced by the next medium of its kind; `column` names the columns."""
    if not isinstance(turns, Sequence) or not turns:
        raise ValueError(f"{where}: expected a list of at least one turn, got {turns!r:.80}")
    waiting = {kind: _as_list(row.get(column.format(kind))) for kind in _MARKED_TYPES}
    given = {kind: len(media) for kind, media in waiting.items()}
    found = dict.fromkeys(_MARKED_TYPES, 0)
    messages = []
    for i, turn in enumerate(turns):
        speaker = turn.get("from", turn.get("role"))
        if speaker not in _SHAREGPT_ROLES:
            raise ValueError(f"{where}: turn {i}: {speaker!r} is none of {', '.join(_SHAREGPT_ROLES)}")
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise ValueError(f"{where}: turn {i}: expected text, got {text!r:.80}")
        role = _SHAREGPT_ROLES[speaker]
        content: list[dict[str, Any]] = []
        # Only users show media; an answer that writes `<image>` means the word.
        for piece in re.split("(<image>|<audio>|<video>)", text) if role == "user" else [text]:
            kind = piece[1:-1]
            if role == "user" and kind in found:
                found[kind] += 1
                if waiting[kind]:
                    content.append(media(kind, waiting[kind].pop(0)))
            elif piece:
                content.append({"type": "text", "text": piece})
        messages.append(
            {"role": role, "content": text if content in ([], [{"type": "text", "text": text}]) else content}
        )
    for kind in _MARKED_TYPES:
        if found[kind] != given[kind]:
            raise ValueError(
                f"{where}: {found[kind]} <{kind}> markers but {given[kind]} media in {column.format(kind)!r};"
                " each medium needs one marker in a user turn"
            )
    return messages


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _from_openai_part(part: Part, where: str) -> Part:
    kind = part.get("type", "")
    if kind not in ("image_url", "audio_url", "video_url", "input_audio"):
        return part
    value = part.get(kind)
    field = "data" if kind == "input_audio" else "url"
    source = value.get(field) if isinstance(value, Mapping) else value
    if not isinstance(source, str):
        raise ValueError(f"{where}: {kind}.{field}: expected text, got {source!r:.80}")
    if kind == "input_audio":
        return {"type": "audio", "base64": source}
    return media(kind.removesuffix("_url"), source)
