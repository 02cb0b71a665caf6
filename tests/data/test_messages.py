"""Messages: what is refused and where, and the border formats that become them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from molora.data.messages import check, conversation, media, media_list, media_parts, parts, rooted
from molora.modality import MediaError

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
    messages = conversation(row, "row 7")
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
    assert [part.get("path", part.get("text")) for part in conversation(two, "")[0]["content"]] == [
        "a.png",
        " or ",
        "b.png",
        "?",
    ]
    assert conversation({"conversations": [{"from": "human", "value": "Hi"}]}, "") == [
        {"role": "user", "content": "Hi"}
    ]


@pytest.mark.parametrize("columns", [("images", "audios", "videos"), ("image", "audio", "video")])
def test_media_columns_beside_turns_in_both_spellings(columns: tuple[str, str, str]) -> None:
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
    media = dict(zip(columns, (["https://x/b.png"], ["a.wav"], None), strict=True))
    texts = ["Listen.", "<audio>and<image>", "Yes."]
    speakers = {"from": ["system", "human", "gpt"], "role": ["system", "user", "assistant"]}
    old = [{"from": who, "value": text} for who, text in zip(speakers["from"], texts, strict=True)]
    new = [{"role": who, "content": text} for who, text in zip(speakers["role"], texts, strict=True)]
    assert conversation({"conversations": old, **media}, "") == expected
    assert conversation({"messages": new, **media}, "") == expected
    assert conversation({"messages": new[1:], "system": "Listen.", **media}, "") == expected
    places = [{"type": "audio"}, {"type": "text", "text": "and", "image": None}, {"type": "image", "text": None}]
    assert conversation({"messages": [new[0], {"role": "user", "content": places}, new[2]], **media}, "") == expected


ASKED = {"from": "human", "value": "hi"}


@pytest.mark.parametrize(
    "row, says",
    [
        ({"conversations": [ASKED], "image": "a"}, "row 3: 0 places for media of type image but 1 media in 'image'"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}]},
            "1 places for media of type image but no column 'image'",
        ),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": None}, "1 places .* 0 media in 'images'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "1 places for media of type audio"),
        ({"conversations": [ASKED, {"from": "gpt", "value": "<image>"}], "image": "a"}, "0 places .* but 1 media"),
        ({"conversations": [ASKED], "image": "a", "images": ["a"]}, "has both 'image' and 'images'; leave one out"),
        (
            {"conversations": [{"from": "dog", "value": "woof"}]},
            "row 3: message 0: role 'dog' is none of system, human",
        ),
        ({"conversations": [{"from": ["dog"], "value": "woof"}]}, "row 3: message 0: role"),
        (
            {"conversations": [{"from": "human", "value": None}]},
            "message 0: expected 'content' or 'value', found value is null",
        ),
        ({"conversations": [{**ASKED, "role": "user"}]}, "message 0: expected 'role' or 'from', found role and from"),
        ({"conversations": [[ASKED]]}, "row 3: message 0: expected a mapping with role and content"),
        ({"conversations": []}, "row 3: conversations: expected a list of at least one turn"),
        ({"messages": "hello"}, "row 3: messages: expected a list of at least one turn, got 'hello'"),
        ({"messages": {"0": "x"}}, "row 3: messages: expected a list of at least one turn"),
        ({"messages": None, "prompt": "x"}, "row 3: neither 'messages' nor 'conversations'"),
        ({"messages": [ASKED], "conversations": [ASKED]}, "row 3: has both 'messages' and 'conversations'"),
        ({"messages": [{"role": "user", "content": ["a", "b"]}]}, "message 0, part 0: expected a mapping with a type"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "message 0: content: expected text or a list of parts"),
        ({"messages": [{**ASKED, "name": "Bob"}]}, "row 3: message 0: has name;"),
        ({"conversations": [{**ASKED, "emotion": "glad"}]}, "row 3: message 0: has emotion;"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "path": "a"}]}]}, "it has path"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a", "text": "x"}]}]}, "has no text"),
        ({"messages": [ASKED], "system": ["x"]}, "row 3: system: expected text"),
        ({"messages": [ASKED], "system": []}, "row 3: system: expected text, got \\[\\]"),
        ({"messages": [ASKED], "system": {}}, "row 3: system: expected text, got {}"),
        ({"messages": [ASKED], "system": 0}, "row 3: system: expected text, got 0"),
        ({"messages": [{"role": "system", "content": "x"}, ASKED], "system": "y"}, "a column 'system' and begins with"),
        ({"messages": [ASKED], "tools": [{"name": "f"}]}, "row 3: the column 'tools' would change what is told"),
        ({"messages": [ASKED], "rejected": "no"}, "the column 'rejected'"),
        ({"messages": [ASKED], "history": [ASKED]}, "the column 'history'"),
        ({"messages": [ASKED], "image_path": "a.png"}, "row 3: the column 'image_path' is not read, .* has no media"),
        ({"messages": [ASKED], "wavs": ["a.wav"]}, "the column 'wavs' is not read"),
        ([], "row 3: expected an object, found list"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        conversation(row, "row 3")


def test_columns_about_the_row_stay_out_of_the_way() -> None:
    about = {"id": 3, "source": "web", "score": 0.5, "tools": [], "functions": None, "image_id": "x", "image_url": ""}
    asked = [{"role": "user", "content": "What does <image> do in HTML?"}]
    assert conversation({"messages": asked, **about, "prompt": "What?", "label": True}, "") == asked
    shown = {"images": ["a.png"], "image_url": "https://x/a.png", "messages": [{"role": "user", "content": "<image>"}]}
    assert conversation(shown, "")[0]["content"] == [{"type": "image", "path": "a.png"}]


@pytest.mark.parametrize("word", ["train", "training", "loss", "weight"])
@pytest.mark.parametrize("columns", [{}, {"images": ["a.png"]}, {"images": None}])
@pytest.mark.parametrize("turns", ["messages", "conversations"])
def test_what_is_not_to_be_learned_is_so_in_every_format(word: str, columns: dict[str, Any], turns: str) -> None:
    who, what = ("role", "content") if turns == "messages" else ("from", "value")
    asked = {who: "user", what: "<image>?" if columns.get("images") else "?", word: False}
    for said, meant in ((False, False), (0, False), (True, True), (1, True), (None, None)):
        row = {turns: [asked, {who: "assistant", what: "x", word: said}], **columns}
        assert conversation(row, "")[1].get("train") is meant
    for said in (0.5, 2, "false", [0], -1):
        with pytest.raises(ValueError, match=rf"row 3: message 1: {word}: .*; a turn is learned \(true, 1\) or not"):
            conversation({turns: [asked, {who: "assistant", what: "x", word: said}], **columns}, "row 3")
    with pytest.raises(ValueError, match="message 0: train: only what an assistant says is learned"):
        conversation({turns: [{**asked, word: True}], **columns}, "row 3")
    with pytest.raises(ValueError, match="contradict each other"):
        conversation({turns: [{**asked, "train": False, "loss": 1}], **columns}, "row 3")


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
    converted = conversation({"messages": messages}, "request")
    assert converted[0] == messages[0]
    assert converted[1]["content"] == [
        {"type": "text", "text": "Compare."},
        {"type": "image", "base64": "AAAA"},
        {"type": "image", "url": "https://x/b.png"},
        {"type": "audio", "base64": "BBBB"},
        {"type": "audio", "path": "file:///c.wav"},
    ]
    check(converted, TYPES, "request")
    with pytest.raises(ValueError, match="request: message 0, part 0: image_url.url: expected text, got None"):
        conversation({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "request")


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(60)).decode()


@pytest.mark.parametrize(
    "value, part",
    [
        ("dir/a.png", {"path": "dir/a.png"}),
        ("/9j/a.jpg", {"path": "/9j/a.jpg"}),
        ("HTTPS://x/b.png", {"url": "HTTPS://x/b.png"}),
        ("data:image/png;base64,AAAA", {"base64": "AAAA"}),
        ("data:image/svg+xml,<svg>", {"url": "data:image/svg+xml,<svg>"}),
        ("data:image/png;base64,AA%2BA", {"url": "data:image/png;base64,AA%2BA"}),
        (PNG, {"base64": PNG}),
        ("A" * 5000, {"base64": "A" * 5000}),
        ("A." * 5000, {"path": "A." * 5000}),
        (b"x", {"bytes": b"x"}),
        ({"bytes": b"x", "path": "a.png"}, {"bytes": b"x"}),
        ({"bytes": None, "path": "a.png"}, {"path": "a.png"}),
        ({"array": [0.0], "sampling_rate": 8, "path": "a.wav"}, {"array": [0.0], "sampling_rate": 8}),
    ],
)
def test_what_a_column_may_hold(value: Any, part: dict[str, Any]) -> None:
    assert media("image", value) == {"type": "image", **part}


def test_a_column_holds_one_medium_or_a_list_or_nothing() -> None:
    assert [part["path"] for part in media_list("image", ["a", None, "b", ""])] == ["a", "b"]
    assert media_list("image", None) == media_list("image", "") == media_list("image", []) == []


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


def path_of(part: dict[str, Any], folder: Path | None, bound: Path | None = None) -> Any:
    """Where a part's file is once its paths are rooted: the key and the path."""
    (message,) = rooted([{"role": "user", "content": [{"type": "image", **part}]}], folder, bound, "row 3")
    (found,) = [(key, value) for key, value in message["content"][0].items() if key != "type"]
    return found


@pytest.mark.parametrize(
    "part, found",
    [
        ({"path": "a b.png"}, ("path", "/d/a b.png")),
        ({"path": Path("a.png")}, ("path", "/d/a.png")),
        ({"path": "/e/a.png"}, ("path", "/e/a.png")),
        ({"image": "a.png"}, ("image", "/d/a.png")),
        ({"url": "a.png"}, ("path", "/d/a.png")),
        ({"path": "file:///e/a%20b%C3%A4.png"}, ("path", "/e/a bä.png")),
        ({"path": "file:///e/a#1?.png"}, ("path", "/e/a#1?.png")),
        ({"url": "FILE://localhost/e/a.png"}, ("path", "/e/a.png")),
        ({"image": "file:/e/a.png"}, ("image", "/e/a.png")),
        ({"path": "~/a.png"}, ("path", "/home/of/me/a.png")),
        ({"path": "100%25.png"}, ("path", "/d/100%25.png")),
        ({"path": "https://x/a.png"}, ("url", "https://x/a.png")),
        ({"path": "data:image/png;base64,AAAA"}, ("base64", "AAAA")),
        ({"url": "https://x/a.png"}, ("url", "https://x/a.png")),
        ({"image": "https://x/a.png"}, ("image", "https://x/a.png")),
        ({"image": {"bytes": b"x", "path": "a.png"}}, ("image", {"bytes": b"x", "path": "a.png"})),
        ({"base64": "AAAA"}, ("base64", "AAAA")),
    ],
)
def test_a_path_means_one_thing_under_every_key(
    part: dict[str, Any], found: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/me")
    assert path_of(part, Path("/d")) == found


def test_a_bound_holds_paths_inside_with_links_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "media", tmp_path / "other"
    inside.mkdir()
    outside.mkdir()
    (inside / "a.png").touch()
    (inside / "in").symlink_to("a.png")
    (inside / "out").symlink_to(outside)
    real = str((inside / "a.png").resolve())
    for path in ("a.png", "in", "x/../a.png", real, f"file://{real}", str(inside / "in")):
        for key in ("path", "image", "url"):
            assert path_of({key: path}, tmp_path, inside)[1] == real
    for path in ("../other/x", "out/x", str(outside), f"file://{outside}/x", "~/x", "/", "..", "a/../../x", "in\0"):
        for key in ("path", "image", "url"):
            with pytest.raises(MediaError, match=r"row 3: message 0, part 0 \(image\): "):
                path_of({key: path}, tmp_path, inside)


@pytest.mark.parametrize("path", ["file://server/a.png", "file://a.png", "file:"])
def test_a_file_of_another_machine_is_refused(path: str) -> None:
    with pytest.raises(MediaError, match=r"row 3: message 0, part 0 \(image\): .* is no local file"):
        path_of({"path": path}, Path("/d"))


@pytest.mark.parametrize("other", ["url", "image"])
def test_a_part_that_names_two_media_is_refused(tmp_path: Path, other: str) -> None:
    part = {"type": "image", "path": "a.png", other: "b.png"}
    with pytest.raises(MediaError, match=f"row 4: message 0, part 0 .image.: has path and {other}"):
        rooted([{"role": "user", "content": [part]}], tmp_path, None, "row 4")


def test_a_turn_whose_content_is_null_is_told_so() -> None:
    with pytest.raises(ValueError, match="expected 'content' or 'value', found content is null"):
        conversation({"messages": [{"role": "user", "content": None}]}, "row 4")


def test_parts_of_openais_responses_are_read() -> None:
    content = [{"type": "input_text", "text": "what?"}, {"type": "input_image", "image_url": "https://x/a.png"}]
    (message,) = conversation({"messages": [{"role": "user", "content": content}]}, "request")
    assert message["content"] == [{"type": "text", "text": "what?"}, {"type": "image", "url": "https://x/a.png"}]
