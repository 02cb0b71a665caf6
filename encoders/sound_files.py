"""Sound files in the pieces that a decoder reads whole.

libsndfile decodes the first of several sounds that were joined end to end, believes a header that was never filled in,
and guesses the length of an MP3 that does not say it. So files are cut where another sound begins, and headers say what
is there. Everything else stays as it is, to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from molora.modality import MediaError

# A header that programs fill in at the end, which a pipe never lets them do, says 0 or just under 2 or 4 GiB.
UNKNOWN_BYTES = 0x7F00_0000

_MAX_PIECES = 2_000
# Tags and what else may follow the last frame of an MP3.
_MP3_SPARE_BYTES = 4096

# Where a logical stream of Ogg begins, and where a FLAC does; both are much too long to come about by chance.
_OGG_BEGINS = re.compile(rb"OggS\0[\x02\x03\x06\x07]")
_FLAC_BEGINS = re.compile(rb"fLaC[\0\x80]\0\0\x22")
_ZEROS = re.compile(rb"\0*")
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0"

_KBPS = {  # by MPEG 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def pieces(data: bytes, max_seconds: float) -> list[bytes]:
    """The sounds of a file that was made of several, each as a file of its own; mostly the file as it is.

    Raises: MediaError for a file of too many, and for an MP3 that is cut off, damaged or longer than `max_seconds`.
    """
    if data.startswith(b"OggS"):
        found = _between(data, _ogg_starts(data))
    elif _mp3_start(data) is not None:
        found = list(_mp3s(data, max_seconds))
    elif data.startswith(b"fLaC") or data.startswith(b"ID3"):
        starts = islice(_FLAC_BEGINS.finditer(data), _MAX_PIECES + 1)
        found = _between(data, [match.start() for match in starts])
    else:
        found = [_filled_in(piece) for piece in _between(data, _header_starts(data))]
        if data[:4] == b"caff" and (promised := _length(found[-1], 0) or 0) > len(found[-1]):
            raise MediaError(f"is cut off: {promised} bytes promised, {len(found[-1])} there; {_AGAIN}")
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
        rest = len(data) - at - 8
        if data[at : at + 8] == b"data\0\0\0\0" and rest > 0 and not _is_chunk(data, at + 8):
            riff, size = (len(data) - 8).to_bytes(4, "little"), rest.to_bytes(4, "little")
            return b"".join([data[:4], riff, data[8 : at + 4], size, data[at + 8 :]])
    elif data[:4] == b".snd" and data[8:12] == bytes(4):
        return data[:8] + b"\xff" * 4 + data[12:]
    elif data[:4] == b"caff" and (at := data.find(b"data" + b"\xff" * 8)) > 0:
        return data[: at + 4] + (len(data) - at - 12).to_bytes(8, "big") + data[at + 12 :]
    return data


def _is_chunk(data: bytes, at: int) -> bool:
    """Whether a chunk of RIFF that fits is here, and so no sound."""
    name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
    return len(name) == 4 and name.isalnum() and at + 8 + size <= len(data)


# MP3 -------------------------------------------------------------------------------------------------------------


class _Frame:
    """What the four bytes before a frame of MPEG audio say; `num_bytes` is 0 for no frame."""

    def __init__(self, data: bytes, at: int) -> None:
        self.num_bytes = 0
        if at + 4 > len(data) or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
            return
        version, layer = data[at + 1] >> 3 & 3, 4 - (data[at + 1] >> 1 & 3)
        rate, kbps = data[at + 2] >> 2 & 3, data[at + 2] >> 4
        if version == 1 or layer == 4 or rate == 3 or kbps in (0, 15):
            return
        self.is_mpeg1, self.layer = version == 3, layer
        self.rate_hz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
        self.is_mono = data[at + 3] >> 6 == 3
        self.num_samples = 384 if layer == 1 else 1152 if layer == 2 or self.is_mpeg1 else 576
        padding, bits = data[at + 2] >> 1 & 1, 1000 * _KBPS[self.is_mpeg1, layer][kbps - 1]
        if layer == 1:
            self.num_bytes = (12 * bits // self.rate_hz + padding) * 4
        else:
            self.num_bytes = self.num_samples // 8 * bits // self.rate_hz + padding

    @property
    def kind(self) -> tuple[object, ...]:
        return self.is_mpeg1, self.layer, self.rate_hz, self.is_mono

    @property
    def side_bytes(self) -> int:
        """Of layer III, between the header and the sound; nothing but zeros before a count of frames."""
        return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[self.is_mpeg1, self.is_mono]


def _tag(data: bytes, at: int) -> int:
    """The length of a tag in an MP3 file, 0 where there is none."""
    if data[at : at + 3] == b"ID3" and at + 10 <= len(data):  # 7 bits to a byte
        return 10 + sum(
            (byte & 127) << shift for byte, shift in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True)
        )
    if data[at : at + 3] == b"TAG":
        return 227 if data[at + 3 : at + 4] == b"+" else 128
    if data[at : at + 8] == b"APETAGEX":
        return 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    return 0


def _mp3_start(data: bytes, at: int = 0) -> int | None:
    """Where the first frame of an MP3 is, after tags and zeros; None for what is no MP3."""
    for _ in range(_MAX_PIECES):
        if not (length := _tag(data, at)):
            break
        at += length
    at = _after_zeros(data, at)
    frame = _Frame(data, at)
    end = at + frame.num_bytes
    return at if frame.num_bytes and (end >= len(data) or _Frame(data, end).num_bytes or _tag(data, end)) else None


def _after_zeros(data: bytes, at: int) -> int:
    match = _ZEROS.match(data, at)
    return match.end() if match else at


def _mp3s(data: bytes, max_seconds: float) -> Iterator[bytes]:
    """Each sound of an MP3 file, with a first frame that counts the others."""
    at, begins, count, promised, first, seconds = _mp3_start(data) or 0, 0, 0, None, None, 0.0
    while True:
        frame = _Frame(data, at)
        counted = _counted(data, at, frame) if frame.num_bytes else None
        ends = not frame.num_bytes or counted is not None or (first is not None and first.kind != frame.kind)
        if ends and first is not None and (count or promised):
            yield _counting(data[begins:at], first, count, promised)
            first, count, promised = None, 0, None
        if not frame.num_bytes:
            after = _mp3_start(data, at)
            if after is not None:
                at = after
                continue
            rest = len(data) - _after_zeros(data, at)
            if rest > _MP3_SPARE_BYTES + _tag(data, at):
                raise MediaError(f"is cut off or damaged: {rest} bytes after its last frame are no sound; {_AGAIN}")
            return
        if at + frame.num_bytes > len(data):
            raise MediaError(f"is cut off: {len(data) - at} of the {frame.num_bytes} bytes of its last frame; {_AGAIN}")
        if first is None:
            first, begins, promised = frame, at, counted
        count += counted is None
        seconds += frame.num_samples / frame.rate_hz
        if seconds > max_seconds + 1:
            raise MediaError(
                f"lasts more than {seconds - 1:.1f} seconds, max_seconds is {max_seconds:g}; cut it, or raise the limit"
            )
        at += frame.num_bytes


_AGAIN = "copy or download it again"


def _counted(data: bytes, at: int, frame: _Frame) -> int | None:
    """How many frames follow one that has no sound and counts them; None for a frame of sound, 0 for no count."""
    if frame.layer != 3:
        return None
    place = at + 4 + frame.side_bytes
    if data[place : place + 4] in (b"Xing", b"Info"):
        has_count = int.from_bytes(data[place + 4 : place + 8], "big") & 1
        return int.from_bytes(data[place + 8 : place + 12], "big") if has_count else 0
    if data[at + 36 : at + 40] == b"VBRI":
        return int.from_bytes(data[at + 50 : at + 54], "big")
    return None


def _counting(sound: bytes, first: _Frame, count: int, promised: int | None) -> bytes:
    """Frames with one before them that counts them. Programs disagree on whether that one counts itself."""
    if promised is not None and promised - count > 1:
        raise MediaError(f"is cut off or damaged: {promised} frames promised, {count} there; {_AGAIN}")
    if first.layer != 3 or (promised is not None and count - promised <= 1 and b"VBRI" not in sound[36:40]):
        return sound
    if promised is not None:
        sound = sound[first.num_bytes :]
    # 64 kbit/s, so that the frame has room, and no checksum.
    header = bytes([0xFF, sound[1] | 1, (0x50 if first.is_mpeg1 else 0x80) | sound[2] & 0x0C, sound[3]])
    content = header + bytes(first.side_bytes) + b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return content.ljust(_Frame(header, 0).num_bytes, b"\0") + sound
