"""Evaluation by generation: the model answers, the answers are compared."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import yaml
from rich.progress import Progress

from molora.config import ConfigError, require
from molora.data.sources import SourceConfig, open_source
from molora.evaluate.blind import Media, blanking, check_media, told, took_place
from molora.evaluate.metrics import Judged, Named, open_metrics, scores
from molora.evaluate.metrics.choices import as_if_likely, continuations
from molora.evaluate.predictions import Predictions
from molora.evaluate.questions import Question, judge, question
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.load import LoadedModel
from molora.pack import Sample
from molora.received import check_name
from molora.shard import ALL_ROWS, Shard
from molora.terminal import progress, warn

_MAX_NAMED = 3
# Rows among which one is looked for that metrics are tried on.
_TRIED_ROWS = 32
# What recipes had a key for before they named metrics in a list.
_OLD_KEYS = {"word_errors": "word_error_rate", "character_errors": "character_error_rate", "macro_f1": "macro_f1"}


@dataclass(kw_only=True)
class EvaluationConfig:
    """Questions to answer, `max_running_samples` at a time, each in `max_new_tokens` at most; an answer that is cut off
    there is counted and said. `media` says what the questions are asked with: `as is`, `none` (without their media, to
    see what the text alone gives away), `blank` (grey pictures, silence, of the same size), `shuffled` (the medium of
    another question), or one of these for each part type, as `{image: blank}`. Of a list `molora eval` asks with each,
    and shows the others beside the first, which is what a training asks with. `metrics` are what the answers are scored
    by: built-in ones, as exact_match or word_error_rate, or a plugin's, each by its name or, with options, as `{bleu:
    {tokeniser: zh}}`."""

    data: SourceConfig
    max_new_tokens: int = 16
    max_running_samples: int = 128
    media: Media | list[Media] = "as is"
    metrics: list[Named] = field(default_factory=lambda: ["exact_match"])

    def __post_init__(self) -> None:
        require(self, 1, "max_new_tokens", "max_running_samples")
        for media in self.asked_with:
            check_media(media)
        names = [told(media) for media in self.asked_with]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"media: {', '.join(names) or 'an empty list'}; name one or more, each once")

    @property
    def asked_with(self) -> list[Media]:
        """Each of `media`, the first of which the others are shown beside."""
        return self.media if isinstance(self.media, list) else [self.media]

    def each(self, name: str) -> dict[str, "EvaluationConfig"]:
        """The evaluations that this one is, by name: itself, and the same with each of the other `media`."""
        first, *others = self.asked_with
        return {
            name: replace(self, media=first),
            **{f"{name} ({told(media)})": replace(self, media=media) for media in others},
        }

    @staticmethod
    def renewed(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """The values of an older recipe as they are written now, with a line that says so."""
        if isinstance(blind := values.get("without_media"), bool) and "media" not in values:
            values = {key: value for key, value in values.items() if key != "without_media"}
            if blind:
                values["media"] = "none"
                warn(f"{where}: without_media: recipes say what questions are asked with now; write media: none")
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

    def __post_init__(self) -> None:
        for name in self.evaluations:
            check_name(name, "evaluations")


class Evaluation:
    """An evaluation that is ready: its questions are open, and what its metrics need is there; of several `media` it
    asks with the first. Raises ConfigError for a source or a metric that cannot be opened, ImportError for what a
    metric needs."""

    def __init__(self, name: str, config: EvaluationConfig) -> None:
        self.name = name
        self.config = config
        self.media: Media = config.asked_with[0]
        self.metrics = open_metrics(config.metrics, f"evaluations.{name}.metrics")
        self.needs_likelihoods = any(getattr(metric, "needs", None) == "likelihoods" for metric in self.metrics)
        self.source = open_source(config.data, f"evaluations.{name}.data")

    def run(
        self,
        loaded: LoadedModel,
        bars: Progress | None = None,
        *,
        shard: Shard = ALL_ROWS,
        strict: bool = False,
        before_each: Callable[[], None] = lambda: None,
        predictions: Predictions | None = None,
    ) -> list[Judged]:
        """Answers a shard of the questions, in order, with a bar. The last assistant message of a row is the
        expected answer. A question that cannot be read, asked or answered is judged with its `error`; `strict` raises
        the first one's. `before_each` is called before an answer is counted. Answers that `predictions` has are taken
        from there, and all others are added."""
        loaded = blanking(loaded, self.media, f"evaluations.{self.name}.media")
        rows = shard.rows(len(self.source))
        bars = bars or progress(shown=False)
        bar = bars.add_task(self.name, total=len(rows), note="")
        asked: dict[str, Question] = {}
        judged: dict[str, Judged] = {}

        def known(question: Question) -> bool:
            """Whether the question has its answer already, which is then counted."""
            asked[question.id] = question
            item = None
            if predictions is not None:
                item = predictions.known(question, needs_likelihoods=self.needs_likelihoods)
            if item is not None:
                judged[item.id] = item
                bars.advance(bar)
            return item is not None

        limits = {name: getattr(self.config, name) for name in ("max_new_tokens", "max_running_samples")}
        samples = self._samples(rows, loaded, known)
        for answer in loaded.answers(samples, GenerationConfig(**limits), keep_going=not strict):
            error = None if answer.error is None else str(answer.error)
            item = judge(
                asked[answer.id],
                answer.text,
                cut_off=answer.finished == "length",
                error=error,
                adapters=answer.adapters,
            )
            judged[item.id] = item = with_likelihoods(loaded, item, strict) if self.needs_likelihoods else item
            if predictions is not None:
                predictions.add(item)
            before_each()
            bars.advance(bar)
        bars.remove_task(bar)
        return [judged[id] for id in asked]

    def _samples(
        self, rows: Iterable[int], loaded: LoadedModel, known: Callable[[Question], bool]
    ) -> Iterator[Sample | Failed]:
        """The questions in some rows that are not `known`, as samples to answer."""
        for index in rows:
            unread = f"{index}:"
            asked = attempt(partial(question, self.source, index, self.media), unread)
            if isinstance(asked, Failed):
                known(Question(unread, [], ""))
                yield asked
            elif not known(asked):
                yield attempt(partial(loaded.encode, asked.prompt, asked.id), asked.id)

    def try_metrics(self) -> None:
        """Scores the first question that can be read as if it had been answered rightly, so that what a metric cannot
        work with is told before the model is asked. Raises ConfigError."""
        for row in range(min(len(self.source), _TRIED_ROWS)):
            asked = attempt(partial(question, self.source, row, self.media), str(row))
            if isinstance(asked, Failed):
                continue
            try:
                scores([as_if_likely(judge(asked, asked.expected))], self.metrics)
            except ValueError as error:
                raise ConfigError(f"evaluations.{self.name}.metrics: {error}") from error
            return

    def scores(self, judged: Sequence[Judged]) -> dict[str, float]:
        """See `molora.evaluate.metrics.scores`."""
        return scores(judged, self.metrics)


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
    found = []
    failed = [f"row {item.row + 1}: {item.error}" for item in judged if item.error is not None]
    cut_off = sum(item.cut_off and item.error is None for item in judged)
    if failed:
        named = "; ".join(failed[:_MAX_NAMED]) + ("; …" if len(failed) > _MAX_NAMED else "")
        found.append(f"{name}: {len(failed)} of {len(judged)} questions were not answered and are in no rate: {named}")
    media = config.asked_with[0]
    if judged and not took_place(media, (item.messages for item in judged)):
        found.append(
            f"{name}: no question has a medium that could be {told(media)}, and all were asked as they are; ask rows "
            "with media, or leave it out of `media`"
        )
    if cut_off:
        found.append(
            f"{name}: {cut_off} of {len(judged) - len(failed)} answers were cut off at max_new_tokens "
            f"({config.max_new_tokens}), or where the backbone's context was full, and are judged as they are; raise "
            "max_new_tokens if answers may be longer, or make the prompts shorter"
        )
    return found
