"""The benchmark's two sides compute the same, and its count of useful operations is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import generation, training, work
from benchmarks.peers.measure import Machine, Result, Row, Setup, bounding_share
from benchmarks.peers.models import Shape, Sizes, save_checkpoint

SIZES = Sizes(
    layers=2,
    width=128,
    mlp_width=192,
    heads=4,
    kv_heads=2,
    vocab_size=1024,
    tower_layers=1,
    tower_width=64,
    ear_blocks=1,
    ear_width=64,
    rank=4,
)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("peers")
    save_checkpoint(folder, SIZES)
    return Setup(folder, torch.float32, "cpu", rounds=1, memory=False)


def test_losses_and_gradients_are_the_peers_own(setup: Setup) -> None:
    """Or the comparison refuses: a projector that is another on one side is seen."""
    ours, theirs = training.open_sides(setup)
    assert len(training.compare_numbers(ours, theirs, torch.float32)) == 4
    with torch.no_grad():
        ours.model.parts()["projectors.audio.default"]["down.bias"].add_(1.0)
    with pytest.raises(RuntimeError, match="losses of each modality, grouped: molora and its peer differ by"):
        training.compare_numbers(ours, theirs, torch.float32)


def test_answers_are_the_peers_own_grouped_and_together(setup: Setup) -> None:
    ours = generation.Ours(training.open_ours(setup.folder, setup.dtype, setup.device).model, 6)
    samples = generation.make_samples(ours.model, Shape(pictures=1, clips=2, texts=2))
    samples[-1] = replace(
        samples[-1],
        **{name: getattr(samples[-1], name)[:20] for name in ("token_ids_T", "modality_ids_T", "targets_T")},
    )
    theirs = generation.Theirs(setup, samples, ours.model)
    mine = ours.answer(samples)
    assert mine == theirs.grouped(6) == theirs.together(6)
    assert {len(tokens) for tokens in mine.values()} == {6}


def test_useful_operations_are_those_that_a_step_takes(setup: Setup) -> None:
    """All that is counted while a step runs, but for the masked half of attention."""
    ours = training.Ours(setup.folder, Shape(pictures=1, clips=1, texts=1), setup.dtype, setup.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours.step()
    passes = [(sample, 3 if sample.items else 1) for sample in ours.samples]
    masked = sum(count * work.attention_flop(ours.model, len(sample)) for sample, count in passes)
    useful = work.step_flop(ours.model, ours.samples)
    assert counter.get_total_flops() == pytest.approx(useful + masked, rel=0.02)
    assert masked > 0.1 * useful


def test_useful_operations_are_those_that_answers_take(setup: Setup) -> None:
    """All that is counted while prompts are read and answers written, but for the masked half of attention."""
    ours = generation.Ours(training.open_ours(setup.folder, setup.dtype, setup.device).model, 8)
    samples = generation.make_samples(ours.model, Shape(pictures=1, clips=1, texts=1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lengths = [len(tokens) for tokens in ours.answer(samples).values()]
    masked = sum(work.attention_flop(ours.model, len(sample)) for sample in samples)
    useful = work.answer_flop(ours.model, samples, lengths)
    assert lengths == [8, 8, 8]
    assert counter.get_total_flops() == pytest.approx(useful + masked, rel=0.02)
    weights = work.backbone_weights(ours.model) + ours.model.backbone.width * ours.model.backbone.vocab_size
    adapters = sum(work.adapter_weights(ours.model, name) for name in ("vision", "audio"))
    seen = sum(work.attention_flop(ours.model, len(s) + 7) - work.attention_flop(ours.model, len(s)) for s in samples)
    assert work.decode_flop(ours.model, samples, lengths) == 7 * 2 * (3 * weights + adapters) + seen


def test_a_share_is_of_what_bounds() -> None:
    machine = Machine(torch.float32, "cpu", flop_per_second=10.0, bytes_per_second=10.0)
    rows = [Row("a", [1.0], 5.0, 3.0), Row("b", [1.0], 2.0, 3.0), Row("c", [1.0])]
    told = [bounding_share(row) for row in Result("a", "float32", "cpu", [], rows, "", machine).as_json()["rows"]]
    assert told == [(0.5, "product"), (0.3, "copy"), (None, "")]


def test_ratios_are_to_the_first_row() -> None:
    rows = [Row("molora", [1.0, 2.0]), Row("peer", [3.0, 8.0])]
    first, second = Result("a", "float32", "cpu", [], rows, "").as_json()["rows"]
    assert (first["ratio"], second["ratio"], second["ratios"]) == (1.0, 3.5, [3.0, 4.0])
