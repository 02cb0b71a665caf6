"""One request on its way through the engine: its samples, their answers piece by piece, and what it took."""

import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

from molora.data.processor import SampleTooLong
from molora.inference.grammar import Grammar, Grammars
from molora.inference.load import LoadedModel
from molora.inference.running import Asked
from molora.inference.sampling import Decoding, TokenLikelihood
from molora.inference.text import FinalText, ends_at
from molora.modality import MediaError
from molora.pack import Sample
from molora.routing import RoutingError, name_of
from molora.seeding import seed_of
from molora.serve.answers import About, Answered, Usage
from molora.serve.engine import Engine, Places
from molora.serve.fields import GenerationBody, StreamOptions
from molora.serve.metrics import Metrics
from molora.serve.preparation import Preparation
from molora.serve.replies import event

# A client knows its request, and the answer's headers have the id.
_SAMPLE = re.compile(r"^sample \S+: (message )?")


class Refused(Exception):
    """A request that cannot be answered as it is; `param` is the field that is wrong, where one is."""

    def __init__(self, message: str, param: str | None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def refusal(error: ValueError, param: str | None) -> Refused:
    """What a client is told of something wrong with its request."""
    codes = {SampleTooLong: "context_length_exceeded", MediaError: "invalid_media", RoutingError: "no_routing_rule"}
    told = _SAMPLE.sub(lambda found: found[1] or "the request: ", str(error))
    return Refused(told, param, next((code for kind, code in codes.items() if isinstance(error, kind)), None))


@dataclass(frozen=True)
class Names:
    """The names under which a model can be asked, beginning with `name`. `part_types` are its modalities by the types
    of their parts, and `order` raises RoutingError for a set of modalities without a rule."""

    name: str
    part_types: Mapping[str, str]
    order: Callable[[frozenset[str]], Any]

    @cached_property
    def known(self) -> dict[str, frozenset[str] | None]:
        """The names with the modalities that each one takes: any mix, or the set that the name says. Sets of one or two
        are named, and that of all, where the router has a rule for them."""
        modalities = sorted(self.part_types.values())
        sets = {frozenset({one, other}) for one in modalities for other in modalities} | {frozenset(modalities)}
        known: dict[str, frozenset[str] | None] = {self.name: None}
        for each in sorted(sets - {frozenset()}, key=lambda each: (len(each), name_of(each))):
            try:
                self.order(each)
            except RoutingError:
                continue
            known[f"{self.name}:{name_of(each)}"] = each
        return known

    def takes(self, name: str) -> frozenset[str] | None:
        """The modalities that a name takes, None for any mix. Raises Refused for an unknown name."""
        if name not in self.known:
            known = ", ".join(self.known)
            raise Refused(f"there is no model {name[:80]!r} here; there are {known}", "model", "model_not_found", 404)
        return self.known[name]

    def check(self, name: str, modalities: frozenset[str]) -> None:
        """Raises Refused for an unknown name, and for modalities that the name does not take."""
        takes = self.takes(name)
        if takes is not None and not modalities <= takes:
            told = f"{name} takes {name_of(takes)}, and the messages hold {name_of(modalities)}"
            raise Refused(f"{told}; ask {self.name}", "model")


@dataclass(frozen=True)
class Service:
    """A model that is served, under the name `name`, and what requests that say nothing else get."""

    name: str
    loaded: LoadedModel
    engine: Engine
    preparation: Preparation
    metrics: Metrics
    grammars: Grammars
    # Whether the model calls tools in a form that is read.
    reads_calls: bool = False
    max_new_tokens: int = 1024
    temperature: float = 0.0
    answer_seconds: float = 600.0

    @cached_property
    def names(self) -> Names:
        processor = self.loaded.processor
        return Names(self.name, processor.part_types, processor.order)

    @cached_property
    def token_text(self) -> Callable[[int], str]:
        """The text of a token by itself. An answer with likelihoods holds the texts of twenty tokens for each of its
        own, and the event loop would wait while all of them are decoded."""
        decode: Any = self.loaded.processor.tokenizer.decode
        return cache(lambda token_id: decode([token_id]))

    def decoding(
        self, body: GenerationBody, max_new_tokens: int | None, stops: tuple[str, ...] = (), **more: Any
    ) -> Decoding:
        """How the answers to a request are decoded, which end at its stops and at these. Raises Refused."""
        all_tokens = body.top_k in (None, -1, 0)
        try:
            return Decoding(
                max_new_tokens=max_new_tokens or self.max_new_tokens,
                temperature=self.temperature if body.temperature is None else body.temperature,
                top_p=body.top_p or 1.0,
                top_k=None if all_tokens else body.top_k,
                # Below 2**53, so that a client that keeps numbers as floats can ask for the same answer again.
                seed=secrets.randbits(53) if body.seed is None else body.seed,
                stop=body.stops + stops,
                ignore_stop_tokens=bool(body.ignore_eos),
                **more,
            )
        except ValueError as error:
            raise refusal(error, None) from error


@dataclass
class Choice:
    """One answer: its tokens, of which a stop token is none, their likelihoods if they were asked for, and its end."""

    index: int
    sample: Sample
    text: FinalText
    tokens: list[int] = field(default_factory=list)
    likelihoods: list[TokenLikelihood] = field(default_factory=list)
    prompt: tuple[TokenLikelihood, ...] = ()
    finished: Literal["stop", "length"] | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to a choice: text that is final, and likelihoods of tokens, which may be ahead of it."""

    choice: Choice
    text: str
    likelihoods: Sequence[TokenLikelihood]


class Request:
    """The answers to some samples, `number` to each, in the order of the samples, by a name of the model. What
    `take_places` takes is given back by `close`. Raises Refused for an unknown name.

    Choice i of a sample draws what `LoadedModel.generate` draws for the i-th of as many equal conversations.
    """

    def __init__(self, service: Service, id: str, model: str, number: int) -> None:
        self.service = service
        self.id = id
        self.model = model
        self.created = int(time.time())
        self.number = number
        self.choices: list[Choice] = []
        service.names.takes(model)
        self._begun = time.monotonic()
        self._places: Places | None = None

    def take_places(self, num_samples: int) -> None:
        """Raises Full where there is no room for the answers to so many samples, Refused where there never is."""
        number, most = num_samples * self.number, self.service.engine.places
        if number > most:
            raise Refused(f"{number} answers are asked for at once, and {most} is the most here; ask for fewer", None)
        self._places = self.service.engine.take_places(number)

    def close(self) -> None:
        if self._places is not None:
            self._places.give_back()

    def ask(
        self, samples: Sequence[Sample], decoding: Decoding, *, strip: bool, grammar: Grammar | None = None
    ) -> None:
        """Says what is to be answered, and how."""
        self.decoding = decoding
        self._grammar = grammar
        for sample in samples:
            self.service.names.check(self.model, sample.modalities)
            for _ in range(self.number):
                text = FinalText(self.service.loaded.processor.decode, decoding.stop, strip=strip)
                self.choices.append(Choice(len(self.choices), sample, text))

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answers as they come. Raises Refused for a sample that cannot be answered, and what `Engine.steps`
        raises. Who leaves early should close this, which takes what is left out of the batch."""
        metrics, decoding, model = self.service.metrics, self.decoding, self.service.loaded.model
        is_over = ends_at(self.service.loaded.processor.decode, decoding.stop)
        # Two requests may bring the same id.
        choices = {f"{secrets.token_hex(12)}-{choice.index}": choice for choice in self.choices}
        asked = [
            Asked(
                replace(choice.sample, id=id),
                decoding,
                seed_of(decoding.seed, str(choice.index % self.number)),
                is_over,
                self._grammar and self._grammar.again(),
            )
            for id, choice in choices.items()
        ]
        assert self._places is not None, "places are taken before anything is asked"
        metrics.tokens.labels("prompt").inc(self.prompt_tokens)
        async with aclosing(self.service.engine.steps(asked, self.service.answer_seconds, self._places)) as steps:
            try:
                async for step in steps:
                    choice = choices[step.id]
                    if not choice.tokens:
                        metrics.first_token.observe(time.monotonic() - self._begun)
                        choice.prompt = step.prompt
                    told = []
                    if step.token_id not in model.backbone.stop_ids or decoding.ignore_stop_tokens:
                        choice.tokens.append(step.token_id)
                        told = [step.likelihood] if step.likelihood else []
                        choice.likelihoods += told
                    if step.finished in ("stop", "length"):
                        choice.finished = step.finished
                        metrics.answer.observe(time.monotonic() - self._begun)
                        metrics.answers.labels(step.finished).inc()
                        metrics.adapters.labels("+".join(self.adapters(choice.sample)) or "none").inc()
                        metrics.tokens.labels("answer").inc(len(choice.tokens))
                    yield Piece(choice, choice.text.piece(choice.tokens, choice.finished is not None), told)
            except ValueError as error:
                raise refusal(error, None) from error

    async def texts(self) -> list[str]:
        """The answers, when they are there."""
        texts = [""] * len(self.choices)
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.choice.index] += piece.text
        return texts

    def adapters(self, sample: Sample) -> list[str]:
        return sorted(self.service.loaded.model.router.adapters(sample.modalities))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt, once for all its answers."""
        return sum(len(choice.sample) for choice in self.choices[:: self.number])

    def media_tokens(self) -> dict[str, int]:
        """Tokens that media took, by modality."""
        taken: dict[str, int] = {}
        for choice in self.choices[:: self.number]:
            for item in choice.sample.items:
                taken[item.modality] = taken.get(item.modality, 0) + item.prepared.num_tokens
        return taken

    def usage(self) -> Usage:
        """The counts so far."""
        answered = sum(len(choice.tokens) for choice in self.choices)
        media = self.media_tokens()
        adapters = sorted({name for choice in self.choices for name in self.adapters(choice.sample)})
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self.prompt_tokens + answered,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": media.get("audio", 0)},
            "adapters": adapters,
            "media_tokens": media,
        }

    def about(self) -> About:
        usage = self.usage()
        return {"adapters": usage["adapters"], "seed": self.decoding.seed, "media_tokens": usage["media_tokens"]}

    def answered(self) -> Answered:
        """What all forms of a whole answer have in common."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "usage": self.usage(),
            "molora": self.about(),
        }

    def chunk(self, object: str, choice: dict[str, Any] | None, options: StreamOptions | None) -> bytes:
        """A piece of a stream: what is added to a choice, or the counts at the end, which have none."""
        choices = [] if choice is None else [choice]
        told = {"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices}
        if options and options.include_usage:
            told["usage"] = self.usage() if options.continuous_usage_stats or choice is None else None
        if choice is None or choice["finish_reason"]:
            told["molora"] = self.about()
        return event(told)
