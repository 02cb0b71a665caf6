"""What can be wrong with the data of a recipe, in kinds, each with what to do about it."""

from dataclasses import dataclass
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of fault: what it is called, what to do about it, and whether it would stop or spoil training."""

    title: str
    remedy: str
    is_error: bool = True


KINDS = {
    "source": Kind("sources that do not open", "mend what the message names, and check again"),
    "unreadable": Kind("rows that cannot be read", "mend the row as its message says, or take it out of the file"),
    "media": Kind(
        "media that cannot be used",
        "mend the file or its path as the message says; a stage with `unusable: skip` leaves such rows out",
    ),
    "url": Kind(
        "media behind URLs",
        "download them and give their paths, or write `allow_urls: true` at the top of the recipe",
    ),
    "part": Kind(
        "parts that no modality answers to",
        "add the modality to the recipe, or correct the part's `type`",
    ),
    "rule": Kind(
        "sets of modalities without a rule",
        "write a rule for the set under router.options.rules, or take these rows out",
    ),
    "roles": Kind(
        "turns in a wrong order",
        "begin with a user turn (a system message may stand before it), alternate, and end with the assistant's answer",
    ),
    "refused": Kind("conversations that the model cannot take", "mend the row as its message says, or take it out"),
    "too long": Kind(
        "samples that are too long",
        "shorten them, raise tokens_per_pack up to the backbone's context, or leave them out with `too_long: skip`",
    ),
    "empty answer": Kind("empty answers", "fill the answer in, or take the row out"),
    "empty prompt": Kind("empty prompts", "fill in what the user asks, or take the row out"),
    "nothing learned": Kind(
        "rows of which nothing is learned",
        "take `train: false` from the answer that the row is there for, or take the row out",
    ),
    "marker": Kind(
        "markers without a medium",
        "give the row a media column with one medium for each marker, or write a media part instead of the marker",
    ),
    "leak": Kind(
        "training rows that an evaluation asks",
        "take them out of one of the two; otherwise the evaluation measures what was learned by heart",
    ),
    "long answer": Kind(
        "expected answers longer than an answer may be",
        "raise max_new_tokens of the evaluation; no answer can be right before",
    ),
    "choices": Kind("choices that do not fit the answer", "correct `choice`, `choices` or the answer of the row"),
    "same answer": Kind(
        "sources with one answer for every row",
        "check the column or template of the answer; from these rows a model learns to ignore what it is asked",
    ),
    "same prompt": Kind(
        "sources that ask the same in most rows, without a medium",
        "check the column or template of the prompt, unless rows are meant to differ in their answers alone",
        False,
    ),
    "shared media": Kind(
        "training media that an evaluation shows with another question",
        "split by medium, not by question, where the evaluation is to measure new media",
        False,
    ),
    "repeated id": Kind(
        "ids that stand twice in a source",
        "give each row an id of its own; rows with one id have the same augmentation and cannot be told apart in logs",
        False,
    ),
    "repeated row": Kind("rows that stand twice in a source", "take the copies out, if they are not meant", False),
    "contradiction": Kind(
        "rows that ask the same and expect another answer",
        "keep the right one; where several answers are right, give them together",
        False,
    ),
    "special token": Kind(
        "texts that spell special tokens",
        "take the tokens out: they stay text, and mean nothing; was a chat template applied to the data already?",
        False,
    ),
    "encoding": Kind(
        "texts that were decoded wrongly",
        "read the original file again with its right encoding, and write it as UTF-8",
        False,
    ),
    "silent": Kind("clips without a sound", "check the recording, or take the row out", False),
    "clipped": Kind("clips that were recorded too loud", "record or convert them at a lower level", False),
    "tiny": Kind("tiny pictures", "give the picture itself and not its thumbnail, or take the row out", False),
    "one colour": Kind("pictures of one colour", "check the picture: nothing is on it; or take the row out", False),
    "context": Kind(
        "prompts that leave no room for a whole answer",
        "shorten the prompts or lower max_new_tokens; answers end where the backbone's context does",
        False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of one row, or of a source where `row` is None. `source` is its key in the recipe; `row` counts from 1;
    `where` names file and row as the source does; `is_error`: it would stop or spoil training."""

    kind: str
    source: str
    where: str
    what: str
    row: int | None = None
    id: str | None = None
    is_error: bool = True

    @property
    def remedy(self) -> str:
        return KINDS[self.kind].remedy
