"""What a run leaves on disk: modality folders that stand alone, the run's molora.json, and states to resume from."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import lora
from molora.assembly import Blueprint, RouterConfig, RouterPlan, blueprint, router_plan
from molora.backbone import Identity
from molora.config import ConfigError
from molora.modality import Origin
from molora.model import MoLoRA
from molora.plugins import Found, file_of
from molora.storage import read_json, read_tensors, sync, write_atomically, write_json, write_tensors, write_text
from molora.trust import Untrusted, find_received

FORMAT_VERSION = "1.0"
_ROUTER = "router.safetensors"
_MODALITY_KEYS = ("name", "plugin", "options", "part_type", "frame_width", "projectors", "backbone", "encoder", "files")
_RUN_KEYS = ("backbone", "modalities", "router")


def check_format(value: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a major format version this code does not know."""
    version = str(value.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise ValueError(
            f"{path}: format version {version!r}, this molora reads {FORMAT_VERSION}; upgrade molora, or use "
            "the one that wrote it"
        )


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    about = read_json(path)
    check_format(about, path)
    if missing := [key for key in keys if key not in about]:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; copy it again from where it was written")
    return about


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


# Modality folders ------------------------------------------------------------------------------------------------


def save_modality(model: MoLoRA, name: str, plan: Blueprint, folder: Path, pristine: Mapping[str, str]) -> None:
    """Writes a modality's folder. `modality.json` comes last and holds the hashes of the others.

    The encoder is left out only if it can be fetched again: its origin is known, and its tensors still have the hash
    that they had when it was built (`pristine`).
    """
    files: dict[str, Mapping[str, Tensor]] = {"projector.safetensors": model.projectors[name].state_dict()}
    encoder: Any = model.encoders[name]
    encoder_hash = tensor_hash(encoder.state_dict())
    origin: Any = encoder.origin
    with_weights = origin is None or encoder_hash != pristine[name]
    if with_weights:
        files["encoder.safetensors"] = encoder.state_dict()
    for file, tensors in files.items():
        write_tensors(folder / file, tensors)
    names = sorted(files)
    if plan.adapter is not None:
        write_tensors(folder / "adapter_model.safetensors", lora.adapter_tensors(model.backbone.model, name))
        write_text(folder / "adapter_config.json", lora.adapter_json(plan.adapter, model.backbone.identity.source))
        names += ["adapter_model.safetensors", "adapter_config.json"]
    options = encoder.saved_config(with_weights) or plan.modality.config
    widths = (encoder.width, model.backbone.width)
    describe_modality(folder, plan, options, widths, model.backbone.identity, encoder_hash, origin, names)


def describe_modality(
    folder: Path,
    plan: Blueprint,
    options: Any,
    widths: tuple[int, int],
    backbone: Identity,
    encoder_hash: str,
    origin: Origin | None,
    files: Sequence[str],
) -> None:
    """Writes `modality.json`, the last file of a modality's folder. `widths` are those of its frames and of the
    backbone."""
    write_json(
        folder / "modality.json",
        {
            "format_version": FORMAT_VERSION,
            "name": plan.modality.name,
            "plugin": plan.plugin,
            "plugin_sha256": plan.plugin_sha256,
            "options": asdict(options),
            "part_type": plan.modality.part_type,
            "frame_width": widths[0],
            "backbone_width": widths[1],
            "projectors": sorted(plan.modality.projectors()),
            "backbone": asdict(backbone),
            "encoder": {"hash": encoder_hash, "origin": None if origin is None else asdict(origin)},
            "files": {file: file_hash(folder / file) for file in files},
        },
    )


def copy_modality(source: Path, folder: Path) -> None:
    """Copies a modality folder byte by byte. `modality.json` comes last, as when it is saved."""
    for path in sorted(files_in(source), key=lambda path: path.name == "modality.json"):
        write_atomically(folder / path.name, partial(shutil.copyfile, path))


def files_in(folder: Path) -> list[Path]:
    """The files of a modality or a backbone, by name; hidden ones are not part of it."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def read_about(folder: Path) -> dict[str, Any]:
    """What a modality folder says of itself. Raises ConfigError or ValueError naming the file."""
    path = folder / "modality.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder}: not a modality folder (no modality.json); give one that a run wrote as modalities/<name>"
        )
    return _read(path, _MODALITY_KEYS)


def read_blueprint(
    folder: Path, identity: Identity, name: str, trusted: Sequence[str | Found] = ()
) -> tuple[Blueprint, list[str]]:
    """Reads the description of a modality folder, to be called `name`, and checks it against the backbone.

    `trusted` are plugins that the folder may name though they do not come by name; see `molora.trust`. Returns its
    blueprint and warnings. Raises ConfigError or ValueError naming the file.
    """
    warnings = check_modality(folder, identity)
    return read_plan(folder, name, trusted), warnings


def check_modality(folder: Path, identity: Identity) -> list[str]:
    """Checks that a modality folder is whole and fits the backbone, without its plugin. Returns warnings.

    Raises ConfigError or ValueError naming the file.
    """
    path = folder / "modality.json"
    about = read_about(folder)
    warnings = identity.check(about["backbone"], str(path))
    for file, expected in about["files"].items():
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file}: missing, though {path} lists it; copy the whole folder")
        if file_hash(folder / file) != expected:
            raise ValueError(
                f"{folder / file}: does not have the hash in {path}; it was changed, or a run was stopped while "
                "writing the folder (resuming that run writes it again)"
            )
    return warnings


def read_plan(folder: Path, name: str, trusted: Sequence[str | Found] = ()) -> Blueprint:
    """The blueprint of a modality folder, to be called `name`, whatever backbone and files it has.

    Raises ConfigError or ValueError naming the file.
    """
    path = folder / "modality.json"
    about = read_about(folder)
    may_run = partial(find_received, sha256=about.get("plugin_sha256"), trusted=trusted)
    try:
        plan = blueprint(name, about["plugin"], about["options"], None, str(path), saved=True, find=may_run)
    except Untrusted:
        raise
    except ConfigError as error:
        raise ConfigError(f"{error}; {_how_to_get_plugin(about['plugin'])}") from error
    adapter = lora.read_adapter(folder) if "adapter_config.json" in about["files"] else None
    return replace(plan, adapter=adapter)


def _how_to_get_plugin(plugin: str) -> str:
    if file_of(plugin):
        return "a modality folder does not contain its plugin: get the file that made this one"
    return "install the package that brings its plugin, in the version that made the folder"


def load_modality(model: MoLoRA, name: str, folder: Path) -> None:
    """Fills a modality's modules from its folder. Raises ValueError listing tensors that do not fit."""
    path = folder / "modality.json"
    about = read_json(path)
    modality: Any = model.modalities[name]
    encoder: Any = model.encoders[name]
    now = {
        "part_type": modality.part_type,
        "frame_width": encoder.width,
        "projectors": sorted(modality.projectors()),
    }
    if changed := [f"{key} was {about[key]!r}, is {now[key]!r}" for key in now if about[key] != now[key]]:
        raise ValueError(
            f"{path}: plugin {about['plugin']!r} has changed since: {'; '.join(changed)}; "
            f"{_how_to_get_plugin(about['plugin'])}"
        )
    path = folder / "projector.safetensors"
    lora.load_exactly(model.projectors[name].state_dict(), read_tensors(path), str(path))
    path = folder / "encoder.safetensors"
    if path.name in about["files"]:
        tensors = read_tensors(path)
        try:
            lora.load_exactly(encoder.state_dict(), tensors, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; did the plugin's code change? train it anew, under another run=") from error
    elif tensor_hash(encoder.state_dict()) != about["encoder"]["hash"]:
        raise ValueError(
            f"{folder}: its encoder comes from {about['encoder']['origin']}, whose tensors now have another hash than "
            "when the modality was saved"
        )
    path = folder / "adapter_model.safetensors"
    if path.name in about["files"]:
        lora.load_adapter_tensors(model.backbone.model, name, read_tensors(path), str(path))


# Runs ------------------------------------------------------------------------------------------------------------


def write_run(
    run: Path,
    backbone: Identity,
    modalities: Sequence[str],
    router: RouterConfig | RouterPlan,
    *,
    dtype: str | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes molora.json, which makes a folder a run that `molora.load` opens, and what the router has learned.

    A backbone folder is named by its path from the run, so that the two can be moved together.
    """
    folder = os.path.relpath(backbone.source, run) if Path(backbone.source).is_dir() else None
    if learned:
        write_tensors(run / _ROUTER, learned)
    plan = router if isinstance(router, RouterPlan) else router_plan(router)
    write_json(
        run / "molora.json",
        {
            "format_version": FORMAT_VERSION,
            "backbone": {**asdict(backbone), "folder": folder, "dtype": dtype},
            "modalities": list(modalities),
            "router": {"plugin": plan.found.spec, "options": plan.options},
            "router_sha256": plan.found.sha256,
            "files": {_ROUTER: file_hash(run / _ROUTER)} if learned else {},
        },
    )


@dataclass(frozen=True)
class RunAbout:
    """What the molora.json in `folder` says."""

    folder: Path
    backbone: dict[str, Any]
    modalities: list[str]
    router: RouterConfig
    files: dict[str, str]
    router_sha256: str | None = None

    def backbone_source(self) -> str:
        """The folder or hub id of the backbone. Raises ConfigError for a folder that is not there."""
        if self.backbone["folder"] is None:
            return self.backbone["source"]
        path = os.path.normpath(self.folder / self.backbone["folder"])
        if not Path(path).is_dir():
            raise ConfigError(
                f"{self.folder / 'molora.json'}: its backbone is not in {path}; move the two together, or write its "
                f'path from {self.folder} as "folder" there'
            )
        return path

    def router_plan(self, trusted: Sequence[str | Found] = ()) -> RouterPlan:
        """The run's router; `trusted` as in `read_blueprint`. Raises ConfigError."""
        may_run = partial(find_received, sha256=self.router_sha256, trusted=trusted)
        return router_plan(self.router, str(self.folder / "molora.json"), may_run)

    def modality_folders(self) -> dict[str, Path]:
        """Modality folders by name; others that molora.json does not name are not part of the run. Raises ConfigError
        for one that is not there."""
        folders = {name: self.folder / "modalities" / name for name in self.modalities}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise ConfigError(
                    f"{self.folder / 'molora.json'}: lists modality {name!r}, whose folder {folder} is missing; copy "
                    'the whole run, or take it out of "modalities" there'
                )
        return folders


def read_run(run: Path) -> RunAbout:
    path = run / "molora.json"
    if not path.is_file():
        raise ConfigError(
            f"{run}: not a run folder (no molora.json); was its training finished or saved at least once?"
        )
    about = _read(path, _RUN_KEYS)
    router = RouterConfig(**about["router"])
    return RunAbout(
        run, about["backbone"], about["modalities"], router, about.get("files", {}), about.get("router_sha256")
    )


def load_router(model: MoLoRA, run: Path) -> None:
    """Gives the router what the router of a run had learned, if it learns. Raises ValueError for what does not fit."""
    if own := model.router_tensors():
        path = run / _ROUTER
        if not path.is_file():
            raise ValueError(f"{path}: missing, though the run's router learns; copy the whole run folder")
        if file_hash(path) != read_run(run).files.get(path.name, file_hash(path)):
            raise ValueError(
                f"{path}: does not have the hash in {run / 'molora.json'}; it was changed, or a run was stopped while "
                "writing the folder (resuming that run writes it again)"
            )
        lora.load_exactly(own, read_tensors(path), str(path))


# States ----------------------------------------------------------------------------------------------------------


def save_state(run: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """Writes `state/<name>/` in one step, then removes older states: a kill at any instant leaves one whole state."""
    root = run / "state"
    temporary = root / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file, values in tensors.items():
        write_tensors(temporary / f"{file}.safetensors", values)
    write_json(temporary / "state.json", {"format_version": FORMAT_VERSION, **about})
    sync(temporary)
    if (root / name).exists():
        shutil.rmtree(root / name)
    os.replace(temporary, root / name)
    sync(root)
    for other in root.iterdir():
        if other.name != name:
            shutil.rmtree(other)


def latest_state(run: Path) -> Path | None:
    """The newest whole state of a run, if it has one."""
    states = [path for path in (run / "state").glob("step-*") if (path / "state.json").is_file()]
    return max(states, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_state(state: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A state's description and its tensors by file."""
    about = read_json(state / "state.json")
    check_format(about, state / "state.json")
    return about, {path.stem: read_tensors(path) for path in sorted(state.glob("*.safetensors"))}
