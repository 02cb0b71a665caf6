"""/v1/chat/completions: conversations with media, answered whole or as a stream."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from molora.data.messages import conversation
from molora.inference.grammar import Grammar
from molora.inference.sampling import TokenLikelihood
from molora.serve.answers import Chat, ChatChoice, ChatLogprobs, ChatMessage, Token
from molora.serve.fields import ChatBody
from molora.serve.replies import Json, finite
from molora.serve.request import Choice, Refused, Request, refusal
from molora.serve.tool_calls import BEGIN, END, CallReader

# What `format` of a sound may say; it is read by its content.
_SOUNDS = ("wav", "mp3", "flac", "ogg", "opus", "aac", "m4a", "webm")
# The whole picture is looked at.
_DETAILS = ("auto", "high")


def messages_of(given: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in our terms. Raises Refused for one that is malformed or asks for what is not done."""
    asked = [_checked(message, f"messages.{index}") for index, message in enumerate(given)]
    try:
        return conversation({"messages": asked}, "the request")
    except ValueError as error:
        raise refusal(error, "messages") from error


def _checked(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message.get("content")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        here = f"{where}.content.{index}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        inner = part.get(kind) if isinstance(kind, str) and isinstance(part, Mapping) else None
        if kind == "image_url" and isinstance(inner, Mapping):
            _only(inner, {"url": None, "detail": _DETAILS}, f"{here}.image_url")
        if kind == "input_audio" and isinstance(inner, Mapping):
            _only(inner, {"data": None, "format": _SOUNDS}, f"{here}.input_audio")
    # Newer clients' word for it.
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _only(inner: Mapping[str, Any], known: Mapping[str, Sequence[str] | None], where: str) -> None:
    for key, value in inner.items():
        allowed = known.get(key)
        if key not in known or (allowed is not None and value is not None and value not in allowed):
            here, others = f"{where}.{key[:80]}", " and ".join(known)
            needed = f"honoured only as {' or '.join(allowed)}" if allowed else f"not honoured; only {others} are"
            raise Refused(f"{here} is {needed}", here)


async def ask(request: Request, body: ChatBody) -> None:
    """Reads a body and says what is to be answered. Raises Refused."""
    likeliest = (body.top_logprobs or 0) if body.logprobs else None
    ends = _check_tools(request, body)
    decoding = request.service.decoding(body, body.limit, ends, num_likeliest=likeliest)
    messages = messages_of(body.messages)
    request.take_places(1)
    holds = body.response_format is not None or body.told_tools
    grammar = await asyncio.to_thread(_grammar, request, body) if holds else None
    try:
        sample = await request.service.preparation.sample(messages, request.id, body.told_tools)
    except ValueError as error:
        raise refusal(error, "messages") from error
    request.ask([sample], decoding, strip=True, grammar=grammar)


def _check_tools(request: Request, body: ChatBody) -> tuple[str, ...]:
    """The texts that end an answer beside its stops. Raises Refused for tools that the model cannot be told of, or
    that do not go with what else is asked."""
    if body.must_call and not body.callable_tools:
        told = "tool_choice asks for a call of a tool that is not among tools; give it there"
        raise Refused(told, "tool_choice")
    if not body.told_tools:
        return ()
    if body.response_format not in (None, {"type": "text"}):
        told = "response_format holds the whole answer, which leaves no room for tools; leave one out"
        raise Refused(told, "response_format")
    if not request.service.loaded.processor.template.takes_tools:
        told = f"the chat template of {request.model} takes no tools; leave tools out, or serve a model whose does"
        raise Refused(told, "tools", "tools_not_supported")
    held = {
        "tool_choice": body.must_call,
        "tools": any(tool.function.strict for tool in body.callable_tools),
        "parallel_tool_calls": body.parallel_tool_calls is False,
    }
    for param, is_held in held.items():
        if is_held and not request.service.reads_calls:
            asked = {"tools": "strict tools are"}.get(param, f"{param} is")
            told = f"{asked} not honoured, as {request.model} calls tools in a form that is not read here; leave it out"
            raise Refused(told, param)
    return (END,) if held["parallel_tool_calls"] else ()


def _reader(request: Request, body: ChatBody) -> CallReader:
    return CallReader(bool(body.told_tools) and request.service.reads_calls)


def _finish(choice: Choice, reader: CallReader) -> Any:
    return "tool_calls" if reader.calls and choice.finished == "stop" else choice.finished


def _grammar(request: Request, body: ChatBody) -> Grammar | None:
    """What the answer is held to. Raises Refused for a form that is not known, or cannot be followed."""
    if body.response_format is None:
        return _grammar_of_calls(request, body)
    form = {key: value for key, value in body.response_format.items() if value is not None}
    kind, grammars = form.pop("type", None), request.service.grammars
    given = form.pop("json_schema" if kind == "json_schema" else "pattern", None)
    schema = given.get("schema") if kind == "json_schema" and isinstance(given, Mapping) else None
    if kind != "text" and body.ignore_eos:
        raise Refused("ignore_eos and response_format contradict each other; leave one out", "ignore_eos")
    try:
        match kind, given:
            case _ if form:
                raise ValueError(f"response_format has {', '.join(form)!r:.80}, which is not honoured; leave it out")
            case "text", None:
                return _grammar_of_calls(request, body)
            case "json_object", None:
                return grammars.of_json_schema({"type": "object"})
            case "json_schema", _ if isinstance(schema, dict):
                return grammars.of_json_schema(schema)
            case "regex", str(pattern):
                return grammars.of_regex(pattern)
            case _:
                known = "text, json_object, json_schema with json_schema.schema, or regex with pattern"
                raise ValueError(f"response_format of type {kind!r:.80} is not honoured as it is; give {known}")
    except ValueError as error:
        raise refusal(error, "response_format") from error


def _grammar_of_calls(request: Request, body: ChatBody) -> Grammar | None:
    """What holds calls to the tools, if one has to be called, or if a tool is strict; then others take any object."""
    functions = [tool.function for tool in body.callable_tools]
    if not (body.must_call or any(function.strict for function in functions)):
        return None
    if body.ignore_eos:
        raise Refused("ignore_eos and calls that are held to a form contradict each other", "ignore_eos")
    parameters = {each.name: (each.strict and each.parameters) or {"type": "object"} for each in functions}
    try:
        return request.service.grammars.of_calls(BEGIN, END, parameters, only=body.must_call)
    except ValueError as error:
        raise refusal(error, "tools") from error


async def whole(request: Request, body: ChatBody) -> Json:
    """All answers, when they are there."""
    # Likelihoods make it long.
    return await asyncio.to_thread(_whole, request, body, await request.texts())


def _whole(request: Request, body: ChatBody, texts: Sequence[str]) -> Json:
    choices: list[ChatChoice] = []
    for choice in request.choices:
        reader = _reader(request, body)
        text, calls = reader.read(texts[choice.index], True)
        message: ChatMessage = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message["content"] = text or None
            message["tool_calls"] = calls
        choices.append(
            {
                "index": choice.index,
                "message": message,
                "logprobs": _logprobs(request, choice.likelihoods) if body.logprobs else None,
                "finish_reason": _finish(choice, reader),
            }
        )
    told: Chat = {"object": "chat.completion", "choices": choices, **request.answered()}
    return Json(told)


async def events(request: Request, body: ChatBody) -> AsyncGenerator[bytes, None]:
    """The answers as a client reads them: the role first, then texts, each choice's last with what ended it, then, if
    it is asked for, what the request took."""
    waiting: dict[int, list[TokenLikelihood]] = {choice.index: [] for choice in request.choices}
    readers = [_reader(request, body) for _ in request.choices]

    def chunk(index: int, delta: dict[str, Any], logprobs: ChatLogprobs | None = None, finished: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
        return request.chunk("chat.completion.chunk", choice, body.stream_options)

    for choice in request.choices:
        yield chunk(choice.index, {"role": "assistant", "content": ""})
    async with aclosing(request.pieces()) as pieces:
        async for piece in pieces:
            index, reader = piece.choice.index, readers[piece.choice.index]
            text, calls = reader.read(piece.text, piece.choice.finished is not None)
            finished = _finish(piece.choice, reader)
            waiting[index] += piece.likelihoods
            if not (text or calls or finished):
                continue
            told = _logprobs(request, waiting[index]) if request.decoding.num_likeliest is not None else None
            waiting[index] = []
            content: dict[str, Any] = {"content": text} if text else {}
            if calls:
                numbered = enumerate(calls, len(reader.calls) - len(calls))
                content["tool_calls"] = [{"index": number, **call} for number, call in numbered]
            yield chunk(index, content, told, finished)
    if body.stream_options and body.stream_options.include_usage:
        yield request.chunk("chat.completion.chunk", None, body.stream_options)


def _logprobs(request: Request, likelihoods: Sequence[TokenLikelihood]) -> ChatLogprobs:
    def told(token_id: int, log_probability: float) -> Token:
        text = request.service.token_text(token_id)
        # A token may be a part of a character, which has no text.
        whole = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": finite(log_probability), "bytes": whole}

    return {
        "content": [
            {**told(each.token_id, each.log_probability), "top_logprobs": [told(*one) for one in each.likeliest]}
            for each in likelihoods
        ],
        "refusal": None,
    }
