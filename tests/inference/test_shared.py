"""A prompt of several continuations runs once, and they score as each does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molora.data.processor import Processor
from molora.inference.likelihood import Likelihood, continued, score
from molora.inference.load import LoadedModel
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routers.learned import LearnedConfig, LearnedRouter
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer, tiny_model

TARGETS = {"gpt-oss": ["q_proj"], "phi4-mini": ["qkv_proj"]}
OPTIONS = ("a", "b", "c", "ab", "a longer one, of more than the window", "")


def loaded_model(family: str, router: str) -> LoadedModel:
    modalities: Any = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": TARGETS.get(family, ["q_proj"])}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model(family), Identity("test", "", "", "", ""))
    if router == "table":
        chosen: Any = TableRouter(list(adapters), TableConfig(rules={"numbers+letters": "letters"}))
    else:
        config = LearnedConfig(list(modalities), scope=router, candidates="all")  # type: ignore[arg-type]
        chosen = LearnedRouter(list(adapters), config, backbone.width)
        for parameter in chosen.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    model = MoLoRA(backbone, modalities, adapters, chosen)
    backbone.turn_ends = frozenset([260])
    return LoadedModel(model, Processor(byte_tokenizer(), modalities, model.router.order, backbone.max_tokens))


def questions() -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}],
        [{"role": "user", "content": [{"type": "numbers", "numbers": [0.5, 1.0]}, {"type": "text", "text": "this?"}]}],
        [{"role": "user", "content": [{"type": "letters", "letters": "xyz"}, {"type": "text", "text": "this?"}]}],
        [{"role": "user", "content": [{"type": t, t: v} for t, v in (("letters", "ab"), ("numbers", [1.0] * 20))]}],
        [{"role": "user", "content": [{"type": "numbers", "numbers": [0.5, 2.0]}, {"type": "text", "text": "this?"}]}],
    ]


def samples_of(loaded: LoadedModel) -> list[Sample]:
    """Every question with every option that says something, those of a question beside each other."""
    return [
        loaded.encode_answered([*question, {"role": "assistant", "content": option}], f"{number} {option}")
        for number, question in enumerate(questions())
        for option in OPTIONS
        if option
    ]


def assert_same(given: list[Any], expected: list[Any]) -> None:
    for one, other in zip(given, expected, strict=True):
        assert isinstance(one.likelihood, Likelihood) and one.id == other.id
        assert (one.likelihood.num_tokens, one.likelihood.is_greedy) == (
            other.likelihood.num_tokens,
            other.likelihood.is_greedy,
        )
        bound = 1e-5 * max(1.0, abs(other.likelihood.log_probability))
        assert abs(one.likelihood.log_probability - other.likelihood.log_probability) <= bound, one.id


def tokens_run(loaded: LoadedModel) -> list[int]:
    """Fills with the tokens of every forward of the backbone."""
    counts: list[int] = []
    loaded.model.backbone.register_forward_pre_hook(lambda module, given: counts.append(len(given[0])))
    return counts


@pytest.mark.parametrize("router", ["table", "sample", "token"])
@pytest.mark.parametrize("family", ["phi4-mini", "gemma2", "gpt-oss"])
def test_options_beside_each_other_score_as_each_alone(family: str, router: str) -> None:
    """Also across the RoPE switch and beyond the window, which lie at 24 and 16 tokens."""
    loaded = loaded_model(family, router)
    samples = samples_of(loaded)
    expected = list(score(loaded.model, samples, tokens_per_pack=1))
    counts = tokens_run(loaded)
    assert_same(list(score(loaded.model, samples)), expected)
    assert sum(counts) < sum(map(len, samples)) / 2
    interleaved = sorted(samples, key=lambda sample: sample.id[2:])
    again = {scored.id: scored for scored in score(loaded.model, interleaved)}
    assert_same([again[each.id] for each in expected], expected)


def test_a_prompt_runs_once_and_options_of_a_token_need_nothing_more() -> None:
    loaded = loaded_model("llama", "table")
    question = questions()[1]
    counts = tokens_run(loaded)
    loaded.likelihoods([(question, option) for option in "abcd"])
    assert counts == [len(loaded.encode(question))]
    counts.clear()
    loaded.likelihoods([(question, option) for option in ("ab", "cde", "f")])
    assert counts == [len(loaded.encode(question)) + 1 + 2]


def test_other_media_and_other_frequencies_are_another_prompt() -> None:
    loaded = loaded_model("phi4-mini", "table")
    counts = tokens_run(loaded)
    first, last = questions()[1], questions()[4]
    loaded.likelihoods([(first, "a"), (last, "a")])
    assert counts == [len(loaded.encode(first)) + len(loaded.encode(last))]
    counts.clear()
    context = [1] * 20
    short, long = continued("short", context, [2, 3]), continued("long", context, [2] * 8)
    list(loaded.scored([short, long]))
    assert counts == [len(short) + len(long) - 2]  # the switch lies at 24 tokens


def test_a_sample_alone_on_demand_shares_nothing() -> None:
    loaded = loaded_model("llama", "table")
    loaded.model.deterministic_batch = True
    counts = tokens_run(loaded)
    loaded.likelihoods([(questions()[0], option) for option in "ab"])
    assert counts == [len(loaded.encode(questions()[0]))] * 2
