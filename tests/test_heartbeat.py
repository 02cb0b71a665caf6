"""A rank that dies, hangs or fails alone ends the others in seconds, and they name it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from molora import heartbeat
from molora.heartbeat import together
from molora.ranks import Ranks, launched_ranks

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["molora.cli.commands", "molora.train.loop", "molora.testing"])


def work(rank: int, port: int, folder: Path, fault: str, calm: bool) -> None:
    """Sums with the other ranks for as long as they do, until rank 1 has its fault."""
    torch.set_num_threads(1)
    os.environ.update(
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"},
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    told = os.open(folder / f"rank {rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(told, 2)
    heartbeat.SILENCE_SECONDS = 3.0
    ranks = launched_ranks("cpu")
    try:
        with together(ranks):
            for step in range(5 if calm else 10**6):
                if rank == 1 and step == 3 and not calm:
                    (folder / "about to").touch()
                    have(fault)
                    continue
                total_of(ranks, step)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def total_of(ranks: Ranks, step: int) -> None:
    assert ranks.sum(torch.tensor([float(step)])).item() == 3 * step
    time.sleep(0.02)


def have(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "failed":
        raise ValueError("no such row")


def start(folder: Path, fault: str, *, calm: bool = False) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=work, args=(rank, port, folder, fault, calm)) for rank in range(3)]
    for process in ranks:
        process.start()
    return ranks


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("killed", "has died"),
        ("stopped", "has died, or was not heard of for "),
        ("failed", "failed: ValueError: no such row"),
    ],
)
def test_one_ranks_end_is_the_end_of_all_and_has_its_name(tmp_path: Path, fault: str, what: str) -> None:
    ranks = start(tmp_path, fault)
    try:
        ranks[0].join(60)
        ranks[2].join(60)
        assert [ranks[0].exitcode, ranks[2].exitcode] == [1, 1]
        who = f"rank 1 of 3 (process {ranks[1].pid} on {socket.gethostname()}) {what}"
        for rank in (0, 2):
            assert who in (tmp_path / f"rank {rank}").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_ranks_that_do_their_work_say_nothing(tmp_path: Path) -> None:
    ranks = start(tmp_path, "none", calm=True)
    for rank, process in enumerate(ranks):
        process.join(60)
        assert process.exitcode == 0 and "rank " not in (tmp_path / f"rank {rank}").read_text()
