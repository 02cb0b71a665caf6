"""A small tokenizer in the manner of Phi-4-multimodal's: bytes, a few merges, special tokens with their real ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Ids, and whether the token takes the whitespace behind it away.
# Source: the tokenizer of microsoft/Phi-4-multimodal-instruct; 200018 and those from 200024 on could not be confirmed.
SPECIAL_TOKENS = {
    "<|endoftext|>": (199999, False),
    "<|endoftext10|>": (200010, False),  # where the reference puts a picture
    "<|endoftext11|>": (200011, False),  # where it puts a clip
    "<|endofprompt|>": (200018, False),
    "<|assistant|>": (200019, True),
    "<|end|>": (200020, True),
    "<|user|>": (200021, True),
    "<|system|>": (200022, True),
    "<|tool|>": (200023, True),
    "<|/tool|>": (200024, True),
    "<|tool_call|>": (200025, True),
    "<|/tool_call|>": (200026, True),
    "<|tool_response|>": (200027, True),
    "<|tag|>": (200028, True),
}

# Roles back to back; a system message may bring a text of tools; what asks for no answer is closed.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'system' and message.tools %}{{ '<|tool|>' + message.tools + '<|/tool|>' }}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)

_CORPUS = (
    "What is shown in this picture? Answer with the letter of one of the given choices.",
    "Transcribe the audio clip into text. Translate the audio to Slovenian.",
    "The answer is a red triangle, no doubt. Yes, no, A, B, C, D.",
)


def save_reference_tokenizer(folder: Path) -> None:
    """Writes the tokenizer's files into `folder`. What stops an answer is left to the model's generation config."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    # The library numbers tokens that it adds without a gap, but keeps the ids that it reads.
    written = json.loads(backend.to_str())
    written["model"]["vocab"] |= {token: id for token, (id, _) in SPECIAL_TOKENS.items()}
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False}
    written["added_tokens"] = [
        {"id": id, "content": token, "rstrip": absorbs, **flags} for token, (id, absorbs) in SPECIAL_TOKENS.items()
    ]
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)), **named)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
