"""Ranks that are killed or told to stop at any instant, saves included, and a run that ends as if they had not been.

The instants begin when the ranks have met: until then nobody can tell a rank that has died from one that comes late,
and the launcher ends the others.

`make chaos KILLS=200 SEED=1` kills so many, at moments that the seed draws.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from molora.config import dump
from tests.train.test_train import (
    home,  # noqa: F401
    in_processes,
    met,
    outcome,
    recipe,
    started,
)

KILLS, SEED = (int(os.environ.get(name, default)) for name, default in (("KILLS", 4), ("SEED", 0)))
# What ends a rank: itself, at a rename of a file; a kill; a signal that asks for a state to go on from.
ENDS = ("in a save", signal.SIGKILL, signal.SIGTERM)
KINDS = [(2, False), (2, True), (4, False), (4, True)]
LONGEST_END = 60  # seconds until the ranks that are left have ended, or are taken for ones that wait for ever


def written(home: Path, run: Path, *, sharded: bool) -> Path:  # noqa: F811
    """A recipe of two stages, with dropout, and with evaluations in which one rank has more to answer than another."""
    config = recipe(home, run, shard_backbone=sharded)
    config.evaluations["rows"].data.limit = 3
    path = run.with_suffix(".yaml")
    path.write_text(dump(config))
    return path


@pytest.fixture(scope="module")
def straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[dict[str, Any], float]]:  # noqa: F811
    """The outcome of a run of so many ranks, with the backbone whole in each, and the seconds that it took."""

    @cache
    def of(count: int) -> tuple[dict[str, Any], float]:
        run = tmp_path_factory.mktemp("straight") / "run"
        begun = time.monotonic()
        in_processes(written(home, run, sharded=False), count)
        return outcome(run), time.monotonic() - begun

    return of


@pytest.mark.parametrize(("count", "sharded"), KINDS)
def test_ranks_that_are_ended_at_any_instant_leave_a_run_that_ends_as_if_they_had_not_been(
    home: Path,  # noqa: F811
    tmp_path: Path,
    straight: Callable[[int], tuple[dict[str, Any], float]],
    count: int,
    sharded: bool,
) -> None:
    expected, seconds = straight(count)
    run = tmp_path / "run"
    path = written(home, run, sharded=sharded)
    draw = random.Random(f"{SEED} {count} {sharded}")
    ended = 0
    while ended < KILLS / len(KINDS):
        end, victim, moment = draw.choice(ENDS), draw.randrange(count), draw.uniform(0, 1) * seconds
        ranks = started(path, count, draw.randint(1, 40) if end == "in a save" else None)
        if isinstance(end, signal.Signals):
            wait_until(lambda: all(met(path.with_name(f"rank {rank}")).exists() for rank in range(count)), ranks)
            ranks[victim].join(moment)
            if ranks[victim].is_alive():
                os.kill(ranks[victim].pid, end)
        for rank in ranks:
            rank.join(seconds + LONGEST_END)
        told = f"{ended} ends, then {end} of rank {victim} after {moment:.1f} s"
        assert not any(rank.is_alive() for rank in ranks), f"{told}: a rank waits for one that is gone"
        ended += any(rank.exitcode != 0 for rank in ranks)
        if any(rank.exitcode == 0 for rank in ranks):  # one saw the end: begin again, so that something is left to end
            in_processes(path, count)
            assert_ended_alike(run, expected, told)
            shutil.rmtree(run)
    in_processes(path, count)
    assert_ended_alike(run, expected, f"{ended} ends")


def wait_until(so: Callable[[], bool], ranks: list[Any]) -> None:
    for _ in range(12_000):
        if so():
            return
        assert all(rank.is_alive() for rank in ranks), [rank.exitcode for rank in ranks]
        time.sleep(0.005)
    raise AssertionError("the ranks do not meet")


def assert_ended_alike(run: Path, expected: dict[str, Any], told: str) -> None:
    ours = outcome(run)
    assert "rows/answered" in ours["rows"][-1]
    for key in expected:
        assert ours[key] == expected[key], f"{told}: {key} differ"
