"""Figures show what the pack, the routing and the adapters hold."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.pretrained import load_backbone
from molora.data.processor import Processor
from molora.model.lora import RoutedLinear
from molora.model.molora import MoLoRA
from molora.report.figures import adapter_similarity, pack_figure, similarity_figure, weights_figure
from molora.testing import save_backbone

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[MoLoRA, Processor]:
    backbone, tokenizer = load_backbone(str(save_backbone(tmp_path_factory.mktemp("backbone"))))
    adapter = {"r": 3, "init_lora_weights": False, "target_modules": ["qkv_proj", "down_proj"]}
    plans = {
        name: blueprint(name, f"molora.testing:{name.title()}", {}, adapter, name) for name in ("numbers", "letters")
    }
    router = RouterConfig(plugin="sum", options={"weights": {"letters+numbers": {"letters": 0.25, "numbers": 0.75}}})
    return assemble(backbone, tokenizer, plans, router)


def packed(built: tuple[MoLoRA, Processor]) -> tuple[Any, Any]:
    model, processor = built
    numbers, letters = model.modalities["numbers"].examples()[1], model.modalities["letters"].examples()[1]
    contents = {"a": "text alone", "b": [numbers], "c": [numbers, {"type": "text", "text": "and"}, letters]}
    samples = [
        processor.encode([{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], id)
        for id, content in contents.items()
    ]
    pack = processor.collate(samples)
    with torch.no_grad():
        return pack, model.router(pack, model.embed(pack))


def bars(axes: Any, row: int) -> list[tuple[float, float]]:
    """Start and stop of the bars of a row, neighbours of one colour joined."""
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches if round(bar.get_y() + 0.4) == row]


def image(figure: Any) -> np.ndarray:
    return np.asarray(figure.axes[0].images[0].get_array())


def test_a_pack_is_drawn_as_it_lies(built: tuple[MoLoRA, Processor]) -> None:
    pack, routing = packed(built)
    (axes,) = pack_figure(pack, routing, list(built[0].modalities)).axes
    ends = [0, *torch.tensor(pack.lengths).cumsum(0).tolist()]
    assert bars(axes, 3) == list(itertools.pairwise(ends))
    assert bars(axes, 1) == [(piece.start, piece.stop) for piece in routing.slices]
    targets = [index for start, stop in bars(axes, 0) for index in range(int(start), int(stop))]
    assert targets == pack.targets_T.nonzero()[:, 0].tolist()
    covered = [(int(stop) - int(start)) for start, stop in bars(axes, 2)]
    assert sum(covered) == ends[-1]
    shown = {text.get_text() for text in axes.texts}
    assert {"a", "b", "c", "bare backbone", "numbers", "letters + numbers"} <= shown


def test_weights_are_drawn_token_by_token(built: tuple[MoLoRA, Processor]) -> None:
    pack, routing = packed(built)
    drawn = torch.from_numpy(image(weights_figure(pack, routing, ["letters", "numbers"])))
    length = dict(zip(pack.ids, pack.lengths, strict=True))
    start = {id: sum(pack.lengths[:index]) for index, id in enumerate(pack.ids)}
    for id, weights in (("a", [0.0, 0.0]), ("b", [0.0, 1.0]), ("c", [0.25, 0.75])):
        piece = drawn[:, start[id] : start[id] + length[id]]
        assert torch.equal(piece, torch.tensor(weights)[:, None].expand(2, length[id]).to(piece.dtype)), id


def test_similarity_is_the_cosine_of_the_changes(built: tuple[MoLoRA, Processor]) -> None:
    model = built[0]
    found = adapter_similarity(model, "numbers", "letters")
    layers = {path: m for path, m in model.backbone.model.named_modules() if isinstance(m, RoutedLinear)}
    assert found.keys() == layers.keys() and len(found) == 4
    for path, layer in layers.items():
        changes = [layer.get_delta_weight(name).flatten() for name in ("numbers", "letters")]
        assert found[path] == pytest.approx(float(torch.cosine_similarity(*changes, dim=0)), abs=1e-6)
    assert all(value == pytest.approx(1) for value in adapter_similarity(model, "numbers", "numbers").values())
    (axes, _) = similarity_figure(model, "numbers", "letters").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["down_proj", "qkv_proj"]
    assert image(similarity_figure(model, "numbers", "letters")).shape == (2, 2)


def test_an_adapter_that_learned_nothing_is_like_no_other(tmp_path: Path) -> None:
    backbone, tokenizer = load_backbone(str(save_backbone(tmp_path)))
    plans = {
        name: blueprint(name, f"molora.testing:{name.title()}", {}, {"r": 2, "target_modules": ["o_proj"]}, name)
        for name in ("numbers", "letters")
    }
    model, _ = assemble(backbone, tokenizer, plans, RouterConfig(plugin="sum"))
    assert set(adapter_similarity(model, "numbers", "letters").values()) == {0.0}
