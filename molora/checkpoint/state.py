"""States to resume from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.checkpoint.format import FORMAT_VERSION, check_format
from molora.received import (
    read_json,
    read_tensors,
)
from molora.storage import write_folder, write_json, write_tensors

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
    about = read_json(state / "state.json")
    check_format(about, state / "state.json")
    return about, {path.stem: read_tensors(path) for path in sorted(state.glob("*.safetensors"))}
