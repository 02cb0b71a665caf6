"""A phase in two processes that are ranks of one run."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.demo.two import in_two
from molora.interrupt import Interrupt, Stopped
from molora.ranks import launched_ranks


def _about_itself(word: str) -> list[Any]:
    ranks = launched_ranks()
    if ranks.is_main:
        print(f"the first rank says {word}")
    return ranks.gather([(ranks.index, ranks.count, os.getpid(), torch.get_num_threads())])


def _fail_in_one(folder: Path) -> None:
    ranks = launched_ranks()
    (folder / f"{ranks.index}").write_text(str(os.getpid()))
    ranks.wait()
    if ranks.index == 1:
        raise ValueError("no such voice")
    ranks.wait()


def _die_in_one(folder: Path) -> None:
    ranks = launched_ranks()
    (folder / f"{ranks.index}").write_text(str(os.getpid()))
    ranks.wait()
    if ranks.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()


def _wait_for_a_signal(folder: Path) -> None:
    ranks = launched_ranks()
    with Interrupt() as interrupt:
        (folder / f"{ranks.index}").write_text(str(os.getpid()))
        while not interrupt.number:
            time.sleep(0.01)
    (folder / f"stopped {ranks.index}").touch()
    raise Stopped("all is saved", interrupt.number)


def _wait_in_two(folder: Path) -> None:
    torch.set_num_threads(2)
    in_two(_wait_for_a_signal, folder)


def _await(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, [path.name for path in paths]
        time.sleep(0.02)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.usefixtures("two_threads")
def test_both_processes_are_ranks_with_half_of_the_threads(capfd: pytest.CaptureFixture[str]) -> None:
    (first, second), again = in_two(_about_itself, "this"), in_two(_about_itself, "that")
    assert first[:2] + first[3:] == (0, 2, 1) and second[:2] + second[3:] == (1, 2, 1)
    assert len({first[2], second[2], again[0][2], os.getpid()}) == 4
    assert capfd.readouterr().out == "the first rank says this\nthe first rank says that\n"


def test_with_one_thread_the_phase_runs_here() -> None:
    assert in_two(_about_itself, "this") == [(0, 1, os.getpid(), 1)]


@pytest.mark.usefixtures("two_threads")
def test_an_error_of_a_rank_is_told_once_and_ends_the_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("no such voice")) as raised:
        in_two(_fail_in_one, tmp_path)
    assert "in _fail_in_one" in raised.value.__notes__[0]
    assert not any(_is_alive((tmp_path / rank).read_text()) for rank in "01")


@pytest.mark.usefixtures("two_threads")
def test_a_kill_of_a_rank_is_told_and_ends_the_other(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"two processes was ended by SIGKILL; .*memory runs out"):
        in_two(_die_in_one, tmp_path)
    assert not any(_is_alive((tmp_path / rank).read_text()) for rank in "01")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_both_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt() -> None:
        _await(tmp_path / "0", tmp_path / "1")
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Stopped, match="all is saved") as raised:
        in_two(_wait_for_a_signal, tmp_path)
    assert raised.value.exit_code == 128 + number
    assert (tmp_path / "stopped 0").exists() and (tmp_path / "stopped 1").exists()


def test_ranks_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = get_context("forkserver").Process(target=_wait_in_two, args=(tmp_path,))
    parent.start()
    _await(tmp_path / "0", tmp_path / "1")
    parent.kill()
    _await(tmp_path / "stopped 0", tmp_path / "stopped 1")
