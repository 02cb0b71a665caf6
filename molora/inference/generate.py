"""Generation: samples of any mix decode together; each starts, crosses the RoPE switch and ends on its own.

Letters: N running samples, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from molora.data.processor import SampleTooLong
from molora.inference.frames import FrameMemory
from molora.inference.grammar import Grammar
from molora.inference.running import Asked, Prompts, Running, next_logits
from molora.inference.sampling import NO_TOKEN, Decoding, TokenLikelihood, choose, likelihoods, positive
from molora.model.molora import MoLoRA
from molora.model.pages import KeptLayers, PagePool, SamplePages
from molora.pack import Sample, collate
from molora.seeding import seed_of
from molora.terminal import warn

T = TypeVar("T")

# Steps in a row that long prompts wait for short ones.
_MOST_HELD_BACK = 3
# How much of the memory that is free keys and values may take: activations and logits need some too.
_SHARE_TAKEN = 0.7


@dataclass(frozen=True)
class GenerationConfig(Decoding):
    """How answers are decoded, and how many samples run together.

    `prefill_tokens` of prompts enter in a step, so that samples that run do not wait long for those that come, and of a
    prompt that has more, `chunk_tokens` (as many by default).
    `kv_cache_gib` is the memory for keys and values: samples wait until enough of it is free for prompt and answer, and
    one that needs more than all of it is refused. None takes what the first `max_running_samples` samples need, and,
    when none of them runs any more, what a later one needs, but no more than 70 % of the memory that is free.
    """

    max_running_samples: int = 64
    prefill_tokens: int = 2048
    chunk_tokens: int | None = None
    kv_cache_gib: float | None = None

    def _settings(self) -> list[tuple[str, bool, str]]:
        sized = self.kv_cache_gib is None or 0 < self.kv_cache_gib < math.inf
        return [
            *super()._settings(),
            ("max_running_samples", positive(self.max_running_samples), "a whole number, 1 or more"),
            ("prefill_tokens", positive(self.prefill_tokens), "a whole number, 1 or more"),
            ("chunk_tokens", self.chunk_tokens is None or positive(self.chunk_tokens), "a whole number, 1 or more"),
            ("kv_cache_gib", sized, "a number above 0"),
        ]


class SampleFailed(ValueError):
    """A sample that a plugin or an encoder fails on."""


class NotFinite(SampleFailed):
    """A sample whose logits are no numbers."""


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
    the end of a text that ends it), "length", or "error": there is no token (-1) then, and `error` says why.
    `likelihood` is the token's, and `prompt` those of the prompt's tokens but its first, if the sample's decoding asks
    for them; the latter come with the first token."""

    id: str
    token_id: int
    finished: Literal["stop", "length", "error"] | None
    error: Exception | None = None
    likelihood: TokenLikelihood | None = None
    prompt: tuple[TokenLikelihood, ...] = ()


def tokens_kept(prompt_tokens: int, max_new_tokens: int, max_tokens: int) -> int:
    """Tokens whose keys and values a sample can come to have; the last token of an answer is never fed."""
    return max(prompt_tokens, min(prompt_tokens + max_new_tokens, max_tokens) - 1)


def pages_configured(kept: KeptLayers, config: GenerationConfig, max_tokens: int) -> int:
    """Pages of the pool that `kv_cache_gib` asks for, and no more than all samples can fill; 0 without it."""
    most = config.max_running_samples * kept.pages_for(max_tokens)
    return kept.pages_within(int((config.kv_cache_gib or 0) * 2**30), config.max_running_samples, most)


class Batch:
    """Samples that are answered together, each as its `Asked` says. A sample that is added waits for pages, enters,
    goes through the backbone in chunks, takes a token a step, and leaves; between two steps others may be added, or
    removed wherever they are. Samples that are one `Sample` but for their ids, and are decoded in the same way, read
    their prompt once: while one reads it the others wait, and then they branch off.

    A sample's tokens do not depend on its neighbours: it has a generator of its own. `frames` remembers those of media
    that appear again.
    """

    def __init__(self, model: MoLoRA, config: GenerationConfig, frames: FrameMemory | None = None) -> None:
        self._model = model.eval()
        self._config = config
        self._frames = frames
        self._waiting: deque[Asked] = deque()
        # Prompts that enter in a step, and those that need several.
        self._short: list[Prompts] = []
        self._long: list[Prompts] = []
        self._held_back = 0
        self._running: list[Running] = []
        self.pool = self._pool_as_configured()

    def _pool_as_configured(self) -> PagePool:
        config, backbone = self._config, self._model.backbone
        kept = backbone.kept_layers()
        num_pages = pages_configured(kept, config, backbone.max_tokens)
        takes, free = kept.num_bytes(num_pages, config.max_running_samples), backbone.free_bytes()
        if takes > free:
            told = f"kv_cache_gib={config.kv_cache_gib:g} takes {_gib(takes)}, but {_gib(free)} of memory are free"
            raise ValueError(f"generation: {told}; give less, or leave it out")
        return backbone.page_pool(num_pages, config.max_running_samples)

    def _make_room(self) -> SampleTooLong | None:
        """Makes a larger pool, as nothing runs and the first sample that waits does not fit; returns what is wrong if
        it never will."""
        kept, number = self.pool.kept, self._config.max_running_samples
        needs = sum(kept.pages_for(self._tokens(asked)) for asked in self._waiting)
        free = self._model.backbone.free_bytes() + self.pool.num_bytes
        num_pages = kept.pages_within(int(_SHARE_TAKEN * free), number, needs)
        first = self._waiting[0].sample
        tokens = self._tokens(self._waiting[0])
        if (least := kept.pages_for(tokens)) > num_pages:
            return SampleTooLong(
                f"sample {first.id}: needs keys and values of {tokens:,} tokens ({len(first):,} of its prompt), "
                f"{_gib(kept.num_bytes(least, number))}, and {_gib(free)} of memory are free, of which "
                f"{_SHARE_TAKEN:.0%} may be taken; shorten the prompt, lower max_new_tokens, or set kv_cache_gib"
            )
        if num_pages < needs:
            warn(
                f"keys and values of {len(self._waiting)} samples would take {_gib(kept.num_bytes(needs, number))}, "
                f"and {_gib(free)} of memory are free, of which {_SHARE_TAKEN:.0%} are taken: samples wait for each "
                "other. Lower max_new_tokens or max_running_samples, or set kv_cache_gib"
            )
        del self.pool  # before there is another
        self.pool = self._model.backbone.page_pool(num_pages, number)
        return None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Samples that hold pages."""
        return len(self._running) + sum(len(prompts.to_come) for prompts in (*self._short, *self._long))

    @property
    def has_room(self) -> bool:
        """Whether one more sample may run beside those that run or wait, if it has pages."""
        return self.num_waiting + self.num_running < self._config.max_running_samples

    def add(self, asked: Asked) -> None:
        """Lets a sample wait for its turn. Ids must be unique. Raises SampleTooLong for one that could never enter."""
        self.check_size(asked)
        self._waiting.append(asked)

    def check_size(self, asked: Asked) -> None:
        """Raises SampleTooLong for a sample that could never enter."""
        sized = self._config.kv_cache_gib is not None
        if sized and not self.pool.fits(needs := self._tokens(asked)):
            sample, has = asked.sample, self.pool.num_pages * self.pool.kept.page_tokens
            raise SampleTooLong(
                f"sample {sample.id}: needs keys and values of {needs:,} tokens ({len(sample):,} of its prompt), but "
                f"kv_cache_gib={self._config.kv_cache_gib:g} holds {has:,}; raise it, lower max_new_tokens, or shorten "
                "the prompt"
            )

    def remove(self, id: str) -> None:
        """Takes a sample out, if it is still there, with its pages."""
        self._waiting = deque(asked for asked in self._waiting if asked.sample.id != id)
        gone = [sample for sample in self._running if sample.id == id]
        self._running = [sample for sample in self._running if sample.id != id]
        for prompts in (*self._short, *self._long):
            gone += prompts.drop(id)
        self._short = [prompts for prompts in self._short if prompts.to_come]
        self._long = [prompts for prompts in self._long if prompts.to_come]
        for sample in gone:
            self.pool.release(sample.pages)

    @torch.no_grad()
    def step(self) -> list[Step]:
        """One token of every sample that runs, after waiting samples have entered and chunks of prompts were fed. A
        sample that cannot be collated or encoded, or whose logits are no numbers, ends with its error."""
        self._branch()  # before those that enter take the pages
        steps = self._enter()
        self._feed()
        self._branch()  # before those that are through end
        if self._running:
            steps += self._choose(next_logits(self._model, self.pool, self._running))
        return steps

    def _branch(self) -> None:
        """Lets samples in that go on from the prompt of one that runs, and have pages now."""
        if not self._waiting:
            return
        holding = {
            each.asked.beginning: each
            for each in self._running
            if self.pool.holds(each.pages, len(each.prompt_TD)) and not self._has_crossed(each, each.pages.length)
        }
        waiting, self._waiting = self._waiting, deque()
        for asked in waiting:
            read, pages = holding.get(asked.beginning), None
            if read is not None and self.num_running < self._config.max_running_samples:
                most = self._tokens(asked)
                rewrites = self._has_crossed(read, most)
                pages = self.pool.branch(read.pages, len(read.prompt_TD), most, rewrites=rewrites)
            if read is None or pages is None:
                self._waiting.append(asked)
            else:
                self._running.append(read.branched(asked, pages))

    def _has_crossed(self, sample: Running, length: int) -> bool:
        """Whether a sample of so many tokens has other rotary frequencies than its prompt."""
        regime = self._model.backbone.regime
        return regime(length) != regime(len(sample.prompt_TD))

    def _feed(self) -> None:
        """Feeds short prompts in the order in which they came, and a chunk of one long prompt, in turn. A step with
        short prompts has no such chunk, so that their first tokens come soon; but of some steps one has, so that long
        prompts go on as well."""
        fed = 0
        while self._short and fed < self._config.prefill_tokens:
            prompts = self._short[0]
            fed += self._feed_chunk(prompts, self._config.prefill_tokens)
            if not prompts.to_come:
                del self._short[0]
        waits = bool(self._long and fed) and self._held_back < _MOST_HELD_BACK
        self._held_back = self._held_back + 1 if waits else 0
        if self._long and not waits:
            prompts = self._long.pop(0)
            self._feed_chunk(prompts, self._config.chunk_tokens or self._config.prefill_tokens)
            if prompts.to_come:
                self._long.append(prompts)

    def _feed_chunk(self, prompts: Prompts, most: int) -> int:
        num_tokens, ended = prompts.feed(self.pool, most)
        self._running += ended
        return num_tokens

    def _enter(self) -> list[Step]:
        """Lets samples in that have pages now for all the tokens that they can come to have, embedded and routed, in
        one pack or each by itself, but those whose prompt is being read; returns a step for each that fails."""
        failed: list[Step] = []
        while self._waiting and not self.num_running and not self.pool.fits(self._tokens(self._waiting[0])):
            if error := self._make_room():
                failed.append(Step(self._waiting.popleft().sample.id, -1, "error", error))
        being_read = {each.asked.beginning for prompts in (*self._short, *self._long) for each in prompts.to_come}
        entering: list[tuple[Asked, SamplePages]] = []
        held_back: list[Asked] = []
        while self._waiting and self.num_running + len(entering) < self._config.max_running_samples:
            if self._waiting[0].beginning in being_read:
                held_back.append(self._waiting.popleft())
                continue
            pages = self.pool.admit(self._tokens(self._waiting[0]))
            if pages is None:
                break
            being_read.add(self._waiting[0].beginning)
            entering.append((self._waiting.popleft(), pages))
        self._waiting.extendleft(reversed(held_back))
        while entering:
            try:
                self._prepare(entering)
                break
            except Exception:
                faulty = faults(self._model, [asked.sample for asked, _ in entering])
                if not faulty:
                    raise
                for asked, pages in entering:
                    if asked.sample.id in faulty:
                        failed.append(Step(asked.sample.id, -1, "error", faulty[asked.sample.id]))
                        self.pool.release(pages)
                entering = [(asked, pages) for asked, pages in entering if asked.sample.id not in faulty]
        return failed

    def _prepare(self, entering: Sequence[tuple[Asked, SamplePages]]) -> None:
        samples = [asked.sample for asked, _ in entering]
        filled = samples if self._frames is None else self._frames.fill(samples)
        held = {asked.sample.id: (asked, pages) for asked, pages in entering}
        long = [sample for sample in filled if len(sample) > self._config.prefill_tokens]
        short = [sample for sample in filled if len(sample) <= self._config.prefill_tokens]
        packs = [[sample] for sample in short] if self._model.deterministic_batch else [short] * bool(short)
        prompts = [Prompts(self._model, pack, held) for pack in (*packs, *([sample] for sample in long))]
        self._short += prompts[: len(packs)]
        self._long += prompts[len(packs) :]

    def _choose(self, logits_NV: Tensor) -> list[Step]:
        """The next token of every running sample; those that end leave."""
        running, backbone = self._running, self._model.backbone
        masked_NV, faulty = _held(logits_NV, running)
        tokens = _chosen(masked_NV, running)
        told = _likelihoods(logits_NV, running, tokens)
        steps: list[Step] = []
        kept: list[Running] = []
        for index, (sample, token_id) in enumerate(zip(running, tokens, strict=True)):
            how = sample.asked.decoding
            finished, error, prompt = None, None, ()
            if index in faulty:
                token_id, finished, error = NO_TOKEN, "error", faulty[index]
            elif token_id == NO_TOKEN:
                finished, error = "error", _not_finite(sample.id, float(logits_NV[index].max()))
            else:
                prompt = () if sample.answer else tuple(sample.prompt_likelihoods)
                sample.answer.append(token_id)
                stops = token_id in backbone.stop_ids and not how.ignore_stop_tokens
                if stops or sample.asked.is_over(sample.answer):
                    finished = "stop"
                elif len(sample.answer) == how.max_new_tokens or sample.length >= backbone.max_tokens:
                    finished = "length"
            steps.append(Step(sample.id, token_id, finished, error, told.get(index), prompt))
            if finished is None:
                kept.append(sample)
            else:
                self.pool.release(sample.pages)
        # Neighbours by adapter, so that routing is one slice each.
        self._running = sorted(kept, key=lambda sample: self._model.router.order(sample.modalities))
        return steps

    def _tokens(self, asked: Asked) -> int:
        most = self._model.backbone.max_tokens
        return tokens_kept(len(asked.sample), asked.decoding.max_new_tokens, most)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"


def _held(logits_NV: Tensor, running: Sequence[Running]) -> tuple[Tensor, dict[int, ValueError]]:
    """Logits without the tokens that the grammars of their samples do not allow, and what is wrong with grammars that
    cannot be followed, by row."""
    faulty: dict[int, ValueError] = {}
    held = [(row, each, each.asked.grammar) for row, each in enumerate(running) if each.asked.grammar is not None]
    if held:
        logits_NV = logits_NV.clone()
    for row, sample, grammar in held:
        try:
            if sample.answer:
                grammar.take(sample.answer[-1])
            allowed_V = grammar.allowed_V().to(logits_NV.device)
        except ValueError as error:
            faulty[row] = SampleFailed(f"sample {sample.id}: {error}")
        else:
            logits_NV[row].masked_fill_(~allowed_V, -math.inf)
    return logits_NV, faulty


def _chosen(logits_NV: Tensor, running: Sequence[Running]) -> list[int]:
    """A token for each sample; those that are drawn alike are drawn together."""
    groups: dict[tuple[float, float, int | None], list[int]] = {}
    for index, sample in enumerate(running):
        how = sample.asked.decoding
        groups.setdefault((how.temperature, how.top_p, how.top_k), []).append(index)
    tokens = [NO_TOKEN] * len(running)
    for (temperature, top_p, top_k), rows in groups.items():
        logits = logits_NV if len(groups) == 1 else logits_NV[rows]
        generators = [running[row].generator for row in rows]
        drawn = choose(logits, generators, temperature=temperature, top_p=top_p, top_k=top_k)
        for row, token_id in zip(rows, drawn, strict=True):
            tokens[row] = token_id
    return tokens


def _likelihoods(logits_NV: Tensor, running: Sequence[Running], tokens: Sequence[int]) -> dict[int, TokenLikelihood]:
    """Those of the tokens chosen, by row, for the samples that ask for them."""
    asked = {
        row: sample.asked.decoding.num_likeliest
        for row, sample in enumerate(running)
        if sample.asked.decoding.num_likeliest is not None and tokens[row] != NO_TOKEN
    }
    rows = list(asked)
    found = likelihoods(logits_NV[rows], [tokens[row] for row in rows], list(asked.values())) if rows else []
    return dict(zip(rows, found, strict=True))


def generate(
    model: MoLoRA,
    samples: Iterable[Sample | Failed],
    config: GenerationConfig | None = None,
    *,
    keep_going: bool = False,
    frames: FrameMemory | None = None,
    is_over: Callable[[Sequence[int]], bool] = lambda tokens: False,
    grammar: Grammar | None = None,
) -> Iterator[Step]:
    """Decodes samples, yielding tokens as they come; samples enter as others finish.

    A sample's tokens do not depend on its neighbours: it has a generator, seeded by the config's seed and the sample's
    id. Ids must be unique. `frames` remembers those of media that appear again. `is_over` says of an answer's tokens so
    far whether they are to be its last, as a text of the config's `stop` is complete. Every answer is held to
    `grammar`, if there is one.

    With `keep_going` a sample that fails (could not be made, collated or encoded, does not fit into `kv_cache_gib`, or
    has logits that are no numbers) ends with a step that has its error, and the others go on as if it had never been
    there. Else its error is raised.

    Raises SampleFailed for a sample that cannot be collated or encoded, SampleTooLong for one that does not fit,
    NotFinite for one whose logits are NaN or infinite, and the error of one that could not be made.
    """
    config = config or GenerationConfig()
    batch = Batch(model, config, frames)
    source = iter(samples)
    read_all = False
    while not read_all or batch.num_waiting or batch.num_running:
        refused: list[Step] = []
        while not read_all and batch.has_room and not refused:
            sample = next(source, None)
            if sample is None:
                read_all = True
            elif isinstance(sample, Failed):
                refused.append(Step(sample.id, -1, "error", sample.error))
            else:
                try:
                    held = None if grammar is None else grammar.again()
                    batch.add(Asked(sample, config, seed_of(config.seed, sample.id), is_over, held))
                except SampleTooLong as error:
                    refused.append(Step(sample.id, -1, "error", error))
        for step in refused or batch.step():
            if step.error is not None and not keep_going:
                raise step.error
            yield step


def _not_finite(id: str, highest: float) -> NotFinite:
    advice = "look at its media, and at the weights it runs with"
    return NotFinite(f"sample {id}: its logits are not finite ({highest}); {advice}")


def faults(model: MoLoRA, samples: Sequence[Sample]) -> dict[str, Exception]:
    """The samples that fail on their own before they reach the backbone, with their errors."""
    found: dict[str, Exception] = {}
    for sample in samples:
        try:
            pack = collate([sample], model.modalities, model.router.order).to(model.device)
            model.router(pack, model.embed(pack))
        except Exception as error:
            found[sample.id] = failure_of(sample, error)
    return found


def failure_of(sample: Sample, error: Exception) -> SampleFailed:
    """What a sample's own error is told as."""
    failed = SampleFailed(f"sample {sample.id}: {type(error).__name__}: {error}; --debug shows where")
    failed.__cause__ = error
    return failed
