"""Likelihoods: those of plain transformers, of any mix, alone and in packs; answers that a text ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.config import ConfigError
from molora.data.processor import Processor
from molora.inference import likelihood
from molora.inference.answers import answer_file
from molora.inference.frames import FrameMemory
from molora.inference.generate import GenerationConfig
from molora.inference.likelihood import Likelihood, continued, score
from molora.inference.load import LoadedModel
from molora.modality import MediaError
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, NumbersConfig, byte_tokenizer, tiny_model

TARGETS = {"gpt-oss": ["q_proj"], "phi4-mini": ["qkv_proj"]}


def loaded_model(family: str = "phi4-mini") -> LoadedModel:
    modalities: Any = {"numbers": Numbers("numbers", NumbersConfig()), "letters": Letters("letters", NumbersConfig())}
    options = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": TARGETS.get(family, ["q_proj"])}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model(family), Identity("test", "", "", "", ""))
    model = MoLoRA(backbone, modalities, adapters, TableRouter(list(adapters), TableConfig()))
    backbone.turn_ends = frozenset([260])
    return LoadedModel(model, Processor(byte_tokenizer(), modalities, model.router.order, backbone.max_tokens))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return loaded_model()


def ask(*content: Any) -> list[dict[str, Any]]:
    """A question of texts and lists of numbers."""
    kinds = {list: "numbers", str: "text"}
    return [{"role": "user", "content": [{"type": kinds[type(c)], kinds[type(c)]: c} for c in content]}]


def reference(logits_TV: torch.Tensor, token_ids: Sequence[int], num_tokens: int) -> Likelihood:
    """The likelihood of the last tokens by the logits before them."""
    log_probabilities_TV = logits_TV.double().log_softmax(-1)
    places = range(len(token_ids) - num_tokens, len(token_ids))
    total = sum(float(log_probabilities_TV[place - 1, token_ids[place]]) for place in places)
    is_greedy = all(int(log_probabilities_TV[place - 1].argmax()) == token_ids[place] for place in places)
    return Likelihood(total, num_tokens, is_greedy)


def assert_same(given: Sequence[Any], expected: Sequence[Any], tolerance: float = 1e-5) -> None:
    """Of likelihoods, of which none is missing."""
    for one, other in zip(given, expected, strict=True):
        assert (one.num_tokens, one.is_greedy) == (other.num_tokens, other.is_greedy)
        bound = tolerance * max(1.0, abs(other.log_probability))
        assert abs(one.log_probability - other.log_probability) <= bound, (one, other)


@pytest.mark.parametrize("family", ["llama", "phi4-mini", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_likelihoods_are_those_of_transformers(family: str) -> None:
    """Also across the RoPE switch and beyond the window, which lie at 24 and 16 tokens."""
    loaded, stock, tokenizer = loaded_model(family), tiny_model(family), byte_tokenizer()
    conversations: list[list[dict[str, Any]]] = [
        ask("hi"),
        [{"role": "system", "content": "be brief"}, *ask("what is the colour of the sky over the sea?")],
        [*ask("one?"), {"role": "assistant", "content": "two"}, *ask("three?")],
    ]
    requests = [(messages, text) for messages in conversations for text in ("a", "blue, é", "no <|end|> yet")]
    expected = []
    for messages, text in requests:
        plain = [
            {"role": m["role"], "content": m["content"][0]["text"]} if m["role"] == "user" else m for m in messages
        ]
        context = tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        # What spells a special token is text, as everywhere.
        continuation = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = [*context, *continuation]
        expected.append(reference(stock(torch.tensor([ids[:-1]])).logits[0], ids, len(continuation)))
    assert_same(loaded.likelihoods(requests), expected)


@torch.no_grad()
def test_any_mix_in_a_pack_is_scored_as_each_alone_and_as_its_logits_say(loaded: LoadedModel) -> None:
    prompts = [ask("what is it?"), ask([0.5, 1.0], "and this?"), ask([2.0] * 30), ask("a", [1.0], "b")]
    requests = [(prompt, text) for text in ("yes", "no, never") for prompt in prompts]
    expected = []
    for prompt, text in requests:
        tokens: Any = loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        sample = loaded.encode(prompt).followed_by(tokens)
        logits_TV = loaded.model.logits(loaded.processor.collate([sample]))
        expected.append(reference(logits_TV, sample.token_ids_T.tolist(), len(tokens)))
    together = loaded.likelihoods(requests)
    assert_same(together, expected)
    assert_same([loaded.likelihoods([request])[0] for request in requests], together)
    assert len({each.log_probability for each in together}) == len(requests)


def test_packs_of_any_size_and_heads_in_chunks_score_the_same(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        loaded.encode_answered([*ask([float(i)] * i, "q" * i), {"role": "assistant", "content": "yes" * i}], str(i))
        for i in range(1, 7)
    ]
    expected = [each.likelihood for each in score(loaded.model, samples)]
    for tokens_per_pack in (1, 40, 90):
        given = [each.likelihood for each in score(loaded.model, samples, tokens_per_pack=tokens_per_pack)]
        assert_same(given, expected)
    monkeypatch.setattr(likelihood, "LOGITS_PER_CHUNK", 3 * loaded.model.backbone.vocab_size)
    assert_same([each.likelihood for each in score(loaded.model, samples)], expected)


def test_the_head_sees_no_position_but_those_before_scored_tokens(loaded: LoadedModel) -> None:
    rows: list[int] = []
    head: Any = loaded.model.backbone.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape[0]))
    try:
        loaded.likelihoods([(ask("a long question, of many tokens"), "yes"), (ask([1.0, 2.0]), "never")])
    finally:
        hook.remove()
    assert sum(rows) == len("yes") + len("never")


def test_a_prompt_of_several_continuations_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model()
    prepared: list[Any] = []
    encoded: list[int] = []
    modality: Any = loaded.processor.modalities["numbers"]
    prepare = modality.prepare
    monkeypatch.setattr(modality, "prepare", lambda *given: prepared.append(given) or prepare(*given))
    loaded.model.encoders["numbers"].register_forward_hook(lambda module, given, frames: encoded.extend(frames.lengths))
    monkeypatch.setattr(likelihood, "TOKENS_PER_PACK", 30)
    prompt = [{"role": "user", "content": [{"type": "numbers", "path": "x.json"}]}]
    monkeypatch.setattr(modality, "load", lambda part: [1.0] * 7)
    loaded.likelihoods([(prompt, text) for text in ("red", "green", "blue", "black and white")])
    assert encoded == [7] and len(prepared) == 1


def test_greedy_decoding_gives_what_is_called_greedy(loaded: LoadedModel) -> None:
    for prompt in (ask("a"), ask([0.25, 3.0], "b"), ask("xyz" * 9)):
        (answer,) = loaded.answers([loaded.encode(prompt)], GenerationConfig(max_new_tokens=6))
        context = loaded.encode(prompt)
        said = answer.token_ids
        targets_T = torch.arange(len(context) + len(said)) >= len(context)
        sample = Sample("0", *_text_after(context, said), targets_T, context.items)
        (found,) = loaded.scored([sample])
        assert found.likelihood is not None and found.likelihood.is_greedy
        other = Sample("0", *_text_after(context, [*said[:-1], (said[-1] + 1) % 256]), targets_T, context.items)
        (found,) = loaded.scored([other])
        assert found.likelihood is not None and not found.likelihood.is_greedy


def _text_after(context: Sample, token_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    whole = context.followed_by(token_ids)
    return whole.token_ids_T, whole.modality_ids_T


@torch.no_grad()
def test_text_without_a_template_up_to_the_whole_context(loaded: LoadedModel) -> None:
    """The last token needs no place: it is only predicted."""
    stock = tiny_model("phi4-mini")
    ids = torch.randint(0, 256, (loaded.model.backbone.max_tokens + 1,), generator=torch.Generator().manual_seed(3))
    for length, context in ((len(ids), 1), (len(ids), 200), (2, 1), (24, 5), (25, 24), (26, 3)):
        given = ids[:length].tolist()
        expected = reference(stock(torch.tensor([given[:-1]])).logits[0], given, length - context)
        (found,) = loaded.scored([continued("x", given[:context], given[context:])])
        assert found.likelihood is not None
        assert_same([found.likelihood], [expected])


@pytest.mark.parametrize("context, continuation", [([], [1]), ([1], [])])
def test_text_needs_a_context_and_a_continuation(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match="sample x: its (context|continuation) has no token"):
        continued("x", context, continuation)


def test_a_bad_request_has_its_error_and_its_neighbours_their_likelihoods(loaded: LoadedModel) -> None:
    good = [(ask("a"), "b"), (ask([1.0], "c"), "d")]
    expected = loaded.likelihoods(good)
    for bad, says in (
        ((ask([]), "x"), "no numbers"),
        ((ask([float("nan")]), "x"), "its log-probability is not finite"),
        ((ask("a"), ""), "its answer is empty"),
        ((ask("a"), "x" * 300), "at most 256 fit"),
        (([], "x"), "starts with an assistant turn"),
    ):
        given = loaded.likelihoods([good[0], bad, good[1]], errors="return")
        assert says in str(given[1]) and "sample 1" in str(given[1])
        assert_same([given[0], given[2]], expected)
        with pytest.raises(ValueError, match="sample 1"):
            loaded.likelihoods([good[0], bad, good[1]])
    with pytest.raises(MediaError):
        loaded.likelihoods([(ask([]), "x")])


def test_what_has_no_answer_is_not_scored(loaded: LoadedModel) -> None:
    with pytest.raises(ValueError, match="sample 0: does not end with an assistant message"):
        loaded.encode_answered(ask("a"))
    with pytest.raises(ValueError, match="have one id"):
        list(loaded.scored([continued("x", [1], [2]), continued("x", [1], [3])]))


def test_frames_beyond_the_memory_are_encoded_again_and_score_the_same(loaded: LoadedModel) -> None:
    samples = [loaded.encode_answered([*ask([1.0, 2.0]), {"role": "assistant", "content": t}], t) for t in ("a", "b")]
    expected = [each.likelihood for each in score(loaded.model, samples, frames=FrameMemory(loaded.model, 10**6))]
    given = [each.likelihood for each in score(loaded.model, samples, frames=FrameMemory(loaded.model, 0))]
    assert_same(given, expected)


# Rows of a file.


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def fill(loaded: LoadedModel, given: Path, out: Path) -> dict[str, dict[str, Any]]:
    with answer_file(given, out, "log_probability") as file:
        file.score(loaded)
    lines = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def answered(question: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    return [*question, {"role": "assistant", "content": answer}]


def test_rows_of_a_file_are_scored_and_a_kill_at_any_byte_loses_at_most_a_line(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    texts = [(ask("a"), "b"), (ask([1.0], "c"), "dé"), (ask("e"), "")]
    given = write(tmp_path / "in.jsonl", [{"id": f"r{i}", "messages": answered(*t)} for i, t in enumerate(texts)])
    out = tmp_path / "out.jsonl"
    rows = fill(loaded, given, out)
    assert set(rows["r0"]) == {"id", "messages", "log_probability", "num_tokens", "is_greedy"}
    assert "its answer is empty" in rows["r2"]["error"]
    expected = loaded.likelihoods(texts[:2])
    found = [
        Likelihood(*(rows[id][key] for key in ("log_probability", "num_tokens", "is_greedy"))) for id in ("r0", "r1")
    ]
    assert_same(found, expected)
    whole = out.read_bytes()
    for length in range(0, len(whole), 37):
        out.write_bytes(whole[:length])
        again = fill(loaded, given, out)
        assert again.keys() == rows.keys() and again["r0"]["messages"] == rows["r0"]["messages"]


def test_answers_are_no_likelihoods(loaded: LoadedModel, tmp_path: Path) -> None:
    given = write(tmp_path / "in.jsonl", [{"id": "r0", "messages": answered(ask("a"), "b")}])
    out = write(tmp_path / "out.jsonl", [{"id": "r0", "messages": [], "answer": "x"}])
    with pytest.raises(ConfigError, match="line 1 is no log-probability of molora"):
        fill(loaded, given, out)


# Texts that end an answer.


def test_an_answer_ends_before_the_first_of_its_stops(loaded: LoadedModel) -> None:
    prompts = [ask("a"), ask([0.5], "b"), ask("cd")]
    whole = _told(loaded, prompts, GenerationConfig(max_new_tokens=24))
    stops = [
        (index, text[start : start + 2]) for index, text in enumerate(whole) for start in range(0, len(text) - 2, 4)
    ]
    assert len(stops) > 6
    for index, stop in stops:
        config = GenerationConfig(max_new_tokens=24, stop=("never there", stop))
        expected = whole[index].partition(stop)[0]
        assert _told(loaded, prompts, config)[index] == expected
        assert "".join(loaded.stream(prompts[index], config)) == expected


def test_a_stopped_answer_takes_no_more_steps_and_its_neighbours_go_on(loaded: LoadedModel) -> None:
    prompts = [ask([0.5], "b"), ask("xyz"), ask([2.0])]
    whole = _told(loaded, prompts, GenerationConfig(max_new_tokens=24))
    stop = whole[0][4:6]
    assert stop and not any(stop in text for text in whole[1:])
    config = GenerationConfig(max_new_tokens=24, stop=(stop,))
    samples = (loaded.encode(prompt, str(index)) for index, prompt in enumerate(prompts))
    answers = {answer.id: answer for answer in loaded.answers(samples, config)}
    assert answers["0"].finished == "stop" and answers["0"].answer_tokens < 24
    assert [answers["1"].text, answers["2"].text] == [text.strip() for text in whole[1:]]


@pytest.mark.parametrize("stop", [("",), "text", ["text"], (7,)])
def test_stops_are_texts(stop: Any) -> None:
    with pytest.raises(ValueError, match="^stop cannot be"):
        GenerationConfig(stop=stop)


def _told(loaded: LoadedModel, prompts: Sequence[Any], config: GenerationConfig) -> list[str]:
    """Answers with the spaces around them."""
    samples = (loaded.encode(prompt, str(index)) for index, prompt in enumerate(prompts))
    answers = {answer.id: answer for answer in loaded.answers(samples, config)}
    return [loaded.text(answers[str(index)].token_ids, config) for index in range(len(prompts))]
