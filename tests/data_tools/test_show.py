"""The page of `molora data show`: what it says of a sample is what the processor and the router make of it."""

from __future__ import annotations

import base64
import io
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from molora.data_tools.drawing import curve, decoded, drawn, mapped
from molora.data_tools.opening import open_processor
from molora.data_tools.show import pieces, write_page
from molora.testing import save_backbone
from molora.testing.tiny import byte_tokenizer
from tests.data_tools.planted import clip, image, picture, recipe, row, write

pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    save_backbone(folder / "backbone")
    shown = row("what is <b>on</b> it? é", "noise & more", picture(folder, "shown"))
    heard = row("what is heard?", "a hum", clip(folder, "heard"))
    write(folder / "planted.jsonl", [shown, heard, row("gone?", "a", image("gone.png"))])
    write(folder / "asked.jsonl", [row("asked?", "expected answer")])
    return folder


class Page(HTMLParser):
    """The elements of a page by their class, each with its text, and all attributes that could fetch something."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.sources: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.sources += [(tag, given[key]) for key in ("src", "href") if key in given]
        if tag not in self.VOID:
            self.open.append((tag, given.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts += [(named or tag, data) for tag, named in self.open]

    def of(self, name: str) -> str:
        return "".join(text for each, text in self.texts if each == name)


def test_the_page_shows_what_the_model_gets(home: Path, tmp_path: Path) -> None:
    made = recipe(home)
    write_page(made, tmp_path / "page.html", rows=3, show=False)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:") for _, source in page.sources)
    assert "http" not in re.sub(r'"http-equiv|http-equiv', "", text)

    processor, _ = open_processor(made)
    asked = row("what is <b>on</b> it? é", "noise & more", image(str(home / "shown.png")))
    first = processor.encode(asked["messages"], "0")
    learned = str(processor.tokenizer.decode(first.token_ids_T[first.targets_T].tolist()))
    assert learned == "noise & more<|end|><|endoftext|>"
    assert learned in page.of("learned")
    assert "what is <b>on</b> it? é" in page.of("tokens")
    assert f"{len(first)} tokens of at most 120" in page.of("facts")
    assert "adapter vision" in page.of("facts") and "adapter audio" in page.of("facts")
    assert "vision × 6" in page.of("tokens") and "audio × 3" in page.of("tokens")
    assert "gone.png" in page.of("error")
    assert page.of("expected") == "expected: expected answer"


def test_pictures_and_sounds_of_the_page_are_those_that_were_decoded(home: Path, tmp_path: Path) -> None:
    write_page(recipe(home), tmp_path / "page.html", rows=3, show=False)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    files = [(tag, base64.b64decode(source.partition(",")[2])) for tag, source in page.sources]
    pictures = [np.asarray(Image.open(io.BytesIO(data))) for tag, data in files if tag == "img"]
    np.testing.assert_array_equal(pictures[0], np.asarray(Image.open(home / "shown.png")))
    assert pictures[1].shape == (16, 16, 3)
    (sound,) = [data for tag, data in files if tag == "audio"]
    with wave.open(io.BytesIO(sound)) as played, wave.open(str(home / "heard.wav")) as given:
        assert played.getparams() == given.getparams()
        one, two = (np.frombuffer(file.readframes(10_000), "<i2").astype(int) for file in (played, given))
    assert np.abs(one - two).max() <= 1  # 32,767 steps up, and as many of 32,768 down


def test_tensors_are_drawn_by_their_shape() -> None:
    crops = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).reshape(2, 3, 4, 5)
    shown = [np.asarray(Image.open(io.BytesIO(each.data))) for each in drawn("crops", crops)]
    np.testing.assert_array_equal(np.stack(shown), crops.movedim(1, -1).numpy())
    ramp = torch.linspace(0, 1, 7)[:, None].expand(7, 3)
    (drawing,) = mapped("ramp", ramp)
    colours = np.asarray(Image.open(io.BytesIO(drawing.data)))
    assert colours.shape == (3, 7, 3)
    assert tuple(colours[0, 0]) == (68, 1, 84) and tuple(colours[0, -1]) == (253, 231, 37)
    assert drawn("ramp", ramp) == mapped("crops", crops) == decoded([1.0], None) == [] and curve([1.0]) is None


def test_a_curve_goes_as_far_up_and_down_as_the_samples() -> None:
    samples = torch.zeros(6000)
    samples[3000], samples[4000] = 0.5, -0.25
    points = [tuple(map(float, point.split(","))) for point in (curve(samples) or "").split()]
    assert min(points, key=lambda point: point[1]) == (300, -0.5)
    assert max(points, key=lambda point: point[1]) == (400, 0.25)


def test_a_long_clip_is_played_for_a_minute() -> None:
    (sound,) = decoded(torch.zeros(61 * 100), 100)
    with wave.open(io.BytesIO(sound.data)) as played:
        assert played.getnframes() == 60 * 100
    assert "61.00 s at 100 Hz; the first 60 s" in sound.caption


def test_pieces_of_text_are_those_of_the_whole() -> None:
    """Also where a character is of several tokens, and where spaces begin tokens, as those of SentencePiece."""
    text = "a café, 東京 🙂 end"
    ids = byte_tokenizer()(text)["input_ids"]
    for start in (0, 2):
        found = list(pieces(ids, start, byte_tokenizer()))
        assert "".join(piece for piece, _ in found) == text[start:]
        assert [id for _, some in found for id in some] == ids[start:]
        assert max(len(some) for _, some in found) == 4

    words = Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1, "▁a": 2, "▁time": 3}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    told = PreTrainedTokenizerFast(tokenizer_object=words)
    assert [piece for piece, _ in pieces([0, 1, 2, 3], 0, told)] == ["once", " upon", " a", " time"]
    assert [piece for piece, _ in pieces([0, 1, 2, 3], 2, told)] == [" a", " time"]
