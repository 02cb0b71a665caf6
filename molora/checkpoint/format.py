"""What the files of a checkpoint have in common: a format version, checked keys, tensors by name."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.received import TensorFile, check_finite, read_json
from molora.storage import check_shapes

FORMAT_VERSION = "1.0"
# A commit of the hub.
COMMIT = re.compile("[0-9a-f]{40}")
_KINDS = {str: "a text", dict: "values by name", int: "a whole number", list: "a list"}


def check_format(value: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a major format version this code does not know."""
    version = str(value.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        told = f"{path}: format version {version!r:.80}, this molora reads {FORMAT_VERSION}"
        raise ValueError(f"{told}; upgrade molora, or use the one that wrote it")


def read_described(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    return checked(read_json(path, path.parent), path, keys)


def checked(about: dict[str, Any], path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    check_format(about, path)
    if missing := [key for key in keys if key not in about]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; copy it again from where it was written")
    if wrong := [key for key, kind in keys.items() if not isinstance(about[key], kind)]:
        told = "; ".join(f"{key} is {about[key]!r:.80}, expected {_KINDS[keys[key]]}" for key in wrong)
        raise ValueError(f"{path}: {told}; copy it again from where it was written")
    return about


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill(parameters: Mapping[str, Tensor], path: Path, sha256: str | None, where: Path, *, finite: bool = True) -> None:
    """Copies a file's tensors, one by one, into parameters of the same names and shapes. Raises ValueError listing what
    does not fit before anything is read, for other bytes than those with the hash in `where`, and for numbers that are
    not finite; an encoder's masks may hold them."""
    with TensorFile(path, path.parent) as file:
        check_shapes(file.shapes, {key: parameter.shape for key, parameter in parameters.items()}, str(path))
        file.check_dtypes({key: parameter.dtype for key, parameter in parameters.items()})
        tensors = file.tensors(sha256, where)
        with torch.no_grad():
            for key, tensor in check_finite(tensors, str(path)) if finite else tensors:
                parameters[key].copy_(tensor)
