"""Loading clips: every format and source, sample rates that agree, and what is refused."""

from __future__ import annotations

import base64
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molora.encoders import sound
from molora.encoders.logmel import log_mel
from molora.encoders.sound import MIN_SAMPLES, SAMPLE_RATE_HZ, load_sound, resample
from molora.encoders.sound_files import pieces
from molora.media import Sources
from molora.modality import MediaError

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

KINDS = (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"))
RATES_HZ = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


def tones(rate_hz: int, hertz: tuple[float, ...] = (440.0, 1700.0, 3100.0), seconds: float = 1.0) -> np.ndarray:
    steps = np.arange(round(rate_hz * seconds)) / rate_hz
    return sum(0.8 / len(hertz) * np.sin(2 * np.pi * f * steps) for f in hertz).astype(np.float32)  # type: ignore[union-attr]


def encoded(wave: np.ndarray, rate_hz: int = 16_000, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def without_count(mp3: bytes) -> bytes:
    """An MP3 (MPEG 2, layer III) without its first frame, which only says how many follow."""
    kbps = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[mp3[2] >> 4]
    return mp3[72_000 * kbps // 16_000 + (mp3[2] >> 1 & 1) :]


def mp3(wave: np.ndarray, mode: str) -> bytes:
    buffer = io.BytesIO()
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": mode, "compression_level": 0.5}
    with soundfile.SoundFile(buffer, "w", 16_000, 1, **options) as file:
        file.write(wave)
    return buffer.getvalue()


def with_sizes(wav: bytes, riff: int, data: int) -> bytes:
    """A plain 16-bit wav file whose header names these sizes."""
    return wav[:4] + riff.to_bytes(4, "little") + wav[8:40] + data.to_bytes(4, "little") + wav[44:]


def streamed(flac: bytes) -> bytes:
    """A FLAC that does not say how long it is, as an encoder writes it into a pipe."""
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def load(value: Any, key: str = "bytes", **rest: Any) -> torch.Tensor:
    return load_sound({"type": "audio", key: value, **rest})


WAVE = tones(16_000)


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


@pytest.mark.parametrize("rate_hz", [22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_what_16_khz_can_carry_stays_and_the_rest_is_gone(rate_hz: int):
    """Up to 7.6 kHz, where the highest mel filter is, within 0.1 %; from 8 kHz on to 1e-4 of what was there."""
    for hertz in (1000.0, 5000.0, 7600.0):
        loaded = load(encoded(tones(rate_hz, (hertz,)), rate_hz, "WAV", "FLOAT"))
        assert float((loaded - torch.from_numpy(tones(16_000, (hertz,))))[1000:-1000].abs().max()) < 1e-3
    for hertz in (8010.0, 8600.0, 10_900.0):
        loaded = load(encoded(tones(rate_hz, (hertz,)), rate_hz, "WAV", "FLOAT"))
        assert float(loaded[1000:-1000].abs().max()) < 1e-4


@pytest.mark.parametrize("rate_hz", [1_000, *RATES_HZ, 96_000, 768_000])
def test_resampling_in_steps_is_torchaudios(rate_hz: int):
    from torchaudio.functional import resample as oracle

    wave = torch.from_numpy(np.random.default_rng(0).standard_normal(rate_hz // 2 + 3).astype(np.float32))
    options: dict[str, Any] = {"lowpass_filter_width": 128, "rolloff": 0.978, "beta": 8.96}
    wanted = oracle(wave.double(), rate_hz, 16_000, resampling_method="sinc_interp_kaiser", **options)
    assert float((resample(wave, rate_hz) - wanted).abs().max()) < 1e-5


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


def test_every_source_gives_the_same_clip(tmp_path: Path):
    data, path = encoded(WAVE, kind="FLAC"), tmp_path / "a.flac"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    wanted = load(data)
    sources: list[tuple[str, Any]] = [("path", str(path)), ("base64", text), ("url", f"data:audio/flac;base64,{text}")]
    for key, value in [*sources, ("audio", data), ("audio", str(path))]:
        assert torch.equal(load(value, key), wanted), key


def test_wav_headers_of_pipes_and_careless_writers_are_no_cut():
    wav = encoded(WAVE)
    sizes = [(len(wav), len(wav) - 44), (0, len(wav) - 44), (2**32 - 1, 2**32 - 1), (2**31 + 36, 2**31)]
    sizes += [(2**31 + 35, 2**31 - 1), (0x7FFFF024, 0x7FFFF000)]
    for riff, data in sizes:
        assert torch.equal(load(with_sizes(wav, riff, data)), load(wav)), (riff, data)


def test_an_mp3_of_constant_bit_rate_need_not_count_its_frames():
    """Its length is then guessed from the size of the file, so a picture in its tag makes it seem longer."""
    plain = without_count(mp3(tones(16_000, seconds=3), "CONSTANT"))
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 12_000 >> 7, 12_000 & 127]) + bytes(12_000)
    loaded = load(plain)
    assert 48_000 <= len(loaded) <= 48_000 + 2 * 1152
    assert torch.equal(load(tag + plain), loaded)
    assert torch.equal(load_sound({"bytes": tag + plain}, max_seconds=3.2), loaded)
    with pytest.raises(MediaError, match="max_seconds is 2.5"):
        load_sound({"bytes": tag + plain}, max_seconds=2.5)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_does_not_say_how_long_it_is_is_decoded_whole(mode: str):
    """Only the silence that encoders put before and after the sound is then not known, and stays."""
    whole = mp3(QUIETER, mode)
    wanted, loaded = load(whole).numpy(), load(without_count(whole)).numpy()
    assert len(wanted) == len(QUIETER) <= len(loaded) <= len(QUIETER) + 4 * 1152
    delays = [delay for delay in range(4 * 1152) if delay + len(wanted) <= len(loaded)]
    differences = [float(np.abs(loaded[delay : delay + 4000] - wanted[:4000]).mean()) for delay in delays]
    best = delays[int(np.argmin(differences))]
    assert np.abs(loaded[best : best + len(wanted)] - wanted)[2000:].max() < 1e-3


JOINED = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
          ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16")]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), JOINED)
def test_sounds_joined_end_to_end_are_all_heard(kind: str, subtype: str):
    low, high = tones(16_000, (440.0,)), tones(16_000, (1700.0,), seconds=0.7)
    parts = [encoded(wave, 16_000, kind, subtype) for wave in (low, high, low)]
    wanted = torch.cat([load(part) for part in parts])
    assert torch.equal(load(b"".join(parts)), wanted)
    assert len(wanted) == 2 * 16_000 + 11_200
    if kind == "MP3":  # with the tags that such files often have
        tag, last = b"ID3\x04\x00\x00\x00\x00\x00\x05title", b"TAG" + bytes(125)
        assert torch.equal(load(b"".join(tag + part + last for part in parts)), wanted)
        joined = b"".join(map(without_count, parts))
        assert len(wanted) <= len(load(joined)) <= len(wanted) + 3 * 4 * 1152


def test_streams_side_by_side_are_no_chain():
    """A page that begins a stream right after another one belongs to the same link."""
    vorbis = encoded(WAVE, kind="OGG", subtype="VORBIS")
    first = 28 + vorbis[27]
    other = vorbis[:14] + b"\x09\x09\x09\x09" + vorbis[18:first]
    assert len(pieces(vorbis[:first] + other + vorbis[first:], 10)) == 1
    assert len(pieces(vorbis + vorbis, 10)) == 2


def test_headers_that_were_never_filled_in_are_no_empty_files():
    wanted = load(encoded(WAVE))
    wav, au, caf = encoded(WAVE), encoded(WAVE, kind="AU"), encoded(WAVE, kind="CAF")
    at = caf.index(b"data")
    aiff = encoded(WAVE, kind="AIFF")
    form, count, samples = 4, aiff.index(b"COMM") + 10, aiff.index(b"SSND") + 4
    unfilled = {
        "wav, no sizes": with_sizes(wav, 0, 0),
        "wav, no data": with_sizes(wav, len(wav) - 8, 0),
        "wav of ffmpeg": with_sizes(wav, 2**32 - 1, 2**32 - 1),
        "wav of sox": with_sizes(wav, 0x7FFFF024, 0x7FFFF000),
        "au, no size": au[:8] + bytes(4) + au[12:],
        "au of a pipe": au[:8] + b"\xff" * 4 + au[12:],
        "caf of a recorder": caf[: at + 4] + b"\xff" * 8 + caf[at + 12 :],
    }
    flac = encoded(WAVE, kind="FLAC")
    assert torch.equal(load(streamed(flac)), load(flac))
    for sizes in ((0, 0, 0), (0x7F00_002E, 0x3F80_0000, 0x7F00_0008)):
        changed = bytearray(aiff)
        for place, size in zip((form, count, samples), sizes, strict=True):
            changed[place : place + 4] = size.to_bytes(4, "big")
        unfilled[f"aiff {sizes}"] = bytes(changed)
    for name, data in unfilled.items():
        assert torch.equal(load(data), wanted), name
    with pytest.raises(MediaError, match="has no samples"):  # truly empty, with a chunk after
        load(with_sizes(wav[:44], 36, 0) + b"LIST\x04\0\0\0INFO")


def test_a_long_clip_is_resampled_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch):
    wave = torch.from_numpy(tones(44_100, seconds=3.3))
    whole = resample(wave, 44_100)
    monkeypatch.setattr(sound, "_SAMPLES_AT_ONCE", 10_000)
    torch.testing.assert_close(resample(wave, 44_100), whole, rtol=0, atol=1e-5)
    monkeypatch.undo()
    once = load(encoded(wave.numpy(), 44_100, "OGG", "VORBIS"))
    monkeypatch.setattr(sound, "_SAMPLES_AT_ONCE", 10_000)
    again = load(encoded(wave.numpy(), 44_100, "OGG", "VORBIS"))
    torch.testing.assert_close(again, once, rtol=0, atol=1e-5)


def test_columns_of_datasets_are_taken_as_they_are():
    data = encoded(WAVE)
    wanted = load(data)
    columns: list[Any] = [
        {"bytes": data, "path": "the name it had.wav"},
        {"array": WAVE, "sampling_rate": 16_000, "path": "gone.wav"},
        {"array": WAVE.tolist(), "sampling_rate": 16_000.0, "bytes": None},
        {"array": [[float(x), float(x)] for x in WAVE], "sampling_rate": 16_000},
        {"path": None, "base64": base64.b64encode(data).decode()},
    ]
    for column in columns:
        np.testing.assert_allclose(load(column, "audio").numpy(), wanted.numpy(), atol=1e-4)
    assert torch.equal(load(data, sampling_rate=16_000, transcript="others may use it"), wanted)


def test_a_clip_shares_no_memory_with_the_array_it_came_from():
    wave = WAVE.copy()
    load(wave, "array", sampling_rate=16_000).zero_()
    assert np.array_equal(wave, WAVE)


def test_a_long_clip_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch):
    data = {kind: encoded(np.zeros(160_000), 16_000, kind, subtype) for kind, subtype in KINDS}

    def decoded(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", decoded)
    for kind in data:
        with pytest.raises(MediaError, match="lasts 10.0 seconds, max_seconds is 9.5"):
            load_sound({"bytes": data[kind]}, max_seconds=9.5)


def test_silence_full_scale_tones_and_loud_music_are_not_refused():
    assert not load(np.zeros(16_000, np.int16), "array", sampling_rate=16_000).any()
    sine = np.sin(2 * np.pi * 100 * np.arange(16_000) / 16_000)
    for wave in (sine, 0.9 * np.sign(sine), np.round(sine * 32767).astype(np.int16)):
        assert len(load(wave, "array", sampling_rate=16_000)) == 16_000
    loud = np.clip(1.3 * tones(16_000), -1, 1)
    assert len(load(loud, "array", sampling_rate=16_000)) == 16_000


LONG = tones(16_000, seconds=8)
# Its bit rate falls after three seconds.
QUIETER = np.concatenate([0.3 * np.random.default_rng(0).standard_normal(48_000), 0.001 * LONG]).astype(np.float32)


def holed(data: bytes) -> bytes:
    return data[: len(data) // 2] + data[len(data) // 2 + 300 :]


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
    "unscaled": (lambda: {"array": 32767 * WAVE, "sampling_rate": 16_000}, "need division by 32768"),
    "no rate": (lambda: {"array": WAVE}, "without its sampling_rate"),
    "odd rate": (lambda: {"array": WAVE, "sampling_rate": 44.1}, "has sampling_rate 44.1"),
    "cube": (lambda: {"array": np.zeros((2, 2, 2)), "sampling_rate": 16_000}, "of shape \\(2, 2, 2\\)"),
    "text": (lambda: {"array": np.array(["a"]), "sampling_rate": 16_000}, "give numbers"),
    "a rate of no ratio": (lambda: {"array": WAVE, "sampling_rate": 15_991}, "no small ratio .* .15991 : 16000"),
    "another rate": (
        lambda: {"bytes": encoded(WAVE), "sampling_rate": 8_000},
        "16000 Hz beside a sampling_rate of 8000",
    ),
    "too slow": (lambda: {"array": WAVE, "sampling_rate": 999}, "sampling_rate 999; .* from 1000 to 768000"),
    "64 bits": (lambda: {"array": np.ones(800, np.int64), "sampling_rate": 16_000}, "is int64 of shape .*give numbers"),
    "ragged": (lambda: {"array": [[0.1], [0.1, 0.2]], "sampling_rate": 16_000}, "is no array"),
    "lying down": (lambda: {"array": np.zeros((2, 800)), "sampling_rate": 16_000}, "L x channels in numpy"),
    "standing": (lambda: {"array": torch.zeros(800, 2), "sampling_rate": 16_000}, "channels x L in torch"),
    "no channels": (lambda: {"array": np.zeros((800, 0)), "sampling_rate": 16_000}, "has no samples"),
    "cut to one": (lambda: {"array": np.clip(32767 * WAVE, -1, 1), "sampling_rate": 16_000}, "is clipped"),
    "one channel clipped": (
        lambda: {"array": np.stack([WAVE, np.clip(20 * WAVE, -1, 1)], 1), "sampling_rate": 16_000},
        "is clipped",
    ),
    "not finite file": (lambda: {"bytes": encoded(np.full(800, np.nan), 16_000, "WAV", "FLOAT")}, "not finite"),
    "unscaled file": (lambda: {"bytes": encoded(9e3 * WAVE, 16_000, "WAV", "FLOAT")}, "need division by 32768"),
    "cut wav": (lambda: {"bytes": encoded(WAVE)[:-2000]}, "is cut off: 32000 bytes promised, 30000 there"),
    "cut aiff": (lambda: {"bytes": encoded(WAVE, kind="AIFF")[:-2000]}, "is cut off"),
    "cut flac": (lambda: {"bytes": encoded(WAVE, kind="FLAC")[:-2000]}, "damaged or no audio .*flac"),
    "cut vorbis": (lambda: {"bytes": encoded(LONG, 16_000, "OGG", "VORBIS")[:-20]}, "is cut off"),
    "cut opus": (lambda: {"bytes": encoded(LONG, 16_000, "OGG", "OPUS")[:-20]}, "is cut off"),
    "vorbis with a hole": (lambda: {"bytes": holed(encoded(LONG, 16_000, "OGG", "VORBIS"))}, "is cut off or damaged"),
    "cut mp3": (
        lambda: {"bytes": mp3(LONG, "CONSTANT")[:-9000]},
        "is cut off or damaged: 225 frames promised, 200 there",
    ),
    "cut mp3 without its length": (
        lambda: {"bytes": without_count(mp3(LONG, "VARIABLE")[:-50])},
        "is cut off: .* bytes of its last frame",
    ),
    "holed mp3": (lambda: {"bytes": holed(mp3(LONG, "CONSTANT"))}, "is cut off or damaged: 225 frames promised"),
    "holed mp3 without its length": (
        lambda: {"bytes": holed(without_count(mp3(LONG, "CONSTANT")))},
        "is cut off or damaged: [0-9]+ bytes after its last frame are no sound",
    ),
    "cut nist": (lambda: {"bytes": encoded(WAVE, kind="NIST")[:-2000]}, "16000 samples promised, 15000 decoded"),
    "cut rf64": (lambda: {"bytes": encoded(WAVE, kind="RF64")[:-2000]}, "is cut off"),
    "cut w64": (lambda: {"bytes": encoded(WAVE, kind="W64")[:-2000]}, "is cut off"),
    "cut caf": (lambda: {"bytes": encoded(WAVE, kind="CAF")[:-2000]}, "is cut off"),
    "cut au": (lambda: {"bytes": encoded(WAVE, kind="AU")[:-2000]}, "is cut off"),
    "streamed flac, cut": (lambda: {"bytes": streamed(encoded(WAVE, kind="FLAC"))[:-9]}, "damaged or no audio"),
    "joined, the second cut": (
        lambda: {"bytes": encoded(WAVE, kind="FLAC") + encoded(WAVE, kind="FLAC")[:-2000]},
        "damaged or no audio",
    ),
    "joined at two rates": (
        lambda: {"bytes": encoded(WAVE, 16_000) + encoded(WAVE, 8_000)},
        "is 2 sounds joined, at 16000 and 8000 Hz",
    ),
    "joined and too long": (lambda: {"bytes": encoded(LONG) * 2}, "lasts 16.0 seconds, max_seconds is 10"),
    "joined mp3 and too long": (lambda: {"bytes": mp3(LONG, "VARIABLE") * 2}, "max_seconds is 10"),
    "what is it": (lambda: {"audio": 3}, "give a path, a URL, bytes, an array, or a mapping"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_clips_are_refused_with_the_reason(name: str):
    make, reason = BAD[name]
    with pytest.raises(MediaError, match=reason):
        load_sound({"type": "audio", **make()}, max_seconds=10)


def test_the_bytes_of_a_clip_are_not_copied_to_move_in_them() -> None:
    data = bytes(2**24)
    tracemalloc.start()
    try:
        file = sound._BoundedFile(data)
        assert file.seek(-8, io.SEEK_END) == len(data) - 8
        assert file.seek(2**40) == len(data) and file.seek(-1) == 0
        assert tracemalloc.get_traced_memory()[1] < len(data) // 2
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("kind", "subtype"), [*KINDS, ("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "OPUS")])
@pytest.mark.parametrize(("start", "end"), [(0, 0.5), (0.25, 0.75), (0.25, None), (None, 0.3), (1.5, 2.0), (0.9, 2.2)])
def test_a_part_of_a_clip_is_that_part_of_the_whole(
    kind: str, subtype: str, start: float | None, end: float | None
) -> None:
    data = encoded(tones(16_000, seconds=2.0), 16_000, kind, subtype)
    whole = load(data)
    first, last = round(16_000 * (start or 0)), None if end is None else round(16_000 * end)
    assert torch.equal(load(data, start_seconds=start, end_seconds=end), whole[first:last])


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_a_part_may_lie_across_sounds_that_were_joined_and_in_one_of_unknown_length(kind: str) -> None:
    subtype = "VORBIS" if kind == "OGG" else "PCM_16"
    data = encoded(tones(16_000), 16_000, kind, subtype) + encoded(tones(16_000, (700.0,)), 16_000, kind, subtype)
    for start, end in ((0.2, 0.4), (0.8, 1.3), (1.25, 1.75), (1.0, None)):
        last = None if end is None else round(16_000 * end)
        assert torch.equal(load(data, start_seconds=start, end_seconds=end), load(data)[round(16_000 * start) : last])
    if kind == "FLAC":
        alone = streamed(encoded(tones(16_000), 16_000, kind, subtype))
        assert torch.equal(load(alone, start_seconds=0.5), load(alone)[8000:])


def test_a_part_of_an_array_and_at_another_rate() -> None:
    wave = tones(8_000, (440.0,), seconds=2.0)
    part = load(wave, "array", sampling_rate=8_000, start_seconds=0.5, end_seconds=1.5)
    assert torch.equal(part, load(wave[4_000:12_000], "array", sampling_rate=8_000))
    assert torch.equal(part, load(encoded(wave, 8_000, "WAV", "DOUBLE"), start_seconds=0.5, end_seconds=1.5))
    assert len(load(encoded(wave, 8_000), start_seconds=0.5)) == 24_000


def test_the_limit_of_seconds_is_on_the_part_that_is_heard() -> None:
    for kind, subtype in KINDS:
        data = encoded(tones(16_000, seconds=3.0), 16_000, kind, subtype)
        assert len(load_sound({"bytes": data, "start_seconds": 1, "end_seconds": 2}, max_seconds=1.5)) == 16_000
        with pytest.raises(MediaError, match="max_seconds is 1.5"):
            load_sound({"bytes": data, "start_seconds": 1}, max_seconds=1.5)


def test_what_is_not_heard_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(tones(16_000, seconds=4.0), 16_000, "FLAC", "PCM_16")
    read, numbers = soundfile.SoundFile.read, []

    def counted(self: Any, frames: int, **rest: Any) -> Any:
        block = read(self, frames, **rest)
        numbers.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    load(data, start_seconds=3, end_seconds=3.5)
    assert sum(numbers) == 8_000


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        ((1.0, None), "has start_seconds 1, but lasts 1.000 seconds"),
        ((0.5, 1.6), "has end_seconds 1.6, but lasts 1.000 seconds"),
        ((3, 4), "has start_seconds 3 and end_seconds 4, but lasts 1.000 seconds"),
        ((-0.1, None), "has start_seconds -0.1 and end_seconds None; a part starts at 0 or later"),
        ((0.5, 0.5), "a part starts at 0 or later, and ends later"),
        ((0.5, 0.51), "lasts 160 samples at 16 kHz, and 400"),
        (("0.5", None), "has start_seconds '0.5' .* each is a number of seconds"),
        ((0, float("nan")), "each is a number of seconds"),
        ((True, None), "each is a number of seconds"),
    ],
)
def test_a_part_that_a_clip_does_not_have_is_refused(seconds: tuple[Any, Any], says: str) -> None:
    start, end = seconds
    for value in ({"bytes": encoded(WAVE)}, {"array": WAVE, "sampling_rate": 16_000}):
        with pytest.raises(MediaError, match=says):
            load_sound({"type": "audio", **value, "start_seconds": start, "end_seconds": end})


@pytest.mark.parametrize(("start", "end"), [(0.25, 0.75), (0.25, None), (None, 0.3), (0.5, 1.4)])
@pytest.mark.parametrize("joined", [False, True])
def test_a_part_of_a_wav_on_disk_is_read_alone_unless_the_file_is_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: float | None, end: float | None, joined: bool
) -> None:
    data = encoded(tones(16_000)) * (1 + joined)
    (tmp_path / "a.wav").write_bytes(data)
    path, wanted = str(tmp_path / "a.wav"), load(data, start_seconds=start, end_seconds=end)
    whole_files = []
    read = Sources.read
    monkeypatch.setattr(Sources, "read", lambda self, key, value: whole_files.append(key) or read(self, key, value))
    assert torch.equal(load(path, "path", start_seconds=start, end_seconds=end), wanted)
    assert whole_files == ["path"] * joined


def test_a_part_of_a_file_that_cannot_be_read_is_refused_as_the_whole_is(tmp_path: Path) -> None:
    wav = encoded(tones(16_000))
    (tmp_path / "cut.wav").write_bytes(wav[: len(wav) // 2])
    (tmp_path / "text.wav").write_bytes(b"RIFF\x10\0\0\0WAVE and no more..")
    (tmp_path / "good.wav").write_bytes(wav)
    with pytest.raises(MediaError, match="is cut off"):
        load(str(tmp_path / "cut.wav"), "path", start_seconds=0.8)
    with pytest.raises(MediaError, match="cannot be decoded"):
        load(str(tmp_path / "text.wav"), "path", start_seconds=0.1)
    with pytest.raises(MediaError, match=r"path '.*good.wav': has start_seconds 1, but lasts 1.000 seconds"):
        load(str(tmp_path / "good.wav"), "path", start_seconds=1)
    with pytest.raises(MediaError, match="No such file"):
        load(str(tmp_path / "gone.wav"), "path", start_seconds=0.5)
    with pytest.raises(MediaError, match="is a folder"):
        load(str(tmp_path), "path", start_seconds=0.5)
