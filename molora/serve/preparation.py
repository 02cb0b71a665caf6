"""Requests to samples, beside the model: text in a thread, media in processes that are bounded in time and memory.

A picture or a clip may take a decoder minutes, or all memory, or kill it. So media are decoded in processes that can be
ended, forked from one that was forked when the server began and has done nothing since: no lock of the server's threads
is held in it, and plugins are there as the server has them.
"""

import asyncio
import copy
import math
import os
import pickle
import queue
import resource
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from molora.data.loader import Joined, join
from molora.data.messages import Message
from molora.data.processor import Processor
from molora.data.prompt import Tools
from molora.interrupt import leave_interrupts_to_parent
from molora.modality import MediaError
from molora.pack import Sample


@dataclass(frozen=True, kw_only=True)
class PreparationLimits:
    """How many processes decode media, and what each of them may take for one request."""

    processes: int = 2
    seconds: float = 30.0
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        for name in ("processes", "seconds", "memory_gib"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"media {name} cannot be {getattr(self, name)}; give a finite number above 0")


class Preparation:
    """Turns conversations into samples. Made, and closed, in the process that serves, before it has other threads."""

    def __init__(self, processor: Processor, limits: PreparationLimits) -> None:
        self.limits = limits
        # Of its own, as a tokenizer is not to be used by two threads at a time.
        self._of_text = copy.deepcopy(processor)
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._media_threads = ThreadPoolExecutor(limits.processes, thread_name_prefix="media")
        self._nursery = _Nursery(processor, int(limits.memory_gib * 2**30))
        self._idle: queue.SimpleQueue[_Child | None] = queue.SimpleQueue()
        for _ in range(limits.processes):
            self._idle.put(None)

    async def sample(self, messages: Sequence[Message], id: str, tools: Tools = ()) -> Sample:
        """A conversation as a sample to answer, with `tools` that the model may call.

        Raises what `Processor.encode` raises, and MediaError for media that take too long, or more memory than they
        may.
        """
        loop = asyncio.get_running_loop()
        if _has_media(messages):
            return await loop.run_in_executor(self._media_threads, self._in_process, messages, id, tools)
        return await loop.run_in_executor(self._text_thread, self._encode, messages, id, tools)

    async def text_ids(self, text: str) -> list[int]:
        """The tokens of a text, as `Processor.text_ids` gives and refuses them."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._text_thread, self._of_text.text_ids, text, "the prompt")

    def _encode(self, messages: Sequence[Message], id: str, tools: Tools) -> Sample:
        return self._of_text.encode(messages, id, generate=True, tools=tools)

    def _in_process(self, messages: Sequence[Message], id: str, tools: Tools) -> Sample:
        child = self._idle.get()
        try:
            child = child or self._nursery.child()
            found = child.answer(pickle.dumps((messages, id, tools)), self.limits.seconds)
        except (EOFError, OSError, TimeoutError) as error:
            if child is None:
                raise RuntimeError("no process can be made that decodes media; is there memory?") from error
            child.end()
            child = None
            slow = isinstance(error, TimeoutError)
            told = f"took longer than {self.limits.seconds:g} seconds" if slow else "ended its decoder"
            raise MediaError(f"sample {id}: reading its media {told}; send smaller ones, or other files") from error
        finally:
            self._idle.put(child)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends all processes and threads, when what is under way is done."""
        self._text_thread.shutdown(cancel_futures=True)
        self._media_threads.shutdown(cancel_futures=True)
        for _ in range(self.limits.processes):
            if child := self._idle.get():
                child.end()
        self._nursery.close()


def _has_media(messages: Sequence[Message]) -> bool:
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(not isinstance(part, Mapping) or part.get("type") != "text" for part in parts)


class _Child:
    """A process that prepares one request after the other."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pid: int = connection.recv()

    def answer(self, asked: bytes, seconds: float) -> Any:
        """A sample, or an exception. Raises TimeoutError after so many seconds, EOFError or OSError if it ends."""
        self._connection.send_bytes(asked)
        if not self._connection.poll(seconds):
            raise TimeoutError
        pickled = self._connection.recv_bytes()
        tensors = bytearray(self._connection.recv_bytes())
        return Joined(pickled, torch.frombuffer(tensors, dtype=torch.uint8) if tensors else torch.empty(0)).parted()

    def end(self) -> None:
        if not self._connection.poll() and os.path.exists(f"/proc/{self._pid}"):
            os.kill(self._pid, signal.SIGKILL)
        self._connection.close()


class _Nursery:
    """A process that forks children when it is asked to. It and they end when the server does."""

    def __init__(self, processor: Processor, memory_bytes: int) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _run(partial(_fork_children, theirs, processor, memory_bytes))
        theirs.close()

    def child(self) -> _Child:
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            socket.send_fds(self._control, [b"."], [theirs.fileno()])
        return _Child(Connection(ours.detach()))

    def close(self) -> None:
        # Whoever else was forked from this process may hold a copy of it.
        self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        os.waitpid(self._pid, 0)


def _run(work: Callable[[], None]) -> None:
    """In a forked process: the work, and its end, without what the parent would do at its own."""
    code = 1
    try:
        leave_interrupts_to_parent()
        work()
        code = 0
    finally:
        os._exit(code)


def _fork_children(control: socket.socket, processor: Processor, memory_bytes: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        told, files, *_ = socket.recv_fds(control, 1, 1)
        if not told:
            return
        if os.fork() == 0:
            control.close()
            _run(partial(_prepare_requests, Connection(files[0]), processor, memory_bytes))
        os.close(files[0])


def _prepare_requests(connection: Connection, processor: Processor, memory_bytes: int) -> None:
    torch.set_num_threads(1)
    most = _data_bytes() + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    connection.send(os.getpid())
    while True:
        try:
            messages, id, tools = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            found = join(processor.encode(messages, id, generate=True, tools=tools))
        except Exception as error:
            found = join(error)
        connection.send_bytes(found.pickled)
        connection.send_bytes(found.tensor_bytes.numpy().tobytes())


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process by now."""
    with open("/proc/self/status", encoding="ascii") as file:
        (kilobytes,) = (line.split()[1] for line in file if line.startswith("VmData:"))
    return int(kilobytes) * 1024
