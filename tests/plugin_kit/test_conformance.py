"""The kit that tries modality plugins: good ones conform, and each way to break the contract is found and named.

A kit that finds fault with everything is as useless as one that finds none, so a broken plugin differs from a good one
in one thing, and must fail the checks listed for it and no others.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from molora.plugin_kit import modality_clauses
from molora.plugin_kit.check import MODALITY, check_modality
from molora.plugin_kit.clauses import clauses_of
from molora.plugins import resolve
from molora.terminal import Finding
from molora.testing import assert_conforms
from molora.testing.side_effects import fingerprint, shared_state

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples/keyword_transformer"
WEIGHTS = Path(os.environ.get("MOLORA_TEST_DATA", ".")) / "weights/kwt1/model.safetensors"
CONVIT = {"kind": "convit", "pretrained": False, "convit": {"width": 8, "depth": 1, "heads": 2}}
CONFORMER = {"width": 16, "blocks": 2, "heads": 2, "mlp_width": 24, "subsampling_channels": 4}
AUGMENT = {"speeds": [0.9, 1.1], "time_masks": 2, "bin_masks": 2}
CHECKS = [clause.name for clause in clauses_of(MODALITY)]

# Plugin, the check meant for it, words of its message; and other checks that it cannot but fail.
BROKEN: list[tuple[str, ...]] = [
    ("Unfinished", "members", "class Unfinished lacks prepare, collate"),
    ("ConfigIsNoDataclass", "config", "dict is no dataclass; add @dataclass"),
    ("ConfigIsNoJson", "config", "set is not JSON serializable"),
    ("ConfigGrows", "config", "saved as JSON and read again is"),
    ("AnswersToText", "name and part type", "part_type is 'text'"),
    ("HasItsOwnName", "name and part type", "an instance has name 'series'"),
    ("PartTypeByName", "name and part type", "two of it went into one model"),
    ("ProjectorNotDeclared", "projectors", "is 'beside', but projectors() has ('default',)"),
    ("ProjectorsInAList", "projectors", "return a tuple"),
    ("HoldsALambda", "weightless", "cannot be pickled"),
    ("HoldsWeights", "weightless", "holds weights (BatchNorm1d"),
    ("NoExamples", "examples", "examples() is []"),
    ("ExamplesByChance", "examples", "examples() gives other parts when called again"),
    ("ExamplesOfOneSize", "examples", "have one size"),
    ("LoadsForever", "load", "load took 0."),
    ("LoadRaises", "load", "LoadRaises.load raised OSError: the drive is not there"),
    ("LoadsByChance", "load repeats", "load gives another item for part 0"),
    ("AcceptsGarbage", "bad parts", "load accepts a file of garbage"),
    ("RefusesWithAnotherError", "bad parts", "load raised KeyError: 'values' for a part without media"),
    ("RefusesWithoutAWord", "bad parts", "load refuses a part without media without a word", "path"),
    ("RefusesTooLate", "bad parts", "prepare raised TypeError"),
    ("IgnoresPaths", "path", "load answers a part that has only a path as it answers one without media"),
    ("QuotesPaths", "path", "load answers a part that has only a path as it answers one without media"),
    ("CollatesLists", "collate", "collate gives list as 'pairs_IS2'; forward takes tensors"),
    ("CollatesATuple", "collate", "collate gives tuple; return a dict of the tensors"),
    ("NumTokensIsATensor", "prepare", "num_tokens of prepare is tensor(2)"),
    ("PreparesAMapping", "prepare", "prepare gives dict"),
    ("PreparesByChance", "randomness", "prepare changes the state of torch's global generator", "shared state"),
    ("AugmentsByChance", "randomness", "prepare changes the state of numpy's global generator", "shared state"),
    ("SeedsEverybody", "randomness", "prepare changes the state of torch's global generator", "shared state"),
    ("BorrowsTheGenerator", "randomness", "prepare gives different tensors for part 0 without a generator"),
    ("CountsItsCalls", "randomness", "prepare gives different tensors for part 0 without a generator"),
    ("RemembersTheLongest", "order of calls", "other tensors for part 1 after other parts"),
    ("EmptiesItsPart", "inputs kept", "load changes part 0"),
    ("ScalesItsItemInPlace", "inputs kept", "prepare changes the item of part 0"),
    ("CollatesInPlace", "inputs kept", "collate changes the prepared items"),
    (
        "OneTokenTooMany",
        "tokens equal frames",
        "num_tokens of prepare is (3,), but lengths of forward's Frames is (2,)",
    ),
    ("LengthsInAList", "tokens equal frames", "lengths of forward's Frames is [2]"),
    ("OneFrameShortInBatches", "tokens equal frames", "all parts: num_tokens of prepare is (2, 4, 7)"),
    ("RowsMissing", "tokens equal frames", "forward gives 11 rows of frames, its lengths add up to 13"),
    ("SortsItsBatch", "tokens equal frames", "all parts in reverse: num_tokens of prepare is (7, 4, 2)"),
    ("EncoderIsNoEncoder", "encoder", "build_encoder gives Identity"),
    ("GivesATuple", "encoder", "forward gives tuple"),
    ("WrongWidth", "encoder", "frames of shape (2, 7); they are 2-D, all items end to end, and the encoder's width 8"),
    ("ThreeAxes", "encoder", "frames of shape (1, 2, 8); they are 2-D"),
    ("DoublePrecision", "encoder", "frames of torch.float64"),
    ("OnAnotherDevice", "encoder", "frames on meta, but its weights are on cpu"),
    ("NotFinite", "encoder", "values that are not finite"),
    ("EncoderBuiltByChance", "encoder repeats", "build_encoder makes other weights from equal seeds"),
    ("DropsOutInEval", "encoder repeats", "forward in eval mode gives other frames", "shared state"),
    ("RemembersItsLastFrames", "encoder repeats", "forward in eval mode gives other frames"),
    ("CountsInABuffer", "encoder repeats", "forward in eval mode changes the encoder's own tensors"),
    ("ChangesItsInput", "encoder repeats", "forward changes its inputs"),
    ("PaddingLeaks", "batch invariance", "forward in eval mode gives part 0 other frames in a batch of all parts"),
    ("MeanOverTheBatch", "batch invariance", "take no statistics over the batch"),
    ("ReversesItsFrames", "batch invariance", "other frames in a batch of all parts than alone"),
    ("MeanOverTheBatchInTraining", "batch invariance in training", "forward in train mode gives part 0 other frames"),
    ("BatchStatistics", "batch invariance in training", "forward in train mode changes norm.running_mean"),
    ("GradientIsNotFinite", "training step", "the encoder's embed.weight, embed.bias, mix.weight and 3 more is not"),
    ("RegistersTwice", "own weights", "registers one tensor as embed.weight and as again.weight"),
    ("SharesTheEmbedding", "own weights", "the encoder's table is the model's own backbone.model.model.embed_tokens"),
    ("IdleParameter", "gradients", "2 of 8 parameters get no gradient (head.weight, head.bias)"),
    ("Detaches", "gradients", "forward detaches its frames"),
    ("UsesAGlobalNetwork", "gradients", "no parameters of the encoder (of shape (8, 8), (8,))"),
    ("TrainsTheBackbone", "nothing else moves", "moved what is not its own (backbone.model"),
    ("UnfreezesTheBackbone", "nothing else moves", "norm.weight and 2 more require gradients"),
    ("ScalesTheBackboneWhenBuilt", "neighbours", "are other bits than without"),
    ("SavesAConfigOfOtherSize", "saving", "its saved folder does not open"),
    ("SavesAConfigThatReadsOtherwise", "saving", "saved_config(with_weights=True)"),
    ("SaysItCanBeFetched", "saving", "saved_config(with_weights=False)"),
    ("KeepsATensorOutOfItsState", "saving", "all that forward uses is in state_dict"),
    ("BlanksToAnotherSize", "blank", "blank of part 0 takes 3 tokens (pairs_S2 (3, 2)), the part itself 2 tokens"),
    ("BlanksByChance", "blank", "blank gives another item for part 0 when called again"),
    ("BlanksToTheItem", "blank", "blank of part 0 still says what the item holds"),
    ("BlanksToTheMean", "blank", "blank of part 0 still says what the item holds"),
    ("BlanksToNoNumber", "blank", "blank of part 0 has pairs_S2 that is not finite"),
    ("BlanksInPlace", "blank", "blank changes the item of part 0; make a new one"),
    ("BlanksWithAnError", "blank", "BlanksWithAnError.blank raised AttributeError"),
    ("KeepsItsFrames", "memory", "forward leaves 3 tensors behind"),
    ("KeepsItsItems", "memory", "load, prepare and collate leave 0 tensors and 9"),
    ("ChangesTheDefaultDtype", "shared state", "collate changes the default dtype", "tokens equal frames"),
    ("TurnsGradientsOff", "shared state", "load changes the grad mode", "training step"),
    ("ChangesTheThreads", "shared state", "examples changes the number of threads"),
    ("DecidesOnDeterminism", "shared state", "build_encoder changes the choice of deterministic algorithms"),
    ("NeedsItsProcess", "data workers", "in a spawned data worker, load and prepare give other tensors for part 0"),
]


def spec(name: str) -> str:
    return f"{HERE / 'faulty_plugins.py'}:{name}"


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    """Findings by their check; every check reports once, in order."""
    assert [finding.what for finding in findings] == CHECKS
    return {finding.what: finding for finding in findings}


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        (spec("Series"), {}),
        (spec("Fetched"), {}),
        (spec("Blanks"), {}),
        ("molora.testing:Numbers", {"projector_beside": ["neighbour"]}),
        ("molora.testing:Letters", {}),
        ("vision", {"crop_pixels": 16, "max_crops": 3, "pool": 1, "tower": CONVIT}),
        ("audio", {"tower": {"conformer": CONFORMER}, "beside": {"vision": "vision"}, "augment": AUGMENT}),
        (f"{EXAMPLE}/keyword_transformer.py:KeywordTransformer", {"weights": str(WEIGHTS)}),
    ],
    ids=["series", "fetched", "blanks", "numbers", "letters", "vision", "audio", "keyword transformer"],
)
def test_good_plugins_keep_every_clause(plugin: str, options: dict[str, Any]) -> None:
    if "audio" in plugin or "keyword" in plugin:
        pytest.importorskip("torchaudio")
    if "keyword" in plugin and not WEIGHTS.is_file():
        pytest.skip("set MOLORA_TEST_DATA to a folder with weights/kwt1")
    findings = by_check(check_modality(plugin, options))
    assert not [finding for finding in findings.values() if finding.ok is not True]


@pytest.mark.parametrize(("name", "check", "words", "also"), [(*row[:3], row[3:]) for row in BROKEN])
def test_a_broken_plugin_fails_the_check_meant_for_it(
    name: str, check: str, words: str, also: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "LoadsForever":  # as long as anyone here wants to wait for it
        monkeypatch.setattr(modality_clauses, "LOAD_SECONDS", 0.05)
    before = fingerprint(shared_state())
    findings = by_check(check_modality(spec(name)))
    assert {found.what for found in findings.values() if found.ok is False} == {check, *also}
    assert words in findings[check].found
    unreached = [found for found in findings.values() if found.ok is None]
    assert all(found.found == f"not reached because of what {found.cause!r} found" for found in unreached)
    assert fingerprint(shared_state()) == before, "the kit leaves the process as it found it"


def test_the_table_has_every_broken_plugin_and_breaks_every_check() -> None:
    module: types.ModuleType = sys.modules[resolve("modality", spec("Series")).__module__]
    plugins = {name for name, value in vars(module).items() if hasattr(value, "part_type")}
    assert {row[0] for row in BROKEN} == plugins - {
        *("Series", "Reshaping", "SkipsLayersInTraining", "Fetched", "Blanks")
    }
    assert len(BROKEN) == len({row[0] for row in BROKEN}) >= 24
    assert {row[1] for row in BROKEN} == {*CHECKS} - {"imports"}, "and the plugin for that is a file of its own"


def test_a_part_type_that_a_named_modality_has_is_told(tmp_path: Path) -> None:
    file = tmp_path / "picture.py"
    file.write_text("from molora.testing import Letters\nclass Picture(Letters):\n    part_type = 'image'\n")
    found = check_modality(f"{file}:Picture", parts=[])[CHECKS.index("name and part type")]
    assert found.ok and "type 'image', and so does 'vision': the two cannot be used together" in found.found
    own = check_modality("vision", parts=[])[CHECKS.index("name and part type")]
    assert own.ok and own.found == "answers to parts of type 'image'"


def test_what_a_check_needs_is_not_reached_and_the_rest_is() -> None:
    findings = by_check(check_modality(spec("LoadRaises")))
    for check in ("prepare", "encoder", "saving", "imports"):
        assert findings[check] == Finding(check, "not reached because of what 'load' found", None, cause="load")
    for check in ("members", "projectors", "examples"):
        assert findings[check].ok is True


def test_chance_in_training_beyond_dropout_leaves_one_check_undecided() -> None:
    findings = by_check(check_modality(spec("SkipsLayersInTraining")))
    undecided = findings.pop("batch invariance in training")
    assert undecided.ok is None and "cannot tell: forward in train mode draws numbers" in undecided.found
    assert undecided.found.endswith("; use nn.Dropout modules to have this checked") and not undecided.cause
    assert all(found.ok is True for found in findings.values())


def test_a_plugin_that_imports_the_model_is_found(tmp_path: Path) -> None:
    file = tmp_path / "heavy.py"
    file.write_text(
        "from molora.model.molora import MoLoRA\nfrom molora.testing import Letters\nclass Heavy(Letters): ...\n"
    )
    findings = by_check(check_modality(f"{file}:Heavy"))
    assert [found.what for found in findings.values() if found.ok is not True] == ["imports"]
    assert "imports molora.model.backbone and molora.model.molora" in findings["imports"].found


def test_what_a_spawned_worker_raises_is_in_the_finding(tmp_path: Path) -> None:
    file = tmp_path / "once.py"
    lines = ["import os", "from molora.testing import Letters", f"if os.path.exists({str(tmp_path / 'been')!r}):"]
    lines += ["    raise OSError('been here before')", f"open({str(tmp_path / 'been')!r}, 'w').close()"]
    file.write_text("\n".join([*lines, "class Once(Letters): ...", ""]))
    findings = by_check(check_modality(f"{file}:Once"))
    assert [found.what for found in findings.values() if found.ok is False] == ["data workers"]
    assert "fail in a spawned data worker: " in findings["data workers"].found
    assert "OSError: been here before" in findings["data workers"].found
    assert findings["imports"].found == "not reached because of what 'data workers' found"


def test_options_that_do_not_fit_are_a_finding() -> None:
    findings = by_check(check_modality(spec("Series"), {"widht": 8}))
    assert "did you mean 'width'?" in findings["config"].found and findings["config"].ok is False


def test_parts_given_take_the_place_of_examples() -> None:
    wrong = by_check(check_modality(spec("Series"), parts=[{"type": "series", "values": []}]))
    assert "load refuses part 0, which it should take: series part" in wrong["load"].found
    other = by_check(check_modality(spec("Series"), parts=[{"type": "image", "path": "a.png"}]))
    assert "the parts given have {'type': 'image'" in other["examples"].found
    one = by_check(check_modality(spec("OneFrameShortInBatches"), parts=[{"type": "series", "values": [1.0] * 6}]))
    assert one["prepare"].found == "3 tokens"
    assert "every part twice: num_tokens of prepare is (3, 3)" in one["tokens equal frames"].found


def test_the_device_of_later_accelerators_stays_open() -> None:
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        findings = by_check(check_modality(spec("IdleParameter")))
        assert findings["training step"].ok and not AcceleratorState._shared_state
    finally:
        AcceleratorState._shared_state.update(before)


def test_an_assertion_lists_every_fault() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_conforms(spec("DropsOutInEval"), {"width": 4})
    listed = str(caught.value).splitlines()
    assert listed[0].endswith("faulty_plugins.py:DropsOutInEval' does not conform:")
    assert [line.split(":")[0] for line in listed[1:]] == ["- encoder repeats", "- shared state"]
