"""Workflows that ask a server: ours in a process of its own, and one that fails in every way."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError, plain_yaml
from molora.data.sources import Messages, MessagesConfig
from molora.synthetic.workflow import OutOfBudget, Workflow, open_workflow
from molora.testing import save_backbone

Replied = tuple[int, dict[str, Any]]


class Server(ThreadingHTTPServer):
    """A server that answers by `reply`, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[dict[str, Any]], Replied] = said
        self.asked: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, reply = self.server.reply(body)
        data = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


def said(body: dict[str, Any]) -> Replied:
    text = body["messages"][-1]["content"]
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    message = {"role": "assistant", "content": f"{text} {body['seed']}"}
    return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def workflow(tmp_path: Path, url: str, *, ask: dict[str, Any] | None = None, **more: Any) -> Workflow:
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("\n".join(json.dumps({"id": f"r{n}", "question": f"{n}?"}) for n in range(12)))
    model = {"url": url, "model": "m", "parallel": 2, "retries": 1, "wait_seconds": 0.01}
    options = {"model": "far", "prompt": "{question}", "answers": 2, "decoding": {"max_new_tokens": 8}, **(ask or {})}
    values = {
        "output": str(tmp_path / "out"),
        "models": {"far": {"server": model}},
        "steps": [
            {"name": "seeds", "kind": "table", "options": {"path": str(seeds)}},
            {"name": "answers", "kind": "ask", "options": options},
        ],
        **more,
    }
    path = tmp_path / "workflow.yaml"
    path.write_text(plain_yaml.write(values))
    return open_workflow(path)


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]


def test_each_answer_has_its_own_seed_and_is_asked_for_once(server: Server, tmp_path: Path) -> None:
    asked = workflow(tmp_path, address(server))
    asked.run()
    found = rows(tmp_path)
    assert [row["question"] for row in found] == [f"{n}?" for n in range(12)]
    assert len({answer for row in found for answer in row["answer"]}) == 24 == len(server.asked)
    assert asked.kept.tokens == 24 * 15
    assert all(0 <= body["seed"] < 2**31 and body["max_tokens"] == 8 for body in server.asked)
    workflow(tmp_path, address(server)).run()
    assert len(server.asked) == 24 and rows(tmp_path) == found


def test_a_server_that_stops_loses_nothing_that_was_answered(server: Server, tmp_path: Path) -> None:
    def weary(body: dict[str, Any]) -> Replied:
        return said(body) if len(server.asked) <= 13 else (503, {})

    server.reply = weary
    with pytest.raises(ConfigError, match="step answers: row .* answers 503 .* the same call goes on"):
        workflow(tmp_path, address(server)).run()
    server.reply = said
    before = len(server.asked)
    workflow(tmp_path, address(server)).run()
    assert len(rows(tmp_path)) == 12 and len(server.asked) - before == 24 - 13


def test_answers_behind_one_that_fails_are_kept(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: (500, {"error": "boom"}) if body["messages"][-1]["content"] == "0?" else said(body)
    with pytest.raises(ConfigError, match="step answers: row r0: .* answers 500 Internal Server Error: boom; what was"):
        workflow(tmp_path, address(server)).run()
    assert len((tmp_path / "out/answers.jsonl").read_text().splitlines()) == 6, "of a round of 8, two failed"
    server.reply = said
    before = len(server.asked)
    workflow(tmp_path, address(server)).run()
    assert len(server.asked) - before == 24 - 6
    made = (tmp_path / "out/rows.jsonl").read_bytes()
    (tmp_path / "out/answers.jsonl").write_text("")
    workflow(tmp_path, address(server)).run()
    assert (tmp_path / "out/rows.jsonl").read_bytes() == made


@pytest.mark.parametrize("status", [401, 404])
def test_what_every_request_would_fail_by_ends_the_workflow(server: Server, tmp_path: Path, status: int) -> None:
    server.reply = lambda body: (status, {"error": {"message": "there is no\nmodel 'm'"}})
    with pytest.raises(ConfigError, match=f"step answers: row r0: http.* answers {status} .*: there is no model 'm'; "):
        workflow(tmp_path, address(server)).run()
    assert len(server.asked) <= 8


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        ((400, {"error": {"message": "too long"}}), "answers 400 .*too long"),
        ((200, {"choices": []}), "no chat completion"),
        ((200, {"choices": [{"message": {"content": 5}}]}), "no chat completion"),
    ],
)
def test_a_row_that_is_refused_leaves_the_others(server: Server, tmp_path: Path, reply: Replied, detail: str) -> None:
    server.reply = lambda body: reply if body["messages"][-1]["content"] == "3?" else said(body)
    (_, done) = workflow(tmp_path, address(server)).run()
    assert [row["question"] for row in rows(tmp_path)] == [f"{n}?" for n in range(12) if n != 3]
    (dropped,) = done.dropped
    assert dropped.reason == "cannot be answered" and re.search(detail, dropped.detail)


def test_an_answer_that_a_filter_stops_is_none(server: Server, tmp_path: Path) -> None:
    def withheld(body: dict[str, Any]) -> Replied:
        status, reply = said(body)
        if body["messages"][-1]["content"] == "3?":
            reply["choices"][0]["finish_reason"] = "content_filter"
        return status, reply

    server.reply = withheld
    (_, done) = workflow(tmp_path, address(server)).run()
    assert len(done.rows) == 11 and done.reasons == {"stopped by the server's content filter": 1}
    workflow(tmp_path, address(server)).run()
    assert len(server.asked) == 24, "nor asked again"


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": None}])
def test_an_answer_is_kept_whose_tokens_a_server_does_not_count(server: Server, tmp_path: Path, usage: Any) -> None:
    server.reply = lambda body: (200, {**said(body)[1], "usage": usage})
    counted = workflow(tmp_path, address(server))
    counted.run()
    assert len(rows(tmp_path)) == 12 and counted.kept.tokens > 24 * 15, "the most that it can be"


def test_a_budget_holds_for_a_server_too(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OutOfBudget, match="of 200 tokens"):
        workflow(tmp_path, address(server), budget_tokens=200).run()
    assert 5 < len(server.asked) <= 13, "15 tokens an answer, and 26 at most"
    # Where the server does not count, the most that it can be is counted.
    server.reply = lambda body: (200, {key: value for key, value in said(body)[1].items() if key != "usage"})
    counted = workflow(tmp_path, address(server), budget_tokens=2000)
    counted.run()
    assert counted.kept.tokens > 24 * 15


def test_a_form_and_media_go_to_the_server_as_its_clients_send_them(server: Server, tmp_path: Path) -> None:
    def seen(body: dict[str, Any]) -> Replied:
        return said({**body, "messages": [{"content": "seen"}]})

    server.reply = seen
    (tmp_path / "a.png").write_bytes(b"picture")
    ask = {"media": {"image": "picture"}, "answers": 1, "decoding": {"schema": {"type": "object"}, "stop": ["\n"]}}
    made = workflow(tmp_path, address(server), ask=ask)
    made.config.steps[0].options["columns"] = {"question": "{question}", "picture": str(tmp_path / "a.png")}
    Workflow(made.config, "here").run()
    body = server.asked[0]
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"} and body["stop"] == ["\n"]
    picture, text = body["messages"][0]["content"]
    assert picture == {"type": "image_url", "image_url": {"url": "data:image/png;base64,cGljdHVyZQ=="}}
    assert text["type"] == "text"


def pictures(tmp_path: Path, url: str) -> Workflow:
    """A question about each of three pictures, which a table names by paths from its own folder."""
    (tmp_path / "data").mkdir(exist_ok=True)
    lines = [json.dumps({"id": f"p{n}", "pictures": [f"{n}.png"], "old": None}) for n in range(3)]
    (tmp_path / "data/pictures.jsonl").write_text("\n".join(lines))
    show = {"image": "picture"}
    steps = [
        {"name": "read", "kind": "table", "options": {"path": str(tmp_path / "data/pictures.jsonl")}},
        {"name": "each", "kind": "spread", "options": {"column": "pictures", "into": "picture"}},
        {"name": "seen", "kind": "ask", "options": {"model": "far", "prompt": "What?", "media": show}},
        {
            "name": "told",
            "kind": "conversation",
            "options": {"user": "What?", "assistant": "{answer}", "media": show, "keep": ["picture"]},
        },
    ]
    return workflow(tmp_path, url, steps=steps)


def test_pictures_are_found_beside_their_table_and_asked_about_by_what_they_show(
    server: Server, tmp_path: Path
) -> None:
    def seen(body: dict[str, Any]) -> Replied:
        shown = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
        return said({**body, "messages": [{"content": base64.b64decode(shown).decode()}]})

    server.reply = seen
    made = pictures(tmp_path, address(server))
    for number in range(3):
        (tmp_path / f"data/{number}.png").write_bytes(f"picture {number}".encode())
    made.run()
    source = Messages(MessagesConfig(path=str(tmp_path / "out/rows.jsonl")))
    for number in range(3):
        shown, said_last = source[number]["messages"][0]["content"][0], source[number]["messages"][1]["content"]
        assert Path(shown["path"]) == tmp_path / f"data/{number}.png"
        assert said_last.startswith(f"picture {number}") and rows(tmp_path)[number]["picture"] == shown["path"]
    answered = [json.loads(line) for line in (tmp_path / "out/steps/seen.jsonl").read_text().splitlines()]
    assert answered[0]["picture"] == str(tmp_path / "data/0.png")
    (tmp_path / "data/1.png").write_bytes(b"picture X")
    os.utime(tmp_path / "data/2.png")
    pictures(tmp_path, address(server)).run()
    assert len(server.asked) == 4, "one picture is another, and one is only younger"
    assert rows(tmp_path)[1]["messages"][1]["content"].startswith("picture X")


def test_a_picture_that_a_server_cannot_be_sent_leaves_the_others(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body: said({**body, "messages": [{"content": "seen"}]})
    made = pictures(tmp_path, address(server))
    lines = [{"pictures": [path]} for path in ("0.png", "none.png", "https://pictures.example/1.png")]
    (tmp_path / "data/0.png").write_bytes(b"picture")
    (tmp_path / "data/pictures.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = Workflow(made.config, "here").run()[2]
    assert len(done.rows) == 1 and done.reasons == {"cannot be answered": 2}
    assert "data/none.png" in done.dropped[0].detail and "by the path of a file" in done.dropped[1].detail


def test_our_own_server_answers(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    backbone = save_backbone(tmp_path / "backbone")
    command = [sys.executable, "-m", "molora", "serve", str(backbone), "--port", "0", "--name", "m"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        found = next(found for line in process.stdout if (found := re.match(r"(http://\S+) serves", line)))
        decoding = {"max_new_tokens": 20, "temperature": 1.0, "regex": "[0-9]{2,4}"}
        made = {}
        for name in ("once", "twice"):
            (tmp_path / name).mkdir()
            workflow(tmp_path / name, f"{found[1]}/v1", ask={"decoding": decoding}).run()
            made[name] = [row["answer"] for row in rows(tmp_path / name)]
        answers = [answer for row in made["once"] for answer in row]
        assert made["once"] == made["twice"] and len({*answers}) > 3
        assert len(answers) == 24 and all(re.fullmatch("[0-9]{2,4}", answer) for answer in answers)
    finally:
        process.kill()
        process.wait()


def test_a_key_that_is_not_there_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    model = {"server": {"url": "http://127.0.0.1:9/v1", "model": "m", "key_variable": "NO_SUCH_KEY"}}
    with pytest.raises(ConfigError, match="workflow.yaml: models: far: key_variable: the environment has no NO_SUCH"):
        workflow(tmp_path, "http://127.0.0.1:9/v1", models={"far": model})
