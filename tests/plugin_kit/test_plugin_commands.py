"""`molora modality` and `molora router` as an author meets them: tables of 80 columns, exit codes, clear errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from molora.cli import commands as cli
from molora.plugin_kit.scaffold import new_plugin

FAULTY_ROUTERS = Path(__file__).with_name("faulty_routers.py")

Told = tuple[int, str, str]


@pytest.fixture
def molora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """Runs a command in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["molora", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        assert all(len(line) <= 80 for line in told.out.splitlines()), told.out
        return code, told.out, told.err

    return run


def one_line(text: str) -> str:
    return " ".join(text.split())


def install(folder: Path, distribution: str, metadata: str, entries: str, **modules: str) -> None:
    """Puts a distribution with modules and entry points into a folder, as pip would."""
    info = folder / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.0\n{metadata}")
    (info / "entry_points.txt").write_text(entries)
    (info / "top_level.txt").write_text("\n".join(modules))
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def test_modalities_are_listed_with_origin_part_encoder_and_licence(molora, tmp_path: Path, monkeypatch) -> None:
    new_plugin("modality", "tide")
    plugin = (tmp_path / "tide.py").read_text()
    site = tmp_path / "site"
    entries = "[molora.modalities]\ntide = acme_tide:TideModality\n"
    install(site, "acme", "License-Expression: MIT\n", entries, acme_tide=plugin)
    old = "Classifier: License :: OSI Approved :: BSD License\n"
    entries = "[molora.modalities]\ngone = zeta_gone:Gone\nhalf = zeta_half:Half\n"
    install(site, "zeta", old, entries, zeta_half="class Half:\n    part_type = 'half'\n")
    monkeypatch.syspath_prepend(str(site))
    code, out, err = molora("modality", "list", "tide.py:TideModality", "zeta_half:Half")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and not err
    assert ["vision", "built-in", "image", "VisionEncoder", "Apache-2.0"] in rows
    assert ["tide", "acme", "tide", "TideEncoder", "MIT"] in rows
    assert ["TideModality", "file", "tide.py", "tide", "TideEncoder", "not", "stated"] in rows
    assert [row for row in rows if row[:2] in (["gone", "zeta"], ["half", "zeta"], ["Half", "zeta"])] == [
        [*name, "-", "-", "-"] for name in (["gone", "zeta"], ["half", "zeta"], ["Half", "zeta"])
    ]
    told = one_line(out)
    assert "gone: modality 'gone': importing 'zeta_gone' failed: ModuleNotFoundError" in told
    assert "half: modality 'half': class Half lacks config_type, load, prepare" in told


def test_a_licence_is_found_wherever_the_metadata_have_it(molora, tmp_path: Path, monkeypatch) -> None:
    new_plugin("modality", "tide")
    plugin = (tmp_path / "tide.py").read_text()
    site = tmp_path / "site"
    stated = {
        "one": "License: Zlib\n        and the whole text of it\n",
        "two": "License: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License\n",
        "three": "",
    }
    for name, metadata in stated.items():
        entries = f"[molora.modalities]\n{name} = {name}_tide:TideModality\n"
        install(site, name, metadata, entries, **{f"{name}_tide": plugin.replace('"tide"', f'"{name}"')})
    monkeypatch.syspath_prepend(str(site))
    _, out, _ = molora("modality", "list")
    rows = {line.split()[0]: " ".join(line.split()[4:]) for line in out.splitlines() if line.split()[0] in stated}
    assert rows == {"one": "Zlib", "two": "BSD License", "three": "not stated"}


def test_routers_are_listed_with_what_they_do(molora, tmp_path: Path) -> None:
    new_plugin("router", "ferry")
    (tmp_path / "sour.py").write_text(
        (tmp_path / "ferry.py").read_text().replace("        super().__init__()\n", "        raise KeyError('sour')\n")
    )
    code, out, err = molora("router", "list", "ferry.py:FerryRouter", "sour.py:FerryRouter")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and not err
    starts = [" ".join(row[:4]) for row in rows]
    assert {"table built-in no Hard", "sum built-in no Weighted", "learned built-in yes Gates"} <= set(starts)
    assert "FerryRouter file ferry.py yes" in starts and "FerryRouter file sour.py -" in starts
    assert "FerryRouter: 'sour'" in out


@pytest.mark.parametrize("kind", ["modality", "router"])
def test_new_says_what_it_wrote_and_what_comes_next(molora, tmp_path: Path, kind: str) -> None:
    code, out, err = molora(kind, "new", "tide")
    assert code == 0 and not err
    written = [line.removeprefix("wrote ") for line in out.splitlines() if line.startswith("wrote ")]
    assert written == ["tide.py", "tide.yaml", "test_tide.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(written)
    assert f"  molora {kind} check tide.py:Tide{kind.capitalize()}\n" in out
    code, out, err = molora(kind, "new", "tide")
    assert code == 1 and not out and err.startswith("error: tide.py, tide.yaml, test_tide.py: there already")
    code, out, _ = molora(kind, "new", "tide", "--out-of-tree", "package")
    assert code == 0 and "  cd package\n  pip install --editable .\n" in out and "check tide\n" in out
    assert (tmp_path / "package/molora_tide/tide.py").is_file()


def test_a_modality_that_keeps_its_contract_exits_with_0(molora) -> None:
    new_plugin("modality", "tide")
    code, out, _ = molora("modality", "check", "tide.py:TideModality", "patch_values=4")
    assert code == 0 and "it keeps the contract" in out
    assert "1 + 2 + 6 tokens" in one_line(out)  # the examples have 1, 8 and 21 values


def test_a_modality_that_breaks_its_contract_exits_with_1(molora, tmp_path: Path) -> None:
    new_plugin("modality", "tide")
    plugin = tmp_path / "tide.py"
    plugin.write_text(plugin.read_text().replace("num_tokens=len(patches_SW)", "num_tokens=len(patches_SW) + 1"))
    code, out, _ = molora("modality", "check", "tide.py:TideModality")
    lines = out.splitlines()
    marks = [line[:2] for line in lines[1:-1] if line[:2].strip()]
    assert code == 1 and lines[-1] == "1 failed, 20 passed, 10 not reached"
    assert marks == ["ok"] * 20 + ["--", "no"]
    assert any(line.startswith("no  tokens equal frames") for line in lines)
    assert "-- 10 more not reached because of what 'tokens equal frames' found" in one_line(out)
    code, out, _ = molora("modality", "check", "tide.py:TideModality", "patch_value=4")
    assert code == 1 and "did you mean 'patch_values'" in one_line(out)
    code, _, err = molora("modality", "check", "tide.py:TideModality", "patch_values")
    assert code == 1 and "write it as key=value" in err


def test_a_modality_is_tried_on_the_parts_of_a_file(molora, tmp_path: Path) -> None:
    new_plugin("modality", "tide")
    (tmp_path / "series.txt").write_text("1 2 3 4 5 6 7 8 9")
    parts = [{"type": "tide", "path": "series.txt"}, {"type": "tide", "values": [1, 2]}, {"type": "smell"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    code, out, _ = molora("modality", "check", "tide.py:TideModality", "--messages", "rows.jsonl")
    assert code == 0 and "2 + 1 tokens" in one_line(out)
    (tmp_path / "series.txt").write_text("1 two 3")
    code, out, _ = molora("modality", "check", "tide.py:TideModality", "--messages", "rows.jsonl")
    assert code == 1 and "could not convert string to float: 'two'" in one_line(out)
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": parts[2:]}]}))
    code, _, err = molora("modality", "check", "tide.py:TideModality", "--messages", "rows.jsonl")
    assert code == 1 and "no parts of type 'tide', which tide.py:TideModality answers to; there are smell" in err


def test_routers_are_checked_with_the_options_of_a_recipe(molora) -> None:
    code, out, _ = molora("router", "check", "table", "rules.audio+vision=vision")
    assert code == 0 and "it keeps the contract" in out and "decides for audio, vision, audio+vision" in one_line(out)
    code, out, _ = molora("router", "check", f"{FAULTY_ROUTERS}:ShortSlices")
    assert code == 1 and any(line.startswith("no  slices") for line in out.splitlines())
    assert "not reached because of what 'slices' found" in one_line(out)
    code, out, _ = molora("router", "check", "learned")
    assert code == 1 and "missing 'modalities'" in one_line(out)
