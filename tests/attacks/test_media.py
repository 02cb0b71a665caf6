"""Attacks through what a row names: addresses inside a network, servers that never end, files that are none, and
pictures and sounds that unfold. Each is refused with its reason."""

from __future__ import annotations

import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.data.processor import Processor
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.pictures import MAX_FILE_BYTES
from molora.encoders.sound import MAX_FILE_BYTES as MAX_SOUND_BYTES
from molora.encoders.sound import load_sound
from molora.encoders.vision import Vision, VisionConfig
from molora.media import MediaPolicy, fetch
from molora.modality import MediaError
from molora.testing import Letters, NumbersConfig, byte_tokenizer
from tests.png import chunk

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")

OPEN = MediaPolicy(allow_urls=True)
INSIDE = MediaPolicy(allow_urls=True, allow_private_addresses=True, deadline_seconds=2)


class Trusting(Letters):
    """A plugin that opens whatever a part names."""

    def load(self, part: Any) -> Any:
        return super().load({"letters": open(part["path"]).read()})


def encode(part: dict[str, Any], media_policy: MediaPolicy | None = None) -> None:
    modality = Trusting("letters", NumbersConfig())
    processor = Processor(byte_tokenizer(), {"letters": modality}, lambda _: "", 100, media_policy)
    processor.encode([{"role": "user", "content": [{"type": "letters", **part}]}], "7", generate=True)


# Addresses inside a network ----------------------------------------------------------------------------------------


@contextmanager
def serving(answer: bytes, *, drip: float = 0.0, for_ever: bytes = b"") -> Iterator[tuple[str, list[bytes]]]:
    """A server on this machine that sends `answer` to everyone, byte by byte with `drip`, then `for_ever` again and
    again; and what it was asked."""
    asked: list[bytes] = []
    done = threading.Event()

    def serve(client: socket.socket) -> None:
        with client:
            try:
                asked.append(client.recv(2**16))
                for byte in (answer[i : i + 1] for i in range(len(answer))) if drip else [answer]:
                    client.sendall(byte)
                    if done.wait(drip):
                        return
                while for_ever and not done.wait(drip):
                    client.sendall(for_ever)
            except OSError:
                return

    def accept(server: socket.socket) -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        done.set()
        server.shutdown(socket.SHUT_RDWR)


INTERNAL = [
    "http://127.0.0.1/",
    "http://127.8.9.1/",
    "http://localhost/",
    "http://0.0.0.0/",
    "http://0/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::7f00:1]/",
    "http://[::ffff:0:7f00:1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[64:ff9b:1:fffe::a9fe:a9fe]/",
    "http://[2001:0:5ef5:79fd:0:59c:80ff:fffe]/",
    "http://[3fff::1]/",
    "http://[5f00::1]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://240.0.0.1/",
    "https://127.0.0.1/",
]


@pytest.mark.parametrize("url", INTERNAL)
def test_an_address_inside_a_network_is_not_asked(url: str, monkeypatch: pytest.MonkeyPatch):
    def connect(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"connects to {arguments}")

    monkeypatch.setattr(socket, "create_connection", connect)
    with OPEN.in_force(), pytest.raises(MediaError, match="leads to .* an address inside a network"):
        fetch(url, 10)


def test_a_name_that_leads_inside_is_not_asked_and_is_looked_up_once(monkeypatch: pytest.MonkeyPatch):
    """A name whose first answer is a public address and whose second is not (rebinding), and one with both at once."""
    answers = [["93.184.215.14", "127.0.0.1"], ["93.184.215.14"], ["127.0.0.1"]]
    connected: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers.pop(0)]

    def connect(address: tuple[str, int], timeout: float) -> None:
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with OPEN.in_force(), pytest.raises(MediaError, match="leads to rebind.example at 127.0.0.1"):
        fetch("http://rebind.example/", 10)
    assert connected == []
    with OPEN.in_force(), pytest.raises(MediaError, match="cannot be fetched .refused"):
        fetch("http://rebind.example/", 10)
    assert connected == ["93.184.215.14"] and answers == [["127.0.0.1"]]


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    with serving(b"HTTP/1.0 200 OK\r\n\r\nmine") as (proxy, asked):
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy)
        with OPEN.in_force(), pytest.raises(MediaError, match="an address inside a network"):
            fetch("http://169.254.169.254/", 10)
        assert not asked


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("file:///etc/passwd", "leads to 'file:///etc/passwd', another scheme"),
        ("ftp://127.0.0.1/a", "another scheme"),
        ("gopher://127.0.0.1:25/_HELO", "another scheme"),
        ("data:text/plain,mine", "another scheme"),
        ("//user:secret@127.0.0.1/", "holds a user name or password"),
        ("/again", "leads on more than 5 times"),
    ],
)
def test_redirects_lead_nowhere_else(location: str, message: str):
    with (
        serving(f"HTTP/1.0 302 Found\r\nLocation: {location}\r\n\r\n".encode()) as (server, _),
        INSIDE.in_force(),
        pytest.raises(MediaError, match=message),
    ):
        fetch(f"{server}/", 10)


def test_a_redirect_that_leads_inside_is_checked_as_the_first_address_is(monkeypatch: pytest.MonkeyPatch):
    connect = socket.create_connection
    with serving(b"HTTP/1.0 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n") as (server, asked):
        port = int(server.rpartition(":")[2])
        monkeypatch.setattr(socket, "create_connection", lambda address, timeout: connect(("127.0.0.1", port)))
        with OPEN.in_force(), pytest.raises(MediaError, match="leads to 169.254.169.254 at 169.254.169.254"):
            fetch("http://93.184.215.14/", 10)
        assert len(asked) == 1


@pytest.mark.parametrize("url", ["http://me:secret@example.org/", "http://me@example.org/", "http://@example.org/"])
def test_credentials_are_not_sent(url: str):
    with OPEN.in_force(), pytest.raises(MediaError, match="holds a user name or password"):
        fetch(url, 10)


def test_an_address_cannot_smuggle_lines_into_the_request():
    with serving(b"HTTP/1.0 200 OK\r\n\r\nfine") as (server, asked), INSIDE.in_force():
        assert fetch(f"{server}/a HTTP/1.0\r\nX-Mine: 1\r\n\r\nGET /b", 10) == b"fine"
        assert fetch(f"{server}/\x00\x7f\x85?\x0b", 10) == b"fine"
    assert [
        line for request in asked for line in request.split(b"\r\n") if line.startswith((b"X-Mine", b"GET /b"))
    ] == []
    assert all(request.count(b"\r\n\r\n") == 1 for request in asked)


# Servers that never end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (b"", {"drip": 0.01, "for_ever": b"H"}, "cannot be fetched within 2 seconds"),
        (b"HTTP/1.0 200 OK\r\n", {"drip": 0.01, "for_ever": b"A: b\r\n"}, "cannot be fetched"),
        (b"HTTP/1.0 200 OK\r\n\r\n", {"drip": 0.1, "for_ever": b"x"}, "cannot be fetched within 2 seconds"),
        (b"HTTP/1.0 200 OK\r\n\r\n", {"for_ever": bytes(2**16)}, "has 1[0-9]* bytes, and 100000 is the most"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 99999999999\r\n\r\n", {}, "has 99999999999 bytes, and 100000 is"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", {"for_ever": b"10000\r\n" + bytes(65536) + b"\r\n"},
         "has 1[0-9]* bytes, and 100000 is the most"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", {"for_ever": b"0" * 4096}, "cannot be fetched"),
        (b"HTTP/1.0 200 OK\r\n", {"for_ever": b"A" * 4096}, "cannot be fetched"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", {"for_ever": b"HTTP/1.1 100 Continue\r\n\r\n", "drip": 0.01}, "within 2"),
        (b"HTTP/1.0 200 OK\r\nContent-Encoding: gzip\r\n\r\nx", {}, "is sent as 'gzip'"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nhalf", {}, "is cut off: 9 bytes promised, 4 sent"),
        (b"\x16\x03\x01", {}, "cannot be fetched"),
        (b"", {}, "cannot be fetched"),
    ],
)  # fmt: skip
def test_a_server_that_drips_floods_or_lies_is_left(answer: bytes, options: dict[str, Any], message: str):
    with serving(answer, **options) as (server, _), INSIDE.in_force(), pytest.raises(MediaError, match=message):
        fetch(f"{server}/", 100_000)


def test_a_name_that_is_looked_up_for_ever_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(30))
    with INSIDE.in_force(), pytest.raises(MediaError, match="cannot be fetched within 2 seconds"):
        fetch("http://slow.example/", 10)


def test_a_handshake_that_never_ends_is_left():
    half_a_record = b"\x16\x03\x03\x3f\xff"
    with (
        serving(half_a_record, drip=0.1, for_ever=b"x") as (server, _),
        INSIDE.in_force(),
        pytest.raises(MediaError, match="cannot be fetched within 2 seconds"),
    ):
        fetch(server.replace("http", "https"), 10)


# Files that are none -----------------------------------------------------------------------------------------------


def odd_files(folder: Path) -> dict[str, tuple[str, str]]:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    (folder / "link").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "pipe": (str(folder / "pipe"), "is a pipe, and only regular files"),
        "socket": (str(folder / "socket"), "is a socket|No such device"),
        "folder": (str(folder), "is a folder, and only regular files"),
        "zero": ("/dev/zero", "is a device, and only regular files"),
        "random": ("/dev/urandom", "is a device"),
        "terminal": ("/dev/tty", "is a device|No such device"),
        "standard input": ("/dev/stdin", "is a (pipe|device|folder|socket)|is empty|No such|damaged"),
        "link to a device": (str(folder / "link"), "is a device"),
        "link to itself": (str(folder / "loop"), "Too many levels"),
        "file of the system": ("/proc/self/maps", "is empty, 0 bytes"),
        "its secrets": ("/proc/self/environ", "is empty, 0 bytes"),
    }


NAMES = ("pipe", "socket", "folder", "zero", "random", "terminal", "standard input", "link to a device",
         "link to itself", "file of the system", "its secrets")  # fmt: skip


@pytest.mark.parametrize("kind", ["image", "audio"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file_is_not_read(name: str, kind: str, tmp_path: Path):
    path, message = odd_files(tmp_path)[name]
    modality = Vision("vision", VisionConfig()) if kind == "image" else Audio("audio", AudioConfig())
    for part in ({"path": path}, {kind: path}, {kind: {"path": path}}):
        with pytest.raises(MediaError, match=message):
            modality.load({"type": kind, **part})


@pytest.mark.parametrize("name", ["pipe", "socket", "folder", "zero", "random", "link to a device"])
def test_a_plugin_that_trusts_its_parts_never_sees_what_is_no_regular_file(name: str, tmp_path: Path):
    path, message = odd_files(tmp_path)[name]
    with pytest.raises(MediaError, match=f"sample 7: .*{message}"):
        encode({"path": path})
    with pytest.raises(MediaError, match=message):
        encode({"letters": {"path": Path(path)}})


def test_a_large_file_is_refused_by_its_size(tmp_path: Path):
    with (tmp_path / "huge.wav").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(MediaError, match=f"has {2**40} bytes, and {MAX_SOUND_BYTES} is the most"):
        load_sound({"path": tmp_path / "huge.wav"})


# Pictures and sounds that unfold -----------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, row: int, *chunks: bytes) -> bytes:
    """A PNG of zeros, with `row` bytes a row."""
    packed = zlib.compressobj()
    rows = b"".join(packed.compress(bytes(1 + row)) for _ in range(height)) + packed.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tags(count: int) -> bytes:
    """A directory of tags that each name all of it."""
    entry = struct.pack("<HHII", 40_000, 7, 12 * count, 8)
    return b"II*\0" + struct.pack("<IH", 8, count) + entry * count + bytes(4)


def tiff(*entries: tuple[int, int, int]) -> bytes:
    """A TIFF of these tags (tag, type, value) and little behind them."""
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + zlib.compress(bytes(1000))


def icon(inside: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inside), 22) + inside


def scans(number: int) -> bytes:
    """A large JPEG of one colour whose last scan is there `number` times."""
    jpeg = saved(Image.new("L", (7900, 7900)), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * number + b"\xff\xd9"


def jpeg_tags() -> bytes:
    """EXIF in many segments, which PIL joins, with five thousand tags that each name all of it."""
    directory = b"II*\0" + struct.pack("<IH", 8, 5000) + struct.pack("<HHII", 40_000, 7, 6_000_000, 8) * 5000
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    parts = [directory, *[bytes(65_000)] * 100]
    return jpeg[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(p) + 8) + b"Exif\0\0" + p for p in parts) + jpeg[20:]


# A picture with its attack inert, or the reason why it is refused.
PICTURES: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "png of packed zeros in its text": (
        lambda: png(8, 8, 8, 0, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24)))),
        None,
    ),
    "png of packed zeros in its profile": (
        lambda: png(8, 8, 8, 0, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**24)))),
        None,
    ),
    "png of three million chunks": (
        lambda: png(8, 8, 8, 0, 8, chunk(b"aaAa", b"") * 3_000_000),
        "more than 131072 chunks",
    ),
    "png of tags that name all": (lambda: png(8, 8, 8, 0, 8, chunk(b"eXIf", tags(60_000))), None),
    "webp of tags that name all": (lambda: saved(Image.new("RGB", (8, 8)), "WEBP", exif=tags(60_000)), None),
    "avif of tags that name all": (
        lambda: saved(Image.new("RGB", (8, 8)), "AVIF", exif=tags(60_000)),
        "has 60000 tags of",
    ),
    "avif of tags that name all, by another brand": (
        lambda: saved(Image.new("RGB", (8, 8)), "AVIF", exif=tags(60_000)).replace(b"ftypavif", b"ftypmif1"),
        "has 60000 tags of",
    ),
    "avif of nothing but tags": (
        lambda: b"\0\0\0\x18ftypavif" + b"II*\0" * 2**19 + b"\0\1\0\0" * 2**20,
        "more than 131072 tags",
    ),
    "tiff of tags that name all": (lambda: tags(60_000), "damaged or no picture|over four times its size"),
    "jpeg of tags that name all": (jpeg_tags, None),
    "jpeg of many scans": (lambda: scans(300), "has 3[0-9]+ scans over 62410000 pixels, [0-9]+ in all, and 2147483648"),
    "jpeg of nothing but segments": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 2**20, "more than 131072 segments"),
    "gif of comments": (lambda: gif_of_comments(60_000), None),
    "gif of endless comments": (lambda: gif_of_comments(200_000), "more than 131072 blocks of a comment"),
    "gif of a huge screen": (
        lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\x08\0\x08\0\0\x02",
        "4294836225 pixels, and max_pixels",
    ),
    "tiff of a huge tile": (
        lambda: tiff(
            (256, 4, 100),
            (257, 4, 100),
            (258, 3, 8),
            (259, 3, 8),
            (262, 3, 1),
            (277, 3, 1),
            (322, 4, 65_520),
            (323, 4, 65_520),
            (324, 4, 150),
            (325, 4, 20),
        ),
        "needs 42929[0-9]+ bytes to be decoded, and 896000000",
    ),
    "tiff of deep pixels": (
        lambda: tiff(
            (256, 4, 7900),
            (257, 4, 7900),
            (258, 3, 64),
            (259, 3, 8),
            (262, 3, 1),
            (273, 4, 150),
            (277, 3, 4),
            (278, 4, 7900),
            (279, 4, 20),
        ),
        "damaged|needs [0-9]+ bytes",
    ),
    "tiff that leads to itself": (lambda: b"II*\0" + struct.pack("<IHI", 8, 0, 8), "damaged or no picture"),
    "icon with a large png": (
        lambda: icon(png(13_000, 13_000, 1, 0, 1625)),
        "13000 x 13000 pixels is more than max_pixels",
    ),
    "icon with a large bitmap": (
        lambda: icon(struct.pack("<IiiHHIIiiII", 40, 12_000, 24_000, 1, 32, 0, 0, 0, 0, 0, 0)),
        "12000 x 12000 pixels is more than max_pixels",
    ),
    "webp of a large canvas": (
        lambda: saved(Image.new("RGB", (7900, 7900)), "WEBP", lossless=True, method=0),
        "needs 1248200000 bytes to be decoded, and 896000000 is the most",
    ),
    "jpeg 2000 of deep bands": (lambda: jpeg_2000(7900), "needs [0-9]+ bytes to be decoded"),
    "jpeg 2000 of nothing but boxes": (
        lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * 600_000,
        "damaged or no picture|read over",
    ),
    "png of the most pixels": (lambda: png(7990, 7990, 8, 6, 4 * 7990), None),
    "bitmap of nothing": (
        lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 7990, -7990, 1, 24, 0, 0, 0, 0, 0, 0),
        "truncated|damaged",
    ),
    "ppm of nothing": (lambda: b"P6 7990 7990 255\n", "damaged or no picture"),
    "ppm of blanks": (lambda: b"P6" + b" " * 2**25, "makes its reader read over 1048576 times"),
    "ppm of one number": (lambda: b"P6 " + b"9" * 2**25, "damaged or no picture"),
}


def gif_of_comments(blocks: int) -> bytes:
    gif = saved(Image.new("P", (8, 8)), "GIF")
    at = 13 + (3 << ((gif[10] & 7) + 1))
    return gif[:at] + b"!\xfe" + (b"\xff" + bytes(255)) * blocks + b"\0" + gif[at:]


def jpeg_2000(side: int) -> bytes:
    """A small one whose headers say that it is large."""
    small = saved(Image.new("RGBA", (8, 8)), "JPEG2000")
    at, size = small.index(b"ihdr") + 4, small.index(b"\xff\x51") + 6
    words = struct.pack(">II", side, side)
    return small[:at] + words + small[at + 8 : size] + words + small[size + 8 :]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_unfolds_is_refused_or_stays_small(name: str):
    make, message = PICTURES[name]
    data, picture = make(), Vision("vision", VisionConfig())
    if message is None:
        assert picture.load({"bytes": data}).size in ((8, 8), (7990, 7990))
    else:
        with pytest.raises(MediaError, match=message):
            picture.load({"bytes": data})


def flac(rate_hz: int, channels: int, num_samples: int) -> bytes:
    """118 bytes that claim all this."""
    packed = rate_hz << 44 | (channels - 1) << 41 | 15 << 36 | num_samples
    return (
        b"fLaC\x80\0\0\x22"
        + struct.pack(">HH", 4096, 4096)
        + bytes(6)
        + packed.to_bytes(8, "big")
        + bytes(16)
        + bytes(76)
    )


def flac_and(num_samples: int) -> bytes:
    return sound("FLAC", "PCM_16", np.zeros((192_000, 8), np.int16), 192_000) + flac(192_000, 8, num_samples)


def sound(kind: str, subtype: str, wave: Any, rate_hz: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def wav(channels: int, rate_hz: int, num_bytes: int) -> bytes:
    form = struct.pack(
        "<IHHIIHH", 16, 1, channels, rate_hz, rate_hz * channels * 2 & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16
    )
    return b"RIFF\xff\xff\xff\xffWAVEfmt " + form + b"data" + struct.pack("<I", num_bytes) + bytes(1000)


SOUNDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "flac that claims ten gibibytes": (
        lambda: flac(655_350, 8, 500_000_000),
        "has 500000000 samples of 8 channels, 16000000000 bytes, and 805306368",
    ),
    "flac that claims days": (lambda: flac(16_000, 1, 2**36 - 1), "lasts 4294967.3 seconds, max_seconds is 1800"),
    "flac that claims what is allowed": (lambda: flac(16_000, 1, 16_000 * 1000), "damaged or no audio|promised"),
    "flac joined with one that claims much": (lambda: flac_and(25_000_000), "has 25192000 samples of 8 channels"),
    "flac of silence that fits": (
        lambda: sound("FLAC", "PCM_16", np.zeros(16_000 * 1801, np.int16)),
        "max_seconds is 1800",
    ),
    "wav of a thousand channels": (lambda: wav(1000, 16_000, 1000), "has 1000 channels, 64 is the most|damaged"),
    "wav of a rate of gigahertz": (lambda: wav(1, 2**31 - 1, 1000), "from 1000 to 768000|damaged"),
    "wav that claims all": (lambda: wav(2, 48_000, 2**31 - 1)[:44], "has no samples|cut off"),
    "mp3 of tags": (lambda: (b"ID3\4\0\0\0\0\0\0") * 2**20, "damaged or no audio"),
    "mp3 that never ends": (lambda: mp3_frame() * 2**18, "max_seconds is 1800"),
    "mp3s joined by the thousand": (
        lambda: (mp3_frame() * 3 + b"ID3\4\0\0\0\0\0\0") * 3000,
        "joined end to end|no sound|damaged|empty|too loud",
    ),
    "wavs joined by the thousand": (
        lambda: sound("WAV", "PCM_16", np.zeros(10)) * 5000,
        "joined end to end, and 2000 is the most",
    ),
    "ogg pages that all begin": (
        lambda: (b"OggS\0\2" + bytes(20) + b"\0" + b"x") * 2**23,
        "joined end to end, and 2000 is the most",
    ),
    "flacs that all begin": (lambda: b"fLaC\0\0\0\x22" * 2**24, "joined end to end, and 2000 is the most"),
    "wav of nothing but chunks": (
        lambda: b"RIFF\0\0\0\0WAVE" + b"aaaa\0\0\0\0" * 2**20,
        "damaged or no audio|no samples",
    ),
    "caf of nothing but chunks": (lambda: b"caff\0\1\0\0" + b"aaaa" + bytes(8) * 2**20, "damaged or no audio|cut off"),
    "a rate of no ratio": (
        lambda: sound("WAV", "PCM_16", np.zeros(20_000), 767_999),
        "767999 Hz is no small ratio to 16000 Hz",
    ),
    "opus that claims hours": (
        lambda: with_granule(sound("OGG", "OPUS", np.zeros(16_000)), 2**40),
        "max_seconds is 1800|cut off|damaged",
    ),
    "vorbis that claims hours": (
        lambda: with_granule(sound("OGG", "VORBIS", np.zeros(160_000)), 2**40),
        "max_seconds is 1800|cut off|damaged",
    ),
}


def mp3_frame() -> bytes:
    """A frame of silence, 26 ms."""
    return b"\xff\xfb\x90\xc4" + bytes(413)


def with_granule(ogg: bytes, granule: int) -> bytes:
    """The last page says that it ends there, with a checksum that is right."""
    at = ogg.rindex(b"OggS")
    page = bytearray(ogg[at:])
    page[6:14], page[22:26] = granule.to_bytes(8, "little"), bytes(4)
    checksum = 0
    for byte in page:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C1_1DB7 if checksum >> 31 else 0)) & 0xFFFF_FFFF
    page[22:26] = checksum.to_bytes(4, "little")
    return ogg[:at] + bytes(page)


@pytest.mark.parametrize("name", SOUNDS)
def test_a_sound_that_unfolds_is_refused(name: str):
    make, message = SOUNDS[name]
    with pytest.raises(MediaError, match=message):
        load_sound({"bytes": make()})


@pytest.mark.parametrize("key", ["base64", "url", "bytes"])
def test_what_is_too_long_is_refused_before_it_is_decoded(key: str):
    text = "A" * (4 * MAX_FILE_BYTES // 3 + 8)
    value: Any = {"base64": text, "url": "data:image/png;base64," + text, "bytes": memoryview(text.encode())}[key]
    with pytest.raises(MediaError, match=f"has [0-9]+ bytes, and {MAX_FILE_BYTES} is the most"):
        Vision("vision", VisionConfig()).load({key: value})
