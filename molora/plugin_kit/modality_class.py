"""Clauses about a modality's class: its members, its options, its name, its projectors."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from molora.checkpoint.assembly import Blueprint
from molora.config import ConfigError, build
from molora.modality import Modality
from molora.plugin_kit.clauses import Fault, clause
from molora.plugin_kit.under_test import OTHER, OWN, ModalityUnderTest, tiny_molora
from molora.plugins import available, resolve
from molora.testing.side_effects import fingerprint


@clause("members")
def members(tested: ModalityUnderTest) -> str:
    tested.plugin = resolve("modality", tested.spec)
    return f"{tested.plugin.__name__} has every member of the contract"


@clause("config", "members")
def config(tested: ModalityUnderTest) -> str:
    config_type = tested.plugin.config_type
    name = getattr(config_type, "__name__", repr(config_type))
    if not (isinstance(config_type, type) and is_dataclass(config_type)):
        raise Fault(f"{name} is no dataclass; add @dataclass: recipes read `options` into the fields of config_type")
    tested.config = build(config_type, tested.options, "options")
    try:
        again = build(config_type, json.loads(json.dumps(asdict(tested.config))), "modality.json")
    except (ConfigError, TypeError) as error:
        raise Fault(
            f"{name} does not survive being saved as JSON and read again ({error}); give it fields of plain values, "
            "lists, mappings and dataclasses, all of them in __init__"
        ) from error
    if fingerprint(again) != fingerprint(tested.config):
        raise Fault(
            f"{name} saved as JSON and read again is {again!r}, was {tested.config!r}; let __post_init__ leave the "
            "fields as they are, or do nothing the second time"
        )
    return f"{name} survives saving and reading, {len(fields(config_type))} fields"


@clause("name and part type", "config")
def name_and_part_type(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    if not isinstance(modality, Modality):
        raise Fault("an instance lacks name or config; __init__(self, name, config) keeps both")
    if modality.name != OWN or fingerprint(modality.config) != fingerprint(tested.config):
        raise Fault(
            f"built with name {OWN!r} and its config, an instance has name {modality.name!r} and config "
            f"{modality.config!r}; __init__(self, name, config) keeps both as they are"
        )
    part_type = modality.part_type
    if not isinstance(part_type, str) or part_type in ("", "text"):
        raise Fault(f"part_type is {part_type!r}; name a content part such as 'image', not 'text', the tokenizer's")
    twin = Blueprint(tested.spec, tested.plugin("twin", tested.config), None)
    try:
        tiny_molora({OWN: tested.blueprint(), "twin": twin})
    except ConfigError:
        told = f"answers to parts of type {part_type!r}"
        others = " and ".join(_answering(part_type, tested.plugin))
        return f"{told}, and so does {others}: the two cannot be used together" if others else told
    raise Fault(
        f"two of it went into one model, under the part types {part_type!r} and {twin.modality.part_type!r}; part_type "
        "is an attribute of the class, the same for every name"
    )


def _answering(part_type: str, but: type) -> list[str]:
    """The modalities with a name that answer to a part type too."""
    names = []
    for plugin in available("modality"):
        try:
            found: Any = resolve("modality", plugin.name)
        except ConfigError:  # what cannot be used is in nobody's way
            continue
        if found is not but and found.part_type == part_type:
            names.append(repr(plugin.name))
    return names


@clause("projectors", "name and part type")
def projectors(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    names = modality.projectors()
    if not (isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names)):
        raise Fault(f"projectors() is {names!r}; return a tuple of at least one name, such as ('default',)")
    if len(set(names)) < len(names) or any("." in name for name in names):
        raise Fault(f"projectors() is {names!r}; names are different from each other and hold no dot")
    # Neighbours that the options mention are those that projector() can know.
    mentioned = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(asdict(tested.config), ensure_ascii=False))
    others = sorted({OTHER, *(plugin.name for plugin in available("modality")), *mentioned})
    companies = [frozenset({OWN, *beside}) for beside in ((), others, *((name,) for name in others))]
    for company in companies:
        if (name := modality.projector(company)) not in names:
            raise Fault(
                f"projector of {sorted(company)} is {name!r}, but projectors() has {names!r}: name every projector "
                "there, and return one of them for every company"
            )
    return f"{', '.join(names)}; tried in {len(companies)} companies"
