"""The chat in a real browser, with its stand-ins for camera and microphone: what a person does, and what is then sent,
answered and seen."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from molora.config import ConfigError
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.serve.examples import read_examples
from tests.serve.conftest import Browsing, Folders, Seen, Served, picture, serving, sound

TEXT = {"type": "text", "text": "what is it?"}
HEARD_HZ = 440.0
# Tokens that take longer than to see the first, of the 256 that the tiny model has.
LONG = 220


@pytest.fixture(scope="module")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("chat") / "log"
    sizes = ["--deterministic-batch", "--max-new-tokens", "12", "--kv-cache-gib", "0.1"]
    with serving(folders, log, sizes) as served:
        yield served


@pytest.fixture
def chat(browsing: Browsing, server: Served) -> Seen:
    return browsing(server.address)


def asked(seen: Seen) -> list[dict[str, Any]]:
    """The bodies of what the page asked the model."""
    posted = [request for request in seen.requests if request.method == "POST"]
    return [json.loads(request.post_data or "") for request in posted]


def offline_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same conversation as molora takes it offline."""

    def part(given: dict[str, Any]) -> dict[str, Any]:
        if given["type"] == "image_url":
            return {"type": "image", "base64": given["image_url"]["url"].partition(",")[2]}
        return {"type": "audio", "base64": given["input_audio"]["data"]} if given["type"] == "input_audio" else given

    return [
        message | ({"content": [part(each) for each in message["content"]]} if message["role"] == "user" else {})
        for message in body["messages"]
        if isinstance(message["content"], list) or message["role"]
    ]


def media(body: dict[str, Any], kind: str) -> bytes:
    (found,) = [part[kind] for part in body["messages"][-1]["content"] if part["type"] == kind]
    return base64.b64decode(found["data"] if kind == "input_audio" else found["url"].partition(",")[2])


def loudest_hertz(data: bytes) -> float:
    samples, rate = soundfile.read(io.BytesIO(data))
    assert samples.ndim == 1 and np.abs(samples).max() > 0.05, "one channel, and something to hear"
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[spectrum.argmax()])


def record(chat: Seen, milliseconds: int = 900) -> None:
    chat.button("Record").click()
    chat.page.wait_for_timeout(milliseconds)
    chat.page.get_by_role("button", name="Stop 0:").click()
    chat.expect(chat.page.locator("#media audio")).to_be_visible()


def set_length(chat: Seen, most: int) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Most tokens of an answer").fill(str(most))
    chat.button("Done").click()


def test_a_spoken_question_about_a_camera_picture_is_answered(chat: Seen, offline: LoadedModel) -> None:
    chat.button("Camera").click()
    chat.button("Take picture").click()
    chat.expect(chat.page.get_by_alt_text("camera picture.jpg")).to_be_visible()
    record(chat)
    chat.button("Send").click()
    chat.finish()
    (body,) = asked(chat)
    taken = Image.open(io.BytesIO(media(body, "image_url"))).convert("RGB")
    assert min(taken.size) >= 240 and np.asarray(taken).mean((0, 1)).argmax() == 1, "the fake camera's green"
    assert loudest_hertz(media(body, "input_audio")) == pytest.approx(HEARD_HZ, abs=5)

    (answer,) = offline.answers([offline.encode(offline_messages(body))], GenerationConfig(max_new_tokens=12))
    assert answer.text and chat.answers() == [answer.text]
    sample = offline.encode(offline_messages(body))
    took = {item.modality: item.prepared.num_tokens for item in sample.items}
    about = chat.page.locator(".about").inner_text()
    assert list(answer.adapters) == ["vision"] and "adapter vision" in about
    assert f"in {answer.prompt_tokens} tokens" in about and f"out {answer.answer_tokens} tokens" in about
    assert f"vision {took['vision']}, audio {took['audio']}" in about
    assert chat.page.locator("#turns img").count() == chat.page.locator("#turns audio").count() == 1


def test_a_second_turn_knows_the_first(chat: Seen, offline: LoadedModel) -> None:
    chat.attach("picture", ("a.png", "image/png", picture()))
    chat.ask("what is it?")
    chat.ask("and <b>why</b>?")
    first, second = asked(chat)
    answers = chat.answers()
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "and <b>why</b>?"},
    ]
    image = {"type": "image", "bytes": picture()}
    turns = [
        {"role": "user", "content": [image, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": answers[0]},
        {"role": "user", "content": "and <b>why</b>?"},
    ]
    config = GenerationConfig(max_new_tokens=12)
    assert answers == [offline.generate(turns[:1], config), offline.generate(turns, config)]
    assert chat.page.get_by_text("and <b>why</b>?", exact=True).is_visible()


def test_settings_are_sent_and_told(chat: Seen) -> None:
    chat.button("Settings").click()
    for label, value in (("Temperature", "1.5"), ("Most tokens of an answer", "5"), ("Seed", "7")):
        chat.page.get_by_label(label).fill(value)
    chat.page.get_by_role("combobox", name="Model").select_option("tiny:vision")
    chat.button("Done").click()
    assert not chat.button("Record").is_visible() and chat.button("Camera").is_visible()
    chat.ask("a")
    (body,) = asked(chat)
    assert {name: body[name] for name in ("model", "temperature", "max_tokens", "seed")} == {
        "model": "tiny:vision",
        "temperature": 1.5,
        "max_tokens": 5,
        "seed": 7,
    }
    about = chat.page.locator(".about").inner_text()
    assert all(told in about for told in ("no adapter", "out 5 tokens", "seed 7", "cut off"))


def test_stop_ends_the_answer_and_frees_its_memory(chat: Seen, server: Served) -> None:
    def metric(name: str) -> float:
        with urllib.request.urlopen(f"{server.address}/metrics") as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    free, finished = metric("molora_free_pages"), metric("molora_answers_total")
    set_length(chat, LONG)
    for stop in (lambda: chat.button("Stop").click(), lambda: chat.page.keyboard.press("Escape")):
        chat.text.fill("go on")
        chat.page.keyboard.press("Enter")
        begun = chat.page.locator(".assistant").last.locator(".said:not(:empty)")
        stopped = False
        while not stopped:
            chat.page.wait_for_timeout(20)
            with server.held():
                chat.page.wait_for_timeout(50)  # until what has come is shown
                if begun.count():
                    stop()
                    chat.finish()
                    stopped = True
        assert "stopped" in chat.page.locator(".about").last.inner_text()
    server.log_with("POST /v1/chat/completions 200")
    for _ in range(100):
        if metric("molora_free_pages") == free:
            break
        chat.page.wait_for_timeout(50)
    assert metric("molora_free_pages") == free and metric("molora_answers_total") == finished
    first, second = asked(chat)
    assert second["messages"][:1] == first["messages"] and second["messages"][1]["content"] == chat.answers()[0] != ""


def test_pictures_are_pasted_and_files_dropped(chat: Seen) -> None:
    chat.context.grant_permissions(["clipboard-read", "clipboard-write"])
    chat.page.evaluate(
        """async (data) => {
            const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
            await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]);
        }""",
        base64.b64encode(picture()).decode(),
    )
    chat.text.focus()
    chat.page.keyboard.press("Control+V")
    chat.expect(chat.page.locator("#media img")).to_be_visible()
    chat.drop("a.wav", "audio/wav", sound())
    chat.expect(chat.page.locator("#media audio")).to_be_visible()
    chat.ask("what?")
    (body,) = asked(chat)
    pasted = Image.open(io.BytesIO(media(body, "image_url"))).convert("RGB")
    assert np.array_equal(np.asarray(pasted), np.asarray(Image.open(io.BytesIO(picture()))))
    assert media(body, "input_audio") == sound()


def test_a_recording_in_a_format_that_the_server_lacks_is_sent_as_wav(chat: Seen) -> None:
    made = chat.page.evaluate(
        """async () => {
            const context = new AudioContext(), tone = new OscillatorNode(context, {frequency: 300});
            const end = context.createMediaStreamDestination();
            tone.connect(end);
            tone.start();
            const recorder = new MediaRecorder(end.stream), parts = [];
            recorder.ondataavailable = ({data}) => parts.push(data);
            recorder.start();
            await new Promise((done) => setTimeout(done, 700));
            recorder.stop();
            await new Promise((done) => (recorder.onstop = done));
            return [...new Uint8Array(await new Blob(parts).arrayBuffer())];
        }"""
    )
    chat.drop("memo.webm", "audio/webm", bytes(made))
    chat.expect(chat.page.locator("#media audio")).to_be_visible()
    chat.ask("")
    assert loudest_hertz(media(asked(chat)[0], "input_audio")) == pytest.approx(300, abs=10)
    chat.drop("memo.m4a", "audio/mp4", b"nothing")
    chat.expect(chat.page.get_by_role("alert")).to_contain_text("memo.m4a cannot be decoded here")
    chat.drop("a.pdf", "application/pdf", b"%PDF")
    chat.expect(chat.page.get_by_role("alert")).to_contain_text("a.pdf is neither a picture nor a sound")


def test_a_plugins_own_part_is_sent_as_it_is(chat: Seen) -> None:
    chat.button("Other").click()
    field = chat.page.get_by_label("As JSON")
    field.fill("{")
    chat.button("Add").click()
    assert field.is_visible(), "no JSON"
    field.fill('{"type": "numbers", "numbers": [0.5, -1]}')
    chat.button("Add").click()
    chat.ask("how many?")
    (body,) = asked(chat)
    assert body["messages"][0]["content"][0] == {"type": "numbers", "numbers": [0.5, -1]}
    assert "adapter numbers" in chat.page.locator(".about").inner_text()


def test_a_run_offers_examples(browsing: Browsing, server: Served, tmp_path: Path) -> None:
    """From its examples.jsonl; those that the chosen name takes."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(picture())
    (tmp_path / "media" / "a.wav").write_bytes(sound())
    image, clip = {"type": "image", "path": "media/a.png"}, {"type": "audio", "path": "media/a.wav"}
    rows = [[image, TEXT], [image, clip], [{"type": "numbers", "numbers": [1]}, TEXT]]
    lines = [json.dumps({"messages": [{"role": "user", "content": content}]}) for content in rows]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines) + "\n")
    with urllib.request.urlopen(f"{server.address}/examples") as response:
        told = json.load(response)
    assert told == {"examples": [], "parts": {"numbers": {"type": "numbers", "numbers": [0.5]}}}, "no run, no examples"
    told["examples"] = read_examples(tmp_path)
    chat = browsing(server.address, offered=told)
    cards = chat.page.locator("#examples button")
    chat.expect(cards).to_have_text(["what is it?", "a picture and a sound", "what is it? (with numbers)"])
    cards.nth(1).click()
    assert chat.page.locator("#media li").count() == 2
    chat.ask("")
    (body,) = asked(chat)
    assert media(body, "image_url") == picture() and media(body, "input_audio") == sound()
    chat.button("New chat").click()
    chat.button("Settings").click()
    chat.page.get_by_role("combobox", name="Model").select_option("tiny:numbers")
    chat.button("Done").click()
    chat.expect(cards).to_have_text(["what is it? (with numbers)"])
    chat.button("Other").click()
    assert json.loads(chat.page.get_by_label("As JSON").input_value()) == told["parts"]["numbers"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"messages": [{"role": "user", "content": [{"type": "image", "path": "../a.png"}]}]}', "leads out of"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "path": "b.png"}]}]}', "b.png"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "one message, of a user"),
        ("{", "line 1: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n' * 25, "25 rows, and 24 is the most"),
    ],
)
def test_examples_that_cannot_be_shown_are_named(tmp_path: Path, row: str, told: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    run = tmp_path / "run"
    run.mkdir()
    (run / "examples.jsonl").write_text(row)
    with pytest.raises(ConfigError, match=told) as refused:
        read_examples(run)
    assert "take the file away" in str(refused.value)


def test_an_error_is_told_as_the_server_says_it_and_loses_nothing(chat: Seen) -> None:
    chat.ask("first")
    chat.attach("picture", ("broken.png", "image/png", picture()[:60]))
    chat.text.fill("what is it?")
    chat.page.keyboard.press("Enter")
    alert = chat.page.locator("#error")
    chat.expect(alert).not_to_be_empty()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(
            urllib.request.Request(
                f"{chat.address}/v1/chat/completions",
                json.dumps(asked(chat)[-1]).encode(),
                {"content-type": "application/json"},
            )
        )
    said = json.loads(refused.value.read())["error"]["message"]
    assert said.startswith("message 2, part 0 (image): ") and alert.inner_text() == said
    chat.expected_failures = 1
    assert chat.text.input_value() == "what is it?"
    assert chat.page.locator("#media img").count() == 1 and len(chat.answers()) == 1
    chat.button("Remove broken.png").click()
    chat.ask("")
    assert asked(chat)[-1]["messages"][-1]["content"] == "what is it?" and not alert.is_visible()


ANSWER = '<img src="http://elsewhere.example/x.png" onerror="document.title = 1"><script>document.title = 1</script>'


def test_what_a_model_says_is_text_and_faults_in_a_stream_are_told(chat: Seen) -> None:
    chunks: list[Any] = [
        {"choices": [{"index": 0, "delta": {"content": ANSWER}, "finish_reason": None}]},
        {"error": {"message": "the model has failed"}},
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.text.fill("a")
    chat.text.press("Enter")
    chat.expect(chat.page.locator(".fault")).to_be_visible()
    assert chat.answers() == [ANSWER] and chat.page.title() == "molora"
    assert chat.page.locator(".fault").inner_text() == "the model has failed"


def test_all_of_it_works_from_the_keyboard(chat: Seen) -> None:
    page, keyboard = chat.page, chat.page.keyboard

    def focused() -> str:
        return page.evaluate("(document.activeElement.ariaLabel ?? document.activeElement.innerText).trim()")

    def tab_to(name: str) -> None:
        for _ in range(30):
            keyboard.press("Tab")
            if focused() == name:
                return
        pytest.fail(f"{name} is not reached with the tab key")

    assert focused() == "Message", "one begins to write at once"
    tab_to("Camera")
    keyboard.press("Enter")
    chat.expect(page.locator("[value=take]")).to_be_enabled()
    tab_to("Take picture")
    keyboard.press("Enter")
    chat.expect(page.locator("#media img")).to_be_visible()
    tab_to("Record")
    keyboard.press("Space")
    page.wait_for_timeout(500)
    keyboard.press("Space")
    chat.expect(page.locator("#media audio")).to_be_visible()
    tab_to("Settings")
    keyboard.press("Enter")
    tab_to("Done")
    keyboard.press("Escape")
    assert focused() == "Settings"
    tab_to("Message")
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    chat.finish()
    assert asked(chat)[0]["messages"][0]["content"][-1] == {"type": "text", "text": "one\ntwo"}
    assert focused() == "Message"
    tab_to("New chat")
    keyboard.press("Enter")
    assert not chat.answers() and focused() == "Message"


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browsing: Browsing, server: Served) -> None:
    chat = browsing(server.address, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    wide = io.BytesIO()
    Image.new("RGB", (1080, 400), "red").save(wide, "PNG")
    chat.attach("picture", ("wide.png", "image/png", wide.getvalue()))
    record(chat, 300)
    chat.drop("b.wav", "audio/wav", sound())
    chat.ask("supercalifragilistic" * 4)
    ends = (chat.page.locator(f".user {each}").last.bounding_box() for each in (".media img", ".said"))
    assert len({round(box["x"] + box["width"]) for box in ends}) == 1, "a picture ends where its text does"
    chat.attach("picture", ("wide.png", "image/png", wide.getvalue()))
    record(chat, 300)
    for opened in ("", "Settings", "Camera", "Other"):
        if opened:
            chat.button(opened).click()
            chat.page.locator("dialog[open]").wait_for()
        assert chat.page.evaluate("document.scrollingElement.scrollWidth") <= 360, opened
        beyond = chat.page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((each) => {
                const {left, right, width} = each.getBoundingClientRect();
                return width && each.checkVisibility() && (left < -1 || right > 361);
            }).map((each) => each.outerHTML.slice(0, 80))"""
        )
        assert beyond == [], opened
        if opened:
            chat.page.keyboard.press("Escape")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_serious(browsing: Browsing, server: Served, colours: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    # The checks are code that is put into the page, which its policy forbids.
    chat = browsing(server.address, color_scheme=colours, bypass_csp=True)

    def check(where: str) -> None:
        found = axe.run(chat.page).response["violations"]
        told = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
        assert told == [], where

    check("at first")
    chat.attach("picture", ("a.png", "image/png", picture()))
    chat.drop("a.wav", "audio/wav", sound())
    check("a draft")
    chat.ask("what is it?")
    chat.ask("and?")
    chat.drop("a.pdf", "application/pdf", b"%PDF")
    check("a conversation, and an error")
    for name in ("Settings", "Camera", "Other"):
        chat.button(name).click()
        chat.page.locator("dialog[open]").wait_for()
        check(name)
        chat.page.keyboard.press("Escape")
    chat.page.goto(f"{server.address}/docs")
    chat.page.get_by_role("heading", name="POST /v1/chat/completions").click()
    check("the API")


def test_where_a_browser_gives_no_devices_the_reason_is_told(chat: Seen) -> None:
    chat.page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
    for name in ("Camera", "Record"):
        chat.button(name).click()
        chat.expect(chat.page.get_by_role("alert")).to_contain_text("with https")


def test_nothing_is_kept_when_the_page_is_left(chat: Seen) -> None:
    chat.ask("a")
    chat.page.reload()
    assert not chat.answers() and chat.context.storage_state() == {"cookies": [], "origins": []}
    assert chat.page.evaluate("sessionStorage.length") == 0


def test_the_api_is_shown_and_tried_without_another_host(browsing: Browsing, server: Served) -> None:
    seen = browsing(f"{server.address}/docs", address=server.address)
    with urllib.request.urlopen(f"{server.address}/openapi.json") as response:
        described = json.load(response)["paths"]
    expected = [f"{method.upper()} {path}" for path, methods in described.items() for method in methods]
    seen.expect(seen.page.locator("summary h2")).to_have_text(expected)
    seen.page.get_by_role("heading", name="POST /v1/chat/completions").click()
    seen.expect(seen.page.get_by_role("cell", name="temperature")).to_be_visible()
    seen.page.locator("details[open]").get_by_role("button", name="Send").click()
    answer = seen.page.locator("details[open] pre")
    seen.expect(answer).to_contain_text("chat.completion")
    assert json.loads(answer.inner_text())["molora"]["adapters"] == []


def test_the_page_has_a_policy_that_lets_nothing_else_in(server: Served) -> None:
    for path in ("/", "/docs", "/web/chat.js"):
        with urllib.request.urlopen(f"{server.address}{path}") as response:
            policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    web = Path(__file__).parents[2] / "molora" / "serve" / "web"
    assert not [path.name for path in web.iterdir() if "https://" in path.read_text()]
