"""Tools by the openai package: a model that has learned to call one does, and others are told what they cannot do."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import molora
from molora.data.processor import Processor
from molora.data.prompt import ChatTemplate
from molora.inference.generate import GenerationConfig
from molora.inference.grammar import Grammars
from molora.inference.load import LoadedModel
from molora.serve.tool_calls import BEGIN, END, CallReader, writes_calls
from molora.testing import byte_tokenizer, tiny_model
from tests.serve.conftest import NUMBERS, Folders, Served, serving
from tests.tools import ASKED, CALL, CALLED, TEMPLATE, TOLD, TOOL

PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "serve.md").read_text(encoding="utf-8")
CALL_TEXT = '\n<tool_call>\n{"name": "hue", "arguments": {"of": "rose"}}\n</tool_call>'
READ: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "a call": (CALL_TEXT, "", [("hue", {"of": "rose"})]),
    "text and a call": (f"I look.\n{CALL_TEXT}", "I look.", [("hue", {"of": "rose"})]),
    "two calls": (CALL_TEXT * 2, "", [("hue", {"of": "rose"})] * 2),
    "text between and behind": (f"a{CALL_TEXT} b {CALL_TEXT} c", "a b c", [("hue", {"of": "rose"})] * 2),
    "a call without its end": (CALL_TEXT.removesuffix("\n</tool_call>"), "", [("hue", {"of": "rose"})]),
    "a call without arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "a call that is cut off": ('a <tool_call>{"name": "hu', 'a <tool_call>{"name": "hu', []),
    "no JSON": ("a <tool_call>hue(rose)</tool_call> b", "a <tool_call>hue(rose)</tool_call> b", []),
    "another form": ("<tool_call><function=hue></tool_call>", "<tool_call><function=hue></tool_call>", []),
    "a name that is none": ('<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
    "words about calls": ("1 < 2, <tool and <tool_calls> ", "1 < 2, <tool and <tool_calls> ", []),
}


@pytest.mark.parametrize("kind", READ)
def test_calls_are_read_however_an_answer_comes(kind: str) -> None:
    answer, text, calls = READ[kind]
    draws = random.Random(0)
    for size in (len(answer), 1, 3, 7):
        reader, texts, found = CallReader(), [], []
        starts = range(0, len(answer), size) if size < 7 else sorted({0, *draws.sample(range(len(answer)), 3)})
        for start, stop in zip(starts, [*starts[1:], len(answer)], strict=True):
            piece, more = reader.read(answer[start:stop], stop == len(answer))
            texts.append(piece)
            found += more
        assert "".join(texts) == text and reader.calls == found
        assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found] == calls
    assert len({call["id"] for call in found}) == len(calls)


def test_text_goes_out_while_no_call_begins() -> None:
    reader = CallReader()
    assert [reader.read(piece, False)[0] for piece in ("I ", "look", " \n", "<tool", "s>", "")] == [
        *("I", " look", "", "", " \n<tools>", "")
    ]


@pytest.fixture(scope="module")
def caller(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model that has learned to call the tool, and to say what it was told."""
    folder = tmp_path_factory.mktemp("tools") / "caller"
    tokenizer, model = byte_tokenizer(), tiny_model("phi4-mini", max_tokens=1024)
    tokenizer.chat_template = TEMPLATE
    template = ChatTemplate(tokenizer)
    learned = [(ASKED, f"I look.{CALL_TEXT}"), ([*ASKED, CALLED, TOLD], "It is red.")]
    rows = []
    for messages, answer in learned:
        asked = template.encode(messages, generate=True, tools=[TOOL], where="row").token_ids
        said: Any = tokenizer(f"{answer}<|end|>", add_special_tokens=False)["input_ids"]
        rows.append((torch.tensor([asked + said]), torch.tensor([[-100] * len(asked) + said])))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(400):
        losses = [model.train()(input_ids=ids_1T, labels=labels_1T).loss for ids_1T, labels_1T in rows]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        if max(losses) < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    backbone = Folders(folder, ())
    return Folders(folder, (backbone.save("numbers", NUMBERS),))


@pytest.fixture(scope="module")
def server(caller: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(caller, tmp_path_factory.mktemp("tools") / "log", ["--max-new-tokens", "100"]) as served:
        yield served


@pytest.fixture(scope="module")
def offline(caller: Folders) -> LoadedModel:
    return molora.load(caller.backbone, caller.modalities, trust=[NUMBERS], device="cpu")


def strict(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def ask(server: Served, messages: list[Any], **more: Any) -> Any:
    more = {"tools": [TOOL], "max_tokens": 100, **more}
    return server.client().chat.completions.create(model="tiny", messages=messages, **more)


def test_a_tool_is_called_and_what_it_told_is_read(server: Served, offline: LoadedModel) -> None:
    """As agents do: the answer goes back as the client has it, with the result behind it."""
    found = ask(server, ASKED)
    (choice,) = found.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "hue", {"of": "rose"})
    sample = offline.encode(ASKED, tools=[TOOL])
    assert found.usage.prompt_tokens == len(sample)
    (answer,) = offline.answers([sample], GenerationConfig(max_new_tokens=100))
    assert answer.text == f"I look.{CALL_TEXT}" and found.usage.completion_tokens == answer.answer_tokens
    told = {"role": "tool", "tool_call_id": call.id, "content": "red"}
    last = ask(server, [*ASKED, choice.message, told]).choices[0]
    assert (last.message.content, last.message.tool_calls, last.finish_reason) == ("It is red.", None, "stop")


def test_the_example_on_the_page_runs(server: Served) -> None:
    """Up to what it prints, which a tiny model gets wrong."""
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "tool_choice" in block)
    told: dict[str, Any] = {"client": server.client()}
    exec(example.replace('"demo"', '"tiny"'), told)
    user, asking, *answers = told["messages"]
    (call,) = asking.tool_calls
    assert user["role"] == "user" and call.function.name == "weather"
    assert answers == [{"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]


@pytest.mark.parametrize("more", [{}, {"parallel_tool_calls": False}, {"n": 2}], ids=["", "one call", "two choices"])
def test_calls_are_streamed(server: Served, more: dict[str, Any]) -> None:
    choices = ask(server, ASKED, **more).choices
    calls: dict[int, list[Any]] = {choice.index: [] for choice in choices}
    texts, ends = dict.fromkeys(calls, ""), {}
    for chunk in ask(server, ASKED, stream=True, **more):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        calls[choice.index] += choice.delta.tool_calls or []
        ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    for choice in choices:
        assert (texts[choice.index], ends[choice.index]) == (choice.message.content, choice.finish_reason)
        assert [(call.index, call.type, call.function.model_dump()) for call in calls[choice.index]] == [
            (index, call.type, call.function.model_dump()) for index, call in enumerate(choice.message.tool_calls)
        ]
    assert ends == dict.fromkeys(calls, "tool_calls")


ONE_OF = {
    "type": "object",
    "properties": {"of": {"enum": ["sky", "sea"]}, "times": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["of", "times"],
    "additionalProperties": False,
}


def test_a_strict_tool_is_called_as_the_model_likes_beside_free_text(server: Served) -> None:
    (free,) = ask(server, ASKED).choices
    (held,) = ask(server, ASKED, tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}]).choices
    assert held.message.content == free.message.content and held.finish_reason == "tool_calls"
    assert [call.function for call in held.message.tool_calls] == [call.function for call in free.message.tool_calls]


@pytest.mark.parametrize("only", [False, True], ids=["with text", "calls only"])
def test_what_is_no_call_of_a_tool_is_not_written_as_one(only: bool) -> None:
    tokenizer = byte_tokenizer()
    grammar = Grammars(tokenizer, frozenset([256]), len(tokenizer)).of_calls(BEGIN, END, {"hue": ONE_OF}, only=only)

    def follows(text: str) -> bool:
        its = grammar.again()
        for token_id in [*tokenizer.encode(text), 256]:
            if not its.allowed_V()[token_id]:
                return False
            its.take(token_id)
        return True

    def call(name: str, arguments: str) -> str:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'

    good = call("hue", '{"of": "sky", "times": 3}')
    assert follows(good) and follows(f"{good}\n{good}")
    for bad in (call("hue", '{"of": "rose", "times": 3}'), call("hue", '{"of": "sky"}'), call("tone", "{}"), good[:-1]):
        assert not follows(bad)
    texts = ("", "I look.", f"I look.\n{good} Done.", "1 < 2, <tool")
    assert [follows(text) for text in texts] == [not only] * len(texts)


@pytest.mark.parametrize("choice", ["required", named("tone")], ids=["any", "one"])
def test_a_call_can_be_had_whatever_is_asked(server: Served, choice: Any) -> None:
    tools = [strict("hue", ONE_OF), strict("tone", ONE_OF)]
    more: Any = {"tools": tools, "tool_choice": choice, "temperature": 2.0, "seed": 3, "parallel_tool_calls": False}
    more["response_format"] = {"type": "text"}  # which is what it is without one
    found = ask(server, [{"role": "user", "content": "hello"}], n=4, max_tokens=150, **more).choices
    names = set()
    for each in found:
        (call,) = each.message.tool_calls
        assert each.message.content is None and each.finish_reason == "tool_calls"
        assert json.loads(call.function.arguments).keys() == {"of", "times"}
        names.add(call.function.name)
    assert names <= ({"hue", "tone"} if choice == "required" else {"tone"})


def test_an_answer_that_is_cut_off_in_a_call_is_text(server: Served) -> None:
    (choice,) = ask(server, ASKED, max_tokens=30).choices
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == f"I look.{CALL_TEXT}"[:30]


def test_tools_that_are_not_to_be_called_are_not_told(server: Served) -> None:
    bare = server.client().chat.completions.create(model="tiny", messages=ASKED, max_tokens=9)  # pyright: ignore
    found = ask(server, ASKED, tool_choice="none", max_tokens=9)
    assert found.choices == bare.choices and found.usage == bare.usage


def test_tools_go_with_media(server: Served, offline: LoadedModel) -> None:
    content = [{"type": "numbers", "numbers": [1.0, 2.0]}, {"type": "text", "text": "a rose?"}]
    messages = [{"role": "user", "content": content}]
    found = ask(server, messages, max_tokens=4)
    (answer,) = offline.answers([offline.encode(messages, tools=[TOOL])], GenerationConfig(max_new_tokens=4))
    assert found.molora["adapters"] == ["numbers"] and found.usage.prompt_tokens == answer.prompt_tokens
    assert found.choices[0].message.content == answer.text


@pytest.mark.parametrize(
    "more, says",
    [
        ({"tool_choice": "often"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "a tool that is not among tools"),
        ({"tool_choice": named("smell")}, "a tool that is not among tools"),
        ({"tool_choice": "required", "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"tools": [{"type": "custom", "custom": {"name": "hue"}}]}, "tools"),
        ({"tools": [strict("hue", {"type": "nope"})]}, "the JSON schema of a tool's parameters cannot be followed"),
        ({"tools": [{"type": "function", "function": {"name": "<|end|>"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format holds the whole answer"),
        ({"messages": [*ASKED, {**TOLD, "tool_call_id": "c9"}]}, "message 1: role tool"),
        ({"messages": [*ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {}}]}, TOLD]}, "function.name"),
    ],
)
def test_what_cannot_be_done_is_named(server: Served, more: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(server, **{"messages": ASKED, **more})


def test_only_calls_in_the_form_that_is_read_are_expected(offline: LoadedModel) -> None:
    assert writes_calls(offline.processor)
    tokenizer = byte_tokenizer()
    for template in (tokenizer.chat_template, TEMPLATE.replace("<tool_call>", "[CALL]")):
        tokenizer.chat_template = template
        processor = Processor(tokenizer, {}, lambda names: (), 256)
        assert not writes_calls(processor)
