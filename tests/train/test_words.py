"""What samples of a stage of words say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from molora.config import ConfigError
from molora.data.processor import SampleTooLong
from molora.pack import Sample
from molora.train.words import Words

TEXT = ["the ringing bells that were heard there", "a bell rang there and then", "that then this"] * 3


def learned(size: int) -> Any:
    """A byte pair encoding of `size` tokens, learned from TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def said(tokenizer: Any, text: str, num_media: int = 90) -> Sample:
    ids = [*[5] * num_media, *tokenizer.encode(text), tokenizer.eos_token_id]
    at = torch.arange(len(ids))
    return Sample("a", torch.tensor(ids), (at < num_media).long(), at >= num_media)


def test_answers_are_spelled_as_a_smaller_encoding_would_have_spelled_them() -> None:
    large, small = learned(285), learned(270)
    words = Words(large, {large.eos_token_id}, 270, "vocabulary")
    for text in [*TEXT[:3], "nothing of this was there"]:
        assert words.of(said(large, text)).tolist() == small.encode(text)
    whole = Words(large, {large.eos_token_id}, None, "vocabulary").of(said(large, TEXT[0]))
    assert whole.tolist() == large.encode(TEXT[0]) and len(whole) < len(small.encode(TEXT[0]))


def test_media_that_cannot_say_all_words_are_refused() -> None:
    tokenizer = learned(285)
    words = Words(tokenizer, {tokenizer.eos_token_id}, None, "vocabulary")
    sample = said(tokenizer, "bb", num_media=3)
    assert len(words.of(sample)) == 2
    short = replace(sample, modality_ids_T=torch.tensor([1, 1, *[0] * (len(sample) - 2)]))
    with pytest.raises(SampleTooLong, match="a: its 2 media tokens cannot say its 2 words, which need 3; train it by"):
        words.of(short)


@pytest.mark.parametrize("count", [0, 256, 286])
def test_a_vocabulary_has_all_letters_and_no_more_than_there_is(count: int) -> None:
    with pytest.raises(ConfigError, match=f"stages.0.vocabulary: is above 256, .* at most 285, got {count}"):
        Words(learned(285), set(), count, "stages.0.vocabulary")


def test_only_byte_pair_encodings_have_first_tokens() -> None:
    whole = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ConfigError, match="by byte pair encoding alone, and this tokenizer is WordLevel; leave it out"):
        Words(PreTrainedTokenizerFast(tokenizer_object=whole), set(), 1, "stages.0.vocabulary")
