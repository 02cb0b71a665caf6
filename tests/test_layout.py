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


def test_the_range_of_pythons_is_the_same_everywhere() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    range_ = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", setup["options"]["python_requires"])
    assert range_
    oldest, newest = int(range_[1]), int(range_[2]) - 1
    classified = re.findall(r"Python :: 3\.(\d+)", setup["metadata"]["classifiers"])
    assert [int(minor) for minor in classified] == list(range(oldest, newest + 1)), "setup.cfg, classifiers"
    said = f"3.{oldest} to 3.{newest}"
    asked = f"(3, {oldest}) <= sys.version_info[:2] <= (3, {newest})"
    for name, lines in {
        "README.md": [f"Python {said}"],
        "Makefile": [asked, f"Python {said}"],
        "molora/doctor/installation.py": [asked, said],
        "molora/plugin_kit/templates/setup.cfg.j2": [f"python_requires = >=3.{oldest}\n"],
        "examples/molora-signals/pyproject.toml": [f'requires-python = "{range_[0]}"'],
        "pyproject.toml": [f'target-version = "py3{oldest}"', f'pythonVersion = "3.{oldest}"'],
    }.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(line in text for line in lines), f"{name} does not say {lines}"


def test_every_library_has_an_oldest_version() -> None:
    """`make test-oldest` installs these."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    groups = (setup["options"]["install_requires"], *setup["options.extras_require"].values())
    wanted = {name for group in groups for name in group.split("\n") if name}
    assert not {name for name in wanted if not re.match(r"[\w.-]+(\[\w+\])?[=>]=\d", name)}


def test_the_version_is_written_once() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: molora.__version__"


def test_the_readme_of_the_library_says_what_each_file_is_for() -> None:
    readme = (ROOT / "molora" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^- `([\w/.]+)`: \S", readme, re.MULTILINE)
    kinds = {".py", ".j2", ".html", ".css", ".js"}
    own = [path.relative_to(ROOT / "molora") for path in (ROOT / "molora").rglob("*") if path.suffix in kinds]
    mapped = [path.relative_to(ROOT) for name in MAPPED for path in (ROOT / name).rglob("*.py")]
    below = [*(path for path in own if not {*MAPPED, "templates"} & {*path.parts}), *mapped]
    tops = {".", *MAPPED}
    contracts = {Path("evaluate/metrics/__init__.py")}
    files = {str(p) for p in below if p.name != "__init__.py" or str(p.parent) in tops or p in contracts}
    assert len(named) == len(set(named)), (
        f"molora/README.md: named twice: {sorted({n for n in named if named.count(n) > 1})}"
    )
    assert set(named) == files, (
        f"molora/README.md: add {sorted(files - set(named))}, remove {sorted(set(named) - files)}"
    )
