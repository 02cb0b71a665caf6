"""Options and arguments that several commands take, and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from molora.checkpoint.opening import ModelPlan
    from molora.inference.load import LoadedModel
    from molora.shard import Shard

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, or a backbone: a folder, hub id or package:NAME.")
]
Modalities = Annotated[
    list[Path] | None, typer.Option("--modality", metavar="FOLDER", help="A modality folder; repeat.")
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule", metavar="A+B=ADAPTER", help="Which adapter samples with these modalities take (or none); repeat."
    ),
]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Fetch media over HTTP where messages name a URL.")]
AllowPrivateAddresses = Annotated[
    bool, typer.Option("--allow-private-addresses", help="With --allow-urls: from inside a network too.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-plugin",
        metavar="SPEC",
        help="Run this plugin's code where a folder names it: path/to/file.py:Class or package.module:Class; repeat.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]…", help="Settings that replace the file's; a mapping is merged into the file's."
    ),
]
DeterministicBatch = Annotated[
    bool, typer.Option("--deterministic-batch", help="Answers are the same to the bit in any batch; slower.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first row that fails.")]
ShardText = Annotated[
    str | None, typer.Option("--shard", metavar="I/N", help="Do every N-th row only, from row I on; rows count from 0.")
]
Merge = Annotated[
    int | None,
    typer.Option("--merge", metavar="N", min=2, max=100_000, help="Put the answers of N shards together instead."),
]
Config = Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]

# The exit code of a command that did its work but for some rows.
FAILED_ROWS = 2


def opener(
    model: str,
    modality: list[Path] | None,
    rule: list[str] | None,
    allow_urls: bool,
    allow_private_addresses: bool,
    trust_plugin: list[str] | None,
    deterministic_batch: bool = False,
) -> Callable[[], LoadedModel]:
    """Opens the model that these options name."""
    from molora.inference.load import load

    return partial(
        load,
        model,
        modality or (),
        router=_rules(rule),
        allow_urls=allow_urls,
        allow_private_addresses=allow_private_addresses,
        trust=trust_plugin or (),
        deterministic_batch=deterministic_batch,
    )


def planner(
    model: str, modality: list[Path] | None, rule: list[str] | None, trust_plugin: list[str] | None
) -> Callable[[], ModelPlan]:
    """Plans the model that these options name, without its weights."""
    from molora.checkpoint.opening import plan_model
    from molora.convert.release import converted

    router, trust = _rules(rule), trust_plugin or ()
    return lambda: plan_model(converted(model), modality or (), router=router, trust=trust)


def shard_of(given: str | None, merge: int | None) -> Shard:
    """What --shard says, all rows without it. Raises ConfigError; for --merge beside it too."""
    from molora.config import ConfigError
    from molora.shard import ALL_ROWS, Shard

    if given is None:
        return ALL_ROWS
    if merge is not None:
        raise ConfigError(f"--shard {given} does a part of the work, and --merge puts parts together; give one")
    return Shard.read(given)


def _rules(given: list[str] | None) -> Any:
    """The table router with the rules of the command line; None without any, for the model's own router."""
    from molora.checkpoint.assembly import RouterConfig
    from molora.config import ConfigError

    rules: dict[str, str | None] = {}
    for rule in given or ():
        modalities, equals, adapter = rule.partition("=")
        if not (modalities and equals and adapter):
            raise ConfigError(f"--rule {rule!r}: write it as A+B=ADAPTER, such as audio+vision=vision, or A+B=none")
        rules[modalities] = None if adapter == "none" else adapter
    return RouterConfig(options={"rules": rules}) if rules else None
