"""Preferences: rows with two answers to one conversation, of which one was chosen and the other rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from molora.data.sources import Messages, MessagesConfig

_SIDES = ("chosen", "rejected")
# OpenAI's names of the same.
_OF_OPENAI = {"preferred_output": "chosen", "non_preferred_output": "rejected"}


class Preferences(Messages):
    """Rows of a file as `messages` reads it, with `chosen` and `rejected` beside a prompt, in the formats of TRL,
    LLaMA-Factory and OpenAI."""

    config_type: ClassVar[type] = MessagesConfig

    def __getitem__(self, row: int) -> dict[str, Any]:
        where = self.rows.where(row)
        chosen, rejected = (self.told(row, side) for side in both_sides(self.rows[row], where))
        for side, told in zip(_SIDES, (chosen, rejected), strict=True):
            if not any(turn["role"] == "assistant" and turn.get("train") is not False for turn in told["messages"]):
                raise ValueError(
                    f"{where}: {side} has nothing to learn; its answer is to be the assistant's, and learned"
                )
        if chosen["messages"] == rejected["messages"]:
            raise ValueError(f"{where}: chosen and rejected are the same; take the row out")
        return {**chosen, "rejected": rejected["messages"]}


def both_sides(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of preferences as two rows of `messages` or `conversations`, which differ in their last answers. What was
    said before is not learned. Media columns and their places are as in any row.

    The prompt is `messages`, `conversations`, or `prompt` as text or turns, or OpenAI's `input`; an answer is a text, a
    turn, or turns. Without a prompt the two sides are whole conversations, and what they begin with in common is it.
    They may be so beside a prompt as well, which is not told twice; one that is a text is left out then, as TRL does.

    Raises ValueError, beginning with `where`, for what is none of these.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    given = {_OF_OPENAI.get(key, key): value for key, value in row.items() if value is not None}
    if missing := [side for side in _SIDES if side not in given]:
        raise ValueError(f"{where}: no {' and no '.join(missing)}; a preference has both answers to its prompt")
    if isinstance(asked := given.pop("input", None), Mapping):
        given |= {"prompt" if key == "messages" else key: value for key, value in asked.items()}
    elif asked:
        raise ValueError(f"{where}: input: expected an object with messages, got {asked!r:.80}")
    prompts = [key for key in ("messages", "conversations", "prompt") if key in given]
    if len(prompts) > 1:
        raise ValueError(f"{where}: has {' and '.join(prompts)}, each a prompt; leave one")
    key = "conversations" if "conversations" in given else "messages"
    value = given.pop(prompts[0]) if prompts else None
    prompt = _turns(value, "user", f"{where}: {prompts[0]}") if prompts else []
    chosen, rejected = (_turns(given.pop(side), "assistant", f"{where}: {side}") for side in _SIDES)
    if isinstance(value, str):
        are_whole = not (_speaks(chosen[0]) or _speaks(rejected[0]))
    else:
        are_whole = chosen[: len(prompt)] == prompt == rejected[: len(prompt)]
    if are_whole:
        same = next(
            (n for n, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (chosen and rejected):
            raise ValueError(f"{where}: one side is the beginning of the other; write the prompt apart, or take it out")
        if not prompt:
            told = f"{where}: chosen and rejected begin with different turns, and nothing says what was asked"
            raise ValueError(f"{told}; give a prompt, and beside it the assistant's answers alone")
    before = [_not_learned(turn) for turn in prompt]
    return {**given, key: [*before, *chosen]}, {**given, key: [*before, *rejected]}


def _turns(value: Any, role: str, where: str) -> list[Any]:
    """A text as a turn, a turn as a list of one, and turns as they are."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"{where}: expected a text, a turn or a list of turns, got {value!r:.80}")
    return list(turns)


def _speaks(turn: Any) -> bool:
    """Whether a turn is the assistant's."""
    return isinstance(turn, Mapping) and (turn.get("role") or turn.get("from")) in ("assistant", "gpt")


def _not_learned(turn: Any) -> Any:
    return {**turn, "train": False} if _speaks(turn) else turn
