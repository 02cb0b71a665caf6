"""The contract of a router, clause by clause, tried on one plugin: what `molora router check` prints.

The plugin decides between two small adapters. Their modalities stand in for the reference's and have their names, audio
and vision, so that the options of a recipe fit.

Letters: T tokens, N samples, D backbone width, E adapters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from itertools import combinations, groupby
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from molora.config import ConfigError, build
from molora.data.processor import Processor
from molora.inference.generate import GenerationConfig, generate
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import load_exactly, lora_config
from molora.model.molora import MoLoRA
from molora.pack import Pack, Sample, collate
from molora.plugin_kit.modality_clauses import Finding
from molora.plugins import resolve
from molora.routing import Routing, RoutingError
from molora.seeding import seeded
from molora.testing.tiny import Letters, Numbers, NumbersConfig, byte_tokenizer, tiny_model

# The modalities here, which have an adapter each, and one that a router may be asked about but that is not.
NAMES = ("audio", "vision")
STRANGER = "smell"

TOLERANCE = 1e-5
# Recomputing a layer repeats the same operations, so what may differ is less.
RECOMPUTED_TOLERANCE = 1e-6

_TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "audio": lambda i: {"type": "numbers", "numbers": [i / 4, 1.0, -i / 8][: 1 + i % 3]},
    "vision": lambda i: {"type": "letters", "letters": "abcxyz"[i % 4 :]},
}
_CONTENTS: tuple[tuple[str, ...], ...] = ((), ("audio",), ("vision",), ("audio", "vision"), ("vision", "audio"))
_COMPARED = ("routing", "loss", "router's loss")
_NEW_TOKENS = 6
# With some weights a router may rightly take no adapter at all (a threshold), and then it has no gradient.
_TRIED_WEIGHTS = 4


def check_router(spec: str, options: Mapping[str, Any] | None = None) -> list[Finding]:
    """Tries a router plugin in a tiny model, in fp32 on the CPU; needs no files."""
    trial = _Trial(spec, dict(options or {}))
    findings: list[Finding] = []
    cause = ""
    for name, check in _CHECKS:
        if cause:
            findings.append(Finding(name, None, f"not reached because of what {cause!r} found", cause))
            continue
        try:
            findings.append(Finding(name, True, check(trial)))
        except Exception as error:  # a plugin can fail in any way, and its own error is the finding
            told = str(error) if isinstance(error, _Fault) else f"raised {type(error).__name__}: {error}"
            findings.append(Finding(name, False, told))
            cause = name if name in _NEEDED else ""
    return findings


class _Fault(Exception):
    """What the plugin does wrong, and how to mend it."""


@dataclass
class _Trial:
    """A plugin on trial. `sets` are the sets of modalities that it decides for, found by an early check."""

    spec: str
    options: dict[str, Any]
    plugin: Any = None
    config: Any = None
    sets: list[frozenset[str]] = field(default_factory=list)

    def router(self, adapters: Sequence[str] = NAMES, width: int = 32) -> Any:
        return self.plugin(list(adapters), self.config, width)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> MoLoRA:
        """A tiny model with the router as after some training: its parameters are not those it starts with."""
        modalities = {"audio": Numbers("audio", NumbersConfig()), "vision": Letters("vision", NumbersConfig())}
        adapters = {
            name: lora_config({"r": r, "lora_alpha": 8, "init_lora_weights": False, "target_modules": _TARGETS}, name)
            for name, r in zip(NAMES, (2, 3), strict=True)
        }
        backbone = _backbone(dtype, _probe(dtype))
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
        for i in range(2 * len(_CONTENTS)):
            names = _CONTENTS[i % len(_CONTENTS)]
            if names and frozenset(names) not in self.sets:
                continue
            text = {"type": "text", "text": "which" + "?" * (i % 3)}
            asked = {"role": "user", "content": [*(_PARTS[name](i) for name in names), text]}
            messages = [asked] if generate else [asked, {"role": "assistant", "content": f"{i} it is"}]
            samples.append(processor.encode(messages, f"{i} ({_called(names)})", generate=generate))
        return samples


def _backbone(dtype: torch.dtype, probe: dict[str, Any] | None) -> Backbone:
    """Phi-4-mini's kind, whose rotary frequencies switch while it answers, so that prompts are prefilled again."""
    model: Any = tiny_model("phi4-mini")
    return Backbone(model.to(dtype), Identity("conformance", "", "", "", ""), probe=probe)


@cache
def _probe(dtype: torch.dtype) -> dict[str, Any]:
    return _backbone(dtype, None).probe


def _called(modalities: Iterable[str]) -> str:
    return "+".join(sorted(modalities)) or "text"


def _subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    """Every set of modalities that is not empty, the smaller ones first."""
    for size in range(1, len(names) + 1):
        yield from map(frozenset, combinations(names, size))


def _packed(model: MoLoRA, samples: Sequence[Sample]) -> Pack:
    return collate(samples, model.modalities, model.router.order)


def _adapters_by_token(routing: Routing, pack: Pack) -> dict[str, Tensor]:
    """For each sample, by id, how much of each adapter (T, E) its tokens take."""
    weights_TE = torch.zeros(sum(pack.lengths), len(NAMES))
    for piece in routing.slices:
        for index, name in enumerate(piece.adapters):
            share = 1.0 if piece.weights_TE is None else piece.weights_TE[:, index].detach().float()
            weights_TE[piece.start : piece.stop, NAMES.index(name)] += share
    return dict(zip(pack.ids, weights_TE.split(pack.lengths), strict=True))


def _difference(ours: Tensor, reference: Tensor) -> float:
    """Max |Δ| in units of max(1, max |reference|)."""
    return float((ours - reference).detach().abs().max() / reference.detach().abs().max().clamp(min=1.0))


# Alone -----------------------------------------------------------------------------------------------------------


def _contract(trial: _Trial) -> str:
    try:
        trial.plugin = resolve("router", trial.spec)
    except ConfigError as error:
        raise _Fault(str(error)) from error
    config_type = trial.plugin.config_type
    if not (issubclass(trial.plugin, nn.Module) and isinstance(config_type, type) and is_dataclass(config_type)):
        raise _Fault(
            f"{trial.plugin.__name__} is to be an nn.Module, and its config_type, {config_type!r}, a dataclass that "
            "recipes read `router.options` into"
        )
    try:
        trial.config = build(config_type, trial.options, "router.options")
        trial.router()
    except (ConfigError, RoutingError) as error:
        raise _Fault(f"{error} (here the modalities and their adapters are {' and '.join(NAMES)})") from error
    return f"{trial.plugin.__name__} has every member, and is built from its options"


def _decisions(trial: _Trial) -> str:
    """Also finds the sets that the later checks can use."""
    router = trial.router()
    refused: list[str] = []
    for modalities in _subsets((*NAMES, STRANGER)):
        name = _called(modalities)
        try:
            order = router.order(modalities)
        except RoutingError as error:
            if unnamed := sorted(each for each in modalities if each not in str(error)):
                raise _Fault(f"the RoutingError for {name} does not name {', '.join(unnamed)}: {error}") from error
            refused.append(name)
            continue
        adapters, learns = router.adapters(modalities), router.learns(modalities)
        if not (isinstance(order, str) and isinstance(adapters, frozenset) and isinstance(learns, bool)):
            raise _Fault(
                f"for {name}, order, adapters and learns are {order!r}, {adapters!r} and {learns!r}; return a str, a "
                "frozenset of names and a bool"
            )
        again = (router.order(modalities), router.adapters(modalities), router.learns(modalities))
        if (order, adapters, learns) != again:
            raise _Fault(f"for {name}, order, adapters or learns answer otherwise when asked again")
        if unknown := adapters - set(NAMES):
            raise _Fault(f"adapters({set(modalities)}) has {sorted(unknown)}, but it was built with {list(NAMES)}")
        if STRANGER not in modalities:
            trial.sets.append(modalities)
    if not trial.sets:
        raise _Fault("raises RoutingError for every set of modalities; give options with rules for audio and vision")
    decided = ", ".join(map(_called, trial.sets))
    return f"decides for {decided}" + (f"; refuses {', '.join(refused)} by name" if refused else "")


def _known_adapters(trial: _Trial) -> str:
    """A router that names an adapter that is not there would run its samples bare, without a word."""
    outcomes: list[str] = []
    for adapters in (["audio"], ["vision"], [STRANGER]):
        try:
            router = trial.router(adapters)
        except ValueError:
            outcomes.append(f"with {adapters[0]} alone it is refused")
            continue
        for modalities in _subsets((*NAMES, STRANGER)):
            try:
                named = router.adapters(modalities)
            except RoutingError:
                continue
            if unknown := named - set(adapters):
                raise _Fault(
                    f"built with the adapter {adapters[0]} alone, adapters({set(modalities)}) has {sorted(unknown)}; "
                    "let __init__ raise RoutingError for options that name an adapter that is not there"
                )
        outcomes.append(f"with {adapters[0]} alone it keeps to that")
    return ", ".join(outcomes)


# In a model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _text(trial: _Trial) -> str:
    router = trial.router()
    nothing = frozenset()
    if not isinstance(router.order(nothing), str) or router.adapters(nothing) or router.learns(nothing):
        raise _Fault(
            f"for text alone, order, adapters and learns are {router.order(nothing)!r}, {router.adapters(nothing)!r} "
            f"and {router.learns(nothing)!r}; they are to be a str, an empty frozenset and False"
        )
    model = trial.model()
    pack = _packed(model, trial.samples(model))
    weights = _adapters_by_token(model.router(pack, model.embed(pack)), pack)
    for id, modalities in zip(pack.ids, pack.modalities, strict=True):
        if not modalities and weights[id].any():
            raise _Fault(f"sample {id} runs with an adapter; give text alone a slice without any")
    return "runs on the bare backbone"


@torch.no_grad()
def _slices(trial: _Trial) -> str:
    model = trial.model()
    samples = trial.samples(model)
    for chosen in (samples, *([sample] for sample in samples)):
        pack = _packed(model, chosen)
        embeds_TD = model.embed(pack)
        before_TD = embeds_TD.clone()
        routing = model.router(pack, embeds_TD)
        if not torch.equal(before_TD, embeds_TD):
            raise _Fault("forward changes embeds_TD, which the backbone reads next; compute on a copy")
        _check_slices(routing, len(embeds_TD))
        num_samples = len(pack)
        if routing.gates is not None and len(routing.gates) != num_samples:
            raise _Fault(f"gates has {len(routing.gates)} entries for {num_samples} samples; give each one or None")
        if routing.losses_N is not None and routing.losses_N.shape != (num_samples,):
            raise _Fault(f"losses_N has shape {tuple(routing.losses_N.shape)}, expected ({num_samples},)")
    return f"cover every token once, in packs of 1 and of {len(samples)} samples"


def _check_slices(routing: Routing, num_tokens: int) -> None:
    place = 0
    for number, piece in enumerate(routing.slices):
        if piece.start != place or piece.stop <= piece.start:
            raise _Fault(f"slice {number} is {piece.start}:{piece.stop}, expected one that starts at {place}")
        if len(set(piece.adapters)) < len(piece.adapters) or set(piece.adapters) - set(NAMES):
            raise _Fault(f"slice {number} has the adapters {piece.adapters!r}; name each of {NAMES} once at most")
        if piece.weights_TE is not None:
            expected = (piece.stop - piece.start, len(piece.adapters))
            if piece.weights_TE.shape != expected or not piece.weights_TE.isfinite().all():
                raise _Fault(
                    f"slice {number} has weights_TE of shape {tuple(piece.weights_TE.shape)}, expected finite ones of "
                    f"{expected}: a row for each token, a column for each of {piece.adapters!r}"
                )
        place = piece.stop
    if place != num_tokens:
        raise _Fault(f"slices end at token {place}, but the pack has {num_tokens}")


@torch.no_grad()
def _order(trial: _Trial) -> str:
    """Samples of equal adapters apart cost a slice more in every layer."""
    model = trial.model()
    pack = _packed(model, trial.samples(model))
    routing = model.router(pack, model.embed(pack))
    hard = (piece.adapters for piece in routing.slices if piece.weights_TE is None)
    blocks = [adapters for adapters, _ in groupby(hard)]
    if len(set(blocks)) < len(blocks):
        apart = next(adapters for adapters in blocks if blocks.count(adapters) > 1)
        raise _Fault(
            f"in a pack sorted by `order`, samples that run with {_called(apart)} are not neighbours; let `order` be "
            "the same text for sets that run with the same adapters"
        )
    return f"{len(pack)} samples make {len(routing.slices)} slices"


@torch.no_grad()
def _covered(trial: _Trial) -> str:
    model = trial.model()
    pack = _packed(model, trial.samples(model))
    weights = _adapters_by_token(model.router(pack, model.embed(pack)), pack)
    for id, modalities in zip(pack.ids, pack.modalities, strict=True):
        used = {name for name, taken in zip(NAMES, weights[id].any(0).tolist(), strict=True) if taken}
        if surplus := used - model.router.adapters(modalities):
            raise _Fault(
                f"sample {id} runs with {sorted(surplus)}, which adapters({set(modalities)}) leaves out: their "
                "optimiser would not step"
            )
    return "every adapter that a sample runs with is in adapters()"


@torch.no_grad()
def _neighbours(trial: _Trial) -> str:
    model = trial.model()
    samples = trial.samples(model)
    worst = _alone_and_together(model.eval(), samples)
    pack = _packed(model, samples)
    model.train()
    once, again = (_adapters_by_token(model.router(pack, model.embed(pack)), pack) for _ in range(2))
    if any(not torch.equal(once[id], again[id]) for id in pack.ids):
        return f"alone and packed differ by at most {worst:.1e}; not compared in training, where it draws at random"
    worst = max(worst, _alone_and_together(model, samples))
    return f"alone and packed differ by at most {worst:.1e}"


def _alone_and_together(model: MoLoRA, samples: Sequence[Sample]) -> float:
    """The largest difference in routing and in losses that company makes."""
    worst = 0.0
    for company in (samples, samples[::-1][:3]):
        pack = _packed(model, company)
        together = _decided(model, pack)
        for sample in company:
            alone = _decided(model, _packed(model, [sample]))[sample.id]
            for what, ours, reference in zip(_COMPARED, together[sample.id], alone, strict=True):
                difference = _difference(ours, reference)
                worst = max(worst, difference)
                if not difference <= TOLERANCE:  # true for NaN too
                    mode = "training" if model.training else "evaluation"
                    raise _Fault(
                        f"in {mode} mode, the {what} of sample {sample.id} alone and in a pack of {len(pack)} differ "
                        f"by {difference:.1e}, allowed {TOLERANCE:.0e}; decide from the sample's own tokens"
                    )
    return worst


def _decided(model: MoLoRA, pack: Pack) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each sample: how much of each adapter its tokens take, its loss, what the router adds to it."""
    losses = model.losses(pack)
    weights = _adapters_by_token(losses.routing, pack)
    return {
        id: (weights[id], total, added)
        for id, total, added in zip(pack.ids, losses.sums_N, losses.router_N, strict=True)
    }


def _generation(trial: _Trial) -> str:
    model = trial.model()
    samples = trial.samples(model, generate=True)
    answers: dict[str, list[int]] = {sample.id: [] for sample in samples}
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS, max_running_samples=4)
    for step in generate(model, samples, config):
        answers[step.id].append(step.token_id)
    for sample in samples:
        cached, full = answers[sample.id], _decode_in_full(model, sample, len(answers[sample.id]))
        if cached != full:
            raise _Fault(
                f"sample {sample.id} answers {cached} from the cache and {full} in full forwards; what was read from a "
                "prompt goes into Routing.gates and is taken from pack.gates when that is not None"
            )
    return f"{len(samples)} answers from the cache equal those of full forwards"


@torch.no_grad()
def _decode_in_full(model: MoLoRA, sample: Sample, count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        new = torch.tensor(answer, dtype=torch.long)
        longer = replace(
            sample,
            token_ids_T=torch.cat([sample.token_ids_T, new]),
            modality_ids_T=torch.cat([sample.modality_ids_T, torch.zeros_like(new)]),
            targets_T=torch.zeros(len(sample) + len(new), dtype=torch.bool),
        )
        answer.append(int(model.logits(_packed(model, [longer]))[-1].argmax()))
    return answer


# Learning --------------------------------------------------------------------------------------------------------


def _learning(trial: _Trial) -> str:
    moved: dict[frozenset[str], set[str]] = {}
    for seed in range(_TRIED_WEIGHTS):
        model = trial.model(seed)
        parameters = dict(model.router.named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
        for sample in trial.samples(model):
            losses = model.losses(_packed(model, [sample]))
            loss = losses.sums_N[0] / sample.num_targets + losses.router_N[0]
            found = moved.setdefault(sample.modalities, set())
            if loss.requires_grad and parameters:
                gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
                found |= {name for name, gradient in zip(parameters, gradients, strict=True) if gradient.any()}
        if all(moved[modalities] or not trial.router().learns(modalities) for modalities in moved):
            break
    for modalities, found in moved.items():
        if bool(found) != (says := trial.router().learns(modalities)):
            which = f"reaches {', '.join(sorted(found))}" if found else "reaches none of the router's parameters"
            raise _Fault(
                f"learns is {says} for {_called(modalities)}, but the gradient of such a sample {which}; the router "
                "takes an optimiser step exactly where learns is True"
            )
    learning = [_called(modalities) for modalities, found in moved.items() if found]
    return f"gradients reach it from {', '.join(learning)} and nothing else" if learning else "no gradient reaches it"


@torch.no_grad()
def _saving(trial: _Trial) -> str:
    model, other = trial.model(seed=1), trial.model(seed=2)
    samples = trial.samples(model)
    saved = safetensors.torch.load(safetensors.torch.save(model.router_tensors()))
    load_exactly(other.router_tensors(), saved, "the saved router")
    pack = _packed(model, samples)
    first, second = (_decided(each, pack) for each in (model, other))
    for id in pack.ids:
        if not all(torch.equal(a, b) for a, b in zip(first[id], second[id], strict=True)):
            raise _Fault(
                f"saved and loaded into a new router, sample {id} is decided otherwise; keep what is learned in "
                "parameters or buffers, and draw nothing at random in evaluation"
            )
    return f"{len(saved)} tensors" if saved else "has nothing to save"


def _checkpointing(trial: _Trial) -> str:
    plain, again = (_gradients(trial, checkpointing) for checkpointing in (False, True))
    for name, gradient in plain.items():
        difference = _difference(again[name], gradient)
        if not difference <= RECOMPUTED_TOLERANCE:
            raise _Fault(
                f"with activation checkpointing the gradient of {name} differs by {difference:.1e}, allowed "
                f"{RECOMPUTED_TOLERANCE:.0e}; a Routing is not to change once it was returned: make new tensors in "
                "every forward"
            )
    return f"gradients of {len(plain)} tensors are the same"


def _gradients(trial: _Trial, checkpointing: bool) -> dict[str, Tensor]:
    model = trial.model()
    model.backbone.activation_checkpointing = checkpointing
    samples = trial.samples(model)
    losses = model.losses(_packed(model, samples))
    if checkpointing:  # a forward in between, as accumulation has: recomputing is to see the routing of its own pack
        model.losses(_packed(model, samples[:4]))
    (losses.sums_N.sum() + losses.router_N.sum()).backward()
    return {
        f"{part}.{key}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for part, parameters in model.parts().items()
        for key, parameter in parameters.items()
    }


def _half_precision(trial: _Trial) -> str:
    model = trial.model(dtype=torch.bfloat16)
    losses = model.losses(_packed(model, trial.samples(model)))
    if not (losses.sums_N.isfinite().all() and losses.router_N.isfinite().all()):
        raise _Fault("on a backbone in bfloat16 the losses are not finite")
    (losses.sums_N.sum() + losses.router_N.sum()).backward()
    return "works on a backbone in bfloat16"


_CHECKS: tuple[tuple[str, Callable[[_Trial], str]], ...] = (
    ("contract", _contract),
    ("every set", _decisions),
    ("adapters there are", _known_adapters),
    ("slices", _slices),
    ("text alone", _text),
    ("adapters() covers", _covered),
    ("order", _order),
    ("neighbours", _neighbours),
    ("cache", _generation),
    ("learns", _learning),
    ("saving", _saving),
    ("recomputing", _checkpointing),
    ("half precision", _half_precision),
)
# What the checks after these build on.
_NEEDED = ("contract", "every set", "slices")
