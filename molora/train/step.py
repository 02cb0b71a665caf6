"""One update, which every rank makes from its own samples."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molora.data.processor import Processor
from molora.model.molora import MoLoRA
from molora.pack import Pack, Sample
from molora.ranks import Ranks
from molora.routing import Routing, name_of
from molora.train.optim import PartOptimizer


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved stays as it is."""


def train_step(
    model: MoLoRA,
    processor: Processor,
    samples: Sequence[Sample],
    tokens_per_pack: int,
    optimizers: Mapping[str, PartOptimizer],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """One update from this rank's samples of a global step; returns the step's metrics, the same on every rank.

    `ranks` are the processes that train together, this one alone if they are left out.

    Each sample's loss is divided by the global target tokens of its group (its set of modalities), and each part is
    reduced, clipped and stepped on its own, so nothing shared couples modalities that train together.
    """
    ranks = ranks or Ranks(model.device)
    targets: dict[frozenset[str], int] = {}
    for counted in ranks.gather([{sample.modalities: 0 for sample in samples}]):
        targets.update(counted)
    for sample in samples:
        targets[sample.modalities] += sample.num_targets
    groups = sorted(targets, key=sorted)
    totals = ranks.sum(torch.tensor([float(targets[g]) for g in groups], device=model.device))
    targets = {group: int(total) for group, total in zip(groups, totals.tolist(), strict=True)}
    done: list[tuple[Pack, Routing, Tensor]] = []
    training = model.training_parts()
    parts = {group: model.parts_of(group) for group in groups}
    for trains in (False, True):
        chosen = [sample for sample in samples if bool(parts[sample.modalities] & training) == trains]
        for pack in processor.packs(chosen, tokens_per_pack):
            pack = pack.to(model.device)
            with nullcontext() if trains else torch.no_grad():
                losses = model.losses(pack)
                shares_N = torch.tensor([1 / max(1, targets[m]) for m in pack.modalities], device=model.device)
                counts_N = torch.tensor(losses.num_targets, device=model.device)
                loss = ((losses.sums_N + losses.router_N * counts_N) * shares_N).sum()
            if trains:
                loss.backward()
            done.append((replace(pack, media={}), losses.routing, losses.sums_N.detach()))
    # What the device has computed is read once all of it is under way.
    sums = dict.fromkeys(groups, 0.0)
    shares: list[tuple[str, dict[str, float]]] = []
    for pack, routing, sums_N in done:
        for modalities, value in zip(pack.modalities, sums_N.tolist(), strict=True):
            sums[modalities] += value
        shares += routed_shares(pack, routing)
    reduced = ranks.sum(torch.tensor([sums[g] for g in groups], device=model.device, dtype=torch.float64))
    means = {g: value / max(1, targets[g]) for g, value in zip(groups, reduced.tolist(), strict=True)}
    if not all(math.isfinite(mean) for mean in means.values()):
        ids = ", ".join(sample.id for sample in samples[:4])
        shown = {name_of(g): mean for g, mean in means.items()}
        told = f"the loss is not finite ({shown}); stopped before the optimiser"
        raise TrainingError(f"{told}. The step's samples: {ids}, …")
    row: dict[str, Any] = {}
    for group, mean in means.items():
        name = name_of(group)
        row[f"loss/{name}"], row[f"targets/{name}"] = mean, targets[group]
    shares = ranks.gather(shares)
    samples_of = Counter(name for name, _ in shares)
    for name, taken in shares:
        for adapter, share in taken.items():
            key = f"routing/{name}/{adapter}"
            row[key] = row.get(key, 0.0) + share / samples_of[name]
    present = frozenset().union(*(parts[group] for group in groups if targets[group]))
    for part, optimizer in optimizers.items():
        if part in present:
            _reduce_gradients(optimizer, ranks)
            row[f"gradient_norm/{part}"], row[f"learning_rate/{part}"] = optimizer.step()
    return row


def routed_shares(pack: Pack, routing: Routing) -> list[tuple[str, dict[str, float]]]:
    """For each sample that a router gave weights: its modalities, and the mean weight of each adapter that it took."""
    shares = []
    ends = list(itertools.accumulate(pack.lengths))
    for piece in routing.slices:
        if piece.weights_TE is not None:
            inside = [n for n, end in enumerate(ends) if piece.start < end <= piece.stop]
            weights = piece.weights_TE.detach().split([pack.lengths[n] for n in inside])
            for n, weights_TE in zip(inside, weights, strict=True):
                means = weights_TE.mean(0).tolist()
                shares.append((name_of(pack.modalities[n]), dict(zip(piece.adapters, means, strict=True))))
    return shares


def _reduce_gradients(optimizer: PartOptimizer, ranks: Ranks) -> None:
    """Sums a part's gradients over ranks in one flat tensor; a rank without the part contributes zeros."""
    parameters = list(optimizer.parameters.values())
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if ranks.count == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    gradients = ranks.sum(flat).split([p.numel() for p in parameters])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
