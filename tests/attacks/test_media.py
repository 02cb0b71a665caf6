"""Attacks through what a row names: addresses inside a network, servers that never end, files that are none, and
pictures and sounds that unfold. Each is refused with its reason."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from molora.media import MediaPolicy, fetch
from molora.modality import MediaError
from molora.processor import Processor
from molora.testing import Letters, NumbersConfig, byte_tokenizer

OPEN = MediaPolicy(allow_urls=True)
INSIDE = MediaPolicy(allow_urls=True, allow_private_addresses=True, deadline_seconds=2)


class Trusting(Letters):
    """A plugin that opens whatever a part names."""

    def load(self, part: Any) -> Any:
        return super().load({"letters": open(part["path"]).read()})


def encode(part: dict[str, Any], media_policy: MediaPolicy | None = None) -> None:
    modality = Trusting("letters", NumbersConfig())
    processor = Processor(byte_tokenizer(), {"letters": modality}, lambda _: "", 100, media_policy)
    processor.encode([{"role": "user", "content": [{"type": "letters", **part}]}], "7", generate=True)


# Addresses inside a network ----------------------------------------------------------------------------------------


@contextmanager
def serving(answer: bytes, *, drip: float = 0.0, for_ever: bytes = b"") -> Iterator[tuple[str, list[bytes]]]:
    """A server on this machine that sends `answer` to everyone, byte by byte with `drip`, then `for_ever` again and
    again; and what it was asked."""
    asked: list[bytes] = []
    done = threading.Event()

    def serve(client: socket.socket) -> None:
        with client:
            try:
                asked.append(client.recv(2**16))
                for byte in (answer[i : i + 1] for i in range(len(answer))) if drip else [answer]:
                    client.sendall(byte)
                    if done.wait(drip):
                        return
                while for_ever and not done.wait(drip):
                    client.sendall(for_ever)
            except OSError:
                return

    def accept(server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        done.set()
        server.shutdown(socket.SHUT_RDWR)


INTERNAL = [
    "http://127.0.0.1/",
    "http://127.8.9.1/",
    "http://localhost/",
    "http://0.0.0.0/",
    "http://0/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "https://127.0.0.1/",
]


@pytest.mark.parametrize("url", INTERNAL)
def test_an_address_inside_a_network_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch):
    def connect(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket, "create_connection", connect)
    with OPEN.in_force(), pytest.raises(MediaError, match="leads to .* an address inside a network"):
        fetch(url, 10)


def test_a_name_that_leads_inside_is_not_asked_and_is_looked_up_once(monkeypatch: pytest.MonkeyPatch):
    """A name whose first answer is a public address and whose second is not (rebinding), and one with both at once."""
    answers = [["93.184.215.14", "127.0.0.1"], ["93.184.215.14"], ["127.0.0.1"]]
    connected: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address: tuple[str, int], timeout: float) -> None:
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with OPEN.in_force(), pytest.raises(MediaError, match="leads to rebind.example at 127.0.0.1"):
        fetch("http://rebind.example/", 10)
    assert connected == []
    with OPEN.in_force(), pytest.raises(MediaError, match="cannot be fetched .refused"):
        fetch("http://rebind.example/", 10)
    assert connected == ["93.184.215.14"] and answers == [["127.0.0.1"]]


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    with serving(b"HTTP/1.0 200 OK\r\n\r\nmine") as (proxy, asked):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        with OPEN.in_force(), pytest.raises(MediaError, match="an address inside a network"):
            fetch("http://169.254.169.254/", 10)
        assert not asked


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "leads to 'file:///etc/passwd', another scheme"),
        ("ftp://127.0.0.1/a", "another scheme"),
        ("gopher://127.0.0.1:25/_HELO", "another scheme"),
        ("data:text/plain,mine", "another scheme"),
        ("//user:secret@127.0.0.1/", "holds a user name or password"),
        ("/again", "leads on more than 5 times"),
    ],
)
def test_redirects_lead_nowhere_else(location: str, message: str):
    with (
        serving(f"HTTP/1.0 302 Found\r\nLocation: {location}\r\n\r\n".encode()) as (server, _),
        INSIDE.in_force(),
        pytest.raises(MediaError, match=message),
    ):
        fetch(f"{server}/", 10)


def test_a_redirect_that_leads_inside_is_checked_as_the_first_address_is(monkeypatch: pytest.MonkeyPatch):
    connect = socket.create_connection
    with serving(b"HTTP/1.0 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n") as (server, asked):
        port = int(server.rpartition(":")[2])
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout: connect(("127.0.0.1", port)))
        with OPEN.in_force(), pytest.raises(MediaError, match="leads to 169.254.169.254 at 169.254.169.254"):
            fetch("http://93.184.215.14/", 10)
        assert len(asked) == 1


@pytest.mark.parametrize("url", ["http://me:secret@example.org/", "http://me@example.org/", "http://@example.org/"])
def test_credentials_are_not_sent(url: str):
    with OPEN.in_force(), pytest.raises(MediaError, match="holds a user name or password"):
        fetch(url, 10)


def test_an_address_cannot_smuggle_lines_into_the_request():
    with serving(b"HTTP/1.0 200 OK\r\n\r\nfine") as (server, asked), INSIDE.in_force():
        assert fetch(f"{server}/a HTTP/1.0\r\nX-Mine: 1\r\n\r\nGET /b", 10) == b"fine"
        assert fetch(f"{server}/\x00\x7f\x85?\x0b", 10) == b"fine"
    assert [
        line for request in asked for line in request.split(b"\r\n") if line.startswith((b"X-Mine", b"GET /b"))
    ] == []
    assert all(request.count(b"\r\n\r\n") == 1 for request in asked)


# Servers that never end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (b"", {"drip": 0.01, "for_ever": b"H"}, "cannot be fetched within 2 seconds"),
        (b"HTTP/1.0 200 OK\r\n", {"drip": 0.01, "for_ever": b"A: b\r\n"}, "cannot be fetched"),
        (b"HTTP/1.0 200 OK\r\n\r\n", {"drip": 0.1, "for_ever": b"x"}, "cannot be fetched within 2 seconds"),
        (b"HTTP/1.0 200 OK\r\n\r\n", {"for_ever": bytes(2**16)}, "has 1[0-9]* bytes, and 100000 is the most"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\n", {}, "has 99999999999 bytes, and 100000 is"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", {"for_ever": b"10000\r\n" + bytes(65536) + b"\r\n"},
         "has 1[0-9]* bytes, and 100000 is the most"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", {"for_ever": b"0" * 4096}, "cannot be fetched"),
        (b"HTTP/1.0 200 OK\r\n", {"for_ever": b"A" * 4096}, "cannot be fetched"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", {"for_ever": b"HTTP/1.1 100 Continue\r\n\r\n", "drip": 0.01}, "within 2"),
        (b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\nx", {}, "is sent as 'gzip'"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhalf", {}, "is cut off: 9 bytes promised, 4 sent"),
        (b"\x16\x03\x01", {}, "cannot be fetched"),
        (b"", {}, "cannot be fetched"),
    ],
)  # fmt: skip
def test_a_server_that_drips_floods_or_lies_is_left(answer: bytes, options: dict[str, Any], message: str):
    began = time.monotonic()
    with serving(answer, **options) as (server, _), INSIDE.in_force(), pytest.raises(MediaError, match=message):
        fetch(f"{server}/", 100_000)
    assert time.monotonic() - began < 10


def test_a_name_that_is_looked_up_for_ever_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    with INSIDE.in_force(), pytest.raises(MediaError, match="cannot be fetched within 2 seconds"):
        fetch("http://slow.example/", 10)


def test_a_handshake_that_never_ends_is_left():
    with serving(b"", drip=0.1, for_ever=b"\x16") as (server, _), INSIDE.in_force(), pytest.raises(MediaError):
        fetch(server.replace("http", "https"), 10)


# Files that are none -----------------------------------------------------------------------------------------------


def odd_files(folder: Path) -> dict[str, tuple[str, str]]:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    (folder / "link").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "pipe": (str(folder / "pipe"), "is a pipe, and only regular files"),
        "socket": (str(folder / "socket"), "is a socket|No such device"),
        "folder": (str(folder), "is a folder, and only regular files"),
        "zero": ("/dev/zero", "is a device, and only regular files"),
        "random": ("/dev/urandom", "is a device"),
        "terminal": ("/dev/tty", "is a device|No such device"),
        "standard input": ("/dev/stdin", "is a (pipe|device|folder|socket)|is empty|No such|damaged"),
        "link to a device": (str(folder / "link"), "is a device"),
        "link to itself": (str(folder / "loop"), "Too many levels"),
        "file of the system": ("/proc/self/maps", "is empty, 0 bytes"),
        "its secrets": ("/proc/self/environ", "is empty, 0 bytes"),
    }


NAMES = ("pipe", "socket", "folder", "zero", "random", "terminal", "standard input", "link to a device",
         "link to itself", "file of the system", "its secrets")  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file_is_not_read(name: str, kind: str, tmp_path: Path):
    from molora.encoders.audio import Audio, AudioConfig
    from molora.encoders.vision import Vision, VisionConfig

    path, message = odd_files(tmp_path)[name]
    modality = Vision("vision", VisionConfig()) if kind == "image" else Audio("audio", AudioConfig())
    for part in ({"path": path}, {kind: path}, {kind: {"path": path}}):
        with pytest.raises(MediaError, match=message):
            modality.load({"type": kind, **part})


@pytest.mark.parametrize("name", ["pipe", "socket", "folder", "zero", "random", "link to a device"])
def test_a_plugin_that_trusts_its_parts_never_sees_what_is_no_regular_file(name: str, tmp_path: Path):
    path, message = odd_files(tmp_path)[name]
    with pytest.raises(MediaError, match=f"sample 7: .*{message}"):
        encode({"path": path})
    with pytest.raises(MediaError, match=message):
        encode({"letters": {"path": Path(path)}})


def test_a_large_file_is_refused_by_its_size(tmp_path: Path):
    from molora.encoders.sound import MAX_FILE_BYTES, load_sound

    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(MediaError, match=f"has {2**40} bytes, and {MAX_FILE_BYTES} is the most"):
        load_sound({"path": tmp_path / "huge.wav"})
