"""Configs: YAML files read into plain dataclasses, where every mistake is one error that names file and key.

A file may name one parent (`base: other.yaml`, relative to the file itself). Mappings merge, everything else replaces.
`key=value` overrides come last: `stages.0.learning_rate=1e-4`. `${key}` stands for the value of another key, `${.key}`
for that of a neighbour, and `\\${` for the two characters.

`${oc.env:NAME}` is an environment variable, and only of those that the user has listed in MOLORA_RECIPE_ENV: whoever
wrote a recipe may not read the secrets of who runs it. Written again, a value that came from there is the
interpolation that it was.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from molora.config import plain_yaml
from molora.config.interpolation import INTERPOLATION, FromEnvironment, Problem, Resolver, is_index, steps_to, words_of

T = TypeVar("T")

MAX_BYTES = 2**20
MAX_BASES = 16


class ConfigError(ValueError):
    """A config that cannot be used; the message says where, what is wrong and what would be right."""


def read(cls: type[T], path: str | Path, overrides: Iterable[str] = (), *, in_part: bool = False) -> T:
    """Reads a YAML file, its `base:` parents and `key=value` overrides into the dataclass `cls`. With `in_part` the
    file may have other keys at its top, which are left to others. Raises ConfigError for an unreadable file, a typo, a
    wrong type, a missing key or a cycle of bases."""
    layers = _layers(Path(path), children=())
    values: Any = {}
    for _, layer in layers:
        values = _merge(values, layer) if layer else values
    for override in overrides:
        where = f"override {override!r} of {path}"
        values, words = _overridden(values, override, where)
        layers.append((where, _with({}, words, None)))
    try:
        values = Resolver(values).resolved()
        if in_part:
            own = typing.get_type_hints(cls)
            values = {key: value for key, value in values.items() if key in own}
        return _build(cls, values, "")
    except Problem as problem:
        raise ConfigError(f"{_origin(layers, problem.key) or path}: {problem}") from problem


def build(cls: type[T], mapping: Mapping[str, Any], where: str) -> T:
    """Reads a mapping already in hand into the dataclass `cls`. Raises ConfigError for a typo, a wrong type or a
    missing key; `where` starts the message."""
    try:
        return _build(cls, mapping, "")
    except Problem as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def options(overrides: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as nested mappings. Raises ConfigError."""
    values: Any = {}
    for override in overrides:
        values, _ = _overridden(values, override, f"option {override!r}")
    try:
        return Resolver(values).resolved()
    except Problem as problem:
        raise ConfigError(f"option {problem}") from problem


def dump(config: Any) -> str:
    """Writes a dataclass as the YAML that `read` turns into an equal one."""
    return plain_yaml.write(_plain(config, escaped=True))


def plain(config: Any) -> Any:
    """A dataclass as mappings and lists for JSON. What came from the environment is written as the interpolation that
    it was."""
    return _plain(config, escaped=False)


def environment_in(value: Any) -> Iterator[str]:
    """What in a value came from the environment, each as it is written."""
    if isinstance(value, FromEnvironment):
        yield value.written
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        yield from environment_in(inner)


def require(config: Any, least: float, *names: str) -> None:
    """Raises ConfigError for a number among a dataclass' fields that is less than `least` or not finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{name} is {value}; give a number of at least {least}")


def did_you_mean(name: object, names: Iterable[str], at_most: int = 1) -> str:
    """A question that names the nearest of `names`, with a blank after it; nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=at_most)
    return f"did you mean {' or '.join(map(repr, near))}? " if near else ""


def _overridden(values: Any, override: str, where: str) -> tuple[Any, list[str]]:
    """Values with that of `key=value` put in, and the steps of its key. Raises ConfigError."""
    key, equals, text = override.partition("=")
    words = words_of(key)
    if not (words and equals):
        raise ConfigError(f"{where}: write it as key=value, such as stages.0.learning_rate=1e-4")
    try:
        return _with(values, steps_to(values, words), _overriding(text)), words
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{where}: {why}; if it is to be a text, quote it: {key}=\"'…'\"") from error
    except Problem as problem:
        raise ConfigError(f"{where}: {problem}") from problem


def _overriding(text: str) -> Any:
    """The value that an override gives: YAML on one line, where a plain text has no comment behind it. Several lines
    are a text as it stands, such as a file that the shell puts there."""
    if "\n" in text:
        return text
    value = plain_yaml.parse(text)
    return text.strip() if isinstance(value, str) and text.strip().startswith(value) else value


def _with(values: Any, steps: list[str], value: Any) -> Any:
    """Values with one put in at the end of some steps; a mapping is merged into the one that is there, an empty one
    replaces it."""
    if not steps:
        return _merge(values, value)
    step, *rest = steps
    if isinstance(values, list):
        if not is_index(step, values):
            raise Problem("", f"index {step} is out of range: the list has {len(values)} items, counted from 0")
        index = int(step)
        return [*values[:index], _with(values[index], rest, value), *values[index + 1 :]]
    if isinstance(values, str) and "${" in values:
        raise Problem("", f"what is above {step} is written as {values}; override what that stands for")
    inner = values if isinstance(values, dict) else {}
    return {**inner, step: _with(inner.get(step), rest, value)}


def _layers(path: Path, children: tuple[Path, ...]) -> list[tuple[str, Any]]:
    """The file and its bases, eldest first, each as (name for errors, unresolved values)."""
    if path.resolve() in children:
        chain = " -> ".join(str(file) for file in (*children, path.resolve()))
        raise ConfigError(f"{path}: its bases lead back to it: {chain}")
    if len(children) > MAX_BASES:
        raise ConfigError(f"{path}: it has more than {MAX_BASES} bases, each the `base:` of another; join some of them")
    child = f" (the `base:` of {children[-1]})" if children else ""
    try:
        text = _read_text(path, child)
        values = plain_yaml.parse(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: not UTF-8 at byte {error.start}; convert the file") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not plain YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_first_line(error)}") from error
    except OSError as error:
        raise ConfigError(f"{path}{child}: cannot be read: {error.strerror or error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found a {_name(type(values))}")
    base = values.pop("base", None)
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of one file, got {base!r}")
    return [*_layers(path.parent / base, (*children, path.resolve())), (str(path), values)]


def _read_text(path: Path, child: str) -> str:
    if child and path.exists() and not path.is_file():  # a file that others wrote must not wait for a pipe
        raise ConfigError(f"{path}{child}: no regular file")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}{child}: has more than {MAX_BYTES:,} bytes, which no config needs; is it one?")
    return data.decode("utf-8-sig")


def _merge(parent: Any, child: Any) -> Any:
    if not (isinstance(parent, dict) and isinstance(child, dict) and child):
        return child
    return {**parent, **{key: _merge(parent.get(key), value) for key, value in child.items()}}


def _origin(layers: list[tuple[str, Any]], key: str) -> str | None:
    """The name of the last layer that says anything about `key`, or about the nearest key above it."""
    whole, nearest, name = f"{key}.", "", None
    for layer, values in reversed(layers):
        for found in _keys(values):
            if len(found) > len(nearest) and whole.startswith(f"{found}."):
                nearest, name = found, layer
    return name


def _keys(values: Any, above: str = "") -> Iterator[str]:
    """Every dotted key in nested mappings and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in items:
        key = _join(above, str(name))
        yield key
        yield from _keys(value, key)


def _build(kind: Any, value: Any, key: str) -> Any:
    """Turns plain YAML values into the annotated type `kind`, without converting anything but int to float."""
    if kind is Any:
        if not isinstance(value, (Mapping, list)):
            return value
        kind = dict if isinstance(value, Mapping) else list
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, key)
    if origin is Literal:
        if any(value == one and (isinstance(value, str) or type(value) is type(one)) for one in arguments):
            return value
        near = did_you_mean(value, map(str, arguments))
        raise Problem(key, f"{near}expected one of {', '.join(map(repr, arguments))}, got {value!r}")
    if (origin or kind) is dict and isinstance(value, Mapping):
        of = arguments[1] if arguments else Any
        for name in value:
            if not isinstance(name, str):
                raise Problem(key, f"expected keys that are text, got {name!r}; quote it")
        return {name: _build(of, item, _join(key, name)) for name, item in value.items()}
    if (origin or kind) in (list, tuple) and isinstance(value, (list, tuple)):
        of = arguments or (Any, ...)
        kinds = [of[0]] * len(value) if origin is not tuple or of[-1] is ... else list(of)
        if len(kinds) != len(value):
            raise Problem(key, f"expected {len(kinds)} values, got {len(value)}: {list(value)!r}")
        items = [_build(of, item, _join(key, str(i))) for i, (of, item) in enumerate(zip(kinds, value, strict=True))]
        return items if (origin or kind) is list else tuple(items)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            told = f"a whole number of {value.bit_length()} bits is beyond a float; give a smaller one"
            raise Problem(key, told) from error
    if (kind in (bool, int, float, type(None)) and type(value) is kind) or (kind is str and isinstance(value, str)):
        return value
    advice = "; quote it to make it text" if kind is str and value is not None else ""
    if (origin or kind) is list and not isinstance(value, Mapping):
        advice = f"; write a list, as [{value}]"
    raise Problem(key, f"expected {_name(kind)}, got {value!r} ({_name(type(value))}){advice}")


def _build_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        return _build(others[0], value, key)
    for kind in sorted(others, key=lambda kind: kind is not type(value)):  # an int stays one in `float | int`
        try:
            return _build(kind, value, key)
        except Problem:
            continue
    raise Problem(key, f"expected {' or '.join(map(_name, kinds))}, got {value!r} ({_name(type(value))})")


def _build_dataclass(cls: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise Problem(key, f"expected a mapping with the keys of {cls.__name__}, got {value!r}")
    if hasattr(cls, "renewed"):  # it reads what older recipes wrote
        value = cls.renewed(value, key)
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls) if field.init}
    for name in value:
        if name not in known:
            told = f"no such key; {did_you_mean(name, known)}{cls.__name__} has: {', '.join(known) or 'none'}"
            raise Problem(_join(key, str(name)), told)
    required = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise Problem(key, f"missing {', '.join(map(repr, missing))}, which {cls.__name__} requires")
    kinds = typing.get_type_hints(cls)
    built = {name: _build(kinds[name], item, _join(key, name)) for name, item in value.items()}
    try:
        return cls(**built)
    except ValueError as error:  # the dataclass' own `__post_init__`
        raise Problem(key, str(error)) from error


def _plain(value: Any, escaped: bool) -> Any:
    """Dataclasses and tuples as mappings and lists; if `escaped`, `${` in text is, as it would be an interpolation."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), escaped) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: _plain(item, escaped) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, escaped) for item in value]
    if isinstance(value, FromEnvironment):
        return value.written
    if isinstance(value, str) and escaped:
        return INTERPOLATION.sub(r"\1\1\\${", value)
    return value


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _name(kind: Any) -> str:
    if kind is type(None):
        return "null"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
