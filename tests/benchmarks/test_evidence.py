"""Pages of results: what is kept is not made again, and a page says what its JSON does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evidence import check, page, plugins, yamnet
from benchmarks.evidence.probe import probe
from benchmarks.evidence.work import Figure, Found, Work
from benchmarks.evidence.yamnet import Yamnet, YamnetConfig
from molora.testing import assert_conforms

YAMNET = Path(os.environ.get("MOLORA_TEST_DATA", ".")) / "weights/yamnet"
PAGES = sorted(path.stem for path in page.HOME.glob("*.json"))

pytest.importorskip("torchaudio")


@pytest.mark.skipif(not YAMNET.is_dir(), reason="set MOLORA_TEST_DATA to a folder with weights/yamnet")
@torch.no_grad()
def test_yamnet_gives_the_published_frames_and_tags() -> None:
    modality = Yamnet("sounds", YamnetConfig(weights=str(YAMNET / "model.safetensors")))
    encoder: Any = modality.build_encoder().eval()
    parity = np.load(YAMNET / "parity.npz")
    waveform_L = torch.from_numpy(parity["waveform"])
    np.testing.assert_allclose(encoder.log_mel(waveform_L[None])[0].numpy(), parity["log_mel"], atol=1e-3)
    frames_SC = encoder(**modality.collate([modality.prepare(waveform_L)])).frames_SC
    np.testing.assert_allclose(frames_SC[0].numpy(), parity["embedding"], atol=1e-4)
    np.testing.assert_allclose(torch.sigmoid(encoder.classifier(frames_SC))[0].numpy(), parity["scores"], atol=1e-5)


@pytest.mark.skipif(not YAMNET.is_dir(), reason="set MOLORA_TEST_DATA to a folder with weights/yamnet")
def test_yamnet_keeps_the_contract_of_a_modality() -> None:
    weights = {"weights": str(YAMNET / "model.safetensors")}
    assert_conforms(f"{Path(yamnet.__file__)}:Yamnet", weights)


def test_an_arm_is_made_once(tmp_path: Path) -> None:
    work = Work(tmp_path, tmp_path, tmp_path, tmp_path, 0, tiny=True)
    found = Found([Figure("alone", "exact_match", "beats", 0.5, 0.25, 0.75, 4)], {"files": "2 of 2"}, {"hash": "x"})
    first = work.arm("alone", lambda: found)
    assert first.found == found
    assert work.arm("alone", lambda: pytest.fail("it is kept")) == first


def test_a_probe_finds_what_is_linear_in_the_features_and_nothing_else() -> None:
    draw = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in draw.normal(size=(200, 2))]

    def source(label: Any) -> Any:
        return [{"messages": [point, {"content": str(label(point))}]} for point in points]

    def accuracy(label: Any) -> float:
        rows = source(label)
        return probe("probe", "points", lambda messages: torch.tensor(messages[0]), rows[:150], rows[150:]).value

    assert accuracy(lambda point: point[0] > point[1]) > 0.95
    assert accuracy(lambda point: point[0] * point[1] > 0) < 0.8


def measured(value: float, exact: str = "2 of 2") -> dict[str, Any]:
    """The JSON of a page with one seed and one arm."""
    figure = {"arm": "plugin", "name": "exact_match", "task": "beats", "value": value, "low": 0.1, "high": 0.9}
    figure |= {"questions": 4, "media": "as is"}
    arm = {"name": "plugin-beats", "processor_seconds": 60.0, "figures": [figure], "exact": {"files": exact}}
    arm |= {"machine": {"processor": "a processor", "threads": 1, "torch": "2"}, "updates": {"beats": [7, 2]}}
    about = {"about": "heart beats", "files": {}, "rows": {"train": 3, "val": 4}}
    return {
        "format_version": "1.0",
        "page": "plugins",
        "command": "python -m benchmarks.evidence plugins --seeds 0",
        "backbone": {"name": "a backbone", "weights": "0"},
        "data": {"beats": about},
        "budget": {},
        "seeds": {"0": {"arms": [arm]}},
    }


def test_the_numbers_of_a_page_are_those_of_its_json(tmp_path: Path) -> None:
    (tmp_path / "plugins.json").write_text(json.dumps(measured(0.1234)))
    text = page.write("plugins", plugins, tmp_path).read_text()
    assert "| plugin | 7 x 2 | 4 | 0.123 (0.100 to 0.900) |" in text
    first = (tmp_path / "plugins.svg").read_bytes()
    page.write("plugins", plugins, tmp_path)
    assert (tmp_path / "plugins.svg").read_bytes() == first


def test_the_check_names_what_is_not_exact_or_not_the_same() -> None:
    assert not list(check.inexact(measured(0.5)))
    assert list(check.inexact(measured(0.5, "1 of 2"))) == ["seed 0, arm plugin-beats: files: 1 of 2"]
    other = measured(0.5)
    assert not list(check.differences(measured(0.1), other))
    other["seeds"]["0"]["arms"][0]["figures"][0]["task"] = "rackets"
    missing, gone = sorted(check.differences(measured(0.5), other), key=lambda fault: "rackets" not in fault)
    assert "on rackets (as is) is missing" in missing and "on beats (as is) is not measured any more" in gone


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_what_their_json_gives(name: str, tmp_path: Path) -> None:
    assert not list(check.undrawn(name, tmp_path))
    assert not list(check.inexact(check.read(page.HOME, name)))
