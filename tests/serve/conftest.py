"""Tiny models that see, hear and read numbers, served by `molora serve` on loopback."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import molora
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.inference.load import LoadedModel
from molora.testing import save_backbone

ADAPTER = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["qkv_proj", "down_proj"]}
SEES = {"kind": "convit", "pretrained": False, "convit": {"width": 8, "depth": 1, "heads": 2}}
HEARS = {"conformer": {"width": 8, "blocks": 1, "heads": 2, "mlp_width": 16, "subsampling_channels": 4}}
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "vision": ("vision", {"crop_pixels": 16, "max_crops": 2, "pool": 1, "tower": SEES}),
    "audio": ("audio", {"tower": HEARS, "beside": {"vision": "vision"}}),
    "numbers": ("molora.testing:Numbers", {}),
}
RULES = {"audio+vision": "vision"}
NUMBERS = "molora.testing:Numbers"


@dataclass
class Served:
    """A server that runs, and where."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def client(self, **more: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60, **more)  # pyright: ignore[reportArgumentType]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The server stands still, so that no answer of it ends first. Whatever fails meanwhile, it goes on."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def log_with(self, line: str) -> str:
        """The log, once it has this; a request's line is written when its answer has gone out."""
        until = time.monotonic() + 30
        while line not in (log := self.log.read_text()):
            assert time.monotonic() < until, f"{line!r} is not in the log after 30 s:\n{log[-2000:]}"
            time.sleep(0.01)
        return log


@dataclass(frozen=True)
class Folders:
    backbone: Path
    modalities: tuple[Path, ...]
    rules: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        named = [word for folder in self.modalities for word in ("--modality", str(folder))]
        ruled = [word for rule in self.rules for word in ("--rule", rule)]
        return [str(self.backbone), *named, *ruled, "--trust-plugin", NUMBERS]

    def save(self, name: str, plugin: str, options: dict[str, Any] | None = None) -> Path:
        """Writes a modality folder as a run does, without training."""
        backbone, tokenizer = load_backbone(str(self.backbone))
        plan = blueprint(name, plugin, options or {}, ADAPTER, "here")
        model, _ = assemble(backbone, tokenizer, {name: plan}, RouterConfig())
        save_modality(model, name, plan, self.backbone.parent / name, {})
        return self.backbone.parent / name


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    home = tmp_path_factory.mktemp("served")
    backbone = Folders(save_backbone(home / "tiny"), ())
    folders = tuple(backbone.save(name, *made) for name, made in PLUGINS.items())
    return Folders(backbone.backbone, folders, ("audio+vision=vision",))


@pytest.fixture(scope="session")
def offline(folders: Folders) -> LoadedModel:
    """The model that the server has."""
    rules = RouterConfig(options={"rules": RULES})
    return molora.load(folders.backbone, folders.modalities, router=rules, trust=[NUMBERS], device="cpu")


Start = Callable[..., Served]


@contextmanager
def serving(folders: Folders, log: Path, more: Sequence[str], module: Sequence[str] = ("molora",)) -> Iterator[Served]:
    """A server in a process of its own, killed at the end if it still runs. `module` is run as `molora` is."""
    command = [sys.executable, "-m", *module, "serve", *folders.arguments, "--port", "0", "--name", "tiny", *more]
    with open(log, "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"(http://\S+) serves", line):
                yield Served(process, found[1], log)
                break
        else:
            pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def picture(shade: int = 100) -> bytes:
    pixels = np.full((16, 24, 3), shade, np.uint8)
    pixels[4:9, 3:20] = (255, shade, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sound(seconds: float = 0.5, hertz: float = 440.0) -> bytes:
    times = np.arange(int(16_000 * seconds)) / 16_000
    samples = (8_000 * np.sin(2 * np.pi * hertz * times)).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, len(samples), "NONE", ""))
        out.writeframes(samples.tobytes())
    return file.getvalue()


# A form's media type, with the line that stands between its fields.
FORM = "multipart/form-data; boundary=x"


def form(*fields: str, files: Sequence[bytes] = (sound(),)) -> bytes:
    """A form with fields, each NAME=VALUE, and with files."""
    named = (field.partition("=") for field in fields)
    parts = [(f'name="{name}"', value.encode()) for name, _, value in named]
    parts += [('name="file"; filename="a.wav"', file) for file in files]
    heads = [(f"--x\r\nContent-Disposition: form-data; {said}\r\n\r\n".encode(), value) for said, value in parts]
    return b"".join(head + value + b"\r\n" for head, value in heads) + b"--x--\r\n"


class Seen:
    """The chat in a browser: what a person can do, and what the page asked for."""

    def __init__(self, context: Any, page: str, address: str, offered: Any) -> None:
        from playwright.sync_api import expect

        self.address = address
        self.context = context
        self.expect = expect
        self.page = context.new_page()
        self.requests: list[Any] = []
        self.faults: list[str] = []
        # Errors of the server that a test asks for; the browser's console tells of each.
        self.expected_failures = 0
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda told: self.faults.append(told.text) if told.type == "error" else None)
        if offered is not None:
            self.page.route("**/examples", lambda route: route.fulfill(json=offered))
        self.page.goto(page)
        self.text = self.page.get_by_label("Message", exact=True)

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def attach(self, kind: str, *files: tuple[str, str, bytes]) -> None:
        given = [{"name": name, "mimeType": type, "buffer": data} for name, type, data in files]
        self.page.locator(f"#{kind}-files").set_input_files(given)
        for name, *_ in files:
            self.expect(self.button(f"Remove {name}")).to_be_visible()

    def drop(self, name: str, type: str, data: bytes) -> None:
        """Lets a file fall onto the page."""
        transfer = self.page.evaluate_handle(
            """([name, type, data]) => {
                const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
                const transfer = new DataTransfer();
                transfer.items.add(new File([bytes], name, {type}));
                return transfer;
            }""",
            [name, type, base64.b64encode(data).decode()],
        )
        for event in ("dragover", "drop"):
            self.page.locator("main").dispatch_event(event, {"dataTransfer": transfer})

    def ask(self, text: str) -> None:
        """Sends a message, whose text is what is written already if none is given, and waits for the answer."""
        if text:
            self.text.fill(text)
        self.text.press("Enter")
        self.finish()

    def finish(self) -> None:
        """Waits until the answer has ended."""
        self.expect(self.button("Send")).to_be_visible(timeout=60_000)
        self.expect(self.page.locator(".assistant").last.locator(".about")).to_be_visible()

    def answers(self) -> list[str]:
        return self.page.locator(".assistant .said").all_text_contents()


Browsing = Callable[..., Seen]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium with a picture for a camera and a tone for a microphone. While it is there, its driver's event loop runs
    in this thread, in which nothing else can run one: so it leaves with its module."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'molora[dev]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    tone = tmp_path_factory.mktemp("microphone") / "tone.wav"
    tone.write_bytes(sound(5.0))
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as running:
        if found is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("no chromium: apt-get install chromium, or python -m playwright install chromium")
        opened = running.chromium.launch(
            executable_path=found, args=[*flags, f"--use-file-for-fake-audio-capture={tone}"]
        )
        yield opened
        opened.close()


@pytest.fixture
def browsing(browser: Any) -> Iterator[Browsing]:
    """Opens a page of a server, by default the chat, of a run that offers these examples. At the end, nothing was asked
    of another host, and nothing failed unseen."""
    opened: list[Seen] = []

    def browse(page: str, address: str | None = None, offered: Any = None, **how: Any) -> Seen:
        opened.append(Seen(browser.new_context(**how), page, address or page, offered))
        return opened[-1]

    yield browse
    for seen in opened:
        others = [each.url for each in seen.requests if not each.url.startswith((seen.address, "blob:", "data:"))]
        assert others == [], "requests to another host"
        assert len(seen.faults) == seen.expected_failures, seen.faults
        seen.context.close()
