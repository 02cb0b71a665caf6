"""Python that nobody has read, such as a model's, run in a process that can compute and print, and nothing else.

Refused: processes and threads, the network, writing or making files, signals, and more memory, files and output than
the limits. Survived: what does not end, as it is killed. Not prevented: reading files that the user may read, which the
program can print and send nowhere; and a program that cheats its tests on purpose, as they run in its own process.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from molora.config import require

# For an interpreter to start on a busy machine; the program's own time begins afterwards.
_STARTS_WITHIN_SECONDS = 60.0
_CONFINED = b"confined\n"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may take: `seconds` that pass, and as many of computing; memory; and bytes that it prints."""

    seconds: float = 10.0
    memory_mib: int = 1024
    output_bytes: int = 2**16

    def __post_init__(self) -> None:
        require(self, 64, "memory_mib")
        require(self, 1, "output_bytes")
        if not 0 < self.seconds <= 3600:
            raise ValueError(f"seconds is {self.seconds:g}; give a number above 0, and 3600 at most")


@dataclass(frozen=True)
class Ended:
    """How a program ended: empty if it came to its end, else `why` it did not. `output` is what it printed, errors
    too."""

    why: str
    output: str


class NoSandbox(OSError):
    """This system cannot confine a program; the message says why."""


def run_program(source: str, limits: Limits) -> Ended:
    """Runs a program to its end, or to the first of its limits. Raises NoSandbox where it cannot be confined, before
    any of it runs."""
    if not sys.platform.startswith("linux"):
        raise NoSandbox(f"programs are confined by Linux's seccomp, and this is {sys.platform}")
    token = secrets.token_hex(16).encode() + b"\n"
    verdict, of_child = os.pipe()
    told = {
        "memory_bytes": limits.memory_mib * 2**20,
        "cpu_seconds": int(limits.seconds) + 1,
        "verdict": of_child,
    }
    with open(verdict, "rb", buffering=0) as pipe:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", str(Path(__file__).with_name("inside_sandbox.py")), json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                cwd="/",
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                pass_fds=[of_child],
                start_new_session=True,
            )
        finally:
            os.close(of_child)
        with process:
            try:
                return _watched(process, pipe, token, source, limits)
            finally:
                process.kill()


def _watched(process: subprocess.Popen[bytes], pipe: IO[bytes], token: bytes, source: str, limits: Limits) -> Ended:
    """Gives the program to its process, and reads what that says until it has ended or a limit is reached."""
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin as given:
            given.write(token)
            given.write(source.encode(errors="surrogatepass"))
    except BrokenPipeError:  # it is over before it began, which is seen below
        pass
    said, output = b"", b""
    deadline, why = time.monotonic() + _STARTS_WITHIN_SECONDS, ""
    with selectors.DefaultSelector() as reading:
        for stream in (pipe, process.stdout):
            reading.register(stream, selectors.EVENT_READ)
        while reading.get_map() and said != _CONFINED + token and not why:
            ready = reading.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                why = f"did not end within {limits.seconds:g} seconds"
            for stream in (key.fileobj for key, _ in ready):
                data = os.read(stream.fileno(), 2**16)  # pyright: ignore[reportAttributeAccessIssue]
                if not data:
                    reading.unregister(stream)
                elif stream is process.stdout:
                    output += data
                else:
                    if not said:
                        deadline = time.monotonic() + limits.seconds
                    said = (said + data)[: len(_CONFINED + token) + 200]
            if len(output) > limits.output_bytes:
                why = f"printed more than {limits.output_bytes} bytes"
    text = output[: limits.output_bytes].decode(errors="replace")
    if not said.startswith(_CONFINED):
        process.kill()
        told = said.decode(errors="replace").removeprefix("unconfined: ") or text.strip()
        raise NoSandbox(f"a program cannot be confined here: {told or 'its process did not start'}")
    if not why and said != _CONFINED + token:
        code = process.wait()
        how = f"was ended by signal {-code}" if code < 0 else f"ended early with exit code {code}"
        why = f"{how}: {text.strip().rpartition(chr(10))[2]:.200}" if text.strip() else how
    return Ended(why, text)
