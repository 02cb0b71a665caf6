"""The engine: one thread owns the backbone and steps the running batch, one owns the encoders; requests come and go
between any two steps."""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace

from molora.inference.generate import Batch, GenerationConfig, Step
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
    frames in a thread of their own, so that answers under way do not wait for them.

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
        self._frames = loaded.frames
        self._most_tokens = config.prefill_tokens
        self._unencoded: queue.SimpleQueue[list[_Add] | _End] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._told: dict[str, tuple[asyncio.Queue[Step], Places]] = {}
        self._threads = [
            threading.Thread(target=self._until_failure, args=[work], name=name, daemon=True)
            for name, work in {"encoders": self._encode, "model": self._answer}.items()
        ]

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """Ends the threads; what is not answered by then is not any more."""
        self._unencoded.put(_End())
        self._orders.put(_End())
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

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
            orders = [_Add(each, until) for each in asked]
            for each in asked:
                self._told[each.sample.id] = told, places
            if any(each.sample.items for each in asked):
                self._unencoded.put(orders)
            else:
                self._enter(orders)
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

    def _check(self) -> None:
        if self.failure is not None:
            raise Broken("the model has failed, and this server ends; ask another one, or start it again")

    def _until_failure(self, work: Callable[[], None]) -> None:
        """In a thread."""
        try:
            work()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _encode(self) -> None:
        """Gives the batch the samples that come with media once these are frames. Those that wait are encoded together,
        as far as their prompts may enter together."""
        ended = False
        while not ended:
            together: list[_Add] = []
            num_tokens = 0
            while not ended and num_tokens < self._most_tokens:
                try:
                    orders = self._unencoded.get(block=not together)
                except queue.Empty:
                    break
                if isinstance(orders, _End):
                    ended = True
                elif orders[0].asked.sample.id in self._told:
                    together += orders
                    num_tokens += len(orders[0].asked.sample)
            self._loop.call_soon_threadsafe(self._enter, self._encoded(together))

    def _encoded(self, orders: Sequence[_Add]) -> list[_Add]:
        """The same with frames. Answers to one sample go on to share its items, and so read its prompt once."""
        samples = {id(order.asked.sample.items): order.asked.sample for order in orders}
        filled = dict(zip(samples, self._filled(list(samples.values())), strict=True))

        def encoded(order: _Add) -> _Add:
            sample = order.asked.sample
            return replace(order, asked=replace(order.asked, sample=replace(sample, items=filled[id(sample.items)])))

        return list(map(encoded, orders))

    def _filled(self, samples: Sequence[Sample]) -> list[tuple[Item, ...]]:
        """The items of samples with their frames; of a sample that fails without, as the batch will find and tell."""
        try:
            return [sample.items for sample in self._frames.fill(samples)]
        except Exception:
            if len(samples) == 1:
                return [samples[0].items]
            return [items for sample in samples for items in self._filled([sample])]

    def _enter(self, orders: Sequence[_Add]) -> None:
        """Orders for samples whose clients are still there."""
        for order in orders:
            if order.asked.sample.id in self._told:
                self._orders.put(order)

    def _answer(self) -> None:
        """Steps the batch."""
        until: dict[str, float] = {}
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
                steps.append(Step(id, -1, "error", TooLate("the answer took longer than it may; ask for less")))
            steps += self.batch.step()
            for step in steps:
                if step.finished:
                    until.pop(step.id, None)
            if steps:
                self._loop.call_soon_threadsafe(self._tell, steps)

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
        if self.failure is not None:
            return
        self.failure = error
        broken = Broken("the model has failed, and with it this answer; the server's log says how")
        self._tell([Step(id, -1, "error", broken) for id in self._told])
        self._on_failure()
