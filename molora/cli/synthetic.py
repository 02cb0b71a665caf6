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
    from functools import partial

    from molora.config import options as read_options
    from molora.inference.drawn import drawn_by
    from molora.inference.generate import GenerationConfig
    from molora.synthetic import roll_out as rolling
    from molora.synthetic.rated import open_verifier, write_rows
    from molora.terminal import say, warn

    verifier = open_verifier(metric, at_least, read_options(settings or ()))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_running_samples=max_running_samples,
    )
    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin)
    by = partial(drawn_by, model, modality or (), rule or (), config)
    rows = rolling.RollOut(messages, output, answers, verifier, by)
    with rows.held({"--accepted": accepted, "--pairs": pairs}):
        if rows.num_left:
            rows.draw(load(), config)
        prompts = list(rows.drawn())
    rates = [f"{name} {share:.3f}" for name, share in rolling.success_rates(prompts).items()]
    say(", ".join(rates) or "no prompt has all its answers")
    for path, make in ((accepted, rolling.accepted), (pairs, rolling.pairs)):
        if path is not None:
            count = write_rows(path, (row for each in prompts for row in make(each, per_prompt, seed)))
            say(f"{path}: {count} rows")
    if rows.failed:
        warn(f"{output}: {len(rows.failed)} answers failed and are drawn again by the next call: {rows.failed[0]}")
        raise typer.Exit(options.FAILED_ROWS)


@app.command()
def pivot(
    model: options.Model,
    messages: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows that end with the right answer.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where searches go, question by question.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value]…", help="The metric's options.")] = None,
    metric: Annotated[str, typer.Option(help="What tells how right an answer is, from 0 to 1.")] = "exact_match",
    at_least: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the metric, for a right answer.")] = 1.0,
    solutions: Annotated[int, typer.Option(min=1, help="Solutions searched of a question, right and wrong ones.")] = 2,
    threshold: Annotated[float, typer.Option(help="By how much a pivotal token moves the probability.")] = 0.2,
    confidence: Annotated[float, typer.Option(help="Of the intervals that decide.")] = 0.975,
    most: Annotated[int, typer.Option(help="Draws behind a prefix at most.")] = 160,
    rows: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Where pivotal tokens go, published.")] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="Where preferences go.")] = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Where a page of the solutions goes.")] = None,
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
    """Find the tokens of the model's own solutions at which the probability that they end right changes, for rows of
    {"id", "messages"}. Draws go on until an interval decides. Tokens become rows as they are published, preferences of
    single tokens for `kind: preferences`, and a page. The same call goes on where it stopped."""
    from functools import partial

    from molora.config import options as read_options
    from molora.inference.drawn import drawn_by
    from molora.inference.generate import GenerationConfig
    from molora.report.pivots import write_page
    from molora.synthetic import pivot as pivoting
    from molora.synthetic.pivotal import SearchConfig
    from molora.synthetic.rated import open_verifier, write_rows
    from molora.terminal import say, warn

    verifier = open_verifier(metric, at_least, read_options(settings or ()))
    config = SearchConfig(threshold=threshold, confidence=confidence, most=most)
    decoding = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        max_running_samples=max_running_samples,
    )
    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin)
    by = partial(drawn_by, model, modality or (), rule or (), decoding)
    search = pivoting.PivotSearch(messages, output, verifier, config, solutions, by)
    with search.held({"--rows": rows, "--pairs": pairs, "--page": page}):
        loaded = load()
        if search.left:
            search.find(loaded, decoding)
        found = list(search.found())
    decode = loaded.processor.decode
    for line in search.summary([row for _, row in found]):
        say(line)
    made = (
        (rows, (each for asked, row in found for each in pivoting.published_rows(asked, row, decode))),
        (pairs, (each for asked, row in found for each in pivoting.pairs(asked, row, decode, threshold))),
    )
    for path, some in made:
        if path is not None:
            say(f"{path}: {write_rows(path, some)} rows")
    if page is not None:
        write_page(page, [(asked.expected, row) for asked, row in found if row["solutions"]], decode)
        say(f"{page}: written")
    if search.failed:
        warn(f"{output}: {len(search.failed)} questions failed and are tried again: {search.failed[0]}")
        raise typer.Exit(options.FAILED_ROWS)
