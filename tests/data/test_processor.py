"""The processor: conversations to samples and packs, every refusal before any weight."""

from __future__ import annotations

import functools
import pickle
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molora.data.processor import Processor, SampleTooLong
from molora.modality import MediaError, Modality, Prepared
from molora.routing import RoutingError


@dataclass
class CounterConfig:
    pass


class Fingers:
    """A part {"type": "count", "n": 3} becomes three tokens, whose value gets noise where augmentation is asked for."""

    config_type: ClassVar[type] = CounterConfig
    part_type: ClassVar[str] = "count"

    def __init__(self, name: str) -> None:
        self.name, self.config = name, CounterConfig()

    def load(self, part: Mapping[str, Any]) -> int:
        if "n" not in part:
            raise MediaError("no 'n' in the part; give the number")
        return part["n"]

    def prepare(self, item: int, generator: torch.Generator | None = None) -> Prepared:
        noise = torch.zeros(1) if generator is None else torch.rand(1, generator=generator)
        return Prepared({"values": item + noise}, item)

    def collate(self, prepared: Sequence[Prepared]) -> dict[str, Tensor]:
        return {"values": torch.cat([one.tensors["values"] for one in prepared])}

    def build_encoder(self) -> Any:
        raise AssertionError("the processor builds no encoder")

    def projector(self, company: frozenset[str]) -> str:
        return "accompanied" if len(company) > 1 else "alone"

    def projectors(self) -> tuple[str, ...]:
        return ("alone", "accompanied")

    def examples(self) -> list[dict[str, Any]]:
        return [{"type": self.part_type, "n": n} for n in (1, 3)]


class Sheep(Fingers):
    part_type: ClassVar[str] = "herd"


class Stars(Fingers):
    part_type: ClassVar[str] = "sky"


class Words(Fingers):
    part_type: ClassVar[str] = "text"


def order(modalities: frozenset[str]) -> str:
    """A router's order in which the set {sheep} has no rule."""
    if modalities == {"sheep"}:
        raise RoutingError("no rule for {sheep}")
    return "+".join(sorted(modalities))


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: id for id, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    )
    return fast


def modalities() -> dict[str, Modality]:
    return {"fingers": Fingers("fingers"), "sheep": Sheep("sheep"), "stars": Stars("stars")}


def processor(max_tokens: int = 200) -> Processor:
    return Processor(tokenizer(), modalities(), order, max_tokens)


def ask(*content: str | tuple[str, int], answer: str = "ok") -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": piece} if isinstance(piece, str) else {"type": piece[0], "n": piece[1]}
        for piece in content
    ]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]


def test_media_positions_items_and_targets_of_a_sample() -> None:
    sample = processor().encode(ask("hi", ("sky", 3), ("herd", 2), "?"), "a")
    assert sample.modality_ids_T.tolist() == [0] * 3 + [3] * 3 + [2] * 2 + [0] * 7
    assert sample.targets_T.tolist() == [False] * 11 + [True] * 4
    assert [(item.modality, item.projector, item.prepared.num_tokens) for item in sample.items] == [
        ("stars", "accompanied", 3),
        ("sheep", "accompanied", 2),
    ]
    assert sample.id == "a" and sample.modalities == {"stars", "sheep"} and sample.num_targets == 4
    assert processor().encode(ask(("count", 1)), "b").items[0].projector == "alone"


def test_reserved_positions_are_the_tokens_of_the_items_and_text_is_untouched() -> None:
    proc = processor()
    sample = proc.encode(ask("hi", ("sky", 3), "?", answer="so"), "a")
    text = proc.encode(ask("hi?", answer="so"), "a")
    assert sample.token_ids_T[sample.modality_ids_T == 0].tolist() == text.token_ids_T.tolist()
    assert proc.decode(sample.token_ids_T[sample.targets_T].tolist()) == "so"
    assert int(sample.token_ids_T.max()) < len(tokenizer())


def test_generation_is_the_prompt_of_training_without_targets() -> None:
    messages = ask("hi", ("sky", 3), answer="so")
    trained, asked = processor().encode(messages, "a"), processor().encode(messages[:1], "a", generate=True)
    assert not asked.targets_T.any()
    assert trained.token_ids_T[: len(asked)].tolist() == asked.token_ids_T.tolist()
    assert trained.modality_ids_T[: len(asked)].tolist() == asked.modality_ids_T.tolist()
    assert int(trained.targets_T.nonzero()[0]) == len(asked)


def test_a_seed_decides_augmentation_and_none_means_none() -> None:
    proc, messages = processor(), ask(("sky", 2), ("sky", 2))

    def values(seed: int | None) -> list[float]:
        return [float(item.prepared.tensors["values"]) for item in proc.encode(messages, "a", seed=seed).items]

    assert values(None) == [2.0, 2.0]
    assert values(7) == values(7) != values(8)
    assert values(7)[0] != values(7)[1]


def test_a_set_of_modalities_without_a_rule_is_refused_before_any_media_is_read() -> None:
    with pytest.raises(RoutingError, match="sample a: no rule for {sheep}"):
        processor().encode([{"role": "user", "content": [{"type": "herd"}]}], "a", generate=True)


@pytest.mark.parametrize(
    "content, error, says",
    [
        ([{"type": "depth"}], ValueError, r"sample a: message 0, part 0: .*'depth'; there are text, count \(fingers\)"),
        ([{"type": "sky"}], MediaError, r"sample a: message 0, part 0 \(sky\): no 'n' in the part"),
        ([{"type": "sky", "n": 0}], MediaError, r"message 0, part 0 \(sky\): modality stars makes 0 tokens of it"),
        (
            [{"type": "text", "text": "x"}, {"type": "sky", "n": 300}],
            SampleTooLong,
            r"has 300 tokens \(300 of media\), but at most 200 fit; that is up to message 0, part 1 \(sky\)",
        ),
        ("x" * 300, SampleTooLong, r"sample a: has 303 tokens \(0 of media\), but at most 200 fit"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_place(content: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        processor().encode([{"role": "user", "content": content}], "a", generate=True)


def test_a_sample_of_exactly_the_most_tokens_fits() -> None:
    messages = ask(("sky", 9))
    length = len(processor().encode(messages, "a"))
    assert len(processor(length).encode(messages, "a")) == length
    with pytest.raises(SampleTooLong):
        processor(length - 1).encode(messages, "a")


def test_modalities_that_claim_one_name_or_one_part_type_are_refused() -> None:
    with pytest.raises(ValueError, match="both one and two answer to parts of type 'count'"):
        Processor(tokenizer(), {"one": Fingers("one"), "two": Fingers("two")}, order, 10)
    with pytest.raises(ValueError, match="modality 'one' is given under the name 'uno'"):
        Processor(tokenizer(), {"uno": Fingers("one")}, order, 10)
    with pytest.raises(ValueError, match="both the tokenizer and one answer to parts of type 'text'"):
        Processor(tokenizer(), {"one": Words("one")}, order, 10)


def some_samples(proc: Processor) -> list[Any]:
    kinds: list[list[str | tuple[str, int]]] = [
        ["hello"],
        [("sky", 4)],
        ["a", ("count", 2)],
        [("sky", 1), ("count", 3)],
        ["x" * 20],
        [("count", 9)],
        ["b", ("sky", 2), ("sky", 5)],
    ]
    return [proc.encode(ask(*kind), str(index)) for index, kind in enumerate(kinds)]


def test_collate_puts_samples_in_the_routers_order_and_media_in_reading_order() -> None:
    proc = processor()
    pack = proc.collate(some_samples(proc))
    assert pack.ids == ("0", "4", "2", "5", "3", "1", "6")
    assert pack.media["stars"].num_tokens == (1, 4, 2, 5)
    assert pack.media["stars"].tensors["values"].tolist() == [1.0, 4.0, 2.0, 5.0]
    assert pack.media["fingers"].num_tokens == (2, 9, 3)
    assert "sheep" not in pack.media
    for index, name in enumerate(proc.modalities):
        tokens = sum(pack.media[name].num_tokens) if name in pack.media else 0
        assert int((pack.modality_ids_T == 1 + index).sum()) == tokens


def test_packs_hold_every_sample_once_in_order_and_no_more_than_allowed() -> None:
    proc = processor()
    samples = some_samples(proc)
    longest = max(map(len, samples))
    for limit in (longest, longest + 1, 50, 1000):
        packs = proc.packs(samples, limit)
        assert sum((pack.ids for pack in packs), ()) == proc.collate(samples).ids
        assert all(sum(pack.lengths) <= limit for pack in packs)
        assert all(sum(a.lengths) + b.lengths[0] > limit for a, b in pairwise(packs))
    assert len(proc.packs(samples, 1000)) == len(proc.packs(samples, sum(map(len, samples)))) == 1
    assert proc.packs([], 10) == []
    with pytest.raises(
        SampleTooLong, match=rf"sample 4: has {longest} tokens, but a pack holds at most {longest - 1};"
    ):
        proc.packs(samples, longest - 1)


def test_a_processor_pickles() -> None:
    proc = processor()
    messages = ask("hi", ("sky", 3), "<|end|>")
    sample, again = proc.encode(messages, "a"), pickle.loads(pickle.dumps(proc)).encode(messages, "a")
    assert sample.token_ids_T.tolist() == again.token_ids_T.tolist()
    assert sample.modality_ids_T.tolist() == again.modality_ids_T.tolist()


def test_decode_leaves_special_tokens_out_but_not_the_text_that_spells_them() -> None:
    proc = processor()
    sample = proc.encode(ask("hi", answer="use <|end|>, yes"), "a")
    assert proc.decode(sample.token_ids_T[sample.targets_T].tolist()) == "use <|end|>, yes"


def test_any_conversation_keeps_its_invariants() -> None:
    draw = random.Random(1)
    proc = processor(max_tokens=10_000)
    kinds = {modality.part_type: 1 + index for index, modality in enumerate(modalities().values())}
    for round in range(100):
        messages: list[dict[str, Any]] = []
        spans: list[tuple[int, int]] = []
        for _ in range(draw.randrange(1, 4)):
            content = []
            for _ in range(draw.randrange(4)):
                if draw.random() < 0.5:
                    content.append({"type": "text", "text": draw.choice(["x", "", "<|end|>", "\U00100000 ü", "🙂"])})
                else:
                    kind, num_tokens = draw.choice(["count", "sky"]), draw.randrange(1, 5)
                    content.append({"type": kind, "n": num_tokens})
                    spans.append((kinds[kind], num_tokens))
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": draw.choice(["", "yes", "<|user|>"])})
        sample = proc.encode(messages, str(round), seed=round)
        assert len(sample.token_ids_T) == len(sample.modality_ids_T) == len(sample.targets_T) == len(sample)
        assert [(proc._ids[item.modality], item.prepared.num_tokens) for item in sample.items] == spans
        # Contiguous and in order: read as one sequence, media positions are the spans one after the other.
        positions = [m for m in sample.modality_ids_T.tolist() if m]
        assert positions == [kind for kind, num_tokens in spans for _ in range(num_tokens)]
        runs = sum(a != b and b != 0 for a, b in pairwise([0, *sample.modality_ids_T.tolist()]))
        assert runs <= len(spans)
        assert not (sample.targets_T & (sample.modality_ids_T > 0)).any()
        assert sample.num_targets > 0


def test_a_medium_is_prepared_again_only_if_its_preparation_is_random() -> None:
    proc, known = processor(), {}
    first = proc.encode(ask(("count", 3), ("sky", 3)), "a", known=known)
    again = proc.encode(ask(("sky", 3), ("count", 2), ("count", 3)), "b", known=known)
    assert again.items[2].prepared is first.items[0].prepared and again.items[0].prepared is first.items[1].prepared
    assert again.items[1].prepared is not first.items[0].prepared
    drawn = [proc.encode(ask(("count", 1), ("count", 1)), "c", seed=7, known=known) for known in ({}, {}, None)]
    values = [torch.cat([item.prepared.tensors["values"] for item in sample.items]) for sample in drawn]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert values[0][0] != values[0][1]
