"""How a process of ours uses the machine: how its threads wait, and what becomes of memory that is freed."""

import ctypes
import os

# By OpenMP's default, threads spin while they wait for each other. Where another process is busy, they take the core
# that they wait for. These sleep, after a moment long enough for the next product to come. OpenMP reads it when torch
# is imported. Measured by benchmarks/busy_machine.py.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}

# Names and numbers of glibc's malloc.h: below which size memory comes from the heap, and how much of it may lie free.
_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
_KEPT_BYTES = 2**30


def settle_in() -> None:
    """Sets what the user's environment leaves open. By glibc's default, memory of large tensors goes back to the system
    when it is freed, and the next tensor's comes page by page: a step that trains a Conformer took 1.6 times as
    long."""
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None and not _MALLOPT.keys() & os.environ.keys():
        for parameter in _MALLOPT.values():
            mallopt(parameter, _KEPT_BYTES)
