"""Commands that answer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from molora.cli import options

app = typer.Typer()


@app.command()
def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(help="The question.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeat.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound; repeat.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(metavar="TYPE=PATH", help="A media part of any type; repeat.")
    ] = None,
    messages: Annotated[Path | None, typer.Option(metavar="IN.jsonl", help='Rows of {"id", "messages"}.')] = None,
    output: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="Where answers go, row by row.")] = None,
    modality: options.Modalities = None,
    rule: options.Rules = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Draw among the likeliest tokens that together have this probability."),
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw among so many of the likeliest tokens.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End an answer before this text; repeat.")
    ] = None,
    seed: int = 0,
    max_running_samples: Annotated[int, typer.Option(min=1, help="Rows answered at a time.")] = 64,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory for keys and values; rows wait for their share of it.")
    ] = None,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Tokens of prompts that enter in a step.")] = 2048,
    strict: options.Strict = False,
    shard: options.ShardText = None,
    merge: options.Merge = None,
    deterministic_batch: options.DeterministicBatch = False,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Answer one question, streamed; or, with --messages and --output, a mixed batch: a row that fails gets its error
    for an answer, and exit code 2 says so. Of N workers each does a --shard; the same call with --merge N instead makes
    the output of theirs."""
    from molora.config import ConfigError
    from molora.inference.answers import answer_rows
    from molora.inference.drawn import drawn_by
    from molora.inference.generate import GenerationConfig
    from molora.inference.shards import merge_answers
    from molora.terminal import visible

    if (messages is None) != (output is None):
        raise ConfigError("--messages and --output go together: rows come from one and answers go to the other")
    share = options.shard_of(shard, merge)
    if messages is None and (shard or merge):
        raise ConfigError("--shard and --merge are about rows; give them with --messages and --output")
    parts: list[dict[str, Any]] = []
    for type, paths in (("image", image), ("audio", audio)):
        parts += [{"type": type, "path": str(path)} for path in paths or ()]
    for given in part or ():
        type, equals, path = given.partition("=")
        if not (type and equals and path):
            raise ConfigError(f"--part {given!r}: write it as TYPE=PATH, such as image=a.png")
        parts.append({"type": type, "path": path})
    if temperature == 0 and (top_p < 1 or top_k is not None):
        raise ConfigError(
            "--top-p and --top-k say which tokens may be drawn, and without --temperature none is; give it"
        )
    if messages is None and not prompt and not parts:
        raise ConfigError("nothing to answer: give a PROMPT, a picture, or --messages with --output")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=tuple(stop or ()),
        seed=seed,
        max_running_samples=max_running_samples,
        prefill_tokens=prefill_tokens,
        kv_cache_gib=kv_cache_gib,
    )
    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin, deterministic_batch)
    if messages is not None and output is not None:
        if merge is not None:
            whole = merge_answers(messages, output, merge)
        else:
            notes = {"drawn": drawn_by(model, modality or (), rule or (), config)}
            whole = answer_rows(load, messages, output, config, shard=share, strict=strict, notes=notes)
        raise typer.Exit(0 if whole else options.FAILED_ROWS)
    loaded = load()
    content = parts + ([{"type": "text", "text": prompt}] if prompt else [])
    for piece in loaded.stream([{"role": "user", "content": content}], config):
        print(visible(piece), end="", flush=True)
    print()


@app.command()
def batch(config: options.Config, overrides: options.Overrides = None, trust_plugin: options.Trust = None) -> None:
    """Answer rows by any number, on the machines of a Ray cluster, as a config says: Parquet or JSONL files in its
    `output` that hold every row once. The same call goes on where it stopped; a row that fails has its error, and exit
    code 2 says so."""
    from molora.config import read
    from molora.inference.batch_job import BatchConfig, answer_batch
    from molora.terminal import say, warn

    done = answer_batch(read(BatchConfig, config, overrides or ()), trust_plugin or ())
    say(f"{done.folder}: {done.rows} rows are answered")
    if done.failed:
        told = f"{done.folder}: {done.failed} of {done.rows} rows have an error, such as: {done.first_error}"
        warn(f"{told}; mend that, and give the same call with retry_failed=true")
        raise typer.Exit(options.FAILED_ROWS)


@app.command()
def score(
    model: options.Model,
    messages: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Rows that end with an answer.")],
    output: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Where likelihoods go, row by row.")],
    modality: options.Modalities = None,
    rule: options.Rules = None,
    strict: options.Strict = False,
    deterministic_batch: options.DeterministicBatch = False,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Tell how probable the model finds given answers: the last message of each row of {"id", "messages"}. A row of the
    output has "log_probability" (natural logarithm), "num_tokens" and "is_greedy" (whether greedy decoding begins so).
    The same call goes on where it stopped; a row that fails gets its error, and exit code 2 says so."""
    from molora.inference.answers import score_rows
    from molora.inference.drawn import model_digest

    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin, deterministic_batch)
    notes = {"model": model_digest(model, modality or (), rule or ())}
    if not score_rows(load, messages, output, strict=strict, notes=notes):
        raise typer.Exit(options.FAILED_ROWS)


@app.command("eval")
def evaluate(
    model: options.Model,
    config: options.Config,
    overrides: options.Overrides = None,
    modality: options.Modalities = None,
    rule: options.Rules = None,
    strict: options.Strict = False,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where answers are kept; of a run, its `predictions` by default."),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Ask all questions again, also those with an answer.")] = False,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Metrics again, of the answers that are kept, without the model.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Differences from another run, or from answers in a folder."),
    ] = None,
    shard: options.ShardText = None,
    merge: options.Merge = None,
    deterministic_batch: options.DeterministicBatch = False,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Answer the evaluations of a config or a recipe: a table, JSON in MODEL/evaluation.json, or alone on standard
    output if MODEL is no run, and the answers with a page to look at them in MODEL/predictions. An interrupted call
    goes on where it stopped. Questions that cannot be asked are counted, and exit code 2 says so. Of N workers each
    asks a --shard of the questions; the same call with --merge N instead scores the answers of all."""
    from molora.config import ConfigError, read
    from molora.evaluate.compare import answers_of, compare, keep_comparisons, show_comparisons
    from molora.evaluate.judge import Evaluations
    from molora.evaluate.results import (
        Place,
        evaluate_model,
        evaluate_shard,
        merge_evaluations,
        rescore_model,
        show,
    )
    from molora.report.answers import write_pages

    if rescore and anew:
        raise ConfigError("--rescore and --anew contradict each other; leave one out")
    share = options.shard_of(shard, merge)
    if merge is not None and (rescore or anew):
        raise ConfigError("--merge scores the answers that shards have; leave --rescore and --anew out")
    if shard is not None and (rescore or against is not None):
        raise ConfigError("--shard has a part of the answers, and --rescore and --against want all; merge them first")
    evaluations = read(Evaluations, config, overrides or (), in_part=True).evaluations
    place = Place(model, modality or (), sorted(rule or ()), predictions)
    others = {} if against is None else answers_of(against, evaluations)
    load = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin, deterministic_batch)
    if share.count > 1:
        whole = evaluate_shard(load, place, evaluations, share, strict=strict, anew=anew)
        raise typer.Exit(0 if whole else options.FAILED_ROWS)
    if merge is not None:
        results = merge_evaluations(place, evaluations, merge)
    elif rescore:
        results = rescore_model(place, evaluations)
    else:
        results = evaluate_model(load, place, evaluations, strict=strict, anew=anew)
    show(results, place)
    comparisons = [] if against is None else compare(results, against, others)
    if against is not None:
        show_comparisons(comparisons, against)
        keep_comparisons(comparisons, place)
    write_pages(results, place, comparisons)
    if any(result.scores["failed"] for result in results):
        raise typer.Exit(options.FAILED_ROWS)
