"""The main job end to end on an embedded default: a small backbone learns to see and to hear, and answers questions.
The backbone is pretrained on the spot, or SmolLM2 from an installed package.

Vision and audio are trained apart, in runs of their own, and put together by naming their folders; what is trained on
top is the projector for sound beside a picture. Everything lies in one folder. What is there is reused; what was
interrupted goes on.
"""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from molora.checkpoint.assembly import BackboneConfig
from molora.checkpoint.opening import model_hashes
from molora.checkpoint.pretrained import fetch
from molora.checkpoint.stock import load_tokenizer, open_stock, read_dtype
from molora.config import dump, plain_yaml, read
from molora.data.easy_vqa import CAPTION_QUESTION, TRANSCRIPT_QUESTION, caption, descriptions, read_split
from molora.data.sources import open_source
from molora.demo.two import in_two
from molora.evaluate.judge import Evaluation, EvaluationConfig, Evaluations
from molora.evaluate.kept_media import kept
from molora.evaluate.metrics import Judged, open_metrics, scores
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel, load
from molora.interrupt import Stopped
from molora.pretrain.loop import PretrainConfig, pretrain
from molora.ranks import launched_ranks
from molora.received import file_hash, read_json
from molora.report.page import Example, Media, Report, read_history
from molora.report.page import write as write_report
from molora.seeding import seed_of
from molora.storage import write_json, write_text
from molora.terminal import print_table, progress, say
from molora.train.loop import train
from molora.train.recipe import Recipe

# How a picture is put into words for the backbone's reading practice; {0} is the colour, {1} the shape.
_PHRASES = (
    *("{0} {1}", "a {0} {1}.", "the picture shows a {0} {1}.", "there is a {0} {1}.", "{1}, {0}.", "this {1} is {0}."),
)
_ENGLISH_CHARACTERS = 60_000
_CAPTIONS_READ = 2
_TEXTS_REPEATED = 6_000
_QUICK_ROWS = 4_000
_SHOWN_EXAMPLES = 10
_SHOWN_MISTAKES = 3
_OFFERED_EXAMPLES = 2

# Where recipes are, in a checkout and where molora is installed.
_CONFIGS = Path(__file__).parents[1] / "configs"
# Recipes by the phase that trains by them. Those of another backbone than the small one have its name before theirs.
_RECIPES = {"vision": "easy_vqa.yaml", "audio": "speech.yaml", "spoken questions": "vision_speech.yaml"}
BackboneName = Literal["small", "smollm2"]

BEFORE = "written question, before audio"
WRITTEN = "written question"
BLIND = "written question, no picture"
SPOKEN = "spoken question"
TRANSCRIPT = "transcript"
TEXT = "text question"
_ABOUT = {
    "small": (
        "A small language model was pretrained on English, on questions about pictures put into words and on texts to "
        "repeat, then frozen."
    ),
    "smollm2": "SmolLM2-135M-Instruct, a released language model, was frozen.",
}
_GOALS = {
    "small": {
        (WRITTEN, "exact match"): 0.90,
        (WRITTEN, "not yes/no"): 0.85,
        (SPOKEN, "exact match"): 0.75,
        (TRANSCRIPT, "words right"): 0.90,
        (TEXT, "as without molora"): 1.0,
    },
    "smollm2": {
        (WRITTEN, "exact match"): 0.95,
        (SPOKEN, "exact match"): 0.70,
        (TRANSCRIPT, "words right"): 0.85,
        (TEXT, "as without molora"): 1.0,
    },
}
# What the backbone is asked in writing, without molora and after everything was trained, and how long it may answer.
_WRITTEN_TO_ALL = ("What is the capital of France?", "Write a sentence about the sea.")
_TEXT_TOKENS = 24


class Demo(NamedTuple):
    """The folder that the demo writes, the backbone it is about, and whether it takes a few steps of everything."""

    run: Path
    backbone: BackboneName = "small"
    quick: bool = False


def run_demo(demo: Demo) -> Path:
    """Makes and freezes a backbone, trains vision and audio apart and then what joins them, evaluates, reports. Returns
    the path of report.html. Raises ValueError if a file of the vision modality changed while audio was trained."""
    run = demo.run
    clock = _Clock(run / "seconds.json")
    with clock.phase("backbone"):
        if demo.backbone == "small":
            with progress() as bars:
                pretrain(backbone_config(run, demo.quick), bars)
        without = answers_without_molora(demo_recipes(demo)["vision"].backbone)
    for name in _RECIPES:
        with clock.phase(name):
            in_two(_train, demo, name)
    untouched = _untouched(run)
    with clock.phase("evaluation"):
        judged = in_two(_evaluate, demo, list(evaluations(demo)))
    loaded = load(run)
    judged[TEXT] = answer_texts(loaded, without)
    _write_examples(judged, run)
    _answer_live(demo, loaded)
    path = write_report(_report(demo, loaded, judged, untouched, clock), run)
    say(f"report: {path}")
    return path


def demo_recipes(demo: Demo) -> dict[str, Recipe]:
    """Vision, audio and what joins them: the recipes in `configs/`, in the demo's folder."""
    folders = {"vision": demo.run / "vision", "audio": demo.run / "audio", "spoken questions": demo.run}
    recipes = {}
    for name, file in _RECIPES.items():
        changes = _set(run=folders[name], data_root=demo.run)
        recipes[name] = recipe = read(Recipe, _config(demo, file), changes)
        if demo.quick:  # a matter of minutes
            for index, stage in enumerate(recipe.stages):
                changes += [f"stages.{index}.steps=5", f"stages.{index}.samples_per_step=8"]
                spoken = [source for source, config in stage.data.items() if "takes" in config.options]
                changes += [f"stages.{index}.data.{source}.options.takes=2" for source in spoken]
            changes += [f"evaluations.{evaluation}.data.limit=20" for evaluation in recipe.evaluations]
            recipes[name] = read(Recipe, _config(demo, file), changes)
    return recipes


def backbone_config(run: Path, quick: bool) -> PretrainConfig:
    """A decoder of Phi-4-mini's shape, pretrained on English and on practice from the training questions, in words."""
    text = [str(path) for path in _write_text(run / "text", quick)]
    changes = _set(output=run / "backbone", text=text, steps=10 if quick else 900, learning_rate=1e-3)
    return read(PretrainConfig, _CONFIGS / "pretrain_small.yaml", changes)


def evaluations(demo: Demo) -> dict[str, EvaluationConfig]:
    """What the report tells, by name."""
    fewer = [f"evaluations.{name}.data.limit=40" for name in (BEFORE, WRITTEN, BLIND, SPOKEN, TRANSCRIPT)]
    changes = [*_set(data_root=demo.run), *(fewer if demo.quick else ())]
    return read(Evaluations, _config(demo, "demo_test.yaml"), changes, in_part=True).evaluations


def _config(demo: Demo, file: str) -> Path:
    return _CONFIGS / (file if demo.backbone == "small" else f"{demo.backbone}_{file}")


def _set(**values: Any) -> list[str]:
    """Overrides that give keys these values, whatever characters are in a path: YAML on one line, as JSON is."""
    texts = {key: dump(str(value) if isinstance(value, Path) else value) for key, value in values.items()}
    return [f"{key}={json.dumps(plain_yaml.parse(text), ensure_ascii=False)}" for key, text in texts.items()]


def _write_text(folder: Path, quick: bool) -> list[Path]:
    """English from the language reference inside every Python; training questions about pictures put into words; and
    texts to repeat, which is what transcribing is for a reader. `quick` writes fewer rows, in another file."""
    from pydoc_data.topics import topics

    english, reading = folder / "english.txt", folder / ("quick_reading.jsonl" if quick else "reading.jsonl")
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
        texts = sorted({question for question, _, _ in questions})
        words = sorted({word.rstrip("?") for text in texts for word in text.split()})
        for index in range(_TEXTS_REPEATED):
            text = draw.choice(texts) if index % 2 else " ".join(draw.choices(words, k=draw.randint(3, 9)))
            said = {"role": "user", "content": f"{text} {TRANSCRIPT_QUESTION}"}
            rows.append(json.dumps({"messages": [said, {"role": "assistant", "content": text}]}))
        draw.shuffle(rows)
        write_text(reading, "\n".join(rows[: _QUICK_ROWS if quick else None]))
    return [english, reading]


def _untouched(run: Path) -> int:
    """The number of files of the vision modality, all byte-identical to what its own run wrote."""
    before, after = run / "vision" / "modalities" / "vision", run / "modalities" / "vision"
    names = sorted(path.name for path in before.iterdir())
    changed = [name for name in names if file_hash(before / name) != file_hash(after / name)]
    if changed or names != sorted(path.name for path in after.iterdir()):
        wrong = f"{after}: differs from {before} in {changed or 'its list of files'}"
        raise ValueError(f"{wrong}; training audio changed vision")
    return len(names)


def answers_without_molora(given: BackboneConfig) -> list[str]:
    """What the backbone answers to the written questions, by transformers alone."""
    folder = fetch(given.path)
    tokenizer: Any = load_tokenizer(folder)
    model: Any = open_stock(folder, read_dtype(given.dtype) if given.dtype else "auto")
    model.set_attn_implementation("sdpa")
    answers = []
    for question in _WRITTEN_TO_ALL:
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        written = model.generate(**asked, max_new_tokens=_TEXT_TOKENS, do_sample=False)
        answers.append(tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def answer_texts(loaded: LoadedModel, without: list[str]) -> list[Judged]:
    """The answers to the written questions now, beside those that transformers gave before."""
    conversations = [[{"role": "user", "content": question}] for question in _WRITTEN_TO_ALL]
    answers = loaded.generate(conversations, GenerationConfig(max_new_tokens=_TEXT_TOKENS))
    judged = []
    for row, (asked, expected, answer) in enumerate(zip(conversations, without, answers, strict=True)):
        say(f"{_WRITTEN_TO_ALL[row]} {answer}")
        judged.append(Judged(f"{row}", asked, expected, answer, answer == expected))
    return judged


def _train(demo: Demo, name: str) -> None:
    """Trains one of the demo's recipes, as one of the ranks there are. Vision is evaluated before there is audio."""
    train(demo_recipes(demo)[name])
    if name == "vision":
        _evaluate(demo, [BEFORE])


def _evaluate(demo: Demo, names: Iterable[str]) -> dict[str, list[Judged]]:
    """Judged answers of all ranks, read back if this very model gave them before."""
    run = demo.run
    ranks = launched_ranks()
    found = {}
    for name in names:
        config = evaluations(demo)[name]
        loaded = load(run / "vision" if name == BEFORE else run)
        path = run / "evaluations" / f"{re.sub('[^a-z]+', '-', name)}.json"
        about = {"model": model_hashes(loaded.layout), "config": asdict(config)}
        if path.is_file() and (known := read_json(path))["of"] == about:
            found[name] = [Judged(**item) for item in known["answers"]]
            continue
        with progress(shown=ranks.is_main) as bars:
            judged = Evaluation(name, config).run(loaded, bars, shard=ranks.shard)
        found[name] = sorted(ranks.gather(judged), key=lambda item: item.row)
        if ranks.is_main:
            answers = [asdict(item) for item in found[name]]
            write_json(path, {"format_version": "1.0", "of": about, "answers": answers})
    return found


def _answer_live(demo: Demo, loaded: LoadedModel) -> None:
    """Answers one batch of text, picture, sound, and picture with sound, each with its own adapter."""
    source, draw = open_source(evaluations(demo)[SPOKEN].data, "live questions"), random.Random(0)
    *before, asked, _ = source[draw.randrange(len(source))]["messages"]
    picture, audio = asked["content"]
    written, asking = ({"type": "text", "text": text} for text in (audio["transcript"], TRANSCRIPT_QUESTION))
    batch = {
        "text": [{"type": "text", "text": f"a red circle. {audio['transcript']}"}],
        "picture": [picture, written],
        "sound": [audio, asking],
        "picture and sound": [picture, audio],
    }
    samples = [loaded.encode([*before, {"role": "user", "content": content}], name) for name, content in batch.items()]
    say(f"one batch about {Path(picture['path']).name} and “{audio['transcript']}”")
    for answer in loaded.answers(samples, GenerationConfig(max_new_tokens=24)):
        ran = ", ".join(answer.adapters) or "bare backbone"
        say(f"  {answer.id:<18} {ran:<14} {answer.text}")


def _write_examples(judged: dict[str, list[Judged]], run: Path) -> None:
    """Questions that the chat of `molora serve` offers, with their media in the run's folder."""
    draw = random.Random(seed_of(0, "offered examples"))
    rows = []
    for name in (WRITTEN, SPOKEN, TRANSCRIPT):
        for item in draw.sample(judged[name], _OFFERED_EXAMPLES):
            content = [
                part if part["type"] == "text" else {"type": part["type"], "bytes": Path(part["path"]).read_bytes()}
                for part in item.messages[-1]["content"]
            ]
            rows.append({"messages": kept([{"role": "user", "content": content}], run)})
    write_text(run / "examples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _report(demo: Demo, loaded: LoadedModel, judged: dict[str, list[Judged]], untouched: int, clock: _Clock) -> Report:
    metrics: dict[str, dict[str, float]] = {}
    rows = []
    for name, config in evaluations(demo).items():
        found = scores(judged[name], open_metrics(config.metrics, name))
        metrics[name] = {"exact match": found["exact_match"], "questions": int(found["questions"])}
        if "word_error_rate" in found:
            metrics[name]["words right"] = 1 - found["word_error_rate"]
        else:
            metrics[name] |= {"not yes/no": found["exact_match/open"], "yes/no": found["exact_match/yes/no"]}
        rows += [(name, what, f"{value:.4f}") for what, value in metrics[name].items() if isinstance(value, float)]
    same = [item.correct for item in judged[TEXT]]
    metrics[TEXT] = {"as without molora": sum(same) / len(same), "questions": len(same)}
    rows.append((TEXT, "as without molora", f"{metrics[TEXT]['as without molora']:.4f}"))
    print_table(("evaluation", "metric", "value"), rows)
    draw = random.Random(seed_of(0, "examples"))
    examples = []
    for name in (WRITTEN, SPOKEN, TRANSCRIPT):
        shown = draw.sample(judged[name], _SHOWN_EXAMPLES)
        shown += [item for item in judged[name] if not item.correct and item not in shown][:_SHOWN_MISTAKES]
        examples += [_example(item, loaded) for item in shown]
    model = loaded.model
    parts = {name: sum(p.numel() for p in parameters.values()) for name, parameters in model.parts().items()}
    facts = {
        "backbone": f"{model.num_backbone_parameters():,} parameters, frozen",
        **{name: f"{size:,} parameters" for name, size in parts.items()},
        "vision files after audio": f"{untouched} of {untouched} byte-identical",
        **{f"seconds, {name}": f"{seconds:.0f}" for name, seconds in clock.seconds.items()},
    }
    return Report(
        title="molora demo: questions about pictures, written and spoken",
        summary=(
            f"{_ABOUT[demo.backbone]} Vision and audio were trained apart, each an encoder, a projector and a LoRA "
            "adapter, and put together; then a second audio projector learned from spoken questions. The figures are "
            "from easy-VQA's test split, spoken in voices that were never trained on. Without the picture a question "
            "is text, which runs on the bare backbone and is answered as without molora, to the letter. Examples are "
            "drawn at random; a few mistakes come after them."
        ),
        metrics=metrics,
        goals=_GOALS[demo.backbone],
        examples=examples,
        history=_history(demo.run),
        facts=facts,
    )


def _history(run: Path) -> list[dict[str, Any]]:
    """The rows of the three runs as those of one: each goes on counting where the one before it ended."""
    rows: list[dict[str, Any]] = []
    for folder in (run / "vision", run / "audio", run):
        before = rows[-1]["step"] if rows else 0
        rows += [{**row, "step": before + row["step"]} for row in read_history(folder / "metrics.jsonl")]
    return rows


def _example(item: Judged, loaded: LoadedModel) -> Example:
    parts = item.messages[-1]["content"]
    question = " ".join(part["text"] for part in parts if part["type"] == "text")
    others = [part for part in parts if part["type"] != "text"]
    modalities = frozenset(loaded.processor.part_types[part["type"]] for part in others)
    adapters = tuple(sorted(loaded.model.router.adapters(modalities)))
    mime = {"image": "image/png", "audio": "audio/flac"}
    media = [Media(Path(p["path"]).read_bytes(), mime[p["type"]], p.get("transcript", "")) for p in others]
    return Example(
        question=question,
        expected=item.expected,
        answer=item.answer,
        correct=item.correct,
        adapters=adapters,
        media=tuple(media),
    )


class _Clock:
    """Seconds spent in each phase, summed over interruptions, which are told."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.is_file() else {}

    @contextmanager
    def phase(self, name: str):
        started = time.monotonic()
        try:
            yield
        except KeyboardInterrupt as stopped:
            told = f"stopped during {name}; what is done is in {self.path.parent}: start the demo again, and it goes on"
            raise Stopped(told, getattr(stopped, "number", signal.SIGINT)) from stopped
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            write_json(self.path, self.seconds)
