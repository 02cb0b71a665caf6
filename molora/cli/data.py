"""Commands about data, before anything trains."""

from typing import Annotated

import typer

app = typer.Typer(help="Data before training.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `index` a word of its own while it is the only command."""


@app.command()
def index(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH…", help="tar, Parquet or JSONL: files, patterns, or train-{000..099}.tar."),
    ],
) -> None:
    """Find where the rows of large files are, once: training reads them through the index, which is kept beside each
    file, or in the cache. Indexes that are there and hold are left as they are."""
    from molora.data.index.build import files_of, indexed
    from molora.terminal import progress, say

    with progress() as bars:
        bar = bars.add_task("indexing", total=None, note="")
        made = 0

        def show(done: int, missing: int) -> None:
            nonlocal made
            made = missing
            bars.update(bar, completed=done, total=missing)

        found = indexed(files_of(paths), show)
        bars.update(bar, completed=made, total=made)
    say(f"done: {sum(each.num_rows for each in found):,} rows in {len(found):,} files, {made:,} of them indexed anew")
