"""Messages: Hugging Face chat messages with content parts, checked once, and the border formats that become them.

A message is {"role", "content"}, and `train: false` where a turn is not to be learned. Content is text or a list of
parts: {"type": "text", "text": ...} or media, such as {"type": "image", "path": ...}, whose type a modality answers to.
An assistant's message may have `tool_calls`, which the messages of role `tool` behind it answer (tools.py).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from molora.data.tools import check_calls, read_calls
from molora.modality import MediaError

Message = Mapping[str, Any]
Part = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")

_KEYS = ("role", "content", "train")
_MORE_KEYS = {"assistant": ("tool_calls", "token_ids"), "tool": ("tool_call_id", "name")}
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
_MARKED_TYPES = ("image", "audio", "video")
_MEDIA_COLUMNS = tuple(f"{kind}{ending}" for kind in _MARKED_TYPES for ending in ("", "s"))

# Other trainers' words for `train`.
_TRAIN_WORDS = ("train", "training", "loss", "weight")

# Columns beside the turns that say what else is told or learned. Other columns are about the row, not of it.
_UNREAD = ("tools", "functions", "chosen", "rejected", "rejected_response", "completion", "system_prompt")
_UNREAD_MEDIA = re.compile("(image|img|audio|wav|video)s?(_?(path|file|file_?name|url|uri|bytes|base64|data|list)s?)?")

# How the base64 text of a png, jpeg, gif, riff (webp, wav), flac, ogg, mp3 or heif file begins.
_BASE64_STARTS = ("iVBORw0KGg", "/9j/", "R0lGOD", "UklGR", "ZkxhQ", "T2dnUw", "SUQz", "AAAAGGZ0eX", "AAAAHGZ0eX")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}(?:=[=\s]*)?")
_LONGEST_PATH = 4096


def check(messages: Sequence[Message], part_types: Mapping[str, str] | None, where: str) -> None:
    """Raises ValueError unless `messages` is a conversation whose parts `part_types` (type -> modality) can serve; any
    type if None."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where}: expected a list of at least one message, got {messages!r:.80}")
    for i, message in enumerate(messages):
        here = f"{where}: message {i}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{here}: expected a mapping with role and content, got {message!r:.80}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{here}: role {role!r:.80} is none of {', '.join(ROLES)}")
        keys = (*_KEYS, *_MORE_KEYS.get(role, ()))
        if surplus := sorted(str(key) for key, value in message.items() if key not in keys and value is not None):
            *first, last = keys
            told = f"a message of role {role} has {', '.join(first)} and {last}, nothing else"
            raise ValueError(f"{here}: has {', '.join(surplus)}; {told}")
        if not isinstance(message.get("train"), (bool, type(None))):
            raise ValueError(f"{here}: train: expected true or false, got {message['train']!r:.80}")
        if message.get("train") and role != "assistant":
            raise ValueError(f"{here}: train: only what an assistant says is learned, and this is the {role}'s turn")
        if not isinstance(message.get("content"), (str, list, tuple)):
            raise ValueError(f"{here}: content: expected text or a list of parts, got {message.get('content')!r:.80}")
        for j, part in enumerate(parts(message)):
            _check_part(part, part_types, f"{here}, part {j}")
        if (token_ids := message.get("token_ids")) is not None:
            _check_token_ids(token_ids, i == len(messages) - 1, here)
    check_calls(messages, where)


def _check_token_ids(token_ids: Any, is_last: bool, here: str) -> None:
    """Token ids say what of an answer was there `before`, and what the `answer` goes on with."""
    ids = [token_ids.get(key) for key in ("before", "answer")] if isinstance(token_ids, Mapping) else [None]
    if not all(isinstance(each, list) and all(type(id) is int and id >= 0 for id in each) for each in ids):
        raise ValueError(f"{here}: token_ids: expected lists of numbers as before and answer, got {token_ids!r:.80}")
    if not ids[1] or len(token_ids) > 2:
        raise ValueError(f"{here}: token_ids: expected before and answer, of one token or more, and nothing else")
    if not is_last:
        raise ValueError(f"{here}: token_ids: only the last message may be given by its tokens, and others follow")


def _check_part(part: Part, part_types: Mapping[str, str] | None, here: str) -> None:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f"{here}: expected a mapping with a type, got {part!r:.80}")
    if part["type"] == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{here}: text: expected text, got {part.get('text')!r:.80}")
        if surplus := sorted(str(k) for k, v in part.items() if k not in ("type", "text") and v is not None):
            raise ValueError(f"{here}: a text part has text and nothing else; it has {', '.join(surplus)}")
    elif part_types is not None and part["type"] not in part_types:
        there = ", ".join(f"{kind} ({modality})" for kind, modality in part_types.items())
        raise ValueError(
            f"{here}: no modality answers to parts of type {part['type']!r:.80}; there are text{there and ', '}{there}"
            "; add the modality, or mend the type"
        )
    elif part.get("text") is not None:
        raise ValueError(f"{here}: a part of type {part['type']!r:.80} has no text; write a text part beside it")


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


def conversation(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A row's messages, whichever format it is in.

    Turns are `messages` of role/content or `conversations` of from/value, and `system` may stand beside them. Parts are
    those of Hugging Face or of OpenAI (`image_url`, `audio_url`, `video_url`, `input_audio`, `input_image`,
    `input_text`). Media may also stand in columns: `image` or `images`, one or a list, and so for audio and video. Each
    takes the next place of its kind: a part of nothing but its type, or a marker (`<image>`) in what a user says. A
    turn is not learned where `train`, `training`, `loss` or `weight` is false or 0.

    Raises: ValueError, beginning with `where`, for what is none of these, for columns that hold more of the
    conversation than is read, and where places and media differ in number.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    given = {key: value for key, value in row.items() if value is not None}
    if not ({"messages", "conversations"} & given.keys()):
        raise ValueError(f"{where}: neither 'messages' nor 'conversations' among its keys {sorted(map(str, row))}")
    if {"messages", "conversations"} <= given.keys():
        raise ValueError(f"{where}: has both 'messages' and 'conversations'; leave one out")
    key = "messages" if "messages" in given else "conversations"
    turns = given[key]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"{where}: {key}: expected a list of at least one turn, got {turns!r:.80}")
    places = _Places(row, given, where)
    marks = _MARKED_TYPES if key == "conversations" else tuple(places.columns)
    messages = [_message(turn, places, marks, f"{where}: message {i}") for i, turn in enumerate(turns)]
    system = given.get("system", "")
    if not isinstance(system, str):
        raise ValueError(f"{where}: system: expected text, got {system!r:.80}")
    if system:
        if messages[0]["role"] == "system":
            raise ValueError(f"{where}: has a column 'system' and begins with a system message; leave one out")
        messages.insert(0, {"role": "system", "content": system})
    check(messages, None, where)
    places.check_filled()
    _check_unread(given, bool(list(media_parts(messages))), where)
    return messages


class _Places:
    """The media columns of a row, which fill the places in its turns one after the other."""

    def __init__(self, row: Mapping[str, Any], given: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.columns: dict[str, str] = {}
        self.waiting: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _MARKED_TYPES}
        for kind in _MARKED_TYPES:
            there = [column for column in (kind, f"{kind}s") if column in row]
            filled = [column for column in there if column in given]
            if len(filled) > 1:
                raise ValueError(f"{where}: has both {filled[0]!r} and {filled[1]!r}; leave one out")
            if there:
                self.columns[kind] = (filled or there)[0]
                self.waiting[kind] = media_list(kind, given.get(self.columns[kind]))
        self.num_given = {kind: len(media) for kind, media in self.waiting.items()}
        self.num_places: Counter[str] = Counter()

    def fill(self, kind: str) -> list[dict[str, Any]]:
        """The next medium of a kind; none if there are more places than media, which `check_filled` reports."""
        self.num_places[kind] += 1
        return [self.waiting[kind].pop(0)] if self.waiting[kind] else []

    def check_filled(self) -> None:
        for kind, num_given in self.num_given.items():
            if self.num_places[kind] != num_given:
                column = self.columns.get(kind)
                given = f"{num_given} media in {column!r}" if column else f"no column {kind!r} or '{kind}s'"
                raise ValueError(
                    f"{self.where}: {self.num_places[kind]} places for media of type {kind} but {given}; each needs "
                    f'one place, <{kind}> in a user\'s text or a part {{"type": "{kind}"}}'
                )


def _message(turn: Any, places: _Places, marks: Sequence[str], where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}: expected a mapping with role and content, got {turn!r:.80}")
    given = {key: value for key, value in turn.items() if value is not None}
    if given.get("tool_calls"):
        given = {"content": "", **given, "tool_calls": read_calls(given["tool_calls"], where)}
    speaker, content = _one_of(given, turn, ("role", "from"), where), _one_of(given, turn, ("content", "value"), where)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise ValueError(f"{where}: role {speaker!r:.80} is none of {', '.join(_SPEAKERS)}")
    role = _SPEAKERS[speaker]
    if isinstance(content, str):
        # Only users show media; an answer that writes `<image>` means the word.
        pieces = _filled(content, places, marks if role == "user" else ())
        content = content if all(piece["type"] == "text" for piece in pieces) else pieces
    elif isinstance(content, (list, tuple)):
        content = [
            piece
            for j, part in enumerate(content)
            for piece in _filled_part(part, places, role == "user", f"{where}, part {j}")
        ]
    return {"role": role, "content": content, **_train(given, where), **given}


def _one_of(given: dict[str, Any], turn: Mapping[str, Any], keys: tuple[str, str], where: str) -> Any:
    """Takes out the value of the one key that is there."""
    there = [key for key in keys if key in given]
    if len(there) != 1:
        empty = " and ".join(f"{key} is null" for key in keys if key in turn)
        has = " and ".join(there) or empty or f"neither; its keys are {sorted(map(str, turn))}"
        raise ValueError(f"{where}: expected {keys[0]!r} or {keys[1]!r}, found {has}")
    return given.pop(there[0])


def _train(given: dict[str, Any], where: str) -> dict[str, bool]:
    """Takes out whether a turn is learned, if it says so."""
    said = {key: given.pop(key) for key in _TRAIN_WORDS if key in given}
    for key, value in said.items():
        if value not in (0, 1):
            raise ValueError(f"{where}: {key}: {value!r:.80}; a turn is learned (true, 1) or not (false, 0)")
    trained = {bool(value) for value in said.values()}
    if len(trained) > 1:
        raise ValueError(f"{where}: {' and '.join(said)} contradict each other: {list(said.values())}")
    return {"train": trained.pop()} if trained else {}


def _filled_part(part: Any, places: _Places, is_user: bool, where: str) -> Sequence[Any]:
    """A part as one of Hugging Face's, with media from a column in it if it is a place."""
    if not isinstance(part, Mapping):
        return [part]  # for `check` to refuse
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind in ("input_text", "output_text"):
        part["type"] = kind = "text"
    elif kind == "input_image":
        part["type"] = kind = "image_url"
    if kind in _MARKED_TYPES and len(part) == 1:
        return places.fill(kind)
    if kind == "text" and isinstance(part.get("text"), str) and len(part) == 2 and is_user:
        return _filled(part["text"], places, [kind for kind, num_given in places.num_given.items() if num_given])
    if kind not in ("image_url", "audio_url", "video_url", "input_audio"):
        return [part]
    value = part.get(kind)
    field = "data" if kind == "input_audio" else "url"
    source = value.get(field) if isinstance(value, Mapping) else value
    if not isinstance(source, str):
        raise ValueError(f"{where}: {kind}.{field}: expected text, got {source!r:.80}")
    return [{"type": "audio", "base64": source} if field == "data" else media(kind.removesuffix("_url"), source)]


def _filled(text: str, places: _Places, marks: Sequence[str]) -> list[dict[str, Any]]:
    """Text in parts, with the next medium of its kind for each marker of the kinds `marks`."""
    if not marks:
        return [{"type": "text", "text": text}]
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(re.split(f"<({'|'.join(marks)})>", text)):
        if index % 2:
            content += places.fill(piece)
        elif piece:
            content.append({"type": "text", "text": piece})
    return content


def _check_unread(given: Mapping[str, Any], has_media: bool, where: str) -> None:
    """Raises ValueError for a column that belongs to the conversation and is not read."""
    for key, value in given.items():
        if key in ("messages", "conversations", "system", *_MEDIA_COLUMNS) or not value:
            continue
        first = value[0].keys() if isinstance(value, list) and isinstance(value[0], Mapping) else ()
        if key in _UNREAD or {"role", "content"}.issubset(first) or {"from", "value"}.issubset(first):
            raise ValueError(
                f"{where}: the column {key!r} would change what is told or learned, and is not read; take it out, or "
                "put what it says into the messages"
            )
        if not has_media and _UNREAD_MEDIA.fullmatch(key) and not isinstance(value, (int, float)):
            raise ValueError(
                f"{where}: the column {key!r} is not read, and the conversation has no media; call it image, audio or "
                "video, and write a place for it into the messages"
            )


def media_list(kind: str, value: Any) -> list[dict[str, Any]]:
    """Parts from a column that holds one medium, a list of them, or nothing (null, or empty text)."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [media(kind, item) for item in values if item is not None and not (isinstance(item, str) and not item)]


def media(kind: str, value: Any) -> dict[str, Any]:
    """A content part from what a dataset column or a URL field holds: a path, a URL, a data URI, base64, bytes, a
    mapping of these (as undecoded Hugging Face columns have), or an object such as a PIL image or an array. Text is
    base64 if it begins as a picture or clip in base64 does, or is too long for a path, and has nothing else."""
    if isinstance(value, Mapping):
        given = {key: item for key, item in value.items() if item is not None}
        if "bytes" in given or "array" in given:
            given.pop("path", None)  # only the name that the file once had
        return {**given, "type": kind}
    if isinstance(value, (bytes, bytearray)):
        return {"type": kind, "bytes": bytes(value)}
    if not isinstance(value, str):
        return {"type": kind, kind: value}
    scheme = value[:8].lower()
    if scheme.startswith("data:"):
        head, _, data = value.partition(",")
        if head.endswith(";base64") and "%" not in data:
            return {"type": kind, "base64": data}
    if scheme.startswith(("data:", "http://", "https://")):
        return {"type": kind, "url": value}
    if (value.startswith(_BASE64_STARTS) or len(value) > _LONGEST_PATH) and _BASE64.fullmatch(value):
        return {"type": kind, "base64": value}
    return {"type": kind, "path": value}


def rooted(messages: list[dict[str, Any]], folder: Path | None, bound: Path | None, where: str) -> list[dict[str, Any]]:
    """Makes local paths of media absolute: `~` is the home folder, `file://` is taken off, and relative paths start
    from `bound`, else from `folder`. Paths stand under `path`, or as text under the part's own type; `path` and `url`
    may turn out to be the other.

    Raises: MediaError for a path that leads out of `bound`, links followed, and for a relative one without a folder.
    """
    for place, part in media_parts(messages):
        _root(part, folder, bound, f"{where}: {place}")
    return messages


def _root(part: Any, folder: Path | None, bound: Path | None, where: str) -> None:
    own = [part["type"]] if part["type"] in _MARKED_TYPES else []  # what a plugin's parts hold is no path to us
    keys = [key for key in ("path", "url", *own) if part.get(key) is not None]
    if len(keys) > 1:
        raise MediaError(f"{where}: has {' and '.join(keys)}, each a medium of its own; leave one")
    for key in keys:
        value = part.get(key)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            continue
        found = media(part["type"], value)
        if "path" in found:
            del part[key]
            part[part["type"] if key == part["type"] else "path"] = _local(found["path"], folder, bound, where)
        elif key == "path":
            del part[key]
            part |= found


def _local(path: str, folder: Path | None, bound: Path | None, where: str) -> str:
    given = path
    if uri := re.fullmatch("file:(?://([^/]*))?(/.*)?", path, re.IGNORECASE | re.DOTALL):
        if (uri[1] or "").lower() not in ("", "localhost") or not uri[2]:
            raise MediaError(f"{where}: {given!r:.200} is no local file; write file:///folder/file, or a path")
        path = unquote(uri[2], errors="surrogateescape")
    if "\0" in path:
        raise MediaError(f"{where}: {given!r:.200} holds a NUL character")
    path = os.path.expanduser(path)
    start = bound or folder
    if start is None and not os.path.isabs(path):
        raise MediaError(f"{where}: {given!r:.200} is relative, and nothing says to what; give media_root")
    path = os.path.join(start or "", path)
    if bound is not None:
        path, root = os.path.realpath(path), os.path.realpath(bound)
        if os.path.commonpath([path, root]) != root:
            raise MediaError(f"{where}: {given!r:.200} leads out of media_root {bound}, to {path}")
    return path
