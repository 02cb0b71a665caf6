"""The samples of a running batch: their prompts, chunk by chunk, and their next tokens.

Letters: T tokens in a pack, N running samples, D backbone width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from molora.inference.grammar import Grammar
from molora.inference.sampling import Decoding, TokenLikelihood, likelihoods
from molora.model.loss import LOGITS_PER_CHUNK
from molora.model.molora import MoLoRA
from molora.model.pages import PagePool, SamplePages
from molora.pack import Pack, Sample, collate
from molora.routing import Routing


@dataclass(frozen=True)
class Asked:
    """A sample to answer, how it is decoded, the seed of what it draws, whether an answer's tokens so far are to be
    all of it, and the grammar that the answer keeps, if there is one."""

    sample: Sample
    decoding: Decoding
    seed: int
    is_over: Callable[[Sequence[int]], bool]
    grammar: Grammar | None = None

    @property
    def beginning(self) -> tuple[int, int, int, Decoding]:
        """Equal for what exists at one time and is one `Sample` but for its ids, to be decoded in the same way: each of
        these may go on from the prompt that another has read."""
        sample = self.sample
        return id(sample.token_ids_T), id(sample.modality_ids_T), id(sample.items), self.decoding


@dataclass
class Running:
    """A sample in the batch: everything needed to decode its next token or to prefill it again. `behind_D` is the
    hidden state behind its prompt."""

    asked: Asked
    modalities: frozenset[str]
    gates: Tensor | None
    prompt_TD: Tensor
    pages: SamplePages
    answer: list[int] = field(default_factory=list)
    prompt_likelihoods: list[TokenLikelihood] = field(default_factory=list)
    behind_D: Tensor = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.asked.seed)

    @property
    def id(self) -> str:
        return self.asked.sample.id

    @property
    def length(self) -> int:
        return len(self.prompt_TD) + len(self.answer)

    def branched(self, asked: Asked, pages: SamplePages) -> Running:
        """Another sample of the same beginning, behind its prompt."""
        other = replace(self, asked=asked, pages=pages, answer=[])
        other.behind_D = self.behind_D
        return other


class Prompts:
    """A pack of prompts on its way through the backbone. It is embedded and routed as a whole, then fed in chunks, so
    that samples that run already need not wait for all of it."""

    def __init__(
        self, model: MoLoRA, samples: Sequence[Sample], asked: Mapping[str, tuple[Asked, SamplePages]]
    ) -> None:
        pack = collate(samples, model.modalities, model.router.order).to(model.device)
        self._model = model
        self._embeds_TD = model.embed(pack)
        self._routing: Routing = model.router(pack, self._embeds_TD)
        self._fed = 0
        gates = self._routing.gates or (None,) * len(pack)
        prompts = self._embeds_TD.split(pack.lengths)
        self._samples: list[Running] = []
        self._dropped: set[str] = set()
        for id, modalities, gate, prompt in zip(pack.ids, pack.modalities, gates, prompts, strict=True):
            its, pages = asked[id]
            self._samples.append(Running(its, modalities, gate, prompt, pages))

    @property
    def to_come(self) -> list[Running]:
        """The samples whose prompts are not through yet."""
        return [sample for sample in self._samples if sample.id not in self._dropped]

    def drop(self, id: str) -> list[Running]:
        """Leaves a sample out of what is to come; returns it, if it was there."""
        dropped = [sample for sample in self.to_come if sample.id == id]
        self._dropped |= {sample.id for sample in dropped}
        return dropped

    def feed(self, pool: PagePool, num_tokens: int) -> tuple[int, list[Running]]:
        """Runs the next chunk. Returns its number of tokens, and the samples whose prompts end in it. A chunk ends
        before a sample that was dropped, whose tokens are passed over."""
        while self._samples[0].id in self._dropped:
            self._fed += self._left(self._samples.pop(0))
        inside: list[Running] = []
        lengths: list[int] = []
        for sample in self._samples:
            if sum(lengths) == num_tokens or sample.id in self._dropped:
                break
            inside.append(sample)
            lengths.append(min(self._left(sample), num_tokens - sum(lengths)))
        start = self._fed
        stop = self._fed = start + sum(lengths)
        unread = torch.zeros(stop - start, dtype=torch.long, device=self._model.device)
        hidden_TD = self._model(
            continuation(inside, lengths, unread),
            embeds_TD=self._embeds_TD[start:stop],
            routing=self._routing.part(start, stop),
            feed=pool.feed([each.pages for each in inside], lengths, [len(each.prompt_TD) for each in inside]),
        )
        for sample, hidden in zip(inside, hidden_TD.split(lengths), strict=True):
            if sample.asked.decoding.score_prompt:
                sample.prompt_likelihoods += self._scored(sample, hidden)
        ended = [sample for sample in inside if not self._left(sample)]
        self._samples = self._samples[len(ended) :]
        last = torch.tensor(lengths[: len(ended)], dtype=torch.long, device=self._model.device).cumsum(0) - 1
        for sample, hidden_D in zip(ended, hidden_TD[last], strict=True):
            sample.behind_D = hidden_D
        return stop - start, ended

    def _left(self, sample: Running) -> int:
        """Tokens of its prompt that are to come."""
        return len(sample.prompt_TD) - sample.pages.length

    def _scored(self, sample: Running, hidden_TD: Tensor) -> list[TokenLikelihood]:
        """The likelihoods of the prompt's tokens that follow those of a chunk, which has been fed."""
        backbone, stop = self._model.backbone, sample.pages.length
        following = sample.asked.sample.token_ids_T[stop - len(hidden_TD) + 1 : stop + 1]
        rows = max(1, LOGITS_PER_CHUNK // backbone.vocab_size)
        found: list[TokenLikelihood] = []
        for hidden, targets in zip(hidden_TD[: len(following)].split(rows), following.split(rows), strict=True):
            count = sample.asked.decoding.num_likeliest or 0
            found += likelihoods(backbone.head(hidden), targets.tolist(), [count] * len(targets))
        return found


def next_logits(model: MoLoRA, pool: PagePool, running: Sequence[Running]) -> Tensor:
    """Feeds every sample its latest token, if it has one, and gives its logits (N, V). Samples whose rotary regime
    changes with the token are prefilled again, alone."""
    if model.deterministic_batch:
        return torch.cat([_decode(model, pool, [sample]) for sample in running])
    return _decode(model, pool, running)


def _decode(model: MoLoRA, pool: PagePool, running: Sequence[Running]) -> Tensor:
    regime = model.backbone.regime
    beginning = [index for index, sample in enumerate(running) if not sample.answer]
    going = [index for index, sample in enumerate(running) if sample.answer]
    crossing = [i for i in going if regime(running[i].length) != regime(running[i].length - 1)]
    staying = [index for index in going if index not in crossing]
    logits: list[Tensor] = []
    if beginning:
        logits.append(model.backbone.head(torch.stack([running[index].behind_D for index in beginning])))
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
    if len(logits) == 1:
        return logits[0]
    order = torch.tensor([*beginning, *staying, *crossing], device=model.device).argsort()
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
