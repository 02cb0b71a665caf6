"""Prompts: chat messages to token ids, with the places of media and the tokens that the model should learn to produce.

The chat template renders the messages and the tokenizer reads the result in one piece, so ids are those of
`apply_chat_template`. Only two things must not reach the tokenizer: media, and text (of tools and their calls too) that
happens to spell a special token. Each is rendered as a private character, a hole; the rendered text is cut there, and
the hole is filled with reserved positions or with the ids of the text. So every special token among the ids was written
by the template.

What to learn is found by those special tokens. The same roles are rendered once with placeholders as contents, which
shows between which special tokens the content of each turn lies; the generation prompt shows where the turn's header
ends. What the model must produce itself, after its generation prompt, is a target, up to the turn's end token.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, groupby, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.messages import Message, parts
from molora.data.template import compiled, render
from molora.data.tools import as_json

# Plane 16 of Unicode, for private use.
_FIRST_HOLE = 0x100000
_HOLE = re.compile("([\U00100000-\U0010fffd])")
_SHOWN_ROLES = 8

# Messages whose content is text.
_Texts = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
# What a template is told of a message beside its role and content.
_OF_TOOLS = ("tool_calls", "tool_call_id", "name")


@dataclass(frozen=True)
class Prompt:
    """A tokenised conversation. `media` holds start and stop of every media part, in the order of the messages."""

    token_ids: list[int]
    targets: list[bool]
    media: list[tuple[int, int]]


@dataclass
class _Rendered:
    """Text and its token ids: the characters of each, which are special tokens, and start and stop of every hole."""

    text: str
    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    specials: list[int] = field(default_factory=list)
    holes: list[tuple[str, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Turn:
    """Where an assistant turn is, counted in the template's special tokens.

    What the model produces starts `header` behind special token number `after`. If no special token parts the turn from
    the message before it, `after` is None, and it starts `surplus` characters before the end of its generation prompt.
    Special token number `end` closes the turn. `messages` says that the model writes special tokens before the content.
    """

    after: int | None
    header: str
    surplus: int
    end: int
    messages: bool


@dataclass(frozen=True)
class _Layout:
    """What a template makes of a sequence of roles: the special tokens it writes, and assistant turns by message."""

    special_ids: list[int]
    turns: dict[int, _Turn]


class ChatTemplate:
    """A tokenizer's chat template as a function from messages to `Prompt`. Raises ValueError for a tokenizer without a
    chat template or without character offsets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {name} has no character offsets; load one backed by the tokenizers library")
        if not tokenizer.chat_template:
            raise ValueError(f"tokenizer {name} has no chat template; set tokenizer.chat_template and save it again")
        self.tokenizer = tokenizer
        self._source = tokenizer.get_chat_template()
        # A tokenizer may have another one for conversations with tools.
        self._source_with_tools = tokenizer.get_chat_template(tools=[])
        self._names = tokenizer.special_tokens_map
        try:
            compiled(self._source)
            compiled(self._source_with_tools)
        except ValueError as error:
            raise ValueError(f"tokenizer {name}: its chat template {error}") from error
        self._special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        # Private characters of the text itself count as spellings, or they would be taken for our holes.
        longest_first = sorted(self._special.values(), key=len, reverse=True)
        self._spellings = re.compile("|".join([_HOLE.pattern, *map(re.escape, longest_first)]))
        self._layouts: dict[tuple[tuple[str, ...], bool], _Layout] = {}

    def encode(
        self,
        messages: Sequence[Message],
        media_lengths: Sequence[int] = (),
        *,
        generate: bool = False,
        tools: Tools = (),
        where: str,
    ) -> Prompt:
        """Tokenises checked messages; `media_lengths` are the tokens of every media part, in the order of the messages,
        and `tools` what the model is told that it may call.

        Targets are what the generation prompt of each assistant turn leaves to the model, up to and with the turn's end
        token, or the last special token of the text if the turn is the last; a message's `train: false` exempts it.
        With `generate`, the generation prompt ends the text and nothing is a target. Media positions hold id 0.
        `where` starts every error message.

        Raises: ValueError if the template refuses the messages, loses or repeats content, loses tools or calls of them,
        ends turns without a special token, or starts them otherwise than its generation prompt says; for tools and
        their calls without `generate`.
        """
        try:
            return self._encode(messages, media_lengths, generate, tools)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        try:
            self._layout_with_tools([{"role": "user", "content": "a"}], [_tool("f")], 0)
        except ValueError:
            return False
        return True

    def shown_call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call of a tool as the template writes it, with what is before it. Raises ValueError where it cannot."""
        call = {"id": "0", "type": "function", "function": {"name": name, "arguments": arguments}}
        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return self._render(asked, False, [_tool(name)])

    def _encode(
        self, messages: Sequence[Message], media_lengths: Sequence[int], generate: bool, tools: Tools
    ) -> Prompt:
        roles = tuple(message["role"] for message in messages)
        has_tools = bool(tools) or any(message.get("tool_calls") for message in messages)
        if has_tools and not generate:
            raise ValueError("holds calls of tools, which can be read and not learned here; take the row away")
        if generate and roles[-1] == "assistant":
            raise ValueError("ends with an assistant turn, which leaves nothing to generate; take it away")
        media = [_hole(index) for index in range(len(media_lengths))]
        fills = {hole: [0] * length for hole, length in zip(media, media_lengths, strict=True)}
        texts, tools = self._with_holes(messages, tools, media, fills)
        rendered = self._tokenise(self._render(texts, generate, tools), fills)
        layout = self._layout_with_tools(texts, tools, len(fills)) if has_tools else self._layout(roles, generate)
        found = [rendered.ids[index] for index in rendered.specials]
        if found != layout.special_ids:
            here, there = (self.tokenizer.convert_ids_to_tokens(ids) for ids in (found, layout.special_ids))
            raise ValueError(
                f"the chat template writes {' '.join(here)} here, but {' '.join(there)} for other contents of the same"
                f" roles ({', '.join(roles)}), so its turns cannot be told apart"
            )
        spans = {hole: (start, stop) for hole, start, stop in rendered.holes if hole in media}
        if sorted(hole for hole, _, _ in rendered.holes if hole in spans) != media:
            raise ValueError(f"the chat template drops or repeats some of the {len(media)} media parts")
        targets = [False] * len(rendered.ids)
        for index, message in enumerate(messages):
            if generate or message["role"] != "assistant" or message.get("train") is False:
                continue
            if index == 0:
                raise ValueError(
                    "starts with an assistant turn, which nothing asks for, so it cannot be learned; take it away, put "
                    "a user turn before it, or, in a row of `messages`, give it `train: false`"
                )
            turn = layout.turns[index]
            start = self._start(turn, index, texts, rendered)
            stop = rendered.specials[-1 if index == len(messages) - 1 else turn.end] + 1
            targets[start:stop] = [True] * (stop - start)
        for start, stop in spans.values():
            targets[start:stop] = [False] * (stop - start)
        return Prompt(rendered.ids, targets, [spans[hole] for hole in media])

    def turn_ends(self) -> frozenset[int]:
        """The tokens that end an answer as the template trains it: the first special token behind an assistant turn,
        the last of a conversation or not. Empty for a template that ends its turns otherwise, or not at all.

        Where a turn may hold several messages (the model writes special tokens of its own between the generation
        prompt and the content), the end of an earlier turn also ends such a message, so only the last turn's counts.
        """
        roles = ("user", "assistant", "user", "assistant")
        for asked in (roles, roles[:2]):
            try:
                layout = self._layout(asked, False)
            except ValueError:  # no conversation that this template can train
                continue
            last = layout.turns[len(asked) - 1]
            turns = [last] if last.messages else layout.turns.values()
            return frozenset(layout.special_ids[turn.end] for turn in turns)
        return frozenset()

    def _with_holes(
        self, messages: Sequence[Message], tools: Tools, media: Sequence[str], fills: dict[str, list[int]]
    ) -> tuple[_Texts, Tools]:
        """Messages of text, and tools, with holes; what fills holes of spelled special tokens is added to `fills`."""
        holes: dict[str, str] = {}

        def protect(match: re.Match[str]) -> str:
            spelling = match[0]
            if spelling not in holes:
                holes[spelling] = _hole(len(fills))
                fills[holes[spelling]] = self._text_ids(spelling)
            return holes[spelling]

        def protected(value: Any) -> Any:
            return json.loads(self._spellings.sub(protect, as_json(value, "tools"))) if value else value

        waiting = iter(media)
        texts = []
        for message in messages:
            pieces: list[str] = []
            for is_text, run in groupby(parts(message), key=lambda part: part["type"] == "text"):
                if is_text:  # joined first, as two text parts can spell a special token together
                    pieces.append(self._spellings.sub(protect, "".join(part["text"] for part in run)))
                else:
                    pieces.extend(next(waiting) for _ in run)
            of_tools = {key: protected(message[key]) for key in _OF_TOOLS if message.get(key)}
            texts.append({"role": message["role"], "content": "".join(pieces), **of_tools})
        return texts, protected(tools)

    def _text_ids(self, spelling: str) -> list[int]:
        ids = self.tokenizer(spelling, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if spelling in map(self._special.get, ids):
            raise ValueError(f"the tokenizer cannot write {spelling!r} as text, only as the special token")
        return ids

    def _render(self, texts: _Texts, generate: bool, tools: Tools = ()) -> str:
        try:
            return render(self._source_with_tools if tools else self._source, texts, generate, self._names, tools)
        except ValueError as error:
            shown = [text["role"] for text in texts[:_SHOWN_ROLES]] + ["…"] * (len(texts) > _SHOWN_ROLES)
            raise ValueError(f"the chat template refuses roles {', '.join(shown)}: {error}") from error

    def _tokenise(self, text: str, fills: Mapping[str, list[int]]) -> _Rendered:
        """Rendered text to tokens: what lies between holes by the tokenizer, holes by their fills."""
        pieces = _HOLE.split(text)
        encoded = self.tokenizer(
            pieces[::2],
            add_special_tokens=False,
            split_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        rendered = _Rendered(text)
        place = 0
        for piece, ids, offsets, hole in zip_longest(
            pieces[::2], encoded["input_ids"], encoded["offset_mapping"], pieces[1::2]
        ):
            rendered.specials += [
                len(rendered.ids) + index
                for index, (id, (start, end)) in enumerate(zip(ids, offsets, strict=True))
                # Unknown text becomes a special token as well, but not one that the template wrote.
                if id in self._special and self._special[id] in piece[start:end]
            ]
            rendered.offsets += [(place + start, place + end) for start, end in offsets]
            rendered.ids += ids
            place += len(piece)
            if hole is not None:
                count = len(rendered.ids)
                rendered.ids += fills[hole]
                rendered.offsets += [(place, place + 1)] * len(fills[hole])
                rendered.holes.append((hole, count, len(rendered.ids)))
                place += 1
        return rendered

    def _layout(self, roles: tuple[str, ...], generate: bool) -> _Layout:
        """Renders `roles` with a hole as every content. Templates decide by roles, so it is kept for the next time."""
        if (roles, generate) not in self._layouts:
            texts = [{"role": role, "content": _hole(index)} for index, role in enumerate(roles)]
            text = self._render(texts, generate)
            _check_contents(text, texts)
            rendered = self._tokenise(text, {_hole(index): [] for index in range(len(roles))})
            asked = () if generate else [i for i, role in enumerate(roles) if role == "assistant" and i > 0]
            turns = {index: self._turn(index, texts, rendered) for index in asked}
            self._layouts[roles, generate] = _Layout([rendered.ids[index] for index in rendered.specials], turns)
        return self._layouts[roles, generate]

    def _layout_with_tools(self, texts: _Texts, tools: Tools, num_holes: int) -> _Layout:
        """The same of messages with tools, or calls of them, to be answered. They hold so many holes already."""
        holes = map(_hole, count(num_holes))
        names: dict[str, str] = {}

        def named(given: Tools) -> Tools:
            """Tools, or calls, with a hole for each name, which shows whether a template writes it."""
            with_holes = []
            for each in given:
                names[hole := next(holes)] = each["function"]["name"]
                with_holes.append({**each, "function": {**each["function"], "name": hole}})
            return with_holes

        emptied = []
        for text in texts:
            calls = named(text.get("tool_calls", ()))
            # Who calls a tool may say nothing else.
            content = next(holes) if text["content"] or not calls else ""
            emptied.append({**text, "content": content, **({"tool_calls": calls} if calls else {})})
        rendered = self._render(emptied, True, named(tools))
        _check_contents(rendered, emptied)
        if lost := [name for hole, name in names.items() if hole not in rendered]:
            raise ValueError(f"the chat template drops tools, or calls of them: {', '.join(lost):.200}")
        tokens = self._tokenise(rendered, {hole: [] for hole in _HOLE.findall(rendered)})
        return _Layout([tokens.ids[index] for index in tokens.specials], {})

    def _turn(self, index: int, texts: _Texts, rendered: _Rendered) -> _Turn:
        text = rendered.text
        content = text.index(texts[index]["content"])
        previous = max((match.end() for match in _HOLE.finditer(text, 0, content)), default=0)
        header = text[previous:content]
        cue = _HOLE.split(self._render(texts[:index], generate=True))[-1]
        # A header may go on behind the cue (the model is to write the rest), or stop short of it (a template that
        # asks for thoughts and leaves them out of past turns); anything else was never asked of the model.
        if not (header.startswith(cue) or cue.startswith(header)):
            raise ValueError(
                f"the chat template starts message {index} (assistant) with {header!r}, but its generation prompt there"
                f" is {cue!r}; training needs a template in which they agree"
            )
        start = previous + min(len(header), len(cue))
        starts = [rendered.offsets[special][0] for special in rendered.specials]
        after = max((number for number, place in enumerate(starts) if previous <= place < start), default=None)
        end = sum(place < content for place in starts)
        if end == len(starts):
            raise ValueError(
                f"the chat template ends message {index} (assistant) without a special token, so the model cannot learn"
                " to stop; training needs a template that ends assistant turns with one"
            )
        if after is not None:
            header = text[rendered.offsets[rendered.specials[after]][1] : start]
        return _Turn(after, header, previous + len(cue) - start, end, any(start <= place < content for place in starts))

    def _start(self, turn: _Turn, index: int, texts: _Texts, rendered: _Rendered) -> int:
        """The first token that the model must produce of an assistant turn."""
        if turn.after is None:
            prompt = self._render(texts[:index], generate=True)
            header, begin, first = prompt[: len(prompt) - turn.surplus], 0, 0
        else:
            special = rendered.specials[turn.after]
            header, begin, first = turn.header, rendered.offsets[special][1], special + 1
        if not rendered.text.startswith(header, begin):
            raise ValueError(
                f"the chat template starts message {index} (assistant) with"
                f" {rendered.text[begin : begin + len(header)]!r}, but its generation prompt says {header!r}"
            )
        # A token that spans the border belongs to the turn. Without a header the turn starts right behind the special
        # token, also when the next token stands for no character (a trimmed space).
        return bisect_right(rendered.offsets, begin + len(header), first, key=lambda o: o[1]) if header else first


def _check_contents(text: str, texts: _Texts) -> None:
    """Raises ValueError unless each content, a hole of its own, is there once."""
    for index, message in enumerate(texts):
        if message["content"] and text.count(message["content"]) != 1:
            what = "repeats" if message["content"] in text else "drops"
            raise ValueError(f"the chat template {what} message {index} ({message['role']})")


def _tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}, "required": []}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


def _hole(index: int) -> str:
    return chr(_FIRST_HOLE + index)
