"""A training step while another process is busy, by how threads wait for each other.

    python benchmarks/busy_machine.py [--repeats 5]

Three processes take the same steps in turn: as the command line sets it, with OMP_WAIT_POLICY=passive alone, and with
OpenMP's default. First on the idle machine, then beside a process that does nothing but count. By default threads spin
while they wait for each other. Where another process has the core of one, the others spin for all of its turn.

The step is `molora.train.loop.train_step` on the samples of mixed_step.py, with a backbone of 4 layers, width 256.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable

from molora.process import WAITING

WARMUPS = 2
POLICIES: dict[str, dict[str, str]] = {"molora": WAITING, "passive": {"OMP_WAIT_POLICY": "passive"}, "default": {}}


class Stepper:
    """A process that takes a step when asked."""

    def __init__(self, policy: str) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--steps"],
            env=environment | POLICIES[policy],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def milliseconds(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def take_steps() -> None:
    """One step a line of standard input; writes its milliseconds."""
    import torch
    from mixed_step import Molora, make_samples, milliseconds
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    ours = Molora(LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **sizes)).eval(), make_samples(), "cpu")
    for _ in sys.stdin:
        print(milliseconds(ours.step, "cpu"), flush=True)


def medians(steppers: dict[str, Stepper], repeats: int, tell: Callable[[str, float], None]) -> dict[str, float]:
    times: dict[str, list[float]] = {policy: [] for policy in steppers}
    for _ in range(repeats):
        for policy, stepper in steppers.items():
            times[policy].append(stepper.milliseconds())
            tell(policy, times[policy][-1])
    return {policy: statistics.median(taken) for policy, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each kind, taken in turn (default 5)")
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps:
        take_steps()
        return
    steppers = {policy: Stepper(policy) for policy in POLICIES}
    found: dict[str, dict[str, float]] = {}
    try:
        medians(steppers, WARMUPS, lambda policy, taken: None)
        for state in ("idle", "busy"):
            busy = [] if state == "idle" else [subprocess.Popen([sys.executable, "-c", "while True: pass"])]
            try:
                found[state] = medians(
                    steppers,
                    arguments.repeats,
                    lambda policy, taken, state=state: print(f"{state}, {policy}: {taken:.0f} ms", flush=True),
                )
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
    finally:
        for stepper in steppers.values():
            stepper.stop()
    print(f"\n{os.cpu_count()} cores\n\npolicy     idle ms   busy ms   busy / idle   idle / default's idle")
    for policy in POLICIES:
        idle, busy_ms = found["idle"][policy], found["busy"][policy]
        print(
            f"{policy:<8} {idle:>9.0f} {busy_ms:>9.0f} {busy_ms / idle:>13.2f} {idle / found['idle']['default']:>23.3f}"
        )


if __name__ == "__main__":
    main()
