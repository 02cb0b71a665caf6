"""The processes that train together."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class Ranks:
    """This process among those that work together; by itself, it is alone. `device` is where its model lies."""

    index = 0
    count = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor."""
        return tensor

    def gather(self, items: list[_T]) -> list[_T]:
        """The items of every rank, in the order of ranks."""
        return items

    def wait(self) -> None:
        """Returns when every rank has come here."""


class _Launched(Ranks):
    """Ranks that a launcher such as torchrun started."""

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.device)
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self._accelerator = accelerator

    def sum(self, tensor: Tensor) -> Tensor:
        return self._accelerator.reduce(tensor, "sum")

    def gather(self, items: list[_T]) -> list[_T]:
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def launched_ranks(device: str | None = None) -> Ranks:
    """The ranks that this process was launched with, on the device named, or on the first that accelerate finds."""
    from accelerate import Accelerator

    return _Launched(Accelerator(cpu=device == "cpu"))
