"""How a server begins and ends: it says what it serves, drains, stops, and does not outlive its model."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from molora.cli import commands
from molora.config import ConfigError
from molora.serve.gate import Keys
from tests.serve.conftest import Folders, Served, serving

DEADLY = """
from molora.testing import Numbers

class Deadly(Numbers):
    part_type = "deadly"
    def load(self, part): return [1.0]
    def collate(self, prepared): raise SystemExit("the end")
"""


def ask(client: openai.OpenAI, found: list[Any], **more: Any) -> threading.Thread:
    """Asks for a long answer in a thread, which puts the answer or the error into `found`."""

    def work() -> None:
        try:
            messages: Any = [{"role": "user", "content": "a"}]
            settings: Any = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, **more}
            answer = client.chat.completions.create(model="tiny", messages=messages, **settings)
            found.append(list(answer) if more else answer)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def running(served: Served) -> float:
    with urllib.request.urlopen(f"{served.address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(("molora_running ", "molora_waiting ")))


def wait_for(count: int, served: Served) -> None:
    until = time.monotonic() + 60
    while (seen := running(served)) < count and time.monotonic() < until:
        time.sleep(0.005)
    assert seen >= count


def test_a_model_may_have_any_name(folders: Folders, tmp_path: Path) -> None:
    name = 'org/its "model\'s"'
    with serving(folders, tmp_path / "log", ["--name", name]) as served:
        assert [model.id for model in served.client().models.list()][:2] == [name, f"{name}:audio"]
        assert served.client().models.retrieve(f"{name}:audio").id == f"{name}:audio"
        assert served.process.stdout is not None
        line = next(line for line in served.process.stdout if line.startswith("curl "))
        curl = subprocess.run(shlex.split(line), capture_output=True, text=True, check=True)
        assert json.loads(curl.stdout)["model"] == name
        assert "org/its" not in served.log_with("/v1/models/{name} ")


def test_the_first_signal_lets_every_answer_finish(folders: Folders, tmp_path: Path) -> None:
    """Streamed and not, running and waiting; no process is left behind, and what was printed works."""
    with serving(folders, tmp_path / "log", ["--max-running-samples", "4"]) as served:
        assert served.process.stdout is not None
        printed = [next(served.process.stdout)]
        while not printed[-1].startswith("curl "):
            printed.append(next(served.process.stdout))
        curl = subprocess.run(shlex.split(printed[-1]), capture_output=True, text=True, check=True)
        assert json.loads(curl.stdout)["choices"][0]["message"]["role"] == "assistant"
        assert any("GiB" in line and "tokens" in line for line in printed)
        processes = psutil.Process(served.process.pid).children(recursive=True)
        found: list[Any] = []
        threads = [ask(served.client(), found, **({"stream": True} if index % 2 else {})) for index in range(8)]
        wait_for(8, served)
        served.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert served.process.wait(60) == 0
        for each in found:
            if isinstance(each, list):
                assert each[-1].choices[0].finish_reason == "length"
            else:
                assert each.usage.completion_tokens == 200
        assert not psutil.wait_procs(processes, timeout=30)[1]
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{served.address}/health")


def test_the_second_signal_ends_at_once(folders: Folders, tmp_path: Path) -> None:
    with serving(folders, tmp_path / "log", ["--max-running-samples", "2"]) as served:
        found: list[Any] = []
        processes = psutil.Process(served.process.pid).children(recursive=True)
        threads = [ask(served.client(), found) for _ in range(8)]
        wait_for(8, served)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(60) == 128 + signal.SIGINT
        for thread in threads:
            thread.join()
        assert any(isinstance(each, openai.APIConnectionError) for each in found)
        assert "stopped by a second SIGINT" in served.log.read_text()
        assert not psutil.wait_procs(processes, timeout=30)[1]


def test_a_model_that_fails_is_reported_and_ends_the_server(folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(DEADLY)
    spec = f"{tmp_path}/deadly.py:Deadly"
    deadly = folders.save("deadly", spec)
    with serving(Folders(folders.backbone, (deadly,)), tmp_path / "log", ["--trust-plugin", spec]) as served:
        found: list[Any] = []
        threads = [ask(served.client(), found), ask(served.client(), found, stream=True)]
        wait_for(2, served)
        with pytest.raises(openai.InternalServerError, match="the model has failed"):
            served.client().chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": [{"type": "deadly"}]}],  # pyright: ignore
            )
        for thread in threads:
            thread.join()
        assert all(isinstance(each, openai.APIError) and "the model has failed" in str(each) for each in found)
        assert served.process.wait(60) == 1
        assert "SystemExit: the end" in served.log.read_text()


MISTAKES = {
    "a port in use": (["--port", "{port}"], "Address already in use; give another --port"),
    "no address": (["--host", "256.0.0.1"], "256.0.0.1:0 cannot be listened on"),
    "another machine": (["--host", "192.0.2.1"], "; give another --host, such as 127.0.0.1"),
    "a URL as a host": (["--media-host", "https://example.org"], "give its name alone, such as example.org"),
    "HTTP to no host": (["--media-http"], "--media-http says how hosts are asked, and none may be; give --media-host"),
    "inside, to no host": (["--media-private-addresses"], "give --media-host HOST, or leave it out"),
    "a key for no server": (["--upstream-key-variable", "KEY"], "give --upstream URL, or leave it out"),
    "no keys": (["--api-keys", "{tmp}/none"], "give a file with a key on each line"),
    "keys that are empty": (["--api-keys", "/dev/null"], "holds no key"),
    "more connections than files": (["--max-connections", str(10**9)], "raise the limit: ulimit -n"),
    "no memory": (["--kv-cache-gib", "0"], "kv_cache_gib cannot be 0"),
    "answers without an end": (["--answer-seconds", "inf"], "answer_seconds cannot be inf; give a finite number"),
    "clients without an end": (["--client-seconds", "inf"], "client_seconds cannot be inf; give a finite number"),
    "requests of any size": (["--max-body-mib", "inf"], "max_body_mib cannot be inf; give a finite number"),
    "media of any size": (["--media-gib", "inf"], "media memory_gib cannot be inf; give a finite number"),
    "no model": (["--modality", "{tmp}"], "modality.json"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_error_before_anything_is_served(
    kind: str, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more, says = MISTAKES[kind]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [word.format(port=taken.getsockname()[1], tmp=tmp_path) for word in more]
        port = [] if "--port" in words else ["--port", "0"]
        monkeypatch.setattr(sys, "argv", ["molora", "serve", str(folders.backbone), *port, *words])
        with pytest.raises(SystemExit) as ended:
            commands.main()
    told = capsys.readouterr().err
    assert ended.value.code == 1 and says in told and told.count("error:") == 1


def test_keys_are_lines_without_notes(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# a note\n\n  one  \ntwo\n")
    keys = Keys(tmp_path / "keys")
    assert [keys.know(f"Bearer {key}".encode()) for key in ("one", "two", "# a note", "", "on")] == [True] * 2 + [
        False
    ] * 3
    assert keys.know(b"bearer one") and not keys.know(b"Basic one") and not keys.know(b"one")
    with pytest.raises(ConfigError, match="no key"):
        (tmp_path / "keys").write_text("# a note\n")
        Keys(tmp_path / "keys")
