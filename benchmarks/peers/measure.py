"""Clocks, peaks and memory: how the comparisons measure."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

# Rounds that are run and not counted: memory is mapped and optimiser state made in them.
WARMUPS = 1


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Setup:
    """What every comparison is given. `folder` holds the checkpoint for both sides; `smollm` is the folder or hub id of
    SmolLM2-135M-Instruct."""

    folder: Path
    dtype: torch.dtype
    device: str
    rounds: int
    memory: bool = True
    smollm: str = "HuggingFaceTB/SmolLM2-135M-Instruct"

    def result(
        self, name: str, about: str, checks: list[str], rows: list[Row], machine: Machine | None = None
    ) -> Result:
        return Result(name, name_of(self.dtype), self.device, checks, rows, about, machine)


@dataclass
class Machine:
    """The fastest matrix product and copy that the machine showed while a comparison ran."""

    dtype: torch.dtype
    device: str
    flop_per_second: float = 0.0
    bytes_per_second: float = 0.0
    _buffers: list[torch.Tensor] = field(default_factory=list)

    def look(self) -> None:
        """Measures once more and keeps the best: a busy machine only makes things slower."""
        if not self._buffers:
            self._fill()
        a, b, out, source, target = self._buffers
        # The second factor lies as the weights of a linear layer do, which is the faster way where bf16 is emulated.
        taken = seconds_of(lambda: torch.mm(a, b.T, out=out), self.device)
        self.flop_per_second = max(self.flop_per_second, 2 * len(a) ** 3 / taken)
        taken = seconds_of(lambda: target.copy_(source), self.device)
        # A copy reads and writes.
        self.bytes_per_second = max(self.bytes_per_second, 2 * len(source) / taken)

    @property
    def held_bytes(self) -> int:
        """What the buffers of the measurement take of the device's memory."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _fill(self) -> None:
        """Makes matrices whose product takes 20 ms or so, if that is possible below 8,192 rows."""
        side, taken = 256, 0.0
        while taken < 0.02 and side < 8192:
            side *= 2
            factors = [torch.ones(side, side, dtype=self.dtype, device=self.device) for _ in range(3)]
            a, b, out = factors
            taken = min(seconds_of(lambda: torch.mm(a, b.T, out=out), self.device) for _ in range(2))  # noqa: B023
        num_bytes = 2**28 if self.device == "cpu" else 2**31
        copied = [torch.ones(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._buffers = [*factors, *copied]


def in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: str, machine: Machine | None = None
) -> dict[str, list[float]]:
    """Seconds of every side in every round. The sides take turns, so that what else runs on the machine hits all."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-WARMUPS, rounds):
        if machine is not None:
            machine.look()
        for name, work in sides.items():
            seconds = seconds_of(work, device)
            if number >= 0:
                taken[name].append(seconds)
    return taken


@dataclass
class Row:
    """What one side of a comparison took. `flop`: useful floating-point operations; `read_bytes`: bytes that must be
    read at least once; `step_bytes`: by how much memory grew; `at`: the place on the axis of a plot."""

    side: str
    seconds: list[float]
    flop: float | None = None
    read_bytes: float | None = None
    step_bytes: int | None = None
    at: float | None = None


@dataclass
class Result:
    """One comparison. The first row is molora's, and ratios are the others' seconds to it, round by round."""

    name: str
    dtype: str
    device: str
    checks: list[str]
    rows: list[Row]
    about: str
    machine: Machine | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "device": self.device,
            "about": self.about,
            "checks": self.checks,
            "rows": [self._row(row) for row in self.rows],
            "matrix_product_flop_per_second": self.machine and self.machine.flop_per_second,
            "copy_bytes_per_second": self.machine and self.machine.bytes_per_second,
            "environment": environment(self.device),
        }

    def _row(self, row: Row) -> dict[str, Any]:
        if not row.seconds:
            return {"side": row.side, "at": row.at, "step_bytes": row.step_bytes}
        ours = self.rows[0].seconds
        ratios = [theirs / mine for theirs, mine in zip(row.seconds, ours, strict=True)]
        best, peak = min(row.seconds), self.machine
        share = row.flop and peak and row.flop / best / peak.flop_per_second
        copied = row.read_bytes and peak and row.read_bytes / best / peak.bytes_per_second
        return {
            "side": row.side,
            "at": row.at,
            "seconds": row.seconds,
            "best": best,
            "median": statistics.median(row.seconds),
            "ratio": statistics.median(ratios),
            "ratio_of_best": best / min(ours),
            "ratios": [min(ratios), max(ratios)],
            "share_of_matrix_product": share,
            "share_of_copy": copied,
            "step_bytes": row.step_bytes,
        }

    def table(self) -> str:
        """At most 80 columns."""
        lines = [f"{self.name}, {self.dtype}, {self.device}", *(f"  {check}" for check in self.checks)]
        lines.append(f"{'':<26}{'best':>9}{'median':>9}{'ratio':>7}{'spread':>14}{'share':>7}{'MB':>7}")
        for row in self.as_json()["rows"]:
            if "seconds" not in row:
                lines.append(f"{row['side']:<65.65}{row['step_bytes'] / 1e6:>14.0f}")
                continue
            share, _ = bounding_share(row)
            memory = row["step_bytes"]
            lines.append(
                f"{row['side']:<26.26}{_time(row['best']):>9}{_time(row['median']):>9}{row['ratio']:>7.2f}"
                f"{row['ratios'][0]:>7.2f}-{row['ratios'][1]:<6.2f}"
                f"{'' if share is None else f'{share:.2f}':>7}{'' if memory is None else f'{memory / 1e6:.0f}':>7}"
            )
        return "\n".join(lines)


def bounding_share(row: Mapping[str, Any]) -> tuple[float | None, str]:
    """The share of the machine's peak that a row of a result comes nearest to, and of which: of the product or copy."""
    shares = [(row[f"share_of_{key}"], word) for key, word in (("matrix_product", "product"), ("copy", "copy"))]
    return max((each for each in shares if each[0]), default=(None, ""))


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def environment(device: str) -> dict[str, Any]:
    """What figures depend on, without the machine's name."""
    processor = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
        processor = next((value.strip() for key, value in lines.items() if key.strip() == "model name"), processor)
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": f"{processor}, {capability}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "card": None if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def step_bytes(work: Callable[[], object], device: str) -> int:
    """By how much memory grows at most while `work` runs. On a CPU: resident memory of this process (Linux)."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from what is resident now
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def step_bytes_apart(comparison: str, side: str, setup: Setup) -> int:
    """`step_bytes` of a side in a process of its own, in which no other has left memory behind."""
    # Every large tensor is mapped by itself and unmapped when it goes, so that resident memory is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    given = [comparison, "--memory-of", side, "--folder", str(setup.folder), "--dtype", name_of(setup.dtype)]
    command = [sys.executable, "-m", "benchmarks.peers", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def relative_difference(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The norm of the difference by the norm of the reference."""
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


def check(what: str, found: float, allowed: float) -> str:
    """A line for the report. Raises RuntimeError if the sides do not compute the same: a time would mean nothing."""
    if not found <= allowed:
        raise RuntimeError(
            f"{what}: molora and its peer differ by {found:.2e}, allowed {allowed:.0e}; nothing was timed"
        )
    return f"{what}: {found:.1e} apart"
