"""Tools in prompts: as transformers writes them, never as special tokens, and never lost without a word."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from molora.data.messages import check, conversation
from molora.data.prompt import ChatTemplate
from molora.testing import byte_tokenizer
from tests.tools import ASKED, CALL, CALLED, TEMPLATE, TOLD, TOOL

SAYS_ONLY = {**CALLED, "content": ""}


def tokenizer(template: Any = TEMPLATE) -> PreTrainedTokenizerFast:
    fast = byte_tokenizer()
    fast.chat_template = template
    return fast


def ids(messages: list[Any], tools: list[Any], template: Any = TEMPLATE) -> list[int]:
    encoded = ChatTemplate(tokenizer(template)).encode(messages, generate=True, tools=tools, where="sample 0")
    return encoded.token_ids


def reference(messages: list[Any], tools: list[Any], template: Any = TEMPLATE) -> list[int]:
    fast = tokenizer(template)
    more: Any = {"tools": tools or None, "add_generation_prompt": True, "return_dict": False}
    return fast.apply_chat_template(messages, **more)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("tools", [[], [TOOL], [TOOL, TOOL]], ids=["none", "one", "two"])
@pytest.mark.parametrize(
    "messages",
    [ASKED, [*ASKED, CALLED, TOLD], [*ASKED, SAYS_ONLY, TOLD, TOLD], [*ASKED, CALLED, *ASKED]],
    ids=["asked", "called and told", "told twice", "not told"],
)
def test_ids_are_those_of_transformers(messages: list[Any], tools: list[Any]) -> None:
    assert ids(messages, tools) == reference(messages, tools)


def test_a_template_of_its_own_for_tools_is_taken() -> None:
    plain = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}<|assistant|>"
    both = {"default": plain, "tool_use": TEMPLATE}
    for tools in ([], [TOOL]):
        assert ids(ASKED, tools, both) == reference(ASKED, tools, both)
    assert ids(ASKED, [], both) != ids(ASKED, [TOOL], both)


def test_special_tokens_that_tools_spell_stay_text() -> None:
    spelled = "<|end|><|assistant|>\U00100000"
    tool, told = copy.deepcopy(TOOL), {**TOLD, "content": spelled}
    tool["function"]["description"] = spelled
    tool["function"]["parameters"]["properties"] = {spelled: {"const": spelled}}
    call = {**CALL, "function": {"name": "hue", "arguments": {spelled: [spelled]}}}
    messages = [*ASKED, {**CALLED, "tool_calls": [call]}, told]
    found, special = ids(messages, [tool]), set(tokenizer().all_special_ids)
    innocent = ids([*ASKED, CALLED, TOLD], [TOOL])
    assert [id for id in found if id in special] == [id for id in innocent if id in special]
    assert tokenizer().decode(found) == tokenizer().decode(reference(messages, [tool]))


WITHOUT_TOOLS = TEMPLATE.replace("{% if tools %}", "{% if false %}")


def test_a_template_tells_whether_it_takes_tools() -> None:
    assert ChatTemplate(tokenizer()).takes_tools
    assert not ChatTemplate(tokenizer(WITHOUT_TOOLS)).takes_tools
    assert not ChatTemplate(byte_tokenizer()).takes_tools


@pytest.mark.parametrize(
    "messages, tools, template, says",
    [
        (ASKED, [TOOL], WITHOUT_TOOLS, "drops tools, or calls of them: hue"),
        ([*ASKED, CALLED, TOLD], [], byte_tokenizer().chat_template, "drops tools, or calls of them: hue"),
        ([*ASKED, CALLED, TOLD], [], TEMPLATE.replace("{{ m.content }}<", "<"), r"drops message 2 \(tool\)"),
    ],
)
def test_a_template_that_loses_them_is_named(messages: Any, tools: Any, template: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"sample 0: the chat template {says}"):
        ids(messages, tools, template)


def test_calls_are_not_learned_in_silence() -> None:
    with pytest.raises(ValueError, match="row 3: holds calls of tools"):
        ChatTemplate(tokenizer()).encode([*ASKED, CALLED], where="row 3")


def called(**function: Any) -> list[Any]:
    return [*ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {**CALL["function"], **function}}]}]


@pytest.mark.parametrize(
    "messages, says",
    [
        ([*ASKED, TOLD], "message 1: role tool: no message with tool_calls stands before it"),
        ([*ASKED, CALLED, *ASKED, TOLD], "message 3: role tool"),
        ([*ASKED, CALLED, {**TOLD, "tool_call_id": "c2"}], "message 2: tool_call_id 'c2' is none of"),
        ([*ASKED, CALLED, {**TOLD, "tool_call_id": 3}], "message 2: tool_call_id: expected text"),
        ([*ASKED, {**CALLED, "tool_calls": "hue"}], "message 1: tool_calls: expected a list"),
        ([*ASKED, {**CALLED, "tool_calls": ["hue"]}], "message 1, tool call 0: expected a mapping"),
        ([*ASKED, {**CALLED, "tool_calls": [{**CALL, "colour": 1}]}], "tool call 0: has colour"),
        ([*ASKED, {**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}], "type 'custom'"),
        ([*ASKED, {**CALLED, "tool_calls": [{**CALL, "id": 7}]}], "tool call 0: id: expected text"),
        ([*ASKED, {**CALLED, "tool_calls": [{"id": "c1"}]}], "tool call 0: function: expected a mapping"),
        (called(name=""), "function.name: expected text"),
        (called(arguments=[1]), "function.arguments: expected a mapping"),
        (called(arguments="{}"), "function.arguments: expected a mapping"),
    ],
)
def test_malformed_calls_are_refused_with_their_place(messages: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"row 1: .*{says}"):
        check(messages, {}, "row 1")


def test_arguments_may_be_json_in_text_and_contents_may_be_missing() -> None:
    """As OpenAI's clients send what they got."""
    written = {**CALL, "function": {"name": "hue", "arguments": '{"of": "rose"}'}}
    sent = {"role": "assistant", "content": None, "tool_calls": [written]}
    assert conversation({"messages": [*ASKED, sent, TOLD]}, "row 1") == [*ASKED, SAYS_ONLY, TOLD]
    nothing = {**CALL, "function": {"name": "hue", "arguments": ""}}
    (_, read) = conversation({"messages": [*ASKED, {**sent, "tool_calls": [nothing]}]}, "row 1")
    assert read["tool_calls"][0]["function"]["arguments"] == {}
    for text in ("[]", "{", "{}{}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": ' * 999 + "1" + "}" * 999):
        wrong = {**CALL, "function": {"name": "hue", "arguments": text}}
        with pytest.raises(ValueError, match="row 1: message 1, tool call 0: arguments: "):
            conversation({"messages": [*ASKED, {**sent, "tool_calls": [wrong]}]}, "row 1")
