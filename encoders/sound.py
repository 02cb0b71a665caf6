"""Clips of content parts as mono waveforms at 16 kHz.

Letters: L samples, C channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molora.encoders.media import Sources
from molora.modality import MediaError

SAMPLE_RATE_HZ = 16_000

# A frame of the front end; from less there is nothing to hear.
MIN_SAMPLES = 400

SOURCES = ("path", "url", "base64", "bytes", "audio", "array")

MAX_FILE_BYTES = 2**30
_RATES_HZ = (1_000, 768_000)

# Clipped: more than this share of the samples begin a run of three at full scale.
_MAX_CLIPPED_SHARE = 0.05
_FULL_SCALE = 32767 / 32768
_CLIPPED_RUN = 3

# Floats may overshoot a little (lossy decoders, filters); far beyond 1 they are integers that were never scaled.
_MAX_OVERSHOOT = 2.0

# Kaiser-windowed sinc, wide enough to be flat to 7 kHz and to let nothing above 8 kHz through; see the tests.
_RESAMPLING: dict[str, Any] = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}


def load_sound(
    part: Mapping[str, Any], *, allow_urls: bool = True, media_root: str | None = None, max_seconds: float = 1800.0
) -> Tensor:
    """Decodes the clip of a content part to a mono waveform (L,) in fp32 at 16 kHz.

    The part has one of `path`, `url`, `base64` (or a data URI), `bytes`, `audio` (any of the others, or a mapping with
    `array` and `sampling_rate`), `array`. Files are wav, flac, ogg, mp3 and whatever else soundfile reads. Beside an
    `array` stands its `sampling_rate` in hertz; it is L, L x C in numpy, C x L in torch, of floats in [-1, 1] or of
    integers, which are scaled by their type's range. Channels are averaged. n samples at r hertz become
    ceil(16000 n / r).

    Raises: MediaError that says which part, what is wrong with it, and what to do; ImportError without the `audio`
    extra.
    """
    sources = Sources(
        part_type="audio",
        noun="clip",
        keys=SOURCES,
        max_file_bytes=MAX_FILE_BYTES,
        allow_urls=allow_urls,
        media_root=media_root,
    )
    key, value = sources.choose(part)
    rate_hz = part.get("sampling_rate")
    if key == "audio" and isinstance(value, Mapping):
        rate_hz = value.get("sampling_rate")
        key, value = "array", value.get("array")
    with sources.named(key, value):
        if key == "audio":
            raise MediaError("give a path, a URL, bytes, an array, or a mapping of array and sampling_rate")
        if key == "array":
            wave_LC, rate_hz = _from_array(value), _checked_rate(rate_hz)
        else:
            wave_LC, rate_hz = _decode(sources.read(key, value), max_seconds)
        _check_length(len(wave_LC) / rate_hz, max_seconds)
        wave_L = resample(torch.from_numpy(_mixed(wave_LC)), rate_hz)
        if len(wave_L) < MIN_SAMPLES:
            raise MediaError(
                f"lasts {len(wave_L)} samples at 16 kHz, and {MIN_SAMPLES} (25 ms) is the least; give a longer clip"
            )
        return wave_L


def resample(wave_L: Tensor, rate_hz: int) -> Tensor:
    """A waveform at `rate_hz` to 16 kHz. Raises ImportError without the `audio` extra."""
    return wave_L if rate_hz == SAMPLE_RATE_HZ else _resampler(rate_hz)(wave_L)


@lru_cache(maxsize=32)
def _resampler(rate_hz: int) -> Any:
    """torchaudio's resampler, whose kernel is made once for a rate."""
    try:
        from torchaudio.transforms import Resample
    except ImportError as error:
        raise ImportError("resampling needs torchaudio: pip install 'molora[audio]'") from error
    return Resample(rate_hz, SAMPLE_RATE_HZ, **_RESAMPLING)


def _decode(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding clips needs soundfile: pip install 'molora[audio]'") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_length(file.frames / file.samplerate, max_seconds)  # by its header, before it fills the memory
            wave_LC = file.read(dtype="float32", always_2d=True)
            promised, rate_hz = file.frames, _checked_rate(file.samplerate)
    except soundfile.SoundFileError as error:
        raise MediaError(
            f"cannot be decoded, it is damaged or no audio ({error}); check that it plays, or convert it to wav or flac"
        ) from error
    if len(wave_LC) < promised or _is_cut_off(data):
        raise MediaError(f"is cut off after {len(wave_LC)} samples; copy or download it again")
    return wave_LC, rate_hz


def _is_cut_off(data: bytes) -> bool:
    """Whether a file ends before its own end mark, where libsndfile would take what there is."""
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little")
        return size < 0xFFFFFFFF and size + 8 > len(data) + 1  # programs that stream write the largest size
    last_page = data.rfind(b"OggS") if data[:4] == b"OggS" else -1
    return last_page >= 0 and not data[last_page + 5] & 4


def _from_array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).movedim(0, -1).numpy()
    wave = np.asarray(value)
    wave_LC = wave[:, None] if wave.ndim == 1 else wave
    if wave_LC.ndim != 2 or wave.dtype.kind not in "fiu" or not 1 <= wave_LC.shape[-1] <= 32:
        raise MediaError(
            f"is {wave.dtype} of shape {wave.shape}; give numbers: L, or L x channels in numpy, channels x L in torch"
        )
    if wave.dtype.kind == "f":
        return wave_LC.astype(np.float32)
    limits = np.iinfo(wave.dtype)
    middle = (limits.max + 1) // 2 if wave.dtype.kind == "u" else 0
    return ((wave_LC.astype(np.float64) - middle) / (limits.max + 1 - middle)).astype(np.float32)


def _mixed(wave_LC: np.ndarray) -> np.ndarray:
    """The mean of the channels, refused if any of them is unusable."""
    if not wave_LC.size:
        raise MediaError("has no samples; record or export it again")
    if not np.isfinite(wave_LC).all():
        raise MediaError("holds samples that are not finite (NaN or infinity); repair it")
    peak = float(np.abs(wave_LC).max())
    if peak > _MAX_OVERSHOOT:
        raise MediaError(
            f"has samples up to {peak:.4g}, but floats lie in [-1, 1]; 16-bit integers stored as floats want dividing "
            "by 32768"
        )
    full_LC = np.abs(wave_LC) >= _FULL_SCALE
    starts_LC = np.logical_and.reduce([full_LC[i : len(full_LC) - _CLIPPED_RUN + 1 + i] for i in range(_CLIPPED_RUN)])
    if starts_LC.mean() > _MAX_CLIPPED_SHARE:
        raise MediaError(
            f"is clipped: {starts_LC.mean():.0%} of its samples begin a run of {_CLIPPED_RUN} at full scale, "
            f"{_MAX_CLIPPED_SHARE:.0%} is the most; record it at a lower level"
        )
    return wave_LC.mean(axis=1)


def _check_length(seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise MediaError(f"lasts {seconds:.1f} seconds, max_seconds is {max_seconds:g}; cut it, or raise the limit")


def _checked_rate(rate_hz: Any) -> int:
    low, high = _RATES_HZ
    if rate_hz is None:
        raise MediaError("is an array without its sampling_rate; give the rate in hertz beside it")
    if not isinstance(rate_hz, (int, np.integer)) or not low <= rate_hz <= high:
        raise MediaError(f"has sampling_rate {rate_hz!r}; it is a whole number of hertz from {low} to {high}")
    return int(rate_hz)
