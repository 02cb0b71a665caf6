"""Chat templates within bounds: a received template is a program, and may take neither the machine nor the day.

Templates run in transformers' sandbox, with its filters and globals. What the sandbox lacks is added here: a limit on
processor time, which every loop, call and filter looks at, and a limit on the size of every value, which is looked at
before a text or a list is multiplied.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import BuiltinFunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

MAX_SOURCE_CHARACTERS = 2**17
MAX_SECONDS = 2.0
# What one value may hold beside a multiple of the messages, and what all values may together.
MAX_CHARACTERS = 2**20
MAX_TOTAL_CHARACTERS = 2**26
# Widths, counts and precisions.
MAX_NUMBER = 10_000
MAX_BITS = 4096
_NODE_CHARACTERS = 64  # what a list or a number counts as
_STEPS_A_LOOK = 64
_MAX_STRIPPED = 256  # each character of a text is looked for among those to strip
_MAX_SHOWN = 300
_LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
# Slow on long texts, and no template needs them.
_REFUSED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# The same of methods, and those whose values or arguments are bytes.
_REFUSED_METHODS = (".translate", ".striptags", ".unescape", ".encode", ".to_bytes", ".from_bytes", ".fromhex")


class TooCostly(jinja2.TemplateRuntimeError):
    """A template that takes more than it may."""


@dataclass
class _Spent:
    """What a rendering has taken so far."""

    most: int
    began: float = field(default_factory=time.thread_time)
    steps: int = 0
    characters: int = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps % _STEPS_A_LOOK == 0 and time.thread_time() - self.began > MAX_SECONDS:
            raise TooCostly(f"it works for over {MAX_SECONDS:g} s on one conversation; it may loop without end")

    def allow(self, characters: int) -> None:
        """Asks before a value of this size is made."""
        if characters > self.most:
            raise TooCostly(
                f"it makes a value of {characters:,} characters or more, and at most {self.most:,} are allowed"
            )

    def keep(self, value: Any) -> Any:
        """Takes a new value into account; a stream is looked at while it is read."""
        if value.__class__ is str:
            return self._kept(value, len(value))
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self.watch(value)
        if isinstance(value, (bytes, bytearray)):
            raise TooCostly("it makes bytes, and a template writes text")
        if isinstance(value, (str, Mapping, *_LISTS)):
            return self._kept(value, _size(value, self.most))
        return value

    def keep_slice(self, value: Any) -> Any:
        """A part of a value that was taken into account before."""
        return self._kept(value, len(value) * (1 if isinstance(value, str) else _NODE_CHARACTERS))

    def _kept(self, value: Any, size: int) -> Any:
        self.allow(size)
        self.characters += size
        if self.characters > MAX_TOTAL_CHARACTERS:
            raise TooCostly(f"it makes over {MAX_TOTAL_CHARACTERS:,} characters in all")
        return value

    def watch(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value


# None while a template is compiled: nothing is computed then.
_SPENT: ContextVar[_Spent] = ContextVar("spent")


def _size(value: Any, most: int) -> int:
    """Characters in a value, its lists and their lists, each as often as it is there; stops counting beyond `most`."""
    size, waiting = 0, [value]
    while waiting and size <= most:
        item = waiting.pop()
        if isinstance(item, str):
            size += len(item)
        else:
            size += _NODE_CHARACTERS
            if isinstance(item, Namespace):
                item = item._Namespace__attrs  # which it writes
            if isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, _LISTS):
                waiting += item
    return size


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    generate: bool,
    names: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A conversation as text by a template; `names` are what it knows beside messages and tools: special tokens. Raises
    ValueError for a template that is none, that refuses the messages, fails on them or takes too much."""
    template = compiled(source)
    token = _SPENT.set(_Spent(MAX_CHARACTERS + 4 * _size([messages, tools], sys.maxsize)))
    try:
        return template.render(
            names, messages=messages, tools=tools or None, documents=None, add_generation_prompt=generate
        )
    except Exception as error:  # a template is a program, and fails in every way that programs do
        raise ValueError(_shown(error)) from error
    finally:
        _SPENT.reset(token)


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Raises ValueError for what is no template."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise ValueError(f"is {len(source):,} characters long, and at most {MAX_SOURCE_CHARACTERS:,} are read")
    environment = _environment()
    try:
        return environment.from_string(_Watched().visit(environment.parse(source)))
    except Exception as error:  # too deep for the parser or the compiler as well
        raise ValueError(f"cannot be compiled: {_shown(error)}") from error


def _shown(error: Exception) -> str:
    text = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


class _Watched(NodeTransformer):
    """Puts a filter of ours around everything that loops, or makes a value without a call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "molora_watch")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), "molora_concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "molora_slice") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        stored = getattr(node, "ctx", "load") != "load"
        return node if stored else _filtered(node, "molora_keep")

    visit_Tuple = visit_Dict = visit_List


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment for chat templates, with everything that makes a value under watch."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        spent = _SPENT.get()
        spent.step()
        for each in (*args, *kwargs.values()):  # who is called may write them
            spent.allow(_size(each, spent.most))
        if isinstance(__obj, LoopContext):  # `loop(children)` of a recursive loop
            args = (spent.watch(args[0]), *args[1:])
        elif isinstance(__obj, BuiltinFunctionType) or (
            isinstance(__obj, MethodType) and isinstance(__obj.__self__, str)  # of Markup
        ):
            args = tuple(list(each) if isinstance(each, Iterator) else each for each in args)
            _foresee(spent, f".{__obj.__name__}", (__obj.__self__, *args), kwargs)
        return spent.keep(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spent = _SPENT.get()
        spent.step()
        if operator == "+":
            return spent.keep(left + right)
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * right}.get(operator, 0)
            if bits > MAX_BITS:
                raise TooCostly(f"it makes a number of {bits:,} bits, and at most {MAX_BITS:,} are allowed")
        elif operator == "*":
            several, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                spent.allow(_size(several, spent.most) * times)
        elif operator == "%" and isinstance(left, str):
            _foresee(spent, ".format", (left, right), {})
        return spent.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _foresee(_SPENT.get(), ".format", (value.__self__, *args), kwargs)
            return wrapped(*args, **kwargs)

        return formatted

    def concat(self, texts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        spent = _SPENT.get()
        kept, length = [], 0
        for text in texts:
            spent.step()
            length += len(text)
            spent.allow(length)
            kept.append(text)
        return spent.keep("".join(kept))


@functools.cache
def _environment() -> _Sandbox:
    stock = _compile_jinja_template("").environment
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[type(extension) for extension in stock.extensions.values()],
        optimized=False,  # nothing of a template is computed while it is compiled
        finalize=_written,
    )
    environment.globals.update(stock.globals)
    del environment.globals["lipsum"]
    filters = {name: function for name, function in stock.filters.items() if name not in _REFUSED_FILTERS}
    environment.filters = {name: _watched(name, function) for name, function in filters.items()}
    environment.filters |= {
        "molora_watch": lambda values: _SPENT.get().watch(values),
        "molora_keep": lambda value: _SPENT.get().keep(value),
        "molora_slice": lambda value: _SPENT.get().keep_slice(value),
        "molora_concat": lambda values: environment.concat(map(_text, values)),
    }
    return environment


@jinja2.pass_context  # so that it is not called while a template is compiled
def _written(context: Any, value: Any) -> str:
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    spent = _SPENT.get()
    spent.allow(_size(value, spent.most))
    return spent.keep(str(value))


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # a context comes before what is filtered

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        spent = _SPENT.get()
        spent.step()
        if name == "join":
            args = tuple(list(each) if isinstance(each, Iterator) else each for each in args)
        _foresee(spent, name, args[first:], kwargs)
        return spent.keep(function(*args, **kwargs))

    return run


def _foresee(spent: _Spent, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a call of a filter, or of a method (its name has a dot), that would make a value beyond the limits."""
    subject, others = args[0] if args else "", [*args[1:], *kwargs.values()]
    for each in (subject, *others):  # some of them are written here
        spent.allow(_size(each, spent.most))
    if name in ("format", ".format", ".format_map"):
        if re.search(r"%[^a-zA-Z%]*\*|\{[^}]*\{", str(subject)):
            raise TooCostly(f"it formats with {subject!r:.40}, whose widths are arguments; write the widths down")
        widths = [int(digits) for digits in re.findall(r"[0-9]+", subject)]
        _small(widths)
        longest = max([0, *widths]) + max([0, *(_size(each, spent.most) for each in others)])
        spent.allow(len(subject) + (subject.count("%") + subject.count("{")) * longest)
        return
    _small(others)
    if name in ("replace", ".replace") and len(others) >= 2:
        old, new = map(str, others[:2])
        spent.allow(len(subject := str(subject)) + subject.count(old) * len(new))
    elif name in ("join", ".join"):
        items, separator = (others[0], subject) if name == ".join" and others else (subject, "".join(map(str, others)))
        spent.allow(_size(items, spent.most) + (len(items) if isinstance(items, Sized) else 0) * len(separator))
    elif name in ("indent", ".expandtabs"):
        width = max([8, *(each if isinstance(each, int) else len(str(each)) for each in others)])
        breaks = "\t" if name == ".expandtabs" else "\n"
        spent.allow(len(str(subject)) + str(subject).count(breaks) * width)
    elif name == "tojson":
        _small(others, 16)
        spent.allow(_size(subject, spent.most) * (1 + sum(len(each) for each in kwargs.get("separators") or ())))
    elif name == "int" and len(str(subject)) > MAX_BITS:
        raise TooCostly(f"it reads a number of {len(str(subject)):,} characters, and at most {MAX_BITS:,} are allowed")
    elif name in ("trim", ".strip", ".lstrip", ".rstrip") and any(len(str(each)) > _MAX_STRIPPED for each in others):
        raise TooCostly(f"it strips any of over {_MAX_STRIPPED} characters; name fewer")
    elif name in _REFUSED_METHODS:
        raise TooCostly(f"it calls {name[1:]}, which has no bounds, and which no template needs")


def _small(values: Iterable[Any], most: int = MAX_NUMBER) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > most:
            raise TooCostly(f"it asks for {value:.3g} of something, and at most {most:,} are allowed")
