"""Modality folders, which stand alone: adapter, projector, encoder, and modality.json with their hashes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.checkpoint.assembly import Blueprint, blueprint
from molora.checkpoint.format import COMMIT, FORMAT_VERSION, checked, fill, read_described, tensor_hash
from molora.checkpoint.trust import Untrusted, find_received
from molora.config import ConfigError
from molora.modality import Modality, Origin, WeightSource
from molora.model import lora
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.plugins import Found, file_of
from molora.received import TensorFile, check_hash, check_name, copy_file, file_hash, listed_files, read_json_bytes
from molora.routing import TEXT
from molora.storage import check_shapes, write_atomically, write_json, write_tensors, write_text

# What is loaded of a modality's folder, if modality.json lists it.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_PROJECTOR = "projector.safetensors"
_ENCODER = "encoder.safetensors"
_MODALITY_KEYS = {
    **{"name": str, "plugin": str, "options": dict, "part_type": str, "frame_width": int, "projectors": list},
    **{"backbone": dict, "encoder": dict, "files": dict},
}


def save_modality(model: MoLoRA, name: str, plan: Blueprint, folder: Path, pristine: Mapping[str, str]) -> None:
    """Writes a modality's folder. `modality.json` comes last and holds the hashes of the others. The encoder is left
    out only if it can be fetched again: its origin is known, and its tensors still have the hash that they had when it
    was built (`pristine`)."""
    files: dict[str, Mapping[str, Tensor]] = {}
    encoder_hash, origin, options, width = tensor_hash({}), None, {}, 0
    if plan.modality is not None:
        encoder: Any = model.encoders[name]
        files[_PROJECTOR] = model.projectors[name].state_dict()
        encoder_hash, origin, width = tensor_hash(encoder.state_dict()), encoder.origin, encoder.width
        with_weights = origin is None or encoder_hash != pristine[name]
        if with_weights:
            files[_ENCODER] = encoder.state_dict()
        options = asdict(encoder.saved_config(with_weights) or plan.modality.config)
    for file, tensors in files.items():
        write_tensors(folder / file, tensors)
    names = sorted(files)
    if plan.adapter is not None:
        config, tensors = (folder / file for file in _ADAPTER)
        write_tensors(tensors, lora.adapter_tensors(model.backbone.model, name))
        write_text(config, lora.adapter_json(plan.adapter, model.backbone.identity.source))
        names += _ADAPTER
    widths, identity = (width, model.backbone.width), model.backbone.identity
    describe_modality(folder, name, plan, options, widths, identity, encoder_hash, origin, names)


def describe_modality(
    folder: Path,
    name: str,
    plan: Blueprint,
    options: Mapping[str, Any],
    widths: tuple[int, int],
    backbone: Identity,
    encoder_hash: str,
    origin: Origin | None,
    files: Sequence[str],
) -> None:
    """Writes `modality.json`, the last file of a modality's folder. `widths`: of its frames, and of the backbone."""
    for file in {_PROJECTOR, _ENCODER, *_ADAPTER} - set(files):
        (folder / file).unlink(missing_ok=True)
    write_json(
        folder / "modality.json",
        {
            "format_version": FORMAT_VERSION,
            "name": name,
            "plugin": plan.plugin,
            "plugin_sha256": plan.plugin_sha256,
            "options": options,
            "part_type": TEXT if plan.modality is None else plan.modality.part_type,
            "frame_width": widths[0],
            "backbone_width": widths[1],
            "projectors": [] if plan.modality is None else sorted(plan.modality.projectors()),
            "backbone": asdict(backbone),
            "encoder": {"hash": encoder_hash, "origin": None if origin is None else asdict(origin)},
            "files": {file: file_hash(folder / file) for file in files},
        },
    )


def copy_modality(source: Path, folder: Path) -> None:
    """Copies the files that a modality folder lists, byte by byte, and `modality.json`: last, as when it is saved.
    Raises ValueError for a file that does not have its hash; it is not written then."""
    path = source / "modality.json"
    about, data = read_json_bytes(path, source)
    for file, sha256 in listed_files(checked(about, path, _MODALITY_KEYS)["files"], path).items():
        write_atomically(folder / file, partial(copy_file, source / file, folder=source, sha256=sha256, where=path))
    write_atomically(folder / path.name, lambda temporary: temporary.write_bytes(data))


def files_in(folder: Path) -> list[Path]:
    """The files of a modality or a backbone, by name; hidden ones are not part of it."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def read_about(folder: Path) -> dict[str, Any]:
    """What a modality folder says of itself. Raises ConfigError or ValueError naming the file."""
    path = folder / "modality.json"
    if not path.is_file():
        told = f"{folder}: not a modality folder (no modality.json)"
        raise ConfigError(f"{told}; give one that a run wrote as modalities/<name>")
    about = read_described(path, _MODALITY_KEYS)
    check_name(about["name"], f'{path}: "name"')
    files = listed_files(about["files"], path)
    of_text = about["plugin"] == TEXT
    for file in (*(() if of_text else (_PROJECTOR,)), *(_ADAPTER if of_text or files.keys() & {*_ADAPTER} else ())):
        if file not in files:
            raise ValueError(f'{path}: "files" lacks {file}, which is loaded too; copy the whole folder again')
    for file in (_ENCODER, *_ADAPTER):
        if file not in files and (folder / file).exists():
            told = f"{folder / file}: is there, but {path} does not list it, so it would not be loaded"
            raise ValueError(f"{told}; take it away, or copy the whole folder again")
    sha256, origin = about["encoder"].get("hash"), about["encoder"].get("origin")
    texts = isinstance(origin, dict) and all(isinstance(origin.get(key), str) for key in ("source", "revision"))
    if not isinstance(sha256, str) or not (origin is None or texts):
        told = f'{path}: "encoder": hash is {sha256!r:.80} and origin {origin!r:.80}'
        raise ValueError(f"{told}, expected a text, and null or texts as source and revision; copy it again")
    if origin is None and _ENCODER not in about["files"] and not of_text:
        told = f'"files" lacks {_ENCODER}, and "encoder" says no origin where its weights are'
        raise ValueError(f"{path}: {told}; copy the whole folder again")
    return about


def read_blueprint(
    folder: Path, identity: Identity, name: str, trusted: Sequence[str | Found] = ()
) -> tuple[Blueprint, list[str]]:
    """Reads the description of a modality folder, to be called `name`, and checks it against the backbone. `trusted`
    are plugins that the folder may name though they do not come by name; see `molora.checkpoint.trust`. Returns its
    blueprint and warnings. Raises ConfigError or ValueError naming the file."""
    warnings = check_modality(folder, identity)
    plan = read_plan(folder, name, trusted)
    check_encoder(plan, folder)
    return plan, warnings


def check_modality(folder: Path, identity: Identity) -> list[str]:
    """Checks that a modality folder is whole and fits the backbone, without its plugin. Returns warnings, which do
    not name it. Raises ConfigError or ValueError naming the file."""
    path = folder / "modality.json"
    about = read_about(folder)
    warnings = identity.check(about["backbone"], str(path))
    for file, expected in about["files"].items():
        if not (folder / file).exists():
            raise ValueError(f"{folder / file}: missing, though {path} lists it; copy the whole folder")
        check_hash(file_hash(folder / file, folder), expected, folder / file, path)
    return warnings


def read_plan(folder: Path, name: str, trusted: Sequence[str | Found] = ()) -> Blueprint:
    """The blueprint of a modality folder, to be called `name`, whatever backbone and files it has. Raises ConfigError
    or ValueError naming the file."""
    path = folder / "modality.json"
    about = read_about(folder)
    may_run = partial(find_received, sha256=about.get("plugin_sha256"), trusted=trusted)
    try:
        plan = blueprint(name, about["plugin"], about["options"], None, str(path), saved=True, find=may_run)
    except Untrusted:
        raise
    except ConfigError as error:
        raise ConfigError(f"{error}; {_how_to_get_plugin(about['plugin'])}") from error
    if plan.modality is not None:
        _check_sources(plan.modality, about, path)
    sha256 = about["files"].get(_ADAPTER[0])
    adapter = None if sha256 is None else lora.read_adapter(folder, sha256, path)
    return replace(plan, adapter=adapter)


def _check_sources(modality: Modality, about: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for options that read a local path, or fetch what is not pinned to the origin's commit."""
    sources = list(_sources(modality.config))
    origin = about["encoder"]["origin"] or {}
    for source in sources:
        if source.path is not None:
            raise ConfigError(
                f"{path}: its options name the path {source.path!r:.200}, and a modality folder reads nothing outside "
                "itself; save the modality anew, with its encoder's weights"
            )
        if source.fetches and (source.revision != origin.get("revision") or not COMMIT.fullmatch(str(source.revision))):
            raise ConfigError(
                f"{path}: its options name {source.name!r:.200} on the hub at revision {source.revision!r:.80}, "
                f'expected the commit that "encoder" gives as its origin ({origin.get("revision")!r:.80}); write that '
                "commit there, or save the modality anew"
            )
    ours = type(modality).__module__.startswith("molora.encoders.")
    if ours and _ENCODER not in about["files"] and not any(source.fetches for source in sources):
        told = f"its encoder is neither in {_ENCODER} nor named on the hub by its options"
        raise ConfigError(f"{path}: {told}; copy the whole folder again")


def _sources(value: Any) -> Iterator[WeightSource]:
    """Wherever they stand among a modality's options."""
    if isinstance(value, WeightSource):
        yield value
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in fields(value)]
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _sources(item)


def check_encoder(plan: Blueprint, folder: Path) -> None:
    """Compares the tensors in a folder's encoder.safetensors with those of the encoder that its options describe. It is
    built without memory for its weights, so that no more is ever taken than the file holds. Raises ValueError."""
    if plan.modality is None or _ENCODER not in read_about(folder)["files"]:
        return
    try:
        with torch.device("meta"):
            encoder = plan.modality.build_encoder()
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if not type(plan.modality).__module__.startswith("molora."):
            return  # the user's code, which cannot be built so
        raise ValueError(f"{folder / 'modality.json'}: its options describe no encoder ({error!s:.300})") from error
    expected = {key: tensor.shape for key, tensor in encoder.state_dict().items()}
    try:
        with TensorFile(folder / _ENCODER, folder) as file:
            check_shapes(file.shapes, expected, str(folder / _ENCODER))
    except ValueError as error:
        raise ValueError(f"{error}; did the plugin's code change? train it anew, under another run=") from error


def _how_to_get_plugin(plugin: str) -> str:
    if file_of(plugin):
        return "a modality folder does not contain its plugin: get the file that made this one"
    return "install the package that brings its plugin, in the version that made the folder"


def load_modality(model: MoLoRA, name: str, folder: Path) -> None:
    """Fills a modality's modules from its folder. Raises ConfigError for what is no modality folder, ValueError listing
    tensors that do not fit."""
    path = folder / "modality.json"
    about = read_about(folder)
    files = about["files"]
    if about["plugin"] != TEXT:
        _load_media_modules(model, name, folder, about)
    if _ADAPTER[1] in files:
        fill(lora.adapter_tensors(model.backbone.model, name), folder / _ADAPTER[1], files[_ADAPTER[1]], path)


def _load_media_modules(model: MoLoRA, name: str, folder: Path, about: Mapping[str, Any]) -> None:
    """Fills encoder and projectors."""
    path, files = folder / "modality.json", about["files"]
    modality: Any = model.modalities[name]
    encoder: Any = model.encoders[name]
    now = {"part_type": modality.part_type, "frame_width": encoder.width, "projectors": sorted(modality.projectors())}
    if changed := [f"{key} was {about[key]!r}, is {now[key]!r}" for key in now if about[key] != now[key]]:
        told = f"{path}: plugin {about['plugin']!r} has changed since: {'; '.join(changed)}"
        raise ValueError(f"{told}; {_how_to_get_plugin(about['plugin'])}")
    fill(model.projectors[name].state_dict(), folder / _PROJECTOR, files[_PROJECTOR], path)
    if _ENCODER in files:
        try:
            fill(encoder.state_dict(), folder / _ENCODER, files[_ENCODER], path, finite=False)
        except ValueError as error:
            raise ValueError(f"{error}; did the plugin's code change? train it anew, under another run=") from error
    elif tensor_hash(encoder.state_dict()) != about["encoder"]["hash"]:
        told = f"{folder}: its encoder comes from {about['encoder']['origin']}"
        raise ValueError(f"{told}, whose tensors now have another hash than when the modality was saved")
