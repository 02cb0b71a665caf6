"""The page of an evaluation: every question with its answer, errors first, to look at and to search."""

import base64
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from molora.data.messages import parts
from molora.evaluate.blind import told
from molora.evaluate.compare import Comparison
from molora.evaluate.kept_media import FOLDER as MEDIA
from molora.evaluate.kept_media import known_type
from molora.evaluate.metrics import Judged, numbers_of
from molora.evaluate.results import Place, Result, shown, told_ends
from molora.report.page import fill
from molora.storage import write_text
from molora.terminal import say

# What a page holds of media itself, errors first; what comes after is shown from its file.
EMBEDDED_BYTES = 24 * 2**20
# From this score of one answer on it counts as right.
_RIGHT = 0.5
_ORDER = ("failed", "wrong", "right")


def write_pages(results: Sequence[Result], place: Place, comparisons: Sequence[Comparison] = ()) -> None:
    """Writes the page of each evaluation beside its answers, with what it is compared with, and says where."""
    folder = place.folder
    if folder is None:
        return
    compared = {comparison.name: comparison for comparison in comparisons}
    for result in results:
        path = folder / f"{result.name}.html"
        write_text(path, page(result, place.told, folder, compared.get(result.name)))
        say(f"answers to look at: {path}")


def page(
    result: Result,
    model: str,
    folder: Path,
    comparison: Comparison | None = None,
    *,
    embedded_bytes: int = EMBEDDED_BYTES,
) -> str:
    """The page of an evaluation, as it lies in `folder`, with the answers of another model beside. Media of up to
    `embedded_bytes` in all are part of it."""
    media = _Media(folder, embedded_bytes)
    rated = [_rated(item, result) for item in result.judged]
    verdicts = [_verdict(item, each) for item, each in zip(result.judged, rated, strict=True)]
    others = {} if comparison is None else {item.id: _other(item, result) for item in comparison.answers}
    order = sorted(range(len(verdicts)), key=lambda index: _ORDER.index(verdicts[index]))
    rows = [
        _row(result.judged[index], media)
        | {"verdict": verdicts[index], "scores": rated[index], "other": others.get(result.judged[index].id)}
        for index in order
    ]
    return fill(
        "answers.html.j2",
        title=result.name,
        summary=_summary(result, model),
        metrics=list(dict.fromkeys(metric for metric, *_ in _cells(result))),
        table={
            tag: {metric: cell for metric, where, *cell in _cells(result) if where == tag}
            for tag in dict.fromkeys(tag for _, tag, *_ in _cells(result))
        },
        comparison=comparison and {"other": str(comparison.other), "rows": [*_differences(comparison)]},
        # Nothing that a row says can end the element that holds the data.
        data=json.dumps({"rows": rows, "media": media.table}).replace("<", "\\u003c"),
    )


def _summary(result: Result, model: str) -> str:
    asked_with = told(result.config.asked_with[0])
    summary = f"{model}. Answers have at most {result.config.max_new_tokens} tokens."
    if asked_with != "as is":
        summary += f" Media of the questions: {asked_with}."
    failed, cut_off = int(result.scores["failed"]), int(result.scores["cut_off"])
    return f"{summary} {failed:,} questions failed and are in no score; {cut_off:,} answers were cut off."


def _cells(result: Result) -> Iterator[tuple[str, str, str, str]]:
    """Every score with its metric and tag, which is empty for all questions, as text, and with its interval."""
    for name, value in result.scores.items():
        metric, _, tag = name.partition("/")
        if name not in ("failed", "cut_off"):
            yield metric, tag, shown(name, value), told_ends(result.intervals.get(name))


def _differences(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """Every metric with its score here and there, the difference, and its interval."""
    for metric, (value, *ends) in comparison.differences.items():
        here, there = (shown(metric, scores[metric]) for scores in (comparison.here, comparison.there))
        yield metric, here, there, f"{value:+.4f}", told_ends(ends)


def _other(item: Judged, result: Result) -> dict[str, Any]:
    """The answer of another model to a question."""
    return {"verdict": _verdict(item, _rated(item, result)), "answer": item.answer, "error": item.error}


def _rated(item: Judged, result: Result) -> dict[str, float]:
    """What an answer gets by itself from the metrics that rate each."""
    rating = [metric for metric in result.metrics if getattr(metric, "rates_each", False) and item.error is None]
    return {name: value for metric in rating for name, value in numbers_of(metric, [item]).items()}


def _verdict(item: Judged, rated: Mapping[str, float]) -> str:
    """By the first metric that rates each answer; by whether the answer equals an accepted one if none does."""
    if item.error is not None:
        return "failed"
    return "right" if next(iter(rated.values()), float(item.correct)) >= _RIGHT else "wrong"


def _row(item: Judged, media: "_Media") -> dict[str, Any]:
    """A question and its answer as the page reads them; a medium is its place in the table of media."""
    turns = [
        {
            "role": message["role"],
            "parts": [part["text"] if part["type"] == "text" else media.add(part) for part in parts(message)],
        }
        for message in item.messages
    ]
    names = ("answer", "tags", "error", "choices", "choice", "cut_off", "adapters")
    facts = {name: getattr(item, name) for name in names}
    return {"row": item.row + 1, "turns": turns, "accepted": item.answers or [item.expected], **facts}


class _Media:
    """The media of a page, each once: the content of a file while there is room, and then a link to the file."""

    def __init__(self, folder: Path, embedded_bytes: int) -> None:
        self.table: list[dict[str, str]] = []
        self._folder = folder.absolute()
        self._left = embedded_bytes
        self._places: dict[str, int] = {}

    def add(self, part: Mapping[str, Any]) -> int:
        """The place of a part's medium in the table."""
        key = json.dumps(part, sort_keys=True, default=repr)
        if key not in self._places:
            self._places[key] = len(self.table)
            self.table.append(self._shown(part))
        return self._places[key]

    def _shown(self, part: Mapping[str, Any]) -> dict[str, str]:
        """A medium as the page has it: its kind, where it comes from, and words for what cannot be shown."""
        path = part.get("path")
        if not isinstance(path, str):
            others = {key: value for key, value in part.items() if key != "type"}
            return {"kind": "words", "source": "", "words": f"{part['type']}: {json.dumps(others, default=repr):.300}"}
        file = Path(path)
        try:
            with open(file, "rb") as opened:
                beginning, size = opened.read(16), os.fstat(opened.fileno()).st_size
        except OSError as error:
            return {"kind": "words", "source": "", "words": f"{part['type']}: {path}: {error.strerror}"}
        known = known_type(beginning)
        if known is None:
            return {"kind": "words", "source": self._link(file), "words": f"{part['type']}: {file.name}"}
        kind = known[1].partition("/")[0]
        if size > self._left:
            return {"kind": kind, "source": self._link(file), "words": file.name}
        self._left -= size
        data = base64.b64encode(file.read_bytes()).decode()
        return {"kind": kind, "source": f"data:{known[1]};base64,{data}", "words": file.name}

    def _link(self, file: Path) -> str:
        """From the page to a file: relative to one that is kept with the answers, so that all can be moved."""
        file = Path(os.path.normpath(file.absolute()))
        if any(file.is_relative_to(home) for home in (self._folder, self._folder.parent / MEDIA)):
            return quote(os.path.relpath(file, self._folder))
        return file.as_uri()
