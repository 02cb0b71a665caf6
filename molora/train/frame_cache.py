"""Frames of frozen encoders, kept on disk: an item is encoded once, however many epochs see it.

Letters: S frames, C encoder width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.checkpoint.format import tensor_hash
from molora.model.molora import MoLoRA
from molora.pack import Item, Sample
from molora.received import read_tensors
from molora.storage import save_tensors, write_cached


class FeatureCache:
    """The frames of every item of a modality whose encoder is frozen, one safetensors file each.

    A file's name is a hash of the encoder's weights, the modality's options, the dtype and the prepared item, so a
    folder can be shared by runs and never gives stale frames. Items that are missing are encoded one at a time: frames
    are then the same bits whichever samples they came with, and a run is the same whether it found them or made them.
    """

    def __init__(self, folder: Path, model: MoLoRA) -> None:
        self.folder = folder
        self.model = model
        self._keys: dict[str, str] = {}
        for name, encoder in model.encoders.items():
            if not any(p.requires_grad for p in encoder.parameters()):
                about: Any = [type(encoder).__qualname__, tensor_hash(encoder.state_dict())]
                about += [asdict(model.modalities[name].config), str(model.backbone.model.dtype)]
                self._keys[name] = json.dumps(about, sort_keys=True, default=str)

    def fill(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same samples, with the frames of items whose encoder is frozen."""
        return [self._with_frames(sample) for sample in samples]

    def _with_frames(self, sample: Sample) -> Sample:
        rejected = None if sample.rejected is None else self._with_frames(sample.rejected)
        return replace(sample, items=tuple(map(self._filled, sample.items)), rejected=rejected)

    def _filled(self, item: Item) -> Item:
        if item.modality not in self._keys:
            return item
        about = self._keys[item.modality] + tensor_hash(item.prepared.tensors)
        key = hashlib.sha256(about.encode()).hexdigest()[:40]
        path = self.folder / item.modality / key[:2] / f"{key}.safetensors"
        frames_SC = self._kept(path, item)
        if frames_SC is None:
            frames_SC = self.model.frames(item).frames_SC.cpu().contiguous()
            write_cached(path, lambda temporary: save_tensors({"frames_SC": frames_SC}, temporary))
        return replace(item, frames_SC=frames_SC)

    def _kept(self, path: Path, item: Item) -> Tensor | None:
        """The frames in a file; None if there is none, or a damaged one, which is made again."""
        try:
            frames_SC = read_tensors(path).get("frames_SC")
        except (OSError, ValueError):
            return None
        encoder: Any = self.model.encoders[item.modality]
        return frames_SC if frames_SC is not None and frames_SC.shape[1:] == (encoder.width,) else None
