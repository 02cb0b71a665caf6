"""Media files changed at random: each is refused with a MediaError or decoded, in bounded time and memory.

A few hundred by default. All ten thousand, with the same seeds every time:

    MOLORA_FUZZED_FILES=10000 python -m pytest tests/encoders/test_media_fuzz.py -q
"""

from __future__ import annotations

import io
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.encoders.sound import load_sound
from molora.encoders.vision import Vision, VisionConfig
from molora.modality import MediaError
from tests.watch import Hung

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

# What a decoder reports in passing, such as an error in a callback, reaches the terminal, and is none of its business.
pytestmark = pytest.mark.filterwarnings("error")

NUM_FILES = int(os.environ.get("MOLORA_FUZZED_FILES", "300"))
MAX_PROCESSOR_SECONDS = 5
MAX_BYTES = 2**30

SIDE = (40, 30)
NUM_SAMPLES = 4_800


def picture(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE[1], SIDE[0], 3), dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(pixels[::5, ::5], 5, 0), 5, 1)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind: str) -> bytes:
    return picture(kind, save_all=True, append_images=[Image.new("RGB", SIDE, c) for c in ("red", "lime")])


def sound(kind: str, subtype: str = "PCM_16", **options: Any) -> bytes:
    steps = np.arange(NUM_SAMPLES) / 16_000
    wave = 0.3 * np.sin(2 * np.pi * 440 * steps * (1 + steps))
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16_000, 1, format=kind, subtype=subtype, **options) as file:
        file.write(wave)
    return buffer.getvalue()


PICTURES: dict[str, Callable[[], bytes]] = {
    "png": lambda: picture("PNG"),
    "png of a palette": lambda: picture("PNG", "P", transparency=3),
    "png with alpha": lambda: picture("PNG", "RGBA"),
    "jpeg": lambda: picture("JPEG"),
    "progressive jpeg": lambda: picture(
        "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\1\0"
    ),
    "gif": lambda: picture("GIF"),
    "animated gif": lambda: animated("GIF"),
    "webp": lambda: picture("WEBP"),
    "lossless webp": lambda: picture("WEBP", "RGBA", lossless=True),
    "animated webp": lambda: animated("WEBP"),
    "bmp": lambda: picture("BMP"),
    "tiff": lambda: picture("TIFF"),
    "lzw tiff": lambda: picture("TIFF", compression="tiff_lzw"),
    "jpeg tiff": lambda: picture("TIFF", compression="jpeg"),
    "ppm": lambda: picture("PPM"),
    "ico": lambda: picture("ICO", sizes=[(24, 24), (16, 16)]),
    "bmp ico": lambda: picture("ICO", sizes=[(24, 24)], bitmap_format="bmp"),
    "avif": lambda: picture("AVIF"),
    "jpeg 2000": lambda: picture("JPEG2000"),
}
SOUNDS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: sound("WAV"),
    "float wav": lambda: sound("WAV", "FLOAT"),
    "adpcm wav": lambda: sound("WAV", "IMA_ADPCM"),
    "flac": lambda: sound("FLAC"),
    "vorbis": lambda: sound("OGG", "VORBIS"),
    "opus": lambda: sound("OGG", "OPUS"),
    "mp3": lambda: sound("MP3", "MPEG_LAYER_III"),
    "joined mp3": lambda: 2 * sound("MP3", "MPEG_LAYER_III", bitrate_mode="CONSTANT", compression_level=0.5),
    "aiff": lambda: sound("AIFF"),
    "au": lambda: sound("AU"),
    "caf": lambda: sound("CAF"),
    "w64": lambda: sound("W64"),
    "rf64": lambda: sound("RF64"),
}
ALL = {**PICTURES, **SOUNDS}


def load(name: str, data: bytes) -> np.ndarray:
    if name in PICTURES:
        return np.asarray(Vision("vision", VisionConfig(max_pixels=1_000_000)).load({"bytes": data}))
    return load_sound({"bytes": data}, max_seconds=60).numpy()


@contextmanager
def bounded(what: str) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(f"{what}: over {MAX_PROCESSOR_SECONDS} seconds of processor time")

    handler = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)


def test_a_hang_is_no_refusal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: signal.raise_signal(signal.SIGPROF))
    with pytest.raises(Hung, match="png: over 5 seconds"), bounded("png"):
        load("png", picture("PNG"))


def kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


EXTREMES = (
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x01",
    b"\x01\0\0\0",
    b"\0\x01\0\0",
)


def changed(data: bytes, draw: random.Random) -> bytes:
    """A file with one to three changes, half of them near its front, where formats say what follows."""
    for _ in range(draw.randint(1, 3)):
        size = len(data)
        at = draw.randrange(min(size, 100) if draw.random() < 0.5 else size)
        length = draw.choice((1, 2, 4, 30, size // 3))
        how = draw.randrange(7)
        if how == 0:
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at] + draw.randbytes(length) + data[at + length :]
        elif how == 2:
            data = data[:at] + draw.choice(EXTREMES) + data[at + 4 :]
        elif how == 3:
            data = data[:at] + data[at + length :]
        elif how == 4:
            data = data[:at] + data[at : at + length] * draw.choice((2, 3, 50)) + data[at + length :]
        elif how == 5:
            data = data[:at] + draw.randbytes(length) + data[at:]
        else:
            data = data[: max(1, at)]
        data = data or b"\0"
    return data


@pytest.mark.parametrize("name", ALL)
def test_a_changed_file_is_refused_or_decoded_within_bounds(name: str):
    whole = ALL[name]()
    load(name, whole)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS")
    refused, numbers = 0, range(list(ALL).index(name), NUM_FILES, len(ALL))
    for number in numbers:
        data = changed(whole, random.Random(number))
        with bounded(f"{name}, file {number}"):
            try:
                item = load(name, data)
            except MediaError as error:
                refused += 1
                assert " at 0x" not in str(error) and len(str(error)) < 1000, f"{name}, file {number}"
                continue
        assert np.isfinite(item).all(), f"{name}, file {number}"
        assert (item.ndim, item.dtype) == ((3, np.uint8) if name in PICTURES else (1, np.float32))
    taken = (kibibytes("VmHWM") - before) * 1024
    assert taken < MAX_BYTES, f"{name}: took {taken / 2**20:.0f} MiB"
    assert refused or len(numbers) < 5


@pytest.mark.parametrize("name", ALL)
def test_a_file_cut_anywhere_is_refused_or_whole(name: str):
    """Where what is missing holds nothing that is seen or heard, such as a file's end marker, all of it is there."""
    whole = ALL[name]()
    wanted = load(name, whole)
    if name in PICTURES:
        assert wanted.shape == ((18, 24, 3) if "ico" in name else (*SIDE[::-1], 3))
    elif name != "joined mp3":
        assert len(wanted) in (NUM_SAMPLES, 5_085)  # blocks of ADPCM are whole
    refused = 0
    for cut in sorted({*range(1, 40), *(len(whole) * share // 47 for share in range(1, 47))}):
        try:
            item = load(name, whole[: len(whole) - cut])
        except MediaError:
            refused += 1
        else:
            assert np.array_equal(item, wanted), f"{name} without its last {cut} of {len(whole)} bytes"
    assert refused >= 20
