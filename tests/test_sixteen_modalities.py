"""Sixteen modalities from an installed package, trained, loaded and asked together; what is absent costs nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora.config import build
from molora.inference.load import LoadedModel
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.plugins import available
from molora.routing import Flow, Routing
from molora.testing import assert_close, save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe
from molora.verify.promises import verify

NAMES = [f"sense{i:02}" for i in range(16)]
TARGETS = (["qkv_proj", "o_proj"], ["down_proj"], ["gate_up_proj", "qkv_proj"])
PACKAGE = """
from molora.testing import Numbers

class Sense(Numbers):
    def load(self, part): return list(part["values"])
    def examples(self): return [{"type": self.part_type, "values": [0.5, -1.0, 2.0][:n]} for n in (1, 3)]

""" + "".join(f'class {name.title()}(Sense): part_type = "{name}"\n' for name in NAMES)


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A distribution with one module and sixteen entry points, as pip would install it."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "senses-1.0.dist-info"
    info.mkdir()
    (folder / "sixteen_senses.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: senses\nVersion: 1.0\n")
    entries = "".join(f"{name} = sixteen_senses:{name.title()}\n" for name in NAMES)
    (info / "entry_points.txt").write_text(f"[molora.modalities]\n{entries}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, site: None) -> Path:
    """A run that trained all sixteen at once."""
    folder = tmp_path_factory.mktemp("sixteen")
    save_backbone(folder / "backbone")
    with open(folder / "rows.jsonl", "w") as file:
        for name in NAMES:
            content = [{"type": name, "values": [1.0, 0.5]}, {"type": "text", "text": "which?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": name[-2:]}]
            file.write(json.dumps({"messages": messages}) + "\n")
    modalities = {
        name: {"plugin": name, "adapter": {"r": 1 + i % 3, "lora_alpha": 8, "target_modules": TARGETS[i % 3]}}
        for i, name in enumerate(NAMES)
    }
    kinds = ("encoders", "projectors", "adapters")
    stage = {
        "name": "tune",
        "train": {kind: {"learning_rate": 1e-2} for kind in kinds},
        "data": {"rows": {"kind": "messages", "options": {"path": str(folder / "rows.jsonl")}}},
        "steps": 3,
        "samples_per_step": 16,
    }
    values = {
        "run": str(folder / "run"),
        "backbone": {"path": str(folder / "backbone")},
        "modalities": modalities,
        "stages": [stage],
        "device": "cpu",
    }
    train(build(Recipe, values, "sixteen"), show=False)
    return folder


def installed(home: Path, count: int) -> LoadedModel:
    """The backbone with the first `count` of the folders."""
    return molora.load(home / "backbone", [home / "run/modalities" / name for name in NAMES[:count]], device="cpu")


@pytest.fixture(scope="module")
def sixteen(home: Path) -> LoadedModel:
    return installed(home, 16)


def asked(loaded: LoadedModel, names: list[str]) -> list[Sample]:
    """A text, and two samples of each of these modalities."""
    contents: list[Any] = ["what is a sense?"]
    for name in names:
        for part in loaded.model.modalities[name].examples():
            contents.append([part, {"type": "text", "text": f"which is it? {name}"}])
    return [loaded.encode([{"role": "user", "content": content}], f"{i}") for i, content in enumerate(contents)]


def test_all_are_listed_under_their_package() -> None:
    listed = {plugin.name: plugin for plugin in available("modality") if plugin.name in NAMES}
    assert list(listed) == NAMES
    assert {plugin.origin for plugin in listed.values()} == {"senses"}


@torch.no_grad()
def test_one_batch_holds_samples_of_all_of_them_and_each_is_as_alone(sixteen: LoadedModel) -> None:
    model, samples = sixteen.model, asked(sixteen, NAMES)
    pack = sixteen.processor.collate(samples)
    embeds_TD = model.embed(pack)
    slices = model.router(pack, embeds_TD).slices
    assert [piece.adapters for piece in slices] == [(), *((name,) for name in NAMES)]
    bare_flow = Flow(pack.lengths, Routing.by_sample([()] * len(pack), pack.lengths))
    bare_TV = model.backbone.head(model.backbone(embeds_TD, pack.position_ids_T, bare_flow))
    packed, bare = (
        dict(zip(pack.ids, logits_TV.split(pack.lengths), strict=True)) for logits_TV in (model.logits(pack), bare_TV)
    )
    for sample in samples:
        assert_close(packed[sample.id], model.logits(sixteen.processor.collate([sample])), what=sample.id)
        assert torch.equal(packed[sample.id], bare[sample.id]) == (not sample.items), "trained adapters do something"


@torch.no_grad()
def test_memory_is_the_sum_of_its_parts(home: Path, sixteen: LoadedModel) -> None:
    def size(tensors: dict[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())

    def held(model: MoLoRA) -> int:
        return size({**dict(model.named_parameters()), **dict(model.named_buffers())})

    empty = installed(home, 0).model
    parts = [size(load_file(path)) for path in (home / "run/modalities").glob("*/*.safetensors")]
    assert len(parts) == 3 * 16 and min(parts) > 0
    assert held(sixteen.model) == held(empty) + sum(parts)


class Operations(TorchDispatchMode):
    """Every operation that torch runs, with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(value.shape) for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_forward_runs_the_same_operations_whatever_else_is_installed(home: Path, sixteen: LoadedModel) -> None:
    def operations(loaded: LoadedModel, names: list[str]) -> list[tuple[str, list[tuple[int, ...]]]]:
        pack = loaded.processor.collate(asked(loaded, names))
        loaded.model.logits(pack)  # the first time also makes the rotary frequencies
        with Operations() as operations:
            loaded.model.logits(pack)
        return operations.seen

    two = operations(installed(home, 2), NAMES[:2])
    assert operations(sixteen, NAMES[:2]) == two
    more = operations(sixteen, NAMES[:3])
    adapted = [sum(name == "aten.addmm.default" for name, _ in seen) for seen in (two, more)]
    assert 0 < adapted[0] < adapted[1], "one more that is present does cost"


def test_the_promises_hold_with_all_of_them(home: Path, sixteen: LoadedModel) -> None:
    assert verify(sixteen, [], {name: home / "run/modalities" / name for name in NAMES})
