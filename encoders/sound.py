"""Clips of content parts as mono waveforms at 16 kHz.

Letters: L samples, C channels, O samples that one step of the resampler makes, K samples that each is made of.
"""

from __future__ import annotations

import io
import math
import numbers
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from molora.media import Sources
from molora.modality import MediaError

SAMPLE_RATE_HZ = 16_000

# A frame of the front end; from less there is nothing to hear.
MIN_SAMPLES = 400

SOURCES = ("path", "url", "base64", "bytes", "audio", "array")

# Half an hour of 24-bit stereo at 48 kHz is half of it.
MAX_FILE_BYTES = 2**30
_RATES_HZ = (1_000, 768_000)
_MAX_CHANNELS = 64

# Clipped: more than this share of the samples lie in runs at full scale, a run being three or more. The peaks of a sine
# at full scale are half a percent, and a peak that touches full scale seldom stays for three samples.
_MAX_CLIPPED_SHARE = 0.05
_FULL_SCALE = 32767 / 32768
_CLIPPED_RUN = 3

# Floats may overshoot a little (lossy decoders, filters); far beyond 1 they are integers that were never scaled.
_MAX_OVERSHOOT = 2.0

# Kaiser-windowed sinc: flat to the highest mel filter's end at 7.69 kHz (-0.1 dB there), and -89 dB from 8 kHz. From
# lower rates, the same shares of half their rate.
_FILTER_ZERO_CROSSINGS = 128
_FILTER_ROLLOFF = 0.978
_FILTER_BETA = 8.96

# A rate that is no small ratio to 16 kHz needs a table of filters that would fill the memory.
_MAX_FILTER_WEIGHTS = 2**24
# A convolution with few filters is slow, so each step of it makes about this many samples.
_SAMPLES_PER_STEP = 128

# libsndfile takes what there is of a file that was cut off or has holes, and says so only in its log.
_CUT_OFF = re.compile(
    r"^ *(?:data|SSND|Data Size|riff|Riff size) *: (?P<promised>\d+) \(should be (?P<present>\d+)\)"
    r"|^Ogg ?: (?:Junk after the last page|Last page lacks|File ended unexpectedly|Skipped \d+ bytes)",
    re.MULTILINE,
)
# Programs that stream do not know the size, and write one just under 2 or 4 GiB.
_UNKNOWN_BYTES = 0x7FFF_0000
_UNKNOWN_FRAMES = 2**63 - 1

# Encoders of MP3 disagree on whether the frame that holds the count is counted, and tags may follow the last frame.
_MP3_SPARE_SAMPLES = 2 * 1152
_MP3_SPARE_BYTES = 4096


def load_sound(part: Mapping[str, Any], *, max_seconds: float = 1800.0) -> Tensor:
    """Decodes the clip of a content part to a mono waveform (L,) in fp32 at 16 kHz.

    The part has one of `path`, `url`, `base64` (or a data URI), `bytes`, `audio` (any of the others, or a mapping of
    one, as columns of datasets are), `array`. Files are wav, flac, ogg, mp3 and whatever else soundfile reads. Beside
    an `array` stands its `sampling_rate` in hertz; it is L or L x C in numpy, L or C x L in torch, of floats in [-1, 1]
    or of uint8, int16 or int32, which are scaled by their range. Channels are averaged. n samples at r hertz become
    ceil(16000 n / r). Full scale is 1; peaks of lossy files and of resampled sound may lie a little beyond.

    A clip that was recorded or converted too loud, so that it is flat at full scale for much of its time, is refused. A
    square wave at full scale is too: integers cut to [-1, 1] look the same.

    Raises: MediaError that says which part, what is wrong with it, and what to do; ImportError without the `audio`
    extra.
    """
    sources = Sources(part_type="audio", noun="clip", keys=SOURCES, max_file_bytes=MAX_FILE_BYTES)
    part = sources.flat(part)
    key, value = sources.choose(part)
    with sources.named(key, value):
        if key == "audio":
            raise MediaError("give a path, a URL, bytes, an array, or a mapping of array and sampling_rate")
        given_hz = _whole(part.get("sampling_rate"))
        if key == "array":
            if given_hz is None:
                raise MediaError("is an array without its sampling_rate; give the rate in hertz beside it")
            wave_LC, rate_hz = _from_array(value), given_hz
            _check_limits(rate_hz, wave_LC.shape[1], len(wave_LC), max_seconds)
        else:
            wave_LC, rate_hz = _decode(sources.read(key, value), max_seconds)
            if given_hz not in (None, rate_hz):
                raise MediaError(f"is a file at {rate_hz} Hz beside a sampling_rate of {given_hz}; leave that out")
        wave_L = resample(torch.from_numpy(_mixed(wave_LC)), rate_hz)
        if len(wave_L) < MIN_SAMPLES:
            raise MediaError(
                f"lasts {len(wave_L)} samples at 16 kHz, and {MIN_SAMPLES} (25 ms) is the least; give a longer clip"
            )
        return wave_L


def resample(wave_L: Tensor, rate_hz: int) -> Tensor:
    """A waveform of n samples at `rate_hz` to ceil(16000 n / rate_hz) at 16 kHz.

    Raises: MediaError for a rate that is no small ratio to 16 kHz; ImportError without the `audio` extra.
    """
    if rate_hz == SAMPLE_RATE_HZ:
        return wave_L
    filters_OK, stride, before = _filters(rate_hz)
    num_samples = -(-len(wave_L) * SAMPLE_RATE_HZ // rate_hz)
    num_steps = -(-num_samples // len(filters_OK))
    after = (num_steps - 1) * stride + filters_OK.shape[1] - before - len(wave_L)
    steps_OL = F.conv1d(F.pad(wave_L, (before, after))[None], filters_OK[:, None], stride=stride)
    return steps_OL.T.reshape(-1)[:num_samples]


@lru_cache(maxsize=8)
def _filters(rate_hz: int) -> tuple[Tensor, int, int]:
    """filters_OK from `rate_hz` to 16 kHz, by how many samples a step moves, and how many it looks back."""
    try:
        from torchaudio.transforms import Resample
    except ImportError as error:
        raise ImportError("resampling needs torchaudio: pip install 'molora[audio]'") from error
    common = math.gcd(rate_hz, SAMPLE_RATE_HZ)
    make, take = SAMPLE_RATE_HZ // common, rate_hz // common
    if make * take > _MAX_FILTER_WEIGHTS:
        raise MediaError(f"{rate_hz} Hz is no small ratio to 16000 Hz ({take} : {make}); resample it to a common rate")
    sinc = Resample(
        rate_hz,
        SAMPLE_RATE_HZ,
        "sinc_interp_kaiser",
        lowpass_filter_width=_FILTER_ZERO_CROSSINGS,
        rolloff=_FILTER_ROLLOFF,
        beta=_FILTER_BETA,
        dtype=torch.float64,
    )
    kernel: Any = sinc.kernel
    filters_OK = kernel.squeeze(1).float()
    repeats = -(-_SAMPLES_PER_STEP // make)
    shifted = [F.pad(filters_OK, (i * take, (repeats - 1 - i) * take)) for i in range(repeats)]
    return torch.cat(shifted), repeats * take, sinc.width


def _decode(data: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """The samples of a file as wave_LC, and their rate in hertz."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding clips needs soundfile: pip install 'molora[audio]'") from error
    buffer = io.BytesIO(data)
    try:
        with soundfile.SoundFile(buffer) as file:
            rate_hz, promised = file.samplerate, file.frames
            if promised == _UNKNOWN_FRAMES:
                raise MediaError("does not say how long it lasts; convert it, to a file and not to a pipe")
            is_mp3 = file.format == "MP3"
            guessed = is_mp3 and not _counts_frames(data)  # from the size of the file, covers in its tags included
            _check_limits(rate_hz, file.channels, 0 if guessed else promised, max_seconds)
            most = math.floor(min(promised, max_seconds * rate_hz + 1))
            wave_LC = file.read(most, dtype="float32", always_2d=True)
            cut_off = _CUT_OFF.search(file.extra_info)
    except soundfile.LibsndfileError as error:
        raise MediaError(
            f"cannot be decoded, it is damaged or no audio ({error.error_string}); check that it plays, or convert it "
            "to wav or flac"
        ) from error
    if guessed and len(wave_LC) > max_seconds * rate_hz:
        _check_limits(rate_hz, 1, promised, max_seconds)
    if guessed and len(wave_LC) == promised and len(data) - buffer.tell() > _MP3_SPARE_BYTES:
        raise MediaError(
            "is an MP3 of varying bit rate without its length in the first frame; convert it to wav or flac"
        )
    again = "copy or download it again"
    if not guessed and len(wave_LC) < promised - (_MP3_SPARE_SAMPLES if is_mp3 else 0):
        raise MediaError(f"is cut off or damaged: {promised} samples promised, {len(wave_LC)} decoded; {again}")
    if cut_off and cut_off["promised"] is None:
        raise MediaError(f"is cut off or damaged: pages of its stream are missing; {again}")
    if cut_off and int(cut_off["present"]) < int(cut_off["promised"]) < _UNKNOWN_BYTES:
        raise MediaError(f"is cut off: {cut_off['promised']} bytes promised, {cut_off['present']} there; {again}")
    return wave_LC, rate_hz


def _counts_frames(data: bytes) -> bool:
    """Whether an MP3 file says in its first frame how many there are."""
    start = 0
    if data[:3] == b"ID3":  # 7 bits to a byte
        start = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=False))
    return any(name in data[start : start + 64] for name in (b"Xing", b"Info"))


def _from_array(value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).movedim(0, -1).numpy()
    try:
        wave = np.asarray(value)
    except ValueError as error:
        raise MediaError(f"is no array ({error})") from error
    wave_LC = wave[:, None] if wave.ndim == 1 else wave
    known = wave.dtype.kind == "f" or wave.dtype.name in ("uint8", "int16", "int32")
    if wave_LC.ndim != 2 or not known or wave_LC.shape[1] > _MAX_CHANNELS:
        raise MediaError(
            f"is {wave.dtype} of shape {wave.shape}; give numbers (floats in [-1, 1], int16, int32 or uint8), L, or "
            f"L x channels in numpy, channels x L in torch, with {_MAX_CHANNELS} channels at most"
        )
    if wave.dtype.kind == "f":
        return wave_LC.astype(np.float32)
    limits = np.iinfo(wave.dtype)
    middle = 128 if wave.dtype == np.uint8 else 0
    return (wave_LC.astype(np.float32) - middle) / (limits.max + 1 - middle)


def _mixed(wave_LC: np.ndarray) -> np.ndarray:
    """The mean of the channels, refused if any of them is unusable."""
    if not wave_LC.size:
        raise MediaError("has no samples; record or export it again")
    low, high = float(wave_LC.min()), float(wave_LC.max())
    if not np.isfinite((low, high)).all():
        raise MediaError("holds samples that are not finite (NaN or infinity); repair it")
    if max(-low, high) > _MAX_OVERSHOOT:
        raise MediaError(
            f"has samples up to {max(-low, high):.4g}, but floats lie in [-1, 1]; 16-bit integers stored as floats "
            "probably need division by 32768"
        )
    full_LC = (wave_LC >= _FULL_SCALE) | (wave_LC <= -_FULL_SCALE)
    if full_LC.mean() > _MAX_CLIPPED_SHARE and (share := _share_in_runs(full_LC)) > _MAX_CLIPPED_SHARE:
        raise MediaError(
            f"is clipped: {share:.0%} of its samples lie in runs at full scale, {_MAX_CLIPPED_SHARE:.0%} is the most; "
            "record it at a lower level"
        )
    return wave_LC.mean(axis=1)


def _share_in_runs(full_LC: np.ndarray) -> float:
    """The share of samples that lie in runs of at least `_CLIPPED_RUN` True ones."""
    num_starts = max(0, len(full_LC) - _CLIPPED_RUN + 1)
    starts_LC = np.logical_and.reduce([full_LC[i : i + num_starts] for i in range(_CLIPPED_RUN)])
    runs_LC = np.zeros_like(full_LC)
    for i in range(_CLIPPED_RUN):
        runs_LC[i : i + num_starts] |= starts_LC
    return float(runs_LC.mean())


def _check_limits(rate_hz: int, channels: int, num_samples: int, max_seconds: float) -> None:
    low, high = _RATES_HZ
    if not low <= rate_hz <= high:
        raise MediaError(f"has sampling_rate {rate_hz}; it is a whole number of hertz from {low} to {high}")
    if channels > _MAX_CHANNELS:
        raise MediaError(f"has {channels} channels, {_MAX_CHANNELS} is the most; mix it down")
    if num_samples > max_seconds * rate_hz:
        raise MediaError(
            f"lasts {num_samples / rate_hz:.1f} seconds, max_seconds is {max_seconds:g}; cut it, or raise the limit"
        )


def _whole(rate_hz: Any) -> int | None:
    if rate_hz is None:
        return None
    if isinstance(rate_hz, numbers.Real) and float(rate_hz).is_integer():
        return int(float(rate_hz))
    low, high = _RATES_HZ
    raise MediaError(f"has sampling_rate {rate_hz!r}; it is a whole number of hertz from {low} to {high}")
