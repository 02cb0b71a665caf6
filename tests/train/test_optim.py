"""Schedules, patterns and part optimisers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from molora.train.optim import PartConfig, PartOptimizer, learning_rate, matches


def test_warm_up_is_linear_and_schedules_end_where_they_should() -> None:
    config = PartConfig(learning_rate=2.0, warmup_steps=4)
    assert [learning_rate(config, step, 12) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert learning_rate(config, 4, 12) == 2.0 and learning_rate(config, 8, 12) == pytest.approx(1.0)
    assert learning_rate(config, 12, 12) == pytest.approx(0.0)
    linear = PartConfig(learning_rate=2.0, schedule="linear")
    assert [learning_rate(linear, step, 4) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert learning_rate(PartConfig(learning_rate=2.0, schedule="constant"), 99, 100) == 2.0


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("adapters.vision", "adapters.vision.model.q_proj.lora_A.weight", True),
        ("adapters.vis", "adapters.vision.model.q_proj.lora_A.weight", False),
        ("adapters.*", "adapters.vision.model.q_proj.lora_A.weight", True),
        ("*.lora_B.weight", "adapters.vision.model.q_proj.lora_B.weight", True),
        ("encoders", "encoders.vision.tower.weight", True),
        ("Encoders", "encoders.vision.tower.weight", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) == expected


@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_a_part_updates_like_adamw_with_clipping(epsilon: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    config = PartConfig(
        learning_rate=0.1, schedule="constant", weight_decay=0.01, epsilon=epsilon, max_gradient_norm=0.5
    )
    optimizer = PartOptimizer([(config, dict(ours.named_parameters()))], total_steps=5)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.95), eps=epsilon, weight_decay=0.01)
    for _ in range(5):
        x = torch.randn(4, 3)
        for model in (ours, theirs):
            (model(x) ** 2).sum().backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        ours_norm = optimizer.gradient_norm()
        assert float(ours_norm) == pytest.approx(float(norm))
        optimizer.step(ours_norm)
        reference.step()
        reference.zero_grad()
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)  # ours runs as one fused kernel


def test_state_goes_round() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    config = PartConfig(learning_rate=0.1)
    optimizer = PartOptimizer([(config, dict(first.named_parameters()))], total_steps=9)
    first(torch.ones(1, 3)).sum().backward()
    optimizer.step(optimizer.gradient_norm())
    second.load_state_dict(first.state_dict())
    again = PartOptimizer([(config, dict(second.named_parameters()))], total_steps=9)
    again.load(optimizer.tensors(), optimizer.steps_taken)
    for model, one in ((first, optimizer), (second, again)):
        model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
        one.step(one.gradient_norm())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert again.steps_taken == 2
