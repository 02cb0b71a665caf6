"""Fingerprints tell contents apart, and nothing else; the shared state comes back."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molora.testing.side_effects import fingerprint, put_back, scramble, shared_state


@dataclass
class Pair:
    left: Any
    right: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


ALIKE = [
    (torch.zeros(3), torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, -0.0])),
    (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, device="meta")),
    (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bool)),
    (torch.zeros(0), torch.zeros(0, 1), torch.zeros(())),
    (np.zeros(3), np.zeros(3, np.float32), np.zeros((3, 1)), np.array([0.0, 0.0, np.nan])),
    (np.array([1, "a"], object), np.array([1, "b"], object), [1, "a"]),
    (np.int64(3), np.int32(3), np.int64(4), 3),
    (Image.new("L", (2, 3)), Image.new("L", (3, 2)), Image.new("RGB", (2, 3)), Image.new("L", (2, 3), 1)),
    ({"a": 1, "b": [2]}, {"a": 1, "b": [3]}, {"a": 1}, {"a": 1, "b": (2,)}),
    ({1, 2}, {1, 3}, frozenset({1, 2}), [1, 2]),
    ([[1], 2], [1, [2]], [1, 2], [[1, 2]]),
    (b"ab", b"ac", "ab", bytearray(b"ab"), memoryview(b"ab")),
    (1, 1.0, True, None, "1", Fraction(1)),
    (Pair(1, torch.ones(2)), Pair(1, torch.zeros(2)), Plain(1)),
    (Plain([1]), Plain([2]), [1]),
]


@pytest.mark.parametrize("values", ALIKE, ids=range(len(ALIKE)))
def test_fingerprints_are_equal_for_equal_content_alone(values: tuple[Any, ...]) -> None:
    prints = [fingerprint(value) for value in values]
    assert len(set(prints)) == len(values)
    if not isinstance(values[-1], memoryview):
        assert [fingerprint(copy.deepcopy(value)) for value in values] == prints


def test_the_order_of_a_mapping_is_no_content() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_a_value_may_hold_itself() -> None:
    loops = [Plain(1), Plain(2)]
    for loop in loops:
        loop.value = [loop.value, loop]
    assert fingerprint(loops[0]) != fingerprint(loops[1])
    assert fingerprint(loops[0]) == fingerprint(copy.deepcopy(loops[0]))


def test_what_changed_of_the_shared_state_is_named_and_put_back() -> None:
    before = shared_state()
    scramble(3)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    changed = put_back(before)
    assert set(changed) == {
        "the default dtype",
        "the grad mode",
        "the state of torch's global generator",
        "the state of numpy's global generator",
        "the state of Python's global generator",
    }
    assert put_back(before) == []
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert random.getstate() == before["the state of Python's global generator"]
