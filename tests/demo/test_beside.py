"""A function in another process, beside the work of this one."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from molora.demo.beside import beside
from molora.interrupt import Interrupt


def _write(path: Path, text: str) -> None:
    print(f"writing {text}")
    path.write_text(f"{text} by {torch.get_num_threads()}")


def _fail() -> None:
    raise ValueError("no such voice")


def _wait_for_a_signal(path: Path) -> None:
    with Interrupt() as interrupt:
        path.with_suffix(".ready").touch()
        while not interrupt.number:
            time.sleep(0.01)
    path.write_text(signal.Signals(interrupt.number).name)


def test_the_function_runs_with_half_of_the_threads_and_tells_its_log(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with beside(tmp_path / "logs" / "other.log", _write, tmp_path / "written", "this"):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "written").read_text() == "this by 2"
    assert (tmp_path / "logs" / "other.log").read_text() == "writing this\n"


def test_a_failure_of_the_function_is_told_at_the_end(tmp_path: Path) -> None:
    done = False
    failed = pytest.raises(RuntimeError, match=r"other\.log failed \(ValueError: no such voice\)")
    with failed, beside(tmp_path / "other.log", _fail):
        done = True
    assert done and "Traceback" in (tmp_path / "other.log").read_text()


def test_an_error_beside_the_function_stops_it_in_good_order(tmp_path: Path) -> None:
    with pytest.raises(KeyError), beside(tmp_path / "other.log", _wait_for_a_signal, tmp_path / "told"):
        while not (tmp_path / "told.ready").exists():
            time.sleep(0.01)
        raise KeyError
    assert (tmp_path / "told").read_text() == "SIGTERM"
