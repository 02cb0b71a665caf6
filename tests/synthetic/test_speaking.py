"""Spoken questions: what is transcribed wrongly is left out, what comes back right is kept, and both are counted."""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molora.data.sources import Messages, MessagesConfig
from molora.synthetic.steps.speaking import Speak, SpeakConfig
from molora.synthetic.workflow import open_workflow
from molora.synthetic.workflow_report import report
from tests.scripted import serving

CONFIG = Path(__file__).parents[2] / "configs" / "make" / "spoken_questions.yaml"


class Listener:
    """Hears every clip as what it is told to."""

    def __init__(self) -> None:
        self.heard: dict[str, str] = {}

    def __call__(self, body: dict[str, Any]) -> str:
        sound, text = body["messages"][0]["content"]
        assert sound["input_audio"]["format"] == "flac" and text["text"] == "transcribe the audio."
        return self.heard[sound["input_audio"]["data"]]


@pytest.fixture
def listener() -> Iterator[tuple[Listener, str]]:
    heard = Listener()
    with serving(heard) as url:
        yield heard, url


def wrong(text: str, draw: random.Random) -> str:
    """A transcript with more than a fifth of its words wrong, missing or added."""
    words = text.rstrip("?").split()
    for place in draw.sample(range(len(words)), len(words) // 4 + 1):
        words[place] = draw.choice(["", "umbrella", f"{words[place]} never"])
    return " ".join(words)


@pytest.mark.parametrize("library", ["espeakng_loader", "soundfile"])
def test_what_speaking_needs_is_told_before_a_model_is_asked(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for there in ("espeakng_loader", "soundfile"):
        pytest.importorskip(there)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"clips of speech need {library}: pip install 'molora\[demo\]'"):
        Speak(SpeakConfig(text="{text}", folder="clips"))


def test_planted_wrong_transcripts_are_left_out_and_right_ones_kept(
    listener: tuple[Listener, str], tmp_path: Path
) -> None:
    for library in ("espeakng_loader", "easy_vqa", "soundfile", "jiwer"):
        pytest.importorskip(library)
    output, (hears, server) = tmp_path / "out", listener
    overrides = [f"output={output}", "steps.0.options.limit=60", "steps.1.options.count=30"]
    overrides += ["models.listener.local=null", f"models.listener.server={{url: '{server}', model: m}}"]
    whole = open_workflow(CONFIG, overrides)
    steps, whole.config.steps, whole.steps = whole.config.steps, whole.config.steps[:3], whole.steps[:3]
    spoken = whole.run()[-1].rows
    assert len(spoken) == 30 and len({row.columns["voice"] for row in spoken}) > 5

    draw = random.Random(0)
    planted = set()
    for number, row in enumerate(spoken):
        clip = base64.b64encode(Path(row.columns["clip"]).read_bytes()).decode()
        question = row.columns["question"]
        hears.heard[clip] = wrong(question, draw) if number % 3 == 0 else question.upper().rstrip("?")
        planted |= {row.id} if number % 3 == 0 else set()
    workflow = open_workflow(CONFIG, overrides)
    assert [step.name for step in steps] == [step.name for step in workflow.config.steps]
    done = {each.config.name: each for each in workflow.run()}
    assert {each.row.id for each in done["understood"].dropped} == planted and len(planted) == 10
    assert {row.id for row in done["conversations"].rows} == {row.id for row in spoken} - planted
    found = report(workflow, [*done.values()])
    ratings = next(step["ratings"] for step in found["steps"] if step["name"] == "understood")
    assert ratings["kept"] == [20] + [0] * 9, "all that is right has a rate of 0"
    assert ratings["dropped"][0] == 0 and sum(ratings["dropped"]) == 10
    source = Messages(MessagesConfig(path=str(output / "rows.jsonl")))
    (asked, answered) = source[0]["messages"]
    assert [part["type"] for part in asked["content"]] == ["image", "audio"] and answered["content"]
    assert all(Path(part["path"]).is_file() for part in asked["content"])
