"""What the command line sets for its process, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from molora.process import WAITING

_HELP = """
import os, sys
from molora.cli.commands import main
sys.argv = ["molora", "--help"]
try: main()
except SystemExit: pass
"""
_KEPT = """
import psutil
block = bytearray(100 * 2**20)
block[:] = b"1" * len(block)
del block
print(psutil.Process().memory_info().rss > 100 * 2**20)
"""


def told(code: str, given: dict[str, str]) -> str:
    """The last line that the command line's process prints when it has `given` in its environment, and no more."""
    ours = (*WAITING, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    command = [sys.executable, "-c", _HELP + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()[-1]


@pytest.mark.parametrize(("given", "expected"), [({}, "passive 5000"), ({"OMP_WAIT_POLICY": "active"}, "active None")])
def test_waiting_threads_do_not_spin_unless_the_user_says_so(given: dict[str, str], expected: str) -> None:
    assert told(f"print(*map(os.environ.get, {[*WAITING]}), 'torch' in sys.modules)", given) == f"{expected} False"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="memory is kept where there is glibc")
@pytest.mark.parametrize(("given", "kept"), [({}, "True"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False")])
def test_memory_that_is_freed_is_kept_unless_the_user_says_so(given: dict[str, str], kept: str) -> None:
    assert told(_KEPT, given) == kept
