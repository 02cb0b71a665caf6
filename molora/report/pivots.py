"""The page of a search for pivotal tokens: solutions with their probability along the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.report.page import filled
from molora.storage import write_text

_WIDTH, _HEIGHT = 720, 120
# Solutions shown, those with pivotal tokens first.
_MOST_SHOWN = 100


def write_page(path: Path, found: Sequence[tuple[str, Mapping[str, Any]]], decode: Callable[..., str]) -> None:
    """Writes a page of the solutions of rows, each row with the answer that was expected."""
    solutions = [(expected, each) for expected, row in found for each in row["solutions"]]
    solutions.sort(key=lambda each: not each[1]["pivots"])
    shown = [_solution(expected, each, decode) for expected, each in solutions[:_MOST_SHOWN]]
    pieces = filled("pivots.html.j2", solutions=shown, count=len(solutions), width=_WIDTH, height=_HEIGHT)
    write_text(path, "".join(pieces))


def _solution(expected: str, solution: Mapping[str, Any], decode: Callable[..., str]) -> dict[str, Any]:
    tokens, known = solution["token_ids"], solution["probabilities"]
    pivots = {each["place"]: each for each in solution["pivots"]}
    # Between two prefixes that were looked at nothing moves, but at a pivotal token.
    share, shares = known[0]["share"], {}
    for each in known:
        shares[each["place"]] = each["share"]
    spans = []
    for place, token in enumerate(tokens):
        share = shares.get(place, share)
        if place in pivots:
            share = pivots[place]["after"]
        spans.append({"text": decode([token]), "share": share, "pivot": pivots.get(place)})

    def at(place: float, share: float) -> str:
        return f"{_WIDTH * place / max(1, len(tokens)):.1f},{_HEIGHT * (1 - share):.1f}"

    line = " ".join(at(each["place"], each["share"]) for each in known)
    band = [at(each["place"], each["interval"][1]) for each in known]
    band += [at(each["place"], each["interval"][0]) for each in reversed(known)]
    return {
        "expected": expected,
        "right": solution["right"],
        "spans": spans,
        "line": line,
        "band": " ".join(band),
        "marks": [(_WIDTH * (each["place"] + 1) / max(1, len(tokens)), each) for each in solution["pivots"]],
    }
