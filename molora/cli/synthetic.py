"""Commands that make data."""

from pathlib import Path
from typing import Annotated

import typer

from molora.cli import options

app = typer.Typer()


@app.command()
def make(
    config: options.Config,
    overrides: options.Overrides = None,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Make data with models, step by step, as a workflow says: rows with where each comes from, and a report. The same
    call goes on where it stopped."""
    from functools import partial

    from molora.inference.load import load
    from molora.synthetic.workflow import open_workflow
    from molora.synthetic.workflow_report import report

    opener = partial(
        load,
        allow_urls=allow_urls,
        allow_private_addresses=allow_private_addresses,
        trust=trust_plugin or (),
    )
    workflow = open_workflow(config, overrides or (), opener)
    report(workflow, workflow.run())


@app.command("roll-out")
def roll_out(
    model: options.Model,
    messages: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows that end with the right answer.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where answers go, row by row.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value]…", help="The metric's options.")] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers drawn for each prompt.")] = 8,
    metric: Annotated[str, typer.Option(help="What tells how right an answer is, from 0 to 1.")] = "exact_match",
    at_least: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the metric, for a right answer.")] = 1.0,
    accepted: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Where right answers go.")] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Where preferences go.")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Right answers, or pairs, of a prompt at most.")] = 2,
    modality: options.Modalities = None,
    rule: options.Rules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.01)] = 0.8,
    top_p: Annotated[float, typer.Option(metavar="SHARE", help="Draw among the likeliest tokens.")] = 1.0,
    seed: int = 0,
    max_running_samples: Annotated[int, typer.Option(min=1, help="Answers drawn at a time.")] = 64,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Draw several answers for each row of {"id", "messages"}, and tell the right ones by the last message. Right
    answers become rows for `kind: messages`, pairs of a right and a wrong one rows for `kind: preferences`. The same
    call goes on where it stopped; a row that fails gets its error, and exit code 2 says so."""
    from molora.config import options as read_options
    from molora.inference.generate import GenerationConfig
    from molora.synthetic import roll_out as rolling
    from molora.terminal import say, warn

    verifier = rolling.open_verifier(metric, at_least, read_options(settings or ()))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_running_samples=max_running_samples,
    )
    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin)
    rows = rolling.RollOut(messages, output, answers)
    with rows.held(verifier):
        if rows.num_left:
            rows.draw(load(), config, verifier)
        drawn = list(rows.drawn())
    rates = [f"{name} {share:.3f}" for name, share in rolling.success_rates(drawn).items()]
    say(", ".join(rates) or "no prompt has all its answers")
    for path, make in ((accepted, rolling.accepted), (pairs, rolling.pairs)):
        if path is not None:
            count = rolling.write_rows(path, (row for each in drawn for row in make(each, per_prompt, seed)))
            say(f"{path}: {count} rows")
    if rows.failed:
        warn(f"{output}: {len(rows.failed)} answers failed and are drawn again by the next call: {rows.failed[0]}")
        raise typer.Exit(options.FAILED_ROWS)
