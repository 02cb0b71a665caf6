"""Cross-entropy on target positions only, without ever holding all logits of a large vocabulary.

Letters: K target positions, D backbone width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits held at once: 2**24 fp32 values are 64 MiB, twice that while softmax runs.
LOGITS_PER_CHUNK = 2**24


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
