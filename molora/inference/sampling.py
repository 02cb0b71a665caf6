"""Choosing the next tokens of a batch, in one pass and with one transfer from the device.

Letters: N samples, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# In place of a token: the logits are not all numbers, or not finite where they are highest.
NO_TOKEN = -1


def choose(
    logits_NV: Tensor, generators: Sequence[torch.Generator], *, temperature: float = 0.0, top_p: float = 1.0
) -> list[int]:
    """One token of every sample, the likeliest if `temperature` is 0. Each sample draws one number from its own
    generator (on the CPU), so its tokens do not depend on its neighbours."""
    highest_N, tokens_N = logits_NV.max(dim=-1)  # NaN is the highest
    if temperature > 0:
        tokens_N = _draw(torch.softmax(logits_NV.float() / temperature, dim=-1), generators, top_p)
    return torch.where(highest_N.isfinite(), tokens_N, NO_TOKEN).tolist()


def _draw(probabilities_NV: Tensor, generators: Sequence[torch.Generator], top_p: float) -> Tensor:
    """Tokens drawn by their probabilities, from the likeliest up to a mass of `top_p`."""
    drawn_N1 = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(probabilities_NV.device)
    if top_p == 1:
        return _first_beyond(probabilities_NV, drawn_N1).squeeze(1)
    ordered_NV, ids_NV = probabilities_NV.sort(dim=-1, descending=True, stable=True)
    likelier_NV = ordered_NV.cumsum(-1) - ordered_NV
    nucleus_NV = ordered_NV.masked_fill(likelier_NV >= top_p, 0)
    return ids_NV.gather(1, _first_beyond(nucleus_NV, drawn_N1)).squeeze(1)


def _first_beyond(masses_NV: Tensor, drawn_N1: Tensor) -> Tensor:
    """The first place at which the sum of masses exceeds that share of the whole; never a place without mass."""
    sums_NV = masses_NV.cumsum(-1)
    return torch.searchsorted(sums_NV, drawn_N1 * sums_NV[:, -1:], right=True)
