"""Ctrl-C, SIGTERM and SIGUSR1: the first is noted, so that work ends at a good place, and the second acts at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

# Schedulers of clusters send SIGUSR1 some time before they take a machine away.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# One signal may come twice: from a terminal or a scheduler, which reach every process, and from the launcher, which
# passes on what it got. What comes so soon is no second one.
_ECHO_SECONDS = 2.0


class Stopped(KeyboardInterrupt):
    """Work was stopped by a signal, at a place from which it goes on; the message says how. It is empty where another
    process says so."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = 128 + number

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, int]]:
        return type(self), (str(self), self.number)


class Interrupt:
    """While entered, notes the first signal that asks this process to stop in `number`, which is 0 before it. Outside
    the main thread, where Python takes no signals, it notes none."""

    def __init__(self) -> None:
        self.number = 0
        self._noted = 0.0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data worker that was forked from it
            self.__exit__()
        elif not self.number:
            self.number, self._noted = number, time.monotonic()
        elif time.monotonic() - self._noted > _ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)


def leave_interrupts_to_parent(worker: int = 0) -> None:
    """For a data worker: Ctrl-C in a terminal, or what a scheduler sends, reaches it too, and it must serve its parent
    until that is done. It ends when its parent does."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
