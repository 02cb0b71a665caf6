"""Every benchmark recipe, read as it is written and run on a few rows with the columns of its dataset."""

from __future__ import annotations

import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molora.config import read
from molora.evaluate.judge import EvaluationConfig, Evaluations
from molora.evaluate.results import Place, evaluate_model
from molora.inference.load import LoadedModel
from molora.testing import byte_tokenizer, tiny_model
from tests.cli.test_cli import run_cli

FOLDER = Path(__file__).parents[2] / "configs" / "benchmarks"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MULTIPLE_CHOICE = {"multiple_choice", "no_choice"}

RECIPE = """
run: {home}/run
backbone: {{path: {home}/backbone}}
modalities:
  vision:
    plugin: vision
    options:
      crop_pixels: 16
      max_crops: 1
      pool: 1
      tower: {{kind: convit, pretrained: false, convit: {{width: 8, depth: 1, heads: 2}}}}
    adapter: {{r: 2, lora_alpha: 4, target_modules: [q_proj]}}
  audio:
    plugin: audio
    options: {{tower: {{kind: conformer, conformer: {{width: 8, blocks: 1, heads: 2}}}}}}
    adapter: {{r: 2, lora_alpha: 4, target_modules: [q_proj]}}
router: {{options: {{rules: {{audio+vision: vision}}}}}}
stages:
  - name: tune
    train: {{adapters: {{learning_rate: 1e-3}}}}
    data: {{rows: {{kind: messages, options: {{path: {home}/rows.jsonl}}}}}}
    steps: 1
    samples_per_step: 2
device: cpu
"""


def picture(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 14), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{colour}.png"}


def clip(pitch_hz: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    samples = 8000 * np.sin(2 * np.pi * pitch_hz * np.arange(6400) / 16_000)
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())
    return {"bytes": buffer.getvalue(), "path": f"{pitch_hz}.wav"}


WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
RECOGNISE = "Please recognize the speech and only output the recognized content:"
TRANSCRIBE = (
    "Please transcribe the following audio. Only provide the transcription without any additional explanation or "
)
PICTURES = [picture("red"), picture("blue")]
CLIPS = [clip(220), clip(440)]
OPTIONS = ["a leaf", "a root", "a stem"]
MMMU_IMAGES = {
    f"image_{number}": [PICTURES[0] if number < 3 else None, PICTURES[1] if number < 2 else None]
    for number in range(1, 8)
}
AIR = {
    "uniq_id": [1, 2],
    "task_name": ["vocal sound", "music genre"],
    "question": ["what is it?", "which?"],
    "choice_a": ["a cough", "jazz"],
    "choice_b": ["a laugh", "rock"],
    "choice_c": ["a sigh", None],
    "choice_d": [None, None],
    "answer_gt": ["a laugh", "jazz"],
    "audio": CLIPS,
}

# The columns of each dataset that lmms-eval 0.7.3 reads, and others that stand beside them; what is asked first and
# expected of it; the metrics of its authors.
SCHEMAS: dict[str, tuple[dict[str, list[Any]], str, list[str], set[str]]] = {
    "chartqa": (
        {
            "type": ["human_test", "augmented_test"],
            "question": ["how many?", "which?"],
            "answer": ["14", "Yes"],
            "image": PICTURES,
        },
        "how many?\nAnswer the question with a single word.",
        ["14"],
        {"relaxed_accuracy", "relaxed_accuracy/human_test"},
    ),
    "spoken_ai2d": (
        {"image": PICTURES, "audio": CLIPS, "options": [OPTIONS, OPTIONS[:2]], "answer": [1, 0]},
        "A. a leaf\nB. a root\nC. a stem\nAnswer the spoken question",
        ["B"],
        MULTIPLE_CHOICE,
    ),
    "spoken_chartqa": (
        {"image": PICTURES, "audio": CLIPS, "answer": ["14", "Yes"]},
        "Answer the spoken question with a single word.",
        ["14"],
        {"relaxed_accuracy"},
    ),
    "textvqa": (
        {
            "question_id": [1, 2],
            "question": ["what is it?", "who?"],
            "answers": [["a"] * 9 + ["b"], ["c"] * 10],
            "image": PICTURES,
        },
        "what is it?" + WORD,
        ["a"] * 9 + ["b"],
        {"vqa_accuracy"},
    ),
    "docvqa": (
        {
            "questionId": ["1", "2"],
            "question": ["what date?", "who?"],
            "answers": [["1/8/93", "8 January"], ["I"]],
            "image": PICTURES,
        },
        "what date?" + WORD,
        ["1/8/93", "8 January"],
        {"anls"},
    ),
    "scienceqa": (
        {
            "image": PICTURES,
            "question": ["which?", "what?"],
            "choices": [OPTIONS, OPTIONS[:2]],
            "answer": [2, 0],
            "hint": ["look", ""],
            "subject": ["natural science", "social science"],
        },
        "Context: look\nwhich?\nA. a leaf\nB. a root\nC. a stem" + LETTER,
        ["C"],
        MULTIPLE_CHOICE,
    ),
    "ai2d": (
        {"question": ["which?", "what?"], "options": [OPTIONS, OPTIONS], "answer": ["1", "0"], "image": PICTURES},
        "which?\nA. a leaf\nB. a root\nC. a stem" + LETTER,
        ["B"],
        MULTIPLE_CHOICE,
    ),
    "mmmu": (
        {
            "id": ["validation_Art_1", "validation_Art_2"],
            "question": ["<image 1> and <image 2>?", "<image 1>?"],
            "options": ["['a leaf', \"it's a root\"]", "['$10', '$20']"],
            "answer": ["B", "A"],
            "question_type": ["multiple-choice", "multiple-choice"],
            "topic_difficulty": ["Easy", "Hard"],
            **MMMU_IMAGES,
        },
        "<image 1> and <image 2>?\nA. a leaf\nB. it's a root\n" + LETTER,
        ["B"],
        {*MULTIPLE_CHOICE, "multiple_choice/Hard"},
    ),
    "mathvista": (
        {
            "pid": ["1", "2"],
            "query": ["Hint: an integer.\nQuestion: how many?", "Hint: a letter.\nQuestion: which?"],
            "answer": ["4", "a leaf"],
            "question_type": ["free_form", "multi_choice"],
            "image": ["images/1.jpg", "images/2.jpg"],
            "decoded_image": PICTURES,
        },
        "Hint: an integer.\nQuestion: how many?",
        ["4"],
        {"relaxed_accuracy"},
    ),
    "pope": (
        {
            "question": ["is there a cat?", "is there a dog?"],
            "answer": ["yes", "no"],
            "category": ["random", "popular"],
            "image": PICTURES,
        },
        "is there a cat?" + WORD,
        ["yes"],
        {"yes_no_accuracy", "yes_share", "yes_no_accuracy/popular"},
    ),
    "librispeech": (
        {"audio": CLIPS, "gt": ["he said", "it is"], "source": ["a", "b"], "task": ["ASR", "ASR"]},
        RECOGNISE,
        ["he said"],
        {"word_error_rate"},
    ),
    "common_voice": (
        {"audio": CLIPS, "path": ["a.mp3", "b.mp3"], "sentence": ["he said", "it is"], "locale": ["en", "en"]},
        RECOGNISE,
        ["he said"],
        {"word_error_rate"},
    ),
    "fleurs": (
        {
            "id": [1, 2],
            "audio": CLIPS,
            "path": ["a.wav", "b.wav"],
            "transcription": ["he said", "it is"],
            "language": ["English"] * 2,
        },
        RECOGNISE,
        ["he said"],
        {"word_error_rate"},
    ),
    "covost2": (
        {"audio": CLIPS, "sentence": ["he said", "it is"], "translation": ["他说", "它是"]},
        "Translate the speech into Chinese and only output the translation:",
        ["他说"],
        {"bleu"},
    ),
    "ami": (
        {"meeting_id": ["EN2002a"] * 2, "audio_id": ["1", "2"], "text": ["OKAY", "YEAH"], "audio": CLIPS},
        TRANSCRIBE + "formatting.",
        ["OKAY"],
        {"word_error_rate"},
    ),
    "mmau": (
        {
            "question_id": ["1", "2"],
            "audio": CLIPS,
            "question": ["which?", "what?"],
            "choices": [json.dumps(OPTIONS), json.dumps(OPTIONS[:2])],
            "answer": ["a root", "a leaf"],
            "task": ["sound", "music"],
        },
        "which?\nA. a leaf\nB. a root\nC. a stem" + LETTER,
        ["B"],
        {*MULTIPLE_CHOICE, "multiple_choice/music"},
    ),
    "air_bench": (
        AIR,
        "what is it?\nA. a cough\nB. a laugh\nC. a sigh\n" + LETTER,
        ["B"],
        {*MULTIPLE_CHOICE, "multiple_choice/vocal sound"},
    ),
    "esc50": (
        {
            "filename": ["1-a.wav", "2-b.wav"],
            "fold": [1, 2],
            "target": [0, 14],
            "category": ["dog", "chirping_birds"],
            "audio": CLIPS,
        },
        "Which of these sounds is it? airplane, ",
        ["dog"],
        {"exact_match", "macro_f1"},
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run with both senses, and room for long prompts."""
    home = tmp_path_factory.mktemp("benchmarks")
    tiny_model("llama", max_tokens=2048).save_pretrained(home / "backbone")
    byte_tokenizer().save_pretrained(home / "backbone")
    (home / "red.png").write_bytes(PICTURES[0]["bytes"])
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
    (home / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (home / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    (home / "recipe.yaml").write_text(RECIPE.format(home=home))
    assert run_cli("train", str(home / "recipe.yaml")) == 0
    return Place(str(home / "run"))


@pytest.fixture(scope="module")
def loaded(place: Place) -> LoadedModel:
    import molora

    return molora.load(place.source)


def test_every_recipe_has_a_replica_of_its_data_and_is_short() -> None:
    assert set(RECIPES) == set(SCHEMAS)
    for name in RECIPES:
        text = (FOLDER / f"{name}.yaml").read_text()
        assert len(text.splitlines()) <= 25 and "Licence: " in text.partition("evaluations:")[0], name


@pytest.mark.parametrize("name", RECIPES)
def test_a_benchmark_runs_on_a_replica_of_its_data(
    name: str, place: Place, loaded: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("sacrebleu")
    pytest.importorskip("jiwer")
    pytest.importorskip("rapidfuzz")
    columns, asked, accepted, metrics = SCHEMAS[name]
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "replica.parquet")
    written: dict[str, EvaluationConfig] = read(Evaluations, FOLDER / f"{name}.yaml", in_part=True).evaluations
    replaced = []
    for each, config in written.items():
        options = f"evaluations.{each}.data.options"
        replaced += [
            f"{options}.path={tmp_path / 'replica.parquet'}",
            f"{options}.split=train",
            f"{options}.subset=null",
        ]
        replaced.append(f"evaluations.{each}.max_new_tokens=2")
        if config.metrics == [{"word_error_rate": {"normaliser": "whisper_english"}}]:
            spellings = Path(place.source).parent
            replaced.append(f"evaluations.{each}.metrics.0.word_error_rate.spellings={spellings}")
    local = read(Evaluations, FOLDER / f"{name}.yaml", replaced, in_part=True).evaluations
    for result in evaluate_model(lambda: loaded, place, local, strict=True):
        first = result.judged[0]
        *media, text = first.messages[0]["content"]
        assert media and text["text"].startswith(asked)
        assert first.answers == accepted
        assert metrics <= result.scores.keys() and result.scores["questions"] == 2
