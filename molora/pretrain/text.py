"""Text to learn from: its documents, and the pieces that they are cut into."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molora.config import ConfigError
from molora.data.formats.rows import JsonRows
from molora.data.messages import Message, check, parts
from molora.data.prompt import ChatTemplate
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
