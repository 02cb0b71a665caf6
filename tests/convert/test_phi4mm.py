"""Phi-4-multimodal: transformers' own model is the oracle; where that is wrong, ours is held to what is right.

Letters: T tokens of a sample, D backbone width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalConfig,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalProcessor,
    Phi4MultimodalVisionConfig,
)

import molora
from molora.config import ConfigError
from molora.convert.phi4mm import Place, Release
from molora.convert.release import converted, export_release, import_release, layout_of
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.pack import collate
from molora.plugins import resolve
from molora.received import read_json
from tests.convert.reference_release import FULL_DEPTH, Sizes, hub_shapes, save_hub, save_native

QUESTION = "What is it?"
SLOTS = {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}


# Media ------------------------------------------------------------------------------------------------------------


def picture(width: int, height: int, phase: float = 0.0) -> dict[str, Any]:
    """Waves and a slope: smooth, with no two places alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = 120 + 90 * np.sin(x / 37 + phase) + 20 * np.cos(y / 11)
    pixels = np.stack([waves, x * 255 / width, y * 255 / height], axis=-1)
    return {"type": "image", "image": Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))}


def clip(seconds: float, pitch_hz: float = 200.0) -> dict[str, Any]:
    """A rising tone with noise."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    noise = np.random.default_rng(0).standard_normal(len(time))
    wave = 0.3 * np.sin(2 * np.pi * (pitch_hz + 50 * time) * time) + 0.05 * noise
    return {"type": "audio", "array": wave.astype(np.float32), "sampling_rate": 16_000}


CASES: dict[str, list[dict[str, Any]]] = {
    "text": [],
    "square": [picture(448, 448)],
    "wide": [picture(900, 500)],
    "tall": [picture(300, 1000)],
    "crops with odd padding": [picture(1000, 701)],
    "two pictures": [picture(448, 448), picture(640, 480, 1.0)],
    "1 s": [clip(1.0)],
    "7.3 s": [clip(7.3)],
    "45 s": [clip(45.0)],
    "picture and clip": [picture(640, 480), clip(2.0)],
}


# Ours and theirs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Native:
    """transformers' model with PEFT's adapters, one sample at a time: what a user of it would run."""

    model: Any
    adapters: Any
    processor: Any
    known: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def adapted(self, parts: Sequence[dict[str, Any]]) -> Iterator[None]:
        types = {part["type"] for part in parts}
        if types:
            self.adapters.set_adapter("vision" if "image" in types else "speech")
        with torch.no_grad(), nullcontext() if types else self.adapters.disable_adapter():
            yield

    def inputs(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        text = f"<|user|>{''.join(SLOTS[part['type']] for part in parts)}{QUESTION}<|end|><|assistant|>"
        pictures = [part["image"] for part in parts if part["type"] == "image"]
        clips = [part["array"] for part in parts if part["type"] == "audio"]
        return dict(self.processor(text=text, images=pictures or None, audio=clips or None, return_tensors="pt"))

    def hidden(self, parts: Sequence[dict[str, Any]]) -> Tensor:
        """Final hidden states (T, D); remembered, as its attention to crops takes seconds."""
        if id(parts) not in self.known:
            with self.adapted(parts):
                self.known[id(parts)] = self.model.model(**self.inputs(parts)).last_hidden_state[0]
        return self.known[id(parts)]


def open_native(folder: Path, vision_attention: str = "eager") -> Native:
    model: Any = Phi4MultimodalForCausalLM.from_pretrained(
        folder, attn_implementation={"": "sdpa", "vision_config": vision_attention, "audio_config": "sdpa"}
    )
    adapters: Any = PeftModel.from_pretrained(model, folder / "vision-lora", adapter_name="vision")
    adapters.load_adapter(folder / "speech-lora", adapter_name="speech")
    return Native(model, adapters.eval(), Phi4MultimodalProcessor.from_pretrained(folder))


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    save_native(folder)
    return folder


@pytest.fixture(scope="module")
def native(released: Path) -> Native:
    return open_native(released)


@pytest.fixture(scope="module")
def run(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_release(released, folder)
    return folder


@pytest.fixture(scope="module")
def ours(run: Path) -> LoadedModel:
    return molora.load(run, device="cpu")


def conversation(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


@torch.no_grad()
def hidden(loaded: LoadedModel, cases: Sequence[Sequence[dict[str, Any]]]) -> list[Tensor]:
    """Final hidden states (T, D) of samples in one pack, in their order."""
    samples = [loaded.encode(conversation(parts), str(index)) for index, parts in enumerate(cases)]
    pack = collate(samples, loaded.model.modalities, loaded.model.router.order)
    found = dict(zip(pack.ids, loaded.model(pack).split(pack.lengths), strict=True))
    return [found[sample.id] for sample in samples]


def logits_apart(loaded: LoadedModel, mine_TD: Tensor, theirs_TD: Tensor) -> float:
    """The largest difference of logits; in pieces, as a row of 200,064 is long."""
    assert mine_TD.shape == theirs_TD.shape
    # The head is linear, without bias.
    pieces = (loaded.model.backbone.head(piece).aminmax() for piece in (mine_TD - theirs_TD).split(32))
    return max(max(-float(low), float(high)) for low, high in pieces)


# The same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_are_transformers_own(name: str, ours: LoadedModel, native: Native) -> None:
    """Through both front ends; 1e-4 is asked, and no front end costs more than rounding."""
    parts = CASES[name]
    sample = ours.encode(conversation(parts), name)
    ids = native.inputs(parts)["input_ids"][0]
    slots = torch.tensor([200010, 200011])
    is_text = ~torch.isin(ids, slots)
    pack = collate([sample], ours.model.modalities, ours.model.router.order)
    assert torch.equal(pack.modality_ids_T == 0, is_text)
    assert torch.equal(pack.token_ids_T[is_text], ids[is_text])
    (mine,) = hidden(ours, [parts])
    assert logits_apart(ours, mine, native.hidden(parts)) <= 1e-5


def test_media_matter_to_the_logits_compared(ours: LoadedModel) -> None:
    """Or the test above could not fail: another picture, clip or company moves them a thousand times further."""
    for one, other in (
        ([picture(448, 448)], [picture(448, 448, 1.0)]),
        ([clip(1.0)], [clip(1.0, 300.0)]),
    ):
        a, b = hidden(ours, [one, other])
        assert logits_apart(ours, a[-4:], b[-4:]) > 1e-3
    alone, beside = hidden(ours, [[clip(1.0)], [picture(448, 448), clip(1.0)]])
    assert logits_apart(ours, alone[-4:], beside[-4:]) > 1e-2


@pytest.mark.parametrize("name", ["text", "square", "1 s", "picture and clip"])
def test_answers_are_transformers_own(name: str, ours: LoadedModel, native: Native) -> None:
    parts, count = CASES[name], 12
    inputs = native.inputs(parts)
    with native.adapted(parts):
        full = native.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    theirs = full[0, inputs["input_ids"].shape[1] :].tolist()
    sample = ours.encode(conversation(parts), name)
    steps = list(molora.inference.generate.generate(ours.model, [sample], GenerationConfig(max_new_tokens=count)))
    assert [step.token_id for step in steps] == theirs


def test_a_mixed_batch_equals_its_samples_alone(ours: LoadedModel) -> None:
    """What the reference cannot do: one `input_mode` there says for the whole batch which adapter runs."""
    names = ["text", "wide", "1 s", "picture and clip", "square", "7.3 s", "two pictures"]
    together = hidden(ours, [CASES[name] for name in names])
    for name, mine in zip(names, together, strict=True):
        (alone,) = hidden(ours, [CASES[name]])
        assert logits_apart(ours, mine, alone) <= 1e-5, name


def test_a_mixed_batch_answers_as_its_samples_alone(ours: LoadedModel) -> None:
    config = GenerationConfig(max_new_tokens=8)
    asked = [conversation(CASES[name]) for name in ("square", "text", "1 s", "picture and clip")]
    assert ours.generate(asked, config) == [ours.generate([one], config)[0] for one in asked]


def test_the_frequencies_switch_while_generating(tmp_path: Path) -> None:
    """The reference drops its cache and prefills again once a sample is longer than the switch; here each sample does
    so on its own, and neighbours go on. The oracle runs without a cache: transformers' `generate` drops it too, and
    then reads the last token alone."""
    save_native(tmp_path / "released", Sizes(switch=24))
    import_release(tmp_path / "released", tmp_path / "run")
    loaded, native = molora.load(tmp_path / "run", device="cpu"), open_native(tmp_path / "released")
    cases = {"short": "go", "near": QUESTION * 2, "beyond": QUESTION * 4}
    theirs = {}
    for name, text in cases.items():
        prompt = native.processor(text=f"<|user|>{text}<|end|><|assistant|>", return_tensors="pt")
        with native.adapted([]):
            full = native.model.generate(**prompt, max_new_tokens=16, do_sample=False, use_cache=False)
        theirs[name] = full[0, prompt["input_ids"].shape[1] :].tolist()
    samples = [loaded.encode([{"role": "user", "content": text}], name) for name, text in cases.items()]
    lengths = sorted(len(sample) for sample in samples)
    assert lengths[0] + 16 <= 24 < lengths[1] + 16 and lengths[1] < 24 < lengths[2]
    found: dict[str, list[int]] = {name: [] for name in cases}
    for step in molora.inference.generate.generate(loaded.model, samples, GenerationConfig(max_new_tokens=16)):
        found[step.id].append(step.token_id)
    assert found == theirs


# Where transformers is wrong ----------------------------------------------------------------------------------


def test_the_tower_is_not_causal(released: Path, ours: LoadedModel, native: Native) -> None:
    """transformers' tower is, under sdpa, when no crop is padded: its first patch cannot see the last."""
    parts = CASES["square"]
    (mine,) = hidden(ours, [parts])
    wrong = open_native(released, "sdpa")
    assert logits_apart(ours, wrong.hidden(parts), native.hidden(parts)) > 1e-3, "mended: take the test away"
    assert logits_apart(ours, mine, native.hidden(parts)) <= 1e-5
    changed = parts[0]["image"].copy()
    changed.paste("black", (434, 434, 448, 448))
    tower: Any = ours.model.encoders["vision"]
    modality = ours.model.modalities["vision"]
    with torch.no_grad():
        frames = [
            tower(**modality.collate([modality.prepare(image)])).frames_SC for image in (parts[0]["image"], changed)
        ]
    assert not torch.equal(frames[0][0], frames[1][0])


def test_clips_of_a_batch_do_not_move_each_other(ours: LoadedModel, native: Native) -> None:
    """transformers adds its mask of padding to the scores, as 0 and 1, and so weighs padding higher instead of hiding
    it."""
    short, long = clip(1.0), clip(3.0)
    batch = native.processor.audio_processor([short["array"], long["array"]], return_tensors="pt")
    alone = native.processor.audio_processor([short["array"]], return_tensors="pt")
    ear = native.model.model.embed_tokens_extend.audio_embed.encoder
    with torch.no_grad():
        beside = ear(batch["audio_input_features"], batch["audio_attention_mask"])[0, :12]
        single = ear(alone["audio_input_features"], None)[0, :12]
    assert float((beside - single).abs().max()) > 1e-3, "mended: take the test away"
    together = hidden(ours, [[short], [long]])
    for parts, mine in zip(([short], [long]), together, strict=True):
        assert logits_apart(ours, mine, native.hidden(parts)) <= 1e-5


def test_long_clips_share_a_batch(ours: LoadedModel, native: Native) -> None:
    """transformers fails on two clips of which one is longer than 40 s."""
    cases = [[clip(45.0)], [clip(2.0)]]
    batch = native.processor.audio_processor([part["array"] for (part,) in cases], return_tensors="pt")
    with torch.no_grad(), pytest.raises(RuntimeError):
        native.model.model.embed_tokens_extend.audio_embed.encoder(
            batch["audio_input_features"], batch["audio_attention_mask"]
        )
    for parts, mine in zip(cases, hidden(ours, cases), strict=True):
        assert logits_apart(ours, mine, native.hidden(parts)) <= 1e-5


def test_stereo_and_other_rates_are_heard(ours: LoadedModel, native: Native) -> None:
    """transformers takes the mean of a stereo clip and forgets it, and refuses every rate but 16 kHz."""
    mono = clip(1.0)
    stereo = np.stack([mono["array"]] * 2, axis=-1)
    with pytest.raises(Exception):  # noqa: B017  (what it stumbles over differs)
        native.processor.audio_processor([stereo], return_tensors="pt")
    with pytest.raises(ValueError, match="sampling rate"):
        native.processor.audio_processor([mono["array"]], sampling_rate=8000, return_tensors="pt")
    time = np.arange(8_000) / 8_000
    low = {"type": "audio", "array": (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32), "sampling_rate": 8_000}
    plain, both, telephone = hidden(ours, [[mono], [{**mono, "array": stereo}], [low]])
    assert logits_apart(ours, plain, both) <= 1e-5
    assert len(telephone) == len(plain)


# There and back -----------------------------------------------------------------------------------------------


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; those of adapter folders under the folder's name."""
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(found: Path, expected: Path, but: str = "no such folder") -> None:
    mine, theirs = ({k: v for k, v in all_tensors(f).items() if but not in k} for f in (found, expected))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert torch.equal(mine[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_the_hub_layout_comes_back_whole(tmp_path: Path) -> None:
    save_hub(tmp_path / "hub", FULL_DEPTH)
    import_release(tmp_path / "hub", tmp_path / "run")
    unused = load_file(tmp_path / "run/backbone/phi4mm/unused.safetensors")
    assert len(all_tensors(tmp_path / "hub")) == 2047
    assert len(unused) == 29
    assert all("layers.26." in name or "post_layernorm" in name or ".head." in name for name in unused)
    export_release(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "hub", but="-lora/")
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer.json"):
        mine, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("back", "hub"))
        assert mine == theirs, name


def test_the_native_layout_comes_back_whole(released: Path, run: Path, tmp_path: Path) -> None:
    export_release(run, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", released)
    for adapter in ("vision-lora", "speech-lora"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "back" / adapter / name).read_bytes() == (released / adapter / name).read_bytes()


def test_from_either_layout_to_the_other_and_back(tmp_path: Path) -> None:
    """Same model: the same tensors after a tour, and transformers' own class reads what was the hub's."""
    save_hub(tmp_path / "hub", dtype=torch.float32)
    import_release(tmp_path / "hub", tmp_path / "run")
    export_release(tmp_path / "run", tmp_path / "native", "native")
    import_release(tmp_path / "native", tmp_path / "again")
    export_release(tmp_path / "again", tmp_path / "back", "hub")
    assert_same_tensors(tmp_path / "back", tmp_path / "hub", but="-lora/")
    assert layout_of(tmp_path / "native") == "native" and layout_of(tmp_path / "back") == "hub"

    loaded, native = molora.load(tmp_path / "run", device="cpu"), open_native(tmp_path / "native")
    for parts in ([], CASES["square"], CASES["1 s"], CASES["picture and clip"]):
        (mine,) = hidden(loaded, [parts])
        assert logits_apart(loaded, mine, native.hidden(parts)) <= 1e-5
    given, kept = (read_json(tmp_path / folder / "config.json") for folder in ("hub", "back"))
    for key in ("audio_processor", "embd_layer"):
        for section in (given[key].get("config", {}), kept[key].get("config", {})):
            section.pop("activation_checkpointing", None)
    different = {key for key in given if given[key] != kept.get(key)}
    # Which files run it, which library wrote it, and how attention is computed are not the model's.
    assert different <= {"auto_map", "transformers_version", "_attn_implementation"}


@pytest.mark.parametrize(
    ("hub", "native"),
    [
        ("image_embed.glb_GN", "image_embed.global_img_feature_extensor"),
        ("image_embed.sub_GN", "image_embed.sub_img_feature_extensor"),
        ("image_embed.img_projection.0.weight", "image_embed.img_projection_up.weight"),
        ("image_embed.img_projection.2.bias", "image_embed.img_projection_down.bias"),
        ("image_embed.img_processor.encoder.layers.1.mlp.fc2.weight",) * 2,
        ("image_embed.img_processor.head.probe",) * 2,
        ("audio_embed.encoder.encoder_embedding.global_invstd",) * 2,
        ("audio_embed.encoder.embed.conv.3.weight",) * 2,
        (
            "audio_embed.encoder.encoders.1.feed_forward_out.net.0.linear.weight",
            "audio_embed.encoder.encoders.1.feed_forward_out.gate_up_proj.weight",
        ),
        (
            "audio_embed.encoder.encoders.0.feed_forward_in.net.2.bias",
            "audio_embed.encoder.encoders.0.feed_forward_in.down_proj.bias",
        ),
        (
            "audio_embed.encoder.encoders.0.self_attn.linear_k.weight",
            "audio_embed.encoder.encoders.0.self_attn.k_proj.weight",
        ),
        (
            "audio_embed.encoder.encoders.1.self_attn.linear_out.bias",
            "audio_embed.encoder.encoders.1.self_attn.o_proj.bias",
        ),
        ("audio_embed.audio_projection.speech.0.weight", "audio_embed.up_proj_for_speech.weight"),
        ("audio_embed.audio_projection.speech.2.weight", "audio_embed.down_proj_for_speech.weight"),
        ("audio_embed.audio_projection.vision.0.weight", "audio_embed.up_proj_for_vision_speech.weight"),
        ("audio_embed.audio_projection.vision.2.bias", "audio_embed.down_proj_for_vision_speech.bias"),
    ],
)
def test_names_in_the_two_layouts(hub: str, native: str, two_layouts: tuple[dict[str, Tensor], ...]) -> None:
    """As transformers' own conversion of the weights has them."""
    prefix = "./model.embed_tokens_extend."
    theirs, ours = two_layouts
    assert torch.equal(theirs[prefix + hub], ours[prefix + native])


@pytest.fixture(scope="module")
def two_layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("layouts")
    save_hub(folder / "hub", Sizes())
    import_release(folder / "hub", folder / "run")
    export_release(folder / "run", folder / "native", "native")
    return all_tensors(folder / "hub"), all_tensors(folder / "native")


def test_adapters_of_the_hub_move_to_folders(two_layouts: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    hub, native = two_layouts
    for theirs, folder in (("vision", "vision-lora"), ("speech", "speech-lora")):
        for side in "AB":
            baked = hub[f"./model.layers.1.mlp.down_proj.lora_{side}.{theirs}.weight"]
            moved = native[f"{folder}/base_model.model.model.layers.1.mlp.down_proj.lora_{side}.weight"]
            assert torch.equal(baked, moved)
    assert torch.equal(
        hub["./model.layers.0.self_attn.qkv_proj.base_layer.weight"],
        native["./model.layers.0.self_attn.qkv_proj.weight"],
    )


def test_a_release_is_opened_as_it_is(released: Path, ours: LoadedModel, monkeypatch: Any, tmp_path: Path) -> None:
    """`molora.load` of the checkpoint itself converts once and then takes what it made."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    (mine,) = hidden(ours, [CASES["square"]])
    for _ in range(2):
        (found,) = hidden(molora.load(released, device="cpu"), [CASES["square"]])
        assert torch.equal(found, mine)
    assert len([path for path in (tmp_path / "phi4mm").iterdir() if path.is_dir()]) == 1


def test_what_stops_an_answer(released: Path, one_shard: Path, tmp_path: Path) -> None:
    """config.json of the hub names <|endoftext|> alone; generation_config.json knows <|end|>, and may be missing."""
    shutil.copytree(one_shard, tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    for number, source in enumerate((released, one_shard, tmp_path / "bare")):
        import_release(source, tmp_path / f"run {number}")
        loaded = molora.load(tmp_path / f"run {number}", device="cpu")
        assert loaded.model.backbone.stop_ids == {199999, 200020}


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_a_release_is_opened_by_its_id(layout: str, released: Path, monkeypatch: Any, tmp_path: Path) -> None:
    """From what the hub's client keeps, without a network."""
    source = released
    if layout == "hub":
        source = tmp_path / "hub"
        save_hub(source, dtype=torch.float32)
    kept = tmp_path / "cache" / "models--microsoft--Phi-4-multimodal-instruct"
    shutil.copytree(source, kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "molora"))
    loaded = molora.load("microsoft/Phi-4-multimodal-instruct", device="cpu")
    assert sorted(loaded.model.modalities) == ["audio", "vision"]
    import_release(source, tmp_path / "run")
    (mine,), (same,) = (hidden(one, [CASES["1 s"]]) for one in (loaded, molora.load(tmp_path / "run", device="cpu")))
    assert torch.equal(mine, same)


# Continued training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported model, its audio trained for some steps."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [
        {"messages": [*conversation([{"type": "audio", "path": f"{n}.wav"}]), {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(("yes", "no"))
    ]
    for n in range(2):
        soundfile.write(folder / f"{n}.wav", clip(0.5, 200.0 + 300 * n)["array"], 16_000)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": str(folder / "run"),
        "backbone": {"path": str(run / "backbone")},
        "modalities": {name: {"path": str(run / "modalities" / name)} for name in ("audio", "vision")},
        "router": {"options": {"rules": {"audio+vision": "vision"}}},
        "stages": [
            {
                "name": "listen",
                "train": {part: {"learning_rate": 1e-2} for part in ("adapters.audio", "projectors.audio.default")},
                "data": {"clips": {"kind": "messages", "options": {"path": str(folder / "data.jsonl")}}},
                "steps": 3,
                "samples_per_step": 2,
            }
        ],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    from molora.config import read
    from molora.train.loop import train
    from molora.train.recipe import Recipe

    return train(read(Recipe, folder / "recipe.yaml"), show=False)


def test_a_trained_run_goes_back_to_transformers(trained: Path, run: Path, released: Path, tmp_path: Path) -> None:
    export_release(trained, tmp_path / "back", "native")
    vision = "vision-lora/adapter_model.safetensors"
    assert (tmp_path / "back" / vision).read_bytes() == (released / vision).read_bytes()
    speech = "speech-lora/adapter_model.safetensors"
    assert (tmp_path / "back" / speech).read_bytes() != (released / speech).read_bytes()
    for name in ("encoder", "projector", "adapter_model"):
        paths = [folder / f"modalities/vision/{name}.safetensors" for folder in (trained, run)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    loaded, native = molora.load(trained, device="cpu"), open_native(tmp_path / "back")
    before = molora.load(run, device="cpu")
    for name in ("text", "square", "1 s", "picture and clip"):
        (mine,), (was,) = hidden(loaded, [CASES[name]]), hidden(before, [CASES[name]])
        assert logits_apart(loaded, mine, native.hidden(CASES[name])) <= 1e-5
        assert (logits_apart(loaded, mine, was) > 1e-3) == (name == "1 s")


def test_transformers_loads_its_adapters_by_itself(trained: Path, tmp_path: Path) -> None:
    """Through `load_adapter`, without PEFT's classes; some pairs of releases of the two libraries refuse each other."""
    from transformers.integrations import peft as integration

    installed = version("peft")
    if Version(installed) < Version(integration.MIN_PEFT_VERSION):
        pytest.skip(f"this transformers asks for peft {integration.MIN_PEFT_VERSION}, installed is {installed}")
    export_release(trained, tmp_path / "back", "native")
    native = open_native(tmp_path / "back")
    plain: Any = Phi4MultimodalForCausalLM.from_pretrained(tmp_path / "back")
    plain.load_adapter(str(tmp_path / "back" / "speech-lora"), adapter_name="speech")
    plain.set_adapter("speech")
    loaded = molora.load(trained, device="cpu")
    (mine,) = hidden(loaded, [CASES["1 s"]])
    with torch.no_grad():
        theirs = plain.eval().model(**native.inputs(CASES["1 s"])).last_hidden_state[0]
    assert logits_apart(loaded, mine, theirs) <= 1e-5


def test_peft_reads_the_adapters_of_either_layout(trained: Path, tmp_path: Path) -> None:
    export_release(trained, tmp_path / "hub", "hub")
    for folder in ("vision-lora", "speech-lora"):
        config = LoraConfig.from_pretrained(str(tmp_path / "hub" / folder))
        backbone: Any = AutoModelForCausalLM.from_pretrained(trained.parent / "run" / _backbone_of(trained))
        adapted = PeftModel.from_pretrained(backbone, tmp_path / "hub" / folder)
        assert len([n for n, _ in adapted.named_parameters() if "lora_A" in n]) == 2 * 4
        assert isinstance(config, LoraConfig) and config.r in (4, 6)
    values = read_json(tmp_path / "hub" / "config.json")
    assert values["speech_lora"]["r"] == 6 and values["vision_lora"]["lora_alpha"] == 8


def _backbone_of(run: Path) -> str:
    return read_json(run / "molora.json")["backbone"]["folder"]


# What is refused ----------------------------------------------------------------------------------------------


def damaged(folder: Path, source: Path, change: Any) -> Path:
    """A copy of a checkpoint of one shard, with its tensors changed."""
    shutil.copytree(source, folder)
    (path,) = folder.glob("model*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "hub"
    save_hub(folder, Sizes(), shards=1)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    return folder


def test_tensors_that_do_not_fit_are_listed(one_shard: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.7.mlp.up.weight"] = torch.zeros(2)
        tensors["model.embed_tokens_extend.image_embed.glb_GN"] = torch.zeros(1, 1, 3)

    with pytest.raises(ValueError, match="unexpected model.layers.7.mlp.up.weight; missing model.norm.weight; "):
        import_release(damaged(tmp_path / "bad", one_shard, change), tmp_path / "run")
    with pytest.raises(ValueError, match=r"glb_GN is \(1, 1, 3\), expected \(1, 1, 32\)"):
        import_release(tmp_path / "bad", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tensor_of_whole_numbers_is_refused(one_shard: Path, tmp_path: Path) -> None:
    """A checkpoint that was quantised since."""

    def change(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.down_proj.base_layer.weight"
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint8)

    with pytest.raises(ValueError, match=r"down_proj\.base_layer\.weight is stored as U8, expected one of BF16"):
        import_release(damaged(tmp_path / "bad", one_shard, change), tmp_path / "run")


@pytest.mark.parametrize("layer", ["encoder.layers.0.mlp.fc1.weight", "embeddings.patch_embedding.weight"])
def test_what_sizes_are_read_from_may_be_missing(one_shard: Path, tmp_path: Path, layer: str) -> None:
    name = f"model.embed_tokens_extend.image_embed.img_processor.{layer}"
    with pytest.raises(ValueError, match=f"missing {name}"):
        import_release(damaged(tmp_path / "bad", one_shard, lambda tensors: tensors.pop(name)), tmp_path / "run")


def test_a_release_opens_where_nothing_can_be_kept(
    one_shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert (Path(converted(one_shard)) / "molora.json").is_file()
    assert "nothing can be kept there" in capsys.readouterr().err


def test_an_edited_release_is_converted_anew(one_shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(one_shard, tmp_path / "release"))
    first = converted(folder)
    assert converted(folder) == first
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        path = folder / name
        stamp = path.stat()
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        assert converted(folder) != first, name
        first = converted(folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.pop("vision_lora"),
        lambda config: config.update(speech_lora=[]),
        lambda config: config["vision_lora"].update(r="x"),
        lambda config: config.update(embd_layer=7),
        lambda config: config.update(audio_processor={}),
        lambda config: config.update(hidden_size="wide"),
    ],
)
def test_settings_of_another_form_are_told_in_one_line(
    one_shard: Path, tmp_path: Path, edit: Callable[[Any], object]
) -> None:
    folder = Path(shutil.copytree(one_shard, tmp_path / "bad"))
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"config\.json.*(cannot open it|lora|expected)") as caught:
        import_release(folder, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"layout": "other"}, {"dtypes": {}}, {"config": 7}, {"max_crops": None}])
def test_what_was_kept_in_another_form_is_told(run: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    there = changed_run(run, tmp_path / "run")
    path = there / "backbone" / "phi4mm" / "about.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match="about.json: "):
        export_release(there, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_shard_is_named(one_shard: Path, tmp_path: Path) -> None:
    shutil.copytree(one_shard, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        import_release(tmp_path / "bad", tmp_path / "run")
    path.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing; copy the whole "):
        import_release(tmp_path / "bad", tmp_path / "run")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("audio_processor", "config", "time_reduction"), 4, "audio time_reduction is 4"),
        (("audio_processor", "config", "chunk_size"), 8, "audio chunk_size is 8"),
        (("embd_layer", "audio_embd_layer", "downsample_rate"), 2, "audio downsample_rate is 2"),
        (("audio_processor", "config", "conv_activation"), "relu", "audio conv_activation is 'relu'"),
    ],
)
def test_settings_that_our_modules_lack(
    one_shard: Path, tmp_path: Path, keys: tuple[str, ...], value: Any, said: str
) -> None:
    shutil.copytree(one_shard, tmp_path / "bad")
    values = read_json(tmp_path / "bad" / "config.json")
    section = values
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (tmp_path / "bad" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=said):
        import_release(tmp_path / "bad", tmp_path / "run")


def test_other_models_and_taken_folders(run: Path, released: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not Phi-4-multimodal"):
        import_release(run / "backbone", tmp_path / "run")
    with pytest.raises(ConfigError, match="is there already"):
        import_release(released, run)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="is there already"):
        import_release(released, tmp_path)
    with pytest.raises(ConfigError, match="is there already and not empty"):
        export_release(run, tmp_path)
    with pytest.raises(ConfigError, match=r"mine\.txt: is a file"):
        import_release(released, tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match=r"mine\.txt: is a file"):
        export_release(run, tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="lies in .*, which is only read"):
        import_release(released, released / "inner")
    with pytest.raises(ConfigError, match="lies in .*, which is only read"):
        export_release(run, run / "inner")
    assert not (released / "inner").exists() and not (run / "inner").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def changed_run(run: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(run, folder)
    about = read_json(folder / "molora.json")
    (folder / "molora.json").write_text(json.dumps({**about, **changes}))
    return folder


@pytest.mark.parametrize("source", ["./nowhere", "nowhere", "a/b/c", "../x"])
def test_a_folder_that_is_not_there_is_none(source: str) -> None:
    """Whoever opens it says so; it is not taken for a name on the hub."""
    assert layout_of(source) is None


def test_runs_that_the_released_model_cannot_be(run: Path, tmp_path: Path) -> None:
    routes = {"plugin": "table", "options": {"rules": {"audio+vision": "audio"}}}
    with pytest.raises(ConfigError, match="would answer otherwise"):
        export_release(changed_run(run, tmp_path / "a", router=routes), tmp_path / "out")
    with pytest.raises(ConfigError, match="has the modalities vision"):
        export_release(changed_run(run, tmp_path / "b", modalities=["vision"]), tmp_path / "out")
    other = changed_run(run, tmp_path / "c")
    shutil.rmtree(other / "backbone" / "phi4mm")
    with pytest.raises(ConfigError, match="was not imported"):
        export_release(other, tmp_path / "out")
    touched = changed_run(run, tmp_path / "d")
    path = touched / "modalities" / "audio" / "projector.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="does not have the hash"):
        export_release(touched, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_import_that_was_stopped_goes_on(released: Path, run: Path, tmp_path: Path) -> None:
    """What a kill leaves is no run yet, and converting again completes it."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "molora.json").unlink()
    (tmp_path / "run" / "modalities" / "audio" / "encoder.safetensors").write_bytes(b"half")
    import_release(released, tmp_path / "run")
    for path in sorted(run.rglob("*.safetensors")):
        there = tmp_path / "run" / path.relative_to(run)
        assert hashlib.sha256(there.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest()


# At full size, without weights --------------------------------------------------------------------------------


def full_release() -> Release:
    """The released model's own sizes."""
    config_class: Any = Phi4MultimodalConfig
    config = config_class(
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        partial_rotary_factor=0.75,
        vision_config=Phi4MultimodalVisionConfig(),
        audio_config=Phi4MultimodalAudioConfig(bias_max_distance=500),
        dtype="bfloat16",
    )
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    adapters = {
        name: LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets) for name, r in (("vision", 256), ("audio", 320))
    }
    return Release(config, adapters, 36)


@pytest.fixture(scope="module")
def full_model() -> MoLoRA:
    release = full_release()
    plans = release.blueprints()
    adapters: Any = release.adapters
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(release.backbone_config())
        table: Any = resolve("router", "table")
        router = table(list(adapters), table.config_type(rules={"audio+vision": "vision"}), 3072)
        backbone = Backbone(stock, Identity("", "", "", "", ""), probe={"embed_scale": 1.0})
        modalities: Any = {name: plan.modality for name, plan in plans.items()}
        return MoLoRA(backbone, modalities, adapters, router)


def size(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def test_parameters_block_by_block(full_model: MoLoRA) -> None:
    """Source: the released checkpoint's counts."""
    parts = {name: size(parameters.values()) for name, parameters in full_model.parts().items()}
    lora_free = [p for name, p in full_model.backbone.model.named_parameters() if "lora_" not in name]
    assert size(lora_free) == 3_836_021_760
    layer = full_model.backbone.model.model.layers[0]  # pyright: ignore[reportAttributeAccessIssue]
    assert size(p for name, p in layer.named_parameters() if "lora_" not in name) == 100_669_440
    assert parts["projectors.vision.default"] == 12_982_272
    assert parts["projectors.audio.default"] == parts["projectors.audio.vision"] == 12_589_056
    assert parts["encoders.audio"] == 441_238_144
    assert parts["adapters.vision"] == 369_098_752
    assert parts["adapters.audio"] == 461_373_440
    unused = [place for place in full_release().places() if place.file.endswith("unused.safetensors")]
    kept = sum(np.prod(place.shape, dtype=int) for place in unused)
    assert len(unused) == 29
    assert parts["encoders.vision"] - 2 * 1152 + kept == 428_565_440
    assert size(lora_free) + sum(parts.values()) + kept == 5_574_460_224


def test_every_tensor_of_the_release_has_its_place() -> None:
    places = full_release().places()
    assert len({place.hub for place in places}) == len({place.native for place in places}) == len(places) == 2047
    shapes = {place.hub: place.released_shape for place in places}
    assert sum("image_embed" in name for name in shapes) == 454
    assert sum("audio_embed" in name for name in shapes) == 887
    real = replace(
        FULL_DEPTH,
        **{"width": 3072, "mlp": 8192, "heads": 24, "tower_width": 1152, "tower_mlp": 4304},
        **{"ear_width": 1024, "ear_mlp": 1536, "ear_channels": 1024, "bias_distance": 500},
    )
    written = hub_shapes(real)
    assert written.keys() == shapes.keys()
    mine = {name: shape for name, shape in shapes.items() if "lora" not in name and "qkv" not in name}
    other = {name for name in mine if mine[name] != written[name]}
    # The builder's tiny models have other numbers of heads.
    assert other == {"model.embed_tokens_extend.audio_embed.encoder.relative_attention_bias_layer.bias_values.weight"}


def test_places_know_both_names() -> None:
    place = Place("backbone", "a", (1,), "native", "hub", (1,))
    assert (place.key, place.named("hub"), place.named("native")) == ("backbone:a", "hub", "native")


# Memory -------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys
from pathlib import Path
from molora.convert.release import import_release

def held(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

import transformers.models.phi3.modeling_phi3, transformers.models.siglip.modeling_siglip
before = held("VmRSS")
import_release(sys.argv[1], Path(sys.argv[2]))
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_converting(tmp_path: Path) -> None:
    """One shard with the whole vocabulary, the mapped file included: within 1.3 times the model."""
    save_hub(tmp_path / "hub", Sizes(layers=1, width=640, heads=10, mlp=64), shards=1)
    total = sum(path.stat().st_size for path in (tmp_path / "hub").glob("*.safetensors"))
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "hub"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) <= 1.3 * total, int(done.stdout.split()[-1]) / total
