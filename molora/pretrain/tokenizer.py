"""A byte-level BPE tokenizer learned from text, with Phi-4-mini's special tokens and chat template."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molora.config import ConfigError

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


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE of exactly `vocab_size` tokens; special tokens and template are Phi-4-mini's. Raises
    ConfigError if the text does not support a vocabulary of that size."""
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
