"""Loading clips: every format and source, sample rates that agree, and what is refused."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molora.encoders.logmel import log_mel
from molora.encoders.sound import MIN_SAMPLES, SAMPLE_RATE_HZ, load_sound
from molora.modality import MediaError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

RATES_HZ = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


def tones(rate_hz: int, hertz: tuple[float, ...] = (440.0, 1700.0, 3100.0), seconds: float = 1.0) -> np.ndarray:
    steps = np.arange(round(rate_hz * seconds)) / rate_hz
    return sum(0.8 / len(hertz) * np.sin(2 * np.pi * f * steps) for f in hertz).astype(np.float32)  # type: ignore[union-attr]


def encoded(wave: np.ndarray, rate_hz: int = 16_000, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def load(value: Any, key: str = "bytes", **rest: Any) -> torch.Tensor:
    return load_sound({"type": "audio", key: value, **rest})


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"),
    [
        *[("WAV", subtype, 1e-4) for subtype in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")],
        ("WAV", "PCM_U8", 3e-2),
        *[("FLAC", subtype, 1e-4) for subtype in ("PCM_16", "PCM_24")],
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.5),
        ("MP3", "MPEG_LAYER_III", 0.1),
    ],
)
def test_every_format_gives_the_wave_that_was_written(kind: str, subtype: str, tolerance: float, channels: int):
    wave = tones(16_000)
    stereo = np.stack([wave, 0.5 * wave], axis=1) if channels == 2 else wave
    loaded = load(encoded(stereo, 16_000, kind, subtype)).numpy()
    wanted = stereo.mean(axis=1) if channels == 2 else wave
    assert loaded.dtype == np.float32 and loaded.shape == wanted.shape
    difference = (loaded - wanted)[800:-800]
    assert np.sqrt(np.square(difference).mean() / np.square(wanted).mean()) < tolerance


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_sample_rates_of_one_sound_give_the_same_wave_and_features(rate_hz: int):
    """Tones below 4 kHz, which every rate can carry. Samples agree to 2e-5, away from the ends, where the resampler
    sees silence; log-mel features of frames off the ends to 0.05 where there is sound (more than a millionth of the
    loudest power): below, the numbers are the rounding of 16 bits."""
    loaded = load(encoded(tones(rate_hz), rate_hz, "WAV", "FLOAT"))
    wanted = torch.from_numpy(tones(16_000))
    assert len(loaded) == len(wanted)
    assert float((loaded - wanted)[1000:-1000].abs().max()) < 2e-5
    ours, theirs = log_mel([loaded])[10:-10], log_mel([wanted])[10:-10]
    heard = theirs > theirs.max() - np.log(1e6)
    assert float((ours - theirs)[heard].abs().max()) < 0.05


def test_what_16_khz_cannot_carry_is_gone():
    for rate_hz in (22_050, 44_100, 48_000):
        assert float(load(encoded(tones(rate_hz, (8_600.0,)), rate_hz, "WAV", "FLOAT"))[800:-800].abs().max()) < 1e-4


@pytest.mark.parametrize("rate_hz", RATES_HZ)
def test_the_number_of_samples_is_rounded_up(rate_hz: int):
    for num in (rate_hz, rate_hz + 1, rate_hz + 7):
        loaded = load(np.zeros(num, np.float32), "array", sampling_rate=rate_hz)
        assert len(loaded) == -(-num * SAMPLE_RATE_HZ // rate_hz)


def test_arrays_of_every_type_and_layout_are_one_wave():
    wave = tones(16_000)
    stereo = np.stack([wave, wave], axis=1)
    arrays: list[Any] = [
        wave,
        wave.astype(np.float64),
        stereo,
        torch.from_numpy(wave),
        torch.from_numpy(stereo.T.copy()),
        (wave * 32767).astype(np.int16),
        (wave * (2**31 - 1)).astype(np.int32),
    ]
    for array in arrays:
        np.testing.assert_allclose(load(array, "array", sampling_rate=16_000).numpy(), wave, atol=1e-4)
        mapping = {"array": array, "sampling_rate": 16_000}
        np.testing.assert_allclose(load(mapping, "audio").numpy(), wave, atol=1e-4)
    eight = ((wave + 1) * 127.5).astype(np.uint8)
    np.testing.assert_allclose(load(eight, "array", sampling_rate=16_000).numpy(), wave, atol=0.02)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.flac").write_bytes(encoded(tones(16_000), kind="FLAC"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder / "a.flac", f"http://127.0.0.1:{server.server_port}/a.flac"
        server.shutdown()


def test_every_source_gives_the_same_clip(served: tuple[Path, str]):
    path, url = served
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    wanted = load(data)
    sources = [("path", str(path)), ("url", url), ("base64", text), ("base64", f"data:audio/flac;base64,{text}")]
    sources += [("audio", data), ("audio", str(path)), ("audio", url)]  # type: ignore[list-item]
    for key, value in sources:
        assert torch.equal(load(value, key), wanted), key
    inside = load_sound({"type": "audio", "path": "a.flac"}, media_root=str(path.parent))
    assert torch.equal(inside, wanted)


def test_silence_and_loud_music_are_not_refused():
    assert not load(np.zeros(16_000, np.int16), "array", sampling_rate=16_000).any()
    loud = np.clip(1.3 * tones(16_000), -1, 1)
    assert len(load(loud, "array", sampling_rate=16_000)) == 16_000


WAVE = tones(16_000)
BAD: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "nothing": (dict, "needs exactly one of path, url, base64, bytes, audio, array"),
    "two sources": (lambda: {"path": "a.wav", "bytes": b"x"}, "needs exactly one of"),
    "missing file": (lambda: {"path": "/nowhere/a.wav"}, "No such file"),
    "no bytes": (lambda: {"bytes": b""}, "is empty, 0 bytes"),
    "not audio": (lambda: {"bytes": b"GIF89a" * 100}, "damaged or no audio"),
    "not base64": (lambda: {"base64": "!!"}, "is not base64"),
    "no samples": (lambda: {"bytes": encoded(WAVE[:0])}, "has no samples"),
    "too short": (lambda: {"bytes": encoded(WAVE[: MIN_SAMPLES - 1])}, "lasts 399 samples at 16 kHz, and 400"),
    "too long": (lambda: {"bytes": encoded(np.zeros(16_000 * 11), 16_000)}, "lasts 11.0 seconds, max_seconds is 10"),
    "not finite": (lambda: {"array": np.full(800, np.nan), "sampling_rate": 16_000}, "not finite"),
    "clipped": (lambda: {"array": np.clip(20 * WAVE, -1, 1), "sampling_rate": 16_000}, "is clipped"),
    "unscaled": (lambda: {"array": 32767 * WAVE, "sampling_rate": 16_000}, "dividing by 32768"),
    "no rate": (lambda: {"array": WAVE}, "without its sampling_rate"),
    "odd rate": (lambda: {"array": WAVE, "sampling_rate": 44.1}, "has sampling_rate 44.1"),
    "cube": (lambda: {"array": np.zeros((2, 2, 2)), "sampling_rate": 16_000}, "of shape \\(2, 2, 2\\)"),
    "text": (lambda: {"array": np.array(["a"]), "sampling_rate": 16_000}, "give numbers"),
    "cut wav": (lambda: {"bytes": encoded(WAVE)[:-2000]}, "is cut off"),
    "cut flac": (lambda: {"bytes": encoded(WAVE, kind="FLAC")[:-2000]}, "damaged|cut off"),
    "cut ogg": (lambda: {"bytes": encoded(WAVE, 16_000, "OGG", "OPUS")[:-2000]}, "damaged|cut off|no samples"),
    "cut mp3": (lambda: {"bytes": encoded(WAVE, 16_000, "MP3", "MPEG_LAYER_III")[:-2000]}, "cut off"),
    "what is it": (lambda: {"audio": 3}, "give a path, a URL, bytes, an array, or a mapping"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clips_are_refused_with_the_reason(name: str):
    make, reason = BAD[name]
    with pytest.raises(MediaError, match=reason):
        load_sound({"type": "audio", **make()}, max_seconds=10)
