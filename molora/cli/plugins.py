"""Commands about plugins: list, new, check."""

from pathlib import Path
from typing import Annotated, Literal

import typer

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Lower-case, such as heart_rate.")]
PackageOption = Annotated[
    Path | None, typer.Option("--out-of-tree", metavar="DIR", help="Write a package to install, into this folder.")
]
SpecArgument = Annotated[
    str, typer.Argument(metavar="SPEC", help="A name, package.module:Class or path/to/file.py:Class.")
]
SpecsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[SPEC]…", help="Others: package.module:Class or path/to/file.py:Class.")
]
OptionsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]…", help="The plugin's options, as in a recipe.")
]
modality_app = typer.Typer(help="Modality plugins: list, new, check.", no_args_is_help=True)
router_app = typer.Typer(help="Router plugins: list, new, check.", no_args_is_help=True)
metric_app = typer.Typer(help="Metric plugins: list.", no_args_is_help=True)
step_app = typer.Typer(help="Steps of workflows, which are plugins: list.", no_args_is_help=True)


@modality_app.command("list")
def list_modalities(specs: SpecsArgument = None) -> None:
    """Every modality that is found by name: where from, for which parts, with which encoder, under which licence."""
    from molora.plugin_kit.catalogue import modalities, show

    show(modalities(specs or ()), ("part", "encoder", "licence"))


@modality_app.command("new")
def new_modality(name: NameArgument, out_of_tree: PackageOption = None) -> None:
    """Write a modality plugin that works: one file to make your own, a recipe, a test."""
    _scaffold("modality", name, out_of_tree)


@modality_app.command("check")
def check_modality(
    spec: SpecArgument,
    options: OptionsArgument = None,
    messages: Annotated[
        Path | None, typer.Option(metavar="IN.jsonl", help="Conversations with parts to try, instead of its examples.")
    ] = None,
) -> None:
    """Try a modality plugin against every clause of its contract. A clause it breaks makes the exit code 1."""
    from molora.config import options as read_options
    from molora.data.sources import parts_for
    from molora.plugin_kit.check import check_modality as check
    from molora.plugin_kit.clauses import show

    given = None if messages is None else parts_for(spec, messages)
    raise typer.Exit(show(check(spec, read_options(options or ()), given)))


@metric_app.command("list")
def list_metrics(specs: SpecsArgument = None) -> None:
    """Every metric that is found by name: where from, what it gives."""
    from molora.plugin_kit.catalogue import metrics, show

    show(metrics(specs or ()), ("what it is",))


@step_app.command("list")
def list_steps(specs: SpecsArgument = None) -> None:
    """Every step of `molora make` that is found by name: where from, what it makes."""
    from molora.plugin_kit.catalogue import show, steps

    show(steps(specs or ()), ("what it makes",))


@router_app.command("list")
def list_routers(specs: SpecsArgument = None) -> None:
    """Every router that is found by name: where from, whether it learns, what it does."""
    from molora.plugin_kit.catalogue import routers, show

    show(routers(specs or ()), ("learns", "what it does"))


@router_app.command("new")
def new_router(name: NameArgument, out_of_tree: PackageOption = None) -> None:
    """Write a router plugin that works: one file to make your own, a recipe, a test."""
    _scaffold("router", name, out_of_tree)


@router_app.command("check")
def check_router(spec: SpecArgument, options: OptionsArgument = None) -> None:
    """Try a router plugin against every clause of its contract, between two adapters: audio and vision. A clause it
    breaks makes the exit code 1."""
    from molora.config import options as read_options
    from molora.plugin_kit.check import check_router as check
    from molora.plugin_kit.clauses import show

    raise typer.Exit(show(check(spec, read_options(options or ()))))


def _scaffold(kind: Literal["modality", "router"], name: str, folder: Path | None) -> None:
    from molora.plugin_kit.scaffold import new_plugin

    files, spec = new_plugin(kind, name, folder)
    for file in files:
        print(f"wrote {file}")
    steps = [] if folder is None else [f"cd {folder}", "pip install --editable ."]
    steps += [
        f"molora {kind} check {spec}",
        f"molora train {name}.yaml backbone.path=BACKBONE",
        f"molora eval runs/{name} {name}.yaml",
    ]
    print("next:", *steps, sep="\n  ")
