"""The data of the pages: public sets, brought into rows of messages, and the folder of a timm tower.

`data_root` holds a folder a set, as the table in docs/results says, and `weights/` with the public encoders.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet

from benchmarks.evidence import spoken
from molora.storage import write_atomically, write_folder, write_text

# The default system message of a chat template may be longer than all else in a prompt.
SYSTEM = "Answer in a word."
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Task:
    """A set as a task: the modality that learns it has its name. `part` makes the content part of a row."""

    name: str
    files: str
    prompt: str
    label: str
    part: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    about: str
    short: Mapping[str, str] | None = None

    def answer(self, row: Mapping[str, Any]) -> str:
        label = str(row[self.label])
        return label if self.short is None else self.short[label]


def _bytes(part_type: str, column: str) -> Callable[[Mapping[str, Any], Path], dict[str, Any]]:
    def part(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        value = row[column]
        data = value if isinstance(value, bytes) else (folder / value).read_bytes()
        return {"type": part_type, "base64": base64.b64encode(data).decode()}

    return part


def _values(part_type: str, *columns: str) -> Callable[[Mapping[str, Any], Path], dict[str, Any]]:
    return lambda row, _: {"type": part_type, **{column: row[column] for column in columns}}


TASKS = {
    task.name: task
    for task in (
        Task(
            *("pictures", "cifar10/{}.parquet", "what is it?", "label_name", _bytes("image", "image")),
            "CIFAR-10, 10,000 of its training pictures and 1,500 others of them held out, all as JPEG copies, in which "
            "models see worse by 5 to 10 points",
        ),
        Task(
            *("digits", "fsdd/{}.parquet", "which digit?", "text", _bytes("audio", "audio")),
            "Free Spoken Digit Dataset (CC BY-SA 4.0): six speakers, all of them in both splits; 1,500 clips to train "
            "on, 300 held out",
        ),
        Task(
            *("sounds", "esc/{}.jsonl", "what is heard?", "category", _bytes("sound", "audio")),
            "ESC-50, the 22 of its classes that were at hand: 110 clips of five seconds to train on, 22 held out; no "
            "recording is in both",
        ),
        Task(
            *("beats", "ecg5000/{}.parquet", "which beat?", "label_name", _values("series", "series")),
            "ECG5000: single heart beats of one patient, 350 to train on, 60 held out; two of five classes make up "
            "nearly all",
            {
                "normal": "normal",
                "R-on-T premature ventricular contraction": "early",
                "premature ventricular contraction": "ventricular",
                "supraventricular premature or ectopic beat": "ectopic",
                "unclassified beat": "unknown",
            },
        ),
        Task(
            *("rackets", "racket_sports/{}.parquet", "which stroke?", "label_name"),
            _values("series", "series", "sampling_hz"),
            "RacketSports: accelerometer and gyroscope of a watch, 120 strokes to train on, 31 held out",
            {
                "Badminton_Clear": "clear",
                "Badminton_Smash": "smash",
                "Squash_BackhandBoast": "backhand",
                "Squash_ForehandBoast": "forehand",
            },
        ),
        Task(
            *("strokes", "omniglot_strokes/{}.parquet", "which alphabet?", "alphabet", _values("strokes", "strokes")),
            "Omniglot, the pen's strokes of five alphabets (MIT): 1,904 drawings to train on, 272 of other people held "
            "out",
        ),
    )
}


def prepare(data_root: Path, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Writes the rows of some tasks to `folder/NAME/{train,val}.jsonl`, once, and what they are made of. The rows are
    in a random order, so that the first ones of a file are a sample of it. Of two tasks joined by "+", whose own names
    come before, the rows of both are asked together, one by one. Returns what is known of each."""
    found: dict[str, Any] = {}
    for name in names:
        target = folder / name
        if not target.is_dir():
            with write_folder(target) as draft:
                if name == "speech":
                    about = spoken.write(data_root, draft, folder / "clips")
                elif "+" in name:
                    about = _of_pair(folder, draft, *name.split("+"))
                else:
                    about = _of_task(data_root, draft, name)
                write_text(draft / "about.json", json.dumps(about, indent=1))
        found[name] = json.loads((target / "about.json").read_text(encoding="utf-8"))
    return found


def _of_task(data_root: Path, draft: Path, name: str) -> dict[str, Any]:
    task, files, counts = TASKS[name], {}, {}
    for split in SPLITS:
        source = data_root / task.files.format(split)
        lines = [json.dumps(_messages(task, row, source.parent)) for row in _read(source)]
        lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
        write_text(draft / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
        files[task.files.format(split)] = hashlib.sha256(source.read_bytes()).hexdigest()
        counts[split] = len(lines)
    return {"about": task.about, "files": files, "rows": counts}


def _of_pair(folder: Path, draft: Path, first: str, second: str) -> dict[str, Any]:
    counts = {}
    for split in SPLITS:
        pairs = list(zip(*(_read(folder / name / f"{split}.jsonl") for name in (first, second)), strict=False))
        write_text(draft / f"{split}.jsonl", "".join(f"{json.dumps(_joined(*pair))}\n" for pair in pairs))
        counts[split] = len(pairs)
    return {"about": f"each of the {second} beside one of the {first}", "files": {}, "rows": counts}


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two rows as one message with both media, and one answer with the answers to both."""
    (system, one, answer), (_, other, also) = first["messages"], second["messages"]
    asked = [one["content"][0], other["content"][0], {"type": "text", "text": "what is it, and which digit?"}]
    told = {"role": "assistant", "content": f"{answer['content']}, {also['content']}"}
    return {"id": f"{first['id']}+{second['id']}", "messages": [system, {"role": "user", "content": asked}, told]}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from pyarrow.parquet.read_table(path).to_pylist()
    else:
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _messages(task: Task, row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    asked = [task.part(row, folder), {"type": "text", "text": task.prompt}]
    turns = {"system": SYSTEM, "user": asked, "assistant": task.answer(row)}
    return {"id": str(row["id"]), "messages": [{"role": role, "content": said} for role, said in turns.items()]}


def copy_encoders(data_root: Path, folder: Path) -> None:
    """The public encoders where recipes find them: two files of weights, and a folder of timm's MobileNetV2 as timm's
    own save_for_hf writes them, from its weights and their meta.json."""
    for name in ("kwt1", "yamnet"):
        if not (target := folder / f"{name}.safetensors").is_file():
            write_atomically(target, partial(shutil.copyfile, data_root / f"weights/{name}/model.safetensors"))
    source, target = data_root / "weights/mobilenetv2_100", folder / "mobilenetv2"
    if not target.is_dir():
        about = json.loads((source / "meta.json").read_text(encoding="utf-8"))
        colours = {"mean": [0.5] * 3, "std": [0.5] * 3}
        config = {"architecture": about["timm_model"], "model_args": about["timm_kwargs"], "pretrained_cfg": colours}
        with write_folder(target) as draft:
            shutil.copyfile(source / "model.safetensors", draft / "model.safetensors")
            write_text(draft / "config.json", json.dumps(config))


def texts(data_root: Path, count: int) -> list[str]:
    """Stories of TinyStories that nobody trains on."""
    lines = (data_root / "tinystories/val.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines[:count]]


def questions(data_root: Path, count: int) -> list[str]:
    """Instructions that people wrote, with their input."""
    rows = map(json.loads, (data_root / "self_instruct_seed/val.jsonl").read_text(encoding="utf-8").splitlines())
    asked = [f"{row['instruction']}\n{row['input']}".strip() for row in rows]
    return sorted(asked, key=len)[:count]
