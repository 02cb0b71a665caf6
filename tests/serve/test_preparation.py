"""What is made of requests beside the model: the same samples, and nothing that a request does harms another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from molora.data.processor import Processor, SampleTooLong
from molora.modality import MediaError
from molora.pack import Sample
from molora.serve.preparation import Preparation, PreparationLimits
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer

LIMITS = PreparationLimits(processes=2, seconds=2.0, memory_gib=0.5)


class Troubled(Numbers):
    """Numbers that ask for trouble: 13 never ends, 17 kills its process, 19 takes memory without end."""

    def load(self, part: Any) -> list[float]:
        numbers = super().load(part)
        if 13 in numbers:
            time.sleep(600)
        if 17 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        if 19 in numbers:
            torch.ones(2**29)
        return numbers


@pytest.fixture(scope="module")
def processor() -> Processor:
    modalities: Any = {"numbers": Troubled("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    return Processor(byte_tokenizer(), modalities, lambda modalities: "", 64)


@pytest.fixture(scope="module")
def preparation(processor: Processor) -> Iterator[Preparation]:
    made = Preparation(processor, LIMITS)
    yield made
    made.close()


def ask(*content: Any) -> list[dict[str, Any]]:
    kinds = {list: "numbers", str: "text"}
    return [{"role": "user", "content": [{"type": kinds[type(c)], kinds[type(c)]: c} for c in content]}]


def same(one: Sample, other: Sample) -> bool:
    tensors = zip(one.items, other.items, strict=True)
    return torch.equal(one.token_ids_T, other.token_ids_T) and all(
        torch.equal(a.prepared.tensors["values"], b.prepared.tensors["values"]) for a, b in tensors
    )


def test_samples_are_those_of_the_processor(processor: Processor, preparation: Preparation) -> None:
    for messages in (ask("hello"), ask([1.0, 2.5], "what?"), [{"role": "user", "content": "plain"}]):
        found = asyncio.run(preparation.sample(messages, "a"))
        assert same(found, processor.encode(messages, "a", generate=True))


TROUBLE = {13.0: "took longer than 2 seconds", 17.0: "ended its decoder", 19.0: "allocate"}


@pytest.mark.parametrize("number", TROUBLE)
def test_trouble_is_its_requests_own(preparation: Preparation, number: float) -> None:
    """Whatever happens to a process, requests beside it and after it are prepared, as many as before."""

    async def several() -> list[Any]:
        asked = [ask([1.0]), ask([number]), *[ask([float(index)]) for index in range(6)], ask("text")]
        preparing = (preparation.sample(messages, str(index)) for index, messages in enumerate(asked))
        return await asyncio.gather(*preparing, return_exceptions=True)

    first, bad, *others = asyncio.run(several())
    assert isinstance(bad, MediaError) and TROUBLE[number] in str(bad) and "sample 1" in str(bad)
    assert all(isinstance(each, Sample) for each in (first, *others))


def test_errors_are_the_processors(processor: Processor, preparation: Preparation) -> None:
    for messages in (ask("x" * 100), ask([1.0] * 99), [{"role": "user", "content": [{"type": "smell"}]}], [], ask([])):
        with pytest.raises(ValueError) as expected:
            processor.encode(messages, "a", generate=True)
        with pytest.raises(ValueError) as found:
            asyncio.run(preparation.sample(messages, "a"))
        assert str(found.value) == str(expected.value) and type(found.value) is type(expected.value)
    with pytest.raises(SampleTooLong):
        asyncio.run(preparation.sample(ask("x" * 100), "a"))


def test_no_process_is_left_behind(processor: Processor) -> None:
    before = set(psutil.Process().children(recursive=True))
    made = Preparation(processor, LIMITS)
    asyncio.run(made.sample(ask([1.0]), "a"))
    begun = set(psutil.Process().children(recursive=True)) - before
    assert len(begun) == 2, "one that forks and one that was forked"
    made.close()
    _, alive = psutil.wait_procs(begun, timeout=30)
    assert not alive


@pytest.mark.parametrize("setting", [{"processes": 0}, {"seconds": 0.0}, {"memory_gib": -1.0}])
def test_limits_of_nothing_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"media {next(iter(setting))} cannot be"):
        PreparationLimits(**setting)
