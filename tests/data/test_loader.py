"""The loader: what a worker encodes is what the training process would have, and it comes in one piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from molora.data.loader import join, step_loader
from molora.data.processor import Processor
from molora.data.sources import EncodedSamples, Skipped, SourceConfig
from molora.encoders.audio import Audio, AudioConfig, AugmentConfig
from molora.encoders.vision import Vision, VisionConfig
from molora.modality import MediaError
from molora.pack import Sample
from molora.testing.tiny import byte_tokenizer


def tensors_of(sample: Sample) -> list[Tensor]:
    media = [tensor for item in sample.items for tensor in item.prepared.tensors.values()]
    return [sample.token_ids_T, sample.modality_ids_T, sample.targets_T, *media]


def mixed(folder: Path) -> EncodedSamples:
    """Pictures, augmented clips, texts and a picture that is left out."""
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "a.png")
    (folder / "broken.png").write_bytes(b"nothing")
    media: list[Any] = [{"type": "image", "path": "a.png"}, {"type": "image", "path": "broken.png"}]
    contents = [*([part] for part in media), [{"type": "audio", "path": "a.wav"}], "hello"]
    pytest.importorskip("soundfile").write(folder / "a.wav", 0.1 * draw.standard_normal(8000), 16_000)
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]}
        for content in contents
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    augment = AugmentConfig(speeds=[0.9, 1.1], time_masks=2, bin_masks=2)
    modalities: Any = {
        "vision": Vision("vision", VisionConfig(crop_pixels=56)),
        "audio": Audio("audio", AudioConfig(augment=augment)),
    }
    processor = Processor(byte_tokenizer(), modalities, lambda names: sorted(names), 1000)
    source = SourceConfig(kind="messages", options={"path": str(folder / "rows.jsonl")})
    return EncodedSamples({"d": source}, processor, seed=0, max_tokens=1000, skips=(MediaError,), where="data")


def test_workers_give_the_bits_of_the_main_process_in_one_piece_a_step(tmp_path: Path) -> None:
    dataset = mixed(tmp_path)
    order: dict[str, Any] = {"first_step": 1, "steps": 4, "samples_per_step": 8, "rank": 1, "ranks": 2}
    steps = {workers: list(step_loader(dataset, **order, workers=workers)) for workers in (0, 2)}
    assert [len(step) for step in steps[0]] == [4, 4, 4]
    seen: set[frozenset[str]] = set()
    for number, (here, there) in enumerate(zip(steps[0], steps[2], strict=True)):
        shared = set()
        for place, (mine, other) in enumerate(zip(here, there, strict=True)):
            wanted = dataset[8 * (number + 1) + 1 + 2 * place]
            assert mine.id == other.id == wanted.id
            if isinstance(wanted, Skipped):
                assert mine == other == wanted
                continue
            assert isinstance(mine, Sample) and isinstance(other, Sample)
            seen.add(wanted.modalities)
            assert [item.projector for item in other.items] == [item.projector for item in wanted.items]
            for a, b, c in zip(*map(tensors_of, (mine, other, wanted)), strict=True):
                assert a.dtype == b.dtype == c.dtype and a.stride() == b.stride()
                assert torch.equal(a, c) and torch.equal(b, c)
            shared |= {tensor.untyped_storage().data_ptr() for tensor in tensors_of(other)}
        assert len(shared) == 1, "every tensor of a step lies in one shared file"
    assert seen == {frozenset(), frozenset({"vision"}), frozenset({"audio"})}


def test_a_picture_is_prepared_once_a_step_and_an_augmented_clip_for_each_sample(tmp_path: Path) -> None:
    order: dict[str, Any] = {"first_step": 0, "steps": 1, "samples_per_step": 8, "rank": 0, "ranks": 1}
    (step,) = step_loader(mixed(tmp_path), **order, workers=1)
    items = [item for sample in step if isinstance(sample, Sample) for item in sample.items]
    pictures = [item.prepared.tensors["crops_BCHW"] for item in items if item.modality == "vision"]
    clips = [item.prepared.tensors["features_SM"] for item in items if item.modality == "audio"]
    assert len(pictures) == len(clips) == 2
    assert pictures[0].data_ptr() == pictures[1].data_ptr()
    assert clips[0].shape != clips[1].shape or not torch.equal(clips[0], clips[1])


def test_tensors_of_every_kind_survive_being_joined() -> None:
    twice = torch.rand(3, 5)
    given = {
        "dtypes": [torch.arange(7).to(kind) for kind in (torch.bool, torch.uint8, torch.bfloat16, torch.float64)],
        "complex": torch.complex(torch.rand(3), torch.rand(3)).conj(),
        "number": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "turned": torch.rand(4, 6).T,
        "every other": torch.arange(10)[::2],
        "trained": torch.nn.Parameter(torch.ones(2)),
        "array": np.arange(3),
        "twice": (twice, twice),
    }
    joined = join(given)
    parted = joined.parted()
    assert isinstance(parted["trained"], torch.nn.Parameter) and parted["trained"].tolist() == [1, 1]
    assert parted["twice"][0] is parted["twice"][1] and (parted["array"] == given["array"]).all()
    for name in ("complex", "number", "nothing", "turned", "every other"):
        assert torch.equal(parted[name], given[name]) and parted[name].is_contiguous(), name
    for mine, other in zip(parted["dtypes"], given["dtypes"], strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)
    # A tensor that is there twice is sent once.
    assert joined.tensor_bytes.numel() < join({**given, "twice": (twice, twice.clone())}).tensor_bytes.numel()
