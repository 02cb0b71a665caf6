"""The recipes for the released Phi-4-multimodal: as its samples are published, on files as the datasets have them, and
without what the samples do wrong.

Other tests show the rest of that: test_vision.py that no crop is made up where a picture has fewer than others of the
batch, test_processor.py that an answer loses its special tokens and no letter, test_mixed_batch.py that samples of any
modalities share a batch and have the logits, gradients and answers that they have alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import get_parameter_names

from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.opening import open_model
from molora.checkpoint.pretrained import load_backbone
from molora.config import read
from molora.data.sources import SourceConfig, open_source
from molora.testing import assert_close, byte_tokenizer, tiny_model
from molora.train import Recipe, train
from molora.train.optim import PartConfig, set_trainable
from molora.train.recipe import plan_recipe

soundfile = pytest.importorskip("soundfile")
for library in ("torchaudio", "datasets", "sacrebleu"):
    pytest.importorskip(library)

CONFIGS = Path(__file__).parents[2] / "configs"
SPEECH, VISION = CONFIGS / "phi4mm_speech_translation.yaml", CONFIGS / "phi4mm_vision_qa.yaml"
RECIPES = {"audio": SPEECH, "vision": VISION}
TRANSLATIONS = ["Vse bo v redu.", '"Ne!" je rekla.', "!", "null", "Kje je postaja?", "Da, jutri ob osmih."]
QUESTION = "Answer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of the shape that an imported release has, and both datasets in a few rows."""
    folder = tmp_path_factory.mktemp("phi4mm")
    tiny_model("phi4-mini", max_tokens=1024).save_pretrained(folder / "backbone")
    byte_tokenizer().save_pretrained(folder / "backbone")
    backbone, tokenizer = load_backbone(str(folder / "backbone"))
    adapter = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    conformer = {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    options = {
        "audio": {"tower": {"conformer": conformer}, "beside": {"vision": "vision"}},
        "vision": {"crop_pixels": 56, "tower": {"kind": "transformers", "pretrained": False, "arguments": sizes}},
    }
    plans = {name: blueprint(name, name, options[name], adapter, name) for name in options}
    model, _ = assemble(backbone, tokenizer, plans, RouterConfig(options={"rules": {"audio+vision": "vision"}}))
    for name, plan in plans.items():
        save_modality(model, name, plan, folder / "modalities" / name, {})
    write_covost(folder / "covost2")
    write_pmc_vqa(folder / "pmc_vqa")
    return folder


def write_covost(folder: Path) -> None:
    """Clips of Common Voice, MP3 at 48 kHz, and tables as get_covost_splits.py writes them: tabs and no quotes."""
    (folder / "clips").mkdir(parents=True)
    draw = np.random.default_rng(0)
    lines = ["path\tsentence\ttranslation\tclient_id"]
    for index, translation in enumerate(TRANSLATIONS):
        name = f"common_voice_en_{index}.mp3"
        wave = 0.1 * draw.standard_normal(48_000 // 2 * (1 + index % 3))
        soundfile.write(folder / "clips" / name, wave, 48_000, format="MP3")
        lines.append(f"{name}\tsentence {index}\t{translation}\tclient {index}")
    for split in ("train", "test"):
        (folder / f"covost_v2.en_sl.{split}.tsv").write_text("\n".join(lines) + "\n")


def write_pmc_vqa(folder: Path) -> None:
    """Figures and tables of version 2; one figure is missing, and one question longer than a pack may be."""
    (folder / "figures").mkdir(parents=True)
    draw = np.random.default_rng(0)
    rows = []
    for index in range(8):
        name = f"PMC825379{index}_Fig4_11.jpg"
        if index != 6:
            pixels = draw.integers(0, 256, (40 + 17 * index, 60 + 23 * (index % 3), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "figures" / name)
        question = " What color is used to label the Golgi complexes in the image?" * (12 if index == 7 else 1)
        choices = [
            f" {letter}: {choice} " for letter, choice in zip("ABCD", ("Green", "NA", "Red", "None"), strict=True)
        ]
        rows.append([index, name, 'A slightly, "highly" altered cell .', question, *choices, "ABCD"[index % 4]])
    columns = [
        "index",
        "Figure_path",
        "Caption",
        "Question",
        *(f"Choice {letter}" for letter in "ABCD"),
        "Answer",
        "split",
    ]
    for split, first in (("train", 0), ("test", 2)):
        with open(folder / f"{split}_2.csv", "w", newline="") as file:
            csv.writer(file).writerows(
                [columns, *([*row, split] for row in rows[first : 8 if split == "train" else 6])]
            )


def tiny(home: Path, name: str, run: Path, *more: str) -> Recipe:
    """A recipe as it is written, on the tiny run and the few rows."""
    overrides = [
        f"run={run}",
        f"backbone.path={home / 'backbone'}",
        f"modalities.audio.path={home / 'modalities/audio'}",
        f"modalities.vision.path={home / 'modalities/vision'}",
        f"data_root={home / ('covost2' if name == 'audio' else 'pmc_vqa')}",
        "stages.0.steps=3",
        "stages.0.samples_per_step=8",
        "stages.0.tokens_per_pack=700",
        "evaluations.test.max_new_tokens=4",
        "data_workers=0",
        "device=cpu",
        *more,
    ]
    return read(Recipe, RECIPES[name], overrides)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logged(run: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, (run / "metrics.jsonl").read_text().splitlines())


# As published

TUNING: dict[str, Any] = {
    "learning_rate": 4e-5, "schedule": "linear", "warmup_steps": 50, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-7,
    "max_gradient_norm": 1.0,
}  # fmt: skip


def test_the_speech_recipe_has_the_published_settings() -> None:
    recipe = read(Recipe, SPEECH)
    (stage,) = recipe.stages
    assert stage.train == {"adapters.audio": PartConfig(weight_decay=0.01, **TUNING)}
    assert stage.samples_per_step == 128 and stage.steps == 3 * (50_000 // 128)
    assert stage.data["clips"].limit == 50_000
    (test,) = recipe.evaluations.values()
    assert (test.data.limit, test.max_new_tokens) == (200, 64)
    assert test.metrics == ["exact_match", {"bleu": {"tokeniser": "13a"}}]


def test_the_vision_recipe_has_the_published_settings() -> None:
    recipe = read(Recipe, VISION)
    (stage,) = recipe.stages
    assert all(
        config in (PartConfig(**TUNING), PartConfig(weight_decay=0.01, **TUNING)) for config in stage.train.values()
    )
    assert stage.samples_per_step == 16 and stage.steps * 16 == stage.data["pictures"].limit == 8000
    assert stage.tokens_per_pack == 8192
    (test,) = recipe.evaluations.values()
    assert (test.data.limit, test.max_new_tokens) == (500, 64)


def test_what_decays_is_what_transformers_trainer_would_let_decay(home: Path, tmp_path: Path) -> None:
    recipe = tiny(home, "vision", tmp_path)
    model, _ = open_model(plan_recipe(recipe), "cpu")
    optimizers = set_trainable(model, recipe.stages[0].train, 3, "stages.0.train")
    decayed = {
        name: config.weight_decay > 0
        for optimizer in optimizers.values()
        for config, parameters in optimizer.groups
        for name in parameters
    }
    parts: dict[str, nn.Module] = {"encoders.vision": model.encoders["vision"]}
    parts["projectors.vision.default"] = model.projectors["vision"]["default"]  # pyright: ignore[reportIndexIssue]
    expected = {
        f"{part}.{name}": name in get_parameter_names(module, [nn.LayerNorm], ["bias"])
        for part, module in parts.items()
        for name, _ in module.named_parameters()
    }
    assert {name: decays for name, decays in decayed.items() if not name.startswith("adapters.")} == expected
    assert {decays for name, decays in decayed.items() if name.startswith("adapters.")} == {True}


def test_a_row_becomes_the_published_prompt(home: Path, tmp_path: Path) -> None:
    (clips,) = tiny(home, "audio", tmp_path).stages[0].data.values()
    heard = open_source(clips, "data")
    assert heard[1]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "audio", "path": str(home / "covost2/clips/common_voice_en_1.mp3")},
                {"type": "text", "text": "\nTranslate the audio to Slovenian."},
            ],
        },
        {"role": "assistant", "content": '"Ne!" je rekla.'},
    ]
    assert [heard[row]["messages"][1]["content"] for row in range(len(heard))] == TRANSLATIONS
    (pictures,) = tiny(home, "vision", tmp_path).stages[0].data.values()
    question, answer = open_source(pictures, "data")[1]["messages"]
    assert question["content"] == [
        {"type": "image", "path": str(home / "pmc_vqa/figures/PMC8253791_Fig4_11.jpg")},
        {
            "type": "text",
            "text": " What color is used to label the Golgi complexes in the image?\n"
            f" A: Green \n B: NA \n C: Red \n D: None \n{QUESTION}",
        },
    ]
    assert answer["content"] == "B"


# A few steps of each


@pytest.fixture(scope="module")
def trained(home: Path) -> dict[str, Path]:
    """Both recipes after three steps; each started from the same run."""
    runs = {name: home / f"run_{name}" for name in RECIPES}
    for name, run in runs.items():
        train(tiny(home, name, run), show=False)
    return runs


@pytest.mark.parametrize(
    ("name", "other", "moved", "parts"),
    [
        ("audio", "vision", {"adapter_model.safetensors"}, {"adapters.audio"}),
        (
            "vision",
            "audio",
            {"adapter_model.safetensors", "projector.safetensors", "encoder.safetensors"},
            {"adapters.vision", "encoders.vision", "projectors.vision.default"},
        ),
    ],
)
def test_a_recipe_trains_what_the_sample_trains_and_leaves_the_other_modality_byte_for_byte(
    name: str, other: str, moved: set[str], parts: set[str], home: Path, trained: dict[str, Path]
) -> None:
    before, after = files(home / "modalities" / name), files(trained[name] / "modalities" / name)
    assert before.keys() == after.keys()
    assert {file for file in before if before[file] != after[file]} == {*moved, "modality.json"}
    assert files(home / "modalities" / other) == files(trained[name] / "modalities" / other)
    *steps, _ = logged(trained[name])
    assert len(steps) == 3
    for row in steps:
        assert {key.partition("/")[2] for key in row if key.startswith("learning_rate/")} == parts
        assert row[f"loss/{name}"] > 0


def test_translations_are_judged_by_bleu_and_choices_by_exact_match(trained: dict[str, Path]) -> None:
    *_, heard = logged(trained["audio"])
    assert 0 <= heard["test/bleu"] <= 100 and heard["test/questions"] == len(TRANSLATIONS)
    *_, seen = logged(trained["vision"])
    assert 0 <= seen["test/exact_match"] <= 1 and seen["test/questions"] == 4 and "test/bleu" not in seen


# What the samples do wrong


def test_every_answer_is_learned_to_its_end_or_its_sample_is_left_out_and_counted(trained: dict[str, Path]) -> None:
    """The vision sample cuts what is too long from the right, where the answer is."""
    *steps, _ = logged(trained["vision"])
    for row in steps:
        assert row["samples"] + row["skipped"] == 8
        # A letter, <|end|> and <|endoftext|>.
        assert row["targets/vision"] == 3 * row["samples"]
    reasons = [reason for row in steps for reason in row.get("skipped_because", [])]
    assert {reason.split("@")[0] for reason in reasons} == {"sample pictures/6", "sample pictures/7"}
    assert all("tokens_per_pack" in reason for reason in reasons if reason.startswith("sample pictures/7"))


def test_padding_is_never_learned_and_a_real_token_0_is(home: Path, tmp_path: Path) -> None:
    """The samples pad ids and labels with 0 and hide every 0 from attention; only 0 is never ignored by the loss."""
    recipe = tiny(home, "audio", tmp_path)
    model, processor = open_model(plan_recipe(recipe), "cpu")
    stock = AutoModelForCausalLM.from_pretrained(home / "backbone", attn_implementation="sdpa").eval()
    asked = ["Is it!", "Where is the station, and when does the last train leave?", "!!! Why"]
    answers = ["!", "At eight!! On the left.", "No"]
    samples = []
    for index, (question, answer) in enumerate(zip(asked, answers, strict=True)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        samples.append(processor.encode(messages, str(index)))
    assert (samples[0].token_ids_T[samples[0].targets_T] == 0).sum() == 1, "an exclamation mark is token 0"

    pack = processor.collate(samples)
    assert len(pack.token_ids_T) == sum(map(len, samples))
    with torch.no_grad():
        losses = model.losses(pack)
        for sums, id in zip(losses.sums_N, pack.ids, strict=True):
            sample = samples[int(id)]
            labels_T = torch.where(sample.targets_T, sample.token_ids_T, -100)
            mean = stock(input_ids=sample.token_ids_T[None], labels=labels_T[None]).loss
            assert_close(sums, mean * (len(answers[int(id)]) + 2), what=f"loss of sample {id}")

        # What the samples' collators would make of the same three.
        labels = [torch.where(sample.targets_T, sample.token_ids_T, -100) for sample in samples]
        ids_NT, labels_NT = (
            nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
            for rows in ([sample.token_ids_T for sample in samples], labels)
        )
        theirs = stock(input_ids=ids_NT, attention_mask=(ids_NT != 0).long(), labels=labels_NT).loss
        ours = losses.sums_N.sum() / sum(losses.num_targets)
        assert abs(theirs - ours) > 0.1, "or this test could not tell"


def test_a_step_may_hold_both_modalities_and_text_each_with_its_own_adapter(home: Path, tmp_path: Path) -> None:
    """The samples write one mode into every batch."""
    recipe, vision = (tiny(home, name, tmp_path / "run") for name in ("audio", "vision"))
    (tmp_path / "talk.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Hi"}]})
    )
    stage, talk = recipe.stages[0], SourceConfig(kind="messages", options={"path": str(tmp_path / "talk.jsonl")})
    stage.data |= {**vision.stages[0].data, "talk": talk}
    stage.train |= {"adapters.vision": stage.train["adapters.audio"]}
    stage.steps, stage.samples_per_step, stage.too_long = 1, 16, "skip"
    train(recipe, show=False)
    row, _ = logged(tmp_path / "run")
    assert {key for key in row if key.startswith("loss/")} == {"loss/audio", "loss/vision", "loss/text"}
    assert {key for key in row if key.startswith("gradient_norm/")} == {
        "gradient_norm/adapters.audio",
        "gradient_norm/adapters.vision",
    }
