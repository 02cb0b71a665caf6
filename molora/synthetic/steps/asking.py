"""Steps that ask models: a prompt made of a row's columns, and dialogues between several roles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from molora.config import ConfigError, require
from molora.data.messages import check
from molora.synthetic.rows import (
    UNANSWERED,
    DecodingConfig,
    Dropped,
    Reply,
    Request,
    Row,
    Text,
    Work,
    at_home,
    list_of,
    made_of_each,
    with_media,
)


@dataclass(kw_only=True)
class AskConfig:
    """`prompt` is the template of what the `model` is asked, behind a `system` message and with `media`, a column with
    a path by its part type, before the text; the row has the absolute path from there on. With `messages`, a column
    that holds a conversation, the prompt is its next turn, or there is none and its last turn is answered. The answer
    becomes the column `into`; of several `answers` that are drawn, a list. Answers that `max_new_tokens` cuts off are
    left out, unless `cut_off` is keep; a row that has none left is dropped."""

    model: str
    prompt: str | None = None
    system: str | None = None
    messages: str | None = None
    media: dict[str, str] = field(default_factory=dict)
    into: str = "answer"
    answers: int = 1
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    cut_off: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        require(self, 1, "answers")
        if self.prompt is None and self.messages is None:
            raise ConfigError("give prompt, messages or both")
        if self.messages is not None and self.system is not None:
            raise ConfigError("give messages or system: a conversation has a system message of its own")
        if self.media and self.prompt is None:
            raise ConfigError("media stand beside a prompt; give one")


class Ask:
    """A model's answer to a prompt made of each row, or several answers."""

    config_type = AskConfig

    def __init__(self, config: AskConfig) -> None:
        self.config = config
        self.models = [config.model]
        texts = {"system": config.system, "prompt": config.prompt}
        self.texts = {name: Text(text, name) for name, text in texts.items() if text is not None}

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        asked: list[Any] = [each for made in made_of_each(rows, lambda row: [self.requests(row)]) for each in made]
        requests = [request for each in asked if not isinstance(each, Dropped) for request in each]
        replies = iter(work.ask(config.model, requests, config.decoding))
        for row, each in zip(rows, asked, strict=True):
            if isinstance(each, Dropped):
                yield each
                continue
            row = each[0][0]
            given = [next(replies) for _ in each]
            said = [reply.text for reply in given if not why_unusable(reply, config.cut_off)]
            if not said:
                reason, detail = why_unusable(given[0], config.cut_off) or ("", "")
                yield Dropped(row, reason, detail)
            else:
                yield row.having(**{config.into: said if config.answers > 1 else said[0]})

    def requests(self, row: Row) -> list[Request]:
        """What is asked of a row, which has the absolute paths of its media then."""
        messages: list[Any] = []
        row, media = with_media(row, self.config.media)
        if (column := self.config.messages) is not None:
            messages += at_home(copied(list_of(column, row, "messages"), f"row {row.id}: {column}"), row)
            if column in row.columns:
                row = replace(row, columns={**row.columns, column: [*messages]})
        texts = {name: text.of(row) for name, text in self.texts.items()}
        if "system" in texts:
            messages.append({"role": "system", "content": texts["system"]})
        if "prompt" in texts:
            text = texts["prompt"]
            messages.append({"role": "user", "content": [*media, {"type": "text", "text": text}] if media else text})
        return [(row, messages, number) for number in range(self.config.answers)]


def copied(messages: list[Any], where: str) -> list[Any]:
    """A conversation of a column, which may be empty. Raises ValueError for what is none."""
    if messages:
        check(messages, None, where)
    return deepcopy(messages)


def why_unusable(reply: Reply, cut_off: str) -> tuple[str, str] | None:
    """Why a reply is left out, and what is true of it alone; None if it is not."""
    if reply.error:
        return UNANSWERED, reply.error
    if reply.finished == "content_filter":
        return "stopped by the server's content filter", reply.text[:200]
    if not reply.text:
        return "the answer is empty", ""
    if reply.finished == "length" and cut_off == "drop":
        return "cut off by max_new_tokens", reply.text[:200]
    return None


@dataclass(kw_only=True)
class RoleConfig:
    """Who takes part in a dialogue: the `model` that plays the role, and the template of what it is told (`system`)."""

    model: str
    system: str


@dataclass(kw_only=True)
class DialogueConfig:
    """`roles` by name take turns, in the order in which they stand, `turns` in all. The first says `opening`, a
    template, if there is one, which counts as a turn. Each role sees what the others say as what a user says. The
    conversation becomes the column `into`, messages of a user, who is the first role, and an assistant, who has the
    last turn; with more than two roles what the others say stands behind their names. A row of which a turn cannot be
    used is dropped."""

    roles: dict[str, RoleConfig]
    turns: int = 4
    opening: str | None = None
    into: str = "messages"
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    cut_off: Literal["drop", "keep"] = "drop"

    def __post_init__(self) -> None:
        require(self, 2, "turns")
        if len(self.roles) < 2:
            raise ConfigError("roles: give two at least, in the order in which they speak")
        if self.turns % len(self.roles) == 1:
            raise ConfigError(
                f"turns is {self.turns}: the last would be the user's, which nothing answers; give {self.turns - 1} or "
                f"{self.turns + 1}"
            )


@dataclass
class _Talk:
    row: Row
    systems: list[str]
    said: list[str]
    dropped: Dropped | None = None


class Dialogue:
    """Conversations between several roles, each played by a model with instructions of its own."""

    config_type = DialogueConfig

    def __init__(self, config: DialogueConfig) -> None:
        self.config = config
        self.models = [*dict.fromkeys(role.model for role in config.roles.values())]
        self.systems = [Text(role.system, f"roles.{name}.system") for name, role in config.roles.items()]
        self.opening = None if config.opening is None else Text(config.opening, "opening")

    def run(self, rows: Sequence[Row], work: Work) -> Iterator[Row | Dropped]:
        config = self.config
        talks: list[Any] = [each for made in made_of_each(rows, lambda row: [self.begun(row)]) for each in made]
        roles = [*config.roles.values()]
        for turn in range(0 if self.opening is None else 1, config.turns):
            speaker = turn % len(roles)
            open_ones = [talk for talk in talks if isinstance(talk, _Talk) and talk.dropped is None]
            requests = [(talk.row, self.heard(talk, speaker), turn) for talk in open_ones]
            for talk, reply in zip(open_ones, work.ask(roles[speaker].model, requests, config.decoding), strict=True):
                if why := why_unusable(reply, config.cut_off):
                    talk.dropped = Dropped(talk.row, f"turn {turn + 1}: {why[0]}", why[1])
                talk.said.append(reply.text)
        for talk in talks:
            if isinstance(talk, Dropped) or talk.dropped is not None:
                yield talk if isinstance(talk, Dropped) else talk.dropped
            else:
                yield talk.row.having(**{config.into: self.told(talk)})

    def begun(self, row: Row) -> _Talk:
        said = [] if self.opening is None else [self.opening.of(row)]
        return _Talk(row, [text.of(row) for text in self.systems], said)

    def heard(self, talk: _Talk, speaker: int) -> list[dict[str, Any]]:
        """The conversation as a role sees it, up to its turn."""
        messages = [{"role": "system", "content": talk.systems[speaker]}]
        for turn, text in enumerate(talk.said):
            own = turn % len(talk.systems) == speaker
            _join(messages, "assistant" if own else "user", text if own else self.named(turn, text))
        if len(messages) == 1:
            messages.append({"role": "user", "content": "Begin."})
        return messages

    def told(self, talk: _Talk) -> list[dict[str, Any]]:
        """The conversation as messages of a user and an assistant, which it ends with."""
        messages: list[dict[str, Any]] = []
        for turn, text in enumerate(talk.said):
            _join(messages, "user" if turn % len(talk.systems) == 0 else "assistant", self.named(turn, text))
        return messages

    def named(self, turn: int, text: str) -> str:
        names = [*self.config.roles]
        return text if len(names) == 2 else f"{names[turn % len(names)]}: {text}"


def _join(messages: list[dict[str, Any]], role: str, text: str) -> None:
    """Adds what is said to a conversation in which turns of one role that follow each other are one."""
    if messages and messages[-1]["role"] == role:
        messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n\n{text}"}
    else:
        messages.append({"role": role, "content": text})
