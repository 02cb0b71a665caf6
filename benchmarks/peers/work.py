"""Useful floating-point operations, counted from shapes: what any implementation has to do, and nothing twice.

A product of (a, b) and (b, c) is 2 a b c. Causal attention counts the half that is not masked. Norms, activations,
softmax and the optimiser are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from molora.model.molora import MoLoRA
from molora.pack import Sample, collate

PRODUCTS = "molora's products alone"


def backbone_weights(model: MoLoRA) -> int:
    """Weights of the decoder's linear layers, head and adapters left out."""
    head: Any = model.backbone.model.get_output_embeddings()
    linear = (m for m in model.backbone.model.modules() if type(m) is nn.Linear and m is not head)
    # Adapters are linear layers too, of a lower rank.
    ranks = {config.r for config in model.adapters.values()}
    return sum(m.weight.numel() for m in linear if not ranks & {*m.weight.shape})


def adapter_weights(model: MoLoRA, name: str) -> int:
    return sum(p.numel() for p in model.parts()[f"adapters.{name}"].values())


def attention_flop(model: MoLoRA, length: int) -> float:
    """Scores and weighted values of one causal forward over a sample, all layers."""
    config = model.backbone.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2.0 * length * (length + 1) * width * config.num_hidden_layers


def encoder_flop(model: MoLoRA, samples: Sequence[Sample]) -> float:
    """One forward of the samples' media through their encoders, which do not train; counted while it runs."""
    pack = collate(samples, model.modalities, model.router.order).to(model.device)
    total = 0.0
    for name, media in pack.media.items():
        # The counter knows attention only by the products that it is written with.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.encoders[name](**media.tensors)
        total += counter.get_total_flops()
    return total


def step_flop(model: MoLoRA, samples: Sequence[Sample]) -> float:
    """One training step in which adapters and projectors train: forward for all; for samples with media also backward
    to the activations, and backward to the weights of what trains."""
    weights = backbone_weights(model)
    config = model.backbone.config
    head = config.hidden_size * config.vocab_size
    total = encoder_flop(model, samples) if any(s.items for s in samples) else 0.0
    parts = model.parts()
    for sample in samples:
        passes = 2 if sample.items else 1
        total += passes * 2.0 * (weights * len(sample) + head * sample.num_targets)
        # Backward of attention: the gradients of queries, keys, values and weights are two products each forward one.
        total += attention_flop(model, len(sample)) * (3 if sample.items else 1)
        for name in model.router.adapters(sample.modalities):
            total += 3 * 2.0 * adapter_weights(model, name) * len(sample)
        for item in sample.items:
            projector = parts[f"projectors.{item.modality}.{item.projector}"]
            # Frames need no gradient, so the first layer has no backward to its input.
            up, down = (projector[f"{side}.weight"].numel() for side in ("up", "down"))
            total += 2.0 * item.prepared.num_tokens * (2 * up + 3 * down)
    return total


def answer_flop(model: MoLoRA, samples: Sequence[Sample], answers: Sequence[int]) -> float:
    """Prompts and answers: each token fed once but an answer's last, and the head where a token is chosen."""
    weights, config = backbone_weights(model), model.backbone.config
    head = config.hidden_size * config.vocab_size
    total = encoder_flop(model, samples) if any(s.items for s in samples) else 0.0
    parts = model.parts()
    for sample, length in zip(samples, answers, strict=True):
        fed = len(sample) + length - 1
        total += 2.0 * (weights * fed + head * length) + attention_flop(model, fed)
        total += sum(2.0 * adapter_weights(model, name) * fed for name in model.router.adapters(sample.modalities))
        for item in sample.items:
            projector = parts[f"projectors.{item.modality}.{item.projector}"]
            total += sum(
                2.0 * item.prepared.num_tokens * projector[f"{side}.weight"].numel() for side in ("up", "down")
            )
    return total


def decode_flop(model: MoLoRA, samples: Sequence[Sample], answers: Sequence[int]) -> float:
    """What is left of `answer_flop` when every sample has its first token."""
    return answer_flop(model, samples, answers) - answer_flop(model, samples, [1] * len(samples))


def decode_bytes(model: MoLoRA, prompts: Sequence[int], answers: Sequence[int]) -> float:
    """Bytes that decoding must read: the weights once a step, however many samples run, and each sample's keys and
    values once for each of its tokens. Adapters are left out: which of them a step needs depends on who still runs."""
    config = model.backbone.config
    size = next(model.backbone.model.parameters()).element_size()
    head = config.hidden_size * config.vocab_size
    # The first token of an answer comes from the prompt's own pass.
    weights = (max(answers) - 1) * (backbone_weights(model) + head)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width
    held = sum(sum(range(prompt + 1, prompt + answer)) for prompt, answer in zip(prompts, answers, strict=True))
    return float(size * (weights + held * per_token))


class _Products(TorchDispatchMode):
    """Keeps every call of an operation that multiplies matrices: products, convolutions, attention, their backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> object:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.overloadpacket in flop_registry or name == "addmm_" or "attention" in name:
            self.calls.append(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)


def with_products(sides: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The sides of a comparison, and the matrix products that the first one makes, with their sizes and layouts, one
    after the other and nothing else: what bounds every implementation that makes them with this library."""
    with _Products() as products:
        next(iter(sides.values()))()

    def multiply() -> None:
        with torch.no_grad():
            for call in products.calls:
                call()

    return {**sides, PRODUCTS: multiply}
