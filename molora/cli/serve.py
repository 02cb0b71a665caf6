"""Commands that serve."""

from pathlib import Path
from typing import Annotated

import typer

from molora.cli import options

app = typer.Typer()

# About reading media and answering, which a server that passes requests on leaves to the one behind.
_WITH_WEIGHTS = (
    *("kv_cache_gib", "prefill_tokens", "max_new_tokens", "temperature", "media_processes", "media_seconds"),
    *("media_gib", "media_private_addresses", "deterministic_batch"),
)


@app.command()
def serve(
    context: typer.Context,
    model: options.Model,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Load no weights: pass requests on to this server, such as vLLM at http://127.0.0.1:8001/v1, each "
            "under the name of the adapter that the router takes.",
        ),
    ] = None,
    upstream_key_variable: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds that server's key.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default its folder's name.")] = None,
    api_keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys of those who may ask, one on each line.")
    ] = None,
    modality: options.Modalities = None,
    rule: options.Rules = None,
    max_running_samples: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait beside them.")] = 64,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="Memory for keys and values; by default half of what is free, at most.")
    ] = None,
    prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompts that enter in a step; by default 512, or 256 on a CPU.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, if the client says nothing.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0, help="If the client says nothing; 0 is greedy.")] = 0.0,
    answer_seconds: Annotated[float, typer.Option(min=0.001, help="The longest that an answer may take.")] = 600.0,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="The largest request, and the largest medium.")] = 32.0,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections that may be open.")] = 512,
    client_seconds: Annotated[
        float, typer.Option(min=0.001, help="The longest to send a request, or to take what was answered of it.")
    ] = 60.0,
    media_processes: Annotated[int, typer.Option(min=1, help="Processes that decode media.")] = 2,
    media_seconds: Annotated[
        float, typer.Option(min=0.001, help="The longest that the media of a request may take.")
    ] = 30.0,
    media_gib: Annotated[float, typer.Option(min=0.001, help="The memory that they may take.")] = 4.0,
    media_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="Fetch media over HTTPS where a request names a URL of this host; * stands for any text; repeat.",
        ),
    ] = None,
    media_http: Annotated[bool, typer.Option("--media-http", help="From these hosts by plain HTTP too.")] = False,
    media_private_addresses: Annotated[
        bool, typer.Option("--media-private-addresses", help="Even where their addresses are inside a network.")
    ] = False,
    deterministic_batch: options.DeterministicBatch = False,
    trust_plugin: options.Trust = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's clients ask: chat with media, completions, transcriptions. Requests of any
    mix are answered together, here or by the server of --upstream. SIGTERM or Ctrl-C ends the server when running
    answers are finished, a second one at once."""
    try:
        from molora.serve.preparation import PreparationLimits
        from molora.serve.process import ServeConfig, serve_upstream
        from molora.serve.process import serve as serve_model
    except ModuleNotFoundError as error:
        raise ImportError(f"molora serve needs {error.name}: pip install 'molora[serve]'") from error

    config = ServeConfig(
        host=host,
        port=port,
        name=name or Path(model).name or "molora",
        api_keys=api_keys,
        max_running_samples=max_running_samples,
        max_waiting=max_waiting,
        kv_cache_gib=kv_cache_gib,
        prefill_tokens=prefill_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        answer_seconds=answer_seconds,
        max_body_mib=max_body_mib,
        max_connections=max_connections,
        client_seconds=client_seconds,
        media_hosts=tuple(host.lower() for host in media_host or ()),
        media_http=media_http,
        media_private_addresses=media_private_addresses,
        media=PreparationLimits(processes=media_processes, seconds=media_seconds, memory_gib=media_gib),
    )
    if upstream is not None:
        _check_alone(context)
        plan = options.planner(model, modality, rule, trust_plugin)
        raise typer.Exit(serve_upstream(plan, upstream, upstream_key_variable, config))
    if upstream_key_variable is not None:
        raise ValueError(
            "--upstream-key-variable names the key of a server behind; give --upstream URL, or leave it out"
        )
    # Which URLs may be fetched, the server says of its own.
    load = options.opener(model, modality, rule, False, False, trust_plugin, deterministic_batch)
    raise typer.Exit(serve_model(load, config))


def _check_alone(context: typer.Context) -> None:
    """Raises ConfigError for an option that has no meaning beside --upstream."""
    from molora.config import ConfigError

    for name in _WITH_WEIGHTS:
        # As an enum of click, which typer has a copy of.
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE":
            told = f"--{name.replace('_', '-')} is about reading media and answering"
            raise ConfigError(f"{told}, which the server of --upstream does, by its own options; leave it out")
