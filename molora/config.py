"""Configs: YAML files read into plain dataclasses, where every mistake is one error that names file and key.

A file may name one parent (`base: other.yaml`, relative to the file itself). Mappings merge, everything else replaces.
`key=value` overrides come last: `stages.0.learning_rate=1e-4`. Interpolation is OmegaConf's (`${key}`).
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config that cannot be used; the message says where, what is wrong and what would be right."""


def read(cls: type[T], path: str | Path, overrides: Iterable[str] = (), *, in_part: bool = False) -> T:
    """Reads a YAML file, its `base:` parents and `key=value` overrides into the dataclass `cls`.

    With `in_part` the file may have other keys at its top, which are left to others.

    Raises: ConfigError for an unreadable file, a typo, a wrong type, a missing key or a cycle of bases.
    """
    layers = _layers(Path(path), children=())
    values: Any = {}
    for _, layer in layers:
        values = _merge(values, layer)
    config = OmegaConf.create(values)
    for override in overrides:
        where = f"override {override!r} of {path}"
        _override(config, override, where)
        layers.append((where, OmegaConf.to_container(OmegaConf.from_dotlist([override]))))
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "")
        raise ConfigError(f"{_origin(layers, key) or path}: {key}: {_first_line(error)}") from error
    if in_part:
        own = typing.get_type_hints(cls)
        values = {key: value for key, value in values.items() if key in own}
    try:
        return _build(cls, values, "")
    except _Problem as problem:
        raise ConfigError(f"{_origin(layers, problem.key) or path}: {problem}") from problem


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Reads a mapping already in hand into the dataclass `cls`; `where` starts the message of every error.

    Raises: ConfigError for a typo, a wrong type or a missing key.
    """
    try:
        return _build(cls, mapping, "")
    except _Problem as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def options(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as nested mappings. Raises ConfigError."""
    config = OmegaConf.create({})
    for override in overrides:
        _override(config, override, f"option {override!r}")
    values: Any = OmegaConf.to_container(config, resolve=True)
    return values


def dump(config: Any) -> str:
    """Writes a dataclass as the YAML that `read` turns into an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def _override(config: Any, override: str, where: str) -> None:
    """Puts the value of `key=value` into an OmegaConf config."""
    key, equals, _ = override.partition("=")
    if not (key and equals):
        raise ConfigError(f"{where}: write it as key=value, such as stages.0.learning_rate=1e-4")
    try:
        # Only the value goes through OmegaConf's YAML, so that `stages.0` is an index and not a mapping's key.
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value{override[len(key) :]}"]))
        value = given["value"]
        words = [inside or plain for inside, plain in re.findall(r"\[(.*?)\]|([^.\[]+)", key)]
        key = "".join(f"[{step}]" for step in _steps(OmegaConf.to_container(config), words))
        OmegaConf.update(config, key, value, merge=isinstance(value, dict), force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from error


def _steps(values: Any, words: list[str]) -> list[str]:
    """A dotted key in steps. A key with dots that a mapping already has is one step; of several, the longest."""
    for count in range(len(words), 0, -1):
        step = ".".join(words[:count])
        if isinstance(values, dict) and step in values:
            return [step, *_steps(values[step], words[count:])]
    if isinstance(values, list) and words and words[0].isdigit() and int(words[0]) < len(values):
        return [words[0], *_steps(values[int(words[0])], words[1:])]
    return words


class _Problem(Exception):
    """What is wrong at a dotted key; the public functions add the file."""

    def __init__(self, key: str, text: str):
        super().__init__(f"{key}: {text}" if key else text)
        self.key = key


def _layers(path: Path, children: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """The file and its bases, eldest first, each as (name for errors, unresolved values)."""
    if path.resolve() in children:
        chain = " -> ".join(str(file) for file in (*children, path.resolve()))
        raise ConfigError(f"{path}: its bases lead back to it: {chain}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {_first_line(error)}") from error
    except OSError as error:
        child = f" (the `base:` of {children[-1]})" if children else ""
        raise ConfigError(f"{path}{child}: cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found a list")
    base = values.pop("base", None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of one file, got {base!r}")
    return [*_layers(path.parent / base, (*children, path.resolve())), (str(path), values)]


def _merge(parent: Any, child: Any) -> Any:
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return child
    return {**parent, **{key: _merge(parent.get(key), value) for key, value in child.items()}}


def _origin(layers: list[tuple[str, Any]], key: str) -> str | None:
    """The name of the last layer that says anything about `key`, or about the nearest key above it."""
    while key:
        for name, values in reversed(layers):
            if key in _keys(values):
                return name
        key = key.rpartition(".")[0]
    return None


def _keys(values: Any, above: str = "") -> Iterator[str]:
    """Every dotted key in nested mappings and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        key = _join(above, str(name))
        yield key
        yield from _keys(value, key)


def _build(kind: Any, value: Any, key: str) -> Any:
    """Turns plain YAML values into the annotated type `kind`, without converting anything but int to float."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(argument) for argument in arguments}:
            return value
        near = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _Problem(key, f"expected one of {', '.join(map(repr, arguments))}, got {value!r}{hint}")
    if (origin or kind) is dict and isinstance(value, Mapping):
        of = arguments[1] if arguments else Any
        for name in value:
            if not isinstance(name, str):
                raise _Problem(key, f"expected keys that are text, got {name!r}; quote it")
        return {name: _build(of, item, _join(key, name)) for name, item in value.items()}
    if (origin or kind) in (list, tuple) and isinstance(value, (list, tuple)):
        of = arguments or (Any, ...)
        kinds = [of[0]] * len(value) if origin is not tuple or of[-1] is ... else list(of)
        if len(kinds) != len(value):
            raise _Problem(key, f"expected {len(kinds)} values, got {len(value)}: {list(value)!r}")
        items = [_build(of, item, _join(key, str(i))) for i, (of, item) in enumerate(zip(kinds, value, strict=True))]
        return items if (origin or kind) is list else tuple(items)
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float, str, type(None)) and type(value) is kind:
        return value
    quote = "; quote it to make it text" if kind is str and isinstance(value, (bool, int, float)) else ""
    raise _Problem(key, f"expected {_name(kind)}, got {value!r} ({_name(type(value))}){quote}")


def _build_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return _build(others[0], value, key)
    for kind in sorted(others, key=lambda kind: kind is not type(value)):  # an int stays one in `float | int`
        try:
            return _build(kind, value, key)
        except _Problem:
            continue
    raise _Problem(key, f"expected {' or '.join(map(_name, kinds))}, got {value!r} ({_name(type(value))})")


def _build_dataclass(cls: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise _Problem(key, f"expected a mapping with the keys of {cls.__name__}, got {value!r}")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls) if field.init}
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            there = ", ".join(known) or "none"
            raise _Problem(_join(key, str(name)), f"no such key; {hint}{cls.__name__} has: {there}")
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise _Problem(key, f"missing {', '.join(map(repr, missing))}, which {cls.__name__} requires")
    kinds = typing.get_type_hints(cls)
    built = {name: _build(kinds[name], item, _join(key, name)) for name, item in value.items()}
    try:
        return cls(**built)
    except ValueError as error:  # the dataclass' own `__post_init__`
        raise _Problem(key, str(error)) from error


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists; `${` in text escaped, as it would be read as an interpolation."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
