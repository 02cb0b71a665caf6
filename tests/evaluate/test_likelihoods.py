"""Choices scored by how probable the model finds them: what is asked for, what is kept, and whose fault a fault is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import build
from molora.data.processor import Processor
from molora.evaluate.judge import Evaluation, EvaluationConfig
from molora.evaluate.metrics import Judged, open_metrics
from molora.inference.load import LoadedModel
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.molora import MoLoRA
from molora.routers.table import TableConfig, TableRouter
from molora.testing import byte_tokenizer, tiny_model
from molora.train.preflight import Trial

SOURCE = """
import json
from dataclasses import dataclass


@dataclass
class RowsConfig:
    rows: str


class Rows:
    config_type = RowsConfig

    def __init__(self, config):
        self.rows = json.loads(config.rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]
"""


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    backbone = Backbone(tiny_model("phi4-mini"), Identity("test", "", "", "", ""))
    model = MoLoRA(backbone, {}, {}, TableRouter([], TableConfig()))
    return LoadedModel(model, Processor(byte_tokenizer(), {}, model.router.order, backbone.max_tokens))


def row(id: str, asked: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"id": id, "messages": messages, **more}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    (tmp_path / "rows.py").write_text(SOURCE)

    def made(*rows: dict[str, Any], metrics: Any = ("choice_likelihood",)) -> EvaluationConfig:
        data = {"kind": f"{tmp_path}/rows.py:Rows", "options": {"rows": json.dumps(rows)}}
        return build(EvaluationConfig, {"data": data, "metrics": list(metrics), "max_new_tokens": 1}, "recipe")

    return made


COLOURS = row("a", "The sky is", "blue", choices=["red", "blue", "a very dark green"], choice=1)
LETTER = row("b", "One and one is: A) 1 B) 2", "B", choices=["1", "2"], choice=1)


def by_hand(loaded: LoadedModel, asked: str, answer: str) -> tuple[float, int]:
    """The log-probability of an answer's tokens after the question, and their number, from the stock model's logits."""
    prompt = loaded.encode([{"role": "user", "content": asked}]).token_ids_T
    said = torch.tensor(byte_tokenizer()(answer, add_special_tokens=False)["input_ids"])
    logits_TV = tiny_model("phi4-mini")(torch.cat([prompt, said])[None].long()).logits[0].float()
    at_T = range(len(prompt) - 1, len(prompt) + len(said) - 1)
    found = logits_TV.log_softmax(-1)[list(at_T)].gather(1, said[:, None])
    return float(found.sum()), len(said)


@torch.no_grad()
def test_each_choice_has_its_likelihood_as_the_answer(loaded: LoadedModel, config: Any) -> None:
    evaluation = Evaluation("test", config(COLOURS, LETTER))
    judged = evaluation.run(loaded, strict=True)
    for item, asked, texts in (
        (judged[0], "The sky is", COLOURS["choices"]),
        (judged[1], LETTER["messages"][0]["content"], "AB"),
    ):
        wanted = [by_hand(loaded, asked, text) for text in texts]
        assert item.likelihoods == [(pytest.approx(total, abs=1e-4), number) for total, number in wanted]
    likeliest = [
        max(range(len(item.likelihoods)), key=lambda at, item=item: item.likelihoods[at][0]) for item in judged
    ]
    assert evaluation.scores(judged)["choice_likelihood"] == sum(found == 1 for found in likeliest) / 2


def test_kept_answers_have_all_that_scoring_them_again_needs(loaded: LoadedModel, config: Any) -> None:
    evaluation = Evaluation("test", config(COLOURS, LETTER, metrics=["exact_match", "choice_likelihood"]))
    judged = evaluation.run(loaded)
    kept = [Judged(**json.loads(json.dumps(asdict(item)))) for item in judged]
    assert evaluation.scores(kept) == evaluation.scores(judged)
    (per_character,) = open_metrics([{"choice_likelihood": {"per": "character"}}], "metrics")
    assert per_character.score(kept) == per_character.score(judged)


def test_likelihoods_are_asked_for_only_where_a_metric_needs_them(loaded: LoadedModel, config: Any) -> None:
    assert [item.likelihoods for item in Evaluation("test", config(COLOURS, metrics=["exact_match"])).run(loaded)] == [
        []
    ]


def test_a_question_whose_choices_cannot_be_scored_fails_alone(loaded: LoadedModel, config: Any) -> None:
    wrong = row("c", "The sky is", "purple", choices=["red", "blue"], choice=1)
    evaluation = Evaluation("test", config(COLOURS, wrong, LETTER))
    judged = evaluation.run(loaded)
    assert [item.error is None for item in judged] == [True, False, True]
    assert "expects 'purple', which is neither the right option, 'blue', nor its letter, B" in str(judged[1].error)
    assert evaluation.scores(judged)["failed"] == 1 and evaluation.scores(judged)["questions"] == 2
    with pytest.raises(ValueError, match="question 1:c: expects 'purple'"):
        evaluation.run(loaded, strict=True)


def test_rows_without_choices_are_told_before_training(config: Any) -> None:
    good = config(COLOURS)
    assert Trial("evaluations.test.data", good.data, evaluation=good).metrics
    bare = config(row("d", "The sky is", "blue"))
    with pytest.raises(ValueError, match="evaluations.test.data: .* question 0:d: choice is None of 0 choices"):
        Trial("evaluations.test.data", bare.data, evaluation=bare)
