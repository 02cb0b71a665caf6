"""Sources of content parts, beyond what pictures and clips show: values of the wrong kind, and limits."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import pytest

from molora.encoders.media import Sources
from molora.modality import MediaError


def sources(**options: Any) -> Sources:
    keys = ("path", "url", "base64", "bytes", "smell", "array")
    defaults = {"part_type": "smell", "noun": "scent", "keys": keys, "max_file_bytes": 10, "allow_urls": True}
    return Sources(**{**defaults, "media_root": None, **options})


def read(part: dict[str, Any], **options: Any) -> bytes:
    of = pickle.loads(pickle.dumps(sources(**options)))
    key, value = of.choose(part)
    with of.named(key, value):
        return of.read(key, value)


def test_one_file_is_the_same_bytes_however_it_is_given(tmp_path: Path):
    path = tmp_path / "rose"
    path.write_bytes(b"rose")
    text = base64.b64encode(b"rose").decode()
    values: list[Any] = [
        path,
        str(path),
        b"rose",
        bytearray(b"rose"),
        memoryview(b"rose"),
        f"data:smell/x;base64,{text}",
    ]
    for value in values:
        assert read({"smell": value}) == b"rose"
    for part in ({"path": path}, {"bytes": bytearray(b"rose")}, {"base64": text}, {"path": "rose", "url": None}):
        assert read(part, media_root=str(tmp_path)) == b"rose"


@pytest.mark.parametrize("size", [10, 11])
def test_the_limit_of_size_holds_for_every_source(tmp_path: Path, size: int):
    data = bytes(size)
    (tmp_path / "a").write_bytes(data)
    for part in ({"path": tmp_path / "a"}, {"bytes": data}, {"base64": base64.b64encode(data).decode()}):
        if size == 10:
            assert read(part) == data
        else:
            with pytest.raises(MediaError, match="is over 10 bytes; shrink it"):
                read(part)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, "an smell part needs exactly one of path, url"),
        ({"path": 3}, "smell part, path '3': is given as str or PathLike, not int"),
        ({"url": 3}, "smell part, url '3': is given as str, not int"),
        ({"base64": b"AAAA"}, "smell part, base64 of 4 bytes: is given as str, not bytes"),
        ({"bytes": "AAAA"}, "bytes of 4 characters: is given as bytes or bytearray or memoryview, not str"),
        ({"path": "a\0b"}, "embedded null byte .*; check the path and media_root"),
        ({"path": "a" * 300}, "File name too long .*; check the path and media_root"),
        ({"base64": "data:smell/x,abc"}, "a data URI holds a scent as data:smell/...;base64,..."),
    ],
)
def test_parts_that_give_no_bytes(part: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(MediaError, match=message):
        read(part)
    with pytest.raises(MediaError, match=message):
        read(part, media_root=str(tmp_path))


def test_what_is_no_file_is_left_to_the_medium():
    assert sources().choose({"smell": 3}) == ("smell", 3)
    assert sources().choose({"array": [1.0], "path": None}) == ("array", [1.0])
    with pytest.raises(MediaError, match="allow_urls is off; download the scent"):
        read({"smell": "https://example.org/rose"}, allow_urls=False)
