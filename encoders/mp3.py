"""MP3 files: the sounds in one, each with a first frame that counts the others.

libsndfile guesses the length of an MP3 that does not say it, and so cuts it or reads on. So frames are counted here.
"""

import re
from collections.abc import Iterator

from molora.modality import MediaError

# What to do with a file of which a part is missing.
AGAIN = "copy or download it again"

_MAX_TAGS = 2_000
# Tags and what else may follow the last frame.
_SPARE_BYTES = 4096
_ZEROS = re.compile(rb"\0*")

_KBPS = {  # by MPEG 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


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
        self.kind = self.is_mpeg1, layer, self.rate_hz, self.is_mono
        # Of layer III, between the header and the sound; nothing but zeros before a count of frames.
        self.side_bytes = (17 if self.is_mono else 32) if self.is_mpeg1 else (9 if self.is_mono else 17)
        self.num_samples = 384 if layer == 1 else 1152 if layer == 2 or self.is_mpeg1 else 576
        padding, bits = data[at + 2] >> 1 & 1, 1000 * _KBPS[self.is_mpeg1, layer][kbps - 1]
        if layer == 1:
            self.num_bytes = (12 * bits // self.rate_hz + padding) * 4
        else:
            self.num_bytes = self.num_samples // 8 * bits // self.rate_hz + padding


def _tag(data: bytes, at: int) -> int:
    """The length of a tag in an MP3 file, 0 where there is none."""
    if data[at : at + 3] == b"ID3" and at + 10 <= len(data):  # 7 bits to a byte
        return 10 + sum((byte & 127) << n for byte, n in zip(data[at + 6 : at + 10], (21, 14, 7, 0), strict=True))
    if data[at : at + 3] == b"TAG":
        return 227 if data[at + 3 : at + 4] == b"+" else 128
    if data[at : at + 8] == b"APETAGEX":
        return 32 + int.from_bytes(data[at + 12 : at + 16], "little")
    return 0


def mp3_start(data: bytes, at: int = 0) -> int | None:
    """Where the first frame of an MP3 is, after tags and zeros; None for what is no MP3."""
    for _ in range(_MAX_TAGS):
        if not (length := _tag(data, at)):
            break
        at += length
    at = _after_zeros(data, at)
    frame = _Frame(data, at)
    end = at + frame.num_bytes
    return at if frame.num_bytes and (end >= len(data) or _Frame(data, end).num_bytes or _tag(data, end)) else None


def _after_zeros(data: bytes, at: int) -> int:
    return match.end() if (match := _ZEROS.match(data, at)) else at


def mp3_sounds(data: bytes, max_seconds: float) -> Iterator[bytes]:
    """Each sound of an MP3 file, with a first frame that counts the others."""
    at, begins, count, promised, first, seconds = mp3_start(data) or 0, 0, 0, None, None, 0.0
    while True:
        frame = _Frame(data, at)
        counted = _counted(data, at, frame) if frame.num_bytes else None
        ends = not frame.num_bytes or counted is not None or (first is not None and first.kind != frame.kind)
        if ends and first is not None and (count or promised):
            yield _counting(data[begins:at], first, count, promised)
            first, count, promised = None, 0, None
        if not frame.num_bytes:
            if (after := mp3_start(data, at)) is not None:
                at = after
                continue
            rest = len(data) - _after_zeros(data, at)
            if rest > _SPARE_BYTES + _tag(data, at):
                raise MediaError(f"is cut off or damaged: {rest} bytes after its last frame are no sound; {AGAIN}")
            return
        if at + frame.num_bytes > len(data):
            raise MediaError(f"is cut off: {len(data) - at} of the {frame.num_bytes} bytes of its last frame; {AGAIN}")
        if first is None:
            first, begins, promised = frame, at, counted
        count += counted is None
        seconds += frame.num_samples / frame.rate_hz
        if seconds > max_seconds + 1:
            raise MediaError(
                f"lasts more than {seconds - 1:.1f} seconds, max_seconds is {max_seconds:g}; cut it, or raise the limit"
            )
        at += frame.num_bytes


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
        raise MediaError(f"is cut off or damaged: {promised} frames promised, {count} there; {AGAIN}")
    if first.layer != 3 or (promised is not None and count - promised <= 1 and b"VBRI" not in sound[36:40]):
        return sound
    if promised is not None:
        sound = sound[first.num_bytes :]
    # 64 kbit/s, so that the frame has room, and no checksum.
    header = bytes([0xFF, sound[1] | 1, (0x50 if first.is_mpeg1 else 0x80) | sound[2] & 0x0C, sound[3]])
    content = header + bytes(first.side_bytes) + b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return content.ljust(_Frame(header, 0).num_bytes, b"\0") + sound
