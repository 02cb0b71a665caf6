"""What a run folder holds beside its modalities: molora.json, what the router learned, and states to resume from."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from molora.checkpoint.assembly import RouterConfig, RouterPlan, router_plan
from molora.checkpoint.format import COMMIT, FORMAT_VERSION, fill, read_described
from molora.checkpoint.trust import find_received
from molora.config import ConfigError, build
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization
from molora.plugins import Found
from molora.received import check_hash, check_name, file_hash, listed_files, read_tensors
from molora.storage import write_folder, write_json, write_tensors

_ROUTER = "router.safetensors"
_RUN_KEYS = {"backbone": dict, "modalities": list, "router": dict}
_STATE_KEYS = {
    **{"recipe": dict, "stage": int, "step": int, "part_steps": dict},
    **{"backbone": dict, "environment": dict, "logs": dict},
}
_STATE = re.compile(r"step-\d{1,18}")


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
    """Writes molora.json, which makes a folder a run that `molora.load` opens, and what the router has learned. A
    backbone folder is named by its path from the run, so that the two move together; one of the hub by id and
    commit."""
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
        """The folder or hub id of the backbone. Raises ConfigError for a folder that is not there. The path may lead
        anywhere, as backbones lie beside runs, and begins where the run really is, links followed. What it leads to is
        only read, runs no code, and has to have the hashes that are recorded here."""
        if self.backbone["folder"] is None:
            return self.backbone["source"]
        path = os.path.realpath(self.folder / self.backbone["folder"])
        if not Path(path).is_dir():
            told = f"{self.folder / 'molora.json'}: its backbone is not in {path}"
            raise ConfigError(f'{told}; move the two together, or write its path from {self.folder} as "folder" there')
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
                told = f"{self.folder / 'molora.json'}: lists modality {name!r}, whose folder {folder} is missing"
                raise ConfigError(f'{told}; copy the whole run, or take it out of "modalities" there')
        return folders


def read_run(run: Path) -> RunAbout:
    """What a run's molora.json says. Raises ConfigError for what is no run, ValueError naming what is wrong in it."""
    path = run / "molora.json"
    if not path.is_file():
        raise ConfigError(f"{run}: not a run folder (no molora.json); was its training finished, or saved once?")
    about = read_described(path, _RUN_KEYS)
    backbone, names = about["backbone"], about["modalities"]
    for key in ("source", "folder", "dtype", "revision"):
        value = backbone.get(key)
        text = isinstance(value, str) and value.isprintable() and len(value) <= 4096
        if not text and (value is not None or key == "source"):
            raise ValueError(f'{path}: "backbone": {key} is {value!r:.80}, expected a text; copy it again')
    if backbone.get("revision") is not None and not COMMIT.fullmatch(backbone["revision"]):
        raise ValueError(f'{path}: "backbone": revision is {backbone["revision"]!r:.80}, no commit; copy it again')
    for name in names:
        check_name(name, f'{path}: "modalities"')
    if len(set(names)) < len(names):
        raise ValueError(f'{path}: "modalities" lists one twice: {", ".join(names):.200}; copy it again')
    router = build(RouterConfig, about["router"], f"{path}: router")
    if router.path is not None:
        raise ValueError(f"{path}: router.path is {router.path!r:.80}, but a run has its own router; copy it again")
    files = listed_files(about["files"], path) if "files" in about else None
    backbone = {"folder": None, "dtype": None, "revision": None, "quantization": "none", **backbone}
    if backbone["quantization"] not in get_args(Quantization):
        told = f"quantization is {backbone['quantization']!r:.80}, expected one of {', '.join(get_args(Quantization))}"
        raise ValueError(f'{path}: "backbone": {told}; copy it again')
    return RunAbout(run, backbone, names, router, files, about.get("router_sha256"))


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
        fill(own, path, sha256, run / "molora.json")


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
    """A state's description and its tensors by file. Raises OSError, ValueError naming the file that is missing,
    damaged or of another format."""
    about = read_state_about(state)
    names = ["weights", "optimizer"]
    if (state / "reference.safetensors").is_file():  # in the middle of a stage of preferences
        names.append("reference")
    return about, {name: read_tensors(state / f"{name}.safetensors") for name in names}


def read_state_about(state: Path) -> dict[str, Any]:
    """A state's description. Raises OSError, ValueError naming the file and the key that is not as it was written."""
    path = state / "state.json"
    about = read_described(path, _STATE_KEYS)
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
