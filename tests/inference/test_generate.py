"""Cached packed decoding equals full forwards, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.inference import generate as generation
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample, collate
from molora.routers.learned import LearnedConfig, LearnedRouter
from molora.routers.table import TableConfig, TableRouter
from molora.testing import ROPE_SWITCH, VOCAB_SIZE, Letters, Numbers, NumbersConfig, tiny_model

NEW_TOKENS = 7
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "phi4-mini", "smollm3", "phimoe", "llama-dynamic")


def make_model(family: str) -> MoLoRA:
    modalities = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    targets = r".*self_attn\.(q_proj|v_proj|o_proj|qkv_proj)"
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": targets}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model(family), Identity("test", "", "", "", ""))
    return MoLoRA(backbone, modalities, adapters, TableRouter(list(adapters), TableConfig()))


def sixteen(model: MoLoRA) -> list[Sample]:
    """Text, numbers and letters of unequal length; some end within reach of the RoPE switch."""
    generator = torch.Generator().manual_seed(3)
    samples = []
    for index in range(16):
        length = (5, 9, ROPE_SWITCH - 3, ROPE_SWITCH, 13, ROPE_SWITCH + 4, 7, 18)[index % 8] + index // 8
        token_ids = torch.randint(VOCAB_SIZE - 5, (length,), generator=generator)
        modality_ids = torch.zeros(length, dtype=torch.long)
        items: tuple[Item, ...] = ()
        if index % 3:
            kind = ("numbers", "letters")[index % 3 - 1]
            modality_ids[1:4] = index % 3
            items = (
                Item(kind, "default", model.modalities[kind].prepare(torch.rand(3, generator=generator).tolist())),
            )
        samples.append(Sample(f"s{index}", token_ids, modality_ids, torch.zeros(length, dtype=torch.bool), items))
    return samples


def without_cache(model: MoLoRA, sample: Sample, new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy decoding by a full forward on the whole sequence for every token."""
    answer: list[int] = []
    while len(answer) < new_tokens:
        longer = replace(
            sample,
            token_ids_T=torch.cat([sample.token_ids_T, torch.tensor(answer, dtype=torch.long)]),
            modality_ids_T=torch.cat([sample.modality_ids_T, torch.zeros(len(answer), dtype=torch.long)]),
            targets_T=torch.zeros(len(sample) + len(answer), dtype=torch.bool),
        )
        with torch.no_grad():
            answer.append(int(model.logits(collate([longer], model.modalities))[-1].argmax()))
        if answer[-1] in model.backbone.stop_ids:
            break
    return answer


def decoded(model: MoLoRA, samples: list[Sample], config: GenerationConfig) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {sample.id: [] for sample in samples}
    for step in generate(model, samples, config):
        answers[step.id].append(step.token_id)
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_decoding_equals_full_forwards(family: str) -> None:
    model = make_model(family)
    samples = sixteen(model)
    expected = {sample.id: without_cache(model, sample) for sample in samples}
    # Two answers that the model was going to give anyway become stops, so that some samples finish early.
    early = {answer[2] for answer in list(expected.values())[3:9:3] if len(answer) > 2}
    model.backbone.model.generation_config.eos_token_id = [256, *early]
    expected = {sample.id: without_cache(model, sample) for sample in samples}
    assert len({len(answer) for answer in expected.values()}) > 1
    for running in (16, 5):
        config = GenerationConfig(max_new_tokens=NEW_TOKENS, max_running_samples=running)
        assert decoded(model, samples, config) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "phi4-mini", "smollm3", "phimoe"])
def test_greedy_text_agrees_with_transformers(family: str) -> None:
    model = make_model(family)
    stock: Any = tiny_model(family)
    for sample in sixteen(model)[0:16:3]:
        theirs = stock.generate(
            sample.token_ids_T[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            attention_mask=torch.ones(1, len(sample)),
        )[0, len(sample) :].tolist()
        assert decoded(model, [sample], GenerationConfig(max_new_tokens=NEW_TOKENS))[sample.id] == theirs


def test_sampling_does_not_depend_on_neighbours() -> None:
    model = make_model("phi4-mini")
    samples = sixteen(model)
    config = GenerationConfig(max_new_tokens=5, temperature=1.3, top_p=0.9, seed=4, max_running_samples=6)
    together = decoded(model, samples, config)
    for sample in samples[::5]:
        assert decoded(model, [sample], config)[sample.id] == together[sample.id]
    assert decoded(model, samples, replace(config, seed=5)) != together


def test_top_p_keeps_only_the_likeliest() -> None:
    model = make_model("llama")
    sample = sixteen(model)[0]
    greedy = decoded(model, [sample], GenerationConfig(max_new_tokens=4))
    nucleus = decoded(model, [sample], GenerationConfig(max_new_tokens=4, temperature=5.0, top_p=1e-6))
    assert nucleus == greedy


def test_why_a_sample_ends_is_told() -> None:
    model = make_model("llama")
    sample = sixteen(model)[0]
    steps = list(generate(model, [sample], GenerationConfig(max_new_tokens=3)))
    assert [step.finished for step in steps] == [None, None, "length"]
    model.backbone.model.generation_config.eos_token_id = steps[1].token_id
    assert [step.finished for step in generate(model, [sample], GenerationConfig(max_new_tokens=3))] == [None, "stop"]


def test_the_end_of_turn_that_the_template_trains_stops_an_answer_too() -> None:
    model = make_model("llama")
    sample = sixteen(model)[0]
    steps = list(generate(model, [sample], GenerationConfig(max_new_tokens=3)))
    model.backbone.model.generation_config.eos_token_id = [256]
    model.backbone.turn_ends = frozenset([steps[1].token_id])
    assert model.backbone.stop_ids == {256, steps[1].token_id}
    assert [step.finished for step in generate(model, [sample], GenerationConfig(max_new_tokens=3))] == [None, "stop"]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="top_p cannot be 1.5"):
        GenerationConfig(top_p=1.5)


def logits_of(model: MoLoRA, batches: list[list[Sample]], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """The logits behind every token of an answer, by the seed of its sample."""
    found: dict[int, list[Tensor]] = {}
    choose = generation.choose

    def noting(logits_NV: Tensor, generators: Sequence[torch.Generator], **settings: Any) -> list[int]:
        for logits_V, generator in zip(logits_NV, generators, strict=True):
            found.setdefault(generator.initial_seed(), []).append(logits_V.clone())
        return choose(logits_NV, generators, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "choose", noting)
        for batch in batches:
            list(generate(model, batch, GenerationConfig(max_new_tokens=4)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi4-mini", "phimoe", "llama with a router that learns"])
def test_a_deterministic_batch_gives_every_sample_the_bits_that_it_has_alone(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family.partition(" ")[0])
    if "learns" in family:
        names = ["numbers", "letters"]
        model.router = LearnedRouter(names, LearnedConfig(modalities=names), model.backbone.width)
    model.backbone.to(dtype)
    samples = sixteen(model)[:7]
    alone = logits_of(model, [[sample] for sample in samples], monkeypatch)
    if dtype == torch.float32:
        assert differing(logits_of(model, [samples], monkeypatch), alone), "their company changes no bit"
    model.deterministic_batch = True
    together = logits_of(model, [samples], monkeypatch)
    assert len(together) == len(samples) and not differing(together, alone)
    assert not differing(logits_of(model, [samples[::-1]], monkeypatch), alone)
    few = GenerationConfig(max_new_tokens=3, max_running_samples=2)
    model.deterministic_batch = False
    expected = {sample.id: decoded(model, [sample], few)[sample.id] for sample in samples}
    model.deterministic_batch = True
    assert decoded(model, samples, few) == expected


def differing(some: dict[int, list[Tensor]], others: dict[int, list[Tensor]]) -> list[int]:
    """The seeds of samples with other logits."""
    assert some.keys() == others.keys()
    return [
        seed
        for seed, logits in some.items()
        if not all(torch.equal(*pair) for pair in zip(logits, others[seed], strict=True))
    ]
