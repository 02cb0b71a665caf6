"""What strangers send: one clear error for each, nothing read that may not be, and the server as well as before."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import BaseModel, ValidationError

from molora.serve.fields import ChatBody, CompletionBody
from tests.png import chunk
from tests.serve.conftest import FORM, Browsing, Folders, Served, form, picture, serving, sound

KEY = "the right key"
MAX_BODY = 2**19


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("limits")
    (home / "keys").write_text(f"# of clients\nanother key\n{KEY}\n")
    sizes = ["--max-running-samples", "2", "--max-waiting", "1", "--max-body-mib", str(MAX_BODY / 2**20)]
    media = ["--media-seconds", "20", "--media-gib", "1", "--answer-seconds", "20"]
    with serving(folders, home / "log", ["--api-keys", str(home / "keys"), *sizes, *media]) as served:
        yield served


def send(
    server: Served,
    body: bytes | str | dict[str, Any],
    path: str = "/v1/chat/completions",
    key: str | None = KEY,
    method: str = "POST",
    **more: str,
) -> tuple[int, Any, dict[str, str]]:
    """The status, the JSON and the headers of an answer."""
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    headers = {"content-type": "application/json", **more}
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    data = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, data.encode() if isinstance(data, str) else data, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content), {name.lower(): value for name, value in response.getheaders()}


def chat(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}


def part(kind: str, **inner: Any) -> dict[str, Any]:
    return chat([{"type": kind, kind: inner}])


def image(url: str) -> dict[str, Any]:
    return part("image_url", url=url)


def of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(side * 1000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


WAV = base64.b64encode(sound()).decode()
BAD_CHATS: dict[str, tuple[Any, int, str]] = {
    "no JSON": ("{", 400, "no JSON: Expecting property name"),
    "nothing": ("", 400, "no object in JSON"),
    "a list": ("[]", 400, "no object in JSON"),
    "a number": ("7", 400, "no object in JSON"),
    "deep JSON": ("[" * 50_000 + "]" * 50_000, 400, "the body cannot be read: maximum recursion depth"),
    "deep messages": ('{"model": "tiny", "messages": ' + "[" * 50_000 + "]" * 50_000 + "}", 400, "recursion depth"),
    "no UTF-8": (
        b'{"model": "\xff\xfe"}',
        400,
        "the body cannot be read: 'utf-8' codec can't decode byte 0xff in position 11",
    ),
    "a huge whole number": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 1' + "0" * 9000 + "}",
        400,
        "the body cannot be read: Exceeds the limit",
    ),
    "a number that is none": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        400,
        "temperature",
    ),
    "an infinite one": (chat(temperature=float("inf")), 400, "temperature"),
    "no model": ({"messages": [{"role": "user", "content": "a"}]}, 400, "model"),
    "no messages": ({"model": "tiny"}, 400, "messages"),
    "no message": (chat(messages=[]), 400, "messages"),
    "messages that are text": (chat(messages="hello"), 400, "messages"),
    "a message that is text": (chat(messages=["hello"]), 400, "messages"),
    "no role": (chat(messages=[{"content": "a"}]), 400, "role"),
    "a role that is none": (chat(messages=[{"role": "wizard", "content": "a"}]), 400, "wizard"),
    "a tool's turn": (chat(messages=[{"role": "tool", "content": "a", "tool_call_id": "x"}]), 400, "tool"),
    "no content": (chat(messages=[{"role": "user"}]), 400, "content"),
    "a name": (chat(messages=[{"role": "user", "content": "a", "name": "Ann"}]), 400, "name"),
    "an answer at the end": (chat(messages=[{"role": "assistant", "content": "a"}]), 400, "nothing to generate"),
    "half a character": (chat("\ud83d"), 400, "half of one"),
    "half a character in a name": (chat(model="\ud83d"), 400, "model"),
    "too long": (chat("x" * 400), 400, "at most 256 fit"),
    "much too long": (chat("x" * 300_000), 400, "characters of text"),
    "many parts": (chat([{"type": "text", "text": ""}] * 999), 400, "999 parts"),
    "a part that is text": (chat(["a"]), 400, "part 0"),
    "a part without a type": (chat([{"text": "a"}]), 400, "part 0"),
    "an unknown part": (chat([{"type": "smell", "smell": "rose"}]), 400, "smell"),
    "a video": (part("video_url", url="data:video/mp4;base64,AAAA"), 400, "video"),
    "an unknown model": (chat(model="gpt-4o"), 404, "there are tiny"),
    "an unknown field": (chat(colour="red"), 400, "'colour' is not honoured"),
    "a penalty": (chat(frequency_penalty=0.5), 400, "frequency_penalty"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools"),
    "tools of a template that takes none": (
        chat(tools=[{"type": "function", "function": {"name": "f"}}]),
        400,
        "template of tiny takes no tools",
    ),
    "a deep tool": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", "function": '
        '{"name": "f", "parameters": ' + '{"a":' * 800 + "1" + "}" * 800 + "}}]}",
        400,
        "nested deeper",
    ),
    "a deep part": (
        '{"model": "tiny", "messages": [{"role": "user", "content": [{"type": "numbers", "numbers": '
        + "[" * 800
        + "]" * 800
        + "}]}]}",
        400,
        "nested deeper",
    ),
    "text for a number": (chat(temperature="hot"), 400, "temperature"),
    "a truth for a number": (chat(max_tokens=True), 400, "max_tokens"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens"),
    "fewer than no tokens": (chat(max_completion_tokens=-1), 400, "max_completion_tokens"),
    "a truth for a number that changes nothing": (chat(best_of=True), 400, "best_of"),
    "a cold temperature": (chat(temperature=-1), 400, "temperature"),
    "a temperature too small": (chat(temperature=1e-9), 400, "temperature"),
    "top_p of nothing": (chat(top_p=0), 400, "top_p"),
    "top_k below": (chat(top_k=-2), 400, "top_k"),
    "no choice": (chat(n=0), 400, "n"),
    "more choices than there are places": (chat(n=4), 400, "4 answers are asked for at once, and 3 is the most here"),
    "many choices": (chat(n=1000), 400, "n"),
    "likelihoods of none": (chat(top_logprobs=3), 400, "logprobs: true"),
    "too many likelihoods": (chat(logprobs=True, top_logprobs=100), 400, "top_logprobs"),
    "options of no stream": (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    "an unknown option": (chat(stream=True, stream_options={"speed": 1}), 400, "stream_options.speed"),
    "stops that are numbers": (chat(stop=["a", 1]), 400, "stop.1: Input should be a valid string"),
    "too many stops": (chat(stop=["a"] * 17), 400, "stop: List should have at most 16 items"),
    "a choice of no tool": (chat(tool_choice={"type": "function"}), 400, "tool_choice.function: Field required"),
    "a choice of tools that is none": (chat(tool_choice="any"), 400, "tool_choice: Input should be 'none', 'auto'"),
    "a form without its schema": (chat(response_format={"type": "json_schema"}), 400, "response_format"),
    "a form that is none": (chat(response_format={"type": "yaml"}), 400, "yaml"),
    "a form without a type": (chat(response_format={}), 400, "response_format"),
    "more than a form": (chat(response_format={"type": "text", "width": 1}), 400, "width"),
    "a schema that is none": (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}),
        400,
        "cannot be followed",
    ),
    "a pattern that no text has": (
        chat(response_format={"type": "regex", "pattern": r"[^\s\S]"}),
        400,
        "no text that goes on from here is what the grammar describes; change it",
    ),
    "a pattern that is none": (chat(response_format={"type": "regex", "pattern": "("}), 400, "cannot be followed"),
    "a form and no end": (chat(response_format={"type": "json_object"}, ignore_eos=True), 400, "contradict"),
    "a local file": (image("/etc/passwd"), 400, "local files are not opened"),
    "a local file by its scheme": (image("file:///etc/passwd"), 400, "local files are not opened"),
    "a path": (chat([{"type": "image", "path": "/etc/passwd"}]), 400, "local files are not opened"),
    "a path under the type": (chat([{"type": "image", "image": "/etc/passwd"}]), 400, "local files are not opened"),
    "a path of a sound": (chat([{"type": "audio", "audio": "/etc/passwd"}]), 400, "local files are not opened"),
    "a path of a plugin": (chat([{"type": "numbers", "path": "/etc/passwd"}]), 400, "local files are not opened"),
    "a URL": (image("http://127.0.0.1:1/a.png"), 400, "URLs are not fetched"),
    "a URL of a plugin": (chat([{"type": "numbers", "url": "https://example.com"}]), 400, "URLs are not fetched"),
    "another scheme": (image("ftp://127.0.0.1/a"), 400, "local files are not opened"),
    "no base64": (image("data:image/png;base64,????"), 400, "base64"),
    "cut base64": (image(of(picture())[:-7]), 400, "part 0"),
    "no picture": (image(of(b"hello")), 400, "part 0"),
    "an empty picture": (image("data:image/png;base64,"), 400, "part 0"),
    "a bomb of pixels": (image(of(bomb(60_000))), 400, "pixels"),
    "a picture that is cut off": (image(of(picture()[:60])), 400, "part 0"),
    "no sound": (part("input_audio", data=base64.b64encode(b"RIFF").decode(), format="wav"), 400, "part 0"),
    "a sound without data": (part("input_audio", format="wav"), 400, "input_audio.data"),
    "a sound of raw samples": (part("input_audio", data=WAV, format="pcm16"), 400, "format is honoured only as wav"),
    "a smaller picture": (part("image_url", url=of(picture()), detail="low"), 400, "detail is honoured only as auto"),
    "an unknown field of a picture": (
        part("image_url", url=of(picture()), crop=1),
        400,
        "crop is not honoured; only url and detail are",
    ),
    "media without a rule": (
        chat([{"type": "numbers", "numbers": [1.0]}, {"type": "image_url", "image_url": {"url": of(picture())}}]),
        400,
        "no routing rule",
    ),
    "a plugin's part without its data": (chat([{"type": "numbers"}]), 400, "no numbers"),
}


@pytest.mark.parametrize("kind", BAD_CHATS)
def test_what_is_wrong_is_one_error_that_says_what(server: Served, kind: str) -> None:
    body, status, says = BAD_CHATS[kind]
    found, told, _ = send(server, body)
    assert (found, told.keys()) == (status, {"error"}), told
    assert told["error"].keys() == {"message", "type", "param", "code"}
    message = told["error"]["message"]
    assert says in message and len(message) < 1000 and not message.startswith("sample")


@pytest.mark.parametrize(("coding", "status"), [("gzip", 415), ("br, gzip", 415), ("identity", 200)])
def test_a_body_that_is_packed_is_refused(server: Served, coding: str, status: int) -> None:
    body = json.dumps(chat()).encode()
    found, told, _ = send(server, gzip.compress(body) if status == 415 else body, **{"content-encoding": coding})
    assert found == status
    assert status == 200 or "send the body as it is" in told["error"]["message"]


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_the_schema_has_the_bounds_and_rules_that_hold(body: type[BaseModel]) -> None:
    schema = body.model_json_schema()
    assert schema["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 64}
    assert '"ge"' not in json.dumps(schema) and schema["additionalProperties"] is False
    whole = {"model": "tiny", "messages": [{}], "prompt": "a"}
    whole = {name: value for name, value in whole.items() if name in schema["required"]}
    for rule in schema["allOf"]:
        asked = dict(whole)
        for name, condition in rule["if"]["properties"].items():
            known = {"object": [{}], "boolean": [True]}.get(condition.get("type"), [condition.get("const")])
            (asked[name], *_) = condition.get("enum", known)
        with pytest.raises(ValidationError):
            body.model_validate(asked)
        body.model_validate(asked | {name: each["const"] for name, each in rule["then"]["properties"].items()})


BAD_COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({}, "prompt"),
    "no text": ({"prompt": ""}, "no token"),
    "no texts": ({"prompt": []}, "prompt: List should have at least 1 item"),
    "no ids": ({"prompt": [[]]}, "no token"),
    "an id that is none": ({"prompt": [99_999]}, "token 99999"),
    "an id below": ({"prompt": [-1]}, "prompt.0: Input should be greater than or equal to 0"),
    "a huge id": ({"prompt": [10**30]}, "token 1000000"),
    "a mix": ({"prompt": ["a", 1]}, "prompt.1: Input should be a valid string"),
    "more prompts than there are places": ({"prompt": ["a"] * 4}, "4 answers are asked for at once"),
    "too long": ({"prompt": "x" * 400}, "400 tokens"),
    "much too long": ({"prompt": "x" * 300_000}, "characters of text"),
    "nothing to do": ({"prompt": "a", "max_tokens": 0}, "without echo"),
    "a suffix": ({"prompt": "a", "suffix": "b"}, "suffix"),
    "half a character": ({"prompt": "\ud83d"}, "half of one"),
    "an echo in a stream": ({"prompt": "a", "echo": True, "stream": True}, "echo and stream"),
}


@pytest.mark.parametrize("kind", BAD_COMPLETIONS)
def test_what_is_wrong_with_a_text_is_said(server: Served, kind: str) -> None:
    body, says = BAD_COMPLETIONS[kind]
    status, told, _ = send(server, {"model": "tiny", **body}, "/v1/completions")
    assert status == 400 and says in told["error"]["message"], told


BAD_FORMS: dict[str, tuple[bytes, str]] = {
    "no file": (form("model=tiny", files=[]), "file"),
    "an empty file": (form("model=tiny", files=[b""]), "is empty"),
    "two files": (form("model=tiny", files=[sound(), picture()]), "'file' is given 2 times"),
    "a text for the file": (form("model=tiny", "file=a", files=[]), "send the sound as a file"),
    "a picture": (form("model=tiny", files=[picture()]), "no audio"),
    "no model": (form(), "model"),
    "a name that takes no sounds": (form("model=tiny:vision"), "takes vision"),
    "a huge seed": (form("model=tiny", f"seed={10**19 + 1}"), "seed"),
    "a huge seed below": (form("model=tiny", f"seed={-(10**19) - 1}"), "seed"),
    "half a seed": (form("model=tiny", "seed=0.5"), "seed"),
    "two seeds": (form("model=tiny", "seed=1", "seed=2"), "'seed' is given 2 times"),
    "no number": (form("model=tiny", "temperature=nan"), "temperature"),
    "a temperature too small": (form("model=tiny", "temperature=1e-9"), "temperature"),
    "an unknown field": (form("model=tiny", "colour=red"), "'colour' is not honoured"),
    "a language": (form("model=tiny", "language=en"), "'language' is not honoured"),
    "a prompt that is a word of another field": (form("model=tiny", "prompt=segment"), "'prompt' is not honoured"),
    "times of words among others": (
        form("model=tiny", "timestamp_granularities[]=word", "timestamp_granularities[]=segment"),
        "'timestamp_granularities[]' is not honoured",
    ),
    "a stream": (form("model=tiny", "stream=true"), "'stream' is not honoured"),
}


@pytest.mark.parametrize("kind", BAD_FORMS)
def test_what_is_wrong_with_a_form_is_said(server: Served, kind: str) -> None:
    body, says = BAD_FORMS[kind]
    status, told, _ = send(server, body, "/v1/audio/transcriptions", **{"content-type": FORM})
    assert status == 400 and says in told["error"]["message"], told


def test_a_form_and_json_have_the_same_bounds(server: Served) -> None:
    described = send(server, "", "/openapi.json", method="GET")[1]["components"]["schemas"]
    forms = [each["properties"] for name, each in described.items() if name.startswith("Body_")]
    assert len(forms) == 2
    for name in ("seed", "temperature"):
        (bounds, _) = described["ChatBody"]["properties"][name]["anyOf"]
        assert {"minimum", "maximum"} <= bounds.keys() and all(bounds.items() <= each[name].items() for each in forms)
    largest = form("model=tiny", f"seed={10**19}", "language=", "stream=false", "timestamp_granularities[]=segment")
    status, told, _ = send(server, largest, "/v1/audio/transcriptions", **{"content-type": FORM})
    assert (status, told["molora"]["seed"]) == (200, 10**19)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/", "/web/chat.js"])
def test_head_is_answered_as_get_without_a_body(server: Served, path: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    found = []
    for method in ("GET", "HEAD"):
        connection.request(method, path, headers={"authorization": f"Bearer {KEY}"})
        response = connection.getresponse()
        found.append((response.status, response.headers["content-length"], response.headers.get_content_type()))
        assert bool(response.read()) == (method == "GET")
    connection.close()
    assert found[0] == found[1] and found[0][0] == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/docs/", "/v1/responses"])
def test_what_is_not_there_is_said_and_leads_nowhere_else(server: Served, path: str) -> None:
    status, told, headers = send(server, chat(), path)
    assert status == 404 and "/docs shows what there is" in told["error"]["message"] and "location" not in headers
    assert send(server, "", "/v1/models/", method="GET")[0] == 404
    status, told, headers = send(server, chat(), "/v1/models/")
    assert (status, headers["allow"]) == (405, "GET") and "location" not in headers
    status, told, headers = send(server, "", "/v1/chat/completions", method="GET")
    assert (status, headers["allow"]) == (405, "POST") and "/docs shows" in told["error"]["message"]


def test_values_that_change_nothing_are_taken(server: Served) -> None:
    nothing = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "tools": None}
    more = {
        "n": 1,
        "top_k": -1,
        "stop": None,
        "store": False,
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
    }
    status, told, _ = send(server, chat(**nothing, **more, stream=False))
    assert status == 200 and told["choices"][0]["finish_reason"] in ("stop", "length")


def test_who_has_no_key_is_told_nothing(server: Served) -> None:
    for key in (None, "", "wrong", KEY + "x", KEY[:-1], "ключ"[:0] or "x" * 10_000):
        for path in ("/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json", "/examples", "/nothing"):
            status, told, headers = send(server, chat(), path, key)
            assert status == 401 and told["error"]["code"] == "invalid_api_key"
            assert headers["www-authenticate"] == "Bearer"
    for key in (KEY, "another key"):
        assert send(server, b"", "/v1/models", key, "GET")[0] == 200
    for path in ("/health", "/ready"):
        assert send(server, b"", path, None, "GET")[0] == 200


def test_the_chat_asks_for_a_key_and_forgets_it_with_the_page(browsing: Browsing, server: Served) -> None:
    seen = browsing(server.address)
    field = seen.page.get_by_label("Key", exact=True)
    seen.expect(field).to_be_focused()
    assert field.get_attribute("type") == "password"
    for key, says in (("wrong", "This server answers those who have a key."), (KEY, "does not know this key")):
        seen.expect(field).to_have_value("")
        seen.expect(seen.page.get_by_text(says)).to_be_visible()
        field.fill(key)
        field.press("Enter")
    seen.expect(field).not_to_be_visible()
    seen.ask("a")
    assert seen.requests[-1].headers["authorization"] == f"Bearer {KEY}"
    assert seen.context.storage_state() == {"cookies": [], "origins": []}
    seen.page.reload()
    seen.expect(field).to_be_visible()
    # Without a key, with a wrong one, and without one again.
    seen.expected_failures = 3


def test_no_other_page_may_ask(server: Served) -> None:
    _, _, headers = send(server, chat(), Origin="https://example.com")
    assert not [name for name in headers if name.startswith("access-control")]
    assert send(server, json.dumps(chat()), **{"content-type": "text/plain"})[0] == 400


def test_a_body_that_is_too_large_is_not_read(server: Served) -> None:
    status, told, _ = send(server, chat("x" * MAX_BODY))
    assert status == 413 and f"{MAX_BODY:,} bytes" in told["error"]["message"]
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as wire:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        wire.sendall(f"{head}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"x" * 2**16
        with pytest.raises(OSError):  # the connection is closed while more is sent
            for _ in range(10_000):
                wire.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    server.log_with("POST /v1/chat/completions 413")


def test_a_full_queue_says_when_to_come_again(server: Served) -> None:
    long = chat(max_tokens=240, ignore_eos=True, n=2)
    found: list[tuple[int, Any, dict[str, str]]] = []
    threads = [threading.Thread(target=lambda: found.append(send(server, long))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [headers for status, _, headers in found if status == 429]
    assert sorted({status for status, _, _ in found}) == [200, 429]
    assert refused and all(int(headers["retry-after"]) >= 1 for headers in refused)
    assert send(server, chat())[0] == 200


def metric(server: Served, name: str) -> float:
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=60)
    connection.request("GET", "/metrics", headers={"authorization": f"Bearer {KEY}"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    (value,) = [line.split()[-1] for line in lines if line.startswith(name + " ")]
    return float(value)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_its_pages(server: Served, stream: bool) -> None:
    """In the middle of an answer; the next one does not wait for the rest of it."""
    free = metric(server, "molora_free_pages")
    address = urlsplit(server.address)
    body = json.dumps(chat(max_tokens=240, ignore_eos=True, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = metric(server, "molora_answer_seconds_count")
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=60) as wire:
        wire.sendall(head.encode() + body)
        if stream:
            wire.recv(1)
        until = time.monotonic() + 30
        while metric(server, "molora_running") == 0 and time.monotonic() < until:
            time.sleep(0.001)
    until = time.monotonic() + 30
    while metric(server, "molora_free_pages") < free and time.monotonic() < until:
        time.sleep(0.01)
    assert metric(server, "molora_free_pages") == free and metric(server, "molora_running") == 0
    assert metric(server, "molora_answer_seconds_count") == before, "the answer did not come to its end"


def test_the_log_holds_no_word_of_what_was_asked(server: Served) -> None:
    send(server, chat("a secret rose" * 99))
    send(server, chat([{"type": "secret", "rose": 1}]))
    log = Path(server.log).read_text()
    assert "secret" not in log and "rose" not in log and KEY not in log
