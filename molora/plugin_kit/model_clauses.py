"""Clauses about a modality where it runs: in a model, in a process that it shares, and in those of data workers."""

import gc
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from molora.checkpoint.format import tensor_hash
from molora.checkpoint.modality_folder import load_modality, read_blueprint, save_modality
from molora.data.processor import Processor
from molora.model.molora import MoLoRA
from molora.plugin_kit.clauses import ALL, Fault, clause, some, words_of
from molora.plugin_kit.under_test import MAX_TOKENS, OTHER, OWN, SEED, ModalityUnderTest, is_own, logits, tiny_molora
from molora.plugins import find
from molora.testing.side_effects import GENERATORS, Parts, fingerprint, forked, put_back, shared_state, spawned
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import TrainingError, train_step

_RATE = 1e-2
# Caches fill in the first rounds. What still grows in every later one is a leak, if it is more than the interpreter's
# own pools grow by.
_FIRST_ROUNDS, _ROUNDS = 3, 4
_NOISE_BYTES = 2048


@clause("training step", "projectors", "tokens equal frames")
def training_step(tested: ModalityUnderTest) -> str:
    model, processor = tiny_molora(tested.plans())
    tested.pristine = {OWN: tensor_hash(model.encoders[OWN].state_dict())}
    tested.elsewhere = tested.fingerprints(model, processor)
    samples = [sample for kind in ("own", "others", "mixed") for sample in tested.samples(processor, kind)]
    parts = [f"encoders.{OWN}.{name}" for name in tested.trains] + [f"projectors.{OWN}", f"adapters.{OWN}"]
    optimizers = set_trainable(model, {part: PartConfig(learning_rate=_RATE) for part in parts}, 1, "conformance")
    try:
        row = train_step(model.train(), processor, samples, MAX_TOKENS, optimizers)
    except TrainingError as error:
        gradients = {name: model.get_parameter(f"encoders.{OWN}.{name}").grad for name in tested.trains}
        wild = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
        if not wild:
            raise
        wrong = f"in one training step the gradient of the encoder's {some(wild)} is not finite"
        advice = "look for roots, logarithms and divisions at 0, or set requires_grad to False in build_encoder"
        raise Fault(f"{wrong}; {advice}") from error
    tested.model, tested.processor = model.eval(), processor
    return f"one step beside {OTHER} and text, loss {row[f'loss/{OWN}']:.2f}"


@clause("own weights", "training step")
def own_weights(tested: ModalityUnderTest) -> str:
    model, prefix = tested.model, f"encoders.{OWN}."
    tensors = [*model.named_parameters(), *model.named_buffers()]
    foreign = {each.untyped_storage().data_ptr(): name for name, each in tensors if not name.startswith(prefix)}
    own: dict[int, str] = {}
    for name, tensor in model.encoders[OWN].state_dict(keep_vars=True).items():
        if not tensor.numel():
            continue
        if (storage := tensor.untyped_storage().data_ptr()) in foreign:
            raise Fault(f"the encoder's {name} is the model's own {foreign[storage]}; build_encoder makes its own")
        if (first := own.setdefault(tensor.data_ptr(), name)) != name:
            raise Fault(f"the encoder registers one tensor as {first} and as {name}; register it once")
    return f"{len(own)} tensors of its own"


@clause("gradients", "training step")
def gradients(tested: ModalityUnderTest) -> str:
    model: MoLoRA = tested.model
    model.zero_grad()
    loss = model.losses(tested.processor.collate(tested.samples(tested.processor, "own"))).sums_N.sum()
    known = {id(parameter) for parameter in model.parameters()}
    strangers = sorted({str(tuple(leaf.shape)) for leaf in _leaves(loss) if id(leaf) not in known})
    loss.backward()
    if strangers:
        wrong = "forward uses tensors that require gradients and are no parameters of the encoder"
        advice = "so that they are neither trained nor saved; make them the encoder's own"
        raise Fault(f"{wrong} (of shape {some(strangers)}), {advice}")
    count = len(tested.trains)
    if idle := [name for name in tested.trains if model.get_parameter(f"encoders.{OWN}.{name}").grad is None]:
        advice = "use them in forward, remove them, or set requires_grad to False in build_encoder"
        if len(idle) == count:
            advice = "forward detaches its frames, or runs under no_grad: leave the gradient on"
        raise Fault(f"{len(idle)} of {count} parameters get no gradient ({some(idle)}); {advice}")
    return f"all {count} parameters that want a gradient get one"


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


@clause("nothing else moves", "training step")
def nothing_else_moves(tested: ModalityUnderTest) -> str:
    now = tested.fingerprints(tested.model, tested.processor)
    if moved := [name for name, before in tested.elsewhere.items() if now[name] != before]:
        raise Fault(f"a training step moved what is not its own ({some(moved)}); change nothing outside the encoder")
    parameters = tested.model.named_parameters()
    if loose := [name for name, parameter in parameters if parameter.requires_grad and not is_own(name)]:
        raise Fault(f"after a training step {some(loose)} require gradients; set that on the encoder's own alone")
    return f"{len(now)} tensors and logits of others as they were, to the bit"


@clause("neighbours", "training step")
def neighbours(tested: ModalityUnderTest) -> str:
    without = tested.fingerprints(*tiny_molora({OTHER: tested.neighbour()}))
    beside = tested.fingerprints(*tiny_molora(tested.plans()))
    if moved := [name for name in without if beside[name] != without[name]]:
        told = f"with the plugin in the model, {some(moved)} are other bits than without"
        raise Fault(f"{told}; build_encoder and __init__ change nothing outside themselves")
    return f"{len(without)} tensors and logits of others are the same bits with and without it"


@clause("saving", "randomness", "order of calls", "encoder repeats", "own weights", "nothing else moves", "neighbours")
def saving(tested: ModalityUnderTest) -> str:
    _check_folder(tested, tested.model, tested.processor, with_weights=True)
    if tested.encoder.origin is None:
        return "a trained folder opens again and gives the same bits"
    _check_folder(tested, *tiny_molora(tested.plans()), with_weights=False)
    return "a trained folder and one without weights open again and give the same bits"


def _check_folder(tested: ModalityUnderTest, model: MoLoRA, processor: Processor, *, with_weights: bool) -> None:
    folder = tested.folder / ("with weights" if with_weights else "without weights")
    pristine = {OWN: "trained"} if with_weights else tested.pristine
    save_modality(model, OWN, tested.blueprint(), folder, pristine)
    advice = f"saved_config(with_weights={with_weights}) gives a config that builds the same modules"
    try:
        plan, _ = read_blueprint(folder, model.backbone.identity, OWN, [find("modality", tested.spec)])
        # Another seed, so that only what was saved can be the same.
        again, its_processor = tiny_molora({OWN: plan, OTHER: tested.neighbour()}, seed=SEED + 1)
        load_modality(again, OWN, folder)
    except Exception as error:
        raise Fault(f"its saved folder does not open ({words_of(error)}); {advice}") from error
    ours = logits(model, processor, tested.samples(processor, "own"))
    if not torch.equal(ours, logits(again, its_processor, tested.samples(its_processor, "own"))):
        told = "opened from its saved folder it gives other logits"
        raise Fault(f"{told}; {advice}, and all that forward uses is in state_dict")


@clause("memory", "encoder")
def memory(tested: ModalityUnderTest) -> str:
    modality = tested.make()
    traced = tracemalloc.is_tracing()
    gc.freeze()  # sets aside what there is already: only new objects are counted, and collecting is quick
    tracemalloc.start()
    try:
        tensors, size = _left_behind(lambda: [modality.collate([tested.prepare(modality, i)]) for i in tested.every])
        if tensors or size > _NOISE_BYTES:
            wrong = f"load, prepare and collate leave {tensors} tensors and {size} bytes behind"
            raise Fault(f"{wrong} every time all parts go through them; keep nothing of an item, or bound the cache")
        tensors, _ = _left_behind(lambda: [tested.encode(tested.encoder, [one]) for one in tested.prepared])
    finally:
        gc.unfreeze()
        if not traced:
            tracemalloc.stop()
    if tensors:
        raise Fault(f"forward leaves {tensors} tensors behind every time all parts go through it; keep none of them")
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


@clause("shared state", "encoder")
def shared_state_kept(tested: ModalityUnderTest) -> str:
    faults: list[str] = []

    def watched(method: str, call: Callable[[], Any], *, may_draw: bool = False) -> Any:
        before = shared_state()
        result = call()
        changed = [name for name in put_back(before) if not (may_draw and name in GENERATORS)]
        if changed:
            faults.append(f"{method} changes {some(changed)}")
        return result

    modality = watched("__init__", tested.make)
    watched("examples", modality.examples)
    watched("projectors", modality.projectors)
    watched("projector", lambda: modality.projector(frozenset({OWN})))
    items = watched("load", lambda: [modality.load(tested.part(index)) for index in tested.every])
    prepared = watched("prepare", lambda: [modality.prepare(item) for item in items])
    watched("prepare", lambda: modality.prepare(items[0], torch.Generator().manual_seed(SEED)))
    collated = watched("collate", lambda: modality.collate(prepared))
    # Weights and dropout come from torch's generator, which the model seeds.
    encoder = watched("build_encoder", modality.build_encoder, may_draw=True)
    watched("forward in eval mode", lambda: encoder.eval()(**collated))
    watched("forward in train mode", lambda: encoder.train()(**collated), may_draw=True)
    watched("saved_config", lambda: encoder.saved_config(True))
    if faults:
        raise Fault(f"{some(list(dict.fromkeys(faults)))}; the whole process shares it, so leave it as it is")
    return "no method changes a setting or a generator that others use"


# After all others: processes are slow to start and say little about a plugin that is wrong already.
@clause("data workers", ALL)
def data_workers(tested: ModalityUnderTest) -> str:
    torch.set_num_threads(1)  # as in a data worker
    parts = Parts(tested.make(), tested.parts, SEED)
    here = [fingerprint(parts[index]) for index in range(len(parts))]
    for how in ("forked", "spawned"):
        try:
            if how == "forked":
                prepared = forked(parts)
            else:
                prepared, tested.imported = spawned(parts, tested.spec, tested.folder)
        except Exception as error:
            why = str(error).strip().splitlines()[-1]
            raise Fault(f"load and prepare fail in a {how} data worker: {why}") from error
        for index, one in enumerate(prepared):
            if fingerprint(one) != here[index]:
                wrong = f"in a {how} data worker, load and prepare give other tensors for part {index // 2} than here"
                advice = "they depend on the part, the config and the generator, not on what a process has done before"
                raise Fault(f"{wrong}: {advice}")
    return "data workers, forked and spawned, prepare the same tensors"


@clause("imports", ALL)
def imports(tested: ModalityUnderTest) -> str:
    if names := " and ".join(tested.imported):
        wrong = f"importing the plugin's module imports {names}, which every data worker would load"
        raise Fault(f"{wrong}; import what needs them inside the function that uses it")
    return "importing the plugin's module does not import the model"
