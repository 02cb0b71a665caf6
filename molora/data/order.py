"""An order of samples that is a pure function of seed and position. As it needs no state, training resumes anywhere and
any rank or worker can compute its share."""

from collections.abc import Sequence

import torch

from molora.seeding import seed_of


class Order:
    """Which row of which source is sample number k: sources by weight, each shuffled anew in every epoch."""

    BLOCK = 4096

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.lengths = tuple(lengths)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.seed = seed
        self._blocks: list[torch.Tensor] = []  # the source of every sample of a block
        self._before: list[torch.Tensor] = [torch.zeros(len(self.lengths), dtype=torch.long)]
        self._shuffles: dict[tuple[int, int], torch.Tensor] = {}

    def __getitem__(self, k: int) -> tuple[int, int, int]:
        """Sample number k as (source, row, epoch of that source)."""
        block, place = divmod(k, self.BLOCK)
        while len(self._blocks) <= block:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "sources", len(self._blocks)))
            sources = torch.multinomial(self.weights, self.BLOCK, replacement=True, generator=generator)
            self._blocks.append(sources)
            self._before.append(self._before[-1] + torch.bincount(sources, minlength=len(self.lengths)))
        sources = self._blocks[block]
        source = int(sources[place])
        nth = int(self._before[block][source]) + int((sources[:place] == source).sum())
        epoch, position = divmod(nth, self.lengths[source])
        return source, int(self._shuffle(source, epoch)[position]), epoch

    def _shuffle(self, source: int, epoch: int) -> torch.Tensor:
        if (source, epoch) not in self._shuffles:
            self._shuffles = {key: value for key, value in self._shuffles.items() if key[0] != source}
            generator = torch.Generator().manual_seed(seed_of(self.seed, "rows", source, epoch))
            self._shuffles[source, epoch] = torch.randperm(self.lengths[source], generator=generator)
        return self._shuffles[source, epoch]
