"""Trains and measures the arms of a page of docs/results, and writes its JSON, its figure and the page.

python -m benchmarks.evidence interference --data-root DATA --backbone FOLDER --seeds 0 1 2

From the repository root. Arms are kept below --folder, so that a call that was stopped goes on; other seeds are added
to the JSON. With --tiny everything is made and small, which shows that it works and nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.evidence import made, page
from benchmarks.evidence.drivers import DRIVERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=list(DRIVERS))
    parser.add_argument("--data-root", type=Path, help="folder with the public sets and weights")
    parser.add_argument("--backbone", type=Path, help="folder of SmolLM2-135M-Instruct in fp32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tiny", action="store_true", help="on made data and a tiny backbone")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw the page from its JSON")
    parser.add_argument("--folder", type=Path, default=Path("runs/results"), help="runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=page.HOME, help="JSON, figures and pages (default: docs/results)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    driver = DRIVERS[given.page]
    if given.draw:
        print(page.write(given.page, driver, given.out))
        return
    data_root, backbone = given.data_root, given.backbone
    if given.tiny:
        data_root, backbone = made.data_root(given.folder / "made"), made.backbone(given.folder / "backbone")
    elif data_root is None or backbone is None:
        parser.error("give --data-root and --backbone, or --tiny")
    elif missing := [str(folder) for folder in (data_root, backbone) if not folder.is_dir()]:
        parser.error(f"{' and '.join(missing)}: no such folder")
    for seed in given.seeds:
        page.measure(given.page, driver, seed, data_root, backbone, given.folder, given.out, tiny=given.tiny)
    print(page.write(given.page, driver, given.out))


if __name__ == "__main__":
    main()
