"""What a recipe names, opened and tried before training: a typo shows in seconds, and not after the last step."""

from collections.abc import Mapping, Sequence

from molora.config import ConfigError, did_you_mean
from molora.data.processor import Processor
from molora.data.sources import (
    Source,
    SourceConfig,
    check_samples,
    encode_row,
    mixed_order,
    open_source,
    placed,
    rows_at_hand,
)
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.metrics import open_metrics, scores
from molora.evaluate.metrics.choices import as_if_likely
from molora.evaluate.questions import judge, question
from molora.model.molora import MoLoRA
from molora.terminal import say
from molora.train.optim import check_start, count, set_trainable
from molora.train.recipe import Recipe, StageConfig, shares_of, skipped_errors
from molora.train.resume import Position
from molora.train.words import Words

# Rows of a source that are tried, spread over it; more of them if none of these can be used.
TRIED_ROWS = 4
TRIED_ROWS_AT_MOST = 32


class Trial:
    """A source, opened, with a few of its rows read, from the first to the last. `where` is its key in the recipe.

    Rows with errors of the kinds in `skips` may be left out, and of an evaluation any may. With `pairs` each has a
    rejected answer.

    Raises ConfigError for a source that cannot be opened; ValueError for rows that cannot be read.
    """

    def __init__(
        self,
        where: str,
        config: SourceConfig,
        *,
        evaluation: EvaluationConfig | None = None,
        skips: tuple[type[ValueError], ...] = (ValueError,),
        pairs: bool = False,
    ) -> None:
        self.where = where
        self.pairs = pairs
        self.evaluation = evaluation
        self.skips = skips
        try:
            self.source: Source = open_source(config, where)
        except ConfigError as error:
            told = str(error)
            raise ConfigError(told if told.startswith(where) else f"{where}: {told}") from error
        if not len(self.source):
            raise ConfigError(f"{where}: no rows")
        self.metrics = open_metrics(evaluation.metrics, f"{where[: -len('.data')]}.metrics") if evaluation else []
        self.scored: set[str] = set()  # what the metrics call their numbers
        self._try(None)

    def encode(self, processor: Processor, max_tokens: int) -> None:
        """Decodes and encodes the rows too. Raises ValueError for rows that cannot be."""
        self._try(processor, max_tokens)

    def _try(self, processor: Processor | None, max_tokens: int = 0) -> None:
        faults: list[ValueError] = []
        tried = 0
        for row in _spread(len(rows_at_hand(self.source)), TRIED_ROWS, TRIED_ROWS_AT_MOST):
            if tried >= TRIED_ROWS and len(faults) < tried:
                return
            tried += 1
            try:
                self._try_row(row, processor, max_tokens)
            except ConfigError as error:
                raise ConfigError(f"{self.where}, row {row + 1}: {error}") from error
            except ValueError as error:
                if not isinstance(error, self.skips):
                    raise ValueError(f"{self.where}, row {row + 1}: {placed(error, self.source, row)}") from error
                faults.append(error)
            except ImportError:  # what is not installed here is no fault of the row
                raise
            except Exception as error:  # a plugin's source can fail in any way
                raise ValueError(f"{self.where}, row {row + 1}: {type(error).__name__}: {error}") from error
        if len(faults) == tried:
            raise ValueError(f"{self.where}: none of the {tried} rows tried can be used; the first: {faults[0]}")

    def _try_row(self, row: int, processor: Processor | None, max_tokens: int) -> None:
        if self.evaluation is not None:
            asked = question(self.source, row, self.evaluation.asked_with[0])
            if processor is None:
                self.scored |= scores([as_if_likely(judge(asked, asked.expected))], self.metrics).keys()
            else:
                processor.encode(asked.prompt, asked.id, generate=True)
            return
        example = self.source[row]
        if processor is not None:
            id = f"{self.where.rpartition('.')[2]}/{example['id']}@0"
            encode_row(processor, example, id, max_tokens, pairs=self.pairs)


def _spread(length: int, few: int, many: int) -> list[int]:
    """Rows from the first to the last: a few, and then others up to many, none twice."""
    rows = (round(index * (length - 1) / (count - 1)) for count in (few, many) for index in range(count))
    return list(dict.fromkeys(rows))[:many]


def open_trials(recipe: Recipe, steps: Sequence[int], position: Position) -> dict[str, Trial]:
    """Every source that is still needed, opened and tried, by its key in the recipe, whose stages have so many steps.
    Raises ConfigError, ValueError."""
    trials: dict[str, Trial] = {}
    for index, stage in list(enumerate(recipe.stages))[position.stage :]:
        for name, config in stage.data.items():
            where = f"stages.{index}.data.{name}"
            pairs = stage.objective == "preferences"
            trials[where] = Trial(where, config, skips=skipped_errors(stage), pairs=pairs)
        sources = [trials[f"stages.{index}.data.{name}"].source for name in stage.data]
        order = mixed_order(
            stage.data.values(), sources, stage.mixture, seed=recipe.seed, samples_per_step=stage.samples_per_step
        )
        check_samples(order, steps[index], stage.samples_per_step, f"stages.{index}.data")
    for name, evaluation in recipe.evaluations.items():
        if trials or name in position.evaluate:
            where = f"evaluations.{name}.data"
            trials[where] = Trial(where, evaluation.data, evaluation=evaluation)
    if recipe.keep_best and (trial := trials.get(f"evaluations.{recipe.keep_best.evaluation}.data")):
        metric = recipe.keep_best.metric
        names = sorted({name.partition("/")[0] for name in trial.scored})  # a tag may be that of rows not tried
        if metric.partition("/")[0] not in names:
            near = did_you_mean(metric, names)
            told = f"keep_best.metric: evaluation {recipe.keep_best.evaluation!r} gives no {metric!r}"
            raise ConfigError(f"{told}; {near}it gives {', '.join(names)}")
    return trials


def try_model(
    recipe: Recipe, steps: Sequence[int], model: MoLoRA, processor: Processor, trials: Mapping[str, Trial]
) -> None:
    """Raises ConfigError or ValueError for what a recipe asks of its model and the model cannot do. `steps` are those
    of its stages."""
    _check_names(recipe, model)
    for index, stage in enumerate(recipe.stages):
        set_trainable(model, stage.train, steps[index], f"stages.{index}.train")
        others = sorted(part for part in model.training_parts() if part.partition(".")[0] in ("adapters", "router"))
        if stage.objective == "words" and others:
            told = f"stages.{index}.train: {others} learn nothing by `objective: words`, which runs no adapter"
            raise ConfigError(f"{told}; train encoders and projectors by it, and the rest in a stage of answers")
        encoders = sorted(part for part in model.training_parts() if part.startswith("encoders."))
        if stage.objective == "preferences" and encoders:
            told = f"stages.{index}.train: {encoders} stay frozen while preferences are learned"
            raise ConfigError(
                f"{told}, so that a medium is encoded once for both answers; train them in a stage before"
            )
        words_of(stage, model, processor, f"stages.{index}")
        check_start(model, stage.start_from, f"stages.{index}.start_from")
        for name in stage.data:
            if trial := trials.get(f"stages.{index}.data.{name}"):
                trial.encode(processor, stage.tokens_per_pack)
    for name in recipe.evaluations:
        if trial := trials.get(f"evaluations.{name}.data"):
            trial.encode(processor, 0)


def words_of(stage: StageConfig, model: MoLoRA, processor: Processor, where: str) -> Words | None:
    """What a stage's samples say; None where words are not what it learns. Raises ConfigError for its vocabulary."""
    if stage.objective != "words":
        return None
    return Words(processor.tokenizer, model.backbone.stop_ids, stage.vocabulary, f"{where}.vocabulary")


def describe(model: MoLoRA, stage: StageConfig, steps: int, num_rows: Mapping[str, int]) -> None:
    """Prints how long a stage is, how often each source comes if epochs are counted, what trains and what is frozen."""
    say(f"{stage.name}: {steps} steps of {stage.samples_per_step} samples")
    if stage.epochs:
        for name, share in shares_of(stage, num_rows).items():
            times = steps * stage.samples_per_step * share / num_rows[name]
            say(f"  {stage.epochs:g} epochs: source {name}, {num_rows[name]:,} rows, {times:.2f} times")
    for part, parameters in model.parts().items():
        training = count(p for p in parameters.values() if p.requires_grad)
        word = "trains" if training else "frozen"
        say(f"  {word}  {part:<24} {training or count(parameters.values()):>12,} parameters")
    say(f"  frozen  {'backbone':<24} {model.num_backbone_parameters():>12,} parameters")


def _check_names(recipe: Recipe, model: MoLoRA) -> None:
    """Raises ConfigError for modalities that the recipe's rules name and that are not there."""
    known = sorted(model.modalities)
    for name in sorted(getattr(model.router, "named", frozenset()) - set(known)) if recipe.router.path is None else ():
        near = did_you_mean(name, known)
        raise ConfigError(f"router.options: a rule names modality {name!r}; {near}there is {known}")
    for owner, modality in model.modalities.items():
        others = [other for other in known if other != owner]
        for name in getattr(modality.config, "beside", None) or ():
            if name not in others and (near := did_you_mean(name, others)):
                where = f"modalities.{owner}.options.beside"
                raise ConfigError(f"{where}: names modality {name!r}; {near}there is {others}")
