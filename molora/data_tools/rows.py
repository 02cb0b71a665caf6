"""One row of a source, looked at as training or an evaluation will: read, its media decoded, its tokens counted."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.data.messages import Message, check, media_parts, parts
from molora.data.processor import Processor, SampleTooLong
from molora.data.sources import NO_REJECTED, Source
from molora.data_tools.contents import Odd, odd_item, odd_texts, odd_turns, special_tokens_of
from molora.data_tools.faults import KINDS, Fault
from molora.data_tools.opening import Named, asked_by, place_of
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.normalise import normalise
from molora.media.policy import SCHEMES, scheme
from molora.modality import MediaError, Modality, Prepared
from molora.pack import Sample
from molora.routing import RoutingError

_KEY_BYTES = 16
# Faults of turns, which make a template refuse a conversation or leave nothing to learn of it.
_TURN_KINDS = ("roles", "empty answer", "empty prompt")
_MAX_MESSAGE = 500


@dataclass
class Facts:
    """What is known of a row. Keys are hashes of content, None of what could not be read: `turns` of the conversation
    up to each answer (of an evaluation the last one), `media` of each medium as its encoder gets it, `answer` of the
    last answer, `whole` of everything. `tokens` are counted by modality, "text" among them."""

    row: int
    where: str
    faults: list[Fault] = field(default_factory=list)
    id: str | None = None
    turns: tuple[bytes, ...] = ()
    media: tuple[bytes, ...] = ()
    answer: bytes | None = None
    whole: bytes | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    num_targets: int = 0


@dataclass(frozen=True)
class _Seen:
    """A medium that was decoded: the hash of what its encoder gets, and what is odd about it."""

    key: bytes
    odd: tuple[Odd, ...]


class _Watched:
    """A modality, whose items are looked at where they are decoded and prepared."""

    def __init__(self, modality: Modality) -> None:
        self.modality = modality
        self.name, self.part_type = modality.name, modality.part_type
        self.load, self.projector = modality.load, modality.projector
        self.is_sound = getattr(modality, "sampling_rate_hz", None) is not None
        self.seen: dict[int, _Seen] = {}

    def prepare(self, item: Any, generator: torch.Generator | None = None) -> Prepared:
        prepared = self.modality.prepare(item, generator)
        self.seen[id(prepared)] = _Seen(_key_of(prepared), tuple(odd_item(item, self.is_sound)))
        return prepared


class Examiner:
    """Looks at rows of sources. Made in the process that uses it, or before it forks."""

    def __init__(self, processor: Processor) -> None:
        self.watched: dict[str, Any] = {name: _Watched(modality) for name, modality in processor.modalities.items()}
        self.processor = Processor(
            processor.tokenizer,
            self.watched,
            processor.order,
            processor.max_tokens,
            processor.media_policy,
            processor.num_embeddings,
        )
        self.special_tokens: re.Pattern[str] | None = special_tokens_of(processor.tokenizer)

    def examine(self, named: Named, source: Source, rows: Sequence[int]) -> list[Facts]:
        """What is known of some rows. A medium that several of them show is decoded once. Raises ImportError for a
        library that reading them needs."""
        known: dict[Any, Prepared] = {}
        found = [self._row(named, source, row, known) for row in rows]
        for watched in self.watched.values():
            watched.seen.clear()
        return found

    def _row(self, named: Named, source: Source, row: int, known: dict[Any, Prepared]) -> Facts:
        facts = Facts(row, place_of(source, row, named.key))
        try:
            example = source[row]
            facts.id, messages = str(example["id"]), example["messages"]
            check(messages, None, facts.where)
            odd = [*odd_turns(messages), *odd_texts(messages, self.special_tokens), *_odd_choices(example)]
        except ImportError:
            raise
        except Exception as error:  # a plugin's source can fail in any way
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            _add(facts, named, _kind_of(error, "unreadable"), what)
            return facts
        for kind, what in odd:
            _add(facts, named, kind, what)
        is_whole = not any(kind in _TURN_KINDS for kind, _ in odd)
        sample = self._encoded(named, source, messages, facts, known, is_whole)
        if sample is not None:
            self._weigh(named, messages, sample, facts)
            if is_whole and named.stage is not None:
                _check_learned(named, named.stage.tokens_per_pack, sample, facts)
        if named.stage is not None and named.stage.objective == "preferences":
            self._check_rejected(named, named.stage.tokens_per_pack, source, example, facts, known)
        return facts

    def _check_rejected(
        self,
        named: Named,
        tokens_per_pack: int,
        source: Source,
        example: Mapping[str, Any],
        facts: Facts,
        known: dict[Any, Prepared],
    ) -> None:
        """The other answer of a pair."""
        if "rejected" not in example:
            _add(facts, named, "refused", NO_REJECTED)
            return
        sample = self._encoded(named, source, example["rejected"], facts, known, True)
        if sample is not None:
            _check_learned(named, tokens_per_pack, sample, facts)

    def _encoded(
        self,
        named: Named,
        source: Source,
        messages: Sequence[Message],
        facts: Facts,
        known: dict[Any, Prepared],
        is_whole: bool,
    ) -> Sample | None:
        """A row as a sample; None if it cannot be one, and then the fault is among the facts. Of turns that are not
        `is_whole` the fault was told before."""
        refused = next(_refused_parts(messages, self.processor), None)
        if refused:
            _add(facts, named, *refused)
            return None
        try:
            if named.evaluation is None:
                return self.processor.encode(messages, str(facts.id), known=known)
            prompt, expected = asked_by(named.evaluation, source, facts.row)
            sample = self.processor.encode(prompt, str(facts.id), generate=True, known=known)
            self._check_answer(named, named.evaluation, expected, len(sample), facts)
            return sample
        except ValueError as error:
            kind = _kind_of(error, "refused")
            if kind != "refused" or is_whole:
                _add(facts, named, kind, str(error))
            return None

    def _check_answer(
        self, named: Named, evaluation: EvaluationConfig, expected: str, prompt_tokens: int, facts: Facts
    ) -> None:
        """Whether an answer may be as long as the one that is expected, and as long as the evaluation says."""
        most, context = evaluation.max_new_tokens, self.processor.max_tokens
        needed = len(self.processor.tokenizer(expected, add_special_tokens=False, verbose=False)["input_ids"])  # pyright: ignore[reportArgumentType]
        if needed > most:
            _add(facts, named, "long answer", f"{expected!r:.60} has {needed} tokens, max_new_tokens is {most}")
        elif prompt_tokens + most > context:
            what = f"{prompt_tokens} tokens of prompt and {most} of answer, and the context has {context}"
            _add(facts, named, "context", what)

    def _weigh(self, named: Named, messages: Sequence[Message], sample: Sample, facts: Facts) -> None:
        """Counts the tokens of a sample, hashes its content, and says what is odd about both."""
        names = ("text", *self.processor.modalities)
        counts = Counter(sample.modality_ids_T.tolist())
        facts.tokens = {names[index]: count for index, count in sorted(counts.items())}
        facts.num_targets = sample.num_targets
        seen = [self.watched[item.modality].seen[id(item.prepared)] for item in sample.items]
        for place, each in zip(media_parts(messages), seen, strict=False):
            for kind, what in each.odd:
                _add(facts, named, kind, f"{place[0]}{_file_of(place[1])}: {what}")
        facts.media = tuple(each.key for each in seen)
        _hash_content(messages, facts, named.evaluation is not None)


def _check_learned(named: Named, tokens_per_pack: int, sample: Sample, facts: Facts) -> None:
    if len(sample) > tokens_per_pack:
        _add(facts, named, "too long", f"{len(sample)} tokens, a pack of this stage holds {tokens_per_pack}")
    elif not sample.num_targets:
        _add(facts, named, "nothing learned", "no answer of it is learned")


def _add(facts: Facts, named: Named, kind: str, what: str) -> None:
    """Adds a fault; it is no error where the stage leaves such rows out."""
    stage = named.stage
    left_out = stage is not None and (
        (kind == "too long" and stage.too_long == "skip") or (kind in ("media", "url") and stage.unusable == "skip")
    )
    for beginning in (f"{facts.where}: ", f"sample {facts.id}: ", f"{named.key}, row {facts.row + 1}: "):
        what = what.removeprefix(beginning)
    if len(what) > _MAX_MESSAGE:
        what = what[: _MAX_MESSAGE - 1] + "…"
    facts.faults.append(
        Fault(
            kind=kind,
            source=named.key,
            where=facts.where,
            what=what,
            row=facts.row + 1,
            id=facts.id,
            is_error=KINDS[kind].is_error and not left_out,
        )
    )


def _kind_of(error: Exception, otherwise: str) -> str:
    kinds = {RoutingError: "rule", MediaError: "media", SampleTooLong: "too long"}
    return next((kind for each, kind in kinds.items() if isinstance(error, each)), otherwise)


def _refused_parts(messages: Sequence[Message], processor: Processor) -> Iterator[Odd]:
    """Parts that no modality answers to, and URLs where none are fetched."""
    for place, part in media_parts(messages):
        if part["type"] not in processor.part_types:
            there = ", ".join(("text", *processor.part_types))
            yield "part", f"{place}: there are only {there}"
        given = part.get("url")
        if isinstance(given, str) and scheme(given) in SCHEMES and not processor.media_policy.allow_urls:
            yield "url", f"{place}: {given:.200}"


def _odd_choices(example: Mapping[str, Any]) -> Iterator[Odd]:
    """A right choice that is none of the choices, or answers without the one that the row expects."""
    choices, choice, answers = (example.get(key) for key in ("choices", "choice", "answers"))
    if choices and not (isinstance(choice, int) and 0 <= choice < len(choices)):
        yield "choices", f"choice is {choice!r}, and there are {len(choices)} choices, counted from 0"
    last = example["messages"][-1]
    expected = "".join(part["text"] for part in parts(last) if part["type"] == "text")
    if answers and last["role"] == "assistant" and expected not in answers:
        yield "choices", f"expects {expected!r:.60}, which is none of its answers"


def _file_of(part: Mapping[str, Any]) -> str:
    path = part.get("path")
    return f", {path!s:.200}" if isinstance(path, str) else ""


def _key_of(prepared: Prepared) -> bytes:
    """A hash of what an encoder gets of an item."""
    found = hashlib.blake2b(digest_size=_KEY_BYTES)
    for name, tensor in sorted(prepared.tensors.items()):
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()


def _hash_content(messages: Sequence[Message], facts: Facts, is_asked: bool) -> None:
    """Hashes of a conversation up to each answer, of the last answer and of it all. System messages do not count, nor
    does what `normalise` takes away: a question is the same under another system message."""
    media = iter(facts.media)
    running = hashlib.blake2b(digest_size=_KEY_BYTES)
    turns: list[bytes] = []
    for message in messages:
        if message["role"] == "system":
            continue
        texts = [part["text"] for part in parts(message) if part["type"] == "text"]
        if message["role"] == "assistant":
            turns.append(running.digest())
            facts.answer = hashlib.blake2b(normalise("".join(texts)).encode(), digest_size=_KEY_BYTES).digest()
        running.update(f"\0{message['role']}\0{normalise(' '.join(texts))}".encode())
        for part in parts(message):
            if part["type"] != "text":
                running.update(next(media, b"without"))
    facts.whole = running.digest()
    facts.turns = tuple(turns[-1:] if is_asked else turns)
