"""A metric of mathematical answers, which are compared as expressions, in a process of their own."""

import json
import selectors
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from molora.config import ConfigError, require
from molora.evaluate.metrics import Judged, Mean

# For the worker's libraries to be imported on a busy machine.
_STARTS_WITHIN_SECONDS = 120.0


@dataclass(kw_only=True)
class MathConfig:
    """A comparison that takes `timeout_seconds`, or more memory than `memory_mib`, finds the answer wrong: it may be a
    tower of powers. `decimals` is how many digits after the point of rounded numbers are compared."""

    timeout_seconds: float = 5.0
    memory_mib: int = 2048
    decimals: int = 6

    def __post_init__(self) -> None:
        require(self, 256, "memory_mib")
        require(self, 0, "decimals")
        if not 0 < self.timeout_seconds <= 3600:
            raise ConfigError(f"timeout_seconds is {self.timeout_seconds:g}; give a number above 0, and 3600 at most")


class MathAnswer(Mean):
    """The share of answers that are equal to an accepted one as mathematical expressions, in LaTeX or plain: 1/2 is
    0.5. An expression is looked for in the answer's box, after "answer is", and anywhere. Which of the two is the
    expected one makes no difference: they are equal if one direction of the comparison says so.

    Source: math-verify (github.com/huggingface/Math-Verify), which finds, reads and compares the expressions."""

    config_type = MathConfig
    rates_each = True
    name = share = "math"

    def __init__(self, config: MathConfig) -> None:
        if find_spec("math_verify") is None or find_spec("antlr4") is None:
            raise ImportError("math needs math-verify: pip install 'molora[math]'")
        self.config = config
        self._worker: subprocess.Popen[bytes] | None = None

    def values(self, judged: Sequence[Judged]) -> list[float]:
        return [float(any(self.equal(expected, item.answer) for expected in item.answers)) for item in judged]

    def equal(self, expected: str, answer: str) -> bool:
        worker = self._worker or self._start()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps([expected, answer]).encode() + b"\n")
            worker.stdin.flush()
            said = self._said(worker, self.config.timeout_seconds)
        except BrokenPipeError:
            said = b""
        if not said:
            self._stop()
            return False
        return json.loads(said)

    def _start(self) -> subprocess.Popen[bytes]:
        told = {"memory_bytes": self.config.memory_mib * 2**20, "decimals": self.config.decimals}
        path = str(Path(__file__).with_name("math_worker.py"))
        self._worker = subprocess.Popen(
            [sys.executable, "-P", path, json.dumps(told)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        weakref.finalize(self, self._worker.kill)  # it waits for the next pair as long as there is a metric
        if self._said(self._worker, _STARTS_WITHIN_SECONDS) != b"ready\n":
            self._stop()
            raise ValueError("math: the process that compares did not start; --debug shows what it wrote")
        return self._worker

    def _said(self, worker: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The next line of the worker; empty if it has ended, or says nothing for so long."""
        assert worker.stdout is not None
        with selectors.DefaultSelector() as reading:
            reading.register(worker.stdout, selectors.EVENT_READ)
            return worker.stdout.readline() if reading.select(seconds) else b""

    def _stop(self) -> None:
        if (worker := self._worker) is not None:
            self._worker = None
            worker.kill()
            worker.communicate()
