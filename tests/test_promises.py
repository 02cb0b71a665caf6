"""The seven promises, for text and vision, on a real run trained here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM

import molora
from molora.config import build
from molora.data.processor import SampleTooLong
from molora.inference.generate import GenerationConfig, generate
from molora.inference.load import LoadedModel
from molora.pack import Sample, collate
from molora.routing import Flow, Routing
from molora.testing import assert_close, save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe

TEXTS = ("hello", "a longer text than the other, past the switch of the rotary frequencies", "x")
SIZES = ((16, 16), (40, 24), (23, 47), (90, 30))
VISION = {
    "plugin": "vision",
    "options": {
        "crop_pixels": 16,
        "max_crops": 3,
        "pool": 1,
        "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 8, "depth": 1, "heads": 2}},
    },
    "adapter": {"r": 4, "lora_alpha": 64, "target_modules": ["qkv_proj", "o_proj"]},
}
LETTERS = {
    "plugin": "molora.testing:Letters",
    "adapter": {"r": 2, "lora_alpha": 32, "target_modules": ["qkv_proj", "down_proj"]},
}


def picture(home: Path, index: int) -> dict[str, str]:
    return {"type": "image", "path": str(home / f"{index}.png")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, pictures, and two runs: vision alone, then letters beside that vision."""
    folder = tmp_path_factory.mktemp("promises")
    save_backbone(folder / "backbone")
    draw = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    kinds: dict[str, list[list[dict[str, Any]]]] = {
        "vision": [[picture(folder, i), {"type": "text", "text": "what?"}] for i in range(len(SIZES))],
        "letters": [
            [{"type": "letters", "letters": word}, {"type": "text", "text": "which?"}] for word in ("ab", "dcba")
        ],
        "text": [[{"type": "text", "text": text}] for text in TEXTS],
    }
    mixes = {"vision": ("vision", "text"), "both": ("vision", "letters", "text"), "letters_rows": ("letters", "text")}
    for name, wanted in mixes.items():
        rows = [content for kind in wanted for content in kinds[kind]]
        with open(folder / f"{name}.jsonl", "w") as file:
            for content in rows:
                answer = {"role": "assistant", "content": content[-1]["text"][:3]}
                file.write(json.dumps({"messages": [{"role": "user", "content": content}, answer]}) + "\n")
    train_run(folder, "vision", {"vision": VISION}, "vision")
    shutil.copytree(folder / "vision/modalities/vision", folder / "vision_before")
    beside = {"vision": {"path": str(folder / "vision/modalities/vision")}, "letters": LETTERS}
    train_run(folder, "letters", beside, "both", trained=("letters",))
    return folder


def train_run(
    home: Path, name: str, modalities: dict[str, Any], rows: str, trained: tuple[str, ...] = ("vision",)
) -> None:
    parts = {f"{kind}.{m}": {"learning_rate": 1e-2} for kind in ("encoders", "projectors", "adapters") for m in trained}
    data = {"rows": {"kind": "messages", "options": {"path": str(home / f"{rows}.jsonl")}}}
    values = {
        "run": str(home / name),
        "backbone": {"path": str(home / "backbone")},
        "modalities": modalities,
        "router": {"options": {"rules": {"vision+letters": "vision"} if len(modalities) == 2 else {}}},
        "stages": [{"name": "tune", "train": parts, "data": data, "steps": 6, "samples_per_step": 6}],
        "device": "cpu",
    }
    train(build(Recipe, values, "test"), show=False)


@pytest.fixture(scope="module")
def loaded(home: Path) -> LoadedModel:
    return molora.load(home / "letters", device="cpu")


@pytest.fixture(scope="module")
def samples(home: Path, loaded: LoadedModel) -> list[Sample]:
    """Text, pictures, letters, a picture with letters, two pictures, in no particular order."""
    letters = {"type": "letters", "letters": "hello"}
    contents: list[Any] = [
        TEXTS[0],
        [picture(home, 1), {"type": "text", "text": "what?"}],
        [letters, {"type": "text", "text": "which?"}],
        TEXTS[1],
        [picture(home, 0), {"type": "text", "text": "and"}, letters, {"type": "text", "text": "?"}],
        [{"type": "text", "text": "between"}, picture(home, 2), {"type": "text", "text": "and"}, picture(home, 3)],
        TEXTS[2],
    ]
    return [loaded.encode([{"role": "user", "content": content}], f"s{i}") for i, content in enumerate(contents)]


@torch.no_grad()
def packed_logits(loaded: LoadedModel, samples: list[Sample]) -> dict[str, Tensor]:
    pack = loaded.processor.collate(samples)
    return dict(zip(pack.ids, loaded.model.logits(pack).split(pack.lengths), strict=True))


def stock(home: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(home / "backbone", attn_implementation="sdpa").eval()


def test_1_frozen_weights_and_eval_mode(home: Path, loaded: LoadedModel) -> None:
    loaded.model.train()
    backbone = loaded.model.backbone
    adapters = [m for n, m in backbone.model.named_modules() if ".lora_" in n]
    assert not any(m.training for m in backbone.modules() if all(m is not a for a in adapters))
    loaded.model.eval()
    mine = {name.replace(".base_layer.", "."): value for name, value in backbone.model.state_dict().items()}
    for name, value in stock(home).state_dict().items():
        assert torch.equal(mine[name], value), name
    assert not any(p.requires_grad for p in backbone.parameters())


def test_1_frozen_text_alone_equals_transformers_to_the_bit(
    home: Path, loaded: LoadedModel, samples: list[Sample]
) -> None:
    reference = stock(home)
    for sample in samples:
        if not sample.items:
            with torch.no_grad():
                theirs = reference(input_ids=sample.token_ids_T[None]).logits[0]
            assert torch.equal(packed_logits(loaded, [sample])[sample.id], theirs)


def test_1_frozen_text_in_a_pack_equals_the_bare_pack_to_the_bit(loaded: LoadedModel, samples: list[Sample]) -> None:
    model, pack = loaded.model, loaded.processor.collate(samples)
    flow = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    with torch.no_grad():
        bare = model.backbone.head(model.backbone(model.embed(pack), pack.position_ids_T, flow)).split(pack.lengths)
    packed = packed_logits(loaded, samples)
    for id, modalities, logits in zip(pack.ids, pack.modalities, bare, strict=True):
        assert torch.equal(packed[id], logits) == (not modalities), id


def test_2_training_letters_leaves_vision_as_it_was(home: Path) -> None:
    for path in sorted((home / "vision_before").iterdir()):
        for run in ("vision", "letters"):
            assert (home / run / "modalities/vision" / path.name).read_bytes() == path.read_bytes(), (
                f"{run} {path.name}"
            )
    before = json.loads((home / "vision_before/modality.json").read_text())["files"]
    after = json.loads((home / "letters/modalities/letters/modality.json").read_text())["files"]
    assert before.keys() == after.keys() and before != after


def test_2_adding_and_removing_a_modality_moves_no_bit_elsewhere(
    home: Path, loaded: LoadedModel, samples: list[Sample]
) -> None:
    without = molora.load(home / "vision", device="cpu")
    shared = [sample for sample in samples if "letters" not in sample.modalities]
    ours, expected = packed_logits(loaded, shared), packed_logits(without, shared)
    assert {frozenset(sample.modalities) for sample in shared} == {frozenset(), frozenset({"vision"})}
    for sample in shared:
        assert torch.equal(ours[sample.id], expected[sample.id]), sample.id


def test_3_any_mix_in_one_batch(loaded: LoadedModel, samples: list[Sample]) -> None:
    forwards, backwards = packed_logits(loaded, samples), packed_logits(loaded, samples[::-1])
    for sample in samples:
        alone = packed_logits(loaded, [sample])[sample.id]
        assert_close(forwards[sample.id], alone, what=f"{sample.id} packed")
        assert_close(backwards[sample.id], alone, what=f"{sample.id} packed in another order")


def test_3_any_mix_is_generated_as_alone(loaded: LoadedModel, samples: list[Sample]) -> None:
    config = GenerationConfig(max_new_tokens=6, max_running_samples=5)
    together = [(step.id, step.token_id) for step in generate(loaded.model, samples, config)]
    for sample in samples:
        alone = [step.token_id for step in generate(loaded.model, [sample], config)]
        assert [token for id, token in together if id == sample.id] == alone


@pytest.mark.parametrize("seed", range(6))
def test_4_tokens_equal_frames(seed: int, loaded: LoadedModel) -> None:
    draw = np.random.default_rng(seed)
    width, height = (int(n) for n in draw.integers(10, 70, 2))
    vision = loaded.model.modalities["vision"]
    item = vision.load({"type": "image", "image": Image.new("RGB", (width, height))})
    prepared = vision.prepare(item)
    frames = loaded.model.encoders["vision"](**vision.collate([prepared, prepared]))
    assert frames.lengths == (prepared.num_tokens,) * 2 and len(frames.frames_SC) == 2 * prepared.num_tokens
    image = {"type": "image", "image": Image.new("RGB", (width, height))}
    sample = loaded.encode([{"role": "user", "content": [image, {"type": "text", "text": "?"}]}])
    assert int((sample.modality_ids_T == 1).sum()) == prepared.num_tokens


def test_4_media_are_never_cut(home: Path, loaded: LoadedModel) -> None:
    many = [picture(home, 3)] * 30
    with pytest.raises(SampleTooLong, match=r"has \d+ tokens \(\d+ of media\), but at most 256 fit"):
        loaded.encode([{"role": "user", "content": [*many, {"type": "text", "text": "?"}]}])


def test_5_one_path_for_loss_evaluation_and_generation(
    home: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [picture(home, 1), {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "wha"}]
    sample = loaded.processor.encode(turns, "s")
    first = int(sample.targets_T.nonzero()[0])
    calls: list[tuple[int, ...]] = []
    forward = type(loaded.model.backbone).forward

    def counted(self: Any, embeds_TD: Tensor, position_ids_T: Tensor, flow: Flow, cache: Any = None) -> Tensor:
        calls.append(flow.lengths)
        return forward(self, embeds_TD, position_ids_T, flow, cache)

    monkeypatch.setattr(type(loaded.model.backbone), "forward", counted)
    with torch.no_grad():
        loss = loaded.model.losses(collate([sample], loaded.model.modalities)).sums_N[0]
        logits = packed_logits(loaded, [sample])["s"]
        answer = [
            s.token_id for s in generate(loaded.model, [loaded.encode(turns[:1])], GenerationConfig(max_new_tokens=1))
        ]
    assert calls == [(len(sample),), (len(sample),), (first,)]
    expected = torch.nn.functional.cross_entropy(logits[first - 1 : -1], sample.token_ids_T[first:], reduction="sum")
    assert_close(loss, expected)
    assert answer == [int(logits[first - 1].argmax())]


def test_6_a_run_holds_nothing_that_can_execute(home: Path) -> None:
    kinds = {path.suffix for path in (home / "letters").rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert kinds == {".safetensors", ".json", ".jsonl", ".yaml", ".md"}


def test_6_a_run_reloads_to_the_bit(home: Path, loaded: LoadedModel, samples: list[Sample]) -> None:
    again = molora.load(home / "letters", device="cpu")
    ours, theirs = packed_logits(loaded, samples), packed_logits(again, samples)
    assert all(torch.equal(ours[id], theirs[id]) for id in ours)


def test_7_peft_opens_what_we_save(home: Path, loaded: LoadedModel, samples: list[Sample]) -> None:
    theirs: Any = PeftModel.from_pretrained(stock(home), str(home / "letters/modalities/vision"))
    sample = samples[1]
    with torch.no_grad():
        embeds = loaded.model.embed(collate([sample], loaded.model.modalities))
        assert_close(packed_logits(loaded, [sample])[sample.id], theirs(inputs_embeds=embeds[None]).logits[0])


def test_7_folders_from_different_runs_combine(home: Path, tmp_path: Path, samples: list[Sample]) -> None:
    train_run(home, "letters_elsewhere", {"letters": LETTERS}, "letters_rows", ("letters",))
    folders = [home / "vision/modalities/vision", home / "letters_elsewhere/modalities/letters"]
    moved = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    rules = molora.RouterConfig(options={"rules": {"vision+letters": "vision"}})
    combined = molora.load(home / "backbone", moved, router=rules, device="cpu")
    alone = molora.load(home / "vision", device="cpu")
    assert torch.equal(packed_logits(combined, [samples[1]])["s1"], packed_logits(alone, [samples[1]])["s1"])
    together = packed_logits(combined, samples)
    assert_close(together["s1"], packed_logits(alone, [samples[1]])["s1"])
