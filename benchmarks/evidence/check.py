"""Runs a tiny form of every page on made data and a tiny backbone, and compares what it gives with the JSON in
docs/results: the same arms and figures, and all that has to be exactly the same so. `make results-check` calls it.

python -m benchmarks.evidence.check
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import made, page
from benchmarks.evidence.drivers import DRIVERS
from benchmarks.evidence.page import HOME


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data_root, backbone = made.data_root(folder / "made"), made.backbone(folder / "backbone")
        wrong = []
        for name, driver in DRIVERS.items():
            page.measure(name, driver, 0, data_root, backbone, folder, folder / "out", tiny=True)
            page.write(name, driver, folder / "out")
            tiny = read(folder / "out", name)
            wrong += [f"{name}, tiny: {fault}" for fault in inexact(tiny)]
            if (HOME / f"{name}.json").is_file():
                kept = read(HOME, name)
                wrong += [f"{name}.json: {fault}" for fault in (*inexact(kept), *differences(kept, tiny))]
                wrong += [f"{name}: {fault}" for fault in undrawn(name, folder / "drawn")]
    if wrong:
        raise SystemExit("\n".join(wrong))


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def differences(kept: Mapping[str, Any], tiny: Mapping[str, Any]) -> Iterator[str]:
    """Where the JSON of a page has other keys, arms or figures than what the code gives now."""
    wanted = shape(tiny)["0"]
    if kept.keys() != tiny.keys():
        yield f"its keys are {sorted(kept)}, those written now {sorted(tiny)}"
    for seed, found in shape(kept).items():
        for what in sorted(found ^ wanted):
            told = "is not measured any more" if what in found else "is missing"
            yield f"seed {seed}: {what} {told}; measure the page again"


def shape(values: Mapping[str, Any]) -> dict[str, set[str]]:
    """By seed, what there is of each arm: its figures, and what had to be exactly so."""
    return {
        seed: {
            *(
                f"arm {arm['name']}, figure {figure['name']} of {figure['arm']} on {figure['task']} ({figure['media']})"
                for arm in measured["arms"]
                for figure in arm["figures"]
            ),
            *(f"arm {arm['name']}, {key}" for arm in measured["arms"] for key in arm["exact"]),
        }
        for seed, measured in values["seeds"].items()
    }


def inexact(values: Mapping[str, Any]) -> Iterator[str]:
    """What had to be the same to the bit and is not."""
    for seed, measured in values["seeds"].items():
        for arm in measured["arms"]:
            for key, value in arm["exact"].items():
                for said in value.values() if isinstance(value, Mapping) else [value]:
                    same, _, all_of_them = said.partition(" of ")
                    if same != all_of_them:
                        yield f"seed {seed}, arm {arm['name']}: {key}: {said}"


def undrawn(name: str, folder: Path) -> Iterator[str]:
    """Whether the page says what its JSON does."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_bytes((HOME / f"{name}.json").read_bytes())
    drawn = page.write(name, DRIVERS[name], folder)
    if drawn.read_bytes() != (HOME / drawn.name).read_bytes():
        yield f"{drawn.name} is not what its JSON gives; run python -m benchmarks.evidence {name} --draw"


if __name__ == "__main__":
    main()
