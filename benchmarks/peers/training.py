"""A training step of the mixed batch beside transformers and PEFT, padded and grouped by modality.

Both adapters and the projectors train; backbone and encoders are frozen. Each side's step ends with clipping and AdamW.
transformers' inputs are collated before the clock starts; molora collates its samples inside its step.

Letters: N samples, T tokens of the longest, D backbone width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.peers import work
from benchmarks.peers.measure import (
    Machine,
    Result,
    Row,
    Setup,
    check,
    in_turns,
    relative_difference,
    step_bytes,
    step_bytes_apart,
)
from benchmarks.peers.models import Shape, make_samples, open_ours, open_theirs, trained_parameters
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.train.optim import PartConfig, PartOptimizer, set_trainable
from molora.train.step import train_step

LEARNING_RATE = 1e-5
TOKENS_PER_PACK = 8192
# Relative differences that pass: rounding, and nothing else.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}
GROUPS: tuple[str, ...] = ("vision", "audio", "")


def train_light_parts(model: MoLoRA) -> dict[str, PartOptimizer]:
    """Adapters and projectors train, with torch's own constants of AdamW."""
    learning = PartConfig(learning_rate=LEARNING_RATE, schedule="constant", beta2=0.999)
    patterns: dict[str, PartConfig] = {"adapters": learning, "projectors": learning}
    return set_trainable(model, patterns, total_steps=1, where="benchmark")


class Ours:
    """molora's step, which is that of `molora train`."""

    def __init__(self, folder: Path, shape: Shape, dtype: torch.dtype, device: str) -> None:
        loaded = open_ours(folder, dtype, device)
        self.model, self.processor = loaded.model, loaded.processor
        self.samples = make_samples(self.model, shape)
        self.optimizers = train_light_parts(self.model)
        self.model.train()

    def step(self) -> dict[str, Any]:
        return train_step(self.model, self.processor, self.samples, TOKENS_PER_PACK, self.optimizers)

    def gradients(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The mean loss of each group, and gradients by full name, without an update."""
        row = train_step(self.model, self.processor, self.samples, TOKENS_PER_PACK, {})
        losses = {name: row[f"loss/{name or 'text'}"] for name in GROUPS if f"loss/{name or 'text'}" in row}
        parameters = [(f"{part}.{key}", p) for part, ps in self.model.parts().items() for key, p in ps.items()]
        found = {name: p.grad for name, p in parameters if p.grad is not None}
        for _, parameter in parameters:
            parameter.grad = None
        return losses, found


def padded_inputs(samples: Sequence[Sample], model: MoLoRA, config: Any, device: str) -> dict[str, Any]:
    """What transformers' model takes for samples, padded on the right to the longest."""
    tokens = [0, *(getattr(config, f"{name}_config") for name in model.modalities)]
    slots = torch.tensor([0, *(getattr(t, "image_token_id", None) or t.audio_token_id for t in tokens[1:])])
    ids = [slots[s.modality_ids_T].where(s.modality_ids_T > 0, s.token_ids_T) for s in samples]
    labels = [s.token_ids_T.where(s.targets_T, -100) for s in samples]
    given: dict[str, Any] = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=config.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    items = [item for sample in samples for item in sample.items]
    if pictures := [item.prepared.tensors for item in items if item.modality == "vision"]:
        crops = torch.stack([tensors["crops_BCHW"] for tensors in pictures])
        pixels = torch.cat([crops, crops], dim=1).float() / 127.5 - 1  # the only crop is its own global view
        side = crops.shape[-1] // config.vision_config.patch_size
        given["image_pixel_values"] = pixels
        given["image_sizes"] = torch.tensor([crops.shape[-2:]] * len(pictures))
        given["image_attention_mask"] = torch.ones(len(pictures), 2, side, side)
    if clips := [item for item in items if item.modality == "audio"]:
        given["audio_input_features"] = torch.stack([item.prepared.tensors["features_SM"] for item in clips])
        given["audio_embed_sizes"] = torch.tensor([item.prepared.num_tokens for item in clips])
    return {name: tensor.to(device) for name, tensor in given.items()}


class Theirs:
    """transformers and PEFT, used in one of the ways that give the right numbers."""

    def __init__(self, folder: Path, samples: Sequence[Sample], ours: MoLoRA, dtype: torch.dtype, device: str) -> None:
        self.model = open_theirs(folder, dtype, device)
        self.device, self.dtype = device, dtype
        native = self.model.base_model.model
        by_group = {
            name: [s for s in samples if name in (*s.modalities, *[""] * (not s.modalities))] for name in GROUPS
        }
        self.batches = {
            name: padded_inputs(group, ours, native.config, device) for name, group in by_group.items() if group
        }
        self.whole = padded_inputs(samples, ours, native.config, device)
        self.adapter_names = [next(iter(s.modalities), "__base__") for s in samples]
        self.targets = {name: sum(s.num_targets for s in group) for name, group in by_group.items()}
        self.parameters = trained_parameters(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, weight_decay=0.0)
        # Dropout is zero, and PEFT mixes adapters in a batch in eval mode only.
        self.model.eval()

    def _precision(self) -> AbstractContextManager[object]:
        """PEFT keeps adapters in fp32; autocast makes their products as narrow as the backbone's."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)

    def _train_everything(self) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def grouped(self) -> dict[str, float]:
        """Forward and backward, one batch per adapter; texts run without any and without a graph. The loss of each
        group."""
        losses = {}
        for name, batch in self.batches.items():
            if name:
                self.model.set_adapter(name)
                self._train_everything()
                with self._precision():
                    loss = self.model(**batch, use_cache=False).loss
                loss.backward()
            else:
                with self._precision(), torch.no_grad(), self.model.disable_adapter():
                    loss = self.model(**batch, use_cache=False).loss
            losses[name] = loss
        return {name: loss.item() for name, loss in losses.items()}

    def padded(self) -> float:
        """Forward and backward of the whole batch at once, each sample with its adapter. transformers would project
        clips otherwise because there are pictures in the batch, so media are embedded before. The mean loss."""
        batch = dict(self.whole)
        native = self.model.base_model.model.model
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        mask = batch.pop("attention_mask")
        self._train_everything()
        with self._precision():
            embeds_NTD = native.embed_tokens(ids)
            for kind in ("image", "audio"):
                media = {key: value for key, value in batch.items() if key.startswith(kind)}
                if media:
                    embeds_NTD = native.embed_tokens_extend(ids, embeds_NTD, **media)
            loss = self.model(
                inputs_embeds=embeds_NTD,
                attention_mask=mask,
                labels=labels,
                adapter_names=self.adapter_names,
                use_cache=False,
            ).loss
        loss.backward()
        return loss.item()

    def update(self, forward_backward: Callable[[], object]) -> None:
        forward_backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found


def compare_numbers(ours: Ours, theirs: Theirs, dtype: torch.dtype) -> list[str]:
    """Losses and gradients of both ways of the peer against molora's; must run before the first update."""
    losses, mine = ours.gradients()
    allowed, lines = ALLOWED[dtype], []
    grouped = theirs.grouped()
    worst = max(abs(losses[name] / grouped[name] - 1) for name in grouped)
    lines.append(check("losses of each modality, grouped", worst, allowed))
    total = sum(theirs.targets.values())
    shares = {name: count / total for name, count in theirs.targets.items()}
    for way, scale in (("grouped", dict.fromkeys(GROUPS, 1.0)), ("padded", shares)):
        if way == "padded":
            mean = sum(losses[name] * shares[name] for name in losses)
            lines.append(check("mean loss, padded", abs(theirs.padded() / mean - 1), allowed))
        found = theirs.gradients()
        # A modality's loss is divided by its own targets in molora, and by all of the batch's in one padded batch.
        apart = {name: relative_difference(mine[name] * scale[name.split(".")[1]], found[name]) for name in found}
        if mine.keys() != found.keys():
            raise RuntimeError(f"the sides train other tensors: {sorted(mine.keys() ^ found.keys())[:4]}")
        lines.append(check(f"gradients of {len(apart)} tensors, {way}", max(apart.values()), allowed))
    return lines


def open_sides(setup: Setup) -> tuple[Ours, Theirs]:
    ours = Ours(setup.folder, Shape(), setup.dtype, setup.device)
    return ours, Theirs(setup.folder, ours.samples, ours.model, setup.dtype, setup.device)


def sides_of(ours: Ours, theirs: Theirs) -> dict[str, Callable[[], object]]:
    return {
        "molora": ours.step,
        "peer, grouped": lambda: theirs.update(theirs.grouped),
        "peer, padded": lambda: theirs.update(theirs.padded),
    }


def compare(setup: Setup) -> list[Result]:
    """The step of each side, in turns, and by how much memory grows in one."""
    device = setup.device
    ours, theirs = open_sides(setup)
    checks = compare_numbers(ours, theirs, setup.dtype)
    machine = Machine(setup.dtype, device)
    sides = sides_of(ours, theirs)
    taken = in_turns(work.with_products(sides), setup.rounds, device, machine)
    flop = work.step_flop(ours.model, ours.samples)
    about = f"{sum(map(len, ours.samples)):,} tokens: 2 pictures, 3 clips, 3 texts; {flop / 1e12:.2f} TFLOP"
    rows = [Row(side, seconds, flop) for side, seconds in taken.items()]
    measured = [row for row in rows if row.side != work.PRODUCTS]
    if setup.memory and device != "cpu":
        for row in measured:
            row.step_bytes = step_bytes(sides[row.side], device)
    del ours, theirs, sides  # or they would lie in memory beside those of the processes below
    if setup.memory and device == "cpu":
        for row in measured:
            row.step_bytes = step_bytes_apart("training", row.side, setup)
    return [setup.result("training step", about, checks, rows, machine)]


def memory_of(setup: Setup, side: str) -> int:
    """By how much this process grows in its second step; the first makes the optimiser's state."""
    step = sides_of(*open_sides(setup))[side]
    step()
    return step_bytes(step, setup.device)
