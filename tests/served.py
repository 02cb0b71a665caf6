"""Python modules run as commands, without the wait for their imports: a server that has the libraries forks for each.

with serving(folder) as python:  # the path of a program
    subprocess.run([python, "-m", "molora", "doctor"])
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

PRELOADED = ("molora.train.loop", "molora.verify.promises", "molora.plugin_kit.scaffold", "molora.testing")

# It imports little, as it starts each time.
_CLIENT = """#!{python} -S
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
server.sendall(order)
sys.exit(int(server.recv(8) or b"1"))
"""


@contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """The path of a program that runs `-m MODULE ARGUMENT…` in a process of its own, forked from a server."""
    address, program = folder / "socket", folder / "python"
    program.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(address))
        listening.listen()
        command = [sys.executable, __file__, str(listening.fileno())]
        path = os.pathsep.join(filter(None, sys.path))
        server = subprocess.Popen(command, pass_fds=[listening.fileno()], env={**os.environ, "PYTHONPATH": path})
        try:
            yield program
        finally:
            server.kill()
            server.wait()


def _serve(listening: socket.socket) -> None:
    for name in PRELOADED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes
    while True:
        caller, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listening.close()
            _run(caller)
        caller.close()


def _run(caller: socket.socket) -> None:
    """In the forked process: what was ordered, its exit code to the caller, and the end."""
    size, files, *_ = socket.recv_fds(caller, 8, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    order = b""
    while len(order) < int.from_bytes(size, "big"):
        order += caller.recv(1 << 16)
    (_, module, *arguments), directory, environment = json.loads(order)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(str(code).encode())
    os._exit(code)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
