"""Routers: what each decides, what it refuses, and that soft routing is the sum that its weights say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.config import build
from molora.data.processor import Processor
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import RoutedLinear, lora_config
from molora.model.molora import MoLoRA
from molora.pack import Pack, Sample, collate
from molora.plugins import resolve
from molora.routing import Flow, Routing, RoutingError, Slice
from molora.testing import Letters, Numbers, NumbersConfig, assert_close, byte_tokenizer, tiny_model

NOWHERE = Identity("test", "", "", "", "")
BOTH = frozenset({"letters", "numbers"})
KINDS: tuple[tuple[str, ...], ...] = ((), ("numbers",), ("letters",), ("numbers", "letters"), ("letters", "numbers"))


@cache
def probe() -> dict[str, Any]:
    return Backbone(tiny_model("phi4-mini"), NOWHERE).probe


def make_model(plugin: str, seed: int = 0, **options: Any) -> MoLoRA:
    modalities = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    adapters = {
        name: lora_config({"r": r, "lora_alpha": 4, "init_lora_weights": False, "target_modules": targets}, name)
        for name, r in (("numbers", 2), ("letters", 3))
    }
    router_class: Any = resolve("router", plugin)
    backbone = Backbone(tiny_model("phi4-mini"), NOWHERE, probe=probe())
    router = router_class(list(adapters), build(router_class.config_type, options, "router.options"), backbone.width)
    torch.manual_seed(seed)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)  # as after some training: gates that depend on what they see
    model = MoLoRA(backbone, modalities, adapters, router)
    for parameters in model.parts().values():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    return model


def learned(**options: Any) -> MoLoRA:
    return make_model("learned", modalities=["letters", "numbers"], **options)


def encode(model: MoLoRA, *, generate: bool = False) -> list[Sample]:
    processor = Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)
    samples = []
    for i in range(10):
        parts: dict[str, dict[str, Any]] = {
            "numbers": {"type": "numbers", "numbers": [i / 4, 1.0, -i / 8][: 1 + i % 3]},
            "letters": {"type": "letters", "letters": "abcxyz"[i % 4 :]},
        }
        content = [*(parts[kind] for kind in KINDS[i % 5]), {"type": "text", "text": "which" + "?" * (i % 3)}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f"{i} it is"}]
        samples.append(processor.encode(messages[: 1 if generate else 2], f"{i}", generate=generate))
    return samples


def packed(model: MoLoRA, samples: list[Sample]) -> Pack:
    return collate(samples, model.modalities, model.router.order)


SOFT: list[dict[str, Any]] = [
    {},
    {"scope": "token"},
    {"candidates": "all"},
    {"scope": "token", "candidates": "all", "top_k": 1},
    {"confidence": 0.4, "rules": {"letters+numbers": "letters"}},
    {"scope": "token", "confidence": 0.4, "balance": 0.1, "z": 0.01},
]


@pytest.mark.parametrize("options", SOFT, ids=str)
def test_a_sample_is_routed_the_same_in_any_company(options: dict[str, Any]) -> None:
    model = learned(**options)
    samples = encode(model)
    pack = packed(model, samples)
    losses = model.losses(pack)
    together = dict(zip(pack.ids, zip(losses.sums_N, losses.router_N, strict=True), strict=True))
    names = {f"{part}.{key}": p for part, parameters in model.parts().items() for key, p in parameters.items()}

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(names.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(names, found, strict=True))

    for sample in samples:
        alone = model.losses(packed(model, [sample]))
        assert_close(together[sample.id][0], alone.sums_N[0], what=sample.id)
        assert_close(together[sample.id][1], alone.router_N[0], what=sample.id)
        if not sample.items:
            assert not alone.sums_N.requires_grad and not alone.router_N.any()
            continue
        both = [
            (loss / sample.num_targets + router)
            for loss, router in (together[sample.id], (alone.sums_N[0], alone.router_N[0]))
        ]
        expected = gradients(both[1])
        for name, gradient in gradients(both[0]).items():
            assert_close(gradient, expected[name], what=f"{name} from sample {sample.id}")
        moved = {part for part in model.parts() if any(expected[f"{part}.{key}"].any() for key in model.parts()[part])}
        assert moved <= model.parts_of(sample.modalities)
        assert ("router" in moved) == model.router.learns(sample.modalities)


@pytest.mark.parametrize("options", SOFT[:2], ids=str)
def test_gates_are_what_their_weights_say(options: dict[str, Any]) -> None:
    """A sample with both modalities equals a run of one dense LoRA made by hand from its own weights."""
    model = learned(**options)
    (sample,) = [s for s in encode(model) if s.id == "3"]
    pack = packed(model, [sample])
    with torch.no_grad():
        embeds_TD = model.embed(pack)
        (piece,) = model.router(pack, embeds_TD).slices
        assert piece.weights_TE is not None and piece.adapters == ("letters", "numbers")
        assert_close(piece.weights_TE.sum(1), torch.ones(len(sample)))
        ours = model(pack)
        # By hand: a layer with one adapter at a time, scaled token by token, added up.
        hooks = []
        for layer in model.backbone.model.modules():
            if not isinstance(layer, RoutedLinear):
                continue

            def add(module: Any, args: Any, out: Tensor) -> Tensor:
                for index, name in enumerate(piece.adapters):
                    low = args[0] @ module.lora_A[name].weight.T @ module.lora_B[name].weight.T
                    out = out + low * module.scaling[name] * piece.weights_TE[:, index, None]  # type: ignore[index]
                return out

            hooks.append(layer.register_forward_hook(add))
        bare = Routing((Slice((), 0, len(sample)),))
        by_hand = model.backbone(embeds_TD, pack.position_ids_T, Flow(pack.lengths, bare))
        for hook in hooks:
            hook.remove()
    assert_close(ours, by_hand)


@torch.no_grad()
def test_a_sum_is_what_its_weights_say() -> None:
    summed = make_model("sum")
    (sample,) = [s for s in encode(summed) if s.id == "3"]
    whole = summed.logits(packed(summed, [sample]))
    named = make_model("sum", weights={"numbers + letters": {"letters": 1.0, "numbers": 1.0}})
    assert torch.equal(whole, named.logits(packed(named, [sample])))
    one = make_model("sum", weights={"letters+numbers": {"letters": 1.0, "numbers": 0.0}})
    table = make_model("table", rules={"letters+numbers": "letters"})
    assert torch.equal(one.logits(packed(one, [sample])), table.logits(packed(table, [sample])))
    # Half of an adapter is the adapter with half its scaling.
    half = make_model("sum", weights={"letters+numbers": {"letters": 0.5}})
    for module in table.backbone.model.modules():
        if isinstance(module, RoutedLinear):
            module.scaling["letters"] /= 2
    assert_close(half.logits(packed(half, [sample])), table.logits(packed(table, [sample])))


@torch.no_grad()
@pytest.mark.parametrize("plugin", ["table", "sum", "learned"])
def test_one_modality_alone_and_text_are_what_the_table_gives_to_the_bit(plugin: str) -> None:
    options: dict[str, Any] = {
        "table": {"rules": {"letters+numbers": "letters"}},
        "learned": {"modalities": sorted(BOTH)},
    }.get(plugin, {})
    model, table = make_model(plugin, **options), make_model("table", rules={"letters+numbers": "letters"})
    for sample in encode(model):
        if len(sample.modalities) < 2:
            assert torch.equal(model.logits(packed(model, [sample])), table.logits(packed(table, [sample])))


@torch.no_grad()
def test_before_training_the_prior_decides() -> None:
    model = learned(rules={"letters+numbers": "letters"}, prior=1.0)
    for parameter in model.router.parameters():  # pyright: ignore[reportAttributeAccessIssue]
        parameter.zero_()
    pack = packed(model, encode(model))
    weights = [s.weights_TE for s in model.router(pack, model.embed(pack)).slices if s.weights_TE is not None]
    assert_close(torch.cat(weights).mean(0), torch.tensor([1.0, 0.0]).softmax(0))


@torch.no_grad()
def test_an_adapter_that_nobody_takes_is_skipped_and_below_the_confidence_the_backbone_is_bare() -> None:
    model = learned(top_k=1, rules={"letters+numbers": "letters"}, prior=1e4)
    pack = packed(model, encode(model))
    assert [piece.adapters for piece in model.router(pack, model.embed(pack)).slices] == [
        (), ("letters",), ("letters",), ("numbers",),
    ]  # fmt: skip
    shy = learned(confidence=0.1)
    router: Any = shy.router
    router.gates["bare"].bias.fill_(1e4)
    pack = packed(shy, [s for s in encode(shy) if s.items])
    bare = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    embeds_TD = shy.embed(pack)
    assert torch.equal(shy(pack), shy.backbone(embeds_TD, pack.position_ids_T, bare))


@pytest.mark.parametrize("options", SOFT, ids=str)
def test_answers_do_not_depend_on_company_or_on_the_cache(options: dict[str, Any]) -> None:
    """What a router decided of a prompt holds for its answer; with token scope each new token decides for itself."""
    model = learned(**options)
    samples = encode(model, generate=True)

    def answers(asked: list[Sample], running: int) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {sample.id: [] for sample in asked}
        for step in generate(model, asked, GenerationConfig(max_new_tokens=5, max_running_samples=running)):
            tokens[step.id].append(step.token_id)
        return tokens

    together = answers(samples, 10)
    assert together == answers(samples, 3)
    for sample in samples:
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < len(together[sample.id]):
                new = torch.tensor(answer, dtype=torch.long)
                longer = replace(
                    sample,
                    token_ids_T=torch.cat([sample.token_ids_T, new]),
                    modality_ids_T=torch.cat([sample.modality_ids_T, torch.zeros_like(new)]),
                    targets_T=torch.zeros(len(sample) + len(new), dtype=torch.bool),
                )
                answer.append(int(model.logits(packed(model, [longer]))[-1].argmax()))
        assert answer == together[sample.id], sample.id


@pytest.mark.parametrize("options", SOFT, ids=str)
def test_activation_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = learned(**options)
        model.backbone.activation_checkpointing = checkpointing
        losses = model.losses(packed(model, encode(model)))
        # A forward in between, as accumulation has: recomputing must see its own pack's routing.
        model.losses(packed(model, encode(model)[:4]))
        (losses.sums_N.sum() + losses.router_N.sum()).backward()
        return {
            f"{part}.{key}": torch.zeros(()) if p.grad is None else p.grad
            for part, parameters in model.parts().items()
            for key, p in parameters.items()
        }

    plain, again = gradients(False), gradients(True)
    assert any(plain[name].any() for name in plain if name.startswith("router."))
    for name, gradient in plain.items():
        assert_close(again[name], gradient, 1e-6, name)


def test_a_learned_router_refuses_modalities_that_it_was_not_made_for() -> None:
    with pytest.raises(RoutingError, match=r"made for \['letters'\], and this model also has \['numbers'\]"):
        make_model("learned", modalities=["letters"])
    fewer: Any = resolve("router", "learned")
    router = fewer(["letters"], build(fewer.config_type, {"modalities": sorted(BOTH)}, ""), 8)
    assert set(dict(router.named_parameters())) == {f"gates.{n}.{k}" for n in BOTH for k in ("weight", "bias")}
    with pytest.raises(RoutingError, match=r"not for \['smells'\]"):
        router.order(frozenset({"letters", "smells"}))


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ("sum", {"weights": {"letters": {"smells": 1.0}}}, r"'letters' name \['smells'\]; the adapters here are"),
        (
            "sum",
            {"weights": {"+": {"letters": 1.0}}},
            "'\\+' names no modality; a rule for text alone is written 'text'",
        ),
        ("table", {"rules": {"": "letters"}}, "'' names no modality; a rule for text alone is written 'text'"),
        (
            "learned",
            {"modalities": ["letters", "numbers"], "rules": {"text": "letters"}},
            "runs on the bare backbone here",
        ),
        ("table", {"rules": {"letters": "smells"}}, "names adapter 'smells'; the adapters here are"),
        ("learned", {"modalities": ["letters", "numbers"], "rules": {"letters": "smells"}}, "names adapter 'smells'"),
        ("learned", {"modalities": ["letters", "numbers"], "top_k": 0}, "top_k is at least 1, got 0"),
        (
            "learned",
            {"modalities": ["letters", "numbers"], "confidence": 1.0},
            "confidence is at least 0 and less than",
        ),
        ("learned", {"modalities": ["letters", "numbers"], "z": -1.0}, "balance and z are at least 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(plugin: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(plugin, **options)


def test_a_set_without_any_adapter_is_refused_by_name() -> None:
    for plugin, message in (("table", "no routing rule for .* 'smells'"), ("sum", "no adapter for .* 'smells'")):
        with pytest.raises(RoutingError, match=message):
            make_model(plugin).router.order(frozenset({"smells"}))


def test_a_part_of_a_decision_says_the_same_of_its_tokens() -> None:
    weights = torch.arange(12.0).reshape(6, 2)
    routing = Routing((Slice((), 0, 3), Slice(("a", "b"), 3, 9, weights), Slice(("b",), 9, 11)))

    def by_token(routing: Routing) -> list[tuple[tuple[str, ...], list[float] | None]]:
        found = []
        for adapters, start, stop, weights_TE in routing.slices:
            assert start == len(found) and (weights_TE is None or len(weights_TE) == stop - start)
            rows = [None] * (stop - start) if weights_TE is None else weights_TE.tolist()
            found += [(adapters, row) for row in rows]
        return found

    whole = by_token(routing)
    for start in range(11):
        for stop in range(start + 1, 12):
            assert by_token(routing.part(start, stop)) == whole[start:stop]
