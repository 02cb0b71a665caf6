"""Installed, the package is found by the names it declares."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from molora.plugins import Plugin, available, resolve

PACKAGE = Path(__file__).parents[1]


def test_molora_finds_the_plugins_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # From a copy: metadata beside the source would declare the plugins to whatever has that folder on its path.
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    site.mkdir()
    # What pip does with a package, but without the network that its isolated builds need.
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_py", "--build-lib", str(site)]
    subprocess.run([*command, "egg_info", "--egg-base", str(site)], cwd=source, check=True)
    monkeypatch.syspath_prepend(str(site))
    assert {plugin for plugin in available("modality") if plugin.origin == "molora-signals"} == {
        Plugin("series", "molora-signals", "molora_signals.series:Series"),
        Plugin("strokes", "molora-signals", "molora_signals.strokes:Strokes"),
    }
    assert resolve("modality", "series").__name__ == "Series"
    assert resolve("source", "columns").__name__ == "Columns"
    assert sorted(path.name for path in site.iterdir()) == ["molora_signals", "molora_signals.egg-info"]
