"""What a small backbone is made from and how."""

from __future__ import annotations

from dataclasses import dataclass

from molora.checkpoint.pretrained import read_dtype
from molora.config import ConfigError, require
from molora.pretrain.tokenizer import FEWEST_TOKENS


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
