"""What `molora modality new` and `molora router new` write: short, clean, true to the contract; and it trains."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import molora
from molora.config import ConfigError, read
from molora.evaluate.judge import Evaluations
from molora.plugin_kit.scaffold import new_plugin
from molora.plugins import Plugin, available
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe

LONG = "temperature_of_the_river"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_its_tests(path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the two tests that a scaffold comes with, as pytest would."""
    module = imported(path)
    module.test_it_keeps_the_contract()
    module.test_its_recipe_trains(scratch, monkeypatch)


@pytest.mark.parametrize("kind", ["modality", "router"])
@pytest.mark.parametrize("name", ["tide", LONG])
def test_its_files_are_short_and_clean(here: Path, kind, name: str) -> None:
    new_plugin(kind, name)
    new_plugin(kind, name, here / "package")
    sources = sorted(here.rglob("*.py"))
    assert len(sources) == 5
    assert all(len(source.read_text().splitlines()) <= 100 for source in sources)
    assert not [text for file in here.rglob("*") if file.is_file() for text in ("{{", "{%") if text in file.read_text()]
    ruff = [sys.executable, "-m", "ruff"]
    checks = [["check", "--isolated"], ["format", "--isolated", "--check"]]
    for check in checks if name != LONG else checks[:1]:  # a long name makes lines that a formatter breaks
        done = subprocess.run([*ruff, *check, "."], cwd=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_modality_keeps_its_contract_and_trains(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaffold = new_plugin("modality", "tide")
    assert scaffold.files == [Path("tide.py"), Path("tide.yaml"), Path("test_tide.py")]
    assert scaffold.spec == "tide.py:TideModality"
    run_its_tests(here / "test_tide.py", tmp_path, monkeypatch)


def test_a_router_keeps_its_contract_and_trains(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert new_plugin("router", "ferry").spec == "ferry.py:FerryRouter"
    run_its_tests(here / "test_ferry.py", tmp_path, monkeypatch)


def test_a_modality_learns_what_its_data_teach(here: Path) -> None:
    new_plugin("modality", "tide")
    run = train(read(Recipe, "tide.yaml", [f"backbone.path={save_backbone(here / 'backbone')}"]), show=False)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["held_out/exact_match"] > 0.9 and last["held_out/questions"] == 100
    assert read(Evaluations, "tide.yaml", in_part=True).evaluations.keys() == {"held_out"}
    loaded = molora.load(run)
    for answer, step in (("up", 0.1), ("down", -0.1)):
        (here / "series.txt").write_text("\n".join(str(step * i) for i in range(20)))
        content = [{"type": "tide", "path": "series.txt"}, {"type": "text", "text": "up or down?"}]
        assert loaded.generate([{"role": "user", "content": content}]) == answer


@pytest.mark.parametrize("kind", ["modality", "router"])
def test_a_package_is_found_by_its_name(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind) -> None:
    name = f"shore_{kind}"  # a module of its own for each case
    scaffold = new_plugin(kind, name, here / "package")
    assert scaffold.spec == name and all(file.is_relative_to(here / "package") for file in scaffold.files)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet", "egg_info"]
    subprocess.run(build, cwd=here / "package", check=True, capture_output=True)
    monkeypatch.syspath_prepend(str(here / "package"))
    spec = f"molora_{name}.{name}:Shore{kind.capitalize() * 2}"
    assert Plugin(name, f"molora-shore-{kind}", spec) in available(kind)
    run_its_tests(here / f"package/tests/test_{name}.py", tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=f"{kind} '{name}' is there already, molora_{name}"):
        new_plugin(kind, name, here / "another")


@pytest.mark.parametrize("file", ["tide.py", "tide.yaml", "test_tide.py"])
def test_nothing_is_overwritten(here: Path, file: str) -> None:
    (here / file).write_text("mine")
    with pytest.raises(ConfigError, match=f"^{file}: there already"):
        new_plugin("modality", "tide")
    assert [path.name for path in here.iterdir()] == [file] and (here / file).read_text() == "mine"
    (here / "package").mkdir()
    (here / "package/setup.cfg").write_text("mine")
    with pytest.raises(ConfigError, match="package/setup.cfg: there already"):
        new_plugin("modality", "tide", here / "package")
    assert [path.name for path in (here / "package").iterdir()] == ["setup.cfg"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("modality", "vision", "modality 'vision' is there already, molora.encoders.vision:Vision"),
        ("router", "table", "router 'table' is there already, molora.routers.table:TableRouter"),
        ("modality", "image", "modality 'vision' answers to content parts of type 'image' already"),
        ("modality", "text", "the tokenizer answers to content parts of type 'text' already"),
        ("modality", "json", "would hide the installed Python module 'json'"),
        ("modality", "class", "cannot name a modality"),
        *(("router", name, "cannot name a router") for name in ("Tide", "1st", "two words", "a-b", "../x", "_x", "")),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(here: Path, kind, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_plugin(kind, name)
    assert not list(here.iterdir())
