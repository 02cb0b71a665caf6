"""Randomness keyed by names: the same in every process, and never dependent on what else happens."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a run seed and names."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Runs a block with torch's generator seeded by `key`, and puts the generator back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(*key))
        yield
