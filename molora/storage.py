"""Files that survive a kill: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_MAX_NAMED = 8


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)`, then makes the result appear at `path` in one step."""
    _write(path, path.with_name(f".{path.name}.tmp"), write)


def write_shared(path: Path, write: Callable[[Path], object]) -> None:
    """The same for a file that several processes may make at once, each under a temporary name of its own."""
    _write(path, path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), write)


def _write(path: Path, temporary: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError naming the file if it is not whole safetensors."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from error


def check_shapes(found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], where: str) -> None:
    """Compares shapes by tensor name. Raises ValueError listing what is unknown, missing or of another shape."""
    problems = [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [
        f"{key} is {tuple(found[key])}, expected {tuple(expected[key])}"
        for key in sorted(found.keys() & expected.keys())
        if tuple(found[key]) != tuple(expected[key])
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
        raise ValueError(f"{where}: the tensors do not fit: {'; '.join(problems[:_MAX_NAMED])}{more}")


def cache_folder() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("MOLORA_CACHE", "~/.cache/molora")).expanduser()


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file if it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
