"""An adapter for text alone: who loads it chooses it by a rule, and for whoever does not the backbone is bare."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import molora
from molora.checkpoint.assembly import RouterConfig
from molora.config import ConfigError, build
from molora.doctor.needs import training_needs
from molora.inference.load import LoadedModel
from molora.routing import RoutingError
from molora.testing import save_backbone
from molora.train import Recipe, train
from molora.verify.promises import promises

ADAPTER = {"r": 4, "lora_alpha": 64, "target_modules": ["qkv_proj", "down_proj"]}
TEXT = [{"role": "user", "content": "what is it?"}]
LETTERS = [{"role": "user", "content": [{"type": "letters", "letters": "ab"}, {"type": "text", "text": "what is it?"}]}]


def recipe(home: Path, run: str, **changes: Any) -> Recipe:
    stage = {
        "name": "tune",
        "objective": "preferences",
        "train": {"adapters": {"learning_rate": 2e-2}},
        "data": {"rows": {"kind": "preferences", "options": {"path": str(home / "pairs.jsonl")}}},
        "steps": 8,
        "samples_per_step": 4,
    }
    values = {
        "run": str(home / run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {
            "letters": {"plugin": "molora.testing:Letters", "adapter": ADAPTER},
            "reasoning": {"plugin": "text", "adapter": ADAPTER},
        },
        "router": {"options": {"rules": {"text": "reasoning"}}},
        "stages": [stage],
        "trackers": [],
        "device": "cpu",
        **changes,
    }
    return build(Recipe, values, "recipe")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    save_backbone(folder / "backbone")
    rows = [{"prompt": prompt, "chosen": "yes", "rejected": "no, it is not"} for prompt in (TEXT, LETTERS)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(recipe(folder, "run"), show=False)
    return folder


@torch.no_grad()
def logits(loaded: LoadedModel, *conversations: Any) -> list[Tensor]:
    """Of conversations in one pack."""
    samples = [loaded.encode(messages, str(index)) for index, messages in enumerate(conversations)]
    pack = loaded.processor.collate(samples)
    by_id = pack.by_sample(loaded.model.logits(pack))
    return [by_id[sample.id] for sample in samples]


def test_text_runs_with_its_adapter_where_a_rule_says_so_and_else_on_the_bare_backbone(home: Path) -> None:
    bare, chosen = molora.load(home / "backbone"), molora.load(home / "run")
    folders = [home / "run/modalities" / name for name in ("letters", "reasoning")]
    beside = molora.load(home / "backbone", folders)
    named = molora.load(home / "backbone", folders[1:], router=RouterConfig(options={"rules": {"text": "reasoning"}}))
    refused = molora.load(home / "run", router=RouterConfig(options={"rules": {"text": None}}))
    (untouched,) = logits(bare, TEXT)
    for unused in (beside, refused):
        assert torch.equal(logits(unused, TEXT)[0], untouched)
    (dressed,) = logits(chosen, TEXT)
    assert torch.equal(logits(named, TEXT)[0], dressed) and (dressed - untouched).abs().max() > 0.1
    # In a pack with a picture each has its own, and the picture's logits do not know of the other's rule.
    of_text, of_letters = logits(chosen, TEXT, LETTERS)
    bare_text, same_letters = logits(refused, TEXT, LETTERS)
    assert torch.equal(of_letters, same_letters) and not torch.equal(of_text, bare_text)
    answers = {a.id: a.adapters for a in chosen.answers([chosen.encode(TEXT, "t"), chosen.encode(LETTERS, "l")])}
    assert answers == {"t": ("reasoning",), "l": ("letters",)}


def test_its_folder_is_an_adapter_in_pefts_format_and_nothing_else(home: Path) -> None:
    folder = home / "run/modalities/reasoning"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "modality.json",
    }
    card = json.loads((home / "run/card.json").read_text())
    assert list(card["modalities"]["reasoning"]["parameters"]) == ["adapters.reasoning"]
    row = json.loads((home / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert row["accuracy/text"] == 1.0 and row["accuracy/letters"] == 1.0


def test_a_run_with_it_keeps_every_promise(home: Path) -> None:
    loaded = molora.load(home / "run")
    assert loaded.layout is not None
    found = list(promises(loaded, [], loaded.layout.folders))
    assert all(finding.ok for finding in found), found
    told = [finding.found for finding in found]
    assert any("4 of 4 texts without adapter reasoning equal transformers" in text for text in told), told
    assert any(text.startswith("reasoning: PEFT opens the folder") for text in told)


def test_it_is_trained_further_and_learns_what_it_learns_alone(home: Path) -> None:
    """Without the other modality its weights are those that it gets beside it."""
    rows = {"path": str(home / "text.jsonl")}
    shutil.copy(home / "pairs.jsonl", home / "text.jsonl")
    text_only = (home / "pairs.jsonl").read_text().splitlines()[0]
    (home / "text.jsonl").write_text("\n".join([text_only] * 2))
    alone = recipe(home, "alone", modalities={"reasoning": {"plugin": "text", "adapter": ADAPTER}})
    alone.stages[0].data["rows"].options = rows
    alone.stages[0].samples_per_step = 2
    train(alone, show=False)
    before, after = (home / run / "modalities/reasoning/adapter_model.safetensors" for run in ("run", "alone"))
    ours, theirs = load_file(before), load_file(after)
    assert all((ours[key] - theirs[key]).abs().max() < 1e-5 for key in ours)
    further = recipe(home, "further", modalities={"reasoning": {"path": str(home / "alone/modalities/reasoning")}})
    further.stages[0].data["rows"].options = rows
    train(further, show=False)
    moved = load_file(home / "further/modalities/reasoning/adapter_model.safetensors")
    assert any(not torch.equal(moved[key], theirs[key]) for key in moved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"router": {"options": {"rules": {"text": "letters"}}}},
            "the adapters of \\['letters'\\], which are for media",
        ),
        ({"modalities": {"text": {"plugin": "molora.testing:Letters"}}}, "modalities.text: 'text' is what rules call"),
        ({"modalities": {"reasoning": {"plugin": "text"}}}, "modalities.reasoning.adapter: missing"),
        (
            {"modalities": {"reasoning": {"plugin": "text", "adapter": ADAPTER, "options": {"a": 1}}}},
            "modalities.reasoning.options: plugin 'text' has none",
        ),
    ],
)
def test_what_makes_no_sense_is_told(home: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, RoutingError), match=message):
        train(recipe(home, "wrong", **changes), show=False)
    assert not (home / "wrong/state").exists()


def test_its_memory_is_foreseen(home: Path) -> None:
    needed = training_needs(recipe(home, "run", modalities={"reasoning": {"plugin": "text", "adapter": ADAPTER}}))
    assert "tokens of text" in str(needed)


def test_who_loads_it_without_a_rule_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    molora.load(home / "backbone", [home / "run/modalities/reasoning"])
    assert "the rule text=reasoning would use it" in " ".join(capsys.readouterr().err.split())
