"""Windows of packed pieces.

Letters: B windows in a step, T tokens in a window.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molora.pretrain.text import Piece

# Windows that still take documents while packing; more of them waste fewer positions.
_OPEN_WINDOWS = 16


class Batch(NamedTuple):
    """Windows of packed documents; `predicted_BT` is True where the next token is a target of the same document."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    predicted_BT: Tensor


def pack(lengths: Sequence[int], order: Iterable[int], window_tokens: int) -> list[list[int]]:
    """Puts every piece whole into the fullest open window that has room for it."""
    full: list[list[int]] = []
    windows: list[tuple[int, list[int]]] = []  # (free positions, pieces), the fullest first
    for piece in order:
        length = lengths[piece]
        at = next((i for i, (free, _) in enumerate(windows) if free >= length), None)
        free, members = (window_tokens, []) if at is None else windows.pop(at)
        windows.append((free - length, [*members, piece]))
        windows.sort(key=lambda window: window[0])
        if len(windows) > _OPEN_WINDOWS or windows[0][0] == 0:
            full.append(windows.pop(0)[1])
    return full + [members for _, members in windows]


def collate(pieces: Sequence[Piece], windows: Sequence[Sequence[int]], window_tokens: int) -> Batch:
    """Lays pieces end to end; the rest of a window is filled with a document that nothing is predicted in."""
    shape = (len(windows), window_tokens)
    token_ids_BT = torch.zeros(shape, dtype=torch.long)
    position_ids_BT = torch.zeros(shape, dtype=torch.long)
    predicted_BT = torch.zeros(shape, dtype=torch.bool)
    for row, members in enumerate(windows):
        start = 0
        for piece in (pieces[member] for member in members):
            stop = start + len(piece)
            token_ids_BT[row, start:stop] = piece.token_ids
            position_ids_BT[row, start:stop] = torch.arange(stop - start)
            predicted_BT[row, start : stop - 1] = piece.targets[1:]
            start = stop
        position_ids_BT[row, start:] = torch.arange(window_tokens - start)
    return Batch(token_ids_BT, position_ids_BT, predicted_BT)
