"""Losses of preferences: by how much a chosen answer is likelier than a rejected one, beside a reference.

Each is a function of log-probabilities, and has its source beside it. Letters: P pairs of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.config import did_you_mean


@dataclass(kw_only=True)
class PreferenceConfig:
    """`losses` maps names to weights; their weighted sum is learned. `beta` is how strongly answers are drawn away from
    the reference: a reward is beta times the log-ratio of an answer's probability to that in the reference.
    `label_smoothing` is the share of pairs whose sides may have been exchanged. With `length_normalised`
    log-probabilities are means over an answer's tokens. `margin` is what the rewards must differ by at least (sigmoid
    and hinge). The reference is the model as it was when the stage began, which for an adapter that starts fresh is the
    bare backbone; without `reference` there is none, and log-probabilities stand in place of log-ratios.

    SimPO (arXiv 2405.14734) is {sigmoid: 1} with length_normalised, a margin and no reference; ORPO (arXiv 2403.07691)
    is {sft: 1, odds_ratio: 0.1} without a reference."""

    losses: dict[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalised: bool = False
    margin: float = 0.0
    reference: bool = True
    discopop_temperature: float = 0.05

    def __post_init__(self) -> None:
        if not self.losses:
            raise ValueError(f"losses: none given; there are {', '.join(LOSSES)}")
        for name, weight in self.losses.items():
            if name not in LOSSES:
                raise ValueError(f"losses: {name!r} is none; {did_you_mean(name, LOSSES)}there are {', '.join(LOSSES)}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"losses.{name}: weight {weight}; give a number above 0, or leave the loss out")
        for name in ("beta", "discopop_temperature"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name} is {value}; give a number above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it is from 0 to below 0.5")
        if "exo_pair" in self.losses and not self.label_smoothing:
            raise ValueError("label_smoothing is 0, where the loss exo_pair is infinite; give one such as 0.001")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin is {self.margin}; give 0 or more")


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of both answers of P pairs, by the model and by the reference, and the answers' tokens; all of
    them (P,) in fp64."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> Scores:
        """The same with means over tokens in place of sums."""
        return Scores(
            self.chosen / self.chosen_tokens,
            self.rejected / self.rejected_tokens,
            self.reference_chosen / self.chosen_tokens,
            self.reference_rejected / self.rejected_tokens,
            self.chosen_tokens,
            self.rejected_tokens,
        )

    @property
    def won(self) -> Tensor:
        """Log-ratios of the chosen answers to the reference."""
        return self.chosen - self.reference_chosen

    @property
    def lost(self) -> Tensor:
        """Log-ratios of the rejected answers to the reference."""
        return self.rejected - self.reference_rejected


def preference_losses(scores: Scores, config: PreferenceConfig) -> Tensor:
    """The weighted sum of a config's losses, (P,). Losses that look at all pairs (aot, sft) are right in the mean."""
    given = scores.per_token() if config.length_normalised else scores
    parts = []
    for name, weight in config.losses.items():
        # These are defined by means over tokens, whatever the others take.
        of_tokens = name in ("ipo", "odds_ratio") and not config.length_normalised
        chosen = scores if name == "sft" else scores.per_token() if of_tokens else given
        parts.append(weight * LOSSES[name](chosen, config))
    return torch.stack(parts).sum(0)


def _smoothed(rewards: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(rewards) - smoothing * F.logsigmoid(-rewards)


def _sigmoid(scores: Scores, config: PreferenceConfig) -> Tensor:
    """DPO, arXiv 2305.18290; smoothed, its conservative form (Mitchell, 2023)."""
    return _smoothed(config.beta * (scores.won - scores.lost) - config.margin, config.label_smoothing)


def _hinge(scores: Scores, config: PreferenceConfig) -> Tensor:
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 + config.margin - config.beta * (scores.won - scores.lost))


def _ipo(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2310.12036, by means over tokens."""
    return (scores.won - scores.lost - 1 / (2 * config.beta)).square()


def _robust(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2403.00409."""
    rewards, smoothing = config.beta * (scores.won - scores.lost), config.label_smoothing
    both = -(1 - smoothing) * F.logsigmoid(rewards) + smoothing * F.logsigmoid(-rewards)
    return both / (1 - 2 * smoothing)


def _exo_pair(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2402.00856: the divergence of the pair's rewards from its smoothed label."""
    rewards, smoothing = config.beta * (scores.won - scores.lost), config.label_smoothing
    right = torch.sigmoid(rewards) * (F.logsigmoid(rewards) - math.log1p(-smoothing))
    return right + torch.sigmoid(-rewards) * (F.logsigmoid(-rewards) - math.log(smoothing))


def _nca_pair(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2402.05369."""
    won, lost = config.beta * scores.won, config.beta * scores.lost
    return -F.logsigmoid(won) - F.logsigmoid(-won) / 2 - F.logsigmoid(-lost) / 2


def _bco_pair(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2404.04656, without the running mean of rewards."""
    return -F.logsigmoid(config.beta * scores.won) - F.logsigmoid(-config.beta * scores.lost)


def _sppo_hard(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2405.00675, where the chosen answer wins for certain."""
    half = 0.5 / config.beta
    return (scores.won - half).square() + (scores.lost + half).square()


def _aot(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2406.05882: the sorted differences of the pairs, beside those of the reference."""
    ours = (scores.chosen - scores.rejected).sort().values
    theirs = (scores.reference_chosen - scores.reference_rejected).sort().values
    return _smoothed(config.beta * (ours - theirs), config.label_smoothing)


def _aot_unpaired(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2406.05882: the sorted log-ratios of the chosen answers, beside those of the rejected ones."""
    return _smoothed(config.beta * (scores.won.sort().values - scores.lost.sort().values), config.label_smoothing)


def _apo_zero(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2408.06266, equation 7: for chosen answers that are better than the model's own."""
    return 1 - torch.sigmoid(config.beta * scores.won) + torch.sigmoid(config.beta * scores.lost)


def _apo_down(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2408.06266, equation 8: for chosen answers that are worse than the model's own."""
    apart = torch.sigmoid(config.beta * (scores.won - scores.lost))
    return torch.sigmoid(config.beta * scores.won) + 1 - apart


def _discopop(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2406.08414, equation 5: between the logistic and the exponential loss, by how sure the model is."""
    rewards = config.beta * (scores.won - scores.lost)
    log_share = F.logsigmoid(rewards / config.discopop_temperature)
    # The sum in the exponent stays small where the exponential by itself is infinite and the share is 0.
    return -F.logsigmoid(rewards) * (1 - log_share.exp()) + torch.exp(log_share - rewards)


def _sft(scores: Scores, config: PreferenceConfig) -> Tensor:
    """The mean loss of the chosen answers' tokens, for every pair."""
    return (-scores.chosen.sum() / scores.chosen_tokens.sum()).expand(len(scores.chosen))


def _odds_ratio(scores: Scores, config: PreferenceConfig) -> Tensor:
    """arXiv 2403.07691, by means over tokens."""
    # Log-probabilities are found in fp32, where a sure answer has 0: infinite odds, and slopes of 0 times infinity.
    highest = -torch.finfo(torch.float32).eps

    def log_odds(log_probabilities: Tensor) -> Tensor:
        # Slopes pass as if nothing were cut off, so that a rejected answer that is sure is still learned from.
        below_0 = log_probabilities + (log_probabilities.clamp(max=highest) - log_probabilities).detach()
        return below_0 - torch.log1p(-below_0.exp())

    return -F.logsigmoid(log_odds(scores.chosen) - log_odds(scores.rejected))


LOSSES: dict[str, Callable[[Scores, PreferenceConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "odds_ratio": _odds_ratio,
}
