"""A server behind this one that holds the weights, such as vLLM: each request goes there under the name of the adapter
that the router takes for what its messages hold."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from molora.checkpoint.assembly import build_router, modality_types
from molora.checkpoint.opening import ModelPlan
from molora.config import ConfigError
from molora.data.messages import check, media_parts
from molora.inference.remote import check_server_url, key_headers
from molora.media import MediaPolicy
from molora.media.policy import SCHEMES, scheme
from molora.media.urls import check_address
from molora.modality import MediaError
from molora.serve.app import also, begin_app, told_of
from molora.serve.chat import messages_of
from molora.serve.engine import Broken, Full, TooLate
from molora.serve.fields import Body, ConversationBody
from molora.serve.metrics import RequestMetrics
from molora.serve.replies import LAST_EVENT, STREAM_HEADERS, event, json_bytes, while_connected
from molora.serve.request import Names, Refused, refusal

T = TypeVar("T")

log = logging.getLogger("molora.serve")

_CONNECT_SECONDS = 10.0
# Headers of an answer that are passed on beside its content.
_PASSED_HEADERS = ("content-type", "retry-after")
# A URL that all programs read alike.
_PLAIN_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+([/?#][!-\[\]-~]*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Upstream:
    """The server behind, at `url`, which ends in /v1, with the name there of each adapter and, under None, of the bare
    backbone. At most `most` answers run or wait there at a time, each for `answer_seconds`."""

    url: str
    headers: Mapping[str, str]
    models: Mapping[str | None, str]
    most: int
    answer_seconds: float


@dataclass(frozen=True)
class Selection:
    """What of a model chooses: its names, the adapter for a set of modalities, and where media may come from."""

    names: Names
    adapter: Callable[[frozenset[str]], str | None]
    adapters: frozenset[str | None]
    policy: MediaPolicy

    @classmethod
    def of(cls, plan: ModelPlan, name: str, policy: MediaPolicy) -> "Selection":
        """Of a model before its weights. Raises ConfigError for a router that does not take one adapter a request."""
        if (kind := plan.router.found.spec) != "table":
            told = f"{plan.where}: the router is {kind!r}, and a request to --upstream runs with one adapter, in full"
            raise ConfigError(f"{told}; only the router 'table' decides so: serve this model without --upstream")
        router = build_router(plan.router, plan.modalities, 0, plan.where)  # a table has no weights, of any width
        names = Names(name, modality_types(plan.modalities), router.order)
        return cls(names, router.adapter, frozenset(router.table.values()), policy)

    def of_chat(self, body: ConversationBody) -> str | None:
        """The adapter for a conversation. Raises Refused."""
        messages = messages_of(body.messages)
        types = self.names.part_types
        try:
            check(messages, types, "the request")
            parts = list(media_parts(messages))
            for _, part in parts:
                self._check_place(part)
            modalities = frozenset(types[part["type"]] for _, part in parts)
            self.names.check(body.model, modalities)
            return self.adapter(modalities)
        except ValueError as error:
            raise refusal(error, "messages") from error

    def of_text(self, body: Body) -> str | None:
        """The adapter for a text. Raises Refused."""
        self.names.takes(body.model)
        return self.adapter(frozenset())

    def _check_place(self, part: Mapping[str, Any]) -> None:
        """Raises MediaError for a medium that the server behind should not fetch."""
        self.policy.check(part)
        for key in ("url", part["type"]):
            if isinstance(value := part.get(key), str) and scheme(value) in SCHEMES:
                if not _PLAIN_URL.fullmatch(value):
                    raise MediaError(f"the URL {value[:200]!r} has characters that no URL has; write them as %XX")
                check_address(value, self.policy)


def find_upstream(
    url: str, key_variable: str | None, adapters: frozenset[str | None], most: int, answer_seconds: float
) -> Upstream:
    """The server behind, asked for its models. Raises ConfigError for a URL that is none and for a server that has no
    name for an adapter, ValueError for one that does not answer."""
    check_server_url(url, "--upstream")
    url, headers = url.rstrip("/"), key_headers(key_variable)
    try:
        answer = httpx2.get(f"{url}/models", headers=headers, timeout=_CONNECT_SECONDS, trust_env=False)
        answer.raise_for_status()
        served = [(str(each["id"]), each.get("parent")) for each in answer.json()["data"]]
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        told = f"--upstream {url}: {url}/models gives no answer ({why})"
        raise ValueError(f"{told}; start that server first, or mend the URL") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--upstream {url}: {url}/models is no list of models; does the URL end in /v1?") from error
    return Upstream(url, headers, _models(url, served, adapters), most, answer_seconds)


def _models(
    url: str, served: Sequence[tuple[str, str | None]], adapters: frozenset[str | None]
) -> dict[str | None, str]:
    """What the server behind calls each adapter and the bare backbone; it says whose adapter a model is, its parent."""
    wanted = sorted(name for name in adapters if name is not None)
    there = ", ".join(id for id, _ in served) or "none"
    told = f"--upstream {url}: has the models {there}"
    if missing := [name for name in wanted if name not in (id for id, parent in served if parent is not None)]:
        modules = " ".join(f"{name}=FOLDER" for name in missing)
        raise ConfigError(f"{told}, and none is {' or '.join(missing)}; start vLLM with --lora-modules {modules}")
    models: dict[str | None, str] = {name: name for name in wanted}
    if None in adapters:
        bare = [id for id, parent in served if parent is None and id not in wanted]
        if not bare:
            raise ConfigError(f"{told}, and none is a bare backbone, whose parent is null; is the URL that of vLLM?")
        models[None] = bare[0]
    return models


def make_passing_app(selection: Selection, upstream: Upstream, **gate: Any) -> FastAPI:
    """The application that passes requests on, behind a `Gate` with these settings."""
    passing = _Passing(upstream)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        async with passing.client:
            yield

    app = begin_app(life, selection.names, passing.works, passing.metrics, **gate)

    @app.post("/v1/chat/completions", response_class=Response, responses=also("application/json", {}))
    async def chat_completions(body: ConversationBody, http: HttpRequest) -> Response:
        """Goes on with a conversation of text and media, as the server behind does."""
        return await passing.answer(http, "chat/completions", body, selection.of_chat(body))

    @app.post("/v1/completions", response_class=Response, responses=also("application/json", {}))
    async def text_completions(body: Body, http: HttpRequest) -> Response:
        """Goes on with texts, as the server behind does."""
        return await passing.answer(http, "completions", body, selection.of_text(body))

    return app


class _Passing:
    """Passes requests on. Each has a connection of its own, as one that waits for a next request may be closed by the
    server behind just when that comes."""

    def __init__(self, upstream: Upstream) -> None:
        self.metrics = RequestMetrics()
        self.client = httpx2.AsyncClient(
            headers={**upstream.headers, "accept-encoding": "identity"},
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )
        self._upstream = upstream
        self._running = 0

    async def works(self) -> bool:
        """Whether the server behind answers."""
        try:
            answer = await self.client.get(f"{self._upstream.url}/models", timeout=_CONNECT_SECONDS)
        except httpx2.HTTPError:
            return False
        return answer.is_success

    async def answer(self, http: HttpRequest, path: str, body: Body, adapter: str | None) -> Response:
        """What the server behind answers, errors too, whole or as a stream. Raises Full, TooLate, Broken, and Refused
        for a body that is no JSON."""
        upstream = self._upstream
        content = _content({**body.model_dump(exclude_unset=True), "model": upstream.models[adapter]})
        headers = {"content-type": "application/json", "x-request-id": http.state.request_id}
        request = self.client.build_request("POST", f"{upstream.url}/{path}", content=content, headers=headers)
        until = asyncio.get_running_loop().time() + upstream.answer_seconds
        async with AsyncExitStack() as held:
            held.enter_context(self._place())
            answer = await while_connected(http, _in_time(until, self.client.send(request, stream=True)))
            held.push_async_callback(answer.aclose)
            self.metrics.adapters.labels(adapter or "none").inc()
            headers = {name: answer.headers[name] for name in _PASSED_HEADERS if name in answer.headers}
            kind = answer.headers.get("content-type", "")
            if answer.status_code in (401, 403):
                raise _broken(answer, "refuses the key of this one")
            if answer.is_success and kind.startswith("text/event-stream"):
                return _Stream(_events(answer, until), answer.status_code, headers, held.pop_all())
            await while_connected(http, _in_time(until, answer.aread()))
            if not _is_object(answer.content):
                raise _broken(answer, "gives no answer in JSON")
        return Response(answer.content, answer.status_code, headers)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the answers at a time. Raises Full where there is no room."""
        if self._running >= self._upstream.most:
            raise Full(f"{self._running} answers run or wait, and {self._upstream.most} is the most; ask again later")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


def _broken(answer: httpx2.Response, what: str) -> Broken:
    log.warning("the server behind %s: status %d, %s", what, answer.status_code, answer.headers.get("content-type"))
    return Broken(f"the server that holds the model {what}; tell who runs this server")


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def _content(body: dict[str, Any]) -> bytes:
    try:
        return json_bytes(body)
    except ValueError as error:
        raise Refused("the body holds NaN or Infinity, which JSON does not have; leave them out", None) from error


async def _in_time(until: float, work: Awaitable[T]) -> T:
    """What the server behind gives. Raises TooLate, and Broken where it fails."""
    try:
        async with asyncio.timeout_at(until):
            return await work
    except TimeoutError as error:
        raise TooLate("the answer took longer than it may; ask for less") from error
    except httpx2.HTTPError as error:
        log.warning("the server behind fails: %s", error or type(error).__name__)
        raise Broken("the server that holds the model does not answer; ask again later") from error


async def _events(answer: httpx2.Response, until: float) -> AsyncGenerator[bytes, None]:
    """A stream as it comes; where it breaks off, an event says why."""
    pieces = answer.aiter_bytes()
    try:
        while (piece := await _in_time(until, anext(pieces, None))) is not None:
            yield piece
    except (TooLate, Broken) as error:
        # An event may have begun.
        yield b"\n\n" + event(told_of(error)[1]) + LAST_EVENT


class _Stream(StreamingResponse):
    """A stream that is passed on; what it holds is let go at its end, whatever that is."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], status: int, headers: dict[str, str], held: AsyncExitStack
    ) -> None:
        super().__init__(events, status, {**headers, **STREAM_HEADERS})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)
