from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import sys
import wave
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.report import page as report
from molora.report.page import Example, Media, Report

VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source"}
Row = dict[str, Any]


class Page(HTMLParser):
    """A page as a tree of elements, so that a test sees what a browser would, entities resolved."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.root = ElementTree.Element("page")
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert len(self.open) == 1, f"never closed: {[element.tag for element in self.open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = ElementTree.SubElement(self.open[-1], tag, {key: value or "" for key, value in attrs})
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        closed = self.open.pop()
        assert closed.tag == tag, f"</{tag}> closes <{closed.tag}>"

    def handle_data(self, data: str) -> None:
        if len(self.open[-1]):
            self.open[-1][-1].tail = (self.open[-1][-1].tail or "") + data
        else:
            self.open[-1].text = (self.open[-1].text or "") + data

    def all(self, path: str) -> list[ElementTree.Element]:
        return self.root.findall(f".//{path}")

    def panel(self, title: str) -> ElementTree.Element:
        return next(figure for figure in self.all("figure") if figure.findtext("h3") == title)


def text(element: ElementTree.Element) -> str:
    return "".join(element.itertext()).strip()


def texts(elements: Sequence[ElementTree.Element]) -> list[str]:
    return [text(element) for element in elements]


def curves(panel: ElementTree.Element, series: int) -> list[np.ndarray]:
    """The points (x, y) of each path that the plot draws in the colour of a series."""
    found = []
    for path in panel.findall(".//path"):
        style = path.get("style", "")
        if "clip-path" in path.attrib and f"stroke: var(--series-{series})" in style:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.get("d", ""))]
            found.append(np.array(numbers).reshape(-1, 2))
    return found


def assert_drawn(curve: np.ndarray, steps: Sequence[float], values: Sequence[float]) -> None:
    """Every point is there, and where it is depends linearly on its step and its value, upwards for more."""
    assert len(curve) == len(steps) == len(values)
    for pixels, numbers, sign in ((curve[:, 0], steps, 1), (curve[:, 1], values, -1)):
        slope, offset = np.polyfit(numbers, pixels, 1)
        assert sign * slope > 0
        np.testing.assert_allclose(pixels, slope * np.asarray(numbers) + offset, atol=0.01)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 40).save(buffer, "PNG")
    return buffer.getvalue()


def recording() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return buffer.getvalue()


LOSSES = [2.0, 1.1, 1.6, 0.7, 1.2, 1.9, 0.9, 0.4]
SCORES = [0.25, 0.875, 0.6]


def history() -> list[Row]:
    """Eight steps in two stages, with three evaluations."""
    rows: list[Row] = []
    for step, loss in enumerate(LOSSES, start=1):
        stage = "captions" if step <= 3 else "questions"
        norms = {"gradient_norm/encoders.vision": loss / 3, "gradient_norm/adapters.vision": loss * 2}
        rows.append(
            {"stage": stage, "step": step, "loss/vision": loss, "learning_rate/adapters.vision": 1e-4 / step, **norms}
        )
        if step in (3, 6, 8):
            score = SCORES[(3, 6, 8).index(step)]
            scores = {"easy_vqa/exact_match": score, "easy_vqa/exact_match/yes-no": 1 - score, "easy_vqa/questions": 40}
            rows.append({"stage": stage, "step": step, **scores})
    return rows


def example_report(**changes: Any) -> Report:
    one = Report(
        title="A vision LoRA",
        summary="It looks.",
        metrics={
            "with the picture": {"exact match": 0.95317, "not yes/no": 0.8432, "questions": 9673},
            "without the picture": {"exact match": 0.6012, "questions": 9673, "loss": 2.5},
        },
        goals={("with the picture", "exact match"): 0.9, ("with the picture", "not yes/no"): 0.85},
        examples=[
            Example(
                question="What shape is it?",
                expected="circle",
                answer="circle",
                correct=True,
                adapters=("vision",),
                media=(Media(picture(64, 64), "image/png"), Media(picture(300, 200), "image/png", "from the roof")),
            ),
            Example(
                question="What is said?",
                expected="hello",
                answer="",
                correct=False,
                adapters=("audio", "vision"),
                media=(Media(recording(), "audio/wav", "a greeting"),),
            ),
            Example(question="Who are you?", expected="a model", answer="a poet", correct=False),
        ],
        history=history(),
        facts={"backbone": "12 M parameters", "training": "312 s"},
    )
    return replace(one, **changes)


def written(folder: Path, one: Report) -> tuple[Page, Row]:
    path = report.write(one, folder)
    assert path == folder / "report.html"
    assert sorted(file.name for file in folder.iterdir()) == ["report.html", "report.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    return Page(path.read_text(encoding="utf-8")), figures


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Row, Report]:
    one = example_report()
    return *written(tmp_path_factory.mktemp("report"), one), one


@pytest.fixture
def page(example: tuple[Page, Row, Report]) -> Page:
    return example[0]


def test_the_page_shows_the_figures_of_the_json(example: tuple[Page, Row, Report]) -> None:
    page, figures, one = example
    assert figures["format_version"] == "1.0"
    assert figures["metrics"] == one.metrics
    assert figures["history"] == one.history
    assert figures["facts"] == one.facts

    conditions = texts(page.all("thead//th"))
    shown: dict[str, dict[str, float]] = {condition: {} for condition in conditions}
    for row in page.all("tbody/tr"):
        for condition, cell in zip(conditions, row.findall("td"), strict=True):
            value = cell.find("data")
            if value is None:
                assert text(cell) == "–"
            else:
                shown[condition][text(row.findall("th")[0])] = json.loads(value.attrib["value"])
    assert shown == figures["metrics"]
    assert [row.findtext("td/data") for row in page.all("tbody/tr")] == ["0.953", "0.843", "9,673", "2.500"]
    facts = page.all("section[@id='facts']")[0]
    assert dict(zip(texts(facts.findall(".//dt")), texts(facts.findall(".//dd")), strict=True)) == figures["facts"]


def test_goals_are_met_or_not(tmp_path: Path) -> None:
    page, figures = written(tmp_path, example_report(history=[]))
    assert texts(page.all("td/small")) == ["goal 0.900 ✓ met", "goal 0.850 ✗ not met"]
    assert figures["goals"] == [
        {"condition": "with the picture", "measure": m, "minimum": goal, "value": value, "met": met}
        for m, goal, value, met in (("exact match", 0.9, 0.95317, True), ("not yes/no", 0.85, 0.8432, False))
    ]
    _, figures = written(tmp_path, example_report(goals={("without the picture", "loss"): 2.5}, history=[]))
    assert figures["goals"][0]["met"], "the goal is the least value that will do"


def test_a_goal_without_its_metric_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metric 'exact' of 'with the picture'.*'exact match'"):
        report.write(example_report(goals={("with the picture", "exact"): 0.9}), tmp_path)


def test_a_metric_that_is_not_finite_is_an_error_and_leaves_the_last_report(tmp_path: Path) -> None:
    written(tmp_path, example_report(history=[]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON compliant"):
        report.write(example_report(metrics={"a": {"loss": math.nan}}, goals={}, history=[]), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_right_and_wrong_are_told_in_words(example: tuple[Page, Row, Report]) -> None:
    page, figures, _ = example
    cards = page.all("article")
    assert [text(card.findall("p")[0]) for card in cards] == ["✓ right", "✗ wrong", "✗ wrong"]
    shown = [[text(card.findall("div/div")[0]), *texts(card.findall(".//dd"))] for card in cards]
    assert shown == [
        ["What shape is it?", "circle", "circle", "vision"],
        ["What is said?", "nothing", "hello", "audio, vision"],
        ["Who are you?", "a poet", "a model", "none"],
    ]
    assert "1 of these 3 answers are right" in text(page.all("section[@id='examples']/p")[0])
    keys = ("question", "expected", "answer", "correct", "adapters")
    assert [tuple(example[key] for key in keys) for example in figures["examples"]] == [
        ("What shape is it?", "circle", "circle", True, ["vision"]),
        ("What is said?", "hello", "", False, ["audio", "vision"]),
        ("Who are you?", "a model", "a poet", False, []),
    ]


def test_media_are_in_the_page_and_told_by_hash_in_the_json(example: tuple[Page, Row, Report]) -> None:
    page, figures, one = example
    media = [medium for example in one.examples for medium in example.media]
    shown = [
        figure.find("img") if figure.find("img") is not None else figure.find("audio")
        for figure in page.all("article/figure")
    ]
    assert [element.tag for element in shown if element is not None] == ["img", "img", "audio"]
    for element, medium in zip(shown, media, strict=True):
        assert element is not None
        head, _, data = element.attrib["src"].partition(",")
        assert (head, base64.b64decode(data)) == (f"data:{medium.mime};base64", medium.data)
    assert [(i.get("class"), i.get("width"), i.get("height")) for i in page.all("img")] == [
        ("small", "64", "64"),
        (None, "300", "200"),
    ]
    assert all(image.get("alt") for image in page.all("img"))
    assert "controls" in page.all("audio")[0].attrib
    assert texts(page.all("article/figure/figcaption")) == ["from the roof", "a greeting"]
    assert [medium for example in figures["examples"] for medium in example["media"]] == [
        {"mime": medium.mime, "sha256": hashlib.sha256(medium.data).hexdigest(), "caption": medium.caption}
        for medium in media
    ]


def test_media_that_cannot_be_shown_are_an_error(tmp_path: Path) -> None:
    example = Example(question="?", expected="", answer="", correct=False, media=(Media(b"1,2", "text/csv"),))
    with pytest.raises(ValueError, match=r"shows image/… and audio/…, not 'text/csv'"):
        report.write(example_report(examples=[example]), tmp_path)
    assert not list(tmp_path.iterdir())


def report_saying(words: str) -> Report:
    """A report with the words in every text that it has."""

    def say(place: str) -> str:
        return f"{place} {words}"

    example = Example(
        question=say("question"),
        expected=say("expected"),
        answer=say("answer"),
        correct=True,
        adapters=(say("adapter"),),
        media=(Media(picture(8, 8), "image/png", say("caption")),),
    )
    rows = [{"stage": f"<b> & $x$ {step // 10}", "step": step, f"loss/{say('group')}": 1.0} for step in range(20)]
    return Report(
        title=say("title"),
        summary=say("summary"),
        metrics={say("condition"): {say("measure"): 0.5}},
        examples=[example],
        history=rows,
        facts={say("fact"): say("value")},
    )


def test_text_stays_text(tmp_path: Path) -> None:
    nasty = """<b>$x$</b> &amp; <script>alert("1")</script> 'quoted' {{ 7 * 7 }} </style></title>"""
    plain, _ = written(tmp_path / "plain", report_saying("harmless"))
    page, figures = written(tmp_path / "nasty", report_saying(nasty))
    assert [element.tag for element in page.root.iter()] == [element.tag for element in plain.root.iter()]
    assert text(page.root) == text(plain.root).replace("harmless", nasty)
    assert page.all("img")[0].get("alt") == f"caption {nasty}"
    assert {"<b> & $x$ 0", "<b> & $x$ 1"} <= set(texts(page.panel("Loss").findall(".//text")))
    assert figures["title"] == f"title {nasty}"
    assert figures["examples"][0]["question"] == f"question {nasty}"


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page, _ = written(tmp_path, example_report())
    elements = list(page.root.iter())
    assert {element.tag for element in elements}.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    ids = [element.attrib["id"] for element in elements if "id" in element.attrib]
    assert len(ids) == len(set(ids)), "an id is used twice"
    targets = [e.attrib[key] for e in elements for key in ("src", "href", "xlink:href", "srcset") if key in e.attrib]
    in_styles = re.findall(r"url\((.*?)\)", (tmp_path / "report.html").read_text(encoding="utf-8"))
    for target in targets + in_styles:
        assert target.startswith("data:") or target.removeprefix("#") in ids, f"{target:.80} is not in the page"
    assert "@import" not in text(page.all("style")[0])
    assert not any(key.startswith("on") for element in elements for key in element.attrib), "an event handler"
    policy = next(meta.attrib["content"] for meta in page.all("meta") if "http-equiv" in meta.attrib)
    assert policy.startswith("default-src 'none'") and "script" not in policy


def test_every_colour_of_a_plot_follows_the_scheme(page: Page) -> None:
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block))
        for block in re.findall(r":root {(.*?)}", text(page.all("style")[0]), re.S)
    )
    assert dark == light
    svgs = page.all("figure/svg")
    assert len(svgs) == 4
    for svg in svgs:
        drawn = ElementTree.tostring(svg, encoding="unicode")
        assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) <= light
        assert not re.findall(r"#[0-9a-f]{6}\b", drawn), "a colour that one of the schemes may hide"
        for label in svg.findall(".//text"):
            assert "fill: var(--muted)" in label.get("style", "")


def test_curves_go_through_the_points(page: Page) -> None:
    loss = page.panel("Loss")
    first, second = curves(loss, 0)
    assert_drawn(first, [1, 2, 3], LOSSES[:3])
    assert_drawn(second, [4, 5, 6, 7, 8], LOSSES[3:])
    assert_drawn(np.concatenate([first, second]), range(1, 9), LOSSES)

    match = page.panel("Exact match")
    assert_drawn(curves(match, 0)[0], [3, 6, 8], SCORES)
    assert_drawn(curves(match, 1)[0], [3, 6, 8], [1 - score for score in SCORES])
    assert_drawn(
        np.concatenate([curves(match, 0)[0], curves(match, 1)[0]]), [3, 6, 8] * 2, SCORES + [1 - s for s in SCORES]
    )

    # These span more than a decade, so their axis is logarithmic.
    gradients = page.panel("Gradient norm, before clipping")
    norms = np.concatenate([*curves(gradients, 0), *curves(gradients, 1)])
    assert_drawn(norms, [*range(1, 9)] * 2, [*(math.log(x / 3) for x in LOSSES), *(math.log(2 * x) for x in LOSSES)])
    assert_drawn(curves(page.panel("Learning rate"), 0)[0], range(1, 9), [1e-4 / step for step in range(1, 9)])


def test_stages_are_marked(page: Page) -> None:
    assert texts(page.all("ol/li")) == ["captions: steps 1 to 3", "questions: steps 4 to 8"]
    for panel in page.all("figure[@class='card panel']"):
        assert {"captions", "questions", "step"} <= set(texts(panel.findall(".//text")))
    loss = page.panel("Loss")
    boundary = [
        p for p in loss.findall(".//path") if "clip-path" in p.attrib and "stroke: var(--muted)" in p.get("style", "")
    ]
    assert len(boundary) == 1
    x = float(re.findall(r"[\d.]+", boundary[0].attrib["d"])[0])
    assert x == pytest.approx(curves(loss, 0)[0][2, 0], abs=0.01), "the first stage ends at its last step"


def test_legends_name_every_curve_with_its_last_value(example: tuple[Page, Row, Report]) -> None:
    page, figures, _ = example

    def legend(title: str) -> dict[str, float]:
        entries = page.panel(title).findall("ul/li")
        return {text(entry).rpartition(" ")[0]: float(entry.findall("data")[0].attrib["value"]) for entry in entries}

    def last(key: str) -> float:
        return [row[key] for row in figures["history"] if key in row][-1]

    assert legend("Loss") == {"vision": last("loss/vision")}
    assert legend("Exact match") == {
        "easy_vqa": last("easy_vqa/exact_match"),
        "easy_vqa/yes-no": last("easy_vqa/exact_match/yes-no"),
    }
    assert legend("Gradient norm, before clipping") == {
        part: last(f"gradient_norm/{part}") for part in ("encoders.vision", "adapters.vision")
    }
    assert legend("Learning rate") == {"adapters.vision": last("learning_rate/adapters.vision")}


def test_curves_differ_in_more_than_colour(tmp_path: Path) -> None:
    rows = [{"stage": "s", "step": n, **{f"loss/{group}": n + group for group in range(4)}} for n in (1, 2)]
    page, _ = written(tmp_path, example_report(history=rows))
    dashes = [path.get("stroke-dasharray") for path in page.panel("Loss").findall("ul//path")]
    assert len(set(dashes)) == 4
    for index, dash in enumerate(dashes):
        (drawn,) = (
            p for p in page.panel("Loss").findall(".//path[@clip-path]") if f"--series-{index})" in p.get("style", "")
        )
        shown = re.search(r"stroke-dasharray: ([\d., ]+)", drawn.get("style", ""))
        assert (shown[1].replace(",", " ").split() if shown else ["none"]) == (dash or "").split()


def test_noisy_curves_are_smoothed_within_a_stage_with_the_raw_line_behind(tmp_path: Path) -> None:
    values = [1.5 + (-1) ** step * 0.5 for step in range(80)] + [7.5 + (-1) ** step * 0.5 for step in range(80)]
    rows = [{"stage": "ab"[n >= 80], "step": n, "loss/vision": value} for n, value in enumerate(values)]
    page, _ = written(tmp_path, example_report(history=rows))
    loss = page.panel("Loss")
    paths = [p for p in loss.findall(".//path[@clip-path]") if "--series-0)" in p.get("style", "")]
    assert ["stroke-opacity" in p.get("style", "") for p in paths] == [True, False, True, False]
    raw, smooth, later_raw, later_smooth = curves(loss, 0)
    assert_drawn(raw, range(80), values[:80])
    assert_drawn(later_raw, range(80, 160), values[80:])
    for behind, strong in ((raw, smooth), (later_raw, later_smooth)):
        noise = np.ptp(behind[:, 1])
        assert np.ptp(strong[:, 1]) < 0.5 * noise
        assert strong[:, 1].min() >= behind[:, 1].min() and strong[:, 1].max() <= behind[:, 1].max()


def test_the_smooth_line_is_a_running_mean() -> None:
    values = np.random.default_rng(0).normal(size=200)
    smooth = report._smoothed(list(values))
    np.testing.assert_allclose(smooth[5:-5], np.convolve(values, np.ones(11) / 11, mode="valid"))
    np.testing.assert_allclose(
        [smooth[0], smooth[2], smooth[-1]], [values[:6].mean(), values[:8].mean(), values[-6:].mean()]
    )


def test_a_report_without_a_history_has_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page, figures = written(tmp_path, example_report(history=[]))
    assert not page.all("figure/svg")
    assert "No training is on record" in text(page.all("section[@id='training']")[0])
    assert figures["history"] == []
    with pytest.raises(ImportError, match=r"pip install 'molora\[demo\]'"):
        report.write(example_report(), tmp_path)


def test_a_report_of_next_to_nothing(tmp_path: Path) -> None:
    page, _ = written(tmp_path, Report(title="Nothing yet", summary="", metrics={}))
    assert [section.get("id") for section in page.all("section")] == ["training"]
    assert texts(page.all("h1")) == ["Nothing yet"]


@pytest.mark.filterwarnings("error")
def test_plots_stand_what_a_history_may_hold(tmp_path: Path) -> None:
    no_evaluations = [{k: v for k, v in row.items() if "exact_match" not in k} for row in history()]
    page, _ = written(tmp_path, example_report(history=no_evaluations))
    assert [panel.findtext("h3") for panel in page.all("figure[@class='card panel']")] == [
        "Loss",
        "Gradient norm, before clipping",
        "Learning rate",
    ]
    one_step = [{"stage": "s", "step": 1, "loss/text": 0.0, "gradient_norm/p": None}]
    page, _ = written(tmp_path, example_report(history=one_step))
    assert [panel.findtext("h3") for panel in page.all("figure[@class='card panel']")] == ["Loss"]
    dots = [use for use in page.panel("Loss").findall(".//use") if "--series-0)" in use.get("style", "")]
    assert len(dots) == 1, "a single point is drawn as a dot"

    gaps: list[Row] = [{"stage": "s", "step": n} for n in range(6)]
    for n, value in ((1, 3.0), (3, 0.5), (4, 2.0)):
        gaps[n]["loss/text"] = value
    page, _ = written(tmp_path, example_report(history=gaps))
    assert_drawn(curves(page.panel("Loss"), 0)[0], [1, 3, 4], [3.0, 0.5, 2.0])


def test_what_a_router_decided_is_drawn(tmp_path: Path) -> None:
    shares = [0.5, 0.75, 0.875]
    rows: list[Row] = [
        {"stage": "s", "step": n, "routing/a+b/a": share, "routing/a+b/b": 1 - share} for n, share in enumerate(shares)
    ]
    page, _ = written(tmp_path, example_report(history=rows))
    (panel,) = page.all("figure[@class='card panel']")
    assert panel.findtext("h3") == "Weight of an adapter, as routed"
    assert_drawn(curves(panel, 0)[0], [0, 1, 2], shares)


def test_a_report_is_written_the_same_twice(tmp_path: Path) -> None:
    one = example_report()
    report.write(one, tmp_path / "a")
    report.write(one, tmp_path / "b")
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_history_is_read_as_it_was_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in history()))
    assert report.read_history(path) == history()
    path.write_text(json.dumps({"stage": "s", "step": 1, "gradient_norm/p": math.inf, "loss/text": math.nan}))
    (row,) = report.read_history(path)
    assert row == {"stage": "s", "step": 1, "gradient_norm/p": None, "loss/text": None}
    _, figures = written(tmp_path / "report", example_report(history=[row]))
    assert figures["history"] == [row]


@pytest.mark.parametrize("line", ['{"stage": "s", "st', "[1]", '{"step": 3}'])
def test_a_line_that_is_not_a_row_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "s", "step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        report.read_history(path)
