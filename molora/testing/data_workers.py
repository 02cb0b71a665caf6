"""A modality plugin at work in other processes, as data workers hold one.

This file imports nothing that a plugin must not, so that it can tell what importing the plugin brings with it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from molora.modality import Modality, Prepared
from molora.plugins import resolve

# What only training and inference need; a data worker that loads it starts late and holds much.
MODEL_FILES = ("molora.model.backbone", "molora.model.molora")

_TIMEOUT_SECONDS = 180


def prepare(modality: Modality, part: Mapping[str, Any], seed: int | None) -> Prepared:
    """A part as a worker prepares it; `seed` drives augmentation, None means none."""
    return modality.prepare(modality.load(part), None if seed is None else torch.Generator().manual_seed(seed))


class Parts(Dataset[Prepared]):
    """The parts of a worker, prepared without augmentation at even places and with it at odd ones."""

    def __init__(self, modality: Modality, parts: Sequence[Mapping[str, Any]], seed: int) -> None:
        self.modality, self.parts, self.seed = modality, parts, seed

    def __len__(self) -> int:
        return 2 * len(self.parts)

    def __getitem__(self, index: int) -> Prepared:
        return prepare(self.modality, self.parts[index // 2], self.seed if index % 2 else None)


def forked(parts: Parts) -> list[Prepared]:
    """Parts as a forked data worker prepares them. Raises what the plugin raises there."""
    worker: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": _TIMEOUT_SECONDS}
    (prepared,) = DataLoader(parts, batch_size=len(parts), collate_fn=list, **worker)
    return prepared


def spawned(parts: Parts, spec: str, folder: Path) -> tuple[list[Prepared], list[str]]:
    """Parts as a worker prepares them that starts from nothing, as spawned ones do, and the model files that importing
    the plugin brought with it. Raises RuntimeError with the error of the plugin.

    It is a program of its own, and not multiprocessing's, which would run the caller's main module again.
    """
    order, result = folder / "order.pickle", folder / "result.pickle"
    order.write_bytes(pickle.dumps((spec, pickle.dumps(parts))))
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(order), str(result)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_SECONDS,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return pickle.loads(result.read_bytes())


def _work(order: Path, result: Path) -> None:
    torch.set_num_threads(1)  # as in a data worker
    spec, pickled = pickle.loads(order.read_bytes())
    resolve("modality", spec)  # a class of a file unpickles only where that file has been imported
    imported = [name for name in MODEL_FILES if name in sys.modules]
    parts = pickle.loads(pickled)
    result.write_bytes(pickle.dumps(([parts[index] for index in range(len(parts))], imported)))


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
