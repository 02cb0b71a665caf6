"""The order of samples: a pure function of seed and position, however sources are mixed and shuffled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from molora.config import ConfigError, build
from molora.data.mixture import Mixture, MixtureConfig
from molora.data.order import Blocks, Order, even_blocks
from molora.data.sources import SourceConfig, check_samples, mixed_order
from molora.seeding import seed_of

CURRICULUM = [(0, 1.0), (300, 0.0), (900, 4.0)]
ORDERS: dict[str, tuple[list[int], list[Any], dict[str, Any]]] = {
    "weights": ([50, 3, 1000], [1.0, 2.0, 0.5], {}),
    "blocks": ([5000, 70], [1.0, 1.0], {"blocks": [even_blocks(5000, 64, 3), None]}),
    "curriculum": ([50, 90], [CURRICULUM, 1.0], {"samples_per_step": 7}),
    "caps": ([50, 900, 31], [1.0, 1.0, 2.0], {"max_epochs": [3, None, 2]}),
    "one source a step": ([50, 90], [1.0, CURRICULUM], {"samples_per_step": 7, "one_source": True}),
}


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_the_same_from_anywhere(name: str) -> None:
    lengths, weights, more = ORDERS[name]
    forwards = Order(lengths, weights, 1, **more)
    sequence = [forwards[k] for k in range(9000)]
    for start in (0, 1, 4095, 4096, 8191, 8999):
        assert Order(lengths, weights, 1, **more)[start] == sequence[start]
    assert [forwards[k] for k in reversed(range(8000, 8100))] == sequence[8099:7999:-1]
    assert [Order(lengths, weights, 2, **more)[k] for k in range(50)] != sequence[:50]


@pytest.mark.parametrize("name", ORDERS)
def test_the_rows_of_every_epoch_come_once(name: str) -> None:
    lengths, weights, more = ORDERS[name]
    order = Order(lengths, weights, 1, **more)
    seen = Counter(order[k] for k in range(9000))
    assert set(seen.values()) == {1}
    for source, length in enumerate(lengths):
        epochs = Counter(epoch for at, _, epoch in seen if at == source)
        assert all(epochs[epoch] == length for epoch in range(max(epochs)))


def test_the_order_of_a_run_that_began_before_blocks_is_kept() -> None:
    """The draws and tables as they were made from the start."""
    order = Order([50, 3, 1000], [1.0, 2.0, 0.5], seed=1)
    generator = torch.Generator().manual_seed(seed_of(1, "sources", 0))
    drawn = torch.multinomial(
        torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), 4096, replacement=True, generator=generator
    ).tolist()
    assert [order[k][0] for k in range(4096)] == drawn
    generator = torch.Generator().manual_seed(seed_of(1, "rows", 2, 0))
    table = torch.randperm(1000, generator=generator).tolist()
    rows = [order[k][1] for k, source in enumerate(drawn) if source == 2]
    assert rows == table[: len(rows)]


def test_a_window_of_blocks_is_read_together_and_mixed() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    blocks = Blocks(np.cumsum(lengths), per_window=8)
    told: list[list[range]] = []
    order = Order(
        [int(lengths.sum())], [1.0], 3, blocks=[blocks], will_read=lambda source, rows, behind: told.append(rows)
    )
    rows = [order[k][1] for k in range(order.lengths[0])]
    assert sorted(rows) == list(range(order.lengths[0]))
    starts = {0, *blocks.ends[:-1].tolist()}
    position = 0
    for ranges in told:
        window = rows[position : position + sum(map(len, ranges))]
        assert sorted(window) == [row for each in ranges for row in each]
        assert {each.start for each in ranges} <= starts and len(ranges) <= 8
        assert window != sorted(window)
        position += len(window)
    assert len(told) == 13 and position == len(rows)
    firsts = [each.start for ranges in told for each in ranges]
    assert sorted(firsts) == sorted(starts) and firsts != sorted(firsts)
    again = [order[len(rows) + k][1] for k in range(len(rows))]
    assert sorted(again) == sorted(rows) and again != rows


def test_a_hundred_million_rows_take_no_table_of_their_size() -> None:
    order = Order([10**8], [1.0], 0, blocks=[even_blocks(10**8, 1024, 16)])
    rows = {order[k][1] for k in (*range(1000), *range(99_999_000, 100_000_000))}
    assert len(rows) == 2000 and max(rows) < 10**8
    shuffle: Any = order._shuffles[0]
    tables = [shuffle.starts, shuffle.lengths, shuffle._order, shuffle._rows, shuffle._window_ends]
    assert sum(map(len, tables)) < 10**6


def test_weights_change_at_their_steps() -> None:
    order = Order([10, 10], [[(0, 1.0), (1000, 0.0), (2000, 3.0)], 1.0], 0, samples_per_step=4)
    shares = [np.mean([order[k][0] == 0 for k in range(first * 4, first * 4 + 4000)]) for first in (0, 1000, 2000)]
    assert shares == [pytest.approx(0.5, abs=0.03), 0.0, pytest.approx(0.75, abs=0.03)]


def test_a_source_leaves_the_mixture_when_it_is_used_up_and_the_others_go_on() -> None:
    order = Order([50, 31, 10**6], [1.0, 1.0, 1.0], 0, max_epochs=[3, 2, None])
    drawn = [order[k] for k in range(5000)]
    counts = Counter(source for source, _, _ in drawn)
    assert counts[0] == 150 and counts[1] == 62
    assert {epoch for source, _, epoch in drawn if source == 0} == {0, 1, 2}
    last = max(k for k, (source, _, _) in enumerate(drawn) if source != 2)
    assert last < 1000 and order.num_samples(10**6) == 10**6


def test_the_samples_end_where_every_source_is_used_up() -> None:
    order = Order([50, 31], [1.0, 5.0], 0, max_epochs=[3, 2])
    assert order.num_samples(212) == 212 and order.num_samples(10**6) == 212
    assert Counter(order[k][0] for k in range(212)) == {0: 150, 1: 62}
    with pytest.raises(IndexError):
        order[212]
    with pytest.raises(ConfigError, match=r"here: the sources are used up after 212 samples \(21 steps of 10\)"):
        check_samples(order, 22, 10, "here")
    check_samples(order, 21, 10, "here")


def test_samples_end_where_the_only_source_left_has_no_weight() -> None:
    order = Order([10, 10], [1.0, [(0, 0.0), (30, 1.0)]], 0, samples_per_step=2, max_epochs=[2, None])
    assert order.num_samples(1000) == 20
    order = Order([10, 10], [1.0, [(0, 0.0), (10, 1.0)]], 0, samples_per_step=2, max_epochs=[2, None])
    assert order.num_samples(1000) == 1000 and order[20][0] == 1


def test_a_step_of_one_source_has_no_other() -> None:
    order = Order([50, 90], [3.0, 1.0], 0, samples_per_step=8, one_source=True)
    steps = [{order[k][0] for k in range(first, first + 8)} for first in range(0, 8000, 8)]
    assert all(len(sources) == 1 for sources in steps)
    assert np.mean([sources == {0} for sources in steps]) == pytest.approx(0.75, abs=0.04)


class Rows:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int, /) -> dict[str, Any]:
        raise AssertionError("the order reads no rows")


@pytest.mark.parametrize(
    "mixture, mean_tokens, share",
    [({}, (), 0.5), ({"temperature": 1}, (), 0.9), ({"temperature": 2}, (), 0.75), ({}, (30.0, 10.0), 0.25)],
)
def test_shares_by_size_and_by_tokens(mixture: dict[str, Any], mean_tokens: tuple[float, ...], share: float) -> None:
    configs = [SourceConfig(kind="x"), SourceConfig(kind="x")]
    order = mixed_order(
        configs,
        [Rows(9000), Rows(1000)],
        MixtureConfig(**mixture),
        seed=0,
        samples_per_step=1,
        mean_tokens=mean_tokens,
    )
    assert np.mean([order[k][0] == 0 for k in range(8000)]) == pytest.approx(share, abs=0.02)


def test_a_long_source_is_shuffled_by_blocks_and_a_shorter_one_if_it_asks_for_them() -> None:
    def blocks_of(length: int, **options: Any) -> bool:
        config = SourceConfig(kind="x", **options)
        order = mixed_order([config], [Rows(length)], MixtureConfig(), seed=0, samples_per_step=1)
        return type(order._shuffles[0]).__name__ == "_ShuffledBlocks"

    assert not blocks_of(2**24) and blocks_of(2**24 + 1) and blocks_of(100, rows_per_block=10)


@pytest.mark.parametrize(
    "weight, told",
    [
        ([], "begin with step 0"),
        ([[5, 1.0]], "begin with step 0"),
        ([[0, 1.0], [0, 2.0]], "let them rise"),
        ([[0, 0.0], [5, 0.0]], "one of them above 0"),
        ([[0, -1.0]], "numbers from 0"),
        ([[0, float("nan")]], "numbers from 0"),
    ],
)
def test_a_curriculum_that_means_nothing_is_refused(weight: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build(SourceConfig, {"kind": "x", "weight": weight}, "data")


def test_a_curriculum_is_read_from_a_recipe() -> None:
    assert build(SourceConfig, {"kind": "x", "weight": [[0, 1], [10, 0.5]]}, "data").weight == [(0, 1.0), (10, 0.5)]


def test_draws_do_not_depend_on_what_was_asked_before() -> None:
    most = [5000, 6000, None]
    whole = Mixture([1.0, 2.0, 0.5], 0, most=most)
    sequence = [whole[d] for d in range(20_000)]
    assert [Mixture([1.0, 2.0, 0.5], 0, most=most)[d] for d in (12_000, 19_999)] == [sequence[12_000], sequence[19_999]]
    assert Counter(source for source, _ in sequence) == {0: 5000, 1: 6000, 2: 9000}


@pytest.mark.parametrize("one_source", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_of_a_step_is_dealt_once_and_every_source_evenly(ranks: int, one_source: bool) -> None:
    order = Order([50, 40, 9], [3.0, 1.0, 1.0], 5, samples_per_step=16, one_source=one_source)
    for step in range(20):
        dealt = [order.dealt(step, 16, rank, ranks) for rank in range(ranks)]
        assert sorted(k for of_rank in dealt for k in of_rank) == list(range(16 * step, 16 * step + 16))
        assert all(of_rank == sorted(of_rank) for of_rank in dealt)
        for source in range(3):
            counts = [sum(order[k][0] == source for k in of_rank) for of_rank in dealt]
            assert max(counts) - min(counts) <= 1
