"""Plugins to start from: templates filled with a name and written as new files."""

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Literal, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from molora.config import ConfigError
from molora.plugin_kit.catalogue import modalities
from molora.plugins import available


class Scaffold(NamedTuple):
    """What was written, and what recipes and commands call the plugin."""

    files: list[Path]
    spec: str


def new_plugin(kind: Literal["modality", "router"], name: str, folder: Path | None = None) -> Scaffold:
    """Writes a plugin that works, its recipe and its test: into the current folder, or as a package into `folder`.
    Raises ConfigError for a name that cannot be used or is taken, and for a file that is there already; then nothing is
    written."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 64 or keyword.iskeyword(name):
        wrong = f"{name!r} cannot name a {kind}"
        raise ConfigError(f"{wrong}; use at most 64 lower-case letters, digits and _, such as heart_rate")
    title = "".join(word.capitalize() for word in name.split("_"))
    plugin_class = title + kind.capitalize()
    package = f"molora_{name}"
    if folder is None:
        module, spec, source = name, f"{name}.py:{plugin_class}", f"{name}.py"
        files = {f"{name}.py": f"{kind}.py", f"{name}.yaml": f"{kind}.yaml", f"test_{name}.py": "test.py"}
    else:
        module, spec, source = package, name, f"{package}.{name}"
        files = {file: file for file in ("README.md", "setup.cfg", "pyproject.toml")}
        files |= {f"{package}/__init__.py": "__init__.py", f"{package}/{name}.py": f"{kind}.py"}
        files |= {f"{name}.yaml": f"{kind}.yaml", f"tests/test_{name}.py": "test.py"}
    paths = {(folder or Path()) / file: template for file, template in files.items()}
    if there := [str(path) for path in paths if path.exists()]:
        raise ConfigError(f"{', '.join(there)}: there already; nothing is overwritten, so move it or take another name")
    _check_free(kind, name, module)
    given = {"kind": kind, "name": name, "title": title, "plugin": spec, "plugin_class": plugin_class, "source": source}
    given["package"] = package if folder is not None else ""
    loader = PackageLoader("molora.plugin_kit")
    templates = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    texts = {path: templates.get_template(f"{template}.j2").render(given) for path, template in paths.items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Scaffold(list(texts), spec)


def _check_free(kind: Literal["modality", "router"], name: str, module: str) -> None:
    """Raises ConfigError for a name that a plugin has, or that is a part type, or whose module would hide another."""
    for plugin in available(kind):
        if plugin.name == name:
            raise ConfigError(f"{kind} {name!r} is there already, {plugin.spec} ({plugin.origin}); take another name")
    owners = {"text": "the tokenizer"}
    if kind == "modality":
        owners |= {entry.columns[0]: f"modality {entry.name!r}" for entry in modalities() if not entry.error}
    if name in owners:
        raise ConfigError(f"{owners[name]} answers to content parts of type {name!r} already; take another name")
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f"{name!r} would hide the installed Python module {module!r}; take another name")
