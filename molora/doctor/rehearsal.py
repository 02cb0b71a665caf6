"""A recipe in small: its stages, parts, columns and templates as they stand, with a tiny backbone, tiny towers and a
few made rows, so that a mistake shows in a minute and not after a download."""

import base64
import io
import json
import wave
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import parse_hf_uri
from PIL import Image

from molora.checkpoint.assembly import ModalityConfig
from molora.checkpoint.modality_folder import read_about
from molora.config import ConfigError, did_you_mean
from molora.config.plain_yaml import parse
from molora.data.sources import SourceConfig
from molora.storage import write_atomically, write_folder, write_text
from molora.terminal import warn
from molora.testing.tiny import save_backbone
from molora.train.recipe import Recipe

# What public datasets hold, column by column.
_DATASETS = Path(__file__).parents[1] / "configs" / "datasets.yaml"

_OF_THE_HUB = ("subset", "split", "revision", "disk_gib")
# The types of parts that the built-in modalities answer to.
_PARTS = {"vision": "image", "audio": "audio"}

# Kinds of sources whose files may be made.
_MADE = ("messages", "preferences")

_ROWS = 4
_STEPS = 2
_SAMPLES = 2
_TOWERS: dict[str, dict[str, Any]] = {
    "vision": {
        "crop_pixels": 32,
        "max_crops": 1,
        "pool": 2,
        "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}},
    },
    "audio": {
        "tower": {"conformer": {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}}
    },
}


def rehearsed(recipe: Recipe) -> Recipe:
    """The recipe in small, in a run folder beside its own whose name ends in `-tiny`, as those do of modalities that
    another run trained. Datasets of the hub become rows of the same columns, and files of conversations or preferences
    that are not there yet made ones; other sources stay what they are. Nothing is sent to trackers.

    Raises ConfigError for a dataset of the hub whose columns `configs/datasets.yaml` does not have, ImportError without
    the `datasets` extra."""
    run = Path(f"{recipe.run}-tiny")
    # Adapters name layers as the backbone's family does.
    family = "phi4-mini" if any("qkv_proj" in str(m.adapter) for m in recipe.modalities.values()) else "llama"
    backbone = run.parent / f"tiny-{family}"
    if not backbone.exists():
        with write_folder(backbone) as folder:
            save_backbone(folder, family)
    known: Any = parse(_DATASETS.read_text(encoding="utf-8"))
    made: dict[str, Path] = {}
    modalities = {name: _tiny_modality(modality) for name, modality in recipe.modalities.items()}
    media = [_PARTS[plugin] for each in modalities.values() if (plugin := _plugin_of(each)) in _PARTS]

    def tiny(source: SourceConfig) -> SourceConfig:
        return _tiny_source(source, run / "rows", known, made, media)

    stages = [
        replace(
            stage,
            data={name: tiny(source) for name, source in stage.data.items()},
            steps=_STEPS,
            epochs=0.0,
            samples_per_step=_SAMPLES,
        )
        for stage in recipe.stages
    ]
    return replace(
        recipe,
        run=str(run),
        backbone=replace(recipe.backbone, path=str(backbone), revision=None, dtype="float32"),
        modalities=modalities,
        stages=stages,
        evaluations={
            name: replace(evaluation, data=replace(tiny(evaluation.data), limit=_SAMPLES))
            for name, evaluation in recipe.evaluations.items()
        },
        data_workers=0,
        feature_cache=None,
        trackers=[],
    )


def _plugin_of(modality: ModalityConfig) -> str:
    """The plugin of a modality, which one that another run trained has in its folder."""
    if modality.path is None:
        return str(modality.plugin)
    try:
        return read_about(Path(modality.path))["plugin"]
    except ConfigError as error:
        run = str(Path(modality.path).parents[1]).removesuffix("-tiny")
        raise ConfigError(f"{error}; train it first, by its own recipe with --tiny run={run}") from error


def _tiny_modality(modality: ModalityConfig) -> ModalityConfig:
    if modality.path is not None:
        path = Path(modality.path)
        run = path.parents[1]
        return replace(modality, path=str(run.with_name(f"{run.name}-tiny") / path.relative_to(run)))
    options = {**modality.options, **_TOWERS.get(str(modality.plugin), {})}
    return replace(modality, options=options, adapter={**(modality.adapter or {}), "r": 4})


def _tiny_source(
    source: SourceConfig, folder: Path, known: Mapping[str, Any], made: dict[str, Path], media: Sequence[str]
) -> SourceConfig:
    """A source of a hub's dataset as one of rows in `folder`, `made` once for each dataset; any other as it is. Those
    of conversations show `media`."""
    path = source.options.get("path")
    if not isinstance(path, str) or Path(path).exists():
        return source
    if source.kind in _MADE:
        warn(f"{path} is not there: made rows stand for it")
        return replace(source, options={"path": str(_conversations(folder, media, source.kind))}, limit=None)
    options = {key: value for key, value in source.options.items() if key not in _OF_THE_HUB}
    if source.kind == "shards" and path.startswith("hf://"):
        if "prompt" not in options:
            made_rows = _conversations(folder, media, "messages")
            return replace(source, kind="messages", options={"path": str(made_rows)}, limit=None)
        path = parse_hf_uri(path).id
        options["media"] = {part: column.partition(";")[0] for part, column in options.get("media", {}).items()}
    elif source.kind != "table":
        return source
    if path not in known:
        near = did_you_mean(path, known)
        raise ConfigError(
            f"{path}: neither a file here, nor among the datasets of the hub whose columns are known; {near}give a "
            f"file, or add its columns to {_DATASETS}"
        )
    if path not in made:
        made[path] = folder / f"{path.replace('/', '--')}.parquet"
        write_atomically(made[path], lambda temporary: write_rows(known[path]["columns"], temporary))
    return replace(source, kind="table", options={**options, "path": str(made[path])}, limit=None)


def _conversations(folder: Path, media: Sequence[str], kind: str) -> Path:
    """A file of rows of this kind in `folder`, each of which shows one medium of each type."""
    path = folder / f"{kind}.jsonl"
    rows = []
    for row in range(_ROWS):
        shown = [{"type": part, "base64": base64.b64encode(_MEDIA[part](row)).decode()} for part in media]
        asked = {"role": "user", "content": [*shown, {"type": "text", "text": f"words of row {row}"}]}
        answered = {"messages": [asked, {"role": "assistant", "content": f"answer {row}"}]}
        preferred = {"prompt": [asked], "chosen": f"answer {row}", "rejected": "another answer"}
        rows.append(json.dumps(preferred if kind == "preferences" else answered))
    write_text(path, "\n".join(rows))
    return path


def write_rows(columns: Mapping[str, Any], path: Path) -> None:
    """Writes made rows with these columns, each said as in `configs/datasets.yaml`, as a parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("made rows are Parquet, which needs pyarrow: pip install 'molora[datasets]'") from error
    rows = [_made(columns, row) for row in range(_ROWS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _made(shape: Any, row: int, column: str = "") -> Any:
    """A value of a shape: a kind by its name, a list of one shape, or shapes by name. No two columns have one text,
    and a number may be that of one of two options."""
    if isinstance(shape, list):
        return [_made(shape[0], row, column), _made(shape[0], row + 1, column)]
    if isinstance(shape, Mapping):
        return {name: _made(inner, row, name) for name, inner in shape.items()}
    if shape in _MEDIA:
        return {"bytes": _MEDIA[shape](row), "path": None}
    return {"text": f"{column} of row {row}", "number": row % 2}[shape]


def _picture(row: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _clip(row: int) -> bytes:
    """Half a second of a tone, 16-bit WAV at 16 kHz."""
    tone = np.sin(np.arange(8000) * (0.1 + 0.02 * row)) * 2**14
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 16_000, 0, "NONE", ""))
        writer.writeframes(tone.astype("<i2").tobytes())
    return file.getvalue()


_MEDIA = {"image": _picture, "audio": _clip}
