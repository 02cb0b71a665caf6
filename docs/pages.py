"""Pages of the site that the code says: every key of a recipe, every option of a plugin, every command.

mkdocs runs this as a hook (mkdocs.yml). The pages exist in the site alone.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml
from mkdocs.structure.files import File, Files
from typer.main import get_command

from molora.cli.commands import app
from molora.doctor.needs import AnsweringConfig
from molora.plugins import Kind, available, find
from molora.pretrain.loop import PretrainConfig
from molora.synthetic.workflow import WorkflowConfig
from molora.train.recipe import Recipe

ROOT = Path(__file__).parents[1]

RECIPES = """# Keys of a recipe

A recipe is a YAML file that `molora train` reads. A key that is not on this page is an error, which names the nearest
one. The title of a section is the place of its keys: `NAME` is a name that you choose, and `0` the place in a list,
counted from 0. On the command line a key is written the same way: `stages.0.steps=200`.

`base: other.yaml` at the top names a parent, whose keys hold where the file does not say otherwise. `${key}` stands for
the value of another key.

The options of modalities, routers, sources of data and metrics are in [Options of plugins](plugins.md).
"""

PLUGINS = """# Options of plugins

What comes with molora. A recipe names a plugin and gives it `options`; a key that is not in its table is an error. For
plugins that are installed beside molora, `molora modality list`, `molora router list`, `molora metric list` and
`molora step list` show where they come from.
"""

COMMANDS = """# Commands

`--help` after any command prints what is here. Errors are one paragraph; `molora --debug COMMAND` shows the traceback.
"""

# Where the options of a kind of plugin stand in a recipe, and the heading of its plugins.
KINDS: dict[Kind, tuple[str, str]] = {
    "modality": ("Modalities", "under `modalities.NAME.options`, beside `plugin: {}`"),
    "router": ("Routers", "under `router.options`, beside `plugin: {}`"),
    "source": ("Sources of data", "under `options` of a source, beside `kind: {}`"),
    "step": ("Steps of workflows", "under `steps.0.options`, beside `kind: {}`"),
    "metric": ("Metrics", "in the list `evaluations.NAME.metrics`, as `{}` or `{{{}: {{option: value}}}}`"),
}


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages. mkdocs calls it."""
    pages = {
        "reference/recipes.md": recipes(),
        "reference/plugins.md": plugins(),
        "reference/commands.md": commands(),
        "explanation/architecture.md": (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def recipes() -> str:
    """Every key of a recipe, and of the other files that commands read."""
    return "\n".join(
        [
            RECIPES,
            *_sections("At the top", Recipe),
            "## The file of `molora pretrain`\n",
            *_sections("", PretrainConfig),
            "## The file of `molora make`\n",
            *_sections("", WorkflowConfig),
            "## Settings of `molora doctor --fit MODEL`\n",
            *_sections("", AnsweringConfig),
        ]
    )


def plugins() -> str:
    """Every built-in plugin with its options."""
    lines = [PLUGINS]
    for kind, (heading, place) in KINDS.items():
        lines.append(f"## {heading}\n")
        for name in [plugin.name for plugin in available(kind) if plugin.origin == "built-in"]:
            plugin: Any = find(kind, name).plugin
            lines += [f"### {name} {{ #{kind}-{name} }}\n", f"{_doc(plugin)}\n"]
            if fields(plugin.config_type):
                lines += [
                    f"Its options stand {place.format(name, name)}.\n",
                    *_sections("", plugin.config_type, "####"),
                ]
            else:
                lines.append("It has no options.\n")
    return "\n".join(lines)


def commands() -> str:
    """Every command with its arguments and options."""
    return "\n".join([COMMANDS, *_command("molora", get_command(app))])


def _command(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for inner, each in command.commands.items():
            yield from _command(f"{name} {inner}", each)
        return
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {name}\n\n```text\n{name} {usage}\n```\n\n{inspect.cleandoc(command.help or '')}\n"
    records = [record for each in command.params if (record := each.get_help_record(context))]
    rows = [f"| `{_cell(shown)}` | {_cell(' '.join(help.split()))} |\n" for shown, help in records]
    yield "| argument or option | meaning |\n|---|---|\n" + "".join(rows)


def _sections(title: str, root: type, level: str = "##") -> Iterator[str]:
    """A dataclass as a table of its fields, then the dataclasses that it holds."""
    waiting, seen = [(title, "", root)], set()
    while waiting:
        title, prefix, each = waiting.pop(0)
        if each in seen:
            continue
        seen.add(each)
        if title:
            yield f"{level} {title} {{ #{_anchor(each)} }}\n"
        yield f"{_doc(each)}\n"
        hints, rows = typing.get_type_hints(each), []
        for field in fields(each):
            rows.append(f"| `{field.name}` | {_cell(_type(hints[field.name]))} | {_default(field)} |\n")
            for inner, place in _held(hints[field.name]):
                waiting.append((f"`{prefix}{field.name}{place}`", f"{prefix}{field.name}{place}.", inner))
        yield "| key | value | default |\n|---|---|---|\n" + "".join(rows)


def _held(hint: Any, place: str = "") -> Iterator[tuple[type, str]]:
    """The dataclasses in a type, each with its place below the key."""
    if is_dataclass(hint):
        yield typing.cast(type, hint), place
    for argument in typing.get_args(hint):
        step = {dict: ".NAME", list: ".0"}.get(typing.get_origin(hint), "")
        yield from _held(argument, place + step)


def _type(hint: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is dict:
        return "options by name" if arguments[1] is Any else f"by name: {_type(arguments[1])}"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if is_dataclass(hint):
        return f"[keys](#{_anchor(hint)})"
    words = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}
    return words.get(hint, "any value")


def _default(field: Field[Any]) -> str:
    value = _value(field)
    if value is MISSING:
        return "required"
    if is_dataclass(value):
        value = {each.name: given for each in fields(value) if (given := getattr(value, each.name)) != _value(each)}
        return _flow(value) if value else "its own defaults"
    return _flow(value)


def _value(field: Field[Any]) -> Any:
    """The default of a field; MISSING for one without."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _flow(value: Any) -> str:
    """A value as a recipe has it, as code."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return f"`{text.splitlines()[0]}`"  # a second line says that the value ends


def _anchor(config_type: Any) -> str:
    return re.sub(r"\W", "-", f"{config_type.__module__}-{config_type.__name__}").lower()


def _doc(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
