"""What a check found, for a person within 80 columns and for a program as JSON."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from molora.data_tools.check import Checked, Outcome
from molora.data_tools.faults import KINDS, Fault
from molora.storage import write_json
from molora.terminal import Finding, print_findings, print_table, say, styled
from molora.train.recipe import Recipe

FORMAT_VERSION = "1.0"

# Of each kind of fault, as many are printed; all of them are in the JSON file.
_SHOWN_FAULTS = 3
_SHOWN_CHARACTERS = 320
_BINS = 8
_BAR_COLUMNS = 40


def print_outcome(recipe: Recipe, outcome: Outcome) -> None:
    """Prints each stage and the evaluations with their rows and tokens, then what is wrong."""
    for index, stage in enumerate(recipe.stages):
        sources = [checked for checked in outcome.sources if checked.named.stage is stage]
        length = f"{sources[0].steps:,} steps" if sources[0].steps else "steps"
        packs = _packs(sources, stage.tokens_per_pack)
        say(
            styled(f"stages.{index} ({stage.name})", "bold"),
            f": {length} of {stage.samples_per_step:,} samples{packs}",
        )
        _print_sources(sources)
        _print_histogram([length for checked in sources for length in checked.lengths])
    if evaluations := [checked for checked in outcome.sources if checked.named.evaluation is not None]:
        say(styled("evaluations", "bold"))
        _print_sources(evaluations)
        say()
    print_findings("what", _findings(outcome))


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Writes all that was found as JSON."""
    sources = [
        {
            "source": checked.named.key,
            "rows": checked.num_rows,
            "rows_checked": checked.num_checked,
            "rows_usable": len(checked.lengths),
            "rows_per_step": checked.rows_per_step,
            "epochs": checked.epochs,
            "tokens_by_modality": dict(checked.tokens),
            "target_tokens": checked.num_targets,
            "tokens_of_a_row": {
                **({"median": statistics.median(checked.lengths)} if checked.lengths else {}),
                "most": max(checked.lengths, default=0),
                "histogram": [
                    {"from": first, "to": last, "rows": count} for first, last, count in histogram(checked.lengths)
                ],
            },
        }
        for checked in outcome.sources
    ]
    faults = [{**asdict(fault), "remedy": fault.remedy} for fault in outcome.faults]
    write_json(path, {"format_version": FORMAT_VERSION, "ok": outcome.ok, "sources": sources, "faults": faults})


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Bins of equal width over whole numbers: the first and last number of each, and how many there are."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + index * width, min(low + (index + 1) * width - 1, high), n) for index, n in enumerate(counts)]


def _packs(sources: Sequence[Checked], tokens_per_pack: int) -> str:
    """The packs that a step fills, by the mean length of what its sources give."""
    planned = [(checked.rows_per_step, checked.lengths) for checked in sources]
    if not planned or not all(rows is not None and lengths for rows, lengths in planned):
        return ""
    tokens = sum(rows * statistics.fmean(lengths) for rows, lengths in planned if rows is not None)
    packs = max(1, -(-int(tokens) // tokens_per_pack))
    return f", about {tokens:,.0f} tokens in {packs:,} pack{'s' * (packs > 1)} of {tokens_per_pack:,}"


def _print_sources(sources: Sequence[Checked]) -> None:
    rows = []
    for checked in sources:
        total = checked.tokens.total()
        shares = [f"{name} {count / total:.0%}" for name, count in checked.tokens.items()]
        read = f"{checked.num_checked:,}"
        if checked.num_checked < checked.num_rows:
            read += f" of {checked.num_rows:,}"
        rows.append(
            (
                checked.named.key.removesuffix(".data").rpartition(".")[2],
                read,
                f"{statistics.median(checked.lengths):,.0f}" if checked.lengths else "",
                f"{max(checked.lengths):,}" if checked.lengths else "",
                ", ".join(shares),
                f"{checked.num_targets / total:.0%}" if total and checked.named.stage else "",
                "" if checked.rows_per_step is None else f"{checked.rows_per_step:,.3g}",
                "" if checked.epochs is None else f"{checked.epochs:,.3g}",
            )
        )
    headings = ("source", "rows", "median tokens", "most", "tokens of", "learned", "rows a step", "epochs")
    print_table(headings, rows, wide="tokens of", right=("rows", "median tokens", "most", "learned", *headings[-2:]))


def _print_histogram(lengths: Sequence[int]) -> None:
    if bins := histogram(lengths):
        most = max(count for _, _, count in bins)
        rows = []
        for first, last, count in bins:
            bar = "█" * round(_BAR_COLUMNS * count / most) or ("▏" if count else "")
            rows.append((f"{first:,}" if first == last else f"{first:,} to {last:,}", f"{count:,}", bar))
        say()
        print_table(("tokens of a row", "rows", ""), rows, wide="", right=("tokens of a row", "rows"))
    say()


def _findings(outcome: Outcome) -> Iterator[Finding]:
    """One for each kind of fault, with the first of them; the rows that are right are one too."""
    checked = sum(each.num_checked for each in outcome.sources)
    wrong = {(fault.source, fault.row) for fault in outcome.faults if fault.row is not None}
    yield Finding("rows", f"{checked:,} checked, {checked - len(wrong):,} without a finding")
    for (kind, is_error), faults in groupby(outcome.faults, key=lambda fault: (fault.kind, fault.is_error)):
        yield Finding(kind, _first_of(list(faults)), False if is_error else None, remedy=KINDS[kind].remedy)


def _first_of(faults: Sequence[Fault]) -> str:
    """What the faults of a kind are, how many there are, and the first of them."""
    lines = [f"{KINDS[faults[0].kind].title}: {len(faults):,}"]
    for fault in faults[:_SHOWN_FAULTS]:
        told = f"{fault.where}: {fault.what}"
        lines.append(told if len(told) <= _SHOWN_CHARACTERS else told[: _SHOWN_CHARACTERS - 1] + "…")
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"and {len(faults) - _SHOWN_FAULTS:,} more")
    return "\n".join(lines)
