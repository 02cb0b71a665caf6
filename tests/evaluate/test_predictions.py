"""Answers of an evaluation are kept as they come; what is kept is gone on from, and scored again as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molora.config import ConfigError
from molora.data.sources import SourceConfig
from molora.encoders.sound import load_sound
from molora.evaluate.judge import Evaluation, EvaluationConfig
from molora.evaluate.kept_media import found_again, kept
from molora.evaluate.metrics import Judged
from molora.evaluate.predictions import open_predictions, read_predictions
from molora.inference.load import LoadedModel
from tests.inference.test_answers import loaded_model

ABOUT = {"model": {"vision": "1"}, "settings": {"max_new_tokens": 3}}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model()


def evaluation(tmp_path: Path, *numbers: float, expected: str = "x") -> Evaluation:
    """Questions about a number each; 19 is one that cannot be read."""
    rows = [
        {
            "id": f"q{index}",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "numbers", "numbers": [number]}, {"type": "text", "text": f"{number}?"}],
                },
                {"role": "assistant", "content": expected},
            ],
            "tags": ["even"] if index % 2 == 0 else [],
        }
        for index, number in enumerate(numbers)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SourceConfig(kind="messages", options={"path": str(path)})
    return Evaluation("test", EvaluationConfig(data=data, max_new_tokens=3))


def run(
    folder: Path, evaluation: Evaluation, loaded: LoadedModel, about: Mapping[str, Any] = ABOUT, *, stop_after: int = -1
) -> list[str]:
    """Runs an evaluation, or stops it after some answers; returns the questions that the model was asked."""
    asked: list[str] = []
    with open_predictions(folder, "test", about, len(evaluation.source)) as predictions:
        add = predictions.add

        def counted(item: Judged) -> None:
            add(item)
            asked.append(item.id)
            if len(asked) == stop_after:
                raise KeyboardInterrupt

        predictions.add = counted  # type: ignore[method-assign]
        predictions.settle(evaluation.run(loaded, predictions=predictions))
    return asked


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def test_a_stopped_evaluation_goes_on_where_it_stopped(tmp_path: Path, loaded: LoadedModel) -> None:
    questions = evaluation(tmp_path, *range(8))
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert len(run(whole, questions, loaded)) == 8
    with pytest.raises(KeyboardInterrupt):
        run(folder, questions, loaded, stop_after=3)
    done = [row["id"] for row in lines(folder)]
    assert len(done) == 3
    with open(folder / "test.jsonl", "ab") as file:
        file.write(b'{"id": "5:q5", "mess')  # a kill while a line was written
    rest = run(folder, questions, loaded)
    assert sorted([*done, *rest]) == [f"{index}:q{index}" for index in range(8)]
    assert (folder / "test.jsonl").read_bytes() == (whole / "test.jsonl").read_bytes()
    assert [row["id"] for row in lines(whole)] == [f"{index}:q{index}" for index in range(8)], "in their order"
    assert run(folder, questions, loaded) == []


def test_kept_answers_score_as_the_run_did(tmp_path: Path, loaded: LoadedModel) -> None:
    questions = evaluation(tmp_path, 1, 19, 2)
    with open_predictions(tmp_path / "kept", "test", ABOUT, 3) as predictions:
        judged = questions.run(loaded, predictions=predictions)
        predictions.settle(judged)
    again = read_predictions(tmp_path / "kept", "test", ABOUT, "run it")
    assert again == judged and questions.scores(again) == questions.scores(judged)
    assert judged[1].error and "nineteen" in judged[1].error
    assert [item.adapters for item in again] == [["numbers"], [], ["numbers"]]
    row = lines(tmp_path / "kept")[0]
    assert row.keys() == {
        *("id", "messages", "expected", "answers", "choices", "choice"),
        *("answer", "tags", "cut_off", "error", "likelihoods", "adapters"),
    }


def test_an_error_and_a_row_that_changed_are_asked_again(tmp_path: Path, loaded: LoadedModel) -> None:
    folder = tmp_path / "kept"
    run(folder, evaluation(tmp_path, 1, 19, 2, 3), loaded)
    assert run(folder, evaluation(tmp_path, 1, 5, 2, 4), loaded) == ["1:q1", "3:q3"]
    assert [row["messages"][0]["content"][1]["text"] for row in lines(folder)] == ["1?", "5?", "2?", "4?"]
    assert run(folder, evaluation(tmp_path, 1, 5, 2, 4, expected="y"), loaded) == [], "what is asked is the same"
    assert {row["expected"] for row in lines(folder)} == {"y"}, "and what is expected is what the rows say now"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"vision": "2"}}, 'model.vision is "1" there and "2" here'),
        ({"model": {"vision": "1", "audio": "1"}}, 'model.audio is null there and "1" here'),
        ({"settings": {"max_new_tokens": 4}}, "settings.max_new_tokens is 3 there and 4 here"),
    ],
)
def test_answers_of_another_model_or_other_settings_are_not_gone_on_from(
    changed: dict[str, Any], told: str, tmp_path: Path, loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = evaluation(tmp_path, 1, 2)
    run(tmp_path / "kept", questions, loaded)
    with pytest.raises(ConfigError, match="its answers are others") as error:
        read_predictions(tmp_path / "kept", "test", {**ABOUT, **changed}, "run it")
    assert told in str(error.value)
    capsys.readouterr()
    assert run(tmp_path / "kept", questions, loaded, {**ABOUT, **changed}) == ["0:q0", "1:q1"]
    assert f"begun anew, as {told}" in " ".join(capsys.readouterr().out.split())
    assert len(read_predictions(tmp_path / "kept", "test", {**ABOUT, **changed}, "run it")) == 2


def test_answers_that_are_not_all_there_are_not_scored(tmp_path: Path, loaded: LoadedModel) -> None:
    folder = tmp_path / "kept"
    with pytest.raises(ConfigError, match=r"test.jsonl: no answers of evaluation 'test' are kept there; run it"):
        read_predictions(folder, "test", ABOUT, "run it")
    with pytest.raises(KeyboardInterrupt):
        run(folder, evaluation(tmp_path, 1, 2, 3), loaded, stop_after=2)
    with pytest.raises(ConfigError, match="has 2 of 3 answers; run it"):
        read_predictions(folder, "test", ABOUT, "run it")


def test_media_that_rows_hold_become_files_that_say_the_same(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    wave_L = np.random.default_rng(0).normal(0, 0.2, 8000).astype(np.float32)
    (tmp_path / "a.bin").write_bytes(b"RIFF\0\0\0\0WAVE")
    parts = [
        {"type": "image", "image": picture},
        {"type": "image", "image": {"bytes": (tmp_path / "a.bin").read_bytes(), "path": "a.wav"}},
        {"type": "audio", "array": wave_L, "sampling_rate": 16_000},
        {"type": "audio", "array": torch.from_numpy(np.stack([wave_L, wave_L])), "sampling_rate": 16_000},
        {"type": "numbers", "numbers": np.array([1.0, 2.0])},
        {"type": "audio", "path": str(tmp_path / "b.wav")},
        {"type": "text", "text": "what?"},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "and?"}]
    written = json.loads(json.dumps(kept(messages, tmp_path / "kept")))
    assert written == kept(messages, tmp_path / "kept") and written[1] == messages[1]
    content = written[0]["content"]
    assert [part.get("path", "").rpartition(".")[2] for part in content] == [
        "png",
        "wav",
        "wav",
        "wav",
        "npy",
        "wav",
        "",
    ]
    assert len(list((tmp_path / "kept/media").iterdir())) == 5 and content[5:] == parts[5:]
    found = found_again(written, tmp_path / "kept")[0]["content"]
    assert np.array_equal(np.asarray(Image.open(found[0]["path"])), np.asarray(picture))
    assert torch.equal(load_sound(found[2]), torch.from_numpy(wave_L)), "32-bit floats lose nothing"
    assert torch.equal(load_sound(found[3]), torch.from_numpy(wave_L))
    assert np.load(found[4]["path"]).tolist() == [1.0, 2.0]
