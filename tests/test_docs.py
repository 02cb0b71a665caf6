"""Every `molora` command in the documentation is one that there is, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from molora import cli

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("molora ")
]


def parse(line: str) -> None:
    """Reads a line as the command would, without running it."""
    command: Any = get_command(cli.app)
    _, *words = shlex.split(line, comments=True)
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.commands[name]
    command.make_context(name, words)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_documented_command_is_one_that_there_is(page: str, line: str) -> None:
    parse(line)


def test_the_pages_have_commands_and_a_wrong_one_would_be_seen() -> None:
    assert {"README.md", "add_a_modality.md"} <= {page for page, _ in COMMANDS}
    for line in ("molora modality renew tide", "molora modality new", "molora eval runs/tide --fast"):
        with pytest.raises(Exception, match=r"renew|Missing|No such option"):
            parse(line)
