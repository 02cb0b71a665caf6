"""Pivotal tokens of a constructed model, whose probability of a right answer is known behind every token."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import molora
from molora.cli.commands import app
from molora.config import ConfigError
from molora.data.preferences import Preferences
from molora.data.sources import MessagesConfig, encode_row
from molora.evaluate.metrics import NoOptions
from molora.inference.drawn import drawn_by
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel
from molora.synthetic.pivot import PivotSearch, pairs, published_rows
from molora.synthetic.pivotal import SearchConfig
from molora.synthetic.rated import open_verifier
from molora.testing import byte_tokenizer
from molora.testing.tiny import VOCAB_SIZE

# Letters of one region stand for each other; what comes next depends on the last token alone. The share of answers that
# hold a Y, which is right, is known behind each region.
REGIONS = {"abcdef": 0.5, "ghijkl": 0.95, "mnopqr": 0.05, "Y": 1.0, "N": 0.0}
END, ASSISTANT = 260, 258


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]  # pyright: ignore[reportReturnType]


def next_tokens() -> dict[int, dict[int, float]]:
    """Probabilities of the next token, by the last one."""
    start, good, bad, (yes,), (no,) = map(ids, REGIONS)

    def evenly(tokens: list[int], share: float) -> dict[int, float]:
        return {token: share / len(tokens) for token in tokens}

    chain = {ASSISTANT: evenly(start, 1.0)}
    for token in start:
        chain[token] = evenly(start, 0.8) | evenly(good, 0.1) | evenly(bad, 0.1)
    for region, right in ((good, 0.95), (bad, 0.05)):
        for token in region:
            chain[token] = evenly(region, 0.8) | {yes: 0.2 * right, no: 0.2 * (1 - right)}
    return chain | {yes: {END: 1.0}, no: {END: 1.0}}


def behind(token: int) -> float:
    """The probability of a right answer behind a token."""
    return next(share for region, share in REGIONS.items() if token in ids(region))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A Llama whose layers add nothing, so that its head reads the embedding of the last token."""
    folder = tmp_path_factory.mktemp("chain") / "backbone"
    width = 264
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, eos_token_id=256, **shape)
    network: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.model.norm.weight.fill_(1.0)
        network.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, width))
        logits = torch.full((VOCAB_SIZE, width), -100.0)
        for token, following in next_tokens().items():
            for other, share in following.items():
                logits[other, token] = torch.tensor(share).log()
        network.lm_head.weight.copy_(logits / width**0.5)
    network.generation_config.eos_token_id = [256, END]
    network.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return molora.load(folder, device="cpu")


DECODING = GenerationConfig(max_new_tokens=60, temperature=1.0, max_running_samples=256)
CONFIG = SearchConfig(most=64)


@pytest.fixture(scope="module")
def whole(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> PivotSearch:
    """A search of three questions."""
    folder = tmp_path_factory.mktemp("search")
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "Y"}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"id": str(n), "messages": turns}) for n in range(3)))
    verifier = open_verifier("regular_expression", options={"pattern": "Y"})
    assert model.layout is not None
    by = partial(drawn_by, model.layout.backbone, (), (), DECODING)
    found = PivotSearch(folder / "rows.jsonl", folder / "out.jsonl", verifier, CONFIG, 2, by)
    with found.held():
        found.find(model, DECODING)
    assert not found.left and not found.failed
    return found


def test_planted_tokens_are_found_their_rows_are_published_and_pairs_are_learned(
    model: LoadedModel, whole: PivotSearch, tmp_path: Path
) -> None:
    found = [(asked, row) for asked, row in whole.found() if row["solutions"]]
    decode = model.processor.decode
    wrong = planted = 0
    for asked, row in found:
        assert [each["right"] for each in row["solutions"]] == [True, False]
        for solution in row["solutions"]:
            shares = [0.5, *map(behind, solution["token_ids"][:-1])]
            shares.append(shares[-1])  # as the last token only ends the answer
            expected = {n for n in range(len(solution["token_ids"])) if abs(shares[n + 1] - shares[n]) >= 0.2}
            planted += len(expected)
            wrong += len(expected ^ {each["place"] for each in solution["pivots"]})
            for pivot in solution["pivots"]:
                low, high = pivot["interval"]
                assert low <= pivot["after"] - pivot["before"] <= high
        for each in published_rows(asked, row, decode):
            assert each["query"] == "go" and each["pivot_token"] == decode([each["pivot_token_id"]])
            assert each["is_positive"] == (each["prob_delta"] > 0) and abs(each["prob_delta"]) >= CONFIG.threshold
    assert planted >= 4 and not wrong
    made = [each for asked, row in found for each in pairs(asked, row, decode, 0.2)]
    assert made
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, made)))
    source = Preferences(MessagesConfig(path=str(tmp_path / "pairs.jsonl")))
    for index in range(len(made)):
        chosen = encode_row(model.processor, source[index], f"pairs/{index}@0", 4096, pairs=True)
        rejected = chosen.rejected
        assert rejected is not None and chosen.num_targets == rejected.num_targets == 1
        assert torch.equal(chosen.token_ids_T[:-1], rejected.token_ids_T[:-1])
        better, worse = (behind(int(sample.token_ids_T[-1])) for sample in (chosen, rejected))
        assert better > worse


def test_a_prefix_is_embedded_once_for_its_draws(
    model: LoadedModel, whole: PivotSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    embed = model.model.embed
    monkeypatch.setattr(model.model, "embed", lambda pack: embedded.append(len(pack)) or embed(pack))
    again = PivotSearch(whole.messages, tmp_path / "out.jsonl", whole.verifier, CONFIG, 2, whole.drawn_by)
    with again.held():
        again.find(model, DECODING)
    found, expected = ([row for _, row in search.found()] for search in (again, whole))
    assert found == expected
    draws = sum(row.get("draws", CONFIG.fewest) for row in found)
    assert sum(embedded) < draws / 4, "some are drawn a few at a time, until an interval decides"


def test_what_was_stopped_goes_on_and_the_command_writes_a_page(
    model: LoadedModel, whole: PivotSearch, tmp_path: Path
) -> None:
    written = whole.output.read_text().splitlines(keepends=True)
    kept = [line for line in written if '"draws"' in line]
    (tmp_path / "part.jsonl").write_text("".join(kept[1:]) + kept[0][:40])
    files = {name: tmp_path / name for name in ("rows.out", "pairs.out", "page.html")}
    assert model.layout is not None
    command = ["pivot", str(model.layout.backbone), str(whole.messages), str(tmp_path / "part.jsonl"), "pattern=Y"]
    command += ["--metric", "regular_expression", "--max-new-tokens", "60", "--temperature", "1", "--most", "64"]
    command += ["--rows", str(files["rows.out"]), "--pairs", str(files["pairs.out"]), "--page", str(files["page.html"])]
    done = CliRunner().invoke(app, [*command, "--max-running-samples", "100"])
    assert done.exit_code == 0, done.output
    (bar,) = (line for line in done.output.splitlines() if line.startswith("pivot "))
    assert bar.endswith(" draws")
    part = (tmp_path / "part.jsonl").read_text().splitlines(keepends=True)
    assert sorted(part) == sorted(written), "beside other draws a search finds the same"
    solutions = sum(len(row["solutions"]) for _, row in whole.found())
    assert f"pivotal tokens in {solutions} solutions" in done.output and files["rows.out"].read_text()
    page = files["page.html"].read_text()
    assert page.count("<svg") == solutions and "<b class=" in page


@pytest.mark.parametrize("changes", [{"pattern": "N"}, {"threshold": 0.3}, {"num_solutions": 3}])
def test_searches_by_another_verifier_or_config_are_not_mixed(whole: PivotSearch, changes: dict[str, Any]) -> None:
    verifier = open_verifier("regular_expression", options={"pattern": changes.get("pattern", "Y")})
    config = replace(CONFIG, threshold=changes.get("threshold", CONFIG.threshold))
    other = PivotSearch(whole.messages, whole.output, verifier, config, changes.get("num_solutions", 2))
    with pytest.raises(ConfigError, match=r"line 1 was rated by '.*', and not by '.*another output"), other.held():
        pass


def test_searches_of_other_questions_or_settings_are_not_mixed(whole: PivotSearch, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="line 1 was drawn otherwise: temperature is 1.0 there and 0.5 here; give"),
        PivotSearch(
            whole.messages, whole.output, whole.verifier, CONFIG, 2, lambda: {**whole.how, "temperature": 0.5}
        ).held(),
    ):
        pass
    changed = tmp_path / "rows.jsonl"
    changed.write_text(whole.messages.read_text().replace('"go"', '"stay"'))
    with (
        pytest.raises(ConfigError, match="line 1 answers '.*', and that row asks something else now; give another"),
        PivotSearch(changed, whole.output, whole.verifier, CONFIG, 2, whole.drawn_by).held(),
    ):
        pass
    assert whole.output.read_text()


class Fails:
    """Cannot rate anything."""

    config_type = NoOptions
    rates_each = True

    def __init__(self, config: NoOptions) -> None: ...

    def score(self, judged: Any) -> Any:
        raise KeyError("boom")


def test_a_metric_that_fails_is_the_error_of_each_question(
    model: LoadedModel, whole: PivotSearch, tmp_path: Path
) -> None:
    search = PivotSearch(whole.messages, tmp_path / "out.jsonl", open_verifier(f"{__file__}:Fails"), CONFIG, 2)
    with search.held():
        search.find(model, DECODING)
    rows = list(map(json.loads, search.output.read_text().splitlines()))
    assert [row["error"] for row in rows] == ["metric Fails: KeyError: 'boom'"] * 3 and len(search.left) == 3


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (
            "^never$",
            "3 of 3 questions are not searched, as their share of right answers is below 0.2; ask easier ones,",
        ),
        (".", "3 of 3 questions are not searched, as their share of right answers is above 0.8; ask harder ones"),
    ],
)
def test_questions_that_are_too_hard_or_too_easy_are_counted(
    model: LoadedModel, whole: PivotSearch, tmp_path: Path, pattern: str, says: str
) -> None:
    verifier = open_verifier("regular_expression", options={"pattern": pattern})
    search = PivotSearch(whole.messages, tmp_path / "out.jsonl", verifier, CONFIG, 2)
    with search.held():
        search.find(model, DECODING)
    rows = [row for _, row in search.found()]
    first, second = search.summary(rows)
    assert first == "0 pivotal tokens in 0 solutions, 48 draws" and second.startswith(says)
    for row in rows:  # as older files have them
        del row["draws"]
    assert [*search.summary(rows)] == [first, second]


def test_an_answer_by_its_tokens_is_checked(model: LoadedModel) -> None:
    asked = {"role": "user", "content": "go"}

    def encode(**answer: Any) -> Any:
        return model.processor.encode([asked, {"role": "assistant", **answer}], "0")

    one, two, three = ids("abc")
    sample = encode(content="abc", token_ids={"before": [one, two], "answer": [three]})
    assert sample.token_ids_T[-3:].tolist() == [one, two, three]
    assert sample.targets_T.nonzero().flatten().tolist() == [len(sample) - 1]
    first = encode(content="a", token_ids={"before": [], "answer": [one]})
    assert first.token_ids_T[-1] == one and first.targets_T.nonzero().flatten().tolist() == [len(first) - 1]
    for token_ids, message in (
        ({"before": [one], "answer": [two]}, "do not read 'abc', the content; another tokenizer"),
        ({"before": [one], "answer": []}, "of one token or more"),
        ({"before": "ab", "answer": [three]}, "expected lists of numbers"),
        ({"before": [one, two], "answer": [10**6]}, "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(content="abc", token_ids=token_ids)
    with pytest.raises(ValueError, match="only the last message may be given by its tokens"):
        turn = {"role": "assistant", "content": "c", "token_ids": {"before": [], "answer": [three]}}
        model.processor.encode([asked, turn, asked, {"role": "assistant", "content": "x"}], "0")
