"""Work beside work. The models of the demo are small, and two threads of one process wait for each other more than they
compute; two processes with a thread each do not."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from molora.process import settle_in


@contextmanager
def beside(log: Path, function: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """While entered, another process calls the function, and each of the two has half of the threads. What it prints is
    added to `log`. Leaving waits for it; leaving by an error or a signal ends it with SIGTERM.

    Raises RuntimeError if the function failed; `log` then ends with its error."""
    threads = torch.get_num_threads()
    half = max(1, threads // 2)
    log.parent.mkdir(parents=True, exist_ok=True)
    process = get_context("spawn").Process(target=_call, args=(log, half, function, arguments))
    process.start()
    torch.set_num_threads(half)
    try:
        yield
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    finally:
        torch.set_num_threads(threads)
    if process.exitcode:
        last = log.read_text().rstrip().rpartition("\n")[2]
        raise RuntimeError(f"the process that wrote {log} failed ({last}); mend that, and start the demo again")


def _call(log: Path, threads: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which ends this process when it has to
    settle_in()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    torch.set_num_threads(threads)
    function(*arguments)


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
