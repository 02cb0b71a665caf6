"""Answers in a given form: which tokens may come next, as json and re see the whole."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from molora.inference.grammar import Grammar, Grammars
from molora.testing import VOCAB_SIZE, byte_tokenizer

STOP_IDS = frozenset({256, 260})
SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "words": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["sure", "words"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(byte_tokenizer(), STOP_IDS, VOCAB_SIZE)


def written(grammar: Grammar, seed: int, most: int = 400) -> str:
    """A text of tokens that are allowed, drawn until one that ends it."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for _ in range(most):
        allowed = grammar.allowed_V().nonzero().squeeze(1)
        token_id = int(allowed[torch.randint(len(allowed), (1,), generator=generator)])
        if token_id in STOP_IDS:
            break
        grammar.take(token_id)
        ids.append(token_id)
    text: Any = byte_tokenizer().decode(ids)
    return text


def test_whatever_is_drawn_keeps_the_form(grammars: Grammars) -> None:
    schema, pattern = grammars.of_json_schema(SCHEMA), grammars.of_regex("(yes|no)[0-9]{2,4}")
    for seed in range(20):
        told = json.loads(written(schema.again(), seed))
        assert set(told) == {"sure", "words"} and isinstance(told["sure"], bool)
        assert len(told["words"]) <= 3 and set(told["words"]) <= {"a", "b"}
        assert re.fullmatch("(yes|no)[0-9]{2,4}", written(pattern.again(), seed))


def test_answers_of_one_grammar_are_apart(grammars: Grammars) -> None:
    """Each goes on from where it is, and the first stays at the beginning."""
    first = grammars.of_regex("ab|cd")
    one, other = first.again(), first.again()
    one.take(ord("a") - ord("!"))
    assert one.allowed_V().nonzero().flatten().tolist() == [ord("b") - ord("!")]
    assert torch.equal(other.allowed_V(), first.allowed_V()) and int(first.allowed_V().sum()) == 2


def test_blanks_between_the_parts_of_a_json_text_have_an_end(grammars: Grammars) -> None:
    grammar = grammars.of_json_schema(SCHEMA)
    blank = byte_tokenizer().encode(" ")[0]
    grammar.take(byte_tokenizer().encode("{")[0])
    count = 0
    while grammar.allowed_V()[blank]:
        grammar.take(blank)
        count += 1
        assert count <= 16


def test_a_form_that_cannot_be_followed_is_refused(grammars: Grammars) -> None:
    for schema in ({"type": "nope"}, {"$ref": "#/none"}, {"properties": 7}):
        with pytest.raises(ValueError, match="the JSON schema cannot be followed: .*; simplify it"):
            grammars.of_json_schema(schema)
    with pytest.raises(ValueError, match="the regular expression cannot be followed"):
        grammars.of_regex("(")
    grammar = grammars.of_regex("ab")
    with pytest.raises(ValueError, match="the grammar cannot be followed"):
        grammar.take(ord("z") - ord("!"))
