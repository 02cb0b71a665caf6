"""Commands about data, before anything trains."""

from pathlib import Path
from typing import Annotated

import typer

from molora.cli import options

app = typer.Typer(help="Data before training: checked, shown, converted, indexed.", no_args_is_help=True)

Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="Read the first N rows of each source only.")]


@app.command()
def check(
    config: options.Config,
    overrides: options.Overrides = None,
    limit: Limit = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything found as JSON too.")] = None,
    trust_plugin: options.Trust = None,
) -> None:
    """Read every row of a recipe's data and decode its media; say what would stop or spoil training.

    The exit code is 1 if there is any such row. No weights are read."""
    from molora.config import read
    from molora.data_tools.check import check as check_data
    from molora.data_tools.summary import print_outcome, write_outcome
    from molora.train.recipe import Recipe

    recipe = read(Recipe, config, overrides or ())
    outcome = check_data(recipe, limit=limit, trust=trust_plugin or ())
    print_outcome(recipe, outcome)
    if json is not None:
        write_outcome(outcome, json)
    raise typer.Exit(0 if outcome.ok else 1)


@app.command()
def show(
    config: options.Config,
    overrides: options.Overrides = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Rows of each source, from its first to its last.")] = 4,
    output: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page to write.")] = Path("data.html"),
    trust_plugin: options.Trust = None,
) -> None:
    """Write a page with rows of a recipe's data as the model sees them: media as they are prepared, tokens, which of
    them are learned, and the adapter that each sample takes."""
    from molora.config import read
    from molora.data_tools.show import write_page
    from molora.terminal import say
    from molora.train.recipe import Recipe

    write_page(read(Recipe, config, overrides or ()), output, rows=rows, trust=trust_plugin or ())
    say(f"done: {output}")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml|ROWS.jsonl", help="A recipe, or a file of conversations.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write; it must not be there yet.")],
    overrides: options.Overrides = None,
    limit: Limit = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Write tar shards of N rows, not JSONL and files.")
    ] = None,
    strict: options.Strict = False,
) -> None:
    """Write rows as JSONL of messages with their media as files beside it, or as shards of webdataset: every source of
    a recipe, or a file of conversations.

    A row that cannot be written, as its medium is missing, is left out and told; the exit code is 2 if any was."""
    from molora.config import ConfigError, read
    from molora.data.sources import SourceConfig
    from molora.data_tools.convert import convert as convert_data
    from molora.data_tools.opening import sources_of
    from molora.terminal import say, warn
    from molora.train.recipe import Recipe

    if source.suffix in (".yaml", ".yml"):
        recipe = read(Recipe, source, overrides or ())
        sources = {named.name: named.config for named in sources_of(recipe)}
    elif overrides:
        raise ConfigError(f"{overrides[0]}: settings go with a recipe, and {source} is a file of conversations")
    else:
        sources = {source.name.partition(".")[0]: SourceConfig(kind="messages", options={"path": str(source)})}
    written = convert_data(sources, target, limit=limit, rows_per_shard=rows_per_shard, strict=strict)
    for reason in written.why:
        warn(f"left out: {reason}")
    if written.num_left_out > len(written.why):
        warn(f"and {written.num_left_out - len(written.why):,} more rows are left out")
    say(f"done: {target}, {written.num_rows:,} rows, {written.num_media:,} media")
    raise typer.Exit(options.FAILED_ROWS if written.num_left_out else 0)


@app.command()
def index(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH…",
            help="tar, Parquet or JSONL: files, patterns, train-{000..099}.tar, hf://datasets/OWNER/NAME/train-*.tar.",
        ),
    ],
    disk_gib: Annotated[
        float | None,
        typer.Option(metavar="GIB", min=0.001, help="Room on disk for files of the hub; 20 by default."),
    ] = None,
) -> None:
    """Find where the rows of large files are, once: training reads them through the index, which is kept beside each
    file, or in the cache. Indexes that are there and hold are left as they are."""
    from molora.data.index.build import files_of, indexed
    from molora.data.index.fetched import fetched
    from molora.terminal import progress, say

    of_hub = fetched(paths, disk_gib)
    files = files_of(paths) if of_hub is None else []
    with progress() as bars:
        bar = bars.add_task("indexing", total=None, note="")
        made = 0

        def show(done: int, missing: int) -> None:
            nonlocal made
            made = missing
            bars.update(bar, completed=done, total=missing)

        found = indexed(files, show) if of_hub is None else of_hub.indexed(show)
        bars.update(bar, completed=made, total=made)
    say(f"done: {sum(each.num_rows for each in found):,} rows in {len(found):,} files, {made:,} of them indexed anew")
