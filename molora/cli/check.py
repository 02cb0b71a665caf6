"""Commands that check a model or this machine."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from molora.cli import options

app = typer.Typer()
# Rows of each data source on which `verify` checks the promises.
VERIFIED_ROWS = 6


@app.command()
def verify(
    model: options.Model,
    modality: options.Modalities = None,
    rule: options.Rules = None,
    messages: Annotated[
        Path | None, typer.Option(metavar="IN.jsonl", help="Conversations with media to check on.")
    ] = None,
    recipe_data: Annotated[
        bool,
        typer.Option(
            "--recipe-data", help="Check on rows of the run's recipe too, from wherever its config.yaml says."
        ),
    ] = False,
    against: Annotated[
        str | None, typer.Option(metavar="OLD", help="Compare with this model instead: nothing they share has moved.")
    ] = None,
    allow_urls: options.AllowUrls = False,
    allow_private_addresses: options.AllowPrivateAddresses = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Check the promises on this model and print a table. It brings its own samples, examples of its modalities; rows
    of its recipe or of a file can be added."""
    from molora.checkpoint.trust import find_received
    from molora.config import ConfigError, read
    from molora.data.messages import media_parts
    from molora.data.sources import SourceConfig, first_rows
    from molora.train.recipe import Recipe
    from molora.verify.compare import compare_models
    from molora.verify.promises import verify as check

    if against is not None:
        if messages is not None or recipe_data:
            raise ConfigError("--against compares on samples of its own; leave --messages and --recipe-data out")
        if rule:
            raise ConfigError("--against compares what the two models' own routers take; leave --rule out")
        raise typer.Exit(0 if compare_models(against, model, modality or (), trust_plugin or ()) else 1)
    run = Path(model)
    sources: list[SourceConfig] = []
    if messages is not None:
        sources = [SourceConfig(kind="messages", options={"path": str(messages)})]
        if recipe_data:
            raise ConfigError("--messages and --recipe-data both say on which rows to check; give one of them")
    elif recipe_data:
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"{run}: no config.yaml, so no recipe whose data could be read; leave --recipe-data out")
        sources = [source for stage in read(Recipe, run / "config.yaml").stages for source in stage.data.values()]
    rows = first_rows(sources, VERIFIED_ROWS, partial(find_received, sha256=None, trusted=trust_plugin or ()))
    loaded = options.opener(model, modality, rule, allow_urls, allow_private_addresses, trust_plugin)()
    if messages is None:  # the recipe may know modalities that have been taken out since
        known = loaded.processor.part_types
        rows = [row for row in rows if all(part["type"] in known for _, part in media_parts(row["messages"]))]
    raise typer.Exit(0 if check(loaded, rows, loaded.layout.folders) else 1)


@app.command()
def doctor(
    overrides: options.Overrides = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|CONFIG.yaml",
            help="Say instead how much memory this will need, before it starts. Settings of a recipe are its own, of a "
            "model prompt_tokens, max_new_tokens, max_running_samples, kv_cache_gib, dtype and quantization.",
        ),
    ] = None,
    modality: options.Modalities = None,
    trust_plugin: options.Trust = None,
    device_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GIB", min=0, max=1_000_000, help="Ask about a device that has this much, instead of this one's."
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=100_000, help="Of a recipe that so many processes train: what each of them needs."
        ),
    ] = 1,
) -> None:
    """What is installed, what works, what is missing and how to get it."""
    from molora.config import ConfigError

    if fit is not None:
        from molora.doctor.memory import main as measure

        raise typer.Exit(measure(fit, overrides or (), modality or (), device_memory, trust_plugin or (), processes))
    if overrides or modality or trust_plugin or device_memory is not None or processes > 1:
        raise ConfigError(
            "settings, --modality, --trust-plugin, --device-memory and --processes go with --fit: say what is to fit"
        )
    from molora.doctor.installation import main as examine

    raise typer.Exit(examine())
