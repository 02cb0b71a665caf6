"""The memory that a recipe or a model will need, printed beside what this machine has, and the time of its steps."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil
import torch
import transformers
from rich.text import Text

from molora.config import ConfigError, build, options, read
from molora.doctor.dry_run import on_meta
from molora.doctor.needs import AnsweringConfig, MemoryNeeds, Need, StageWork, answering_needs, training_needs
from molora.memory import free_bytes
from molora.ranks import pick_device
from molora.terminal import console, print_table, say, styled
from molora.train.recipe import Recipe

# What there is, by its data sheets, and what of it a process gets beside what CUDA keeps.
_CARDS = {
    24: "L4, RTX 4090",
    32: "RTX 5090",
    40: "A100",
    48: "L40S",
    80: "A100, H100",
    96: "RTX PRO 6000",
    141: "H200",
    192: "B200, MI300X",
}
_SHARE_OF_CARD = 0.96
# Of some, their products of bf16 matrices a second without sparsity, by the same, and the share of it that training is
# taken to reach; and the share that it reached on a CPU of what a product of large matrices does there.
_PEAKS = {"L4": (24, 121e12), "A100": (80, 312e12), "H100": (80, 989e12), "B200": (192, 2250e12)}
_SHARE_OF_PEAK, _SHARE_OF_PRODUCT = 0.4, 0.8
_DURATIONS = (("days", 86_400), ("hours", 3600), ("minutes", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6))
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(frozen=True)
class Device:
    """A device, what is free of its memory, how much it has, and how many processes share it."""

    name: str
    free_bytes: int
    num_bytes: int
    processes: int = 1

    def holds(self, needed: MemoryNeeds) -> bool:
        return self.processes * needed.given_bytes <= self.free_bytes


def devices(kind: str, processes: int = 1) -> list[Device]:
    """This machine's devices of a kind, "cuda" or "cpu", for so many processes, which share a CPU."""
    if kind == "cpu":
        return [Device("CPU", free_bytes(torch.device("cpu")), psutil.virtual_memory().total, processes)]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [Device(f"GPU {i}, {name}", *torch.cuda.mem_get_info(i)) for i, name in enumerate(names)]


def show(needed: MemoryNeeds, there: Iterable[Device], processes: int = 1) -> None:
    """Prints what each of so many processes needs, within 80 columns, and beside it what each device has."""
    rows: list[tuple[str | Text, ...]] = []

    def add(title: str, needs: Iterable[Need], total: int, origin: str) -> None:
        rows.append((styled(title, "bold"),))
        rows.extend((need.what, amount(need.num_bytes), need.origin) for need in needs)
        rows.append(("total", styled(amount(total), "bold"), origin))

    constant = (*needed.weights, needed.process) if needed.process else needed.weights
    add("weights", constant, needed.constant_bytes, "")
    for moment in needed.moments:
        for said in (moment, moment.given) if moment.given else (moment,):
            rows.append(())
            add(said.name, said.needs, needed.constant_bytes + said.num_bytes, "with the weights")
    print_table(("what", "how much", "where it comes from"), rows, wide="where it comes from", right=("how much",))
    say()
    if needed.held:
        say(needed.held)
    for fault in needed.unknown:
        say(f"Not counted as its data are: {fault}")
    told = f"{amount(needed.given_bytes)} needed"
    if any(moment.given for moment in needed.moments):
        told += f" as its data are, {amount(needed.num_bytes)} with the largest packs that it allows"
    if processes > 1:
        told += f", by each of {processes} processes"
    for device in there:
        verdict = styled("it fits", "green") if device.holds(needed) else styled("it does not fit", "red")
        all_of_it = f"{amount(device.processes * needed.given_bytes)} in all, " if device.processes > 1 else ""
        has = f"{amount(device.free_bytes)} free of {amount(device.num_bytes)}"
        say(f"{device.name}: ", verdict, f", {told}, {all_of_it}{has}")
    on_card = needed.given_bytes - (needed.process.num_bytes if needed.process else 0)
    say(f"Graphics cards: {cards_for(on_card)}.")
    for stage in needed.work:
        say(f"Stage {stage.name}: {expected_time(stage, on_card)}.")


def cards_for(num_bytes: int) -> str:
    """The cards that hold so much, smallest first."""
    enough = [size for size in _CARDS if num_bytes <= size * 2**30 * _SHARE_OF_CARD]
    if not enough:
        return f"one of {max(_CARDS)} GB is too small"
    first, larger = enough[0], f" and larger ones, up to {max(_CARDS)} GB" if enough[1:] else ""
    return f"one of {first} GB ({_CARDS[first]}) holds it{larger}"


def expected_time(stage: StageWork, num_bytes: int) -> str:
    """How long the steps of a stage will take on this CPU and on cards that hold so many bytes."""
    seconds = stage.step_flop / (_product_flop_per_second(stage.dtype) * _SHARE_OF_PRODUCT)
    here = f"{duration(seconds)} a step and {duration(stage.num_steps * seconds)} in all"
    cards = [
        f"{name} {duration(stage.step_flop / (peak * _SHARE_OF_PEAK))}"
        for name, (size, peak) in _PEAKS.items()
        if num_bytes <= size * 2**30 * _SHARE_OF_CARD
    ]
    return (
        f"{stage.num_steps:,} steps of {stage.step_flop / 1e12:,.3g} TFLOP. On this CPU about {here}, if nothing runs "
        f"beside it{'; a step on ' if cards else ''}{', '.join(cards)}"
    )


@cache
def _product_flop_per_second(dtype: torch.dtype) -> float:
    """What the fastest of some products of large matrices reaches on this CPU."""
    matrix, seconds = torch.zeros((1024, 1024), dtype=dtype), []
    for _ in range(4):
        begun = time.perf_counter()
        torch.mm(matrix, matrix.T)
        seconds.append(time.perf_counter() - begun)
    return 2 * len(matrix) ** 3 / min(seconds)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    unit, size = next((pair for pair in _DURATIONS if seconds >= pair[1]), _DURATIONS[-1])
    return f"{seconds / size:,.{0 if seconds >= 10 * size else 1}f} {unit}"


def amount(num_bytes: int) -> str:
    """Bytes in the unit that suits them."""
    unit, size = next((pair for pair in _UNITS if num_bytes >= pair[1]), _UNITS[-1])
    return f"{num_bytes / size:,.1f} {unit}" if num_bytes else "0"


def main(
    source: str,
    overrides: Sequence[str] = (),
    modalities: Sequence[str | Path] = (),
    device_memory_gib: float | None = None,
    trust: Sequence[str] = (),
    processes: int = 1,
) -> int:
    """Prints what a recipe (a YAML file, with its overrides) or a model needs. Returns 1 if it does not fit, else 0.
    `overrides` of a model are fields of AnsweringConfig. The device is the one the run would take, or any that has
    `device_memory_gib`; of a recipe that so many `processes` train, it is what one of them takes."""
    transformers.logging.set_verbosity_error()
    libraries = psutil.Process().memory_info().rss
    with console.status("building it without weights"):
        if Path(source).suffix in (".yaml", ".yml"):
            if modalities:
                raise ConfigError(f"{source}: a recipe names its modalities itself; --modality goes with a backbone")
            recipe = read(Recipe, source, overrides)
            kind = pick_device(recipe.device).type
            needed = training_needs(recipe, trust, kind, processes)
        elif processes > 1:
            raise ConfigError(f"{source}: --processes is for a recipe; a model answers in one process, whole")
        else:
            config = build(AnsweringConfig, options(overrides), "--fit")
            kind = pick_device().type
            model = on_meta(source, modalities, dtype=config.dtype, quantization=config.quantization, trust=trust)
            needed = answering_needs(model, config, kind)
    if kind == "cpu" and device_memory_gib is None:
        needed = replace(needed, process=Need("Python", libraries, "the interpreter and its libraries"))
    if device_memory_gib is None:
        there = devices(kind, processes)
    else:
        size = int(device_memory_gib * 2**30)
        there = [Device(f"a device of {device_memory_gib:g} GiB", size, size)]
    show(needed, there, processes)
    return int(not there[0].holds(needed))
