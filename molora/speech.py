"""Texts spoken by espeak-ng in many voices, for training: reproducible, cached on disk.

espeak-ng is licensed under GPL-3.0. It comes with the PyPI package `espeakng-loader`, is loaded at run time and never
shipped; the clips that it makes are ours.

Letters: L samples, K bins of the Fourier transform.
"""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from molora.seeding import seed_of
from molora.storage import write_atomically

_ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_TRAINING_TIMBRES = (
    *("m1", "m2", "m3", "m4", "m5", "m7", "f1", "f2", "f4"),
    *("Andy", "Annie", "Denis", "Alex", "Mike", "linda", "ed", "adam"),
)
_HELD_OUT_TIMBRES = ("m6", "m8", "f3", "f5", "Michael", "steph")

TRAINING_VOICES = tuple(f"{accent}+{timbre}" for timbre in _TRAINING_TIMBRES for accent in _ACCENTS)
HELD_OUT_VOICES = tuple(f"{accent}+{timbre}" for timbre in _HELD_OUT_TIMBRES for accent in _ACCENTS)

_PEAK = 0.7


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """A text, how it is said, and where: `noise_decibels` is the ratio of speech to noise, `reverberation_seconds` the
    time in which an echo falls by 60 decibels; None is none. `seed` draws noise and echo."""

    text: str
    voice: str
    words_per_minute: int = 160
    pitch: int = 50
    noise_decibels: float | None = None
    reverberation_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("an utterance needs a text to speak, this one is empty")


def draw_utterance(text: str, voices: Sequence[str], acoustics: bool, *key: int | str) -> Utterance:
    """A text in a voice, speed and pitch, and with `acoustics` a noise and a room, all drawn from `key`."""
    seed = seed_of("utterance", *key)
    draw = random.Random(seed)
    return Utterance(
        text=text,
        voice=draw.choice(voices),
        words_per_minute=draw.randint(130, 200),
        pitch=draw.randint(35, 65),
        noise_decibels=draw.uniform(10, 30) if acoustics and draw.random() < 0.7 else None,
        reverberation_seconds=draw.uniform(0.1, 0.5) if acoustics and draw.random() < 0.5 else None,
        seed=seed,
    )


def clip(utterance: Utterance, folder: Path) -> Path:
    """The utterance as a FLAC file in `folder`, made unless it is there. Raises ImportError without the extra."""
    about = json.dumps({**asdict(utterance), "espeak": version("espeakng-loader")}, sort_keys=True)
    path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.flac"
    if not path.is_file():
        try:
            import soundfile
        except ImportError as error:
            raise ImportError("writing clips needs soundfile: pip install 'molora[demo]'") from error
        wave_L, rate_hz = speak(utterance)
        write_atomically(path, lambda temporary: soundfile.write(temporary, wave_L, rate_hz, format="FLAC"))
    return path


def speak(utterance: Utterance) -> tuple[np.ndarray, int]:
    """The utterance as a mono waveform (L,) in fp32 with a peak of 0.7, and its sample rate in hertz."""
    espeak = _Espeak()
    try:
        wave_L = espeak.speak(utterance.text, utterance.voice, utterance.words_per_minute, utterance.pitch)
    finally:
        espeak.close()
    generator = np.random.default_rng(utterance.seed)
    if utterance.reverberation_seconds is not None:
        wave_L = _reverberate(wave_L, utterance.reverberation_seconds, espeak.rate_hz, generator)
    if utterance.noise_decibels is not None:
        wave_L = wave_L + _noise_like(wave_L, utterance.noise_decibels, generator)
    return (wave_L * (_PEAK / np.abs(wave_L).max())).astype(np.float32), espeak.rate_hz


def _reverberate(wave_L: np.ndarray, seconds: float, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """An echo of decaying noise with a third of the direct sound's energy."""
    num_samples = int(seconds * rate_hz)
    echo_L = generator.standard_normal(num_samples) * 10 ** (-3 * np.arange(num_samples) / num_samples)
    response_L = echo_L / np.sqrt(3 * np.square(echo_L).sum())
    response_L[0] = 1.0
    length = len(wave_L) + num_samples - 1
    return np.fft.irfft(np.fft.rfft(wave_L, length) * np.fft.rfft(response_L, length), length)


def _noise_like(wave_L: np.ndarray, decibels: float, generator: np.random.Generator) -> np.ndarray:
    """Pink noise that is `decibels` weaker than the speech."""
    spectrum_K = np.fft.rfft(generator.standard_normal(len(wave_L)))
    spectrum_K /= np.sqrt(np.maximum(np.arange(len(spectrum_K)), 1))
    noise_L = np.fft.irfft(spectrum_K, len(wave_L))
    return noise_L * np.sqrt(np.square(wave_L).mean() / np.square(noise_L).mean()) * 10 ** (-decibels / 20)


class _Espeak:
    """espeak-ng's C interface (speak_lib.h), as far as it is needed.

    The library keeps the phases of its voice from one utterance to the next, through every way it has to start anew.
    So it is opened for one utterance, and closed: what was said before leaves no trace.
    """

    _SYNCHRONOUS, _RATE, _PITCH, _UTF8, _CHARACTERS = 2, 1, 3, 1, 1

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError("speaking needs espeak-ng: pip install 'molora[demo]'") from error
        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.rate_hz: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, data, 0)
        if self.rate_hz <= 0:
            raise OSError(f"espeak-ng cannot start (error {self.rate_hz}); reinstall espeakng-loader")
        self._chunks: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)  # kept, or ctypes would free what espeak calls
        self._library.espeak_SetSynthCallback(self._callback)

    def close(self) -> None:
        self._call(self._library.espeak_Terminate)
        _ctypes.dlclose(self._library._handle)

    def _receive(self, samples: int | None, count: int, events: int) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """Speech as float64 in [-1, 1]. Raises ValueError for a voice that espeak does not have."""
        library = self._library
        if library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._call(library.espeak_SetParameter, self._RATE, words_per_minute, 0)
        self._call(library.espeak_SetParameter, self._PITCH, pitch, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock seeds it
        said = text.encode() + b"\0"
        self._call(library.espeak_Synth, said, len(said), 0, self._CHARACTERS, 0, self._UTF8, None, None)
        if not self._chunks:
            raise ValueError(f"espeak-ng says nothing for {text!r}")
        return np.frombuffer(b"".join(self._chunks), np.int16) / 32768

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        if code := function(*arguments):
            raise OSError(f"espeak-ng: {function.__name__} failed with code {code}")
