"""Plugins: from a name in a config to the class that it means.

A spec is a built-in name, `package.module:Class`, `path/to/file.py:Class`, or a name that an installed package declares
in the entry-point group of its kind, such as `molora.modalities`. This is for what a user writes; what a received
folder says goes through `molora.checkpoint.trust`, which decides whether its code may run.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from molora.config import ConfigError, did_you_mean

Kind = Literal["modality", "router", "source", "metric", "step"]

_SOURCES = {
    "messages": "molora.data.sources:Messages",
    "preferences": "molora.data.preferences:Preferences",
    "table": "molora.data.formats.table:Table",
    "shards": "molora.data.index.shards:Shards",
    "coco_captions": "molora.data.formats.coco:CocoCaptions",
    "vqa": "molora.data.formats.coco:Vqa",
    "folder": "molora.data.formats.folders:Folder",
    "transcripts": "molora.data.formats.transcripts:Transcripts",
    "kaldi": "molora.data.formats.kaldi:Kaldi",
    "nemo": "molora.data.formats.nemo:Nemo",
    "easy_vqa": "molora.data.easy_vqa:EasyVQA",
    "spoken_easy_vqa": "molora.data.easy_vqa:SpokenEasyVQA",
}
_METRICS = {
    "exact_match": "molora.evaluate.metrics.text:ExactMatch",
    "macro_f1": "molora.evaluate.metrics.text:MacroF1",
    "yes_no": "molora.evaluate.metrics.text:YesNo",
    "multiple_choice": "molora.evaluate.metrics.choices:MultipleChoice",
    "choice_likelihood": "molora.evaluate.metrics.choices:ChoiceLikelihood",
    "vqa_accuracy": "molora.evaluate.metrics.visual:VqaAccuracy",
    "anls": "molora.evaluate.metrics.visual:Anls",
    "relaxed_accuracy": "molora.evaluate.metrics.visual:RelaxedAccuracy",
    "word_error_rate": "molora.evaluate.metrics.speech:WordErrorRate",
    "character_error_rate": "molora.evaluate.metrics.speech:CharacterErrorRate",
    "bleu": "molora.evaluate.metrics.translation:Bleu",
    "chrf": "molora.evaluate.metrics.translation:Chrf",
    "cider": "molora.evaluate.metrics.writing:Cider",
    "rouge": "molora.evaluate.metrics.writing:Rouge",
    "number": "molora.evaluate.metrics.values:Number",
    "regular_expression": "molora.evaluate.metrics.values:RegularExpression",
    "math": "molora.evaluate.metrics.mathematics:MathAnswer",
    "unit_tests": "molora.evaluate.metrics.programs:UnitTests",
    "judge": "molora.evaluate.metrics.judge_model:JudgeModel",
}
_STEPS = {
    "table": "molora.synthetic.steps.reading:ReadTable",
    "conversations": "molora.synthetic.steps.reading:ReadConversations",
    "sample": "molora.synthetic.steps.choosing:DrawRows",
    "shots": "molora.synthetic.steps.choosing:Shots",
    "filter": "molora.synthetic.steps.choosing:Filter",
    "deduplicate": "molora.synthetic.steps.overlap:Deduplicate",
    "decontaminate": "molora.synthetic.steps.overlap:Decontaminate",
    "passages": "molora.synthetic.steps.shaping:Passages",
    "compose": "molora.synthetic.steps.shaping:Compose",
    "extract": "molora.synthetic.steps.shaping:Extract",
    "spread": "molora.synthetic.steps.shaping:Spread",
    "choices": "molora.synthetic.steps.shaping:MakeChoices",
    "conversation": "molora.synthetic.steps.shaping:MakeConversation",
    "ask": "molora.synthetic.steps.asking:Ask",
    "dialogue": "molora.synthetic.steps.asking:Dialogue",
    "speak": "molora.synthetic.steps.speaking:Speak",
    "vote": "molora.synthetic.steps.judging:Vote",
    "verify": "molora.synthetic.steps.judging:Verify",
}

# What a class must have to keep the contract of molora.modality, molora.routing, molora.data.sources,
# molora.evaluate.metrics or molora.synthetic.rows (`name` and `config` are instances').
_MEMBERS = {
    "modality": (
        *("config_type", "part_type", "load", "prepare", "collate"),
        *("build_encoder", "projector", "projectors", "examples"),
    ),
    "router": ("config_type", "order", "adapters", "learns", "forward"),
    "source": ("config_type", "__len__", "__getitem__"),
    "metric": ("config_type", "score"),
    "step": ("config_type", "run"),
}


class Plugin(NamedTuple):
    """A plugin that has a name: who declares it ("built-in" or a distribution) and where its class is."""

    name: str
    origin: str
    spec: str


class Untrusted(ConfigError):
    """Code that a folder names and the user has not allowed to run; the message says what to give."""


@dataclass(frozen=True)
class Found:
    """A plugin's class, and what folders record of it: a spec without a path, and the SHA-256 of `file`, the code that
    was run for it. Both are None for what comes by name, with molora or an installed package."""

    plugin: type
    spec: str
    sha256: str | None = None
    file: Path | None = None


Finder = Callable[[Kind, str], Found]


def available(kind: Kind) -> list[Plugin]:
    """Every plugin of a kind that has a name, built-in ones first."""
    if kind == "modality":
        from molora.encoders import MODALITIES as built_in
    elif kind == "router":
        from molora.routers import ROUTERS as built_in
    else:
        built_in = {"source": _SOURCES, "metric": _METRICS, "step": _STEPS}[kind]
    group = "molora.modalities" if kind == "modality" else f"molora.{kind}s"
    declared = _declared(group, tuple((path, _changed_ns(path)) for path in sys.path))
    return [*(Plugin(name, "built-in", spec) for name, spec in built_in.items()), *declared]


@cache
def _declared(group: str, places: tuple[tuple[str, int], ...]) -> tuple[Plugin, ...]:
    """What packages installed in these places declare. To find out reads a file of every package there."""
    installed = (
        Plugin(entry.name, entry.dist.name if entry.dist else "an installed package", entry.value)
        for entry in entry_points(group=group)
    )
    # A distribution seen twice (an editable install beside its checkout) is one owner, hence the set.
    return tuple(sorted(set(installed)))


def _changed_ns(path: str) -> int:
    """When something was installed in a place of `sys.path` or taken away; 0 for what is no folder."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def resolve(kind: Kind, spec: str) -> type:
    """The class that `spec` means; see `find`."""
    return find(kind, spec).plugin


def find(kind: Kind, spec: str) -> Found:
    """Finds the class that a user's `spec` means, runs its module, and checks that it has the members of its contract.
    Raises: ConfigError if nothing or more than one plugin answers to the name, if its module cannot be imported, or if
    the class lacks members."""
    if file := file_of(spec):
        try:
            path = Path(os.path.realpath(os.path.expanduser(file[0])))
        except ValueError as error:
            raise ConfigError(f"{kind} {spec!r}: no path of a file ({error})") from error
        return find_in_file(kind, spec, path, lambda: _source(path))
    target = spec if ":" in spec else _named(kind, spec).spec
    module_name, _, class_name = target.rpartition(":")
    module = _run(kind, spec, module_name, lambda: importlib.import_module(module_name))
    plugin = _class_in(kind, spec, module, module_name, class_name)
    if comes_by_name(kind, spec):
        return Found(plugin, spec)
    origin = getattr(module, "__file__", None)
    file = None if origin is None else Path(origin)
    return Found(plugin, spec, None if file is None else hashlib.sha256(file.read_bytes()).hexdigest(), file)


def find_in_file(kind: Kind, spec: str, path: Path, read: Callable[[], bytes]) -> Found:
    """The class that `spec` names in a file at `path` with the content that `read` gives: what is hashed is what runs.
    Raises ConfigError as `find` does."""
    sha256 = ""

    def run() -> ModuleType:
        nonlocal sha256
        source = read()
        sha256 = hashlib.sha256(source).hexdigest()
        return _run_file(path, source, sha256)

    class_name = spec.rpartition(".py")[2].removeprefix(":")
    module = _run(kind, spec, spec.removesuffix(f":{class_name}"), run)
    if not class_name:
        fit = [name for name, found in _classes(module).items() if not _missing(kind, found)]
        choices = " or ".join(f"{spec}:{name}" for name in fit or ["Class"])
        raise ConfigError(f"{kind} {spec!r}: names a file and no class in it; write {choices}")
    plugin = _class_in(kind, spec, module, spec.removesuffix(f":{class_name}"), class_name)
    return Found(plugin, f"{path.name}:{class_name}", sha256, path)


def file_of(spec: str) -> tuple[str, str] | None:
    """The path and the class of a spec that names a file; None for another. Without a class that is empty."""
    parts = re.fullmatch(r"(.*\.py)(?::([^:/]*))?", spec, flags=re.DOTALL)
    return (parts[1], parts[2] or "") if parts else None


def comes_by_name(kind: Kind, spec: str) -> bool:
    """Whether a spec means a class that comes with molora or that an installed package declares."""
    if file_of(spec):
        return False
    return ":" not in spec or spec.startswith("molora.") or any(plugin.spec == spec for plugin in available(kind))


def _class_in(kind: Kind, spec: str, module: ModuleType, place: str, class_name: str) -> type:
    found = getattr(module, class_name, None)
    if found is None:
        classes = list(_classes(module))
        told = f"{kind} {spec!r}: {place} has no {class_name!r}"
        raise ConfigError(f"{told}; {did_you_mean(class_name, classes)}its classes: {', '.join(classes) or 'none'}")
    if not isinstance(found, type):
        raise ConfigError(f"{kind} {spec!r}: {place}:{class_name} is {found!r}, not a class")
    if missing := _missing(kind, found):
        raise ConfigError(f"{kind} {spec!r}: class {class_name} lacks {', '.join(missing)}, which every {kind} has")
    return found


def _missing(kind: Kind, found: type) -> list[str]:
    """Members of the contract that a class lacks."""
    # Those that a Protocol declares do not count: a class that names the contract as its base has yet to fulfil it.
    own = {member for base in found.__mro__ if not getattr(base, "_is_protocol", False) for member in vars(base)}
    return [member for member in _MEMBERS[kind] if member not in own]


def _classes(module: ModuleType) -> dict[str, type]:
    """The classes in a module that its own file or package defines."""
    package = module.__name__.partition(".")[0]
    classes = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in classes.items() if value.__module__.partition(".")[0] == package}


def _named(kind: Kind, name: str) -> Plugin:
    plugins = available(kind)
    owners = [plugin for plugin in plugins if plugin.name == name]
    if len(owners) > 1:
        claims = " and ".join(f"{plugin.origin} ({plugin.spec})" for plugin in owners)
        raise ConfigError(f"{kind} {name!r} is claimed by {claims}; write the `package.module:Class` that you mean")
    if not owners:
        names = [plugin.name for plugin in plugins]
        told = f"no {kind} is called {name!r}; {did_you_mean(name, names)}there is {', '.join(names) or 'none'}"
        raise ConfigError(f"{told}; or write `package.module:Class` or `path/to/file.py:Class`")
    return owners[0]


def _run(kind: Kind, spec: str, place: str, run: Callable[[], ModuleType]) -> ModuleType:
    try:
        return run()
    except Exception as error:  # a plugin can fail in any way; its own error is shown and chained
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{kind} {spec!r}: importing {place!r} failed: {why}") from error


def _source(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return path.read_bytes()


def _run_file(path: Path, source: bytes, sha256: str) -> ModuleType:
    """Runs a file's code once, under a name made from path and content so that its classes pickle to data workers."""
    key = hashlib.sha256(f"{path} {sha256}".encode()).hexdigest()
    name = f"molora_plugin_{path.stem}_{key[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        # Not through the loader, which would read the file again, or a .pyc beside it.
        exec(compile(source, str(path), "exec", dont_inherit=True), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module
