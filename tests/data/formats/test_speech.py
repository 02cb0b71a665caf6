"""Kaldi's folders, NeMo's manifests, transcripts, folders: which part of which file is heard, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError
from molora.data.sources import Source, SourceConfig, open_source
from molora.modality import MediaError


def opened(kind: str, path: Path, **options: Any) -> Source:
    return open_source(SourceConfig(kind=kind, options={"path": str(path), **options}), "data")


def clips(source: Source) -> list[dict[str, Any]]:
    """The clips of all rows, without their type."""
    found = [source[row]["messages"][0]["content"][0] for row in range(len(source))]
    return [{key: value for key, value in part.items() if key != "type"} for part in found]


def data_folder(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


WHOLE = {"text": "u1 ONE  TWO\nu2\tÜBER\n", "wav_scp": "u1 /abs/one.wav\nu2   sub/two  words.wav \n"}


def test_a_kaldi_folder_without_segments_has_a_file_for_each_utterance(tmp_path: Path) -> None:
    source = opened("kaldi", data_folder(tmp_path, **WHOLE))
    assert clips(source) == [{"path": "/abs/one.wav"}, {"path": str(tmp_path / "sub/two  words.wav")}]
    assert [source[row]["id"] for row in range(2)] == ["u1", "u2"]
    assert [source[row]["messages"][1]["content"] for row in range(2)] == ["ONE  TWO", "ÜBER"]
    assert source[0]["messages"][0]["content"][1]["text"] == "Transcribe the audio clip into text."


def test_segments_of_a_kaldi_folder_are_seconds_of_recordings(tmp_path: Path) -> None:
    """In any order, as the ids join the files; what `text` does not have is no row."""
    segments = "u2 r 1.5 -1\nu3 r 9 10\nu1 r 0.25 1.5\n"
    folder = data_folder(tmp_path, text=WHOLE["text"], wav_scp="r a.wav\n", segments=segments)
    path = str(tmp_path / "a.wav")
    assert clips(opened("kaldi", folder)) == [
        {"path": path, "start_seconds": 0.25, "end_seconds": 1.5},
        {"path": path, "start_seconds": 1.5},
    ]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"wav_scp": "u1 sph2pipe -f wav a.sph |\nu2 a.wav"},
            "wav.scp, row 1: a command, .* no command is run; write the",
        ),
        ({"wav_scp": "u1 wav.1.ark:1234\nu2 a.wav"}, "wav.scp, row 1: .* lies inside an archive"),
        ({"wav_scp": "u1\nu2 a.wav"}, "wav.scp, row 1: no path behind 'u1'"),
        ({"wav_scp": "u2 a.wav"}, r"text, row 1: 'u1' is not in .*wav.scp"),
        ({"text": "u1\n"}, r"text, row 1: answer: empty"),
        ({"segments": "u2 u2 0 1"}, r"text, row 1: 'u1' is not in .*segments"),
        ({"segments": "u1 r9 0 1"}, r"segments, row 1: 'r9' is not in .*wav.scp"),
        ({"segments": "u1 u1 0 1 1"}, "segments, row 1: .* .a channel is not read"),
        ({"segments": "u1 u1 0"}, "segments, row 1: .* a segment is the ids"),
    ],
)
def test_a_faulty_row_of_a_kaldi_folder_is_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    source = opened("kaldi", data_folder(tmp_path, **{**WHOLE, **files}))
    with pytest.raises(ValueError, match=says):
        source[0]


def test_a_kaldi_folder_that_is_not_whole_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such folder; give the one that has wav.scp and text"):
        opened("kaldi", tmp_path / "gone")
    with pytest.raises(ConfigError, match="text: no such file"):
        opened("kaldi", tmp_path)
    data_folder(tmp_path, text="u1 A\n", wav_scp="u1 a.wav\nu2 b.wav\nu1 c.wav\n")
    with pytest.raises(ConfigError, match="wav.scp, row 3: 'u1' stands in row 1 too"):
        opened("kaldi", tmp_path)
    data_folder(tmp_path, text="\n", wav_scp="u1 a.wav\n")
    with pytest.raises(ConfigError, match="text: no rows"):
        opened("kaldi", tmp_path)


def test_media_root_bounds_the_files_of_every_kind(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    data_folder(tmp_path, text="u1 A\n", wav_scp="u1 ../a.wav\n")
    (tmp_path / "m.json").write_text('{"audio_filepath": "/etc/passwd", "text": "a"}')
    (tmp_path / "a.trans.txt").write_text("../a A\n")
    for kind, path in (("kaldi", tmp_path), ("nemo", tmp_path / "m.json"), ("transcripts", tmp_path)):
        source = opened(kind, path, media_root=root)
        with pytest.raises(MediaError, match="leads out of media_root"):
            source[0]


def test_a_nemo_manifest_says_which_part_of_a_file_is_heard(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "a.wav", "text": "whole"},
        {"audio_filepath": "a.wav", "text": "x", "duration": 2.5},
        {"audio_filepath": "a.wav", "text": "x", "offset": 1, "duration": 2.5},
        {"audio_filepath": "a.wav", "text": "x", "offset": None, "duration": None},
    ]
    (tmp_path / "m.json").write_text("\n".join(map(json.dumps, rows)))
    path = str(tmp_path / "a.wav")
    assert clips(opened("nemo", tmp_path / "m.json")) == [
        {"path": path},
        {"path": path, "start_seconds": 0.0, "end_seconds": 2.5},
        {"path": path, "start_seconds": 1.0, "end_seconds": 3.5},
        {"path": path},
    ]


def test_a_nemo_manifest_may_ask_and_answer(tmp_path: Path) -> None:
    row = {"audio_filepath": "/a.wav", "question": "Who speaks?", "answer": "A man.", "duration": 1}
    (tmp_path / "m.json").write_text(json.dumps(row))
    (user, reply) = opened("nemo", tmp_path / "m.json", prompt="{question}", answer="{answer}")[0]["messages"]
    assert (user["content"][1]["text"], reply["content"]) == ("Who speaks?", "A man.")
    with pytest.raises(ConfigError, match="answer: no column 'text'"):
        opened("nemo", tmp_path / "m.json")
    for path in (None, "", ["a.wav", "b.wav"]):
        (tmp_path / "m.json").write_text(json.dumps({**row, "audio_filepath": path}))
        with pytest.raises(ValueError, match="m.json, row 1: audio_filepath: expected a path"):
            opened("nemo", tmp_path / "m.json", answer="{answer}")[0]


def test_transcripts_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for folder, text in (("b/2", "y two\n\nz three"), ("a/1", "x  one ")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "t.trans.txt").write_text(text)
    source = opened("transcripts", tmp_path)
    assert [part["path"] for part in clips(source)] == [
        str(tmp_path / name) for name in ("a/1/x.flac", "b/2/y.flac", "b/2/z.flac")
    ]
    assert [source[row]["messages"][1]["content"] for row in range(3)] == [" one ", "two", "three"]
    with pytest.raises(ConfigError, match=r"no file called \*.lab in it"):
        opened("transcripts", tmp_path, files="*.lab")
    with pytest.raises(ConfigError, match="medium is 'a.wav' in every row"):
        opened("transcripts", tmp_path, medium="a.wav")
    with pytest.raises(ConfigError, match="media.audio: no column 'name'; columns are"):
        opened("transcripts", tmp_path, medium="{name}.wav")


def test_a_folder_of_media_has_a_row_for_each_file_of_its_type(tmp_path: Path) -> None:
    for name in ("b/2.wav", "b/a.FLAC", "a/x/1.mp3", "b/.hidden.wav", "b/notes.md", "b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    options = {"part": "audio", "prompt": "{name}", "answer": "{class}"}
    source = opened("folder", tmp_path, **options)
    assert [source[row]["id"] for row in range(len(source))] == ["a/x/1.mp3", "b/2.wav", "b/a.FLAC"]
    assert [source[row]["messages"][1]["content"] for row in range(3)] == ["x", "b", "b"]
    assert clips(source)[1] == {"path": str(tmp_path / "b/2.wav")}
    (tmp_path / "b/2.txt").write_bytes("\ufeff zwei äpfel \n".encode())
    source = opened("folder", tmp_path, **{**options, "answer": "{text}"})
    assert source[1]["messages"][1]["content"] == "zwei äpfel"
    (tmp_path / "b/2.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"2.txt: byte 1 is not UTF-8"):
        source[1]
    os.mkfifo(tmp_path / "b/a.txt")
    with pytest.raises(ValueError, match=r"a.FLAC: its text a.txt: is a pipe"):
        source[2]
    with pytest.raises(ConfigError, match="no image files, which end in .avif"):
        opened("folder", tmp_path / "a", **{**options, "part": "image"})
    with pytest.raises(ConfigError, match="no such folder"):
        opened("folder", tmp_path / "gone", **options)
