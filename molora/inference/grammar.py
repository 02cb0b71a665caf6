"""Answers that are held to a JSON schema or a regular expression, by llguidance.

Letters: V vocabulary.
"""

import json
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# Blanks between the parts of a JSON text. Without a bound, a small model may write nothing else.
_BLANKS = r"[ \n]{0,16}"


class Grammars:
    """Makes grammars for a tokenizer. `stop_ids` are the tokens that may end an answer, `vocab_size` is V. What
    llguidance needs of the tokenizer is made once, with the first grammar."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(id for id in stop_ids if id < vocab_size)
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._known: Any = None

    def of_json_schema(self, schema: dict[str, Any]) -> "Grammar":
        """Answers are JSON texts that a schema describes. Raises ValueError for a schema that cannot be followed."""
        return self._grammar(*_of_json_schema(schema))

    def of_regex(self, pattern: str) -> "Grammar":
        """Answers match a regular expression from their first to their last character. Raises ValueError for one that
        cannot be followed."""
        return self._grammar(*_of_regex(pattern))

    def of_calls(self, begin: str, end: str, parameters: Mapping[str, dict[str, Any]], *, only: bool) -> "Grammar":
        """Between `begin` and `end` answers have calls in JSON of functions with these names and schemas of parameters;
        `only` says that they are calls, one at least, and nothing else. Raises ValueError for a schema that cannot be
        followed."""
        first, last = json.dumps(begin), json.dumps("}\n" + end)
        start = f'{first} call ("\\n" {first} call)*' if only else "(begin call)* TEXT"
        lines = ["%llguidance {}", f"start: {start}", "TEXT: /(.|\\n)*/", f"begin[lazy]: TEXT {first}"]
        lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(parameters))))
        for index, (name, schema) in enumerate(parameters.items()):
            head = json.dumps(f'\n{{"name": {json.dumps(name)}, "arguments": ')
            in_json = json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}})
            lines.append(f"call_{index}: {head} %json {in_json} {last}")
        return self._grammar("\n".join(lines), "the JSON schema of a tool's parameters")

    def _grammar(self, text: str, what: str) -> "Grammar":
        tokenizer = self._of_library()
        _check(text, what, tokenizer)
        return Grammar(_llguidance().LLMatcher(tokenizer, text, log_level=0), self._vocab_size)

    def _of_library(self) -> Any:
        from llguidance.hf import from_tokenizer

        with self._lock:
            if self._known is None:
                tokenizer: Any = self._tokenizer
                most = max(self._vocab_size, len(tokenizer))
                self._known = from_tokenizer(tokenizer, n_vocab=most, eos_token=self._stop_ids)
        return self._known


class Grammar:
    """What may come next in one answer. Raises ValueError where it cannot be followed any further."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def again(self) -> "Grammar":
        """The same for another answer."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size)

    def allowed_V(self) -> Tensor:
        """Whether each token may come next, on the CPU."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        known = min(len(bits), self._vocab_size)
        allowed[:known] = torch.from_numpy(bits[:known]).bool()
        if not allowed.any():
            raise ValueError("the grammar allows no token here, not even one that ends the answer; simplify it")
        return allowed

    def take(self, token_id: int) -> None:
        """Goes on behind a token that was allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            # What follows the first line is the state of the library.
            fault = self._matcher.get_error().partition("\n")[0][:300]
            if fault.startswith("NoExtension"):
                raise ValueError("no text that goes on from here is what the grammar describes; change it")
            raise ValueError(f"the grammar cannot be followed: {fault}; simplify it")


def check_form(schema: dict[str, Any] | None, pattern: str | None) -> None:
    """Raises ValueError for a JSON schema or a regular expression that no tokenizer's grammar can follow."""
    if schema is not None:
        _check(*_of_json_schema(schema))
    if pattern is not None:
        _check(*_of_regex(pattern))


def _of_json_schema(schema: dict[str, Any]) -> tuple[str, str]:
    """llguidance's grammar, and what it is one of."""
    make = _llguidance().LLMatcher.grammar_from_json_schema
    return make(schema, overrides={"whitespace_pattern": _BLANKS}), "the JSON schema"


def _of_regex(pattern: str) -> tuple[str, str]:
    return _llguidance().LLMatcher.grammar_from_regex(pattern), "the regular expression"


def _check(text: str, what: str, tokenizer: Any = None) -> None:
    if fault := _llguidance().LLMatcher.validate_grammar(text, tokenizer):
        raise ValueError(f"{what} cannot be followed: {fault.strip()[:300]}; simplify it")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError("answers in a given form need llguidance: pip install 'molora[serve]'") from error
    return llguidance
