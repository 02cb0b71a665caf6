"""Ranks of which one lacks what the other has never wait for each other, and make the update that one process makes."""

from __future__ import annotations

import gc
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.checkpoint.opening import open_model
from molora.config import ConfigError, dump, read
from molora.doctor.dry_run import on_meta
from molora.doctor.needs import gathered, weights
from molora.evaluate.judge import Evaluation
from molora.interrupt import Stopped
from molora.ranks import Ranks, launched_ranks
from molora.train.loop import train
from molora.train.optim import PartConfig, set_trainable
from molora.train.recipe import Recipe, plan_recipe
from molora.train.step import train_step
from tests.doctor.test_memory import most_allocated
from tests.train.test_train import FORKS, constant, environments, in_processes, outcome, recipe, write_home

TEXT: dict[str, Any] = {"type": "text", "text": "and this?"}
NUMBERS: dict[str, Any] = {"type": "numbers", "numbers": [0.5, 1.0]}
LETTERS: dict[str, Any] = {"type": "letters", "letters": "abc"}
# What a rank's share of a step may hold.
SHARES: dict[str, list[list[dict[str, Any]]]] = {
    "text": [[TEXT]],
    "numbers": [[NUMBERS, TEXT]],
    "letters": [[LETTERS, TEXT]],
    "both": [[NUMBERS, LETTERS, TEXT]],
    "nothing": [],
}
STEPS = 10


def losses_of_all_assignments(home: Path, ranks: Ranks, *, sharded: bool = False) -> dict[str, list[dict[str, float]]]:
    """The losses of ten steps for every assignment of shares to two ranks, of which a lone process takes both; and
    under "bytes" those of all tensors that the process has then, and those that a step takes beside them at most."""
    config = recipe(home, home / "run")
    patterns = {name: PartConfig(learning_rate=1e-3) for name in ("encoders", "projectors", "adapters")}
    found = {}
    model, processor = open_model(plan_recipe(config), "cpu", ranks if sharded else None)
    model.eval()  # dropout is drawn rank by rank
    learned = [weight for weights in model.parts().values() for weight in weights.values()]
    begun = [weight.detach().clone() for weight in learned]
    for assigned in itertools.product(SHARES, repeat=2):
        with torch.no_grad():
            for weight, value in zip(learned, begun, strict=True):
                weight.copy_(value)
        optimizers = set_trainable(model, patterns, STEPS, "test")
        mine = assigned if ranks.count == 1 else [assigned[ranks.index]]
        samples = [
            processor.encode(
                [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}], f"{place} {index}"
            )
            for place, share in enumerate(mine)
            for index, content in enumerate(SHARES[share])
        ]
        rows = [train_step(model, processor, samples, 4096, optimizers, ranks) for _ in range(STEPS)]
        found[" and ".join(assigned)] = [
            {key: value for key, value in row.items() if key.startswith("loss/")} for row in rows
        ]
    messages = [{"role": "user", "content": [NUMBERS, TEXT]}, {"role": "assistant", "content": "yes"}]
    samples = [processor.encode(messages, str(ranks.index))]
    found["bytes"] = [{"alive": bytes_alive()}]
    train_step(model, processor, samples, 4096, {}, ranks)  # which leaves gradients
    step = most_allocated(lambda: train_step(model, processor, samples, 4096, {}, ranks))
    found["bytes"][0]["step"] = step
    return found


def bytes_alive() -> int:
    """Of all storages that a tensor of this process has."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def as_rank(environment: dict[str, str], told: Path, home: Path, sharded: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    torch.save(losses_of_all_assignments(home, launched_ranks("cpu"), sharded=sharded), told)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_every_assignment_of_modalities_to_two_ranks_trains_as_one_process(tmp_path: Path, sharded: bool) -> None:
    home = write_home(tmp_path)
    two = [tmp_path / "losses of one", tmp_path / "losses of the other"]
    jobs = [({}, tmp_path / "losses", False)]  # a fresh process too, in which nothing is left of another test
    jobs += [(environment, told, sharded) for environment, told in zip(environments(2), two, strict=True)]
    processes = [FORKS.Process(target=as_rank, args=(*job[:2], home, job[2])) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
            raise AssertionError("the ranks wait for each other")
        assert process.exitcode == 0
    expected = torch.load(tmp_path / "losses", weights_only=True)
    model = on_meta(recipe(home, home / "run"))
    elsewhere = weights(model)[0].num_bytes - weights(model, 2)[0].num_bytes
    (whole_layers,) = (need.num_bytes for need in gathered(model, 2))
    (held,) = expected.pop("bytes")
    for told in two:
        ours = torch.load(told, weights_only=True)
        (of_rank,) = ours.pop("bytes")
        assert held["alive"] - of_rank["alive"] == pytest.approx(elsewhere if sharded else 0, rel=0.01, abs=1000)
        # Two layers and a half without fail, and one more for each of gloo's two threads that is late to let go.
        more = of_rank["step"] - held["step"]
        assert 2 / 5 * whole_layers < more <= whole_layers if sharded else abs(more) < 0.01 * held["step"]
        assert ours.keys() == expected.keys() and len(expected) == len(SHARES) ** 2
        for assigned, rows in expected.items():
            for step, row in enumerate(rows):
                assert ours[assigned][step] == pytest.approx(row, rel=1e-5, abs=1e-5), f"{assigned}, step {step}"


def as_rank_that_is_stopped(environment: dict[str, str], path: Path) -> None:
    """Trains; the second rank gets a signal when it has an answer of the first evaluation."""
    torch.set_num_threads(1)
    os.environ.update(environment)
    answered = Evaluation.run

    def signalled(*given: Any, before_each: Callable[[], None], **more: Any) -> Any:
        def note() -> None:
            if environment["RANK"] == "1":
                signal.raise_signal(signal.SIGTERM)
            before_each()

        return answered(*given, before_each=note, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Evaluation, "run", signalled)
        train(read(Recipe, path), show=False)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_signal_to_one_rank_ends_an_evaluation_of_all(tmp_path: Path, sharded: bool) -> None:
    home = write_home(tmp_path)
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        config = recipe(home, tmp_path / name / "run", shard_backbone=sharded)
        (tmp_path / name / "recipe.yaml").write_text(dump(config))
    path = tmp_path / "stopped/recipe.yaml"
    ranks = [FORKS.Process(target=as_rank_that_is_stopped, args=(each, path)) for each in environments(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    log = (path.parent / "run/metrics.jsonl").read_text()
    assert "samples_digest" in log and "rows/exact_match" not in log
    in_processes(path)
    in_processes(tmp_path / "straight/recipe.yaml")
    ours, expected = outcome(path.parent / "run"), outcome(tmp_path / "straight/run")
    for key in expected:
        assert ours[key] == expected[key], key


def test_a_run_of_two_ranks_goes_on_in_one_process_where_that_is_allowed(tmp_path: Path) -> None:
    home = write_home(tmp_path)
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "down_proj"]}
    plugins = {name: f"molora.testing:{name.capitalize()}" for name in ("numbers", "letters")}
    modalities = {name: {"plugin": plugin, "adapter": adapter} for name, plugin in plugins.items()}
    changes: dict[str, Any] = {"modalities": modalities, "evaluations": {}}
    (tmp_path / "begun.yaml").write_text(dump(constant(home, tmp_path / "begun", 5, **changes)))
    in_processes(tmp_path / "begun.yaml")
    with pytest.raises(ConfigError, match="ranks 2 then, 1 now"):
        train(constant(home, tmp_path / "begun", 10, **changes), show=False)
    changes["allow_changed_environment"] = True
    train(constant(home, tmp_path / "begun", 10, **changes), show=False)
    train(constant(home, tmp_path / "whole", 10, **changes), show=False)
    ours, expected = outcome(tmp_path / "begun"), outcome(tmp_path / "whole")
    assert len(ours["rows"]) == len(expected["rows"]) == 12
    for row, other in zip(ours["rows"], expected["rows"], strict=True):
        assert row["samples_digest"] == other["samples_digest"]
        for key in [key for key in other if key.startswith("loss/")]:
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), f"step {row['step']}: {key}"
    for name, values in expected["tensors"]["weights.safetensors"].items():
        weights = torch.tensor(ours["tensors"]["weights.safetensors"][name])
        torch.testing.assert_close(weights, torch.tensor(values), rtol=0, atol=1e-4)
