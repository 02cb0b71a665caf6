"""The default router: a table from a sample's set of modalities to the adapter it runs with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from molora.routing import Routing, RoutingError, modality_set, name_of


@dataclass
class TableConfig:
    """`rules` maps modalities joined by "+" (any order) to an adapter, or to null for the bare backbone.

    Each modality alone runs with the adapter of its own name unless a rule says otherwise. Text alone runs on the bare
    backbone, unless the rule "text" names an adapter that is made for it. Sets of several modalities need a rule of
    their own.
    Source: Phi-4-Multimodal (arXiv 2503.01743), where image+audio runs with the vision adapter.
    """

    rules: dict[str, str | None] = field(default_factory=dict)


class TableRouter(nn.Module):
    """Hard routing at sample scope, no parameters."""

    config_type: ClassVar[type] = TableConfig

    def __init__(self, adapters: Sequence[str], config: TableConfig, width: int = 0) -> None:
        super().__init__()
        self.table: dict[frozenset[str], str | None] = {frozenset({name}): name for name in adapters}
        self.table[frozenset()] = None
        rules = {modality_set(key, "rules"): adapter for key, adapter in config.rules.items()}
        for key, adapter in config.rules.items():
            if adapter is not None and adapter not in adapters:
                raise RoutingError(
                    f"rule {key!r} names adapter {adapter!r}; the adapters here are {sorted(adapters)}; load "
                    "that modality too, or change the rule"
                )
        self.table |= rules
        self.named = frozenset().union(*rules)

    def adapter(self, modalities: frozenset[str]) -> str | None:
        """The adapter for a set of modalities. Raises RoutingError if no rule covers the set."""
        if modalities not in self.table:
            name = name_of(modalities)
            known = sorted(name_of(rule) for rule in self.table)
            raise RoutingError(
                f"no routing rule for a sample with modalities {name!r} (rules: {', '.join(known)}); train with "
                f"router.options.rules.{name}=<adapter or null>, in the recipe below router, options, rules; or answer "
                f"with --rule {name}=<adapter or none>"
            )
        return self.table[modalities]

    def order(self, modalities: frozenset[str]) -> str:
        return self.adapter(modalities) or ""

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        adapter = self.adapter(modalities)
        return frozenset() if adapter is None else frozenset({adapter})

    def learns(self, modalities: frozenset[str]) -> bool:
        return False

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        return Routing.by_sample([tuple(self.adapters(m)) for m in pack.modalities], pack.lengths)
