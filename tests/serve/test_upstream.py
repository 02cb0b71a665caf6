"""Requests that a server with weights answers: each goes to the adapter that the router takes, as it came."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from typer.testing import CliRunner

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.pretrained import identify
from molora.checkpoint.run_folder import write_run
from molora.cli.commands import app
from molora.inference.load import LoadedModel
from tests.serve.conftest import Folders, Served, picture, serving, sound

KEY = "the key of the server behind"
BARE = "the backbone"


@dataclass
class Behind:
    """A server as vLLM's is to its clients, which keeps what it is asked, and answers with some of it."""

    address: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    stop: Callable[[], None] = lambda: None
    adapters_have_parents: bool = True

    def app(self, adapters: Sequence[str]) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models")
        async def models(request: Request) -> Any:
            if request.headers.get("authorization") != f"Bearer {KEY}":
                return JSONResponse({"error": {"message": "no key"}}, 401)
            parent = BARE if self.adapters_have_parents else None
            cards = [{"id": BARE, "parent": None}, *({"id": name, "parent": parent} for name in adapters)]
            return {"object": "list", "data": cards}

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Any:
            body = await request.json()
            self.asked.append(body)
            self.headers.append(dict(request.headers))
            if "refuse" in body:
                return JSONResponse({"error": {"message": "not I"}}, body["refuse"], {"retry-after": "7"})
            if "instead" in body:
                return Response(body["instead"][1], body["instead"][0])
            if not body.get("stream"):
                message = {"role": "assistant", "content": body["model"]}
                choice = {"index": 0, "message": message, "text": body["model"], "finish_reason": "stop"}
                return {
                    "id": "a",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [choice],
                }
            return StreamingResponse(self.pieces(body), media_type="text/event-stream")

        return app

    async def pieces(self, body: dict[str, Any]) -> AsyncIterator[str]:
        try:
            for index in range(body.get("pieces", 3)):
                delta = {"role": "assistant", "content": f"{index} "}
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                told = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
                yield f"data: {json.dumps({**told, 'choices': [choice]})}\n\n"
                if body.get("break_at") == index:
                    raise ConnectionError
                while body.get("wait_at") == index and not self.go_on.is_set():
                    await asyncio.sleep(0.01)
            yield "data: [DONE]\n\n"
        finally:
            self.left.set()


@contextmanager
def behind(adapters: Sequence[str]) -> Iterator[Behind]:
    made = Behind()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(made.app(adapters), log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join()

        made.address, made.stop = f"http://127.0.0.1:{listening.getsockname()[1]}/v1", stop
        yield made
        stop()


@pytest.fixture(scope="module")
def upstream() -> Iterator[Behind]:
    with behind(["vision", "audio", "numbers"]) as made:
        yield made


@pytest.fixture(scope="module")
def proxy(folders: Folders, upstream: Behind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("proxy") / "log"
    with passing(folders, upstream, log, ["--max-running-samples", "2", "--max-waiting", "0"]) as served:
        yield served


@contextmanager
def passing(folders: Folders, upstream: Behind, log: Path, more: Sequence[str] = ()) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEY_BEHIND", KEY)
        named = ["--upstream", upstream.address, "--upstream-key-variable", "KEY_BEHIND"]
        with serving(folders, log, [*named, *more]) as served:
            yield served


def of(data: bytes) -> str:
    return base64.b64encode(data).decode()


# A part as clients send it, and the same as molora takes it offline.
TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{of(picture())}", "detail": "auto"}}
SOUND = {"type": "input_audio", "input_audio": {"data": of(sound()), "format": "wav"}}
SOUND_URL = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{of(sound(0.3))}"}}
SERIES = {"type": "numbers", "numbers": [0.5, -1.0, 2.0]}
OFFLINE = {
    id(TEXT): TEXT,
    id(IMAGE): {"type": "image", "bytes": picture()},
    id(SOUND): {"type": "audio", "bytes": sound()},
    id(SOUND_URL): {"type": "audio", "bytes": sound(0.3)},
    id(SERIES): SERIES,
}
# The turns of a conversation: what a user says, then an answer, and so on.
MIXES: list[list[list[dict[str, Any]]]] = [
    [[TEXT]],
    [[IMAGE, TEXT]],
    [[SOUND, TEXT]],
    [[SOUND_URL, TEXT]],
    [[IMAGE, SOUND, TEXT]],
    [[SOUND_URL, TEXT, IMAGE]],
    [[IMAGE, IMAGE, TEXT]],
    [[SOUND, SOUND_URL]],
    [[TEXT], [TEXT]],
    [[IMAGE, TEXT], [TEXT]],
    [[TEXT], [SOUND, TEXT]],
    [[IMAGE, TEXT], [SOUND, TEXT]],
    [[SOUND_URL], [IMAGE], [TEXT]],
    [[TEXT], [TEXT], [IMAGE, IMAGE]],
    [[SERIES, TEXT]],
]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def conversation(turns: Sequence[Any]) -> list[Any]:
    said: list[Any] = [{"role": "system", "content": "be short"}]
    for content in turns:
        said += [user(content), {"role": "assistant", "content": "<image> it is"}]
    return said[:-1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("turns", MIXES, ids=range(len(MIXES)))
def test_a_request_goes_to_the_adapter_that_the_router_takes(
    proxy: Served, upstream: Behind, offline: LoadedModel, turns: list[Any], stream: bool
) -> None:
    same = [[OFFLINE[id(part)] for part in content] for content in turns]
    sample = offline.encode(conversation(same))
    taken = offline.model.router.adapters(sample.modalities) or {BARE}
    more: Any = {"frequency_penalty": 0.5, "seed": 7, "extra_body": {"mm_processor_kwargs": {"num_crops": 4}}}
    asked = conversation(turns)
    found: Any = proxy.client().chat.completions.create(model="tiny", messages=asked, stream=stream, **more)
    if stream:
        chunks = list(found)
        assert [chunk.choices[0].delta.content for chunk in chunks] == ["0 ", "1 ", "2 "]
        models = {chunk.model for chunk in chunks}
    else:
        models = {found.model, found.choices[0].message.content}
    assert models == taken
    (model,) = taken
    body = upstream.asked[-1]
    expected = {"model": model, "messages": asked, "frequency_penalty": 0.5, "seed": 7}
    assert {**expected, "mm_processor_kwargs": {"num_crops": 4}, "stream": stream} == {"stream": False, **body}


def test_a_text_goes_to_the_bare_backbone(proxy: Served, upstream: Behind) -> None:
    found = proxy.client().completions.create(model="tiny:vision", prompt=[1, 2], logprobs=3, extra_body={"min_p": 0.1})
    assert found.choices[0].text == BARE
    assert upstream.asked[-1] == {"model": BARE, "prompt": [1, 2], "logprobs": 3, "min_p": 0.1}


def test_names_are_those_of_the_run_and_take_what_they_say(proxy: Served, upstream: Behind) -> None:
    client, before = proxy.client(), len(upstream.asked)
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:audio", "tiny:numbers", "tiny:vision", "tiny:audio+vision"]
    with pytest.raises(openai.BadRequestError, match="tiny:vision takes vision, and the messages hold audio; ask tiny"):
        client.chat.completions.create(model="tiny:vision", messages=[user([SOUND])])  # pyright: ignore[reportArgumentType]
    with pytest.raises(openai.NotFoundError, match="there is no model 'vision' here"):
        client.chat.completions.create(model="vision", messages=[{"role": "user", "content": "a"}])
    assert len(upstream.asked) == before


def send(proxy: Served, body: Any, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"content-type": "application/json", **headers}
    return httpx2.post(f"{proxy.address}/v1/chat/completions", content=content, headers=headers, timeout=60)


def chat(content: Any = "a", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [user(content)], **more}


REFUSED: dict[str, tuple[Any, str, str | None]] = {
    "a set without a rule": (chat([SERIES, IMAGE]), "no routing rule", "no_routing_rule"),
    "a part of no modality": (chat([{"type": "smell", "smell": "a"}]), "no modality answers to parts", None),
    "a URL": (
        chat([{"type": "image_url", "image_url": {"url": "http://example.org/"}}]),
        "not fetched",
        "invalid_media",
    ),
    "a local file": (
        chat([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        "local",
        "invalid_media",
    ),
    "a number that is none": (chat(temperature=float("nan")), "NaN or Infinity", None),
    "no messages": ({"model": "tiny"}, "messages: Field required", None),
    "no name": ({"messages": [user("a")]}, "model: Field required", None),
    "messages that are none": ({"model": "tiny", "messages": [{"role": "nobody", "content": "a"}]}, "nobody", None),
    "no JSON": (b"{", "JSON", None),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_request_that_cannot_be_routed_is_refused_here(proxy: Served, upstream: Behind, kind: str) -> None:
    before = len(upstream.asked)
    body, says, code = REFUSED[kind]
    answer = send(proxy, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and says in error["message"] and error["code"] == code
    assert len(upstream.asked) == before


def test_errors_of_the_server_behind_are_passed_on(proxy: Served) -> None:
    for status in (400, 404, 429, 500):
        answer = send(proxy, chat(refuse=status))
        assert (answer.status_code, answer.json()) == (status, {"error": {"message": "not I"}})
        assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("answer", [(307, ""), (200, "<html>"), (200, ""), (200, "{"), (500, "out"), (401, "{}")])
def test_what_is_no_answer_is_not_passed_on(proxy: Served, answer: tuple[int, str]) -> None:
    status, content = answer
    found = send(proxy, chat(instead=[status, content]))
    error = found.json()["error"]
    assert (found.status_code, error["code"]) == (503, "model_failed")
    assert ("refuses the key" if status == 401 else "no answer in JSON") in error["message"]


def test_the_request_keeps_its_id_and_only_the_servers_own_key_goes_on(proxy: Served, upstream: Behind) -> None:
    answer = send(proxy, chat(), **{"x-request-id": "mine", "authorization": "Bearer a client's", "cookie": "a=b"})
    headers = upstream.headers[-1]
    assert answer.headers["x-request-id"] == headers["x-request-id"] == "mine"
    assert headers["authorization"] == f"Bearer {KEY}" and "cookie" not in headers
    proxy.log_with("mine POST /v1/chat/completions 200")


def test_a_stream_that_breaks_off_says_so(proxy: Served) -> None:
    answer = send(proxy, chat(stream=True, break_at=1))
    *_, broken, end = answer.text.strip().split("\n\n")
    assert answer.status_code == 200 and "0 " in answer.text
    assert json.loads(broken.removeprefix("data: "))["error"]["code"] == "model_failed" and end == "data: [DONE]"


def test_a_client_that_leaves_ends_its_answer_and_gives_back_its_place(proxy: Served, upstream: Behind) -> None:
    """Pieces arrive as they are written: the client reads the first one while the server behind waits."""
    waiting = chat(stream=True, wait_at=0)
    upstream.go_on.clear()
    url = f"{proxy.address}/v1/chat/completions"
    with httpx2.stream("POST", url, json=waiting) as one, httpx2.stream("POST", url, json=waiting) as other:
        arriving = [one.iter_text(), other.iter_text()]  # which close their streams once they are gone
        assert all("0 " in next(each) for each in arriving)
        full = send(proxy, chat())
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
        upstream.left.clear()
    assert upstream.left.wait(60)
    while send(proxy, chat()).status_code == 429:  # until the second one has left too
        pass
    upstream.go_on.set()


def test_a_server_behind_that_is_gone_is_told_and_not_ready(folders: Folders, tmp_path: Path) -> None:
    with behind(["vision", "audio", "numbers"]) as upstream, passing(folders, upstream, tmp_path / "log") as proxy:
        assert httpx2.get(f"{proxy.address}/ready").status_code == 200
        upstream.stop()
        answer = send(proxy, chat())
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_failed"
        assert httpx2.get(f"{proxy.address}/ready").json() == {"ready": False}
        assert (
            'molora_requests_total{path="/v1/chat/completions",status="503"} 1.0'
            in httpx2.get(f"{proxy.address}/metrics").text
        )


def test_media_are_named_by_url_only_on_hosts_that_may_be_asked_and_keys_are_asked_for(
    folders: Folders, upstream: Behind, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("a client's\n")
    more = ["--media-host", "files.example.org", "--api-keys", str(tmp_path / "keys"), "--max-body-mib", "0.1"]
    with passing(folders, upstream, tmp_path / "log", more) as proxy:

        def ask(url: str) -> tuple[int, Any]:
            body = chat([{"type": "image_url", "image_url": {"url": url}}])
            answer = send(proxy, body, authorization="Bearer a client's")
            return answer.status_code, answer.json()

        status, answer = ask("https://files.example.org/a.png?b=%20")
        assert status == 200 and answer["model"] == "vision"
        for url, says in {
            "https://other.example.org/a.png": "only files.example.org may be asked",
            "http://files.example.org/a.png": "only https is fetched",
            "https://files.example.org:8443/a.png": "may be asked",
            "https://me@files.example.org/a.png": "characters that no URL has",
            "https://files.example.org\\@other.example.org/": "characters that no URL has",
            "https://files.example.org/a b": "characters that no URL has",
        }.items():
            status, answer = ask(url)
            assert status == 400 and says in answer["error"]["message"], url
        assert send(proxy, chat()).status_code == 401
        assert send(proxy, chat("a" * 200_000), authorization="Bearer a client's").status_code == 413


def start(*arguments: str, exit_code: int = 1) -> str:
    """What `molora serve` says where it does not start."""
    done = CliRunner().invoke(app, ["serve", *arguments, "--port", "0"])
    assert done.exit_code == exit_code
    return str(done.exception)


@pytest.mark.parametrize("router", ["sum", "learned"])
def test_a_router_that_sums_or_learns_is_refused_by_name(folders: Folders, tmp_path: Path, router: str) -> None:
    for folder in folders.modalities[:2]:
        shutil.copytree(folder, tmp_path / "modalities" / folder.name)
    identity = identify(folders.backbone, str(folders.backbone))
    write_run(tmp_path, identity, ["vision", "audio"], RouterConfig(plugin=router))
    said = start(str(tmp_path), "--upstream", "http://127.0.0.1:9/v1")
    assert said.startswith(f"{tmp_path / 'molora.json'}: the router is '{router}'") and "without --upstream" in said


def test_a_model_that_is_not_there_is_refused_though_its_weights_are_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = start("runs/nothing", "--upstream", "http://127.0.0.1:9/v1")
    assert said.startswith(f"backbone 'runs/nothing': no such folder in {tmp_path}")


def test_a_server_behind_that_does_not_fit_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_BEHIND", KEY)
    model = [*folders.arguments, "--upstream-key-variable", "KEY_BEHIND"]
    with behind(["vision"]) as upstream:
        said = start(*model, "--upstream", upstream.address)
        assert f"has the models {BARE}, vision, and none is audio or numbers; start vLLM with --lora-modules" in said
        upstream.adapters_have_parents = False
        assert "and none is audio or numbers or vision" in start(*model, "--upstream", upstream.address)
        assert "401" in start(*folders.arguments, "--upstream", upstream.address)
        assert "404" in start(*model, "--upstream", upstream.address.removesuffix("/v1"))
        told = start(*model, "--upstream", upstream.address, "--temperature", "0.5")
        assert told.startswith("--temperature is about reading media and answering, which the server of --upstream")
    assert "gives no answer" in start(*model, "--upstream", upstream.address)
    told = start(*model, "--upstream", upstream.address.replace("://", "://me:sesame@"))
    assert "holds a user name or a password" in told and "sesame" not in told
    told = start(*model, "--upstream", f"{upstream.address}?key=sesame")
    assert told.startswith("--upstream: the address holds a query") and "sesame" not in told
    assert start(*model, "--upstream", "nowhere").startswith("--upstream is 'nowhere'; give an http or https address")
    unset = ["--upstream", upstream.address, "--upstream-key-variable", "NO_SUCH_KEY"]
    assert "the environment has no NO_SUCH_KEY" in start(*folders.arguments, *unset)
