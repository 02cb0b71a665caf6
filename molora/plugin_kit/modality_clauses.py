"""The contract of a modality, clause by clause, tried on one plugin: what `molora modality check` prints.

Every check is isolated: what a plugin raises is what that check found, and checks that build on it are not reached.
"""

from __future__ import annotations

import gc
import io
import json
import pickle
import random
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.checkpoint.assembly import Blueprint
from molora.checkpoint.format import tensor_hash
from molora.checkpoint.modality_folder import load_modality, read_blueprint, save_modality
from molora.config import ConfigError, build
from molora.data.processor import Processor
from molora.modality import Encoder, Frames, MediaError, Modality, Prepared
from molora.model.molora import MoLoRA
from molora.plugin_kit.under_test import (
    GENERATORS,
    MAX_TOKENS,
    OTHER,
    OWN,
    SEED,
    Trial,
    fingerprint,
    is_own,
    logits,
    put_back,
    scramble,
    shared_state,
    tiny_molora,
)
from molora.plugins import available, find, resolve
from molora.seeding import seeded
from molora.testing.data_workers import Parts, forked, spawned
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

# Decoding a part should take a moment; a worker that takes this long starves every training.
LOAD_SECONDS = 10.0
TOLERANCE = 1e-5

_RATE = 1e-2
# Caches fill in the first rounds. What still grows in every later one is a leak, if it is more than the interpreter's
# own pools grow by.
_FIRST_ROUNDS, _ROUNDS = 3, 4
_NOISE_BYTES = 2048

_METHODS = (
    *("__init__", "load", "prepare", "collate", "build_encoder", "projector", "projectors", "examples"),
    *("forward", "saved_config", "train"),
)


@dataclass(frozen=True)
class Finding:
    """Whether a plugin keeps one clause of the contract, and what was found or what to mend. None: not reached, or the
    check cannot tell. `cause`: the check whose finding kept this one from being reached."""

    check: str
    ok: bool | None
    message: str
    cause: str = ""


def check_modality(
    spec: str, options: Mapping[str, Any] | None = None, parts: Sequence[Mapping[str, Any]] | None = None
) -> list[Finding]:
    """Tries a modality plugin on the CPU, on its own examples or on `parts`: content parts that it should take.

    It is tried by itself, in other processes, and in a tiny model with a second modality; no other files are needed.
    """
    findings: list[Finding] = []
    causes: dict[str, str] = {}  # a check that failed or was not reached, to the one that failed
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(spec, dict(options or {}), parts, Path(folder))
        for name, check, needs in _CHECKS:
            cause = next((causes[need] for need in (causes if needs is None else needs) if need in causes), None)
            if cause is not None:
                findings.append(Finding(name, None, f"not reached because of what {cause!r} found", cause))
                causes[name] = cause
                continue
            findings.append(_tried(name, check, trial))
            if findings[-1].ok is False:
                causes[name] = name
    return findings


class _Fault(Exception):
    """What the plugin does wrong, and how to mend it."""


class _Undecided(Exception):
    """Why a check cannot tell."""


def _tried(name: str, check: Callable[[Trial], str], trial: Trial) -> Finding:
    before = shared_state()
    try:
        return Finding(name, True, check(trial))
    except _Fault as fault:
        return Finding(name, False, str(fault))
    except _Undecided as doubt:
        return Finding(name, None, str(doubt))
    except Exception as error:  # a plugin can fail in any way, and its own error is the finding
        return Finding(name, False, f"{_raiser(error, trial.plugin)} raised {_words_of(error)}")
    finally:
        put_back(before)


def _raiser(error: Exception, plugin: type | None) -> str:
    """The method of the plugin, or of its encoder, inside which an error arose."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, (plugin or Encoder, Encoder)) and frame.f_code.co_name in _METHODS:
            return f"{type(owner).__name__}.{frame.f_code.co_name}"
    return "the plugin"


def _words_of(error: Exception) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# The plugin ------------------------------------------------------------------------------------------------------


def _members(trial: Trial) -> str:
    try:
        trial.plugin = resolve("modality", trial.spec)
    except ConfigError as error:
        raise _Fault(str(error)) from error
    return f"{trial.plugin.__name__} has every member of the contract"


def _config(trial: Trial) -> str:
    config_type = trial.plugin.config_type
    if not (isinstance(config_type, type) and is_dataclass(config_type)):
        name = getattr(config_type, "__name__", repr(config_type))
        raise _Fault(f"{name} is no dataclass; add @dataclass: recipes read `options` into the fields of config_type")
    try:
        trial.config = build(config_type, trial.options, "options")
    except ConfigError as error:
        raise _Fault(str(error)) from error
    try:
        again = build(config_type, json.loads(json.dumps(asdict(trial.config))), "modality.json")
    except (ConfigError, TypeError) as error:
        raise _Fault(
            f"{config_type.__name__} does not survive being saved as JSON and read again ({error}); give it fields of "
            "plain values, lists, mappings and dataclasses, all of them in __init__"
        ) from error
    if fingerprint(again) != fingerprint(trial.config):
        raise _Fault(
            f"{config_type.__name__} saved as JSON and read again is {again!r}, was {trial.config!r}; let "
            "__post_init__ leave the fields as they are, or do nothing the second time"
        )
    return f"{config_type.__name__} survives saving and reading, {len(fields(config_type))} fields"


def _identity(trial: Trial) -> str:
    modality = trial.make()
    if not isinstance(modality, Modality):
        raise _Fault("an instance lacks name or config; __init__(self, name, config) keeps both")
    if modality.name != OWN or fingerprint(modality.config) != fingerprint(trial.config):
        raise _Fault(
            f"built with name {OWN!r} and its config, an instance has name {modality.name!r} and config "
            f"{modality.config!r}; __init__(self, name, config) keeps both as they are"
        )
    part_type = modality.part_type
    if not isinstance(part_type, str) or part_type in ("", "text"):
        raise _Fault(
            f"part_type is {part_type!r}; name the content part that it answers to, such as 'image', but not 'text', "
            "which is the tokenizer's"
        )
    twin = Blueprint(trial.spec, trial.plugin("twin", trial.config), None)
    try:
        tiny_molora({OWN: trial.blueprint(), "twin": twin})
    except ConfigError:
        told = f"answers to parts of type {part_type!r}"
        others = " and ".join(_answering(part_type, trial.plugin))
        return f"{told}, and so does {others}: the two cannot be used together" if others else told
    raise _Fault(
        f"two of it went into one model, under the part types {part_type!r} and {twin.modality.part_type!r}; part_type "
        "is an attribute of the class, the same for every name"
    )


def _answering(part_type: str, but: type) -> Iterator[str]:
    """The modalities with a name that answer to a part type too."""
    for plugin in available("modality"):
        try:
            found: Any = resolve("modality", plugin.name)
        except ConfigError:  # what cannot be used is in nobody's way
            continue
        if found is not but and found.part_type == part_type:
            yield repr(plugin.name)


def _projectors(trial: Trial) -> str:
    modality = trial.make()
    names = modality.projectors()
    if not (isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names)):
        raise _Fault(f"projectors() is {names!r}; return a tuple of at least one name, such as ('default',)")
    if len(set(names)) < len(names) or any("." in name for name in names):
        raise _Fault(f"projectors() is {names!r}; names are different from each other and hold no dot")
    # Neighbours that the options mention are those that projector() can know.
    others = sorted({OTHER, *(plugin.name for plugin in available("modality")), *_texts(asdict(trial.config))})
    companies = [frozenset({OWN, *beside}) for beside in ((), others, *((name,) for name in others))]
    for company in companies:
        if (name := modality.projector(company)) not in names:
            raise _Fault(
                f"projector of {sorted(company)} is {name!r}, but projectors() has {names!r}: name every projector "
                "there, and return one of them for every company"
            )
    return f"{', '.join(names)}; tried in {len(companies)} companies"


def _texts(value: Any) -> Iterator[str]:
    """Every text inside plain values, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


class _Pickler(pickle.Pickler):
    """Pickles, and remembers what it met that has weights."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.weights: list[str] = []

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, (nn.Module, nn.Parameter)):
            self.weights.append(type(obj).__name__)


def _weightless(trial: Trial) -> str:
    modality = trial.make()
    for index in range(len(trial.parts)):  # what it keeps from its first calls counts too
        trial.prepare(modality, index, SEED)
    pickler = _Pickler()
    try:
        pickler.dump(modality)
    except Exception as error:
        raise _Fault(
            f"cannot be pickled ({_words_of(error)}), but data workers get a copy: keep lambdas, "
            "locks and open files out of the instance, and make them inside load or prepare"
        ) from error
    if pickler.weights:
        raise _Fault(
            f"holds weights ({_some(sorted(set(pickler.weights)))}), which every data worker would copy: make "
            "networks in build_encoder, and compute without them in load and prepare"
        )
    return "pickles, and holds no weights"


# Its parts and items ---------------------------------------------------------------------------------------------


def _examples(trial: Trial) -> str:
    modality = trial.make()
    examples = modality.examples()
    if not isinstance(examples, list) or not examples:
        raise _Fault(f"examples() is {examples!r:.80}; return a list of a few content parts that load takes")
    trial.parts = list(examples if trial.given is None else trial.given)
    for where, parts in (("examples()", examples), ("the parts given", trial.parts)):
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type") != modality.part_type:
                wanted = f"a content part is a mapping with type {modality.part_type!r}"
                raise _Fault(f"{where} have {part!r:.80}; {wanted}")
    scramble(1)
    if not fingerprint(examples) == fingerprint(modality.examples()) == fingerprint(trial.make().examples()):
        raise _Fault("examples() gives other parts when called again; draw from a generator seeded inside it")
    if len({fingerprint([_extent(value) for value in part.values()]) for part in examples}) < 2:
        raise _Fault(f"all parts of examples() ({len(examples)}) have one size; return at least two sizes")
    if not trial.parts:
        raise _Fault("the parts given are none; give at least one, or leave them out to take examples()")
    return f"{len(examples)} parts, the same every time"


def _extent(value: Any) -> Any:
    """The shape of an array, the size of a picture, the length of a text or list; anything else is its own extent."""
    for attribute in ("shape", "size"):
        if isinstance(extent := getattr(value, attribute, None), tuple):
            return extent
    return len(value) if hasattr(value, "__len__") else value


def _load(trial: Trial) -> str:
    modality, slowest = trial.make(), 0.0
    for index in range(len(trial.parts)):
        part, started = trial.part(index), time.monotonic()
        try:
            modality.load(part)
        except MediaError as error:
            raise _Fault(f"load refuses part {index}, which it should take: {error}") from error
        slowest = max(slowest, time.monotonic() - started)
        if slowest > LOAD_SECONDS:
            raise _Fault(
                f"load took {slowest:.1f} seconds for part {index}, and {LOAD_SECONDS:g} is the most; prepare the data "
                "beforehand, or do less in load"
            )
    return f"{len(trial.parts)} parts, the slowest in {slowest:.3f} seconds"


def _load_repeats(trial: Trial) -> str:
    modality = trial.make()
    for index in range(len(trial.parts)):
        items = set()
        for seed in range(2):
            scramble(seed)
            items.add(fingerprint(modality.load(trial.part(index))))
        if len(items) > 1:
            raise _Fault(f"load gives another item for part {index} when called again; only prepare may augment")
    return "the same item every time"


def _bad_parts(trial: Trial) -> str:
    faults, spoilt = [], list(_spoilt(trial))
    for what, part in spoilt:
        modality, method = trial.make(), "load"
        try:
            item = modality.load(part)
            method = "prepare"
            modality.prepare(item)
        except MediaError as error:
            if not str(error).strip():
                faults.append(f"{method} refuses {what} without a word")
        except Exception as error:
            faults.append(f"{method} raised {_words_of(error)} for {what}")
        else:
            faults.append(f"load accepts {what}")
    if faults:
        raise _Fault(f"{_some(faults)}; raise MediaError that says which part, why, and what to do")
    return f"{len(spoilt)} bad parts refused with MediaError"


def _spoilt(trial: Trial) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts that no plugin can take, and what is wrong with them."""
    example = trial.part(0)
    kind = example["type"]
    garbage = random.Random(SEED).randbytes(4096)
    (trial.folder / "garbage.bin").write_bytes(garbage)
    (trial.folder / "empty.bin").touch()
    yield "a part without media", {"type": kind}
    yield "a part of nothing but None", {key: value if key == "type" else None for key, value in example.items()}
    for what, name in (
        ("a path that leads nowhere", "missing.bin"),
        ("a folder's path", "."),
        ("a file of garbage", "garbage.bin"),
        ("an empty file", "empty.bin"),
    ):
        yield what, {"type": kind, "path": str(trial.folder / name)}
    yield "bytes of garbage", {"type": kind, "bytes": garbage}
    for key, value in example.items():
        if key != "type":
            yield f"an object() as {key!r}", {**example, key: object()}
            if not isinstance(value, str):
                yield f"the word 'garbage' as {key!r}", {**example, key: "garbage"}


def _path(trial: Trial) -> str:
    file = trial.folder / "any.bin"
    file.write_bytes(b"anything")
    answers = []
    # Without media is a part that has nothing, or the path under a key that nobody looks for.
    for media in ({"path": str(file)}, {}, {"htap": str(file)}):
        try:
            answers.append(fingerprint(trial.make().load({"type": trial.part(0)["type"], **media})))
        except Exception as error:  # what is in the file is nothing that load should like
            answers.append(_words_of(error).replace("htap", "path"))
    answer, *without = answers
    if answer in without:
        raise _Fault(
            f"load answers a part that has only a path as it answers one without media ({answer:.120}); read the file "
            "that part['path'] names, which is all that commands, tables and JSONL files give, and if it cannot be "
            "used let the MediaError say why"
        )
    return "load reads the file that a path names"


def _prepare(trial: Trial) -> str:
    modality = trial.make()
    for index in range(len(trial.parts)):
        for seed in (SEED, None):
            one = trial.prepare(modality, index, seed)
            if not isinstance(one, Prepared):
                raise _Fault(f"prepare gives {type(one).__name__} for part {index}; return molora.modality.Prepared")
            if type(one.num_tokens) is not int or one.num_tokens < 1:
                raise _Fault(
                    f"num_tokens of prepare is {one.num_tokens!r} for part {index}; it is an int of at least 1, the "
                    "number of frames that the encoder will give"
                )
            for name, tensor in one.tensors.items():
                if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.requires_grad:
                    raise _Fault(
                        f"prepare gives {tensor!r:.60} as {name!r} for part {index}; give tensors on the CPU that "
                        "require no gradient"
                    )
        trial.prepared.append(one)
    return f"{' + '.join(str(one.num_tokens) for one in trial.prepared)} tokens"


def _randomness(trial: Trial) -> str:
    modality = trial.make()
    for index in range(len(trial.parts)):
        for seed, how in ((None, "without a generator"), (SEED, "with generators in equal state")):
            results = set()
            for state in range(3):
                scramble(state)
                before = shared_state()
                results.add(fingerprint(trial.prepare(modality, index, seed)))
                if drawn := [name for name in put_back(before) if name in GENERATORS]:
                    raise _Fault(f"prepare changes {_some(drawn)}; draw from its argument `generator` alone")
            if len(results) > 1:
                raise _Fault(
                    f"prepare gives different tensors for part {index} {how}; draw from its argument `generator` "
                    "alone, and not at all if that is None"
                )
    return "draws from the generator it is given, and from nothing else"


def _inputs(trial: Trial) -> str:
    modality = trial.make()
    for index in range(len(trial.parts)):
        part = trial.part(index)
        before = fingerprint(part)
        item = modality.load(part)
        if fingerprint(part) != before:
            raise _Fault(f"load changes part {index}, which the next epoch reads again; copy what you change")
        before = fingerprint(item)
        for generator in (None, torch.Generator().manual_seed(SEED)):
            modality.prepare(item, generator)
        if fingerprint(item) != before:
            raise _Fault(f"prepare changes the item of part {index}; copy what you change (clone, not in place)")
    before = fingerprint(trial.prepared)
    modality.collate(trial.prepared)
    if fingerprint(trial.prepared) != before:
        raise _Fault("collate changes the prepared items that it joins; copy what you change")
    return "load, prepare and collate leave what they are given as it was"


def _order(trial: Trial) -> str:
    every = range(len(trial.parts))
    first = {index: fingerprint(trial.prepare(trial.make(), index)) for index in every}
    modality = trial.make()
    for order in (every, every[::-1], every):
        for index in order:
            if fingerprint(trial.prepare(modality, index)) != first[index]:
                raise _Fault(
                    f"load and prepare give other tensors for part {index} after other parts than in a new instance: "
                    "keep nothing from one call to the next, except caches that change no result"
                )
    return "what load and prepare give does not depend on earlier calls"


def _collate(trial: Trial) -> str:
    modality = trial.make()
    collated = modality.collate([trial.prepare(modality, index) for index in range(len(trial.parts))])
    if not isinstance(collated, Mapping):
        raise _Fault(f"collate gives {type(collated).__name__}; return a dict of the tensors that forward takes")
    for name, tensor in collated.items():
        if not isinstance(tensor, Tensor):
            raise _Fault(
                f"collate gives {type(tensor).__name__} as {name!r}; forward takes tensors, since they are moved to "
                "its device: join the items' tensors (torch.cat), and make one of numbers (torch.tensor)"
            )
    return f"a dict of {len(collated)} tensors"


# Its encoder -----------------------------------------------------------------------------------------------------


def _encoder(trial: Trial) -> str:
    encoder: Any = trial.build_encoder()
    if not isinstance(encoder, Encoder):
        raise _Fault(f"build_encoder gives {type(encoder).__name__}; derive that from molora.modality.Encoder")
    width = getattr(encoder, "width", None)
    if type(width) is not int or width < 1:
        raise _Fault(f"the encoder's width is {width!r}; set it to the number of columns of its frames")
    trial.trains = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    device = next((tensor.device for tensor in encoder.state_dict().values()), torch.device("cpu"))
    trial.encoder = encoder.eval()
    for index, one in enumerate(trial.prepared):
        frames = trial.encode(encoder, [one])
        where = f"for part {index} forward gives"
        if not isinstance(frames, Frames):
            raise _Fault(f"{where} {type(frames).__name__}; return molora.modality.Frames")
        frames_SC = frames.frames_SC
        if frames_SC.ndim != 2 or frames_SC.shape[1] != width:
            raise _Fault(
                f"{where} frames of shape {tuple(frames_SC.shape)}; they are 2-D, all items end to end, and the "
                f"encoder's width {width} wide"
            )
        if frames_SC.device != device:
            raise _Fault(f"{where} frames on {frames_SC.device}, but its weights are on {device}; keep them there")
        if frames_SC.dtype != torch.float32:
            raise _Fault(f"{where} frames of {frames_SC.dtype}; with its weights in float32 they are float32")
        if not frames_SC.isfinite().all():
            count = int((~frames_SC.isfinite()).sum())
            raise _Fault(f"{where} {count} values that are not finite (NaN or infinity); look for divisions by 0")
    return f"frames {width} wide, float32, finite"


def _tokens(trial: Trial) -> str:
    batches = {f"part {index} alone": [index] for index in range(len(trial.prepared))}
    for name, order in {**batches, **trial.batches()}.items():
        _check_lengths(trial, [trial.prepared[index] for index in order], name)
    drawn = [trial.prepare(trial.make(), index, SEED) for index in range(len(trial.parts))]
    _check_lengths(trial, drawn, "all parts, augmented")
    return "as many frames as tokens, alone and in batches, in order"


def _check_lengths(trial: Trial, prepared: Sequence[Prepared], name: str) -> None:
    frames = trial.encode(trial.encoder, prepared)
    num_tokens = tuple(one.num_tokens for one in prepared)
    if frames.lengths != num_tokens:
        raise _Fault(
            f"{name}: num_tokens of prepare is {num_tokens}, but lengths of forward's Frames is {frames.lengths!r}; "
            "the two are equal tuples, item by item, for every batch"
        )
    if len(frames.frames_SC) != sum(num_tokens):
        raise _Fault(
            f"{name}: forward gives {len(frames.frames_SC)} rows of frames, its lengths add up to {sum(num_tokens)}"
        )


def _repeats(trial: Trial) -> str:
    encoder = trial.encoder
    if fingerprint(trial.build_encoder().state_dict()) != fingerprint(trial.build_encoder().state_dict()):
        raise _Fault(
            "build_encoder makes other weights from equal seeds; draw them from torch's global generator alone"
        )
    weights = fingerprint(encoder.state_dict())
    collated = trial.make().collate(trial.prepared)
    before = fingerprint(collated)
    with torch.no_grad():
        first = encoder(**collated)
    if fingerprint(collated) != before:
        raise _Fault("forward changes its inputs; copy what you change (clone, not in place)")
    trial.encode(encoder, trial.prepared[::-1])
    if not torch.equal(first.frames_SC, trial.encode(encoder, trial.prepared).frames_SC):
        raise _Fault("forward in eval mode gives other frames when called again: no chance, no memory of earlier calls")
    if fingerprint(encoder.state_dict()) != weights:
        raise _Fault("forward in eval mode changes the encoder's own tensors; only an optimiser may")
    return "the same bits every time, inputs left as they were"


def _invariance(trial: Trial) -> str:
    return f"frames alone and in batches differ by at most {_worst(trial, trial.encoder, 'in eval mode'):.0e}"


def _invariance_training(trial: Trial) -> str:
    encoder = trial.build_encoder().train()
    for module in encoder.modules():  # dropout is the one thing that may differ
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    buffers = {name: fingerprint(buffer) for name, buffer in encoder.named_buffers()}
    runs = []
    for seed in range(2):
        with seeded(seed):
            runs.append(trial.encode(encoder, trial.prepared).frames_SC)
    if changed := [name for name, buffer in encoder.named_buffers() if fingerprint(buffer) != buffers[name]]:
        raise _Fault(
            f"forward in train mode changes {_some(changed)}: no statistics over batches; use LayerNorm or "
            "GroupNorm, or hold BatchNorm in eval mode by overriding train"
        )
    if not torch.equal(*runs):
        raise _Undecided(
            "cannot tell: forward in train mode draws numbers other than those of nn.Dropout modules; use nn.Dropout "
            "modules to have this checked"
        )
    return f"frames alone and in batches differ by at most {_worst(trial, encoder, 'in train mode'):.0e}"


def _worst(trial: Trial, encoder: Any, mode: str) -> float:
    """The largest relative difference between an item's frames alone and in a batch."""
    worst = 0.0
    alone = [trial.encode(encoder, [one]).frames_SC for one in trial.prepared]
    for name, order in trial.batches().items():
        frames = trial.encode(encoder, [trial.prepared[index] for index in order])
        for index, ours in zip(order, frames.frames_SC.split(frames.lengths), strict=True):
            difference = float((ours - alone[index]).abs().max() / alone[index].abs().max().clamp(min=1.0))
            if not difference <= TOLERANCE:
                raise _Fault(
                    f"forward {mode} gives part {index} other frames in a batch of {name} than alone: they differ by "
                    f"{difference:.1e}, {TOLERANCE:.0e} is allowed; in convolutions, attention and means, no item "
                    "sees padding (mask it) or, where items lie end to end, another item (split them by their lengths);"
                    " and take no statistics over the batch"
                )
            worst = max(worst, difference)
    return worst


# In a model ------------------------------------------------------------------------------------------------------


def _training(trial: Trial) -> str:
    model, processor = tiny_molora(trial.plans())
    trial.pristine = {OWN: tensor_hash(model.encoders[OWN].state_dict())}
    trial.elsewhere = trial.fingerprints(model, processor)
    samples = [sample for kind in ("own", "others", "mixed") for sample in trial.samples(processor, kind)]
    parts = [f"encoders.{OWN}.{name}" for name in trial.trains] + [f"projectors.{OWN}", f"adapters.{OWN}"]
    optimizers = set_trainable(model, {part: PartConfig(learning_rate=_RATE) for part in parts}, 1, "conformance")
    row = train_step(model.train(), processor, samples, MAX_TOKENS, optimizers)
    trial.model, trial.processor = model.eval(), processor
    if wild := [name for name in trial.trains if not model.get_parameter(f"encoders.{OWN}.{name}").isfinite().all()]:
        raise _Fault(
            f"after one training step the encoder's {_some(wild)} is not finite: forward has no finite gradient there; "
            "look for roots, logarithms and divisions at 0, or set requires_grad to False in build_encoder"
        )
    return f"one step beside {OTHER} and text, loss {row[f'loss/{OWN}']:.2f}"


def _own_weights(trial: Trial) -> str:
    encoder, model = trial.model.encoders[OWN], trial.model
    foreign = {
        tensor.untyped_storage().data_ptr(): name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not name.startswith(f"encoders.{OWN}.")
    }
    own: dict[int, str] = {}
    for name, tensor in encoder.state_dict(keep_vars=True).items():
        if not tensor.numel():
            continue
        if (storage := tensor.untyped_storage().data_ptr()) in foreign:
            raise _Fault(f"the encoder's {name} is the model's own {foreign[storage]}; build_encoder makes its own")
        if tensor.data_ptr() in own:
            raise _Fault(
                f"the encoder registers one tensor as {own[tensor.data_ptr()]} and as {name}; register it once"
            )
        own[tensor.data_ptr()] = name
    return f"{len(own)} tensors of its own"


def _gradients(trial: Trial) -> str:
    model: MoLoRA = trial.model
    parameters = dict(model.encoders[OWN].named_parameters())
    for parameter in model.parameters():
        parameter.grad = None
    loss = model.losses(trial.processor.collate(trial.samples(trial.processor, "own"))).sums_N.sum()
    known = {id(parameter) for parameter in model.parameters()}
    strangers = sorted({str(tuple(leaf.shape)) for leaf in _leaves(loss) if id(leaf) not in known})
    loss.backward()
    if strangers:
        raise _Fault(
            f"forward uses tensors that require gradients and are no parameters of the encoder (of shape "
            f"{_some(strangers)}), so that they are neither trained nor saved; make them the encoder's own"
        )
    if idle := [name for name in trial.trains if parameters[name].grad is None]:
        all_of_them = len(idle) == len(trial.trains)
        advice = "use them in forward, remove them, or set requires_grad to False in build_encoder"
        raise _Fault(
            f"{len(idle)} of {len(trial.trains)} parameters get no gradient ({_some(idle)}); "
            + ("forward detaches its frames, or runs under no_grad: leave the gradient on" if all_of_them else advice)
        )
    return f"all {len(trial.trains)} parameters that want a gradient get one"


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss would give gradients to."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.variable for node in seen if hasattr(node, "variable")]


def _nothing_else(trial: Trial) -> str:
    model: MoLoRA = trial.model
    now = trial.fingerprints(model, trial.processor)
    if moved := [name for name, before in trial.elsewhere.items() if now[name] != before]:
        raise _Fault(
            f"a training step of this modality moved what is not its own ({_some(moved)}); the encoder "
            "changes nothing outside itself"
        )
    foreign = {name: parameter for name, parameter in model.named_parameters() if not is_own(name)}
    if loose := [name for name, parameter in foreign.items() if parameter.requires_grad]:
        raise _Fault(
            f"after a training step of this modality, {_some(loose)} require gradients: the encoder sets "
            "requires_grad on nothing but its own parameters"
        )
    return f"{len(now)} tensors and logits of others as they were, to the bit"


def _neighbours(trial: Trial) -> str:
    results = []
    for plans in ({OTHER: trial.neighbour()}, trial.plans()):
        model, processor = tiny_molora(plans)
        results.append(trial.fingerprints(model, processor))
    without, beside = results
    if moved := [name for name in without if beside[name] != without[name]]:
        raise _Fault(
            f"with the plugin in the model, {_some(moved)} are other bits than without; build_encoder and "
            "__init__ change nothing outside themselves"
        )
    return f"{len(without)} tensors and logits of others are the same bits with and without it"


def _saving(trial: Trial) -> str:
    _check_folder(trial, trial.model, trial.processor, with_weights=True)
    if trial.encoder.origin is None:
        return "a trained folder opens again and gives the same bits"
    model, processor = tiny_molora(trial.plans())
    _check_folder(trial, model, processor, with_weights=False)
    return "a trained folder and one without weights open again and give the same bits"


def _check_folder(trial: Trial, model: MoLoRA, processor: Processor, *, with_weights: bool) -> None:
    folder = trial.folder / ("with weights" if with_weights else "without weights")
    pristine = {OWN: "trained"} if with_weights else trial.pristine
    save_modality(model, OWN, trial.blueprint(), folder, pristine)
    advice = f"saved_config(with_weights={with_weights}) gives a config that builds the same modules"
    try:
        plan, _ = read_blueprint(folder, model.backbone.identity, OWN, [find("modality", trial.spec)])
        # Another seed, so that only what was saved can be the same.
        again, its_processor = tiny_molora({OWN: plan, OTHER: trial.neighbour()}, seed=SEED + 1)
        load_modality(again, OWN, folder)
    except Exception as error:
        raise _Fault(f"its saved folder does not open ({_words_of(error)}); {advice}") from error
    ours = logits(model, processor, trial.samples(processor, "own"))
    theirs = logits(again, its_processor, trial.samples(its_processor, "own"))
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise _Fault(
            f"opened from its saved folder it gives other logits; {advice}, and all that forward uses is in state_dict"
        )


# The process -----------------------------------------------------------------------------------------------------


def _memory(trial: Trial) -> str:
    modality, every = trial.make(), range(len(trial.parts))

    def load_and_prepare() -> list[Any]:
        return [modality.collate([trial.prepare(modality, index)]) for index in every]

    traced = tracemalloc.is_tracing()
    gc.freeze()  # sets aside what there is already: only new objects are counted, and collecting is quick
    tracemalloc.start()
    try:
        tensors, size = _left_behind(load_and_prepare)
        if tensors or size > _NOISE_BYTES:
            raise _Fault(
                f"load, prepare and collate leave {tensors} tensors and {size} bytes behind every time all parts go "
                "through them; keep nothing of an item, or bound the cache"
            )
        tensors, _ = _left_behind(lambda: [trial.encode(trial.encoder, [one]) for one in trial.prepared])
    finally:
        gc.unfreeze()
        if not traced:
            tracemalloc.stop()
    if tensors:
        raise _Fault(f"forward leaves {tensors} tensors behind every time all parts go through it; keep none of them")
    return "load, prepare, collate and forward leave nothing behind"


def _left_behind(run: Callable[[], object]) -> tuple[int, int]:
    """The tensors and bytes that remain of every call, at least, once caches have filled."""
    counts = []
    for _ in range(_FIRST_ROUNDS + _ROUNDS):
        run()
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        counts.append((tensors, tracemalloc.get_traced_memory()[0]))
    steps = [(tensors - t, size - s) for (t, s), (tensors, size) in pairwise(counts[_FIRST_ROUNDS - 1 :])]
    return max(0, min(tensors for tensors, _ in steps)), max(0, min(size for _, size in steps))


def _globals(trial: Trial) -> str:
    faults: list[str] = []

    def watched(method: str, call: Callable[[], Any], *, may_draw: bool = False) -> Any:
        before = shared_state()
        result = call()
        changed = [name for name in put_back(before) if not (may_draw and name in GENERATORS)]
        if changed:
            faults.append(f"{method} changes {_some(changed)}")
        return result

    every = range(len(trial.parts))
    modality = watched("__init__", trial.make)
    watched("examples", modality.examples)
    watched("projectors", modality.projectors)
    watched("projector", lambda: modality.projector(frozenset({OWN})))
    items = watched("load", lambda: [modality.load(trial.part(index)) for index in every])
    prepared = watched("prepare", lambda: [modality.prepare(item) for item in items])
    watched("prepare", lambda: modality.prepare(items[0], torch.Generator().manual_seed(SEED)))
    collated = watched("collate", lambda: modality.collate(prepared))
    # Weights and dropout come from torch's generator, which the model seeds.
    encoder = watched("build_encoder", modality.build_encoder, may_draw=True)
    watched("forward in eval mode", lambda: encoder.eval()(**collated))
    watched("forward in train mode", lambda: encoder.train()(**collated), may_draw=True)
    watched("saved_config", lambda: encoder.saved_config(True))
    if faults:
        raise _Fault(f"{_some(list(dict.fromkeys(faults)))}; the whole process shares it, so leave it as it is")
    return "no method changes a setting or a generator that others use"


def _workers(trial: Trial) -> str:
    torch.set_num_threads(1)  # as in a data worker
    parts = Parts(trial.make(), trial.parts, SEED)
    here = [fingerprint(parts[index]) for index in range(len(parts))]
    for how in ("forked", "spawned"):
        try:
            if how == "forked":
                prepared = forked(parts)
            else:
                prepared, trial.imported = spawned(parts, trial.spec, trial.folder)
        except Exception as error:
            why = str(error).strip().splitlines()[-1]
            raise _Fault(f"load and prepare fail in a {how} data worker: {why}") from error
        for index, one in enumerate(prepared):
            if fingerprint(one) != here[index]:
                raise _Fault(
                    f"in a {how} data worker, load and prepare give other tensors for part {index // 2} than here: "
                    "they depend on the part, the config and the generator, not on what a process has done before"
                )
    return "data workers, forked and spawned, prepare the same tensors"


def _imports(trial: Trial) -> str:
    if trial.imported:
        raise _Fault(
            f"importing the plugin's module imports {' and '.join(trial.imported)}, which every data worker would "
            "load; import what needs them inside the function that uses it"
        )
    return "importing the plugin's module does not import the model"


# A check's name, the check, and those that it builds on. None: all before it, since processes are slow to start and say
# little about a plugin that is wrong already.
_CHECKS: tuple[tuple[str, Callable[[Trial], str], tuple[str, ...] | None], ...] = (
    ("members", _members, ()),
    ("config", _config, ("members",)),
    ("name and part type", _identity, ("config",)),
    ("projectors", _projectors, ("name and part type",)),
    ("examples", _examples, ("name and part type",)),
    ("load", _load, ("examples",)),
    ("load repeats", _load_repeats, ("load",)),
    ("bad parts", _bad_parts, ("load",)),
    ("path", _path, ("load",)),
    ("prepare", _prepare, ("load",)),
    ("randomness", _randomness, ("prepare", "load repeats")),
    ("collate", _collate, ("prepare",)),
    ("inputs kept", _inputs, ("collate",)),
    ("order of calls", _order, ("prepare", "randomness")),
    ("weightless", _weightless, ("prepare",)),
    ("encoder", _encoder, ("collate",)),
    ("tokens equal frames", _tokens, ("encoder",)),
    ("encoder repeats", _repeats, ("encoder",)),
    ("batch invariance", _invariance, ("tokens equal frames", "encoder repeats")),
    ("batch invariance in training", _invariance_training, ("batch invariance",)),
    ("training step", _training, ("projectors", "tokens equal frames")),
    ("own weights", _own_weights, ("training step",)),
    ("gradients", _gradients, ("training step",)),
    ("nothing else moves", _nothing_else, ("training step",)),
    ("neighbours", _neighbours, ("training step",)),
    (
        "saving",
        _saving,
        ("randomness", "order of calls", "encoder repeats", "own weights", "nothing else moves", "neighbours"),
    ),
    ("memory", _memory, ("encoder",)),
    ("shared state", _globals, ("encoder",)),
    ("data workers", _workers, None),
    ("imports", _imports, None),
)
