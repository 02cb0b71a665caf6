"""Samples of a recipe as the model sees them, in one page that opens offline."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from molora.data.messages import media_parts
from molora.data.processor import Processor
from molora.data.sources import Source, open_source
from molora.data_tools.drawing import curve, decoded, drawn, mapped
from molora.data_tools.opening import Named, open_processor, place_of, sources_of
from molora.evaluate.judge import question
from molora.pack import Sample
from molora.report.page import embedded
from molora.routing import Router
from molora.storage import write_text
from molora.terminal import progress
from molora.train.recipe import Recipe

# Text that no reader of a page needs in full, in tokens of one kind that stand together.
_MAX_TOKENS_SHOWN = 2000


def write_page(recipe: Recipe, path: Path, *, rows: int = 4, trust: Sequence[str] = (), show: bool = True) -> None:
    """Writes a page with `rows` rows of each source of a recipe, from its first to its last. A row that cannot be a
    sample is shown with its error. Raises ConfigError, ValueError or OSError for a recipe that cannot be opened."""
    opened = [(named, open_source(named.config, named.key)) for named in sources_of(recipe)]
    opened.sort(key=lambda pair: pair[0].stage is None)  # what trains comes first
    processor, router = open_processor(recipe, trust)
    sections = []
    with progress(shown=show) as bars:
        for named, source in opened:
            chosen = _spread(len(source), rows)
            bar = bars.add_task(named.key, total=len(chosen), note="")
            cards = []
            for row in chosen:
                cards.append(_card(named, source, row, processor, router))
                bars.advance(bar)
            about = named.stage.name if named.stage else f"at most {named.evaluation.max_new_tokens} tokens of answer"  # pyright: ignore[reportOptionalMemberAccess]
            sections.append({"key": named.key, "about": about, "num_rows": len(source), "cards": cards})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(Path(__file__).with_name("show.html.j2").read_text(encoding="utf-8"))
    names = list(processor.modalities)
    write_text(path, template.render(run=recipe.run, sections=sections, modalities=names))


def _spread(length: int, count: int) -> list[int]:
    """Rows from the first to the last, evenly, none twice."""
    if count == 1:
        return list(range(min(length, 1)))
    return list(dict.fromkeys(round(index * (length - 1) / (count - 1)) for index in range(count))) if length else []


def _card(named: Named, source: Source, row: int, processor: Processor, router: Router) -> dict[str, Any]:
    """What the page says of a row."""
    card: dict[str, Any] = {"where": place_of(source, row, named.key), "error": None, "id": "", "expected": None}
    try:
        if named.evaluation is not None:
            asked = question(source, row, named.evaluation.without_media)
            messages, card["expected"] = asked["prompt"], asked["expected"]
            card["id"] = asked["id"]
        else:
            example = source[row]
            messages, card["id"] = example["messages"], str(example["id"])
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
    """Tokens that stand together and are of one kind: media of one item, or text that is learned or is not. Text comes
    in pieces, of a token each, or of several that make a character together."""
    names = ["", *processor.modalities]
    special = set(processor.tokenizer.all_special_ids) | {
        id for id, token in processor.tokenizer.added_tokens_decoder.items() if token.special
    }
    places = list(zip(sample.modality_ids_T.tolist(), sample.targets_T.tolist(), strict=True))
    start = 0
    for (modality, is_learned), run in groupby(places):
        stop = start + len(list(run))
        span = {"modality": names[modality], "index": modality - 1, "learned": is_learned, "count": stop - start}
        if not modality:
            ids = sample.token_ids_T[start:stop].tolist()
            span["cut"] = max(0, len(ids) - _MAX_TOKENS_SHOWN)
            span["pieces"] = list(_pieces(ids[:_MAX_TOKENS_SHOWN], special, processor))
        yield span
        start = stop


def _pieces(ids: Sequence[int], special: set[int], processor: Processor) -> Iterator[dict[str, Any]]:
    held: list[int] = []
    for place, id in enumerate(ids):
        held.append(id)
        text: Any = processor.tokenizer.decode(held, clean_up_tokenization_spaces=False)
        # Bytes of a character that the next tokens complete.
        if text.endswith("\ufffd") and len(held) < 4 and place + 1 < len(ids) and ids[place + 1] not in special:
            continue
        yield {"text": text, "special": len(held) == 1 and id in special, "ids": " ".join(map(str, held))}
        held = []
