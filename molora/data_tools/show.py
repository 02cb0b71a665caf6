"""Samples of a recipe as the model sees them, in one page that opens offline."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from molora.data.messages import media_parts
from molora.data.processor import Processor
from molora.data.sources import Source, open_source, rows_at_hand
from molora.data_tools.drawing import curve, decoded, drawn, mapped
from molora.data_tools.opening import Named, asked_by, open_processor, place_of, sources_of
from molora.pack import Sample
from molora.report.page import embedded, filled
from molora.routing import Router
from molora.storage import write_atomically
from molora.terminal import progress
from molora.train.recipe import Recipe

# Text that no reader of a page needs in full, in tokens of one kind that stand together.
_MAX_TOKENS_SHOWN = 2000

# A character of UTF-8 has four bytes at most, and a token one at least.
_MAX_TOKENS_OF_CHARACTER = 4


def write_page(recipe: Recipe, path: Path, *, rows: int = 4, trust: Sequence[str] = (), show: bool = True) -> None:
    """Writes a page with `rows` rows of each source of a recipe, from its first to its last. A row that cannot be a
    sample is shown with its error. Raises ConfigError, ValueError or OSError for a recipe that cannot be opened."""
    opened = [(named, open_source(named.config, named.key)) for named in sources_of(recipe)]
    opened.sort(key=lambda pair: pair[0].stage is None)  # what trains comes first
    processor, router = open_processor(recipe, trust)
    chosen = [_spread(len(rows_at_hand(source)), rows) for _, source in opened]
    with progress(shown=show) as bars:
        tasks = [
            bars.add_task(named.key, total=len(each), note="") for (named, _), each in zip(opened, chosen, strict=True)
        ]

        def cards(number: int) -> Iterator[dict[str, Any]]:
            for row in chosen[number]:
                yield _card(*opened[number], row, processor, router)
                bars.advance(tasks[number])

        sections = [
            {
                "key": named.key,
                "about": named.stage.name
                if named.stage
                else f"at most {named.evaluation.max_new_tokens} tokens of answer",  # pyright: ignore[reportOptionalMemberAccess]
                "num_rows": len(source),
                "num_cards": len(chosen[number]),
                "cards": cards(number),
            }
            for number, (named, source) in enumerate(opened)
        ]
        template = Path(__file__).with_name("show.html.j2")
        pieces = filled(template, run=recipe.run, sections=sections, modalities=list(processor.modalities))

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines(pieces)

        write_atomically(path, write)


def _spread(length: int, count: int) -> list[int]:
    """Rows from the first to the last, evenly, none twice."""
    if count == 1:
        return list(range(min(length, 1)))
    return list(dict.fromkeys(round(index * (length - 1) / (count - 1)) for index in range(count))) if length else []


def _card(named: Named, source: Source, row: int, processor: Processor, router: Router) -> dict[str, Any]:
    """What the page says of a row."""
    card: dict[str, Any] = {"where": place_of(source, row, named.key), "error": None, "id": "", "expected": None}
    try:
        example = source[row]
        messages, card["id"] = example["messages"], str(example["id"])
        if named.evaluation is not None:
            messages, card["expected"] = asked_by(named.evaluation, source, row)
        sample = processor.encode(messages, card["id"], generate=named.evaluation is not None)
        media = list(_media(messages, sample, processor))
    except ImportError:
        raise
    except Exception as error:  # a plugin's source can fail in any way
        return {**card, "error": str(error)}
    limit = processor.max_tokens if named.stage is None else min(named.stage.tokens_per_pack, processor.max_tokens)
    return {
        **card,
        "media": media,
        "spans": list(_spans(sample, processor)),
        "adapters": sorted(router.adapters(sample.modalities)),
        "num_tokens": len(sample),
        "num_media_tokens": int((sample.modality_ids_T > 0).sum()),
        "num_targets": sample.num_targets,
        "limit": limit,
    }


def _media(messages: Any, sample: Sample, processor: Processor) -> Iterator[dict[str, Any]]:
    """Every medium as it was decoded and as it was prepared."""
    for (place, part), item in zip(media_parts(messages), sample.items, strict=True):
        modality = processor.modalities[item.modality]
        with processor.media_policy.in_force():
            loaded = modality.load(part)
        rate_hz = getattr(modality, "sampling_rate_hz", None)
        tensors = item.prepared.tensors.items()
        shapes = [f"{name}, {tuple(tensor.shape)} of {str(tensor.dtype)[6:]}" for name, tensor in tensors]
        yield {
            "place": place,
            "modality": item.modality,
            "index": list(processor.modalities).index(item.modality),
            "projector": item.projector,
            "num_tokens": item.prepared.num_tokens,
            "decoded": [embedded(each) for each in decoded(loaded, rate_hz)],
            "curve": curve(loaded),
            "pictures": [embedded(each) for name, tensor in tensors for each in drawn(name, tensor)],
            "maps": [embedded(each) for name, tensor in tensors for each in mapped(name, tensor)],
            "shapes": shapes,
        }


def _spans(sample: Sample, processor: Processor) -> Iterator[dict[str, Any]]:
    """Tokens that stand together and are of one kind: media of one item, or text that is learned or is not."""
    names = ["", *processor.modalities]
    special = {id for id, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    places = list(zip(sample.modality_ids_T.tolist(), sample.targets_T.tolist(), strict=True))
    start = 0
    for (modality, is_learned), run in groupby(places):
        stop = start + len(list(run))
        span = {"modality": names[modality], "index": modality - 1, "learned": is_learned, "count": stop - start}
        if not modality:
            shown = min(stop, start + _MAX_TOKENS_SHOWN)
            ids = sample.token_ids_T[:shown].tolist()
            span["pieces"] = [
                {"text": text, "ids": " ".join(map(str, some)), "special": some[0] in special}
                for text, some in pieces(ids, start, processor.tokenizer)
            ]
            span["cut"] = stop - shown
        yield span
        start = stop


def pieces(ids: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """The text of each token from `start` on, and its id; of several tokens where they make a character together. A
    token is read behind the one before it, as some tokenizers take the space away that a text begins with."""
    first = start
    for stop in range(start + 1, len(ids) + 1):
        before = str(tokenizer.decode(ids[max(0, first - 1) : first]))
        text = str(tokenizer.decode(ids[max(0, first - 1) : stop])).removeprefix(before)
        is_cut = text.endswith("\ufffd") and stop - first < _MAX_TOKENS_OF_CHARACTER and stop < len(ids)
        if not is_cut:
            yield text, ids[first:stop]
            first = stop
