"""Where media come from: what a part may be given as, limits, files, URLs, and the caller's policy."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
import urllib.parse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import molora
from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.opening import open_model
from molora.cli.commands import app
from molora.config import ConfigError, build
from molora.data.processor import Processor
from molora.media import MediaPolicy, Sources, fetch, policy
from molora.modality import MediaError
from molora.pack import Sample
from molora.testing import Letters, NumbersConfig, byte_tokenizer, save_backbone
from molora.train.recipe import Recipe, plan_recipe
from tests.pages import serving

KEYS = ("path", "url", "base64", "bytes", "smell", "array")
INSIDE = MediaPolicy(allow_urls=True, allow_private_addresses=True)


def read(part: dict[str, Any], max_file_bytes: int = 10) -> bytes:
    sources = Sources(part_type="smell", keys=KEYS, max_file_bytes=max_file_bytes)
    sources = pickle.loads(pickle.dumps(sources))
    key, value = sources.choose(sources.flat(part))
    with sources.named(key, value):
        return sources.read(key, value)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


# What is given


def test_one_file_is_the_same_bytes_however_it_is_given(tmp_path: Path):
    path = tmp_path / "rose"
    path.write_bytes(b"rose")
    values: list[Any] = [
        path,
        str(path),
        b"rose",
        bytearray(b"rose"),
        memoryview(b"rose"),
        np.bytes_(b"rose"),
        f"data:smell/x;base64,{encoded(b'rose')}",
        {"bytes": b"rose", "path": "the name that it had"},
        {"bytes": None, "path": str(path)},
        {"base64": encoded(b"rose"), "url": None},
    ]
    for value in values:
        assert read({"smell": value}) == b"rose", value
    for part in ({"path": path}, {"bytes": bytearray(b"rose")}, {"base64": encoded(b"rose"), "path": None}):
        assert read(part) == b"rose"


SMELLY = bytes([0xFB, 0xEF, 0xFF, 0xBE])  # ++//vg== in base64


@pytest.mark.parametrize(
    "text",
    [
        "++//vg==",
        "--__vg==",
        "++//vg",
        "--__vg",
        " ++/\n/v\tg== ",
        "data:;base64,++//vg==",
        "data:smell/x;charset=utf-8;name=a.b;base64,++//vg==",
        "DATA:smell/x;BASE64,++//vg==",
        "data:smell/x;base64,%2B%2B%2F%2Fvg%3D%3D",
        "data:smell/x;base64,--__vg",
        "data:smell/x,%FB%EF%FF%BE",
    ],
)
def test_base64_and_data_uris_are_read_as_the_web_writes_them(text: str):
    assert read({"base64": text}) == SMELLY
    if text[:5].lower() == "data:":
        assert read({"url": text}) == read({"smell": text}) == SMELLY


@pytest.mark.parametrize("size", [10, 11])
def test_the_limit_of_size_holds_for_every_source(tmp_path: Path, size: int):
    data = bytes(size)
    (tmp_path / "a").write_bytes(data)
    uri = "data:x," + "%00" * size
    for part in ({"path": tmp_path / "a"}, {"bytes": data}, {"base64": encoded(data)}, {"url": uri}):
        if size == 10:
            assert read(part) == data
        else:
            with pytest.raises(MediaError, match="has 11 bytes, and 10 is the most; shrink it"):
                read(part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "an smell part needs exactly one of path, url"),
        ({"path": "a", "bytes": b"a"}, "needs exactly one of .*; it has .'path', 'bytes'"),
        ({"smell": {"path": None, "bytes": None}}, "needs exactly one of"),
        ({"path": 3}, "smell part, path '3': is given as str or PathLike, not int"),
        ({"url": 3}, "smell part, url '3': is given as str, not int"),
        ({"base64": b"AAAA"}, "smell part, base64 of 4 bytes: is given as str, not bytes"),
        ({"bytes": "AAAA"}, "bytes of 4 characters: is given as bytes or bytearray or memoryview, not str"),
        ({"path": "a\0b"}, "embedded null byte .*; check the path"),
        ({"path": "a" * 300}, "File name too long .*; check the path"),
        ({"path": "nowhere"}, "No such file or directory .*nowhere.*; check the path"),
        ({"base64": ""}, "is empty, 0 bytes"),
        ({"base64": "AAA=AAAA"}, "is not base64"),
        ({"base64": "AAAAA"}, "is not base64"),
        ({"base64": "rosé"}, "is not base64"),
        ({"base64": "data:smell/x;base64"}, "is a data URI without a comma"),
        ({"url": "ftp://example.org/rose"}, "only http, https and data URLs are fetched"),
        ({"url": "file:///etc/passwd"}, "only http, https and data URLs are fetched"),
    ],
)
def test_parts_that_give_no_bytes(part: dict[str, Any], message: str):
    with pytest.raises(MediaError, match=message):
        read(part)


def test_what_is_no_file_is_left_to_the_medium():
    sources = Sources(part_type="smell", keys=KEYS, max_file_bytes=10)
    assert sources.choose({"smell": 3}) == ("smell", 3)
    assert sources.choose({"array": [1.0], "path": None}) == ("array", [1.0])
    assert sources.choose({"smell": [1.0]}) == ("array", [1.0])
    assert sources.flat({"smell": {"array": [1.0], "path": "a"}, "rate": 3}) == {"array": [1.0], "rate": 3}


# URLs


def test_addresses_are_encoded_as_browsers_do():
    """A path in letters or already escaped, a query, a fragment, blanks around, a host in letters."""
    pages = {
        urllib.parse.quote("/ä b.png"): b"letters",
        "/c.png?q=%C3%A9&r=1": b"query",
        "/": b"top",
    }
    with serving(pages) as server, INSIDE.in_force():
        assert fetch(f"{server}/ä b.png", 10) == b"letters"
        assert fetch(f"{server}/%C3%A4%20b.png", 10) == b"letters"
        assert fetch(f" {server.replace('http', 'HTTP')}/c.png?q=é&r=1#part\n", 10) == b"query"
        assert fetch(server, 10) == b"top"
        assert fetch(server.replace("127.0.0.1", "ｌocalhost"), 10) == b"top"


def test_redirects_are_followed_from_hop_to_hop():
    pages = {
        "/a": (301, "/b"),
        "/b": (302, "d/c"),
        "/d/c": (307, urllib.parse.quote("/ä")),
        "/%C3%A4": (303, "/e".replace("e", "\u00c3\u00a9")),  # UTF-8 as it is on the wire
        "/%C3%A9": (308, "?now"),
        "/%C3%A9?now": b"here",
    }
    with serving(pages) as server, INSIDE.in_force():
        assert fetch(f"{server}/a", 10) == b"here"


def test_what_does_not_come_is_said():
    pages = {"/empty": b"", "/large": bytes(11), "/away": (302, "")}
    with serving(pages) as server, INSIDE.in_force():
        for path, message in (
            ("none", r"cannot be fetched \(HTTP 404 Not Found\); check the address"),
            ("large", "has 11 bytes, and 10 is the most"),
            ("away", r"cannot be fetched \(HTTP 302"),
        ):
            with pytest.raises(MediaError, match=message):
                fetch(f"{server}/{path}", 10)
        with pytest.raises(MediaError, match=f"smell part, url '{server}/empty': is empty, 0 bytes"):
            read({"smell": f"{server}/empty"})
    for url, message in (
        ("http://", "no host in it"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http://127.0.0.1:1/", "Connection refused"),
        (f"http://{'a' * 64}.example/", "cannot be fetched"),
    ):
        with INSIDE.in_force(), pytest.raises(MediaError, match=message):
            fetch(url, 10)


HOSTS = ("files.example", "*.files.example", "other.example:8443", "127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://files.example.evil.example/", "files.example.evil.example"),
        ("http://evilfiles.example/", "evilfiles.example"),
        ("http://files.example./", "files.example."),
        ("http://files.example:8080/", "files.example:8080"),
        ("http://other.example/", "other.example"),
        ("http://files.example#@evil.example/", None),
        ("http://evil.example?files.example/", "evil.example"),
        ("http://evil.example#.files.example/", "evil.example"),
        ("http://evil.example/.files.example", "evil.example"),
        ("http://ﬁles.evil.example/", "files.evil.example"),
        ("http://2130706433/", "2130706433"),
        ("{server}/away", "evil.example"),
        ("{server}/near", "localhost:{port}"),
    ],
)
def test_only_hosts_that_the_caller_names_are_asked(url: str, asked: str | None, monkeypatch: pytest.MonkeyPatch):
    """Neither looked up nor connected to, whatever the address looks like and whoever leads there."""
    pages: dict[str, Any] = {"/away": (302, "http://evil.example/"), "/a": b"rose"}
    with serving(pages) as server:
        port = server.rpartition(":")[2]
        pages["/near"] = (302, f"http://localhost:{port}/a")
        look_up, seen = socket.getaddrinfo, []

        def watched(host: str, *arguments: Any, **more: Any) -> Any:
            seen.append(host)
            return look_up("127.0.0.1", *arguments, **more)

        monkeypatch.setattr(socket, "getaddrinfo", watched)
        hosts = tuple(host.format(port=port) for host in HOSTS)
        with replace(INSIDE, hosts=hosts).in_force():
            assert fetch(f"{server}/a", 10) == b"rose"
            url = url.format(server=server)
            with pytest.raises(MediaError) as refused:
                fetch(url, 10)
        told = "may be asked; download it" if asked else "cannot be fetched"
        assert told in str(refused.value) and (asked or "").format(port=port) in str(refused.value)
    assert set(seen) <= {"127.0.0.1", "files.example"}


def test_a_pattern_stands_for_the_names_below_it(monkeypatch: pytest.MonkeyPatch):
    with serving({"/": b"rose"}) as server:
        port = int(server.rpartition(":")[2])
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", port))])
        with replace(INSIDE, hosts=(f"*.files.example:{port}",)).in_force():
            assert fetch(f"http://a.b.FILES.example:{port}/", 10) == b"rose"
            with pytest.raises(MediaError, match="may be asked"):
                fetch(f"http://files.example:{port}/", 10)


def test_only_https_where_the_caller_says_so():
    with serving({"/": b"rose"}) as server, replace(INSIDE, https_only=True).in_force():
        with pytest.raises(MediaError, match="leads to '127.0.0.1:.*' by plain HTTP, and only https is fetched here"):
            fetch(server, 10)
        with pytest.raises(MediaError, match="cannot be fetched .*SSL"):
            fetch(server.replace("http", "https"), 10)


# The policy


def test_urls_are_off_unless_the_caller_allows_them():
    assert policy() == MediaPolicy() and not policy().allow_urls
    with pytest.raises(MediaError, match="URLs are not fetched unless you allow it; .* say --allow-urls"):
        read({"smell": "https://example.org/rose"})
    with MediaPolicy(allow_urls=True).in_force():
        assert policy().allow_urls
        with MediaPolicy().in_force():
            assert not policy().allow_urls
        assert policy().allow_urls
    assert not policy().allow_urls


class Curious(Letters):
    """A plugin that looks for itself at what a part names, and knows nothing of policies."""

    def load(self, part: Mapping[str, Any]) -> Any:
        raise AssertionError(f"a plugin saw {part}")


class Fetching(Letters):
    """A plugin that fetches with what molora has for it."""

    def load(self, part: Mapping[str, Any]) -> Any:
        return super().load({"letters": fetch(part["url"], 10).decode()})


def one_order(_: frozenset[str]) -> str:
    return ""


def encode(modality: Letters, part: dict[str, Any], media_policy: MediaPolicy | None = None) -> Sample:
    processor = Processor(byte_tokenizer(), {"letters": modality}, one_order, 100, media_policy)
    processor = pickle.loads(pickle.dumps(processor))  # as it travels to data workers
    return processor.encode([{"role": "user", "content": [{"type": "letters", **part}]}], "7", generate=True)


@pytest.mark.parametrize(
    "part",
    [
        {"url": "https://example.org/rose"},
        {"url": " HTTP://example.org/rose"},
        {"letters": "https://example.org/rose"},
        {"letters": {"url": "https://example.org/rose"}},
    ],
)
def test_the_processor_keeps_urls_from_every_plugin(part: dict[str, Any]):
    with pytest.raises(MediaError, match=r"sample 7: message 0, part 0 .letters.: letters part, url .*--allow-urls"):
        encode(Curious("letters", NumbersConfig()), part)


def test_the_processors_policy_is_in_force_inside_a_plugin():
    with serving({"/a": b"rose"}) as server:
        sample = encode(Fetching("letters", NumbersConfig()), {"url": f"{server}/a"}, INSIDE)
        assert sample.items[0].prepared.num_tokens == 4
        with pytest.raises(MediaError, match="an address inside a network"):
            encode(Fetching("letters", NumbersConfig()), {"url": f"{server}/a"}, MediaPolicy(allow_urls=True))
    assert not policy().allow_urls


def test_a_plugin_may_read_its_paths_itself(tmp_path: Path):
    (tmp_path / "a.json").write_text('"rose"')
    for part in ({"path": str(tmp_path / "a.json")}, {"path": tmp_path / "a.json"}):
        assert encode(Letters("letters", NumbersConfig()), part).items[0].prepared.num_tokens == 4
    with pytest.raises(MediaError, match="is no JSON file of letters: .*No such file"):
        encode(Letters("letters", NumbersConfig()), {"path": str(tmp_path / "b.json")})


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    save_backbone(folder)
    return folder


def test_who_opens_a_model_says_whether_it_may_fetch(backbone: Path):
    assert molora.load(backbone, device="cpu").processor.media_policy == MediaPolicy()
    opened = molora.load(backbone, device="cpu", allow_urls=True, allow_private_addresses=True)
    assert opened.processor.media_policy == INSIDE


def recipe(backbone: Path, **more: Any) -> Recipe:
    values = {
        "run": "unused",
        "backbone": {"path": str(backbone)},
        "modalities": {"vision": {"plugin": "vision", "options": {"crop_pixels": 64, "tower": TOWER}}},
        "stages": [{"name": "a", "train": {}, "data": {}, "steps": 1, "samples_per_step": 1}],
        "device": "cpu",
        **more,
    }
    return build(Recipe, values, "recipe.yaml")


TOWER = {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}}


def test_a_recipe_says_whether_training_may_fetch(backbone: Path):
    for more, wanted in (
        ({}, MediaPolicy()),
        ({"allow_urls": True, "allow_private_addresses": True}, INSIDE),
    ):
        _, processor = open_model(plan_recipe(recipe(backbone, **more)), "cpu")
        assert processor.media_policy == wanted


@pytest.mark.parametrize(
    ("option", "advice"),
    [("allow_urls", "`allow_urls` at the top of the recipe"), ("media_root", "into the options of the data source")],
)
def test_a_recipe_with_what_a_modality_once_said_learns_where_it_stands_now(backbone: Path, option: str, advice: str):
    options = {"crop_pixels": 64, "tower": TOWER, option: None}
    given = recipe(backbone, modalities={"vision": {"plugin": "vision", "options": options}})
    with pytest.raises(ConfigError, match=rf"modalities.vision.options.{option}: is no option of a modality.*{advice}"):
        open_model(plan_recipe(given), "cpu")


def test_a_folder_that_was_saved_with_a_policy_opens_and_cannot_widen_the_callers(backbone: Path, tmp_path: Path):
    plan = plan_recipe(recipe(backbone))
    model, _ = open_model(plan, "cpu")
    save_modality(model, "vision", plan.modalities["vision"], tmp_path / "vision", {"vision": ""})
    about = json.loads((tmp_path / "vision/modality.json").read_text())
    about["options"] |= {"allow_urls": True, "media_root": None}
    (tmp_path / "vision/modality.json").write_text(json.dumps(about))
    loaded = molora.load(
        backbone, [tmp_path / "vision"], router=RouterConfig(options={"rules": {"vision": None}}), device="cpu"
    )
    planned = plan.modalities["vision"].modality
    assert planned is not None and loaded.processor.modalities["vision"].config == planned.config
    with pytest.raises(MediaError, match="URLs are not fetched unless you allow it"):
        loaded.encode([{"role": "user", "content": [{"type": "image", "url": "http://127.0.0.1/a.png"}]}])


def test_the_command_line_says_whether_media_may_be_fetched(backbone: Path, tmp_path: Path):
    """Kept off, kept out of the network, and fetched."""
    plan = plan_recipe(recipe(backbone))
    model, _ = open_model(plan, "cpu")
    save_modality(model, "vision", plan.modalities["vision"], tmp_path / "vision", {"vision": ""})
    Image.new("RGB", (64, 64)).save(picture := io.BytesIO(), "PNG")
    with serving({"/a.png": picture.getvalue()}) as server:
        row = {"id": "1", "messages": [{"role": "user", "content": [{"type": "image", "url": f"{server}/a.png"}]}]}
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        answers = []
        for number, flags in enumerate(([], ["--allow-urls"], ["--allow-urls", "--allow-private-addresses"])):
            out = tmp_path / f"out{number}.jsonl"
            command = ["generate", str(backbone), "--modality", str(tmp_path / "vision"), "--rule", "vision=none"]
            command += ["--messages", str(tmp_path / "in.jsonl"), "--output", str(out), "--max-new-tokens", "1"]
            CliRunner().invoke(app, [*command, *flags])
            answers.append(json.loads(out.read_text()))
    assert "URLs are not fetched unless you allow it" in answers[0]["error"]
    assert "an address inside a network" in answers[1]["error"]
    assert "answer" in answers[2] and not answers[2].get("error")


def test_a_key_that_asks_for_another_picture_is_refused() -> None:
    sources = Sources(part_type="image", keys=("path", "image"), max_file_bytes=9)
    assert sources.choose({"type": "image", "path": "a.png", "width": 3}) == ("path", "a.png")
    with pytest.raises(MediaError, match="has crop, which nothing reads"):
        sources.choose({"type": "image", "path": "a.png", "crop": [0, 0, 1, 1]})


def test_a_part_of_a_medium_is_refused_unless_its_reader_honours_the_key() -> None:
    pictures = Sources(part_type="image", keys=("path",), max_file_bytes=9)
    clips = Sources(part_type="audio", keys=("path",), max_file_bytes=9, part_of=("start_seconds", "end_seconds"))
    part = {"path": "a", "start_seconds": 1.0, "end_seconds": 2.0}
    assert clips.choose(part) == ("path", "a")
    with pytest.raises(MediaError, match="has end_seconds, start_seconds, which nothing reads .*; change the file"):
        pictures.choose(part)
    with pytest.raises(
        MediaError, match="has duration, which nothing .*; give start_seconds and end_seconds, or change"
    ):
        clips.choose({"path": "a", "duration": 1})
