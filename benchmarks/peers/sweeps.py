"""How molora's time grows: with tokens, with the share of pictures in a batch, and with samples that decode together.

The numbers of these sides were compared by the other comparisons; here only clocks run.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.peers import work
from benchmarks.peers.generation import Ours as Answering
from benchmarks.peers.installed import NEW_TOKENS, Installed, load_stock
from benchmarks.peers.measure import Machine, Result, Row, Setup, in_turns
from benchmarks.peers.models import Shape
from benchmarks.peers.training import Ours, Theirs, sides_of

SAMPLE_TOKENS = 128
PACK_TOKENS = (256, 512, 1024, 2048)
BATCH = 4
RUNNING = (1, 4, 16, 64)


def sweep(setup: Setup) -> list[Result]:
    return [tokens(setup), running_samples(setup), pictures(setup)]


def tokens(setup: Setup) -> Result:
    """Training steps of one pack of growing length, half of the samples with each of two adapters."""
    installed = Installed(load_stock(setup), 2)
    batches = [
        installed.samples([i % 2 for i in range(count // SAMPLE_TOKENS)], SAMPLE_TOKENS) for count in PACK_TOKENS
    ]
    sides: dict[str, Callable[[], object]] = {
        f"{count} tokens": lambda batch=batch: installed.step(batch)
        for count, batch in zip(PACK_TOKENS, batches, strict=True)
    }
    machine = Machine(setup.dtype, setup.device)
    taken = in_turns(sides, setup.rounds, setup.device, machine)
    rows = [
        Row(side, taken[side], work.step_flop(installed.model, batch), at=count)
        for side, batch, count in zip(sides, batches, PACK_TOKENS, strict=True)
    ]
    about = f"a training step of samples of {SAMPLE_TOKENS} tokens"
    return setup.result("time against tokens", about, [], rows, machine)


def running_samples(setup: Setup) -> Result:
    """Decoding of texts together, without their prompts."""
    installed = Installed(load_stock(setup), 2)
    ours = Answering(installed.model, NEW_TOKENS)
    batches = {count: installed.samples([None] * count, SAMPLE_TOKENS // 2) for count in RUNNING}
    machine = Machine(setup.dtype, setup.device)
    seconds: dict[int, list[float]] = {}
    for count, batch in batches.items():
        ours.decode_seconds.clear()
        in_turns({"molora": lambda batch=batch: ours.answer(batch)}, setup.rounds, setup.device, machine)
        seconds[count] = ours.decode_seconds[-setup.rounds :]
    rows = []
    for count, batch in batches.items():
        read = work.decode_bytes(installed.model, [len(sample) for sample in batch], [NEW_TOKENS] * count)
        flop = work.decode_flop(installed.model, batch, [NEW_TOKENS] * count)
        rows.append(Row(f"{count} running", seconds[count], flop, read, at=count))
    about = f"decoding {NEW_TOKENS - 1} tokens of each sample, after prompts of {SAMPLE_TOKENS // 2}"
    return setup.result("time against running samples", about, [], rows, machine)


def pictures(setup: Setup) -> Result:
    """Training steps of batches of pictures and texts beside the peer's, by how many are pictures."""
    rows = []
    machine = Machine(setup.dtype, setup.device)
    for count in range(1, BATCH):
        shape = Shape(pictures=count, clips=0, texts=BATCH - count)
        ours = Ours(setup.folder, shape, setup.dtype, setup.device)
        theirs = Theirs(setup.folder, ours.samples, ours.model, setup.dtype, setup.device)
        # One round: padded batches take long, and the curve is what counts.
        taken = in_turns(sides_of(ours, theirs), 1, setup.device, machine)
        flop = work.step_flop(ours.model, ours.samples)
        rows += [Row(f"{side}, {count} of {BATCH}", taken[side], flop, at=count / BATCH) for side in taken]
    return setup.result("time against share of pictures", f"a training step of {BATCH} samples", [], rows, machine)
