"""The engine: one thread steps the running batch, and one runs the encoders; requests come and go between any two
steps."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from torch import Tensor

from molora.inference.generate import Batch, GenerationConfig, Step, failure_of
from molora.inference.load import LoadedModel
from molora.inference.running import Asked
from molora.pack import Item, Sample


class Full(Exception):
    """More answers are asked for than may wait."""


class TooLate(Exception):
    """An answer took longer than it may."""


class Broken(Exception):
    """The engine has failed, and answers nothing any more."""


@dataclass(frozen=True)
class _Add:
    asked: Asked
    until: float


@dataclass(frozen=True)
class _Remove:
    id: str


class _End:
    """The thread's last order."""


_Order = _Add | _Remove | _End


class Places:
    """Room for answers that are being prepared, wait or run."""

    def __init__(self, engine: "Engine", count: int) -> None:
        self._engine = engine
        self._count = count

    def give_back(self, count: int | None = None) -> None:
        """So many of them, at most those that are left; all of them by default."""
        count = self._count if count is None else min(count, self._count)
        self._count -= count
        self._engine.give_back(count)


class Engine:
    """Answers samples together. Its methods are called in the event loop that `start` was called in. Media become
    frames request by request, beside the answers under way.

    At most `config.max_running_samples` answers run at a time, and `max_waiting` more wait or are being prepared, which
    makes so many `places`.
    `on_failure` is called once if the model fails, in which case every answer is `Broken` from then on.
    """

    def __init__(
        self, loaded: LoadedModel, config: GenerationConfig, max_waiting: int, on_failure: Callable[[], None]
    ) -> None:
        if config.kv_cache_gib is None:
            raise ValueError("a server needs a size for keys and values, kv_cache_gib; give one")
        self.batch = Batch(loaded.model, config)
        self.failure: BaseException | None = None
        self.places = config.max_running_samples + max_waiting
        self._taken = 0
        self._on_failure = on_failure
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._told: dict[str, tuple[asyncio.Queue[Step], Places]] = {}
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._frames = loaded.frames
        self._encoders = ThreadPoolExecutor(1, thread_name_prefix="encoders")
        self._unencoded: dict[str, list[Sample]] = {}

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the threads; what is not answered by then is not any more."""
        self._orders.put(_End())
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._encoders.shutdown, cancel_futures=True)

    @property
    def num_waiting(self) -> int:
        """Requests whose media wait for the encoders, and answers that wait for pages."""
        return len(self._unencoded) + self.batch.num_waiting

    def take_places(self, count: int) -> Places:
        """Keeps room for so many answers. Raises Full where there is none, Broken after a failure."""
        self._check()
        if self._taken + count > self.places:
            raise Full(f"{self._taken} answers run or wait here, and {self.places} is the most; ask again later")
        self._taken += count
        return Places(self, count)

    def give_back(self, count: int) -> None:
        self._taken -= count

    async def steps(self, asked: Sequence[Asked], seconds: float, places: Places) -> AsyncGenerator[Step, None]:
        """The steps of some samples until all have finished; each gives back one of the places when it has, whether or
        not its steps have been read by then. Who leaves early, by closing this, takes them out of the batch. Raises the
        error of a sample that fails, SampleTooLong for one that never fits, TooLate for one that is not finished in so
        many seconds, Broken if the model fails."""
        self._check()
        for each in asked:
            self.batch.check_size(each)
        told: asyncio.Queue[Step] = asyncio.Queue()
        unfinished = {each.sample.id for each in asked}
        until = time.monotonic() + seconds
        try:
            for each in asked:
                self._told[each.sample.id] = told, places
            for each in await self._encoded(asked, seconds):
                self._orders.put(_Add(each, until))
            while unfinished:
                step = await told.get()
                if step.finished:
                    unfinished.discard(step.id)
                if step.error is not None:
                    raise step.error
                yield step
        finally:
            for each in asked:
                del self._told[each.sample.id]
            for id in unfinished:
                self._orders.put(_Remove(id))

    async def _encoded(self, asked: Sequence[Asked], seconds: float) -> list[Asked]:
        """The same with frames. Answers to one sample go on to share its items, and so read its prompt once."""
        samples = {id(each.sample.items): each.sample for each in asked if each.sample.items}
        if not samples:
            return list(asked)
        key = asked[0].sample.id
        self._unencoded[key] = list(samples.values())
        try:
            async with asyncio.timeout(seconds):
                found = await self._loop.run_in_executor(self._encoders, self._encode, key)
        except TimeoutError as error:
            raise _too_late() from error
        finally:
            self._unencoded.pop(key, None)
        filled = dict(zip(samples, found, strict=True))
        return [
            replace(each, sample=replace(each.sample, items=filled.get(id(each.sample.items), ()))) for each in asked
        ]

    def _encode(self, key: str) -> list[tuple[Item, ...]]:
        """In the encoders' thread: the items of each sample of a request, with their frames, on the CPU until they
        enter; nothing if its client has left. Raises SampleFailed."""
        found: list[tuple[Item, ...]] = []
        for sample in self._unencoded.get(key, ()):
            try:
                (filled,) = self._frames.fill([sample])
            except Exception as error:
                raise failure_of(sample, error) from error
            except BaseException as error:
                self._loop.call_soon_threadsafe(self._fail, error)
                raise _broken() from error
            found.append(tuple(replace(item, frames_SC=_on_cpu(item.frames_SC)) for item in filled.items))
        return found

    def _check(self) -> None:
        if self.failure is not None:
            raise Broken("the model has failed, and this server ends; ask another one, or start it again")

    def _work(self) -> None:
        """In the thread."""
        until: dict[str, float] = {}
        try:
            while True:
                steps: list[Step] = []
                idle = not (self.batch.num_waiting or self.batch.num_running)
                for order in self._given(idle):
                    if isinstance(order, _End):
                        return
                    if isinstance(order, _Remove):
                        self.batch.remove(order.id)
                        until.pop(order.id, None)
                    else:
                        self.batch.add(order.asked)
                        until[order.asked.sample.id] = order.until
                now = time.monotonic()
                for id in [id for id, end in until.items() if end < now]:
                    self.batch.remove(id)
                    steps.append(Step(id, -1, "error", _too_late()))
                steps += self.batch.step()
                for step in steps:
                    if step.finished:
                        until.pop(step.id, None)
                if steps:
                    self._loop.call_soon_threadsafe(self._tell, steps)
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _given(self, wait: bool) -> list[_Order]:
        """What was ordered since the last step; waits for an order if there is nothing else to do."""
        orders = [self._orders.get()] if wait else []
        while not self._orders.empty():
            orders.append(self._orders.get())
        return orders

    def _tell(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if step.id in self._told:
                told, places = self._told[step.id]
                told.put_nowait(step)
                if step.finished:
                    places.give_back(1)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
            self._tell([Step(id, -1, "error", _broken()) for id in self._told])
            self._on_failure()


def _on_cpu(frames_SC: Tensor | None) -> Tensor | None:
    return None if frames_SC is None else frames_SC.cpu()


def _too_late() -> TooLate:
    return TooLate("the answer took longer than it may; ask for less")


def _broken() -> Broken:
    return Broken("the model has failed, and with it this answer; the server's log says how")
