"""Made data and weights in the layout of the public ones, and a tiny backbone, for the tiny form of every page."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.evidence.yamnet import Yamnet, YamnetConfig
from molora.plugins import find
from molora.testing import save_backbone

ROWS = 4


def backbone(folder: Path) -> Path:
    return folder if folder.is_dir() else save_backbone(folder)


def data_root(folder: Path) -> Path:
    """Writes the made sets and weights, once."""
    if folder.is_dir():
        return folder
    draw = np.random.default_rng(0)
    tables: dict[str, Callable[[int], dict[str, Any]]] = {
        "cifar10": lambda n: {"label_name": ("cat", "dog")[n % 2], "image": _picture(draw)},
        "fsdd": lambda n: {"text": ("one", "two")[n % 2], "audio": _sound(draw, 0.4)},
        "ecg5000": lambda n: {"label_name": "normal", "series": draw.normal(size=140).tolist()},
        "racket_sports": lambda n: {
            "label_name": ("Badminton_Clear", "Badminton_Smash")[n % 2],
            "sampling_hz": 10.0,
            "series": draw.normal(size=(6, 30)).tolist(),
        },
        "omniglot_strokes": lambda n: {
            "alphabet": ("Greek", "Latin")[n % 2],
            "strokes": [[[float(x), float(y), 10.0 * i] for i, (x, y) in enumerate(draw.integers(0, 99, (5, 2)))]],
        },
    }
    for split in ("train", "val"):
        for name, make in tables.items():
            made = [{"id": f"{split}{n}", **make(n)} for n in range(ROWS)]
            (folder / name).mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), folder / name / f"{split}.parquet")
        (folder / "esc/audio").mkdir(parents=True, exist_ok=True)
        sounds = []
        for n in range(ROWS):
            (folder / f"esc/audio/{split}{n}.flac").write_bytes(_sound(draw, 1.0))
            sounds.append({"id": f"{split}{n}", "audio": f"audio/{split}{n}.flac", "category": ("rain", "dog")[n % 2]})
        _write_lines(folder / f"esc/{split}.jsonl", sounds)
        # A word of the tiny tokenizer is a letter, and few letters take as long as these to say.
        stories = [{"text": f"{'W' if split == 'train' else 'X'} w {letter}."} for letter in "xyzw"]
        _write_lines(folder / f"tinystories/{split}.jsonl", stories)
        (folder / "read_speech/audio").mkdir(parents=True, exist_ok=True)
        (folder / f"read_speech/audio/{split}.flac").write_bytes(_sound(draw, 1.0))
        said = {"id": split, "audio": f"audio/{split}.flac", "text": "Cats.", "language": "en"}
        _write_lines(folder / f"read_speech/{split}.jsonl", [said])
        asked = [{"instruction": f"Say {n}.", "input": ""} for n in range(ROWS)]
        _write_lines(folder / f"self_instruct_seed/{split}.jsonl", asked)
    _write_weights(folder / "weights")
    return folder


@torch.no_grad()
def _write_weights(folder: Path) -> None:
    torch.manual_seed(0)
    about = {"timm_model": "test_efficientnet", "timm_kwargs": {}}
    tower: Any = timm.create_model("test_efficientnet")
    keyword: Any = find("modality", "examples/keyword_transformer/keyword_transformer.py:KeywordTransformer").plugin
    listener = keyword("digits", keyword.config_type()).build_encoder()
    for parameter in listener.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tagger: Any = Yamnet("sounds", YamnetConfig()).build_encoder()
    tagger.mel.weight.abs_()  # bands are sums of magnitudes
    for name, module in {"mobilenetv2_100": tower, "kwt1": listener, "yamnet": tagger}.items():
        (folder / name).mkdir(parents=True)
        save_file(module.state_dict(), folder / name / "model.safetensors")
    (folder / "mobilenetv2_100/meta.json").write_text(json.dumps(about), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def _picture(draw: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _sound(draw: np.random.Generator, seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, draw.normal(size=int(16_000 * seconds)) / 10, 16_000, format="FLAC")
    return file.getvalue()
