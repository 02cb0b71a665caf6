"""Clips of content parts as mono waveforms at 16 kHz.

Letters: L samples, C channels, O samples that one step of the resampler makes, K samples that each is made of.
"""

import io
import math
import numbers
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from molora.encoders.mp3 import AGAIN
from molora.encoders.sound_files import UNKNOWN_BYTES, pieces
from molora.media import Sources, open_file
from molora.modality import MediaError

# What encoders hear, and the frames that their features are made of: 25 ms every 10 ms.
SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 400
HOP_SAMPLES = 160

# From less than a frame there is nothing to hear.
MIN_SAMPLES = FRAME_SAMPLES

# Half an hour of 24-bit stereo at 48 kHz is half of it.
MAX_FILE_BYTES = 2**30
_SOURCES = ("path", "url", "base64", "bytes", "audio", "array")
_CLIPS = Sources(
    part_type="audio", keys=_SOURCES, max_file_bytes=MAX_FILE_BYTES, part_of=("start_seconds", "end_seconds")
)

# Ends of segments are rounded, so that they may lie a little beyond the clip's. Source: Kaldi's extract-segments.
_MAX_OVERSHOOT_SECONDS = 0.5

_MIN_HZ, _MAX_HZ = 1_000, 768_000
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
_FILTER: dict[str, Any] = {"lowpass_filter_width": 128, "rolloff": 0.978, "beta": 8.96}  # width: zero crossings

# A rate that is no small ratio to 16 kHz needs a table of filters that would fill the memory.
_MAX_FILTER_WEIGHTS = 2**24
# A convolution with few filters is slow, so each step of it makes about this many samples.
_SAMPLES_PER_STEP = 128

# What a clip's samples may take, of all its channels: half an hour of stereo at 48 kHz is nine tenths of it.
MAX_DECODED_BYTES = 768 * 2**20
_SAMPLES_AT_ONCE = 2**20

# libsndfile takes what there is of a file that was cut off or has holes, and says so only in its log.
_CUT_OFF = re.compile(
    r"^ *(?:data|SSND|BODY|Data Size|riff|Riff size) *: (?P<promised>\d+) \(should be (?P<present>\d+)\)"
    r"|^Ogg ?: (?:Junk after the last page|Last page lacks|File ended unexpectedly|Skipped \d+ bytes)",
    re.MULTILINE,
)
_UNKNOWN_FRAMES = 2**63 - 1
# NIST SPHERE, as speech corpora have it, says its length in words that libsndfile passes over.
_NIST_SAMPLES = re.compile(rb"^sample_count -i (\d+)", re.MULTILINE)

# An MP3 may count one frame too many or too few, and decoders start late.
_MP3_SPARE_SAMPLES = 2 * 1152


def load_sound(part: Mapping[str, Any], *, max_seconds: float = 1800.0) -> Tensor:
    """Decodes the clip of a content part to a mono waveform (L,) in fp32 at 16 kHz.

    The part has one of `path`, `url`, `base64` (or a data URI), `bytes`, `audio` (any of the others, or a mapping of
    one, as columns of datasets are), `array`. Files are wav, flac, ogg, mp3 and whatever else soundfile reads. Beside
    an `array` stands its `sampling_rate` in hertz; it is L or L x C in numpy, L or C x L in torch, of floats in [-1, 1]
    or of uint8, int16 or int32, which are scaled by their range. `start_seconds` and `end_seconds` ask for a part of
    the sound, to which `max_seconds` then applies. Channels are averaged. n samples at r hertz become
    ceil(16000 n / r). Full scale is 1; peaks of lossy files and of resampled sound may lie a little beyond.

    A clip that was recorded or converted too loud, so that it is flat at full scale for much of its time, is refused. A
    square wave at full scale is too: integers cut to [-1, 1] look the same.

    Raises: MediaError that says which part, what is wrong with it, and what to do; ImportError without the `audio`
    extra.
    """
    key, value = _CLIPS.choose(part := _CLIPS.flat(part))
    with _CLIPS.named(key, value):
        if key == "audio":
            raise MediaError("give a path, a URL, bytes, an array, or a mapping of array and sampling_rate")
        span = _Span.of(part)
        given_hz = part.get("sampling_rate")
        if given_hz is not None and not (isinstance(given_hz, numbers.Real) and float(given_hz).is_integer()):
            raise _wrong_rate(given_hz)
        if key == "array":
            if given_hz is None:
                raise MediaError("is an array without its sampling_rate; give the rate in hertz beside it")
            wave_LC, rate_hz = _from_array(value), int(float(given_hz))
            wave_LC = span.cut(wave_LC, rate_hz)
            _check_limits(rate_hz, wave_LC.shape[1], len(wave_LC), max_seconds)
            mixer = _Mixer()
            for start in range(0, len(wave_LC), _SAMPLES_AT_ONCE):
                mixer.add(_scaled(wave_LC[start : start + _SAMPLES_AT_ONCE]))
            wave_L = mixer.wave_L()
        else:
            wave_L, rate_hz = _decode_source(key, value, span, max_seconds)
            if given_hz not in (None, rate_hz):
                raise MediaError(f"is a file at {rate_hz} Hz beside a sampling_rate of {given_hz}; leave that out")
        wave_L = resample(torch.from_numpy(wave_L), rate_hz)
        if len(wave_L) < MIN_SAMPLES:
            raise MediaError(
                f"lasts {len(wave_L)} samples at 16 kHz, and {MIN_SAMPLES} (25 ms) is the least; give a longer clip"
            )
        return wave_L


def resample(wave_L: Tensor, rate_hz: int) -> Tensor:
    """A waveform of n samples at `rate_hz` to ceil(16000 n / rate_hz) at 16 kHz. Raises MediaError for a rate that is
    no small ratio to 16 kHz, and ImportError without the `audio` extra."""
    if rate_hz == SAMPLE_RATE_HZ:
        return wave_L
    filters_OK, stride, before = _filters(rate_hz)
    num_samples = -(-len(wave_L) * SAMPLE_RATE_HZ // rate_hz)
    num_steps = -(-num_samples // len(filters_OK))
    steps_at_once = max(1, _SAMPLES_AT_ONCE // stride)
    made = []
    for first in range(0, num_steps, steps_at_once):  # a long clip is not copied whole
        steps = min(steps_at_once, num_steps - first)
        start = first * stride - before
        stop = start + (steps - 1) * stride + filters_OK.shape[1]
        around = wave_L[max(0, start) : max(0, stop)]
        around = F.pad(around, (max(0, -start), stop - max(0, start) - len(around)))
        made.append(F.conv1d(around[None], filters_OK[:, None], stride=stride).T.reshape(-1))
    return (made[0] if len(made) == 1 else torch.cat(made))[:num_samples]


@lru_cache(maxsize=4)
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
    sinc = Resample(rate_hz, SAMPLE_RATE_HZ, "sinc_interp_kaiser", **_FILTER, dtype=torch.float64)
    kernel: Any = sinc.kernel
    filters_OK = kernel.squeeze(1).float()
    repeats = -(-_SAMPLES_PER_STEP // make)
    shifted = [F.pad(filters_OK, (i * take, (repeats - 1 - i) * take)) for i in range(repeats)]
    return torch.cat(shifted), repeats * take, sinc.width


class _Span(NamedTuple):
    """Which part of a sound is heard, in seconds; up to the sound's end if `end` is None."""

    start: float
    end: float | None

    @classmethod
    def of(cls, part: Mapping[str, Any]) -> Self:
        """Raises MediaError for seconds that are none, and for a part that ends before it starts."""
        start, end = part.get("start_seconds"), part.get("end_seconds")
        for value in (start, end):
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not is_number:
                raise MediaError(
                    f"has start_seconds {start!r:.40} and end_seconds {end!r:.40}; each is a number of seconds"
                )
        span = cls(float(start or 0), None if end is None else float(end))
        if span.start < 0 or (span.end is not None and span.end <= span.start):
            raise MediaError(
                f"has start_seconds {start} and end_seconds {end}; a part starts at 0 or later, and ends later"
            )
        return span

    @property
    def is_whole(self) -> bool:
        return self == (0.0, None)

    def samples(self, rate_hz: int) -> tuple[int, int]:
        """The first sample, and the one after the last."""
        return round(self.start * rate_hz), sys.maxsize if self.end is None else round(self.end * rate_hz)

    def check(self, num_samples: int, rate_hz: int) -> None:
        """Raises MediaError for a part that starts or ends after the sound, which has so many samples."""
        late = []
        if not self.is_whole and self.start * rate_hz >= num_samples:
            late = [f"start_seconds {self.start:g}"]
        if self.end is not None and (self.end - _MAX_OVERSHOOT_SECONDS) * rate_hz > num_samples:
            late.append(f"end_seconds {self.end:g}")
        if late:
            raise MediaError(f"has {' and '.join(late)}, but lasts {num_samples / rate_hz:.3f} seconds")

    def cut(self, wave_LC: np.ndarray, rate_hz: int) -> np.ndarray:
        self.check(len(wave_LC), rate_hz)
        first, last = self.samples(rate_hz)
        return wave_LC[first:last]


def _decode_source(key: str, value: Any, span: _Span, max_seconds: float) -> tuple[np.ndarray, int]:
    """The samples of a part of what a content part gives, and their rate in hertz. Of a part of a WAV no more is read
    than that part: recordings of speech may be hours long, and their segments seconds."""
    if key == "path" and not span.is_whole:
        with open_file(value, MAX_FILE_BYTES) as (file, num_bytes):
            if _is_one_wav(file, num_bytes):
                wave_L, rate_hz, num = _decode_piece(_OpenFile(file, num_bytes), 0, span, max_seconds)
                if num < span.samples(rate_hz)[1]:
                    span.check(num, rate_hz)
                return wave_L, rate_hz
    return _decode(_CLIPS.read(key, value), span, max_seconds)


def _is_one_wav(file: io.BufferedReader, num_bytes: int) -> bool:
    """Whether a file is a WAV from its first byte to its last: nothing is joined to it, and its header is filled in."""
    head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WAVE" and 8 + int.from_bytes(head[4:8], "little") == num_bytes


def _decode(data: bytes, span: _Span, max_seconds: float) -> tuple[np.ndarray, int]:
    """The samples of a part of a file, its channels averaged, and their rate in hertz."""
    clips, rate_hz, num_samples = [], 0, 0
    for piece in (found := pieces(data, max_seconds if span.is_whole else math.inf)):
        wave_L, piece_hz, num = _decode_piece(_BoundedFile(piece), num_samples, span, max_seconds)
        if rate_hz not in (0, piece_hz):
            raise MediaError(f"is {len(found)} sounds joined, at {rate_hz} and {piece_hz} Hz; convert it to one rate")
        rate_hz, num_samples = piece_hz, num_samples + num
        clips.append(wave_L)
        if num_samples >= span.samples(rate_hz)[1]:
            break
    else:
        span.check(num_samples, rate_hz)
    return clips[0] if len(clips) == 1 else np.concatenate(clips), rate_hz


def _decode_piece(
    source: "_BoundedFile | _OpenFile", before: int, span: _Span, max_seconds: float
) -> tuple[np.ndarray, int, int]:
    """The samples of a file that are in the span, their rate, and how many were passed; as many come `before`."""
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("decoding clips needs soundfile: pip install 'molora[audio]'") from error

    class Forward(soundfile.SoundFile):
        """Read from front to back: soundfile seeks after every read, which lossy decoders do not do exactly."""

        def seekable(self) -> bool:
            return False

    mixer, num = _Mixer(), 0
    try:
        with Forward(source) as file:
            rate_hz, channels, promised = file.samplerate, file.channels, file.frames
            is_mp3, knows = file.format == "MP3", file.frames != _UNKNOWN_FRAMES
            start, stop = span.samples(rate_hz)
            first, last = max(0, start - before), stop - before  # as this file counts
            _check_limits(rate_hz, channels, min(before + promised if knows else 0, stop) - start, max_seconds)
            if first and knows and file.subtype.startswith("PCM_"):
                num = file.seek(min(first, promised))
            ends = min(promised, last)
            while len(block_LC := file.read(min(_SAMPLES_AT_ONCE, ends - num), dtype="float32", always_2d=True)):
                mixer.add(block_LC[max(0, first - num) :])
                num += len(block_LC)
                _check_limits(rate_hz, channels, before + num - start, max_seconds)
            cut_off = _CUT_OFF.search(file.extra_info)
    except soundfile.LibsndfileError as error:
        raise MediaError(
            f"cannot be decoded, it is damaged or no audio ({error.error_string}); check that it plays, or convert it "
            "to wav or flac"
        ) from error
    source.seek(0)
    if (head := source.read(1024)).startswith(b"NIST_1A") and (told := _NIST_SAMPLES.search(head)):
        promised = int(told[1])
    if knows and num < min(promised - (_MP3_SPARE_SAMPLES if is_mp3 else 0), last):
        raise MediaError(f"is cut off or damaged: {promised} samples promised, {num} decoded; {AGAIN}")
    if cut_off and cut_off["promised"] is None:
        raise MediaError(f"is cut off or damaged: pages of its stream are missing; {AGAIN}")
    if cut_off and int(cut_off["present"]) < int(cut_off["promised"]) < UNKNOWN_BYTES:
        raise MediaError(f"is cut off: {cut_off['promised']} bytes promised, {cut_off['present']} there; {AGAIN}")
    is_outside = not span.is_whole and not mixer.num_samples
    return np.zeros(0, np.float32) if is_outside else mixer.wave_L(), rate_hz, num


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
    return wave_LC


def _scaled(wave_LC: np.ndarray) -> np.ndarray:
    """Samples in fp32, integers by their range."""
    if wave_LC.dtype.kind == "f":
        return wave_LC.astype(np.float32)
    middle = 128 if wave_LC.dtype == np.uint8 else 0
    return (wave_LC.astype(np.float32) - middle) / (np.iinfo(wave_LC.dtype).max + 1 - middle)


class _BoundedFile(io.BytesIO):
    """A file whose reader never leaves it: damaged headers make libsndfile seek before its begin and beyond its end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)  # asking the buffer for it would copy the data

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return super().seek(_inside(offset, whence, self.tell(), self._size))


class _OpenFile(io.BufferedReader):
    """The same for a file on disk, of which only what is asked for is read."""

    def __init__(self, file: io.BufferedReader, num_bytes: int) -> None:
        super().__init__(file.raw)
        self._size = num_bytes
        self.seek(0)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return super().seek(_inside(offset, whence, self.tell(), self._size))


def _inside(offset: int, whence: int, at: int, num_bytes: int) -> int:
    """The place that a seek leads to, but for places outside a file."""
    base = {io.SEEK_SET: 0, io.SEEK_CUR: at, io.SEEK_END: num_bytes}[whence]
    return min(max(base + offset, 0), num_bytes)


class _Mixer:
    """The mean of channels, block by block, refused if any of them is unusable."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.num_samples, self.num_clipped = 0, 0.0

    def add(self, wave_LC: np.ndarray) -> None:
        if not wave_LC.size:
            return
        low, high = float(wave_LC.min()), float(wave_LC.max())
        if not np.isfinite((low, high)).all():
            raise MediaError("holds samples that are not finite (NaN or infinity); repair it")
        if (peak := max(-low, high)) > _MAX_OVERSHOOT:
            raise MediaError(
                f"has samples up to {peak:.4g}, but floats lie in [-1, 1]; 16-bit integers stored as floats probably "
                "need division by 32768"
            )
        full_LC = (wave_LC >= _FULL_SCALE) | (wave_LC <= -_FULL_SCALE)
        if full_LC.any():
            self.num_clipped += _share_in_runs(full_LC) * wave_LC.size
        self.num_samples += wave_LC.size
        self.blocks.append(wave_LC.mean(axis=1))

    def wave_L(self) -> np.ndarray:
        if not self.num_samples:
            raise MediaError("has no samples; record or export it again")
        if (share := self.num_clipped / self.num_samples) > _MAX_CLIPPED_SHARE:
            raise MediaError(
                f"is clipped: {share:.0%} of its samples lie in runs at full scale, {_MAX_CLIPPED_SHARE:.0%} is the "
                "most; record it at a lower level"
            )
        return self.blocks[0] if len(self.blocks) == 1 else np.concatenate(self.blocks)


def _share_in_runs(full_LC: np.ndarray) -> float:
    """The share of samples that lie in runs of at least `_CLIPPED_RUN` True ones."""
    num_starts = max(0, len(full_LC) - _CLIPPED_RUN + 1)
    starts_LC = np.logical_and.reduce([full_LC[i : i + num_starts] for i in range(_CLIPPED_RUN)])
    runs_LC = np.zeros_like(full_LC)
    for i in range(_CLIPPED_RUN):
        runs_LC[i : i + num_starts] |= starts_LC
    return float(runs_LC.mean())


def _check_limits(rate_hz: int, channels: int, num_samples: int, max_seconds: float) -> None:
    if not _MIN_HZ <= rate_hz <= _MAX_HZ:
        raise _wrong_rate(rate_hz)
    if channels > _MAX_CHANNELS:
        raise MediaError(f"has {channels} channels, {_MAX_CHANNELS} is the most; mix it down")
    if num_samples > max_seconds * rate_hz:
        raise MediaError(
            f"lasts {num_samples / rate_hz:.1f} seconds, max_seconds is {max_seconds:g}; cut it, or raise the limit"
        )
    if 4 * channels * num_samples > MAX_DECODED_BYTES:
        raise MediaError(
            f"has {num_samples} samples of {channels} channels, {4 * channels * num_samples} bytes, and "
            f"{MAX_DECODED_BYTES} is the most; lower its rate, or mix it down"
        )


def _wrong_rate(rate_hz: Any) -> MediaError:
    return MediaError(f"has sampling_rate {rate_hz!r}; it is a whole number of hertz from {_MIN_HZ} to {_MAX_HZ}")
