"""Sound files in the pieces that a decoder reads whole.

libsndfile decodes the first of several sounds that were joined end to end, and believes a header that was never filled
in. So files are cut where another sound begins, and headers say what is there. Everything else stays as it is.
"""

import re
from itertools import islice

from molora.encoders.mp3 import AGAIN, mp3_sounds, mp3_start
from molora.modality import MediaError

# A header that programs fill in at the end, which a pipe never lets them do, says 0 or just under 2 or 4 GiB.
UNKNOWN_BYTES = 0x7F00_0000

_MAX_PIECES = 2_000

# Where a logical stream of Ogg begins, and where a FLAC does; both are much too long to come about by chance.
_OGG_BEGINS = re.compile(rb"OggS\0[\x02\x03\x06\x07]")
_FLAC_BEGINS = re.compile(rb"fLaC[\0\x80]\0\0\x22")
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0"


def pieces(data: bytes, max_seconds: float) -> list[bytes]:
    """The sounds of a file that was made of several, each as a file of its own; mostly the file as it is. Raises
    MediaError for a file of too many, and for an MP3 that is cut off, damaged or longer than `max_seconds`."""
    if data.startswith(b"OggS"):
        found = _between(data, _ogg_starts(data))
    elif mp3_start(data) is not None:
        found = list(mp3_sounds(data, max_seconds))
    elif data.startswith(b"fLaC") or data.startswith(b"ID3"):
        starts = islice(_FLAC_BEGINS.finditer(data), _MAX_PIECES + 1)
        found = _between(data, [match.start() for match in starts])
    else:
        found = [_filled_in(piece) for piece in _between(data, _header_starts(data))]
        if data[:4] == b"caff" and (promised := _length(found[-1], 0) or 0) > len(found[-1]):
            raise MediaError(f"is cut off: {promised} bytes promised, {len(found[-1])} there; {AGAIN}")
    if len(found) > _MAX_PIECES:
        raise MediaError(f"is {len(found)} or more sounds joined end to end, and {_MAX_PIECES} is the most; convert it")
    return found


def _between(data: bytes, starts: list[int]) -> list[bytes]:
    """A file cut before each start but the first, which may have tags before it."""
    cuts = [0, *starts[1:], len(data)]
    return [data[cuts[i] : cuts[i + 1]] for i in range(len(cuts) - 1)]


def _ogg_starts(data: bytes) -> list[int]:
    """Where links of a chain begin. Streams that run side by side begin in pages one after the other."""
    starts, after = [], -1
    for match in _OGG_BEGINS.finditer(data):
        start = match.start()
        if start != after:
            starts.append(start)
            if len(starts) > _MAX_PIECES:
                break
        table = data[start + 27 : start + 27 + (data[start + 26] if start + 26 < len(data) else 0)]
        after = start + 27 + len(table) + sum(table)
    return starts


def _header_starts(data: bytes) -> list[int]:
    """Where files begin whose header says how long each is."""
    starts, at = [], 0
    while len(starts) <= _MAX_PIECES:
        starts.append(at)
        length = _length(data, at)
        if length is None or data[at + length : at + length + 4] != data[at : at + 4]:
            return starts
        at += length
    return starts


def _length(data: bytes, at: int) -> int | None:
    """The length that a file's header says, None if it says none."""
    magic = data[at : at + 4]
    if magic in (b"RIFF", b"RIFX", b"FORM"):
        size = int.from_bytes(data[at + 4 : at + 8], "little" if magic == b"RIFF" else "big")
        return 8 + size if 0 < size < UNKNOWN_BYTES else None
    if magic == b"RF64" and data[at + 12 : at + 16] == b"ds64":
        return 8 + int.from_bytes(data[at + 20 : at + 28], "little")
    if data[at : at + 16] == _W64:
        return int.from_bytes(data[at + 16 : at + 24], "little") or None
    if magic == b".snd":
        size = int.from_bytes(data[at + 8 : at + 12], "big")
        return int.from_bytes(data[at + 4 : at + 8], "big") + size if 0 < size < UNKNOWN_BYTES else None
    if magic == b"caff":
        end = at + 8
        for _ in range(_MAX_PIECES):
            if end + 12 > len(data) or data[end : end + 4] == b"caff":
                return end - at
            size = int.from_bytes(data[end + 4 : end + 12], "big", signed=True)
            if size < 0:
                return None
            end += 12 + size
    return None


def _filled_in(data: bytes) -> bytes:
    """A file whose header says that it has no sound, though there is some, with a header that says how much."""
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        at = 12
        for _ in range(_MAX_PIECES):
            if at + 8 >= len(data) or data[at : at + 4] == b"data":
                break
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            at += at & 1
        rest, name = len(data) - at - 8, data[at + 8 : at + 12]
        # Another chunk that fits is no sound.
        fits = len(name) == 4 and name.isalnum() and 8 + int.from_bytes(data[at + 12 : at + 16], "little") <= rest
        if data[at : at + 8] == b"data\0\0\0\0" and rest > 0 and not fits:
            riff, size = (len(data) - 8).to_bytes(4, "little"), rest.to_bytes(4, "little")
            return b"".join([data[:4], riff, data[8 : at + 4], size, data[at + 8 :]])
    elif data[:4] == b".snd" and data[8:12] == bytes(4):
        return data[:8] + b"\xff" * 4 + data[12:]
    elif data[:4] == b"caff" and (at := data.find(b"data" + b"\xff" * 8)) > 0:
        return data[: at + 4] + (len(data) - at - 12).to_bytes(8, "big") + data[at + 12 :]
    return data
