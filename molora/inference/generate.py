"""Generation: samples of any mix decode together; each starts, crosses the RoPE switch and ends on its own.

Letters: T tokens in a pack, N running samples, D backbone width, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

from molora.model.cache import PackedCache
from molora.model.molora import MoLoRA
from molora.pack import Pack, Sample, collate
from molora.seeding import seed_of

T = TypeVar("T")

# A softmax over smaller ones would divide by zero in single precision; such a temperature means greedy: 0.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded. `temperature` 0 is greedy; `top_p` keeps the likeliest tokens up to that mass."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_running_samples: int = 64

    def __post_init__(self) -> None:
        tempered = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        for name, ok, needed in (
            ("max_new_tokens", _positive(self.max_new_tokens), "a whole number, 1 or more"),
            ("temperature", tempered, f"0, which is greedy, or {LEAST_TEMPERATURE:g} or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_running_samples", _positive(self.max_running_samples), "a whole number, 1 or more"),
        ):
            if not ok:
                raise ValueError(f"generation: {name} cannot be {getattr(self, name)}; give {needed}")


class SampleFailed(ValueError):
    """A sample that a plugin or an encoder fails on."""


class NotFinite(SampleFailed):
    """A sample whose logits are no numbers."""


def _positive(number: int) -> bool:
    return isinstance(number, int) and number >= 1


@dataclass(frozen=True)
class Failed:
    """In the place of a sample that could not be made."""

    id: str
    error: Exception


def attempt(make: Callable[[], T], id: str) -> T | Failed:
    """What `make` makes for a sample, or what is wrong with the sample."""
    try:
        return make()
    except ImportError:  # what is not installed here is no fault of the sample
        raise
    except Exception as error:
        return Failed(id, error)


@dataclass(frozen=True)
class Step:
    """One new token of one sample. `finished` is set on its last one: "stop" (a stop token, not part of the answer),
    "length", or "error": there is no token (-1) then, and `error` says why."""

    id: str
    token_id: int
    finished: Literal["stop", "length", "error"] | None
    error: Exception | None = None


@dataclass
class _Running:
    """A sample in the batch: everything needed to decode its next token or to prefill it again."""

    id: str
    modalities: frozenset[str]
    gates: Tensor | None
    prompt_TD: Tensor
    generator: torch.Generator
    answer: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.prompt_TD) + len(self.answer)


@torch.no_grad()
def generate(
    model: MoLoRA,
    samples: Iterable[Sample | Failed],
    config: GenerationConfig | None = None,
    *,
    keep_going: bool = False,
) -> Iterator[Step]:
    """Decodes samples, yielding tokens as they come; samples enter as others finish.

    A sample's tokens do not depend on its neighbours: it has a generator, seeded by the config's seed and the sample's
    id. Ids must be unique.

    With `keep_going` a sample that fails (could not be made, collated or encoded, or has logits that are no numbers)
    ends with a step that has its error, and the others go on as if it had never been there. Else its error is raised.

    Raises SampleFailed for a sample that cannot be collated or encoded, NotFinite for one whose logits are NaN or
    infinite, and the error of one that could not be made.
    """
    config = config or GenerationConfig()
    model.eval()
    waiting = iter(samples)
    running: list[_Running] = []
    cache = PackedCache()

    def failed(id: str, error: Exception) -> Step:
        if not keep_going:
            raise error
        return Step(id, -1, "error", error)

    while True:
        logits: list[Tensor] = []
        if running:
            logits, cache = _decode(model, running, cache)
        entering: list[Sample] = []
        entered = None
        while entered is None:
            while len(entering) < config.max_running_samples - len(running):
                if (sample := next(waiting, None)) is None:
                    break
                if isinstance(sample, Failed):
                    yield failed(sample.id, sample.error)
                else:
                    entering.append(sample)
            if not entering:
                break
            try:
                entered = _prefill(model, entering, config)
            except Exception:
                faults = _faults(model, entering)
                if not faults:
                    raise
                for id, error in faults.items():
                    yield failed(id, error)
                entering = [sample for sample in entering if sample.id not in faults]
        if entered is not None:
            newcomers, their_logits, their_cache = entered
            running, logits = running + newcomers, logits + their_logits
            cache.join(their_cache)
        if not running:
            return
        kept: list[int] = []
        for index, (sample, logits_V) in enumerate(zip(running, logits, strict=True)):
            try:
                token_id = _choose(logits_V, sample.generator, config)
            except NotFinite as error:
                yield failed(sample.id, NotFinite(f"sample {sample.id}: {error}"))
                continue
            sample.answer.append(token_id)
            finished = None
            if token_id in model.backbone.stop_ids:
                finished = "stop"
            elif len(sample.answer) == config.max_new_tokens or sample.length >= model.backbone.max_tokens:
                finished = "length"
            yield Step(sample.id, token_id, finished)
            if finished is None:
                kept.append(index)
        # Neighbours by adapter, so that routing is one slice each.
        kept.sort(key=lambda index: model.router.order(running[index].modalities))
        running = [running[index] for index in kept]
        cache.select(kept)


def _faults(model: MoLoRA, samples: Sequence[Sample]) -> dict[str, Exception]:
    """The samples that fail on their own before they reach the backbone, with their errors."""
    faults: dict[str, Exception] = {}
    for sample in samples:
        try:
            pack = collate([sample], model.modalities, model.router.order).to(model.device)
            model.router(pack, model.embed(pack))
        except Exception as error:
            fault = SampleFailed(f"sample {sample.id}: {type(error).__name__}: {error}; --debug shows where")
            fault.__cause__ = error
            faults[sample.id] = fault
    return faults


def _prefill(
    model: MoLoRA, samples: Sequence[Sample], config: GenerationConfig
) -> tuple[list[_Running], list[Tensor], PackedCache]:
    """Runs prompts; returns what decoding goes on with, and the logits behind each."""
    if model.deterministic_batch and len(samples) > 1:
        running, logits, cache = [], [], PackedCache()
        for sample in samples:
            its_running, its_logits, its_cache = _prefill(model, [sample], config)
            running, logits = running + its_running, logits + its_logits
            cache.join(its_cache)
        return running, logits, cache
    pack = collate(samples, model.modalities, model.router.order).to(model.device)
    cache = PackedCache()
    embeds_TD = model.embed(pack)
    routing = model.router(pack, embeds_TD)
    hidden_TD = model(pack, embeds_TD=embeds_TD, routing=routing, cache=cache)
    logits = list(model.backbone.head(hidden_TD[torch.tensor(pack.lengths).cumsum(0) - 1]))
    gates = routing.gates or (None,) * len(pack)
    prompts = embeds_TD.split(pack.lengths)
    running = [
        _Running(id, modalities, gate, prompt, torch.Generator().manual_seed(seed_of(config.seed, id)))
        for id, modalities, gate, prompt in zip(pack.ids, pack.modalities, gates, prompts, strict=True)
    ]
    return running, logits, cache


def _decode(model: MoLoRA, running: Sequence[_Running], cache: PackedCache) -> tuple[list[Tensor], PackedCache]:
    """Feeds every sample its latest token. Those whose rotary regime changes with it are prefilled again, alone."""
    if model.deterministic_batch and len(running) > 1:
        both = [_decode(model, [sample], its) for sample, its in zip(running, cache.split(), strict=True)]
        joined = PackedCache()
        for _, its in both:
            joined.join(its)
        return [logits_V for logits, _ in both for logits_V in logits], joined
    regime = model.backbone.regime
    crossing = {i for i, sample in enumerate(running) if regime(sample.length) != regime(sample.length - 1)}
    staying = [index for index in range(len(running)) if index not in crossing]
    cache.select(staying)
    logits: dict[int, Tensor] = {}
    if staying:
        samples = [running[index] for index in staying]
        tokens = torch.tensor([sample.answer[-1] for sample in samples], device=model.device)
        positions = torch.tensor([sample.length - 1 for sample in samples], device=model.device)
        pack = _continuation(samples, (1,) * len(samples), tokens)
        hidden_ND = model(pack, embeds_TD=model.backbone.embed(tokens), position_ids_T=positions, cache=cache)
        logits.update(zip(staying, model.backbone.head(hidden_ND), strict=True))
    for index in sorted(crossing):
        sample = running[index]
        answer = torch.tensor(sample.answer, device=model.device)
        embeds_TD = torch.cat([sample.prompt_TD, model.backbone.embed(answer)])
        again = PackedCache()
        unread = torch.zeros(sample.length, dtype=torch.long, device=model.device)
        pack = _continuation([sample], (sample.length,), unread)
        hidden_TD = model(pack, embeds_TD=embeds_TD, cache=again)
        cache.join(again)
        logits[index] = model.backbone.head(hidden_TD[-1:])[0]
    order = [*staying, *sorted(crossing)]
    cache.select([order.index(index) for index in range(len(running))])
    return [logits[index] for index in range(len(running))], cache


def _continuation(samples: Sequence[_Running], lengths: tuple[int, ...], token_ids_T: Tensor) -> Pack:
    """A pack whose embeddings are already known: no items, no targets."""
    return Pack(
        ids=tuple(sample.id for sample in samples),
        lengths=lengths,
        modalities=tuple(sample.modalities for sample in samples),
        token_ids_T=token_ids_T,
        modality_ids_T=torch.zeros_like(token_ids_T),
        targets_T=torch.zeros_like(token_ids_T, dtype=torch.bool),
        media={},
        gates=tuple(sample.gates for sample in samples),
    )


def _choose(logits_V: Tensor, generator: torch.Generator, config: GenerationConfig) -> int:
    likeliest = int(logits_V.argmax())  # of logits that are not all numbers, one that is none
    if not math.isfinite(highest := float(logits_V[likeliest])):
        raise NotFinite(f"its logits are not finite ({highest}); look at its media, and at the weights it runs with")
    if config.temperature == 0:
        return likeliest
    probabilities_V = torch.softmax(logits_V.float().cpu() / config.temperature, dim=-1)
    if config.top_p < 1:
        ordered, ids = probabilities_V.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= config.top_p
        probabilities_V[ids[beyond]] = 0
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
