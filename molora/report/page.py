"""The report of a run: `report.html`, one file that opens offline, and `report.json` with the same figures."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from molora.storage import write_text

FORMAT_VERSION = "1.0"


@dataclass(frozen=True)
class Media:
    """One picture or recording as it is shown: the bytes of its file, their MIME type, and words to go below it."""

    data: bytes
    mime: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One answered question and the adapters that ran for it, none for the bare backbone."""

    question: str
    expected: str
    answer: str
    correct: bool
    adapters: tuple[str, ...] = ()
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report says. A metric that is an int is shown as a count, a float as a measure. `metrics` maps a condition
    ("with the picture") to its measures ("exact match") and their values; `goals` maps (condition, measure) to the
    least value wanted; `history` are the rows of a run's metrics.jsonl."""

    title: str
    summary: str
    metrics: Mapping[str, Mapping[str, float]]
    goals: Mapping[tuple[str, str], float] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    history: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a number that is not finite becomes None, which JSON can say and plots leave out.
    Raises ValueError naming the file and line that is not a row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line, parse_constant=lambda _: None)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
            raise ValueError(f"{path}, line {number}: expected an object with stage and step, found {line:.80}")
        rows.append(row)
    return rows


def write(report: Report, folder: Path) -> Path:
    """Writes report.json and report.html into `folder`; returns the path of the latter. Raises ValueError for a goal
    without its metric, a metric that is not finite and media that cannot be shown, and ImportError if there is a
    history but no matplotlib to plot it."""
    figures = _figures(report)
    html = fill(
        "report.html.j2",
        **figures,
        table=_table(figures),
        pictures=[[embedded(medium) for medium in example.media] for example in report.examples],
        panels=_panels(report.history),
        stages=_stages(report.history),
    )
    write_text(folder / "report.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "report.html", html)
    return folder / "report.html"


def fill(name: str | Path, **values: Any) -> str:
    """A template, of this folder unless its path says otherwise, filled in; all of them have one style."""
    return "".join(filled(name, **values))


def filled(name: str | Path, **values: Any) -> Iterator[str]:
    """The same in pieces, so that what is taken from an iterator need not be in memory at once."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = _number
    here = Path(__file__).parent
    template, style = ((here / file).read_text(encoding="utf-8") for file in (name, "style.css.j2"))
    return environment.from_string(template).generate(values, style=style)


def _figures(report: Report) -> dict[str, Any]:
    """The content of report.json, which the page is made from too. Media are told by the SHA-256 of their bytes."""
    goals = []
    for (condition, measure), minimum in report.goals.items():
        if measure not in report.metrics.get(condition, {}):
            raise ValueError(
                f"goals: no metric {measure!r} of {condition!r}; there are "
                f"{[(condition, measure) for condition, row in report.metrics.items() for measure in row]}"
            )
        value = report.metrics[condition][measure]
        met = value >= minimum
        goals.append({"condition": condition, "measure": measure, "minimum": minimum, "value": value, "met": met})
    examples = []
    for example in report.examples:
        media = [
            {"mime": medium.mime, "sha256": hashlib.sha256(medium.data).hexdigest(), "caption": medium.caption}
            for medium in example.media
        ]
        examples.append({**asdict(example), "media": media})
    return {
        "format_version": FORMAT_VERSION,
        "title": report.title,
        "summary": report.summary,
        "metrics": {condition: dict(measures) for condition, measures in report.metrics.items()},
        "goals": goals,
        "examples": examples,
        "facts": dict(report.facts),
        "history": [dict(row) for row in report.history],
    }


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) >= 0.001 else f"{value:.3g}"


def _table(figures: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """A row for each measure with a cell for each condition, None where a condition lacks the measure."""
    metrics = figures["metrics"]
    goals = {(goal["condition"], goal["measure"]): goal for goal in figures["goals"]}

    def cell(condition: str, measure: str) -> dict[str, Any] | None:
        value = metrics[condition].get(measure)
        share = isinstance(value, float) and 0 <= value <= 1
        return None if value is None else {"value": value, "share": share, "goal": goals.get((condition, measure))}

    measures = dict.fromkeys(measure for row in metrics.values() for measure in row)
    return [(measure, [cell(condition, measure) for condition in metrics]) for measure in measures]


def embedded(medium: Media) -> dict[str, Any]:
    """What the page needs to show a medium; small pictures are enlarged pixel by pixel, to stay crisp."""
    kind = medium.mime.partition("/")[0]
    if kind not in ("image", "audio"):
        raise ValueError(f"a report shows image/… and audio/…, not {medium.mime!r}")
    shown = {
        "kind": kind,
        "source": f"data:{medium.mime};base64,{base64.b64encode(medium.data).decode()}",
        "caption": medium.caption,
    }
    if kind == "image":
        with Image.open(io.BytesIO(medium.data)) as image:
            width, height = image.size
        shown |= {"width": width, "height": height, "small": max(width, height) <= 160}
    return shown


class _Kind(NamedTuple):
    """A kind of plot and the metrics it shows, named by the groups of the pattern. Noisy curves are smoothed, and
    logarithmic where they span a decade; shares go from 0 to 1."""

    title: str
    pattern: str
    curve: Literal["noisy", "share", "plain"]


_KINDS = (
    _Kind("Loss", "loss/(.+)", "noisy"),
    _Kind("Exact match", "(.+)/exact_match(/.+)?", "share"),
    _Kind("Gradient norm, before clipping", "gradient_norm/(.+)", "noisy"),
    _Kind("Learning rate", "learning_rate/(.+)", "plain"),
    _Kind("Weight of an adapter, as routed", "routing/(.+)", "plain"),
)

# Curves differ in colour and in dash. The drawing has stand-ins for the colours, which the page then names, so that the
# reader's light or dark scheme decides them.
_COLOURS = 6
_DASHES = ("", "5 2", "1.5 1.5", "7 2 1.5 2")
_INK, _LINE, _SERIES = "#fe0000", "#fe0001", tuple(f"#fe01{index:02x}" for index in range(_COLOURS))

# 1/72 inch, so that text of 10 is legible when a phone shows the plot at its full width.
_WIDTH, _HEIGHT = 374, 224

# A run of fewer points is drawn as it is.
_SMOOTHED_POINTS = 40


class _Point(NamedTuple):
    stage: int
    step: int
    value: float


def _stages(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Each stage of a history with its first and last step."""
    stages = [(str(name), [row["step"] for row in rows]) for name, rows in groupby(history, lambda row: row["stage"])]
    return [(name, min(steps), max(steps)) for name, steps in stages]


def _series(history: Sequence[Mapping[str, Any]], pattern: str) -> dict[str, list[_Point]]:
    """The metrics that a pattern fits, by their short names, as points in the order of the steps."""
    series: dict[str, list[_Point]] = {}
    for stage, (_, rows) in enumerate(groupby(history, lambda row: row["stage"])):
        for row in rows:
            for key, value in row.items():
                if (match := re.fullmatch(pattern, key)) and isinstance(value, (int, float)):
                    label = "".join(group or "" for group in match.groups())
                    series.setdefault(label, []).append(_Point(stage, row["step"], value))
    return series


def _panels(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each kind of plot that has something to show: its title, SVG and legend."""
    panels = []
    for kind in _KINDS:
        if series := _series(history, kind.pattern):
            legend = [
                {"label": label, "colour": i % _COLOURS, "dash": _DASHES[i % len(_DASHES)], "last": points[-1].value}
                for i, (label, points) in enumerate(series.items())
            ]
            panels.append({"title": kind.title, "svg": _draw(kind, series, _stages(history)), "legend": legend})
    return panels


def _draw(kind: _Kind, series: Mapping[str, Sequence[_Point]], stages: Sequence[tuple[str, int, int]]) -> str:
    """The curves of one plot over the steps, with the stages marked, as an SVG element to put into a page."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
    except ImportError as error:
        raise ImportError("the plots of a report need matplotlib: pip install 'molora[demo]'") from error

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "molora",
        "lines.scale_dashes": False,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _LINE),
        **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), _INK),
    }
    with style.context(settings, after_reset=True):
        figure = Figure((_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_visible(False)
        figure.patch.set_visible(False)
        axes.grid(axis="y", linewidth=0.6)
        for index, points in enumerate(series.values()):
            colour, dash = _SERIES[index % _COLOURS], _DASHES[index % len(_DASHES)]
            line = {"color": colour, "linewidth": 1.8, "linestyle": (0, [float(n) for n in dash.split()] or None)}
            # A stage has its own data, so a noisy curve begins anew with it.
            for _, run in groupby(points, lambda point: point.stage if kind.curve == "noisy" else 0):
                _, steps, values = zip(*run, strict=True)
                if kind.curve == "noisy" and len(values) >= _SMOOTHED_POINTS:
                    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
                    axes.plot(steps, _smoothed(values), **line)
                else:
                    marker = "o" if kind.curve == "share" or len(values) == 1 else ""
                    axes.plot(steps, values, **line, marker=marker, markersize=4)

        values = [point.value for points in series.values() for point in points if point.value > 0]
        if kind.curve == "share":
            axes.set_ylim(-0.03, 1.03)
        elif kind.curve == "noisy" and values and max(values) > 10 * min(values):
            axes.set_yscale("log")
            decades = np.log10(max(values) / min(values))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)))
            axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("step")

        _mark(axes, stages)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _for_page(buffer.getvalue(), kind.title)


def _mark(axes: Any, stages: Sequence[tuple[str, int, int]]) -> None:
    """Makes the steps of all stages the width of a plot; of several, draws the boundaries and names each above it."""
    first, last = stages[0][1], stages[-1][2]
    margin = max(1, 0.02 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    if len(stages) == 1:
        return
    for _, _, end in stages[:-1]:
        axes.axvline(end, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    for number, (name, begin, end) in enumerate(stages, start=1):
        # A name that is too long gives way to the number that it has in the page's list of stages.
        room = 0.85 * _WIDTH * (end - begin) / (last - first + 2 * margin)
        label = name if 6 * len(name) < room else str(number)
        above = {"transform": axes.get_xaxis_transform(), "ha": "center", "fontsize": 9, "parse_math": False}
        axes.text((begin + end) / 2, 1.03, label, **above)


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean over a twentieth of the points around each, of fewer at the ends."""
    count, reach = len(values), len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(count) - reach, 0), np.minimum(np.arange(count) + reach + 1, count)
    return (sums[high] - sums[low]) / (high - low)


def _for_page(svg: str, title: str) -> str:
    """A drawing of matplotlib's as an element of a page: colours by name, ids that no other drawing has."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", title.lower())
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace(_INK, "var(--muted)").replace(_LINE, "var(--line)")
    for index, colour in enumerate(_SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
