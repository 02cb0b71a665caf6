"""The data of a recipe, opened without the weights of its model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from molora.checkpoint.pretrained import fetch
from molora.checkpoint.stock import load_tokenizer
from molora.data.processor import Processor
from molora.data.sources import Source, SourceConfig
from molora.doctor.dry_run import on_meta
from molora.evaluate.judge import EvaluationConfig
from molora.evaluate.questions import question
from molora.media import MediaPolicy
from molora.routing import Router
from molora.train.recipe import Recipe, StageConfig


@dataclass(frozen=True, kw_only=True)
class Named:
    """A source that a recipe names under `key`, of a stage or of an evaluation."""

    key: str
    config: SourceConfig
    stage: StageConfig | None = None
    evaluation: EvaluationConfig | None = None

    @property
    def name(self) -> str:
        """The key as the name of a file."""
        return self.key.removesuffix(".data").replace(".data.", ".")


def sources_of(recipe: Recipe) -> Iterator[Named]:
    """Every source of every evaluation, and then of every stage."""
    for name, evaluation in recipe.evaluations.items():
        yield Named(key=f"evaluations.{name}.data", config=evaluation.data, evaluation=evaluation)
    for index, stage in enumerate(recipe.stages):
        for name, config in stage.data.items():
            yield Named(key=f"stages.{index}.data.{name}", config=config, stage=stage)


def open_processor(recipe: Recipe, trust: Sequence[str] = ()) -> tuple[Processor, Router]:
    """The processor and the router of a recipe's model. No weights are read; a router that learns has no values.
    Raises ConfigError, ValueError, OSError for what cannot be opened."""
    model = on_meta(recipe, dtype="float32", trust=trust)  # of which nothing depends here
    tokenizer = load_tokenizer(fetch(recipe.backbone.path, recipe.backbone.revision, weights=False))
    policy = MediaPolicy(allow_urls=recipe.allow_urls, allow_private_addresses=recipe.allow_private_addresses)
    longest, known_ids = model.backbone.max_tokens, model.backbone.num_embeddings
    processor = Processor(tokenizer, model.modalities, model.router.order, longest, policy, known_ids)
    return processor, model.router


def place_of(source: Source, row: int, key: str) -> str:
    """The file and row of a row where its source can tell, else the source's key and the row."""
    tell = getattr(source, "where", None)
    return str(tell(row)) if callable(tell) else f"{key}, row {row + 1}"


def asked_by(evaluation: EvaluationConfig, source: Source, row: int) -> tuple[list[dict[str, Any]], str]:
    """The messages that an evaluation asks with a row, with its own media if it asks with any, and the answer that it
    expects. Raises ValueError."""
    media = evaluation.asked_with[0]
    asked = question(source, row, "none" if media == "none" else "as is")
    return asked.prompt, asked.expected
