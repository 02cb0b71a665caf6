"""What docs/how_to/deploy.md says to put in front of a server and around it, tried with nginx and systemd."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from molora.serve.process import ServeConfig
from tests.serve.conftest import Browsing, Folders, Served, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how_to" / "deploy.md").read_text(encoding="utf-8")
KEY = "the key"


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


@dataclass
class Deployed:
    server: Served
    address: str
    certificate: Path

    def client(self) -> openai.OpenAI:
        trusting = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=str(self.certificate)))
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, http_client=trusting)

    def metric(self, name: str) -> float:
        request = urllib.request.Request(f"{self.server.address}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def deployed(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The server behind nginx with the page's settings, but for ports, names and a certificate of our own."""
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    openssl = shutil.which("openssl")
    if not (nginx and openssl):
        pytest.skip("no nginx or no openssl: apt-get install nginx-light openssl")
    home = tmp_path_factory.mktemp("deployed")
    (home / "keys").write_text(KEY)
    certificate, private = home / "certificate.pem", home / "private.key"
    asked = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(private), "-out", str(certificate)]
    subprocess.run([openssl, *made, *asked], check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serving(folders, home / "log", ["--api-keys", str(home / "keys"), "--max-new-tokens", "12"]) as server:
        settings = block("nginx")
        below = "    location /demo/ { proxy_pass http://127.0.0.1:8000/; }\n}"
        assert "`location /demo/` with `proxy_pass http://127.0.0.1:8000/;`" in PAGE
        for old, new in (
            ("}\n$", below),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            (r"server_name \S+;", "server_name localhost;"),
            (r"ssl_certificate \S+;", f"ssl_certificate {certificate};"),
            (r"ssl_certificate_key \S+;", f"ssl_certificate_key {private};"),
            (r"http://127\.0\.0\.1:8000", server.address),
        ):
            settings, times = re.subn(old, new, settings)
            assert times, old
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        folders_of_its = "".join(f"{kind}_temp_path {home / kind};\n" for kind in kinds)
        user = "user root; " if os.geteuid() == 0 else ""  # its workers write to the test's folder
        (home / "nginx.conf").write_text(
            f"{user}daemon off; pid {home / 'pid'}; error_log {home / 'errors'};\nevents {{}}\n"
            f"http {{ access_log off;\n{folders_of_its}{settings}}}\n"
        )
        process = subprocess.Popen([nginx, "-p", str(home), "-c", str(home / "nginx.conf")], stderr=subprocess.PIPE)
        try:
            found = Deployed(server, f"https://localhost:{port}", certificate)
            for _ in range(200):
                assert process.poll() is None, process.stderr and process.stderr.read()
                try:
                    found.client().models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(0.05)
            yield found
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait()


def test_a_large_picture_passes_and_a_larger_body_does_not(deployed: Deployed) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 2**21
    data = base64.b64encode(file.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages: Any = [{"role": "user", "content": [part]}]
    found: Any = deployed.client().chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert found.molora["adapters"] == ["vision"]
    messages[0]["content"] = "x" * 34 * 2**20
    with pytest.raises(openai.APIStatusError) as refused:
        deployed.client().chat.completions.create(model="tiny", messages=messages)
    assert refused.value.status_code == 413


def test_tokens_come_as_they_are_made_and_a_client_that_leaves_is_forgotten(deployed: Deployed) -> None:
    free, finished = deployed.metric("molora_free_pages"), deployed.metric("molora_answers_total")
    stream = deployed.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "go on"}], max_tokens=220, stream=True
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    with deployed.server.held():
        stream.close()
    deployed.server.log_with("POST /v1/chat/completions")
    for _ in range(500):
        if deployed.metric("molora_free_pages") == free:
            break
        time.sleep(0.02)
    assert deployed.metric("molora_free_pages") == free and deployed.metric("molora_answers_total") == finished


@pytest.mark.parametrize("path", ["/", "/demo/"])
def test_the_chat_works_behind_it(browsing: Browsing, deployed: Deployed, path: str) -> None:
    seen = browsing(f"{deployed.address}{path}", address=deployed.address, ignore_https_errors=True)
    seen.page.get_by_label("Key", exact=True).fill(KEY)
    seen.page.keyboard.press("Enter")
    seen.button("Camera").click()
    seen.button("Take picture").click()
    seen.expect(seen.page.locator("#media img")).to_be_visible()
    seen.ask("a")
    assert "adapter vision" in seen.page.locator(".about").inner_text()
    seen.expected_failures = 1  # before there was a key


def test_who_stops_the_server_waits_until_it_has_drained() -> None:
    drained = ServeConfig(name="tiny").answer_seconds + ServeConfig(name="tiny").client_seconds
    (minutes,) = re.findall(r"^TimeoutStopSec=(\d+)min$", block("ini"), re.MULTILINE)
    (seconds,) = re.findall(r"--stop-timeout (\d+)", PAGE)
    assert int(minutes) * 60 == int(seconds) > drained


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_one_and_lets_little_through(tmp_path: Path) -> None:
    unit = tmp_path / "molora.service"
    command, times = re.subn("/opt/molora/bin/molora", f"{sys.executable} -m molora", block("ini"))
    assert times == 1
    unit.write_text(command)
    checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert checked.returncode == 0 and "molora.service" not in checked.stderr, checked.stderr
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=25", str(unit)], capture_output=True, text=True
    )
    assert rated.returncode == 0, textwrap.shorten(rated.stdout[-400:] + rated.stderr, 400)
