"""Data that talk to the terminal: they are shown, and do nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from molora.cli import commands as cli

CLEAR = "\x1b[2J\x1b]0;owned\x07\x9b31m"
SHOWN = "\\x1b[2J\\x1b]0;owned\\x07\\x9b31m"


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Runs a command that fails; what it wrote, on both streams."""
    monkeypatch.setattr(sys, "argv", ["molora", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code
    said = capsys.readouterr()
    return said.out + said.err


@pytest.mark.parametrize("command", ["generate", "verify", "eval", "train"])
def test_a_name_with_escapes_does_not_reach_the_terminal_in_an_error(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"run{CLEAR}"
    folder.mkdir()
    (folder / "molora.json").write_text(json.dumps({"format_version": "9"}))
    arguments = {"eval": [str(folder), str(folder / "x.yaml")], "train": [str(folder / "x.yaml")]}
    said = told(capsys, monkeypatch, command, *arguments.get(command, [str(folder), *["hi"] * (command == "generate")]))
    assert SHOWN in said and not {"\x1b", "\x07", "\x9b"} & set(said)


def test_a_run_that_says_of_itself_what_a_terminal_obeys_is_quoted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "molora.json").write_text(json.dumps({"format_version": f"[red]{CLEAR}"}))
    said = told(capsys, monkeypatch, "generate", str(tmp_path), "hi")
    assert "[red]" in said and not {"\x1b", "\x07", "\x9b"} & set(said)


def test_a_plugin_named_with_escapes_is_shown_in_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["molora", "modality", "list", f"[bold]{CLEAR}.py:A"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "[bold]" in said and "owned" in said and not {"\x1b", "\x07", "\x9b"} & set(said)
