"""Speech for training: the same bytes whenever and wherever it is spoken, in voices that can be told apart."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from molora.data.speech import HELD_OUT_VOICES, TRAINING_VOICES, Utterance, clip, draw_utterance, speak

pytest.importorskip("espeakng_loader")
soundfile = pytest.importorskip("soundfile")

PLAIN = Utterance(text="what is the red shape?", voice="en-us+m3")


def spoken(utterance: Utterance) -> bytes:
    return speak(utterance)[0].tobytes()


def test_an_utterance_is_the_same_whatever_was_said_before_and_in_any_process() -> None:
    utterances = [draw_utterance("is there a circle in the image?", TRAINING_VOICES, True, i) for i in range(12)]
    first = [spoken(utterance) for utterance in utterances]
    assert [spoken(utterance) for utterance in reversed(utterances)] == first[::-1]
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(spoken, utterances[:3]) == first[:3]
    assert len(set(first)) == len(first)


def test_threads_may_speak_at_once() -> None:
    utterances = [draw_utterance("is there a circle in the image?", TRAINING_VOICES, False, i) for i in range(24)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(spoken, utterances)) == [spoken(utterance) for utterance in utterances]


def test_every_voice_speaks_and_sounds_like_no_other() -> None:
    waves = [spoken(replace(PLAIN, voice=voice)) for voice in TRAINING_VOICES + HELD_OUT_VOICES]
    assert len(set(waves)) == len(waves)


def test_held_out_voices_have_timbres_of_their_own() -> None:
    trained, held_out = ({voice.partition("+")[2] for voice in voices} for voices in (TRAINING_VOICES, HELD_OUT_VOICES))
    assert trained and held_out and not trained & held_out


def test_speech_lasts_as_long_as_speech_and_begins_soon() -> None:
    for index in range(20):
        wave_L, rate_hz = speak(draw_utterance(PLAIN.text, TRAINING_VOICES, False, index))
        assert 0.8 < len(wave_L) / rate_hz < 3
        loud = np.flatnonzero(np.abs(wave_L) > 0.02) / rate_hz
        assert loud[0] < 0.3 and float(np.abs(wave_L).max()) == pytest.approx(0.7, abs=1e-4)


def test_noise_has_the_power_asked_for_where_it_is_heard() -> None:
    clean_L, rate_hz = speak(PLAIN)
    for decibels in (0.0, 20.0):
        noisy_L, _ = speak(replace(PLAIN, noise_decibels=decibels))
        scale = np.dot(noisy_L, clean_L) / np.dot(clean_L, clean_L)
        noise_L = noisy_L - scale * clean_L
        measured = 10 * np.log10(np.square(scale * clean_L).mean() / np.square(noise_L).mean())
        assert measured == pytest.approx(decibels, abs=0.5)
        power_K = np.square(np.abs(np.fft.rfft(noise_L)))
        assert power_K[np.fft.rfftfreq(len(noise_L), 1 / rate_hz) < 45].sum() < 0.01 * power_K.sum()


def test_an_echo_outlasts_the_speech() -> None:
    clean_L, rate_hz = speak(PLAIN)
    echoing_L, _ = speak(replace(PLAIN, reverberation_seconds=0.5))
    assert len(echoing_L) == len(clean_L) + int(0.5 * rate_hz) - 1
    assert float(np.abs(echoing_L[len(clean_L) :]).max()) > 1e-4


def test_a_clip_is_made_once_and_holds_what_was_spoken(tmp_path: Path) -> None:
    path = clip(PLAIN, tmp_path)
    wave_L, rate_hz = soundfile.read(path, dtype="float32")
    assert rate_hz == speak(PLAIN)[1]
    np.testing.assert_allclose(wave_L, speak(PLAIN)[0], atol=1 / 32768)
    before = path.stat().st_mtime_ns
    assert clip(PLAIN, tmp_path) == path and path.stat().st_mtime_ns == before
    assert clip(replace(PLAIN, pitch=40), tmp_path) != path
    assert len(list(tmp_path.iterdir())) == 2


def made(folder: Path) -> list[bytes]:
    return [clip(replace(PLAIN, pitch=pitch), folder).read_bytes() for pitch in range(30, 60)]


def test_workers_may_make_the_same_clips_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(made, [tmp_path / "shared"] * 4, chunksize=1)
    assert found == [made(tmp_path / "own")] * 4
    assert len(list((tmp_path / "shared").iterdir())) == 30, "no temporary file is left"


def test_names_and_other_scripts_are_spoken() -> None:
    assert spoken(replace(PLAIN, text="the café is naïve")) != spoken(replace(PLAIN, text="the caf is nave"))
    assert len(spoken(replace(PLAIN, text="漢字")))


def test_what_cannot_be_spoken_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Utterance(text="  ", voice="en-us")
    with pytest.raises(ValueError, match="no voice 'xx-nowhere'"):
        speak(Utterance(text="x", voice="xx-nowhere"))
    with pytest.raises(ValueError, match="no voice 'en-us\\+nobody'"):
        speak(Utterance(text="x", voice="en-us+nobody"))
    with pytest.raises(ValueError, match=r"says nothing for '\.\.\.'"):
        speak(Utterance(text="...", voice="en-us"))
    with pytest.raises(ValueError, match="between 80 and 450, got 20"):
        Utterance(text="x", voice="en-us", words_per_minute=20)
    with pytest.raises(ValueError, match="between 0 and 99, got 100"):
        Utterance(text="x", voice="en-us", pitch=100)


def test_data_that_espeak_cannot_open_is_an_error_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import espeakng_loader

    before = spoken(PLAIN)
    with monkeypatch.context() as patched:
        patched.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path / ("x" * 160)))
        with pytest.raises(OSError, match="cannot start with its data in .*xxx"):
            speak(PLAIN)
    assert spoken(PLAIN) == before
