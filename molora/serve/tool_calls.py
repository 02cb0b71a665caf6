"""Calls of tools in answers: which chat templates have models write them as they are read here, and the reader."""

import json
import secrets
from typing import Any

from molora.data.processor import Processor
from molora.received import parse_json
from molora.serve.answers import CalledFunction, ToolCall

# Hermes's form, which many models keep: JSON with name and arguments between these.
BEGIN, END = "<tool_call>", "</tool_call>"


class CallReader:
    """Parts one answer, as it comes, into text and calls. The blanks before a call belong to neither. One that does not
    read takes all for text."""

    def __init__(self, reads: bool = True) -> None:
        self.calls: list[ToolCall] = []
        self._reads = reads
        self._waiting = ""

    def read(self, piece: str, last: bool) -> tuple[str, list[ToolCall]]:
        """What a piece of the answer, perhaps the last, settles: text, and calls as OpenAI's clients read them. What
        stands like a call and is none is text."""
        if not self._reads:
            return piece, []
        self._waiting += piece
        text, first = "", len(self.calls)
        while BEGIN in self._waiting:
            before, _, behind = self._waiting.partition(BEGIN)
            inside, end, rest = behind.partition(END)
            if not (end or last):
                break
            if call := _call(inside):
                self.calls.append(call)
                text += before.rstrip()
            else:
                text += before + BEGIN + inside + end
            self._waiting = rest
        settled = len(self._waiting) if last else _before_call(self._waiting)
        text, self._waiting = text + self._waiting[:settled], self._waiting[settled:]
        return text, self.calls[first:]


def _before_call(text: str) -> int:
    """How many characters of a text stand before a call that has begun, or may begin at its end, and its blanks."""
    begun = [n for n in range(1, len(BEGIN)) if text.endswith(BEGIN[:n])]
    before = text.partition(BEGIN)[0] if BEGIN in text else text[: len(text) - max(begun, default=0)]
    return len(before.rstrip())


def _call(inside: str) -> ToolCall | None:
    """A call from its JSON, None for anything else."""
    try:
        given = parse_json(inside.encode("utf-8", "surrogatepass"), "a call")
    except ValueError:
        return None
    name, arguments = given.get("name"), given.get("arguments", {})
    if set(given) - {"name", "arguments"} or not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    function: CalledFunction = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def writes_calls(processor: Processor) -> bool:
    """Whether the chat template shows the model calls that `CallReader` reads, by the tokens that it is shown."""
    asked = "look_up", {"what": "a rose", "times": 2}
    try:
        shown = processor.template.shown_call(*asked)
    except ValueError:
        return False
    token_ids: Any = processor.tokenizer(shown, add_special_tokens=False)["input_ids"]
    reader = CallReader()
    reader.read(processor.decode(token_ids), True)
    read = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reader.calls]
    return asked in read
