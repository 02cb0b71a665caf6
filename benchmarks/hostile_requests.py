"""Requests that are wrong in thousands of ways: one clear error each, soon, and the server as it was before.

    python -m benchmarks.hostile_requests [--count 10000] [--seed 0] [--json FILE] [options of molora serve]

A good request for text, a picture, a sound or a plugin's numbers is spoiled: bytes of its JSON or of its media are
changed, cut off or doubled, a value is replaced by one that is out of place (huge, deep, half a character, of another
type), or its medium by a bomb of pixels, of compressed text, or of hours of sound. What happens to be good all the same
is answered. Printed: answers and errors by status, the slowest error, and the resident memory of all processes of
the server after a fifth of the requests and at the end. An error of the server, or one without the form of OpenAI's,
ends the measurement with exit code 1.
"""

from __future__ import annotations

import argparse
import base64
import copy
import http.client
import io
import json
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soundfile

from benchmarks.serving import Server, make_questions, save_model, serving

CLIENTS = 8
BOMB_PIXELS, BOMB_BYTES, BOMB_SECONDS = 60_000, 2**28, 3 * 3600
# A bomb takes a process that decodes media for long.
BOMB_SHARE = 0.01


def deep(kind: str, levels: int) -> str:
    begin, end = {"list": ("[", "]"), "object": ('{"a":', "}")}[kind]
    return begin * levels + "0" * (kind == "object") + end * levels


def odd_values(draw: random.Random) -> Any:
    """A value that is seldom right."""
    return draw.choice(
        [
            *(
                None,
                True,
                -1,
                0,
                10**400,
                -(2**63),
                1e308,
                float("nan"),
                float("inf"),
                "",
                "\ud83d",
                "\0",
                "x" * 100_000,
            ),
            *([], {}, [[]], [None], {"": ""}, json.loads(deep("list", 60)), json.loads(deep("object", 400))),
            *("data:image/png;base64,", "file:///etc/passwd", "http://127.0.0.1/", "assistant", "tool", ["a"] * 1000),
        ]
    )


def replaced(body: Any, draw: random.Random) -> Any:
    """A body with one of its values, or names, made odd."""
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []
    waiting = [body]
    while waiting:
        node = waiting.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.3:
        node[draw.choice(["tools", "n", "stop", "seed", "logprobs", "response_format", "role", "type", "\udfff"])] = (
            odd_values(draw)
        )
    else:
        node[key] = odd_values(draw)
    return body


def spoiled(data: bytes, draw: random.Random) -> bytes:
    """Bytes of which some are changed, cut off, doubled or left out."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        place = draw.randrange(len(changed) + 1)
        stop = min(len(changed), place + draw.randrange(1, 40))
        match draw.randrange(5):
            case 0:
                changed[place:stop] = draw.randbytes(stop - place)
            case 1:
                del changed[place:stop]
            case 2:
                changed[place:place] = changed[place:stop]
            case 3:
                del changed[max(1, place) :]
            case _:
                changed[place:place] = draw.choice([b'"', b"{", b"]", b",", b"\\u", b"\xff", b"1e999", b"\0" * 100])
    return bytes(changed)


def media_spoiled(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A body whose pictures and sounds are spoiled, their files or the base64 of them."""
    body = copy.deepcopy(body)
    for part in body["messages"][0]["content"]:
        for inner, key in ((part.get("image_url"), "url"), (part.get("input_audio"), "data")):
            if inner is None:
                continue
            head, comma, data = inner[key].rpartition(",")
            if draw.random() < 0.2:
                inner[key] = head + comma + spoiled(data.encode(), draw).decode("latin-1")
            else:
                inner[key] = head + comma + base64.b64encode(spoiled(base64.b64decode(data), draw)).decode()
    return body


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def make_bombs() -> list[dict[str, Any]]:
    """Parts that are small, and would be large when decoded."""
    zeros = zlib.compress(bytes(BOMB_BYTES), 9)

    def png(side: int, *more: bytes) -> str:
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        pixels = png_chunk(b"IDAT", zlib.compress(bytes(min(side, 1000) * (side + 1)), 9))
        data = b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + png_chunk(b"IEND", b"")
        return f"data:image/png;base64,{base64.b64encode(data).decode()}"

    text, profile = png_chunk(b"zTXt", b"a\0\0" + zeros), png_chunk(b"iCCP", b"a\0\0" + zeros)
    pictures = [png(BOMB_PIXELS), png(8, text), png(8, profile), png(12_000)]
    silence = io.BytesIO()
    with soundfile.SoundFile(silence, "w", 48_000, 1, format="OGG", subtype="OPUS") as file:
        for _ in range(BOMB_SECONDS // 10):
            file.write(np.zeros(480_000, np.float32))
    sound = base64.b64encode(silence.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    return [*parts, {"type": "input_audio", "input_audio": {"data": sound}}]


def make_requests(count: int, seed: int) -> Callable[[int], bytes]:
    """The body of request number i, drawn from the seed and i alone."""
    good = [
        {"model": "model", "messages": question.messages, "max_tokens": 1, "temperature": 0.5, "seed": 1}
        for question in make_questions(40)
    ]
    with_media = [
        body for body in good if {"image_url", "input_audio"} & {p["type"] for p in body["messages"][0]["content"]}
    ]
    bombs = make_bombs()

    def body(index: int) -> bytes:
        draw = random.Random(f"{seed} {index}")
        if draw.random() < BOMB_SHARE:
            return json.dumps({**good[0], "messages": [{"role": "user", "content": [draw.choice(bombs)]}]}).encode()
        match draw.randrange(4):
            case 0:
                return spoiled(json.dumps(draw.choice(good)).encode(), draw)
            case 1:
                return json.dumps(replaced(draw.choice(good), draw)).encode()
            case 2:
                return json.dumps(media_spoiled(draw.choice(with_media), draw)).encode()
            case _:
                kind, levels = draw.choice(["list", "object"]), draw.randrange(1, 100_000)
                text = json.dumps({**draw.choice(good), "metadata": "HERE"})
                return text.replace('"HERE"', deep(kind, levels)).encode()

    return body


def ask(server: Server, body: bytes) -> tuple[int, bytes, float]:
    """The status, the answer and the seconds that it took."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection(urlsplit(server.address).netloc, timeout=120)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, answer, time.monotonic() - begun


def is_one_error(answer: bytes) -> bool:
    told = json.loads(answer)
    return told.keys() == {"error"} and told["error"].keys() == {"message", "type", "param", "code"}


def measure(server: Server, body: Callable[[int], bytes], count: int) -> dict[str, Any]:
    statuses: Counter[int] = Counter()
    seconds: list[float] = []
    faults: list[str] = []
    resident = []
    parts: Sequence[range] = (range(count // 5), range(count // 5, count))
    with ThreadPoolExecutor(CLIENTS) as clients:
        for part in parts:
            for index, (status, answer, took) in zip(
                part, clients.map(lambda i: ask(server, body(i)), part), strict=True
            ):
                statuses[status] += 1
                seconds += [took] * (status != 200)
                if status >= 500 or (status != 200 and not is_one_error(answer)):
                    faults.append(f"request {index}: {status} {answer[:200]!r}")
            resident.append(server.resident_bytes())
    return {
        "requests": count,
        "statuses": dict(sorted(statuses.items())),
        "slowest_error_seconds": max(seconds),
        "resident_mib": [each / 2**20 for each in resident],
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        modalities = save_model(Path(folder))
        with serving(Path(folder), modalities, more) as server:
            found = measure(server, make_requests(given.count, given.seed), given.count)
    by_status = ", ".join(f"{count:,} with {status}" for status, count in found["statuses"].items())
    before, after = found["resident_mib"]
    print(f"{given.count:,} requests: {by_status}; the slowest error took {found['slowest_error_seconds']:.2f} s")
    print(f"resident memory {before:,.0f} MiB after a fifth of them and {after:,.0f} MiB at the end")
    for fault in found["faults"]:
        print(fault)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
