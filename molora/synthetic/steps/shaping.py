"""Steps that take columns apart and put them together."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from molora.config import ConfigError, require
from molora.evaluate.normalise import FULL_STOPS, normalise, words
from molora.synthetic.rows import (
    Dropped,
    Row,
    RowByRow,
    Text,
    Work,
    is_json,
    list_of,
    text_of,
    texts_of,
    texts_of_list,
    value_of,
    with_media,
)
from molora.synthetic.steps.choosing import pattern

_END_OF_SENTENCE = re.compile(f"(?<=[{FULL_STOPS}!?\u061f\uff01\uff1f])\\s+|\\n+")


@dataclass(kw_only=True)
class PassagesConfig:
    """The text of `column` is cut into passages of whole sentences, of at most `max_words` words each, and those of
    fewer than `min_words` are left out; a sentence that is longer is a passage of its own. `at_most` keeps the first of
    each text. The passage stands in the column `into`."""

    column: str
    into: str = "passage"
    max_words: int = 120
    min_words: int = 30
    at_most: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "max_words", "at_most")


class Passages(RowByRow):
    """A row for each passage of a long text, without the text."""

    config_type = PassagesConfig

    def __init__(self, config: PassagesConfig) -> None:
        self.config = config

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        found = [
            text for text in self.cut(text_of(config.column, row, "column")) if len(words(text)) >= config.min_words
        ]
        rest = {name: value for name, value in row.columns.items() if name != config.column}
        for number, text in enumerate(found[: config.at_most]):
            yield row.part(number, {**rest, config.into: text})
        if not found:
            yield Dropped(row, f"no passage of {config.min_words} words")

    def cut(self, text: str) -> Iterator[str]:
        passage, count = "", 0
        for sentence in _END_OF_SENTENCE.split(text):
            more = len(words(sentence))
            if passage and count + more > self.config.max_words:
                yield passage
                passage, count = "", 0
            passage, count = f"{passage} {sentence}".strip(), count + more
        if passage:
            yield passage


@dataclass(kw_only=True)
class ComposeConfig:
    """`columns` are templates by the name of the column that each makes, such as {prompt: "{instruction} {input}"}.
    `drop` names columns to leave out, `only` those to keep beside them; give one of the two at most."""

    columns: dict[str, str] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    only: list[str] | None = None

    def __post_init__(self) -> None:
        if self.drop and self.only is not None:
            raise ConfigError("give drop or only, not both")


class Compose(RowByRow):
    """Columns made of others by templates; columns renamed and left out."""

    config_type = ComposeConfig

    def __init__(self, config: ComposeConfig) -> None:
        self.config = config
        self.texts = texts_of(config.columns, "columns")

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        for name in (*config.drop, *(config.only or ())):
            value_of(name, row, "drop or only")
        kept = row.columns if config.only is None else {name: row.columns[name] for name in config.only}
        kept = {name: value for name, value in kept.items() if name not in config.drop}
        made = {name: text.of(row).strip() for name, text in self.texts.items()}
        yield row.with_only({**kept, **made})


@dataclass(kw_only=True)
class ExtractConfig:
    """What is taken out of the text of `column`. Either `pattern`, a regular expression whose named groups,
    (?P<question>…), become columns, from its first match, its `last`, or with `every` from all of them as lists; or
    `keys`, those of the JSON object in the text that become columns, and no others. A row without is dropped."""

    column: str
    pattern: str | None = None
    last: bool = False
    every: bool = False
    keys: list[str] | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.keys is None):
            raise ConfigError("give either pattern or keys")
        if self.last and self.every:
            raise ConfigError("give last or every, not both")
        if self.pattern is not None and not pattern(self.pattern, "pattern").groupindex:
            raise ConfigError(f"pattern: {self.pattern!r} has no named group; write (?P<column>…) for each column")


class Extract(RowByRow):
    """Columns taken out of a text by a regular expression, or out of the JSON in it."""

    config_type = ExtractConfig

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.pattern = None if config.pattern is None else re.compile(config.pattern, re.DOTALL | re.MULTILINE)

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        text = text_of(self.config.column, row, "column")
        found = self.matched(text) if self.pattern else self.decoded(text)
        yield row.having(**found) if found else Dropped(row, f"nothing to take out of {self.config.column}", text[:200])

    def matched(self, text: str) -> dict[str, Any]:
        assert self.pattern is not None
        matches = [*self.pattern.finditer(text)]
        if not matches:
            return {}
        groups = [{name: (said or "").strip() for name, said in match.groupdict().items()} for match in matches]
        if self.config.every:
            return {name: [each[name] for each in groups] for name in groups[0]}
        return groups[-1 if self.config.last else 0]

    def decoded(self, text: str) -> dict[str, Any]:
        start = text.find("{")
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:]) if start >= 0 else (None, 0)
        except (ValueError, RecursionError):
            return {}
        keys = self.config.keys or []
        if not isinstance(value, Mapping) or any(value.get(key) in (None, "", []) for key in keys):
            return {}
        if not is_json([value[key] for key in keys]):
            return {}
        return {key: value[key] for key in keys}


@dataclass(kw_only=True)
class SpreadConfig:
    """`column` holds a list; each of its items becomes a row, and stands in the column `into`. Items that are equal but
    for case, spaces and a closing full stop are one, and `at_most` keeps the first."""

    column: str
    into: str
    at_most: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "at_most")


class Spread(RowByRow):
    """A row for each item of a list, without the list."""

    config_type = SpreadConfig

    def __init__(self, config: SpreadConfig) -> None:
        self.config = config

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        items: dict[str, Any] = {}
        for item in list_of(config.column, row, "column"):
            items.setdefault(normalise(item) if isinstance(item, str) else json.dumps(item), item)
        items.pop("", None)
        rest = {name: value for name, value in row.columns.items() if name != config.column}
        for number, item in enumerate([*items.values()][: config.at_most]):
            yield row.part(number, {**rest, config.into: item})
        if not items:
            yield Dropped(row, f"{config.column} is empty")


@dataclass(kw_only=True)
class MakeChoicesConfig:
    """`right` is a template of the right option, `wrong` the column with the list of wrong ones, of which the first
    `num_wrong` are taken; a row with fewer that differ from each other and from the right one is dropped. Each line of
    the column `options` is made by `line` of {letter} and {choice}."""

    right: str
    wrong: str
    num_wrong: int = 3
    line: str = "{letter}. {choice}"

    def __post_init__(self) -> None:
        require(self, 1, "num_wrong")
        if self.num_wrong >= len(ascii_uppercase):
            raise ConfigError(f"num_wrong is {self.num_wrong}; there are letters for {len(ascii_uppercase) - 1}")


class MakeChoices(RowByRow):
    """Multiple choice: `choices` in an order drawn by the workflow's seed, `choice`, the number of the right one from
    0, its `letter`, and `options`, a line for each."""

    config_type = MakeChoicesConfig

    def __init__(self, config: MakeChoicesConfig) -> None:
        self.config = config
        self.right = Text(config.right, "right")
        self.line = Text(config.line, "line")
        self.line.of(Row("", {"letter": "A", "choice": ""}))  # it has no other columns

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        right = self.right.of(row).strip()
        wrong: dict[str, str] = {}
        for item in texts_of_list(config.wrong, row, "wrong"):
            wrong.setdefault(normalise(item), item.strip())
        others = [text for key, text in wrong.items() if key not in ("", normalise(right))][: config.num_wrong]
        if len(others) < config.num_wrong or not right:
            yield Dropped(row, f"fewer than {config.num_wrong} wrong options", f"{right!r} and {others}"[:200])
            return
        choices = [right, *others]
        random.Random(work.seed_of("choices", row.id)).shuffle(choices)
        lines = [
            self.line.of(Row(row.id, {"letter": letter, "choice": choice}))
            for letter, choice in zip(ascii_uppercase, choices, strict=False)
        ]
        place = choices.index(right)
        yield row.having(choices=choices, choice=place, letter=ascii_uppercase[place], options="\n".join(lines))


@dataclass(kw_only=True)
class MakeConversationConfig:
    """Templates of what the `user` and the `assistant` say, and of a `system` message. `media` maps a part type to the
    column that holds the path of one, which becomes absolute and stands before the user's text; this may be empty then.
    `keep` names columns that stay beside `messages`, such as choices and tags."""

    user: str
    assistant: str
    system: str | None = None
    media: dict[str, str] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)


class MakeConversation(RowByRow):
    """Rows for `kind: messages`, which training, evaluations and roll-outs read."""

    config_type = MakeConversationConfig

    def __init__(self, config: MakeConversationConfig) -> None:
        self.config = config
        said = {"system": config.system, "user": config.user, "assistant": config.assistant}
        self.texts = {role: Text(text, role) for role, text in said.items() if text is not None}

    def made_of(self, row: Row, work: Work) -> Iterator[Row | Dropped]:
        messages: list[dict[str, Any]] = []
        row, shown = with_media(row, self.config.media)
        for role, template in self.texts.items():
            text = template.of(row).strip()
            if not text and not (role == "user" and self.config.media):
                yield Dropped(row, f"what the {role} says is empty")
                return
            content = shown if role == "user" else []
            said: Any = [*content, *([{"type": "text", "text": text}] if text else [])] if content else text
            messages.append({"role": role, "content": said})
        kept = {name: value_of(name, row, "keep") for name in self.config.keep}
        yield row.with_only({"messages": messages, **kept})
