"""Every `molora` command in the documentation is one that there is, with options that it has; every link leads to a
file; the tutorials run from their first line to their last; and what the page about modalities quotes is what the
scaffold writes, recipes read and commands print."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from molora.cli import commands as cli
from molora.config import build, plain_yaml
from molora.data.formats.table import TableConfig
from molora.data.sources import MessagesConfig, SourceConfig
from molora.plugin_kit.scaffold import new_plugin
from molora.plugins import available, find
from molora.testing import save_backbone
from molora.train.recipe import StageConfig

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("molora ")
]


PAGE = (ROOT / "docs/tutorials/add_a_modality.md").read_text(encoding="utf-8")
# Python on the page that is not the scaffold's: what to add to it, and the use of what was trained.
ADDED = ("if generator is not None", "def saved_config", "beside_picture", "molora.load")


def blocks(language: str) -> list[str]:
    """The page's blocks of a language, without their common indent."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for named, block in found if named == language]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which somebody follows the page."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


def test_the_page_quotes_the_scaffold(here: Path) -> None:
    new_plugin("modality", "tide")
    written = {line.strip() for line in (here / "tide.py").read_text().splitlines()}
    quoted = [block for block in blocks("python") if not any(words in block for words in ADDED)]
    assert len(quoted) == len(blocks("python")) - len(ADDED) == 3
    assert [line for block in quoted for line in block.splitlines() if line and line.strip() not in written] == []


def test_the_recipes_on_the_page_are_read() -> None:
    recipes: list[Any] = [plain_yaml.parse(block) for block in blocks("yaml")]
    data, stages, router = recipes
    kinds = {"messages": MessagesConfig, "table": TableConfig}
    sources = [build(SourceConfig, source, "the page") for source in data["data"].values()]
    assert [source.kind for source in sources] == ["messages", "table"]
    for source in sources:
        build(kinds[source.kind], source.options, "the page")
    assert [build(StageConfig, stage, "the page").name for stage in stages["stages"]] == ["describe", "answer"]
    assert router["router"]["options"]["rules"] == {"tide+vision": "tide"}


def test_what_the_page_shows_is_what_the_commands_print(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written, trains, trained, found, *_ = blocks("")

    def told(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["molora", *arguments])
        with suppress(SystemExit):
            cli.main()
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    assert told("modality", "new", "tide") == written.splitlines()

    backbone = save_backbone(here / "backbone")
    shorter = ("train", "tide.yaml", f"backbone.path={backbone}", "evaluations={}", "stages.0.steps=2", "device=cpu")
    lines = told(*shorter)
    assert lines[:5] == trains.replace("100 steps", "2 steps").splitlines()
    assert told(*shorter)[0] == trained.replace("100 of 100", "2 of 2").rstrip()

    text = (here / "tide.py").read_text()
    (here / "longer.py").write_text(text.replace("num_tokens=len(patches_SW)", "num_tokens=len(patches_SW) + 1"))
    assert told("modality", "check", "longer.py:TideModality")[-5:] == found.splitlines()


def test_the_sources_on_the_page_about_data_are_read() -> None:
    text = (ROOT / "docs/how_to/data.md").read_text(encoding="utf-8")
    sources = [
        build(SourceConfig, source, name)
        for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        for name, source in plain_yaml.parse(block)["data"].items()
    ]
    for source in sources:
        plugin: Any = find("source", source.kind).plugin
        build(plugin.config_type, source.options, "the page")
    formats = {plugin.name for plugin in available("source") if plugin.spec.startswith("molora.data.formats.")}
    assert {source.kind for source in sources} >= formats


def follow(page: str) -> None:
    """Does what a tutorial says, in the current folder: writes its files and runs its commands, trainings of two
    steps."""
    shorter = {"train": "stages.0.steps=2", "pretrain": "steps=2"}
    text = (ROOT / "docs/tutorials" / page).read_text(encoding="utf-8")
    fence = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
    for language, title, block in fence.findall(text):
        if title:
            Path(title).write_text(block, encoding="utf-8")
        elif language == "sh":
            for line in block.splitlines():
                program, *words = shlex.split(line)
                if program == "python":
                    runpy.run_path(words[0], run_name="__main__")
                else:
                    assert program == "molora", line
                    get_command(cli.app)([*words, *filter(None, [shorter.get(words[0])])], standalone_mode=False)


def test_the_tutorials_run_from_their_first_line_to_their_last(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(here / "cache"))
    follow("train_on_your_own.md")
    assert {path.name for path in (here / "runs").iterdir()} == {"pictures", "sounds"}
    follow("mixed_inference.md")
    assert len((here / "answers.jsonl").read_text().splitlines()) == 3


def test_every_link_leads_to_a_file() -> None:
    """The site checks its own; these are the links as they are in the repository."""
    generated = ("recipes.md", "plugins.md", "commands.md", "architecture.md")
    lost = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not ((page.parent / link).exists() or Path(link).name in generated)
    ]
    assert lost == []
