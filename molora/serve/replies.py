"""How answers go out: as one JSON, or as events of a stream; and what becomes of a client that leaves."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from molora.serve.answers import ErrorBody

T = TypeVar("T")

LAST_EVENT = b"data: [DONE]\n\n"
# So that no proxy waits for more of a stream before it passes on what there is.
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Gone(Exception):
    """The client has closed its connection."""


class Json(JSONResponse):
    """JSON in ASCII, as halves of characters have no other form."""

    def render(self, content: Any) -> bytes:
        return json_bytes(content)


def json_bytes(content: Any) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def finite(log_probability: float) -> float:
    """A log probability as JSON can hold it."""
    return max(log_probability, -9999.0)


def event(content: Any) -> bytes:
    return b"data: " + json_bytes(content) + b"\n\n"


class Events(StreamingResponse):
    """Events as they come, and the last one. `close` is called at the end, whatever it is; the events are closed before
    it. An error in them is an event, made by `told`."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        told: Callable[[Exception], ErrorBody],
    ) -> None:
        super().__init__(self._whole(events, told), media_type="text/event-stream")
        self.headers.update(STREAM_HEADERS)
        self._events = events
        self._close = close

    async def _whole(
        self, events: AsyncIterator[bytes], told: Callable[[Exception], ErrorBody]
    ) -> AsyncIterator[bytes]:
        try:
            async for each in events:
                yield each
        except Exception as error:
            yield event(told(error))
        yield LAST_EVENT

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            self._close()


async def while_connected(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; it is cancelled if the client leaves. Raises Gone then."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.wait({task, leaving})


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
