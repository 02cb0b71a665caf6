"""Pictures of what happens inside: a pack and its routing, weights over tokens, how alike adapters are.

Letters: T tokens, D input width, O output width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from molora.model.lora import RoutedLinear
from molora.model.molora import MoLoRA
from molora.pack import Pack
from molora.routing import Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH_INCHES = 9
# How much of a figure's width a letter of a label takes; a label without room is left out.
_LETTER_SHARE = 0.007


def pack_figure(pack: Pack, routing: Routing, modalities: list[str]) -> Figure:
    """The token axis of a pack in four bands: samples, modalities, adapters (a band of slices), and targets.
    `modalities` are the model's, in their order."""
    figure, axes = _axes(2.4)
    names = ("text", *modalities)
    colours = {"text": "0.95", **{name: f"C{index}" for index, name in enumerate(modalities)}}
    axes.set_xlim(0, sum(pack.lengths))
    start = 0
    for id, length in zip(pack.ids, pack.lengths, strict=True):
        _bar(axes, 3, start, length, "0.9", id)
        start += length
    for value, start, length in _stretches(pack.modality_ids_T.tolist()):
        _bar(axes, 2, start, length, colours[names[value]], names[value])
    for piece in routing.slices:
        name = " + ".join(piece.adapters) or "bare backbone"
        colour = colours.get(name, "0.7" if piece.adapters else "0.95")
        _bar(axes, 1, piece.start, piece.stop - piece.start, colour, name)
    for value, start, length in _stretches(pack.targets_T.tolist()):
        if value:
            _bar(axes, 0, start, length, "black", "")
    axes.set_yticks(range(4), ["targets", "adapters", "modalities", "samples"])
    axes.set_xlabel("token of the pack")
    return figure


def weights_figure(pack: Pack, routing: Routing, adapters: list[str]) -> Figure:
    """How much of each adapter every token of a pack runs with; media tokens are marked below."""
    figure, axes = _axes(0.8 + 0.4 * len(adapters))
    total = sum(pack.lengths)
    weights = torch.zeros(len(adapters), total)
    for piece in routing.slices:
        for index, name in enumerate(piece.adapters):
            weight = 1.0 if piece.weights_TE is None else piece.weights_TE[:, index].detach().float().cpu()
            weights[adapters.index(name), piece.start : piece.stop] = weight
    image = axes.imshow(weights.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    media = pack.modality_ids_T.nonzero()[:, 0].tolist()
    axes.plot(media, [len(adapters) - 0.45] * len(media), "|", color="tab:red", clip_on=False)
    for end in torch.tensor(pack.lengths).cumsum(0).tolist()[:-1]:
        axes.axvline(end - 0.5, color="white", linewidth=1)
    axes.set_yticks(range(len(adapters)), adapters)
    axes.set_xlabel("token of the pack (red: media tokens; white: samples end)")
    figure.colorbar(image, label="weight")
    return figure


def adapter_similarity(model: MoLoRA, one: str, other: str) -> dict[str, float]:
    """For each layer that both adapters change, the cosine between the changes that they make to its weights. A change
    is the matrix B A (O, D); it is never formed: its products are those of matrices of size R."""
    cosines: dict[str, float] = {}
    for path, layer in model.backbone.model.named_modules():
        if isinstance(layer, RoutedLinear) and one in layer.lora_A and other in layer.lora_A:
            product, first, second = (_product(layer, *pair) for pair in ((one, other), (one, one), (other, other)))
            length = (first * second) ** 0.5
            cosines[path] = product / length if length else 0.0  # an adapter that has not learned changes nothing
    return cosines


def similarity_figure(model: MoLoRA, one: str, other: str) -> Figure:
    """`adapter_similarity` as a map of layers and the linear modules in them."""
    cosines = adapter_similarity(model, one, other)
    layers = sorted({_place(path)[0] for path in cosines})
    modules = sorted({_place(path)[1] for path in cosines})
    grid = torch.full((len(modules), len(layers)), float("nan"))
    for path, cosine in cosines.items():
        layer, module = _place(path)
        grid[modules.index(module), layers.index(layer)] = cosine
    figure, axes = _axes(0.8 + 0.35 * len(modules))
    reach = max(0.01, float(grid.nan_to_num().abs().max()))
    image = axes.imshow(grid.numpy(), aspect="auto", vmin=-reach, vmax=reach, cmap="RdBu")
    axes.set_yticks(range(len(modules)), modules)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("layer")
    axes.set_title(f"cosine between the changes of {one} and {other}", fontsize=10)
    figure.colorbar(image)
    return figure


def _product(layer: RoutedLinear, one: str, other: str) -> float:
    """The inner product of two adapters' changes: the sum of the entries of (B1ᵀ B2) ∘ (A1 A2ᵀ)."""
    (a1, b1), (a2, b2) = (layer.adapter_weights(name, torch.float64) for name in (one, other))
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _place(path: str) -> tuple[int, str]:
    """The layer's number and the module's name in "model.layers.3.self_attn.o_proj"."""
    parts = path.split(".")
    return next(int(part) for part in parts if part.isdigit()), parts[-1]


def _axes(height_inches: float) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'molora[demo]'") from error
    figure = Figure((_WIDTH_INCHES, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _stretches(values: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """Runs of equal values: the value, where it starts and how long it is."""
    start = 0
    for value, run in groupby(values):
        length = len(list(run))
        yield value, start, length
        start += length


def _bar(axes: Any, row: int, start: int, length: int, colour: str, label: str) -> None:
    axes.barh(row, length, left=start, height=0.8, color=colour, edgecolor="white", linewidth=0.5)
    if length > _LETTER_SHARE * len(label) * axes.get_xlim()[1]:
        axes.text(start + length / 2, row, label, ha="center", va="center", fontsize=7)
