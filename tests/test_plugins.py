"""Plugins: four ways to name one, one owner per name, errors that say what there is."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from molora import plugins
from molora.config import ConfigError
from molora.modality import Modality
from molora.plugins import Plugin, available, resolve

DEPTH = """
from dataclasses import dataclass

@dataclass
class DepthConfig:
    size: int = 1

class Depth:
    config_type = DepthConfig
    part_type = "depth"
    def __init__(self, name, config): self.name, self.config = name, config
    def load(self, part): ...
    def prepare(self, item, generator=None): ...
    def collate(self, prepared): ...
    def build_encoder(self): ...
    def projector(self, company): return "default"
    def projectors(self): return ("default",)
    def examples(self): return []

class Half:
    config_type = DepthConfig
    part_type = "half"
    def load(self, part): ...

thing = 3
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a distribution with one module and its entry points on the path, as pip would."""

    def install(distribution: str, module: str, entries: str) -> None:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(DEPTH)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entries)
        monkeypatch.syspath_prepend(str(site))

    return install


def test_built_in_names_are_available_and_resolve() -> None:
    assert ("vision", "built-in", "molora.encoders.vision:Vision") in available("modality")
    assert resolve("router", "table").__name__ == "TableRouter"


def test_a_class_is_found_by_module_path(install) -> None:
    install("acme", "acme_depth", "")
    found = resolve("modality", "acme_depth:Depth")
    assert found.__module__ == "acme_depth" and isinstance(found("depth", None), Modality)


def test_a_class_is_found_by_file_once_and_pickles(tmp_path: Path) -> None:
    file = tmp_path / "my depth.py"
    file.write_text(DEPTH)
    found = resolve("modality", f"{file}:Depth")
    assert resolve("modality", f"{file}:Depth") is found
    assert pickle.loads(pickle.dumps(found("depth", 1))).name == "depth"


def test_a_class_is_found_by_entry_point(install) -> None:
    install("acme", "acme_depth", "[molora.modalities]\ndepth = acme_depth:Depth\n")
    assert Plugin("depth", "acme", "acme_depth:Depth") in available("modality")
    assert resolve("modality", "depth").__module__ == "acme_depth"
    assert "depth" not in [plugin.name for plugin in available("router")]


def test_two_owners_of_a_name_are_an_error_that_names_both(install) -> None:
    install("acme", "acme_depth", "[molora.modalities]\ndepth = acme_depth:Depth\nvision = acme_depth:Depth\n")
    install("zeta", "zeta_depth", "[molora.modalities]\ndepth = zeta_depth:Depth\n")
    with pytest.raises(ConfigError, match=r"claimed by acme \(acme_depth:Depth\) and zeta \(zeta_depth:Depth\)"):
        resolve("modality", "depth")
    with pytest.raises(ConfigError, match=r"claimed by built-in \(.*\) and acme \(acme_depth:Depth\)"):
        resolve("modality", "vision")
    assert resolve("modality", "zeta_depth:Depth").__module__ == "zeta_depth"


def test_an_unknown_name_says_what_there_is_and_what_is_near() -> None:
    with pytest.raises(ConfigError, match="is called 'vison'; did you mean 'vision'\\? there is audio, vision"):
        resolve("modality", "vison")
    with pytest.raises(ConfigError, match="no router is called 'quantum'; there is table"):
        resolve("router", "quantum")


def test_what_fails_inside_a_plugin_is_shown_and_chained(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('no such drone')")
    for _ in range(2):  # the failed module must not stay behind as if it had been imported
        with pytest.raises(ConfigError, match="importing .*broken.py' failed: RuntimeError: no such drone") as caught:
            resolve("modality", f"{file}:Depth")
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert not any(name.startswith("molora_plugin_broken") for name in sys.modules)
    with pytest.raises(ConfigError, match="'no_such_package' failed: ModuleNotFoundError"):
        resolve("modality", "no_such_package:Depth")
    with pytest.raises(ConfigError, match="FileNotFoundError: no file .*absent.py"):
        resolve("modality", f"{tmp_path}/absent.py:Depth")


def test_a_wrong_class_is_an_error_that_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "depth.py"
    file.write_text(DEPTH)
    with pytest.raises(ConfigError, match="has no 'Dept'; did you mean 'Depth'\\?"):
        resolve("modality", f"{file}:Dept")
    (tmp_path / "shore.py").write_text("from pathlib import Path\n" + DEPTH)
    with pytest.raises(ConfigError, match="has no 'Shore'; its classes: DepthConfig, Depth, Half$"):
        resolve("modality", f"{tmp_path}/shore.py:Shore")
    with pytest.raises(ConfigError, match="depth.py': names a file and no class in it; write .*depth.py:Depth$"):
        resolve("modality", str(file))
    with pytest.raises(ConfigError, match="absent.py': importing .*FileNotFoundError"):
        resolve("modality", str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="is 3, not a class"):
        resolve("modality", f"{file}:thing")
    with pytest.raises(ConfigError, match="class Half lacks prepare, collate, build_encoder, projector, projectors"):
        resolve("modality", f"{file}:Half")
    with pytest.raises(ConfigError, match="class Depth lacks order, adapters, learns, forward, which every router has"):
        resolve("router", f"{file}:Depth")


def test_naming_the_contract_as_base_does_not_fulfil_it(tmp_path: Path) -> None:
    file = tmp_path / "lazy.py"
    file.write_text("from molora.modality import Modality\nclass Lazy(Modality):\n    part_type = 'lazy'\n")
    with pytest.raises(ConfigError, match="lacks config_type, load, prepare, collate, build_encoder"):
        resolve("modality", f"{file}:Lazy")


def test_the_members_asked_for_are_those_of_the_contract() -> None:
    declared = {*Modality.__annotations__, *(name for name, value in vars(Modality).items() if callable(value))}
    public = {name for name in declared if not name.startswith("_")}
    assert set(plugins._MEMBERS["modality"]) == public - {"name", "config"}
