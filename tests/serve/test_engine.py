"""The engine: requests come and go between any two steps, and none of them harms another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from molora.data.processor import SampleTooLong
from molora.inference.generate import GenerationConfig, SampleFailed, Step
from molora.inference.load import LoadedModel
from molora.inference.running import Asked
from molora.inference.sampling import Decoding
from molora.serve.engine import Broken, Engine, Full, Places, TooLate

LONG = Decoding(max_new_tokens=200, ignore_stop_tokens=True)


def run(loaded: LoadedModel, work: Callable[[Engine], Awaitable[Any]], **more: Any) -> Any:
    """What `work` returns with an engine that has started, whose pages are all free at the end."""
    kept = loaded.model.backbone.kept_layers()
    pages = more.pop("pages", 12)
    size = {"max_running_samples": 3, "kv_cache_gib": kept.num_bytes(pages, 3) / 2**30, **more}
    failures: list[None] = []

    async def main() -> Any:
        engine = Engine(loaded, GenerationConfig(**size), 4, lambda: failures.append(None))
        free = engine.batch.pool.num_free
        engine.start()
        try:
            return await asyncio.wait_for(work(engine), 60)
        finally:
            await engine.stop()
            if engine.failure is None:
                assert engine.batch.pool.num_free == free and not engine._taken
            assert len(failures) == (engine.failure is not None)

    return asyncio.run(main())


def ask(loaded: LoadedModel, id: str, how: Decoding, content: Any = "what is it?") -> Asked:
    sample = loaded.encode([{"role": "user", "content": content}], id)
    return Asked(sample, how, 0, lambda tokens: False)


async def steps(engine: Engine, *asked: Asked, seconds: float = 60) -> AsyncGenerator[Step, None]:
    places = engine.take_places(len(asked))
    try:
        async with aclosing(engine.steps(asked, seconds, places)) as found:
            async for step in found:
                yield step
    finally:
        places.give_back()


async def tokens(engine: Engine, asked: Asked, seconds: float = 60) -> list[int]:
    return [step.token_id async for step in steps(engine, asked, seconds=seconds)]


def test_requests_that_come_while_others_run_get_their_own_answers(offline: LoadedModel) -> None:
    contents = ["a", [{"type": "numbers", "numbers": [1.0, 2.0]}], "what?"] * 2

    async def work(engine: Engine) -> list[list[int]]:
        async def later(index: int) -> list[int]:
            await asyncio.sleep(0.02 * index)
            how = Decoding(max_new_tokens=20 + index, ignore_stop_tokens=True)
            return await tokens(engine, ask(offline, str(index), how, contents[index]))

        return await asyncio.gather(*map(later, range(len(contents))))

    for index, found in enumerate(run(offline, work, prefill_tokens=4)):
        messages = [{"role": "user", "content": contents[index]}]
        config = GenerationConfig(max_new_tokens=20 + index, ignore_stop_tokens=True)
        (expected,) = offline.answers([offline.encode(messages)], config)
        assert tuple(found) == expected.token_ids


@pytest.mark.parametrize("after", [0, 1, 5])
def test_who_leaves_takes_no_more_steps_and_its_pages_are_free(offline: LoadedModel, after: int) -> None:
    async def work(engine: Engine) -> None:
        async with aclosing(steps(engine, ask(offline, "gone", LONG))) as found:
            for _ in range(after):
                await anext(found)
        # A step later at most it is out.
        await tokens(engine, ask(offline, "next", Decoding(max_new_tokens=2, ignore_stop_tokens=True)))
        assert engine.batch.num_running == engine.batch.num_waiting == 0

    run(offline, work)


def test_who_is_cancelled_while_waiting_is_never_run(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> None:
        running = [asyncio.ensure_future(tokens(engine, ask(offline, f"r{index}", LONG))) for index in range(3)]
        waiting = asyncio.ensure_future(tokens(engine, ask(offline, "waits", LONG)))
        while not engine.batch.num_waiting:
            await asyncio.sleep(0.001)
        waiting.cancel()
        for each in running:
            each.cancel()
        await asyncio.wait([*running, waiting])
        assert all(each.cancelled() for each in (*running, waiting))

    run(offline, work)


def test_more_than_may_wait_is_refused(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> None:
        five, two = engine.take_places(5), engine.take_places(2)
        with pytest.raises(Full, match="7 answers run or wait here, and 7 is the most"):
            engine.take_places(1)
        two.give_back()
        five.give_back(1)
        three = engine.take_places(3)
        for places in (two, five, five, three):
            places.give_back()

    run(offline, work)


def test_an_answer_that_takes_too_long_ends_and_others_go_on(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> None:
        how = Decoding(max_new_tokens=30, ignore_stop_tokens=True)
        slow, fine = await asyncio.gather(
            tokens(engine, ask(offline, "slow", LONG), 0.05),
            tokens(engine, ask(offline, "fine", how)),
            return_exceptions=True,
        )
        assert isinstance(slow, TooLate) and len(fine) == 30  # pyright: ignore[reportArgumentType]

    run(offline, work)


def test_what_never_fits_is_its_own_error(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(SampleTooLong, match="needs keys and values"):
            await tokens(engine, ask(offline, "long", Decoding(max_new_tokens=200), "x" * 200))
        assert len(await tokens(engine, ask(offline, "a", Decoding(max_new_tokens=3, ignore_stop_tokens=True)))) == 3

    run(offline, work, pages=2)


def test_a_model_that_fails_ends_every_answer(offline: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(engine: Engine) -> None:
        async def broken() -> None:
            async for _ in steps(engine, ask(offline, "a", LONG)):
                monkeypatch.setattr(offline.model, "forward", fail)

        with pytest.raises(Broken, match="the model has failed, and with it this answer"):
            await broken()
        with pytest.raises(Broken, match="this server ends"):
            await anext(engine.steps([ask(offline, "b", LONG)], 60, Places(engine, 0)))
        with pytest.raises(Broken):
            engine.take_places(1)
        assert isinstance(engine.failure, RuntimeError)

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("out of memory")

    run(offline, work)


def test_a_server_needs_a_size_for_its_pool(offline: LoadedModel) -> None:
    with pytest.raises(ValueError, match="kv_cache_gib"):
        Engine(offline, GenerationConfig(), 1, lambda: None)


def test_steps_of_several_samples_come_together(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> list[Step]:
        how = Decoding(max_new_tokens=4, ignore_stop_tokens=True)
        return [step async for step in steps(engine, ask(offline, "a", how), ask(offline, "b", how))]

    found = run(offline, work)
    assert sorted(step.id for step in found) == ["a"] * 4 + ["b"] * 4


def numbers(*values: float) -> list[dict[str, Any]]:
    return [{"type": "numbers", "numbers": list(values)}]


class Held:
    """An encoder that waits to be let go, counts its calls, and fails on what holds a 13."""

    def __init__(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began, self.go, self.calls = threading.Event(), threading.Event(), 0
        self.encode = loaded.model.encoders["numbers"].forward
        monkeypatch.setattr(loaded.model.encoders["numbers"], "forward", self)

    def __call__(self, **tensors: Tensor) -> Any:
        assert threading.current_thread().name.startswith("encoders")
        self.calls += 1
        self.began.set()
        assert self.go.wait(30)
        if any((tensor == 13).any() for tensor in tensors.values()):
            raise ValueError("unlucky")
        return self.encode(**tensors)


SHORT = Decoding(max_new_tokens=4, ignore_stop_tokens=True)


def test_text_is_answered_while_media_are_encoded(offline: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(offline, monkeypatch)

    async def work(engine: Engine) -> None:
        waits = asyncio.ensure_future(tokens(engine, ask(offline, "media", SHORT, numbers(3, 1))))
        await asyncio.to_thread(held.began.wait, 30)
        assert len(await tokens(engine, ask(offline, "text", LONG))) == 200
        with pytest.raises(TooLate):
            await tokens(engine, ask(offline, "late", SHORT, numbers(2)), seconds=0.05)
        assert engine.num_waiting == 1 and not waits.done()
        held.go.set()
        assert len(await waits) == 4 and held.calls == 1

    run(offline, work, pages=30)


def test_who_leaves_while_its_media_are_encoded_is_never_run(
    offline: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(offline, monkeypatch)

    async def work(engine: Engine) -> None:
        gone, never = (
            asyncio.ensure_future(tokens(engine, ask(offline, f"{value}", LONG, numbers(value)))) for value in (4, 5)
        )
        await asyncio.to_thread(held.began.wait, 30)
        for each in (gone, never):
            each.cancel()
        await asyncio.wait([gone, never])
        held.go.set()
        assert len(await tokens(engine, ask(offline, "stays", SHORT, numbers(6)))) == 4
        assert engine.batch.num_running == engine.batch.num_waiting == 0
        assert held.calls == 2, "whose turn had not come are not even encoded"

    run(offline, work, pages=30)


def test_media_that_fail_harm_no_others(offline: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(offline, monkeypatch)

    async def work(engine: Engine) -> None:
        first = asyncio.ensure_future(tokens(engine, ask(offline, "first", SHORT, numbers(7))))
        await asyncio.to_thread(held.began.wait, 30)
        asked = (asyncio.ensure_future(tokens(engine, ask(offline, f"{x}", SHORT, numbers(x)))) for x in (8, 13, 9))
        found = asyncio.gather(first, *asked, return_exceptions=True)
        await asyncio.sleep(0.1)
        held.go.set()
        *good, bad, last = await found
        assert all(isinstance(each, list) and len(each) == 4 for each in (*good, last))
        assert isinstance(bad, SampleFailed) and str(bad) == "sample 13: ValueError: unlucky; --debug shows where"

    run(offline, work, pages=30)


def test_several_answers_share_their_media_and_their_prompt(
    offline: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(offline, monkeypatch)
    held.go.set()
    one = ask(offline, "0", SHORT, numbers(10, 11))
    several = [replace(one, sample=replace(one.sample, id=f"{index}")) for index in range(3)]
    fed = []
    forward = offline.model.forward
    monkeypatch.setattr(offline.model, "forward", lambda pack, **more: fed.append(pack) or forward(pack, **more))

    async def work(engine: Engine) -> list[Step]:
        return [step async for step in steps(engine, *several)]

    assert len(run(offline, work, pages=30)) == 12
    assert held.calls == 1 and sum(sum(pack.lengths) for pack in fed) == len(one.sample) + 3 * 3


def test_who_does_not_read_keeps_no_place(offline: LoadedModel) -> None:
    async def work(engine: Engine) -> None:
        places = engine.take_places(7)
        how = Decoding(max_new_tokens=3, ignore_stop_tokens=True)
        async with aclosing(engine.steps([ask(offline, "slow", how)], 60, places)) as found:
            await anext(found)
            while engine._taken == 7:
                await asyncio.sleep(0.001)
            engine.take_places(1).give_back()
        places.give_back()

    run(offline, work)
