"""Text to learn from: its documents, a tokenizer learned from them, the pieces that they are cut into, and windows of
packed pieces. The tokenizer is a byte-level BPE with Phi-4-mini's special tokens and chat template.

Letters: B windows in a step, T tokens in a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from molora.config import ConfigError
from molora.data.messages import Message, check, parts
from molora.data.prompt import ChatTemplate
from molora.data.rows import JsonRows
from molora.seeding import seeded

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
# In the order of their ids in Phi-4-mini, behind the learned vocabulary. All but the first absorb following whitespace.
SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|assistant|>", END_OF_TURN, "<|user|>", "<|system|>"),
    *("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
)
# Phi-4-mini's format: turns back to back, no newlines; a system message may carry a `tools` string.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' ~ message.role ~ '|>' ~ message.content -}}"
    "{%- if message.role == 'system' and message.tools -%}{{- '<|tool|>' ~ message.tools ~ '<|/tool|>' -}}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{{- '<|assistant|>' if add_generation_prompt else eos_token -}}"
)
# Words with the character before them, numbers of up to three digits, runs of punctuation, line ends, spaces.
# Source: a simpler relative of o200k_base's pattern (openai/tiktoken, tiktoken_ext/openai_public.py).
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Every byte and the special tokens.
FEWEST_TOKENS = 256 + len(SPECIAL_TOKENS)
# Windows that still take documents while packing; more of them waste fewer positions.
_OPEN_WINDOWS = 16

Document: TypeAlias = "str | list[Message]"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE of exactly `vocab_size` tokens; special tokens and template are Phi-4-mini's.

    Raises: ConfigError if the text does not support a vocabulary of that size.
    """
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    learned, alphabet = vocab_size - len(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=learned, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    special = [AddedToken(token, rstrip=token != END_OF_TEXT, special=True) for token in SPECIAL_TOKENS]
    backend.add_special_tokens(special)
    if (size := backend.get_vocab_size()) != vocab_size:
        wrong = f"vocab_size {vocab_size} is too large for the text: pairs that occur twice or more give {size} tokens"
        raise ConfigError(f"{wrong}; lower vocab_size or add text")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


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
