"""Every attack runs under the same watch: it may not run its code, hang, or fill the memory."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import datasets  # noqa: F401
import pytest
import soundfile  # noqa: F401
import torchaudio  # noqa: F401

# What attacks import takes seconds the first time, which are not theirs.
from tests.watch import Hung

# Of this process. On a quiet machine no attack takes over 5 seconds; neighbours that share its cores stretch processor
# time too, by up to three times. What waits for nothing gets longer still.
MAX_PROCESSOR_SECONDS = 15
MAX_CLOCK_SECONDS = 60
MAX_BYTES = 2**30


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that an attack's code, or a write to the wrong place, would make. It must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the attack's code ran, or its file was written"


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """Fails an attack that takes over 15 seconds of processor time, a minute of waiting, or a gibibyte."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung(f"hangs: over {MAX_PROCESSOR_SECONDS} s at work or {MAX_CLOCK_SECONDS} s in all")

    gc.collect()
    gc.freeze()  # what is there now need not be looked through before every test
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _kibibytes("VmRSS")
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, MAX_PROCESSOR_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_CLOCK_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    taken = (_kibibytes("VmHWM") - before) * 1024
    assert taken < MAX_BYTES, f"took {taken / 2**20:.0f} MiB"


def _kibibytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
