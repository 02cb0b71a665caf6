"""Whether pivotal tokens are found again in fresh draws.

    python -m benchmarks.pivots MODEL IN.jsonl OUT.jsonl [--metric exact_match] [--max-new-tokens 128] [--draws 160]
        [--plot FILE.svg] [--json FILE]

IN.jsonl and OUT.jsonl are those of `molora pivot`, and metric and length should be its own. Behind the tokens before
each pivotal one, and behind those with it, as many solutions are drawn with another seed and rated. Printed: how many
changes have the same sign, how many intervals of both overlap, and the correlation of the two estimates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import molora
from benchmarks.evidence.page import save_figure
from molora.evaluate.questions import Question
from molora.inference.generate import GenerationConfig
from molora.inference.load import Answer, LoadedModel
from molora.synthetic.pivot import PivotSearch
from molora.synthetic.pivotal import Prefix, SearchConfig, difference
from molora.synthetic.rated import Verifier, open_verifier


@dataclass(frozen=True)
class Token:
    """A pivotal token that was found: its question, the solution's tokens before it, itself, its text, the change, and
    its interval."""

    asked: Question
    before: tuple[int, ...]
    token_id: int
    text: str
    change: float
    interval: tuple[float, float]


def found(search: PivotSearch) -> Iterator[Token]:
    for asked, row in search.found():
        for solution in row["solutions"]:
            for pivot in solution["pivots"]:
                before = tuple(solution["token_ids"][: pivot["place"]])
                low, high = pivot["interval"]
                change = pivot["after"] - pivot["before"]
                yield Token(asked, before, pivot["token_id"], pivot["token"], change, (low, high))


def drawn(
    loaded: LoadedModel, asked: Question, before: tuple[int, ...], verifier: Verifier, how: GenerationConfig, draws: int
) -> Prefix:
    """What comes of so many solutions that go on behind some tokens; of tokens that end one, that alone."""
    if before and before[-1] in loaded.model.backbone.stop_ids:
        whole = Answer(asked.id, loaded.text(before[:-1]).strip(), (), 0, before, "stop")
        return Prefix(len(before), known=verifier.rate(asked, whole)[1])
    sample = loaded.encode(asked.prompt, asked.id).followed_by(before)
    prefix = Prefix(len(before))
    samples = [replace(sample, id=f"{asked.id}#{len(before)}#{number}") for number in range(draws)]
    for answer in loaded.answers(samples, replace(how, max_new_tokens=max(1, how.max_new_tokens - len(before)))):
        tokens = (*before, *answer.token_ids)
        whole = replace(answer, text=loaded.text(tokens).strip(), token_ids=tokens)
        prefix.draws.append((-1, verifier.rate(asked, whole)[1]))
    return prefix


def plot(tokens: list[Token], again: list[dict[str, Any]], path: Path) -> None:
    figure, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    ax.plot([-1, 1], [-1, 1], color="grey", linewidth=0.8)
    ax.axhline(0, color="grey", linewidth=0.5)
    ax.axvline(0, color="grey", linewidth=0.5)
    for token, each in zip(tokens, again, strict=True):
        (low, high), (other_low, other_high) = token.interval, each["interval"]
        x, y = token.change, each["change"]
        bars = {"xerr": [[x - low], [high - x]], "yerr": [[y - other_low], [other_high - y]]}
        ax.errorbar(x, y, **bars, fmt="o", markersize=4, linewidth=0.6, color="C0")
    ax.set(xlim=(-1, 1), ylim=(-1, 1), xlabel="change found by the search", ylabel="change in fresh draws")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("messages", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--metric", default="exact_match")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--draws", type=int, default=160, help="behind each prefix (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another than the search's (default: %(default)s)")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    verifier = open_verifier(given.metric)
    how = GenerationConfig(max_new_tokens=given.max_new_tokens, temperature=given.temperature, seed=given.seed)
    config = SearchConfig()
    tokens = list(found(PivotSearch(given.messages, given.output, verifier, config)))
    if len(tokens) < 2:
        parser.error(
            f"{given.output}: has {len(tokens)} pivotal tokens, and two at least are compared; search more rows"
        )
    loaded = molora.load(given.model, device="cpu")
    again: list[dict[str, Any]] = []
    for token in tokens:
        ends = (token.before, (*token.before, token.token_id))
        before, after = (drawn(loaded, token.asked, each, verifier, how, given.draws) for each in ends)
        change, interval = after.share - before.share, difference(before, after, config.deviations)
        again.append({"question": token.asked.id, "token": token.text, "found": token.change, "change": change})
        again[-1]["interval"] = interval
        low, high = interval
        print(
            f"{token.text!r}: {token.change:+.2f}, in fresh draws {change:+.2f} ({low:+.2f} to {high:+.2f})", flush=True
        )
    changes = np.array([[token.change, each["change"]] for token, each in zip(tokens, again, strict=True)])
    same = int((changes.prod(1) > 0).sum())
    inside = sum(
        token.interval[0] <= each["interval"][1] and each["interval"][0] <= token.interval[1]
        for token, each in zip(tokens, again, strict=True)
    )
    print(
        f"{len(tokens)} pivotal tokens: {same} move the same way in fresh draws, the intervals of {inside} overlap, "
        f"mean change {abs(changes[:, 0]).mean():.3f} and {abs(changes[:, 1]).mean():.3f}, correlation "
        f"{np.corrcoef(changes.T)[0, 1]:.3f}"
    )
    if given.plot:
        plot(tokens, again, given.plot)
    if given.json:
        given.json.write_text(json.dumps(again, indent=1) + "\n")


if __name__ == "__main__":
    main()
