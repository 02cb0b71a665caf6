"""Real public datasets in the formats that recipes name: every row is read, and its media are decoded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from molora.data.sources import SourceConfig, open_source
from molora.encoders.audio import Audio, AudioConfig
from molora.encoders.vision import Vision, VisionConfig

DATA = Path(os.environ.get("MOLORA_TEST_DATA", "."))
pytestmark = pytest.mark.skipif(
    not (DATA / "manifest.json").is_file(), reason="set MOLORA_TEST_DATA to a folder with the sets of its manifest"
)
DECODED = 20


def rows(kind: str, **options: Any) -> list[dict[str, Any]]:
    """All rows, after the media of the first few were decoded."""
    source = open_source(SourceConfig(kind=kind, options=options), "data")
    modalities = {"image": Vision("vision", VisionConfig()), "audio": Audio("audio", AudioConfig())}
    found = [source[row] for row in range(len(source))]
    for row in found[:DECODED]:
        for part in row["messages"][0]["content"]:
            if part["type"] in modalities:
                modalities[part["type"]].load(part)
    return found


def lines(path: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, (DATA / path).read_text(encoding="utf-8").splitlines())


def learned(found: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in found]


def test_tables_of_word_problems_have_options_or_none() -> None:
    options = {"media": {"image": "image"}, "prompt": "{question}\n{choices}", "answer": "{choice}"}
    found = rows(
        "table", path=str(DATA / "tabmwp/train.jsonl"), choices="choices", choice={"text": "answer"}, **options
    )
    given = list(lines("tabmwp/train.jsonl"))
    assert learned(found) == [row["answer"] for row in given]
    assert [row.get("choices") for row in found] == [row["choices"] for row in given]
    assert all(row["choices"][row["choice"]] == learned([row])[0] for row in found if "choices" in row)


def test_captions_of_photographs_are_accepted_answers() -> None:
    options = {"media": {"image": "image"}, "prompt": "Describe it.", "answers": "captions"}
    found = rows("table", path=str(DATA / "coco_mini/train.jsonl"), **options)
    assert [row["answers"] for row in found] == [row["captions"] for row in lines("coco_mini/train.jsonl")]


def test_captions_of_photographs_in_coco_s_own_file(tmp_path: Path) -> None:
    given = list(lines("coco_mini/train.jsonl"))
    images = [{"id": row["id"], "file_name": row["image"].rpartition("/")[2]} for row in given]
    captions = [(row["id"], caption) for row in given for caption in row["captions"]]
    annotations = [{"image_id": id, "id": n, "caption": caption} for n, (id, caption) in enumerate(captions)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    options = {"path": str(tmp_path / "captions.json"), "media_root": str(DATA / "coco_mini/images"), "prompt": "?"}
    assert learned(rows("coco_captions", **options)) == [caption for _, caption in captions]
    pictures = rows("coco_captions", row="image", **options)
    assert [row["answers"] for row in pictures] == [row["captions"] for row in given]


def test_questions_about_receipts_are_items_of_a_list() -> None:
    asked = {"prompt": "{qa[3][question]}", "answer": "{qa[3][answer]}", "answers": "qa[*][answer]"}
    found = rows("table", path=str(DATA / "sroie/val.jsonl"), media={"image": "image"}, **asked)
    given = [[item["answer"] for item in row["qa"]] for row in lines("sroie/val.jsonl")]
    assert learned(found) == [answers[3] for answers in given]
    assert [row["answers"] for row in found] == [[answers[3], *answers[:3], *answers[4:]] for answers in given]


def test_real_speech_as_the_tools_of_speech_have_it(tmp_path: Path) -> None:
    """The same clips through Kaldi's, NeMo's, LJSpeech's and LibriSpeech's files."""
    given = list(lines("read_speech/val.jsonl"))
    paths = {row["id"]: str(DATA / "read_speech" / row["audio"]) for row in given}
    texts = [row["text"].strip() for row in given]
    files: dict[str, list[str]] = {
        "wav.scp": [f"{id} {path}" for id, path in paths.items()],
        "text": [f"{row['id']} {text}" for row, text in zip(given, texts, strict=True)],
        "m.json": [
            json.dumps({"audio_filepath": paths[row["id"]], "duration": row["duration"], "text": text})
            for row, text in zip(given, texts, strict=True)
        ],
        "metadata.csv": [f"{paths[row['id']]}|{text}" for row, text in zip(given, texts, strict=True)],
        "a.trans.txt": [f"{paths[row['id']]} {text}" for row, text in zip(given, texts, strict=True)],
    }
    for name, content in files.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    assert learned(rows("kaldi", path=str(tmp_path))) == texts
    assert learned(rows("nemo", path=str(tmp_path / "m.json"))) == texts
    assert learned(rows("transcripts", path=str(tmp_path), medium="{id}")) == texts
    about = {"separator": "|", "names": ["id", "text"], "medium": "{id}"}
    assert learned(rows("transcripts", path=str(tmp_path / "metadata.csv"), **about)) == texts


def test_real_sounds_in_folders_of_their_class(tmp_path: Path) -> None:
    given = list(lines("esc/val.jsonl"))
    for row in given:
        (tmp_path / row["category"]).mkdir(exist_ok=True)
        (tmp_path / row["category"] / Path(row["audio"]).name).symlink_to((DATA / "esc" / row["audio"]).absolute())
    found = rows("folder", path=str(tmp_path), part="audio", prompt="Which?", answer="{class}")
    assert sorted(learned(found)) == sorted(row["category"] for row in given)


def test_segments_of_a_real_recording_are_what_was_said_there(tmp_path: Path) -> None:
    """Two real clips joined in one recording; each segment is its clip to the sample."""
    given = [row for row in lines("read_speech/val.jsonl") if row["source"] == "LJSpeech"][:2]
    waves = [soundfile.read(DATA / "read_speech" / row["audio"], dtype="int16")[0] for row in given]
    soundfile.write(tmp_path / "all.flac", np.concatenate(waves), 16_000, subtype="PCM_16")
    border, end = (sum(map(len, waves[:count])) / 16_000 for count in (1, 2))
    (tmp_path / "segments").write_text(f"a all 0 {border}\nb all {border} {end}\n")
    (tmp_path / "wav.scp").write_text("all all.flac\n")
    (tmp_path / "text").write_text("".join(f"{id} {row['text']}\n" for id, row in zip("ab", given, strict=True)))
    audio = Audio("audio", AudioConfig())
    for row, wave in zip(rows("kaldi", path=str(tmp_path)), waves, strict=True):
        heard = audio.load(row["messages"][0]["content"][0])
        assert (heard.numpy() * 32768 == wave).all()
