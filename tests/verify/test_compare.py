"""Adding and removing a modality moves nothing else, to the bit; and what does move is found."""

from __future__ import annotations

import json
import shutil
import wave
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import molora
from molora.checkpoint.opening import locate
from molora.cli.commands import app
from molora.config import build
from molora.inference.load import LoadedModel
from molora.model.lora import adapter_parameters
from molora.pack import Sample
from molora.received import file_hash
from molora.routing import RoutingError
from molora.terminal import Finding
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe
from molora.verify.compare import NUM_SAMPLES, compare_files, compare_logits, compare_models
from molora.verify.promises import examples, routed

pytest.importorskip("torchaudio")

TARGETS = ["qkv_proj", "o_proj", "down_proj"]
ADAPTER = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}
TOWER = {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}
CONVIT = {"kind": "convit", "pretrained": False, "convit": {"width": 8, "depth": 1, "heads": 2}}
VISION = {
    "plugin": "vision",
    "options": {"crop_pixels": 16, "max_crops": 2, "pool": 1, "tower": CONVIT},
    "adapter": ADAPTER,
}
AUDIO = {
    "plugin": "audio",
    "options": {"tower": {"conformer": TOWER}, "beside": {"vision": "vision"}},
    "adapter": ADAPTER,
}
# It adapts a layer that the others leave alone.
NUMBERS = {"plugin": "molora.testing:Numbers", "adapter": {**ADAPTER, "target_modules": [*TARGETS, "gate_up_proj"]}}
RULES = {"audio+vision": "vision"}
SETS = [(), ("audio",), ("numbers",), ("vision",), ("audio", "vision"), ("numbers", "vision")]
PARTS: dict[str, dict[str, Any]] = {
    "vision": {"type": "image", "path": "a.png"},
    "audio": {"type": "audio", "path": "a.wav"},
    "numbers": {"type": "numbers", "numbers": [1.0, -0.5]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Vision and audio trained apart, by two people with copies of one backbone; `pair` puts them together, `three`
    adds numbers to the pair."""
    folder = tmp_path_factory.mktemp("against")
    save_backbone(folder / "backbone")
    for copy in ("hers", "his"):
        shutil.copytree(folder / "backbone", folder / copy)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (24, 16, 3), dtype=np.uint8)).save(folder / "a.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(draw.integers(-9_000, 9_000, 6_000, dtype=np.int16).tobytes())
    parts = ("encoders", "projectors", "adapters")
    train_run(folder, "vision", "hers", {"vision": VISION}, {}, parts)
    train_run(folder, "audio", "his", {"audio": AUDIO}, {}, parts)
    apart = {name: {"path": str(folder / name / "modalities" / name)} for name in ("vision", "audio")}
    train_run(folder, "pair", "backbone", apart, RULES, ("projectors.audio.vision",))
    paired = {name: {"path": str(folder / "pair/modalities" / name)} for name in ("vision", "audio")}
    rules = {**RULES, "numbers+vision": "numbers"}
    train_run(folder, "three", "backbone", {**paired, "numbers": NUMBERS}, rules, [f"{kind}.numbers" for kind in parts])
    return folder


def train_run(
    home: Path,
    name: str,
    backbone: str,
    modalities: dict[str, Any],
    rules: dict[str, str],
    trained: Sequence[str],
) -> None:
    """Trains on every set of modalities that has a rule, mixed in one pack."""
    sets = [(), *((name,) for name in modalities), *(rule.split("+") for rule in rules)]
    with open(home / f"{name}.jsonl", "w") as file:
        for modalities_of_row in sets:
            content = [*(PARTS[modality] for modality in modalities_of_row), {"type": "text", "text": "what?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "that"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    values = {
        "run": str(home / name),
        "backbone": {"path": str(home / backbone)},
        "modalities": modalities,
        "router": {"options": {"rules": rules}},
        "stages": [
            {
                "name": "tune",
                "train": {part: {"learning_rate": 1e-2} for part in trained},
                "data": {"rows": {"kind": "messages", "options": {"path": str(home / f"{name}.jsonl")}}},
                "steps": 4,
                "samples_per_step": 12,
            }
        ],
        "device": "cpu",
    }
    train(build(Recipe, values, "test"), show=False)


@pytest.fixture(scope="module")
def pair(home: Path) -> LoadedModel:
    return molora.load(home / "pair", device="cpu")


def held(checks: Iterable[Finding]) -> dict[str, bool | None]:
    return {check.what: check.ok for check in checks}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_plugin_added_by_a_recipe_moves_no_file_and_no_logit(home: Path, pair: LoadedModel) -> None:
    for name, before in {"vision": "vision", "audio": "pair"}.items():
        was = bytes_of(home / before / "modalities" / name)
        assert was == bytes_of(home / "three/modalities" / name) and len(was) == 5
    for copy in ("hers", "his"):
        assert bytes_of(home / copy) == bytes_of(home / "backbone")
    checks = list(compare_logits(pair, molora.load(home / "three", device="cpu")))
    assert held(checks) == dict.fromkeys(["text", "audio", "vision", "audio+vision"], True)
    assert all(check.found == "50 of 50 samples are equal to the bit" for check in checks)


ADDED_AND_REMOVED: dict[str, tuple[str, str, tuple[str, ...], list[str]]] = {
    "two put together": (
        "vision",
        "pair",
        (),
        [
            "holds backbone 6 of 6 files are equal to the byte",
            "holds backbone weights have the hash that OLD recorded",
            "holds vision 5 of 5 files are equal to the byte",
            "not checked audio added: 5 files of MODEL alone",
            "holds text 100 of 100 samples are equal to the bit",
            "holds vision 100 of 100 samples are equal to the bit",
        ],
    ),
    "a plugin added": (
        "pair",
        "three",
        (),
        [
            "holds backbone 6 files, which OLD and MODEL share",
            "holds audio 5 of 5 files are equal to the byte",
            "not checked numbers added: 5 files of MODEL alone",
            "holds audio+vision 50 of 50 samples are equal to the bit",
        ],
    ),
    "a plugin removed": (
        "three",
        "pair",
        (),
        [
            "not checked numbers removed: 5 files of OLD alone",
            "holds audio+vision 50 of 50 samples are equal to the bit",
        ],
    ),
    "all but one removed": ("three", "vision", (), ["audio removed", "numbers removed", "vision 100 of 100 samples"]),
    "a plugin removed by naming the other folders": (
        "three",
        "backbone",
        ("three/modalities/audio", "vision/modalities/vision"),
        [
            "holds audio 5 files, which OLD and MODEL share",
            "holds vision 5 of 5 files are equal to the byte",
            "numbers removed",
            "holds vision 66 of 66 samples are equal to the bit",
            "not checked other sets no rule in MODEL for audio+vision",
        ],
    ),
}


@pytest.mark.parametrize("case", ADDED_AND_REMOVED)
def test_the_command_says_what_came_and_went_and_that_all_else_holds(case: str, home: Path) -> None:
    old, model, folders, said = ADDED_AND_REMOVED[case]
    named = [argument for folder in folders for argument in ("--modality", str(home / folder))]
    result = CliRunner().invoke(app, ["verify", str(home / model), "--against", str(home / old), *named])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    told = " ".join(result.output.split())
    assert all(text in told for text in said) and "BROKEN" not in told, told


def moved(checks: Iterable[Finding]) -> dict[str, str]:
    return {check.what: check.found for check in checks if check.ok is False}


def copied(home: Path, name: str, to: Path) -> Path:
    """A copy of a run beside a copy of its backbone, where it looks for it."""
    shutil.copytree(home / "backbone", to / "backbone")
    return Path(shutil.copytree(home / name, to / name))


def test_what_was_trained_on_is_found_and_nothing_else(home: Path) -> None:
    """`pair` taught audio's second projector, which sound alone does not use, on a copy of the backbone."""
    before, after = home / "audio", home / "pair"
    assert moved(compare_files(locate(before), locate(after))) == {
        "audio": "2 of 5 files are equal to the byte, not adapter_config.json, modality.json, projector.safetensors"
    }
    logits = compare_logits(molora.load(before, device="cpu"), molora.load(after, device="cpu"))
    assert held(logits) == {"text": True, "audio": True}
    assert not compare_models(before, after)


@pytest.mark.parametrize("rehashed", [False, True], ids=["", "with its hash rewritten"])
def test_a_weight_nudged_by_one_ulp_in_its_file_is_caught(rehashed: bool, home: Path, tmp_path: Path) -> None:
    run = copied(home, "pair", tmp_path)
    folder = run / "modalities/vision"
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    weight = next(tensor for name, tensor in sorted(tensors.items()) if "lora_B" in name)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    save_file(tensors, path)
    names = [path.name]
    if rehashed:
        about = json.loads((folder / "modality.json").read_text())
        about["files"][path.name] = file_hash(path)
        (folder / "modality.json").write_text(json.dumps(about))
        names.append("modality.json")
    assert moved(compare_files(locate(home / "pair"), locate(run))) == {
        "vision": f"{5 - len(names)} of 5 files are equal to the byte, not {', '.join(names)}"
    }
    result = CliRunner().invoke(app, ["verify", str(run), "--against", str(home / "pair")])
    assert result.exit_code == 1 and "BROKEN" in result.output


def test_a_backbone_weight_nudged_in_its_file_is_caught(home: Path, tmp_path: Path) -> None:
    run = copied(home, "pair", tmp_path)
    path = tmp_path / "backbone/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    assert moved(compare_files(locate(home / "pair"), locate(run))) == {
        "backbone": "weights have the hash that OLD recorded"
    }
    with pytest.raises(ValueError, match="trained with"):
        compare_models(home / "pair", run)


@pytest.mark.parametrize("name", ["vision", "audio"])
def test_a_weight_nudged_in_memory_is_caught_by_the_logits_of_what_uses_it(
    name: str, home: Path, pair: LoadedModel
) -> None:
    nudged = molora.load(home / "pair", device="cpu")
    parameters = adapter_parameters(nudged.model.backbone.model, name)
    weight = max((p for key, p in parameters.items() if "lora_B" in key), key=lambda p: float(p.detach().abs().max()))
    with torch.no_grad():
        weight.view(-1)[weight.abs().argmax()] *= 1 + 1e-3
    found = moved(compare_logits(pair, nudged))
    assert set(found) == {"vision": {"vision", "audio+vision"}, "audio": {"audio"}}[name]
    assert all("largest difference" in text for text in found.values())


def test_a_rule_that_changed_moves_its_own_set(home: Path, pair: LoadedModel, tmp_path: Path) -> None:
    run = copied(home, "pair", tmp_path)
    about = json.loads((run / "molora.json").read_text())
    about["router"]["options"]["rules"]["audio+vision"] = "audio"
    (run / "molora.json").write_text(json.dumps(about))
    assert set(moved(compare_logits(pair, molora.load(run, device="cpu")))) == {"audio+vision"}


def test_a_modality_taken_out_of_a_run_is_gone_though_its_folder_stays(home: Path, tmp_path: Path) -> None:
    run = copied(home, "three", tmp_path)
    about = json.loads((run / "molora.json").read_text())
    about["modalities"].remove("numbers")
    (run / "molora.json").write_text(json.dumps(about))
    with pytest.raises(RoutingError, match="molora.json: rule 'numbers.vision' names adapter 'numbers'; .*here"):
        molora.load(run, device="cpu")
    del about["router"]["options"]["rules"]["numbers+vision"]
    (run / "molora.json").write_text(json.dumps(about))
    assert (run / "modalities/numbers/modality.json").is_file()
    assert compare_models(home / "three", run)
    result = CliRunner().invoke(app, ["verify", str(run)])
    assert result.exit_code == 0 and "2 modality folders whole" in result.output


def test_a_run_trained_anew_without_a_modality_no_longer_has_it(home: Path) -> None:
    shutil.copytree(home / "three", home / "anew", ignore=shutil.ignore_patterns("state"))
    paired = {name: {"path": str(home / "pair/modalities" / name)} for name in ("vision", "audio")}
    train_run(home, "anew", "backbone", paired, RULES, ["projectors.audio.vision"])
    assert (home / "anew/modalities/numbers/modality.json").is_file()
    assert set(locate(home / "anew").folders) == {"audio", "vision"}
    assert compare_models(home / "vision", home / "anew")


def test_the_samples_are_spread_over_every_set_and_the_same_every_time(home: Path, pair: LoadedModel) -> None:
    three = molora.load(home / "three", device="cpu")
    sets = list(routed(three, three.model.modalities))
    assert sets == [frozenset(names) for names in SETS]
    made = [list(examples([three, three], sets, NUM_SAMPLES)) for _ in range(2)]
    counts = Counter(modalities for modalities, _ in made[0])
    assert sum(counts.values()) == NUM_SAMPLES == 200 and max(counts.values()) - min(counts.values()) <= 1
    for modalities, encoded in made[0]:
        assert all(sample.modalities == modalities for sample in encoded)

    def content(sample: Sample) -> tuple[Any, ...]:
        return sample.token_ids_T.tolist(), sample.modality_ids_T.tolist(), [str(i.prepared) for i in sample.items]

    first, again = ([content(pair[0]) for _, pair in suite] for suite in made)
    assert first == again
    assert len({str(made) for made in first}) == NUM_SAMPLES, "no sample is another one again"
