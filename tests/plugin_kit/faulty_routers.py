"""Routers that each break one clause of the contract, for the tests of its checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.routers.learned import LearnedConfig, LearnedRouter
from molora.routers.sum import SumConfig, SumRouter
from molora.routers.table import TableConfig, TableRouter
from molora.routing import Routing, RoutingError, Slice, runs


class NoModule:
    config_type = SumConfig

    def __init__(self, adapters: Sequence[str], config: SumConfig, width: int) -> None: ...
    def order(self, modalities: frozenset[str]) -> str: ...
    def adapters(self, modalities: frozenset[str]) -> frozenset[str]: ...
    def learns(self, modalities: frozenset[str]) -> bool: ...
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing: ...


class OptionsInAMapping(SumRouter):
    config_type = dict


class Unnamed(SumRouter):
    """Does not say for which modalities there is no rule."""

    def order(self, modalities: frozenset[str]) -> str:
        if modalities - self.known:
            raise RoutingError("no such adapter")
        return super().order(modalities)


class Undecided(SumRouter):
    """Takes samples that it has no adapter for."""

    def order(self, modalities: frozenset[str]) -> str:
        return ""


class ListOfAdapters(SumRouter):
    def adapters(self, modalities: frozenset[str]) -> Any:
        return sorted(super().adapters(modalities))


class NoRules(SumRouter):
    def order(self, modalities: frozenset[str]) -> str:
        raise RoutingError(f"no rule for {sorted(modalities)}")


class Unchecked(TableRouter):
    """Believes that every adapter is there that its rules name."""

    def __init__(self, adapters: Sequence[str], config: TableConfig, width: int) -> None:
        super().__init__([*adapters, "audio", "vision"], config, width)


class ShortSlices(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        *others, last = super().forward(pack, embeds_TD).slices
        return Routing((*others, last._replace(stop=last.stop - 1)))


class GapInSlices(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        first, *others = super().forward(pack, embeds_TD).slices
        return Routing((first._replace(start=1), *others))


class OneWeightForAll(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        return Routing(
            tuple(piece._replace(weights_TE=torch.ones(1)) for piece in super().forward(pack, embeds_TD).slices)
        )


class Inplace(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        embeds_TD[0] *= 2
        return super().forward(pack, embeds_TD)


class Crash(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        raise KeyError("gate")


class DressedText(SumRouter):
    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices = super().forward(pack, embeds_TD).slices
        return Routing(tuple(piece if piece.adapters else piece._replace(adapters=("audio",)) for piece in slices))


class LearningText(SumRouter):
    def learns(self, modalities: frozenset[str]) -> bool:
        return not modalities


class Concealed(SumRouter):
    """Does not tell all adapters that it uses."""

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        return frozenset(sorted(super().adapters(modalities))[:1])


class Apart(TableRouter):
    def order(self, modalities: frozenset[str]) -> str:
        super().order(modalities)
        return str(len(modalities))


class WholePack(LearnedRouter):
    """Reads the mean of the pack, neighbours included."""

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        return super().forward(pack, embeds_TD + embeds_TD.mean(0))


class BatchStatistics(LearnedRouter):
    def __init__(self, adapters: Sequence[str], config: LearnedConfig, width: int) -> None:
        super().__init__(adapters, config, width)
        self.norm = nn.BatchNorm1d(width, affine=False)

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        return super().forward(pack, self.norm(embeds_TD))


class CoupledBalance(LearnedRouter):
    """Weighs its loss by how many samples there are."""

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        routing = super().forward(pack, embeds_TD)
        assert routing.losses_N is not None
        return replace(routing, losses_N=routing.losses_N / len(pack))


class Forgetful(LearnedRouter):
    """Decides anew for every token of an answer."""

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        media_T = torch.ones_like(pack.modality_ids_T) if pack.gates else pack.modality_ids_T
        return super().forward(replace(pack, gates=None, modality_ids_T=media_T), embeds_TD)


class Modest(LearnedRouter):
    def learns(self, modalities: frozenset[str]) -> bool:
        return False

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices = []
        for modalities, start, stop, _ in runs(pack.modalities, pack.lengths):
            names = tuple(sorted(modalities))
            gates: list[Any] = [self.gates[name] for name in names]
            weights_TE = torch.cat([gate(embeds_TD[start:stop]) for gate in gates], 1) if names else None
            slices.append(Slice(names, start, stop, weights_TE))
        return Routing(tuple(slices))


class Boastful(SumRouter):
    def learns(self, modalities: frozenset[str]) -> bool:
        return bool(modalities)


class Detached(LearnedRouter):
    """Cuts its gates off from the loss."""

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        with torch.no_grad():
            return super().forward(pack, embeds_TD)


class Unsaved(SumRouter):
    """Keeps what it knows outside its parameters and buffers."""

    def __init__(self, adapters: Sequence[str], config: SumConfig, width: int) -> None:
        super().__init__(adapters, config, width)
        self.share = float(torch.rand(()))

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        return Routing(
            tuple(
                piece._replace(weights_TE=torch.full((piece.stop - piece.start, len(piece.adapters)), self.share))
                for piece in super().forward(pack, embeds_TD).slices
            )
        )


class Reused(SumRouter):
    """Writes the weights of every pack into one tensor."""

    def __init__(self, adapters: Sequence[str], config: SumConfig, width: int) -> None:
        super().__init__(adapters, config, width)
        self.shares_TE = torch.empty(4096, len(adapters))

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices = []
        for piece in super().forward(pack, embeds_TD).slices:
            shares_TE = self.shares_TE[piece.start : piece.stop, : len(piece.adapters)]
            slices.append(piece._replace(weights_TE=shares_TE.copy_(embeds_TD[piece.start : piece.stop, :1].detach())))
        return Routing(tuple(slices))


class FullPrecision(nn.Module):
    """Multiplies embeddings of the backbone's dtype by parameters in fp32."""

    @dataclass
    class Config:
        pass

    config_type = Config

    def __init__(self, adapters: Sequence[str], config: Any, width: int) -> None:
        super().__init__()
        self.names = frozenset(adapters)
        self.gates = nn.ModuleDict({name: nn.Linear(width, 1) for name in sorted(adapters)})

    def order(self, modalities: frozenset[str]) -> str:
        if modalities and not modalities & self.names:
            raise RoutingError(f"no adapter for {sorted(modalities)}")
        return "+".join(sorted(modalities & self.names))

    def adapters(self, modalities: frozenset[str]) -> frozenset[str]:
        return modalities & self.names

    def learns(self, modalities: frozenset[str]) -> bool:
        return bool(modalities & self.names)

    def forward(self, pack: Any, embeds_TD: Tensor) -> Routing:
        slices = []
        for modalities, start, stop, _ in runs(pack.modalities, pack.lengths):
            names = tuple(sorted(modalities & self.names))
            gates = [self.gates[name](embeds_TD[start:stop]) for name in names]
            slices.append(Slice(names, start, stop, torch.cat(gates, 1) if gates else None))
        return Routing(tuple(slices))
