"""Pretrained encoders: their options, and their files, fetched from the Hugging Face hub or read from a folder."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from molora import received
from molora.config import did_you_mean
from molora.hub import HubError, fetch_snapshot
from molora.modality import Origin, WeightSource

Source = TypeVar("Source", bound=WeightSource)
# Whose output an encoder gives: that of a block, counted from the end, or of what comes after the last one.
Layer = int | Literal["final"]

# Beyond any encoder. The largest that is known is 15,360 wide, with 64 layers.
MAX_SIZE, MAX_LAYERS, MAX_LIST = 2**16, 1000, 16


def fetch(repository: str, revision: str | None, wanted: Sequence[str]) -> tuple[Path, Origin]:
    """The files of a repository whose names match a pattern in `wanted`, as a folder, and the commit they are of.
    Raises ValueError if the hub has no such repository or cannot be reached and the files were not fetched before."""
    try:
        folder = fetch_snapshot(repository, revision, wanted)
    except HubError as error:
        raise ValueError(
            f"{repository} (revision {revision or 'main'}) cannot be fetched from the Hugging Face hub, of which "
            f"{', '.join(wanted)} is wanted: {error}; check the name, the network and the login, or give a local "
            "folder in path"
        ) from error
    return folder, Origin(repository, folder.name)


def locate(config: WeightSource, repository: str | None, wanted: Sequence[str]) -> tuple[Path | None, Origin | None]:
    """The file or folder to read: `path`, or the repository's files that `wanted` names, with the commit they are of.
    Raises ValueError for a path where nothing is, and as `fetch` does."""
    if config.path is None:
        return (None, None) if repository is None else fetch(repository, config.revision, wanted)
    path = Path(config.path)
    if not path.exists():
        raise ValueError(f"path {path}: no such file or folder; give what its library saved")
    return path, None


def from_scratch(config: Source, **changes: Any) -> Source:
    """The options that build the same encoder with random weights, from nothing outside themselves."""
    return replace(config, **{"name": None, "path": None, "revision": None, "pretrained": False, **changes})


def to_save(config: Source, scratch: Source, origin: Origin | None, with_weights: bool) -> Source:
    """The options to save with an encoder. With its weights beside them, those that build it from scratch; else those
    that it was built from, pinned to the commit of its origin."""
    if with_weights or origin is None:
        return scratch if with_weights else config
    return replace(config, revision=origin.revision)


def shapes_only() -> bool:
    """Whether modules are being built on the meta device, where weights would be fetched and read for nothing."""
    return torch.get_default_device().type == "meta"


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """The safetensors files of a folder: those in the index of `name`, or `name` itself. Raises ValueError if one is
    missing, and for an index that names no files of its folder."""
    files = [folder / file for file in sorted(received.shard_names(folder, name))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"{folder}: no {missing.name} in this folder; weights are read from safetensors files")
    return files


def read_weights(
    source: Path, name: str = "model.safetensors", prefixes: Sequence[str] = ("",), unused: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """The tensors of a weights file, or of the safetensors files of a folder. A pickle is read only if it is named. Of
    `prefixes`, the first that names begin with is taken off, and what does not begin with it is left out, as is what
    then begins with one of `unused`."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    if source.is_file() and source.suffix != ".safetensors":
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
    else:
        for file in [source] if source.is_file() else weight_files(source, name):
            state |= load_file(file)
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)), "")
    inner = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return {key: tensor for key, tensor in inner.items() if not key.startswith(unused)}


def load_transformers(model_type: Any, sizes: Any, state: dict[str, Tensor], where: str) -> Any:
    """A model of transformers with these weights, in fp32. Raises ValueError if some are missing or do not fit."""
    reporting = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # so that the report names all
    model, report = model_type.from_pretrained(
        None, config=sizes, state_dict=state, dtype=torch.float32, trust_remote_code=False, **reporting
    )
    kinds = {"missing": "missing_keys", "unexpected": "unexpected_keys", "of another shape": "mismatched_keys"}
    found = {kind: sorted(report[keys]) for kind, keys in kinds.items()}
    if any(found.values()):
        counts = ", ".join(f"{len(keys)} {kind} (such as {keys[:3]})" for kind, keys in found.items() if keys)
        raise ValueError(f"{where}: not the weights of this encoder: {counts}")
    return model


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is missing or no JSON object within bounds."""
    try:
        return received.read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); is the folder the right library's?") from error


def check_source(config: WeightSource, layer: Layer | None) -> None:
    """Raises ValueError for a revision of nothing, and for a layer that does not count from the end."""
    if config.revision is not None and (config.path or not config.name):
        raise ValueError(f"revision {config.revision!r} is for weights named on the hub: give a name and no path")
    if isinstance(layer, int) and layer >= 0:
        raise ValueError(f"layer counts from the end and is negative, -1 being the last; got {layer}")


def num_kept(layer: Layer, depth: int, where: str) -> int:
    """How many of `depth` blocks an encoder needs so that `layer`, counted from the end, is its last; all of them for
    `final`. Raises ValueError for more than it has."""
    if layer == "final":
        return depth
    if not -depth <= layer:
        raise ValueError(f"{where}: layer {layer} asked for, but the encoder has {depth} blocks")
    return depth + layer + 1


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


def check_options(what: str, owner: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises ValueError, with the nearest name that there is, for a key that `owner` does not take, and as
    `check_sizes` does."""
    for key in given:
        if key not in known:
            near = did_you_mean(key, known)
            raise ValueError(f"{what}: {owner} takes no {key!r} here; {near}it has {', '.join(known)}")
    check_sizes(what, given)
