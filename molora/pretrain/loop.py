"""Pretraining: a small causal language model made from text, in the shape of Phi-4-mini, for the demo and for tests.

The result is an ordinary transformers folder (Phi3ForCausalLM and a byte-level BPE tokenizer). Of plain text every
token is learned, of a conversation the assistant's turns, as everywhere else. Documents never see each other: each
starts at position 0, and transformers recognises restarting positions as packed documents.

Letters: B windows in a step, T tokens in a window, K predicted tokens, D width.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import tokenizers
import torch
import transformers
from rich.progress import Progress
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from molora.checkpoint.format import FORMAT_VERSION, check_format
from molora.checkpoint.pretrained import read_dtype
from molora.config import ConfigError, require
from molora.data.messages import Message, check, parts
from molora.data.prompt import ChatTemplate
from molora.interrupt import Interrupt, Stopped
from molora.model.loss import target_losses
from molora.received import read_json, read_tensors
from molora.seeding import seeded
from molora.storage import hold, settle, sync, write_json, write_tensors

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
# In the order of their ids in Phi-4-mini, behind the learned vocabulary. All but the first absorb following whitespace.
SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<|assistant|>",
    END_OF_TURN,
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_response|>",
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

_ROTATED_SHARE = 0.75
_BETAS = (0.9, 0.95)
# Windows that still take documents while packing; more of them waste fewer positions.
_OPEN_WINDOWS = 16
_WITHOUT_EFFECT_ON_RESULT = ("output", "text", "checkpoint_every_steps")

Document: TypeAlias = "str | list[Message]"


@dataclass
class PretrainConfig:
    """What a backbone is made from and how.

    `text` are .txt files (one document each) or .jsonl files whose rows have `text` or `messages`; `output` a folder.
    `vocab_size` includes the special tokens. `precision` is that of matrix products; weights and optimiser are fp32.
    The two position limits are LongRoPE's: the length up to which frequencies are plain, and the promised length.
    """

    output: str
    text: list[str]
    vocab_size: int = 2048
    width: int = 192
    mlp_width: int = 512
    layers: int = 4
    heads: int = 6
    key_value_heads: int = 2
    original_max_position_embeddings: int = 4096
    max_position_embeddings: int = 131072
    window_tokens: int = 128
    windows_per_step: int = 8
    steps: int = 600
    learning_rate: float = 1.5e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    held_out_share: float = 0.02
    precision: str = "float32"
    checkpoint_every_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require(self, 1, "vocab_size", "width", "mlp_width", "layers", "heads", "key_value_heads", "window_tokens")
        require(self, 1, "windows_per_step", "steps", "checkpoint_every_steps")
        require(self, 0, "learning_rate", "warmup_steps", "weight_decay")
        self.precision = str(read_dtype(self.precision, "precision")).removeprefix("torch.")
        _require(self.precision in ("float32", "bfloat16"), f"precision {self.precision} is not float32 or bfloat16")
        _require(
            self.width % (8 * self.heads) == 0,
            f"width {self.width} must be a multiple of 8 x heads ({8 * self.heads}), so that three quarters of a head "
            "can be rotated in pairs",
        )
        _require(
            self.heads % self.key_value_heads == 0,
            f"heads {self.heads} must be a multiple of key_value_heads {self.key_value_heads}",
        )
        _require(
            2 <= self.window_tokens <= self.original_max_position_embeddings <= self.max_position_embeddings,
            f"window_tokens {self.window_tokens} (at least 2), original_max_position_embeddings "
            f"{self.original_max_position_embeddings} and max_position_embeddings {self.max_position_embeddings} must "
            "not decrease in this order",
        )
        _require(0 < self.held_out_share < 1, f"held_out_share {self.held_out_share} must lie between 0 and 1")
        _require(self.learning_rate > 0, f"learning_rate {self.learning_rate} must be positive")
        fewest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)
        _require(
            self.vocab_size >= fewest,
            f"vocab_size {self.vocab_size} must be at least {fewest}: every byte and the special tokens",
        )


class Piece(NamedTuple):
    """A document, or a part of one, that fits into a window; targets are the tokens to be learned."""

    token_ids: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)


class Batch(NamedTuple):
    """Windows of packed documents; `predicted_BT` is True where the next token is a target of the same document."""

    token_ids_BT: Tensor
    position_ids_BT: Tensor
    predicted_BT: Tensor


def pretrain(config: PretrainConfig, progress: Progress | None = None) -> Path:
    """Makes the backbone that `config` describes and returns its folder, going on where an interrupted call stopped.

    A finished folder is reused. Until then the work lies in `<output>.partial`. `pretrain.json` in the folder records
    the config, the hash of the text, the loss of every step and the held-out loss and perplexity.

    Raises: ConfigError for text that cannot be read or is too little, and for a folder made otherwise than asked.
    """
    progress = progress or Progress(disable=True)
    output = Path(config.output)
    partial = output.with_name(f"{output.name}.partial")
    state = partial / "state.safetensors"
    made_from = {
        "format_version": FORMAT_VERSION,
        "config": {name: value for name, value in asdict(config).items() if name not in _WITHOUT_EFFECT_ON_RESULT},
        "text_sha256": _hash_files(config.text),
    }
    if output.exists():
        _check_same(made_from, output)
        shutil.rmtree(partial, ignore_errors=True)  # a kill between the two last steps leaves it behind
        return output
    # Going on exactly needs the same arithmetic; a finished backbone does not care.
    made_from["environment"] = _environment()
    if state.exists():
        _check_same(made_from, partial)

    documents = [document for path in config.text for document in _read_documents(Path(path))]
    tokenizer = train_tokenizer((document for _, document in documents), config)
    bar = progress.add_task("tokenising", total=len(documents), note="")
    pieces = _cut(progress.track(documents, task_id=bar), tokenizer, config.window_tokens)
    train_pieces, held_out_pieces = _hold_out(pieces, config)

    partial.mkdir(parents=True, exist_ok=True)
    with hold(partial):
        model = _build_model(config, tokenizer)
        write_json(partial / "pretrain.json", made_from)
        with Interrupt() as interrupt:
            losses = _train(model, train_pieces, config, state, progress, interrupt)
        held_out_loss = _evaluate(model, held_out_pieces, config)

        _save(model, tokenizer, partial / "backbone")
        record = {
            **made_from,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "tokens": sum(map(len, train_pieces)),
            "losses": losses,
            "held_out_loss": held_out_loss,
            "held_out_perplexity": math.exp(held_out_loss),
        }
        write_json(partial / "backbone" / "pretrain.json", record)
        os.rename(partial / "backbone", output)
        sync(output.absolute().parent)
        shutil.rmtree(partial)
    return output


def train_tokenizer(documents: Iterable[Document], config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE of exactly `config.vocab_size` tokens; special tokens and template are Phi-4-mini's.

    Raises: ConfigError if the text does not support a vocabulary of that size.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(itertools.chain.from_iterable(map(_contents, documents)), trainer)
    backend.add_special_tokens(
        [AddedToken(token, rstrip=token != END_OF_TEXT, special=True) for token in SPECIAL_TOKENS]
    )
    if backend.get_vocab_size() != config.vocab_size:
        raise ConfigError(
            f"vocab_size {config.vocab_size} is too large for {', '.join(config.text)}: pairs that occur twice or more "
            f"give {backend.get_vocab_size()} tokens; lower vocab_size or add text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def long_factors(count: int, scale: float) -> list[float]:
    """LongRoPE's factors for samples longer than the original limit; `scale` is the promised over the original length.

    They grow geometrically up to `scale` over the first 31/48 of the frequencies and stay there. At 48 and 32 this is
    within 5 % of Phi-4-mini's searched list, but for its last two (44.2 and 47.8).
    Source: config.json of microsoft/Phi-4-mini-instruct.
    """
    return [scale ** min(1.0, (48 * i) / (31 * count)) for i in range(count)]


def _build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    scale = config.max_position_embeddings / config.original_max_position_embeddings
    num_frequencies = int(config.width // config.heads * _ROTATED_SHARE) // 2
    end_of_turn, end_of_text = (tokenizer.vocab[token] for token in (END_OF_TURN, END_OF_TEXT))
    phi = Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        original_max_position_embeddings=config.original_max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": _ROTATED_SHARE,
            "factor": scale,
            "short_factor": [1.0] * num_frequencies,
            "long_factor": long_factors(num_frequencies, scale),
        },
        rms_norm_eps=1e-5,
        # Near Phi-4-mini's 0.02 at its width; a narrow model drawn with 0.02 attends too evenly to learn fast.
        initializer_range=config.width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    with seeded(config.seed, "weights"):
        model = Phi3ForCausalLM(phi)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model


def _train(
    model: Phi3ForCausalLM,
    pieces: Sequence[Piece],
    config: PretrainConfig,
    state_path: Path,
    progress: Progress,
    interrupt: Interrupt,
) -> list[float]:
    """Trains `model` in place and returns the loss of every step; continues from `state_path` if it is there, and
    leaves it there when interrupted."""
    parameters = dict(model.named_parameters())
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=True)
    losses = _load_state(state_path, parameters, optimizer) if state_path.exists() else []

    task = progress.add_task("pretraining", total=config.steps, completed=len(losses), note="")
    model.train()
    batches = itertools.islice(_batches(pieces, config), len(losses), config.steps)
    for step, batch in enumerate(batches, start=len(losses)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        loss = _losses(model, batch, config.precision).mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ConfigError(f"the loss of step {step} is {losses[-1]}; lower learning_rate {config.learning_rate}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        stopping = interrupt.number
        if stopping or (step + 1) % config.checkpoint_every_steps == 0:
            _save_state(state_path, parameters, optimizer, losses)
        progress.update(task, completed=step + 1, note=f"loss {losses[-1]:.3f}")
        if stopping:
            name = signal.Signals(stopping).name
            told = f"stopped by {name} after step {step + 1} of {config.steps}, which is saved"
            raise Stopped(f"{told}; run it again to go on", stopping)
    return losses


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / (config.steps - config.warmup_steps)))


def _losses(model: Phi3ForCausalLM, batch: Batch, precision: str) -> Tensor:
    """Negative log-likelihood of every predicted token, (K,)."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        output = model.model(batch.token_ids_BT, position_ids=batch.position_ids_BT, use_cache=False)
        hidden_KD = output.last_hidden_state[batch.predicted_BT]
        targets_K = batch.token_ids_BT.roll(-1, dims=1)[batch.predicted_BT]
        return target_losses(model.lm_head, hidden_KD, targets_K, model.config.vocab_size)


@torch.no_grad()
def _evaluate(model: Phi3ForCausalLM, pieces: Sequence[Piece], config: PretrainConfig) -> float:
    model.eval()
    windows = _pack([len(piece) for piece in pieces], range(len(pieces)), config.window_tokens)
    losses = []
    for start in range(0, len(windows), config.windows_per_step):
        batch = _collate(pieces, windows[start : start + config.windows_per_step], config.window_tokens)
        losses.append(_losses(model, batch, "float32"))
    return float(torch.cat(losses).mean())


def _save_state(
    path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]
) -> None:
    state = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in parameters.items():
        state[f"parameter.{name}"] = parameter
        state |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    write_tensors(path, state)


def _load_state(path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """Restores what `_save_state` wrote and returns the losses so far, one per step."""
    state = read_tensors(path)
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"parameter.{name}"])
        optimizer.state[parameter] = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return state["losses"].tolist()


def _batches(pieces: Sequence[Piece], config: PretrainConfig) -> Iterator[Batch]:
    """Steps without end; every epoch packs the pieces anew in another order and leaves out what does not fill a step.

    Raises: ConfigError if the text does not fill one step.
    """
    lengths = [len(piece) for piece in pieces]
    for epoch in itertools.count():
        with seeded(config.seed, "epoch", epoch):
            order = torch.randperm(len(pieces)).tolist()
        windows = _pack(lengths, order, config.window_tokens)
        if len(windows) < config.windows_per_step:
            raise ConfigError(
                f"{', '.join(config.text)}: the text fills {len(windows)} windows of {config.window_tokens} tokens, a "
                f"step takes {config.windows_per_step}; add text or lower windows_per_step or window_tokens"
            )
        for start in range(0, len(windows) - config.windows_per_step + 1, config.windows_per_step):
            yield _collate(pieces, windows[start : start + config.windows_per_step], config.window_tokens)


def _pack(lengths: Sequence[int], order: Iterable[int], window_tokens: int) -> list[list[int]]:
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


def _collate(pieces: Sequence[Piece], windows: Sequence[Sequence[int]], window_tokens: int) -> Batch:
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


def _cut(
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


def _hold_out(pieces: list[Piece], config: PretrainConfig) -> tuple[list[Piece], list[Piece]]:
    """Splits off the pieces that training never sees; at least one on either side."""
    if len(pieces) < 2:
        raise ConfigError(
            f"{', '.join(config.text)}: {len(pieces)} piece(s) of up to {config.window_tokens} tokens cannot be split "
            "into training and held-out text; add text or lower window_tokens"
        )
    with seeded(config.seed, "held out"):
        order = torch.randperm(len(pieces)).tolist()
    count = min(len(pieces) - 1, max(1, round(config.held_out_share * len(pieces))))
    return [pieces[i] for i in order[count:]], [pieces[i] for i in order[:count]]


def _contents(document: Document) -> list[str]:
    if isinstance(document, str):
        return [document]
    return [part["text"] for message in document for part in parts(message)]


def _read_documents(path: Path) -> Iterator[tuple[str, Document]]:
    """The documents of a .txt or .jsonl file, each with words that say where it is. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"text: {path}: not UTF-8 at byte {error.start}; convert the file") from error
    if not text.strip():
        raise ConfigError(f"text: {path}: the file is empty")
    if path.suffix == ".txt":
        yield str(path), text
    elif path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"{path}, row {number}", _read_row(line, f"{path}, row {number}")
    else:
        raise ConfigError(f"text: {path}: text is read from .txt and .jsonl files, not from {path.suffix!r}")


def _read_row(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error})") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if not (isinstance(row, dict) and "messages" in row):
        raise ConfigError(f"{where}: expected an object with `text` (a string) or `messages` (a list)")
    check(row["messages"], {}, where)
    return row["messages"]


def _hash_files(paths: Sequence[str]) -> str:
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


def _environment() -> dict[str, Any]:
    modules = (torch, transformers, tokenizers)
    return {**{module.__name__: str(module.__version__) for module in modules}, "threads": torch.get_num_threads()}


def _check_same(made_from: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError saying in what `folder` differs from a backbone made from `made_from`."""
    path = folder / "pretrain.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} exists but was not made by `molora pretrain` (no pretrain.json); choose another output"
        )
    found = read_json(path)
    check_format(found, path)
    differences = []
    for section, wanted in made_from.items():
        pairs = [(section, found.get(section), wanted)]
        if isinstance(wanted, dict):
            there = found.get(section) or {}
            pairs = [(key, there.get(key), wanted.get(key)) for key in sorted({*wanted, *there})]
        differences += [f"{key} is {new!r}, there {old!r}" for key, old, new in pairs if old != new]
    if differences:
        raise ConfigError(
            f"{folder} was made differently: {'; '.join(differences)}; remove the folder or choose another output"
        )


def _save(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder that AutoModelForCausalLM and AutoTokenizer open, and waits until it is on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    transformers.logging.disable_progress_bar()  # writing is quick, and a display of ours may be on the screen
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settle(folder)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
