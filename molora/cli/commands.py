"""The command line. Libraries are imported inside the commands, so that `--help` does not wait for them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from molora.inference.load import LoadedModel
    from molora.plugin_kit.modality_clauses import Finding

app = typer.Typer(
    name="molora",
    help="Mixture-of-LoRAs multimodal models: train, generate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, or a backbone: a folder or hub id.")]
ModalityOption = Annotated[
    list[Path] | None, typer.Option("--modality", metavar="FOLDER", help="A modality folder; repeat.")
]
RuleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rule", metavar="A+B=ADAPTER", help="Which adapter samples with these modalities take (or none); repeat."
    ),
]
UrlsOption = Annotated[bool, typer.Option("--allow-urls", help="Fetch media over HTTP where messages name a URL.")]
PrivateOption = Annotated[
    bool, typer.Option("--allow-private-addresses", help="With --allow-urls: from inside a network too.")
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trust-plugin",
        metavar="SPEC",
        help="Run this plugin's code where a folder names it: path/to/file.py:Class or package.module:Class; repeat.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]…", help="Settings that replace the file's.")
]
DeterministicOption = Annotated[
    bool, typer.Option("--deterministic-batch", help="Answers are the same to the bit in any batch; slower.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first row that fails.")]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG.yaml")]
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
convert_app = typer.Typer(help="To and from the layouts of released models.", no_args_is_help=True)
router_app = typer.Typer(help="Router plugins: list, new, check.", no_args_is_help=True)
app.add_typer(modality_app, name="modality")
app.add_typer(router_app, name="router")
app.add_typer(convert_app, name="convert")


# Rows of each data source on which `verify` checks the promises.
VERIFIED_ROWS = 6
# The exit code of a command that did its work but for some rows.
FAILED_ROWS = 2


# By OpenMP's default, threads spin while they wait for each other. Where another process is busy, they take the core
# that they wait for. These sleep, after a moment long enough for the next product to come. OpenMP reads it when torch
# is imported. Measured by benchmarks/busy_machine.py.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000"}


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["MOLORA_DEBUG"] = "1"


@app.command()
def train(config: ConfigArgument, overrides: Overrides = None, trust_plugin: TrustOption = None) -> None:
    """Run a recipe: writes a run folder, and goes on where it stopped."""
    from molora.config import read
    from molora.terminal import say
    from molora.train.loop import train as run_recipe
    from molora.train.recipe import Recipe

    recipe = read(Recipe, config, overrides or ())
    with _stoppable():
        run = run_recipe(recipe, trust=trust_plugin or ())
    say(f"done: {run}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Tells how stopped work goes on, and ends with the exit code of the signal."""
    from molora.interrupt import Stopped
    from molora.terminal import visible

    try:
        yield
    except Stopped as stopped:
        print(visible(str(stopped)), file=sys.stderr)
        raise typer.Exit(stopped.exit_code) from stopped


@app.command()
def pretrain(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Build a small backbone from text."""
    from molora.config import read
    from molora.pretrain.config import PretrainConfig
    from molora.pretrain.loop import pretrain as run_pretraining
    from molora.terminal import progress, say

    with _stoppable(), progress() as bars:
        folder = run_pretraining(read(PretrainConfig, config, overrides or ()), bars)
    say(f"done: {folder}")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The question.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeat.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A sound; repeat.")] = None,
    part: Annotated[
        list[str] | None, typer.Option(metavar="TYPE=PATH", help="A media part of any type; repeat.")
    ] = None,
    messages: Annotated[Path | None, typer.Option(metavar="IN.jsonl", help='Rows of {"id", "messages"}.')] = None,
    output: Annotated[Path | None, typer.Option(metavar="OUT.jsonl", help="Where answers go, row by row.")] = None,
    modality: ModalityOption = None,
    rule: RuleOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: int = 0,
    strict: StrictOption = False,
    deterministic_batch: DeterministicOption = False,
    allow_urls: UrlsOption = False,
    allow_private_addresses: PrivateOption = False,
    trust_plugin: TrustOption = None,
) -> None:
    """Answer one question, streamed; or, with --messages and --output, a mixed batch: a row that fails gets its error
    for an answer, and exit code 2 says so."""
    from molora.config import ConfigError
    from molora.inference.generate import GenerationConfig
    from molora.inference.load import load
    from molora.terminal import visible

    if (messages is None) != (output is None):
        raise ConfigError("--messages and --output go together: rows come from one and answers go to the other")
    parts: list[dict[str, Any]] = []
    for type, paths in (("image", image), ("audio", audio)):
        parts += [{"type": type, "path": str(path)} for path in paths or ()]
    for given in part or ():
        type, equals, path = given.partition("=")
        if not (type and equals and path):
            raise ConfigError(f"--part {given!r}: write it as TYPE=PATH, such as image=a.png")
        parts.append({"type": type, "path": path})
    if messages is None and not prompt and not parts:
        raise ConfigError("nothing to answer: give a PROMPT, a picture, or --messages with --output")
    config = GenerationConfig(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def opened() -> LoadedModel:
        return load(
            model,
            modality or (),
            router=_rules(rule),
            allow_urls=allow_urls,
            allow_private_addresses=allow_private_addresses,
            trust=trust_plugin or (),
            deterministic_batch=deterministic_batch,
        )

    if messages is not None and output is not None:
        from molora.inference.answers import answer_rows

        raise typer.Exit(0 if answer_rows(opened, messages, output, config, strict=strict) else FAILED_ROWS)
    loaded = opened()
    content = parts + ([{"type": "text", "text": prompt}] if prompt else [])
    for piece in loaded.stream([{"role": "user", "content": content}], config):
        print(visible(piece), end="", flush=True)
    print()


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


@app.command("eval")
def evaluate(
    model: ModelArgument,
    config: ConfigArgument,
    overrides: Overrides = None,
    modality: ModalityOption = None,
    rule: RuleOption = None,
    strict: StrictOption = False,
    deterministic_batch: DeterministicOption = False,
    allow_urls: UrlsOption = False,
    allow_private_addresses: PrivateOption = False,
    trust_plugin: TrustOption = None,
) -> None:
    """Answer the evaluations of a config or a recipe: a table, and JSON in MODEL/evaluation.json, or alone on standard
    output if MODEL is no run. Questions that cannot be asked are counted, and exit code 2 says so."""
    from molora.config import read
    from molora.evaluate.judge import Evaluations
    from molora.evaluate.results import evaluate_model
    from molora.inference.load import load

    evaluations = read(Evaluations, config, overrides or (), in_part=True).evaluations

    def opened() -> LoadedModel:
        return load(
            model,
            modality or (),
            router=_rules(rule),
            allow_urls=allow_urls,
            allow_private_addresses=allow_private_addresses,
            trust=trust_plugin or (),
            deterministic_batch=deterministic_batch,
        )

    if not evaluate_model(opened, Path(model), evaluations, rules=sorted(rule or ()), strict=strict):
        raise typer.Exit(FAILED_ROWS)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="The folder it writes.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything, to see that it works.")] = False,
) -> None:
    """The main job end to end: make a backbone, teach it to see and to hear, ask it questions, write a report."""
    from molora.demo.run import run_demo

    with _stoppable():
        run_demo(run, quick=quick)


@app.command()
def verify(
    model: ModelArgument,
    modality: ModalityOption = None,
    rule: RuleOption = None,
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
    allow_urls: UrlsOption = False,
    allow_private_addresses: PrivateOption = False,
    trust_plugin: TrustOption = None,
) -> None:
    """Check the promises on this model and print a table. It brings its own samples, examples of its modalities; rows
    of its recipe or of a file can be added."""
    from molora.checkpoint.trust import find_received
    from molora.config import ConfigError, read
    from molora.data.messages import media_parts
    from molora.data.sources import SourceConfig, open_source
    from molora.inference.load import load
    from molora.train.recipe import Recipe
    from molora.verify.compare import unmoved
    from molora.verify.promises import verify as check

    if against is not None:
        if messages is not None or recipe_data:
            raise ConfigError("--against compares on samples of its own; leave --messages and --recipe-data out")
        if rule:
            raise ConfigError("--against compares what the two models' own routers take; leave --rule out")
        raise typer.Exit(0 if unmoved(against, model, modality or (), trust_plugin or ()) else 1)
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
    trust = trust_plugin or ()
    may_run = partial(find_received, sha256=None, trusted=trust)
    opened = [open_source(source, "data", may_run) for source in sources]
    rows = [source[row] for source in opened for row in range(min(len(source), VERIFIED_ROWS))]
    loaded = load(
        model,
        modality or (),
        router=_rules(rule),
        allow_urls=allow_urls,
        allow_private_addresses=allow_private_addresses,
        trust=trust,
    )
    if messages is None:  # the recipe may know modalities that have been taken out since
        known = loaded.processor.part_types
        rows = [row for row in rows if all(part["type"] in known for _, part in media_parts(row["messages"]))]
    raise typer.Exit(0 if check(loaded, rows, loaded.layout.folders) else 1)


@convert_app.command("phi4mm")
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
    from molora.plugin_kit.modality_clauses import check_modality as check

    given = None if messages is None else _parts(messages, spec)
    raise typer.Exit(_show_findings(check(spec, read_options(options or ()), given)))


def _parts(messages: Path, spec: str) -> list[Any]:
    """The content parts in a file of conversations that a modality answers to."""
    from molora.config import ConfigError
    from molora.data.messages import media_parts
    from molora.data.sources import Messages, MessagesConfig
    from molora.plugins import resolve

    part_type = resolve("modality", spec).part_type  # pyright: ignore[reportAttributeAccessIssue]
    source = Messages(MessagesConfig(path=str(messages)))
    parts = [part for row in range(len(source)) for _, part in media_parts(source[row]["messages"])]
    chosen = [part for part in parts if part["type"] == part_type]
    if not chosen:
        there = ", ".join(sorted({part["type"] for part in parts})) or "no media"
        raise ConfigError(f"{messages}: no parts of type {part_type!r}, which {spec} answers to; there are {there}")
    return chosen


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
    from molora.plugin_kit.router_clauses import check_router as check

    raise typer.Exit(_show_findings(check(spec, read_options(options or ()))))


def _scaffold(kind: Literal["modality", "router"], name: str, folder: Path | None) -> None:
    from molora.plugin_kit.scaffold import new_plugin

    files, spec = new_plugin(kind, name, folder)
    for file in files:
        print(f"wrote {file}")
    steps = [] if folder is None else [f"cd {folder}", "pip install --editable ."]
    steps += [f"molora {kind} check {spec}", f"molora train {name}.yaml", f"molora eval runs/{name} {name}.yaml"]
    print("next:", *steps, sep="\n  ")


def _show_findings(findings: Sequence[Finding]) -> int:
    """Prints what a contract's checks found, faults last, within 80 columns; returns the exit code."""

    from molora.terminal import print_table, styled

    marks = {True: ("ok", "green"), False: ("no", "red"), None: ("--", "yellow")}
    rows = [(finding.ok, finding.check, finding.message) for finding in findings if not finding.cause]
    unreached = Counter((finding.cause, finding.message) for finding in findings if finding.cause)
    rows += [(None, f"{count} more", message) for (_, message), count in unreached.items()]
    rows.sort(key=lambda row: (row[0] is False, row[0] is None))
    print_table(("", "check", "found"), [(styled(*marks[ok]), check, message) for ok, check, message in rows])
    counts = {
        "failed": sum(finding.ok is False for finding in findings),
        "passed": sum(finding.ok is True for finding in findings),
        "undecided": sum(finding.ok is None and not finding.cause for finding in findings),
        "not reached": unreached.total(),
    }
    told = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    print(told if counts["failed"] else "it keeps the contract")
    return int(counts["failed"] > 0)


@app.command()
def doctor(
    overrides: Overrides = None,
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|CONFIG.yaml",
            help="Say instead how much memory this will need, before it starts. Settings of a recipe are its own, of a "
            "model prompt_tokens, max_new_tokens, max_running_samples and dtype.",
        ),
    ] = None,
    modality: ModalityOption = None,
    trust_plugin: TrustOption = None,
    device_memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Ask about a device that has this much, instead of this one's.")
    ] = None,
) -> None:
    """What is installed, what works, what is missing and how to get it."""
    from molora.config import ConfigError

    if fit is not None:
        from molora.doctor.memory import main as measure

        raise typer.Exit(measure(fit, overrides or (), modality or (), device_memory, trust_plugin or ()))
    if overrides or modality or trust_plugin or device_memory is not None:
        raise ConfigError("settings, --modality, --trust-plugin and --device-memory go with --fit: say what is to fit")
    from molora.doctor.installation import main as examine

    raise typer.Exit(examine())


def main() -> None:
    """Runs the command line; a user's mistake is one paragraph on standard error and exit code 1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("MOLORA_DEBUG"):
            raise
        from molora.terminal import visible

        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
