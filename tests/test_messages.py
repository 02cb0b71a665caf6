"""Messages: what is refused and where, and the border formats that become them."""

from __future__ import annotations

from typing import Any

import pytest

from molora.messages import check, from_llava, from_openai, from_sharegpt, media, media_parts, parts

TYPES = {"image": "vision", "audio": "hearing"}
GOOD: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat.", "train": False},
    {"role": "user", "content": [{"type": "audio", "path": "a.wav"}, {"type": "image", "path": "b.png"}]},
    {"role": "assistant", "content": "", "train": None},
]


def test_a_good_conversation_passes_and_shows_its_media_in_order() -> None:
    check(GOOD, TYPES, "row 1")
    assert [(place, part["path"]) for place, part in media_parts(GOOD)] == [
        ("message 1, part 0 (image)", "a.png"),
        ("message 3, part 0 (audio)", "a.wav"),
        ("message 3, part 1 (image)", "b.png"),
    ]
    assert parts(GOOD[0]) == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize(
    "messages, says",
    [
        ([], "row 1: expected a list of at least one message"),
        ("hello", "row 1: expected a list of at least one message, got 'hello'"),
        (["hello"], "row 1: message 0: expected a mapping"),
        ([{"role": "robot", "content": "x"}], "row 1: message 0: role 'robot' is none of system, user, assistant"),
        ([{"content": "x"}], "row 1: message 0: role None"),
        ([{"role": "user"}], "row 1: message 0: content: expected text or a list of parts, got None"),
        ([{"role": "user", "content": 3}], "row 1: message 0: content:"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "row 1: message 0: has tool_calls;"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "train": "no"}], "message 1: train:"),
        ([{"role": "user", "content": ["x"]}], "row 1: message 0, part 0: expected a mapping with a type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0, part 0: text: expected text, got None"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "depth"}]}],
            r"message 0, part 1: no modality answers to parts of type 'depth'; there are text, image \(vision\), "
            r"audio \(hearing\)",
        ),
    ],
)
def test_a_bad_conversation_is_refused_with_its_place(messages: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check(messages, TYPES, "row 1")


def test_keys_that_hold_nothing_are_no_keys() -> None:
    check([{"role": "user", "content": "x", "tool_calls": None, "name": None}], {}, "row 1")


def test_llava_rows() -> None:
    row = {
        "id": "7",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "The tag <image>."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    messages = from_llava(row, "row 7")
    assert messages == [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat is it?"}],
        },
        {"role": "assistant", "content": "The tag <image>."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    check(messages, TYPES, "row 7")
    two = {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image> or <image>?"}]}
    assert [part.get("path", part.get("text")) for part in from_llava(two, "")[0]["content"]] == [
        "a.png",
        " or ",
        "b.png",
        "?",
    ]
    assert from_llava({"conversations": [{"from": "human", "value": "Hi"}]}, "") == [{"role": "user", "content": "Hi"}]


def test_sharegpt_rows_in_both_spellings() -> None:
    expected = [
        {"role": "system", "content": "Listen."},
        {
            "role": "user",
            "content": [
                {"type": "audio", "path": "a.wav"},
                {"type": "text", "text": "and"},
                {"type": "image", "url": "https://x/b.png"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
    ]
    columns = {"audios": ["a.wav"], "images": ["https://x/b.png"], "videos": None}
    texts = ["Listen.", "<audio>and<image>", "Yes."]
    speakers = {"from": ["system", "human", "gpt"], "role": ["system", "user", "assistant"]}
    old = [{"from": who, "value": text} for who, text in zip(speakers["from"], texts, strict=True)]
    new = [{"role": who, "content": text} for who, text in zip(speakers["role"], texts, strict=True)]
    assert from_sharegpt({"conversations": old, **columns}, "") == expected
    assert from_sharegpt({"messages": new, **columns}, "") == expected


@pytest.mark.parametrize(
    "row, says",
    [
        ({"conversations": [{"from": "human", "value": "hi"}], "image": "a"}, "row 3: 0 <image> markers but 1 media"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "row 3: 1 <image> markers but 0 media in 'image'"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "<image>"}], "image": "a"},
            "0 <image> markers but 1 media",
        ),
        ({"conversations": [{"from": "dog", "value": "woof"}]}, "row 3: turn 0: 'dog' is none of system, human"),
        ({"conversations": [{"from": "human", "value": None}]}, "row 3: turn 0: expected text, got None"),
        ({"conversations": []}, "row 3: expected a list of at least one turn"),
        ({}, "row 3: expected a list of at least one turn, got None"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_llava(row, "row 3")


def test_openai_messages() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare."},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                {"type": "image_url", "image_url": "https://x/b.png"},
                {"type": "input_audio", "input_audio": {"data": "BBBB", "format": "wav"}},
                {"type": "audio_url", "audio_url": {"url": "file:///c.wav"}},
            ],
        },
    ]
    converted = from_openai(messages, "request")
    assert converted[0] == messages[0]
    assert converted[1]["content"] == [
        {"type": "text", "text": "Compare."},
        {"type": "image", "base64": "AAAA"},
        {"type": "image", "url": "https://x/b.png"},
        {"type": "audio", "base64": "BBBB"},
        {"type": "audio", "path": "/c.wav"},
    ]
    check(converted, TYPES, "request")
    with pytest.raises(ValueError, match="request: message 0, part 0: image_url.url: expected text, got None"):
        from_openai([{"role": "user", "content": [{"type": "image_url"}]}], "request")


def test_media_of_a_column() -> None:
    picture = object()
    assert media("image", {"bytes": b"x", "path": None}) == {"type": "image", "bytes": b"x"}
    assert media("image", {"bytes": b"x", "path": "a.png"}) == {"type": "image", "bytes": b"x"}
    assert media("audio", {"path": "a.wav", "array": [0.0], "sampling_rate": 8000}) == {
        "type": "audio",
        "array": [0.0],
        "sampling_rate": 8000,
    }
    assert media("image", b"x") == {"type": "image", "bytes": b"x"}
    assert media("image", picture) == {"type": "image", "image": picture}
    assert media("image", "dir/a.png") == {"type": "image", "path": "dir/a.png"}
