"""Questions asked without what they are about: what goes, what stays, and what stands in its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molora.config import ConfigError, build
from molora.data.processor import Processor
from molora.data.sources import SourceConfig
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.vision import Vision, VisionConfig
from molora.evaluate.blind import Media, blanking, took_place
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.questions import question
from molora.inference.load import LoadedModel
from molora.modality import HasBlank
from molora.pack import Sample
from molora.testing import Numbers, NumbersConfig, byte_tokenizer

DATA = {"kind": "messages", "options": {"path": "rows.jsonl"}}


def rows(*pictures: str, sound: str | None = None) -> Any:
    """Rows with a picture each, and a sound each if there is one; a list is source enough."""
    return [
        {
            "id": str(index),
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "path": picture},
                        *([] if sound is None else [{"type": "audio", "path": f"{index}{sound}"}]),
                        {"type": "text", "text": f"what {index}?"},
                    ],
                },
                {"role": "assistant", "content": "this"},
            ],
        }
        for index, picture in enumerate(pictures)
    ]


def asked(source: Any, index: int, media: Media) -> list[tuple[str, str]]:
    """The parts that a row asks: their types, and paths or texts."""
    content = question(source, index, media).prompt[0]["content"]
    return [(part["type"], part.get("path") or part.get("text")) for part in content]


def test_shuffled_pictures_are_those_of_other_rows_and_never_the_rows_own() -> None:
    names = [f"{index // 3}.png" for index in range(300)]  # three questions about each
    source = rows(*names)
    drawn = [asked(source, index, "shuffled") for index in range(300)]
    for index, parts in enumerate(drawn):
        assert parts[1:] == asked(source, index, "as is")[1:], "the text stays"
        assert parts[0][0] == "image" and parts[0][1] in names and parts[0][1] != names[index]
    assert drawn == [asked(source, index, "shuffled") for index in range(300)], "the same in every run"
    assert len({parts[0][1] for parts in drawn}) > 60, "drawn from all over the source"


def test_a_medium_is_the_rows_own_by_what_it_holds() -> None:
    source = rows("", "", "")
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    for row, picture in zip(source, (pixels, pixels.copy(), pixels + 1), strict=True):
        row["messages"][0]["content"][0] = {"type": "image", "image": Image.fromarray(picture)}
    found = question(source, 0, "shuffled").prompt[0]["content"][0]
    assert found is source[2]["messages"][0]["content"][0]


def test_where_there_is_no_other_medium_the_row_says_so() -> None:
    with pytest.raises(ValueError, match="row 2: media: shuffled needs another medium of type 'image', and 3 rows"):
        question(rows("a.png", "a.png", "a.png"), 1, "shuffled")


def test_each_part_type_has_its_own_treatment() -> None:
    source = rows("a.png", "b.png", sound=".wav")
    text, sound = ("text", "what 0?"), ("audio", "0.wav")
    assert asked(source, 0, "none") == [text]
    assert asked(source, 0, {"image": "none"}) == [sound, text]
    assert asked(source, 0, {"image": "shuffled"}) == [("image", "b.png"), sound, text]
    assert asked(source, 0, {"audio": "shuffled"}) == [("image", "a.png"), ("audio", "1.wav"), text]
    assert asked(source, 0, "blank") == asked(source, 0, "as is"), "what is blank is so when it is decoded"


def test_blank_pictures_are_grey_and_blank_sounds_silent_with_as_many_tokens() -> None:
    vision = Vision("vision", VisionConfig(crop_pixels=32, max_crops=4, pool=1, tower=tower()))
    audio = Audio("audio", AudioConfig())
    modalities: Any = {"vision": vision, "audio": audio}
    loaded = model_with(modalities)
    noise = np.random.default_rng(0)
    content = [
        {"type": "image", "image": Image.fromarray(noise.integers(0, 255, (40, 70, 3), dtype=np.uint8))},
        {"type": "audio", "array": noise.normal(0, 0.1, 9000).astype(np.float32), "sampling_rate": 16_000},
        {"type": "text", "text": "what?"},
    ]
    messages = [{"role": "user", "content": content}]
    seen = loaded.encode(messages)
    blank = blanking(loaded, "blank", "media").encode(messages)
    assert torch.equal(blank.modality_ids_T, seen.modality_ids_T) and torch.equal(blank.token_ids_T, seen.token_ids_T)
    pixels = blank.items[0].prepared.tensors["crops_BCHW"]
    assert sorted(pixels.unique().tolist()) == [128, 255], "grey, and the white that fills the crops"
    assert features(seen).any() and not features(blank).any()
    half = blanking(loaded, {"image": "blank"}, "media").encode(messages)
    assert torch.equal(half.items[0].prepared.tensors["crops_BCHW"], pixels)
    assert torch.equal(features(half), features(seen))
    assert blanking(loaded, "as is", "media") is loaded
    assert torch.equal(loaded.encode(messages).items[1].prepared.tensors["features_SM"], features(seen))


def features(sample: Sample) -> torch.Tensor:
    return sample.items[1].prepared.tensors["features_SM"]


def model_with(modalities: Any) -> LoadedModel:
    """What encodes questions for some modalities; no network is asked."""
    network: Any = None
    return LoadedModel(network, Processor(byte_tokenizer(), modalities, lambda names: sorted(names), 10_000))


def tower() -> Any:
    from molora.encoders.vision_towers.tower import TowerConfig

    return TowerConfig(kind="convit", pretrained=False)


def test_a_modality_without_a_blank_item_is_named_before_anything_is_asked() -> None:
    numbers = Numbers("numbers", NumbersConfig())
    assert not isinstance(numbers, HasBlank)
    modalities: Any = {"numbers": numbers}
    loaded = model_with(modalities)
    with pytest.raises(ConfigError, match=r"media: blank: modality 'numbers' has no blank item.*blank\(item\)"):
        blanking(loaded, "blank", "media")
    assert blanking(loaded, {"numbers": "shuffled"}, "media") is loaded
    with pytest.raises(ConfigError, match="media: the model reads no 'number', its modalities have numbers; did you"):
        blanking(loaded, {"number": "blank"}, "media")


def test_a_baseline_that_blinds_nothing_is_told() -> None:
    asked = [[{"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what?"}]}]]
    text: Any = [[{"role": "user", "content": "what?"}]]
    for media in ("blank", "shuffled", {"image": "blank", "audio": "as is"}):
        assert took_place(media, [*text, *asked]) and not took_place(media, text)
    assert not took_place({"audio": "blank"}, asked)
    assert took_place("none", text) and took_place("as is", text)


def test_a_list_of_media_is_the_evaluation_and_its_baselines() -> None:
    config = build(EvaluationConfig, {"data": DATA, "media": ["as is", "none", {"image": "blank"}]}, "test")
    each = config.each("test")
    assert {name: one.media for name, one in each.items()} == {
        "test": "as is",
        "test (none)": "none",
        "test (image blank)": {"image": "blank"},
    }
    with pytest.raises(ConfigError, match="media: none, none; name one or more, each once"):
        EvaluationConfig(data=SourceConfig(kind="messages"), media=["none", "none"])
    for wrong in ("gray", {"image": "gray"}, ["as is", "gray"]):
        with pytest.raises(ConfigError, match="test: media: 'gray' is none of as is, none, blank, shuffled"):
            build(EvaluationConfig, {"data": DATA, "media": wrong}, "test")
    with pytest.raises(ConfigError, match="media: text stays as it is"):
        build(EvaluationConfig, {"data": DATA, "media": {"text": "none"}}, "test")


def test_an_older_recipe_without_media_is_read_and_told_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert build(EvaluationConfig, {"data": DATA, "without_media": True}, "test").media == "none"
    assert "write media: none" in " ".join(capsys.readouterr().err.split())
    assert build(EvaluationConfig, {"data": DATA, "without_media": False}, "test").media == "as is"
    assert capsys.readouterr().err == ""
