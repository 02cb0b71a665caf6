"""The first signal is noted, its echo is nothing, and a second one acts."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from molora.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_acts_and_an_echo_of_the_first_does_not(number: signal.Signals) -> None:
    acted: list[int] = []
    before: Any = signal.signal(number, lambda number, frame: acted.append(number))
    try:
        with Interrupt() as interrupt:
            assert interrupt.number == 0
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert interrupt.number == number and not acted
            interrupt._noted -= 10
            signal.raise_signal(number)
            assert acted == [number]
    finally:
        signal.signal(number, before)
