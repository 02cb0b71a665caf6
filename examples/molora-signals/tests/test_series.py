"""Signals: the contract, what is refused and why, what normalising keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molora.modality import MediaError
from molora.testing import assert_close, assert_conforms
from molora_signals.series import Series, SeriesConfig

WAVE = np.sin(np.arange(66).reshape(2, 33) / 3)


def series(**options: Any) -> Series:
    return Series("series", SeriesConfig(sampling_hz=50, **options))


@pytest.mark.parametrize(
    "options", [{}, {"max_channels": 1, "patch_samples": 7, "layers": 1, "crop": 0.3, "jitter": 0.1}], ids=str
)
def test_series_conform(options: dict[str, Any]) -> None:
    assert_conforms("molora_signals.series:Series", options)


def test_files_hold_what_a_part_would(tmp_path: Path) -> None:
    (tmp_path / "wave.json").write_text(json.dumps(WAVE.tolist()))
    np.save(tmp_path / "wave.npy", WAVE)
    np.savetxt(tmp_path / "wave.csv", WAVE.T, delimiter=",")
    for part in ({"series": WAVE}, *({"path": str(path)} for path in tmp_path.iterdir())):
        values_KL, rate_hz = series().load({"type": "series", **part, "sampling_hz": 20})
        np.testing.assert_array_equal(values_KL.numpy(), WAVE)
        assert rate_hz == 20
    (tmp_path / "heart.csv").write_text("1\n2\n3\n")
    assert series().load({"path": tmp_path / "heart.csv"})[0].tolist() == [[1, 2, 3]]
    assert series().load({"series": [1, 2, 3]})[1] == 50
    assert series().load({"series": torch.arange(3).numpy()[::-1], "sampling_hz": np.int64(5)})[0].tolist() == [
        [2, 1, 0]
    ]


BAD = {
    "nothing": ({}, r"needs either `series` or `path` and has \['type'\]"),
    "both": ({"series": [1], "path": "a.json"}, "needs either"),
    "empty": ({"series": []}, r"has shape \(1, 0\)"),
    "empty channels": ({"series": [[], []]}, r"has shape \(2, 0\)"),
    "ragged": ({"series": [[1, 2], [1]]}, "channels of equally many numbers: .*inhomogeneous"),
    "words": ({"series": ["up", "down"]}, "equally many numbers: could not convert string to float: 'up'"),
    "a cube": ({"series": np.zeros((2, 3, 4))}, r"has shape \(2, 3, 4\); give channels x samples"),
    "not a number": ({"series": [1, math.nan, math.inf, 2]}, "2 of 4 values are missing"),
    "a gap": ({"series": [[1, None, 3]]}, "1 of 3 values are missing"),
    "huge": ({"series": [1, 1e300]}, "1 of 2 values are missing, infinite or huge"),
    "too many channels": ({"series": np.zeros((9, 2))}, "has 9 channels, over max_channels 8"),
    "too long": ({"series": np.zeros(101)}, "has 101 samples, over max_samples 100"),
    "no rate": ({"series": [1], "sampling_hz": None}, "sampling_hz is None; give samples a second"),
    "standing still": ({"series": [1], "sampling_hz": 0}, "sampling_hz is 0"),
    "no file": ({"path": "nowhere.npy"}, "path 'nowhere.npy': cannot be read .*No such file"),
    "another kind": ({"path": "song.mp3"}, "a file is .json, .npy, .csv, not '.mp3'"),
    "an object": ({"path": 3}, "cannot be read"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(MediaError, match=f"^series part.*{message}"):
        series(max_samples=100).load({"type": "series", **part})


@pytest.mark.parametrize("options", [{"patch_samples": 0}, {"max_channels": 0}, {"crop": 1.0}], ids=str)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"at least 1, .*{next(iter(options))}"):
        series(**options)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"time,volts\n1,2\n"),
        ("a.csv", b"1,2\n3\n"),
        ("a.json", b"{}"),
        ("a.json", b"\xff"),
        ("a.npy", b"none"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=f"path .*{name}'.*cannot be read"):
        series().load({"type": "series", "path": str(tmp_path / name)})


def test_pickles_in_arrays_are_not_run(tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(MediaError, match="allow_pickle=False"):
        series().load({"type": "series", "path": tmp_path / "odd.npy"})


def test_normalising_moves_level_and_scale_to_the_summary() -> None:
    plain, moved = (series().prepare(series().load({"series": wave})) for wave in (WAVE, 1000 * WAVE - 7e6))
    assert_close(moved.tensors["samples_LK"], plain.tensors["samples_LK"], 1e-5)
    samples_LK = plain.tensors["samples_LK"]
    assert_close(samples_LK.mean(0), torch.zeros(8), 1e-6)
    assert_close(samples_LK.square().mean(0), torch.tensor([1.0, 1.0, *[0.0] * 6]), 1e-6)
    summary_3K = moved.tensors["summary_M"][:-1].view(3, 8)
    assert summary_3K[0].tolist() == [1, 1, *[0] * 6]
    assert_close(summary_3K[1, :2].sinh(), torch.from_numpy(1000 * WAVE - 7e6).mean(1).float(), 1e-4)
    assert_close(summary_3K[2, :2].sinh(), torch.from_numpy(1000 * WAVE).std(1, correction=0).float(), 1e-4)
    assert float(plain.tensors["summary_M"][-1].exp()) == pytest.approx(50)


def test_a_channel_that_does_not_move_stays_at_rest() -> None:
    resting = series().prepare(series().load({"series": [[0.1] * 7, [1e-9] * 7, [-3e29] * 7, [0] * 7]}))
    assert_close(resting.tensors["samples_LK"], torch.zeros(7, 8), 1e-5)


def test_training_sees_a_stretch_of_the_signal_with_noise() -> None:
    ramp = torch.arange(100.0, dtype=torch.float64)[None] ** 2
    draws = [
        series(crop=0.5).prepare((ramp, 50.0), torch.Generator().manual_seed(seed)).tensors["samples_LK"][:, 0]
        for seed in range(20)
    ]
    lengths = [len(draw) for draw in draws]
    assert 50 <= min(lengths) < 60 and 90 < max(lengths) <= 100
    for draw in draws:  # of a parabola, every stretch has constant second differences: nothing but cutting was done
        assert_close(draw.diff().diff(), draw.diff().diff().mean().expand(len(draw) - 2), 1e-4)
    noisy = series(jitter=0.1).prepare((ramp, 50.0), torch.Generator().manual_seed(0)).tensors["samples_LK"][:, 0]
    noise = noisy - series().prepare((ramp, 50.0)).tensors["samples_LK"][:, 0]
    assert 0.07 < float(noise.std()) < 0.13
