"""The checks of routers: the built-in ones pass, and every way to break the contract is found by the check for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molora.plugin_kit.check import check_router
from molora.testing import assert_router_conforms

FAULTY = Path(__file__).with_name("faulty_routers.py")
BOTH = {"modalities": ["audio", "vision"]}
TO_VISION = {"rules": {"audio+vision": "vision"}}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("table", {}),
        ("table", TO_VISION),
        ("table", {"rules": {"audio+vision": "vision", "audio": None}}),
        ("sum", {}),
        ("sum", {"weights": {"audio+vision": {"vision": 1.0, "audio": 0.5}}}),
        ("learned", BOTH),
        ("learned", {**BOTH, **TO_VISION, "confidence": 0.4}),
        ("learned", {**BOTH, "scope": "token"}),
        ("learned", {**BOTH, "scope": "token", "candidates": "all", "top_k": 1, "balance": 0.1, "z": 0.01}),
    ],
    ids=str,
)
def test_the_built_in_routers_keep_the_contract(spec: str, options: dict[str, Any]) -> None:
    assert_router_conforms(spec, options)


FAULTS: list[tuple[str, dict[str, Any], str, str]] = [
    ("NoModule", {}, "contract", "is to be an nn.Module"),
    ("OptionsInAMapping", {}, "contract", "a dataclass that recipes read"),
    ("Unnamed", {}, "every set", "the RoutingError for smell does not name smell: no such adapter"),
    ("Undecided", {}, "every set", "raised RoutingError: no adapter for a sample with modalities 'smell'"),
    ("ListOfAdapters", {}, "every set", "a frozenset of names"),
    ("NoRules", {}, "every set", "RoutingError for every set"),
    ("Unchecked", TO_VISION, "adapters there are", "built with the adapter audio alone"),
    ("ShortSlices", {}, "slices", "slices end at token"),
    ("GapInSlices", {}, "slices", "slice 0 is 1:"),
    ("OneWeightForAll", {}, "slices", "has weights_TE of shape (1,), expected finite ones"),
    ("Inplace", {}, "slices", "forward changes embeds_TD"),
    ("Crash", {}, "slices", "raised KeyError: 'gate'"),
    ("DressedText", {}, "text alone", "runs with an adapter"),
    ("LearningText", {}, "text alone", "for text alone, order, adapters and learns are '', frozenset() and True"),
    ("Concealed", {}, "adapters() covers", "runs with ['vision'], which adapters("),
    ("Apart", TO_VISION, "order", "are not neighbours; let `order` be"),
    ("WholePack", BOTH, "neighbours", "in evaluation mode, the routing of sample"),
    ("BatchStatistics", BOTH, "neighbours", "in training mode, the routing of sample"),
    ("CoupledBalance", {**BOTH, "balance": 1.0}, "neighbours", "the router's loss of sample"),
    ("Forgetful", BOTH, "cache", "from the cache and"),
    ("Modest", BOTH, "learns", "learns is False for audio, but the gradient of such a sample reaches gates.audio"),
    ("Boastful", {}, "learns", "learns is True for audio, but the gradient of such a sample reaches none"),
    ("Detached", BOTH, "learns", "learns is True for audio+vision, but the gradient of such a sample reaches none"),
    ("Unsaved", {}, "saving", "saved and loaded into a new router"),
    ("Reused", {}, "recomputing", "make new tensors in every forward"),
    ("FullPrecision", {}, "half precision", "raised RuntimeError"),
]


@pytest.mark.parametrize(("name", "options", "check", "message"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found_by_its_own_check(name: str, options: dict[str, Any], check: str, message: str) -> None:
    findings = check_router(f"{FAULTY}:{name}", options)
    broken = {finding.what: finding.found for finding in findings if finding.ok is False}
    assert check in broken and message in broken[check], broken
    also = {"DressedText": {"adapters() covers"}, "LearningText": {"learns"}, "Modest": {"half precision"}}
    assert broken.keys() - {check} == also.get(name, set()), broken
    if check in ("contract", "every set", "slices"):
        later = findings[[finding.what for finding in findings].index(check) + 1 :]
        assert later and all(finding.ok is None and repr(check) in finding.found for finding in later)


def test_options_that_are_missing_or_wrong_are_told() -> None:
    first, *_ = check_router("learned")
    assert first.ok is False and "missing 'modalities'" in first.found and "audio and vision" in first.found
    first, *_ = check_router("table", {"rulez": {}})
    assert first.ok is False and "did you mean 'rules'" in first.found
    first, *_ = check_router("tabel")
    assert first.ok is False and "did you mean 'table'" in first.found


def test_the_assertion_lists_what_is_broken() -> None:
    told = r"router '.*Crash' does not conform:\n- slices: Crash\.forward raised KeyError"
    with pytest.raises(AssertionError, match=told):
        assert_router_conforms(f"{FAULTY}:Crash")
