"""A phase of the demo in two processes. The models of the demo are small, and two threads of one process wait for each
other more than they compute; two ranks with a thread each do not."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context, parent_process, set_start_method
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import distributed

from molora.process import settle_in

_T = TypeVar("_T")

# How long a rank may take to tell of itself, and to leave in good order, when the other one has failed.
_TELLING_SECONDS, _LEAVING_SECONDS = 2, 20


class _Told(NamedTuple):
    """What a rank says at its end, and when by the machine's clock, which is one for both."""

    seconds: float
    result: Any
    error: BaseException | None


def in_two(phase: Callable[..., _T], *arguments: Any) -> _T:
    """What the first of two ranks returns. Each calls `phase(*arguments)` in a process of its own, in which
    `launched_ranks` knows both, with half of this process's threads. With one thread, or where there is a GPU, the
    phase is called here. SIGINT and SIGTERM are passed on to the ranks.

    Raises the first error of a rank, and RuntimeError if one was killed; the other one is ended then."""
    threads = torch.get_num_threads()
    if threads < 2 or torch.accelerator.is_available():
        return phase(*arguments)
    forks = get_context("forkserver")
    forks.set_forkserver_preload([phase.__module__])
    with tempfile.TemporaryDirectory(prefix="molora-ranks-") as folder, _ranks() as ranks, _passed_on(ranks):
        for rank in range(2):
            ours, its = forks.Pipe(duplex=False)
            outputs = [Connection(os.dup(number), readable=False) for number in (1, 2)]
            given = (rank, threads // 2, Path(folder) / "meeting", its, outputs, phase, arguments)
            process = forks.Process(target=_be_rank, args=given)
            process.start()
            ranks[process] = ours
            for connection in (its, *outputs):
                connection.close()
        return _result(ranks)


@contextmanager
def _ranks() -> Iterator[dict[BaseProcess, Connection]]:
    """Processes, and where each tells its end. When this is left all of them have ended."""
    ranks: dict[BaseProcess, Connection] = {}
    try:
        yield ranks
        for process in ranks:
            process.join(_LEAVING_SECONDS)
    finally:
        for process in ranks:
            process.terminate()
        for process, connection in ranks.items():
            process.join(_LEAVING_SECONDS)
            process.kill()
            process.join()
            connection.close()


@contextmanager
def _passed_on(ranks: dict[BaseProcess, Connection]) -> Iterator[None]:
    """While entered, what stops this process stops the ranks, whose ends then tell the rest."""

    def pass_on(number: int, _: object) -> None:
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _result(ranks: dict[BaseProcess, Connection]) -> Any:
    """What the first rank returned, once both have. Raises the first error, which the other rank may have met as a
    connection that was closed."""
    told: dict[BaseProcess, _Told] = {}
    while len(told) < len(ranks):
        left = [process for process in ranks if process not in told]
        failed = any(each.error for each in told.values())
        signs = [ranks[process] for process in left] + [process.sentinel for process in left]
        ready = wait(signs, _TELLING_SECONDS if failed else None)
        if not ready:
            break
        for process in left:
            if ranks[process].poll():
                told[process] = _hear(process, ranks[process])
            elif process.sentinel in ready:
                _end_without_word(process)
    first = min((each for each in told.values() if each.error), default=None, key=lambda each: each.seconds)
    if first is not None and first.error is not None:
        raise first.error
    return told[next(iter(ranks))].result


def _hear(process: BaseProcess, connection: Connection) -> _Told:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        _end_without_word(process)


def _end_without_word(process: BaseProcess) -> NoReturn:
    process.join()
    code = process.exitcode or 0
    by = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
    hint = "; the system ends processes so where memory runs out" if by == "SIGKILL" else ""
    raise RuntimeError(f"one of the demo's two processes was ended by {by}{hint}. Start the demo again: it goes on")


def _be_rank(
    rank: int,
    threads: int,
    meeting: Path,
    told: Connection,
    outputs: list[Connection],
    phase: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which passes it on
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number, output in enumerate(outputs, start=1):
        os.dup2(output.fileno(), number)
    settle_in()
    set_start_method(get_all_start_methods()[0], force=True)  # of data workers: as in other processes
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(launched, OMP_NUM_THREADS=str(threads), GLOO_SOCKET_IFNAME=loopback)
    torch.set_num_threads(threads)
    result, error = None, None
    try:
        distributed.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=2)
        result = phase(*arguments)
    except BaseException as raised:
        error = _sendable(raised)
    told.send_bytes(pickle.dumps(_Told(time.monotonic(), result, error)))


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _sendable(error: BaseException) -> BaseException:
    """The error, with its traceback as a note; one that cannot be sent is a RuntimeError that says the same."""
    note = "".join(traceback.format_exception(error))
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error
