"""Clauses about a modality in a model: it trains, moves nothing but itself, and is saved whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora.checkpoint.format import tensor_hash
from molora.checkpoint.modality_folder import load_modality, read_blueprint, save_modality
from molora.data.processor import Processor
from molora.model.molora import MoLoRA
from molora.plugin_kit.clauses import Fault, clause, some, words_of
from molora.plugin_kit.under_test import MAX_TOKENS, OTHER, OWN, SEED, ModalityUnderTest, is_own, logits, tiny_molora
from molora.plugins import find
from molora.train.optim import PartConfig, set_trainable
from molora.train.step import train_step

_RATE = 1e-2


@clause("training step", "projectors", "tokens equal frames")
def training_step(tested: ModalityUnderTest) -> str:
    model, processor = tiny_molora(tested.plans())
    tested.pristine = {OWN: tensor_hash(model.encoders[OWN].state_dict())}
    tested.elsewhere = tested.fingerprints(model, processor)
    samples = [sample for kind in ("own", "others", "mixed") for sample in tested.samples(processor, kind)]
    parts = [f"encoders.{OWN}.{name}" for name in tested.trains] + [f"projectors.{OWN}", f"adapters.{OWN}"]
    optimizers = set_trainable(model, {part: PartConfig(learning_rate=_RATE) for part in parts}, 1, "conformance")
    row = train_step(model.train(), processor, samples, MAX_TOKENS, optimizers)
    tested.model, tested.processor = model.eval(), processor
    if wild := [name for name in tested.trains if not model.get_parameter(f"encoders.{OWN}.{name}").isfinite().all()]:
        raise Fault(
            f"after one training step the encoder's {some(wild)} is not finite: forward has no finite gradient there; "
            "look for roots, logarithms and divisions at 0, or set requires_grad to False in build_encoder"
        )
    return f"one step beside {OTHER} and text, loss {row[f'loss/{OWN}']:.2f}"


@clause("own weights", "training step")
def own_weights(tested: ModalityUnderTest) -> str:
    encoder, model = tested.model.encoders[OWN], tested.model
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
        raise Fault(
            f"forward uses tensors that require gradients and are no parameters of the encoder (of shape "
            f"{some(strangers)}), so that they are neither trained nor saved; make them the encoder's own"
        )
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
        raise Fault(
            f"with the plugin in the model, {some(moved)} are other bits than without; build_encoder and "
            "__init__ change nothing outside themselves"
        )
    return f"{len(without)} tensors and logits of others are the same bits with and without it"


@clause(
    "saving",
    *("randomness", "order of calls", "encoder repeats"),
    *("own weights", "nothing else moves", "neighbours"),
)
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
    theirs = logits(again, its_processor, tested.samples(its_processor, "own"))
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        raise Fault(
            f"opened from its saved folder it gives other logits; {advice}, and all that forward uses is in state_dict"
        )
