"""Samples enter by free pages and in chunks: whatever waits or enters beside it, a sample's answer stays what it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.data.processor import SampleTooLong
from molora.inference import generate as generation
from molora.inference.frames import FrameMemory
from molora.inference.generate import Batch, GenerationConfig, Step, generate
from molora.inference.running import Asked
from molora.inference.sampling import NO_TOKEN, Decoding, choose
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.model.pages import PagePool
from molora.pack import Item, Sample, collate
from molora.routers.learned import LearnedConfig, LearnedRouter
from molora.routers.table import TableConfig, TableRouter
from molora.seeding import seed_of
from molora.testing import VOCAB_SIZE, Letters, Numbers, NumbersConfig, assert_close, tiny_model

NAMES = ("numbers", "letters")


def make_model(family: str, learned: bool = False, **settings: Any) -> MoLoRA:
    modalities = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    targets = r".*self_attn\.(q_proj|v_proj|o_proj|qkv_proj)"
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": targets}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model(family, **settings), Identity("test", "", "", "", ""))
    backbone.model.generation_config.eos_token_id = None
    router: Any = TableRouter(NAMES, TableConfig())
    if learned:
        router = LearnedRouter(NAMES, LearnedConfig(modalities=list(NAMES)), backbone.width)
    return MoLoRA(backbone, modalities, adapters, router)


def make_samples(model: MoLoRA, lengths: Sequence[int]) -> list[Sample]:
    """Text, numbers and letters in turn."""
    generator = torch.Generator().manual_seed(5)
    samples = []
    for index, length in enumerate(lengths):
        modality_ids, items = torch.zeros(length, dtype=torch.long), ()
        if (kind := index % 3) and length > 3:
            modality_ids[1:4] = kind
            prepared = model.modalities[NAMES[kind - 1]].prepare(torch.rand(3, generator=generator).tolist())
            items = (Item(NAMES[kind - 1], "default", prepared),)
        ids = torch.randint(VOCAB_SIZE, (length,), generator=generator)
        samples.append(Sample(f"s{index}", ids, modality_ids, torch.zeros(length, dtype=torch.bool), items))
    return samples


def answers(steps: Iterator[Step]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for step in steps:
        found.setdefault(step.id, []).append(step.token_id)
    return found


def ask(sample: Sample, how: Decoding) -> Asked:
    return Asked(sample, how, seed_of(how.seed, sample.id), lambda tokens: False)


def gib(model: MoLoRA, num_pages: int, num_samples: int) -> float:
    return model.backbone.kept_layers().num_bytes(num_pages, num_samples) / 2**30


LENGTHS = (70, 9, 33, 130, 64, 5, 100, 1, 18, 65, 24, 90)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "phi3", "phi4-mini", "llama-dynamic", "phimoe", "gpt-oss", "learned"]
)
def test_chunks_and_a_narrow_pool_change_no_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end anywhere, windows and rotary regimes crossed, samples that wait for each other's pages."""
    learned = family == "learned"
    model = make_model("phi4-mini" if learned else family, learned)
    samples = make_samples(model, (30, 9, 33, 41, 5, 20) if family == "llama-dynamic" else LENGTHS)
    alone = logits_of(model, [[sample] for sample in samples], GenerationConfig(max_new_tokens=4), monkeypatch)
    for prefill_tokens, chunk_tokens in ((7, None), (50, 20)):
        config = GenerationConfig(
            max_new_tokens=4,
            max_running_samples=5,
            prefill_tokens=prefill_tokens,
            chunk_tokens=chunk_tokens,
            kv_cache_gib=gib(model, 4, 5),
        )
        together = logits_of(model, [samples], config, monkeypatch)
        assert together.keys() == alone.keys()
        for id, logits in together.items():
            assert_close(logits, alone[id], 1e-5, what=f"{family} {id}, {prefill_tokens} prompt tokens a step")


def logits_of(
    model: MoLoRA, batches: list[list[Sample]], config: GenerationConfig, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """The logits behind every token of an answer, by the id of its sample."""
    logits: list[Tensor] = []

    def noting(logits_NV: Tensor, generators: Sequence[torch.Generator], **settings: Any) -> list[int]:
        logits.extend(logits_NV)
        return choose(logits_NV, generators, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "choose", noting)
        ids = [step.id for batch in batches for step in generate(model, batch, config)]
    order = {id: [index for index, other in enumerate(ids) if other == id] for id in ids}
    return {id: torch.stack([logits[index] for index in places]) for id, places in order.items()}


@pytest.mark.parametrize("sizes", [{"prefill_tokens": 40}, {"prefill_tokens": 160, "chunk_tokens": 40}])
def test_samples_that_run_do_not_wait_for_a_long_prompt(sizes: dict[str, Any]) -> None:
    model = make_model("llama")
    samples = make_samples(model, (9, 200))
    steps = [step.id for step in generate(model, samples, GenerationConfig(max_new_tokens=12, **sizes))]
    assert steps.index("s1") >= 4, "the first has an answer for each chunk of the second"


def test_a_sample_that_never_fits_is_refused_before_any_sample_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    samples = make_samples(model, (100, 30))
    config = GenerationConfig(max_new_tokens=40, kv_cache_gib=gib(model, 2, 64))
    told = "sample s0: needs keys and values of 139 tokens .100 of its prompt., but .* holds 128; raise it"
    steps = list(generate(model, samples, config, keep_going=True))
    assert [step.id for step in steps] == ["s0"] + ["s1"] * 40
    assert isinstance(steps[0].error, SampleTooLong)
    model.backbone.kept_layers()
    monkeypatch.setattr(model, "embed", lambda pack: pytest.fail("a sample ran"))
    with pytest.raises(SampleTooLong, match=told):
        next(generate(model, samples, config))


def test_without_a_size_a_later_longer_sample_still_fits() -> None:
    model = make_model("phi3")
    samples = make_samples(model, (9, 5, 12, 200, 7, 11))
    alone = GenerationConfig(max_new_tokens=6)
    expected = {sample.id: answers(generate(model, [sample], alone))[sample.id] for sample in samples}
    config = GenerationConfig(max_new_tokens=6, max_running_samples=2)
    assert answers(generate(model, samples, config)) == expected


def test_without_a_size_a_pool_leaves_memory_free(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Samples wait for each other, and one that would need more is refused, in a line that says what to do."""
    model = make_model("llama")
    pools: list[PagePool] = []
    make = model.backbone.page_pool
    monkeypatch.setattr(model.backbone, "page_pool", lambda *sizes: pools.append(make(*sizes)) or pools[-1])
    samples = make_samples(model, (70, 9, 200, 33, 130, 64, 5))
    config = GenerationConfig(max_new_tokens=4)
    short = [samples[index] for index in (0, 1, 3, 4, 5, 6)]
    expected = {sample.id: answers(generate(model, [sample], config))[sample.id] for sample in short}
    pools.clear()
    free = int(gib(model, 3, 64) * 2**30 / 0.69)
    monkeypatch.setattr(model.backbone, "free_bytes", lambda: free - sum(pool.num_bytes for pool in pools[-1:]))
    steps = list(generate(model, samples, config, keep_going=True))
    assert answers(step for step in steps if not step.error) == expected
    assert [pool.num_pages for pool in pools] == [0, 3]
    (failed,) = [step for step in steps if step.error]
    assert isinstance(failed.error, SampleTooLong) and failed.id == "s2"
    assert re.search("needs keys and values of 203 tokens .200 of .* free, of which 70% may be", str(failed.error))
    told = " ".join(capsys.readouterr().err.split())
    assert "of 7 samples would take" in told and "samples wait for each other. Lower max_new_tokens" in told


def test_a_pool_larger_than_what_is_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    config = GenerationConfig(kv_cache_gib=gib(model, 5, 64))
    monkeypatch.setattr(model.backbone, "free_bytes", lambda: int(gib(model, 5, 64) * 2**30))
    Batch(model, config)
    monkeypatch.setattr(model.backbone, "free_bytes", lambda: int(gib(model, 5, 64) * 2**30) - 1)
    with pytest.raises(ValueError, match=r"kv_cache_gib=.* takes .* GiB of memory are free; give less"):
        Batch(model, config)


def test_a_pool_is_made_once_and_empty_again_at_the_end() -> None:
    """Requests of every kind through one pool of the announced size."""
    model = make_model("gemma3")
    samples = make_samples(model, [1 + (7 * index) % 50 for index in range(60)])
    config = GenerationConfig(max_new_tokens=3, max_running_samples=7, kv_cache_gib=gib(model, 6, 7))
    batch = Batch(model, config)
    pool, free = batch.pool, batch.pool.num_free
    assert pool.num_bytes == pytest.approx(config.kv_cache_gib * 2**30, rel=0.01)  # pyright: ignore[reportOptionalOperand]
    for sample in samples:
        batch.add(ask(sample, config))
    ended: list[str] = []
    while batch.num_waiting or batch.num_running:
        ended += [step.id for step in batch.step() if step.finished]
        assert batch.num_running <= 7 and batch.pool is pool
    assert sorted(ended) == sorted(sample.id for sample in samples) and pool.num_free == free


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_sample_that_is_removed_leaves_no_trace(deterministic: bool) -> None:
    """While it waits, in the middle of its prompt or of its answer, and after it."""
    model = make_model("phi4-mini")
    model.deterministic_batch = deterministic
    samples = make_samples(model, (30, 9, 100, 60, 20, 45, 12))
    config = GenerationConfig(max_new_tokens=6, max_running_samples=5, prefill_tokens=32, kv_cache_gib=gib(model, 9, 5))
    expected = answers(generate(model, samples, config))
    for removed in ("s0", "s2", "s3", "s6", "none"):
        for after in range(9):
            batch = Batch(model, config)
            free = batch.pool.num_free
            for sample in samples:
                batch.add(ask(sample, config))
            found: list[Step] = []
            for _ in range(after):
                found += batch.step()
            held, running = batch.pool.num_free, batch.num_running
            batch.remove(removed)
            assert (batch.pool.num_free[None] or 0) >= (held[None] or 0)
            assert batch.num_running == running or batch.pool.num_free != held, "its pages are free at once"
            count = len(found)
            while batch.num_waiting or batch.num_running:
                found += batch.step()
            assert removed not in [step.id for step in found[count:]]
            others = {id: tokens for id, tokens in answers(iter(found)).items() if id != removed}
            assert others == {id: tokens for id, tokens in expected.items() if id != removed}
            assert batch.pool.num_free == free


@pytest.mark.parametrize("num_long", [1, 3])
def test_a_short_prompt_waits_for_no_long_one(num_long: int) -> None:
    """Whether it comes after them or with them."""
    model = make_model("llama")
    *long, early, late = make_samples(model, (*[200] * num_long, 9, 9))
    config = GenerationConfig(max_new_tokens=4, prefill_tokens=20, kv_cache_gib=gib(model, 24, 64))
    batch = Batch(model, config)
    for sample in (*long, early):
        batch.add(ask(sample, config))
    assert [step.id for step in batch.step()] == [early.id]
    batch.add(ask(late, config))
    assert [step.id for step in batch.step()] == [early.id, late.id]


def test_a_long_prompt_goes_on_beside_short_ones_without_end() -> None:
    model = make_model("llama")
    long, *short = make_samples(model, (200, *[20] * 60))
    config = GenerationConfig(max_new_tokens=1, prefill_tokens=20, kv_cache_gib=gib(model, 24, 64))
    batch = Batch(model, config)
    batch.add(ask(long, config))
    for number, sample in enumerate(short):
        batch.add(ask(sample, config))
        if long.id in [step.id for step in batch.step()]:
            assert number >= 10, "it has ten chunks"
            return
    pytest.fail("sixty short prompts were read, and the ten chunks of a long one not")


def test_each_sample_is_decoded_in_its_own_way() -> None:
    """Together as alone, whatever the settings of the others are."""
    model = make_model("llama")
    samples = make_samples(model, (9, 12, 14, 20, 13, 15))
    ways = [
        Decoding(max_new_tokens=5),
        Decoding(max_new_tokens=9, temperature=1.5, seed=3),
        Decoding(max_new_tokens=7, temperature=1.5, top_p=0.5, num_likeliest=2),
        Decoding(max_new_tokens=3, temperature=0.7, top_k=4),
        Decoding(max_new_tokens=6, temperature=1.5, seed=3, top_p=0.9, top_k=5),
        Decoding(max_new_tokens=2, num_likeliest=0, score_prompt=True),
    ]
    config = GenerationConfig(kv_cache_gib=gib(model, 12, 64))
    batch = Batch(model, config)
    for sample, how in zip(samples, ways, strict=True):
        batch.add(ask(sample, how))
    found: list[Step] = []
    while batch.num_waiting or batch.num_running:
        found += batch.step()
    together = answers(iter(found))
    for sample, how in zip(samples, ways, strict=True):
        alone = answers(generate(model, [sample], GenerationConfig(**vars(how))))
        assert together[sample.id] == alone[sample.id] and len(together[sample.id]) == how.max_new_tokens
    greedy = answers(generate(model, samples[3:4], GenerationConfig(max_new_tokens=3)))
    assert (
        answers(generate(model, samples[3:4], GenerationConfig(max_new_tokens=3, temperature=9.0, top_k=1))) == greedy
    )


@pytest.mark.parametrize("prefill_tokens", [7, 2048])
def test_likelihoods_are_those_of_a_full_forward(prefill_tokens: int) -> None:
    """Of every token of an answer and of its prompt, in chunks or not."""
    model = make_model("llama")
    samples = [sample for sample in make_samples(model, (9, 12, 14, 60)) if not sample.items]
    how = Decoding(max_new_tokens=5, num_likeliest=3, score_prompt=True)
    batch = Batch(model, GenerationConfig(kv_cache_gib=gib(model, 8, 64), prefill_tokens=prefill_tokens))
    for sample in samples:
        batch.add(ask(sample, how))
    found: dict[str, list[Step]] = {sample.id: [] for sample in samples}
    while batch.num_waiting or batch.num_running:
        for step in batch.step():
            found[step.id].append(step)
    for sample in samples:
        steps = found[sample.id]
        ids = [*sample.token_ids_T.tolist(), *(step.token_id for step in steps)]
        whole = Sample.of_text("whole", ids)
        logits_TV = model.logits(collate([whole], model.modalities)).detach().log_softmax(-1)
        told = [*steps[0].prompt, *(step.likelihood for step in steps)]
        assert [each.token_id for each in told if each] == ids[1:]
        own_T = logits_TV[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        assert_close(torch.tensor([each.log_probability for each in told if each]), own_T, 1e-5, what="own")
        likeliest = torch.tensor([[value for _, value in each.likeliest] for each in told if each])
        assert_close(likeliest, logits_TV[:-1].topk(3).values, 1e-5, what="likeliest")
        assert not any(step.prompt for step in steps[1:])


def test_pages_come_back_from_samples_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[PagePool] = []
    model = make_model("llama")
    make = model.backbone.page_pool
    monkeypatch.setattr(model.backbone, "page_pool", lambda *sizes: pools.append(make(*sizes)) or pools[-1])
    samples = make_samples(model, (9, 20, 30, 70, 12, 14))
    prepared = replace(samples[1].items[0].prepared, tensors={"values": torch.full((3,), torch.nan)})
    samples[1] = replace(samples[1], items=(replace(samples[1].items[0], prepared=prepared),))
    broken = replace(samples[4].items[0].prepared, num_tokens=2)
    samples[4] = replace(samples[4], items=(replace(samples[4].items[0], prepared=broken),))
    config = GenerationConfig(max_new_tokens=5, max_running_samples=3, kv_cache_gib=gib(model, 8, 3))
    steps = list(generate(model, samples, config, keep_going=True))
    assert {step.id for step in steps if step.finished == "error"} == {"s1", "s4"}
    assert len([step for step in steps if step.finished == "length"]) == 4
    (pool,) = pools
    assert pool.num_free == {None: 8}
    assert not any(tensor.any() for tensor in (*pool.keys.values(), *pool.values.values()))


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_tokens_are_drawn_by_their_probabilities(top_p: float) -> None:
    """Against multinomial counts of the same nucleus, and each sample as if it were alone."""
    logits_V = torch.tensor([2.0, 1.0, 0.5, -1.0, -torch.inf, 1.5])
    number = 4000
    generators = [torch.Generator().manual_seed(seed) for seed in range(number)]
    drawn = choose(logits_V.expand(number, -1), generators, temperature=0.8, top_p=top_p)
    probabilities = torch.softmax(logits_V / 0.8, 0)
    if top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        probabilities[ids[ordered.cumsum(0) - ordered >= top_p]] = 0
        probabilities /= probabilities.sum()
    shares = torch.bincount(torch.tensor(drawn), minlength=6) / number
    assert (shares - probabilities).abs().max() < 4 * (0.25 / number) ** 0.5  # four standard deviations
    assert not shares[probabilities == 0].any()
    for seed in range(0, number, 501):
        again = torch.Generator().manual_seed(seed)
        assert choose(logits_V[None], [again], temperature=0.8, top_p=top_p) == [drawn[seed]]


@pytest.mark.parametrize("temperature", [1e-6, 0.7, 1e30])
@pytest.mark.parametrize("top_k", [None, 1, 63, 64, 65, 2000])
@pytest.mark.parametrize("top_p", [1e-320, 1e-9, 0.3, 0.9, 0.9999, 1.0])
def test_a_nucleus_is_that_of_a_full_sort(top_p: float, top_k: int | None, temperature: float) -> None:
    """Of flat and of steep logits, with many that are equal, in a batch and alone."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(7, 3000, generator=generator) * torch.tensor([0, 0.1, 1, 2, 5, 30, 1e30])[:, None]
    logits[1:, 100:200] = -torch.inf
    logits = logits.bfloat16().float()  # which makes equals of what is near

    def drawn(rows: list[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return choose(logits[rows], generators, temperature=temperature, top_p=top_p, top_k=top_k)

    ordered, ids = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature, 1).sort(
        dim=1, descending=True, stable=True
    )
    outside = (ordered.cumsum(1) - ordered >= top_p) | (torch.arange(3000) >= (top_k or 3000))
    outside[:, 0] = False
    sums = ordered.masked_fill(outside, 0).cumsum(1)
    expected = []
    for row in range(7):
        number = torch.rand(1, generator=torch.Generator().manual_seed(row))
        expected.append(int(ids[row, int((sums[row] <= number * sums[row, -1]).sum())]))
    if top_p < 1 or top_k is not None:  # else they are drawn in the order of the vocabulary
        assert drawn([*range(7)]) == expected
    assert [drawn([row]) for row in range(7)] == [[token] for token in drawn([*range(7)])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
@pytest.mark.parametrize("vocab_size", [7, 1000])
def test_logits_that_are_no_numbers_give_no_token(
    bad: float, temperature: float, top_p: float, vocab_size: int
) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, 4] = bad
    logits[2] = -torch.inf
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    first, *others = choose(logits, generators, temperature=temperature, top_p=top_p)
    assert 0 <= first < vocab_size and others == [NO_TOKEN, NO_TOKEN]


def test_media_that_appear_again_are_encoded_once() -> None:
    model = make_model("phi4-mini")
    samples = make_samples(model, (9, 12, 14, 20, 13, 15))
    samples[4] = replace(samples[4], items=samples[1].items)  # another question about the same
    many, few = GenerationConfig(max_new_tokens=5), GenerationConfig(max_new_tokens=5, max_running_samples=2)
    expected = {sample.id: answers(generate(model, [sample], many))[sample.id] for sample in samples}
    encoded: list[int] = []
    for encoder in model.encoders.values():
        encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output.lengths)))
    frames = FrameMemory(model, 10**6)
    assert answers(generate(model, samples, many, frames=frames)) == expected
    assert sum(encoded) == 3, "two of letters, one of numbers that two samples share"
    assert answers(generate(model, samples, few, frames=frames)) == expected
    assert sum(encoded) == 3
    filled = collate(frames.fill(samples), model.modalities)
    assert_close(model.logits(filled), model.logits(collate(samples, model.modalities)), 1e-5, what="logits")
    model.deterministic_batch = True
    alone = FrameMemory(model, 10**6)
    for item, frames_SC in ((i, i.frames_SC) for s in alone.fill(samples) for i in s.items):
        assert frames_SC is not None and torch.equal(frames_SC, model.frames(item).frames_SC)


def test_frames_that_are_kept_are_bounded_and_follow_the_weights() -> None:
    model = make_model("llama")
    samples = [sample for sample in make_samples(model, (9, 12, 14) * 8) if sample.items]
    one = model.frames(samples[0].items[0]).frames_SC.nbytes
    frames = FrameMemory(model, 5 * one)
    for sample in samples:
        frames.fill([sample])
        assert frames.num_bytes <= 5 * one
    assert frames.num_bytes == 5 * one
    (kept,) = frames.fill(samples[-1:])
    with torch.no_grad():
        for parameter in model.encoders[samples[-1].items[0].modality].parameters():
            parameter.add_(1.0)
    (fresh,) = frames.fill(samples[-1:])
    expected = model.frames(samples[-1].items[0]).frames_SC
    assert fresh.items[0].frames_SC is not None and kept.items[0].frames_SC is not None
    assert torch.equal(fresh.items[0].frames_SC, expected) and not torch.equal(kept.items[0].frames_SC, expected)
    nothing = FrameMemory(model, 0)
    assert nothing.fill(samples[:1])[0].items[0].frames_SC is not None and nothing.num_bytes == 0


@torch.no_grad()
def test_frames_that_are_kept_are_computed_in_the_backbones_dtype() -> None:
    """Or an answer with them would be another than one without, in half precision."""
    model = make_model("llama")
    language_model: Any = model.backbone.model
    language_model.to(torch.bfloat16)
    for sample in (sample for sample in make_samples(model, (9, 12, 14)) if sample.items):
        (filled,) = FrameMemory(model, 10**6).fill([sample])
        with_frames, without = (model.embed(collate([each], model.modalities)) for each in (filled, sample))
        assert torch.equal(with_frames, without) and filled.items[0].frames_SC is not None
        assert filled.items[0].frames_SC.dtype == torch.bfloat16
