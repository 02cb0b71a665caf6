"""Any mix in one batch: pictures, sounds and both, with their own adapters and projectors, beside what others do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

from molora.checkpoint.assembly import Blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.config import build
from molora.data.processor import Processor
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.vision import Vision, VisionConfig
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Sample, collate
from molora.routers.table import TableConfig, TableRouter
from molora.testing import assert_close, byte_tokenizer, tiny_model
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

pytest.importorskip("torchaudio")

TOWER = {"width": 16, "blocks": 2, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}
KINDS = ("text", "image", "audio", "image+audio", "two images", "audio twice", "interleaved", "spoken question")
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def make_model() -> MoLoRA:
    convit = {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}}
    vision = build(VisionConfig, {"crop_pixels": 16, "max_crops": 2, "pool": 1, "tower": convit}, "vision")
    audio = build(AudioConfig, {"tower": {"conformer": TOWER}, "beside": {"vision": "vision"}}, "audio")
    # Adapters much stronger than these only magnify the rounding of fp32: in fp64 the samples agree to 1e-15.
    options = {"r": 4, "lora_alpha": 4, "init_lora_weights": False, "target_modules": TARGETS}
    adapters = {name: lora_config(options, name) for name in ("audio", "vision")}
    router = TableRouter(list(adapters), TableConfig(rules={"audio+vision": "vision"}))
    backbone = Backbone(tiny_model("phi4-mini"), Identity("test", "", "", "", ""))
    return MoLoRA(backbone, {"audio": Audio("audio", audio), "vision": Vision("vision", vision)}, adapters, router)


@pytest.fixture(scope="module")
def model() -> MoLoRA:
    model = make_model()
    for parameters in model.parts().values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    return model


@pytest.fixture(scope="module")
def processor(model: MoLoRA) -> Processor:
    return Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)


def image(index: int) -> dict[str, Any]:
    draw = np.random.default_rng(index)
    pixels = draw.integers(0, 256, (16 + index % 3 * 8, 16 + index % 5 * 4, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def audio(index: int) -> dict[str, Any]:
    draw = np.random.default_rng(index)
    wave = 0.1 * draw.standard_normal(1_000 + 977 * (index % 7)).astype(np.float32)
    return {"type": "audio", "array": wave, "sampling_rate": 16_000}


def text(index: int) -> dict[str, Any]:
    return {"type": "text", "text": "say it" + "!" * (index % 4)}


def conversation(kind: str, i: int) -> list[dict[str, Any]]:
    content = {
        "text": [text(i)],
        "image": [image(i), text(i)],
        "audio": [audio(i), text(i)],
        "image+audio": [image(i), audio(i), text(i)],
        "two images": [image(i), image(i + 1), text(i)],
        "audio twice": [audio(i), text(i), audio(i + 1)],
        "interleaved": [text(i), audio(i), text(i + 1), image(i), text(i + 2), audio(i + 1)],
        "spoken question": [image(i), audio(i)],
    }[kind]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": f"{i} it is"}]


def thirty_two(processor: Processor, *, answers: bool = True) -> list[Sample]:
    samples = []
    for i in range(32):
        messages = conversation(KINDS[i % len(KINDS)], i)
        samples.append(processor.encode(messages if answers else messages[:1], f"{i}", generate=not answers))
    random.Random(5).shuffle(samples)
    return samples


def alone(model: MoLoRA, sample: Sample) -> Any:
    return collate([sample], model.modalities, model.router.order)


@torch.no_grad()
def test_logits_are_those_that_each_sample_has_alone(model: MoLoRA, processor: Processor):
    samples = thirty_two(processor)
    pack = processor.collate(samples)
    packed = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
    for sample in samples:
        assert_close(packed[sample.id], model.logits(alone(model, sample)), what=f"sample {sample.id}")
    routing = model.router(pack, torch.empty(0))
    assert [piece.adapters for piece in routing.slices] == [(), ("audio",), ("vision",)], "an adapter is one slice"


def test_gradients_are_those_that_each_sample_has_alone(model: MoLoRA, processor: Processor):
    samples = thirty_two(processor)
    named = {f"{part}.{key}": p for part, parameters in model.parts().items() for key, p in parameters.items()}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(named, found, strict=True))

    pack = processor.collate(samples)
    losses = dict(zip(pack.ids, model.losses(pack).sums_N, strict=True))
    for sample in samples:
        if not sample.items:
            assert not model.losses(alone(model, sample)).sums_N.requires_grad
            continue
        expected = gradients(model.losses(alone(model, sample)).sums_N[0] / sample.num_targets)
        for name, gradient in gradients(losses[sample.id] / sample.num_targets).items():
            assert_close(gradient, expected[name], what=f"{name} from sample {sample.id}")
        moved = {name for name, gradient in expected.items() if gradient.abs().max() > 1e-7}
        parts = {part for part in model.parts() if any(name.startswith(f"{part}.") for name in moved)}
        assert parts == set(model.parts_of(sample.modalities))


def test_answers_are_those_that_each_sample_has_alone(model: MoLoRA, processor: Processor):
    samples = thirty_two(processor, answers=False)

    def answers(asked: list[Sample], running: int) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {sample.id: [] for sample in asked}
        for step in generate(model, asked, GenerationConfig(max_new_tokens=6, max_running_samples=running)):
            tokens[step.id].append(step.token_id)
        return tokens

    together = answers(samples, 32)
    assert together == answers(samples, 5)
    for sample in samples:
        assert answers([sample], 1)[sample.id] == together[sample.id], sample.id


# Interference ----------------------------------------------------------------------------------------------------

STEPS = 200


def trained(patterns: tuple[str, ...], kinds: tuple[str, ...], model: MoLoRA | None = None) -> MoLoRA:
    """A model after 200 steps on samples of these kinds; sample i is the same whatever the kinds."""
    model = model or make_model()
    processor = Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)
    optimizers = set_trainable(model, {p: PartConfig(learning_rate=1e-3) for p in patterns}, STEPS, "here")
    samples = [processor.encode(conversation(KINDS[i % 8], i), f"{i}") for i in range(32)]
    for step in range(STEPS):
        shown = [samples[(4 * step + i) % 32] for i in range(8)]
        model.train()
        train_step(model, processor, [s for s in shown if KINDS[int(s.id) % 8] in kinds], 4096, optimizers)
    return model.eval()


def test_training_audio_beside_pictures_leaves_pictures_and_text_as_they_were(tmp_path: Path):
    """200 steps with pictures in the same packs: the vision files and every logit without sound keep their bits."""
    model = make_model()
    processor = Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)
    silent = processor.collate([s for s in thirty_two(processor) if "audio" not in s.modalities])
    config = model.adapters["vision"]
    plan = Blueprint("vision", model.modalities["vision"], config)

    def state(name: str) -> tuple[Tensor, dict[str, bytes]]:
        save_modality(model, "vision", plan, tmp_path / name, {})
        with torch.no_grad():
            return model.logits(silent), {p.name: p.read_bytes() for p in sorted((tmp_path / name).iterdir())}

    before = state("before")
    moving = {name: p.clone() for name, p in model.encoders["audio"].named_parameters()}
    trained(("encoders.audio", "projectors.audio", "adapters.audio"), KINDS, model)
    after = state("after")
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and len(before[1]) == 5
    assert any(not torch.equal(moving[name], p) for name, p in model.encoders["audio"].named_parameters())


def test_training_together_gives_each_modality_the_weights_it_gets_alone():
    sounds, pictures = ("audio", "audio twice"), ("image", "two images")
    names = {m: (f"encoders.{m}", f"projectors.{m}.default", f"adapters.{m}") for m in ("audio", "vision")}
    together = trained((*names["audio"], *names["vision"]), ("text", *sounds, *pictures)).parts()
    for modality, kinds in (("audio", sounds), ("vision", pictures)):
        apart = trained(names[modality], kinds).parts()
        for part in names[modality]:
            for key, parameter in apart[part].items():
                assert_close(together[part][key], parameter, 1e-5, f"{part}.{key}")


# What transformers does instead -----------------------------------------------------------------------------------

IMAGE, AUDIO, PAD = 90, 91, 92


@pytest.fixture(scope="module")
def phi4mm() -> Phi4MultimodalForCausalLM:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "crop_size": 28,
        "patch_size": 14,
        "image_token_id": IMAGE,
    }
    sound = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 4,
        "audio_token_id": AUDIO,
    }
    config = Phi4MultimodalConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=PAD,
        eos_token_id=PAD,
        pad_token_id=PAD,
        vision_config=vision,
        audio_config=sound,
    )
    towers: Any = config.vision_config
    towers._attn_implementation = "eager"
    return Phi4MultimodalForCausalLM(config).eval()


@torch.no_grad()
def test_transformers_gives_a_clip_another_projector_when_a_neighbour_has_a_picture(phi4mm: Any):
    """Its Phi4Multimodal picks one audio projector for a whole batch: the second one, if anybody brought a picture. So
    a spoken question is heard differently beside a stranger's picture. Ours are equal, as the tests above show."""
    features = 12 + 4 * torch.randn(2, 16, 80)  # 2 tokens each; multiples of 8 frames hide its leak of padding
    spoken = [PAD, PAD, 5, AUDIO, AUDIO, 6, 7]
    seen_and_spoken = [5, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, AUDIO, AUDIO, 6]
    num_image = 2 * (1 * (1 + 1)) + 1
    assert num_image == 5
    ids = torch.tensor([[PAD] * 2 + spoken, seen_and_spoken])
    ids[0, :2] = PAD
    picture = {
        "image_pixel_values": torch.randn(1, 2, 3, 28, 28),
        "image_sizes": torch.tensor([[28, 28]]),
        "image_attention_mask": torch.ones(1, 2, 2, 2),
    }
    together = phi4mm(
        input_ids=ids,
        attention_mask=(ids != PAD).long(),
        audio_input_features=features,
        audio_embed_sizes=torch.tensor([2, 2]),
        audio_attention_mask=torch.ones(2, 16, dtype=torch.bool),
        **picture,
    ).logits[0, -3:]

    def alone(neighbour: bool) -> Tensor:
        batch = ids if neighbour else ids[:1]
        return phi4mm(
            input_ids=torch.where(batch == IMAGE, 7, batch),
            attention_mask=(batch != PAD).long(),
            audio_input_features=features[: len(batch)],
            audio_embed_sizes=torch.tensor([2] * len(batch)),
            audio_attention_mask=torch.ones(len(batch), 16, dtype=torch.bool),
        ).logits[0, -3:]

    assert_close(alone(neighbour=True), alone(neighbour=False), 1e-4, "a neighbour without a picture changes nothing")
    assert float((together - alone(neighbour=False)).abs().max()) > 1e-2


@torch.no_grad()
def test_transformers_runs_a_whole_batch_with_one_adapter(phi4mm: Any):
    """`set_adapter` is a state of the model, not of a sample: a text beside a picture loses the bare backbone."""
    ids = torch.tensor([[5, 6, 7, 8]])
    bare = phi4mm(input_ids=ids).logits
    pattern = r"model\.layers\.\d+\.self_attn\.(qkv_proj|o_proj)"
    options = LoraConfig(r=2, init_lora_weights=False, target_modules=pattern)
    both: Any = get_peft_model(phi4mm, options, adapter_name="speech")
    both.add_adapter("vision", options)
    both.set_adapter("vision")
    assert both.active_adapters == ["vision"]
    assert float((both(input_ids=ids).logits - bare).abs().max()) > 1e-3
