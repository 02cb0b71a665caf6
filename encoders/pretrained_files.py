"""Files of pretrained encoders: fetched from the Hugging Face hub, and read as their libraries wrote them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from molora import received
from molora.config import did_you_mean
from molora.modality import Origin
from molora.received import shard_names

# Beyond any encoder. The largest that is known is 15,360 wide, with 64 layers.
MAX_SIZE, MAX_LAYERS, MAX_LIST = 2**16, 1000, 16


def fetch(repository: str, revision: str | None, wanted: Sequence[str]) -> tuple[Path, Origin]:
    """The files of a repository whose names match a pattern in `wanted`, as a folder, and the commit they are of.

    Raises: ValueError if the hub has no such repository or cannot be reached and the files were not fetched before.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(wanted)))
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise ValueError(
            f"{repository} (revision {revision or 'main'}) cannot be fetched from the Hugging Face hub, of which "
            f"{', '.join(wanted)} is wanted: {error}; check the name, the network and the login, or give a local "
            "folder in path"
        ) from error
    return folder, Origin(repository, folder.name)


def shapes_only() -> bool:
    """Whether modules are being built on the meta device, where weights would be fetched and read for nothing."""
    return torch.get_default_device().type == "meta"


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The safetensors files of a folder: those in the index of `name`, or `name` itself.

    Raises: ValueError if one is missing, and for an index that names no files of its folder.
    """
    files = [folder / file for file in sorted(shard_names(folder, name))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: no {file.name} in this folder; weights are read from safetensors files")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is missing or no JSON object within bounds."""
    try:
        return received.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is the folder the right library's?") from error


def check_sizes(what: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes, numbers of layers or lists beyond those of any encoder, and for what is no plain
    value: all of it would be built before anything is compared with it."""
    for key, value in given.items():
        most = MAX_LAYERS if re.search("layers|depth|blocks", key) else MAX_SIZE
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        for item in items:
            if not isinstance(item, int | float | str | None):
                raise ValueError(f"{what}: {key} is {value!r:.80}, expected a number, a text or a list of numbers")
            if len(items) > MAX_LIST or (isinstance(item, int | float) and not -most <= item <= most):
                raise ValueError(
                    f"{what}: {key} is {value!r:.80}, allowed {most} at most, and {MAX_LIST} of them; is it a typing "
                    "mistake?"
                )


def check_keys(what: str, owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ValueError, with the nearest name that there is, for a key that `owner` does not take."""
    for key in given:
        if key not in known:
            raise ValueError(
                f"{what}: {owner} takes no {key!r} here; {did_you_mean(key, known)}it has {', '.join(known)}"
            )
