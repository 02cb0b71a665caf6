"""What a model does with text alone: beside stock transformers, and with an adapter that is always on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.evidence import rows
from benchmarks.evidence.work import Figure, Work
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.pack import Sample

ANSWER_TOKENS = 24
RESAMPLES = 1000


class Texts:
    """Stories whose tokens are predicted, and questions that are answered, by the backbone's own tokenizer."""

    def __init__(self, backbone: Path, stories: Sequence[str], questions: Sequence[str]) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
        self.stories = [self.tokenizer(story).input_ids for story in stories]
        self.questions = [[{"role": "user", "content": question}] for question in questions]

    @classmethod
    def of_work(cls, work: Work, stories: int, questions: int) -> Texts:
        """The first stories of the held-out ones, and the shortest questions."""
        stories, questions = (2, 2) if work.tiny else (stories, questions)
        return cls(work.backbone, rows.texts(work.data_root, stories), rows.questions(work.data_root, questions))

    @torch.no_grad()
    def perplexity(self, arm: str, logits_of: Callable[[list[int]], Tensor]) -> tuple[Figure, list[str]]:
        """The perplexity of a token over all stories, stories drawn again for its interval; and the hash of each
        story's logits."""
        sums, hashes = [], []
        for ids in self.stories:
            logits_TV = logits_of(ids).float()
            hashes.append(hashlib.sha256(logits_TV.numpy().tobytes()).hexdigest())
            log_TV = logits_TV[:-1].double().log_softmax(-1)
            sums.append((-log_TV.gather(1, torch.tensor(ids[1:])[:, None]).sum().item(), len(ids) - 1))
        totals_N2 = np.array(sums)
        drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
        sums_B, counts_B = totals_N2[drawn].sum(1).T
        low, high = np.exp(np.quantile(sums_B / counts_B, [0.025, 0.975])).tolist()
        value = math.exp(totals_N2[:, 0].sum() / totals_N2[:, 1].sum())
        return Figure(arm, "perplexity", "text", value, low, high, len(sums), "none"), hashes

    @torch.no_grad()
    def answers(self, model: Any) -> list[list[int]]:
        """The tokens that a model of transformers answers with, by its own `generate`, greedily."""
        answers = []
        for question in self.questions:
            ids = self.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
            ids = ids["input_ids"] if not isinstance(ids, Tensor) else ids
            given = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
            stops = model.generation_config.eos_token_id
            stops = stops if isinstance(stops, list) else [stops]
            answers.append([token for token in given if token not in stops])
        return answers

    def of_stock(self, arm: str, backbone: Path) -> tuple[Figure, list[str], list[list[int]]]:
        return self._of(arm, AutoModelForCausalLM.from_pretrained(backbone))

    def of_adapters(self, arm: str, backbone: Path, folders: Sequence[Path]) -> tuple[Figure, list[list[int]]]:
        """PEFT's model with an adapter of all folders, each in an equal part, always on, as it is when one adapter
        serves everything or adapters are merged into the weights."""
        first, *others = folders
        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(backbone), str(first), adapter_name=first.name
        )
        if others:
            for folder in others:
                model.load_adapter(str(folder), folder.name)
            names = [folder.name for folder in folders]
            model.base_model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", "cat")
            model.set_adapter("merged")
        figure, _, answers = self._of(arm, model)
        return figure, answers

    def _of(self, arm: str, model: Any) -> tuple[Figure, list[str], list[list[int]]]:
        model.eval()
        figure, hashes = self.perplexity(arm, lambda ids: model(torch.tensor([ids])).logits[0])
        return figure, hashes, self.answers(model)

    def of_molora(self, arm: str, loaded: LoadedModel) -> tuple[Figure, list[str], list[list[int]]]:
        figure, hashes = self.perplexity(arm, lambda ids: logits(loaded, Sample.of_text("story", ids)))
        samples = [loaded.encode(question, str(index)) for index, question in enumerate(self.questions)]
        answers = {
            answer.id: list(answer.token_ids)
            for sample in samples
            for answer in loaded.answers([sample], GenerationConfig(max_new_tokens=ANSWER_TOKENS))
        }
        return figure, hashes, [answers[sample.id] for sample in samples]


def logits(loaded: LoadedModel, sample: Sample) -> Tensor:
    """Logits (T, V) of a sample alone."""
    return loaded.model.logits(loaded.processor.collate([sample]))


def answers_kept(arm: str, answers: Sequence[Any], stock: Sequence[Any]) -> Figure:
    """The share of questions that are answered as by stock transformers, to the token."""
    same = sum(one == other for one, other in zip(answers, stock, strict=True))
    return Figure(arm, "answers kept", "text", same / len(stock), questions=len(stock), media="none")


def equal_share(some: Sequence[Any], others: Sequence[Any]) -> str:
    """How many of two lists are equal, in words."""
    return f"{sum(one == other for one, other in zip(some, others, strict=True))} of {len(some)}"
