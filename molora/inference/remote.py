"""A model at an OpenAI-compatible address, asked over HTTP, and asked again where that may help."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molora.config import ConfigError, require

_MAX_REPLY_BYTES = 2**20
_MAX_WAIT_SECONDS = 60.0
_MAX_REASON = 200  # characters
# What may pass when one asks again: the server is busy, restarts or had no time.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)


@dataclass(kw_only=True)
class ServerConfig:
    """`url` is where the server's `chat/completions` lies, as http://127.0.0.1:8000/v1, and `model` its name there.
    `key_variable` names the environment variable that holds the server's key, if it asks for one. `parallel` requests
    run at a time. A request that has no answer in `timeout_seconds`, or that a busy server refuses, is sent again up to
    `retries` times, the first time after `wait_seconds` and then after twice as long each time."""

    url: str
    model: str
    key_variable: str | None = None
    parallel: int = 8
    timeout_seconds: float = 60.0
    retries: int = 3
    wait_seconds: float = 1.0

    def __post_init__(self) -> None:
        require(self, 1, "parallel")
        require(self, 0, "retries")
        check_server_url(self.url)
        if self.timeout_seconds <= 0 or self.wait_seconds < 0:
            raise ConfigError("timeout_seconds must be above 0, and wait_seconds not below")


class Refused(ValueError):
    """A server refuses a request, for the reason that it gives. `passing` says that it may not do so later, and did
    after all tries."""

    def __init__(self, message: str, status: int, detail: str) -> None:
        reason = _reason(detail)
        super().__init__(f"{message}: {reason}" if reason else message)
        self.status = status
        self.passing = status in _PASSING


class Silent(ValueError):
    """A server says nothing, after all tries."""


def check_server_url(url: str, name: str = "url") -> None:
    """Raises ConfigError for what is no address of a server, and for one that holds a password or a query, which every
    message about it would show. `name` is the key or the option that gives it."""
    is_http = re.match(r"https?://[^/]", url)
    place = url.split("/")[2] if is_http else url
    if "@" in place or "?" in url or "#" in url:
        found = "a user name or a password" if "@" in place else "a query or a fragment, behind ? or #"
        told = f"{name}: the address holds {found}, which messages show"
        raise ConfigError(f"{told}; leave it out, and name an environment variable that holds the server's key")
    if not is_http:
        raise ConfigError(f"{name} is {url!r}; give an http or https address, as http://127.0.0.1:8000/v1")


def key_headers(key_variable: str | None) -> dict[str, str]:
    """The headers with a server's key, of the environment. Raises ValueError for a key that is not there."""
    if key_variable is None:
        return {}
    key = os.environ.get(key_variable)
    if not key or not (key.isascii() and key.isprintable()):
        told = "has no" if not key else "has no key, but other characters, in"
        raise ValueError(f"key_variable: the environment {told} {key_variable}; set it to the key")
    return {"Authorization": f"Bearer {key}"}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A server that sends elsewhere would get the key there."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """Sends requests, from any thread. Raises ValueError for a key that is not in the environment."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self._headers = {"Content-Type": "application/json", **key_headers(config.key_variable)}
        self._opener = urllib.request.build_opener(_NoRedirects)

    def check(self) -> None:
        """Raises ValueError for a server that does not answer, or refuses the key."""
        url = self.config.url
        try:
            self._send("models", None)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise ValueError(f"url: {url} refuses the key ({error.code}); see key_variable") from error
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"url: {url} does not answer ({_said(error)}); start the server first") from error

    def complete(self, body: Mapping[str, Any]) -> bytes:
        """The server's reply to a chat that is to be completed. Raises Refused and Silent."""
        config = self.config
        for tried in range(config.retries + 1):
            wait_seconds = config.wait_seconds * 2**tried
            try:
                return self._send("chat/completions", body)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING or tried == config.retries:
                    detail = error.read(1000).decode(errors="replace")
                    raise Refused(f"{config.url} answers {error.code} {error.reason}", error.code, detail) from error
                asked = error.headers.get("Retry-After", "")
                wait_seconds = max(wait_seconds, float(asked)) if asked.isdecimal() else wait_seconds
            except (OSError, http.client.HTTPException) as error:
                if tried == config.retries:
                    raise Silent(f"{config.url} does not answer ({_said(error)})") from error
            time.sleep(min(wait_seconds, _MAX_WAIT_SECONDS))
        raise AssertionError("the last try returns or raises")

    def _send(self, place: str, body: Mapping[str, Any] | None) -> bytes:
        """What the server replies at a place below the address."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.config.url.rstrip('/')}/{place}", data, self._headers)
        with self._opener.open(request, timeout=self.config.timeout_seconds) as reply:
            return reply.read(_MAX_REPLY_BYTES + 1)


def _said(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__


def _reason(detail: str) -> str:
    """The reason in the body of an error, in a line: the message in its JSON, or its text."""
    try:
        told: Any = json.loads(detail)
    except (ValueError, RecursionError):
        told = detail
    for key in ("error", "message", "detail"):  # OpenAI has the message in `error`, others beside it or as `detail`
        if isinstance(told, Mapping) and told.get(key):
            told = told[key]
    return " ".join(str(told or "").split())[:_MAX_REASON]
