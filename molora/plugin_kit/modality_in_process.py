"""Clauses about a modality in its process, which it shares, and in those of data workers."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from molora.plugin_kit.clauses import ALL, Fault, clause, some
from molora.plugin_kit.under_test import OWN, SEED, ModalityUnderTest
from molora.testing.data_workers import Parts, forked, spawned
from molora.testing.side_effects import GENERATORS, fingerprint, put_back, shared_state

# Caches fill in the first rounds. What still grows in every later one is a leak, if it is more than the interpreter's
# own pools grow by.
_FIRST_ROUNDS, _ROUNDS = 3, 4
_NOISE_BYTES = 2048


@clause("memory", "encoder")
def memory(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    traced = tracemalloc.is_tracing()
    gc.freeze()  # sets aside what there is already: only new objects are counted, and collecting is quick
    tracemalloc.start()
    try:
        tensors, size = _left_behind(lambda: [modality.collate([tested.prepare(modality, i)]) for i in tested.every])
        if tensors or size > _NOISE_BYTES:
            raise Fault(
                f"load, prepare and collate leave {tensors} tensors and {size} bytes behind every time all parts go "
                "through them; keep nothing of an item, or bound the cache"
            )
        tensors, _ = _left_behind(lambda: [tested.encode(tested.encoder, [one]) for one in tested.prepared])
    finally:
        gc.unfreeze()
        if not traced:
            tracemalloc.stop()
    if tensors:
        raise Fault(f"forward leaves {tensors} tensors behind every time all parts go through it; keep none of them")
    return "load, prepare, collate and forward leave nothing behind"


def _left_behind(run: Callable[[], object]) -> tuple[int, int]:
    """The tensors and bytes that remain of every call, at least, once caches have filled."""
    counts = []
    for _ in range(_FIRST_ROUNDS + _ROUNDS):
        run()
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        counts.append((tensors, tracemalloc.get_traced_memory()[0]))
    steps = [(tensors - t, size - s) for (t, s), (tensors, size) in pairwise(counts[_FIRST_ROUNDS - 1 :])]
    return max(0, min(tensors for tensors, _ in steps)), max(0, min(size for _, size in steps))


@clause("shared state", "encoder")
def shared_state_kept(tested: ModalityUnderTest) -> str:
    faults: list[str] = []

    def watched(method: str, call: Callable[[], Any], *, may_draw: bool = False) -> Any:
        before = shared_state()
        result = call()
        changed = [name for name in put_back(before) if not (may_draw and name in GENERATORS)]
        if changed:
            faults.append(f"{method} changes {some(changed)}")
        return result

    modality = watched("__init__", tested.make)
    watched("examples", modality.examples)
    watched("projectors", modality.projectors)
    watched("projector", lambda: modality.projector(frozenset({OWN})))
    items = watched("load", lambda: [modality.load(tested.part(index)) for index in tested.every])
    prepared = watched("prepare", lambda: [modality.prepare(item) for item in items])
    watched("prepare", lambda: modality.prepare(items[0], torch.Generator().manual_seed(SEED)))
    collated = watched("collate", lambda: modality.collate(prepared))
    # Weights and dropout come from torch's generator, which the model seeds.
    encoder = watched("build_encoder", modality.build_encoder, may_draw=True)
    watched("forward in eval mode", lambda: encoder.eval()(**collated))
    watched("forward in train mode", lambda: encoder.train()(**collated), may_draw=True)
    watched("saved_config", lambda: encoder.saved_config(True))
    if faults:
        raise Fault(f"{some(list(dict.fromkeys(faults)))}; the whole process shares it, so leave it as it is")
    return "no method changes a setting or a generator that others use"


# After all others: processes are slow to start and say little about a plugin that is wrong already.
@clause("data workers", ALL)
def data_workers(tested: ModalityUnderTest) -> str:
    torch.set_num_threads(1)  # as in a data worker
    parts = Parts(tested.make(), tested.parts, SEED)
    here = [fingerprint(parts[index]) for index in range(len(parts))]
    for how in ("forked", "spawned"):
        try:
            if how == "forked":
                prepared = forked(parts)
            else:
                prepared, tested.imported = spawned(parts, tested.spec, tested.folder)
        except Exception as error:
            why = str(error).strip().splitlines()[-1]
            raise Fault(f"load and prepare fail in a {how} data worker: {why}") from error
        for index, one in enumerate(prepared):
            if fingerprint(one) != here[index]:
                raise Fault(
                    f"in a {how} data worker, load and prepare give other tensors for part {index // 2} than here: "
                    "they depend on the part, the config and the generator, not on what a process has done before"
                )
    return "data workers, forked and spawned, prepare the same tensors"


@clause("imports", ALL)
def imports(tested: ModalityUnderTest) -> str:
    if tested.imported:
        raise Fault(
            f"importing the plugin's module imports {' and '.join(tested.imported)}, which every data worker would "
            "load; import what needs them inside the function that uses it"
        )
    return "importing the plugin's module does not import the model"
