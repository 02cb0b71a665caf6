"""What tests need, of molora and of plugins: tiny real things, and assertions."""

from molora.testing.asserts import assert_close, assert_conforms, assert_router_conforms
from molora.testing.tiny import (
    ROPE_SWITCH,
    VOCAB_SIZE,
    WINDOW,
    Letters,
    Numbers,
    NumbersConfig,
    byte_tokenizer,
    save_backbone,
    tiny_model,
)

__all__ = [
    "ROPE_SWITCH",
    "VOCAB_SIZE",
    "WINDOW",
    "Letters",
    "Numbers",
    "NumbersConfig",
    "assert_close",
    "assert_conforms",
    "assert_router_conforms",
    "byte_tokenizer",
    "save_backbone",
    "tiny_model",
]
