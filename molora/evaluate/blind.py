"""Questions asked without what they are about, to see what the text and the adapter give away by themselves."""

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from molora.config import ConfigError, did_you_mean
from molora.data.messages import media_parts, parts
from molora.data.sources import Source
from molora.inference.load import LoadedModel
from molora.modality import HasBlank, Modality
from molora.seeding import seed_of

# What becomes of a medium: it stays, goes, loses its content but not its size, or gives way to another question's.
TREATMENTS = ("as is", "none", "blank", "shuffled")
# One treatment for all media, or one for each part type; parts of other types stay as they are.
Media = str | dict[str, str]

# Rows in which another medium is looked for; many questions in a row may be about the same picture.
_TRIED_ROWS = 64


def check_media(media: Media) -> None:
    """Raises ConfigError for a treatment that there is not, and for one of text, which stays."""
    for word in media.values() if isinstance(media, dict) else [media]:
        if word not in TREATMENTS:
            raise ConfigError(f"media: {word!r:.80} is none of {', '.join(TREATMENTS)}")
    if isinstance(media, dict) and "text" in media:
        raise ConfigError("media: text stays as it is; name the part types of media, as {image: blank}")
    if not media:
        raise ConfigError("media: names no part type; write {image: blank}, or one word for all")


def treatment(media: Media, part_type: str) -> str:
    return media if isinstance(media, str) else media.get(part_type, "as is")


def took_place(media: Media, asked: Iterable[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether any of the questions has a medium that is blank or another's, where that is what becomes of some. Media
    that go leave nothing to tell it by."""
    changing = {"blank", "shuffled"}
    if not changing & set(media.values() if isinstance(media, dict) else [media]):
        return True
    return any(treatment(media, part["type"]) in changing for prompt in asked for _, part in media_parts(prompt))


def told(media: Media) -> str:
    """A treatment in a few words, as in names of results: "none", "image blank"."""
    return media if isinstance(media, str) else ", ".join(f"{kind} {word}" for kind, word in sorted(media.items()))


def treated(prompt: Sequence[Mapping[str, Any]], source: Source, row: int, media: Media) -> list[Any]:
    """The messages that a row asks, with media left out or those of other rows in their places. What is blank is as it
    is here, and loses its content when it is decoded (see `blanking`). Raises ValueError where no other medium is
    found."""
    own = [part for _, part in media_parts(prompt)]

    def kept(message: Mapping[str, Any], place: int) -> Iterator[Any]:
        for index, part in enumerate(parts(message)):
            how = "as is" if part["type"] == "text" else treatment(media, part["type"])
            if how == "shuffled":
                yield _other_medium(part["type"], own, source, row, f"{place}.{index}")
            elif how != "none":
                yield part

    return [{**message, "content": list(kept(message, place))} for place, message in enumerate(prompt)]


def _other_medium(part_type: str, own: Sequence[Mapping[str, Any]], source: Source, row: int, place: str) -> Any:
    """A medium of another row, the same in every run, and none that the row has too."""
    draw = random.Random(seed_of("shuffled", row, place))
    for other in draw.sample(range(len(source)), min(len(source), _TRIED_ROWS)):
        try:
            there = [part for _, part in media_parts(source[other]["messages"]) if part["type"] == part_type]
        except Exception:  # told when that row is asked, and no fault of this one
            continue
        if found := [part for part in there if not any(_same(part, mine) for mine in own)]:
            return draw.choice(found)
    raise ValueError(
        f"evaluation row {row + 1}: media: shuffled needs another medium of type {part_type!r}, and "
        f"{min(len(source), _TRIED_ROWS)} rows have none but its own; give rows with other media, or another `media`"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two parts, or two values in them, are equal; arrays and pictures by what they hold."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    arrays = (np.ndarray, Tensor, Image.Image)
    if isinstance(one, arrays) and isinstance(other, arrays):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return type(one) is type(other) and one == other


class _Blanking:
    """A modality whose items are blank."""

    def __init__(self, modality: Any) -> None:
        self._modality = modality

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modality, name)

    def load(self, part: Mapping[str, Any]) -> Any:
        return self._modality.blank(self._modality.load(part))


def blanking(loaded: LoadedModel, media: Media, where: str) -> LoadedModel:
    """The model, or the same that is given blank items of every modality whose parts are to be blank. Raises
    ConfigError for a modality that has no blank item, and for a part type that no modality has."""
    part_types = sorted({modality.part_type for modality in loaded.processor.modalities.values()} - {"text"})
    for part_type in media if isinstance(media, dict) else ():
        if part_type not in part_types:
            known = f"its modalities have {', '.join(part_types) or 'none'}"
            ask = f"{did_you_mean(part_type, part_types)}name one of these, or leave it out"
            raise ConfigError(f"{where}: the model reads no {part_type!r:.80}, {known}; {ask}")
    modalities: dict[str, Modality] = {}
    for name, modality in loaded.processor.modalities.items():
        if treatment(media, modality.part_type) == "blank":
            if not isinstance(modality, HasBlank):
                raise ConfigError(
                    f"{where}: blank: modality {name!r} has no blank item; give its class a method `blank(item)` that "
                    f"returns an item of the same size that says nothing, or name the part types that are to be blank, "
                    f"such as {{image: blank}}, without {modality.part_type}"
                )
            modalities[name] = _Blanking(modality)  # type: ignore[assignment]
    if not modalities:
        return loaded
    blind = copy.copy(loaded)
    blind.processor = copy.copy(loaded.processor)
    blind.processor.modalities = {**loaded.processor.modalities, **modalities}
    return blind
