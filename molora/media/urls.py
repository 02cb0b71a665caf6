"""What URLs hold, as the policy in force allows."""

import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from molora.media.policy import SCHEMES, MediaPolicy, check_size, policy, scheme
from molora.modality import MediaError

T = TypeVar("T")

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 2**16

# Where IPv6 carries an IPv4 address inside (RFC 6052).
_NAT64 = "64:ff9b::/96"
# All that is given out of IPv6. Outside of it are older forms of IPv4 addresses and translators of a network's own,
# which Python counts as global.
_GIVEN_OUT = "2000::/3"
# What Python counts as global beside: in Azure's machines their host, and addresses of documentation (RFC 9637).
_NOT_GLOBAL = ("168.63.129.16/32", "3fff::/20")


def fetch(url: str, max_bytes: int) -> bytes:
    """What a URL holds, as the policy in force allows: each hop's address is looked up once, checked, and connected to.
    Raises MediaError for a URL that is not allowed, leads to an address inside a network, to another scheme or too far,
    does not answer in time, or holds more than `max_bytes`."""
    rules = policy()
    deadline = time.monotonic() + rules.deadline_seconds
    if scheme(url) not in SCHEMES:
        raise MediaError("only http, https and data URLs are fetched; for a local file give its path")
    rules.check_urls()
    try:
        for _ in range(_MAX_REDIRECTS + 1):
            found = _get(url, rules, deadline, max_bytes)
            if isinstance(found, bytes):
                return found
            if scheme(found) not in SCHEMES or (scheme(url) == "https://" and scheme(found) == "http://"):
                raise MediaError(f"leads to {found[:200]!r}, another scheme; give the address of the file itself")
            url = found
    except TimeoutError as error:
        raise MediaError(
            f"cannot be fetched within {rules.deadline_seconds:g} seconds; try again, or {rules.instead}"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"cannot be fetched ({error or type(error).__name__}); check the address") from error
    raise MediaError(f"leads on more than {_MAX_REDIRECTS} times; give the address of the file itself")


def _get(url: str, rules: MediaPolicy, deadline: float, max_bytes: int) -> bytes | str:
    """The content of one address, or the address that it redirects to."""
    parts, host, port, is_tls = check_address(url, rules)
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~?")
    found = _within(deadline, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    addresses = list(dict.fromkeys(str(address[4][0]) for address in found))
    if not rules.allow_private_addresses:
        _check_addresses(host, addresses, rules)
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


def check_address(url: str, rules: MediaPolicy) -> tuple[urllib.parse.SplitResult, str, int, bool]:
    """The parts of a URL, its host, its port, and whether it is asked by TLS. Raises MediaError for one that the rules
    do not allow, ValueError for what is none."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.username is not None or parts.password is not None:
        raise MediaError(f"holds a user name or password, which is not sent; {rules.instead}")
    if not parts.hostname:
        raise MediaError("cannot be fetched (no host in it); check the address")
    is_tls = parts.scheme == "https"
    host, port = parts.hostname, parts.port or (443 if is_tls else 80)
    if not host.isascii():
        host = host.encode("idna").decode()
    rules.check_host(host, port, is_tls)
    return parts, host, port, is_tls


def _answer(response: http.client.HTTPResponse, url: str, max_bytes: int) -> bytes | str:
    if response.status in _REDIRECTS and (location := response.headers.get("Location")):
        # Headers come as latin-1, and a path outside ASCII in them is nearly always UTF-8.
        return urllib.parse.urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    if response.status != 200:
        raise MediaError(f"cannot be fetched (HTTP {response.status} {response.reason}); check the address")
    if (coding := response.headers.get("Content-Encoding", "identity").lower()) != "identity":
        raise MediaError(f"is sent as {coding[:40]!r}, though it was asked for as it is; {policy().instead}")
    promised = response.length
    check_size(promised or 0, max_bytes)
    content = io.BytesIO()
    while chunk := response.read(_CHUNK_BYTES):
        content.write(chunk)
        check_size(content.tell(), max_bytes)
    if promised is not None and content.tell() < promised:
        raise MediaError(f"is cut off: {promised} bytes promised, {content.tell()} sent; try again")
    return content.getvalue()


def _check_addresses(host: str, addresses: list[str], rules: MediaPolicy) -> None:
    for text in addresses:
        if not _is_inside(ipaddress.ip_address(text.partition("%")[0])):
            continue
        if not rules.allow_paths:
            raise MediaError(f"leads to {host}, an address inside a network; {rules.instead}")
        raise MediaError(
            f"leads to {host} at {text}, an address inside a network, which a data set's rows could misuse; if you "
            "trust them, say --allow-private-addresses too (allow_private_addresses=True of molora.load, "
            "`allow_private_addresses: true` at the top of a recipe)"
        )


def _connect(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first address that takes one."""
    fault = OSError("no address found")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=_left(deadline))
        except OSError as error:
            fault = error
    raise fault


def _left(deadline: float) -> float:
    """The seconds until the deadline. Raises: TimeoutError after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _within(deadline: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError if that takes too long. Looking up a name cannot be interrupted, so
    it goes on in a thread that ends with the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=_left(deadline))


class _Wire(io.RawIOBase):
    """A socket, and the file of what it receives, whose every read and write ends by the deadline, so that a server
    that drips does too."""

    def __init__(self, wire: socket.socket, deadline: float) -> None:
        self.wire, self.deadline = wire, deadline

    def sendall(self, data: bytes) -> None:
        self.wire.settimeout(_left(self.deadline))
        self.wire.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def close(self) -> None:
        pass  # who opened the socket closes it

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.wire.settimeout(_left(self.deadline))
        return self.wire.recv_into(buffer)


def _is_inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, or one that it carries, is inside a network, a machine's own, or nobody's."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped or _is_in(address, _NAT64):
            return _is_inside(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        carried = (address.sixtofour, *(address.teredo or ()))
        if not _is_in(address, _GIVEN_OUT) or any(_is_inside(one) for one in carried if one is not None):
            return True
    return address.is_multicast or not address.is_global or any(_is_in(address, each) for each in _NOT_GLOBAL)


def _is_in(address: ipaddress.IPv4Address | ipaddress.IPv6Address, network: str) -> bool:
    return address in ipaddress.ip_network(network)
