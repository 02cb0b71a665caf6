"""Examines a wheel and a source archive before they are published: their files, and the README as an index shows it."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

from readme_renderer import markdown

PACKAGES = ("molora", "encoders", "routers")


def main(folder: Path) -> None:
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=True).stdout.split()
    code = {name for name in tracked if name.endswith((".py", ".j2", ".typed"))}
    with tarfile.open(source) as archive:
        packed = {"/".join(Path(name).parts[1:]) for name in archive.getnames()}
    needed = {*code, "LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    assert needed <= packed, f"{source.name} lacks {sorted(needed - packed)}"

    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = message_from_bytes(archive.read(metadata))
    expected = {re.sub("^(encoders|routers)/", r"molora/\1/", name) for name in code}
    assert installed == expected, f"{wheel.name}: {sorted(installed ^ expected)} only there or only in the checkout"

    shown = markdown.render(described.get_payload())
    assert shown, "the README does not render"
    inside = {link for link in re.findall(r'(?:href|src)="([^"]+)"', shown) if not link.startswith(("http", "#"))}
    print(f"ok: {described['Name']} {described['Version']}, {len(installed)} files, README of {len(shown)} characters")
    if inside:
        print(f"note: these links of the README lead somewhere in the repository only: {', '.join(sorted(inside))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
