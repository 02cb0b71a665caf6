"""The hub is asked whether it answers, once and shortly, before anything is wanted of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from molora import hub
from molora.checkpoint.pretrained import fetch
from molora.config import ConfigError
from molora.convert.release import layout_of
from molora.data.sources import SourceConfig, open_source
from molora.encoders import pretrained_files
from tests.local_hub import COMMIT, LocalHub


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that takes every connection and never answers, and what it was asked."""
    asked: list[str] = []
    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                asked.append(connection.recv(1000).split(b"\r\n")[0].decode())

        threading.Thread(target=listen, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "_WAIT_SECONDS", 0.05)
        hub._reach.cache_clear()  # a hub of an earlier test may have had the same port, and have answered
        yield asked
        server.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


AWAY = r"the hub at http://127.0.0.1:\d+ cannot be reached \(ReadTimeout"


def test_a_hub_that_does_not_answer_is_asked_once_and_told(silent: list[str]) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"backbone 'runs/x': no such folder in .*{AWAY}.* give a local folder"
    ):
        fetch("runs/x")
    with pytest.raises(ValueError, match=rf"some/siglip .* cannot be fetched .*{AWAY}.*not fetched before"):
        pretrained_files.fetch("some/siglip", None, ["*.json"])
    with pytest.raises(hub.HubError, match=AWAY):
        hub.fetch_file("some/model", "config.json")
    assert layout_of("some/model") is None
    assert [each for each in silent if each.startswith("HEAD")] == ["HEAD / HTTP/1.1"] * 4


def test_a_dataset_of_a_hub_that_does_not_answer_is_asked_once_and_told(silent: list[str]) -> None:
    pytest.importorskip("datasets")
    options = {"path": "some/rows", "prompt": "{q}", "answer": "{a}"}
    with pytest.raises(ConfigError, match=rf"data source some/rows: no such file or folder in .*{AWAY}"):
        open_source(SourceConfig(kind="table", options=options), "data.rows")
    assert [each for each in silent if each.startswith("HEAD")] == ["HEAD / HTTP/1.1"]


def test_what_was_fetched_before_is_found_without_the_hub(silent: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "models--some--model" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(COMMIT)
    assert hub.fetch_snapshot("some/model", None, ["*.json"]) == folder
    assert hub.fetch_file("some/model", "config.json") == folder / "config.json"


def test_a_hub_that_answers_gives_files_and_says_what_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalHub({"some/model": {"config.json": b"{}", "notes.md": b"no"}}) as local:
        local.use(monkeypatch)
        folder = hub.fetch_snapshot("some/model", None, ["*.json"])
        assert folder.name == COMMIT and [path.name for path in folder.iterdir()] == ["config.json"]
        with pytest.raises(hub.HubError, match="RepositoryNotFoundError: 404"):
            hub.fetch_snapshot("some/other", None, ["*.json"])
        with pytest.raises(hub.HubError, match="RemoteEntryNotFoundError: 404"):
            hub.fetch_file("some/model", "nothing.json")
        assert [path for method, path in local.asked if (method, path) == ("HEAD", "/")] == ["/"]
