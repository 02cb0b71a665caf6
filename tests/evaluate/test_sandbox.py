"""Programs that mean harm are refused or survived, and ordinary ones come to their end."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from molora.evaluate import inside_sandbox
from molora.evaluate.sandbox import Limits, NoSandbox, run_program

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")

SHORT = Limits(seconds=1.0, memory_mib=256, output_bytes=4096)
# What ends by itself gets the time that a busy machine may need.
LONG = replace(SHORT, seconds=60.0)
REFUSED = "not permitted"

# What each does, and what its end says.
HOSTILE = {
    "a fork bomb": ("import os\nwhile True: os.fork()", REFUSED),
    "a process by vfork and exec": ("import subprocess\nsubprocess.run(['true'])", REFUSED),
    "another program in its place": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'id'])", REFUSED),
    "a shell": ("import os\nassert os.system('true') == 0", "AssertionError"),
    "a spawned process": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        REFUSED,
    ),
    "threads without end": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "can't start new thread",
    ),
    "memory at once": ("bytearray(2**33)", "MemoryError"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
    "memory of a mapping": ("import mmap\nmmap.mmap(-1, 2**34)", "Cannot allocate memory"),
    "more memory by a new limit": (
        "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
        "not allowed to raise maximum limit",
    ),
    "the limits of the parent": ("import os, resource as r\nr.prlimit(os.getppid(), r.RLIMIT_NOFILE, (1, 1))", REFUSED),
    "a number that grows": ("9 ** 9 ** 9 ** 9", "did not end"),
    "an endless loop": ("while True: pass", "did not end"),
    "an endless loop that keeps what stops it": (
        "import signal\nfor s in (14, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "did not end",
    ),
    "an endless sleep": ("import time\ntime.sleep(1e6)", "did not end"),
    "a search without end": ("import re\nre.match('(a+)+$', 'a' * 99 + 'b')", "did not end"),
    "endless output": ("while True: print('x' * 1000)", "printed more than 4096 bytes"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "printed more than 4096 bytes"),
    "endless recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        "signal|RecursionError|Memory|did not end",
    ),
    "a file in the folder of files for a while": ("open('/tmp/molora-was-here', 'w')", REFUSED),
    "a file by a name of its own": (
        "import tempfile\ntempfile.NamedTemporaryFile()",
        "No usable temporary|not permitted",
    ),
    "a file that is emptied": ("import os\nos.open(VICTIM, os.O_RDONLY | os.O_TRUNC)", REFUSED),
    "a file that is taken away": ("import os\nos.remove(VICTIM)", REFUSED),
    "a file that is renamed": ("import os\nos.rename(VICTIM, VICTIM + '2')", REFUSED),
    "a file whose mode is changed": ("import os\nos.chmod(VICTIM, 0o777)", REFUSED),
    "a link to a file": ("import os\nos.symlink(VICTIM, VICTIM + '3')", REFUSED),
    "a folder": ("import os\nos.mkdir(VICTIM + '4')", REFUSED),
    "a socket": ("import socket\nsocket.socket()", REFUSED),
    "a socket of the machine": ("import socket\nsocket.socketpair()", REFUSED),
    "a name that is looked up": ("import socket\nsocket.create_connection(('example.com', 80))", "gaierror"),
    "a signal to the parent": ("import os\nos.kill(os.getppid(), 9)", REFUSED),
    "a signal to everyone": ("import os\nos.kill(-1, 9)", REFUSED),
    "a signal by way of a descriptor": ("import fcntl, os\nfcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", REFUSED),
    "descriptors without end": ("import os\nwhile True: os.dup(1)", "Too many open files"),
    "another root": ("import os\nos.chroot('/tmp')", REFUSED),
    "another priority": ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", REFUSED),
    "shared memory": ("from multiprocessing import shared_memory as s\ns.SharedMemory('x', True, 99)", REFUSED),
    "memory of the parent": (
        "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nassert l.ptrace(16, os.getppid(), 0, 0) == 0",
        "AssertionError",
    ),
    "an end that looks good": ("import os\nos._exit(0)", "exit code 0"),
    "an end by an exception that looks good": ("raise SystemExit", "exit code 0"),
    "a verdict of its own": (
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'confined\\n' + b'0' * 32 + b'\\n')\n"
        "  except OSError: 0\nos._exit(0)",
        "exit code 0",
    ),
}


def test_there_are_as_many_hostile_programs_as_promised() -> None:
    assert len(HOSTILE) >= 30


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused_or_survived(name: str, tmp_path: Path) -> None:
    source, says = HOSTILE[name]
    victim = tmp_path / "victim"
    victim.write_text("whole")
    mode = victim.stat().st_mode
    ended = run_program(source.replace("VICTIM", repr(str(victim))), SHORT if "did not end" in says else LONG)
    assert re.search(says, ended.why), ended
    assert len(ended.output) <= SHORT.output_bytes
    assert victim.read_text() == "whole" and victim.stat().st_mode == mode and len(list(tmp_path.iterdir())) == 1
    assert not Path("/tmp/molora-was-here").exists()


ORDINARY = """
import bisect, collections, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, itertools, json
import math, operator, os, random, re, statistics, string, sys, time, typing
import numpy
@functools.cache
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
assert fib(90) == 2880067194370816120
assert numpy.linalg.solve(numpy.eye(3) * 2, numpy.ones(3)).tolist() == [0.5, 0.5, 0.5]
assert json.loads(json.dumps({"a": [1.5, None]})) == {"a": [1.5, None]}
assert open(__import__("os").__file__).read(1)
assert sorted(os.listdir("/")) and datetime.datetime.now() and random.random() < 1
time.sleep(0.01)
print("done", file=sys.stderr)
"""


def test_an_ordinary_program_comes_to_its_end() -> None:
    ended = run_program(ORDINARY, Limits(seconds=60.0))
    assert (ended.why, ended.output) == ("", "done\n")


def test_a_program_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    ended = run_program("import os\nprint('JUDGE_KEY' in os.environ, os.getcwd(), os.isatty(0))", LONG)
    assert (ended.why, ended.output) == ("", "False / False\n")


def test_what_is_wrong_is_told_by_the_last_line() -> None:
    assert run_program("assert 1 == 2, 'one is not two'", LONG).why == (
        "ended early with exit code 1: AssertionError: one is not two"
    )
    assert "SyntaxError" in run_program("def f(:", LONG).why


def test_where_nothing_can_be_confined_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the calls of riscv64 are not known"):
        inside_sandbox.call_filter("riscv64")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(NoSandbox, match="and this is darwin"):
            run_program("print(1)", SHORT)
    # An interpreter whose process cannot confine itself.
    script = tmp_path / "python"
    says = "os.write(json.loads(sys.argv[4])['verdict'], b'unconfined: no')"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\n{says}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(NoSandbox, match="a program cannot be confined here: no"):
        run_program("print(1)", SHORT)


def test_a_program_does_not_outlive_who_asked_for_it(tmp_path: Path) -> None:
    """The child of a process that is killed is killed too."""
    asks = "import sys; from molora.evaluate.sandbox import *; run_program('while True: pass', Limits(seconds=600))"
    parent = subprocess.Popen([sys.executable, "-c", asks])
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    deadline = time.monotonic() + 120
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = map(int, found)
    while b"inside_sandbox" not in Path(f"/proc/{child}/cmdline").read_bytes() or _state(child) != "2":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while _state(child) not in ("gone", "Z"):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.05)


def _state(pid: int) -> str:
    """Its seccomp mode, 2 where a filter decides; Z for one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    if re.search(r"^State:\s+Z", status, re.MULTILINE):
        return "Z"
    found = re.search(r"^Seccomp:\s+(\d)", status, re.MULTILINE)
    return found[1] if found else "gone"


@pytest.mark.parametrize(
    ("header", "column"),
    [(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_of_calls_are_those_of_the_system(header: str, column: int) -> None:
    if not os.path.exists(header):
        pytest.skip(f"no {header}; apt-get install linux-libc-dev")
    text = Path(header).read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}
    if column:
        known["newfstatat"] = known["fstatat"]  # its name in the table
    ours = {**inside_sandbox.ALLOWED, **inside_sandbox.CONDITIONAL, **inside_sandbox.MISSING}
    for name, numbers in ours.items():
        assert numbers[column] == known.get(name), name
