"""The page of results: tables and plots in benchmarks/README.md, from benchmarks/results.json.

python -m benchmarks.peers.page
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import bounding_share

HOME = Path(__file__).parents[1]
RESULTS = HOME / "results.json"
BEGIN, END = "<!-- results: written by benchmarks.peers.page -->", "<!-- end of results -->"

# In the order of the page: what is wanted of ratios, shares and memory, and what bounds the time.
ROWS: dict[str, tuple[str, str]] = {
    "training step": (
        "padded at least 5.5 (fp32) or 9 (bf16), grouped 1.6 or 3, share 0.62 or 0.45, memory at most 0.35 of padded",
        "matrix products",
    ),
    "training step, short samples": (
        "share at least 0.35 in bf16",
        "matrix products of few rows, and starting operations",
    ),
    "texts alone, training metrics": ("at most 1.02", "matrix products of the backbone"),
    "texts alone, generation": ("at most 1.02", "starting operations, then reading weights"),
    "mixed batch": ("at most 1.05", "matrix products; adapters split them into smaller ones"),
    "installed modalities": ("at most 1.02", "matrix products"),
    "generation, 8 x 32": ("at least 2.5 (fp32) or 5 (bf16)", "matrix products of the prompts, then reading weights"),
    "generation, 64 requests": ("at least 5", "matrix products of the prompts, then reading weights"),
    "decoding, 64 requests": ("share at least 0.5", "reading weights; with many rows, matrix products"),
    "decoding one sample": ("at least 1.2", "reading weights"),
    "time to first token": ("at least 1.43", "matrix products and attention of the tower, then of the prompt"),
    "memory of the head": ("less than 300 MB", "one chunk of logits and its gradient"),
}
PLOTS = {
    "mixed batch": ("adapters in the batch", "adapters"),
    "installed modalities": ("modalities installed", "installed"),
    "time against tokens": ("tokens in the pack", "tokens"),
    "time against share of pictures": ("share of samples with a picture", "pictures"),
    "time against running samples": ("samples that decode together", "running"),
}


def write() -> None:
    """Draws the plots and puts the tables between the marks of benchmarks/README.md."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    plots = [draw(results, name) for name in PLOTS if any(result["name"] == name for result in results.values())]
    path = HOME / "README.md"
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path}: needs the lines {BEGIN!r} and {END!r} once each; the results go between them")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = [*_machine(results), "", *_tables(results), *plots]
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


def _machine(results: Mapping[str, Any]) -> Iterator[str]:
    for about in {json.dumps(result["environment"], sort_keys=True) for result in results.values()}:
        where = json.loads(about)
        card = f", {where['card']}" if where["card"] else ""
        yield (
            f"Measured on {where['cores']} cores of {where['processor']}{card}, {where['threads']} threads; Python "
            f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}, peft {where['peft']}."
        )
    peaks = [result for result in results.values() if result["matrix_product_flop_per_second"]]
    fastest = {}
    for result in peaks:
        product, copied = fastest.get(result["dtype"], (0.0, 0.0))
        product = max(product, result["matrix_product_flop_per_second"])
        fastest[result["dtype"]] = product, max(copied, result["copy_bytes_per_second"])
    rounds = sorted({len(row["seconds"]) for result in results.values() for row in result["rows"] if "seconds" in row})
    yield f"Rounds of each comparison: {' or '.join(map(str, rounds))}."
    for dtype, (product, copied) in fastest.items():
        yield f"Fastest product of matrices in {dtype}: {product / 1e9:,.0f} GFLOP/s; copy: {copied / 1e9:.1f} GB/s."


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    for name, (bar, bound) in ROWS.items():
        for result in results.values():
            if result["name"] == name:
                title, about = name[0].upper() + name[1:], result["about"]
                yield f"**{title}**, {result['dtype']}: {about}. Wanted: {bar}. Bound by {bound}.\n"
                yield "| side | best | median | ratio | spread | share | grows by |"
                yield "|---|---:|---:|---:|---:|---:|---:|"
                for row in result["rows"]:
                    yield f"| {' | '.join([row['side'], *_figures(row)])} |"
                yield ""


def _figures(row: Mapping[str, Any]) -> Sequence[str]:
    memory = "" if row["step_bytes"] is None else f"{row['step_bytes'] / 1e6:,.0f} MB"
    if "seconds" not in row:
        return ["", "", "", "", "", memory]
    value, of = bounding_share(row)
    share = "" if value is None else f"{value:.2f} of {of}"
    low, high = row["ratios"]
    return [_time(row["best"]), _time(row["median"]), f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", share, memory]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def draw(results: Mapping[str, Any], name: str) -> str:
    """Draws best seconds along an axis, a line for each side; returns the line that shows the plot."""
    import matplotlib.pyplot as plt

    axis, file = PLOTS[name]
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    lines: dict[str, list[tuple[float, float]]] = {}
    about = ""
    for result in results.values():
        if result["name"] == name:
            about = result["about"]
            for row in result["rows"]:
                # A side's name ends with the place on the axis; what stands before is the same along a line.
                side = row["side"].rsplit(", ", 1)[0] if ", " in row["side"] else "molora"
                lines.setdefault(f"{side}, {result['dtype']}", []).append((row["at"], row["best"]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel=axis, ylabel="seconds", ylim=(0, None), title=about)
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    path = HOME / "plots" / f"{file}.svg"
    path.parent.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = file  # the same file for the same figures
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return f"![seconds by {axis}](plots/{file}.svg)"


if __name__ == "__main__":
    write()
