"""The processes that train together, and the device of each."""

import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from molora.config import ConfigError
from molora.shard import Shard

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

    @property
    def shard(self) -> Shard:
        """The rows that this process takes of those that all go through."""
        return Shard(self.index, self.count)

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


def launched_ranks(name: str | None = None) -> Ranks:
    """The ranks that this process was launched with, on the device named, or on the one that accelerate finds. Raises
    ConfigError for a device that is not there, or that all ranks would share."""
    from accelerate import Accelerator

    _begin_again()
    if name is None:
        # Told of no device, accelerate takes ranks on CPUs for processes that know nothing of each other.
        return _Launched(Accelerator(cpu=not torch.accelerator.is_available()))
    device = pick_device(name)
    if device.type != "cpu" and device.index is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(f"device: {name} is one device, and every rank has its own; give {device.type}")
        torch.accelerator.set_device_index(device.index)
    ranks = _Launched(Accelerator(cpu=device.type == "cpu"))
    if ranks.device.type != device.type:
        raise ConfigError(f"device: is {name}, but accelerate runs this process on {ranks.device}; give that one")
    return ranks


def _begin_again() -> None:
    """Makes the group of processes that torchrun has started again. Newer versions of it give every attempt the same
    store, where the addresses of processes lie that have gone. Raises ConfigError on several machines, which do not
    agree on the number of the attempt."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if os.environ["WORLD_SIZE"] != os.environ["LOCAL_WORLD_SIZE"]:
        raise ConfigError(
            "torchrun has started the processes again with the store of those before; give it a new one each time: "
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all machines"
        )
    from torch.distributed import init_process_group
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, index, count = next(rendezvous("env://"))
    init_process_group(store=PrefixStore(f"attempt {attempt}", store), rank=index, world_size=count)


def pick_device(name: str | None = None) -> torch.device:
    """The device named, else the first GPU, else the CPU. Raises ConfigError for one that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        torch.ones(1, device=device).item()  # which "meta" has no value for
    except (RuntimeError, AssertionError) as error:  # an AssertionError if torch was built without the device
        told = str(error).partition("\n")[0][:200]
        raise ConfigError(f"device: {name!r} is none of this machine ({told}); give cpu, or leave it out") from error
    return device
