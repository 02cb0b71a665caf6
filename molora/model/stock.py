"""Parts of a causal LM as transformers has it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM without its head; some classes call themselves their decoder."""
    found = model.get_decoder()
    return found if found is not model else model.get_submodule("model")


def stock_attention(model: PreTrainedModel) -> str:
    """The attention of transformers that computes all of a model: scores in full are gigabytes for a long sample, but
    only eager attention knows caps and sinks."""
    capped = getattr(model.config, "attn_logit_softcapping", None)
    return "sdpa" if model._supports_sdpa and not capped else "eager"


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def mixers(model: nn.Module) -> str:
    names = {type(module).__name__ for module in model.modules()}
    return ", ".join(sorted(name for name in names if "Attention" in name or "Mixer" in name))
