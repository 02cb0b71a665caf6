"""The samples of each step, encoded in data workers.

torch gives every tensor that leaves a worker a shared file of its own, to be made, sent and mapped, and a step has
dozens of tensors: that took longer than encoding them. So the tensors of a step leave together, as one tensor of bytes.
Without workers they are joined as well, so that a step's tensors are the same, strides included, with workers or not.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from molora.data.sources import EncodedSamples, Skipped, check_samples
from molora.interrupt import leave_interrupts_to_parent
from molora.modality import Prepared
from molora.pack import Sample

# Where a tensor may begin among the bytes: a cache line, which every dtype divides.
_ALIGNED_BYTES = 64

# Where a tensor is among the bytes: its first byte and the one behind its last, its dtype, its shape.
_Place = tuple[int, int, torch.dtype, torch.Size]


def step_loader(
    dataset: EncodedSamples, *, first_step: int, steps: int, samples_per_step: int, rank: int, ranks: int, workers: int
) -> Iterator[list[Sample | Skipped]]:
    """Yields this rank's samples of each step from `first_step` on. Raises ConfigError if there are not enough of them,
    and ValueError for one that cannot be used."""
    check_samples(dataset.order, steps, samples_per_step, dataset.where)
    loader = DataLoader(
        _Caught(dataset),
        batch_sampler=(dataset.order.dealt(step, samples_per_step, rank, ranks) for step in range(first_step, steps)),
        collate_fn=join,
        num_workers=workers,
        worker_init_fn=leave_interrupts_to_parent,
        prefetch_factor=2 if workers else None,
    )
    for joined in loader:
        samples = joined.parted()
        for sample in samples:
            if isinstance(sample, ValueError):
                raise sample
        yield samples


@dataclass
class _Caught(Dataset[Any]):
    """Samples, and errors in the place of those that cannot be had: a worker that raises one adds its traceback."""

    samples: EncodedSamples

    def __getitems__(self, step: list[int]) -> list[Sample | Skipped | ValueError]:
        """The samples of a step, which torch asks for at once. What was prepared for one serves the others."""
        known: dict[Any, Prepared] = {}
        return [self._sample(k, known) for k in step]

    def _sample(self, k: int, known: dict[Any, Prepared]) -> Sample | Skipped | ValueError:
        try:
            return self.samples.encoded(k, known)
        except ValueError as error:
            return error


@dataclass(frozen=True)
class Joined:
    """A value whose tensors are joined into one tensor of bytes; `pickled` is the rest of it."""

    pickled: bytes
    tensor_bytes: Tensor

    def parted(self) -> Any:
        """The value, its tensors being views of the joined one."""
        return _Reader(self.pickled, self.tensor_bytes).load()


def join(value: Any) -> Joined:
    """Joins the tensors of any value that can be pickled; what is not plain and dense in memory is pickled as it is."""
    file = io.BytesIO()
    writer = _Writer(file)
    writer.dump(value)
    tensor_bytes = torch.empty(writer.num_bytes, dtype=torch.uint8)
    for tensor, (start, stop, dtype, shape) in writer.placed.values():
        tensor_bytes[start:stop].view(dtype).view(shape).copy_(tensor)
    return Joined(file.getvalue(), tensor_bytes)


class _Writer(pickle.Pickler):
    """Writes places instead of tensors; a tensor that is there twice has one place."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.num_bytes = 0
        self.placed: dict[int, tuple[Tensor, _Place]] = {}

    def persistent_id(self, obj: Any) -> _Place | None:
        if type(obj) is not Tensor or obj.layout != torch.strided or obj.device.type != "cpu" or obj.requires_grad:
            return None
        if id(obj) not in self.placed:
            stop = self.num_bytes + obj.numel() * obj.element_size()
            self.placed[id(obj)] = obj, (self.num_bytes, stop, obj.dtype, obj.shape)
            self.num_bytes = -(-stop // _ALIGNED_BYTES) * _ALIGNED_BYTES
        return self.placed[id(obj)][1]


class _Reader(pickle.Unpickler):
    def __init__(self, pickled: bytes, tensor_bytes: Tensor) -> None:
        super().__init__(io.BytesIO(pickled))
        self.tensor_bytes = tensor_bytes
        self.made: dict[_Place, Tensor] = {}

    def persistent_load(self, pid: _Place) -> Tensor:
        if pid not in self.made:
            start, stop, dtype, shape = pid
            self.made[pid] = self.tensor_bytes[start:stop].view(dtype).view(shape)
        return self.made[pid]
