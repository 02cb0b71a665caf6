"""Generation: samples of any mix decode together; each starts, crosses the RoPE switch and ends on its own.

Letters: N running samples, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from molora.data.processor import SampleTooLong
from molora.inference.frames import FrameMemory
from molora.inference.running import Prompts, Running, next_logits
from molora.inference.sampling import NO_TOKEN, choose
from molora.model.molora import MoLoRA
from molora.model.pages import PagePool, SamplePages
from molora.pack import Sample, collate
from molora.seeding import seed_of

T = TypeVar("T")

# A softmax over smaller ones would divide by zero in single precision; such a temperature means greedy: 0.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class GenerationConfig:
    """How answers are decoded. `temperature` 0 is greedy; `top_p` keeps the likeliest tokens up to that mass. An answer
    ends before the first of the texts `stop` that it would hold.

    `prefill_tokens` of prompts enter in a step, so that samples that run do not wait long for those that come.
    `kv_cache_gib` is the memory for keys and values: samples wait until enough of it is free for prompt and answer, and
    one that needs more than all of it is refused. None takes what the first `max_running_samples` samples need, and,
    when none of them runs any more, what a later one needs.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_running_samples: int = 64
    prefill_tokens: int = 2048
    kv_cache_gib: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sized = self.kv_cache_gib is None or 0 < self.kv_cache_gib < math.inf
        stops = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        tempered = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        for name, ok, needed in (
            ("max_new_tokens", _positive(self.max_new_tokens), "a whole number, 1 or more"),
            ("temperature", tempered, f"0, which is greedy, or {LEAST_TEMPERATURE:g} or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_running_samples", _positive(self.max_running_samples), "a whole number, 1 or more"),
            ("prefill_tokens", _positive(self.prefill_tokens), "a whole number, 1 or more"),
            ("kv_cache_gib", sized, "a number above 0"),
            ("stop", stops, "a tuple of texts that are not empty"),
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
    """One new token of one sample. `finished` is set on its last one: "stop" (a stop token, not part of the answer, or
    the end of a text that ends it), "length", or "error": there is no token (-1) then, and `error` says why."""

    id: str
    token_id: int
    finished: Literal["stop", "length", "error"] | None
    error: Exception | None = None


def tokens_kept(prompt_tokens: int, max_new_tokens: int, max_tokens: int) -> int:
    """Tokens whose keys and values a sample can come to have; the last token of an answer is never fed."""
    return max(prompt_tokens, min(prompt_tokens + max_new_tokens, max_tokens) - 1)


class Admission:
    """Samples on their way in, in their order, and the pool that they wait for."""

    def __init__(self, model: MoLoRA, samples: Iterable[Sample | Failed], config: GenerationConfig) -> None:
        self._backbone = model.backbone
        self._samples = iter(samples)
        self._config = config
        self._waiting: deque[Sample] = deque()
        self._read_all = False
        self.pool = self._pool_as_configured()

    @property
    def is_over(self) -> bool:
        """Whether no sample is to come."""
        return self._read_all and not self._waiting

    def _pool_as_configured(self) -> PagePool:
        config, backbone = self._config, self._backbone
        if config.kv_cache_gib is None:
            return backbone.page_pool(0, config.max_running_samples)
        kept = backbone.kept_layers()
        most = config.max_running_samples * kept.pages_for(backbone.max_tokens)
        num_pages = kept.pages_within(int(config.kv_cache_gib * 2**30), config.max_running_samples, most)
        return backbone.page_pool(num_pages, config.max_running_samples)

    def read(self, num_running: int) -> Iterator[Failed]:
        """Reads as many samples as may run beside those that do; yields what is none, or can never fit."""
        while len(self._waiting) < self._config.max_running_samples - num_running:
            if (sample := next(self._samples, None)) is None:
                self._read_all = True
                return
            if isinstance(sample, Failed):
                yield sample
            elif self._config.kv_cache_gib is not None and not self.pool.fits(self._tokens(sample)):
                yield Failed(sample.id, self._too_long(sample))
            else:
                self._waiting.append(sample)

    def enter(self, num_running: int) -> list[tuple[Sample, SamplePages]]:
        """Those of the samples read that have pages now, for all the tokens that they can come to have."""
        if self._waiting and not num_running and not self.pool.fits(self._tokens(self._waiting[0])):
            needs = [self.pool.kept.pages_for(self._tokens(sample)) for sample in self._waiting]
            del self.pool  # before there is another
            self.pool = self._backbone.page_pool(sum(needs), self._config.max_running_samples)
        entering = []
        while self._waiting and num_running + len(entering) < self._config.max_running_samples:
            pages = self.pool.admit(self._tokens(self._waiting[0]))
            if pages is None:
                break
            entering.append((self._waiting.popleft(), pages))
        return entering

    def _tokens(self, sample: Sample) -> int:
        return tokens_kept(len(sample), self._config.max_new_tokens, self._backbone.max_tokens)

    def _too_long(self, sample: Sample) -> SampleTooLong:
        needs, has = self._tokens(sample), self.pool.num_pages * self.pool.kept.page_tokens
        return SampleTooLong(
            f"sample {sample.id}: needs keys and values of {needs:,} tokens ({len(sample):,} of its prompt), but "
            f"kv_cache_gib={self._config.kv_cache_gib:g} holds {has:,}; raise it, lower max_new_tokens, or shorten the "
            "prompt"
        )


@torch.no_grad()
def generate(
    model: MoLoRA,
    samples: Iterable[Sample | Failed],
    config: GenerationConfig | None = None,
    *,
    keep_going: bool = False,
    frames: FrameMemory | None = None,
    is_over: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> Iterator[Step]:
    """Decodes samples, yielding tokens as they come; samples enter as others finish.

    A sample's tokens do not depend on its neighbours: it has a generator, seeded by the config's seed and the sample's
    id. Ids must be unique. `frames` remembers those of media that appear again. `is_over` says of an answer's tokens so
    far whether they are to be its last, as a text of the config's `stop` is complete.

    With `keep_going` a sample that fails (could not be made, collated or encoded, does not fit into `kv_cache_gib`, or
    has logits that are no numbers) ends with a step that has its error, and the others go on as if it had never been
    there. Else its error is raised.

    Raises SampleFailed for a sample that cannot be collated or encoded, SampleTooLong for one that does not fit,
    NotFinite for one whose logits are NaN or infinite, and the error of one that could not be made.
    """
    config = config or GenerationConfig()
    model.eval()
    admission = Admission(model, samples, config)
    running: list[Running] = []
    prompts: list[Prompts] = []

    def failed(id: str, error: Exception) -> Step:
        if not keep_going:
            raise error
        return Step(id, -1, "error", error)

    while running or prompts or not admission.is_over:
        logits = next_logits(model, admission.pool, running)
        if not prompts:
            prompts = yield from _entering(model, admission, len(running), config, frames, failed)
        fed = 0
        while prompts and fed < config.prefill_tokens:
            num_tokens, ended, their_logits = prompts[0].feed(admission.pool, config.prefill_tokens)
            fed, running, logits = fed + num_tokens, running + ended, logits + their_logits
            prompts = prompts if prompts[0].to_come else prompts[1:]
        if not running:
            continue
        logits_NV = torch.cat(logits) if len(logits) > 1 else logits[0]
        generators = [sample.generator for sample in running]
        tokens = choose(logits_NV, generators, temperature=config.temperature, top_p=config.top_p)
        kept: list[Running] = []
        for index, (sample, token_id) in enumerate(zip(running, tokens, strict=True)):
            finished = None
            if token_id == NO_TOKEN:
                yield failed(sample.id, _not_finite(sample.id, float(logits_NV[index].max())))
                finished = "error"
            else:
                sample.answer.append(token_id)
                if token_id in model.backbone.stop_ids or is_over(sample.answer):
                    finished = "stop"
                elif len(sample.answer) == config.max_new_tokens or sample.length >= model.backbone.max_tokens:
                    finished = "length"
                yield Step(sample.id, token_id, finished)
            if finished is None:
                kept.append(sample)
            else:
                admission.pool.release(sample.pages)
        # Neighbours by adapter, so that routing is one slice each.
        running = sorted(kept, key=lambda sample: model.router.order(sample.modalities))


def _not_finite(id: str, highest: float) -> NotFinite:
    advice = "look at its media, and at the weights it runs with"
    return NotFinite(f"sample {id}: its logits are not finite ({highest}); {advice}")


def _entering(
    model: MoLoRA,
    admission: Admission,
    num_running: int,
    config: GenerationConfig,
    frames: FrameMemory | None,
    failed: Callable[[str, Exception], Step],
) -> Generator[Step, None, list[Prompts]]:
    """Lets samples in, embedded and routed, in one pack or each by itself; yields a step for each that fails."""
    for fault in admission.read(num_running):
        yield failed(fault.id, fault.error)
    entering = admission.enter(num_running)
    while entering:
        samples = [sample for sample, _ in entering]
        pages = {sample.id: held for sample, held in entering}
        seeds = {sample.id: seed_of(config.seed, sample.id) for sample in samples}
        try:
            filled = samples if frames is None else frames.fill(samples)
            packs = [[sample] for sample in filled] if model.deterministic_batch else [filled]
            return [Prompts(model, pack, pages, seeds) for pack in packs]
        except Exception:
            failed_alone = faults(model, samples)
            if not failed_alone:
                raise
            for id, error in failed_alone.items():
                yield failed(id, error)
                admission.pool.release(pages[id])
            entering = [(sample, held) for sample, held in entering if sample.id not in failed_alone]
    return []


def faults(model: MoLoRA, samples: Sequence[Sample]) -> dict[str, Exception]:
    """The samples that fail on their own before they reach the backbone, with their errors."""
    found: dict[str, Exception] = {}
    for sample in samples:
        try:
            pack = collate([sample], model.modalities, model.router.order).to(model.device)
            model.router(pack, model.embed(pack))
        except Exception as error:
            fault = SampleFailed(f"sample {sample.id}: {type(error).__name__}: {error}; --debug shows where")
            fault.__cause__ = error
            found[sample.id] = fault
    return found
