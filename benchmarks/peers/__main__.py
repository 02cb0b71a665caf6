"""molora beside transformers and PEFT; see benchmarks/README.md.

python -m benchmarks.peers training [--dtype bfloat16] [--rounds 5] [--device cuda] [--json results.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.peers import first_token, generation, installed, page, smollm, sweeps, training
from benchmarks.peers.measure import Result, Setup
from benchmarks.peers.models import SIZES, save_checkpoint

COMPARISONS: dict[str, Callable[[Setup], list[Result]]] = {
    "training": training.compare,
    "text": installed.text_only,
    "mixed": installed.mixed,
    "generation": generation.mixed_batch,
    "requests": generation.requests,
    "first-token": first_token.compare,
    "head": first_token.head,
    "decode": smollm.decode_alone,
    "short": smollm.short_samples,
    "sweeps": sweeps.sweep,
}
MEMORY: dict[str, Callable[[Setup, str], int]] = {"training": training.memory_of, "head": first_token.head_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", nargs="+", choices=[*COMPARISONS, "all"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, the sides taken in turn (default 3)")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="tiny tries the code, not the speed")
    parser.add_argument("--smollm", default=Setup.smollm, help="folder or hub id of it (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file of results; a comparison in it is replaced")
    parser.add_argument("--page", action="store_true", help="keep results in benchmarks/ and write its page from them")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory of each side")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        dtype = getattr(torch, given.dtype)
        setup = Setup(folder, dtype, given.device, given.rounds, not given.no_memory, given.smollm)
        if given.memory_of:
            print(MEMORY[given.comparison[0]](setup, given.memory_of))
            return
        save_checkpoint(folder, SIZES[given.size])
        for name in COMPARISONS if "all" in given.comparison else given.comparison:
            results = COMPARISONS[name](setup)
            for result in results:
                print(f"\n{result.table()}", flush=True)
            for path in {given.json, page.RESULTS if given.page else None} - {None}:
                write_results(path, results)
            del results
            gc.collect()  # the models of one comparison would lie beside those of the next
    if given.page:
        page.write()


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Adds results to a file; one of the same name, dtype and device is replaced."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for result in results:
        kept[f"{result.name}, {result.dtype}, {result.device}"] = result.as_json()
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
