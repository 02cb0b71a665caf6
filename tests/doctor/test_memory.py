"""What a run is said to need is what a run takes: real models, steps and answers are the oracle, to the byte."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, WhisperConfig, WhisperFeatureExtractor
from typer.testing import CliRunner

import molora.model.backbone
from molora.checkpoint.assembly import BackboneConfig, ModalityConfig, RouterConfig
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.opening import open_model
from molora.checkpoint.run_folder import write_run
from molora.cli.commands import app
from molora.config import ConfigError, dump
from molora.data.processor import Processor
from molora.data.sources import EncodedSamples, SourceConfig
from molora.doctor.dry_run import on_meta
from molora.doctor.memory import Device, cards_for, duration, main, show
from molora.doctor.needs import (
    AnsweringConfig,
    MemoryNeeds,
    Moment,
    Need,
    StageWork,
    about,
    answering_needs,
    full_pack,
    training_needs,
)
from molora.evaluate.judge import EvaluationConfig
from molora.inference.generate import Batch, GenerationConfig, generate, tokens_kept
from molora.inference.load import load
from molora.inference.running import Asked
from molora.modality import Encoder, Frames
from molora.model.molora import MoLoRA
from molora.model.pages import PagePool
from molora.pack import Sample
from molora.seeding import seed_of
from molora.terminal import console
from molora.testing import ROPE_SWITCH, Numbers, byte_tokenizer, save_backbone
from molora.train.optim import PartConfig, set_trainable
from molora.train.preference import Reference, preference_step
from molora.train.preflight import words_of
from molora.train.recipe import Recipe, StageConfig, plan_recipe
from molora.train.step import train_step

VISION: dict[str, Any] = {
    "crop_pixels": 32,
    "pool": 2,
    "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}},
}
AUDIO: dict[str, Any] = {
    "tower": {"conformer": {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}},
    "beside": {"vision": "vision"},
}
ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}
RULES = {"audio+vision": "vision"}
EVERYTHING = ("encoders", "projectors", "adapters")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for matrices to be most of it."""
    folder = tmp_path_factory.mktemp("small")
    config = Phi3Config(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=256,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def recipe_of(path: Path | str, dtype: str | None = None, **changes: Any) -> Recipe:
    """Pictures and sounds; everything trains."""
    train = {f"{part}.*": PartConfig(learning_rate=1e-3) for part in EVERYTHING}
    source = SourceConfig(kind="messages", options={"path": "nowhere.jsonl"})
    stage = StageConfig(
        name="all", train=train, data={"rows": source}, steps=2, samples_per_step=4, tokens_per_pack=700
    )
    plans = {"vision": VISION, "audio": AUDIO}
    settings: dict[str, Any] = {
        "run": "unused",
        "backbone": BackboneConfig(path=str(path), dtype=dtype),
        "modalities": {
            name: ModalityConfig(plugin=name, options=options, adapter=ADAPTER) for name, options in plans.items()
        },
        "router": RouterConfig(options={"rules": RULES}),
        "stages": [stage],
        "device": "cpu",
    }
    return Recipe(**{**settings, **changes})


def named(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (tuple(t.shape), t.stride(), t.dtype, isinstance(t, nn.Parameter)) for name, t in tensors}


def held(model: nn.Module) -> int:
    """Bytes of the storages behind a model's tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for storage in storages.values())


def most_allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator had given out at a time."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events: Any = seen.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    now = most = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def need(moment: Moment, what: str) -> int:
    return next(need.num_bytes for need in moment.needs if need.what == what)


# The model


def test_a_recipes_model_on_meta_has_the_tensors_of_the_real_one(backbone: Path) -> None:
    recipe = recipe_of(backbone)
    real, _ = open_model(plan_recipe(recipe), "cpu")
    model = on_meta(recipe)
    assert named(model) == named(real)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model.parts().keys() == real.parts().keys()


def test_dtypes_are_those_of_the_real_one_too(backbone: Path) -> None:
    recipe = recipe_of(backbone, "bfloat16")
    real, _ = open_model(plan_recipe(recipe), "cpu")
    assert named(on_meta(recipe)) == named(real)
    assert {p.dtype for p in real.parameters()} == {torch.bfloat16, torch.float32}


def test_a_run_and_a_backbone_with_folders_become_models_on_meta(backbone: Path, tmp_path: Path) -> None:
    recipe = recipe_of(backbone)
    planned = plan_recipe(recipe)
    plans = planned.modalities
    real, _ = open_model(planned, "cpu")
    folders = {name: tmp_path / "modalities" / name for name in plans}
    for name, plan in plans.items():
        save_modality(real, name, plan, folders[name], {})
    write_run(tmp_path, real.backbone.identity, list(plans), recipe.router, dtype="bfloat16", learned={})
    run = load(tmp_path, device="cpu").model
    assert named(on_meta(tmp_path)) == named(run)
    assert run.backbone.model.dtype == torch.bfloat16
    parts = load(backbone, list(folders.values()), router=recipe.router, device="cpu").model
    assert named(on_meta(backbone, list(folders.values()))) == named(parts)
    saved = recipe_of(backbone, modalities={name: ModalityConfig(path=str(folders[name])) for name in plans})
    assert named(on_meta(saved)) == named(parts)


SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
EAR: dict[str, Any] = {
    **{"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24},
    **{"num_mel_bins": 16, "max_source_positions": 100},
}
HEARS: dict[str, Any] = {"feature_size": 16, "chunk_length": 2}


def tower(**options: Any) -> dict[str, Any]:
    return {"crop_pixels": 56, "tower": options}


def ear(**options: Any) -> dict[str, Any]:
    return {"tower": {"kind": "pretrained", "pretrained": {"architecture": "whisper", **options}}}


# A plugin, its options with pretrained weights that are not here, and options that build the same from scratch. FOLDER
# holds descriptions, as a repository on the hub does, and no weights.
FOLDER = "<folder>"
PRETRAINED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "siglip": (
        "vision",
        tower(kind="transformers", path=FOLDER),
        tower(kind="transformers", pretrained=False, arguments=SIZES),
    ),
    "timm": (
        "vision",
        tower(kind="timm", name="vit_tiny_patch16_224", patch_pixels=16),
        tower(kind="timm", name="vit_tiny_patch16_224", patch_pixels=16, pretrained=False),
    ),
    "timm, convolutional": (
        "vision",
        tower(kind="timm", name="resnet10t", patch_pixels=8, layer=-3),
        tower(kind="timm", name="resnet10t", patch_pixels=8, layer=-3, pretrained=False),
    ),
    "whisper": ("audio", ear(path=FOLDER), ear(pretrained=False, arguments=EAR, features=HEARS)),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_encoders_are_built_from_their_descriptions_alone(
    name: str, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    plugin, given, scratch = PRETRAINED[name]
    if name == "siglip":
        SiglipVisionConfig(**SIZES, image_size=56, patch_size=14).save_pretrained(tmp_path)
    if name == "whisper":
        WhisperConfig(**EAR).save_pretrained(tmp_path)
        WhisperFeatureExtractor(**HEARS).save_pretrained(tmp_path)
    given = json.loads(json.dumps(given).replace(FOLDER, str(tmp_path)))
    modalities = [{plugin: ModalityConfig(plugin=plugin, options=options)} for options in (given, scratch)]
    model = on_meta(recipe_of(backbone, modalities=modalities[0], router=RouterConfig()))
    real, _ = open_model(plan_recipe(recipe_of(backbone, modalities=modalities[1], router=RouterConfig())), "cpu")
    assert named(model) == named(real)


def test_what_must_be_fetched_is_named_when_the_hub_is_out_of_reach(
    backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    modalities = {"vision": ModalityConfig(plugin="vision", options=tower(kind="transformers", name="some/siglip"))}
    with pytest.raises(ValueError, match=r"some/siglip .* cannot be fetched .* of which \*config.json is wanted"):
        on_meta(recipe_of(backbone, modalities=modalities, router=RouterConfig()))
    with pytest.raises(FileNotFoundError, match=r"backbone 'some/llm': no such folder in .*, and the hub gives none"):
        on_meta(recipe_of("some/llm"))


class _Peeking(nn.Module):
    """Looks at a weight when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 8)
        self.scale = float(self.linear.weight.detach().sum())


class Peeking(Numbers):
    def build_encoder(self) -> Any:
        return _Peeking()


def test_an_encoder_that_looks_at_weights_is_told_so(backbone: Path) -> None:
    modalities = {"numbers": ModalityConfig(plugin=f"{__file__}:Peeking")}
    with pytest.raises(ValueError, match=r"encoder of numbers cannot be built without weights.*torch.device"):
        on_meta(recipe_of(backbone, modalities=modalities, router=RouterConfig()))


class _Choosy(Encoder):
    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 8)

    def forward(self, **collated: Tensor) -> Frames:
        frames_SC = self.linear(collated["values"][:, None])
        return Frames(frames_SC[(frames_SC > 0).any(1).nonzero()[:, 0]], tuple(collated["lengths"].tolist()))


class Choosy(Numbers):
    """Its frames are those that a weight chooses."""

    def build_encoder(self) -> Any:
        return _Choosy()


# Training


@pytest.mark.parametrize("parts", [EVERYTHING, ("adapters",)], ids=["everything", "adapters"])
def test_weights_gradients_and_optimiser_are_what_a_step_holds_to_the_byte(
    parts: tuple[str, ...], backbone: Path
) -> None:
    recipe = recipe_of(backbone)
    (stage,) = recipe.stages
    stage.train = {f"{part}.*": PartConfig(learning_rate=1e-3) for part in parts}
    expected = training_needs(recipe)

    model, processor = open_model(plan_recipe(recipe), "cpu")
    optimizers = set_trainable(model, stage.train, stage.steps, "stages.0.train")
    samples = [
        processor.encode([{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], str(index))
        for index, content in enumerate(every_company(processor))
    ]
    train_step(model, processor, samples, 700, {})
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    train_step(model, processor, samples, 700, optimizers)
    state = [tensor for optimizer in optimizers.values() for tensor in optimizer.tensors().values()]

    assert expected.weight_bytes == held(model)
    by_part = {part: sum(p.nbytes for p in parameters.values()) for part, parameters in model.parts().items()}
    assert {need.what for need in expected.weights} == {"backbone", *by_part}
    for row in expected.weights:
        if row.what.startswith(("projectors", "adapters")):
            assert row.num_bytes == by_part[row.what]
    (moment,) = expected.moments
    assert need(moment, "gradients") == gradients
    assert need(moment, "optimiser") == sum(tensor.untyped_storage().nbytes() for tensor in state) > 2 * gradients


def every_company(processor: Processor) -> list[list[dict[str, Any]]]:
    picture, sound = (processor.modalities[name].examples()[0] for name in ("vision", "audio"))
    return [[picture], [sound], [picture, sound]]


@pytest.mark.parametrize(
    ("size", "dtype", "checkpointing"),
    [
        ("tiny", "float32", False),
        ("tiny", "bfloat16", True),
        ("small", "float32", True),
        ("small", "float32", False),
        ("small", "bfloat16", False),
    ],
)
def test_activations_and_logits_are_within_a_hundredth_of_what_is_allocated(
    size: str, dtype: str, checkpointing: bool, backbone: Path, small: Path
) -> None:
    if dtype == "bfloat16" and not {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("a CPU without bf16 instructions allocates fp32 copies for its products, which no device does")
    path = {"tiny": backbone, "small": small}[size]
    recipe = recipe_of(path, dtype, activation_checkpointing=checkpointing)
    (stage,) = recipe.stages
    (moment,) = training_needs(recipe).moments
    (origin,) = (need.origin for need in moment.needs if need.what == "activations")
    company = frozenset(
        next(word for word in origin.replace(",", "").split() if word in ("audio+vision", "audio", "vision")).split("+")
    )

    model, processor = open_model(plan_recipe(recipe), "cpu")
    model.backbone.activation_checkpointing = checkpointing
    set_trainable(model, stage.train, stage.steps, "stages.0.train")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model.train()
    samples = full_pack(model, company, stage)
    taken = most_allocated(lambda: train_step(model, processor, samples, stage.tokens_per_pack, {}))
    assert sum(map(len, samples)) > 0.95 * stage.tokens_per_pack
    assert need(moment, "activations") + need(moment, "logits") == pytest.approx(taken, rel=0.01)


def rows_of(path: Path, lengths: list[int]) -> SourceConfig:
    """Conversations with a picture and an answer of that many letters."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    Image.fromarray(picture).save(path.with_suffix(".png"))
    with open(path, "w") as file:
        for length in lengths:
            content = [{"type": "image", "path": str(path.with_suffix(".png"))}, {"type": "text", "text": "what?"}]
            answer = {"role": "assistant", "content": "a" * length}
            file.write(json.dumps({"messages": [{"role": "user", "content": content}, answer]}) + "\n")
    return SourceConfig(kind="messages", options={"path": str(path)})


def test_packs_of_the_data_are_counted_as_the_recipes_own_steps_take_them(small: Path, tmp_path: Path) -> None:
    """The oracle is training itself: the same recipe's first steps, and what the allocator gave out in the fullest."""
    recipe = recipe_of(small)
    (stage,) = recipe.stages
    stage.data, stage.steps = {"rows": rows_of(tmp_path / "rows.jsonl", [5, 90, 20, 40, 10, 60, 30, 80])}, 2
    (moment,) = training_needs(recipe).moments
    given = moment.given
    assert given is not None and given.name == "stage all, as its data are"

    model, processor = open_model(plan_recipe(recipe), "cpu")
    set_trainable(model, stage.train, stage.steps, "stages.0.train")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    model.train()
    dataset = EncodedSamples(
        stage.data, processor, seed=seed_of(recipe.seed, "all"), max_tokens=700, skips=(), where="test"
    )
    steps = [[dataset[4 * step + k] for k in range(4)] for step in range(2)]
    tokens = [sum(len(sample) for sample in samples if isinstance(sample, Sample)) for samples in steps]
    heaviest: Any = steps[tokens.index(max(tokens))]
    (origin,) = (its.origin for its in given.needs if its.what == "activations")
    assert origin == f"a pack of {max(tokens)} tokens, the largest from 8 rows of its data, checkpointing off"
    taken = most_allocated(lambda: train_step(model, processor, heaviest, stage.tokens_per_pack, {}))
    assert need(given, "activations") + need(given, "logits") == pytest.approx(taken, rel=0.01)
    assert need(given, "activations") < need(moment, "activations")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_products_of_a_stages_steps_are_those_that_training_computes(
    checkpointing: bool, small: Path, tmp_path: Path
) -> None:
    """The oracle is a step of training under torch's own counter, with attention as products of matrices: it keeps the
    scores that the CPU's attention computes again."""
    recipe = recipe_of(small, activation_checkpointing=checkpointing)
    (stage,) = recipe.stages
    stage.data, stage.steps = {"rows": rows_of(tmp_path / "rows.jsonl", [40, 40, 40, 40])}, 3
    (work,) = training_needs(recipe).work
    model, processor = open_model(plan_recipe(recipe), "cpu")
    model.backbone.activation_checkpointing = checkpointing
    set_trainable(model, stage.train, stage.steps, "stages.0.train")
    dataset = EncodedSamples(
        stage.data, processor, seed=seed_of(recipe.seed, "all"), max_tokens=700, skips=(), where="test"
    )
    samples: Any = [dataset[k] for k in range(4)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_step(model.train(), processor, samples, stage.tokens_per_pack, {})
    assert (work.name, work.num_steps, work.dtype) == ("all", 3, torch.float32)
    assert work.step_flop == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(("objective", "tokens_per_pack"), [("words", 700), ("preferences", 700), ("preferences", 80)])
def test_steps_of_words_and_of_preferences_are_counted_as_what_they_are(
    objective: Any, tokens_per_pack: int, small: Path, tmp_path: Path
) -> None:
    """The first run no layer of the backbone; the second run the reference too, and several packs twice."""
    recipe = recipe_of(small)
    (stage,) = recipe.stages
    stage.objective, stage.tokens_per_pack = objective, tokens_per_pack
    parts = ("encoders", "projectors") if objective == "words" else ("adapters",)
    stage.train = {f"{part}.*": PartConfig(learning_rate=1e-3) for part in parts}
    rows = rows_of(tmp_path / "rows.jsonl", [2] * 4)
    if objective == "preferences":
        prompt = [{"type": "image", "path": str(tmp_path / "rows.png")}, {"type": "text", "text": "what?"}]
        row = {"prompt": [{"role": "user", "content": prompt}], "chosen": "a" * 20, "rejected": "b" * 30}
        (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4))
        rows.kind = objective
    stage.data = {"rows": rows}
    (work,) = training_needs(recipe).work
    model, processor = open_model(plan_recipe(recipe), "cpu")
    set_trainable(model, stage.train, stage.steps, "stages.0.train")
    pairs = objective == "preferences"
    dataset = EncodedSamples(
        stage.data, processor, seed=seed_of(recipe.seed, "all"), max_tokens=700, skips=(), where="test", pairs=pairs
    )
    samples: Any = [dataset[k] for k in range(4)]
    with_what = (model.train(), processor, samples, stage.tokens_per_pack, {})
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if pairs:
            preference_step(*with_what, stage.preference, Reference(model))
        else:
            train_step(*with_what, words=words_of(stage, model, processor, "test"))
    assert work.step_flop == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_mean_step_has_the_mean_of_the_tokens(small: Path, tmp_path: Path) -> None:
    recipe = recipe_of(small)
    found = []
    for lengths in ([40] * 8, [40] * 4 + [400] * 4):
        recipe.stages[0].data = {"rows": rows_of(tmp_path / "rows.jsonl", lengths)}
        (work,) = training_needs(recipe).work
        found.append(work.step_flop)
    assert 2 * found[0] < found[1]
    few = recipe_of(small)
    few.stages[0].samples_per_step = 2
    few.stages[0].data = {"rows": rows_of(tmp_path / "rows.jsonl", [40] * 8)}
    one, two, eight = (training_needs(few, processes=count).work[0].step_flop for count in (1, 2, 8))
    assert eight == two == one / 2, "those without a sample wait for the others"


def test_each_of_several_processes_takes_its_share_of_samples_and_layers(small: Path) -> None:
    """What a shard takes is measured in `tests/train/test_ranks.py`."""
    alone, two = (training_needs(recipe_of(small, shard_backbone=True), processes=count) for count in (1, 2))
    whole = training_needs(recipe_of(small), processes=2)
    assert whole.weights == alone.weights
    assert [need.what for need in two.weights] == [need.what for need in alone.weights]
    embedded = 2048 * 128 * 4
    assert embedded < two.weights[0].num_bytes < alone.weights[0].num_bytes / 2 + embedded + 1024
    assert two.weights[1:] == alone.weights[1:]
    step, between = two.moments
    assert need(step, "whole layers") == pytest.approx(2.5 * (alone.weight_bytes - two.weight_bytes), rel=0.01)
    assert not any(its.what == "whole layers" for its in (*alone.moments[0].needs, *whole.moments[0].needs))
    (origin,) = (its.origin for its in step.needs if its.what == "activations")
    assert origin.startswith("a pack of 2 x "), "of the four samples of a step"
    parts = on_meta(recipe_of(small)).parts().values()
    assert need(between, "sums") == 2 * max(sum(p.nbytes for p in part.values()) for part in parts)


def test_preferences_hold_a_copy_of_what_trains_and_two_answers_of_a_pair(small: Path, tmp_path: Path) -> None:
    recipe = recipe_of(small)
    (stage,) = recipe.stages
    stage.objective, stage.train = "preferences", {"adapters.*": PartConfig(learning_rate=1e-3)}
    row = {"prompt": "what?", "chosen": "a" * 20, "rejected": "b" * 50}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    stage.data = {"pairs": SourceConfig(kind="preferences", options={"path": str(tmp_path / "pairs.jsonl")})}
    (moment,) = training_needs(recipe).moments
    assert need(moment, "reference") == need(moment, "gradients") > 0
    (origin,) = (its.origin for its in moment.needs if its.what == "activations")
    assert origin.startswith("a pack of 8 x ")
    stage.preference.reference = False
    (without,) = training_needs(recipe).moments
    assert [each.what for each in without.needs] == ["gradients", "optimiser", "logits", "activations"]


def test_what_is_needed_is_said_for_the_data_and_for_the_largest_packs(backbone: Path, tmp_path: Path) -> None:
    recipe = recipe_of(backbone)
    recipe.stages[0].data = {"rows": rows_of(tmp_path / "rows.jsonl", [1, 2, 3, 4])}
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    ran = CliRunner().invoke(app, ["doctor", "--fit", str(tmp_path / "recipe.yaml")], catch_exceptions=False)
    words = " ".join(ran.stdout.split())
    assert "stage all, as its data are" in words and "rows of its data" in words
    assert "the interpreter and its libraries" in words
    assert re.search(r"it fits, [\d.]+ [MG]iB needed as its data are, [\d.]+ [MG]iB with the largest packs", words)
    # Room for its data and not for the largest packs is room enough; without its data, the largest packs decide.
    needed = training_needs(recipe)
    assert needed.given_bytes < needed.num_bytes
    between = (needed.given_bytes + needed.num_bytes) / 2 / 2**30
    assert main(str(tmp_path / "recipe.yaml"), device_memory_gib=between) == 0
    assert main(str(tmp_path / "recipe.yaml"), ["stages.0.data.rows.options.path=nowhere"], (), between) == 1


def test_data_that_cannot_be_opened_are_named(backbone: Path) -> None:
    recipe = recipe_of(backbone)
    recipe.stages.append(replace(recipe.stages[0], name="again"))
    counted = training_needs(recipe)
    assert len(counted.unknown) == 2
    for index, fault in enumerate(counted.unknown):
        assert fault.startswith(f"stages.{index}.data: ") and "nowhere.jsonl" in fault
    assert all(moment.given is None for moment in counted.moments) and counted.given_bytes == counted.num_bytes


def test_an_evaluation_is_counted_with_its_own_prompts_and_rows(
    small: Path, tmp_path: Path, pools: list[PagePool]
) -> None:
    """The oracle is an answer to each of the same rows: its pool of pages, and what the allocator gave out."""
    path, answer = tmp_path / "asked.jsonl", {"role": "assistant", "content": "yes"}
    Image.new("RGB", (32, 32)).save(tmp_path / "asked.png")
    picture = {"type": "image", "path": str(tmp_path / "asked.png")}
    questions = ["a" * 20, "a" * 300, [picture, {"type": "text", "text": "a" * 90}]]
    rows = [{"messages": [{"role": "user", "content": question}, answer]} for question in questions]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = SourceConfig(kind="messages", options={"path": str(path)})
    recipe = recipe_of(small, evaluations={"test": EvaluationConfig(data=data, max_new_tokens=4)})
    counted = training_needs(recipe)
    moment = counted.moments[-1]
    assert moment.name == "evaluation test, as its data are, prefill"
    assert [fault.partition(":")[0] for fault in counted.unknown] == ["stages.0.data"]

    model, processor = open_model(plan_recipe(recipe), "cpu")
    samples = [processor.encode(row["messages"][:1], str(index), generate=True) for index, row in enumerate(rows)]
    least, middle, most = sorted(len(sample) for sample in samples)
    (origin,) = (its.origin for its in moment.needs if its.what == "KV cache")
    assert origin.startswith(f"3 x {least} to {most} tokens of vision, 4 new ones each")
    pools.clear()
    steps = generate(model, samples, GenerationConfig(max_new_tokens=4, max_running_samples=128))
    taken = most_allocated(lambda: next(steps))
    assert need(moment, "KV cache") == held_by(pools[-1])
    answering = [need(moment, what) for what in ("KV cache", "logits", "activations")]
    assert sum(answering) == pytest.approx(taken, rel=0.01)

    # Two of three rows in each of two processes: the longest ones. Of more rows than run, as many as run.
    for changes, processes in ({}, 2), ({"max_running_samples": 2}, 1):
        recipe.evaluations["test"] = replace(recipe.evaluations["test"], **changes)
        (_, *_, moment) = training_needs(recipe, processes=processes).moments
        assert any(f"2 x {middle} to {most} tokens of vision" in its.origin for its in moment.needs)
    recipe.evaluations["test"] = EvaluationConfig(data=replace(data, options={"path": "nowhere.jsonl"}))
    counted = training_needs(recipe)
    assert counted.moments[-1].name == "evaluation test, prefill"
    assert counted.unknown[-1].startswith("evaluations.test.data: ") and "nowhere.jsonl" in counted.unknown[-1]


def test_a_pack_that_holds_no_example_is_refused(backbone: Path) -> None:
    recipe = recipe_of(backbone)
    recipe.stages[0].tokens_per_pack = 12
    with pytest.raises(ValueError, match=r"a sample of \w+ takes \d+ tokens, but only 12 fit"):
        training_needs(recipe)


def test_frames_from_the_cache_cost_no_encoder(backbone: Path) -> None:
    """The encoder does not train; without its frames it runs in every step."""
    changes: list[dict[str, Any]] = [{}, {"feature_cache": "unused"}]
    taken = []
    for change in changes:
        recipe = recipe_of(backbone, **change)
        del recipe.modalities["audio"]
        recipe.router = RouterConfig()
        recipe.modalities["vision"].options = {**VISION, "crop_pixels": 128}
        recipe.stages[0].train = {"projectors.*": PartConfig(learning_rate=1e-3)}
        recipe.stages[0].tokens_per_pack = 2000
        (moment,) = training_needs(recipe).moments
        taken.append(need(moment, "activations"))
    assert taken[1] < taken[0]


# Answers


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[PagePool]:
    """The pools of pages that are made; `generate` begins with an empty one."""
    made: list[PagePool] = []

    class Seen(PagePool):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(molora.model.backbone, "PagePool", Seen)
    return made


def prompts(model: MoLoRA, num_tokens: int, number: int) -> list[Sample]:
    """Text alone, of that many tokens."""
    processor = Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)
    shortest = len(processor.encode([{"role": "user", "content": ""}], "", generate=True))
    messages = [{"role": "user", "content": "a" * (num_tokens - shortest)}]
    return [processor.encode(messages, str(index), generate=True) for index in range(number)]


@pytest.mark.parametrize("family", ["phi4-mini", "gemma2", "llama-dynamic"])
@pytest.mark.parametrize(
    ("prompt_tokens", "new_tokens"), [(10, 1), (9, 12), (ROPE_SWITCH - 4, 10), (ROPE_SWITCH + 9, 3)]
)
def test_keys_and_values_are_what_the_pool_holds_to_the_byte(
    family: str, prompt_tokens: int, new_tokens: int, tmp_path: Path, pools: list[PagePool]
) -> None:
    folder = str(save_backbone(tmp_path, family))
    config = AnsweringConfig(prompt_tokens=prompt_tokens, max_new_tokens=new_tokens, max_running_samples=3)
    prefill, last = answering_needs(on_meta(folder), config).moments
    model = load(folder, device="cpu").model
    model.backbone.model.generation_config.eos_token_id = None  # every answer is as long as it may be
    model.backbone.turn_ends = frozenset()
    pools.clear()
    sizes = [
        held_by(pools[-1])
        for _ in generate(
            model,
            prompts(model, prompt_tokens, 3),
            GenerationConfig(max_new_tokens=new_tokens, max_running_samples=3),
        )
    ]
    assert len(sizes) == 3 * new_tokens
    assert (need(prefill, "KV cache"), need(last, "KV cache")) == (sizes[0], sizes[-1])


def test_samples_within_a_size_are_as_many_as_run_together(small: Path, pools: list[PagePool]) -> None:
    model = load(small, device="cpu").model
    kept = model.backbone.kept_layers()
    size = kept.num_bytes(5 * kept.pages_for(90), 5) * 1.1 / 2**30
    config = AnsweringConfig(prompt_tokens=80, max_new_tokens=10, max_running_samples=20, kv_cache_gib=size)
    needs = answering_needs(on_meta(str(small)), config)
    assert f"kv_cache_gib={size:g} of molora.GenerationConfig holds keys and values of 5 x 90 tokens" in needs.held
    batch = Batch(model, GenerationConfig(max_new_tokens=10, max_running_samples=20, kv_cache_gib=size))
    for sample in prompts(model, 80, 7):
        batch.add(Asked(sample, GenerationConfig(max_new_tokens=10), 0, lambda tokens: False))
    batch.step()
    assert (batch.num_running, batch.num_waiting) == (5, 2)
    assert {need(moment, "KV cache") for moment in needs.moments} == {held_by(pools[-1])}
    with pytest.raises(ConfigError, match=r"kv_cache_gib: 1e-06, but 89 tokens of a sample take"):
        answering_needs(on_meta(str(small)), replace(config, kv_cache_gib=1e-6))


def test_pages_are_counted_as_the_device_has_them(small: Path) -> None:
    """The kernel for CUDA takes longer pages: 100 tokens take two of 64, or one of 256."""
    config = AnsweringConfig(prompt_tokens=90, max_new_tokens=11, max_running_samples=5)
    (cpu, _), (cuda, _) = (answering_needs(on_meta(str(small)), config, kind).moments for kind in ("cpu", "cuda"))
    assert need(cuda, "KV cache") == 2 * need(cpu, "KV cache")
    assert (need(cuda, "activations"), need(cuda, "logits")) == (need(cpu, "activations"), need(cpu, "logits"))


def held_by(pool: PagePool) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in (*pool.keys.values(), *pool.values.values()))


def test_a_prefill_takes_what_is_allocated(small: Path) -> None:
    config = AnsweringConfig(prompt_tokens=100, max_running_samples=5)
    prefill, _ = answering_needs(on_meta(str(small)), config).moments
    model = load(small, device="cpu").model
    steps = generate(model, prompts(model, 100, 5), GenerationConfig(max_running_samples=5))
    taken = most_allocated(lambda: next(steps))
    assert prefill.num_bytes == pytest.approx(taken, rel=0.01)


def test_an_answer_ends_with_the_context(backbone: Path) -> None:
    most = on_meta(str(backbone)).backbone.max_tokens
    assert tokens_kept(most - 3, 1000, most) == tokens_kept(most - 3, 3, most) == most - 1


# The released shape


@pytest.fixture(scope="module")
def phi4_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phi-4-mini's config.json, and nothing else. Source: microsoft/Phi-4-multimodal-instruct, config.json."""
    folder = tmp_path_factory.mktemp("phi4-mini")
    Phi3Config(
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        },
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


def test_the_released_shape_from_its_config_alone(phi4_mini: Path) -> None:
    """Parameters as in the released checkpoint (5.6 billion): adapters of rank 256 and 320 on every linear layer."""
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    plans = {
        name: ModalityConfig(plugin=name, options=options, adapter={"r": rank, "target_modules": targets})
        for name, options, rank in (
            ("vision", {"tower": {"kind": "transformers", "pretrained": False, "arguments": SO400M}}, 256),
            ("audio", {"beside": {"vision": "vision"}}, 320),
        )
    }
    model = on_meta(recipe_of(phi4_mini, modalities=plans))
    parts = {name: sum(p.numel() for p in parameters.values()) for name, parameters in model.parts().items()}
    assert parts == {
        "adapters.audio": 461_373_440,
        "adapters.vision": 369_098_752,
        "encoders.audio": 441_238_144,
        # Without the last block, the norm behind it and the pooling head, which give no frames; with the separators.
        "encoders.vision": 428_565_440 - 15_239_504 - 15_238_352 - 2 * 1152 + 2_304,
        "projectors.audio.default": 12_589_056,
        "projectors.audio.vision": 12_589_056,
        "projectors.vision.default": 12_982_272,
    }
    assert sum(p.numel() for p in model.backbone.parameters()) == 3_836_021_760 + 461_373_440 + 369_098_752


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def test_the_released_shape_answers(phi4_mini: Path) -> None:
    config = AnsweringConfig(prompt_tokens=4000, max_new_tokens=200, max_running_samples=2)
    needed = answering_needs(on_meta(str(phi4_mini)), config)
    prefill, last = needed.moments
    assert needed.weight_bytes == 2 * 3_836_021_760 + held_in_buffers(phi4_mini)
    # 8 heads of 128, keys and values, in each of 32 layers; 4199 tokens in pages of 64.
    a_token = 2 * 8 * 128 * 2 * 32
    assert need(prefill, "KV cache") == need(last, "KV cache") == 2 * 66 * 64 * a_token
    assert need(last, "logits") == 2 * 2 * 200_064


def held_in_buffers(folder: Path) -> int:
    return sum(buffer.nbytes for buffer in on_meta(str(folder)).buffers())


# The table


def test_the_table_fits_in_80_columns_and_says_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (Need("backbone", 3 * 2**30, "3,836,021,760 parameters, bfloat16"),)
    needs = (
        Need("activations", 5 * 2**29, "a pack of 9 x 910 tokens of audio+vision, checkpointing on"),
        Need("logits", 0, "none at the fullest moment"),
    )
    work = StageWork("[align]", 6000, 4e11, torch.float32)
    needed = MemoryNeeds(weights, (Moment("stage [align]", needs), Moment("stage short", ())), (work,))
    monkeypatch.setattr(console, "width", 200)
    devices = [Device("GPU 0, with a long name" + " and more" * 6, 6 * 2**30, 8 * 2**30), Device("CPU", 2**30, 2**31)]
    show(needed, devices)
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    words = " ".join(shown.split())
    assert "weights backbone 3.0 GiB 3,836,021,760 parameters, bfloat16 total 3.0 GiB" in words
    assert "stage [align] activations 2.5 GiB a pack of 9 x 910 tokens of audio+vision, checkpointing on" in words
    assert "logits 0 none at the fullest moment total 5.5 GiB with the weights" in words
    assert "and more: it fits, 5.5 GiB needed, 6.0 GiB free of 8.0 GiB" in words
    assert "CPU: it does not fit, 5.5 GiB needed, 1.0 GiB free of 2.0 GiB" in words
    for processes, fits in ((2, "it fits"), (3, "it does not fit")):
        show(needed, [Device("CPU", 12 * 2**30, 16 * 2**30, processes)], processes)
        told = f"CPU: {fits}, 5.5 GiB needed, by each of {processes} processes, {5.5 * processes} GiB in all, 12.0 GiB"
        assert told in " ".join(capsys.readouterr().out.split())
    assert "Graphics cards: one of 24 GB (L4, RTX 4090) holds it and larger ones, up to 192 GB." in words
    assert "Stage [align]: 6,000 steps of 0.4 TFLOP. On this CPU about" in words
    assert "a step on L4 8.3 ms, A100 3.2 ms, H100 1.0 ms, B200 444 µs." in words


@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (23, "one of 24 GB (L4, RTX 4090) holds it and larger ones, up to 192 GB"),
        (23.9, "one of 32 GB (RTX 5090) holds it and larger ones, up to 192 GB"),
        (79.5, "one of 96 GB (RTX PRO 6000) holds it and larger ones, up to 192 GB"),
        (150, "one of 192 GB (B200, MI300X) holds it"),
        (190, "one of 192 GB is too small"),
    ],
)
def test_cards_that_hold_it_are_named_with_room_for_what_cuda_keeps(gib: float, told: str) -> None:
    assert cards_for(int(gib * 2**30)) == told


def test_packed_numbers_are_not_called_parameters() -> None:
    packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    assert about([packed]) == "3 numbers as they are packed, uint8"
    assert about([torch.nn.Parameter(torch.zeros(3))]) == "3 parameters, float32"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (2e-4, "200 µs"),
        (0.25, "250 ms"),
        (1.0, "1.0 s"),
        (59, "59 s"),
        (90, "1.5 minutes"),
        (7200, "2.0 hours"),
        (9e6, "104 days"),
    ],
)
def test_durations_have_the_unit_that_suits_them(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_the_command_line_reads_recipes_and_models(backbone: Path, tmp_path: Path) -> None:
    recipe = recipe_of(backbone)
    recipe.evaluations = {
        "test": EvaluationConfig(data=SourceConfig(kind="messages", options={"path": "x"}, limit=3), max_new_tokens=4)
    }
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    command = ["doctor", "--fit", str(tmp_path / "recipe.yaml"), "stages.0.tokens_per_pack=300"]
    ran = CliRunner().invoke(app, command, catch_exceptions=False)
    words = " ".join(ran.stdout.split())
    assert ran.exit_code == 0, ran.stdout
    assert "tokens of audio" in words and "stage all gradients" in words
    assert "evaluation test, prefill" in words and "KV cache" in words and "CPU: it fits" in words

    command = [
        "doctor",
        "--fit",
        str(backbone),
        "prompt_tokens=50",
        "max_running_samples=2",
        "--device-memory",
        "0.0001",
    ]
    ran = CliRunner().invoke(app, command, catch_exceptions=False)
    words = " ".join(ran.stdout.split())
    assert ran.exit_code == 1 and "2 x 50 tokens of text, 128 new ones each" in words
    assert "a device of 0.0001 GiB: it does not fit" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stages.0.steps=3"], "go with --fit"),
        (["--device-memory", "3"], "go with --fit"),
        (["--processes", "2"], "go with --fit"),
        (["--fit", "nowhere", "--processes", "2"], "--processes is for a recipe"),
        (["--fit", "recipe.yaml", "--modality", "x"], "names its modalities itself"),
        (["--fit", "BACKBONE", "prompt_token=3"], "no such key; did you mean 'prompt_tokens'"),
        (["--fit", "BACKBONE", "prompt_tokens=300"], "a sample of text takes 300 tokens, but only 256 fit"),
        (["--fit", "BACKBONE", "max_running_samples=0"], "max_running_samples cannot be 0"),
        (["--fit", "nowhere/at/all"], "backbone .nowhere/at/all.: no such folder"),
    ],
)
def test_what_the_command_cannot_do_is_said(arguments: list[str], message: str, backbone: Path) -> None:
    arguments = [str(backbone) if argument == "BACKBONE" else argument for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CliRunner().invoke(app, ["doctor", *arguments], catch_exceptions=False)


def test_layers_that_depend_on_values_are_named(backbone: Path) -> None:
    modalities = {"numbers": ModalityConfig(plugin=f"{__file__}:Choosy", adapter=ADAPTER)}
    with pytest.raises(RuntimeError, match=r"nonzero.* gives no shape without values"):
        training_needs(recipe_of(backbone, modalities=modalities, router=RouterConfig()))
