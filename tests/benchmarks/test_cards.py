"""The page on scaling says what its script computes, and the script's sizes are those of the model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

from benchmarks import cards

PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "scaling.md"


def test_the_page_has_the_tables_of_the_script() -> None:
    assert cards.tables() in PAGE.read_text(encoding="utf-8")


def test_the_sizes_are_those_of_the_model_that_transformers_builds() -> None:
    config = Phi3Config(
        hidden_size=cards.WIDTH,
        num_hidden_layers=cards.LAYERS,
        intermediate_size=cards.MLP_WIDTH,
        vocab_size=cards.VOCABULARY,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
        norms = sum(weight.numel() for weight in model.parameters() if weight.ndim == 1)
        assert model.num_parameters() - norms == cards.BACKBONE
        targets = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        adapted = get_peft_model(model, LoraConfig(r=cards.RANK, target_modules=targets))
    assert sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad) == cards.ADAPTER
