"""Uses an installed wheel as a stranger would; `make wheel-test` runs it with the Python of a clean environment."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path


def only_molora_was_added() -> None:
    """Nothing but the package, its metadata and the command: not `encoders`, `routers` or `tests`."""
    files = importlib.metadata.files("molora")
    assert files, "the wheel has no record of its files"
    outside = {file.parts[0] for file in files if file.parts[0] != ".."}
    version = importlib.metadata.version("molora")
    assert outside == {"molora", f"molora-{version}.dist-info"}, f"site-packages gained {sorted(outside)}"
    assert {file.name for file in files if file.parts[0] == ".."} == {"molora"}, "only the command goes to bin"


def it_imports_from_site_packages() -> None:
    import molora
    import molora.encoders
    import molora.routers

    for package in (molora, molora.encoders, molora.routers):
        assert Path(str(package.__file__)).is_relative_to(sys.prefix), f"{package.__file__} is not the installed one"
    for name in ("py.typed", "report.html.j2"):
        assert (Path(str(molora.__file__)).parent / name).is_file(), f"{name} is not in the wheel"


def the_command_helps() -> None:
    command = Path(sys.executable).with_name("molora")
    for call in ([command, "--help"], [sys.executable, "-m", "molora", "--help"]):
        shown = subprocess.run(call, capture_output=True, text=True)
        assert shown.returncode == 0, f"{call} exits {shown.returncode}:\n{shown.stderr}"
        assert "train" in shown.stdout, f"{call} does not list `train`:\n{shown.stdout}"


if __name__ == "__main__":
    for check in (only_molora_was_added, it_imports_from_site_packages, the_command_helps):
        check()
        print(f"ok: {check.__name__.replace('_', ' ')}", flush=True)
