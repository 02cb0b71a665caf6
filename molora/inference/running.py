"""The samples of a running batch: their prompts, chunk by chunk, and their next tokens.

Letters: T tokens in a pack, N running samples, D backbone width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.model.molora import MoLoRA
from molora.model.pages import PagePool, SamplePages
from molora.pack import Pack, Sample, collate
from molora.routing import Routing


@dataclass
class Running:
    """A sample in the batch: everything needed to decode its next token or to prefill it again."""

    id: str
    modalities: frozenset[str]
    gates: Tensor | None
    prompt_TD: Tensor
    pages: SamplePages
    generator: torch.Generator
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt_TD) + len(self.answer)


class Prompts:
    """A pack of prompts on its way through the backbone. It is embedded and routed as a whole, then fed in chunks, so
    that samples that run already need not wait for all of it."""

    def __init__(
        self, model: MoLoRA, samples: Sequence[Sample], pages: Mapping[str, SamplePages], seeds: Mapping[str, int]
    ) -> None:
        pack = collate(samples, model.modalities, model.router.order).to(model.device)
        self._model = model
        self._embeds_TD = model.embed(pack)
        self._routing: Routing = model.router(pack, self._embeds_TD)
        self._fed = 0
        gates = self._routing.gates or (None,) * len(pack)
        prompts = self._embeds_TD.split(pack.lengths)
        self._samples = [
            Running(id, modalities, gate, prompt, pages[id], torch.Generator().manual_seed(seeds[id]))
            for id, modalities, gate, prompt in zip(pack.ids, pack.modalities, gates, prompts, strict=True)
        ]

    @property
    def to_come(self) -> list[Running]:
        """The samples whose prompts are not through yet."""
        return self._samples

    def feed(self, pool: PagePool, num_tokens: int) -> tuple[int, list[Running], list[Tensor]]:
        """Runs the next chunk. Returns its number of tokens, the samples whose prompts end in it, and the logits (1, V)
        behind each."""
        start = self._fed
        stop = self._fed = min(start + num_tokens, len(self._embeds_TD))
        inside: list[Running] = []
        lengths: list[int] = []
        for sample in self._samples:
            if sum(lengths) < stop - start:
                inside.append(sample)
                left = len(sample.prompt_TD) - sample.pages.length
                lengths.append(min(left, stop - start - sum(lengths)))
        unread = torch.zeros(stop - start, dtype=torch.long, device=self._model.device)
        hidden_TD = self._model(
            continuation(inside, lengths, unread),
            embeds_TD=self._embeds_TD[start:stop],
            routing=self._routing.part(start, stop),
            feed=pool.feed([each.pages for each in inside], lengths, [len(each.prompt_TD) for each in inside]),
        )
        ended = [sample for sample in inside if sample.pages.length == len(sample.prompt_TD)]
        self._samples = self._samples[len(ended) :]
        if not ended:
            return stop - start, [], []
        last = torch.tensor(lengths[: len(ended)], device=self._model.device).cumsum(0) - 1
        return stop - start, ended, [self._model.backbone.head(hidden_TD[last])]


def next_logits(model: MoLoRA, pool: PagePool, running: Sequence[Running]) -> list[Tensor]:
    """Feeds every sample its latest token; logits (N, V) in pieces. Samples whose rotary regime changes with it are
    prefilled again, alone."""
    if model.deterministic_batch:
        return [_decode(model, pool, [sample]) for sample in running]
    return [_decode(model, pool, running)] if running else []


def _decode(model: MoLoRA, pool: PagePool, running: Sequence[Running]) -> Tensor:
    regime = model.backbone.regime
    crossing = [i for i, sample in enumerate(running) if regime(sample.length) != regime(sample.length - 1)]
    staying = [index for index in range(len(running)) if index not in crossing]
    logits: list[Tensor] = []
    if staying:
        samples = [running[index] for index in staying]
        tokens = torch.tensor([sample.answer[-1] for sample in samples], device=model.device)
        ones = [1] * len(samples)
        feed = pool.feed([sample.pages for sample in samples], ones, [sample.length for sample in samples])
        hidden_ND = model(continuation(samples, ones, tokens), embeds_TD=model.backbone.embed(tokens), feed=feed)
        logits.append(model.backbone.head(hidden_ND))
    for index in crossing:
        sample = running[index]
        sample.pages.length = 0
        answer = torch.tensor(sample.answer, device=model.device)
        embeds_TD = torch.cat([sample.prompt_TD, model.backbone.embed(answer)])
        unread = torch.zeros(sample.length, dtype=torch.long, device=model.device)
        feed = pool.feed([sample.pages], [sample.length], [sample.length])
        hidden_TD = model(continuation([sample], [sample.length], unread), embeds_TD=embeds_TD, feed=feed)
        logits.append(model.backbone.head(hidden_TD[-1:]))
    if not crossing:
        return logits[0]
    order = torch.tensor([*staying, *crossing], device=model.device).argsort()
    return torch.cat(logits)[order]


def continuation(samples: Sequence[Running], lengths: Sequence[int], token_ids_T: Tensor) -> Pack:
    """A pack whose embeddings are already known: no items, no targets."""
    return Pack(
        ids=tuple(sample.id for sample in samples),
        lengths=tuple(lengths),
        modalities=tuple(sample.modalities for sample in samples),
        token_ids_T=token_ids_T,
        modality_ids_T=torch.zeros_like(token_ids_T),
        targets_T=torch.zeros_like(token_ids_T, dtype=torch.bool),
        media={},
        gates=tuple(sample.gates for sample in samples),
    )
