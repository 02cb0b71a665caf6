"""Rotary embeddings whose frequencies depend on length, evaluated per sample instead of per pack.

transformers picks the frequencies from the largest position of the whole row. In a pack that would let one long sample
change its neighbours, so each sample's positions are handed to the stock module on their own.
"""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from molora.routing import current_flow


class SampleRotary(nn.Module):
    """Wraps a length-dependent rotary module of a backbone: LongRoPE and dynamic NTK."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def __getattr__(self, name: str) -> Any:
        # Models read settings such as `attention_scaling` straight from the rotary module.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("rotary"), name)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """x gives device and dtype; position_ids (1, T) to cos and sin (1, T, rotated width)."""
        flow = current_flow()
        if flow is None:
            return self._stock(x, position_ids, layer_type)
        samples = zip(flow.ends or flow.lengths, flow.lengths, strict=True)
        outputs, start = [], 0
        for _, run in groupby(samples, key=lambda sample: self.regime(sample[0], layer_type)):
            ends, lengths = zip(*run, strict=True)
            stop = start + sum(lengths)
            part = position_ids[:, start:stop]
            if flow.ends is not None:
                # The stock module reads a sample's length from its last position, which may be in another forward.
                part = torch.cat([part, part.new_full((1, 1), max(ends) - 1)], dim=1)
            cos, sin = self._stock(x, part, layer_type)
            outputs.append((cos[:, : stop - start], sin[:, : stop - start]))
            start = stop
        cos, sin = zip(*outputs, strict=True)
        return torch.cat(cos, dim=1), torch.cat(sin, dim=1)

    def regime(self, length: int, layer_type: str | None = None) -> int:
        """A number that changes exactly when a sample growing to `length` tokens changes its frequencies."""
        rope_type, parameters = self._settings(layer_type)
        if rope_type == "longrope":
            return int(length > parameters["original_max_position_embeddings"])
        if rope_type == "dynamic":
            return max(length, self.rotary.original_max_seq_len)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return 0

    def regimes(self, length: int) -> tuple[int, ...]:
        """`regime` for every kind of layer that has its own frequencies."""
        rope_type = self.rotary.rope_type
        layer_types = list(rope_type) if isinstance(rope_type, dict) else [None]
        return tuple(self.regime(length, layer_type) for layer_type in layer_types)

    @property
    def stretch(self) -> float:
        """How far beyond the trained context dynamic frequencies reach; 1 for other kinds."""
        rope_type, parameters = self._settings(None)
        return float(parameters["factor"]) if rope_type == "dynamic" else 1.0

    def _settings(self, layer_type: str | None) -> tuple[str, dict[str, Any]]:
        rope_type: Any = self.rotary.rope_type
        parameters: Any = self.rotary.config.rope_parameters  # pyright: ignore[reportAttributeAccessIssue]
        return (rope_type, parameters) if layer_type is None else (rope_type[layer_type], parameters[layer_type])

    def _stock(self, x: Tensor, position_ids: Tensor, layer_type: str | None) -> tuple[Tensor, Tensor]:
        if self._settings(layer_type)[0] == "dynamic":
            # The stock module remembers the longest length it saw; a sample must not depend on what ran before it.
            prefix = "" if layer_type is None else f"{layer_type}_"
            setattr(self.rotary, f"{prefix}max_seq_len_cached", self.rotary.original_max_seq_len)
            original = getattr(self.rotary, f"{prefix}original_inv_freq")
            self.rotary.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        return self.rotary(x, position_ids, **kwargs)


def wrap_rotary(model: nn.Module) -> list[SampleRotary]:
    """Replaces every length-dependent rotary module in `model` and returns the wrappers."""
    wrappers = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            rope_type = getattr(child, "rope_type", None)
            types = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
            if types & {"longrope", "dynamic"} and not isinstance(parent, SampleRotary):
                wrapper = SampleRotary(child)
                setattr(parent, name, wrapper)
                wrappers.append(wrapper)
    return wrappers
