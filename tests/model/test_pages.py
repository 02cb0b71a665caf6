"""The pool of pages: what it says it takes, who may enter, and attention that reads it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora.model import attention
from molora.model.attention import Paged, PageTable, packed_attention
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.pages import KeptLayer, KeptLayers, PagePool, SamplePages
from molora.routing import Flow, flowing
from molora.testing import WINDOW, assert_close, tiny_model

GROUPS, HEADS, WIDTH, PAGE = 2, 6, 8, 16
FP32, BF16 = torch.float32, torch.bfloat16
PLAIN, WINDOWED = (KeptLayer(window, (GROUPS, WIDTH), (GROUPS, WIDTH), FP32) for window in (None, 40))
KEPT = KeptLayers({0: PLAIN, 1: WINDOWED}, PAGE)
ODDITIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "capped": {"softcap": 2.0},
    "sinks": {"s_aux": torch.linspace(-1, 2, HEADS)},
}


def make_pool(num_pages: int, num_samples: int, kept: KeptLayers = KEPT) -> PagePool:
    return PagePool(kept, num_pages, num_samples, torch.zeros(()))


def held(pool: PagePool) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in (*pool.keys.values(), *pool.values.values()))


@pytest.mark.parametrize("num_pages", [0, 1, 7, 100])
@pytest.mark.parametrize("num_samples", [1, 3, 64])
def test_a_pool_takes_what_was_announced(num_pages: int, num_samples: int) -> None:
    other = KeptLayer(7, (1, 4), (3, 12), BF16)
    for kept in (KEPT, KeptLayers({0: PLAIN}, PAGE), KeptLayers({3: WINDOWED, 5: other}, PAGE)):
        pool = make_pool(num_pages, num_samples, kept)
        assert held(pool) == pool.num_bytes == kept.num_bytes(num_pages, num_samples)


@pytest.mark.parametrize("num_bytes", [0, 10_000, 123_456, 10**7])
def test_the_largest_pool_within_a_number_of_bytes(num_bytes: int) -> None:
    found = KEPT.pages_within(num_bytes, 4, most=1000)
    assert KEPT.num_bytes(found, 4) <= num_bytes
    assert found == 1000 or KEPT.num_bytes(found + 1, 4) > num_bytes


@pytest.mark.parametrize(
    ("family", "windows"),
    [("llama", [None, None]), ("phi3", [WINDOW, WINDOW]), ("gemma3", [WINDOW, None]), ("gpt-oss", [WINDOW, None])],
)
def test_what_a_layer_keeps_is_found_out(family: str, windows: list[int | None]) -> None:
    kept = Backbone(tiny_model(family), Identity("test", "", "", "", "")).kept_layers()
    assert [kept.layers[index].window for index in range(2)] == windows
    assert {layer.key_shape for layer in kept.layers.values()} == {(2, 8)}


def test_ten_thousand_samples_leave_no_page_behind() -> None:
    pool, drawn = make_pool(60, 8), random.Random(0)
    before = pool.num_free
    running: list[SamplePages] = []
    entered = waited = 0
    while entered < 10_000:
        pages = pool.admit(drawn.randrange(1, 20 * PAGE)) if len(running) < 8 else None
        if pages is not None:
            entered += 1
            running.append(pages)
            for window in (None, 40):
                taken = [page for each in running for page in each.pages[window]]
                assert len(set(taken)) == len(taken)
        else:
            waited += 1
            pool.release(running.pop(drawn.randrange(len(running))))
    assert waited > 1000
    for pages in running:
        pool.release(pages)
    assert pool.num_free == before == {None: 60, 40: 24}


def test_samples_that_branch_off_each_other_leave_no_page_behind() -> None:
    """Nor lose one while another holds it, nor get more than they would alone."""
    pool, drawn = make_pool(60, 8), random.Random(0)
    before = pool.num_free
    running: list[tuple[SamplePages, int, int]] = []  # with the tokens of its prompt, and all that it may have
    branched = 0
    for turn in range(3_000):
        pages, length, most = None, drawn.randrange(1, 6 * PAGE), 0
        if len(running) < 8 and drawn.random() < 0.5:
            most = length + drawn.randrange(4 * PAGE)
            pages = pool.admit(most)
            if pages:
                feed(pool, pages, length, float(turn + 1))
        elif len(running) < 8 and running:
            other, length, most = drawn.choice(running)
            free = pool.num_free[None]
            pages = (
                pool.branch(other, length, most, rewrites=drawn.random() < 0.2) if pool.holds(other, length) else None
            )
            branched += pages is not None
            assert pages is None or free - pool.num_free[None] <= pool.kept.pages_for(most)
            if pages:
                assert_equal_beginnings(pool, other, pages, length)
        if pages:
            running.append((pages, length, most))
            if length < most:
                feed(pool, pages, drawn.randrange(1, most - length + 1), -float(turn + 1))
        elif running:
            pool.release(running.pop(drawn.randrange(len(running)))[0])
        lasting = {page for pages, _, _ in running for page in pages.pages[None]}
        assert pool.num_free[None] == 60 - len(lasting), "a page is free when nobody holds it"
    assert branched > 300
    for pages, _, _ in running:
        pool.release(pages)
    assert pool.num_free == before
    assert not any(tensor.any() for tensor in (*pool.keys.values(), *pool.values.values()))


def feed(pool: PagePool, pages: SamplePages, count: int, value: float) -> None:
    """The next tokens of a sample, all of one value."""
    both = torch.full((1, GROUPS, count, WIDTH), value)
    fed = pool.feed([pages], [count], [pages.length + count])
    with flowing(Flow((count,))):
        for layer in pool.keys:
            fed.update(both, both, layer)


def assert_equal_beginnings(pool: PagePool, one: SamplePages, other: SamplePages, length: int) -> None:
    assert other.length == length
    for layer, kept in pool.kept.layers.items():
        # A ring's oldest token is written over before it is read.
        start = 0 if kept.window is None else max(0, length - kept.window + 1)
        for tensor in (pool.keys[layer], pool.values[layer]):
            first, second = (tensor.flatten(0, 1)[pool.slots(its, kept.window, start, length)] for its in (one, other))
            assert torch.equal(first, second) and first.all()


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("between", [0, 3])
def test_a_step_of_samples_that_share_pages_is_attention_sample_by_sample(kind: str, between: int) -> None:
    """Prompts of full pages and of parts, with one, two and five answers, beside pages of others."""
    generator = torch.Generator().manual_seed(5)
    pool = make_pool(99, 16)
    samples: list[SamplePages] = []
    written: list[Tensor] = []
    for length, number in ((2 * PAGE, 5), (PAGE + 3, 2), (7, 1), (3 * PAGE + 5, 2)):
        pool.admit(between * PAGE + 1)
        (first,), (both,) = fill(pool, [length], 9, generator)
        branches = [pool.branch(first, length, length + 9, rewrites=False) for _ in range(number - 1)]
        for count, pages in enumerate((first, *branches), start=2):
            assert pages
            new = torch.randn(2, 1, GROUPS, count, WIDTH, generator=generator)
            added = pool.feed([pages], [count], [length + count])
            with flowing(Flow((count,))):
                for layer in pool.keys:
                    added.update(new[0], new[1], layer)
            samples.append(pages)
            written.append(torch.cat([both, new], dim=3))
    lengths = [pages.length for pages in samples]
    new = torch.randn(2, 1, GROUPS, len(lengths), WIDTH, generator=generator)
    query = torch.randn(1, HEADS, len(lengths), WIDTH, generator=generator)
    step = pool.feed(samples, [1] * len(lengths), [length + 1 for length in lengths])
    with flowing(Flow((1,) * len(lengths))):
        for layer, window in ((0, None), (1, 40)):
            keys, values = step.update(new[0], new[1], layer)
            out, _ = packed_attention(Layer(), query, keys, values, None, sliding_window=window, **ODDITIES[kind])
            for index in range(len(lengths)):
                both = torch.cat([written[index], new[:, :, :, index : index + 1]], dim=3)
                its = reference(query[:, :, index], both, window, **ODDITIES[kind])
                assert_close(out[:, index : index + 1], its, 1e-5, what=f"sample {index} of layer {layer}")


def test_a_sample_waits_for_pages_and_is_refused_none_that_are_free() -> None:
    pool = make_pool(10, 4)
    assert pool.fits(10 * PAGE) and not pool.fits(10 * PAGE + 1)
    first, second, third = (pool.admit(3 * PAGE) for _ in range(3))
    assert first and second and third
    assert pool.admit(2 * PAGE) is None and pool.num_free[None] == 1
    pool.release(first)
    pool.release(third)
    scattered = pool.admit(7 * PAGE)
    assert scattered and scattered.pages[None] == [0, 1, 2, 6, 7, 8, 9], "a hole between neighbours is no obstacle"
    assert len(scattered.pages[40]) == 3, "a window holds no more than it reads"


def test_neighbouring_pages_are_taken_where_there_are_enough() -> None:
    pool = make_pool(10, 4)
    one, two, _ = pool.admit(2 * PAGE), pool.admit(PAGE), pool.admit(PAGE)
    assert one and two
    pool.release(one)
    three = pool.admit(3 * PAGE)
    assert three and three.pages[None] == [4, 5, 6]


def fill(
    pool: PagePool, lengths: list[int], room: int, generator: torch.Generator
) -> tuple[list[SamplePages], list[Tensor]]:
    """Samples whose keys and values were written token by token and in pieces; and what was written, (1, G, K, d)."""
    samples = [pages for length in lengths if (pages := pool.admit(length + room))]
    assert len(samples) == len(lengths)
    written = [torch.randn(2, 1, GROUPS, length, WIDTH, generator=generator) for length in lengths]
    for start in (0, 5, 30, 31):
        stop = {0: 5, 5: 30, 30: 31, 31: 1000}[start]
        parts = [tensor[:, :, :, start:stop] for tensor in written]
        inside = [index for index, part in enumerate(parts) if part.shape[3]]
        if not inside:
            continue
        counts = [parts[index].shape[3] for index in inside]
        feed = pool.feed([samples[i] for i in inside], counts, [lengths[i] for i in inside])
        new = torch.cat([parts[index] for index in inside], dim=3)
        with flowing(Flow(tuple(counts))):
            for layer in pool.keys:
                feed.update(new[0], new[1], layer)
    return samples, written


def test_part_of_a_prompt_gives_the_same_bits_wherever_its_pages_lie() -> None:
    """Neighbouring pages are seen as they are, and scattered ones are gathered."""
    chunks = [PAGE + 3, 2 * PAGE, 7]
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, 1, GROUPS, sum(chunks), WIDTH, generator=generator)
    query = torch.randn(1, HEADS, sum(chunks), WIDTH, generator=generator)

    def attended(pool: PagePool, scattered: bool) -> list[Tensor]:
        pages = pool.admit(sum(chunks))
        assert pages and (pages.pages[None] != [*range(pages.pages[None][0], pages.pages[None][0] + 4)]) is scattered
        outputs, start = [], 0
        for count in chunks:
            new, asked = (each[..., start : start + count, :] for each in (written, query))
            feed = pool.feed([pages], [count], [sum(chunks)])
            with flowing(Flow((count,))):
                for layer, window in {0: None, 1: 40}.items():
                    keys, values = feed.update(new[0], new[1], layer)
                    output, _ = packed_attention(Layer(), asked, keys, values, None, sliding_window=window)
                    outputs.append(output)
            start += count
        return outputs

    pool = make_pool(8, 4)
    apart = [pool.admit(PAGE) for _ in range(8)]
    for pages in apart[::2]:
        assert pages
        pool.release(pages)
    for one, other in zip(attended(make_pool(8, 4), False), attended(pool, True), strict=True):
        assert torch.equal(one, other)


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = HEADS // GROUPS


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("lengths", [[9], [70], [3, 50, 16, 90, 15], [2, 7, 11]])
def test_a_step_through_page_tables_is_attention_sample_by_sample(
    lengths: list[int], scattered: bool, kind: str
) -> None:
    """Full layers and windows, lengths around pages and windows, pages in order and between those of others."""
    generator = torch.Generator().manual_seed(1)
    pool = make_pool(80, 12)
    if scattered:
        passing = [pool.admit(PAGE) for _ in range(24)]
        for sample in passing[::2]:
            assert sample
            pool.release(sample)
    samples, written = fill(pool, lengths, 1, generator)
    new = torch.randn(2, 1, GROUPS, len(lengths), WIDTH, generator=generator)
    query = torch.randn(1, HEADS, len(lengths), WIDTH, generator=generator)
    feed = pool.feed(samples, [1] * len(lengths), [length + 1 for length in lengths])
    assert feed.position_ids_T.tolist() == lengths
    with flowing(Flow((1,) * len(lengths))):
        for layer, window in ((0, None), (1, 40)):
            keys, values = feed.update(new[0], new[1], layer)
            out, _ = packed_attention(Layer(), query, keys, values, None, sliding_window=window, **ODDITIES[kind])
            for index in range(len(lengths)):
                both = torch.cat([written[index], new[:, :, :, index : index + 1]], dim=3)
                its = reference(query[:, :, index], both, window, **ODDITIES[kind])
                assert_close(out[:, index : index + 1], its, 1e-5, what=f"sample {index} of layer {layer}")


def reference(
    query: Tensor,
    both: Tensor,
    window: int | None,
    scaling: float = WIDTH**-0.5,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of one query (1, H, d), head by head, written out; output (1, 1, H, d)."""
    keys, values = both[:, 0] if window is None else both[:, 0, :, -window:]
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        scores = keys[group] @ query[0, head] * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[head : head + 1]])
        weights = F.softmax(scores, dim=0)[: keys.shape[1]]
        outputs.append(weights @ values[group])
    return torch.stack(outputs)[None, None]


@pytest.mark.parametrize("kind", ODDITIES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_in_one_sample_reaches_no_other(bad: float, kind: str) -> None:
    """In a step of samples with more and with fewer pages, of which the first holds what is no number."""
    results = []
    for first in (1.0, bad):
        generator = torch.Generator().manual_seed(4)
        pool = make_pool(80, 12)
        lengths = [20, 5, 90, 33]
        samples, _ = fill(pool, lengths, 1, generator)
        for layer, kept in pool.kept.layers.items():
            pool.keys[layer][samples[0].pages[kept.window]] *= first
            pool.values[layer][samples[0].pages[kept.window]] *= first
        new = torch.randn(2, 1, GROUPS, 4, WIDTH, generator=generator)
        query = torch.randn(1, HEADS, 4, WIDTH, generator=generator)
        feed = pool.feed(samples, [1] * 4, [length + 1 for length in lengths])
        with flowing(Flow((1,) * 4)):
            for layer, window in ((0, None), (1, 40)):
                keys, values = feed.update(new[0], new[1], layer)
                out, _ = packed_attention(Layer(), query, keys, values, None, sliding_window=window, **ODDITIES[kind])
                results.append(out[0])
    for as_it_is, beside_bad in zip(results[:2], results[2:], strict=True):
        assert not beside_bad[0].isfinite().all()
        assert torch.equal(as_it_is[1:], beside_bad[1:])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_pages_one_by_one_are_the_gathered_keys(dtype: torch.dtype) -> None:
    """The two arrangements of a step: pages where they lie, and what a table gathers."""
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(30, PAGE, GROUPS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    for pages in ([[4, 5], [6], [7, 8, 9]], [[29, 0, 14], [3], [20]]):
        used = [len(its) * PAGE - 3 for its in pages]
        table = PageTable(pages, used, PAGE, keys)
        gathered_NGKd, values_NGKd = Paged(keys, table).gathered(), Paged(values, table).gathered()
        query = torch.randn(1, HEADS, len(pages), WIDTH, generator=generator).to(dtype)
        with flowing(Flow((1,) * len(pages))):
            out, _ = packed_attention(Layer(), query, Paged(keys, table), Paged(values, table), None)
        query_NGRd = query[0].transpose(0, 1).reshape(len(pages), GROUPS, -1, WIDTH)
        expected = F.scaled_dot_product_attention(query_NGRd, gathered_NGKd, values_NGKd, table.visible_N11K)
        tolerance = 1e-5 if dtype == FP32 else 2e-2
        assert_close(out, expected.reshape(1, len(pages), HEADS, WIDTH), tolerance, what=str(pages))
        for index, its in enumerate(pages):
            alone = keys[its].flatten(0, 1)[: used[index]]
            assert torch.equal(gathered_NGKd[index, :, : used[index]].transpose(0, 1), alone)


def test_what_is_no_number_does_not_outlive_its_sample() -> None:
    pool = make_pool(4, 2)
    samples = [pool.admit(2 * PAGE), pool.admit(2 * PAGE)]
    assert samples[0] and samples[1]
    bad = torch.full((1, GROUPS, 2 * PAGE, WIDTH), torch.nan)
    feed = pool.feed(samples[:1], [2 * PAGE], [2 * PAGE])  # pyright: ignore[reportArgumentType]
    for layer in pool.keys:
        feed.update(bad, bad, layer)
    pool.release(samples[0])
    assert not any(tensor.any() for tensor in (*pool.keys.values(), *pool.values.values()))


def test_the_kernel_that_reads_tables_gets_what_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole pages, a table of whole numbers, as many tokens as count: what a kernel is given is enough to attend."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(12, PAGE, GROUPS, WIDTH, generator=generator) for _ in range(2))
    table = PageTable([[3, 1, 7], [5], [2, 0]], [40, 16, 17], PAGE, keys)
    query = torch.randn(1, HEADS, 3, WIDTH, generator=generator)

    def kernel(
        query_THd: Tensor,
        keys_PBGd: Tensor,
        values_PBGd: Tensor,
        starts: Tensor,
        ends: Tensor,
        most_q: int,
        most_k: int,
        *,
        scale: float | None,
        enable_gqa: bool,
        seqused_k: Tensor,
        block_table: Tensor,
        num_splits: int,
    ) -> Tensor:
        assert starts.tolist() == [0, 1, 2, 3] and ends.tolist() == [0, 40, 56, 73] and (most_q, most_k) == (1, 40)
        assert enable_gqa and num_splits == 1 and scale is None
        assert {starts.dtype, ends.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
        outputs = []
        for index, (pages, used) in enumerate(zip(block_table.tolist(), seqused_k.tolist(), strict=True)):
            k, v = (pool[pages].flatten(0, 1)[:used].transpose(0, 1)[None] for pool in (keys_PBGd, values_PBGd))
            q = query_THd[index][None, :, None]
            outputs.append(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0, :, 0])
        return torch.stack(outputs)

    key, value = Paged(keys, table), Paged(values, table)
    with flowing(Flow((1, 1, 1))):
        expected, _ = packed_attention(Layer(), query, key, value, None)
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        monkeypatch.setattr(attention, "_kernel_reads_pages", lambda: True)
        monkeypatch.setattr(attention, "_in_half_on_cuda", lambda query: True)
        given, _ = packed_attention(Layer(), query, key, value, None)
    assert_close(given, expected, 1e-5, what="attention through the kernel's arguments")
