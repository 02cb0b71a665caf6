"""A judge that is served by `molora serve` rates the answers of a roll-out by a rubric."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from molora.cli.commands import app
from tests.serve.conftest import Folders, serving

RUBRIC = "Is {answer} what {question} asks for, as {expected}? From {lowest:g} to {highest:g}:"
# The tiny model says nothing that is a number, so its reply is held to one.
FORM = {"type": "json_schema", "json_schema": {"name": "score", "schema": {"type": "integer", "enum": [1, 2, 3, 4]}}}


def test_a_served_model_rates_a_roll_out_by_a_rubric_that_is_kept(folders: Folders, tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"}]}
        for n in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["roll-out", str(folders.backbone), str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")]
    more = ["--metric", "judge", "--at-least", "0.5", "--answers", "4", "--max-new-tokens", "6"]
    with serving(folders, tmp_path / "log", []) as served:
        options = [f"url={served.address}/v1", "model=tiny", "lowest=1", "highest=4", f"prompt={json.dumps(RUBRIC)}"]
        options.append(f"more={json.dumps({'response_format': FORM})}")
        done = CliRunner().invoke(app, [*command, *options, *more])
        assert done.exit_code == 0, done.output
        answers = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
        assert len(answers) == 12 and {row["rating"] for row in answers} <= {0.0, 1 / 3, 2 / 3, 1.0}
        assert all(row["right"] == (row["rating"] >= 0.5 and row["finished"] == "stop") for row in answers)
        other = CliRunner().invoke(app, [*command, *options, "max_tokens=7", *more])
    assert other.exit_code == 1 and "give the same metric" in str(other.exception)
