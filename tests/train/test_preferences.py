"""Preferences: losses and gradients are those of TRL, however the pairs are packed, and of each modality alone."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import molora
from molora.config import ConfigError, build, dump
from molora.data.processor import Processor
from molora.data.sources import encode_row
from molora.interrupt import Interrupt, Stopped
from molora.model.backbone import Backbone
from molora.model.identity import Identity
from molora.model.lora import lora_config
from molora.model.molora import Losses, MoLoRA
from molora.pack import Pack, Sample
from molora.routers.table import TableConfig, TableRouter
from molora.testing import Letters, Numbers, assert_close, byte_tokenizer, save_backbone, tiny_model
from molora.testing.tiny import NumbersConfig
from molora.train.loop import train
from molora.train.optim import PartConfig, set_trainable
from molora.train.preference import Reference, preference_step
from molora.train.preference_losses import LOSSES, PreferenceConfig, Scores, preference_losses
from molora.train.recipe import Recipe
from molora.train.step import TrainingError, train_step
from tests.train.test_train import in_processes, outcome_in_spite_of_kills

TARGETS = ["o_proj", "down_proj"]
# TRL's padded batch would have LongRoPE's frequencies of its longest row.
FAMILY = "llama"
ANSWERS = (("yes, it is", "no"), ("four", "five, or six"), ("a cat", "some dog or other"), ("b", "cc"))


def make_model(rules: dict[str, str | None] | None = None, dropout: float = 0.0) -> MoLoRA:
    modalities: dict[str, Any] = {
        "numbers": Numbers("numbers", NumbersConfig()),
        "letters": Letters("letters", NumbersConfig()),
    }
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": TARGETS}
    adapters = {name: lora_config(options, name) for name in modalities}
    backbone = Backbone(tiny_model(FAMILY), Identity("test", "", "", "", ""))
    return MoLoRA(backbone, modalities, adapters, TableRouter([*modalities], TableConfig(rules or {})))


def processor_of(model: MoLoRA) -> Processor:
    return Processor(byte_tokenizer(), model.modalities, model.router.order, model.backbone.max_tokens)


def make_pairs(model: MoLoRA, kinds: Sequence[str], count: int = 4) -> list[Sample]:
    """Pairs that ask in turn with a text alone (""), numbers or letters."""
    parts: dict[str, list[dict[str, Any]]] = {
        "": [],
        "numbers": [{"type": "numbers", "numbers": [0.5, -1.0]}],
        "letters": [{"type": "letters", "letters": "ab"}],
    }
    pairs = []
    for index in range(count):
        content = [*parts[kinds[index % len(kinds)]], {"type": "text", "text": f"what is it{'?' * (index + 1)}"}]
        chosen, rejected = (
            [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
            for answer in ANSWERS[index % len(ANSWERS)]
        )
        row = {"id": str(index), "messages": chosen, "rejected": rejected}
        pairs.append(encode_row(processor_of(model), row, f"rows/{index}@0", 4096, pairs=True))
    return pairs


def randomise(model: MoLoRA, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for part, parameters in model.parts().items():
        if part.startswith("adapters."):
            for parameter in parameters.values():
                parameter.data = torch.randn(parameter.shape, generator=draw) * 0.15


def trained(model: MoLoRA, patterns: Sequence[str] = ("adapters", "projectors")) -> Any:
    how = {pattern: PartConfig(learning_rate=1e-3, max_gradient_norm=math.inf) for pattern in patterns}
    return set_trainable(model, how, 10, "test")


def gradients_of(
    model: MoLoRA, pairs: list[Sample], config: PreferenceConfig, reference: Reference | None, tokens: int = 4096
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model.train()
    row = preference_step(model, processor_of(model), pairs, tokens, {}, config, reference)
    found = {}
    for part, parameters in model.parts().items():
        for key, parameter in parameters.items():
            if parameter.grad is not None:
                found[f"{part}.{key}"], parameter.grad = parameter.grad, None
    return row, found


def assert_same_update(one: tuple[dict[str, Any], dict[str, Tensor]], other: tuple[Any, Any]) -> None:
    """Rows and gradients, as `gradients_of` returns them."""
    (row, found), (expected, gradients) = one, other
    assert row.keys() == expected.keys() and found.keys() == gradients.keys()
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    for name, gradient in gradients.items():
        assert_close(found[name], gradient, 1e-5, name)


# TRL --------------------------------------------------------------------------------------------------------------


class Trl:
    """TRL's trainer of the same model, whose adapter has two states: the policy's and the reference's."""

    def __init__(self, folder: Path) -> None:
        datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
        self.ours = make_model({"text": "numbers"})
        trained(self.ours, ["adapters.numbers"])
        randomise(self.ours, 1)
        self.reference = Reference(self.ours)
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model: Any = get_peft_model(tiny_model(FAMILY), adapter)
        self._copy()
        rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        tokenizer = byte_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        config = trl.DPOConfig(str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
        self.trainer: Any = trl.DPOTrainer(self.model, args=config, train_dataset=rows, processing_class=tokenizer)
        randomise(self.ours, 2)
        self._copy()
        self.model.eval()

    def _parameters(self) -> dict[str, Any]:
        return {
            name.removeprefix("base_model.model.").replace(".default.weight", ".weight"): parameter
            for name, parameter in self.model.named_parameters()
            if ".default." in name
        }

    def _copy(self) -> None:
        parts = self.ours.parts()["adapters.numbers"]
        theirs = self._parameters()
        assert theirs.keys() == parts.keys()
        for name, parameter in theirs.items():
            parameter.data = parts[name].data.clone()

    def loss(self, pairs: Sequence[Sample], **settings: Any) -> tuple[float, dict[str, Tensor]]:
        trainer = self.trainer
        trainer.loss_types, trainer.loss_weights = [*settings["losses"]], [*settings["losses"].values()]
        trainer.beta, trainer.label_smoothing = settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
        samples = [*pairs, *(pair.rejected for pair in pairs if pair.rejected is not None)]
        ids, mask, targets = (
            pad_sequence([make(sample) for sample in samples], batch_first=True)
            for make in (
                lambda sample: sample.token_ids_T,
                lambda sample: torch.ones(len(sample), dtype=torch.long),
                lambda sample: sample.targets_T.long(),
            )
        )
        inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": targets}
        loss = trainer._compute_loss(self.model, inputs, return_outputs=False)
        parameters = self._parameters()
        found = torch.autograd.grad(loss, list(parameters.values()))
        return loss.item(), dict(zip(parameters, found, strict=True))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Trl:
    return Trl(tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize(
    "settings",
    [
        *({"losses": {name: 1.0}} for name in LOSSES if name not in ("exo_pair", "odds_ratio")),
        {"losses": {"exo_pair": 1.0}, "label_smoothing": 0.01},
        {"losses": {"robust": 1.0}, "label_smoothing": 0.2, "beta": 0.4},
        {"losses": {"aot": 1.0}, "label_smoothing": 0.1},
        {"losses": {"sigmoid": 0.8, "sft": 0.3, "bco_pair": 0.2}, "beta": 0.5},
    ],
    ids=lambda settings: "+".join(settings["losses"]) + str(settings.get("label_smoothing", "")),
)
def test_losses_and_gradients_are_those_of_trl(oracle: Trl, settings: dict[str, Any]) -> None:
    pairs = make_pairs(oracle.ours, [""])
    row, found = gradients_of(oracle.ours, pairs, PreferenceConfig(**settings), oracle.reference)
    loss, expected = oracle.loss(pairs, **settings)
    assert row["loss/text"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert {f"adapters.numbers.{name}" for name in expected} == found.keys()
    for name, gradient in expected.items():
        assert_close(found[f"adapters.numbers.{name}"], gradient, 1e-5, name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3


def test_means_over_tokens_are_those_of_trl(oracle: Trl) -> None:
    pairs = make_pairs(oracle.ours, [""])
    config = PreferenceConfig(length_normalised=True)
    row, found = gradients_of(oracle.ours, pairs, config, oracle.reference)
    loss, expected = oracle.loss(pairs, losses={"sigmoid_norm": 1.0})
    assert row["loss/text"] == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        assert_close(found[f"adapters.numbers.{name}"], gradient, 1e-5, name)


# What the papers say of losses that TRL has elsewhere or not at all -------------------------------------------------


def test_orpo_and_simpo_are_what_their_papers_say() -> None:
    model = make_model()
    trained(model)
    randomise(model, 3)
    pairs = make_pairs(model, ["numbers"])
    with torch.no_grad():
        samples = [answer for pair in pairs for answer in (pair, pair.rejected) if answer is not None]
        packed = processor_of(model).collate([*samples])
        sums = dict(zip(packed.ids, model.losses(packed).sums_N.double(), strict=True))
    means = [[-sums[each.id] / each.num_targets for each in (pair, pair.rejected) if each] for pair in pairs]
    simpo = torch.stack([-torch.nn.functional.logsigmoid(2.0 * (won - lost) - 1.6) for won, lost in means]).mean()
    config = PreferenceConfig(beta=2.0, margin=1.6, length_normalised=True, reference=False)
    row, _ = gradients_of(model, pairs, config, None)
    assert row["loss/numbers"] == pytest.approx(float(simpo), rel=1e-5)
    odds = [[mean.exp() / (1 - mean.exp()) for mean in pair] for pair in means]
    ratio = torch.stack([-torch.sigmoid((won / lost).log()).log() for won, lost in odds]).mean()
    learned = sum(sums[pair.id] for pair in pairs) / sum(pair.num_targets for pair in pairs)
    config = PreferenceConfig(losses={"sft": 1.0, "odds_ratio": 0.1}, reference=False)
    row, _ = gradients_of(model, pairs, config, None)
    assert row["loss/numbers"] == pytest.approx(float(learned + 0.1 * ratio), rel=1e-5)


# The ends of the numbers ----------------------------------------------------------------------------------------------


def all_scores_of(*log_probabilities: float) -> tuple[Scores, list[Tensor]]:
    """All pairs of answers, and of the reference's, with these log-probabilities; and those of the model's answers."""
    values = torch.tensor(log_probabilities, dtype=torch.float64)
    chosen, rejected, *theirs = (each.clone() for each in torch.cartesian_prod(*[values] * 4).unbind(1))
    ours = [chosen.requires_grad_(True), rejected.requires_grad_(True)]
    tokens = torch.ones_like(chosen)
    return Scores(chosen, rejected, theirs[0], theirs[1], tokens, tokens), ours


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_slopes_are_finite_for_answers_that_are_certain_or_impossible(name: str, beta: float) -> None:
    """Also where the reference is sure of the contrary."""
    scores, ours = all_scores_of(0.0, -1e-8, -1.0, -1e4)
    losses_P = preference_losses(scores, PreferenceConfig(losses={name: 1.0}, beta=beta, label_smoothing=0.01))
    assert losses_P.isfinite().all()
    slopes = torch.autograd.grad(losses_P.sum(), ours, materialize_grads=True)
    assert all(each.isfinite().all() for each in slopes)


@pytest.mark.parametrize("rejected", [-3.0, -1.0, -0.1])
def test_the_odds_ratio_of_a_certain_answer_has_the_slope_of_one_that_is_nearly_certain(rejected: float) -> None:
    """Which tends to the odds of the rejected answer."""
    for chosen in (0.0, -1e-8, -1e-5):
        ours = torch.tensor([chosen], dtype=torch.float64, requires_grad=True)
        theirs, one = torch.full_like(ours, rejected), torch.ones_like(ours)
        scores = Scores(ours, theirs, one, one, one, one)
        losses_P = preference_losses(scores, PreferenceConfig(losses={"odds_ratio": 1.0}))
        (slope,) = torch.autograd.grad(losses_P.sum(), ours)
        odds = math.exp(rejected) / (1 - math.exp(rejected))
        assert slope.item() == pytest.approx(-odds, rel=1e-3)


# Packs, groups and references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "sft"])
def test_the_update_is_the_same_in_any_packs(loss: str) -> None:
    model = make_model()
    trained(model)
    randomise(model, 1)
    reference = Reference(model)
    randomise(model, 2)
    pairs = make_pairs(model, ["numbers", "letters", ""], 9)
    config = PreferenceConfig(losses={loss: 1.0}, label_smoothing=0.1)
    row, found = gradients_of(model, pairs, config, reference)
    for tokens in (max(len(each) for pair in pairs for each in (pair, pair.rejected) if each), 150):
        other, apart = gradients_of(model, pairs, config, reference, tokens)
        assert_same_update((other, apart), (row, found))


def test_both_forwards_drop_out_the_same_and_the_reference_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside pairs of an adapter that drops out and does not train."""
    model = make_model(dropout=0.5)
    trained(model, ["adapters.numbers"])
    randomise(model, 1)
    found: dict[str, dict[str, float]] = {"reference": {}, "first": {}, "second": {}}
    losses = MoLoRA.losses

    def noted(model: MoLoRA, pack: Pack) -> Losses:
        result = losses(model, pack)
        forward = "second" if torch.is_grad_enabled() else "first" if model.training else "reference"
        found[forward] |= dict(zip(pack.ids, result.sums_N.tolist(), strict=True))
        return result

    monkeypatch.setattr(MoLoRA, "losses", noted)
    pairs = make_pairs(model, ["numbers", "letters"], 8)
    gradients_of(model, pairs, PreferenceConfig(), Reference(model), 150)
    learned = [id for pair in pairs if pair.modalities == {"numbers"} for id in (pair.id, f"{pair.id}, rejected")]
    assert found["second"] == pytest.approx({id: found["first"][id] for id in learned}, rel=1e-5)
    assert found["first"] != pytest.approx(found["reference"], rel=1e-2)
    model.eval()
    answers = [answer for pair in pairs for answer in (pair, pair.rejected) if answer is not None]
    bare = {each.id: losses(model, processor_of(model).collate([each])).sums_N.item() for each in answers}
    assert found["reference"] == pytest.approx(bare, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prompt_of_a_pair_runs_once(checkpointing: bool) -> None:
    """And gives the update that it gives where each answer is a pack of its own."""
    model = make_model()
    trained(model)
    randomise(model, 1)
    reference = Reference(model)
    randomise(model, 2)
    model.backbone.activation_checkpointing = checkpointing
    pairs = make_pairs(model, ["numbers", "letters", ""], 6)
    answers = [answer for pair in pairs for answer in (pair, pair.rejected) if answer is not None]
    counts: list[int] = []
    model.backbone.register_forward_pre_hook(lambda module, given: counts.append(len(given[0])))
    row, found = gradients_of(model, pairs, PreferenceConfig(), reference)
    prompts = sum(int(pair.targets_T.nonzero()[0]) for pair in pairs)
    assert sum(counts[: len(counts) // 2]) == sum(map(len, answers)) - prompts
    other, apart = gradients_of(model, pairs, PreferenceConfig(), reference, max(map(len, answers)))
    assert_same_update((other, apart), (row, found))


def test_a_pair_alone_has_the_loss_that_it_has_beside_others() -> None:
    model = make_model()
    trained(model)
    randomise(model, 1)
    reference = Reference(model)
    randomise(model, 2)
    pairs = make_pairs(model, ["numbers"])
    together, _ = gradients_of(model, pairs, PreferenceConfig(), reference)
    alone = [gradients_of(model, [pair], PreferenceConfig(), reference)[0]["loss/numbers"] for pair in pairs]
    assert together["loss/numbers"] == pytest.approx(sum(alone) / len(alone), rel=1e-5)


def test_a_fresh_adapter_begins_at_the_logarithm_of_two() -> None:
    model = make_model()
    trained(model)
    row, _ = gradients_of(model, make_pairs(model, ["numbers", "letters"]), PreferenceConfig(), Reference(model))
    assert row["loss/numbers"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["loss/letters"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["accuracy/numbers"] == 0 and row["pairs/numbers"] == 2


def test_each_modality_gets_the_update_that_it_gets_alone() -> None:
    """And text, which has no adapter, changes nothing."""
    moved: dict[str, dict[str, Tensor]] = {}
    for kinds in (("numbers", "letters", ""), ("numbers",), ("letters",)):
        model = make_model()
        optimizers = trained(model)
        randomise(model, 1)
        reference = Reference(model)
        pairs = [pair for pair in make_pairs(model, ["numbers", "letters", ""], 12)
                 if (next(iter(pair.modalities), "")) in kinds]  # fmt: skip
        for _ in range(5):
            model.train()
            preference_step(model, processor_of(model), pairs, 4096, optimizers, PreferenceConfig(), reference)
        moved["+".join(kinds)] = {
            f"{part}.{key}": p.detach().clone() for part, ps in model.parts().items() for key, p in ps.items()
        }
    together = moved["numbers+letters+"]
    for kind in ("numbers", "letters"):
        for name, tensor in moved[kind].items():
            if name.startswith((f"adapters.{kind}", f"projectors.{kind}")):
                assert_close(together[name], tensor, 1e-5, name)


def test_preferences_are_learned_and_the_reference_stays() -> None:
    model = make_model()
    optimizers = trained(model)
    reference = Reference(model)
    before = copy.deepcopy(reference.tensors)
    pairs = make_pairs(model, ["numbers"])
    rows = []
    for _ in range(10):
        model.train()
        rows.append(preference_step(model, processor_of(model), pairs, 4096, optimizers, PreferenceConfig(), reference))
    assert rows[-1]["loss/numbers"] < rows[0]["loss/numbers"] - 0.01 and rows[-1]["accuracy/numbers"] == 1
    assert rows[-1]["reward_chosen/numbers"] > rows[-1]["reward_rejected/numbers"]
    assert all(torch.equal(before[name], tensor) for name, tensor in reference.tensors.items())


@pytest.mark.parametrize("objective", ["answers", "preferences"])
def test_a_gradient_that_is_not_finite_stops_before_any_part_is_changed(objective: str) -> None:
    model = make_model()
    optimizers = trained(model)
    randomise(model, 1)
    parameters = {f"{part}.{key}": p for part, ps in model.parts().items() for key, p in ps.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _, last = max((name, p) for name, p in parameters.items() if name.startswith("adapters.letters"))
    last.register_hook(lambda gradient: gradient * math.nan)
    pairs = make_pairs(model, ["numbers", "letters"])
    with_what = (model.train(), processor_of(model), pairs, 4096, optimizers)
    with pytest.raises(TrainingError, match=r"the gradient norm is not finite \({'adapters.letters': nan}\); stopped"):
        if objective == "preferences":
            preference_step(*with_what, PreferenceConfig(), None)
        else:
            train_step(*with_what)
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters.items())


# Recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    save_backbone(folder / "backbone")
    rows = []
    for index in range(12):
        kind = ("numbers", "letters")[index % 2]
        part = {"type": kind, kind: [0.1 * index] if kind == "numbers" else "ab"}
        prompt = [{"role": "user", "content": [part, {"type": "text", "text": f"question {index}"}]}]
        chosen, rejected = ANSWERS[index % len(ANSWERS)]
        rows.append({"id": f"row {index}", "prompt": prompt, "chosen": chosen, "rejected": rejected})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [{"id": row["id"], "messages": [*row["prompt"], {"role": "assistant", "content": "x"}]} for row in rows]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


def recipe(home: Path, run: Path, **changes: Any) -> Recipe:
    adapter = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["qkv_proj", "down_proj"]}
    stage = {
        "name": "preferences",
        "objective": "preferences",
        "train": {"adapters": {"learning_rate": 1e-2}, "projectors": {"learning_rate": 1e-3}},
        "data": {"pairs": {"kind": "preferences", "options": {"path": str(home / "pairs.jsonl")}}},
        "steps": 6,
        "samples_per_step": 4,
        "tokens_per_pack": 150,
        **changes,
    }
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {
            "numbers": {"plugin": "molora.testing:Numbers", "adapter": adapter},
            "letters": {"plugin": "molora.testing:Letters", "adapter": adapter},
        },
        "stages": [stage],
        "save_every_steps": 1,
        "trackers": [],
        "device": "cpu",
    }
    return build(Recipe, values, "test")


def interrupted(interrupt: Interrupt) -> Interrupt:
    """As if Ctrl-C had come when training began."""
    interrupt.number = signal.SIGINT
    return interrupt


def tensors_of(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted((run / "modalities").rglob("*.safetensors"))}


def logged(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def test_a_stage_of_preferences_goes_on_as_if_it_had_not_stopped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step in a process's own life: the reference is that of the stage's beginning all the same."""
    whole = train(recipe(home, tmp_path / "whole"), show=False)
    assert not list(whole.glob("state/*/reference.safetensors")), "the reference is of no use at a stage's end"
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__enter__", interrupted)
        for step in range(1, 6):
            with pytest.raises(Stopped, match=f"after step {step} of 6"):
                train(recipe(home, tmp_path / "stopped"), show=False)
            assert load_file(tmp_path / f"stopped/state/step-{step}/reference.safetensors")
    train(recipe(home, tmp_path / "stopped"), show=False)
    assert tensors_of(whole) == tensors_of(tmp_path / "stopped")
    assert logged(whole) == logged(tmp_path / "stopped")
    answer = molora.load(whole).generate(
        [{"role": "user", "content": [{"type": "letters", "letters": "ab"}]}],
        molora.GenerationConfig(max_new_tokens=2),
    )
    assert isinstance(answer, str)


def test_a_stage_of_preferences_killed_at_twenty_moments_ends_like_one_that_was_not(home: Path, tmp_path: Path) -> None:
    """What it learned before the stage is the reference, which is in no file but the state."""
    runs = [recipe(home, tmp_path / name, steps=4) for name in ("straight", "killed")]
    answers = {"rows": {"kind": "messages", "options": {"path": str(home / "answers.jsonl")}}}
    before = recipe(home, tmp_path / "any", name="answers", objective="answers", data=answers, steps=2).stages[0]
    for run in runs:
        run.stages.insert(0, before)
    ours = outcome_in_spite_of_kills(*runs)
    assert [row["step"] for row in ours["rows"]] == [1, 2, 3, 4, 5, 6]
    assert "accuracy/letters" in ours["rows"][-1]


@pytest.mark.parametrize(("pairs", "sharded"), [(2, False), (3, True)], ids=["whole", "sharded"])
def test_two_processes_learn_like_one(home: Path, tmp_path: Path, pairs: int, sharded: bool) -> None:
    """A pair for each, so that one often has a modality that the other has not, and sorts pairs that lie apart; or two
    for one of them, whose answers lie in more packs."""
    runs = []
    for name in ("one", "two"):
        config = recipe(home, tmp_path / name, steps=20, samples_per_step=pairs, preference={"losses": {"aot": 1.0}})
        config.shard_backbone = sharded
        for modality in config.modalities.values():
            modality.adapter = {**(modality.adapter or {}), "lora_dropout": 0.0}
        runs.append(config)
    train(runs[0], show=False)
    (tmp_path / "two.yaml").write_text(dump(runs[1]))
    in_processes(tmp_path / "two.yaml")
    one, two = (logged(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 20 and any("loss/numbers" in row and "loss/letters" in row for row in one)
    for row, expected in zip(two, one, strict=True):
        assert row.keys() == expected.keys() and row["samples_digest"] == expected["samples_digest"]
        for key, value in expected.items():
            if key.startswith(("loss/", "accuracy/", "reward_")):
                assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-5), f"step {row['step']}: {key}"


def test_a_reference_that_is_gone_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "__enter__", interrupted)
        with pytest.raises(Stopped):
            train(recipe(home, tmp_path / "run"), show=False)
    (tmp_path / "run/state/step-1/reference.safetensors").unlink()
    with pytest.raises(ValueError, match="the reference of the stage's preferences, in the state: .* missing adapters"):
        train(recipe(home, tmp_path / "run"), show=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"encoders": {"learning_rate": 1e-3}}}, "stages.0.train: .*encoders.letters.* stay frozen"),
        ({"preference": {"losses": {"sigmiod": 1}}}, "losses: 'sigmiod' is none; did you mean 'sigmoid'?"),
        ({"preference": {"losses": {}}}, "losses: none given"),
        ({"preference": {"losses": {"sigmoid": -1}}}, "losses.sigmoid: weight -1"),
        ({"preference": {"beta": 0}}, "beta is 0"),
        ({"preference": {"label_smoothing": 0.5}}, "label_smoothing is 0.5"),
        ({"preference": {"losses": {"exo_pair": 1}}}, "label_smoothing is 0, where the loss exo_pair is infinite"),
        ({"preference": {"margin": -1}}, "margin is -1"),
        ({"objective": "answers", "preference": {"beta": 0.2}}, "preference: is for `objective: preferences`"),
    ],
)
def test_what_cannot_be_learned_is_told(home: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(home, tmp_path / "run", **changes), show=False)
    assert not (tmp_path / "run/state").exists()


def test_rows_without_a_rejected_answer_are_told(home: Path, tmp_path: Path) -> None:
    data = {"rows": {"kind": "messages", "options": {"path": str(home / "answers.jsonl")}}}
    with pytest.raises(ValueError, match="answers.jsonl, row 1: .*has no rejected answer; preferences are learned"):
        train(recipe(home, tmp_path / "run", data=data), show=False)


def test_answers_that_show_other_media_are_told_before_training(home: Path, tmp_path: Path) -> None:
    shown = [{"type": "letters", "letters": "ab"}, {"type": "text", "text": "this"}]
    row = {"prompt": "what?", "chosen": "that", "rejected": [{"role": "assistant", "content": shown}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    data = {"pairs": {"kind": "preferences", "options": {"path": str(tmp_path / "pairs.jsonl")}}}
    with pytest.raises(ValueError, match="0 media with the chosen answer and 1 with the rejected one"):
        train(recipe(home, tmp_path / "run", data=data), show=False)
    assert not (tmp_path / "run/state").exists()
