"""A plugin under test: what clauses need of it, and tiny models around it.

Letters: T tokens, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from molora.checkpoint.assembly import Blueprint, RouterConfig, assemble, blueprint
from molora.data.processor import Processor
from molora.modality import Frames, Prepared
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routing import name_of
from molora.seeding import seeded
from molora.testing.side_effects import fingerprint, prepare
from molora.testing.tiny import Letters, Numbers, NumbersConfig, byte_tokenizer, tiny_model

# The names under which a modality and its neighbour are tried.
OWN, OTHER = "checked", "neighbour"
SEED = 7
MAX_TOKENS = 2**20
# Those between which a router decides. They stand in for the reference's and have their names, so that the options of a
# recipe fit.
ROUTED = ("audio", "vision")

_NEIGHBOURS = ("molora.testing.tiny:Numbers", "molora.testing.tiny:Letters")
_RANDOM = {"lora_alpha": 8, "init_lora_weights": False}
_ADAPTER = {**_RANDOM, "r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_CONTENTS: tuple[tuple[str, ...], ...] = ((), ("audio",), ("vision",), ("audio", "vision"), ("vision", "audio"))


@dataclass
class UnderTest:
    """A plugin with its options, and what its first clauses leave here for later ones."""

    spec: str
    options: dict[str, Any]
    plugin: Any = field(default=None, init=False)
    config: Any = field(default=None, init=False)


@dataclass
class ModalityUnderTest(UnderTest):
    """`given` are content parts to try it on; None means its examples. `folder` is for files."""

    given: Sequence[Mapping[str, Any]] | None
    folder: Path
    parts: list[Mapping[str, Any]] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    encoder: Any = None
    trains: list[str] = field(default_factory=list)
    model: Any = None
    processor: Any = None
    pristine: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    imported: list[str] = field(default_factory=list)

    @property
    def every(self) -> range:
        """The index of every part."""
        return range(len(self.parts))

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
        every = list(self.every)
        return {"all parts": every, "all parts in reverse": every[::-1], "every part twice": every * 2}

    def blueprint(self) -> Blueprint:
        return blueprint(OWN, self.spec, self.options, _ADAPTER, "the plugin")

    def neighbour(self) -> Blueprint:
        """A modality to stand beside the plugin, of another part type."""
        plans = (blueprint(OTHER, spec, {}, _ADAPTER, "the neighbour") for spec in _NEIGHBOURS)
        part_type = self.make().part_type
        return next(plan for plan in plans if plan.modality and plan.modality.part_type != part_type)

    def plans(self) -> dict[str, Blueprint]:
        return {OWN: self.blueprint(), OTHER: self.neighbour()}

    def samples(self, processor: Processor, kind: Literal["own", "others", "mixed"]) -> list[Sample]:
        """Conversations about the plugin's parts; about none and about the neighbour's; about both."""
        text = {"type": "text", "text": "what is it?"}
        neighbour: Any = self.neighbour().modality
        others = neighbour.examples()
        contents = {
            "own": [[self.part(index), text] for index in self.every],
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
            what = f"the logits of {name_of(sample.modalities)} ({sample.id})"
            found[what] = fingerprint(logits(model, processor, [sample]))
        return found


@dataclass
class RouterUnderTest(UnderTest):
    """`sets` are the sets of modalities that it decides for, found by an early clause."""

    sets: list[frozenset[str]] = field(default_factory=list)

    def router(self, adapters: Sequence[str] = ROUTED, width: int = 32) -> Any:
        return self.plugin(list(adapters), self.config, width)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> MoLoRA:
        """A tiny model with the router as after some training: its parameters are not those it starts with. It is
        Phi-4-mini's kind, whose rotary frequencies switch while it answers, so prompts are prefilled again."""
        modalities = {"audio": Numbers("audio", NumbersConfig()), "vision": Letters("vision", NumbersConfig())}
        sized = zip(ROUTED, (2, 3), strict=True)
        adapters = {name: lora_config({**_RANDOM, "r": r, "target_modules": _TARGETS}, name) for name, r in sized}
        backbone = _backbone("phi4-mini", dtype)
        with seeded(seed, "router"), torch.no_grad():
            router = self.router(width=backbone.width)
            for parameter in router.parameters():
                parameter.add_(torch.randn_like(parameter))
        model = MoLoRA(backbone, modalities, adapters, router)
        for parameters in model.parts().values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        return model

    def samples(self, model: MoLoRA, *, generate: bool = False) -> list[Sample]:
        """Conversations of several lengths for every set that the router decides for, and of text alone."""
        processor = Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)
        samples = []
        for i, names in enumerate(_CONTENTS * 2):
            if names and frozenset(names) not in self.sets:
                continue
            numbers, letters = [i / 4, 1.0, -i / 8][: 1 + i % 3], "abcxyz"[i % 4 :]
            part = {"audio": {"type": "numbers", "numbers": numbers}, "vision": {"type": "letters", "letters": letters}}
            text = {"type": "text", "text": "which" + "?" * (i % 3)}
            asked = {"role": "user", "content": [*(part[name] for name in names), text]}
            messages = [asked] if generate else [asked, {"role": "assistant", "content": f"{i} it is"}]
            samples.append(processor.encode(messages, f"{i} ({name_of(names)})", generate=generate))
        return samples


def tiny_molora(plans: Mapping[str, Blueprint], seed: int = SEED) -> tuple[MoLoRA, Processor]:
    """A tiny model with these modalities, and its processor."""
    rules = {f"{OWN}+{OTHER}": OWN} if plans.keys() >= {OWN, OTHER} else {}
    router = RouterConfig(options={"rules": rules})
    return assemble(_backbone("llama", max_tokens=MAX_TOKENS), byte_tokenizer(), plans, router, seed=seed)


@torch.no_grad()
def logits(model: MoLoRA, processor: Processor, samples: list[Sample]) -> Tensor:
    return model.eval().logits(processor.collate(samples))


@cache
def _probe(family: str, dtype: torch.dtype, max_tokens: int) -> dict[str, Any]:
    return _backbone(family, dtype, max_tokens, probed=False).probe


def _backbone(family: str, dtype: torch.dtype = torch.float32, max_tokens: int = 256, probed: bool = True) -> Backbone:
    """A tiny backbone, which is probed once."""
    model: Any = tiny_model(family, max_tokens=max_tokens)
    probe = _probe(family, dtype, max_tokens) if probed else None
    return Backbone(model.to(dtype), Identity("conformance", "", "", "", ""), probe=probe)


def is_own(name: str) -> bool:
    """Whether a tensor of the model belongs to the plugin's modality."""
    return OWN in name.split(".")
