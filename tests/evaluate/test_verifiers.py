"""Metrics that rate a value in an answer: numbers with units, mathematics, patterns, programs with tests."""

from __future__ import annotations

import time
from typing import Any

import pytest

from molora.config import ConfigError
from molora.evaluate.metrics import Judged, open_metrics
from molora.evaluate.metrics.programs import code_of
from molora.evaluate.sandbox import NoSandbox


def rated(metric: Any, expected: str, answer: str, **more: Any) -> float:
    return metric.score([Judged("0:a", [], expected, answer, False, **more)])[metric.name]


def opened(name: str, **options: Any) -> Any:
    (metric,) = open_metrics([{name: options}], "metrics")
    return metric


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("3 km", "It is 3,000 metres.", True),
        ("3 km", "3000", False),
        ("3 km", "3 kg", False),
        ("3", "3 km", True),
        ("12.5 km/h", "at 12.5 kilometres per hour", True),
        ("12.5 km/h", "3.47222222 m/s", True),
        ("12.5 km/h", "12.5 km", False),
        ("$5", "It costs 5 dollars.", True),
        ("$5", "500 cents", True),
        ("$5", "5 euros", False),
        ("-3", "\u22123", True),
        ("-3", "- 3", True),
        ("3", "-3", False),
        ("0.5", "1/2", True),
        ("50%", "50 per cent", True),
        ("1e3", "1,000", True),
        (".25", "0.25", True),
        ("7", "I have 7 apples, so 7", True),
        ("7", "x7y", False),
        ("7", "seven", False),
        ("20 \u00b0C", "20\u00b0C", True),
        ("2 m\u00b2", "20000 cm^2", True),
        ("1", "1/0", False),
        ("0", "0.000001", False),
        ("4", "2 + 2 = 4.", True),
        ("1234567", "1,234,567", True),
        ("2 h", "120 min", True),
        ("6", "3 of them, and 3 of those", False),
    ],
)
def test_numbers_are_compared_by_value_and_unit(expected: str, answer: str, right: bool) -> None:
    assert rated(opened("number"), expected, answer) == right


def test_which_number_counts_and_how_far_it_may_be_off() -> None:
    assert rated(opened("number", read="final"), "5", "The answer is 5, from 2 and 3") == 0.0
    assert rated(opened("number", read="final"), "5", "2 and 3. Answer: 5") == 1.0
    assert rated(opened("number", read="only"), "5", "2 and 3 are 5") == 0.0
    assert rated(opened("number", tolerance=0.05), "100", "104") == 1.0
    assert rated(opened("number", tolerance=0.03), "100", "104") == 0.0
    assert rated(opened("number", units=False), "100 km", "100") == 1.0
    assert rated(opened("number"), "5", "6", answers=["5", "6"]) == 1.0
    with pytest.raises(ValueError, match="question 0:a: expects 'five'; number needs one number there"):
        rated(opened("number"), "five", "5")
    with pytest.raises(ConfigError, match="tolerance is 1"):
        opened("number", tolerance=1.0)


def test_a_pattern_is_found_in_time_or_not_at_all() -> None:
    assert rated(opened("regular_expression"), r"^\d+$", "12") == 1.0
    assert rated(opened("regular_expression"), r"^\d+$", "12a") == 0.0
    assert rated(opened("regular_expression", pattern="YES", ignore_case=True), "anything", "oh yes") == 1.0
    assert rated(opened("regular_expression", pattern="yes", whole=True), "anything", "oh yes") == 0.0
    began = time.monotonic()
    endless = opened("regular_expression", timeout_seconds=0.1)
    assert rated(endless, r"(a|aa)+$", "a" * 60 + "b") == 0.0 and time.monotonic() - began < 60
    with pytest.raises(ConfigError, match="pattern: '\\(' is no regular expression: missing"):
        opened("regular_expression", pattern="(")
    with pytest.raises(ValueError, match="question 0:a: '\\[' is no regular expression"):
        rated(opened("regular_expression"), "[", "x")


def test_expressions_are_compared_in_a_process_that_may_be_ended() -> None:
    pytest.importorskip("math_verify")
    metric = opened("math", timeout_seconds=20.0)
    for expected, answer, right in (
        ("1/2", r"so it is $\frac{1}{2}$", True),
        ("$x^2+1$", r"the answer is \boxed{1+x^2}", True),
        ("3", "4", False),
        ("$1<x<2$", "$(1,2)$", True),
        ("$(1,2)$", "$1<x<2$", True),  # the other direction
        ("7", "nothing", False),
    ):
        assert rated(metric, expected, answer) == right, (expected, answer)
    metric.config.timeout_seconds = 1.0
    assert rated(metric, "1", "$9^{9^{9^{9^9}}}$") == 0.0
    assert rated(metric, "1", "9**9**9**9") == 0.0
    metric.config.timeout_seconds = 20.0
    assert rated(metric, "2", "$1+1$") == 1.0, "the next answer has a new process"
    worker = metric._worker
    del metric
    assert worker.wait(60) != 0, "the process ends with its metric"


TESTS = "assert double(2) == 4\nassert double(0) == 0"


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def double(x):\n    return 2 * x", True),
        ("Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.", True),
        ("```\nx = 1\n```\nand then\n```py\ndouble = lambda x: x + x\n```", True),
        ("def double(x):\n    return x ** 2 + 1", False),
        ("def double(x): return 2 * x\nraise SystemExit", False),
        ("It doubles a number.", False),
    ],
)
def test_programs_are_right_that_pass_their_tests(answer: str, right: bool) -> None:
    assert rated(opened("unit_tests", seconds=60.0), TESTS, answer) == right


def test_without_a_sandbox_no_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise NoSandbox("a program cannot be confined here: no")

    monkeypatch.setattr("molora.evaluate.metrics.programs.run_program", none)
    with pytest.raises(ConfigError, match="unit tests cannot be run safely here: a program cannot be"):
        opened("unit_tests")
    with pytest.raises(ConfigError, match="seconds is 0"):
        opened("unit_tests", seconds=0)


def test_the_last_fenced_piece_is_the_program() -> None:
    assert code_of("```python\na\n```\n```\nb\n```") == "b\n"
    assert code_of("```python\nopen = '`'\n```") == "open = '`'\n"
    assert code_of("x = 1") == "x = 1"
