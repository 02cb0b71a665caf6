"""Clients that are slow, silent, or gone: each loses its connection and nothing else, and the others do not notice."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from molora.serve.process import ServeConfig, listen
from tests.serve.conftest import Folders, Served, serving

MOST = 12
LONG = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 240, "ignore_eos": True}
# Some ten megabytes of likelihoods for one step of the model, and as much as a stream.
LARGE = {"model": "tiny", "prompt": ["x" * 200] * 60, "echo": True, "logprobs": 20, "max_tokens": 1}
LARGE_STREAM = {**LONG, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("slow") / "log"
    with serving(folders, log, ["--client-seconds", "3", "--max-connections", str(MOST)]) as served:
        yield served


def connect(server: Served) -> socket.socket:
    address = urlsplit(server.address)
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.settimeout(60)
    wire.connect((address.hostname, address.port))
    return wire


def post(body: dict[str, Any], path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def test_a_piece_of_an_answer_waits_for_no_acknowledgement_of_the_one_before() -> None:
    with listen(ServeConfig(name="tiny", port=0)) as listening, socket.create_connection(listening.getsockname()):
        wire, _ = listening.accept()
        with wire:
            assert wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
# What a client sends at once, and whether it goes on byte by byte. None of them reads.
SLOW: dict[str, tuple[bytes, bool]] = {
    "nothing": (b"", False),
    "half a head": (GET, False),
    "a head that drips": (GET + b"X-More: ", True),
    "half a head after an answer": (GET + b"\r\n" + GET, False),
    "a head that drips after an answer": (GET + b"\r\n" + GET + b"X-More: ", True),
    "half a body": (post(LONG, length=10_000), False),
    "a body that drips": (post(LONG, length=10_000), True),
    "a body that nobody wants and drips": (post({}, "/nothing", 10_000), True),
    "a body that is too large and drips": (post(LONG, length=10**9), True),
    "a large answer that is not read": (post(LARGE, "/v1/completions"), False),
    "a stream that is not read": (post(LARGE_STREAM), False),
}


def is_cut(server: Served, wire: socket.socket, drips: bool) -> bool:
    """Whether the server has let go of a connection. What it sent before is not read, so the client cannot tell."""
    if drips:
        with suppress(OSError):
            wire.send(b"x", socket.MSG_DONTWAIT)
    return wire.getsockname() not in clients(server)


def clients(server: Served) -> list[tuple[str, int]]:
    found = psutil.Process(server.process.pid).net_connections("tcp")
    return [(each.raddr.ip, each.raddr.port) for each in found if each.raddr]


def wait_until(done: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 120
    while not done():
        assert time.monotonic() < until, f"{what} is not so after 120 s"
        time.sleep(0.1)


def numbers(server: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{server.address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}


def is_free(server: Served, free: float) -> bool:
    found = numbers(server)
    return found["molora_free_pages"] == free and not found["molora_running"] + found["molora_waiting"]


def ask(server: Served, content: str) -> str:
    more: Any = {"max_tokens": 20, "seed": 1, "extra_body": {"ignore_eos": True}}
    answer = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **more
    )
    return answer.choices[0].message.content or ""


def test_slow_clients_lose_their_connections_and_others_nothing(server: Served) -> None:
    alone = [ask(server, content) for content in "abc"]
    free = numbers(server)["molora_free_pages"]
    wires = {kind: connect(server) for kind in SLOW}
    for kind, wire in wires.items():
        wire.sendall(SLOW[kind][0])
    assert [ask(server, content) for content in "abc"] == alone
    for kind, wire in wires.items():
        wait_until(lambda wire=wire, kind=kind: is_cut(server, wire, SLOW[kind][1]), f"the end of a client with {kind}")
        wire.close()
    wait_until(lambda: is_free(server, free), "every page free")
    log = server.log_with("POST /v1/chat/completions 408")
    assert "POST /v1/chat/completions 413" in log and "POST other 404" in log
    assert "Traceback" not in log and "ERROR" not in log


def test_who_only_opens_connections_loses_the_oldest_of_them(server: Served) -> None:
    """And keeps nobody out, who sends what it wants."""
    wires = []
    for _ in range(4 * MOST):
        wires.append(connect(server))
        wires[-1].sendall(GET)
    ask(server, "a")
    wait_until(lambda: len(clients(server)) <= MOST, f"no more than {MOST} connections")
    assert is_cut(server, wires[0], False)
    for wire in wires:
        wire.close()


VANISHING = """
import socket, sys, time
address = (sys.argv[1], int(sys.argv[2]))
wires = []
for text in sys.argv[3:]:
    wires.append(socket.create_connection(address))
    wires[-1].sendall(text.encode("latin-1"))
    if '"stream": true' in text:
        wires[-1].recv(1)
print("sent", flush=True)
time.sleep(600)
"""


def test_who_is_killed_frees_its_pages_and_leaves_the_others_alone(server: Served, tmp_path: Path) -> None:
    """In the middle of a head, of a body, of a stream, and while it waits for an answer."""
    alone = ask(server, "a")
    free = numbers(server)["molora_free_pages"]
    sent = [GET, post(LONG, length=10**6), post({**LONG, "stream": True}), post({**LONG, "n": 8})]
    address = urlsplit(server.address)
    command = [sys.executable, "-c", VANISHING, str(address.hostname), str(address.port)]
    told = [each.decode("latin-1") for each in sent]
    with subprocess.Popen([*command, *told], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None and client.stdout.readline() == "sent\n"
        wait_until(lambda: numbers(server)["molora_running"] >= 1, "an answer that runs")
        before = numbers(server)["molora_answer_seconds_count"]
        client.send_signal(signal.SIGKILL)
    assert ask(server, "a") == alone
    wait_until(lambda: is_free(server, free), "every page free")
    assert numbers(server)["molora_answer_seconds_count"] <= before + 2, "answers were gone on with for nobody"
    assert "Traceback" not in server.log.read_text() and "ERROR" not in server.log.read_text()
