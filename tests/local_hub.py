"""A hub on this machine: it serves datasets from memory, as the Hugging Face hub answers huggingface_hub.

with LocalHub({"someone/words": {"train.jsonl": b"…"}}) as hub:
    hub.use(monkeypatch)
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "1" * 40
_API = re.compile(r"/api/(?:datasets|models)/(?P<repository>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/[^/]+)?")
_FILE = re.compile(r"(?:/datasets)?/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class LocalHub(ThreadingHTTPServer):
    """`asked` lists the requests, as method and path; a request for a path in `broken` fails with that status, and the
    content of a path in `cut` ends half-way."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[tuple[str, str]] = []
        self.broken: dict[str, int] = {}
        self.cut: set[str] = set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has huggingface_hub ask this hub, as HF_ENDPOINT does for a process that starts."""
        monkeypatch.setenv("HF_ENDPOINT", self.address)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", self.address)
        template = f"{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        found = (_FILE.fullmatch(urlsplit(path).path) for method, path in self.asked if method == "GET")
        return [unquote(each["path"]) for each in found if each]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        self.server.asked.append((self.command, self.path))
        if api := _API.match(path):
            self._send_json(self._about(api["repository"], api["what"], body))
        elif file := _FILE.fullmatch(path):
            self._send_file(file["repository"], unquote(file["path"]))
        else:
            self._send(200, b"a hub")

    def _about(self, repository: str, what: str | None, body: bytes) -> Any:
        files = self.server.repositories.get(repository)
        if files is None:
            return None
        if what in (None, "revision"):
            return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        wanted = json.loads(body)["paths"] if what == "paths-info" else None
        return entries if wanted is None else [entry for entry in entries if entry["path"] in wanted]

    def _send_json(self, value: Any) -> None:
        if value is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_file(self, repository: str, path: str) -> None:
        data = self.server.repositories.get(repository, {}).get(path)
        if status := self.server.broken.get(path):
            return self._send(status, b"broken")
        if data is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, about, cut=path in self.server.cut)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._send(206, data[start:stop], about, cut=path in self.server.cut)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut
