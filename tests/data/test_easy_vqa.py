"""Spoken easy-VQA: rows, voices by split, and clips that are kept."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from molora.config import ConfigError
from molora.data.easy_vqa import EasyVQA, EasyVQAConfig, SpokenEasyVQA, SpokenEasyVQAConfig
from molora.data.sources import SourceConfig, open_source
from molora.train.card import about_source

pytest.importorskip("easy_vqa")
pytest.importorskip("espeakng_loader")
soundfile = pytest.importorskip("soundfile")


def test_transcripts_are_the_questions_that_are_spoken(tmp_path: Path) -> None:
    options = {"split": "test", "task": "transcripts", "folder": str(tmp_path), "takes": 2}
    source = open_source(SourceConfig(kind="spoken_easy_vqa", options=options), "here")
    assert len(source) == 2 * 107
    rows = [source[row] for row in (0, 1, 213)]
    for row in rows:
        audio, text = row["messages"][0]["content"]
        assert text["text"] == "transcribe the audio." and row["messages"][1]["content"].endswith("?")
        assert soundfile.info(audio["path"]).duration > 0.5
    first, second, last = (row["messages"][1]["content"] for row in rows)
    assert first == second != last
    assert len(list(tmp_path.iterdir())) == 3, "two takes of one text are two clips"
    assert source[0] == rows[0] and len(list(tmp_path.iterdir())) == 3


def test_a_spoken_question_has_the_picture_and_the_answer_of_the_written_one(tmp_path: Path) -> None:
    options = {"split": "train"}
    written = open_source(SourceConfig(kind="easy_vqa", options=options), "here")
    spoken = SpokenEasyVQA(SpokenEasyVQAConfig(split="train", task="questions", folder=str(tmp_path), takes=3))
    assert len(written) == len(spoken)
    for row in (0, 12_345):
        picture, text = written[row]["messages"][0]["content"]
        own_picture, audio = spoken[row]["messages"][0]["content"]
        assert own_picture == picture and audio["type"] == "audio"
        assert spoken.rows[row].text == audio["transcript"] == text["text"] and spoken.rows[row].take in range(3)
        assert spoken[row]["messages"][1] == written[row]["messages"][1] and spoken[row]["tags"] == written[row]["tags"]


@pytest.mark.parametrize("kind", ["easy_vqa", "spoken_easy_vqa"])
def test_a_card_tells_the_package_and_not_the_clips_made_so_far(kind: str, tmp_path: Path) -> None:
    options = {"split": "test", "task": "questions", **({} if kind == "easy_vqa" else {"folder": str(tmp_path)})}
    config = SourceConfig(kind=kind, options=options)
    source = open_source(config, "here")
    before = about_source(config, source)
    assert source[7] and about_source(config, source) == before
    assert (before["fingerprint"], before["licence"], before["files"]) == ("easy-vqa 1.0", "MIT", [])


@pytest.mark.parametrize("kind", ["easy_vqa", "spoken_easy_vqa"])
def test_a_system_message_stands_before_every_row(kind: str, tmp_path: Path) -> None:
    options = {"split": "test", "task": "questions", **({} if kind == "easy_vqa" else {"folder": str(tmp_path)})}
    plain, told = (
        open_source(SourceConfig(kind=kind, options={**options, **more}), "here")[7] for more in ({}, {"system": ""})
    )
    assert told == {**plain, "messages": [{"role": "system", "content": ""}, *plain["messages"]]}


def test_balanced_questions_do_not_tell_their_answers() -> None:
    rows = EasyVQA(EasyVQAConfig(split="train", balanced=True)).rows
    answers = {
        negated: Counter(a for q, a, _, _ in rows if a in ("yes", "no") and _negated(q) == negated)
        for negated in (True, False)
    }
    for counted in answers.values():
        assert counted["yes"] == pytest.approx(counted["no"], rel=0.1)
    plain = EasyVQA(EasyVQAConfig(split="train")).rows
    assert rows[: len(plain)] == plain and set(rows) == set(plain)


def _negated(question: str) -> bool:
    return " not " in question or " no " in question


def test_no_takes_are_refused() -> None:
    options = {"split": "test", "task": "questions", "folder": "clips", "takes": 0}
    with pytest.raises(ConfigError, match="takes is at least 1, got 0"):
        open_source(SourceConfig(kind="spoken_easy_vqa", options=options), "here")


def test_the_splits_share_no_voice(tmp_path: Path) -> None:
    def voices(split: str) -> set[str]:
        config = SpokenEasyVQAConfig(split=split, task="transcripts", folder=str(tmp_path))  # type: ignore[arg-type]
        return {voice.partition("+")[2] for voice in SpokenEasyVQA(config).voices}

    assert not voices("train") & voices("test")
