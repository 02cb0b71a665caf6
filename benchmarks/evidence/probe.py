"""Linear probes: what a straight line through features tells, to compare a trained modality with.

Letters: I items, F features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.work import Figure
from molora.checkpoint.opening import open_model
from molora.config import ConfigError
from molora.data.sources import Source, open_source
from molora.evaluate.intervals import interval
from molora.evaluate.metrics import Judged, open_metrics
from molora.train.frame_cache import FeatureCache
from molora.train.recipe import Recipe, plan_recipe

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
# The share of the training rows on which the penalty is chosen.
CHOOSING = 0.2


def probe_frames(arm: str, recipe: Recipe, rows: int | None = None) -> Figure:
    """The accuracy of a probe on the mean frame of the recipe's frozen encoder: trained on the first rows of its first
    stage, tried on all of its evaluation."""
    (task,) = recipe.evaluations
    model, processor = open_model(plan_recipe(recipe), "cpu")
    cache = FeatureCache(Path(str(recipe.feature_cache)), model)

    def features(messages: Sequence[Any]) -> Tensor:
        (sample,) = cache.fill([processor.encode(messages, "0", generate=True)])
        frames_SC = sample.items[0].frames_SC
        assert frames_SC is not None
        return frames_SC.mean(0)

    train, held_out = _sources(recipe, task)
    return probe(arm, task, features, train, held_out, rows)


def probe_values(arm: str, recipe: Recipe) -> Figure:
    """The accuracy of a probe on the numbers of a signal themselves, which all have one shape."""
    (task,) = recipe.evaluations

    def features(messages: Sequence[Any]) -> Tensor:
        (part,) = (part for part in messages[-1]["content"] if part["type"] != "text")
        return torch.tensor(part[part["type"]], dtype=torch.float32).flatten()

    return probe(arm, task, features, *_sources(recipe, task))


def _sources(recipe: Recipe, task: str) -> tuple[Source, Source]:
    (config,) = recipe.stages[0].data.values()
    return open_source(config, "data"), open_source(recipe.evaluations[task].data, task)


def probe(
    arm: str,
    task: str,
    features: Callable[[Sequence[Any]], Tensor],
    train: Source,
    held_out: Source,
    rows: int | None = None,
) -> Figure:
    """A multinomial logistic regression from the features of prompts to answers. Its penalty is the best for the last
    rows of the training part, which are then learned too."""
    sides = []
    for source, count in ((train, rows or len(train)), (held_out, len(held_out))):
        messages = [source[row]["messages"] for row in range(min(count, len(source)))]
        sides.append((torch.stack([features(each[:-1]) for each in messages]), _answers(messages)))
    (train_IF, answers), (held_IF, expected) = sides
    names = sorted(set(answers))
    labels_I = torch.tensor([names.index(answer) for answer in answers])
    mean_F, deviation_F = train_IF.mean(0), train_IF.std(0) + 1e-6
    train_IF, held_IF = (train_IF - mean_F) / deviation_F, (held_IF - mean_F) / deviation_F
    cut = max(1, round(len(train_IF) * (1 - CHOOSING)))
    if cut == len(train_IF):
        raise ConfigError(f"{task}: {len(train_IF)} rows are too few for a probe; give more")
    right = {}
    for penalty in PENALTIES:
        given_I = _fitted(train_IF[:cut], labels_I[:cut], len(names), penalty)(train_IF[cut:])
        right[penalty] = int((given_I == labels_I[cut:]).sum())
    given_I = _fitted(train_IF, labels_I, len(names), max(PENALTIES, key=lambda penalty: right[penalty]))(held_IF)
    judged = [
        Judged(f"{row}:", [], said, names[given], said == names[given])
        for row, (said, given) in enumerate(zip(expected, given_I.tolist(), strict=True))
    ]
    (metric,) = open_metrics(["exact_match"], task)
    low, high = interval(metric, judged).get("exact_match", (None, None))
    value = float(np.mean([item.correct for item in judged]))
    return Figure(arm, "exact_match", task, value, low, high, len(judged))


def _answers(messages: Sequence[Sequence[Any]]) -> list[str]:
    return [each[-1]["content"] for each in messages]


def _fitted(train_IF: Tensor, labels_I: Tensor, classes: int, penalty: float) -> Callable[[Tensor], Tensor]:
    """The most likely class of features, by weights that L-BFGS finds; the same in every run."""
    weights_KF = torch.zeros(classes, train_IF.shape[1], requires_grad=True)
    bias_K = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_KF, bias_K], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(train_IF @ weights_KF.T + bias_K, labels_I)
        loss = loss + penalty * weights_KF.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return lambda held_IF: (held_IF @ weights_KF.T + bias_K).argmax(1)
