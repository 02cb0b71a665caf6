"""The server beside the offline batch, and short texts beside long prompts and clients that vanish.

    python -m benchmarks.serving [--seconds 60] [--clients 64] [--askers 16] [--rounds 3] [--json FILE]
        [options of molora serve]

- load: clients that ask one request after the other: text, a picture, a sound, both, a plugin's numbers, each drawn
  with a seed of its own. Every answer is compared with the one that the model gives offline. Throughput: tokens of
  answers a second beside those of the same requests in an offline batch, in turns. Memory: resident, of all processes
  of the server, in the last fifth of the time over that in the second fifth.
- first text: the 95th percentile of the time to the first text of short questions, while prompts of 4,000 tokens enter,
  or while clients leave in the middle of bodies and answers, over that of the short questions alone, in turns. Clients
  that leave make work until they do, so beside that stands the time while as many ask the same and stay.

The model: a random Llama of 4 layers, width 256, with small encoders. All on one machine, which the clients share.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import psutil
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import molora
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.data.messages import conversation
from molora.inference.generate import Batch, GenerationConfig
from molora.inference.load import LoadedModel
from molora.inference.running import Asked
from molora.inference.sampling import Decoding
from molora.seeding import seed_of
from molora.testing import byte_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
MAX_TOKENS = 8192
NUMBERS = "molora.testing:Numbers"
ADAPTER = {"r": 8, "lora_alpha": 16, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOWER = {"kind": "convit", "pretrained": False, "convit": {"width": 64, "depth": 2, "heads": 2}}
CONFORMER = {"width": 64, "blocks": 2, "heads": 2, "mlp_width": 128, "subsampling_channels": 16}
PLUGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "vision": ("vision", {"crop_pixels": 64, "max_crops": 2, "pool": 2, "tower": TOWER}),
    "audio": ("audio", {"tower": {"conformer": CONFORMER}, "beside": {"vision": "vision"}}),
    "numbers": (NUMBERS, {}),
}
RULES = {"audio+vision": "vision"}
RUNNING, KEPT_GIB = 32, 0.5
# After how long clients that vanish do so.
LEAVE_SECONDS = 0.2
LONG_TOKENS, LONG_CLIENTS, VANISHING_CLIENTS = 4000, 2, 8


@dataclass(frozen=True)
class Question:
    """A request, and how many tokens its answer has."""

    kind: str
    content: Any
    seed: int
    tokens: int

    @property
    def messages(self) -> list[Any]:
        return [{"role": "user", "content": self.content}]

    @property
    def decoding(self) -> Decoding:
        return Decoding(max_new_tokens=self.tokens, temperature=1.0, seed=self.seed, ignore_stop_tokens=True)


def save_model(home: Path) -> list[Path]:
    """Writes the backbone and a folder for each modality; returns the latter."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, **SIZES)
    model = LlamaForCausalLM(config)
    # It says printable characters, as halves of others wait for their rest and the first token would be no text.
    printable = tokenizer.convert_tokens_to_ids([chr(code) for code in range(ord("!"), ord("~") + 1)])
    with torch.no_grad():
        head_VD = model.lm_head.weight
        head_VD.copy_(torch.zeros_like(head_VD).index_copy(0, torch.tensor(printable), 30 * head_VD[printable]))
    model.save_pretrained(home / "backbone")
    tokenizer.save_pretrained(home / "backbone")
    for name, (plugin, options) in PLUGINS.items():
        backbone, tokenizer = load_backbone(str(home / "backbone"))
        plan = blueprint(name, plugin, options, ADAPTER, "here")
        model, _ = assemble(backbone, tokenizer, {name: plan}, RouterConfig())
        save_modality(model, name, plan, home / name, {})
    return [home / name for name in PLUGINS]


def make_questions(count: int) -> list[Question]:
    """Of every kind, each another one."""
    draw = np.random.default_rng(0)
    kinds = ("text", "picture", "sound", "both", "numbers")
    questions = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        content: list[Any] = [{"type": "text", "text": f"what is number {index}?"}]
        if kind in ("picture", "both"):
            content.insert(0, {"type": "image_url", "image_url": {"url": _picture(draw)}})
        if kind in ("sound", "both"):
            content.insert(0, {"type": "input_audio", "input_audio": {"data": _sound(draw), "format": "wav"}})
        if kind == "numbers":
            content.insert(0, {"type": "numbers", "numbers": draw.normal(size=8).tolist()})
        questions.append(Question(kind, content, index, 16 + index % 17))
    return questions


def _picture(draw: np.random.Generator) -> str:
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _sound(draw: np.random.Generator) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((3000 * draw.standard_normal(16_000)).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def answer_offline(loaded: LoadedModel, questions: Sequence[Question]) -> list[str]:
    """The answers of one batch, each with the seed of its question."""
    config = GenerationConfig(max_running_samples=RUNNING, kv_cache_gib=KEPT_GIB)
    batch = Batch(loaded.model, config, loaded.frames)
    tokens: dict[str, list[int]] = {str(index): [] for index in range(len(questions))}
    waiting = iter(enumerate(questions))
    left = len(questions)
    while left:
        while batch.has_room and (following := next(waiting, None)):
            index, question = following
            messages = conversation({"messages": question.messages}, "a question")
            sample = loaded.encode(messages, str(index))
            how = question.decoding
            batch.add(Asked(sample, how, seed_of(how.seed, "0"), lambda tokens: False))
        for step in batch.step():
            assert step.error is None, step.error
            tokens[step.id].append(step.token_id)
            left -= step.finished is not None
    return [loaded.text(each).strip() for each in tokens.values()]


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    address: str

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=600, max_retries=0)

    def resident_bytes(self) -> int:
        process = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


@contextmanager
def serving(home: Path, modalities: Sequence[Path], more: Sequence[str]) -> Iterator[Server]:
    command = [sys.executable, "-m", "molora", "serve", str(home / "backbone"), "--port", "0"]
    command += ["--name", "model", "--trust-plugin", NUMBERS]
    for folder in modalities:
        command += ["--modality", str(folder)]
    for modality, adapter in RULES.items():
        command += ["--rule", f"{modality}={adapter}"]
    sizes = ["--max-running-samples", str(RUNNING), "--max-waiting", "256", "--kv-cache-gib", str(KEPT_GIB)]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *sizes, *more], stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"(http://\S+) serves", line):
                yield Server(process, found[1])
                break
        else:
            raise RuntimeError(f"the server did not start: {(home / 'log').read_text()[-2000:]}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@dataclass
class Load:
    """What came of asking for a while."""

    asked: int = 0
    wrong: int = 0
    lost: int = 0
    tokens: int = 0
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)


async def ask_for(
    server: Server, questions: Sequence[Question], answers: Sequence[str], clients: int, seconds: float, load: Load
) -> None:
    """So many clients ask for so long, each from another place in the questions on; their answers are compared."""
    begun = time.monotonic()

    async def ask_on(client: openai.AsyncOpenAI, index: int) -> None:
        while time.monotonic() < begun + seconds:
            question, expected = questions[index % len(questions)], answers[index % len(questions)]
            load.asked += 1
            try:
                found = await client.chat.completions.create(
                    model="model",
                    messages=question.messages,
                    max_tokens=question.tokens,
                    temperature=1.0,
                    seed=question.seed,
                    extra_body={"ignore_eos": True},
                )
            except openai.APIError as error:
                print(f"lost: {error}", file=sys.stderr)
                load.lost += 1
            else:
                load.wrong += found.choices[0].message.content != expected
                load.tokens += question.tokens
            index += clients + 1

    async def watch() -> None:
        while True:
            load.resident.append(server.resident_bytes())
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    async with server.client() as client:
        await asyncio.gather(*(ask_on(client, index) for index in range(clients)))
    watching.cancel()
    load.seconds += time.monotonic() - begun


async def first_texts(
    server: Server, askers: int, seconds: float, beside: Callable[[], Awaitable[None]] | None
) -> list[float]:
    """Seconds to the first text of short questions, one after the other by some clients, beside what else goes on."""
    begun, found = time.monotonic(), []

    async def ask_on(client: openai.AsyncOpenAI, number: int) -> None:
        while time.monotonic() < begun + seconds:
            asked = time.monotonic()
            stream = await client.chat.completions.create(
                model="model",
                messages=[{"role": "user", "content": f"hello {number}"}],
                max_tokens=16,
                temperature=1.0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            first = None
            async for chunk in stream:
                if first is None and chunk.choices[0].delta.content:
                    first = time.monotonic() - asked
            if first is not None:
                found.append(first)

    async with server.client() as client:
        others = [] if beside is None else [asyncio.ensure_future(beside())]
        await asyncio.gather(*(ask_on(client, number) for number in range(askers)))
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    return found


async def send_long(server: Server) -> None:
    """Prompts of thousands of tokens, without end."""

    async def ask_on(client: openai.AsyncOpenAI, number: int) -> None:
        while True:
            number += 1
            text = f"{number} {'x' * LONG_TOKENS}"
            await client.chat.completions.create(
                model="model", messages=[{"role": "user", "content": text}], max_tokens=4
            )

    async with server.client() as client:
        await asyncio.gather(*(ask_on(client, 1000 * number) for number in range(LONG_CLIENTS)))


async def vanish(server: Server, leave: bool) -> None:
    """Clients that leave in the middle of a body, of a stream and of their wait, without end; or that stay."""
    address = urlsplit(server.address)
    asked = {"model": "model", "messages": [{"role": "user", "content": "a"}], "max_tokens": 400, "ignore_eos": True}

    async def leave_on(number: int) -> None:
        while True:
            body = json.dumps({**asked, "stream": number % 3 == 0}).encode()
            length = len(body) + (10_000 if number % 3 == 1 and leave else 0)
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            head += f"Content-Length: {length}\r\n"
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            if not leave:
                await reader.read()
            elif number % 3 == 0:
                with suppress(ConnectionError):
                    await reader.read(1)
            await asyncio.sleep(LEAVE_SECONDS if leave else 0)
            writer.transport.abort()

    await asyncio.gather(*(leave_on(number) for number in range(VANISHING_CLIENTS)))


def percentile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share))


def measure_load(
    server: Server, loaded: LoadedModel, questions: Sequence[Question], clients: int, seconds: float, rounds: int
) -> dict[str, Any]:
    answers = answer_offline(loaded, questions)
    offline, served, load = [], [], Load()
    for _ in range(rounds):
        begun = time.monotonic()
        if answer_offline(loaded, questions) != answers:
            raise RuntimeError("the offline batch gives other answers the second time")
        offline.append(sum(question.tokens for question in questions) / (time.monotonic() - begun))
        tokens, took = load.tokens, load.seconds
        asyncio.run(ask_for(server, questions, answers, clients, seconds / rounds, load))
        served.append((load.tokens - tokens) / (load.seconds - took))
    fifth = max(1, len(load.resident) // 5)
    growth = statistics.mean(load.resident[-fifth:]) / statistics.mean(load.resident[fifth : 2 * fifth])
    ratios = [mine / theirs for mine, theirs in zip(served, offline, strict=True)]
    return {
        "clients": clients,
        "seconds": load.seconds,
        "asked": load.asked,
        "wrong": load.wrong,
        "lost": load.lost,
        "memory_growth": growth,
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratios": ratios,
    }


def measure_first(server: Server, askers: int, seconds: float, rounds: int) -> dict[str, Any]:
    beside: dict[str, Callable[[], Awaitable[None]] | None] = {
        "alone": None,
        "long prompts": lambda: send_long(server),
        "clients that leave": lambda: vanish(server, True),
        "clients that stay": lambda: vanish(server, False),
    }
    asyncio.run(first_texts(server, askers, 2, None))
    found: dict[str, list[float]] = {name: [] for name in beside}
    for _ in range(rounds):
        for name, work in beside.items():
            found[name] += asyncio.run(first_texts(server, askers, seconds / rounds, work))
    p95 = {name: percentile(values, 0.95) for name, values in found.items()}
    return {
        "askers": askers,
        "questions": {name: len(values) for name, values in found.items()},
        "p50_ms": {name: 1000 * percentile(values, 0.5) for name, values in found.items()},
        "p95_ms": {name: 1000 * value for name, value in p95.items()},
        "p95_ratio": {name: value / p95["alone"] for name, value in p95.items() if name != "alone"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load; first tokens take half as long each")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--askers", type=int, default=16, help="of short questions")
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        modalities = save_model(home)
        router = RouterConfig(options={"rules": RULES})
        loaded = molora.load(home / "backbone", modalities, router=router, trust=[NUMBERS], device="cpu")
        with serving(home, modalities, more) as server:
            load = measure_load(
                server, loaded, make_questions(given.questions), given.clients, given.seconds, given.rounds
            )
            print(
                f"{load['asked']:,} requests of {load['clients']} clients in {load['seconds']:.0f} s: {load['wrong']} "
                f"answers differ from the offline ones, {load['lost']} lost\n"
                f"throughput {load['throughput_ratio']:.2f} of the offline batch, memory x {load['memory_growth']:.3f}",
                flush=True,
            )
            first = measure_first(server, given.askers, given.seconds / 2, given.rounds)
            for name, value in first["p95_ms"].items():
                ratio = f", x {first['p95_ratio'][name]:.2f}" if name in first["p95_ratio"] else ""
                times = f"p50 {first['p50_ms'][name]:.0f} ms, p95 {value:.0f} ms{ratio}"
                print(f"first text of {first['questions'][name]} short questions, {name}: {times}")
    if given.json:
        given.json.write_text(json.dumps({"load": load, "first_text": first}, indent=1) + "\n")


if __name__ == "__main__":
    main()
