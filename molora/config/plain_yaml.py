"""YAML text as plain values and back: what is read is what stands there, and no more of it than a config has.

Read as text, since YAML 1.1 would make another number of them: 010, 1:30, dates. Read as numbers: 1e-3, .5, 1_000.
"""

import re
from typing import Any

import yaml

# Far more than any config has; what goes beyond was made to fill the memory.
MAX_VALUES = 10_000
MAX_CHARACTERS = 2**20
MAX_DEPTH = 32
# Of a whole number: Python refuses to read or print one of over 4300 digits.
_MAX_DIGITS = 1000

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = (None, "!", *(_TAG + name for name in ("str", "map", "seq")))
# The kinds of plain scalars, with the characters that one of them begins with. Anything else is text.
_SCALARS = (
    ("bool", "yYnNtTfFoO", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"),
    ("int", "-+0123456789", "[-+]?(0b_*[01][01_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0|[1-9][0-9_]*)"),
    (
        "float",
        "-+.0123456789",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    ),
    ("null", "~nN", "~|null|Null|NULL"),
    ("null", ("",), ""),
    ("merge", "<", "<<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, starts, pattern in _SCALARS:
        for start in starts:
            found.setdefault(start, []).append((_TAG + name, re.compile(f"^(?:{pattern})$")))
    return found


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: Any = super().compose_mapping_node(anchor)  # pyright: ignore[reportArgumentType]
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _TAG + "merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag == _TAG + "int" and len(node.value) > _MAX_DIGITS:
            problem = f"a whole number of {len(node.value)} characters, and {_MAX_DIGITS} are the most; write less"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return super().construct_object(node, deep)  # pyright: ignore[reportArgumentType]


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse(text: str) -> Any:
    """Values of YAML text: mappings, lists, texts, numbers, booleans and null. Raises yaml.YAMLError for what is not
    YAML, makes other things (tags), or is too much, counting aliases."""
    _measure(text)
    return yaml.load(text, Loader=_Loader)


def write(values: Any) -> str:
    """Plain values as the YAML that `parse` turns into equal ones."""
    return yaml.dump(values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


def _measure(text: str) -> None:
    """Walks over the text's events, which takes no memory, before anything is made of them."""
    values = characters = 0
    begun: list[tuple[str | None, int, int]] = []
    sizes: dict[str | None, tuple[int, int]] = {}
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        problem = ""
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in sizes:
                values += sizes[event.anchor][0]
                characters += sizes[event.anchor][1]
            else:
                problem = f"*{event.anchor} stands for nothing that ends before it"
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values_before, characters_before = begun.pop()
            sizes[anchor] = values - values_before, characters - characters_before
        elif isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)):
            if event.tag not in _PLAIN_TAGS:
                problem = f"the tag {event.tag} is not read; write plain values"
            if isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1, len(event.value)
                characters += len(event.value)
            else:
                begun.append((event.anchor, values, characters))
            values += 1
        if values > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} values, aliases counted, which no config needs"
        if characters > MAX_CHARACTERS:
            problem = f"more than {MAX_CHARACTERS:,} characters, aliases counted, which no config needs"
        if len(begun) > MAX_DEPTH:
            problem = f"values lie more than {MAX_DEPTH} deep in each other, which no config needs"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
