"""Clauses about a router, which decides here between two small adapters.

Letters: T tokens, N samples, D backbone width, E adapters, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from itertools import combinations, groupby

import safetensors.torch
import torch
from torch import Tensor, nn

from molora.config import ConfigError, build
from molora.inference.generate import GenerationConfig, generate
from molora.model.lora import load_exactly
from molora.model.molora import MoLoRA
from molora.model.probe import difference
from molora.pack import Pack, Sample, collate
from molora.plugin_kit.clauses import TOLERANCE, Fault, clause
from molora.plugin_kit.under_test import ROUTED, RouterUnderTest
from molora.plugins import resolve
from molora.routing import Routing, RoutingError, name_of

# A modality that a router may be asked about, but that has no adapter.
STRANGER = "smell"
# Recomputing a layer repeats the same operations, so what may differ is less.
RECOMPUTED_TOLERANCE = 1e-6

_COMPARED = ("routing", "loss", "router's loss")
_NEW_TOKENS = 6
# With some weights a router may rightly take no adapter at all (a threshold), and then it has no gradient.
_TRIED_WEIGHTS = 4


@clause("contract")
def contract(tested: RouterUnderTest) -> str:
    tested.plugin = resolve("router", tested.spec)
    name, config_type = tested.plugin.__name__, tested.plugin.config_type
    if not (issubclass(tested.plugin, nn.Module) and isinstance(config_type, type) and is_dataclass(config_type)):
        wanted = f"{name} is to be an nn.Module, and its config_type, {config_type!r}, a dataclass"
        raise Fault(f"{wanted} that recipes read `router.options` into")
    try:
        tested.config = build(config_type, tested.options, "router.options")
        tested.router()
    except (ConfigError, RoutingError) as error:
        raise Fault(f"{error} (here the modalities and their adapters are {' and '.join(ROUTED)})") from error
    return f"{name} has every member, and is built from its options"


@clause("every set", "contract")
def every_set(tested: RouterUnderTest) -> str:
    """Also finds the sets that the later clauses can use."""
    router = tested.router()
    refused: list[str] = []
    for modalities in _subsets((*ROUTED, STRANGER)):
        name = name_of(modalities)
        try:
            order = router.order(modalities)
        except RoutingError as error:
            if unnamed := sorted(each for each in modalities if each not in str(error)):
                raise Fault(f"the RoutingError for {name} does not name {', '.join(unnamed)}: {error}") from error
            refused.append(name)
            continue
        adapters, learns = router.adapters(modalities), router.learns(modalities)
        if not (isinstance(order, str) and isinstance(adapters, frozenset) and isinstance(learns, bool)):
            wrong = f"for {name}, order, adapters and learns are {order!r}, {adapters!r} and {learns!r}"
            raise Fault(f"{wrong}; return a str, a frozenset of names and a bool")
        again = router.order(modalities), router.adapters(modalities), router.learns(modalities)
        if (order, adapters, learns) != again:
            raise Fault(f"for {name}, order, adapters or learns answer otherwise when asked again")
        if unknown := adapters - set(ROUTED):
            raise Fault(f"adapters({set(modalities)}) has {sorted(unknown)}, but it was built with {list(ROUTED)}")
        if STRANGER not in modalities:
            tested.sets.append(modalities)
    if not tested.sets:
        raise Fault("raises RoutingError for every set of modalities; give options with rules for audio and vision")
    decided = ", ".join(map(name_of, tested.sets))
    return f"decides for {decided}" + (f"; refuses {', '.join(refused)} by name" if refused else "")


def _subsets(names: Sequence[str]) -> Iterator[frozenset[str]]:
    """Every set of modalities that is not empty, the smaller ones first."""
    for size in range(1, len(names) + 1):
        yield from map(frozenset, combinations(names, size))


@clause("adapters there are", "every set")
def adapters_there_are(tested: RouterUnderTest) -> str:
    """A router that names an adapter that is not there would run its samples bare, without a word."""
    outcomes: list[str] = []
    for adapter in (*ROUTED, STRANGER):
        try:
            router = tested.router([adapter])
        except ValueError:
            outcomes.append(f"with {adapter} alone it is refused")
            continue
        for modalities in _subsets((*ROUTED, STRANGER)):
            try:
                named = router.adapters(modalities)
            except RoutingError:
                continue
            if unknown := named - {adapter}:
                wrong = f"built with the adapter {adapter} alone, adapters({set(modalities)}) has {sorted(unknown)}"
                raise Fault(f"{wrong}; let __init__ raise RoutingError for options that name one that is not there")
        outcomes.append(f"with {adapter} alone it keeps to that")
    return ", ".join(outcomes)


@clause("slices", "every set")
@torch.no_grad()
def slices(tested: RouterUnderTest) -> str:
    model = tested.model()
    samples = tested.samples(model)
    for chosen in (samples, *([sample] for sample in samples)):
        pack = _packed(model, chosen)
        embeds_TD = model.embed(pack)
        before_TD = embeds_TD.clone()
        routing = model.router(pack, embeds_TD)
        if not torch.equal(before_TD, embeds_TD):
            raise Fault("forward changes embeds_TD, which the backbone reads next; compute on a copy")
        _check_slices(routing, len(embeds_TD))
        count = len(pack)
        if routing.gates is not None and len(routing.gates) != count:
            raise Fault(f"gates has {len(routing.gates)} entries for {count} samples; give each one or None")
        if routing.losses_N is not None and routing.losses_N.shape != (count,):
            raise Fault(f"losses_N has shape {tuple(routing.losses_N.shape)}, expected ({count},)")
    return f"cover every token once, in packs of 1 and of {len(samples)} samples"


def _check_slices(routing: Routing, num_tokens: int) -> None:
    place = 0
    for number, piece in enumerate(routing.slices):
        if piece.start != place or piece.stop <= piece.start:
            raise Fault(f"slice {number} is {piece.start}:{piece.stop}, expected one that starts at {place}")
        if len(set(piece.adapters)) < len(piece.adapters) or set(piece.adapters) - set(ROUTED):
            raise Fault(f"slice {number} has the adapters {piece.adapters!r}; name each of {ROUTED} once at most")
        if piece.weights_TE is not None:
            shape, expected = tuple(piece.weights_TE.shape), (piece.stop - piece.start, len(piece.adapters))
            if shape != expected or not piece.weights_TE.isfinite().all():
                wrong = f"slice {number} has weights_TE of shape {shape}, expected finite ones of {expected}"
                raise Fault(f"{wrong}: a row for each token, a column for each of {piece.adapters!r}")
        place = piece.stop
    if place != num_tokens:
        raise Fault(f"slices end at token {place}, but the pack has {num_tokens}")


@clause("text alone", "slices")
@torch.no_grad()
def text_alone(tested: RouterUnderTest) -> str:
    router, nothing = tested.router(), frozenset()
    order, adapters, learns = router.order(nothing), router.adapters(nothing), router.learns(nothing)
    if not isinstance(order, str) or adapters or learns:
        wrong = f"for text alone, order, adapters and learns are {order!r}, {adapters!r} and {learns!r}"
        raise Fault(f"{wrong}; they are to be a str, an empty frozenset and False")
    model = tested.model()
    pack = _packed(model, tested.samples(model))
    weights = _adapters_by_token(model, pack)
    for id, modalities in zip(pack.ids, pack.modalities, strict=True):
        if not modalities and weights[id].any():
            raise Fault(f"sample {id} runs with an adapter; give text alone a slice without any")
    return "runs on the bare backbone"


@clause("adapters() covers", "slices")
@torch.no_grad()
def adapters_covers(tested: RouterUnderTest) -> str:
    model = tested.model()
    pack = _packed(model, tested.samples(model))
    weights = _adapters_by_token(model, pack)
    for id, modalities in zip(pack.ids, pack.modalities, strict=True):
        used = {name for name, taken in zip(ROUTED, weights[id].any(0).tolist(), strict=True) if taken}
        if surplus := used - model.router.adapters(modalities):
            wrong = f"sample {id} runs with {sorted(surplus)}, which adapters({set(modalities)}) leaves out"
            raise Fault(f"{wrong}: their optimiser would not step")
    return "every adapter that a sample runs with is in adapters()"


@clause("order", "slices")
@torch.no_grad()
def order(tested: RouterUnderTest) -> str:
    """Samples of equal adapters apart cost a slice more in every layer."""
    model = tested.model()
    pack = _packed(model, tested.samples(model))
    routing = model.router(pack, model.embed(pack))
    hard = (piece.adapters for piece in routing.slices if piece.weights_TE is None)
    blocks = [adapters for adapters, _ in groupby(hard)]
    apart = next((adapters for adapters in blocks if blocks.count(adapters) > 1), None)
    if apart is not None:
        wrong = f"in a pack sorted by `order`, samples that run with {name_of(apart)} are not neighbours"
        raise Fault(f"{wrong}; let `order` be the same text for sets that run with the same adapters")
    return f"{len(pack)} samples make {len(routing.slices)} slices"


@clause("neighbours", "slices")
@torch.no_grad()
def neighbours(tested: RouterUnderTest) -> str:
    model = tested.model()
    samples = tested.samples(model)
    worst = _alone_and_together(model.eval(), samples)
    pack = _packed(model, samples)
    model.train()
    once, again = (_adapters_by_token(model, pack) for _ in range(2))
    if any(not torch.equal(once[id], again[id]) for id in pack.ids):
        return f"alone and packed differ by at most {worst:.1e}; not compared in training, where it draws at random"
    worst = max(worst, _alone_and_together(model, samples))
    return f"alone and packed differ by at most {worst:.1e}"


def _alone_and_together(model: MoLoRA, samples: Sequence[Sample]) -> float:
    """The largest difference in routing and in losses that other samples in the pack make."""
    worst = 0.0
    for chosen in (samples, samples[::-1][:3]):
        pack = _packed(model, chosen)
        together = _decided(model, pack)
        for sample in chosen:
            alone = _decided(model, _packed(model, [sample]))[sample.id]
            for what, ours, reference in zip(_COMPARED, together[sample.id], alone, strict=True):
                differs = difference(ours, reference)
                worst = max(worst, differs)
                if not differs <= TOLERANCE:  # true for NaN too
                    told = f"in {'training' if model.training else 'evaluation'} mode, the {what} of sample {sample.id}"
                    wrong = f"{told} alone and in a pack of {len(pack)} differ by {differs:.1e}"
                    raise Fault(f"{wrong}, allowed {TOLERANCE:.0e}; decide from the sample's own tokens")
    return worst


@clause("cache", "slices")
def cache(tested: RouterUnderTest) -> str:
    model = tested.model()
    samples = tested.samples(model, generate=True)
    answers: dict[str, list[int]] = {sample.id: [] for sample in samples}
    for step in generate(model, samples, GenerationConfig(max_new_tokens=_NEW_TOKENS, max_running_samples=4)):
        answers[step.id].append(step.token_id)
    for sample in samples:
        cached, full = answers[sample.id], []
        with torch.no_grad():
            while len(full) < len(cached):
                full.append(int(model.logits(_packed(model, [sample.followed_by(full)]))[-1].argmax()))
        if cached != full:
            wrong = f"sample {sample.id} answers {cached} from the cache and {full} in full forwards"
            advice = "what is read from a prompt goes into Routing.gates and comes from pack.gates if that is not None"
            raise Fault(f"{wrong}; {advice}")
    return f"{len(samples)} answers from the cache equal those of full forwards"


@clause("learns", "slices")
def learns(tested: RouterUnderTest) -> str:
    moved: dict[frozenset[str], set[str]] = {}
    for seed in range(_TRIED_WEIGHTS):
        model = tested.model(seed)
        parameters = dict(model.router.named_parameters())  # pyright: ignore[reportAttributeAccessIssue]
        for sample in tested.samples(model):
            losses = model.losses(_packed(model, [sample]))
            loss = losses.sums_N[0] / sample.num_targets + losses.router_N[0]
            found = moved.setdefault(sample.modalities, set())
            if loss.requires_grad and parameters:
                gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
                found |= {name for name, gradient in zip(parameters, gradients, strict=True) if gradient.any()}
        if all(moved[modalities] or not tested.router().learns(modalities) for modalities in moved):
            break
    for modalities, found in moved.items():
        if bool(found) != (says := tested.router().learns(modalities)):
            which = f"reaches {', '.join(sorted(found))}" if found else "reaches none of the router's parameters"
            wrong = f"learns is {says} for {name_of(modalities)}, but the gradient of such a sample {which}"
            raise Fault(f"{wrong}; the router takes an optimiser step exactly where learns is True")
    learning = [name_of(modalities) for modalities, found in moved.items() if found]
    return f"gradients reach it from {', '.join(learning)} and nothing else" if learning else "no gradient reaches it"


@clause("saving", "slices")
@torch.no_grad()
def saving(tested: RouterUnderTest) -> str:
    model, other = tested.model(seed=1), tested.model(seed=2)
    saved = safetensors.torch.load(safetensors.torch.save(model.router_tensors()))
    load_exactly(other.router_tensors(), saved, "the saved router")
    pack = _packed(model, tested.samples(model))
    first, second = (_decided(each, pack) for each in (model, other))
    for id in pack.ids:
        if not all(map(torch.equal, first[id], second[id])):
            wrong = f"saved and loaded into a new router, sample {id} is decided otherwise"
            advice = "keep what is learned in parameters or buffers, and draw nothing at random in evaluation"
            raise Fault(f"{wrong}; {advice}")
    return f"{len(saved)} tensors" if saved else "has nothing to save"


@clause("recomputing", "slices")
def recomputing(tested: RouterUnderTest) -> str:
    plain, again = (_gradients(tested, checkpointing) for checkpointing in (False, True))
    for name, gradient in plain.items():
        differs = difference(again[name], gradient)
        if not differs <= RECOMPUTED_TOLERANCE:
            wrong = f"with activation checkpointing the gradient of {name} differs by {differs:.1e}"
            advice = "a Routing is not to change once it was returned: make new tensors in every forward"
            raise Fault(f"{wrong}, allowed {RECOMPUTED_TOLERANCE:.0e}; {advice}")
    return f"gradients of {len(plain)} tensors are the same"


def _gradients(tested: RouterUnderTest, checkpointing: bool) -> dict[str, Tensor]:
    model = tested.model()
    model.backbone.activation_checkpointing = checkpointing
    samples = tested.samples(model)
    losses = model.losses(_packed(model, samples))
    if checkpointing:  # a forward in between, as accumulation has: recomputing is to see the routing of its own pack
        model.losses(_packed(model, samples[:4]))
    (losses.sums_N.sum() + losses.router_N.sum()).backward()
    named = {f"{part}.{key}": each for part, parameters in model.parts().items() for key, each in parameters.items()}
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in named.items()}


@clause("half precision", "slices")
def half_precision(tested: RouterUnderTest) -> str:
    model = tested.model(dtype=torch.bfloat16)
    losses = model.losses(_packed(model, tested.samples(model)))
    if not (losses.sums_N.isfinite().all() and losses.router_N.isfinite().all()):
        raise Fault("on a backbone in bfloat16 the losses are not finite")
    (losses.sums_N.sum() + losses.router_N.sum()).backward()
    return "works on a backbone in bfloat16"


def _packed(model: MoLoRA, samples: Sequence[Sample]) -> Pack:
    return collate(samples, model.modalities, model.router.order)


def _adapters_by_token(model: MoLoRA, pack: Pack, routing: Routing | None = None) -> dict[str, Tensor]:
    """For each sample, by id, how much of each adapter (T, E) its tokens take."""
    routing = routing or model.router(pack, model.embed(pack))
    weights_TE = torch.zeros(sum(pack.lengths), len(ROUTED))
    for piece in routing.slices:
        for index, name in enumerate(piece.adapters):
            share = 1.0 if piece.weights_TE is None else piece.weights_TE[:, index].detach().float()
            weights_TE[piece.start : piece.stop, ROUTED.index(name)] += share
    return pack.by_sample(weights_TE)


def _decided(model: MoLoRA, pack: Pack) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each sample: how much of each adapter its tokens take, its loss, what the router adds to it."""
    losses = model.losses(pack)
    weights = _adapters_by_token(model, pack, losses.routing).values()
    return dict(zip(pack.ids, zip(weights, losses.sums_N, losses.router_N, strict=True), strict=True))
