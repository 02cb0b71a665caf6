"""A router that learns: how much of each adapter a sample, or each of its tokens, runs with, read from its embeddings.

Letters: T tokens, N samples, P places to decide for (samples or tokens), D backbone width, E candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.routing import Routing, RoutingError, Slice, check_part, modality_set, runs

_BARE = "bare"
_MAX_MODALITIES = 1000


@dataclass
class LearnedConfig:
    """`modalities` are those it is trained for; a model with others is refused, because nothing was learned of them.

    `scope` is what one decision covers: a `sample` (decided from its media tokens) or a `token` (from itself). A place
    chooses among `candidates`, the adapters of its sample's modalities (`present`) or `all`; only the former leaves the
    results of other modalities as they were when one is trained. `rules` name the adapter that a set of modalities
    prefers before anything is learned, as in the table router, and `prior` says by how much (in logits). The `top_k`
    strongest share a weight of 1.

    With a `confidence` the bare backbone is a candidate too, and takes over where it leaves the adapters together less
    than that. `balance` and `z` weigh the losses that keep gates even and small; both are means over the places of one
    sample, so that samples do not depend on each other.
    Source of the losses: arXiv 2101.03961 §2.2 (balance), arXiv 2202.08906 §3.3 (z); of balance within one sequence:
    arXiv 2412.19437 §2.1.2.
    """

    modalities: list[str]
    scope: Literal["sample", "token"] = "sample"
    candidates: Literal["present", "all"] = "present"
    rules: dict[str, str] = field(default_factory=dict)
    prior: float = 2.0
    top_k: int = 2
    confidence: float | None = None
    balance: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        if len(self.modalities) > _MAX_MODALITIES:
            raise ValueError(f"it is made for {len(self.modalities)} modalities, allowed {_MAX_MODALITIES}")
        for name in self.modalities:
            check_part(name)
        if self.top_k < 1:
            raise ValueError(f"top_k is at least 1, got {self.top_k}")
        if self.confidence is not None and not 0 <= self.confidence < 1:
            raise ValueError(f"confidence is at least 0 and less than 1, got {self.confidence}")
        if min(self.balance, self.z) < 0:
            raise ValueError(f"balance and z are at least 0, got {self.balance} and {self.z}")


class LearnedRouter(nn.Module):
    """Gates from embeddings, with a prior from the modalities. Before training it decides by the prior alone."""

    config_type: ClassVar[type] = LearnedConfig

    def __init__(self, adapters: Sequence[str], config: LearnedConfig, width: int) -> None:
        super().__init__()
        if unknown := set(adapters) - set(config.modalities):
            raise RoutingError(
                f"the learned router was made for {sorted(config.modalities)}, and this model also has "
                f"{sorted(unknown)}: train a router for all of them, or use the table router"
            )
        self.config = config
        self.known = tuple(sorted(adapters))
        self.rules = {modality_set(key, "rules"): adapter for key, adapter in config.rules.items()}
        if frozenset() in self.rules:
            raise RoutingError(
                "rules: text alone runs on the bare backbone here; the routers table and sum can give it an adapter"
            )
        if strange := sorted(frozenset().union(*self.rules) - set(config.modalities)):
            raise RoutingError(f"rules name modalities {strange}; the router is made for {config.modalities}")
        for key, adapter in config.rules.items():
            if adapter not in config.modalities:
                raise RoutingError(f"rule {key!r} names adapter {adapter!r}; expected one of {config.modalities}")
        names = [*config.modalities, *([] if config.confidence is None else [_BARE])]
        # Keyed by name, so that a model with fewer modalities can take the same parameters.
        self.gates = nn.ModuleDict({name: nn.Linear(width, 1) for name in sorted(names)})
        for parameter in self.gates.parameters():
            nn.init.zeros_(parameter)

    def _candidates(self, modalities: frozenset[str]) -> tuple[str, ...]:
        """The adapters that such a sample chooses among. Raises RoutingError for modalities it was not made for."""
        made_for = set(self.config.modalities)
        if unknown := modalities - made_for:
            raise RoutingError(f"the learned router was made for {sorted(made_for)}, not for {sorted(unknown)}")
        takes_all = self.config.candidates == "all" and bool(modalities)
        return tuple(name for name in self.known if takes_all or name in modalities)

    def order(self, modalities: frozenset[str]) -> str:
        return "+".join(sorted(modalities)) if self._candidates(modalities) else ""

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        return frozenset(self._candidates(modalities))

    def learns(self, modalities: frozenset[str]) -> bool:
        candidates = self._candidates(modalities)
        return len(candidates) + (self.config.confidence is not None) > 1 and bool(candidates)

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices: list[Slice] = []
        gates: list[Tensor | None] = [None] * len(pack)
        losses: list[Tensor] = [embeds_TD.new_zeros((), dtype=torch.float32)] * len(pack)
        for modalities, start, stop, members in runs(pack.modalities, pack.lengths):
            candidates = self._candidates(modalities)
            if not self.learns(modalities):
                slices.append(Slice(candidates, start, stop))
                continue
            lengths = torch.tensor(pack.lengths[members], device=embeds_TD.device)
            if pack.gates is not None and self.config.scope == "sample":
                gates[members] = pack.gates[members]
                weights_TE = torch.stack(pack.gates[members]).repeat_interleave(lengths, 0)
            else:
                places_PD, sizes = self._places(pack.modality_ids_T[start:stop], embeds_TD[start:stop], lengths)
                weights_TE, losses_P = self._decide(modalities, candidates, places_PD)
                losses[members] = [sample_P.mean() for sample_P in losses_P.split(sizes)]
                if self.config.scope == "sample":
                    gates[members] = weights_TE.unbind()
                    weights_TE = weights_TE.repeat_interleave(lengths, 0)
            used = (weights_TE != 0).any(0).nonzero().flatten().tolist()
            slices.append(Slice(tuple(candidates[index] for index in used), start, stop, weights_TE[:, used]))
        return Routing(tuple(slices), tuple(gates), torch.stack(losses))

    def _places(self, modality_ids_T: Tensor, embeds_TD: Tensor, lengths: Tensor) -> tuple[Tensor, list[int]]:
        """What each decision is read from, and how many decisions each sample has."""
        if self.config.scope == "token":
            return embeds_TD, lengths.tolist()
        is_media_T = (modality_ids_T > 0).float()
        samples_T = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        media_TD = embeds_TD.float() * is_media_T[:, None]
        sums_PD = media_TD.new_zeros(len(lengths), media_TD.shape[1]).index_add(0, samples_T, media_TD)
        counts_P = media_TD.new_zeros(len(lengths)).index_add(0, samples_T, is_media_T)
        return sums_PD / counts_P[:, None], [1] * len(lengths)

    def _decide(self, modalities: frozenset[str], names: tuple[str, ...], places_PD: Tensor) -> tuple[Tensor, Tensor]:
        """How much of each of the adapters `names` each place takes, as weights_PE, and losses_P."""
        config = self.config
        names = names if config.confidence is None else (*names, _BARE)
        gates: list[Any] = [self.gates[name] for name in names]
        normed_PD = F.rms_norm(places_PD.float(), places_PD.shape[1:])
        weight_ED, bias_E = torch.cat([gate.weight for gate in gates]), torch.cat([gate.bias for gate in gates])
        logits_PE = F.linear(normed_PD, weight_ED, bias_E)
        prior = [config.prior * (name == self.rules.get(modalities)) for name in names]
        logits_PE = logits_PE + torch.tensor(prior, device=logits_PE.device)
        strongest = logits_PE.topk(min(config.top_k, len(names)), dim=1).indices
        chosen_PE = torch.zeros_like(logits_PE).scatter(1, strongest, 1.0)
        weights_PE = logits_PE.masked_fill(chosen_PE == 0, float("-inf")).softmax(1)
        if config.top_k == 1:  # a constant 1; it learns as if it were the probability (straight through)
            probabilities_PE = logits_PE.softmax(1)
            weights_PE = weights_PE + chosen_PE * (probabilities_PE - probabilities_PE.detach())
        # E times the sum over candidates of (share of choices) x (probability); 1 where both are even.
        even_P = len(names) * (chosen_PE / chosen_PE.sum(1, keepdim=True) * logits_PE.softmax(1)).sum(1)
        losses_P = config.balance * even_P + config.z * logits_PE.logsumexp(1).square()
        if config.confidence is not None:
            weights_PE = weights_PE[:, :-1]
            weights_PE = weights_PE * (weights_PE.sum(1, keepdim=True) >= config.confidence)
        return weights_PE, losses_P
