"""States to resume from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.checkpoint.format import FORMAT_VERSION, read_described
from molora.received import read_tensors
from molora.storage import write_folder, write_json, write_tensors

_STATE_KEYS = {
    **{"recipe": dict, "stage": int, "step": int, "part_steps": dict},
    **{"backbone": dict, "environment": dict, "logs": dict},
}
_STATE = re.compile(r"step-\d{1,18}")


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
