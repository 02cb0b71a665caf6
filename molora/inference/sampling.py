"""Choosing the next tokens of a batch, in one pass and with one transfer from the device.

Letters: N samples, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# In place of a token: the logits are not all numbers, or not finite where they are highest.
NO_TOKEN = -1

# A softmax over smaller ones would divide by zero in single precision; such a temperature means greedy: 0.
LEAST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded. `temperature` 0 is greedy; `top_k` keeps the likeliest tokens, so many of them, and
    `top_p` those up to that mass. An answer ends before the first of the texts `stop` that it would hold, and with a
    stop token unless `ignore_stop_tokens`.

    `num_likeliest`: how many of the likeliest tokens are told beside each token's own likelihood; None tells none.
    `score_prompt` tells the same of the prompt's tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_stop_tokens: bool = False
    num_likeliest: int | None = None
    score_prompt: bool = False

    def __post_init__(self) -> None:
        for name, ok, needed in self._settings():
            if not ok:
                raise ValueError(f"generation: {name} cannot be {getattr(self, name)}; give {needed}")

    def _settings(self) -> list[tuple[str, bool, str]]:
        """Every setting that has bounds, whether it is within them, and what they are."""
        stops = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        tempered = self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf
        told = self.num_likeliest is None or (isinstance(self.num_likeliest, int) and self.num_likeliest >= 0)
        return [
            ("max_new_tokens", positive(self.max_new_tokens), "a whole number, 1 or more"),
            ("temperature", tempered, f"0, which is greedy, or {LEAST_TEMPERATURE:g} or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k is None or positive(self.top_k), "a whole number, 1 or more, or none"),
            ("stop", stops, "a tuple of texts that are not empty"),
            ("num_likeliest", told, "a whole number, 0 or more, or none"),
        ]


def positive(number: int) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(number, int) and number >= 1


@dataclass(frozen=True)
class TokenLikelihood:
    """The natural logarithm of a token's probability, and the likeliest tokens at its place, each with its own."""

    token_id: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...]


def choose(
    logits_NV: Tensor,
    generators: Sequence[torch.Generator],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
) -> list[int]:
    """One token of every sample, the likeliest if `temperature` is 0. Each sample draws one number from its own
    generator (on the CPU), so its tokens do not depend on its neighbours."""
    highest_N, tokens_N = logits_NV.max(dim=-1)  # NaN is the highest
    if temperature > 0:
        tokens_N = _draw(torch.softmax(logits_NV.float() / temperature, dim=-1), generators, top_p, top_k)
    return torch.where(highest_N.isfinite(), tokens_N, NO_TOKEN).tolist()


def likelihoods(logits_NV: Tensor, tokens: Sequence[int], num_likeliest: Sequence[int]) -> list[TokenLikelihood]:
    """How probable each row's token is by its logits, whatever the temperature, and so many of the likeliest ones."""
    log_probabilities_NV = logits_NV.float().log_softmax(dim=-1)
    tokens_N1 = torch.tensor(tokens, dtype=torch.long, device=logits_NV.device)[:, None]
    own = log_probabilities_NV.gather(1, tokens_N1).squeeze(1).tolist()
    most = min(max(num_likeliest, default=0), logits_NV.shape[1])
    values, ids = (each.tolist() for each in log_probabilities_NV.topk(most, dim=-1))
    return [
        TokenLikelihood(token_id, own[row], tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (token_id, count) in enumerate(zip(tokens, num_likeliest, strict=True))
    ]


def _draw(probabilities_NV: Tensor, generators: Sequence[torch.Generator], top_p: float, top_k: int | None) -> Tensor:
    """Tokens drawn by their probabilities, among the `top_k` likeliest, up to a mass of `top_p`."""
    drawn_N1 = torch.stack([torch.rand(1, generator=generator) for generator in generators]).to(probabilities_NV.device)
    if top_p == 1 and top_k is None:
        return _first_beyond(probabilities_NV, drawn_N1).squeeze(1)
    ordered_NV, ids_NV = probabilities_NV.sort(dim=-1, descending=True, stable=True)
    likelier_NV = ordered_NV.cumsum(-1) - ordered_NV
    nucleus_NV = ordered_NV.masked_fill(likelier_NV >= top_p, 0)
    if top_k is not None:
        nucleus_NV[:, top_k:] = 0
    return ids_NV.gather(1, _first_beyond(nucleus_NV, drawn_N1)).squeeze(1)


def _first_beyond(masses_NV: Tensor, drawn_N1: Tensor) -> Tensor:
    """The first place at which the sum of masses exceeds that share of the whole; never a place without mass."""
    sums_NV = masses_NV.cumsum(-1)
    return torch.searchsorted(sums_NV, drawn_N1 * sums_NV[:, -1:], right=True)
