"""The gate: what every request passes before it is read, and what is written about it."""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Collection
from pathlib import Path

from fastapi import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from molora.config import ConfigError
from molora.serve.answers import error_body
from molora.serve.metrics import RequestMetrics
from molora.serve.replies import Json

log = logging.getLogger("molora.serve")

# Paths that are answered without a key: those that say whether the server is well, and pages, which ask for one.
OPEN_PATHS = ("/", "/docs", "/health", "/ready")
OPEN_FOLDER = "/web/"
_PORT = re.compile(r":\d+$")
# What is left of a body whose end is not known is not read.
_AND_CLOSE = {"connection": "close"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """The keys of those who may ask. Only their hashes are kept."""

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-keys {path}: {error}; give a file with a key on each line") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise ConfigError(f"--api-keys {path}: holds no key; write one on each line")
        self._hashes = [_hash(key.encode()) for key in keys]

    def know(self, authorization: bytes) -> bool:
        """Whether a header holds one of the keys; it takes the same time whatever it holds."""
        scheme, _, key = authorization.partition(b" ")
        given = _hash(key.strip())
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(found) and scheme.lower() == b"bearer"


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _path(scope: Scope) -> str:
    """The path that is asked for, as the application has it: what a client wrote is not told."""
    routes = scope["app"].routes
    return next((route.path_format for route in routes if route.matches(scope)[0] is not Match.NONE), "other")


class Gate:
    """Gives each request an id, asks for a key, bounds what is sent and how long that takes, and logs a line: the
    request's id, what was asked for, and how it ended, never what it holds. `hosts` are the names by which the server
    may be called, None for any: a page that has its own name lead to this machine is not answered."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: RequestMetrics,
        keys: Keys | None,
        hosts: Collection[str] | None,
        max_body_bytes: int,
        client_seconds: float,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._keys = keys
        self._hosts = hosts
        self._max_body_bytes = max_body_bytes
        self._client_seconds = client_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        id = asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = id
        begun, status, path = time.monotonic(), 499, _path(scope)

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id.encode())]
            await send(message)

        try:
            if refusal := self._refusal(scope["path"], headers):
                await refusal(scope, receive, answered)
            else:
                # What is asked with HEAD is answered as with GET; the connection leaves the body out.
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                await self._app({**scope, "method": method}, self._bounded(receive), answered)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            seconds = time.monotonic() - begun
            log.info("%s %s %s %d %.3f s", id, scope["method"], path, status, seconds)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Json | None:
        called = _PORT.sub("", headers.get(b"host", b"").decode("latin-1").lower())
        if self._hosts is not None and called not in self._hosts:
            names = " or ".join(self._hosts)
            told = f"this server is called {names}, not {called[:80]!r}; with --api-keys it takes any name"
            return Json(error_body(told, "invalid_request_error"), status_code=421)
        open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        known = self._keys is None or open or self._keys.know(headers.get(b"authorization", b""))
        if not known:
            told = "no valid API key; send the header Authorization: Bearer KEY"
            said = error_body(told, "invalid_request_error", "invalid_api_key")
            return Json(said, status_code=401, headers={"www-authenticate": "Bearer"})
        coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if coding != "identity":
            told = f"Content-Encoding {coding[:80]!r} is not read; send the body as it is, without this header"
            return Json(error_body(told, "invalid_request_error"), status_code=415)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            # The connection stays, or a client that is still sending would see it break instead of this.
            return Json(error_body(self._too_large(), "invalid_request_error"), status_code=413)
        return None

    def _bounded(self, receive: Receive) -> Receive:
        """Receives no more bytes of a body than may be sent, and for no longer than that may take."""
        deadline = time.monotonic() + self._client_seconds
        received, whole = 0, False

        async def bounded() -> Message:
            nonlocal received, whole
            if whole:  # now only the end of the connection is waited for
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                told = f"the body was not there within {self._client_seconds:g} seconds"
                raise HTTPException(408, told, _AND_CLOSE) from None
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_large(), _AND_CLOSE)
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the body has more than {self._max_body_bytes:,} bytes, the most that is read; send smaller media"
