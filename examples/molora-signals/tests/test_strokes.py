"""Pen strokes: the contract, what is refused and why, what a drawing's tokens depend on."""

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
from molora_signals.strokes import Strokes, StrokesConfig


def strokes(**options: Any) -> Strokes:
    return Strokes("strokes", StrokesConfig(**options))


def arc(points: int, milliseconds: float = 500.0) -> list[list[float]]:
    """A half circle of radius 10 drawn at even speed."""
    turns = np.linspace(0, math.pi, points)
    return np.stack([10 * np.cos(turns), 10 * np.sin(turns), turns / math.pi * milliseconds], axis=1).tolist()


def patches(drawing: Any, **options: Any) -> torch.Tensor:
    plugin = strokes(**options)
    return plugin.prepare(plugin.load({"strokes": drawing})).tensors["patches_PX"]


def test_strokes_conform() -> None:
    assert_conforms("molora_signals.strokes:Strokes", {"slant": 0.2, "beside": {"vision": "vision"}})


def test_a_file_holds_what_a_part_would(tmp_path: Path) -> None:
    (tmp_path / "arc.json").write_text(json.dumps([arc(9)]))
    loaded = strokes().load({"type": "strokes", "path": str(tmp_path / "arc.json")})
    assert [stroke.tolist() for stroke in loaded] == [arc(9)]


BAD = {
    "nothing": ({}, r"give either `strokes` or `path`; it has \['type'\]"),
    "both": ({"strokes": [arc(3)], "path": "a.json"}, "give either"),
    "no strokes": ({"strokes": []}, "has 0 points"),
    "an empty stroke": ({"strokes": [arc(3), []]}, r"stroke 2 has shape \(0,\)"),
    "no time": ({"strokes": [[[1, 2], [3, 4]]]}, r"stroke 1 has shape \(2, 2\); give points x 3"),
    "points for strokes": ({"strokes": arc(3)}, r"stroke 1 has shape \(3,\)"),
    "ragged": ({"strokes": [[[1, 2, 3], [1, 2]]]}, "cannot be read as strokes of points .*inhomogeneous"),
    "words": ({"strokes": [[["a", "b", "c"]]]}, "cannot be read"),
    "a number": ({"strokes": 3}, "cannot be read .*not iterable"),
    "not a number": ({"strokes": [arc(3), [[1, math.nan, 0]]]}, "stroke 2 has missing, infinite or huge numbers"),
    "a gap": ({"strokes": [[[1, None, 0]]]}, "stroke 1 has missing"),
    "too long": ({"strokes": [arc(6), arc(5)]}, "has 11 points; give at least 1, and at most max_points 10"),
    "no file": ({"path": "nowhere.json"}, "path 'nowhere.json': cannot be read .*No such file"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(MediaError, match=f"^strokes part.*{message}"):
        strokes(max_points=10).load({"type": "strokes", **part})


@pytest.mark.parametrize("options", [{"patch_points": 0}, {"points_per_side": 0}, {"width": 33}], ids=str)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"at least 1, .*{next(iter(options))}"):
        strokes(**options)


def test_a_pen_that_is_sampled_more_often_draws_the_same() -> None:
    assert_close(patches([arc(1000)]), patches([arc(300)]), 1e-3)


def test_place_and_size_do_not_matter_but_time_does() -> None:
    drawing = np.array(arc(100))
    assert_close(patches([drawing * [7, 7, 1] + [300, -50, 9000]]), patches([drawing]), 1e-5)
    assert not torch.allclose(patches([arc(100, 900.0)]), patches([drawing]), atol=1e-2)


def test_points_lie_evenly_and_a_stroke_says_where_it_begins() -> None:
    values_NV = patches([arc(100), [[0, 5, 700]]], points_per_side=40, patch_points=1).view(-1, 6)
    # A half circle is pi/2 diameters long, and the diameter is 40 points: 63 steps, and then the dot.
    assert len(values_NV) == 64 + 1
    assert values_NV[:, 5].nonzero().flatten().tolist() == [0, 64]
    steps = values_NV[1:64, 2:4].norm(dim=1)
    assert_close(steps, steps.mean().expand(63), 1e-3)
    assert_close(values_NV[:64, 0].abs().max(), torch.tensor(1.0))


def test_training_slants_a_drawing_and_keeps_what_is_straight() -> None:
    plugin = strokes(slant=0.3, patch_points=1)
    line = [torch.tensor([[0.0, 0.0, 0.0], [30.0, 10.0, 100.0]], dtype=torch.float64)]
    drawn = [plugin.prepare(line, torch.Generator().manual_seed(seed)).tensors["patches_PX"] for seed in range(5)]
    angles = [float(torch.atan2(values[-1, 3], values[-1, 2])) for values in drawn]
    assert max(angles) - min(angles) > 0.05
    for values in drawn:
        assert_close(values[1:, 2:4], values[-1, 2:4].expand(len(values) - 1, 2), 1e-5)


def test_company_names_the_projector() -> None:
    plugin = strokes(beside={"vision": "vision"})
    assert plugin.projectors() == ("default", "vision")
    assert plugin.projector(frozenset({"strokes"})) == "default"
    assert plugin.projector(frozenset({"strokes", "vision"})) == "vision"
