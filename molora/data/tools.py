"""Tools: functions that a model is told of, and its calls of them, as chat templates read both.

A tool is {"type": "function", "function": {"name", "description", "parameters"}}, with a JSON schema of its parameters.
A call is {"id", "type": "function", "function": {"name", "arguments"}}, whose arguments are a mapping.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from molora.received import parse_json


def read_calls(calls: Any, where: str) -> Any:
    """Calls whose arguments are text, as OpenAI's clients write them, with the JSON object in it. Raises ValueError."""
    if not isinstance(calls, (list, tuple)):
        return calls  # for `check_calls` to refuse
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and isinstance(given := function.get("arguments"), str):
            # Some models call what takes no argument with none.
            data = given.encode("utf-8", "surrogatepass") or b"{}"
            arguments = parse_json(data, f"{where}, tool call {index}: arguments")
            call = {**call, "function": {**function, "arguments": arguments}}
        read.append(call)
    return read


def check_calls(messages: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises ValueError for calls of tools that are malformed, and for a tool's message that answers none of them."""
    waiting: Sequence[Any] = ()
    for i, message in enumerate(messages):
        here = f"{where}: message {i}"
        if message["role"] != "tool":
            waiting = message.get("tool_calls") or ()
            if not isinstance(waiting, (list, tuple)):
                raise ValueError(f"{here}: tool_calls: expected a list, got {waiting!r:.80}")
            for j, call in enumerate(waiting):
                _check_call(call, f"{here}, tool call {j}")
            continue
        known = [call.get("id") for call in waiting]
        if not known:
            raise ValueError(f"{here}: role tool: no message with tool_calls stands before it; add the one it answers")
        for key in ("tool_call_id", "name"):
            if not isinstance(message.get(key), (str, type(None))):
                raise ValueError(f"{here}: {key}: expected text, got {message[key]!r:.80}")
        if message.get("tool_call_id") not in (None, *known):
            raise ValueError(f"{here}: tool_call_id {message['tool_call_id']!r:.80} is none of {known!r:.200}")


def _check_call(call: Any, here: str) -> None:
    call = _given(call, ("id", "type", "function"), here)
    if call.get("type", "function") != "function":
        raise ValueError(f"{here}: type {call['type']!r:.80}; only calls of type function are known")
    if not isinstance(call.get("id", ""), str):
        raise ValueError(f"{here}: id: expected text, got {call['id']!r:.80}")
    function = _given(call.get("function"), ("name", "arguments"), f"{here}: function")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{here}: function.name: expected text, got {function.get('name')!r:.80}")
    if not isinstance(function.get("arguments"), Mapping):
        raise ValueError(f"{here}: function.arguments: expected a mapping, got {function.get('arguments')!r:.80}")


def _given(value: Any, known: Sequence[str], here: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{here}: expected a mapping with {' and '.join(known)}, got {value!r:.80}")
    given = {key: each for key, each in value.items() if each is not None}
    if surplus := sorted(str(key) for key in given if key not in known):
        raise ValueError(f"{here}: has {', '.join(surplus)}; there are {' and '.join(known)}, nothing else")
    return given


def as_json(value: Any, where: str) -> str:
    """Tools or calls as JSON, in the characters that they hold. Raises ValueError for what is none."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON that can be read: {error}") from error
