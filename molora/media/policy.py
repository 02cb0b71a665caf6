"""What the caller allows of media.

A data set's rows, and the folders that a model comes in, may be a stranger's. So what may be fetched or opened is the
caller's `MediaPolicy`: the processor holds it and puts it in force around every `load`, and no plugin can widen it.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from molora.modality import MediaError

# What the sources that hold a file may be given as.
FILE_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str, os.PathLike),
    "url": (str,),
    "base64": (str,),
    "bytes": (bytes, bytearray, memoryview),
}
SCHEMES = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class MediaPolicy:
    """What the caller allows of media, wherever the parts come from.

    `allow_urls`: whether `url` may fetch over HTTP. Addresses inside a network (loopback, private, link-local, …) are
    refused even then, whatever name or redirect leads there, unless `allow_private_addresses` says that the parts are
    trusted with them. `hosts`: from where, redirects included, as patterns such as `example.org` or `*.example.org`;
    a port that is not the scheme's own belongs to it: `example.org:8443`. `https_only`: not by plain HTTP.
    `deadline_seconds` is the time for one URL in all, redirects included. Proxies of the environment are not used,
    since a proxy looks up names by itself. `allow_paths`: whether local files are opened, which the parts of somebody
    elsewhere may not ask for. `max_file_bytes`: a larger file is refused, whatever its medium allows.
    """

    allow_urls: bool = False
    hosts: tuple[str, ...] = ("*",)
    https_only: bool = False
    allow_private_addresses: bool = False
    deadline_seconds: float = 60.0
    allow_paths: bool = True
    max_file_bytes: int | None = None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Makes this the policy of everything that is read inside."""
        token = _POLICY.set(self)
        try:
            yield
        finally:
            _POLICY.reset(token)

    def check(self, part: Mapping[str, Any]) -> None:
        """Raises MediaError for a part that no plugin may see: one that names a URL or a path though none is allowed,
        or a path that is there and no regular file."""
        kind = part.get("type")
        inner = part.get(kind) if isinstance(kind, str) else None
        given = [*part.items(), *(inner.items() if isinstance(inner, Mapping) else ())]
        for key, value in given:
            here = f"{kind or 'media'} part, {label('url' if key == kind else key, value)}: "
            if key in ("url", kind) and isinstance(value, str) and scheme(value) in SCHEMES:
                self.check_urls(here)
            elif key == "path" and isinstance(value, FILE_TYPES["path"]):
                self.check_paths(here)
                try:
                    mode = os.stat(value).st_mode
                except (OSError, ValueError):  # the plugin says what it misses
                    continue
                if not stat.S_ISREG(mode):
                    raise MediaError(here + no_file(mode))

    def check_urls(self, here: str = "") -> None:
        """Raises: MediaError that begins with `here`, unless URLs are allowed."""
        if self.allow_urls:
            return
        if not self.allow_paths:
            raise MediaError(f"{here}URLs are not fetched here; {self.instead}")
        raise MediaError(
            f"{here}URLs are not fetched unless you allow it; {self.instead}, or say "
            "--allow-urls (allow_urls=True of molora.load, `allow_urls: true` at the top of a recipe or of a batch job)"
        )

    def check_host(self, host: str, port: int, is_tls: bool) -> None:
        """Raises: MediaError for a host that is not among `hosts`, or that is to be asked without TLS though only HTTPS
        is allowed."""
        asked = host if port == (443 if is_tls else 80) else f"{host}:{port}"
        if self.https_only and not is_tls:
            raise MediaError(f"leads to {asked[:200]!r} by plain HTTP, and only https is fetched here; {self.instead}")
        if not any(fnmatchcase(asked, pattern) for pattern in self.hosts):
            known = ", ".join(self.hosts)
            raise MediaError(f"leads to {asked[:200]!r}, and only {known} may be asked; {self.instead}")

    def check_paths(self, here: str = "") -> None:
        """Raises: MediaError that begins with `here`, unless local files are allowed."""
        if not self.allow_paths:
            raise MediaError(f"{here}local files are not opened here; {self.instead}")

    @property
    def instead(self) -> str:
        """What to do with a file that is not fetched or opened."""
        return "download it and give its path" if self.allow_paths else "send what the file holds, in base64"


_POLICY: ContextVar[MediaPolicy | None] = ContextVar("media_policy", default=None)


def policy() -> MediaPolicy:
    """The policy in force; the strictest where none is."""
    return _POLICY.get() or MediaPolicy()


def scheme(url: str) -> str:
    """The scheme as programs that fetch see it, with its slashes."""
    return url.lstrip()[:8].lower().partition("//")[0] + "//"


def label(key: str, value: Any) -> str:
    """Which part an error is about, without pouring its data into the message."""
    if key == "path" or (key == "url" and str(value)[:5].lower() != "data:"):
        return f"{key} {str(value)[:200]!r}"
    if isinstance(value, (str, bytes)):
        return f"{key} of {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{key} {value.dtype} of shape {tuple(value.shape)}"
    return f"{key} {type(value).__name__}"


def no_file(mode: int) -> str:
    devices = dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", **devices}
    kind = kinds.get(stat.S_IFMT(mode), "something else")
    return f"is {kind}, and only regular files are opened; give the path of one"


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Raises MediaError for more bytes than a medium, or the policy in force, allows of a file."""
    max_bytes = min(max_bytes, policy().max_file_bytes or max_bytes)
    if num_bytes > max_bytes:
        raise MediaError(f"has {num_bytes} bytes, and {max_bytes} is the most; shrink it")
