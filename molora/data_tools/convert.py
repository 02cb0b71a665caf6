"""Any source to files that others read: JSONL of messages with media beside it, or tar shards of webdataset."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from molora.config import ConfigError
from molora.data.messages import media, parts
from molora.data.sources import Source, SourceConfig, open_source
from molora.data_tools.opening import place_of
from molora.media import Sources
from molora.media.policy import SCHEMES, scheme
from molora.modality import MediaError
from molora.received import check_name
from molora.storage import hold, write_folder
from molora.terminal import progress

# A larger file of one medium is refused; modalities refuse such files too.
_FILES = Sources(part_type="media", keys=(), max_file_bytes=2**30)

# How files begin, and the endings that programs know them by.
_ENDINGS = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"fLaC", ".flac"),
    (b"OggS", ".ogg"),
    (b"ID3", ".mp3"),
    (b"\xff\xfb", ".mp3"),
)
_RIFF_ENDINGS = {b"WAVE": ".wav", b"WEBP": ".webp"}

# Types of parts whose content may stand under the type itself, and the keys that hold the content of any.
_MEDIA_TYPES = ("image", "audio", "video")
# Rows that are left out are counted; so many are told.
_MAX_TOLD = 20
_CONTENTS = ("array", "bytes", "base64", "path", "url")


@dataclass
class Written:
    """How much was written, how many rows were left out, and why the first of these were."""

    num_rows: int = 0
    num_media: int = 0
    num_left_out: int = 0
    why: list[str] = field(default_factory=list)


class Unwritable(ValueError):
    """A row that cannot be written as it is."""


@dataclass(frozen=True)
class _Content:
    """What the file of a medium will hold, and the ending of its name."""

    data: bytes
    ending: str


class _Files(Protocol):
    """Where rows and their media go."""

    def medium(self, row: int, data: bytes, ending: str) -> str:
        """Keeps a file; returns the path that the row names it by."""
        ...

    def row(self, row: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def convert(
    sources: Mapping[str, SourceConfig],
    target: Path,
    *,
    limit: int | None = None,
    rows_per_shard: int | None = None,
    strict: bool = False,
    show: bool = True,
) -> Written:
    """Writes sources into a new folder: NAME.jsonl with media in NAME.media/, or NAME-000000.tar and so on, of
    `rows_per_shard` rows each, a row being KEY.json and its media KEY.0.png, KEY.1.wav ….

    Media are the files that they were, byte for byte; arrays become PNG or WAV without loss. URLs stay URLs. The folder
    is there when all rows are written, and not before. A row that cannot be written is left out, or with `strict` stops
    it all.

    Raises: ConfigError for a folder that is there already and for sources that cannot be opened, ValueError naming the
    row that cannot be written if all are such or with `strict`, or a source whose name is none of a file.
    """
    if target.exists():
        raise ConfigError(f"{target}: is there already; name a new folder")
    opened = {check_name(name, str(target)): open_source(config, name) for name, config in sources.items()}
    written = Written()
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold(target), write_folder(target) as draft, progress(shown=show) as bars:
        for name, source in opened.items():
            num_rows = len(source) if limit is None else min(limit, len(source))
            bar = bars.add_task(name, total=num_rows, note="")
            files = _Lines(draft, name) if rows_per_shard is None else _Shards(draft, name, rows_per_shard)
            with closing(files):
                for row in range(num_rows):
                    _convert_row(source, row, name, files, written, strict)
                    bars.advance(bar)
        if written.num_left_out and not written.num_rows:
            raise ValueError(f"none of {written.num_left_out:,} rows can be written; the first: {written.why[0]}")
    return written


def _convert_row(source: Source, row: int, name: str, files: _Files, written: Written, strict: bool) -> None:
    try:
        values = _row(source, row, name)
    except Unwritable as error:
        if strict:
            raise
        written.num_left_out += 1
        if len(written.why) < _MAX_TOLD:
            written.why.append(str(error))
        return
    for message in values.get("messages") or values["prompt"]:
        for part in message["content"] if isinstance(message["content"], list) else ():
            if isinstance(part.get("path"), _Content):
                part["path"] = files.medium(row, part["path"].data, part["path"].ending)
            written.num_media += part["type"] != "text"
    files.row(row, values)
    written.num_rows += 1


def _row(source: Source, row: int, name: str) -> dict[str, Any]:
    """A row with the content of its media, which is all read. Raises Unwritable."""
    where = place_of(source, row, name)
    try:
        example = source[row]
    except ImportError:
        raise
    except Exception as error:  # a plugin's source can fail in any way
        told = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise Unwritable(told if told.startswith(where) else f"{where}: {told}") from error
    values = dict(example)
    if rejected := values.pop("rejected", None):  # as `kind: preferences` reads it
        chosen = values.pop("messages")
        learned = (n for n, turn in enumerate(chosen) if turn["role"] == "assistant" and turn.get("train") is not False)
        start = next(learned, len(chosen) - 1)  # behind the prompt, of which nothing is learned
        prompt = _with_content(chosen[:start], where)
        values |= {"prompt": prompt, "chosen": chosen[start:], "rejected": rejected[start:]}
    else:
        values["messages"] = _with_content(values["messages"], where)
    try:
        _json(values)
    except (TypeError, ValueError) as error:
        raise Unwritable(f"{where}: holds what JSON cannot ({error}); only media may be bytes or arrays") from error
    return values


def _with_content(given: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """Messages with the content of their media. Raises Unwritable."""
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(given):
        if isinstance(message["content"], str):
            messages.append(dict(message))
            continue
        content = []
        for j, part in enumerate(parts(message)):
            try:
                content.append(dict(part) if part["type"] == "text" else _part(part))
            except (ValueError, OSError, TypeError) as error:
                raise Unwritable(f"{where}: message {i}, part {j} ({part['type']}): {error}") from error
        messages.append({**message, "content": content})
    return messages


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part with its content as its `path`. What a plugin's part holds otherwise stays as it is."""
    kind = part["type"]
    if part.get(kind) is not None and kind in _MEDIA_TYPES:
        part = {**{key: value for key, value in part.items() if key != kind}, **media(kind, part[kind])}
    found = next((key for key in (*_CONTENTS, kind) if part.get(key) is not None), kind)
    value = part.get(found)
    rest = {key: value for key, value in part.items() if key != found}
    if isinstance(value, (Image.Image, np.ndarray, Tensor)):
        return {**rest, "path": _encoded(value, rest.get("sampling_rate"))}
    if found not in _CONTENTS or found == "array" or (found == "url" and scheme(str(value)) in SCHEMES):
        return dict(part)
    data = _FILES.read(found, value)
    ending = Path(str(value)).suffix if found == "path" else ""
    return {**rest, "path": _Content(data, ending or _ending(data))}


def _encoded(value: Any, rate_hz: Any) -> _Content:
    """A picture as PNG, or a waveform as WAV if it has a rate."""
    file = io.BytesIO()
    if rate_hz is not None:
        try:
            import soundfile
        except ImportError as error:
            raise ImportError("writing clips needs soundfile: pip install 'molora[audio]'") from error
        wave = np.asarray(value.movedim(0, -1) if isinstance(value, Tensor) else value)
        kinds = {"int16": "PCM_16", "int32": "PCM_32", "uint8": "PCM_U8", "float64": "DOUBLE"}
        soundfile.write(file, wave, int(rate_hz), format="WAV", subtype=kinds.get(wave.dtype.name, "FLOAT"))
        return _Content(file.getvalue(), ".wav")
    if not isinstance(value, Image.Image):
        pixels = np.asarray(value.movedim(0, -1) if isinstance(value, Tensor) and value.ndim == 3 else value)
        if pixels.dtype != np.uint8:
            raise MediaError(f"an array of {pixels.dtype} has no file format that keeps it; give uint8 pixels")
        value = Image.fromarray(pixels.squeeze(2) if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    value.save(file, format="PNG")
    return _Content(file.getvalue(), ".png")


def _ending(data: bytes) -> str:
    if data[:4] == b"RIFF":
        return _RIFF_ENDINGS.get(data[8:12], ".bin")
    return next((ending for start, ending in _ENDINGS if data.startswith(start)), ".bin")


class _Lines:
    """NAME.jsonl, and media under the hash of their content, so that one medium of many rows is one file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.media = folder / f"{name}.media"
        self.file = open(folder / f"{name}.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (close closes it)

    def medium(self, row: int, data: bytes, ending: str) -> str:
        path = self.media / f"{hashlib.sha256(data).hexdigest()[:32]}{ending}"
        if not path.exists():
            self.media.mkdir(exist_ok=True)
            path.write_bytes(data)
        return f"{self.media.name}/{path.name}"

    def row(self, row: int, values: Mapping[str, Any]) -> None:
        self.file.write(_json(values) + "\n")

    def close(self) -> None:
        self.file.close()


class _Shards:
    """NAME-000000.tar and so on. Members of a row stand together, its KEY.json first, which names its media."""

    def __init__(self, folder: Path, name: str, rows_per_shard: int) -> None:
        self.stem, self.rows_per_shard = folder / name, rows_per_shard
        self.tar: tarfile.TarFile | None = None
        self.num_rows = 0
        self.waiting: list[tuple[str, bytes]] = []

    def medium(self, row: int, data: bytes, ending: str) -> str:
        self.waiting.append((f"{row:09}.{len(self.waiting)}{ending}", data))
        return self.waiting[-1][0]

    def row(self, row: int, values: Mapping[str, Any]) -> None:
        shard, place = divmod(self.num_rows, self.rows_per_shard)
        self.num_rows += 1
        if place == 0:
            self.close()
            self.tar = tarfile.open(f"{self.stem}-{shard:06}.tar", "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        assert self.tar is not None, "the first row opens it"
        for name, data in ((f"{row:09}.json", _json(values).encode()), *self.waiting):
            about = tarfile.TarInfo(name)
            about.size = len(data)
            self.tar.addfile(about, io.BytesIO(data))
        self.waiting = []

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()


def _json(values: Mapping[str, Any]) -> str:
    """A row as JSON; content that has no path yet stands for one."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, default=_path_to_be)


def _path_to_be(value: Any) -> str:
    if isinstance(value, _Content):
        return value.ending
    raise TypeError(f"{type(value).__name__} is not JSON serializable")
