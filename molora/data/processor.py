"""The processor: messages to samples, samples to packs. Weightless and picklable, so that data workers can hold one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from molora.data.messages import Message, Part, check, media_parts, parts
from molora.data.prompt import ChatTemplate, Tools
from molora.data.tools import as_json
from molora.media import MediaPolicy
from molora.modality import MediaError, Modality, Prepared
from molora.pack import Item, Pack, Sample, collate
from molora.routing import RoutingError

# What a part of a medium in a file holds; objects such as arrays may be changed between two samples.
_PLAIN = (str, bytes, int, float, NoneType)


class SampleTooLong(ValueError):
    """A sample with more tokens than fit; a media span is never cut, and neither is text."""


class Processor:
    """Turns conversations into samples and packs for a tokenizer, modalities in their order, and a router's `order`.

    `max_tokens` is the longest sample that the backbone can take. `media_policy` is the caller's word on where media
    may come from, and holds for every plugin. `num_embeddings`: token ids from there on have no embedding.
    Raises: ValueError if two modalities answer to one part type, or one stands under another's name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        modalities: Mapping[str, Modality],
        order: Callable[[frozenset[str]], Any],
        max_tokens: int,
        media_policy: MediaPolicy | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        self.part_types: dict[str, str] = {}
        for name, modality in modalities.items():
            if modality.name != name:
                raise ValueError(f"modality {modality.name!r} is given under the name {name!r}; use its own")
            if modality.part_type in ("text", *self.part_types):
                owner = self.part_types.get(modality.part_type, "the tokenizer")
                raise ValueError(f"both {owner} and {name} answer to parts of type {modality.part_type!r}; keep one")
            self.part_types[modality.part_type] = name
        self.tokenizer = tokenizer
        self.modalities = dict(modalities)
        self.order = order
        self.max_tokens = max_tokens
        self.num_embeddings = num_embeddings
        self.media_policy = media_policy or MediaPolicy()
        self.template = ChatTemplate(tokenizer)
        self._ids = {name: 1 + index for index, name in enumerate(self.modalities)}

    def encode(
        self,
        messages: Sequence[Message],
        id: str,
        *,
        generate: bool = False,
        seed: int | None = None,
        known: dict[Any, Prepared] | None = None,
        tools: Tools = (),
    ) -> Sample:
        """Turns one conversation into a sample; `seed` drives augmentation, None means none.

        With `generate` the sample ends with the generation prompt and has no targets; then the model may be told of
        `tools` that it may call, as transformers' chat templates take them. `known` holds what was prepared
        of a step's other samples, and this one's media are added: a file that is there again is not read again, unless
        its preparation draws from the sample's own randomness.

        Raises: ValueError for messages that are malformed or that the chat template refuses, RoutingError for a set of
        modalities without a rule, MediaError for media that cannot be used, SampleTooLong.
        """
        where = f"sample {id}"
        self._check_counts(messages, where)
        check(messages, self.part_types, where)
        if (token_ids := messages[-1].get("token_ids")) is not None:
            prompt = self.encode(messages[:-1], id, generate=True, seed=seed, known=known)
            return self._continued(prompt, messages[-1], token_ids, where)
        texts = [part["text"] for message in messages for part in parts(message) if part["type"] == "text"]
        told = [tools, *(message.get("tool_calls") for message in messages)]
        self._check_texts([*texts, *(as_json(each, f"{where}: tools") for each in told if each)], where)
        media = [(place, self.part_types[part["type"]], part) for place, part in media_parts(messages)]
        modalities = frozenset(modality for _, modality, _ in media)
        try:
            self.order(modalities)
        except RoutingError as error:
            raise RoutingError(f"{where}: {error}") from error
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        known = {} if known is None else known
        items: list[Item] = []
        num_tokens = 0
        for place, name, part in media:
            item = self._prepare(self.modalities[name], part, modalities, generator, known, f"{where}: {place}")
            num_tokens += item.prepared.num_tokens
            if num_tokens > self.max_tokens:  # before more is decoded, and before positions are laid out
                raise SampleTooLong(
                    f"{where}: has {num_tokens} tokens ({num_tokens} of media), but at most {self.max_tokens} fit; that"
                    f" is up to {place}, the rest was not read; shorten it or skip it"
                )
            items.append(item)
        lengths = [item.prepared.num_tokens for item in items]
        prompt = self.template.encode(messages, lengths, generate=generate, tools=tools, where=where)
        if len(prompt.token_ids) > self.max_tokens:
            raise SampleTooLong(
                f"{where}: has {len(prompt.token_ids)} tokens ({sum(lengths)} of media), but at most {self.max_tokens}"
                " fit; shorten it or skip it"
            )
        if self.num_embeddings is not None and (highest := max(prompt.token_ids)) >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ValueError(
                f"{where}: holds the token {token!r}, number {highest}, and the backbone has {self.num_embeddings} "
                "embeddings; save the backbone again after resize_token_embeddings, or with the tokenizer it came with"
            )
        # A template may move a message, and media are read in the order in which the tokens stand.
        placed = sorted(zip(prompt.media, items, strict=True), key=lambda pair: pair[0])
        modality_ids_T = torch.zeros(len(prompt.token_ids), dtype=torch.long)
        for (start, stop), item in placed:
            modality_ids_T[start:stop] = self._ids[item.modality]
        return Sample(
            id=id,
            token_ids_T=torch.tensor(prompt.token_ids, dtype=torch.long),
            modality_ids_T=modality_ids_T,
            targets_T=torch.tensor(prompt.targets, dtype=torch.bool),
            items=tuple(item for _, item in placed),
        )

    def _continued(self, prompt: Sample, message: Message, token_ids: Mapping[str, list[int]], where: str) -> Sample:
        """A prompt with an answer that is given by its tokens, of which those of its `answer` are targets; nothing ends
        it, as it may be a part of one."""
        before, answer = token_ids["before"], token_ids["answer"]
        highest = max([*before, *answer])
        if highest >= len(self.tokenizer) or self.decode([*before, *answer]) != message["content"]:
            raise ValueError(
                f"{where}: token_ids: do not read {message['content']!r:.80}, the content; another tokenizer made them"
            )
        sample = prompt.followed_by([*before, *answer])
        if len(sample) > self.max_tokens:
            raise SampleTooLong(f"{where}: has {len(sample)} tokens, but at most {self.max_tokens} fit; shorten it")
        learned = message.get("train") is not False
        sample.targets_T[len(sample) - len(answer) :] = learned
        return sample

    def text_ids(self, text: str, where: str) -> list[int]:
        """The tokens of a text without a template, with those that the tokenizer adds to a text. `where` starts every
        error message. Raises SampleTooLong for a text that is far too long, ValueError for halves of characters."""
        self._check_texts([text], where)
        return self.tokenizer.encode(text)

    def collate(self, samples: Sequence[Sample]) -> Pack:
        """Joins samples into one pack, in the router's order."""
        return collate(samples, self.modalities, self.order)

    def packs(
        self, samples: Iterable[Sample], max_tokens_per_pack: int, shared: Mapping[str, int] | None = None
    ) -> list[Pack]:
        """Joins samples into packs of at most `max_tokens_per_pack`, filled in the router's order. `shared` are tokens
        that a sample, by its id, begins with as the one before it does, which run once for both in a pack. Raises
        SampleTooLong for a sample that is longer than a pack may be."""
        shared = shared or {}
        packs: list[list[Sample]] = []
        num_tokens = 0
        for sample in sorted(samples, key=lambda sample: self.order(sample.modalities)):
            if len(sample) > max_tokens_per_pack:
                raise SampleTooLong(
                    f"sample {sample.id}: has {len(sample)} tokens, but a pack holds at most {max_tokens_per_pack};"
                    " allow larger packs or skip it"
                )
            own = len(sample) - shared.get(sample.id, 0)
            if not packs or num_tokens + own > max_tokens_per_pack:
                packs.append([])
                num_tokens, own = 0, len(sample)
            packs[-1].append(sample)
            num_tokens += own
        return [self.collate(members) for members in packs]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)  # pyright: ignore[reportReturnType]

    def _check_counts(self, messages: Any, where: str) -> None:
        """Refuses what cannot fit, each message and part being a token or more, before it is looked at one by one."""
        messages = messages if isinstance(messages, (list, tuple)) else ()
        contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
        num_parts = sum(len(content) for content in contents if isinstance(content, (list, tuple)))
        for count, what in ((len(messages), "messages"), (num_parts, "parts")):
            if count > self.max_tokens:
                raise SampleTooLong(
                    f"{where}: has {count:,} {what}, but at most {self.max_tokens:,} tokens fit; shorten it or skip it"
                )

    def _check_texts(self, texts: Sequence[str], where: str) -> None:
        """Refuses what cannot fit before it is read by a template or a tokenizer, which would take long."""
        characters = sum(map(len, texts))
        if characters > self.max_tokens * self._longest_token:
            raise SampleTooLong(
                f"{where}: has {characters:,} characters of text, but at most {self.max_tokens:,} tokens fit, and the "
                f"longest token has {self._longest_token} characters; shorten it or skip it"
            )

        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{where}: character {error.start + 1} of a text is {text[error.start]!r}, half of one; read "
                    "or cut the text again, by whole characters"
                ) from error

    @cached_property
    def _longest_token(self) -> int:
        return max(map(len, self.tokenizer.get_vocab()))

    def _prepare(
        self,
        modality: Modality,
        part: Part,
        modalities: frozenset[str],
        generator: torch.Generator | None,
        known: dict[Any, Prepared],
        where: str,
    ) -> Item:
        """Whatever a plugin raises is this part's fault, and so this sample's."""
        try:
            self.media_policy.check(part)
            prepared = self._prepare_once(modality, part, generator, known)
            projector = modality.projector(modalities)
        except MediaError as error:
            raise MediaError(f"{where}: {error}") from error
        except ImportError:  # what is not installed here is no fault of the part
            raise
        except Exception as error:
            raise MediaError(
                f"{where}: modality {modality.name} fails on it: {type(error).__name__}: {error}; --debug shows where"
            ) from error
        if not isinstance(prepared, Prepared) or type(prepared.num_tokens) is not int:
            raise MediaError(f"{where}: modality {modality.name} makes {prepared!r:.80} of it, needs a Prepared")
        if prepared.num_tokens < 1:
            raise MediaError(
                f"{where}: modality {modality.name} makes {prepared.num_tokens} tokens of it, needs 1 or more"
            )
        return Item(modality.name, projector, prepared)

    def _prepare_once(
        self, modality: Modality, part: Part, generator: torch.Generator | None, known: dict[Any, Prepared]
    ) -> Prepared:
        """What is known of a part, or else its preparation, which is known from then on if no randomness is in it."""
        key = None
        if all(isinstance(value, _PLAIN) for value in part.values()):
            key = (modality.name, *sorted((name, type(value).__name__, value) for name, value in part.items()))
            if key in known:
                return known[key]
        fresh = None if generator is None else generator.get_state()
        with self.media_policy.in_force():
            prepared = modality.prepare(modality.load(part), generator)
        drew = generator is not None and fresh is not None and not torch.equal(generator.get_state(), fresh)
        if key is not None and not drew:
            known[key] = prepared
        return prepared
