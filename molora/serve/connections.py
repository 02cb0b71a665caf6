"""Connections: how many may be open, and for how long one may be without a request, or without reading its answer."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded(seconds: float, most: int) -> type[asyncio.Protocol]:
    """The protocol of a server's connections, for uvicorn, which bounds neither.

    A connection is cut if it is so many seconds without the head of a request, at its beginning or after an answer, or
    if nothing is read of what waits to be sent. Of more than `most` connections the one is cut that has been without a
    whole request for the longest time, so that who only opens connections loses those.
    """
    silent: dict[H11Protocol, None] = {}

    class Bounded(H11Protocol):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self._cuts: dict[str, asyncio.TimerHandle] = {}

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()
            if len(self.connections) > most and silent:
                next(iter(silent)).transport.abort()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._cut_later("unread", True)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cut_later("unread", False)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            silent.pop(self, None)
            for cut in self._cuts.values():
                cut.cancel()

        def _watch(self) -> None:
            has_head = self.cycle is not None and not self.cycle.response_complete
            self._cut_later("no request", not has_head)
            if has_head and not self.cycle.more_body:
                silent.pop(self, None)
            else:
                silent.setdefault(self)

        def _cut_later(self, why: str, wanted: bool) -> None:
            if wanted and why not in self._cuts:
                self._cuts[why] = self.loop.call_later(seconds, self.transport.abort)
            elif not wanted and why in self._cuts:
                self._cuts.pop(why).cancel()

    return Bounded
