"""What a stranger's conversation, template or plugin may try on the one who answers it."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import ConfigError
from molora.data.processor import Processor
from molora.data.template import render
from molora.evaluate.normalise import words
from molora.inference.answers import answer_file
from molora.inference.generate import GenerationConfig
from molora.modality import Prepared
from molora.testing import Numbers, NumbersConfig, byte_tokenizer
from tests.watch import Hung

HELLO = [{"role": "user", "content": "hello"}]
DOUBLED = (
    "{{% set ns = namespace(x={start}) %}}"
    "{{% for i in range(60) %}}{{% set ns.x = {twice} %}}{{% endfor %}}{{{{ ns.x }}}}"
)
NESTED = "{{% set ns = namespace(x={{}}) %}}{{% for i in range(40) %}}{{% set ns.x = {value} %}}{{% endfor %}}"
LONG = "{% set s = 'x' * 1000000 %}"
# Programs in a chat template: what each would take, and what it is told.
BOMBS = {
    "nested loops": (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "works for over 2 s",
    ),
    "one range, nested": (
        "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
        "works for over 2 s",
    ),
    "macros that call each other": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "works for over 2 s",
    ),
    "streams of streams": (
        "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{{ r|select('odd')|sum }}{% endfor %}{% endfor %}",
        "works for over 2 s",
    ),
    "searching": (
        "{% set s = 'ab' * 400000 %}{% for a in range(9999) %}{% for b in range(9999) %}{% if 'bba' in s %}"
        "{% endif %}{% endfor %}{% endfor %}",
        "works for over 2 s",
    ),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "loops in loops without end": ("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}", "RecursionError"),
    "a text times a number": ("{{ 'x' * 1000000000 }}", "1,000,000,000 characters"),
    "a number times a text": ("{{ 1000000000 * 'x' }}", "1,000,000,000 characters"),
    "a list times a number": ("{{ ([0] * 100000000)|length }}", "characters or more"),
    "doubling by +": (DOUBLED.format(start="'ab'", twice="ns.x + ns.x"), "characters or more"),
    "doubling by ~": (DOUBLED.format(start="'ab'", twice="ns.x ~ ns.x"), "characters or more"),
    "doubling by join": (DOUBLED.format(start="'ab'", twice="[ns.x, ns.x]|join"), "characters or more"),
    "doubling by replace": (DOUBLED.format(start="'ab'", twice="ns.x.replace('a', ns.x)"), "characters or more"),
    "doubling lists": (DOUBLED.format(start="[1]", twice="[ns.x, ns.x]"), "characters or more"),
    "doubling dictionaries": (DOUBLED.format(start="{}", twice="{'a': ns.x, 'b': ns.x}"), "characters or more"),
    "doubling blocks": (
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = b %}{% endfor %}",
        "characters or more",
    ),
    "squaring": (DOUBLED.format(start="9", twice="ns.x * ns.x"), "bits"),
    "a power": ("{{ 10 ** 1000000000 }}", "bits"),
    "width by a filter": ("{{ 'x'|center(1000000000) }}", "1e+09"),
    "width by a method": ("{{ 'x'.ljust(1000000000) }}", "1e+09"),
    "width in a percent format": ("{{ '%1000000000d' % 1 }}", "1e+09"),
    "width in a format filter": ("{{ '%1000000000d'|format(1) }}", "1e+09"),
    "width in a format method": ("{{ '{:1000000000}'.format(1) }}", "1e+09"),
    "width as an argument of a percent format": ("{{ '%*d' % (1000000000, 1) }}", "widths are arguments"),
    "width as an argument of a format": ("{{ '{:{}}'.format(1, 1000000000) }}", "widths are arguments"),
    "a format of nothing but percent signs": ("{{ ('%' * 1000000) % 1 }}", "characters or more"),
    "a long text in many fields": (LONG + "{{ ('{0}' * 10000).format(s) }}", "characters or more"),
    "digits": ("{{ 1.5|round(1000000000) }}", "1e+09"),
    "bytes of a number": ("{{ (1).to_bytes(1000000000, 'big') }}", "1e+09"),
    "bytes of a small number": ("{{ (1).to_bytes(2, 'big') }}", "to_bytes, which has no bounds"),
    "bytes of a text": (LONG + "{{ s.encode() }}", "encode, which has no bounds"),
    "punycode": ("{{ ('\u4e00\u4e01' * 400000).encode('punycode') }}", "encode, which has no bounds"),
    "punycode of an escaped text": ("{{ (('\u4e00\u4e01' * 9000)|e).encode('punycode') }}", "encode, which has no"),
    "a number of a million digits": ("{% set a = ('f' * 1000000)|int(0, 16) %}{{ a // 7 }}", "1,000,000 characters"),
    "width of an escaped text": ("{{ ('x'|e).center(1000000000) }}", "1e+09"),
    "replacing in an escaped text": (LONG + "{{ (s|e).replace('x', s) }}", "characters or more"),
    "tags of an escaped text": ("{{ (('<!--' * 9000)|safe).striptags() }}", "striptags, which has no bounds"),
    "stripping": ("{{ ('a' * 1000000).strip('b' * 1000000) }}", "over 256 characters"),
    "stripping by a filter": ("{{ ('a' * 1000000)|trim('b' * 1000000) }}", "over 256 characters"),
    "namespaces in namespaces": (NESTED.format(value="namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}", "characters or more"),
    "namespaces to a filter": (
        NESTED.format(value="namespace(a=ns.x, b=ns.x)") + "{{ 'a'|replace(ns.x, 'b') }}",
        "characters or more",
    ),
    "namespaces as a complaint": (
        NESTED.format(value="namespace(a=ns.x, b=ns.x)") + "{{ raise_exception(ns.x) }}",
        "characters or more",
    ),
    "items of items": (NESTED.format(value="{'a': ns.x.items(), 'b': ns.x.items()}") + "{{ ns.x }}", "or more"),
    "replacing by a filter": (LONG + "{{ s|replace('x', s) }}", "characters or more"),
    "replacing in a stream": (LONG + "{{ [s]|map('replace', 'x', s)|list }}", "characters or more"),
    "joining": (LONG + "{{ range(9999)|join(s) }}", "characters or more"),
    "joining by a method": (LONG + "{{ s.join(range(9999)|map('string')) }}", "characters or more"),
    "tabs": ("{{ ('\t' * 1000000).expandtabs(9999) }}", "characters or more"),
    "indents": ("{{ ('\n' * 1000000)|indent(9999, true, true) }}", "characters or more"),
    "translation": ("{{ 'aaaa'.translate({97: 'x' * 1000000}) }}", "translate"),
    "separators": (LONG + "{{ ([1] * 9000)|tojson(separators=(s, s)) }}", "characters or more"),
    "many cells": ("{{ [1]|batch(1000000000, 'x')|list }}", "1e+09"),
    "many long texts": (
        "{% set ns = namespace() %}" + "".join(f"{{% set ns.a{i} = 'x' * {1000000 + i} %}}" for i in range(999)),
        "67,108,864 characters in all",
    ),
    "many long slices": (LONG + "{% set a = [" + "s[1:]," * 3000 + "] %}", "67,108,864 characters in all"),
    "lists printed": (
        "{% set d = [1] * 9000 %}{% for a in range(9999) %}{% for b in range(9999) %}{{ d }}{% endfor %}{% endfor %}",
        "characters",
    ),
    "lorem ipsum": ("{{ lipsum(1000000) }}", "undefined"),
    "a long complaint": ("{{ raise_exception('no ' * 300000) }}", "no no"),
}
ESCAPES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "a format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
    "a format in a map": "{{ ['{0.__class__}'.format]|map('call', namespace)|list }}",
    "a namespace": "{{ namespace.__init__.__globals__.sys.modules }}",
    "the messages": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "a message": "{{ messages[0].update({'content': 'x'}) }}",
    "a file": "{% include 'CANARY' %}",
    "a module": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "a base": "{% extends 'CANARY' %}",
    "our own filter": "{{ messages|molora_keep|attr('__class__')|attr('__mro__')|first }}{{ 1 / 0 }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_takes_neither_the_machine_nor_the_day(bomb: str) -> None:
    template, says = BOMBS[bomb]
    with pytest.raises(ValueError) as refused:
        render(template, HELLO, True, {})
    assert says in str(refused.value) and len(str(refused.value)) < 500


@pytest.mark.parametrize("number", [signal.SIGPROF, signal.SIGALRM])
def test_a_template_that_hangs_is_not_refused_but_fails_its_test(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora.data.template._text", lambda _: signal.raise_signal(number))
    with pytest.raises(Hung):
        render("{{ messages }}", HELLO, True, {})


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_does_not_leave_its_sandbox(escape: str, canary: Path) -> None:
    with pytest.raises(ValueError):
        render(ESCAPES[escape].replace("CANARY", str(canary)), HELLO, True, {})
    assert HELLO == [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("text", ["<", "(", "[(", "()(", "<>("])
def test_brackets_that_nothing_closes_are_looked_for_once(text: str) -> None:
    assert words(text * 250_000 + "a") == ["a"]


class Hostile(Numbers):
    """A plugin whose items say what it does with them."""

    def load(self, part: Mapping[str, Any]) -> Any:
        return part["do"]

    def prepare(self, item: Any, generator: torch.Generator | None = None) -> Any:
        values = {"values": torch.zeros(1)}
        tricks: dict[str, Any] = {
            "a trillion tokens": lambda: Prepared(values, 10**12),
            "no tokens": lambda: Prepared(values, 0),
            "fewer than none": lambda: Prepared(values, -5),
            "half a token": lambda: Prepared(values, 1.5),  # pyright: ignore[reportArgumentType]
            "true tokens": lambda: Prepared(values, True),
            "nothing": lambda: None,
            "an error without words": lambda: (_ for _ in ()).throw(AssertionError),
            "recursion": lambda: self.prepare(item),
            "a long error": lambda: (_ for _ in ()).throw(OSError("no " * 10)),
            "an exit": lambda: (_ for _ in ()).throw(StopIteration("stop")),
        }
        return tricks[item]()


@pytest.mark.parametrize(
    ("trick", "says"),
    [
        ("a trillion tokens", "has 1000000000000 tokens (1000000000000 of media)"),
        ("no tokens", "makes 0 tokens"),
        ("fewer than none", "makes -5 tokens"),
        ("half a token", "needs a Prepared"),
        ("true tokens", "needs a Prepared"),
        ("nothing", "makes None of it"),
        ("an error without words", "AssertionError"),
        ("recursion", "RecursionError"),
        ("a long error", "OSError"),
        ("an exit", "fails on it"),
        ("what it does not know", "KeyError"),
    ],
)
def test_what_a_plugin_does_is_the_samples_fault(trick: str, says: str) -> None:
    processor = Processor(byte_tokenizer(), {"numbers": Hostile("numbers", NumbersConfig())}, sorted, 256)
    with pytest.raises(ValueError) as refused:
        processor.encode([{"role": "user", "content": [{"type": "numbers", "do": trick}]}], "7", generate=True)
    assert says in str(refused.value) and "sample 7" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x" * 200_000_000, "200,000,000 characters of text"),
        ([{"type": "text", "text": "x" * 1_000_000}] * 200, "200,000,000 characters of text"),
        ([{"type": "text", "text": ""}] * 1_000_000, "1,000,000 parts"),
        ([{"type": "numbers", "numbers": [1.0] * 100}] * 250, r"300 tokens \(300 of media\)"),
        ("<|end|>" * 300, "at most 256 fit"),
        ("\ud800", "half of one"),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_before_work(content: Any, says: str) -> None:
    processor = Processor(byte_tokenizer(), {"numbers": Numbers("numbers", NumbersConfig())}, sorted, 256)
    with pytest.raises(ValueError, match=says):
        processor.encode([{"role": "user", "content": content}], "7", generate=True)


def test_a_million_messages_are_refused_before_work() -> None:
    processor = Processor(byte_tokenizer(), {}, sorted, 256)
    with pytest.raises(ValueError, match="1,000,000 messages"):
        processor.encode([{"role": "user", "content": ""}] * 1_000_000, "7", generate=True)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 1e-320},
        {"temperature": 1e-7},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"top_p": 1.0000001},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1.5},
        {"max_running_samples": math.inf},
    ],
)
def test_settings_that_make_no_numbers_are_refused(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} cannot be .*; give"):
        GenerationConfig(**setting)


@pytest.mark.parametrize("name", ["../canary", "canary\x00", "/dev/full/x", "a/../../canary"])
def test_an_id_is_no_path(name: str, tmp_path: Path, canary: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": name, "messages": HELLO}) + "\n")
    with answer_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl") as file:
        assert file.ids == [name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_link_planted_for_the_lock_is_not_followed(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": "a", "messages": HELLO}) + "\n")
    (tmp_path / ".out.jsonl.lock").symlink_to(canary)
    with (
        pytest.raises(ConfigError, match="cannot be locked"),
        answer_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl"),
    ):
        pass
