"""Interpolations: `${key}`, `${.key}` and `${oc.env:NAME}` in the values of a config, and the steps of dotted keys."""

import os
import re
from typing import Any

from molora.config.plain_yaml import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES

ALLOWED_VARIABLES = "MOLORA_RECIPE_ENV"
_MAX_STEPS = 64
# All the backslashes before an interpolation, tried from the first of them alone.
INTERPOLATION = re.compile(r"(?<!\\)(\\*)\$\{")


class Problem(Exception):
    """What is wrong at a dotted key; the public functions add the file."""

    def __init__(self, key: str, text: str):
        super().__init__(f"{key}: {text}" if key else text)
        self.key = key


class FromEnvironment(str):
    """A text made with an environment variable; `written` is what stood in its place."""

    written: str


class Resolver:
    """Puts values where interpolations stand, and no more of them than a config may have."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.values_left = MAX_VALUES
        self.characters_left = MAX_CHARACTERS
        self.level = 0

    def resolved(self) -> Any:
        """The root with every interpolation replaced. Raises Problem."""
        return self._value(self.root, (), 0)

    def _value(self, value: Any, path: tuple[str, ...], depth: int) -> Any:
        self.values_left -= 1
        if self.values_left < 0:
            raise Problem(".".join(path), f"interpolations make more than {MAX_VALUES:,} values")
        if isinstance(value, (dict, list)):
            self.level += 1
            if self.level > MAX_DEPTH:
                told = f"lies more than {MAX_DEPTH} deep: an interpolation leads back to itself, or to more"
                raise Problem(".".join(path), told)
            if isinstance(value, dict):
                self._take(sum(len(str(key)) for key in value) if depth else 0, path)
                made = {key: self._value(item, (*path, str(key)), depth) for key, item in value.items()}
            else:
                made = [self._value(item, (*path, str(index)), depth) for index, item in enumerate(value)]
            self.level -= 1
            return made
        if not isinstance(value, str):
            return value
        if value == "???":
            raise Problem(".".join(path), "missing: ??? stands for a value to give")
        if "${" in value:
            return self._text(value, path, depth)
        self._take(len(value) if depth else 0, path)
        return value

    def _take(self, characters: int, path: tuple[str, ...]) -> None:
        self.characters_left -= characters
        if self.characters_left < 0:
            raise Problem(".".join(path), f"interpolations make more than {MAX_CHARACTERS:,} characters")

    def _text(self, text: str, path: tuple[str, ...], depth: int) -> Any:
        pieces: list[Any] = []
        end = 0
        for found in INTERPOLATION.finditer(text):
            slashes = len(found[1])
            pieces.append(text[end : found.start()] + "\\" * (slashes // 2))
            end = found.end()
            if slashes % 2:
                pieces.append("${")
                continue
            name, closed, _ = text[end:].partition("}")
            if not closed:
                raise Problem(".".join(path), f"{text!r}: an interpolation without its end; write \\${{ for the text")
            if "${" in name:
                raise Problem(".".join(path), f"{text!r}: an interpolation inside another is not read")
            end += len(name) + 1
            pieces.append(self._named(name.strip(), path, depth + 1))
        pieces = [piece for piece in [*pieces, text[end:]] if piece != ""] or [""]
        if len(pieces) == 1 and not isinstance(pieces[0], str):
            return pieces[0]
        made = "".join(map(str, pieces))
        self._take(len(made), path)
        if any(isinstance(piece, FromEnvironment) for piece in pieces):
            made = FromEnvironment(made)
            made.written = text
        return made

    def _named(self, name: str, path: tuple[str, ...], depth: int) -> Any:
        """What `${name}` at a path stands for."""
        where = ".".join(path)
        if depth > MAX_DEPTH:
            raise Problem(where, f"${{{name}}} leads back to itself, or through more than {MAX_DEPTH} others")
        if name.startswith("oc.env:"):
            return _variable(name.removeprefix("oc.env:"), where)
        if ":" in name:
            raise Problem(where, f"${{{name}}}: only ${{key}} and ${{oc.env:NAME}} are read")
        up = len(name) - len(name.lstrip("."))
        words = [*path[: len(path) - up], *words_of(name[up:])] if up else words_of(name)
        if not words:
            raise Problem(where, f"${{{name[:80]}}}: there is no key in it; write \\${{ for the text")
        node = self.root
        steps = steps_to(node, words)
        for step in steps:
            if isinstance(node, str):
                node = self._value(node, path, depth)
            if isinstance(node, dict) and step in node:
                node = node[step]
            elif isinstance(node, list) and is_index(step, node):
                node = node[int(step)]
            else:
                raise Problem(where, f"${{{name}}}: there is no key {'.'.join(words)!r}")
        return self._value(node, tuple(steps), depth)


def _variable(given: str, key: str) -> Any:
    name, comma, default = (part.strip() for part in given.partition(","))
    if name not in os.environ.get(ALLOWED_VARIABLES, "").replace(",", " ").split():
        raise Problem(
            key,
            f"reads the environment variable {name}, which a config may do only if you say so: set "
            f"{ALLOWED_VARIABLES}={name} (several: {ALLOWED_VARIABLES}=A,B), or give the value itself, {key}=…",
        )
    value = os.environ.get(name)
    if value is None and not comma:
        raise Problem(key, f"the environment variable {name} is not set")
    if value is None and default == "null":
        return None
    made = FromEnvironment(default if value is None else value)
    made.written = f"${{oc.env:{given}}}"
    return made


def words_of(key: str) -> list[str]:
    """The steps of a dotted key, which may have brackets: `a.b[0]`."""
    closed = key.rfind("]") + 1
    key = key[:closed] + key[closed:].replace("[", ".")  # what would close each of these would be looked for to the end
    return [inside or plain for inside, plain in re.findall(r"\[([^\]]*)\]|([^.\[]+)", key)]


def steps_to(values: Any, words: list[str]) -> list[str]:
    """A dotted key in steps. A key with dots that a mapping already has is one step; of several, the longest."""
    for count in range(min(len(words), _MAX_STEPS), 0, -1):
        step = ".".join(words[:count])
        if isinstance(values, dict) and step in values:
            return [step, *steps_to(values[step], words[count:])]
    if isinstance(values, list) and words and is_index(words[0], values):
        return [words[0], *steps_to(values[int(words[0])], words[1:])]
    return words


def is_index(step: str, values: list[Any]) -> bool:
    return step.isdecimal() and len(step) < 10 and int(step) < len(values)
