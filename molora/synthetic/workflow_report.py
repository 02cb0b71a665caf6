"""What a workflow made, in numbers and examples: report.json, and report.md to read.

Letters: N texts, D backbone width.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from molora.data.messages import parts
from molora.evaluate.normalise import words
from molora.inference.load import LoadedModel
from molora.storage import write_json, write_text
from molora.synthetic.kept import digest
from molora.synthetic.models import LocalModel
from molora.synthetic.rows import Row, texts_in
from molora.synthetic.workflow import Done, Workflow
from molora.terminal import print_table, say

FORMAT_VERSION = "1.0"
_EXAMPLES = 3
_MOST_CHARACTERS = 300
_RANGES = 10


def report(workflow: Workflow, done: Sequence[Done]) -> dict[str, Any]:
    """Writes the report of a workflow that has run, and prints its table of steps."""
    rows = done[-1].rows
    found: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "rows": len(rows),
        "tokens": workflow.kept.tokens,
        "budget_tokens": workflow.config.budget_tokens,
        "steps": [_step(each, step) for each, step in zip(done, workflow.steps, strict=True)],
        "columns": {name: _diversity(workflow, texts) for name, texts in _columns(rows).items()},
        "examples": [{"id": row.id, **row.columns} for row in _spaced(rows, _EXAMPLES)],
    }
    write_json(workflow.folder / "report.json", found)
    write_text(workflow.folder / "report.md", _page(workflow, found))
    headings = ("step", "kind", "rows before", "rows", "left out for")
    lines = [
        (step["name"], step["kind"], str(step["before"]), str(step["rows"]), _reasons(step, 2))
        for step in found["steps"]
    ]
    print_table(headings, lines, wide="left out for", right=("rows before", "rows"))
    for told in _faults(workflow, found["steps"]):
        say(told)
    say(
        f"{workflow.folder / 'rows.jsonl'}: {len(rows):,} rows, for {found['tokens']:,} tokens; see report.md beside it"
    )
    return found


def _step(done: Done, step: Any) -> dict[str, Any]:
    rates = getattr(step, "rates", None)
    asked = {
        "answers": len(done.replies),
        "prompt_tokens": sum(reply.prompt_tokens for reply in done.replies),
        "answer_tokens": sum(reply.answer_tokens for reply in done.replies),
    }
    return {
        "name": done.config.name,
        "kind": done.config.kind,
        "before": done.num_before,
        "rows": len(done.rows),
        "accepted": 1 - len(done.dropped) / done.num_before if done.num_before else None,
        "dropped": done.reasons,
        **({"fault": " ".join(done.fault.split())[:_MOST_CHARACTERS]} if done.fault else {}),
        **(asked if done.replies else {}),
        **({} if rates is None else {"ratings": _ratings(done, rates)}),
    }


def _ratings(done: Done, column: str) -> dict[str, Any]:
    """How many rows were kept and dropped by the number in a column, in ranges of equal width."""
    kept = [float(row.columns[column]) for row in done.rows]
    dropped = [float(each.row.columns[column]) for each in done.dropped if column in each.row.columns]
    edges = _edges([*kept, *dropped])
    counts = {
        name: np.histogram(values, edges)[0].tolist() if len(edges) else []
        for name, values in {"kept": kept, "dropped": dropped}.items()
    }
    return {"column": column, "edges": edges.tolist(), **counts}


def _edges(values: Sequence[float]) -> np.ndarray:
    """The edges of ranges of equal width; of one, for numbers between which there are not so many."""
    if not values:
        return np.zeros(0)
    try:
        return np.histogram_bin_edges(values, _RANGES)
    except ValueError:
        return np.array([min(values), max(values)])


def _columns(rows: Iterable[Row]) -> dict[str, list[str]]:
    """The texts of each column; those of a conversation by who speaks."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.columns.items():
            if name == "messages" and isinstance(value, list):
                for message in value:
                    said = [part["text"] for part in parts(message) if part["type"] == "text" and part["text"].strip()]
                    found.setdefault(f"{name}: {message['role']}", []).extend(said)
            else:
                found.setdefault(name, []).extend(text for text in texts_in(value) if text.strip())
    return {name: texts for name, texts in found.items() if texts}


def _diversity(workflow: Workflow, texts: Sequence[str]) -> dict[str, Any]:
    split = [words(text) for text in texts]
    found: dict[str, Any] = {
        "texts": len(texts),
        "different": len({*texts}),
        "mean_words": sum(map(len, split)) / len(split),
        **{f"distinct_{length}": _distinct(split, length) for length in (1, 2, 3)},
    }
    local = next((model for model in workflow.models.values() if isinstance(model, LocalModel)), None)
    if local is not None and len(texts) > 1:
        key = digest("spread", local.identity, list(texts))
        if (kept := workflow.kept.get(key)) is None:
            workflow.kept.keep({key: (kept := {"spread": spread(local.loaded, texts)})})
        found["spread"] = kept["spread"]
    return found


def _distinct(split: Sequence[Sequence[str]], length: int) -> float | None:
    """Different runs of so many words, for each run that there is. Source: distinct-n (arXiv 1510.03055)."""
    runs = [tuple(each[start : start + length]) for each in split for start in range(len(each) - length + 1)]
    return len({*runs}) / len(runs) if runs else None


def spread(loaded: LoadedModel, texts: Sequence[str]) -> float:
    """How far texts lie apart, from 0 for equal ones: one less the mean cosine between two of them, each the mean of
    its tokens' embeddings in the backbone."""
    tokenizer: Any = loaded.processor.tokenizer
    table_VD = loaded.model.backbone.embeddings_VD
    ids = [each for text in texts if (each := tokenizer(text, add_special_tokens=False)["input_ids"])]
    if (number := len(ids)) < 2:
        return 0.0
    with torch.no_grad():
        means = [table_VD[torch.tensor(each, device=table_VD.device)].float().mean(0) for each in ids]
        units_ND = torch.nn.functional.normalize(torch.stack(means), dim=-1)
        all_pairs = float(units_ND.sum(0).square().sum()) - float(units_ND.square().sum())
    return 1 - all_pairs / (number * (number - 1))


def _spaced(rows: Sequence[Row], count: int) -> list[Row]:
    """Rows that lie evenly apart."""
    return [rows[number * len(rows) // count] for number in range(min(count, len(rows)))]


def _reasons(step: Mapping[str, Any], most: int) -> str:
    dropped = [f"{reason} ({count})" for reason, count in step["dropped"].items()]
    return ", ".join(dropped[:most]) + (", …" if len(dropped) > most else "")


def _faults(workflow: Workflow, steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line on the first row of each step that could do nothing with it, and where the others are."""
    folder = workflow.folder / "dropped"
    return [f"{step['name']}: {step['fault']}; see {folder / step['name']}.jsonl" for step in steps if "fault" in step]


def _page(workflow: Workflow, found: Mapping[str, Any]) -> str:
    budget = found["budget_tokens"]
    lines = [
        f"# {workflow.folder.name}",
        "",
        f"{found['rows']:,} rows, made by `molora make {workflow.where}` for {found['tokens']:,} tokens"
        + (f" of {budget:,}." if budget else "."),
        "",
        "## Steps",
        "",
        "| step | kind | rows before | rows | accepted | answers | tokens | left out for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in found["steps"]:
        accepted = "" if step["accepted"] is None else f"{step['accepted']:.0%}"
        tokens = step.get("prompt_tokens", 0) + step.get("answer_tokens", 0)
        cells = (step["name"], step["kind"], step["before"], step["rows"], accepted)
        asked = (f"{step['answers']:,}", f"{tokens:,}") if "answers" in step else ("", "")
        lines.append("| " + " | ".join(_cell(str(each)) for each in (*cells, *asked, _reasons(step, 9))) + " |")
    for told in _faults(workflow, found["steps"]):
        lines += ["", f"    {told}"]
    for step in found["steps"]:
        if (ratings := step.get("ratings")) and ratings["edges"]:
            lines += [
                "",
                f"## {step['name']}: {ratings['column']}",
                "",
                "| from | to | kept | dropped |",
                "|---|---|---|---|",
            ]
            edges = itertools.pairwise(ratings["edges"])
            for (low, high), kept, dropped in zip(edges, ratings["kept"], ratings["dropped"], strict=True):
                lines.append(f"| {low:.3g} | {high:.3g} | {kept} | {dropped} |")
    lines += [
        "",
        "## Diversity",
        "",
        "`distinct-n` is the share of runs of n words that are different; `spread` is 0 where all texts are the same",
        "to the backbone's embeddings.",
        "",
        "| column | texts | different | mean words | distinct-1 | distinct-2 | distinct-3 | spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found["columns"].items():
        shares = [each[f"distinct_{length}"] for length in (1, 2, 3)] + [each.get("spread")]
        numbers = [f"{each['texts']:,}", f"{each['different']:,}", f"{each['mean_words']:.1f}"]
        numbers += ["" if share is None else f"{share:.3f}" for share in shares]
        lines.append("| " + " | ".join((_cell(name), *numbers)) + " |")
    lines += ["", "## Examples", ""]
    for row in found["examples"]:
        lines += ["```json", json.dumps(_shortened(row), ensure_ascii=False, indent=2), "```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        text = value.replace("```", "'''")
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value] if isinstance(value, list) else value
