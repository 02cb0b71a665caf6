"""The page of an evaluation: every question is on it, errors first, and a browser shows it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import wave
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from molora.data.sources import SourceConfig
from molora.evaluate.compare import Comparison, differences
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.metrics import Judged, open_metrics, scores
from molora.evaluate.results import Result
from molora.report.answers import page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = '</script><script>document.title = "taken"</script><img src=x onerror="document.title=1">'


def judged(row: int, answer: str, parts: list[dict[str, Any]], **more: Any) -> Judged:
    content = [*parts, {"type": "text", "text": f"question {row}"}]
    adapters = ["vision"] if parts else []
    messages = [{"role": "user", "content": content}]
    return Judged(f"{row}:q", messages, "yes", answer, answer == "yes", adapters=adapters, **more)


def result(items: list[Judged]) -> Result:
    metrics = open_metrics(["exact_match"], "metrics")
    config = EvaluationConfig(data=SourceConfig(kind="messages"))
    return Result("all & sundry", config, metrics, items, scores=scores(items, metrics))


def data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def dom(path: Path) -> str:
    """What a browser makes of a page that lies in a file, once all is loaded."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    ran = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    return ran.stdout


def picture(folder: Path, name: str = "a.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 24), "red").save(folder / name, "PNG")
    return folder / name


def sound(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))
    return folder / "a.wav"


def test_errors_come_first_and_every_row_says_all_there_is_to_know(tmp_path: Path) -> None:
    items = [
        judged(0, "yes", [], tags=["t"]),
        judged(1, "no", [], cut_off=True, choices=["yes", "no"], choice=0),
        judged(2, "", [], error="no such file"),
        judged(3, "yes", []),
    ]
    rows = data(page(result(items), "runs/x", tmp_path))["rows"]
    assert [(row["row"], row["verdict"]) for row in rows] == [(3, "failed"), (2, "wrong"), (1, "right"), (4, "right")]
    assert rows[0]["error"] == "no such file" and rows[0]["scores"] == {}
    assert rows[1] == {
        **{"row": 2, "turns": [{"role": "user", "parts": ["question 1"]}], "answer": "no", "accepted": ["yes"]},
        **{"choices": ["yes", "no"], "choice": 0, "cut_off": True, "error": None, "tags": [], "adapters": []},
        **{"verdict": "wrong", "scores": {"exact_match": 0.0}, "other": None},
    }


def test_media_are_part_of_the_page_while_there_is_room_and_each_once(tmp_path: Path) -> None:
    inside, outside = picture(tmp_path / "predictions/media", "a #1.png"), picture(tmp_path / "data", "b.png")
    (tmp_path / "data/notes.txt").write_text("no picture")
    parts = [[{"type": "image", "path": str(path)}] for path in (inside, inside, outside)]
    others = [{"type": "image", "path": str(tmp_path / "none.png")}, {"type": "numbers", "numbers": [1.0]}]
    others.append({"type": "image", "path": str(tmp_path / "data/notes.txt")})
    items = [judged(row, "yes", each) for row, each in enumerate([*parts, others])]

    def media(embedded_bytes: int) -> list[dict[str, str]]:
        return data(page(result(items), "x", tmp_path / "predictions", embedded_bytes=embedded_bytes))["media"]

    one, *_ = found = media(inside.stat().st_size)
    assert one["kind"] == "image" and one["source"].startswith("data:image/png;base64,")
    assert found[1]["source"] == outside.as_uri()
    assert [each["words"] for each in found[2:4]] == [
        f"image: {tmp_path / 'none.png'}: No such file or directory",
        'numbers: {"numbers": [1.0]}',
    ]
    assert found[4]["kind"] == "words" and "base64" not in found[4]["source"], "only pictures and sounds are taken in"
    assert len(found) == 5
    assert media(0)[0]["source"] == "media/a%20%231.png", "what lies in the folder moves with it"
    step = page(result(items), "runs/x", tmp_path / "predictions/step-7", embedded_bytes=0)
    assert data(step)["media"][0]["source"] == "../media/a%20%231.png", "as do the media of all steps"


def test_what_an_answer_says_stays_text(tmp_path: Path) -> None:
    text = page(result([judged(0, HOSTILE, [])]), HOSTILE, tmp_path)
    assert HOSTILE not in text and text.count("</script>") == 2
    assert data(text)["rows"][0]["answer"] == HOSTILE


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_a_browser_shows_a_few_of_ten_thousand_rows_and_their_media(tmp_path: Path) -> None:
    shown = {"type": "image", "path": str(picture(tmp_path / "data"))}
    heard = {"type": "audio", "path": str(sound(tmp_path / "data"))}
    items = [judged(row, HOSTILE if row % 2 else "yes", [shown, heard]) for row in range(10_000)]
    watch = """<script>
      state.text = "question 77"; draw();
      for (const image of document.images) image.loading = "eager";
      addEventListener("load", () => {  // which waits for media that are not lazy
        const loaded = [document.querySelector("img").naturalWidth, document.querySelector("audio").duration];
        document.body.append(element("pre", {id: "seen"}, JSON.stringify([rows.length, found.length, loaded])));
      });
    </script>"""
    for embedded_bytes in (0, 2**20):
        text = page(result(items), "runs/x", tmp_path, embedded_bytes=embedded_bytes)
        (tmp_path / "page.html").write_text(text.replace("</body>", f"{watch}</body>"))
        tree = dom(tmp_path / "page.html")
        seen = re.search(r'<pre id="seen">(.*?)</pre>', tree)
        assert seen, tree[-2000:]
        assert json.loads(html.unescape(seen[1])) == [10_000, 111, [16, 0.5]]
        assert 40 <= tree.count("<article") < 111
        assert "<title>all &amp; sundry</title>" in tree, "no answer ran as code"


@pytest.mark.skipif(CHROMIUM is None, reason="no browser here")
def test_answers_stand_beside_those_of_another_model_and_are_found_by_who_is_right(tmp_path: Path) -> None:
    here = [judged(row, answer, []) for row, answer in enumerate(("yes", "yes", "no", "no", "yes"))]
    there = [judged(row, answer, []) for row, answer in enumerate(("yes", HOSTILE, "yes", "no", "no"))]
    shown = result(here)
    of_both = scores(here, shown.metrics), scores(there, shown.metrics)
    found = differences(here, there, shown.metrics)
    comparison = Comparison(shown.name, Path("runs/<other>"), *of_both, found, 0, there)
    watch = """<script>
      const seen = {};
      for (const {value} of [...byId("compared").options]) {
        byId("compared").value = value;
        byId("compared").dispatchEvent(new Event("change"));
        seen[value] = found.map(row => row.row);
      }
      document.body.append(element("pre", {id: "seen"}, JSON.stringify(seen)));
    </script>"""
    text = page(shown, "runs/x", tmp_path, comparison)
    assert "Beside runs/&lt;other&gt;" in text and "<data>+0.2000</data>" in text
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{watch}</body>"))
    seen = re.search(r'<pre id="seen">(.*?)</pre>', dom(tmp_path / "page.html"))
    assert seen and json.loads(html.unescape(seen[1])) == {
        **{"": [3, 4, 1, 2, 5], "right here alone": [2, 5], "right there alone": [3]},
        **{"right in both": [1], "right in none": [4]},
    }
