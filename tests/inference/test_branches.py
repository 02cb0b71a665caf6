"""Answers to one prompt branch off where it was read once, and are what each is alone, whatever else comes or goes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from molora.inference.frames import FrameMemory
from molora.inference.generate import Batch, GenerationConfig, Step, generate
from molora.inference.grammar import Grammars
from molora.inference.sampling import Decoding
from molora.model import pages
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.testing import VOCAB_SIZE, assert_close, byte_tokenizer
from tests.inference.test_admission import answers, ask, gib, logits_of, make_model, make_samples

# Around pages of 64 tokens, windows of 16 and a rotary switch at 24.
LENGTHS = (22, 70, 33, 5, 130, 64)


def several(samples: Sequence[Sample], number: int) -> list[Sample]:
    """Every sample so many times, as those have it who ask for several answers."""
    return [replace(sample, id=f"{sample.id}#{n}") for sample in samples for n in range(number)]


def apart(samples: Sequence[Sample]) -> list[Sample]:
    """The same samples, of which the batch does not know that they are."""
    return [replace(sample, token_ids_T=sample.token_ids_T.clone()) for sample in samples]


def tokens_run(model: MoLoRA, patch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every forward from now on."""
    counted: list[int] = []
    forward = model.backbone.forward
    model.backbone.kept_layers()
    patch.setattr(
        model.backbone, "forward", lambda embeds_TD, *more: counted.append(len(embeds_TD)) or forward(embeds_TD, *more)
    )
    return counted


def finish(batch: Batch) -> list[Step]:
    found: list[Step] = []
    while batch.num_waiting or batch.num_running:
        found += batch.step()
    return found


def is_empty(batch: Batch) -> bool:
    pool = batch.pool
    full = {window: pool.kept.pages_of_window(window, pool.num_pages, 64) for window in pool.kept.windows}
    zeros = not any(tensor.any() for tensor in (*pool.keys.values(), *pool.values.values()))
    return zeros and pool.num_free == full


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "phi3", "phi4-mini", "llama-dynamic", "phimoe", "gpt-oss", "learned"]
)
def test_answers_that_branch_off_are_those_of_each_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy ones by their logits, and drawn ones. Every modality, rings, rotary regimes crossed; with room for all,
    for few, and in chunks of prompts."""
    learned = family == "learned"
    model = make_model("phi4-mini" if learned else family, learned)
    samples = several(make_samples(model, (22, 30, 33, 5) if family == "llama-dynamic" else LENGTHS), 3)
    greedy, drawn = GenerationConfig(max_new_tokens=5), GenerationConfig(max_new_tokens=5, temperature=1.5)
    alone = logits_of(model, [[sample] for sample in samples], greedy, monkeypatch)
    expected = answers(step for sample in samples for step in generate(model, [sample], drawn))
    sizes: list[dict[str, Any]] = [
        {"kv_cache_gib": gib(model, 64, 64)},
        {"kv_cache_gib": gib(model, 4, 5), "max_running_samples": 5, "prefill_tokens": 50, "chunk_tokens": 20},
        {"kv_cache_gib": gib(model, 3, 64), "prefill_tokens": 7},
    ]
    for size in sizes:
        together = logits_of(model, [samples], replace(greedy, **size), monkeypatch)
        assert together.keys() == alone.keys()
        for id, logits in together.items():
            assert_close(logits, alone[id], 1e-5, what=f"{family} {id}, {size}")
        assert answers(generate(model, samples, replace(drawn, **size))) == expected, f"{family}, {size}"


@pytest.mark.parametrize("max_new_tokens", [1, 6])
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "phi4-mini"])
def test_a_prompt_is_embedded_and_read_once(family: str, max_new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every answer ends at once, and where some crosses a rotary switch, which runs for itself."""
    model = make_model(family)
    prompts = make_samples(model, (70, 100, 33, 130))
    embedded: list[int] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda pack: embedded.append(len(pack)) or embed(pack))
    counted = tokens_run(model, monkeypatch)
    list(generate(model, several(prompts, 5), GenerationConfig(max_new_tokens=max_new_tokens)))
    assert sum(embedded) == 4
    assert sum(counted) == 70 + 100 + 33 + 130 + 20 * (max_new_tokens - 1)


def test_later_answers_branch_off_those_that_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a roll-out, where an answer begins when another ends."""
    model = make_model("llama")
    (prompt,) = make_samples(model, (100,))
    counted = tokens_run(model, monkeypatch)
    # Every answer ends at its own length, so that one place at a time is free.
    samples = [replace(prompt, id=f"{number}") for number in range(9)]
    batch = Batch(model, GenerationConfig(max_running_samples=3, kv_cache_gib=gib(model, 64, 3)))
    how = Decoding(max_new_tokens=40)
    lengths = [7, 4, 11, 9, 3, 8, 5, 12, 6]
    for sample, length in zip(samples, lengths, strict=True):
        batch.add(replace(ask(sample, how), is_over=lambda tokens, most=length: len(tokens) >= most))
    found = answers(iter(finish(batch)))
    assert [len(found[sample.id]) for sample in samples] == lengths
    assert sum(counted) == 100 + sum(length - 1 for length in lengths)
    assert is_empty(batch)


def test_a_prompt_is_read_again_when_no_answer_has_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that came round, or the end of all other answers."""
    for family, times in (("gemma3", 3), ("llama", 1)):
        model = make_model(family)
        samples = several(make_samples(model, (40,)), 3)
        how = Decoding(max_new_tokens=9)
        expected = answers(
            step for sample in samples for step in generate(model, [sample], GenerationConfig(**vars(how)))
        )
        batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 64, 64)))
        counted = tokens_run(model, monkeypatch)
        found: list[Step] = []
        for sample in samples:
            batch.add(ask(sample, how))
            found += [*batch.step(), *batch.step(), *batch.step()]
        found += finish(batch)
        assert answers(iter(found)) == expected
        assert sum(counted) == 40 * times + 3 * 8
        batch.add(ask(replace(samples[0], id="later"), how))
        assert answers(iter(finish(batch)))["later"] == expected["s0#0"]
        assert sum(counted) == 40 * (times + 1) + 4 * 8 and is_empty(batch)


def test_answers_to_one_prompt_fit_where_as_many_prompts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two full pages and one of its own each, so six answers take eight pages, where six prompts take eighteen."""
    model = make_model("llama")
    samples = several(make_samples(model, (130,)), 6)
    how = Decoding(max_new_tokens=9)
    for asked, running in ((samples, 6), (apart(samples), 2)):
        batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 8, 64)))
        for sample in asked:
            batch.add(ask(sample, how))
        batch.step()
        assert batch.num_running == running and batch.num_waiting == 6 - running
        finish(batch)
        assert is_empty(batch)


@pytest.mark.parametrize("size", [{}, {"prefill_tokens": 64, "chunk_tokens": 30}])
def test_bits_are_those_of_each_alone(size: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "gemma3", "phi4-mini"):
        model = make_model(family)
        model.deterministic_batch = True
        samples = several(make_samples(model, (22, 70, 33, 130)), 3)
        config = GenerationConfig(max_new_tokens=5, temperature=1.5, **size)
        alone = logits_of(model, [[sample] for sample in samples], config, monkeypatch)
        for num_pages in (4, 64):
            config = replace(config, kv_cache_gib=gib(model, num_pages, 64))
            together = logits_of(model, [samples], config, monkeypatch)
            for id, logits in together.items():
                assert torch.equal(logits, alone[id]), f"{family} {id}"


@pytest.mark.parametrize("family", ["phi4-mini", "llama-dynamic"])
def test_an_answer_that_crosses_a_rotary_switch_rewrites_no_page_of_another(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While those that began later, and share its prompt, have not crossed it yet."""
    monkeypatch.setattr(pages, "page_tokens", lambda device_type: 8)
    model = make_model(family)
    prompts = make_samples(model, (17, 18, 19, 20, 21))
    how = Decoding(max_new_tokens=16, temperature=1.5, ignore_stop_tokens=True)
    samples = [replace(prompt, id=f"{prompt.id}#{n}") for n in range(4) for prompt in prompts]
    expected = answers(step for sample in samples for step in generate(model, [sample], GenerationConfig(**vars(how))))
    batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 100, 64)))
    counted = tokens_run(model, monkeypatch)
    found: list[Step] = []
    for begun in range(0, 20, 5):
        for sample in samples[begun : begun + 5]:
            batch.add(ask(sample, how))
        found += batch.step()
    if family == "llama-dynamic":  # of which none has crossed yet
        assert sum(counted) == sum(map(len, prompts)) + 5 * (1 + 2 + 3), "a prompt is read once"
    found += finish(batch)
    assert answers(iter(found)) == expected and is_empty(batch)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi4-mini"])
def test_answers_that_are_taken_out_leave_no_trace(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first or any other, before, while and after the prompt is read; in any order, in a narrow pool and a wide."""
    monkeypatch.setattr(pages, "page_tokens", lambda device_type: 16)
    model = make_model(family)
    samples = several(make_samples(model, (22, 100, 70)), 4)
    how = GenerationConfig(max_new_tokens=6, temperature=1.5)
    expected = answers(step for sample in samples for step in generate(model, [sample], how))
    drawn = random.Random(0)
    for turn in range(12):
        size = gib(model, drawn.choice([7, 12, 99]), 64)
        batch = Batch(model, replace(how, prefill_tokens=drawn.choice([30, 2048]), kv_cache_gib=size))
        for sample in samples:
            batch.add(ask(sample, how))
        leaving = ["s1#0", *drawn.sample([sample.id for sample in samples], 4)]
        found: list[Step] = []
        gone: set[str] = set()
        while batch.num_waiting or batch.num_running:
            if leaving and drawn.random() < 0.6:
                batch.remove(leaving[0])
                gone.add(leaving.pop(0))
            found += batch.step()
        told = answers(iter(found))
        for id, tokens in expected.items():
            if id in gone:
                assert told.get(id, []) == tokens[: len(told.get(id, []))], f"turn {turn}: {id}"
            else:
                assert told[id] == tokens, f"turn {turn}: {id}"
        assert is_empty(batch)


def test_likelihoods_and_grammars_are_those_of_each_alone() -> None:
    """Of prompts too; and samples that are decoded in another way do not branch off."""
    model = make_model("llama")
    (prompt,) = make_samples(model, (90,))
    stop_ids = model.backbone.stop_ids
    grammar = Grammars(byte_tokenizer(), stop_ids or frozenset({256}), VOCAB_SIZE).of_regex("[a-f]{4}(yes|no)")
    told = Decoding(max_new_tokens=6, temperature=1.5, num_likeliest=2, score_prompt=True)
    ways = [told, told, replace(told, num_likeliest=4), Decoding(max_new_tokens=6), Decoding(max_new_tokens=6)]
    asked = [
        replace(ask(replace(prompt, id=f"{n}"), how), grammar=grammar.again() if n in (1, 4) else None)
        for n, how in enumerate(ways)
    ]
    batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 64, 64), prefill_tokens=40))
    for each in asked:
        batch.add(each)
    together = finish(batch)
    for each in asked:
        held = each.grammar and grammar.again()
        config = GenerationConfig(**vars(each.decoding))
        alone = list(generate(model, [each.sample], config, grammar=held))
        mine = [step for step in together if step.id == each.sample.id]
        assert [step.token_id for step in mine] == [step.token_id for step in alone]
        for one, other in zip(mine, alone, strict=True):
            assert len(one.prompt) == len(other.prompt)
            for first, second in zip((*one.prompt, one.likelihood), (*other.prompt, other.likelihood), strict=True):
                if first is None or second is None:
                    assert first is second
                    continue
                assert first.token_id == second.token_id
                assert math.isclose(first.log_probability, second.log_probability, abs_tol=1e-4)
                assert [id for id, _ in first.likeliest] == [id for id, _ in second.likeliest]


def test_each_answer_to_a_prompt_that_fails_has_its_error() -> None:
    """A medium that cannot be encoded, or whose frames are no numbers; and media that are remembered."""
    model = make_model("llama")
    samples = make_samples(model, (9, 20, 30, 70, 75, 14))
    prepared = replace(samples[1].items[0].prepared, tensors={"values": torch.full((3,), torch.nan)})
    samples[1] = replace(samples[1], items=(replace(samples[1].items[0], prepared=prepared),))
    broken = replace(samples[4].items[0].prepared, num_tokens=2)
    samples[4] = replace(samples[4], items=(replace(samples[4].items[0], prepared=broken),))
    asked = several(samples, 3)
    how = Decoding(max_new_tokens=5)
    for frames in (None, FrameMemory(model, 10**6)):
        batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 8, 64)), frames)
        for sample in asked:
            batch.add(ask(sample, how))
        steps = finish(batch)
        failed = {step.id for step in steps if step.finished == "error"}
        assert failed == {f"s{index}#{n}" for index in (1, 4) for n in range(3)}
        assert len([step for step in steps if step.finished == "length"]) == 12
        assert is_empty(batch)


def test_no_prompt_waits_for_answers_to_another_without_end() -> None:
    """Those that wait for a prompt let others pass while it is read, and others do not take the pages they wait for."""
    model = make_model("llama")
    long, *others = make_samples(model, (200, *[20] * 40))
    how = Decoding(max_new_tokens=3)
    batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 6, 64), prefill_tokens=20))
    first, *waiting = several([long], 3)
    for sample in (first, *waiting):
        batch.add(ask(sample, how))
    ended: list[str] = []
    for number, other in enumerate(others):
        batch.add(ask(other, how))
        ended += [step.id for step in batch.step() if step.finished]
        if all(sample.id in ended for sample in (first, *waiting)):
            assert others[0].id in ended[:1], "short prompts pass while the long one is read"
            assert number >= 10, "it has ten chunks"
            return
    pytest.fail("forty short prompts were read, and the answers to a long one did not end")
