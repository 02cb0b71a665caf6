"""setup.cfg, the folders and the links in molora/ agree on what is installed under which name."""

from __future__ import annotations

import configparser
import importlib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("encoders", "routers")


@pytest.fixture(scope="module")
def options() -> dict[str, list[str]]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    return {key: value.split("\n")[1:] for key, value in setup["options"].items() if value.startswith("\n")}


def packages_on_disk() -> set[str]:
    """Folders with an `__init__.py`, by the name they are installed under; links are not followed."""
    found = set()
    for top in ("molora", *MAPPED):
        for folder, _, files in os.walk(ROOT / top):
            if "__init__.py" in files:
                name = ".".join(Path(folder).relative_to(ROOT).parts)
                found.add(name if top == "molora" else f"molora.{name}")
    return found


def test_setup_cfg_lists_exactly_the_packages_on_disk(options: dict[str, list[str]]) -> None:
    listed, found = set(options["packages"]), packages_on_disk()
    assert listed == found, f"setup.cfg, packages: add {sorted(found - listed)}, remove {sorted(listed - found)}"


def test_setup_cfg_maps_the_folders_under_molora(options: dict[str, list[str]]) -> None:
    mapped = dict(line.replace(" ", "").split("=") for line in options["package_dir"])
    assert mapped == {"molora": "molora", **{f"molora.{name}": name for name in MAPPED}}


@pytest.mark.parametrize("name", MAPPED)
def test_the_link_points_home(name: str) -> None:
    link = ROOT / "molora" / name
    assert link.is_symlink(), f"molora/{name} is not a link; run: rm -rf molora/{name}; ln -sfn ../{name} molora/{name}"
    target = os.readlink(link)
    assert target == f"../{name}", f"molora/{name} points to {target}; run: ln -sfn ../{name} molora/{name}"


@pytest.mark.parametrize("name", MAPPED)
def test_the_bare_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"import 'molora.{name}', not '{name}'"):
        importlib.import_module(name)


@pytest.mark.parametrize("name", MAPPED)
def test_the_folder_and_the_link_are_one_module(name: str) -> None:
    module = importlib.import_module(f"molora.{name}")
    assert Path(str(module.__file__)).resolve() == ROOT / name / "__init__.py"


def test_the_readme_of_the_library_says_what_each_file_is_for() -> None:
    readme = (ROOT / "molora" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^- `([\w/.]+)`: \S", readme, re.MULTILINE)
    below = [
        path.relative_to(ROOT / "molora") for path in (ROOT / "molora").rglob("*") if path.suffix in {".py", ".j2"}
    ]
    faces = {str(path) for path in below if path.name == "__init__.py" and path.parent != Path()}
    files = {str(path) for path in below if not {*MAPPED, "templates"} & {*path.parts}} - faces
    assert len(named) == len(set(named)), (
        f"molora/README.md: named twice: {sorted({n for n in named if named.count(n) > 1})}"
    )
    assert set(named) == files, (
        f"molora/README.md: add {sorted(files - set(named))}, remove {sorted(set(named) - files)}"
    )
