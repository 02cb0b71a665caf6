"""Documents of text files, the pieces that they are cut into, and windows of packed pieces, epoch by epoch.

Letters: B windows in a step, T tokens in a window.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molora.config import ConfigError
from molora.data.messages import Message, check, parts
from molora.data.prompt import ChatTemplate
from molora.data.rows import JsonRows
from molora.pretrain.config import PretrainConfig
from molora.seeding import seeded

Document: TypeAlias = "str | list[Message]"


class Piece(NamedTuple):
    """A document, or a part of one, that fits into a window; targets are the tokens to be learned."""

    token_ids: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


def cut(
    documents: Iterable[tuple[str, Document]], tokenizer: PreTrainedTokenizerFast, window_tokens: int
) -> list[Piece]:
    """Tokenises documents and cuts them into pieces of at most one window, those without a target left out."""
    template = ChatTemplate(tokenizer)
    pieces = []
    for where, document in documents:
        if isinstance(document, str):
            token_ids = torch.tensor([*tokenizer.encode(document, split_special_tokens=True), tokenizer.eos_token_id])
            targets = torch.ones_like(token_ids, dtype=torch.bool)
        else:
            prompt = template.encode(document, where=where)
            token_ids, targets = torch.tensor(prompt.token_ids), torch.tensor(prompt.targets)
        pieces += map(Piece, token_ids.split(window_tokens), targets.split(window_tokens))
    return [piece for piece in pieces if piece.targets[1:].any()]


def hold_out(pieces: list[Piece], share: float, seed: int) -> tuple[list[Piece], list[Piece]]:
    """Splits off the pieces that training never sees; at least one on either side."""
    if len(pieces) < 2:
        wrong = f"text: {len(pieces)} piece(s) of up to a window cannot be split into training and held-out text"
        raise ConfigError(f"{wrong}; add text or lower window_tokens")
    with seeded(seed, "held out"):
        order = torch.randperm(len(pieces)).tolist()
    count = min(len(pieces) - 1, max(1, round(share * len(pieces))))
    return [pieces[i] for i in order[count:]], [pieces[i] for i in order[:count]]


def contents(document: Document) -> list[str]:
    """The texts of a document."""
    if isinstance(document, str):
        return [document]
    return [part["text"] for message in document for part in parts(message)]


def read_documents(path: Path) -> Iterator[tuple[str, Document]]:
    """The documents of a .txt or .jsonl file, each with words that say where it is. Raises ConfigError."""
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"text: {path}: not UTF-8 at byte {error.start}; convert the file") from error
        if not text.strip():
            raise ConfigError(f"text: {path}: the file is empty")
        yield str(path), text
    elif path.suffix == ".jsonl":
        rows = JsonRows(path, numbers_as_text=False)
        for number in range(len(rows)):
            yield rows.where(number), _document(rows[number], rows.where(number))
    else:
        raise ConfigError(f"text: {path}: text is read from .txt and .jsonl files, not from {path.suffix!r}")


def _document(row: Mapping[str, Any], where: str) -> Document:
    if isinstance(row.get("text"), str):
        return row["text"]
    if "messages" not in row:
        raise ConfigError(f"{where}: expected an object with `text` (a string) or `messages` (a list)")
    check(row["messages"], {}, where)
    return row["messages"]


def hash_files(paths: Sequence[str]) -> str:
    """SHA-256 over the suffixes and bytes of the text files, in order. Raises ConfigError for an unreadable one."""
    if not paths:
        raise ConfigError("text: name at least one .txt or .jsonl file")
    digest = hashlib.sha256()
    for path in map(Path, paths):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"text: {path} cannot be read: {error.strerror}") from error
        digest.update(f"{path.suffix} {len(data)} ".encode() + data)
    return digest.hexdigest()


# Windows that still take documents while packing; more of them waste fewer positions.
_OPEN_WINDOWS = 16


class Batch(NamedTuple):
    """Windows of packed documents; `predicted_BT` is True where the next token is a target of the same document."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    predicted_BT: Tensor


def batches(pieces: Sequence[Piece], config: PretrainConfig) -> Iterator[Batch]:
    """Steps without end; every epoch packs the pieces anew in another order and leaves out what does not fill a step.

    Raises: ConfigError if the text does not fill one step.
    """
    lengths = [len(piece) for piece in pieces]
    size, window_tokens = config.windows_per_step, config.window_tokens
    for epoch in itertools.count():
        with seeded(config.seed, "epoch", epoch):
            order = torch.randperm(len(pieces)).tolist()
        windows = pack(lengths, order, window_tokens)
        if len(windows) < size:
            wrong = f"{', '.join(config.text)}: the text fills {len(windows)} windows of {window_tokens} tokens"
            raise ConfigError(f"{wrong}, a step takes {size}; add text or lower windows_per_step or window_tokens")
        yield from _steps(pieces, windows[: len(windows) // size * size], config)


def in_order(pieces: Sequence[Piece], config: PretrainConfig) -> Iterator[Batch]:
    """All pieces once, packed in their own order; the last batch may be smaller than a step."""
    return _steps(pieces, pack([len(piece) for piece in pieces], range(len(pieces)), config.window_tokens), config)


def _steps(pieces: Sequence[Piece], windows: list[list[int]], config: PretrainConfig) -> Iterator[Batch]:
    for start in range(0, len(windows), config.windows_per_step):
        yield collate(pieces, windows[start : start + config.windows_per_step], config.window_tokens)


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
