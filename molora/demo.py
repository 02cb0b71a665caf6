"""The main job end to end on an embedded default: a small backbone learns to see and answers questions about pictures.

Everything it writes lies in one run folder. What is there is reused; what was interrupted goes on.
"""

from __future__ import annotations

import json
import random
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from molora.assembly import BackboneConfig, ModalityConfig
from molora.checkpoint import file_hash
from molora.data import SourceConfig, open_source
from molora.easy_vqa import CAPTION_QUESTION, caption, descriptions, read_split
from molora.evaluate import EvaluationConfig, Judged, judge, scores
from molora.loading import LoadedModel, load
from molora.optim import PartConfig
from molora.pretrain import PretrainConfig, pretrain
from molora.report import Example, Media, Report, read_history
from molora.report import write as write_report
from molora.seeding import seed_of
from molora.storage import read_json, write_json, write_text
from molora.terminal import console, progress
from molora.train import Recipe, StageConfig, train

# How a picture is put into words for the backbone's reading practice; {0} is the colour, {1} the shape.
_PHRASES = (
    "{0} {1}",
    "a {0} {1}.",
    "the picture shows a {0} {1}.",
    "there is a {0} {1}.",
    "{1}, {0}.",
    "this {1} is {0}.",
)
_ENGLISH_CHARACTERS = 60_000
_CAPTIONS_READ = 2
_LIVE_QUESTIONS = 4
_SHOWN_EXAMPLES = 20
_SHOWN_MISTAKES = 4


def run_demo(run: Path, *, quick: bool = False) -> Path:
    """Pretrains and freezes a backbone, trains the vision modality on easy-VQA, evaluates, answers, reports.

    `quick` takes a few steps of everything. Returns the path of report.html.
    """
    clock = _Clock(run / "seconds.json")
    with clock.phase("backbone"), progress() as bars:
        backbone = pretrain(backbone_config(run, quick), bars)
    with clock.phase("training"):
        train(recipe(run, backbone, quick))
    loaded = load(run)
    with clock.phase("evaluation"):
        judged = {name: _evaluated(run, loaded, name, config) for name, config in evaluations(quick).items()}
    _answer_live(loaded)
    path = write_report(_report(run, loaded, judged, clock), run)
    console.print(f"report: {path}", highlight=False)
    return path


def backbone_config(run: Path, quick: bool) -> PretrainConfig:
    """A decoder of Phi-4-mini's shape, pretrained on English and on reading practice from the training questions."""
    return PretrainConfig(
        output=str(run / "backbone"),
        text=[str(path) for path in _write_text(run / "text")],
        vocab_size=2048,
        width=192,
        mlp_width=512,
        layers=4,
        heads=6,
        key_value_heads=2,
        window_tokens=128,
        windows_per_step=8,
        steps=10 if quick else 400,
        learning_rate=1.5e-3,
    )


def _write_text(folder: Path) -> list[Path]:
    """English from the language reference inside every Python, and training questions about pictures put into words."""
    from pydoc_data.topics import topics

    english, reading = folder / "english.txt", folder / "reading.jsonl"
    if not reading.exists():
        write_text(english, "\n\n".join(topics[name] for name in sorted(topics))[:_ENGLISH_CHARACTERS])
        questions, _ = read_split("train")
        about = descriptions(questions)
        draw = random.Random(0)
        rows = []
        asked = [row for row in questions if row[2] in about]
        asked += [(CAPTION_QUESTION, caption(*about[image]), image) for image in about for _ in range(_CAPTIONS_READ)]
        for question, answer, image in asked:
            worded = draw.choice(_PHRASES).format(*about[image])
            turns = [{"role": "user", "content": f"{worded} {question}"}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": turns}))
        draw.shuffle(rows)
        write_text(reading, "\n".join(rows))
    return [english, reading]


def recipe(run: Path, backbone: Path, quick: bool) -> Recipe:
    """Captions teach the encoder to put a picture into the backbone's words, questions then teach the adapter."""
    captions = SourceConfig(kind="easy_vqa", options={"split": "train", "task": "captions"})
    questions = SourceConfig(kind="easy_vqa", options={"split": "train"})
    curve = SourceConfig(kind="easy_vqa", options={"split": "test"}, limit=20 if quick else 300)
    return Recipe(
        run=str(run),
        backbone=BackboneConfig(path=str(backbone)),
        modalities={
            "vision": ModalityConfig(
                plugin="vision",
                options={
                    "crop_pixels": 64,
                    "max_crops": 0,
                    "pool": 4,
                    "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 96, "depth": 3, "heads": 4}},
                },
                adapter={
                    "r": 32,
                    "lora_alpha": 64,
                    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
                },
            )
        },
        stages=[
            StageConfig(
                name="captions",
                train={
                    "encoders.vision": PartConfig(learning_rate=1e-3, warmup_steps=20, schedule="constant"),
                    "projectors.vision": PartConfig(learning_rate=1e-3, warmup_steps=20, schedule="constant"),
                },
                data={"captions": captions},
                steps=5 if quick else 180,
                samples_per_step=64,
            ),
            StageConfig(
                name="questions",
                train={
                    "projectors.vision": PartConfig(learning_rate=1e-3),
                    "adapters.vision": PartConfig(learning_rate=1e-3, warmup_steps=20),
                },
                data={"questions": questions},
                steps=5 if quick else 300,
                samples_per_step=64,
                evaluate_every_steps=50,
            ),
        ],
        evaluations={"test": EvaluationConfig(data=curve, max_new_tokens=4)},
        save_every_steps=50,
    )


def evaluations(quick: bool) -> dict[str, EvaluationConfig]:
    """The whole test split, with its pictures and without."""
    data = SourceConfig(kind="easy_vqa", options={"split": "test"}, limit=40 if quick else None)
    return {
        "with the picture": EvaluationConfig(data=data, max_new_tokens=4),
        "without the picture": EvaluationConfig(data=data, max_new_tokens=4, without_media=True),
    }


def _evaluated(run: Path, loaded: LoadedModel, name: str, config: EvaluationConfig) -> list[Judged]:
    """Judged answers, read back if this very model gave them before."""
    path = run / "evaluations" / f"{name.replace(' ', '-')}.json"
    model = {"model": file_hash(run / "modalities" / "vision" / "modality.json"), "config": asdict(config)}
    if path.is_file() and (known := read_json(path))["of"] == model:
        return [Judged(**item) for item in known["answers"]]
    source = open_source(config.data, name)
    with progress() as bars:
        bar = bars.add_task(name, total=len(source), note="")
        judged = judge(loaded.model, loaded.processor, source, config, advance=lambda: bars.advance(bar))
    write_json(path, {"format_version": "1.0", "of": model, "answers": [asdict(item) for item in judged]})
    return judged


def _answer_live(loaded: LoadedModel) -> None:
    """Answers a few questions of the test split in front of the user, token by token."""
    source = open_source(SourceConfig(kind="easy_vqa", options={"split": "test"}), "live questions")
    draw = random.Random(0)
    for row in (source[draw.randrange(len(source))] for _ in range(_LIVE_QUESTIONS)):
        prompt = row["messages"][:-1]
        picture, text = prompt[0]["content"]
        console.print(f"{Path(picture['path']).name}  {text['text']} ", end="", highlight=False)
        for piece in loaded.stream(prompt):
            console.print(piece, end="", style="bold", highlight=False)
        console.print()


def _report(run: Path, loaded: LoadedModel, judged: dict[str, list[Judged]], clock: _Clock) -> Report:
    metrics: dict[str, dict[str, float]] = {}
    for name, answers in judged.items():
        found = scores(answers)
        metrics[name] = {
            "exact match": found["exact_match"],
            "not yes/no": found["exact_match/open"],
            "yes/no": found["exact_match/yes/no"],
            "questions": int(found["questions"]),
        }
        console.print(f"{name:<20} exact match {found['exact_match']:.4f}, not yes/no {found['exact_match/open']:.4f}")
    answered = judged["with the picture"]
    shown = random.Random(seed_of(0, "examples")).sample(answered, _SHOWN_EXAMPLES)
    shown += [item for item in answered if not item.correct and item not in shown][:_SHOWN_MISTAKES]
    model = loaded.model
    parts = {name: sum(p.numel() for p in parameters.values()) for name, parameters in model.parts().items()}
    adapters = sum(size for name, size in parts.items() if name.startswith("adapters."))
    facts = {
        "backbone": f"{sum(p.numel() for p in model.backbone.parameters()) - adapters:,} parameters, frozen",
        **{name: f"{size:,} parameters" for name, size in parts.items()},
        **{f"seconds, {name}": f"{seconds:.0f}" for name, seconds in clock.seconds.items()},
    }
    return Report(
        title="molora demo: questions about pictures",
        summary=(
            "A small language model was pretrained on English and on questions about pictures put into words, then "
            "frozen. A vision encoder, a projector and a LoRA adapter then learned from easy-VQA's training pictures. "
            "The figures are exact matches on its whole test split. Without the picture a question is text, which runs "
            "on the bare backbone. The examples are drawn at random; a few mistakes come after them."
        ),
        metrics=metrics,
        goals={("with the picture", "exact match"): 0.90, ("with the picture", "not yes/no"): 0.85},
        examples=[_example(item, loaded) for item in shown],
        history=read_history(run / "metrics.jsonl"),
        facts=facts,
    )


def _example(item: Judged, loaded: LoadedModel) -> Example:
    picture, text = item.messages[0]["content"]
    modality = loaded.processor.part_types[picture["type"]]
    return Example(
        question=text["text"],
        expected=item.expected,
        answer=item.answer,
        correct=item.correct,
        adapters=tuple(sorted(loaded.model.router.adapters(frozenset({modality})))),
        media=(Media(Path(picture["path"]).read_bytes(), "image/png"),),
    )


class _Clock:
    """Seconds spent in each phase, summed over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    @contextmanager
    def phase(self, name: str):
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            write_json(self.path, self.seconds)
