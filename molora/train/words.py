"""What the samples of a stage of words say: their answers, by the tokenizer's tokens or by its first ones alone.

Letter: K words of a sample.
"""

from __future__ import annotations

import json
from collections.abc import Set
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.config import ConfigError
from molora.data.processor import SampleTooLong
from molora.pack import Sample


class Words:
    """`vocabulary` is how many tokens words are spelled with and told apart from; None is all that there are.

    Byte pair encoding learns its tokens one from two before it, so that the first ones are the encoding that a smaller
    vocabulary would have had. Raises ConfigError for a tokenizer of another kind, and for a number that leaves it
    without its letters.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Set[int], vocabulary: int | None, where: str
    ) -> None:
        self.vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._stop_ids = torch.tensor(sorted(stop_ids))
        self._speller = None if vocabulary is None else _first_tokens(tokenizer, vocabulary, where)

    def of(self, sample: Sample) -> Tensor:
        """The words (K,) of a sample's answer, without what ends its turn. Raises SampleTooLong if its media tokens are
        too few to say them: each says one, and one more lies between equal neighbours."""
        words_K = sample.token_ids_T[sample.targets_T & ~torch.isin(sample.token_ids_T, self._stop_ids)]
        if self._speller is not None:
            text = self._tokenizer.decode(words_K.tolist(), skip_special_tokens=True)
            words_K = torch.tensor(self._speller.encode(text, add_special_tokens=False).ids, dtype=torch.long)
        needed = len(words_K) + int((words_K[1:] == words_K[:-1]).sum())
        num_media = int((sample.modality_ids_T > 0).sum())
        if num_media < needed:
            told = f"{sample.id}: its {num_media} media tokens cannot say its {len(words_K)} words, which need {needed}"
            raise SampleTooLong(
                f"{told}; train it by `objective: answers`, give its media more tokens, or leave such samples out by "
                "`too_long: skip`"
            )
        return words_K


def _first_tokens(tokenizer: PreTrainedTokenizerBase, count: int, where: str) -> Tokenizer:
    """A tokenizer with the ids and merges of another's first tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole: dict[str, Any] = {"model": {"type": "none"}} if backend is None else json.loads(backend.to_str())
    model = whole["model"]
    if model["type"] != "BPE":
        told = f"{where}: the first tokens spell words by byte pair encoding alone, and this tokenizer is"
        raise ConfigError(f"{told} {model['type']}; leave it out")
    letters = max(model["vocab"][token] for token in model["vocab"] if len(token) == 1)
    if not letters < count <= len(model["vocab"]):
        raise ConfigError(f"{where}: is above {letters}, the letters, and at most {len(model['vocab'])}, got {count}")
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < count}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(whole))
