"""Clauses about a modality's encoder: the frames that it gives, alone and in batches."""

from typing import Any

import torch
from torch import nn

from molora.modality import Encoder, Frames, Prepared
from molora.model.probe import difference
from molora.plugin_kit.clauses import TOLERANCE, Fault, Undecided, clause, kept, some
from molora.plugin_kit.under_test import SEED, ModalityUnderTest
from molora.seeding import seeded
from molora.testing.side_effects import fingerprint


@clause("encoder", "collate")
def encoder(tested: ModalityUnderTest) -> str:
    encoder: Any = tested.build_encoder()
    if not isinstance(encoder, Encoder):
        raise Fault(f"build_encoder gives {type(encoder).__name__}; derive that from molora.modality.Encoder")
    width = getattr(encoder, "width", None)
    if type(width) is not int or width < 1:
        raise Fault(f"the encoder's width is {width!r}; set it to the number of columns of its frames")
    tested.trains = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    device = next((tensor.device for tensor in encoder.state_dict().values()), torch.device("cpu"))
    tested.encoder = encoder.eval()
    for index, one in enumerate(tested.prepared):
        frames = tested.encode(encoder, [one])
        where = f"for part {index} forward gives"
        if not isinstance(frames, Frames):
            raise Fault(f"{where} {type(frames).__name__}; return molora.modality.Frames")
        frames_SC = frames.frames_SC
        if frames_SC.ndim != 2 or frames_SC.shape[1] != width:
            wrong = f"{where} frames of shape {tuple(frames_SC.shape)}"
            raise Fault(f"{wrong}; they are 2-D, all items end to end, and the encoder's width {width} wide")
        if frames_SC.device != device:
            raise Fault(f"{where} frames on {frames_SC.device}, but its weights are on {device}; keep them there")
        if frames_SC.dtype != torch.float32:
            raise Fault(f"{where} frames of {frames_SC.dtype}; with its weights in float32 they are float32")
        if wild := int((~frames_SC.isfinite()).sum()):
            raise Fault(f"{where} {wild} values that are not finite (NaN or infinity); look for divisions by 0")
    return f"frames {width} wide, float32, finite"


@clause("tokens equal frames", "encoder")
def tokens_equal_frames(tested: ModalityUnderTest) -> str:
    batches = {f"part {index} alone": [index] for index in tested.every} | tested.batches()
    for name, order in batches.items():
        _check_lengths(tested, [tested.prepared[index] for index in order], name)
    drawn = [tested.prepare(tested.make(), index, SEED) for index in tested.every]
    _check_lengths(tested, drawn, "all parts, augmented")
    return "as many frames as tokens, alone and in batches, in order"


def _check_lengths(tested: ModalityUnderTest, prepared: list[Prepared], name: str) -> None:
    frames = tested.encode(tested.encoder, prepared)
    num_tokens = tuple(one.num_tokens for one in prepared)
    if frames.lengths != num_tokens:
        wrong = f"{name}: num_tokens of prepare is {num_tokens}, but lengths of forward's Frames is {frames.lengths!r}"
        raise Fault(f"{wrong}; the two are equal tuples, item by item, for every batch")
    if (rows := len(frames.frames_SC)) != sum(num_tokens):
        raise Fault(f"{name}: forward gives {rows} rows of frames, its lengths add up to {sum(num_tokens)}")


@clause("encoder repeats", "encoder")
def encoder_repeats(tested: ModalityUnderTest) -> str:
    if fingerprint(tested.build_encoder().state_dict()) != fingerprint(tested.build_encoder().state_dict()):
        raise Fault("build_encoder makes other weights from equal seeds; draw them from torch's global generator alone")
    weights = fingerprint(tested.encoder.state_dict())
    collated = tested.make().collate(tested.prepared)
    with kept(collated, "forward changes its inputs; copy what you change (clone, not in place)"), torch.no_grad():
        first = tested.encoder(**collated)
    tested.encode(tested.encoder, tested.prepared[::-1])
    if not torch.equal(first.frames_SC, tested.encode(tested.encoder, tested.prepared).frames_SC):
        raise Fault("forward in eval mode gives other frames when called again: no chance, no memory of earlier calls")
    if fingerprint(tested.encoder.state_dict()) != weights:
        raise Fault("forward in eval mode changes the encoder's own tensors; only an optimiser may")
    return "the same bits every time, inputs left as they were"


@clause("batch invariance", "tokens equal frames", "encoder repeats")
def batch_invariance(tested: ModalityUnderTest) -> str:
    return _alone_and_in_batches(tested, tested.encoder, "in eval mode")


@clause("batch invariance in training", "batch invariance")
def batch_invariance_in_training(tested: ModalityUnderTest) -> str:
    encoder = tested.build_encoder().train()
    for module in encoder.modules():  # dropout is the one thing that may differ
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    buffers = {name: fingerprint(buffer) for name, buffer in encoder.named_buffers()}
    runs = []
    for seed in range(2):
        with seeded(seed):
            runs.append(tested.encode(encoder, tested.prepared).frames_SC)
    if changed := [name for name, buffer in encoder.named_buffers() if fingerprint(buffer) != buffers[name]]:
        wrong = f"forward in train mode changes {some(changed)}: no statistics over batches"
        raise Fault(f"{wrong}; use LayerNorm or GroupNorm, or hold BatchNorm in eval mode by overriding train")
    if not torch.equal(*runs):
        wrong = "cannot tell: forward in train mode draws numbers other than those of nn.Dropout modules"
        raise Undecided(f"{wrong}; use nn.Dropout modules to have this checked")
    return _alone_and_in_batches(tested, encoder, "in train mode")


def _alone_and_in_batches(tested: ModalityUnderTest, encoder: Any, mode: str) -> str:
    worst = 0.0
    alone = [tested.encode(encoder, [one]).frames_SC for one in tested.prepared]
    for name, order in tested.batches().items():
        frames = tested.encode(encoder, [tested.prepared[index] for index in order])
        for index, ours in zip(order, frames.frames_SC.split(frames.lengths), strict=True):
            differs = difference(ours, alone[index])
            if not differs <= TOLERANCE:
                raise Fault(
                    f"forward {mode} gives part {index} other frames in a batch of {name} than alone: they differ by "
                    f"{differs:.1e}, {TOLERANCE:.0e} is allowed; in convolutions, attention and means, no item "
                    "sees padding (mask it) or, where items lie end to end, another item (split them by their lengths);"
                    " and take no statistics over the batch"
                )
            worst = max(worst, differs)
    return f"frames alone and in batches differ by at most {worst:.0e}"
