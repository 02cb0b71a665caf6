"""Pages on loopback, for what fetches them."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a path (as it was sent) with what `pages` says: bytes, or a status with a place to go to."""

    pages: dict[str, bytes | tuple[int, str]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        page = self.pages.get(self.path)
        if isinstance(page, bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
        else:
            status, location = page or (404, "")
            self.send_response(status)
            self.send_header("Location", location)
            self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(pages: dict[str, Any], asked: list[str] | None = None) -> Iterator[str]:
    """The address of a server of these pages; the paths that it is asked for are added to `asked`."""
    handler = type("Serving", (Handler,), {"pages": pages, "asked": [] if asked is None else asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
