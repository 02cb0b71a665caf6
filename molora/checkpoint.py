"""What a run leaves on disk: modality folders that stand alone, the run's molora.json, and states to resume from."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import lora
from molora.assembly import Blueprint, RouterConfig, RouterPlan, blueprint, router_plan
from molora.backbone import Identity
from molora.config import ConfigError, build
from molora.modality import Origin, WeightSource
from molora.model import MoLoRA
from molora.plugins import Found, file_of
from molora.received import (
    MAX_JSON_BYTES,
    TensorFile,
    check_finite,
    check_hash,
    check_name,
    copy_file,
    file_hash,
    listed_files,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
)
from molora.storage import check_shapes, write_atomically, write_folder, write_json, write_tensors, write_text
from molora.trust import Untrusted, find_received

FORMAT_VERSION = "1.0"
_ROUTER = "router.safetensors"
# What is loaded of a modality's folder, if modality.json lists it.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_PROJECTOR = "projector.safetensors"
_ENCODER = "encoder.safetensors"
_MODALITY_KEYS = {
    **{"name": str, "plugin": str, "options": dict, "part_type": str, "frame_width": int, "projectors": list},
    **{"backbone": dict, "encoder": dict, "files": dict},
}
_RUN_KEYS = {"backbone": dict, "modalities": list, "router": dict}
_STATE_KEYS = {
    **{"recipe": dict, "stage": int, "step": int, "part_steps": dict},
    **{"backbone": dict, "environment": dict, "logs": dict},
}
_COMMIT = re.compile("[0-9a-f]{40}")
_STATE = re.compile(r"step-\d{1,18}")
_KINDS = {str: "a text", dict: "values by name", int: "a whole number", list: "a list"}


def check_format(value: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a major format version this code does not know."""
    version = str(value.get("format_version"))
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise ValueError(
            f"{path}: format version {version!r:.80}, this molora reads {FORMAT_VERSION}; upgrade molora, or use "
            "the one that wrote it"
        )


def _read(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    return _checked(read_json(path, path.parent), path, keys)


def _checked(about: dict[str, Any], path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
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


# Modality folders ------------------------------------------------------------------------------------------------


def save_modality(model: MoLoRA, name: str, plan: Blueprint, folder: Path, pristine: Mapping[str, str]) -> None:
    """Writes a modality's folder. `modality.json` comes last and holds the hashes of the others.

    The encoder is left out only if it can be fetched again: its origin is known, and its tensors still have the hash
    that they had when it was built (`pristine`).
    """
    files: dict[str, Mapping[str, Tensor]] = {_PROJECTOR: model.projectors[name].state_dict()}
    encoder: Any = model.encoders[name]
    encoder_hash = tensor_hash(encoder.state_dict())
    origin: Any = encoder.origin
    with_weights = origin is None or encoder_hash != pristine[name]
    if with_weights:
        files[_ENCODER] = encoder.state_dict()
    for file, tensors in files.items():
        write_tensors(folder / file, tensors)
    names = sorted(files)
    if plan.adapter is not None:
        config, tensors = (folder / file for file in _ADAPTER)
        write_tensors(tensors, lora.adapter_tensors(model.backbone.model, name))
        write_text(config, lora.adapter_json(plan.adapter, model.backbone.identity.source))
        names += _ADAPTER
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
    for file in {_PROJECTOR, _ENCODER, *_ADAPTER} - set(files):
        (folder / file).unlink(missing_ok=True)
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
    """Copies the files that a modality folder lists, byte by byte, and `modality.json`: last, as when it is saved.

    Raises ValueError for a file that does not have its hash; it is not written then.
    """
    path = source / "modality.json"
    data = read_bytes(path, MAX_JSON_BYTES, source)
    about = _checked(parse_json(data, str(path)), path, _MODALITY_KEYS)
    for file, sha256 in listed_files(about["files"], path).items():
        write_atomically(folder / file, partial(copy_file, source / file, folder=source, sha256=sha256, where=path))
    write_atomically(folder / path.name, lambda temporary: temporary.write_bytes(data))


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
    about = _read(path, _MODALITY_KEYS)
    check_name(about["name"], f'{path}: "name"')
    files = listed_files(about["files"], path)
    for file in (_PROJECTOR, *(_ADAPTER if files.keys() & {*_ADAPTER} else ())):
        if file not in files:
            raise ValueError(f'{path}: "files" lacks {file}, which is loaded too; copy the whole folder again')
    for file in (_ENCODER, *_ADAPTER):
        if file not in files and (folder / file).exists():
            raise ValueError(
                f"{folder / file}: is there, but {path} does not list it, so it would not be loaded; take it away, or "
                "copy the whole folder again"
            )
    _check_encoder_about(about, path)
    return about


def _check_encoder_about(about: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for an encoder without a hash, and for one that is neither in the folder nor of some origin."""
    sha256, origin = about["encoder"].get("hash"), about["encoder"].get("origin")
    texts = origin is None or (
        isinstance(origin, dict) and all(isinstance(origin.get(key), str) for key in ("source", "revision"))
    )
    if not isinstance(sha256, str) or not texts:
        raise ValueError(
            f'{path}: "encoder": hash is {sha256!r:.80} and origin {origin!r:.80}, expected a text, and null or texts '
            "as source and revision; copy it again"
        )
    if origin is None and _ENCODER not in about["files"]:
        raise ValueError(
            f'{path}: "files" lacks {_ENCODER}, and "encoder" says no origin where its weights are; copy the whole '
            "folder again"
        )


def read_blueprint(
    folder: Path, identity: Identity, name: str, trusted: Sequence[str | Found] = ()
) -> tuple[Blueprint, list[str]]:
    """Reads the description of a modality folder, to be called `name`, and checks it against the backbone.

    `trusted` are plugins that the folder may name though they do not come by name; see `molora.trust`. Returns its
    blueprint and warnings. Raises ConfigError or ValueError naming the file.
    """
    warnings = check_modality(folder, identity)
    plan = read_plan(folder, name, trusted)
    check_encoder(plan, folder)
    return plan, warnings


def check_modality(folder: Path, identity: Identity) -> list[str]:
    """Checks that a modality folder is whole and fits the backbone, without its plugin. Returns warnings.

    Raises ConfigError or ValueError naming the file.
    """
    path = folder / "modality.json"
    about = read_about(folder)
    warnings = identity.check(about["backbone"], str(path))
    for file, expected in about["files"].items():
        if not (folder / file).exists():
            raise ValueError(f"{folder / file}: missing, though {path} lists it; copy the whole folder")
        check_hash(file_hash(folder / file, folder), expected, folder / file, path)
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
    _check_sources(plan, about, path)
    sha256 = about["files"].get(_ADAPTER[0])
    adapter = None if sha256 is None else lora.read_adapter(folder, sha256, path)
    return replace(plan, adapter=adapter)


def _check_sources(plan: Blueprint, about: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError for options that read a local path, or fetch what is not pinned to the origin's commit."""
    sources = list(_sources(plan.modality.config))
    origin = about["encoder"]["origin"] or {}
    for source in sources:
        if source.path is not None:
            raise ConfigError(
                f"{path}: its options name the path {source.path!r:.200}, and a modality folder reads nothing outside "
                "itself; save the modality anew, with its encoder's weights"
            )
        if source.fetches and (
            source.revision != origin.get("revision") or not _COMMIT.fullmatch(str(source.revision))
        ):
            raise ConfigError(
                f"{path}: its options name {source.name!r:.200} on the hub at revision {source.revision!r:.80}, "
                f'expected the commit that "encoder" gives as its origin ({origin.get("revision")!r:.80}); write that '
                "commit there, or save the modality anew"
            )
    ours = type(plan.modality).__module__.startswith("molora.encoders.")
    if ours and _ENCODER not in about["files"] and not any(source.fetches for source in sources):
        raise ConfigError(
            f"{path}: its encoder is neither in {_ENCODER} nor named on the hub by its options; copy the whole folder "
            "again"
        )


def _sources(value: Any) -> Iterator[WeightSource]:
    """Wherever they stand among a modality's options."""
    if isinstance(value, WeightSource):
        yield value
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in fields(value)]
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from _sources(item)


def check_encoder(plan: Blueprint, folder: Path) -> None:
    """Compares the tensors in a folder's encoder.safetensors with those of the encoder that its options describe.

    It is built without memory for its weights, so that no more is ever taken than the file holds. Raises ValueError.
    """
    if _ENCODER not in read_about(folder)["files"]:
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
    """Fills a modality's modules from its folder.

    Raises ConfigError for what is no modality folder, ValueError listing tensors that do not fit.
    """
    path = folder / "modality.json"
    about = read_about(folder)
    files = about["files"]
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
    _load(model.projectors[name].state_dict(), folder / _PROJECTOR, files[_PROJECTOR], path)
    if _ENCODER in files:
        try:
            _load(encoder.state_dict(), folder / _ENCODER, files[_ENCODER], path, finite=False)
        except ValueError as error:
            raise ValueError(f"{error}; did the plugin's code change? train it anew, under another run=") from error
    elif tensor_hash(encoder.state_dict()) != about["encoder"]["hash"]:
        raise ValueError(
            f"{folder}: its encoder comes from {about['encoder']['origin']}, whose tensors now have another hash than "
            "when the modality was saved"
        )
    if _ADAPTER[1] in files:
        _load(lora.adapter_tensors(model.backbone.model, name), folder / _ADAPTER[1], files[_ADAPTER[1]], path)


def _load(
    parameters: Mapping[str, Tensor], path: Path, sha256: str | None, where: Path, *, finite: bool = True
) -> None:
    """Copies a file's tensors, one by one, into parameters of the same names and shapes.

    Raises ValueError listing what does not fit before anything is read, for other bytes than those with the hash in
    `where`, and for numbers that are not finite; an encoder's masks may hold them.
    """
    with TensorFile(path, path.parent) as file:
        check_shapes(file.shapes, {key: parameter.shape for key, parameter in parameters.items()}, str(path))
        file.check_dtypes({key: parameter.dtype for key, parameter in parameters.items()})
        tensors = file.tensors(sha256, where)
        with torch.no_grad():
            for key, tensor in check_finite(tensors, str(path)) if finite else tensors:
                parameters[key].copy_(tensor)


# Runs ------------------------------------------------------------------------------------------------------------


def write_run(
    run: Path,
    backbone: Identity,
    modalities: Sequence[str],
    router: RouterConfig | RouterPlan,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes molora.json, which makes a folder a run that `molora.load` opens, and what the router has learned.

    A backbone folder is named by its path from the run, so that the two can be moved together; one of the hub by its
    id and its commit (`revision`).
    """
    source = backbone.source
    folder = os.path.relpath(os.path.realpath(source), os.path.realpath(run)) if Path(source).is_dir() else None
    if learned:
        write_tensors(run / _ROUTER, learned)
    plan = router if isinstance(router, RouterPlan) else router_plan(router)
    write_json(
        run / "molora.json",
        {
            "format_version": FORMAT_VERSION,
            "backbone": {**asdict(backbone), "folder": folder, "dtype": dtype, "revision": revision},
            "modalities": list(modalities),
            "router": {"plugin": plan.found.spec, "options": plan.options},
            "router_sha256": plan.found.sha256,
            "files": {_ROUTER: file_hash(run / _ROUTER)} if learned else {},
        },
    )


@dataclass(frozen=True)
class RunAbout:
    """What the molora.json in `folder` says. `files` is None if an older molora wrote it, which listed none."""

    folder: Path
    backbone: dict[str, Any]
    modalities: list[str]
    router: RouterConfig
    files: Mapping[str, str] | None
    router_sha256: str | None = None

    def backbone_source(self) -> str:
        """The folder or hub id of the backbone. Raises ConfigError for a folder that is not there.

        The path may lead anywhere, as backbones lie beside runs, and begins where the run really is, links followed.
        What it leads to is only read, runs no code, and has to have the hashes that are recorded here.
        """
        if self.backbone["folder"] is None:
            return self.backbone["source"]
        path = os.path.realpath(self.folder / self.backbone["folder"])
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
    """What a run's molora.json says. Raises ConfigError for what is no run, ValueError naming what is wrong in it."""
    path = run / "molora.json"
    if not path.is_file():
        raise ConfigError(
            f"{run}: not a run folder (no molora.json); was its training finished or saved at least once?"
        )
    about = _read(path, _RUN_KEYS)
    backbone, names = about["backbone"], about["modalities"]
    for key in ("source", "folder", "dtype", "revision"):
        value = backbone.get(key)
        text = isinstance(value, str) and value.isprintable() and len(value) <= 4096
        if not text and (value is not None or key == "source"):
            raise ValueError(f'{path}: "backbone": {key} is {value!r:.80}, expected a text; copy it again')
    if backbone.get("revision") is not None and not _COMMIT.fullmatch(backbone["revision"]):
        raise ValueError(f'{path}: "backbone": revision is {backbone["revision"]!r:.80}, no commit; copy it again')
    for name in names:
        check_name(name, f'{path}: "modalities"')
    if len(set(names)) < len(names):
        raise ValueError(f'{path}: "modalities" lists one twice: {", ".join(names):.200}; copy it again')
    router = build(RouterConfig, about["router"], f"{path}: router")
    if router.path is not None:
        raise ValueError(f"{path}: router.path is {router.path!r:.80}, but a run has its own router; copy it again")
    files = listed_files(about["files"], path) if "files" in about else None
    backbone = {"folder": None, "dtype": None, "revision": None, **backbone}
    return RunAbout(
        run,
        backbone,
        names,
        router,
        files,
        about.get("router_sha256"),
    )


def load_router(model: MoLoRA, run: Path) -> None:
    """Gives the router what the router of a run had learned, if it learns. Raises ValueError for what does not fit."""
    if own := model.router_tensors():
        path = run / _ROUTER
        if not path.is_file():
            raise ValueError(f"{path}: missing, though the run's router learns; copy the whole run folder")
        files = read_run(run).files
        if files is not None and _ROUTER not in files:
            raise ValueError(f"{path}: is not listed in {run / 'molora.json'}; copy the whole run folder again")
        sha256 = None if files is None else files[_ROUTER]
        if sha256 is not None:
            check_hash(file_hash(path, run), sha256, path, run / "molora.json")
        _load(own, path, sha256, run / "molora.json")


# States ----------------------------------------------------------------------------------------------------------


def save_state(run: Path, name: str, tensors: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> None:
    """Writes `state/<name>/` in one step, then removes older states: a kill at any instant leaves one whole state."""
    root = run / "state"
    with write_folder(root / name) as draft:
        for file, values in tensors.items():
            write_tensors(draft / f"{file}.safetensors", values)
        write_json(draft / "state.json", {"format_version": FORMAT_VERSION, **about})
    for other in root.iterdir():
        if _STATE.fullmatch(other.name) and other.name != name:
            shutil.rmtree(other)


def latest_state(run: Path) -> Path | None:
    """The newest whole state of a run, if it has one."""
    states = [path for path in (run / "state").glob("step-*") if _STATE.fullmatch(path.name)]
    whole = [path for path in states if (path / "state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def read_state(state: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """A state's description and its tensors by file.

    Raises OSError, ValueError naming the file that is missing, damaged or of another format.
    """
    about = read_state_about(state)
    return about, {name: read_tensors(state / f"{name}.safetensors") for name in ("weights", "optimizer")}


def read_state_about(state: Path) -> dict[str, Any]:
    """A state's description. Raises OSError, ValueError naming the file and the key that is not as it was written."""
    path = state / "state.json"
    about = _read(path, _STATE_KEYS)
    counts = {"": {key: about[key] for key in ("stage", "step")}, **{k: about[k] for k in ("part_steps", "logs")}}
    for above, values in counts.items():
        for key, value in values.items():
            if type(value) is not int or value < 0:
                key = f"{above}.{key}" if above else key
                raise ValueError(f"{path}: {key} is {value!r:.80}, expected a count; copy it again")
    evaluate = about.get("evaluate", [])  # which older states lack
    if not isinstance(evaluate, list) or not all(isinstance(name, str) for name in evaluate):
        raise ValueError(f"{path}: evaluate is {evaluate!r:.80}, expected names; copy it again")
    return about
