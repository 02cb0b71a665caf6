"""Clauses about a modality by itself: its class (members, options, name, projectors), its parts and its items."""

import io
import json
import pickle
import random
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from molora.checkpoint.assembly import Blueprint
from molora.config import ConfigError, build
from molora.modality import HasBlank, MediaError, Modality, Prepared
from molora.plugin_kit.catalogue import modalities
from molora.plugin_kit.clauses import Fault, clause, kept, some, words_of
from molora.plugin_kit.under_test import OTHER, OWN, SEED, ModalityUnderTest, tiny_molora
from molora.plugins import available, resolve
from molora.testing.side_effects import GENERATORS, fingerprint, put_back, scramble, shared_state

# Decoding a part should take a moment; a worker that takes this long starves every training.
LOAD_SECONDS = 10.0


@clause("members")
def members(tested: ModalityUnderTest) -> str:
    tested.plugin = resolve("modality", tested.spec)
    return f"{tested.plugin.__name__} has every member of the contract"


@clause("config", "members")
def config(tested: ModalityUnderTest) -> str:
    config_type = tested.plugin.config_type
    name = getattr(config_type, "__name__", repr(config_type))
    if not (isinstance(config_type, type) and is_dataclass(config_type)):
        raise Fault(f"{name} is no dataclass; add @dataclass: recipes read `options` into the fields of config_type")
    tested.config = build(config_type, tested.options, "options")
    try:
        again = build(config_type, json.loads(json.dumps(asdict(tested.config))), "modality.json")
    except (ConfigError, TypeError) as error:
        wrong = f"{name} does not survive being saved as JSON and read again ({error})"
        advice = "give it fields of plain values, lists, mappings and dataclasses, all of them in __init__"
        raise Fault(f"{wrong}; {advice}") from error
    if fingerprint(again) != fingerprint(tested.config):
        wrong = f"{name} saved as JSON and read again is {again!r}, was {tested.config!r}"
        raise Fault(f"{wrong}; let __post_init__ leave the fields as they are, or do nothing the second time")
    return f"{name} survives saving and reading, {len(fields(config_type))} fields"


@clause("name and part type", "config")
def name_and_part_type(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    if not isinstance(modality, Modality):
        raise Fault("an instance lacks name or config; __init__(self, name, config) keeps both")
    if modality.name != OWN or fingerprint(modality.config) != fingerprint(tested.config):
        wrong = f"built with name {OWN!r} and its config, an instance has name {modality.name!r}"
        raise Fault(f"{wrong} and config {modality.config!r}; __init__(self, name, config) keeps both as they are")
    part_type = modality.part_type
    if not isinstance(part_type, str) or part_type in ("", "text"):
        raise Fault(f"part_type is {part_type!r}; name a content part such as 'image', not 'text', the tokenizer's")
    other = tested.plugin("twin", tested.config)
    twin = Blueprint(tested.spec, other, None)
    try:
        tiny_molora({OWN: tested.blueprint(), "twin": twin})
    except ConfigError:
        told = f"answers to parts of type {part_type!r}"
        named = [entry.name for entry in modalities() if entry.columns[:1] == (part_type,)]
        others = " and ".join(repr(name) for name in named if resolve("modality", name) is not tested.plugin)
        return f"{told}, and so does {others}: the two cannot be used together" if others else told
    wrong = f"two of it went into one model, under the part types {part_type!r} and {other.part_type!r}"
    raise Fault(f"{wrong}; part_type is an attribute of the class, the same for every name")


@clause("projectors", "name and part type")
def projectors(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    names = modality.projectors()
    if not (isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names)):
        raise Fault(f"projectors() is {names!r}; return a tuple of at least one name, such as ('default',)")
    if len(set(names)) < len(names) or any("." in name for name in names):
        raise Fault(f"projectors() is {names!r}; names are different from each other and hold no dot")
    # Neighbours that the options mention are those that projector() can know.
    mentioned = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(asdict(tested.config), ensure_ascii=False))
    others = sorted({OTHER, *(plugin.name for plugin in available("modality")), *mentioned})
    sets = [frozenset({OWN, *beside}) for beside in ((), others, *((name,) for name in others))]
    for those in sets:
        if (name := modality.projector(those)) not in names:
            wrong = f"projector of {sorted(those)} is {name!r}, but projectors() has {names!r}"
            raise Fault(f"{wrong}: name every projector there, and return one of them for every set of modalities")
    return f"{', '.join(names)}; tried in {len(sets)} sets of modalities"


@clause("examples", "name and part type")
def examples(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    examples = modality.examples()
    if not isinstance(examples, list) or not examples:
        raise Fault(f"examples() is {examples!r:.80}; return a list of a few content parts that load takes")
    tested.parts = list(examples if tested.given is None else tested.given)
    for where, parts in (("examples()", examples), ("the parts given", tested.parts)):
        for part in parts:
            if not isinstance(part, Mapping) or part.get("type") != modality.part_type:
                raise Fault(f"{where} have {part!r:.80}; a part is a mapping with type {modality.part_type!r}")
    scramble(1)
    if not fingerprint(examples) == fingerprint(modality.examples()) == fingerprint(tested.make().examples()):
        raise Fault("examples() gives other parts when called again; draw from a generator seeded inside it")
    if len({fingerprint([_extent(value) for value in part.values()]) for part in examples}) < 2:
        raise Fault(f"all parts of examples() ({len(examples)}) have one size; return at least two sizes")
    if not tested.parts:
        raise Fault("the parts given are none; give at least one, or leave them out to take examples()")
    return f"{len(examples)} parts, the same every time"


def _extent(value: Any) -> Any:
    """The shape of an array, the size of a picture, the length of a text or list; anything else is its own extent."""
    extent = getattr(value, "shape", getattr(value, "size", None))
    return extent if isinstance(extent, tuple) else len(value) if hasattr(value, "__len__") else value


@clause("load", "examples")
def load(tested: ModalityUnderTest) -> str:
    modality, slowest = tested.make(), 0.0
    for index in tested.every:
        part, started = tested.part(index), time.monotonic()
        try:
            modality.load(part)
        except MediaError as error:
            raise Fault(f"load refuses part {index}, which it should take: {error}") from error
        slowest = max(slowest, time.monotonic() - started)
        if slowest > LOAD_SECONDS:
            wrong = f"load took {slowest:.1f} seconds for part {index}, and {LOAD_SECONDS:g} is the most"
            raise Fault(f"{wrong}; prepare the data beforehand, or do less in load")
    return f"{len(tested.parts)} parts, the slowest in {slowest:.3f} seconds"


@clause("load repeats", "load")
def load_repeats(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    for index in tested.every:
        items = set()
        for seed in range(2):
            scramble(seed)
            items.add(fingerprint(modality.load(tested.part(index))))
        if len(items) > 1:
            raise Fault(f"load gives another item for part {index} when called again; only prepare may augment")
    return "the same item every time"


@clause("bad parts", "load")
def bad_parts(tested: ModalityUnderTest) -> str:
    faults, spoilt = [], list(_spoilt(tested))
    for what, part in spoilt:
        modality, method = tested.make(), "load"
        try:
            item = modality.load(part)
            method = "prepare"
            modality.prepare(item)
        except MediaError as error:
            if not str(error).strip():
                faults.append(f"{method} refuses {what} without a word")
        except Exception as error:
            faults.append(f"{method} raised {words_of(error)} for {what}")
        else:
            faults.append(f"load accepts {what}")
    if faults:
        raise Fault(f"{some(faults)}; raise MediaError that says which part, why, and what to do")
    return f"{len(spoilt)} bad parts refused with MediaError"


def _spoilt(tested: ModalityUnderTest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts that no plugin can take, and what is wrong with them."""
    example = tested.part(0)
    kind = {"type": example["type"]}
    garbage = random.Random(SEED).randbytes(4096)
    (tested.folder / "garbage.bin").write_bytes(garbage)
    (tested.folder / "empty.bin").touch()
    yield "a part without media", kind
    yield "a part of nothing but None", {**dict.fromkeys(example), **kind}
    yield "a path that leads nowhere", {**kind, "path": str(tested.folder / "missing.bin")}
    yield "a folder's path", {**kind, "path": str(tested.folder)}
    yield "a file of garbage", {**kind, "path": str(tested.folder / "garbage.bin")}
    yield "an empty file", {**kind, "path": str(tested.folder / "empty.bin")}
    yield "bytes of garbage", {**kind, "bytes": garbage}
    for key, value in example.items():
        if key != "type":
            yield f"an object() as {key!r}", {**example, key: object()}
            if not isinstance(value, str):
                yield f"the word 'garbage' as {key!r}", {**example, key: "garbage"}


@clause("path", "load")
def path(tested: ModalityUnderTest) -> str:
    file = tested.folder / "any.bin"
    file.write_bytes(b"anything")
    answers = []
    # Without media is a part that has nothing, or the path under a key that nobody looks for.
    for media in ({"path": str(file)}, {}, {"htap": str(file)}):
        try:
            answers.append(fingerprint(tested.make().load({"type": tested.part(0)["type"], **media})))
        except Exception as error:  # what is in the file is nothing that load should like
            answers.append(words_of(error).replace("htap", "path"))
    answer, *without = answers
    if answer in without:
        raise Fault(
            f"load answers a part that has only a path as it answers one without media ({answer:.120}); read the file "
            "that part['path'] names, which is all that commands, tables and JSONL files give, and if it cannot be "
            "used let the MediaError say why"
        )
    return "load reads the file that a path names"


@clause("prepare", "load")
def prepare(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    for index in tested.every:
        for seed in (SEED, None):
            one = tested.prepare(modality, index, seed)
            if not isinstance(one, Prepared):
                raise Fault(f"prepare gives {type(one).__name__} for part {index}; return molora.modality.Prepared")
            if type(one.num_tokens) is not int or one.num_tokens < 1:
                wrong = f"num_tokens of prepare is {one.num_tokens!r} for part {index}"
                raise Fault(f"{wrong}; it is an int of at least 1, the number of frames that the encoder will give")
            for name, tensor in one.tensors.items():
                if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.requires_grad:
                    wrong = f"prepare gives {tensor!r:.60} as {name!r} for part {index}"
                    raise Fault(f"{wrong}; give tensors on the CPU that require no gradient")
        tested.prepared.append(one)
    return f"{' + '.join(str(one.num_tokens) for one in tested.prepared)} tokens"


@clause("randomness", "prepare", "load repeats")
def randomness(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    for index in tested.every:
        for seed, how in ((None, "without a generator"), (SEED, "with generators in equal state")):
            results = set()
            for state in range(3):
                scramble(state)
                before = shared_state()
                results.add(fingerprint(tested.prepare(modality, index, seed)))
                if drawn := [name for name in put_back(before) if name in GENERATORS]:
                    raise Fault(f"prepare changes {some(drawn)}; draw from its argument `generator` alone")
            if len(results) > 1:
                wrong = f"prepare gives different tensors for part {index} {how}"
                raise Fault(f"{wrong}; draw from its argument `generator` alone, and not at all if that is None")
    return "draws from the generator it is given, and from nothing else"


@clause("collate", "prepare")
def collate(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    collated = modality.collate([tested.prepare(modality, index) for index in tested.every])
    if not isinstance(collated, Mapping):
        raise Fault(f"collate gives {type(collated).__name__}; return a dict of the tensors that forward takes")
    for name, tensor in collated.items():
        if not isinstance(tensor, Tensor):
            raise Fault(
                f"collate gives {type(tensor).__name__} as {name!r}; forward takes tensors, since they are moved to "
                "its device: join the items' tensors (torch.cat), and make one of numbers (torch.tensor)"
            )
    return f"a dict of {len(collated)} tensors"


@clause("inputs kept", "collate")
def inputs_kept(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    for index in tested.every:
        part = tested.part(index)
        with kept(part, f"load changes part {index}, which the next epoch reads again; copy what you change"):
            item = modality.load(part)
        with kept(item, f"prepare changes the item of part {index}; copy what you change (clone, not in place)"):
            for generator in (None, torch.Generator().manual_seed(SEED)):
                modality.prepare(item, generator)
    with kept(tested.prepared, "collate changes the prepared items that it joins; copy what you change"):
        modality.collate(tested.prepared)
    return "load, prepare and collate leave what they are given as it was"


@clause("blank", "prepare")
def blank(tested: ModalityUnderTest) -> str:
    if not isinstance(tested.make(), HasBlank):
        return "has no method blank: evaluations cannot ask with blank media"
    modality = tested.make()
    advice = "return an item of the same size that says nothing: the same whatever the item holds"
    for index in tested.every:
        item = modality.load(tested.part(index))
        with kept(item, f"blank changes the item of part {index}; make a new one"):
            scramble(0)
            one = modality.prepare(modality.blank(item))
        scramble(1)
        if fingerprint(modality.prepare(modality.blank(item))) != fingerprint(one):
            raise Fault(f"blank gives another item for part {index} when called again; draw nothing in it")
        whole = tested.prepared[index]
        sizes = [(each.num_tokens, _shapes(each)) for each in (one, whole)]
        if sizes[0] != sizes[1]:
            raise Fault(f"blank of part {index} takes {_sized(one)}, the part itself {_sized(whole)}; {advice}")
        if wrong := [name for name, tensor in one.tensors.items() if not tensor.isfinite().all()]:
            raise Fault(f"blank of part {index} has {some(wrong)} that is not finite; {advice}")
        other = modality.prepare(modality.blank(_otherwise(item)))
        if fingerprint(one) == fingerprint(whole) or fingerprint(other) != fingerprint(one):
            raise Fault(f"blank of part {index} still says what the item holds; {advice}")
    return f"{len(tested.parts)} blank items, of the same size and without content"


def _shapes(prepared: Prepared) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in prepared.tensors.items()}


def _sized(prepared: Prepared) -> str:
    shapes = ", ".join(f"{name} {shape}" for name, shape in _shapes(prepared).items())
    return f"{prepared.num_tokens} tokens ({shapes})"


def _otherwise(item: Any) -> Any:
    """An item of the same size that holds something else: its values in reverse order, and half as large."""
    if isinstance(item, Tensor):
        turned = item.flip(tuple(range(item.ndim)))
        return turned * 0.5 if item.is_floating_point() else turned // 2
    if isinstance(item, np.ndarray):
        return _otherwise(torch.from_numpy(item.copy())).numpy() if item.dtype.kind in "fiu" else item
    if isinstance(item, Image.Image):
        return Image.fromarray(_otherwise(np.asarray(item)), item.mode)
    if isinstance(item, str):
        return item[::-1]
    if isinstance(item, (list, tuple)) and all(isinstance(value, float) for value in item):
        return type(item)(value / 2 for value in reversed(item))
    if isinstance(item, (list, tuple)):
        return type(item)(map(_otherwise, item))
    return {key: _otherwise(value) for key, value in item.items()} if isinstance(item, dict) else item


@clause("order of calls", "prepare", "randomness")
def order_of_calls(tested: ModalityUnderTest) -> str:
    first = [fingerprint(tested.prepare(tested.make(), index)) for index in tested.every]
    modality = tested.make()
    for index in (*tested.every, *reversed(tested.every), *tested.every):
        if fingerprint(tested.prepare(modality, index)) != first[index]:
            wrong = f"load and prepare give other tensors for part {index} after other parts than in a new instance"
            raise Fault(f"{wrong}: keep nothing from one call to the next, except caches that change no result")
    return "what load and prepare give does not depend on earlier calls"


class _Pickler(pickle.Pickler):
    """Pickles, and remembers what it met that has weights."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.weights: set[str] = set()

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, (nn.Module, nn.Parameter)):
            self.weights.add(type(obj).__name__)


@clause("weightless", "prepare")
def weightless(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    for index in tested.every:  # what it keeps from its first calls counts too
        tested.prepare(modality, index, SEED)
    pickler = _Pickler()
    try:
        pickler.dump(modality)
    except Exception as error:
        wrong = f"cannot be pickled ({words_of(error)}), but data workers get a copy"
        advice = "keep lambdas, locks and open files out of the instance, and make them inside load or prepare"
        raise Fault(f"{wrong}: {advice}") from error
    if pickler.weights:
        wrong = f"holds weights ({some(sorted(pickler.weights))}), which every data worker would copy"
        raise Fault(f"{wrong}: make networks in build_encoder, and compute without them in load and prepare")
    return "pickles, and holds no weights"
