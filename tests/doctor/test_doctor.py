from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from molora.doctor.installation import examine, libraries
from molora.terminal import Finding, console, print_findings


def test_libraries_are_compared_with_what_is_installed() -> None:
    lines = [
        "rich>=1",
        "packaging<1",
        "no-such-library==2.*",
        "another-one; extra == 'audio'",
        "left-out; extra == 'dev'",
        "of-another-system; sys_platform == 'win32'",
    ]
    assert list(libraries(lines, ["audio"])) == [
        Finding("rich", version("rich"), True, ">=1"),
        Finding("packaging", version("packaging"), False, "<1", "pip install 'packaging<1'"),
        Finding("no-such-library", "not installed", False, "==2.*", "pip install 'no-such-library==2.*'"),
        Finding("another-one", "not installed", None, "", "pip install 'molora[audio]'"),
    ]


def test_this_environment_is_sound() -> None:
    bad = [finding for finding in examine() if finding.ok is False]
    # The tests also run in a checkout that is not installed.
    assert [finding for finding in bad if finding.found != "not installed" or finding.what != "molora"] == []


def test_the_table_fits_in_80_columns_and_keeps_every_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = "/a/long/path" * 12
    remedy = "pip install 'molora[audio]' " + "and more " * 20
    monkeypatch.setattr(console, "width", 200)
    assert not print_findings("what", [Finding("what", "found"), Finding("library", found, False, "==2.11.*", remedy)])
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    squeezed = "".join(shown.split())
    assert all("".join(part.split()) in squeezed for part in (remedy, "==2.11.*"))
    assert squeezed.count("/a/long/path") >= 5


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """Here torch is a CPU build and torchaudio the registry's, which then fails; transformers is the real one."""

    def installed(name: str, version: str, *more: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *more])
        )

    core = ["torch==2.11.*", "transformers>=5", "torchaudio==2.11.*; extra == 'audio'"]
    installed("molora", "9.9", *(f"Requires-Dist: {line}" for line in core), "Provides-Extra: audio")
    installed("torch", "2.11.0+cpu")
    installed("torchvision", "0.26.0+cpu")
    installed("torchaudio", "2.11.0")
    (tmp_path / "torchaudio.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')")
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


def test_a_broken_library_is_reported_with_its_cause_and_the_exit_code_says_so(
    tmp_path: Path, broken: dict[str, str]
) -> None:
    # Away from the checkout: metadata in the working directory would come first.
    command = [sys.executable, "-m", "molora", "doctor"]
    ran = subprocess.run(command, cwd=tmp_path, env=broken, capture_output=True, text=True)
    shown = " ".join(ran.stdout.split())
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "molora 9.9" in shown
    assert "ok torch 2.11.0+cpu" in shown
    assert "no torchaudio 2.11.0, import fails: OSError" in shown
    assert f"no transformers {version('transformers')}, import fails: OSError" in shown
    assert "torchaudio 2.11.0 is the registry build, but torch 2.11.0+cpu is not" in shown
    assert "torchaudio==2.11.0 --index-url https://download.pytorch.org/whl/cpu" in shown
    assert "offline, HF_HUB_OFFLINE is set" in shown
