"""A sample runs with the adapters of all its modalities at once, each as much as its weight says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molora.routing import Routing, RoutingError, Slice, modality_set, name_of, runs


@dataclass
class SumConfig:
    """`weights` maps modalities joined by "+" (any order) to how much of which adapter they run with, such as
    {"audio+vision": {"vision": 1.0, "audio": 0.5}}. Without an entry a set runs with all of its own adapters, in full,
    and text alone on the bare backbone.
    """

    weights: dict[str, dict[str, float]] = field(default_factory=dict)


class SumRouter(nn.Module):
    """Weighted sums of adapters at sample scope, no parameters."""

    config_type: ClassVar[type] = SumConfig

    def __init__(self, adapters: Sequence[str], config: SumConfig, width: int) -> None:
        super().__init__()
        self.known = frozenset(adapters)
        self.rules = {modality_set(key, "weights"): weights for key, weights in config.weights.items()}
        self.named = frozenset().union(*self.rules)
        for key, weights in config.weights.items():
            if unknown := weights.keys() - self.known:
                raise RoutingError(
                    f"weights {key!r} name {sorted(unknown)}; the adapters here are {sorted(adapters)}; load "
                    "those modalities too, or change the weights"
                )

    def weights(self, modalities: frozenset[str]) -> Mapping[str, float]:
        """Adapter to weight, without those that weigh nothing. Raises RoutingError for modalities without any adapter
        and without an entry."""
        if modalities not in self.rules and modalities and not modalities & self.known:
            name = name_of(modalities)
            raise RoutingError(f"no adapter for a sample with modalities {name!r}; add 'router.weights.{name}'")
        found = self.rules.get(modalities, dict.fromkeys(modalities & self.known, 1.0))
        return {name: weight for name, weight in sorted(found.items()) if weight}

    def order(self, modalities: frozenset[str]) -> str:
        return "+".join(f"{weight:g} {name}" for name, weight in self.weights(modalities).items())

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        return frozenset(self.weights(modalities))

    def learns(self, modalities: frozenset[str]) -> bool:
        return False

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices = []
        for modalities, start, stop, _ in runs(pack.modalities, pack.lengths):
            weights = self.weights(modalities)
            weights_TE = None
            if any(weight != 1 for weight in weights.values()):
                weights_TE = torch.tensor([*weights.values()], device=embeds_TD.device).expand(stop - start, -1)
            slices.append(Slice(tuple(weights), start, stop, weights_TE))
        return Routing(tuple(slices))
