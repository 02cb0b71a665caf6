"""Packed equals alone, on every family of backbone, for logits and adapter gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ctc_loss
from transformers import PreTrainedModel

from molora.model import backbone as backbone_module
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.model.probe import BackboneRefused
from molora.model.projector import Projector
from molora.pack import Item, Sample, collate
from molora.routers.table import TableConfig, TableRouter
from molora.testing import ROPE_SWITCH, VOCAB_SIZE, WINDOW, Letters, Numbers, NumbersConfig, assert_close, tiny_model

NOWHERE = Identity("test", "", "", "", "")
FAMILIES = (
    "llama", "llama-dynamic", "qwen3", "gemma2", "gemma3", "phi3", "phi4-mini", "smollm3", "phimoe", "gpt-oss",
    "granite",
)  # fmt: skip

# Samples whose media tokens are as many as the words they say, or more.
SPOKEN = [("a", 8, ("numbers", "letters")), ("b", 9, ("numbers", "numbers")), ("c", 6, ("letters",))]


def make_model(family: str, targets: str = r".*self_attn\.(q_proj|v_proj|o_proj|qkv_proj)", **lora: object) -> MoLoRA:
    modalities = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "target_modules": targets, **lora}
    adapters = {name: lora_config(options, name) for name in modalities}
    router = TableRouter(list(adapters), TableConfig(rules={"letters+numbers": "numbers"}))
    return MoLoRA(Backbone(tiny_model(family), NOWHERE), modalities, adapters, router)


def make_sample(model: MoLoRA, id: str, length: int, kinds: tuple[str, ...] = ()) -> Sample:
    """Random text with the items of `kinds` (three numbers each) spliced in near its start."""
    generator = torch.Generator().manual_seed(sum(map(ord, id)))
    token_ids = torch.randint(VOCAB_SIZE, (length,), generator=generator)
    modality_ids = torch.zeros(length, dtype=torch.long)
    items = []
    for place, kind in enumerate(kinds):
        start = 1 + 4 * place
        modality_ids[start : start + 3] = 1 + list(model.modalities).index(kind)
        prepared = model.modalities[kind].prepare(torch.rand(3, generator=generator).tolist())
        items.append(Item(kind, model.modalities[kind].projector(frozenset(kinds)), prepared))
    targets = (torch.arange(length) >= length // 2) & (modality_ids == 0)
    return Sample(id, token_ids, modality_ids, targets, tuple(items))


def twelve(model: MoLoRA) -> list[Sample]:
    """Unequal lengths around the window and the RoPE switch, every set of modalities."""
    kinds = [(), ("numbers",), ("letters",), ("numbers", "letters"), ("numbers", "numbers")]
    edges = (
        9,
        10,
        WINDOW - 1,
        WINDOW,
        WINDOW + 1,
        2 * WINDOW + 3,
        ROPE_SWITCH - 1,
        ROPE_SWITCH,
        ROPE_SWITCH + 1,
        31,
        11,
        29,
    )
    return [make_sample(model, f"sample {i}", length, kinds[i % len(kinds)]) for i, length in enumerate(edges)]


def gradients(model: MoLoRA, loss: Tensor) -> dict[str, Tensor]:
    named = {f"{part}.{name}": p for part, parameters in model.parts().items() for name, p in parameters.items()}
    found = torch.autograd.grad(
        loss, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def train_everything(model: MoLoRA) -> MoLoRA:
    for parameters in model.parts().values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str) -> None:
    model = train_everything(make_model(family))
    samples = twelve(model)
    pack = collate(samples, model.modalities, model.router.order)
    with torch.no_grad():
        packed_logits = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
    packed_losses = dict(zip(pack.ids, model.losses(pack).sums_N, strict=True))
    for sample in samples:
        alone = collate([sample], model.modalities)
        assert_close(packed_logits[sample.id], model.logits(alone), what=f"{family} logits of {sample.id}")

        if not sample.items:
            assert not model.losses(alone).sums_N.requires_grad, "a sample without modalities has nothing to train"
            continue
        expected = gradients(model, model.losses(alone).sums_N[0] / sample.num_targets)
        for name, gradient in gradients(model, packed_losses[sample.id] / sample.num_targets).items():
            assert_close(gradient, expected[name], what=f"{family} gradient of {name} from {sample.id}")
        assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


def test_moe_chooses_the_same_experts_packed_and_alone() -> None:
    model = make_model("phimoe")
    chosen: list[Tensor] = []
    for module in model.backbone.model.modules():
        if type(module).__name__ == "PhimoeTopKRouter":
            module.register_forward_hook(lambda module, args, output: chosen.append(output[-1].reshape(-1, 2)))
    samples = twelve(model)
    pack = collate(samples, model.modalities, model.router.order)
    with torch.no_grad():
        model(pack)
        packed = [layer.split(pack.lengths) for layer in chosen]
        assert len(packed) == 2, "the tiny PhiMoE has two layers of experts"
        for index, id in enumerate(pack.ids):
            chosen.clear()
            model(collate([next(s for s in samples if s.id == id)], model.modalities))
            for layer in range(2):
                assert torch.equal(packed[layer][index], chosen[layer]), f"other experts for {id} in layer {layer}"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "attention code of its own (BloomAttention)"),
        ("falcon", "attention code of its own (FalconAttention)"),
        ("mamba", "recurrent state (MambaMixer)"),
        ("llama4", "chunked_attention"),
    ],
)
def test_the_probe_refuses_what_cannot_be_packed(family: str, reason: str) -> None:
    with pytest.raises(BackboneRefused) as refusal:
        Backbone(tiny_model(family), NOWHERE)
    assert reason in str(refusal.value)


def test_the_probe_notices_a_window_that_is_not_honoured() -> None:
    model = tiny_model("phi3")
    for layer in model.model.layers:  # the mask is made from the model's config, the kernel's argument from the layer's
        layer.self_attn.config = replace_window(model.config)
    with pytest.raises(BackboneRefused, match="relative difference"):
        Backbone(model, NOWHERE)


def replace_window(config: object) -> object:
    import copy

    other = copy.copy(config)
    other.sliding_window = None  # pyright: ignore[reportAttributeAccessIssue]
    return other


def test_the_probe_refuses_logits_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    run = backbone_module.run_stock

    def with_nan(model: PreTrainedModel) -> object:
        stock = run(model)
        stock.logits[-1][0, 0] = float("nan")
        return stock

    monkeypatch.setattr(backbone_module, "run_stock", with_nan)
    with pytest.raises(BackboneRefused, match="relative difference nan"):
        Backbone(tiny_model("llama"), Identity("test", "", "", "", ""))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4-mini"])
def test_activation_checkpointing_restores_routing_for_interleaved_forwards(family: str) -> None:
    model = train_everything(make_model(family))
    packs = [
        collate(
            [make_sample(model, "a", 20, ("numbers",)), make_sample(model, "b", 9)],
            model.modalities,
            model.router.order,
        ),
        collate([make_sample(model, "c", 31, ("letters",))], model.modalities, model.router.order),
    ]
    alone = [gradients(model, model.losses(pack).sums_N.sum()) for pack in packs]
    model.backbone.activation_checkpointing = True
    losses = [model.losses(pack).sums_N.sum() for pack in packs]
    for loss, expected in zip(losses, alone, strict=True):
        for name, gradient in gradients(model, loss).items():
            assert_close(gradient, expected[name], 1e-6, what=name)


def test_media_enter_after_the_embedding_scale() -> None:
    model = make_model("granite")
    assert model.backbone.embed_scale == pytest.approx(12.0)
    pack = collate([make_sample(model, "a", 12, ("numbers",))], model.modalities)
    frames = model.encoders["numbers"](**pack.media["numbers"].tensors).frames_SC
    tokens = model.projectors["numbers"]["default"](frames)  # pyright: ignore[reportIndexIssue]
    seen: list[Tensor] = []
    model.backbone.model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(pack)
    assert_close(seen[0][0, 1:4], tokens, what="the first layer's input at media positions")


def test_a_projector_may_depend_on_the_company() -> None:
    numbers = Numbers("numbers", NumbersConfig(projector_beside=["letters"]))
    assert numbers.projector(frozenset({"numbers"})) == "default"
    assert numbers.projector(frozenset({"numbers", "letters"})) == "beside"
    model = make_model("llama")
    model.modalities["numbers"] = numbers
    model.projectors["numbers"].add_module("beside", Projector(8, 32))
    mixed = [make_sample(model, "a", 14, ("numbers", "letters")), make_sample(model, "b", 9, ("numbers",))]
    pack = collate(mixed, model.modalities, model.router.order)
    assert set(pack.media["numbers"].projectors) == {"default", "beside"}
    together = dict(zip(pack.ids, model.logits(pack).split(pack.lengths), strict=True))
    for sample in mixed:
        assert_close(together[sample.id], model.logits(collate([sample], model.modalities)), what=sample.id)


def test_an_encoder_that_breaks_its_word_is_named() -> None:
    model = make_model("llama")
    sample = make_sample(model, "a", 12, ("numbers",))
    item = replace(sample.items[0], prepared=replace(sample.items[0].prepared, num_tokens=4))
    pack = collate([replace(sample, items=(item,))], model.modalities)
    pack.media["numbers"].tensors["lengths"].fill_(3)
    with pytest.raises(ValueError, match="reserves .4.* returned .3"):
        model(pack)


def test_losses_are_on_targets_only_and_shift_inside_each_sample() -> None:
    model = make_model("llama")
    samples = [make_sample(model, "a", 12), make_sample(model, "b", 15, ("numbers",))]
    samples[0] = replace(samples[0], targets_T=torch.ones(12, dtype=torch.bool))
    pack = collate(samples, model.modalities)
    losses = model.losses(pack)
    for index, sample in enumerate(samples):
        logits = model.logits(collate([sample], model.modalities))
        wanted = [t for t in range(1, len(sample)) if sample.targets_T[t]]
        expected = -sum(torch.log_softmax(logits[t - 1], -1)[sample.token_ids_T[t]] for t in wanted)
        assert_close(losses.sums_N[index], torch.as_tensor(expected), what=sample.id)
        assert losses.num_targets[index] == len(wanted) == sample.num_targets


def test_words_are_learned_through_the_embeddings_alone_and_without_neighbours() -> None:
    model = train_everything(make_model("granite"))  # which scales its embeddings
    samples = [make_sample(model, name, length, kinds) for name, length, kinds in SPOKEN]
    pack = collate(samples, model.modalities, model.router.order)
    words_of = {sample.id: sample.token_ids_T[sample.targets_T] for sample in samples}
    losses = model.word_losses(pack, [words_of[id] for id in pack.ids])
    embeddings_VD = model.backbone.embeddings_VD
    for id, loss, num_words in zip(pack.ids, losses.sums_N, losses.num_targets, strict=True):
        sample = next(sample for sample in samples if sample.id == id)
        alone = collate([sample], model.modalities)
        words = words_of[id]
        assert num_words == len(words)
        tokens_SD = model.embed(alone)[sample.modality_ids_T > 0]
        vectors = torch.cat([torch.zeros(1, model.backbone.width), embeddings_VD])
        distances = torch.cdist(tokens_SD.double(), vectors.double()).square()
        log_size, far = math.log(len(embeddings_VD)), embeddings_VD.double().square().sum(1).mean() / 2
        nowhere = far.expand(len(distances), 1)
        log_probs = (-log_size / far * torch.cat([distances, nowhere], 1)).log_softmax(1)[:, None]
        lengths = (torch.tensor([len(tokens_SD)]), torch.tensor([len(words)]))
        expected = ctc_loss(log_probs, words[None] + 1, *lengths, reduction="none")[0]
        assert_close(loss.double(), expected, what=id)
        ours = gradients(model, loss)
        for name, gradient in gradients(model, expected).items():
            assert_close(ours[name], gradient, what=f"gradient of {name} from {id}")
        assert {name.partition(".")[0] for name, gradient in ours.items() if gradient.any()} == {
            "encoders",
            "projectors",
        }


def test_words_are_told_apart_from_the_first_tokens_alone() -> None:
    model = make_model("llama")
    samples = [make_sample(model, name, length, kinds) for name, length, kinds in SPOKEN]
    pack = collate(samples, model.modalities, model.router.order)
    words = [torch.tensor([3, 5])[: len(items)] for items in pack.ids]
    losses = model.word_losses(pack, words, 6)
    model.backbone.embeddings_VD[6:] *= 3
    assert torch.equal(model.word_losses(pack, words, 6).sums_N, losses.sums_N)
    assert not torch.equal(model.word_losses(pack, words).sums_N, losses.sums_N)
