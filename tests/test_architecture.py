"""Who may import whom, read from the source.

Imports point one way, importing works nothing out, and the model knows no modality by name.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# The folders of molora/, each with those that it may import besides itself and the root: the files in molora/ itself,
# `config` and `media`, which import nothing but each other. None imports one below it.
MAY_IMPORT = {
    "data": "",
    "model": "data",
    "checkpoint": "data model",
    "convert": "data model checkpoint",
    "inference": "data model checkpoint convert",
    "evaluate": "data model checkpoint convert inference",
    "train": "data model checkpoint convert inference evaluate",
    "pretrain": "data model checkpoint train",
    "verify": "data model checkpoint convert inference",
    "testing": "",
    "plugin_kit": "data model checkpoint convert inference evaluate train testing",
    "serve": "data model checkpoint convert inference",
    "synthetic": "data model checkpoint convert inference evaluate",
    "doctor": "data model checkpoint convert inference evaluate train testing",
    "report": "data model checkpoint convert inference evaluate train",
    "data_tools": "data model checkpoint convert inference evaluate train doctor report",
    "demo": "data model checkpoint convert inference evaluate train pretrain report",
    "cli": "data model checkpoint convert inference evaluate train pretrain verify plugin_kit serve synthetic doctor "
    "report data_tools demo",
}
ROOT_ROOMS = ("", "config", "media")
# What a function may import though its file may not: plugins import `testing`, and must not bring the model with them.
IN_FUNCTIONS = {"testing": "plugin_kit"}

# Plugins arrive by name: only `plugins` reads the tables of the built-in ones, and what they may import is little.
PLUGINS = ("molora.encoders", "molora.routers")
PLUGIN_MAY_IMPORT = {
    "molora.encoders": {"molora.config", "molora.hub", "molora.media", "molora.modality", "molora.received"},
    "molora.routers": {"molora.config", "molora.routing"},
}

# Optional or slow to import, so imported where they are used.
LAZY = (
    "datasets",
    "easy_vqa",
    "espeakng_loader",
    "jiwer",
    "llguidance",
    "matplotlib",
    "open_clip",
    "pillow_heif",
    "rapidfuzz",
    "ray",
    "rouge_score",
    "sacrebleu",
    "soundfile",
    "tensorboard",
    "torchao",
    "torchaudio",
)

# Files that another program loads as parts of it, with the library that it brings: their classes are made from its own.
PARTS_OF = {
    "molora.evaluate.harness.lm_eval": "lm_eval",
    "molora.evaluate.harness.lmms_eval": "lmms_eval",
}

# Rooms that are an extra: their files import its libraries as they start, and others import them only in functions.
EXTRA_ROOMS = {
    "serve": ("fastapi", "httpx2", "prometheus_client", "pydantic", "starlette", "typing_extensions", "uvicorn")
}

# Installed because something else needs them to work for us.
NEEDED_UNSEEN = {
    "jinja2": "transformers renders chat templates with it",
    "torchvision": "timm imports it, and it must match torch",
}
IMPORTED_AS = {
    "easy-vqa": "easy_vqa",
    "espeakng-loader": "espeakng_loader",
    "open_clip_torch": "open_clip",
    "pillow": "PIL",
    "pyyaml": "yaml",
}

# Calls that make a constant; anything else at the top of a module is work at import.
CONSTANT_MAKERS = (
    *("dict", "float", "frozenset", "int", "len", "max", "min", "range", "set", "sorted", "sum", "tuple"),
    *("Console", "ContextVar", "NewType", "ParamSpec", "Path", "Sources", "TypeVar", "logging.getLogger", "re.compile"),
    "threading.Lock",
    *("BeforeValidator", "Field", "typer.Argument", "typer.Option", "typer.Typer"),
)


class Import(NamedTuple):
    """`module` is imported by `file` in `line`; `top` means when the file itself is imported."""

    file: Path
    line: int
    module: str
    top: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


SOURCES = sorted(path for top in ("molora", "encoders", "routers") for path in (ROOT / top).glob("**/*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "molora" else ("molora", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def owner(module: str) -> str | None:
    """The package of plugins that a module belongs to."""
    return next((name for name in PLUGINS if module == name or module.startswith(name + ".")), None)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path)


def at_run_time(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node` with whether it is inside a function; what is under `if TYPE_CHECKING` does not run."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for otherwise in child.orelse:
                yield from at_run_time(otherwise, inside_function)
            continue
        yield child, inside_function
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from at_run_time(child, inside_function or function)


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """What a file imports when it runs. `from molora import x` counts as the module molora.x if there is one."""
    found = []
    modules = {module_name(source) for source in SOURCES} | {"molora"}
    for node, inside in at_run_time(tree(path)):
        if isinstance(node, ast.Import):
            found += [Import(path, node.lineno, alias.name, not inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{path.relative_to(ROOT)}:{node.lineno}: write the import in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append(Import(path, node.lineno, inner if inner in modules else node.module, not inside))
    return tuple(found)


def ours(path: Path) -> Iterator[Import]:
    for found in imports(path):
        if found.module == "molora":
            yield found._replace(module="molora.__init__")
        elif found.module.startswith("molora."):
            yield found


def room(module: str) -> str:
    """The folder of molora/ that a module is in, however deep; the root is the empty name."""
    name = [*module.split("."), ""][1]
    return name if (ROOT / "molora" / name).is_dir() else ""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    name = module_name(path)
    if plugin := owner(name):
        for found in ours(path):
            allowed = owner(found.module) == plugin or found.module in PLUGIN_MAY_IMPORT[plugin]
            assert allowed, f"{found}, but files in {plugin} import only {sorted(PLUGIN_MAY_IMPORT[plugin])}"
        return
    here = room(name)
    if name in ("molora", "molora.__main__"):
        return  # the public names and the command, which are anywhere
    assert here in (*ROOT_ROOMS, *MAY_IMPORT), f"{here} is no room yet; add it to MAY_IMPORT"
    for found in ours(path):
        if owner(found.module):
            assert name == "molora.plugins", f"{found}, but plugins arrive by name, through molora.plugins"
            assert found.module in PLUGINS, f"{found}, but only the table of a package of plugins is read"
            continue
        allowed = {here, *ROOT_ROOMS, *MAY_IMPORT.get(here, "").split()}
        allowed |= set() if found.top else set(IN_FUNCTIONS.get(here, "").split())
        assert room(found.module) in allowed, f"{found}, but files in molora/{here} import only {sorted(allowed)}"


def test_no_import_cycles() -> None:
    graph = {module_name(path): {found.module for found in ours(path)} for path in SOURCES}

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        for module in sorted(graph.get(name, ())):
            if module not in done:
                walk(module, (*trail, name))
        done.add(name)

    done: set[str] = set()
    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_work_at_import(path: Path) -> None:
    makers = {*CONSTANT_MAKERS, *(node.name for node in tree(path).body if isinstance(node, ast.ClassDef))}
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.If,
    )
    for node in tree(path).body:
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        if isinstance(node, ast.If):
            condition = ast.unparse(node.test)
            assert condition.startswith("__name__") or condition.endswith("TYPE_CHECKING"), f"{where}: if at import"
            continue
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        group_of_commands = isinstance(node, ast.Expr) and ast.unparse(node).startswith("app.add_typer(")
        assert docstring or group_of_commands or isinstance(node, allowed), (
            f"{where}: {type(node).__name__} runs at import"
        )
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for call, inside in at_run_time(node):
                if isinstance(call, ast.Call) and not inside:
                    called = ast.unparse(call.func)
                    of_a_constant = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Constant)
                    assert of_a_constant or called in makers, f"{where}: calls {called} at import"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    for found in imports(path):
        heavy = any(found.module == name or found.module.startswith(name + ".") for name in LAZY)
        assert not (heavy and found.top), f"{found} at the top of the file; import it in the function that uses it"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_room_that_is_an_extra_is_imported_where_it_is_used(path: Path) -> None:
    here = room(module_name(path))
    for found in ours(path):
        there = room(found.module)
        assert there == here or there not in EXTRA_ROOMS or not found.top, f"{found} at the top of the file"


def test_what_another_program_loads_is_imported_by_nothing_else() -> None:
    for path in SOURCES:
        for found in ours(path):
            assert found.module not in PARTS_OF, f"{found}, which only {PARTS_OF.get(found.module)} can load"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_model_or_tokenizer_brings_code_of_its_own(path: Path) -> None:
    """What opens one says so itself, whatever the default is."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            opens = node.func.attr in ("from_pretrained", "from_config") and "PeftModel" not in ast.unparse(node.func)
            said = {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node.func)}"
            assert not opens or said.get("trust_remote_code") == "False", f"{where} without trust_remote_code=False"
            assert said.get("trust_remote_code", "False") == "False", f"{where} runs code of a model"


@pytest.mark.parametrize("name", ["data/processor", "model/lora", "model/molora", "model/projector", "pack", "routing"])
def test_the_model_knows_no_modality_by_name(name: str) -> None:
    source = tree(ROOT / "molora" / f"{name}.py")
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(source)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            known = re.search(r"\b(audio|image|series|speech|video|vision)s?\b", node.value)
            assert known is None, f"molora/{name}.py:{node.lineno} names a modality: {node.value!r}"


def requirements() -> tuple[set[str], set[str]]:
    """Import names of what setup.cfg installs always, and of what its extras add."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")

    def names(lines: str) -> set[str]:
        distributions: list[str] = re.findall(r"^([A-Za-z][\w.-]*)", lines, flags=re.MULTILINE)
        return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in distributions}

    return names(setup["options"]["install_requires"]), names("\n".join(setup["options.extras_require"].values()))


def test_setup_cfg_requires_what_is_imported_and_nothing_else() -> None:
    core, extra = requirements()
    third_party = [
        found._replace(module=found.module.split(".")[0])
        for path in SOURCES
        for found in imports(path)
        if found.module.split(".")[0] not in {*sys.stdlib_module_names, "molora"}
    ]
    brought = set(PARTS_OF.values())
    for found in third_party:
        if found.module in brought:
            part = module_name(found.file)
            assert not found.top or PARTS_OF.get(part) == found.module, f"{found}, but {part} is no part of it"
            continue
        in_time = not found.top or found.module in EXTRA_ROOMS.get(room(module_name(found.file)), ())
        assert found.module in core or (in_time and found.module in extra), (
            f"{found}, which a plain install does not bring (setup.cfg)"
        )
    unused = core - {found.module for found in third_party} - set(NEEDED_UNSEEN)
    assert not unused, f"setup.cfg installs {sorted(unused)}, which nothing imports"
