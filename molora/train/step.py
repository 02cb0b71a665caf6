"""One update, which every rank makes from its own samples."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.data.processor import Processor
from molora.model.molora import MoLoRA
from molora.pack import Pack, Sample
from molora.ranks import Ranks
from molora.routing import Routing, name_of
from molora.train.optim import PartOptimizer
from molora.train.phases import PhaseClock
from molora.train.recipe import StageConfig
from molora.train.words import Words


class TrainingError(RuntimeError):
    """Training cannot go on; what was saved stays as it is."""


def train_step(
    model: MoLoRA,
    processor: Processor,
    samples: Sequence[Sample],
    tokens_per_pack: int,
    optimizers: Mapping[str, PartOptimizer],
    ranks: Ranks | None = None,
    clock: PhaseClock | None = None,
    words: Words | None = None,
) -> dict[str, Any]:
    """One update from this rank's samples of a global step; returns the step's metrics, the same on every rank.

    `ranks` are the processes that train together, this one alone if they are left out. `clock` is told each phase.
    `words` say what samples say, in a stage that learns words and no answers.

    Each sample's loss is divided by the global target tokens of its group (its set of modalities), and each part is
    reduced, clipped and stepped on its own, so nothing shared couples modalities that train together.
    """
    ranks = ranks or Ranks(model.device)
    clock = clock or PhaseClock(model.device)
    targets = _global_targets(samples, ranks)
    by_id = {sample.id: sample for sample in samples}
    groups = [key for key in targets if isinstance(key, frozenset)]
    done: list[tuple[Pack, Routing, Tensor]] = []
    training = model.training_parts()
    parts = {group: model.parts_of(group) for group in groups}
    for trains in (False, True):
        chosen = [sample for sample in samples if bool(parts[sample.modalities] & training) == trains]
        clock.to("loading")
        packs = processor.packs(chosen, tokens_per_pack)
        if words is None:
            model.backbone.catch_up(len(packs), backward=trains)
        for pack in packs:
            pack = pack.to(model.device)
            clock.to("forward")
            with nullcontext() if trains else torch.no_grad():
                if words is None:
                    losses = model.losses(pack)
                else:
                    losses = model.word_losses(pack, [words.of(by_id[id]) for id in pack.ids], words.vocabulary)
                shares_N = torch.tensor([1 / max(1, targets[m]) for m in pack.modalities], device=model.device)
                counts_N = torch.tensor(losses.num_targets, device=model.device)
                loss = ((losses.sums_N + losses.router_N * counts_N) * shares_N).sum()
            if trains:
                clock.to("backward")
                loss.backward()
            done.append((replace(pack, media={}), losses.routing, losses.sums_N.detach()))
            clock.to("loading")
    clock.to("other")
    means, shares = _results(done, targets, ranks)
    named = {f"source {key}" if isinstance(key, str) else name_of(key): mean for key, mean in means.items()}
    check_finite("loss", named, samples)
    row: dict[str, Any] = {}
    for key, mean in means.items():
        of, name = ("source_", key) if isinstance(key, str) else ("", name_of(key))
        row[f"{of}loss/{name}"], row[f"{of}targets/{name}"] = mean, targets[key]
    row |= _mean_shares(ranks.gather(shares))
    present = frozenset().union(*(parts[group] for group in groups if targets[group]))
    return row | update(optimizers, present, samples, ranks, clock)


def update(
    optimizers: Mapping[str, PartOptimizer],
    present: frozenset[str],
    samples: Sequence[Sample],
    ranks: Ranks,
    clock: PhaseClock,
) -> dict[str, float]:
    """Steps the parts that a sample of any rank ran through (`present`); their gradient norms and learning rates. If a
    gradient of one is not finite, none is stepped."""
    row: dict[str, float] = {}
    clock.to("optimizer")
    stepped = {part: optimizer for part, optimizer in optimizers.items() if part in present}
    for optimizer in stepped.values():
        _reduce_gradients(optimizer, ranks)
    norms = {part: optimizer.gradient_norm() for part, optimizer in stepped.items()}
    values = {part: norm.item() for part, norm in norms.items()}  # read once all are under way
    check_finite("gradient norm", values, samples)
    for part, optimizer in stepped.items():
        row[f"gradient_norm/{part}"], row[f"learning_rate/{part}"] = values[part], optimizer.step(norms[part])
    clock.to("other")
    return row


def check_finite(what: str, values: Mapping[str, float], samples: Sequence[Sample]) -> None:
    """Raises TrainingError for a step's losses or gradient norms (`what`), by what they are of, that are no numbers."""
    if wrong := {name: value for name, value in values.items() if not math.isfinite(value)}:
        ids = ", ".join(sample.id for sample in samples[:4]) + (", …" if len(samples) > 4 else "")
        told = f"the {what} is not finite ({wrong}); stopped before the optimiser"
        raise TrainingError(f"{told}. Lower the learning rate, or see what is odd in the step's samples: {ids}")


def source_of(id: str) -> str | None:
    """The data source that a sample's id begins with, `source/row@epoch`; None for a sample that is of none."""
    name, slash, _ = id.partition("/")
    return name if slash else None


def check_skipped(run: Path, stage: StageConfig, before: Sequence[str], row: Mapping[str, Any]) -> list[str]:
    """Why samples of a stage were left out up to a step, if their number has a limit. Raises TrainingError if it is
    passed: the data are not what was expected."""
    if stage.skip_limit is None:
        return []
    skipped = [*before, *row.get("skipped_because", [])]
    if len(skipped) > stage.skip_limit:
        raise TrainingError(
            f"{run}: {len(skipped)} samples of stage {stage.name} could not be used, and its skip_limit is "
            f"{stage.skip_limit}; mend them, or raise it:\n  " + "\n  ".join(skipped)
        )
    return skipped


# What a loss is averaged over: samples with the same set of modalities, or of the same source.
_Key = frozenset[str] | str


def _keys_of(modalities: frozenset[str], id: str) -> tuple[_Key, ...]:
    source = source_of(id)
    return (modalities,) if source is None else (modalities, source)


def _global_targets(samples: Sequence[Sample], ranks: Ranks) -> dict[_Key, int]:
    """Target tokens of every rank's samples, by group and by source, in the same order on every rank."""
    counts: Counter[_Key] = Counter()
    for sample in samples:
        for key in _keys_of(sample.modalities, sample.id):
            counts[key] += sample.num_targets
    keys = {key for keys in ranks.gather([list(counts)]) for key in keys}
    ordered = sorted(keys, key=lambda key: (isinstance(key, str), [key] if isinstance(key, str) else sorted(key)))
    totals = ranks.sum(torch.tensor([float(counts[key]) for key in ordered], device=ranks.device))
    return {key: int(total) for key, total in zip(ordered, totals.tolist(), strict=True)}


def _results(
    done: Iterable[tuple[Pack, Routing, Tensor]], targets: Mapping[_Key, int], ranks: Ranks
) -> tuple[dict[_Key, float], list[tuple[str, dict[str, float]]]]:
    """The mean loss of every rank's targets by group and source, and this rank's shares of adapters. What the device
    has computed is read here, once all of it is under way."""
    sums = dict.fromkeys(targets, 0.0)
    shares: list[tuple[str, dict[str, float]]] = []
    for pack, routing, sums_N in done:
        for modalities, id, value in zip(pack.modalities, pack.ids, sums_N.tolist(), strict=True):
            for key in _keys_of(modalities, id):
                sums[key] += value
        shares += routed_shares(pack, routing)
    reduced = ranks.sum(torch.tensor(list(sums.values()), device=ranks.device, dtype=torch.float64))
    means = {key: value / max(1, targets[key]) for key, value in zip(sums, reduced.tolist(), strict=True)}
    return means, shares


def _mean_shares(shares: Sequence[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """The mean weight of each adapter over the samples of each group that a router gave weights."""
    row: dict[str, float] = {}
    samples_of = Counter(name for name, _ in shares)
    for name, taken in shares:
        for adapter, share in taken.items():
            key = f"routing/{name}/{adapter}"
            row[key] = row.get(key, 0.0) + share / samples_of[name]
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
