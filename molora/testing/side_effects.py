"""What code changes beside what it should: fingerprints of values, and the state that a whole process shares."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
SETTINGS: _State = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the choice of deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the precision of matrix products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
}


def shared_state() -> dict[str, Any]:
    """The settings and generators that everything in this process shares, by what they are called in messages."""
    return {name: read() for name, (read, _) in {**SETTINGS, **GENERATORS}.items()}


def put_back(before: Mapping[str, Any]) -> list[str]:
    """Restores the shared state, and names what of it had changed."""
    now = shared_state()
    changed = [name for name in before if fingerprint(now[name]) != fingerprint(before[name])]
    for name in changed:
        {**SETTINGS, **GENERATORS}[name][1](before[name])
    return changed


def scramble(seed: int) -> None:
    """Gives all global generators a state that belongs to `seed`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
