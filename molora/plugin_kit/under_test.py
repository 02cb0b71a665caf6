"""A modality plugin on trial: its parts, its encoder, a tiny model around it, and ways to see what it changes."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from molora.checkpoint.assembly import Blueprint, RouterConfig, assemble, blueprint
from molora.data.processor import Processor
from molora.modality import Frames, Prepared
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.seeding import seeded
from molora.testing.data_workers import prepare
from molora.testing.tiny import byte_tokenizer, tiny_model

# The names under which the plugin and its neighbour are tried.
OWN, OTHER = "checked", "neighbour"
SEED = 7
MAX_TOKENS = 2**20

_NEIGHBOURS = ("molora.testing.tiny:Numbers", "molora.testing.tiny:Letters")
_ADAPTER = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass
class Trial:
    """A plugin with its options, and what its first checks leave here for later ones.

    `given` are content parts to try it on; None means its examples. `folder` is for files.
    """

    spec: str
    options: dict[str, Any]
    given: Sequence[Mapping[str, Any]] | None
    folder: Path
    plugin: Any = None
    config: Any = None
    parts: list[Mapping[str, Any]] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    encoder: Any = None
    trains: list[str] = field(default_factory=list)
    model: Any = None
    processor: Any = None
    pristine: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    imported: list[str] = field(default_factory=list)

    def make(self) -> Any:
        """A plugin that has not been used."""
        return self.plugin(OWN, self.config)

    def part(self, index: int) -> dict[str, Any]:
        """A copy of a part: whoever changes it spoils nothing."""
        return copy.deepcopy(dict(self.parts[index]))

    def prepare(self, modality: Any, index: int, seed: int | None = None) -> Prepared:
        return prepare(modality, self.part(index), seed)

    def build_encoder(self) -> Any:
        with seeded(SEED):
            return self.make().build_encoder()

    def encode(self, encoder: Any, prepared: Sequence[Prepared]) -> Frames:
        with torch.no_grad():
            return encoder(**self.make().collate(prepared))

    def batches(self) -> dict[str, list[int]]:
        """Which parts make a batch, by what it is called in messages."""
        every = list(range(len(self.parts)))
        return {"all parts": every, "all parts in reverse": every[::-1], "every part twice": every * 2}

    def blueprint(self) -> Blueprint:
        return blueprint(OWN, self.spec, self.options, _ADAPTER, "the plugin")

    def neighbour(self) -> Blueprint:
        """A modality to stand beside the plugin, of another part type."""
        plans = (blueprint(OTHER, spec, {}, _ADAPTER, "the neighbour") for spec in _NEIGHBOURS)
        part_type = self.make().part_type
        return next(plan for plan in plans if plan.modality.part_type != part_type)

    def plans(self) -> dict[str, Blueprint]:
        return {OWN: self.blueprint(), OTHER: self.neighbour()}

    def samples(self, processor: Processor, kind: Literal["own", "others", "mixed"]) -> list[Sample]:
        """Conversations about the plugin's parts; about none and about the neighbour's; about both."""
        text = {"type": "text", "text": "what is it?"}
        others = self.neighbour().modality.examples()
        contents = {
            "own": [[self.part(index), text] for index in range(len(self.parts))],
            "others": [[text], *([part, text] for part in others)],
            "mixed": [[self.part(0), others[0], text]],
        }[kind]
        answer = {"role": "assistant", "content": "it is"}
        turns = [[{"role": "user", "content": content}, answer] for content in contents]
        return [processor.encode(messages, f"{kind} {index}") for index, messages in enumerate(turns)]

    def fingerprints(self, model: MoLoRA, processor: Processor) -> dict[str, str]:
        """Of all that the plugin must not move: tensors that are not its own, logits of samples without it."""
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        found = {name: fingerprint(tensor) for name, tensor in tensors.items() if not is_own(name)}
        for sample in self.samples(processor, "others"):
            what = "+".join(sample.modalities) or "text"
            found[f"the logits of {what} ({sample.id})"] = fingerprint(logits(model, processor, [sample]))
        return found


def tiny_molora(plans: Mapping[str, Blueprint], seed: int = SEED) -> tuple[MoLoRA, Processor]:
    """A tiny model with these modalities, and its processor."""
    rules = {f"{OWN}+{OTHER}": OWN} if plans.keys() >= {OWN, OTHER} else {}
    return assemble(_backbone(_probe()), byte_tokenizer(), plans, RouterConfig(options={"rules": rules}), seed=seed)


@torch.no_grad()
def logits(model: MoLoRA, processor: Processor, samples: list[Sample]) -> Tensor:
    return model.eval().logits(processor.collate(samples))


def _backbone(probe: dict[str, Any] | None) -> Backbone:
    return Backbone(tiny_model("llama", max_tokens=MAX_TOKENS), Identity("trial", "", "", "", ""), probe=probe)


@cache
def _probe() -> dict[str, Any]:
    return _backbone(None).probe


def is_own(name: str) -> bool:
    """Whether a tensor of the model belongs to the plugin's modality."""
    return OWN in name.split(".")


def fingerprint(value: Any) -> str:
    """A hash of everything inside a value: values of equal content have equal ones."""
    digest = hashlib.sha256()
    _feed(value, digest.update, ())
    return digest.hexdigest()


def _feed(value: Any, update: Callable[[bytes], None], above: tuple[int, ...]) -> None:
    """Hands the content of a value to `update`. `above` are the objects that it lies in, and may refer to."""
    update(f"<{type(value).__qualname__}>".encode())
    if id(value) in above:
        return
    inside: Any = ()
    if isinstance(value, Tensor):
        update(f"{value.dtype} {tuple(value.shape)} {value.device}".encode())
        if value.device.type != "meta":
            update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, Image.Image):
        update(f"{value.mode} {value.size}".encode() + value.tobytes())
    elif isinstance(value, memoryview):
        update(bytes(value))
    elif isinstance(value, Mapping):
        inside = sorted(value.items(), key=lambda entry: repr(entry[0]))
    elif isinstance(value, (set, frozenset)):
        inside = sorted(value, key=repr)
    elif isinstance(value, (list, tuple, np.ndarray)):
        inside = value
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inside = [vars(value)]
    elif type(value).__repr__ is not object.__repr__:  # that one holds an address, and nothing of the content
        update(repr(value).encode())
    for item in inside:
        _feed(item, update, (*above, id(value)))
    update(b"</>")


_State = dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]
GENERATORS: _State = {
    "the state of torch's global generator": (torch.get_rng_state, torch.set_rng_state),
    "the state of numpy's global generator": (np.random.get_state, np.random.set_state),
    "the state of Python's global generator": (random.getstate, random.setstate),
}
SETTINGS: _State = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the choice of deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the precision of matrix products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
}


def shared_state() -> dict[str, Any]:
    """The settings and generators that everything in this process shares, by what they are called in messages."""
    return {name: read() for name, (read, _) in {**SETTINGS, **GENERATORS}.items()}


def put_back(before: Mapping[str, Any]) -> list[str]:
    """Restores the shared state, and names what of it had changed."""
    now = shared_state()
    changed = [name for name in before if fingerprint(now[name]) != fingerprint(before[name])]
    for name in changed:
        {**SETTINGS, **GENERATORS}[name][1](before[name])
    return changed


def scramble(seed: int) -> None:
    """Gives all global generators a state that belongs to `seed`."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
