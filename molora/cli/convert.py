"""Commands to and from the layouts of released models."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="To and from the layouts of released models.", no_args_is_help=True)


@app.command("phi4mm")
def convert_phi4mm(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A released checkpoint (folder or hub id), or a run.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    layout: Annotated[
        Literal["hub", "native"] | None,
        typer.Option(help="For a run: the released repository's layout, or transformers'. [default: its own]"),
    ] = None,
) -> None:
    """Phi-4-multimodal: a released checkpoint to a run, or a run of it to a checkpoint."""
    from molora.config import ConfigError
    from molora.convert.release import export_release, import_release

    if (Path(source) / "molora.json").is_file():
        export_release(Path(source), target, layout)
    elif layout is not None:
        raise ConfigError(f"--layout says how to write a run, and {source} is none; convert it to a run first")
    else:
        import_release(source, target)
    print(f"done: {target}")


@app.command("vllm")
def convert_vllm(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of Phi-4-multimodal, or of adapters for text.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
) -> None:
    """vLLM: a run to a folder that vLLM opens, each adapter in a folder of its own inside. Prints the command that
    serves it; `molora serve RUN --upstream URL` in front of that routes requests as the run does."""
    from molora.convert.vllm import export_vllm

    command = export_vllm(run, target)
    print(f"done: {target}")
    print(command)


@app.command("gguf")
def convert_gguf(
    source: Annotated[
        str, typer.Argument(metavar="FILE|PACKAGE", help="A GGUF file, or an installed Python package that holds one.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    dtype: Annotated[str, typer.Option(help="What the weights are written in; fp32 loses nothing.")] = "float32",
) -> None:
    """GGUF, of llama.cpp: a file, or the one in an installed package, to a folder that transformers opens."""
    from molora.checkpoint.gguf import find_gguf, unpack

    unpack(find_gguf(source), target, dtype)
    print(f"done: {target}")
