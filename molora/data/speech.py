"""Texts spoken by espeak-ng in many voices, for training: reproducible, cached on disk.

espeak-ng is licensed under GPL-3.0. It comes with the PyPI package `espeakng-loader`, is loaded at run time and never
shipped; the clips that it makes are ours.

Letters: L samples, K bins of the Fourier transform.
"""

import _ctypes
import ctypes
import hashlib
import json
import os
import random
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from molora.seeding import seed_of
from molora.storage import write_atomically

_ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
_TRAINING_TIMBRES = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f4"),
    *("Andy", "Annie", "Denis", "Alex", "Mike", "linda", "ed"),
)
_HELD_OUT_TIMBRES = ("quincy", "m8", "f3", "f5", "Michael", "steph")

TRAINING_VOICES = tuple(f"{accent}+{timbre}" for timbre in _TRAINING_TIMBRES for accent in _ACCENTS)
HELD_OUT_VOICES = tuple(f"{accent}+{timbre}" for timbre in _HELD_OUT_TIMBRES for accent in _ACCENTS)

_PEAK = 0.7

# Below lies half the power of pink noise that starts at 1 Hz, where nothing is heard.
_LOWEST_NOISE_HZ = 50

# In the names of clips, so that a change of what follows espeak makes new ones.
_ACOUSTICS_VERSION = 2

# espeak's own limits; beyond them it says something else than was asked for.
_WORDS_PER_MINUTE = (80, 450)
_PITCHES = (0, 99)

# espeak-ng is one for the whole process, so threads speak one after the other.
_TURN = threading.Lock()


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
        for name, (least, most) in {"words_per_minute": _WORDS_PER_MINUTE, "pitch": _PITCHES}.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} lies between {least} and {most}, got {value}")


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


def check_extra() -> None:
    """Raises ImportError for what clips of speech need and is not installed."""
    for name in ("espeakng_loader", "soundfile"):
        if find_spec(name) is None:
            raise ImportError(f"clips of speech need {name}: pip install 'molora[demo]'")


def clip(utterance: Utterance, folder: Path) -> Path:
    """The utterance as a FLAC file in `folder`, made unless it is there; any number of workers may ask for it at once.
    Raises ImportError without the extra, and what `speak` does."""
    check_extra()
    about = {**asdict(utterance), "espeak": _espeak_version(), "acoustics": _ACOUSTICS_VERSION}
    path = folder / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]}.flac"
    if not path.is_file():
        import soundfile

        wave_L, rate_hz = speak(utterance)
        write_atomically(path, lambda temporary: soundfile.write(temporary, wave_L, rate_hz, format="FLAC"))
    return path


def speak(utterance: Utterance) -> tuple[np.ndarray, int]:
    """The utterance as a mono waveform (L,) in fp32 with a peak of 0.7, and its sample rate in hertz. Raises
    ImportError without the extra, ValueError for a voice that espeak does not have and for a text of which nothing can
    be heard, OSError if espeak cannot start."""
    with _TURN, closing(_Espeak()) as espeak:
        wave_L = espeak.speak(utterance.text, utterance.voice, utterance.words_per_minute, utterance.pitch)
    generator = np.random.default_rng(utterance.seed)
    if utterance.reverberation_seconds is not None:
        wave_L = _reverberate(wave_L, utterance.reverberation_seconds, espeak.rate_hz, generator)
    if utterance.noise_decibels is not None:
        wave_L = wave_L + _noise_like(wave_L, utterance.noise_decibels, espeak.rate_hz, generator)
    return (wave_L * (_PEAK / np.abs(wave_L).max())).astype(np.float32), espeak.rate_hz


@cache
def _espeak_version() -> str:
    return version("espeakng-loader")  # which parses a file: too slow to be asked for every clip


def _reverberate(wave_L: np.ndarray, seconds: float, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """An echo of decaying noise with a third of the direct sound's energy."""
    num_samples = int(seconds * rate_hz)
    echo_L = generator.standard_normal(num_samples) * 10 ** (-3 * np.arange(num_samples) / num_samples)
    response_L = echo_L / np.sqrt(3 * np.square(echo_L).sum())
    response_L[0] = 1.0
    length = len(wave_L) + num_samples - 1
    fast = 1 << (length - 1).bit_length()  # a length that is prime takes several times as long
    return np.fft.irfft(np.fft.rfft(wave_L, fast) * np.fft.rfft(response_L, fast), fast)[:length]


def _noise_like(wave_L: np.ndarray, decibels: float, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """Pink noise that is `decibels` weaker than the speech, from 50 Hz up."""
    spectrum_K = np.fft.rfft(generator.standard_normal(len(wave_L)))
    hertz_K = np.fft.rfftfreq(len(wave_L), 1 / rate_hz)
    spectrum_K *= (hertz_K >= _LOWEST_NOISE_HZ) / np.sqrt(np.maximum(hertz_K, _LOWEST_NOISE_HZ))
    noise_L = np.fft.irfft(spectrum_K, len(wave_L))
    return noise_L * np.sqrt(np.square(wave_L).mean() / np.square(noise_L).mean()) * 10 ** (-decibels / 20)


class _Espeak:
    """espeak-ng's C interface (speak_lib.h), as far as it is needed. The library keeps the phases of its voice from one
    utterance to the next, through every way it has to start anew. So it is opened for one utterance, and closed: what
    was said before leaves no trace."""

    _SYNCHRONOUS, _RATE, _PITCH, _UTF8, _CHARACTERS = 2, 1, 3, 1, 1
    _DO_NOT_EXIT = 0x8000  # else a failed start ends the whole process

    def __init__(self) -> None:
        check_extra()
        import espeakng_loader

        self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
        self._data = Path(espeakng_loader.get_data_path())
        path = os.fsencode(self._data)
        self.rate_hz: int = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, path, self._DO_NOT_EXIT)
        if self.rate_hz <= 0:
            _ctypes.dlclose(self._library._handle)
            raise OSError(
                f"espeak-ng cannot start with its data in {self._data}: reinstall espeakng-loader; if that path is "
                f"longer than 150 characters (it has {len(path)}), in an environment with a shorter one"
            )
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
        timbre = voice.partition("+")[2]  # espeak passes over one that it does not have
        known = not timbre or (self._data / "voices" / "!v" / timbre).is_file()
        if not known or library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._call(library.espeak_SetParameter, self._RATE, words_per_minute, 0)
        self._call(library.espeak_SetParameter, self._PITCH, pitch, 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # else the clock seeds it
        said = text.encode() + b"\0"
        self._call(library.espeak_Synth, said, len(said), 0, self._CHARACTERS, 0, self._UTF8, None, None)
        wave_L = np.frombuffer(b"".join(self._chunks), np.int16)
        if not wave_L.any():
            raise ValueError(f"espeak-ng says nothing for {text!r}")
        return wave_L / 32768

    @staticmethod
    def _call(function: Any, *arguments: Any) -> None:
        if code := function(*arguments):
            raise OSError(f"espeak-ng: {function.__name__} failed with code {code}")
