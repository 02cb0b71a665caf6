"""Templates render as transformers renders them, and what takes too much is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from molora.data.template import MAX_SOURCE_CHARACTERS, compiled, render
from molora.testing import byte_tokenizer

TALK = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "<think>\tcafé\t</think> 红色。 {{ x }}"},
    {"role": "assistant", "content": "yes\n\n"},
    {"role": "user", "content": ""},
]
# What published templates do, construct by construct.
CONSTRUCTS = {
    "concatenation": "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' + m['content'] }}{% endfor %}",
    "numbers in text": "{{ 'a' ~ 1 ~ 2.5 ~ none ~ true ~ messages|length }}",
    "loop variables": "{% for m in messages %}{{ loop.index0, loop.first, loop.last, loop.length, loop.revindex }}"
    "{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{{ loop.cycle('a', 'b') }}"
    "{{ loop.changed(m.role) }}{% endfor %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for (a, b) in [(1, 2), (3, 4)] %}{{ a + b * 2 ** 3 % 5 // 1 }}{% endfor %}",
    "conditions": "{% for m in messages if m.role != 'system' %}{{ m.role }}{% else %}none{% endfor %}"
    "{% for m in [] %}x{% else %}empty{% endfor %}",
    "break and continue": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespaces": "{% set ns = namespace(found=false, text='') %}{% for m in messages[::-1] %}"
    "{% set ns.text = ns.text + m.role %}{% endfor %}{{ ns.text }}{{ ns.found }}",
    "slices": "{% set rest = messages[1:] %}{{ rest|length }}{{ messages[-1].role }}{{ messages[0].content[1:4] }}",
    "string methods": "{% set c = messages[1].content %}{{ c.split('</think>')[-1].lstrip('\\n') }}"
    "{{ c.startswith('<') }}"
    "{{ c.upper().strip() }}{{ ', '.join(['a', 'b']) }}{{ c.replace('é', 'e') }}{{ 'a\\tb'.expandtabs(4) }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages[0].content|trim|upper|title }}{{ ['b', 'a']|sort|first }}{{ 'a'|default('b') }}{{ x|default('b') }}"
    "{{ [1, 2, 3]|sum }}{{ 'x'|indent(2, true) }}{{ 3.14159|round(2) }}{{ messages|items|list if false }}"
    "{{ [3, 1]|max }}",
    "json": "{{ messages|tojson }}{{ messages[0]|tojson(indent=4) }}"
    "{{ {'a': [1, {'b': 'é'}]}|tojson(ensure_ascii=True) }}",
    "formats": "{{ '%s and %5.2f' % ('a', 1.5) }}{{ '{}-{:>4}'.format('a', 7) }}{{ '%s'|format('b') }}",
    "macros": "{% macro show(m, n=1) %}<{{ m.role }}{{ n }}>{{ caller() if caller }}{% endmacro %}"
    "{{ show(messages[0]) }}"
    "{% call show(messages[1], n=2) %}inside{% endcall %}",
    "blocks": "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x|length }}"
    "{% filter upper %}abc{{ x }}{% endfilter %}",
    "recursion": "{% for n in [[1, [2, 3]], [4]] recursive %}{{ loop(n) if n is not number else n }}{% endfor %}",
    "tests": "{{ messages is defined, tools is none, x is undefined }}{{ 'a' in 'abc', 'role' in messages[0] }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
    "generation blocks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "white space": "{%- for m in messages %}\n    {{- m.role }}\n  {% if true %}\n x\n  {% endif %}\n{% endfor -%}\n",
    "dictionaries": "{% set d = dict(a=1, **{'b': 2}) %}{% for k in d %}{{ k }}{{ d[k] }}"
    "{{ d.get('z', 0) }}{% endfor %}",
    "the prompt": "{% if add_generation_prompt %}{{ messages|length }}{% endif %}{{ documents }}",
    "a number of dates": "{{ 1700000000 }}{{ 20250101|string }}{{ [1700000000]|first }}",
}


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    fast = byte_tokenizer()
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_a_template_gives_what_transformers_gives(construct: str) -> None:
    fast = tokenizer(CONSTRUCTS[construct])
    for generate in (False, True):
        theirs: Any = fast.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
        assert render(CONSTRUCTS[construct], TALK, generate, fast.special_tokens_map) == theirs


def test_a_long_conversation_is_no_attack() -> None:
    """A thousand turns, whose text a template collects in a namespace, and looks at twenty turns from every turn."""
    ""
    template = (
        "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text + m.content %}"
        "{% for other in messages[:20] %}{% if other.role == m.role %}{% set ns.n = ns.n + 1 %}{% endif %}{% endfor %}"
        "{% endfor %}{{ ns.text }}{{ ns.n }}"
    )
    talk = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 10} for i in range(1000)]
    assert render(template, talk, False, {}) == "".join(m["content"] for m in talk) + str(1000 * 10)


def test_a_text_of_megabytes_is_no_attack() -> None:
    talk = [{"role": "user", "content": "é" * 3_000_000}]
    assert len(render("{% for m in messages %}<{{ m.content|trim + '>' }}{% endfor %}", talk, False, {})) == 3_000_002


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for %}", "Expected an expression"),
        ("{% unknown %}", "unknown tag"),
        ("{{ x|pprint }}", "No filter named 'pprint'"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("x" * (MAX_SOURCE_CHARACTERS + 1), "131,073 characters long, and at most 131,072 are read"),
    ],
)
def test_what_is_no_template_is_refused_where_it_is_opened(template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compiled(template)
