"""Losses of samples: of answers, without ever holding all logits of a large vocabulary, and of words in media tokens.

Letters: K target positions, N samples, S media tokens, D backbone width, V vocabulary, W different words of a sample.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# Logits held at once: 2**24 fp32 values are 64 MiB, twice that while softmax runs.
LOGITS_PER_CHUNK = 2**24

# The log-probability of what is not there: finite, so that CTC's differences of two of them are.
_NEVER = -1e4


def target_losses(head: Callable[[Tensor], Tensor], hidden_KD: Tensor, targets_K: Tensor, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each target, (K,) in fp32. More positions than fit into one chunk are computed chunk
    by chunk, and again in backward, so that memory stays bounded by the chunk whatever K and V are."""

    def chunk_losses(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    rows = max(1, LOGITS_PER_CHUNK // vocab_size)
    if len(targets_K) <= rows:
        return chunk_losses(hidden_KD, targets_K)
    chunks = zip(hidden_KD.split(rows), targets_K.split(rows), strict=True)
    losses = [checkpoint(chunk_losses, hidden, targets, use_reentrant=False) for hidden, targets in chunks]
    return torch.cat(losses)  # pyright: ignore[reportArgumentType]


def word_losses(media: Sequence[Tensor], words: Sequence[Tensor], embeddings_VD: Tensor) -> Tensor:
    """Negative log-likelihood (N,), in fp32, of each sample's words (token ids) in its media tokens (S, D), by CTC.

    A media token says a word of the vocabulary the more the nearer it is to the word's embedding, a blank the nearer it
    is to zero, and nothing where it is far from all of them. Every sample has as many media tokens as it has words, and
    one more between equal neighbours. Source: Graves et al., ICML 2006 (CTC).
    """
    squares_V = torch.linalg.vector_norm(embeddings_VD, dim=1, dtype=torch.float32).square()
    # Scores are squared distances, in units in which the mean word is 2 ln V from zero: the V words that are far from a
    # token do not outweigh the one that is near. What is half as far as that from all is nowhere: without this a token
    # would do best far beyond a word, where no layer of the backbone reads it as one.
    scale = float(2 * math.log(len(embeddings_VD)) / squares_V.mean())
    offsets_V = (-scale * squares_V).to(embeddings_VD.dtype)

    def scores(tokens_SD: Tensor, ids: Tensor | slice) -> Tensor:
        """Of words, to that of the blank."""
        scaled_SD = (2 * scale * tokens_SD).to(embeddings_VD.dtype)
        return torch.addmm(offsets_V[ids], scaled_SD, embeddings_VD[ids].T).float()

    @torch.no_grad()
    def totals(tokens_SD: Tensor) -> tuple[Tensor, Tensor]:
        """The log-sum of the scores of all words, blank and nowhere, and its gradient: all are held here, once."""
        scores_SV = scores(tokens_SD, slice(None))
        nowhere_S1 = scale * tokens_SD.square().sum(1, keepdim=True) - math.log(len(embeddings_VD))
        highest_S1 = scores_SV.amax(1, keepdim=True).maximum(nowhere_S1).clamp(min=0)
        shares_SV, share_S1 = scores_SV.sub_(highest_S1).exp_(), (nowhere_S1 - highest_S1).exp()
        sums_S1 = shares_SV.sum(1, keepdim=True) + share_S1 + (-highest_S1).exp()
        slopes_SD = shares_SV.to(embeddings_VD.dtype) @ embeddings_VD + share_S1 * tokens_SD
        return (sums_S1.log() + highest_S1).squeeze(1), 2 * scale * slopes_SD / sums_S1

    chunks = torch.cat([*media]).split(max(1, LOGITS_PER_CHUNK // len(embeddings_VD)))
    totals_S, slopes_SD = (torch.cat(parts) for parts in zip(*map(totals, chunks), strict=True))
    log_probs, places = [], []
    lengths = [len(tokens_SD) for tokens_SD in media]
    for tokens_SD, ids, total_S, slope_SD in zip(
        media, words, totals_S.split(lengths), slopes_SD.split(lengths), strict=True
    ):
        own_W, place = ids.unique(return_inverse=True)
        total_S = total_S + ((tokens_SD - tokens_SD.detach()) * slope_SD).sum(1)  # the same, with its gradient
        said_SW = F.pad(scores(tokens_SD, own_W), (1, 0)) - total_S[:, None]  # the blank scores zero
        # All other words are one: the gradient of torch's CTC is right if probabilities sum to one.
        rest_S1 = (1 - said_SW.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()
        log_probs.append(torch.cat([said_SW, rest_S1], 1))
        places.append(place + 1)
    widest = max(len(each[0]) for each in log_probs)
    padded = [F.pad(each, (0, widest - len(each[0])), value=_NEVER) for each in log_probs]
    losses_N = F.ctc_loss(
        # On the host: the CUDA kernel sums in an order that changes from run to run.
        pad_sequence(padded).cpu(),
        torch.cat(places).cpu(),
        torch.tensor(lengths),
        torch.tensor([len(place) for place in places]),
        reduction="none",
    )
    return losses_N.to(embeddings_VD.device)
