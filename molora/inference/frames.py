"""Frames of media that appear again: the next turn of a chat, many questions about one picture.

Letters: S frames, C encoder width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molora.checkpoint.format import tensor_hash
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample


class FrameMemory:
    """Frames of the items that were seen last, by a hash of what was prepared of them, in `max_bytes` at most.

    Items that are not known are encoded together, and each by itself if the model is to be deterministic: a pack's
    other items may change the last bits of its frames. What an encoder gave before its weights changed is forgotten.
    """

    def __init__(self, model: MoLoRA, max_bytes: int) -> None:
        self.model = model
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._frames: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._weights: dict[str, list[tuple[int, int]]] = {}

    @torch.no_grad()
    def fill(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples, with the frames of all their items."""
        keys = {
            id(item): (item.modality, tensor_hash(item.prepared.tensors))
            for sample in samples
            for item in sample.items
            if item.frames_SC is None
        }
        known: dict[tuple[str, str], Tensor] = {}
        for name in sorted({name for name, _ in keys.values()}):
            self._forget_if_changed(name)
            items = {keys[id(item)]: item for sample in samples for item in sample.items if id(item) in keys}
            its = {key: item for key, item in items.items() if key[0] == name}
            known |= {key: self._frames[key] for key in its if key in self._frames}
            unknown = [key for key in its if key not in known]
            groups = [[key] for key in unknown] if self.model.deterministic_batch else [unknown] if unknown else []
            for group in groups:
                frames = self.model.frames(*(its[key] for key in group))
                # Copies, as what is kept of one item should not keep the others.
                parts = [frames_SC.clone() for frames_SC in frames.frames_SC.split(frames.lengths)]
                known |= dict(zip(group, parts, strict=True))
        for key, frames_SC in known.items():
            self._keep(key, frames_SC)

        def filled(item: Item) -> Item:
            return replace(item, frames_SC=known[keys[id(item)]]) if id(item) in keys else item

        return [replace(sample, items=tuple(map(filled, sample.items))) for sample in samples]

    def _keep(self, key: tuple[str, str], frames_SC: Tensor) -> None:
        if key not in self._frames and frames_SC.nbytes <= self.max_bytes:
            self._frames[key] = frames_SC
            self.num_bytes += frames_SC.nbytes
        if key in self._frames:
            self._frames.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._frames.popitem(last=False)[1].nbytes

    def _forget_if_changed(self, name: str) -> None:
        encoder: Any = self.model.encoders[name]
        weights = [(tensor.data_ptr(), tensor._version) for tensor in (*encoder.parameters(), *encoder.buffers())]
        if self._weights.setdefault(name, weights) != weights:
            self._weights[name] = weights
            for key in [key for key in self._frames if key[0] == name]:
                self.num_bytes -= self._frames.pop(key).nbytes
