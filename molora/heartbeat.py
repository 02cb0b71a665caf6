"""A process that dies, or fails alone, ends the others of its run in seconds, and they say which it was.

Else ranks that wait for each other's numbers end with a time-out of ten minutes and more, without a name. Until they
have met, one that has died cannot be told from one that comes late: torchrun ends the others then.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molora.ranks import Ranks

BEAT_SECONDS = 1.0
# A process that has not been heard of for so long is taken for dead; the longest that one that lives is held up.
SILENCE_SECONDS = 20.0
# For a rank's own error, which may say more, to be printed before another one's end ends it.
_GRACE_SECONDS = 3.0
_MAX_TOLD = 1000


class RankDied(RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """While entered, this rank tells the others that it lives, and ends when one of them does not. An error that leaves
    it is told to them; KeyboardInterrupt, by which all of them stop, is not.

    Raises RankDied, with the rank's name, in place of an error of torch.distributed about one that has died."""
    if ranks.count == 1:
        yield
        return
    beats = _Beats(ranks)
    ranks.wait()  # for everyone's first beat
    beats.start()
    try:
        yield
    except Exception as error:
        dead = beats.dead() if _is_of_distributed(error) else ""
        beats.stop()
        beats.tell(dead or f"{beats.name(ranks.index)} failed: {type(error).__name__}: {error}")
        beats.linger()
        if dead:
            raise RankDied(f"{dead}. {_GO_ON}") from error
        raise
    except BaseException:
        beats.stop()
        raise
    beats.stop()
    ranks.wait()  # the first rank may hold what the others look into


_GO_ON = "What was saved is whole: start the run again to go on from there"


def _is_of_distributed(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any("/torch/distributed/" in frame.filename for frame in frames)


class _Beats(threading.Thread):
    """Counts in the store that the ranks share, and looks whether the next rank counts."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(name="heartbeat", daemon=True)
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self.ranks = ranks
        self.over = threading.Event()
        # A connection of its own: that of the main thread may be waiting for something.
        self.store: Any = PrefixStore("heartbeat", _get_default_store()).clone()
        self.store.set(f"process/{ranks.index}", f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set(f"beat/{ranks.index}", "0")

    def stop(self) -> None:
        """Returns when the thread looks no more."""
        self.over.set()
        self.join()

    def name(self, rank: int) -> str:
        try:
            process = self.store.get(f"process/{rank}").decode()
        except RuntimeError:  # of torch.distributed: the store has gone with its rank
            process = "which held what they share"
        return f"rank {rank} of {self.ranks.count} ({process})"

    def tell(self, what: str) -> None:
        """Tells the others why this rank ends, if none has told it."""
        try:
            self.store.compare_set("ended", "", what[:_MAX_TOLD])
        except RuntimeError:  # they see for themselves that the store has gone
            return

    def linger(self) -> None:
        """Lets the others read why this rank ends, if it may hold what they read."""
        if self.ranks.index == 0:
            time.sleep(_GRACE_SECONDS)

    def dead(self) -> str:
        """Why a rank ended, or which one beats no more; empty if all do."""
        try:
            if self.store.check(["ended"]):
                return self.store.get("ended").decode()
            before = self._all_beats()
            time.sleep(_GRACE_SECONDS)
            silent = [rank for rank, beat in enumerate(self._all_beats()) if beat == before[rank]]
        except RuntimeError:
            silent = [0]
        return " and ".join(f"{self.name(rank)} has died" for rank in silent if rank != self.ranks.index)

    def _all_beats(self) -> list[bytes]:
        return [self.store.get(f"beat/{rank}") for rank in range(self.ranks.count)]

    def run(self) -> None:
        beats, heard, next_rank = 0, (b"", time.monotonic()), (self.ranks.index + 1) % self.ranks.count
        while not self.over.wait(BEAT_SECONDS):
            beats += 1
            try:
                self.store.set(f"beat/{self.ranks.index}", str(beats))
                if self.store.check(["ended"]):
                    self._end(self.store.get("ended").decode())
                beat = self.store.get(f"beat/{next_rank}")
            except RuntimeError:
                self._end(f"{self.name(0)} has died")
                continue
            if beat != heard[0]:
                heard = beat, time.monotonic()
            elif (silent := time.monotonic() - heard[1]) > SILENCE_SECONDS:
                died = f"{self.name(next_rank)} has died, or was not heard of for {silent:.0f} s"
                self.tell(died)
                self._end(died)

    def _end(self, why: str) -> None:
        """Ends this process, whatever its main thread waits for."""
        if not self.over.wait(_GRACE_SECONDS):
            print(f"error: {why}. {_GO_ON}", file=sys.stderr, flush=True)
            self.linger()
            os._exit(1)
