"""What plugins there are, with where each comes from: what `molora modality list` and its like print."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from pathlib import Path
from typing import Any

from molora.config import build
from molora.plugins import Kind, Plugin, available, resolve
from molora.terminal import print_table, say, styled

_UNKNOWN = "not stated"
# What a router is built with to see whether it learns.
_ADAPTERS = ["audio", "vision"]
_WIDTH = 8


@dataclass(frozen=True)
class Entry:
    """A plugin: its name, where it comes from, what its columns say, and why it cannot be used, if it cannot."""

    name: str
    origin: str
    columns: tuple[str, ...] = ()
    error: str = ""


def modalities(specs: Sequence[str] = ()) -> list[Entry]:
    """Every modality that has a name, and those of `specs`; columns are part type, encoder and licence."""
    return _entries("modality", specs, lambda found, origin: (str(found.part_type), _encoder(found), _licence(origin)))


def routers(specs: Sequence[str] = ()) -> list[Entry]:
    """Every router that has a name, and those of `specs`; columns are whether it learns, and what it does."""
    return _entries("router", specs, lambda found, _: ("yes" if _learns(found) else "no", _summary(found)))


def metrics(specs: Sequence[str] = ()) -> list[Entry]:
    """Every metric that has a name, and those of `specs`; the column is what it gives."""
    return _entries("metric", specs, lambda found, _: (_summary(found),))


def steps(specs: Sequence[str] = ()) -> list[Entry]:
    """Every step of workflows that has a name, and those of `specs`; the column is what it makes."""
    return _entries("step", specs, lambda found, _: (_summary(found),))


def _entries(kind: Kind, specs: Sequence[str], columns: Callable[[Any, str], tuple[str, ...]]) -> list[Entry]:
    entries = []
    named = [(plugin, plugin.name) for plugin in available(kind)]
    for plugin, spec in [*named, *((_from_spec(spec), spec) for spec in specs)]:
        try:
            entries.append(Entry(plugin.name, plugin.origin, columns(resolve(kind, spec), plugin.origin)))
        except Exception as error:  # a plugin can fail in any way; its own error is shown
            entries.append(Entry(plugin.name, plugin.origin, error=str(error)))
    return entries


def show(entries: Sequence[Entry], columns: Sequence[str]) -> None:
    """Prints a table within 80 columns, then why some cannot be used."""
    rows = [(entry.name, entry.origin, *(entry.columns or ["-"] * len(columns))) for entry in entries]
    print_table(("name", "origin", *columns), rows)
    for entry in entries:
        if entry.error:
            say(styled(entry.name, "red"), f": {entry.error}")


def _from_spec(spec: str) -> Plugin:
    """A plugin that is named by its file, or by its module, whose origin is the distribution that it belongs to."""
    module, _, class_name = spec.rpartition(":")
    if module.endswith(".py"):
        return Plugin(class_name, f"file {Path(module).name}", spec)
    return Plugin(class_name, packages_distributions().get(module.partition(".")[0], [module])[0], spec)


def _licence(origin: str) -> str:
    """What a distribution's metadata say, whichever of their three fields it is in."""
    try:
        about: Any = metadata("molora" if origin == "built-in" else origin)
    except PackageNotFoundError:
        return _UNKNOWN
    for key in ("License-Expression", "License"):
        if (stated := about.get(key) or "UNKNOWN") != "UNKNOWN":
            return stated.splitlines()[0]  # some put the whole text there
    classified = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    return ", ".join(line.rpartition(" :: ")[2] for line in classified) or _UNKNOWN


def _encoder(modality_class: type) -> str:
    """The class that `build_encoder` says it returns; what the modality says of itself if that tells nothing."""
    told = inspect.signature(modality_class.build_encoder).return_annotation  # pyright: ignore[reportAttributeAccessIssue]
    name = told.__name__ if isinstance(told, type) else str(told)
    return _summary(modality_class) if name in ("Encoder", "_empty") else name.replace(" | ", " or ")


def _summary(plugin_class: type) -> str:
    """The first sentence of the docstring."""
    text = " ".join((inspect.getdoc(plugin_class) or "").split())
    return text.partition(". ")[0].rstrip(".") or "no docstring"


def _learns(router_class: Any) -> bool:
    """Whether it has parameters, built with its defaults. It may require no option but `modalities`."""
    config_type = router_class.config_type
    required = {field.name for field in fields(config_type) if field.default is field.default_factory is MISSING}
    options = {"modalities": _ADAPTERS} if "modalities" in required else {}
    router = router_class(_ADAPTERS, build(config_type, options, "without options"), _WIDTH)
    return any(True for _ in router.parameters())
