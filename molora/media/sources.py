"""Where the bytes of a content part come from, whatever the medium, and what the caller allows.

A data set's rows, and the folders that a model comes in, may be a stranger's. So what may be fetched or opened is the
caller's `MediaPolicy`: the processor holds it and puts it in force around every `load`, and no plugin can widen it.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import os
import queue
import socket
import ssl
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from molora.modality import MediaError

T = TypeVar("T")

# What the sources that hold a file may be given as.
FILE_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str, os.PathLike),
    "url": (str,),
    "base64": (str,),
    "bytes": (bytes, bytearray, memoryview),
}

_SCHEMES = ("http://", "https://")
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 2**16

# Where IPv6 carries an IPv4 address inside (RFC 6052).
_NAT64 = "64:ff9b::/96"
# A public number that in Azure's machines means their host.
_HOSTS_OF_MACHINES = ("168.63.129.16",)


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What the caller allows of media, wherever the parts come from.

    `allow_urls`: whether `url` may fetch over HTTP. Addresses inside a network (loopback, private, link-local, …) are
    refused even then, whatever name or redirect leads there, unless `allow_private_addresses` says that the parts are
    trusted with them. `deadline_seconds` is the time for one URL in all, redirects included. Proxies of the environment
    are not used, since a proxy looks up names by itself.
    """

    allow_urls: bool = False
    allow_private_addresses: bool = False
    deadline_seconds: float = 60.0

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes this the policy of everything that is read inside."""
        token = _POLICY.set(self)
        try:
            yield
        finally:
            _POLICY.reset(token)

    def check(self, part: Mapping[str, Any]) -> None:
        """Refuses a part that no plugin may see: one that names a URL though none is allowed, or a path that is there
        and no regular file.

        Raises: MediaError.
        """
        kind = part.get("type")
        inner = part.get(kind) if isinstance(kind, str) else None
        given = [*part.items(), *(inner.items() if isinstance(inner, Mapping) else ())]
        for key, value in given:
            here = f"{kind or 'media'} part, {_label('url' if key == kind else key, value)}: "
            if key in ("url", kind) and isinstance(value, str) and _scheme(value) in _SCHEMES:
                self.check_urls(here)
            elif key == "path" and isinstance(value, FILE_TYPES["path"]):
                try:
                    mode = os.stat(value).st_mode
                except (OSError, ValueError):  # the plugin says what it misses
                    continue
                if not stat.S_ISREG(mode):
                    raise MediaError(here + _no_file(mode))

    def check_urls(self, here: str = "") -> None:
        """Raises: MediaError that begins with `here`, unless URLs are allowed."""
        if not self.allow_urls:
            raise MediaError(
                f"{here}URLs are not fetched unless you allow it; download it and give its path, or say "
                "--allow-urls (allow_urls=True of molora.load, `allow_urls: true` at the top of a recipe)"
            )


_POLICY: ContextVar[MediaPolicy | None] = ContextVar("media_policy", default=None)


def policy() -> MediaPolicy:
    """The policy in force; the strictest where none is."""
    return _POLICY.get() or MediaPolicy()


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the parts of one medium may be given as.

    `part_type` names the medium in messages and is itself a source, of anything. `max_file_bytes`: a larger file is
    refused.
    """

    part_type: str
    keys: tuple[str, ...]
    max_file_bytes: int

    def flat(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part with what a mapping under `part_type` holds, such as {bytes, path} of a dataset's column, beside the
        rest. A path there is only the name that the file once had if its content stands beside it."""
        value = part.get(self.part_type)
        if not isinstance(value, Mapping):
            return part
        inner = {key: item for key, item in value.items() if item is not None}
        if "bytes" in inner or "array" in inner:
            inner.pop("path", None)
        return {**{key: item for key, item in part.items() if key != self.part_type}, **inner}

    def choose(self, part: Mapping[str, Any]) -> tuple[str, Any]:
        """The one source that a part has and its value. Under `part_type`, the source that its value turns out to be;
        that key again if it is none of the others.

        Raises: MediaError for a part with no source or with several.
        """
        given = [key for key in self.keys if part.get(key) is not None]
        if len(given) != 1:
            raise MediaError(
                f"an {self.part_type} part needs exactly one of {', '.join(self.keys)}; it has {given or sorted(part)}"
            )
        key, value = given[0], part[given[0]]
        if key != self.part_type:
            return key, value
        if isinstance(value, str) and (value[:5].lower() == "data:" or _scheme(value) in _SCHEMES):
            return "url", value
        kinds: dict[str, tuple[type, ...]] = {
            "path": FILE_TYPES["path"],
            "bytes": FILE_TYPES["bytes"],
            "array": (np.ndarray, Tensor, list, tuple),
        }
        return next((name for name, types in kinds.items() if isinstance(value, types)), key), value

    def read(self, key: str, value: Any) -> bytes:
        """The bytes of the file that `path`, `url`, `base64` (or a data URI) or `bytes` gives.

        Raises: MediaError for one that cannot be read, is not allowed, is empty or too large.
        """
        if not isinstance(value, FILE_TYPES[key]):
            wanted = " or ".join(kind.__name__ for kind in FILE_TYPES[key])
            raise MediaError(f"is given as {wanted}, not {type(value).__name__}")
        if key == "bytes":
            _check_size(memoryview(value).nbytes, self.max_file_bytes)
            data = bytes(value)
        elif key == "path":
            data = read_file(value, self.max_file_bytes)
        elif isinstance(value, str) and value[:5].lower() == "data:":
            data = _read_data_uri(value, self.max_file_bytes)
        elif key == "base64":
            data = _read_base64(value, self.max_file_bytes)
        else:
            data = fetch(value, self.max_file_bytes)
        if not data:
            raise MediaError("is empty, 0 bytes; write or download it again")
        return data

    @contextmanager
    def named(self, key: str, value: Any) -> Iterator[None]:
        """Says in every MediaError inside which part it is about."""
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.part_type} part, {_label(key, value)}: {error}") from error.__cause__


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file.

    Opened without waiting, so that no pipe or device can hold it up, and never read beyond the size it says, since some
    files of the system have no end.

    Raises: MediaError for one that cannot be read, is no regular file, is empty or too large.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise MediaError(_no_file(status.st_mode))
            _check_size(status.st_size, max_bytes)
            data = file.read(status.st_size)
    except IsADirectoryError:
        raise MediaError(_no_file(stat.S_IFDIR)) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise MediaError(f"{reason} ({Path(path).absolute()}); check the path") from error
    if len(data) < status.st_size:
        raise MediaError(f"ends after {len(data)} of its {status.st_size} bytes; is it being written? try again")
    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _no_file(mode: int) -> str:
    kinds: dict[str, Callable[[int], bool]] = {
        "a folder": stat.S_ISDIR,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    kind = next((name for name, fits in kinds.items() if fits(mode)), "something else")
    return f"is {kind}, and only regular files are opened; give the path of one"


def _check_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise MediaError(f"has {num_bytes} bytes, and {max_bytes} is the most; shrink it")


def _read_data_uri(value: str, max_bytes: int) -> bytes:
    head, comma, text = value.partition(",")
    if not comma:
        raise MediaError("is a data URI without a comma; write data:TYPE;base64,TEXT")
    if head.rstrip().lower().endswith(";base64"):
        # Percent signs are no base64, so what they stand for is looked up first.
        return _read_base64(urllib.parse.unquote(text) if "%" in text else text, max_bytes)
    _check_size(len(text) - 2 * text.count("%"), max_bytes)
    return urllib.parse.unquote_to_bytes(text)


def _read_base64(text: str, max_bytes: int) -> bytes:
    """Both alphabets are read, and padding may be left out, as web and mail programs write it."""
    text = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    _check_size(len(text) * 3 // 4, max_bytes)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise MediaError(f"is not base64 ({error}); encode the file's bytes") from error


def _label(key: str, value: Any) -> str:
    """Which part an error is about, without pouring its data into the message."""
    if key == "path" or (key == "url" and str(value)[:5].lower() != "data:"):
        return f"{key} {str(value)[:200]!r}"
    if isinstance(value, (str, bytes)):
        return f"{key} of {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{key} {value.dtype} of shape {tuple(value.shape)}"
    return f"{key} {type(value).__name__}"


# URLs ------------------------------------------------------------------------------------------------------------


def fetch(url: str, max_bytes: int) -> bytes:
    """What a URL holds, as the policy in force allows: each hop's address is looked up once, checked, and connected to.

    Raises: MediaError for a URL that is not allowed, leads to an address inside a network, to another scheme or too
    far, does not answer in time, or holds more than `max_bytes`.
    """
    rules = policy()
    deadline = time.monotonic() + rules.deadline_seconds
    if _scheme(url) not in _SCHEMES:
        raise MediaError("only http, https and data URLs are fetched; for a local file give its path")
    rules.check_urls()
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            found = _get(url, rules, deadline, max_bytes)
            if isinstance(found, bytes):
                return found
            if _scheme(found) not in _SCHEMES or (_scheme(url) == "https://" and _scheme(found) == "http://"):
                raise MediaError(f"leads to {found[:200]!r}, another scheme; give the address of the file itself")
            url = found
    except TimeoutError as error:
        raise MediaError(
            f"cannot be fetched within {rules.deadline_seconds:g} seconds; try again, or download it and give its path"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"cannot be fetched ({error or type(error).__name__}); check the address") from error
    raise MediaError(f"leads on more than {_MAX_REDIRECTS} times; give the address of the file itself")


def _scheme(url: str) -> str:
    """The scheme as programs that fetch see it, with its slashes."""
    return url.lstrip()[:8].lower().partition("//")[0] + "//"


def _get(url: str, rules: MediaPolicy, deadline: float, max_bytes: int) -> bytes | str:
    """The content of one address, or the address that it redirects to."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.username is not None or parts.password is not None:
        raise MediaError("holds a user name or password, which rows should not; download it and give its path")
    if not parts.hostname:
        raise MediaError("cannot be fetched (no host in it); check the address")
    is_tls = parts.scheme == "https"
    host, port = parts.hostname, parts.port or (443 if is_tls else 80)
    if not host.isascii():
        host = host.encode("idna").decode()
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    found = _within(deadline, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
    if not rules.allow_private_addresses:
        _check_addresses(host, addresses)
    wire = _connect(addresses, port, deadline)
    try:
        if is_tls:
            wire.settimeout(_left(deadline))
            wire = ssl.create_default_context().wrap_socket(wire, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = _Wire(wire, deadline)  # pyright: ignore[reportAttributeAccessIssue]
        if is_tls:  # as the Host header is written
            connection.default_port = 443
        connection.request("GET", target, headers={"User-Agent": "molora", "Accept-Encoding": "identity"})
        with connection.getresponse() as response:
            return _answer(response, url, max_bytes)
    finally:
        wire.close()


def _answer(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes | str:
    if response.status in _REDIRECTS and (location := response.headers.get("Location")):
        # Headers come as latin-1, and a path outside ASCII in them is nearly always UTF-8.
        return urllib.parse.urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    if response.status != 200:
        raise MediaError(f"cannot be fetched (HTTP {response.status} {response.reason}); check the address")
    if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise MediaError(f"is sent as {coding[:40]!r}, though it was asked for as it is; download it, give its path")
    promised = response.length
    _check_size(promised or 0, max_bytes)
    content = io.BytesIO()
    while chunk := response.read(_CHUNK_BYTES):
        content.write(chunk)
        _check_size(content.tell(), max_bytes)
    if promised is not None and content.tell() < promised:
        raise MediaError(f"is cut off: {promised} bytes promised, {content.tell()} sent; try again")
    return content.getvalue()


def _check_addresses(host: str, addresses: list[str]) -> None:
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        inside = [address]
        if isinstance(address, ipaddress.IPv6Address):
            inside += [found for found in (address.ipv4_mapped, address.sixtofour) if found is not None]
            inside += address.teredo or ()
            if address in ipaddress.ip_network(_NAT64):
                inside.append(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
            if address.ipv4_mapped is not None:
                inside.remove(address)
        if any(_is_inside(one) for one in inside):
            raise MediaError(
                f"leads to {host} at {text}, an address inside a network, which a data set's rows could misuse; if you "
                "trust them, say --allow-private-addresses too (allow_private_addresses=True of molora.load, "
                "`allow_private_addresses: true` at the top of a recipe)"
            )


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first address that takes one."""
    for index, address in enumerate(addresses):
        try:
            return socket.create_connection((address, port), timeout=_left(deadline))
        except OSError:
            if index == len(addresses) - 1:
                raise
    raise OSError("no address found")


def _left(deadline: float) -> float:
    """The seconds until the deadline. Raises: TimeoutError after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _within(deadline: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError if that takes too long. Looking up a name cannot be interrupted, so
    it goes on in a thread that ends with the process."""
    results: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


class _Wire:
    """A socket whose every read and write ends by the deadline, so that a server that drips does too."""

    def __init__(self, wire: socket.socket, deadline: float) -> None:
        self.wire, self.deadline = wire, deadline

    def sendall(self, data: bytes) -> None:
        self.wire.settimeout(_left(self.deadline))
        self.wire.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.wire, self.deadline))

    def close(self) -> None:
        pass  # who opened the socket closes it


class _Reader(io.RawIOBase):
    def __init__(self, wire: socket.socket, deadline: float) -> None:
        self.wire, self.deadline = wire, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.wire.settimeout(_left(self.deadline))
        return self.wire.recv_into(buffer)


def _is_inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is inside a network, or a machine's own; site-local ones of IPv6 count as global in Python."""
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_multicast or site_local or not address.is_global or str(address) in _HOSTS_OF_MACHINES
