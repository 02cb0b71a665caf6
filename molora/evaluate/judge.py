"""Evaluation by generation: the model answers, the answers are compared."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import yaml
from rich.progress import Progress

from molora.config import require
from molora.data.messages import parts
from molora.data.sources import Source, SourceConfig, open_source, read_tags
from molora.evaluate.metrics import Judged, Named, open_metrics, scores
from molora.evaluate.metrics.choices import continuations
from molora.evaluate.normalise import exact_match
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import LoadedModel
from molora.pack import Sample
from molora.ranks import Ranks
from molora.terminal import progress, warn

_MAX_NAMED = 3
# What recipes had a key for before they named metrics in a list.
_OLD_KEYS = {"word_errors": "word_error_rate", "character_errors": "character_error_rate", "macro_f1": "macro_f1"}


@dataclass(kw_only=True)
class EvaluationConfig:
    """Questions to answer, `max_running_samples` at a time, each in `max_new_tokens` at most; an answer that is cut off
    there is counted and said. `without_media` leaves the media parts out, to see what the text alone gives away.
    `metrics` are what the answers are scored by: built-in ones, as exact_match or word_error_rate, or a plugin's, each
    by its name or, with options, as `{bleu: {tokeniser: zh}}`."""

    data: SourceConfig
    max_new_tokens: int = 16
    max_running_samples: int = 128
    without_media: bool = False
    metrics: list[Named] = field(default_factory=lambda: ["exact_match"])

    def __post_init__(self) -> None:
        require(self, 1, "max_new_tokens", "max_running_samples")

    @staticmethod
    def renewed(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The values of an older recipe as they are written now, with a line that says so."""
        metrics, old = values.get("metrics", ["exact_match"]), [key for key in (*_OLD_KEYS, "bleu") if key in values]
        if not old or not isinstance(metrics, list):
            return values
        used = [key for key in old if values[key] not in (False, None)]
        if any(values[key] is not True for key in used if key != "bleu"):
            return values  # the error names the key
        for key in used:
            named: Named = {"bleu": {"tokeniser": values[key]}} if key == "bleu" else _OLD_KEYS[key]
            metrics = metrics if named in metrics else [*metrics, named]
        if used:
            written = yaml.safe_dump(metrics, default_flow_style=True, width=10_000).strip()
            warn(f"{where}: {', '.join(used)}: recipes name metrics in a list now; write metrics: {written}")
        return {**{key: value for key, value in values.items() if key not in old}, "metrics": metrics}


@dataclass(kw_only=True)
class Evaluations:
    """What `molora eval` reads of a config, which may be a recipe."""

    evaluations: dict[str, EvaluationConfig]


class Evaluation:
    """An evaluation that is ready: its questions are open, and what its metrics need is there. Raises ConfigError for a
    source or a metric that cannot be opened, ImportError for what a metric needs."""

    def __init__(self, name: str, config: EvaluationConfig) -> None:
        self.name = name
        self.config = config
        self.metrics = open_metrics(config.metrics, f"evaluations.{name}.metrics")
        self.source = open_source(config.data, f"evaluations.{name}.data")

    def run(
        self,
        loaded: LoadedModel,
        bars: Progress | None = None,
        *,
        ranks: Ranks | None = None,
        strict: bool = False,
        before_each: Callable[[], None] = lambda: None,
    ) -> list[Judged]:
        """Answers this rank's share of the questions, in order, with a bar. The last assistant message of a row is the
        expected answer. A question that cannot be read, asked or answered is judged with its `error`; `strict` raises
        the first one's. `before_each` is called before an answer is counted."""
        share = range(len(self.source)) if ranks is None else range(ranks.index, len(self.source), ranks.count)
        bars = bars or progress(shown=False)
        bar = bars.add_task(self.name, total=len(share), note="")
        asked: dict[str, dict[str, Any]] = {}
        judged: dict[str, Judged] = {}
        needs_likelihoods = any(getattr(metric, "needs", None) == "likelihoods" for metric in self.metrics)
        limits = {name: getattr(self.config, name) for name in ("max_new_tokens", "max_running_samples")}
        samples = self._samples(share, loaded, asked)
        for answer in loaded.answers(samples, GenerationConfig(**limits), keep_going=not strict):
            error = None if answer.error is None else str(answer.error)
            item = judge(asked[answer.id], answer.text, cut_off=answer.finished == "length", error=error)
            judged[item.id] = with_likelihoods(loaded, item, strict) if needs_likelihoods else item
            before_each()
            bars.advance(bar)
        bars.remove_task(bar)
        return [judged[id] for id in asked]

    def _samples(
        self, rows: Iterable[int], loaded: LoadedModel, asked: dict[str, dict[str, Any]]
    ) -> Iterator[Sample | Failed]:
        """The questions in some rows as samples to answer; what is asked is put into `asked` by the sample's id."""
        for index in rows:
            unread = f"{index}:"
            row = attempt(partial(question, self.source, index, self.config.without_media), unread)
            if isinstance(row, Failed):
                asked[unread] = {"id": unread, "prompt": [], "expected": ""}
                yield row
            else:
                asked[row["id"]] = row
                yield attempt(partial(loaded.encode, row["prompt"], row["id"]), row["id"])

    def scores(self, judged: Sequence[Judged]) -> dict[str, float]:
        """See `molora.evaluate.metrics.scores`."""
        return scores(judged, self.metrics)


def question(source: Source, index: int, without_media: bool = False) -> dict[str, Any]:
    """Splits a row into prompt and expected answer; the id gains the row number, so that it is unique."""
    row = source[index]
    *prompt, last = row["messages"]
    if last["role"] != "assistant" or not prompt:
        raise ValueError(f"evaluation row {index + 1}: must end with an assistant message, the expected answer")
    if without_media:
        prompt = [{**m, "content": [part for part in parts(m) if part["type"] == "text"]} for m in prompt]
    if other := next((part["type"] for part in parts(last) if part["type"] != "text"), None):
        raise ValueError(f"evaluation row {index + 1}: the expected answer holds {other}; it can be text alone")
    expected = "".join(part["text"] for part in parts(last))
    return {
        "id": f"{index}:{row['id']}",
        "prompt": prompt,
        "expected": expected,
        "tags": read_tags(row.get("tags"), f"evaluation row {index + 1}"),
        "answers": list(row.get("answers") or [expected]),
        "choices": list(row.get("choices") or []),
        "choice": row.get("choice"),
    }


def judge(asked: Mapping[str, Any], answer: str, *, cut_off: bool = False, error: str | None = None) -> Judged:
    """A question with its answer, which is right if it equals one that is accepted."""
    facts = {key: asked[key] for key in ("tags", "answers", "choices", "choice") if key in asked}
    item = Judged(asked["id"], asked["prompt"], asked["expected"], answer, False, cut_off=cut_off, error=error, **facts)
    return replace(item, correct=error is None and any(exact_match(answer, each) for each in item.answers))


def with_likelihoods(loaded: LoadedModel, item: Judged, strict: bool) -> Judged:
    """The answer with the likelihood of each of its question's choices, or with the error that there is instead, which
    `strict` raises."""
    if item.error is not None or not item.choices:
        return item
    found = attempt(lambda: loaded.likelihoods([(item.messages, text) for text in continuations(item)]), item.id)
    if not isinstance(found, Failed):
        return replace(item, likelihoods=[(each.log_probability, each.num_tokens) for each in found])
    if strict:
        raise found.error
    return replace(item, correct=False, error=str(found.error))


def complaints(name: str, judged: Sequence[Judged], config: EvaluationConfig) -> list[str]:
    """What one should know before one believes the scores of an evaluation."""
    told = []
    failed = [f"row {item.row + 1}: {item.error}" for item in judged if item.error is not None]
    cut_off = sum(item.cut_off for item in judged)
    if failed:
        named = "; ".join(failed[:_MAX_NAMED]) + ("; …" if len(failed) > _MAX_NAMED else "")
        told.append(f"{name}: {len(failed)} of {len(judged)} questions were not answered and are in no rate: {named}")
    if cut_off:
        told.append(
            f"{name}: {cut_off} of {len(judged) - len(failed)} answers were cut off at max_new_tokens "
            f"({config.max_new_tokens}), or where the backbone's context was full, and are judged as they are; raise "
            "max_new_tokens if answers may be longer, or make the prompts shorter"
        )
    return told
