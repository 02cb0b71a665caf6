"""A backbone in shards over several processes trains as a whole one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Phi3ForCausalLM

from molora.config import ConfigError, dump
from molora.model.sharding import Steps
from molora.ranks import Ranks
from molora.testing import byte_tokenizer, tiny_model
from molora.train.loop import train
from molora.train.optim import PartConfig
from molora.train.recipe import Recipe
from tests.train.test_train import constant, home, in_processes, outcome, recipe  # noqa: F401

# MOLORA_RANK_STEPS=100 trains for as many steps as EXPERIMENTS.md has.
STEPS = int(os.environ.get("MOLORA_RANK_STEPS", "6"))


def write_pictures_and_sounds(folder: Path) -> Path:
    """Rows of text, of a picture, of a sound and of both."""
    draw = np.random.default_rng(0)
    for index in range(6):
        pixels = draw.integers(0, 256, (16 + index % 3 * 8, 16 + index % 5 * 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        with wave.open(str(folder / f"{index}.wav"), "wb") as sound:
            sound.setparams((1, 2, 16_000, 0, "NONE", ""))
            sound.writeframes(draw.integers(-3000, 3000, 2_000 + 977 * index).astype("<i2").tobytes())
    generator = random.Random(0)
    with open(folder / "mixed.jsonl", "w", encoding="utf-8") as file:
        for index in range(40):
            name = str(folder / str(generator.randrange(6)))
            media = [{"type": "image", "path": f"{name}.png"}, {"type": "audio", "path": f"{name}.wav"}]
            content = [*media[index % 2 : 2 - index // 2 % 2], {"type": "text", "text": "which" + "?" * (index % 5)}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"number {index}"}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "mixed.jsonl"


def mixed(home: Path, run: Path, rows: Path, sharded: bool) -> Recipe:  # noqa: F811
    tower = {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}
    convit = {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}}
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    audio = {"tower": {"conformer": tower}, "beside": {"vision": "vision"}}
    vision = {"crop_pixels": 16, "max_crops": 2, "pool": 1, "tower": convit}
    stage = {
        "name": "all",
        "train": {name: {"learning_rate": 1e-3} for name in ("encoders", "projectors", "adapters")},
        "data": {"rows": {"kind": "messages", "options": {"path": str(rows)}}},
        "steps": STEPS,
        "samples_per_step": 6,
        "tokens_per_pack": 128,
    }
    return recipe(
        home,
        run,
        modalities={
            "vision": {"plugin": "vision", "options": vision, "adapter": adapter},
            "audio": {"plugin": "audio", "options": audio, "adapter": adapter},
        },
        router={"options": {"rules": {"audio+vision": "vision"}}},
        stages=[stage],
        evaluations={},
        save_every_steps=STEPS,
        shard_backbone=sharded,
    )


def assert_trained_alike(run: Path, other: Path) -> list[dict[str, Any]]:
    """Losses within 1e-5 in every step, adapters within 1e-4 at the end. Returns the steps' rows."""
    ours, expected = outcome(run), outcome(other)
    assert len(ours["rows"]) == len(expected["rows"])
    for row, theirs in zip(ours["rows"], expected["rows"], strict=True):
        assert row["samples_digest"] == theirs["samples_digest"]
        losses = {key: value for key, value in theirs.items() if key.startswith("loss/")}
        for key, value in losses.items():
            assert abs(row[key] - value) <= 1e-5 * max(1.0, abs(value)), f"step {row['step']}: {key}"
    weights, others = (
        {name: torch.tensor(values) for name, values in tensors.items() if name.startswith("adapters.")}
        for tensors in (each["tensors"]["weights.safetensors"] for each in (ours, expected))
    )
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-4)
    return ours["rows"]


@pytest.fixture(scope="module")
def one(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What one process makes of the mixed rows."""
    pytest.importorskip("torchaudio")
    folder = tmp_path_factory.mktemp("mixed")
    return train(mixed(home, folder / "one", write_pictures_and_sounds(folder), sharded=False), show=False)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("count", [2, 4])
def test_pictures_and_sounds_train_in_several_processes_as_in_one(
    home: Path,  # noqa: F811
    tmp_path: Path,
    one: Path,
    count: int,
    sharded: bool,
) -> None:
    (tmp_path / "many.yaml").write_text(dump(mixed(home, tmp_path / "many", one.with_name("mixed.jsonl"), sharded)))
    in_processes(tmp_path / "many.yaml", count)
    rows = assert_trained_alike(tmp_path / "many", one)
    groups = {key for row in rows for key in row if key.startswith("loss/")}
    assert groups == {"loss/text", "loss/audio", "loss/vision", "loss/audio+vision"}


def test_words_before_answers_are_learned_in_shards_as_in_one_process(home: Path, tmp_path: Path) -> None:  # noqa: F811
    """A stage of words runs no layer, and the stage of answers behind it all of them."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "letters", "letters": said}]},
                {"role": "assistant", "content": said},
            ]
        }
        for said in ("abc", "cab", "bca", "acb") * 2
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = {
        "name": "words",
        "objective": "words",
        "train": {kind: {"learning_rate": 1e-2} for kind in ("encoders", "projectors.letters")},
        "data": {"rows": {"kind": "messages", "options": {"path": str(tmp_path / "rows.jsonl")}}},
        "steps": 3,
        "samples_per_step": 4,
    }
    answers = {**words, "name": "answers", "objective": "answers", "train": {"adapters": {"learning_rate": 1e-3}}}
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
    given: dict[str, Any] = {
        "modalities": {"letters": {"plugin": "molora.testing:Letters", "adapter": adapter}},
        "router": {},
    }
    given |= {"stages": [words, answers], "evaluations": {}}
    one, many = (
        recipe(home, tmp_path / name, **given, shard_backbone=sharded)
        for name, sharded in (("one", False), ("many", True))
    )
    train(one, show=False)
    (tmp_path / "many.yaml").write_text(dump(many))
    in_processes(tmp_path / "many.yaml", 2)
    assert len(assert_trained_alike(tmp_path / "many", tmp_path / "one")) == 6


def test_the_reference_at_its_full_depth_trains_in_four_shards(tmp_path: Path) -> None:
    """Phi-4-mini's 32 layers, 27 of SigLIP and 24 of the Conformer, with tiny widths. Of a sound only the adapter of
    the last layer learns, so that a rank that has sounds alone could end its backward pass there.
    Shards compute their layers again."""
    pytest.importorskip("torchaudio")
    config: Any = tiny_model("phi4-mini").config
    config.num_hidden_layers = 32
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Phi3ForCausalLM(config).save_pretrained(tmp_path / "backbone")
    byte_tokenizer().save_pretrained(tmp_path / "backbone")
    rows = write_pictures_and_sounds(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 27, "num_attention_heads": 2}
    siglip = {"kind": "transformers", "pretrained": False, "arguments": sizes}
    runs = []
    for name, sharded in (("one", False), ("many", True)):
        given = mixed(tmp_path, tmp_path / name, rows, sharded)
        given.activation_checkpointing = sharded
        given.modalities["audio"].options["tower"]["conformer"]["blocks"] = 24
        given.modalities["vision"].options |= {"crop_pixels": 56, "tower": siglip}
        given.modalities["audio"].adapter = {**(given.modalities["audio"].adapter or {}), "layers_to_transform": [31]}
        (stage,) = given.stages
        stage.train = {part: PartConfig(learning_rate=1e-3) for part in ("adapters", "*.vision.*")}
        stage.tokens_per_pack, stage.steps, given.save_every_steps = 256, 2, 2
        runs.append(given)
    train(runs[0], show=False)
    (tmp_path / "many.yaml").write_text(dump(runs[1]))
    in_processes(tmp_path / "many.yaml", 4)
    assert len(assert_trained_alike(tmp_path / "many", tmp_path / "one")) == 2


def test_what_four_processes_began_goes_on_in_two_and_in_one(home: Path, tmp_path: Path) -> None:  # noqa: F811
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
    plugins = {"numbers": "molora.testing:Numbers", "letters": "molora.testing:Letters"}
    modalities = {name: {"plugin": plugin, "adapter": adapter} for name, plugin in plugins.items()}

    def of(name: str, steps: int) -> Recipe:
        more: dict[str, Any] = {"modalities": modalities, "evaluations": {}, "allow_changed_environment": True}
        return constant(home, tmp_path / name, steps, shard_backbone=True, **more)

    (tmp_path / "begun.yaml").write_text(dump(of("begun", 3)))
    in_processes(tmp_path / "begun.yaml", 4)
    for name in ("two", "one"):
        shutil.copytree(tmp_path / "begun", tmp_path / name)
    (tmp_path / "two.yaml").write_text(dump(of("two", 6)))
    in_processes(tmp_path / "two.yaml", 2)
    train(of("one", 6), show=False)
    train(of("whole", 6), show=False)
    for name in ("two", "one"):
        assert len(assert_trained_alike(tmp_path / name, tmp_path / "whole")) == 8


def test_an_error_inside_shared_layers_is_not_taken_for_that_of_a_sample() -> None:
    """The other ranks wait inside the layers, so that going on would leave them there."""
    idle: list[bool] = []
    steps = Steps(Ranks(torch.device("cpu")), idle.append)

    def fail(embeds_TD: torch.Tensor) -> torch.Tensor:
        raise ValueError("no memory")

    with pytest.raises(RuntimeError, match="in layers that all ranks share: ValueError: no memory"), steps.at_will():
        try:
            steps.run(fail, torch.ones(1, 1))
        except Exception as error:
            raise AssertionError("the sample was left out, and others would have gone on") from error
    assert not idle


def test_a_quantised_backbone_is_not_cut_into_shards(home: Path, tmp_path: Path) -> None:  # noqa: F811
    backbone = {"path": str(home / "backbone"), "quantization": "nf4"}
    with pytest.raises(ConfigError, match="shard_backbone: a backbone with quantization nf4 is not cut into shards"):
        recipe(home, tmp_path / "run", backbone=backbone, shard_backbone=True)
