"""Mixtures of experts: found in every family, and compared with their choices held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from molora.model.backbone import Backbone
from molora.model.experts import Choices, routers, untargetable
from molora.model.identity import Identity
from molora.model.probe import BackboneRefused
from molora.testing import VOCAB_SIZE, WINDOW, assert_close, tiny_model

NOWHERE = Identity("test", "", "", "", "")
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    "num_experts": 4, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("phimoe", "mlp.router"),
        ("gpt-oss", "mlp.router"),
        ("Mixtral", "mlp.gate"),
        ("Qwen3Moe", "mlp.gate"),
    ],
)
def test_the_router_of_every_layer_is_found_beside_its_experts(model: str, name: str) -> None:
    if model in ("phimoe", "gpt-oss"):
        causal: Any = tiny_model(model)
    else:
        config = getattr(transformers, f"{model}Config")(**SIZES)
        causal = getattr(transformers, f"{model}ForCausalLM")(config)
    assert list(routers(causal)) == [f"model.layers.{layer}.{name}" for layer in range(2)]
    refused = untargetable(causal)
    assert refused[f"model.layers.1.{name}"] == "the expert router"
    assert refused["model.layers.1.mlp.experts.gate_up_proj"] == "a part of the experts"
    assert not any("self_attn" in path for path in refused)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_dense_model_has_none(family: str) -> None:
    assert not untargetable(tiny_model(family)) and not routers(tiny_model(family))


@pytest.mark.parametrize("family", ["phimoe", "gpt-oss"])
def test_choices_are_made_again_sample_by_sample(family: str) -> None:
    """What was chosen alone is chosen in a pack, even by a router that would now choose otherwise."""
    model: Any = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, 32, generator=generator) for length in (3, 7, 5)]
    block = model.model.layers[0].mlp

    def run(hidden: torch.Tensor) -> torch.Tensor:
        out = block(hidden)
        return (out[0] if isinstance(out, tuple) else out)[0]

    choices = Choices(model.model.layers[0])
    with torch.no_grad():
        with choices.keeping():
            alone = [run(hidden) for hidden in inputs]
        block.router.weight.normal_(generator=generator)
        changed = run(inputs[1])
        with choices.again([2, 1], (5, 7)):
            again = run(torch.cat([inputs[2], inputs[1]], dim=1))
        assert_close(again, torch.cat([alone[2], alone[1]]), 1e-6)
        assert (changed - alone[1]).abs().max() > 0.01
        assert torch.equal(run(inputs[1]), changed), "hooks are gone"


def test_a_mixture_in_half_precision_passes_the_probe() -> None:
    """Rounding swaps experts that are close, here and in transformers' own ways of attending alike."""
    backbone = Backbone(tiny_model("phimoe").bfloat16(), NOWHERE)
    assert max(backbone.probe["differences"].values()) < 0.05


def test_the_probe_sees_a_window_that_a_mixture_does_not_honour() -> None:
    """transformers masks by the config's window but does not hand it to this family's attention function."""
    model = tiny_model("phimoe")
    model.config.sliding_window = WINDOW
    with pytest.raises(BackboneRefused, match="relative difference"):
        Backbone(model, NOWHERE)
