"""Routed equals PEFT: the same adapter files, sample by sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from molora.config import ConfigError
from molora.model import lora
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import RoutedLinear, lora_config
from molora.routing import Flow, Routing, Slice, flowing
from molora.testing import VOCAB_SIZE, assert_close, tiny_model

NOWHERE = Identity("test", "", "", "", "")
ADAPTERS: dict[str, dict[str, Any]] = {
    "vision": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "second": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*\.(v_proj|o_proj|up_proj)"},
}


def build(options: dict[str, dict[str, Any]] = ADAPTERS) -> Backbone:
    backbone = Backbone(tiny_model("llama"), NOWHERE)
    for name, given in options.items():
        torch.manual_seed(len(name))
        lora.inject(backbone.model, name, lora_config({"init_lora_weights": False, **given}, name), name)
    return backbone


def save(backbone: Backbone, name: str, options: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(lora.adapter_tensors(backbone.model, name), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(lora.adapter_json(lora_config(options, name), "somewhere/llama"))
    return folder


def run(backbone: Backbone, samples: list[Tensor], adapters: tuple[str | None, ...]) -> tuple[Tensor, ...]:
    lengths = tuple(map(len, samples))
    positions = torch.cat([torch.arange(n) for n in lengths])
    flow = Flow(lengths, Routing.by_sample([() if name is None else (name,) for name in adapters], lengths))
    return backbone.head(backbone(backbone.embed(torch.cat(samples)), positions, flow)).split(lengths)


def samples(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB_SIZE, (5 + 3 * i,), generator=generator) for i in range(count)]


def peft_logits(folder: Path | None, ids: Tensor) -> Tensor:
    model: PreTrainedModel | PeftModel = tiny_model("llama")
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def test_a_mixed_pack_gives_what_peft_gives_with_each_adapter_active(tmp_path: Path) -> None:
    backbone = build()
    folders: dict[str | None, Path | None] = {None: None}
    for name, options in ADAPTERS.items():
        folders[name] = save(backbone, name, options, tmp_path / name)
    ids = samples(6)
    for adapters in (
        (None, None, "second", "second", "vision", "vision"),
        ("vision", "second", "vision", "second", None, "vision"),
        ("second",) * 6,
    ):
        for index, ours in enumerate(run(backbone, ids, adapters)):
            assert_close(ours, peft_logits(folders[adapters[index]], ids[index]), what=f"{adapters} sample {index}")


def test_bare_samples_are_untouched_to_the_bit() -> None:
    ids = samples(4)
    bare = run(Backbone(tiny_model("llama"), NOWHERE), ids, (None,) * 4)
    mixed = run(build(), ids, (None, "vision", None, "second"))
    assert torch.equal(mixed[0], bare[0]) and torch.equal(mixed[2], bare[2])
    assert not torch.equal(mixed[1], bare[1]) and not torch.equal(mixed[3], bare[3])


def test_gradients_stay_in_the_adapter_a_sample_uses() -> None:
    backbone = build()
    parameters = {name: lora.adapter_parameters(backbone.model, name) for name in ADAPTERS}
    ids = samples(3)
    run(backbone, ids, (None, "vision", "second"))[1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters["vision"].values())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in parameters["second"].values())


@pytest.mark.parametrize(
    ("options", "scaling", "rank"),
    [
        ({"r": 6, "lora_alpha": 3}, 0.5, 6),
        ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 2.0, 16),
        ({"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}}, 2.0, 2),
    ],
)
def test_rank_alpha_and_rslora_are_honoured(options: dict[str, Any], scaling: float, rank: int) -> None:
    backbone = build({"a": {**options, "target_modules": ["q_proj"]}})
    layer = backbone.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, RoutedLinear)
    assert layer.scaling["a"] == pytest.approx(scaling) and layer.lora_A["a"].get_parameter("weight").shape[0] == rank


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_initialisations_are_pefts(init: bool | str) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": init}
    backbone = build({"a": options})
    layer = backbone.model.model.layers[0].self_attn.q_proj
    # Both of PEFT's defaults start as no change; orthogonal starts with a product of orthogonal factors.
    assert (layer.lora_B["a"].weight.abs().sum() == 0) == (init != "orthogonal")
    torch.manual_seed(1)
    from peft import get_peft_model

    theirs = get_peft_model(tiny_model("llama"), lora_config(options, "a"))
    expected = theirs.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    assert torch.equal(layer.lora_A["a"].weight, expected)


def test_dropout_follows_train_and_eval() -> None:
    backbone = build({"a": {"r": 4, "lora_dropout": 0.5, "target_modules": ["q_proj"]}})
    ids = samples(1)
    lora.set_dropout(backbone.model, False)
    first, second = run(backbone, ids, ("a",))[0], run(backbone, ids, ("a",))[0]
    assert torch.equal(first, second)
    lora.set_dropout(backbone.model, True)
    assert not torch.equal(run(backbone, ids, ("a",))[0], first)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_sum_written_out(dropout: float) -> None:
    """Two adapters with gates on one slice, one adapter on the next, none on the last."""
    given = {"r": 4, "lora_dropout": dropout, "target_modules": ["q_proj"]}
    backbone = build({"a": given, "b": {**given, "r": 2}})
    layer = backbone.model.model.layers[0].self_attn.q_proj.double()
    lora.set_dropout(backbone.model, True)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(1, 9, layer.in_features, generator=drawn, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 2, generator=drawn, dtype=torch.float64, requires_grad=True)
    slices = (Slice(("a", "b"), 0, 4, gates), Slice(("b",), 4, 7), Slice((), 7, 9))
    learned = [x, gates, *(layer.get_parameter(f"lora_{side}.{name}.weight") for name in "ab" for side in "AB")]
    found = []
    for written_out in (False, True):
        torch.manual_seed(0)
        if written_out:
            out = layer.base_layer(x)[0]
            for name, tokens, gate in (("a", slice(0, 4), 0), ("b", slice(0, 4), 1), ("b", slice(4, 7), None)):
                x_TD = x[0, tokens]
                low = layer.lora_A[name](x_TD * F.dropout(torch.ones_like(x_TD), dropout))
                share = layer.lora_B[name](low if gate is None else low * gates[:, gate, None])
                out = out + F.pad(share * layer.scaling[name], (0, 0, tokens.start, 9 - tokens.stop))
        else:
            with flowing(Flow((4, 3, 2), Routing(slices))):
                out = layer(x)[0]
        found.append((out, *torch.autograd.grad(out.cos().sum(), learned)))
    for mine, expected in zip(*found, strict=True):
        assert_close(mine, expected, 1e-12)


def test_casts_follow_the_weights() -> None:
    backbone = build({"a": {"r": 4, "target_modules": ["q_proj"]}})
    layer = backbone.model.model.layers[0].self_attn.q_proj
    first = layer.adapter_weights("a", torch.bfloat16)
    assert all(mine is again for mine, again in zip(first, layer.adapter_weights("a", torch.bfloat16), strict=True))
    with torch.no_grad():
        layer.lora_A["a"].weight.add_(1)
    a_RD, b_OR = layer.adapter_weights("a", torch.bfloat16)
    assert torch.equal(a_RD, layer.lora_A["a"].weight.bfloat16()) and torch.equal(b_OR, first[1])


def test_what_peft_saves_we_load(tmp_path: Path) -> None:
    from peft import get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    get_peft_model(tiny_model("llama"), lora_config(options, "a")).save_pretrained(str(tmp_path))
    backbone = Backbone(tiny_model("llama"), NOWHERE)
    lora.inject(backbone.model, "theirs", lora.read_adapter(tmp_path), "theirs")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    into = lora.adapter_tensors(backbone.model, "theirs")
    lora.load_exactly(into, tensors, str(tmp_path))
    ids = samples(1)
    assert_close(run(backbone, ids, ("theirs",))[0], peft_logits(tmp_path, ids[0]))
    with pytest.raises(ValueError, match="missing .*layers.0.self_attn.q_proj.lora_A"):
        lora.load_exactly(
            lora.adapter_tensors(backbone.model, "theirs"), dict(list(tensors.items())[1:]), str(tmp_path)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4}, "target_modules: missing"),
        ({"r": 4, "target_modules": ["q_proj"], "rnak": 3}, "rnak"),
        ({"r": 4, "target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
        ({"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 4, "target_modules": ["q_proj"], "bias": "all"}, "bias"),
        ({"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"r": 4, "target_modules": ["quality_proj"]}, "hits nothing"),
        ({"r": 4, "target_modules": ["q_proj", "quality_proj"]}, r"\['quality_proj'\] hit no layer"),
        ({"r": 4, "target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"r": 4, "target_modules": ["lm_head"]}, "output head"),
    ],
)
def test_what_cannot_be_routed_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"a": options})


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["gate_up_proj"], "mlp.experts.gate_up_proj, a part of the experts"),
        (["q_proj", "down_proj"], "mlp.experts.down_proj, a part of the experts"),
        ("model.*experts", "mlp.experts, the experts"),
        (["q_proj", "router"], "mlp.router, the expert router"),
        ("all-linear", "mlp.router, the expert router"),
    ],
)
def test_experts_and_their_router_are_refused_by_name(targets: Any, named: str) -> None:
    backbone = Backbone(tiny_model("phimoe"), NOWHERE)
    before = [type(module) for module in backbone.model.modules()]
    attention = r"target attention only; linear layers here: \['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"
    with pytest.raises(ConfigError, match=f"layers.0.{named} of a mixture of experts, .*; {attention}"):
        lora.inject(backbone.model, "a", lora_config({"r": 2, "target_modules": targets}, "a"), "a")
    assert [type(module) for module in backbone.model.modules()] == before


def test_merging_and_disabling_are_refused() -> None:
    layer = build().model.model.layers[0].self_attn.q_proj
    for forbidden in (layer.merge, layer.unmerge, lambda: layer.enable_adapters(False)):
        with pytest.raises(RuntimeError, match="routed model"):
            forbidden()


def test_a_layer_outside_a_forward_says_so() -> None:
    with pytest.raises(RuntimeError, match="outside a molora forward"):
        build().model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))
