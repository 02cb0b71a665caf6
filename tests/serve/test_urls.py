"""URLs in requests: what a server that fetches them never asks, and what it does fetch."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.pages import serving as serving_pages
from tests.serve.conftest import Folders, Served, picture, serving, sound
from tests.serve.network import PUBLIC

# How a request may name the machine that serves, or one beside it, and a word of what is said. `{port}` is that of a
# server on loopback that nobody may reach; whoever connects to PUBLIC reaches another one, which redirects.
WAYS: dict[str, str] = {
    "http://127.0.0.1:{port}/": "inside a network",
    "http://127.8.9.1:{port}/": "inside a network",
    "https://127.0.0.1:{port}/": "inside a network",
    "HTTP://127.0.0.1:{port}/": "inside a network",
    "http:// 127.0.0.1:{port}/": "cannot be fetched",
    "http://127.0.0.1.:{port}/": "cannot be fetched",
    "http://localhost:{port}/": "inside a network",
    "http://LOCALHOST:{port}/": "inside a network",
    "http://localhost.:{port}/": "inside a network",
    "http://0.0.0.0:{port}/": "inside a network",
    "http://0:{port}/": "inside a network",
    "http://127.1:{port}/": "inside a network",
    "http://2130706433:{port}/": "inside a network",
    "http://0x7f000001:{port}/": "inside a network",
    "http://0x7f.0.0.1:{port}/": "inside a network",
    "http://017700000001:{port}/": "inside a network",
    "http://0177.0.0.01:{port}/": "inside a network",
    "http://①②⑦.⓪.⓪.①:{port}/": "inside a network",
    "http://１２７。０。０。１:{port}/": "inside a network",
    "http://127%2e0%2e0%2e1:{port}/": "cannot be fetched",
    "http://[::1]:{port}/": "inside a network",
    "http://[::]:{port}/": "inside a network",
    "http://[0:0:0:0:0:0:0:1]:{port}/": "inside a network",
    "http://[::ffff:127.0.0.1]:{port}/": "inside a network",
    "http://[::ffff:7f00:1]:{port}/": "inside a network",
    "http://[::ffff:0:7f00:1]:{port}/": "inside a network",
    "http://[::127.0.0.1]:{port}/": "inside a network",
    "http://[64:ff9b::7f00:1]:{port}/": "inside a network",
    "http://[64:ff9b:1::7f00:1]:{port}/": "inside a network",
    "http://[2002:7f00:1::]:{port}/": "inside a network",
    "http://[2001:0:5ef5:79fd:0:59c:80ff:fffe]/": "inside a network",
    "http://[fe80::1]:{port}/": "inside a network",
    "http://[fec0::1]/": "inside a network",
    "http://[fd00:ec2::254]/": "inside a network",
    "http://[ff02::1]/": "inside a network",
    "http://10.0.0.1/": "inside a network",
    "http://172.16.0.1/": "inside a network",
    "http://192.168.1.1/": "inside a network",
    "http://100.64.0.1/": "inside a network",
    "http://198.18.0.1/": "inside a network",
    "http://169.254.169.254/latest/meta-data/": "inside a network",
    "http://168.63.129.16/": "inside a network",
    "http://224.0.0.1/": "inside a network",
    "http://255.255.255.255/": "inside a network",
    "http://240.0.0.1/": "inside a network",
    "http://inside.test:{port}/": "inside a network",
    "http://INSIDE.test:{port}/": "inside a network",
    "http://router.test/": "inside a network",
    "http://cloud.test/": "inside a network",
    "http://six.test:{port}/": "inside a network",
    "http://mapped.test:{port}/": "inside a network",
    "http://scoped.test:{port}/": "inside a network",
    "http://both.test:{port}/": "inside a network",
    # The name is looked up once, and connected to where it was.
    "http://once.test:{port}/none": "HTTP 404",
    "http://changing.test:{port}/again": "inside a network",
    "http://public.test@127.0.0.1:{port}/": "holds a user name",
    "http://public.test:a@127.0.0.1:{port}/": "holds a user name",
    "http://public.test\\@127.0.0.1:{port}/": "holds a user name",
    "http://127.0.0.1:{port}\\@public.test/": "holds a user name",
    "http://127.0.0.1:{port}\\.public.test/": "cannot be fetched",
    "http://public.test/to/0": "inside a network",
    "http://public.test/to/1": "inside a network",
    "http://public.test/to/2": "inside a network",
    "http://public.test/to/3": "another scheme",
    "http://public.test/to/4": "another scheme",
    "http://public.test/to/5": "holds a user name",
    "http://public.test/to/6": "inside a network",
    "http://public.test/loop": "more than 5 times",
    "file:///etc/passwd": "local files",
    "ftp://127.0.0.1:{port}/": "local files",
    "gopher://127.0.0.1:{port}/_GET": "local files",
    "dict://127.0.0.1:{port}/": "local files",
    "//127.0.0.1:{port}/": "local files",
    "http:/127.0.0.1:{port}/": "local files",
    "h\nttp://127.0.0.1:{port}/": "local files",
}
LOCATIONS = [
    "http://127.0.0.1:{port}/",
    "//2130706433:{port}/",
    "http://inside.test:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/",
    "http://me:secret@127.0.0.1:{port}/",
    "http://both.test:{port}/",
]


@dataclass
class Fetching:
    """A server that fetches from every host, and what was asked of the one that nobody may reach."""

    served: Served
    port: str
    asked: list[str]


@pytest.fixture(scope="module")
def fetching(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetching]:
    log = tmp_path_factory.mktemp("fetching") / "log"
    asked: list[str] = []
    with serving_pages({"/": picture()}, asked) as canary:
        port = canary.rpartition(":")[2]
        pages: dict[str, Any] = {f"/to/{index}": (302, each.format(port=port)) for index, each in enumerate(LOCATIONS)}
        pages |= {"/loop": (302, "/loop"), "/again": (302, f"http://changing.test:{port}/again"), "/a.png": picture()}
        with serving_pages(pages) as public:
            command = ["tests.serve.network", public.rpartition(":")[2]]
            hosts = ["--media-host", "*", "--media-http", "--media-processes", "1"]
            with serving(folders, log, hosts, command) as served:
                yield Fetching(served, port, asked)


def ask(served: Served, url: str, kind: str = "image_url") -> Any:
    content: Any = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what is it?"}]
    return served.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=8
    )


@pytest.mark.parametrize("url", WAYS)
def test_no_way_leads_inside(fetching: Fetching, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(fetching.served, url.format(port=fetching.port))
    told: Any = refused.value.body
    assert WAYS[url] in told["message"] and len(told["message"]) < 400
    assert told["code"] == "invalid_media" and told["param"] == "messages"
    assert "its path" not in told["message"] and "--" not in told["message"], "which is no advice for a client"
    assert not fetching.asked


def test_what_is_public_is_fetched(fetching: Fetching) -> None:
    """So that the others were not refused for want of a network."""
    for url in (f"http://{PUBLIC}/a.png", "http://public.test:8080/a.png"):
        assert ask(fetching.served, url).molora["adapters"] == ["vision"]


def test_a_host_that_is_named_gives_what_it_has_and_no_other(folders: Folders, tmp_path: Path) -> None:
    """A picture and a sound, as if they had stood in the request."""
    pages: dict[str, Any] = {"/a.png": picture(), "/a.wav": sound(), "/large": bytes(2**20 + 1)}
    asked: list[str] = []
    with serving_pages(pages) as named, serving_pages({"/a.png": picture()}, asked) as other:
        pages |= {
            "/away": (302, f"{other}/a.png"),
            "/by/name": (302, f"{named.replace('127.0.0.1', 'localhost')}/a.png"),
        }
        more = ["--media-host", named.removeprefix("http://"), "--media-http", "--media-private-addresses"]
        with serving(folders, tmp_path / "log", [*more, "--max-body-mib", "1"]) as served:
            for kind, path, data in (("image_url", "/a.png", picture()), ("audio_url", "/a.wav", sound())):
                found = ask(served, named + path, kind)
                same = ask(served, f"data:;base64,{base64.b64encode(data).decode()}", kind)
                assert found.choices == same.choices and found.usage == same.usage
            for path, says in (
                ("/away", "may be asked"),
                ("/by/name", "may be asked"),
                ("/none", "HTTP 404"),
                ("/large", "1048577 bytes, and 1048576 is the most"),
            ):
                with pytest.raises(openai.BadRequestError, match=says):
                    ask(served, named + path)
            with pytest.raises(openai.BadRequestError, match="may be asked"):
                ask(served, f"{other}/a.png")
            assert not asked


def test_a_host_that_drips_is_left(folders: Folders, tmp_path: Path) -> None:
    """Its request fails after the time that media may take; those beside it do not wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = threading.Event()

        def drip() -> None:
            client, _ = server.accept()
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not done.wait(0.2):
                client.sendall(b".")

        threading.Thread(target=drip, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        more = ["--media-host", address, "--media-http", "--media-private-addresses", "--media-seconds", "4"]
        with serving(folders, tmp_path / "log", more) as served:
            found: list[Any] = []

            def slow() -> None:
                try:
                    ask(served, f"http://{address}/")
                except openai.APIError as error:
                    found.append(error)

            thread = threading.Thread(target=slow)
            thread.start()
            assert ask(served, f"data:;base64,{base64.b64encode(picture()).decode()}").choices
            assert not found
            thread.join()
            done.set()
    assert isinstance(found[0], openai.BadRequestError) and "within 2 seconds" in str(found[0])
