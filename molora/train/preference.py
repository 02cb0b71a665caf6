"""An update from preferences, which every rank makes from its own pairs.

Letters: P pairs of a group, N samples of a pack, S frames of an item, C encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from molora.data.processor import Processor
from molora.model.molora import Losses, MoLoRA
from molora.model.shared import shared_prompts
from molora.pack import Pack, Sample
from molora.ranks import Ranks
from molora.routing import name_of
from molora.storage import check_shapes
from molora.train.optim import PartOptimizer
from molora.train.phases import PhaseClock
from molora.train.preference_losses import PreferenceConfig, Scores, preference_losses
from molora.train.step import check_finite, source_of, update


class Reference:
    """What trains in a stage, as it was when the stage began: `tensors` by full name. Raises ValueError for tensors
    that do not fit."""

    def __init__(self, model: MoLoRA, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._model = model
        self._parameters = {
            f"{part}.{key}": parameter
            for part, parameters in model.parts().items()
            for key, parameter in parameters.items()
            if parameter.requires_grad
        }
        if tensors is None:
            self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        else:
            found, expected = (
                {name: each.shape for name, each in side.items()} for side in (tensors, self._parameters)
            )
            check_shapes(found, expected, "the reference of the stage's preferences, in the state")
            self.tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference meanwhile, and drops nothing out."""
        self._exchange()
        self._model.eval()
        try:
            yield
        finally:
            self._model.train()
            self._exchange()

    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data


@dataclass(frozen=True)
class _Pair:
    """What is known of a pair on every rank: its group, the log-probabilities of both answers, chosen first,
    by the model and by the reference, and the answers' tokens."""

    id: str
    modalities: frozenset[str]
    ours: tuple[float, float]
    theirs: tuple[float, float]
    tokens: tuple[int, int]


def preference_step(
    model: MoLoRA,
    processor: Processor,
    samples: Sequence[Sample],
    tokens_per_pack: int,
    optimizers: Mapping[str, PartOptimizer],
    config: PreferenceConfig,
    reference: Reference | None,
    ranks: Ranks | None = None,
    clock: PhaseClock | None = None,
) -> dict[str, Any]:
    """One update from this rank's samples of a global step, each with a rejected answer; returns the step's metrics,
    the same on every rank.

    The two answers of a pair are samples of their own, in any packs; beside each other, their prompt runs once. First
    their log-probabilities are found without a graph, by the reference and by the model. The loss of a group (a set of
    modalities) is the mean over its pairs of all ranks; its slopes are what each answer's log-probability weighs in the
    second forward, whose graph is that of one pack. So it is the same in however many packs and ranks the pairs lie,
    also for losses that compare pairs.
    """
    ranks = ranks or Ranks(model.device)
    clock = clock or PhaseClock(model.device)
    clock.to("encoding")
    pairs = [_encoded(model, sample) for sample in samples]
    clock.to("loading")
    answers = {answer.id: answer for pair in pairs for answer in pair}
    in_common = {other.id: _shared(model, (one, other))[1][1] for one, other in pairs}
    packs = [  # those that train first, as both of their forwards begin with the same state of the generator
        replace(pack.to(model.device), shared=_shared(model, [answers[id] for id in pack.ids]))
        for trains in (True, False)
        for pack in processor.packs(
            [each for each in answers.values() if model.trains(each.modalities) == trains], tokens_per_pack, in_common
        )
    ]
    clock.to("forward")
    theirs: dict[str, float] = {}
    if reference is not None:
        with reference.in_place():
            theirs = _log_probabilities(model, packs)
    ours, forward = _first_forward(model, packs)
    found = ranks.gather([_pair(one, other, ours, theirs) for one, other in pairs])
    row, slopes = _slopes(sorted(found, key=lambda pair: pair.id), config)
    check_finite("loss", {key[5:]: value for key, value in row.items() if key.startswith("loss/")}, samples)
    counts = {name: row[f"pairs/{name}"] for name in {name_of(pair.modalities) for pair in found}}
    trained = [pack for pack in packs if model.trains(pack.modalities[0])]
    clock.to("forward")
    model.backbone.catch_up(len(trained), backward=True)
    for pack in trained:
        clock.to("forward")
        losses = forward(pack)
        slopes_N = losses.sums_N.new_tensor([slopes[id] for id in pack.ids])
        shares_N = losses.sums_N.new_tensor([0.5 / counts[name_of(m)] for m in pack.modalities])
        loss = (losses.router_N * shares_N - losses.sums_N * slopes_N).sum()
        clock.to("backward")
        loss.backward()
    present = frozenset().union(*(model.parts_of(pair.modalities) for pair in found))
    return row | update(optimizers, present, samples, ranks, clock)


def _encoded(model: MoLoRA, sample: Sample) -> tuple[Sample, Sample]:
    """Both answers as samples; what their prompt shows is encoded once."""
    rejected = sample.rejected
    assert rejected is not None, "a stage of preferences has pairs"
    items = tuple(
        item if item.frames_SC is not None else replace(item, frames_SC=model.frames(item).frames_SC)
        for item in sample.items
    )
    return replace(sample, items=items, rejected=None), replace(rejected, items=items)


def _shared(model: MoLoRA, samples: Sequence[Sample]) -> tuple[tuple[int, int], ...]:
    """What neighbours share of what comes before their answers, as a pack has it."""
    return shared_prompts(model, samples, [int(sample.targets_T.nonzero()[0]) for sample in samples])


@torch.no_grad()
def _log_probabilities(model: MoLoRA, packs: Sequence[Pack]) -> dict[str, float]:
    """The log-probability of every sample's targets, by its id."""
    model.backbone.catch_up(len(packs), backward=False)
    sums = [(pack.ids, model.losses(pack).sums_N) for pack in packs]  # read once all are under way
    return {id: -value for ids, sums_N in sums for id, value in zip(ids, sums_N.tolist(), strict=True)}


def _first_forward(model: MoLoRA, packs: Sequence[Pack]) -> tuple[dict[str, float], Callable[[Pack], Losses]]:
    """The log-probabilities of all samples, and what gives a pack's losses with their graph. Of a single pack the graph
    is kept; of several it is made again, with the same dropout, and where layers lie in shards, as other ranks may have
    several."""
    if len(packs) == 1 and model.trains(packs[0].modalities[0]) and not model.backbone.is_sharded:
        losses = model.losses(packs[0])
        values = (-losses.sums_N.detach()).tolist()
        return dict(zip(packs[0].ids, values, strict=True)), lambda _: losses
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        return _log_probabilities(model, packs), model.losses


def _pair(one: Sample, other: Sample, ours: Mapping[str, float], theirs: Mapping[str, float]) -> _Pair:
    return _Pair(
        one.id,
        one.modalities,
        (ours[one.id], ours[other.id]),
        (theirs.get(one.id, 0.0), theirs.get(other.id, 0.0)),
        (one.num_targets, other.num_targets),
    )


def _slopes(pairs: Sequence[_Pair], config: PreferenceConfig) -> tuple[dict[str, Any], dict[str, float]]:
    """The step's row, and the slope of the loss by the log-probability of every answer, by its sample's id."""
    row: dict[str, Any] = {}
    slopes: dict[str, float] = {}
    for group in sorted({pair.modalities for pair in pairs}, key=sorted):
        members = [pair for pair in pairs if pair.modalities == group]
        ours, theirs, tokens = (
            torch.tensor([getattr(pair, key) for pair in members], dtype=torch.float64)
            for key in ("ours", "theirs", "tokens")
        )
        ours.requires_grad_(True)
        scores = Scores(*ours.unbind(1), *theirs.unbind(1), *tokens.unbind(1))
        losses_P = preference_losses(scores, config)
        (of_ours,) = torch.autograd.grad(losses_P.mean(), ours)
        for pair, (chosen, rejected) in zip(members, of_ours.tolist(), strict=True):
            slopes[pair.id], slopes[f"{pair.id}, rejected"] = chosen, rejected
        rewards = [config.beta * ratios.detach() for ratios in (scores.won, scores.lost)]
        name = name_of(group)
        row |= {
            f"loss/{name}": losses_P.mean().item(),
            f"pairs/{name}": len(members),
            f"accuracy/{name}": float((rewards[0] > rewards[1]).double().mean()),
            f"reward_chosen/{name}": float(rewards[0].mean()),
            f"reward_rejected/{name}": float(rewards[1].mean()),
        }
    for pair in pairs:
        key = f"source_targets/{source_of(pair.id)}"
        row[key] = row.get(key, 0) + sum(pair.tokens)
    return row, slopes
