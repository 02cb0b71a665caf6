"""Choosing the next tokens of a batch, in one pass and with one transfer from the device.

Letters: N samples, L of them, V vocabulary, K of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# In place of a token: the logits are not all numbers, or not finite where they are highest.
NO_TOKEN = -1

# Nothing but the likeliest token is left below; such a temperature means greedy: 0.
LEAST_TEMPERATURE = 1e-6

# How many of the likeliest tokens are sorted first, and how many times as many where those are too few.
_FIRST_SORTED, _MORE_SORTED = 64, 16


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
                raise ValueError(f"{name} cannot be {getattr(self, name)}; give {needed}")

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
    finite_N = highest_N.isfinite()
    if temperature > 0:
        # Below the highest, so that no temperature makes them overflow.
        below_NV = (logits_NV.float() - highest_N[:, None]) / temperature
        below_NV.masked_fill_(~finite_N[:, None], 0)
        tokens_N = _draw(torch.softmax(below_NV, dim=-1), generators, top_p, top_k)
    return torch.where(finite_N, tokens_N, NO_TOKEN).tolist()


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
    tokens_N = torch.zeros(len(generators), dtype=torch.long, device=probabilities_NV.device)
    left_N = torch.arange(len(generators), device=probabilities_NV.device)
    vocab_size = probabilities_NV.shape[1]
    # A processor sorts no more than it must; a GPU sorts at once what it would otherwise have to be asked about.
    count = vocab_size if probabilities_NV.is_cuda else _FIRST_SORTED
    while len(left_N):
        count = min(count, vocab_size)
        ordered_LK, ids_LK = _likeliest(probabilities_NV[left_N], count)
        likelier_LK = ordered_LK.cumsum(-1) - ordered_LK
        beyond_LK = (likelier_LK >= top_p) | (ordered_LK == 0)
        beyond_LK[:, 0] = False  # as a share of these numbers, the smallest top_p are 0
        if top_k is not None:
            beyond_LK[:, top_k:] = True
        nucleus_LK = ordered_LK.masked_fill(beyond_LK, 0)
        tokens_N[left_N] = ids_LK.gather(1, _first_beyond(nucleus_LK, drawn_N1[left_N])).squeeze(1)
        if count == vocab_size:
            break
        # The nucleus is whole if its last token is likelier than the last that was sorted; of tokens that are as
        # likely as that one, others may come first.
        least_L1 = ordered_LK.masked_fill(beyond_LK, torch.inf).amin(-1, keepdim=True)
        left_N = left_N[(least_L1 <= ordered_LK[:, -1:]).squeeze(1)]
        count *= _MORE_SORTED
    return tokens_N


def _likeliest(probabilities_LV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest probabilities, in order, and their tokens, of equal ones the first before the last."""
    if count == probabilities_LV.shape[1]:
        return probabilities_LV.sort(dim=-1, descending=True, stable=True)
    ids_LK = probabilities_LV.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    ordered_LK, order_LK = probabilities_LV.gather(1, ids_LK).sort(dim=-1, descending=True, stable=True)
    return ordered_LK, ids_LK.gather(1, order_LK)


def _first_beyond(masses_NV: Tensor, drawn_N1: Tensor) -> Tensor:
    """The first place at which the sum of masses exceeds that share of the whole; never a place without mass."""
    sums_NV = masses_NV.cumsum(-1)
    return torch.searchsorted(sums_NV, drawn_N1 * sums_NV[:, -1:], right=True)
