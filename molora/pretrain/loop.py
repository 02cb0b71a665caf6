"""Pretraining: a small causal language model made from text, in the shape of Phi-4-mini, for the demo and for tests.

The result is an ordinary transformers folder (Phi3ForCausalLM and a byte-level BPE tokenizer). Of plain text every
token is learned, of a conversation the assistant's turns, as everywhere else. Documents never see each other: each
starts at position 0, and transformers recognises restarting positions as packed documents.

Letters: B windows in a step, T tokens in a window, K predicted tokens, D width.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.progress import Progress
from torch import Tensor
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from molora.checkpoint.format import FORMAT_VERSION, check_format
from molora.checkpoint.stock import read_dtype
from molora.config import ConfigError, require
from molora.interrupt import Interrupt, Stopped
from molora.model.loss import target_losses
from molora.pretrain import text
from molora.pretrain.text import Piece
from molora.pretrain.tokenizer import END_OF_TEXT, END_OF_TURN, FEWEST_TOKENS, train_tokenizer
from molora.pretrain.windows import Batch, collate, pack
from molora.received import read_json, read_tensors
from molora.seeding import seeded
from molora.storage import hold, settle, sync, write_json, write_tensors
from molora.train.optim import PartConfig, learning_rate
from molora.train.resume import differences, environment

_ROTATED_SHARE = 0.75
_BETAS = (0.9, 0.95)
_WITHOUT_EFFECT_ON_RESULT = ("output", "text", "checkpoint_every_steps")


@dataclass
class PretrainConfig:
    """What a backbone is made from and how.

    `text` are .txt files (one document each) or .jsonl files whose rows have `text` or `messages`; `output` a folder.
    `vocab_size` includes the special tokens. `precision` is that of matrix products; weights and optimiser are fp32.
    The two position limits are LongRoPE's: the length up to which frequencies are plain, and the promised length.
    A step takes `windows_per_step` windows of `window_tokens`. `held_out_share` of the documents is not trained on, and
    gives the loss at the end. A state to resume from is saved every `checkpoint_every_steps`.
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
        multiple = f"width {self.width} must be a multiple of 8 x heads ({8 * self.heads})"
        rotated = "so that three quarters of a head can be rotated in pairs"
        _require(self.width % (8 * self.heads) == 0, f"{multiple}, {rotated}")
        heads, shared = self.heads, self.key_value_heads
        _require(heads % shared == 0, f"heads {heads} must be a multiple of key_value_heads {shared}")
        window, plain, longest = self.window_tokens, self.original_max_position_embeddings, self.max_position_embeddings
        limits = f"original_max_position_embeddings {plain} and max_position_embeddings {longest}"
        told = f"window_tokens {window} (at least 2), {limits} must not decrease in this order"
        _require(2 <= window <= plain <= longest, told)
        _require(0 < self.held_out_share < 1, f"held_out_share {self.held_out_share} must lie between 0 and 1")
        _require(self.learning_rate > 0, f"learning_rate {self.learning_rate} must be positive")
        least = f"must be at least {FEWEST_TOKENS}: every byte and the special tokens"
        _require(self.vocab_size >= FEWEST_TOKENS, f"vocab_size {self.vocab_size} {least}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


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
        "text_sha256": text.hash_files(config.text),
    }
    if output.exists():
        _check_same(made_from, output)
        shutil.rmtree(partial, ignore_errors=True)  # a kill between the two last steps leaves it behind
        return output
    # Going on exactly needs the same arithmetic; a finished backbone does not care.
    made_from["environment"] = environment(tokenizers=tokenizers.__version__)
    if state.exists():
        _check_same(made_from, partial)
    documents = [document for path in config.text for document in text.read_documents(Path(path))]
    texts = itertools.chain.from_iterable(text.contents(document) for _, document in documents)
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
    bar = progress.add_task("tokenising", total=len(documents), note="")
    pieces = text.cut(progress.track(documents, task_id=bar), tokenizer, config.window_tokens)
    train_pieces, held_out_pieces = text.hold_out(pieces, config.held_out_share, config.seed)
    partial.mkdir(parents=True, exist_ok=True)
    with hold(partial):
        model = _build_model(config, tokenizer)
        write_json(partial / "pretrain.json", made_from)
        losses = _train(model, train_pieces, config, state, progress)
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
    model: Phi3ForCausalLM, pieces: Sequence[Piece], config: PretrainConfig, state_path: Path, progress: Progress
) -> list[float]:
    """Trains `model` in place and returns the loss of every step; continues from `state_path` if it is there, and
    leaves it there when interrupted."""
    parameters = dict(model.named_parameters())
    decayed = [parameter for parameter in parameters.values() if parameter.ndim >= 2]
    others = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=_BETAS, fused=True)
    schedule = PartConfig(learning_rate=config.learning_rate, warmup_steps=config.warmup_steps)
    losses = _load_state(state_path, parameters, optimizer) if state_path.exists() else []
    task = progress.add_task("pretraining", total=config.steps, completed=len(losses), note="")
    model.train()
    steps = itertools.islice(batches(pieces, config), len(losses), config.steps)
    with Interrupt() as interrupt:
        for step, batch in enumerate(steps, start=len(losses)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(schedule, step, config.steps)
            loss = _losses(model, batch, config.precision).mean()
            losses.append(value := loss.item())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm).item()
            for name, number in {"loss": value, "gradient norm": norm}.items():
                if not math.isfinite(number):
                    told = f"the {name} of step {step} is {number}"
                    raise ConfigError(f"{told}; lower learning_rate {config.learning_rate}")
            optimizer.step()
            optimizer.zero_grad()
            stopping = interrupt.number
            if stopping or (step + 1) % config.checkpoint_every_steps == 0:
                _save_state(state_path, parameters, optimizer, losses)
            progress.update(task, completed=step + 1, note=f"loss {value:.3f}")
            if stopping:
                name = signal.Signals(stopping).name
                told = f"stopped by {name} after step {step + 1} of {config.steps}, which is saved"
                raise Stopped(f"{told}; run it again to go on", stopping)
    return losses


def batches(pieces: Sequence[Piece], config: PretrainConfig) -> Iterator[Batch]:
    """Steps without end; every epoch packs the pieces anew in another order and leaves out what does not fill a step.
    Raises ConfigError if the text does not fill one step."""
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
    return float(torch.cat([_losses(model, batch, "float32") for batch in in_order(pieces, config)]).mean())


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


def _check_same(made_from: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError saying in what `folder` differs from a backbone made from `made_from`."""
    path = folder / "pretrain.json"
    if not path.is_file():
        wrong = f"{folder} exists but was not made by `molora pretrain` (no pretrain.json)"
        raise ConfigError(f"{wrong}; choose another output")
    found = read_json(path)
    check_format(found, path)
    then, now = {key: found.get(key) for key in made_from}, dict(made_from)
    if isinstance(recorded := then.get("environment"), dict):  # an older version recorded less
        now["environment"] = {key: value for key, value in now["environment"].items() if key in recorded}
    if changed := list(differences(then, now)):
        wrong = f"{folder} was made differently: {'; '.join(changed)}"
        raise ConfigError(f"{wrong}; remove the folder or choose another output")


def _save(model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder that AutoModelForCausalLM and AutoTokenizer open, and waits until it is on disk."""
    shutil.rmtree(folder, ignore_errors=True)
    transformers.logging.disable_progress_bar()  # writing is quick, and a display of ours may be on the screen
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settle(folder)
