"""Seconds of a training step by phase, from a clock that is read once a step."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Waiting for samples and packing them, encoders, the rest of the forward pass, the backward pass, updates, all else.
PHASES: tuple[str, ...] = ("loading", "encoding", "forward", "backward", "optimizer", "other")


class PhaseClock:
    """Time belongs to one phase until the next begins. On CUDA the marks between phases are events in the device's
    queue, since the host runs ahead of the device; they are read together, at the end of a step."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.above: list[str] = []

    def start(self, phase: str) -> None:
        """Begins a step with a phase; what was not read is forgotten."""
        self.marks = [(phase, self._now())]
        self.above = []

    def to(self, phase: str) -> None:
        """Ends the phase under way and begins another; nothing before `start`."""
        if self.marks:
            self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Ends the step. Seconds of all phases; on CUDA this waits until the device has done what it was asked."""
        seconds = dict.fromkeys(PHASES, 0.0)
        self.to("other")
        if self.on_cuda:
            self.marks[-1][1].synchronize()
        for (phase, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin
        self.marks = []
        return seconds

    def watch(self, encoders: Iterable[nn.Module]) -> None:
        """Counts every call of these modules as encoding, wherever it comes from."""
        for encoder in encoders:
            encoder.register_forward_pre_hook(self._enter)
            encoder.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *given: object) -> None:
        self.above.append(self.marks[-1][0] if self.marks else "other")
        self.to("encoding")

    def _leave(self, *given: object) -> None:
        self.to(self.above.pop())

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
