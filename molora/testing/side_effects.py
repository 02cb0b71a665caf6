"""What code does beside what it should: fingerprints of values, the state that a whole process shares, and a modality
plugin at work in other processes, as data workers hold one.

This file imports nothing that a plugin must not, so that it can tell what importing the plugin brings with it.
"""

import hashlib
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, are_deterministic_algorithms_enabled, use_deterministic_algorithms
from torch.backends import cudnn
from torch.utils.data import DataLoader, Dataset

from molora.modality import Modality, Prepared
from molora.plugins import resolve

# What only training and inference need; a data worker that loads it starts late and holds much.
MODEL_FILES = ("molora.model.backbone", "molora.model.molora")

_TIMEOUT_SECONDS = 180


def fingerprint(value: Any) -> str:
    """A hash of everything inside a value: values of equal content have equal ones."""
    digest = hashlib.sha256()
    _feed(value, digest.update, ())
    return digest.hexdigest()


def _feed(value: Any, update: Callable[[bytes], None], above: tuple[int, ...]) -> None:
    """Hands the content of a value to `update`. `above` are the objects that it lies in, and may refer to."""
    update(f"<{type(value).__qualname__}>".encode())
    if id(value) in above:
        return
    inside: Any = ()
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)} {value.device}".encode())
        if value.device.type != "meta":
            update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, memoryview):
        update(bytes(value))
    elif isinstance(value, Mapping):
        inside = sorted(value.items(), key=lambda entry: repr(entry[0]))
    elif isinstance(value, (set, frozenset)):
        inside = sorted(value, key=repr)
    elif isinstance(value, (list, tuple, np.ndarray)):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inside = [vars(value)]
    elif type(value).__repr__ is not object.__repr__:  # that one holds an address, and nothing of the content
        update(repr(value).encode())
    for item in inside:
        _feed(item, update, (*above, id(value)))
    update(b"</>")


_State = dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]
GENERATORS: _State = {
    "the state of torch's global generator": (torch.get_rng_state, torch.set_rng_state),
    "the state of numpy's global generator": (np.random.get_state, np.random.set_state),
    "the state of Python's global generator": (random.getstate, random.setstate),
}
_SHARED: _State = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the choice of deterministic algorithms": (are_deterministic_algorithms_enabled, use_deterministic_algorithms),
    "the precision of matrix products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.deterministic": (lambda: cudnn.deterministic, lambda value: setattr(cudnn, "deterministic", value)),
    "cudnn.benchmark": (lambda: cudnn.benchmark, lambda value: setattr(cudnn, "benchmark", value)),
    **GENERATORS,
}


def shared_state() -> dict[str, Any]:
    """The settings and generators that everything in this process shares, by what they are called in messages."""
    return {name: read() for name, (read, _) in _SHARED.items()}


def put_back(before: Mapping[str, Any]) -> list[str]:
    """Restores the shared state, and names what of it had changed."""
    now = shared_state()
    changed = [name for name in before if fingerprint(now[name]) != fingerprint(before[name])]
    for name in changed:
        _SHARED[name][1](before[name])
    return changed


def scramble(seed: int) -> None:
    """Gives all global generators a state that belongs to `seed`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


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
    the plugin brought with it. Raises RuntimeError with the error of the plugin. It is a program of its own, and not
    multiprocessing's, which would run the caller's main module again."""
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
