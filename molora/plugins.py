"""Plugins: from a name in a config to the class that it means.

A spec is a built-in name, `package.module:Class`, `path/to/file.py:Class`, or a name that an installed package declares
in the entry-point group `molora.modalities`, `molora.routers` or `molora.sources`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from molora.config import ConfigError

Kind = Literal["modality", "router", "source"]

_GROUPS = {"modality": "molora.modalities", "router": "molora.routers", "source": "molora.sources"}

_SOURCES = {
    "messages": "molora.data:Messages",
    "table": "molora.table:Table",
    "easy_vqa": "molora.easy_vqa:EasyVQA",
    "spoken_easy_vqa": "molora.easy_vqa:SpokenEasyVQA",
}

# What a class must have to keep the contract of molora.modality, molora.routing or molora.data (`name` and `config` are
# instances').
_MEMBERS = {
    "modality": (
        *("config_type", "part_type", "load", "prepare", "collate", "build_encoder", "projector", "projectors"),
        "examples",
    ),
    "router": ("config_type", "order", "adapters", "learns", "forward"),
    "source": ("config_type", "__len__", "__getitem__"),
}


class Plugin(NamedTuple):
    """A plugin that has a name: who declares it ("built-in" or a distribution) and where its class is."""

    name: str
    origin: str
    spec: str


def available(kind: Kind) -> list[Plugin]:
    """Every plugin of a kind that has a name, built-in ones first."""
    if kind == "modality":
        from molora.encoders import MODALITIES as built_in
    elif kind == "router":
        from molora.routers import ROUTERS as built_in
    else:
        built_in = _SOURCES
    installed = (
        Plugin(entry.name, entry.dist.name if entry.dist else "an installed package", entry.value)
        for entry in entry_points(group=_GROUPS[kind])
    )
    # A distribution seen twice (an editable install beside its checkout) is one owner, hence the set.
    return [Plugin(name, "built-in", spec) for name, spec in built_in.items()] + sorted(set(installed))


def resolve(kind: Kind, spec: str) -> type:
    """Finds the class that `spec` means and checks that it has the members of its contract.

    Raises: ConfigError if nothing or more than one plugin answers to the name, if its module cannot be imported, or
    if the class lacks members.
    """
    if spec.endswith(".py"):
        fit = [name for name, found in _classes(_import(kind, spec, spec)).items() if not _missing(kind, found)]
        choices = " or ".join(f"{spec}:{name}" for name in fit or ["Class"])
        raise ConfigError(f"{kind} {spec!r}: names a file and no class in it; write {choices}")
    target = spec if ":" in spec else _named(kind, spec).spec
    module_name, _, class_name = target.rpartition(":")
    module = _import(kind, spec, module_name)
    try:
        found = getattr(module, class_name)
    except AttributeError as error:
        classes = list(_classes(module))
        raise ConfigError(
            f"{kind} {spec!r}: {module_name} has no {class_name!r}{_nearest(class_name, classes)}"
            f" its classes: {', '.join(classes) or 'none'}"
        ) from error
    if not isinstance(found, type):
        raise ConfigError(f"{kind} {spec!r}: {target} is {found!r}, not a class")
    if missing := _missing(kind, found):
        raise ConfigError(f"{kind} {spec!r}: class {class_name} lacks {', '.join(missing)}, which every {kind} has")
    return found


def _missing(kind: Kind, found: type) -> list[str]:
    """Members of the contract that a class lacks."""
    # Those that a Protocol declares do not count: a class that names the contract as its base has yet to fulfil it.
    own = {member for base in found.__mro__ if not getattr(base, "_is_protocol", False) for member in vars(base)}
    return [member for member in _MEMBERS[kind] if member not in own]


def _classes(module: ModuleType) -> dict[str, type]:
    """The classes in a module that its own file or package defines."""
    package = module.__name__.partition(".")[0]
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__.partition(".")[0] == package
    }


def _named(kind: Kind, name: str) -> Plugin:
    plugins = available(kind)
    owners = [plugin for plugin in plugins if plugin.name == name]
    if len(owners) > 1:
        claims = " and ".join(f"{plugin.origin} ({plugin.spec})" for plugin in owners)
        raise ConfigError(f"{kind} {name!r} is claimed by {claims}; write the `package.module:Class` that you mean")
    if not owners:
        names = [plugin.name for plugin in plugins]
        raise ConfigError(
            f"no {kind} is called {name!r}{_nearest(name, names)} there is {', '.join(names) or 'none'};"
            f" or write `package.module:Class` or `path/to/file.py:Class`"
        )
    return owners[0]


def _import(kind: Kind, spec: str, module_name: str) -> ModuleType:
    try:
        if module_name.endswith(".py"):
            return _import_file(Path(module_name))
        return importlib.import_module(module_name)
    except Exception as error:  # a plugin can fail in any way; its own error is shown and chained
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{kind} {spec!r}: importing {module_name!r} failed: {why}") from error


def _import_file(path: Path) -> ModuleType:
    """Imports a file once, under a name made from its path so that its classes pickle to forked data workers."""
    path = path.expanduser().resolve()
    name = f"molora_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ";"
