"""The judge model: asked over HTTP of a server that the test starts, and what becomes of replies without a score."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from molora.config import ConfigError
from molora.evaluate.intervals import interval
from molora.evaluate.metrics import Judged, open_metrics, scores

Reply = tuple[int, dict[str, str], bytes]


class Server(ThreadingHTTPServer):
    """A server that answers by `reply`, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply: Callable[[str], Reply] = lambda asked: said("10")
        self.models: Reply = (200, {}, b"{}")
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.running = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.give(self.server.models)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.keys.add(self.headers.get("Authorization"))
            server.running += 1
            server.most = max(server.most, server.running)
        found = server.reply(body["messages"][0]["content"])
        with server.lock:
            server.running -= 1
        self.give(found)

    def give(self, reply: Reply) -> None:
        status, headers, body = reply
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def said(text: str) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def answered(answer: str, id: str = "0:a", **more: Any) -> Judged:
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What colour?"}]
    return Judged(id, [{"role": "user", "content": content}], "red", answer, False, answers=["red", "crimson"], **more)


def judge(server: Server, **options: Any) -> Any:
    (metric,) = open_metrics([{"judge": {"url": server.url, "model": "m", "wait_seconds": 0.01, **options}}], "recipe")
    return metric


def test_the_mean_score_is_given_and_every_answer_is_judged_once(server: Server) -> None:
    server.reply = lambda asked: said("8" if "Answer: red" in asked else "Hardly.\nScore: 2.5")
    judged = [answered("red"), answered("a dog", "1:b", tags=["hard"]), answered("a cat", "2:c", tags=["hard"])]
    metric = judge(server)
    assert scores(judged, [metric]) == {
        "judge": 13 / 3, "judge_failed": 0, "questions": 3,
        "judge/hard": 2.5, "judge_failed/hard": 0, "questions/hard": 2, "failed": 0, "cut_off": 0,
    }  # fmt: skip
    assert interval(metric, judged, group=lambda item: item.id)["judge"].low >= 2.5
    assert len(server.asked) == 3 and {each["model"] for each in server.asked} == {"m"}
    assert all(each["temperature"] == 0 for each in server.asked)
    asked = next(text for each in server.asked if "Answer: red" in (text := each["messages"][0]["content"]))
    assert "Question: [image]\nWhat colour?\nAccepted answer: red or crimson\nAnswer: red\n" in asked
    assert "one number from 0 (wrong) to 10 (right)" in asked


@pytest.mark.parametrize(
    "reply",
    [
        said("I would say about 7 of 10"),
        said("7/10"),
        said("11"),
        said("-1"),
        said("nan"),
        said(""),
        said("7\nbut I am not sure"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
        (200, {}, b"<html>"),
        (400, {}, b"{}"),
        (302, {"Location": "http://127.0.0.1:9/v1/chat/completions"}, b""),
    ],
)
def test_a_reply_without_a_score_is_counted_told_and_never_a_zero(
    server: Server, reply: Reply, capsys: pytest.CaptureFixture[str]
) -> None:
    server.reply = lambda asked: reply if "Answer: bad" in asked else said("6")
    assert judge(server).score([answered("bad"), answered("good", "1:b")]) == {"judge": 6, "judge_failed": 1}
    assert "judge: 1 of 2 answers have no score; the first: " in " ".join(capsys.readouterr().err.split())
    assert judge(server).score([answered("bad")]) == {"judge_failed": 1}
    assert len(server.asked) == 3  # none of these is tried again


def test_a_busy_server_is_asked_again_and_a_dead_one_not_for_ever(server: Server) -> None:
    waiting = iter([(503, {}, b""), (429, {"Retry-After": "0"}, b""), said("9")])
    server.reply = lambda asked: next(waiting)
    assert judge(server).score([answered("red")]) == {"judge": 9, "judge_failed": 0}
    server.reply = lambda asked: (503, {}, b"")
    assert judge(server, retries=2).score([answered("red")]) == {"judge_failed": 1}
    assert len(server.asked) == 3 + 3


def test_a_server_that_stops_or_is_too_slow_leaves_answers_without_a_score(server: Server) -> None:
    slow = judge(server, timeout_seconds=0.2, retries=1)
    release = threading.Event()

    def late(asked: str) -> Reply:
        release.wait(30)
        return said("5")

    server.reply = late
    assert slow.score([answered("red")]) == {"judge_failed": 1}
    release.set()
    server.reply = lambda asked: said("5")
    metric = judge(server, retries=1)
    server.shutdown()
    server.server_close()
    assert metric.score([answered("red")]) == {"judge_failed": 1}
    with pytest.raises(ConfigError, match=r"recipe: judge: url: http://.* does not answer .*; start the server first"):
        judge(server)


def test_a_server_that_falls_silent_is_not_asked_for_every_answer(server: Server) -> None:
    def silent(asked: str) -> Reply:
        time.sleep(0.3)
        return said("10")

    server.reply = silent
    metric: Any = judge(server, parallel=2, retries=0)
    metric.config.timeout_seconds = 0.05
    judged = [Judged(f"{index}:", [], "yes", "no", False) for index in range(100)]
    assert scores(judged, [metric])["judge_failed"] == 100
    assert len(server.asked) <= 12, "two may be under way when the tenth is given up"
    assert "not asked, as" in str(metric.scores["99:", "no"])
    server.reply = lambda asked: said("10")
    metric.config.timeout_seconds, metric.scores = 60.0, {}
    assert scores(judged[:3], [metric])["judge"] == 10


def test_as_many_requests_run_at_a_time_as_the_recipe_says(server: Server) -> None:
    gate = threading.Barrier(4)

    def together(asked: str) -> Reply:
        gate.wait(30)  # passes when four are there
        return said("1")

    server.reply = together
    judged = [answered(f"answer {index}", f"{index}:") for index in range(8)]
    assert judge(server, parallel=4).score(judged) == {"judge": 1, "judge_failed": 0}
    assert server.most == 4


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    assert judge(server, key_variable="JUDGE_KEY").score([answered("red")])["judge"] == 10
    assert server.keys == {"Bearer sesame"}
    server.models = (401, {}, b"")
    with pytest.raises(ConfigError, match=r"refuses the key \(401\)") as told:
        judge(server, key_variable="JUDGE_KEY")
    assert "sesame" not in str(told.value)
    monkeypatch.setenv("JUDGE_KEY", "sesame\n")
    with pytest.raises(ConfigError, match="the environment has no key, but other characters, in JUDGE_KEY") as told:
        judge(server, key_variable="JUDGE_KEY")
    assert "sesame" not in str(told.value)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="key_variable: the environment has no JUDGE_KEY; set it to the key"):
        judge(server, key_variable="JUDGE_KEY")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "127.0.0.1:8000/v1"}, "url is '127.0.0.1:8000/v1'; give an http or https address"),
        ({"url": "http://me:sesame@judge.example/v1"}, "^(?!.*sesame).*url: .* holds a user name or a password"),
        ({"url": "me:sesame@judge.example/v1"}, "^(?!.*sesame).*url: .* holds a user name or a password"),
        (
            {"url": "https://judge.example/v1?key=sesame"},
            r"^(?!.*sesame).*url: .* a query or a fragment, behind \? or #",
        ),
        ({"url": "https://judge.example/v1#sesame"}, "^(?!.*sesame).*url: .* a query or a fragment"),
        ({"lowest": 1, "highest": 1}, "lowest is 1 and highest 1; lowest must be less"),
        ({"parallel": 0}, "parallel is 0; give a number of at least 1"),
        (
            {"prompt": "Rate it from {lowest} to {highest}."},
            "prompt: does not name {answer}, so the judge would not see",
        ),
        ({"prompt": "Is {anser} right?"}, "prompt: .*'anser'.* is no part of it; it may name {question}"),
        ({"prompt": 'Write {"score": 1}'}, "writes other braces twice"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0"),
        ({"key": "secret"}, "key: no such key"),
    ],
)
def test_wrong_options_are_told_before_the_model_answers(server: Server, options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        judge(server, **options)


def test_a_prompt_and_a_scale_of_ones_own(server: Server) -> None:
    server.reply = lambda asked: said("1") if asked == "red? {1}" else said("5")
    own = {"prompt": "{answer}? {{{highest:g}}}", "lowest": 0, "highest": 1}
    assert judge(server, **own).score([answered("red")]) == {"judge": 1, "judge_failed": 0}
