"""Settings for every test."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Tiny models gain nothing from more threads, and two busy cores would make them wait for each other.
torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test outlives a loss of power, and the disk would be waited for hundreds of times in every training.
os.fsync = lambda descriptor: None
# A shell starts what runs in the background with Ctrl-C ignored; tests try commands as from a terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is there by now stays; no collection of garbage, of which the doctor asks for many, walks through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests train with is nothing to trust afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
