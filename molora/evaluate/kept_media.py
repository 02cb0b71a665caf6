"""Media of messages as a file of JSON lines can say them: by the path of a file, which is made where there is none.

Letters: L samples, C channels.
"""

import base64
import binascii
import hashlib
import io
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from molora.storage import write_atomically

FOLDER = "media"

# How files begin that browsers show or play: an offset, the bytes there, the ending of a name and the MIME type.
_BEGINNINGS = (
    (0, b"\x89PNG", "png", "image/png"),
    (0, b"\xff\xd8\xff", "jpg", "image/jpeg"),
    (0, b"GIF8", "gif", "image/gif"),
    (8, b"WEBP", "webp", "image/webp"),
    (0, b"BM", "bmp", "image/bmp"),
    (8, b"WAVE", "wav", "audio/wav"),
    (0, b"fLaC", "flac", "audio/flac"),
    (0, b"OggS", "ogg", "audio/ogg"),
    (0, b"ID3", "mp3", "audio/mpeg"),
    (0, b"\xff\xfb", "mp3", "audio/mpeg"),
    (0, b"\xff\xf3", "mp3", "audio/mpeg"),
)
_BEGINNING_BYTES = 16


def known_type(beginning: bytes) -> tuple[str, str] | None:
    """The ending and the MIME type of a file of pictures or sound, by its first bytes; None for any other."""
    for offset, magic, ending, mime in _BEGINNINGS:
        if beginning[offset : offset + len(magic)] == magic:
            return ending, mime
    return None


def kept(messages: Sequence[Mapping[str, Any]], folder: Path, above: Path | None = None) -> list[dict[str, Any]]:
    """The messages in plain values. Media that they hold themselves, as bytes, pictures or arrays, become files in
    `folder`/media, or in `above`/media, each once, and paths that start from `folder`; other paths stay."""
    return _changed(messages, lambda part: _kept_part(part, folder, (above or folder) / FOLDER))


def found_again(messages: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The messages that `kept` gave, with paths that lead to the files from anywhere."""

    def found(part: Mapping[str, Any]) -> dict[str, Any]:
        path = part.get("path")
        return {**part, "path": str(folder / path)} if isinstance(path, str) else dict(part)

    return _changed(messages, found)


def _changed(messages: Sequence[Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each medium changed."""
    changed = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [dict(part) if part["type"] == "text" else change(part) for part in content]
        changed.append({**message, "content": content})
    return changed


def _kept_part(part: Mapping[str, Any], folder: Path, media: Path) -> dict[str, Any]:
    own = part.get(part["type"])
    if isinstance(own, Mapping):  # as columns of datasets hold media
        part = {**{key: value for key, value in part.items() if key != part["type"]}, **own}
    plain = {key: value for key, value in part.items() if value is not None}
    for key in ("bytes", "base64", "array", str(part["type"])):
        if (content := _content(key, plain)) is not None:
            del plain[key]
            if key == "array":
                plain.pop("sampling_rate", None)  # the file says it
            return {**{k: _plain(v) for k, v in plain.items()}, "path": os.path.relpath(_file(content, media), folder)}
    return {key: _plain(value) for key, value in plain.items()}


def _content(key: str, part: Mapping[str, Any]) -> bytes | None:
    """The bytes of a file that holds what a part has under a key; None where that is text or numbers."""
    value = part.get(key)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(value, (np.ndarray, Tensor)):
        values = np.asarray(value)
        rate_hz = part.get("sampling_rate")
        if rate_hz is not None and values.dtype.kind == "f":
            wave_LC = values.T if isinstance(value, Tensor) and values.ndim == 2 else values
            return _wav(wave_LC.reshape(len(wave_LC), -1), int(rate_hz))
        buffer = io.BytesIO()
        np.save(buffer, values)
        return buffer.getvalue()
    if key == "base64" and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error:
            return None  # it stays as the text that it is
    return None


def _wav(wave_LC: np.ndarray, rate_hz: int) -> bytes:
    """A WAV file of 32-bit floats, which loses nothing."""
    data = wave_LC.astype("<f4").tobytes()
    channels = wave_LC.shape[1]
    about = struct.pack("<HHIIHH", 3, channels, rate_hz, 4 * channels * rate_hz, 4 * channels, 32)
    head = b"WAVEfmt " + struct.pack("<I", len(about)) + about + b"data" + struct.pack("<I", len(data))
    return b"RIFF" + struct.pack("<I", len(head) + len(data)) + head + data


def _file(content: bytes, folder: Path) -> Path:
    """The file with that content in a folder, which is written if it is not there."""
    beginning = content[:_BEGINNING_BYTES]
    ending, _ = known_type(beginning) or ("npy" if beginning.startswith(b"\x93NUMPY") else "bin", "")
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.{ending}"
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def _plain(value: Any) -> Any:
    """A value as JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else repr(value)
