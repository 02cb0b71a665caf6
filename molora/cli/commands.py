"""The command line. Libraries are imported inside the commands, so that `--help` does not wait for them."""

import logging
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from molora.cli import answer, check, convert, data, plugins, serve, synthetic, train
from molora.process import settle_in


class _Stoppable(TyperGroup):
    """Commands that say how stopped work goes on, and end with the exit code of the signal; typer says nothing."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            from molora.interrupt import Stopped
            from molora.terminal import visible

            if told := str(stopped) if isinstance(stopped, Stopped) else "stopped":
                print(visible(told), file=sys.stderr)
            raise typer.Exit(getattr(stopped, "exit_code", 130)) from stopped


app = typer.Typer(
    name="molora",
    cls=_Stoppable,
    help="Mixture-of-LoRAs multimodal models: train, generate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train.app)
app.add_typer(answer.app)
app.add_typer(synthetic.app)
app.add_typer(serve.app)
app.add_typer(check.app)
app.add_typer(plugins.modality_app, name="modality")
app.add_typer(plugins.router_app, name="router")
app.add_typer(plugins.metric_app, name="metric")
app.add_typer(plugins.step_app, name="step")
app.add_typer(convert.app, name="convert")
app.add_typer(data.app, name="data")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    if debug:
        os.environ["MOLORA_DEBUG"] = "1"


def main() -> None:
    """Runs the command line; a user's mistake is one paragraph on standard error and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in ("bitsandbytes", "torch.utils._pytree"):  # what quantisers have to say when they are imported
        logging.getLogger(library).setLevel(logging.ERROR)
    settle_in()
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("MOLORA_DEBUG"):
            raise
        from molora.terminal import visible

        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
