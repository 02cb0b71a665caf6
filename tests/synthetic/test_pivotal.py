"""The search for pivotal tokens on solutions whose probabilities are known: what it finds, and for how many draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest

from molora.synthetic.pivotal import Prefix, SearchConfig, difference, search

NUM_TOKENS = 64
Truth = tuple[list[float], set[int], bool]


def planted(draw: random.Random) -> Truth:
    """The probability behind each prefix, the pivotal tokens, and how the solution ended. Moves are one way, as what
    moves there and back between two cuts cannot be seen."""
    places = sorted(draw.sample(range(2, NUM_TOKENS - 2), draw.choice([0, 1, 2])))
    levels = {0: [0.5], 1: [0.5, 0.95], 2: [0.35, 0.65, 0.97]}[len(places)]
    rises = draw.random() < 0.5
    levels = levels if rises else [1 - level for level in levels]
    behind = [levels[sum(place < length for place in places)] for length in range(NUM_TOKENS + 1)]
    ends_right = rises if places else draw.random() < 0.5
    behind[-1] = float(ends_right)
    return behind, {n for n in range(NUM_TOKENS) if abs(behind[n + 1] - behind[n]) >= 0.2}, ends_right


def sequential(truth: Truth, draw: random.Random) -> tuple[set[int], int]:
    """What the search finds, and its draws."""
    behind, _, ends_right = truth
    steps, draws = search(NUM_TOKENS, Prefix(0), ends_right, SearchConfig()), 0
    try:
        while True:
            for prefix, count in next(steps):
                while len(prefix.draws) < count:
                    prefix.draws.append((0, draw.random() < behind[prefix.length]))
                    draws += 1
    except StopIteration as end:
        return {pivot.place for pivot in end.value[0]}, draws


def fixed(truth: Truth, draw: random.Random, count: int) -> tuple[set[int], int]:
    """The published search: halves wherever estimates of so many draws differ by the threshold."""
    behind, _, ends_right = truth
    known = {NUM_TOKENS: float(ends_right)}

    def share(length: int) -> float:
        if length not in known:
            known[length] = sum(draw.random() < behind[length] for _ in range(count)) / count
        return known[length]

    found, stretches = set(), [(0, NUM_TOKENS)]
    while stretches:
        first, last = stretches.pop()
        if abs(share(last) - share(first)) < 0.2:
            continue
        if last == first + 1:
            found.add(first)
        else:
            stretches += [(first, (first + last) // 2), ((first + last) // 2, last)]
    return found, count * (len(known) - 1)


def tried(find: Callable[[Truth, random.Random], tuple[set[int], int]], number: int) -> tuple[float, float]:
    """The share of solutions of which anything is missed or found for nothing, and the draws of a solution."""
    wrong = draws = 0
    for seed in range(number):
        draw = random.Random(seed)
        truth = planted(draw)
        found, some = find(truth, draw)
        wrong += found != truth[1]
        draws += some
    return wrong / number, draws / number


def test_planted_tokens_are_found_and_no_others_for_half_the_draws_of_a_fixed_number() -> None:
    wrong, draws = tried(sequential, 200)
    assert wrong <= 0.05
    # The fixed search errs more with 160 draws behind a prefix, which are nearly twice as many in all.
    others = {count: tried(partial(fixed, count=count), 200) for count in (10, 80, 160, 240)}
    assert others[10][0] > others[80][0] > others[160][0] > wrong
    assert draws <= others[240][1] / 2


def test_the_interval_of_a_difference_holds_it() -> None:
    draw = random.Random(0)
    held = 0
    for _ in range(2000):
        before, after = (Prefix(0, draws=[(0, draw.random() < share) for _ in range(40)]) for share in (0.3, 0.8))
        low, high = difference(before, after, 1.96)
        held += low <= 0.5 <= high
    assert 0.93 <= held / 2000 <= 0.98


def test_the_end_is_known_and_never_drawn() -> None:
    steps = search(3, Prefix(0), True, SearchConfig())
    wanted = next(steps)
    assert all(prefix.length < 3 for prefix, _ in wanted)
    assert Prefix(3, known=True).interval(2.0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"most": 4}, "most is 4; give 16 or more"),
        ({"threshold": 0}, "threshold is 0; give a share above 0 and below 1"),
        ({"confidence": 0.4}, "^confidence is 0.4; give a share from 0.5 to below 1"),
        ({"lowest": 0.9}, "lowest is 0.9 and highest 0.8"),
        ({"stretch": 0}, "stretch"),
    ],
)
def test_settings_that_make_no_sense_are_told(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(**options)  # pyright: ignore[reportArgumentType]
