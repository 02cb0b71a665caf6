"""The probe: a backbone's packed results beside those of transformers, before it is trusted.

Letters: T tokens of a sample, D backbone width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from molora.model.experts import Choices

# A probe longer than this is not worth its time; windows beyond it stay unexercised.
_TOKENS = 8192
# Logits of all positions are gigabytes with a large vocabulary; final hidden states are compared at every position.
_LOGITS = 16
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class BackboneRefused(ValueError):
    """A causal LM that cannot run packed samples exactly; the message says why."""


@dataclass(frozen=True)
class Stock:
    """What transformers itself gives on the probe's samples."""

    samples: list[Tensor]
    hidden: list[Tensor]
    logits: list[Tensor]
    choices: Choices
    embed_scale: float


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM without its head; some classes call themselves their decoder."""
    found = model.get_decoder()
    return found if found is not model else model.get_submodule("model")


def stock_attention(model: PreTrainedModel) -> str:
    """The attention of transformers that computes all of a model: scores in full are gigabytes for a long sample, but
    only eager attention knows caps and sinks."""
    return "sdpa" if model._supports_sdpa and not getattr(model.config, "attn_logit_softcapping", None) else "eager"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def mixers(model: nn.Module) -> str:
    names = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in names if "Attention" in name or "Mixer" in name))


@torch.no_grad()
def run_stock(model: PreTrainedModel) -> Stock:
    """Runs the probe's samples one by one through the untouched model. Raises BackboneRefused."""
    name = type(model).__name__
    layers = decoder_layers(model)
    if getattr(model, "_is_stateful", False):
        raise BackboneRefused(f"{name} keeps a recurrent state ({mixers(model)}), which samples in a pack would share")
    if not model._can_set_attn_implementation() or not layers:
        told = f"{name} has attention code of its own ({mixers(model)}) instead of transformers' attention interface"
        raise BackboneRefused(f"{told}, so samples in a pack could see each other")
    generator = torch.Generator().manual_seed(0)
    lengths, vocab_size = _probe_lengths(model.config), model.config.vocab_size
    samples = [torch.randint(vocab_size, (n,), generator=generator).to(model.device) for n in lengths]
    entered: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden: list[Tensor] = []

    def keep_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0][0])
        return (args[0][:, -_LOGITS:],)

    head: Any = model.get_output_embeddings()
    head_hook = head.register_forward_pre_hook(keep_last)
    model.set_attn_implementation(stock_attention(model))
    choices = Choices(model)
    with choices.keeping():
        logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples]
    hook.remove()
    head_hook.remove()
    scale = _embed_scale(name, model.get_input_embeddings()(samples[0]), entered[0][0])
    return Stock(samples, hidden, logits, choices, scale)


def _probe_lengths(config: Any) -> tuple[int, ...]:
    """A few tokens, something in between, and more than every window and RoPE switch that fits."""
    edges = [getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        edges.append(parameters.get("original_max_position_embeddings"))
    limit = min(config.max_position_embeddings, _TOKENS)
    longest = max([edge + 9 for edge in edges if edge and edge + 9 <= limit], default=min(limit, 40))
    return tuple(sorted({min(5, limit), max(1, longest // 2), longest}))


def _embed_scale(name: str, embedded_TD: Tensor, entered_TD: Tensor) -> float:
    """The factor between the embedding module's output and what the first layer receives."""
    scale = float((entered_TD.double() * embedded_TD.double()).sum() / embedded_TD.double().square().sum())
    if not torch.allclose(entered_TD, embedded_TD * scale, rtol=1e-2, atol=1e-4):
        raise BackboneRefused(f"{name} transforms its input embeddings before the first layer by more than a factor")
    return 1.0 if torch.equal(entered_TD, embedded_TD) else scale


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; NaN if one of them is NaN, which `max` may pass over."""
    return float(torch.tensor([*values], dtype=torch.float64).max())


def difference(ours: Tensor, reference: Tensor) -> float:
    """max |Δ| / max(1, max |reference|), the measure of the promises; NaN if there is one."""
    return float((ours - reference).detach().abs().max() / reference.detach().abs().max().clamp(min=1.0))


@torch.no_grad()
def compare(
    model: PreTrainedModel, stock: Stock, packed: Callable[[Sequence[Tensor]], Tensor], head: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """Runs the probe's samples alone and packed, and compares with what the stock model gave. `packed` gives final
    hidden states (T, D) of samples that lie end to end, `head` the logits of some."""
    name = type(model).__name__
    lengths = [len(ids) for ids in stock.samples]
    tolerance = _TOLERANCE[model.dtype]

    def run(which: Sequence[int]) -> Tensor:
        """With the experts that the stock model chose for these samples."""
        with stock.choices.again(which, [lengths[index] for index in which]):
            return packed([stock.samples[index] for index in which])

    try:
        alone = [run([index]) for index in range(len(lengths))]
        together = run(range(len(lengths))).split(lengths)
    except NotImplementedError as error:
        raise BackboneRefused(f"{name}: {error}") from error
    differences: dict[str, float] = {}
    for how, ours in (("alone", alone), ("packed", together)):
        logits = [head(hidden_TD[-_LOGITS:]) for hidden_TD in ours]
        pairs = [*zip(ours, stock.hidden, strict=True), *zip(logits, stock.logits, strict=True)]
        relative = (float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)
        differences[how] = worst = largest(relative)
        if not worst <= tolerance:
            types = ", ".join(sorted(set(getattr(model.config, "layer_types", None) or ["full_attention"])))
            raise BackboneRefused(
                f"{name} gives other logits {how} than in transformers: relative difference {worst:.2g}, allowed "
                f"{tolerance:.0e}, for samples of {lengths} tokens (layer types: {types}; {mixers(model)})"
            )
    return {"embed_scale": stock.embed_scale, "lengths": lengths, "differences": differences}
