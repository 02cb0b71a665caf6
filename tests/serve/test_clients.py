"""The openai package against a live server: whatever is asked, the answer is the one that the model gives offline."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import torch

from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.pack import Sample, collate
from tests.serve.conftest import FORM, Folders, Served, form, picture, serving, sound
from tests.tools import ASKED, CALLED, TOLD, TOOL


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("clients") / "log"
    with serving(folders, log, ["--deterministic-batch", "--max-new-tokens", "20"]) as served:
        yield served


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client()


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def of(data: bytes) -> str:
    return base64.b64encode(data).decode()


TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image_url", "image_url": {"url": data_uri(picture(), "image/png"), "detail": "auto"}}
SOUND = {"type": "input_audio", "input_audio": {"data": of(sound()), "format": "wav"}}
SOUND_URL = {"type": "audio_url", "audio_url": {"url": data_uri(sound(0.3, 200.0), "audio/wav")}}
NUMBERS = {"type": "numbers", "numbers": [0.5, -1.0, 2.0]}

# A conversation as clients send it, the same as molora takes it offline, and the adapters that run.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]] = {
    "text": ([TEXT], [TEXT], []),
    "picture": ([IMAGE, TEXT], [{"type": "image", "bytes": picture()}, TEXT], ["vision"]),
    "sound": ([TEXT, SOUND], [TEXT, {"type": "audio", "bytes": sound()}], ["audio"]),
    "both": (
        [IMAGE, SOUND_URL, TEXT],
        [{"type": "image", "bytes": picture()}, {"type": "audio", "bytes": sound(0.3, 200.0)}, TEXT],
        ["vision"],
    ),
    "a plugin's own part": ([NUMBERS, TEXT], [NUMBERS, TEXT], ["numbers"]),
}
Case = tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "seed": 7, "top_p": 0.9}], ids=["greedy", "drawn"])
def test_answers_are_those_that_the_model_gives_offline(
    client: openai.OpenAI, offline: LoadedModel, kind: str, settings: dict[str, Any]
) -> None:
    """Whole and streamed, with how many tokens it took."""
    asked, same, adapters = CONVERSATIONS[kind]
    config = GenerationConfig(max_new_tokens=9, stop=("zz",), **settings)
    (answer,) = offline.answers([offline.encode(user(same))], config)
    more: Any = {"max_tokens": 9, "stop": ["zz"], **settings}
    whole = client.chat.completions.create(model="tiny", messages=user(asked), **more)
    assert whole.choices[0].message.content == answer.text
    assert whole.choices[0].finish_reason == answer.finished
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (answer.prompt_tokens, answer.answer_tokens)
    about: Any = whole.model_extra
    assert about["molora"]["adapters"] == adapters == list(answer.adapters)
    sample = offline.encode(user(same))
    took = {item.modality: item.prepared.num_tokens for item in sample.items}
    assert about["molora"]["media_tokens"] == took and whole.usage.model_extra["media_tokens"] == took  # pyright: ignore[reportOptionalSubscript]
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=user(asked), stream=True, stream_options={"include_usage": True}, **more
        )
    )
    first, *middle, usage = chunks
    assert first.choices[0].delta.role == "assistant" and not first.choices[0].delta.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in middle) == answer.text
    assert [chunk.choices[0].finish_reason for chunk in middle] == [None] * (len(middle) - 1) + [answer.finished]
    assert usage.choices == [] and usage.usage is not None and usage.usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_choices_are_those_of_as_many_conversations(client: openai.OpenAI, offline: LoadedModel) -> None:
    config = GenerationConfig(max_new_tokens=6, temperature=2.0, seed=11)
    expected = offline.generate([user([{"type": "image", "bytes": picture()}, TEXT])] * 4, config)
    assert len(set(expected)) > 1
    more: Any = {"max_completion_tokens": 6, "temperature": 2.0, "seed": 11, "n": 4}
    whole = client.chat.completions.create(model="tiny", messages=user([IMAGE, TEXT]), **more)
    assert [choice.message.content for choice in whole.choices] == expected
    texts = dict.fromkeys(range(4), "")
    for chunk in client.chat.completions.create(model="tiny", messages=user([IMAGE, TEXT]), stream=True, **more):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == expected


def test_a_seed_that_was_drawn_is_told_and_gives_the_same_answer_again(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=user("a"), max_tokens=8, temperature=3.0, **more)

    one, other = ask(), ask()
    assert one.molora["seed"] != other.molora["seed"]
    assert ask(seed=one.molora["seed"]).choices[0].message.content == one.choices[0].message.content


def test_many_clients_at_a_time_get_what_each_gets_alone(server: Served, offline: LoadedModel) -> None:
    """Of every kind, together."""
    cases = list(CONVERSATIONS.values()) * 6

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=120) as client:
            asked = [
                client.chat.completions.create(
                    model="tiny", messages=user(asked), max_tokens=4 + index % 5, seed=index, temperature=1.2
                )
                for index, (asked, _, _) in enumerate(cases)
            ]
            return await asyncio.gather(*asked)

    for index, (found, (_, same, adapters)) in enumerate(zip(asyncio.run(ask_all()), cases, strict=True)):
        config = GenerationConfig(max_new_tokens=4 + index % 5, seed=index, temperature=1.2)
        assert found.choices[0].message.content == offline.generate(user(same), config)
        assert found.molora["adapters"] == adapters


def test_earlier_turns_and_roles_are_read(client: openai.OpenAI, offline: LoadedModel) -> None:
    earlier = {"role": "assistant", "content": "a sound"}
    asked: Any = [{"role": "developer", "content": "be short"}, *user([SOUND, TEXT]), earlier, *user("and?")]
    clip = {"type": "audio", "bytes": sound()}
    same = [{"role": "system", "content": "be short"}, *user([clip, TEXT]), earlier, *user("and?")]
    found = client.chat.completions.create(model="tiny", messages=asked, max_tokens=5)
    assert found.choices[0].message.content == offline.generate(same, GenerationConfig(max_new_tokens=5))


def test_likelihoods_of_an_answer_are_the_models(client: openai.OpenAI, offline: LoadedModel) -> None:
    more: Any = {"max_tokens": 5, "logprobs": True, "top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    found = client.chat.completions.create(model="tiny", messages=user("a"), **more)
    assert found.choices[0].logprobs is not None and found.choices[0].logprobs.content is not None
    told = found.choices[0].logprobs.content
    config = GenerationConfig(max_new_tokens=5, ignore_stop_tokens=True)
    (answer,) = offline.answers([offline.encode(user("a"))], config)
    ids = [*offline.encode(user("a")).token_ids_T.tolist(), *answer.token_ids]
    with torch.no_grad():
        logits_TV = offline.model.logits(collate([Sample.of_text("a", ids)], offline.model.modalities))
    expected_KV = logits_TV.log_softmax(-1)[-6:-1]
    own = torch.tensor([each.logprob for each in told])
    assert torch.allclose(own, expected_KV.gather(1, torch.tensor(ids[-5:])[:, None]).squeeze(1), atol=1e-4)
    assert [len(each.top_logprobs) for each in told] == [3] * 5
    assert all(each.top_logprobs[0].logprob == each.logprob for each in told), "greedy"
    chunks = client.chat.completions.create(model="tiny", messages=user("a"), stream=True, **more)
    streamed = [
        each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == told


def test_texts_are_gone_on_with_and_scored(client: openai.OpenAI, offline: LoadedModel) -> None:
    """As harnesses ask for likelihoods: token ids, an echo, and a token more."""
    texts = ["to be", "or not"]
    ids = [offline.processor.tokenizer.encode(text) for text in texts]
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for choice, text, its in zip(found.choices, texts, ids, strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        own: Any = choice.logprobs.token_logprobs
        assert choice.text.startswith(text) and own[0] is None and len(own) == len(its) + 1
        with torch.no_grad():
            logits_TV = offline.model.logits(collate([Sample.of_text("a", its)], offline.model.modalities))
        expected_T = logits_TV.log_softmax(-1)[:-1].gather(1, torch.tensor(its[1:])[:, None]).squeeze(1)
        assert torch.allclose(torch.tensor(own[1:-1]), expected_T, atol=1e-4)
        top: Any = choice.logprobs.top_logprobs
        assert top[-1] is not None and max(top[-1].values()) == own[-1]
    again = client.completions.create(model="tiny", prompt=texts, max_tokens=0, echo=True, logprobs=1)
    assert [choice.text for choice in again.choices] == texts
    assert again.choices[0].logprobs.token_logprobs == found.choices[0].logprobs.token_logprobs[:-1]  # pyright: ignore
    plain = client.completions.create(model="tiny", prompt=texts[0], max_tokens=6)
    chunks = client.completions.create(model="tiny", prompt=texts[0], max_tokens=6, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    whole = client.completions.create(model="tiny", prompt=texts, max_tokens=6, logprobs=1)
    chunks = client.completions.create(model="tiny", prompt=texts, max_tokens=6, logprobs=1, stream=True)
    told = [chunk.choices[0] for chunk in chunks]
    for choice in whole.choices:
        pieces = [each.logprobs for each in told if each.index == choice.index and each.logprobs]
        offsets = [place for piece in pieces for place in piece.text_offset or ()]
        assert choice.logprobs is not None and offsets == choice.logprobs.text_offset


def test_what_is_said_is_written_down(client: openai.OpenAI, offline: LoadedModel) -> None:
    clip = {"type": "audio", "bytes": sound()}
    config = GenerationConfig(max_new_tokens=20)
    for asking, create in (
        ("Transcribe the audio clip into text.", client.audio.transcriptions.create),
        ("Translate the audio to English.", client.audio.translations.create),
    ):
        expected = offline.generate(user([clip, {"type": "text", "text": asking}]), config)
        assert create(model="tiny", file=("a.wav", sound())).text == expected
        assert create(model="tiny", file=("a.wav", sound()), response_format="text") == expected + "\n"
        told: Any = create(model="tiny", file=("a.wav", sound()), response_format="verbose_json")
        assert told.text == expected and told.duration == pytest.approx(0.5)
    for format in ("srt", "vtt"):
        with pytest.raises(openai.BadRequestError, match="does not know when words are said"):
            client.audio.transcriptions.create(model="tiny", file=("a.wav", sound()), response_format=format)  # pyright: ignore
    with pytest.raises(openai.BadRequestError, match="'language' is not honoured"):
        client.audio.transcriptions.create(model="tiny", file=("a.wav", sound()), language="en")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "number": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sure", "number"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_keep_the_form_that_is_asked_for(client: openai.OpenAI, temperature: float) -> None:
    """Beside answers in no form, whatever the tiny model would rather say, whole and streamed."""

    def ask(form: Any, **more: Any) -> Any:
        content = [IMAGE, TEXT]
        settings: Any = {"max_tokens": 120, "temperature": temperature, "seed": 3, "n": 3, **more}
        return client.chat.completions.create(model="tiny", messages=user(content), response_format=form, **settings)

    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    whole = ask(form)
    for choice in whole.choices:
        told = json.loads(choice.message.content)
        assert choice.finish_reason == "stop" and set(told) == {"sure", "number"}
        assert isinstance(told["sure"], bool) and 0 <= told["number"] <= 99
    texts = ["", "", ""]
    for chunk in ask(form, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    for choice in ask({"type": "regex", "pattern": "(yes|no)[0-9]{2}"}).choices:
        assert re.fullmatch("(yes|no)[0-9]{2}", choice.message.content)
    assert all(choice.message.content.startswith("{") for choice in ask({"type": "json_object"}, max_tokens=4).choices)


def test_whole_numbers_may_be_written_as_others(client: openai.OpenAI) -> None:
    """As some languages write all of theirs; and of two limits both hold."""
    settings: Any = {"temperature": 2.0, "extra_body": {"ignore_eos": True}}
    asked = client.chat.completions.create(model="tiny", messages=user("a"), max_tokens=6, seed=3, n=2, **settings)
    more: Any = {"max_tokens": 9.0, "max_completion_tokens": 6.0, "seed": 3.0, "n": 2.0, **settings}
    same = client.chat.completions.create(model="tiny", messages=user("a"), **more)
    assert same.choices == asked.choices and same.usage == asked.usage


def test_a_template_without_tools_is_named(client: openai.OpenAI) -> None:
    """This model's: it neither tells of tools nor shows calls."""

    def ask(messages: Any, **more: Any) -> Any:
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, **more)

    with pytest.raises(openai.BadRequestError, match="the chat template of tiny takes no tools") as told:
        ask(ASKED, tools=[TOOL])
    assert (told.value.param, told.value.code) == ("tools", "tools_not_supported")
    assert ask(ASKED, tools=[TOOL], tool_choice="none").choices == ask(ASKED).choices
    with pytest.raises(openai.BadRequestError, match="drops tools, or calls of them: hue"):
        ask([*ASKED, CALLED, TOLD])


def test_every_set_of_modalities_has_a_name(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:audio", "tiny:numbers", "tiny:vision", "tiny:audio+vision"]
    assert client.models.retrieve("tiny:vision").id == "tiny:vision"
    found = client.chat.completions.create(model="tiny:vision", messages=user([IMAGE, TEXT]), max_tokens=1)
    assert found.model == "tiny:vision"
    with pytest.raises(openai.BadRequestError, match="tiny:vision takes vision, and the messages hold audio"):
        client.chat.completions.create(model="tiny:vision", messages=user([SOUND, TEXT]), max_tokens=1)


def get(server: Served, path: str) -> str:
    with urllib.request.urlopen(f"{server.address}{path}") as response:
        return response.read().decode()


def test_health_and_numbers_are_told(server: Served, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=user([IMAGE, TEXT]), max_tokens=2)
    assert json.loads(get(server, "/health")) == {"status": "ok"} and json.loads(get(server, "/ready")) == {
        "ready": True
    }
    numbers = get(server, "/metrics")
    assert 'molora_adapters_total{adapters="vision"}' in numbers and "molora_running 0.0" in numbers
    assert "/v1/chat/completions" in json.loads(get(server, "/openapi.json"))["paths"]


CHAT = {"model": "tiny", "messages": user([IMAGE, TEXT]), "max_tokens": 3}
ECHO = {"model": "tiny", "prompt": ["ab", "c"], "max_tokens": 2, "echo": True, "logprobs": 1}
# What is asked, with which body, and the media type of what comes.
ANSWERS: dict[str, tuple[str, Any, str]] = {
    "a conversation": ("/v1/chat/completions", CHAT, "application/json"),
    "its likelihoods": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}, "application/json"),
    "its stream": ("/v1/chat/completions", {**CHAT, "stream": True}, "text/event-stream"),
    "its error": ("/v1/chat/completions", {**CHAT, "model": "other"}, "application/json"),
    "a text": ("/v1/completions", {"model": "tiny", "prompt": "a"}, "application/json"),
    "its likelihoods, and its prompt's": ("/v1/completions", ECHO, "application/json"),
    "its own stream": ("/v1/completions", {"model": "tiny", "prompt": "a", "stream": True}, "text/event-stream"),
    "what is said": ("/v1/audio/transcriptions", form("model=tiny"), "application/json"),
    "more of it": ("/v1/audio/translations", form("model=tiny", "response_format=verbose_json"), "application/json"),
    "its text": ("/v1/audio/transcriptions", form("model=tiny", "response_format=text"), "text/plain"),
    "models": ("/v1/models", None, "application/json"),
    "a model": ("/v1/models/{name}", None, "application/json"),
    "health": ("/health", None, "application/json"),
    "readiness": ("/ready", None, "application/json"),
    "metrics": ("/metrics", None, "text/plain"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_are_as_the_description_of_the_api_says(server: Served, kind: str) -> None:
    path, body, media_type = ANSWERS[kind]
    description = json.loads(get(server, "/openapi.json"))
    (operation,) = description["paths"][path].values()
    sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": FORM if sent is body else "application/json"}
    try:
        url = server.address + path.replace("{name}", "tiny:vision")
        found = urllib.request.urlopen(urllib.request.Request(url, sent, headers))
    except urllib.error.HTTPError as error:
        found = error
    text = found.read().decode()
    assert found.headers.get_content_type() == media_type, text
    schema = operation["responses"]["200" if found.status == 200 else "4XX"]["content"][media_type]["schema"]
    told: Any = json.loads(text) if media_type == "application/json" else text
    jsonschema.validate(told, {**schema, "components": description["components"]})
    if media_type == "application/json":
        described = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(described["required"]) <= told.keys() <= described["properties"].keys()


def test_requests_with_one_id_are_told_apart(server: Served) -> None:
    async def ask_all() -> list[Any]:
        headers = {"x-request-id": "same"}
        url = f"{server.address}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120, default_headers=headers) as client:
            asked = [
                client.chat.completions.create(model="tiny", messages=user("abc"[index]), max_tokens=9)
                for index in (0, 1, 2, 0, 1, 2)
            ]
            return [each.choices[0].message.content for each in await asyncio.gather(*asked)]

    found = asyncio.run(ask_all())
    assert found[:3] == found[3:] and len(set(found)) > 1


def test_a_page_that_has_its_own_name_lead_here_is_not_answered(server: Served) -> None:
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.address}/health", headers={"Host": "LocalHost"})
    ) as own:
        assert own.status == 200
    request = urllib.request.Request(f"{server.address}/v1/models", headers={"Host": "evil.example:8000"})
    with pytest.raises(urllib.error.HTTPError, match="421"):
        urllib.request.urlopen(request)
    request = urllib.request.Request(f"{server.address}/v1/models", headers={"Host": "localhost:1"})
    assert urllib.request.urlopen(request).status == 200


def test_the_log_has_a_line_with_its_id_for_each_request_and_no_word_of_it(server: Served) -> None:
    headers = {"x-request-id": "my-own.id"}
    client = server.client(default_headers=headers)
    asked = client.chat.completions.with_raw_response.create(model="tiny", messages=user("a secret rose"), max_tokens=1)
    assert asked.headers["x-request-id"] == "my-own.id" and asked.parse().id == "chatcmpl-my-own.id"
    log = server.log_with("my-own.id POST /v1/chat/completions 200")
    assert "secret" not in log and "rose" not in log
