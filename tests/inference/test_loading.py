"""Modalities made apart, put together by naming folders: what fits works, and what does not is one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import molora
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.opening import locate
from molora.checkpoint.pretrained import load_backbone
from molora.checkpoint.run_folder import read_run, write_run
from molora.cli.commands import app
from molora.config import ConfigError, build
from molora.terminal import visible
from molora.testing import byte_tokenizer, save_backbone
from molora.train import Recipe, train
from molora.verify.promises import verify

ADAPTER = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["qkv_proj", "down_proj"]}
DEPTH = """
from molora.testing import Numbers

class Depth(Numbers):
    part_type = "depth"
    def load(self, part): return list(part["depth"])
    def examples(self): return [{"type": "depth", "depth": [1.0, 2.0]}, {"type": "depth", "depth": [0.5]}]

class Lazy(Numbers):
    part_type = "lazy"

class Half:
    config_type = Numbers.config_type
    part_type = "half"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backbones, one more with another tokenizer, modality folders, and a run whose router learned."""
    folder = tmp_path_factory.mktemp("loading")
    save_backbone(folder / "backbone")
    shutil.copytree(folder / "backbone", folder / "other_tokenizer")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder / "other_tokenizer")
    (folder / "depth.py").write_text(DEPTH)
    save(folder, "numbers", "molora.testing:Numbers", {"projector_beside": ["letters"]})
    save(folder, "letters", "molora.testing:Letters")
    save(folder, "counts", "molora.testing:Numbers")
    save(folder, "depth", f"{folder}/depth.py:Depth")
    both = [{"type": "numbers", "numbers": [1.0]}, {"type": "letters", "letters": "ab"}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": both}, {"role": "assistant", "content": "x"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    train(recipe(folder, folder / "run"), show=False)
    return folder


def save(home: Path, name: str, plugin: str, options: dict[str, Any] | None = None) -> None:
    """Writes a modality folder as a run does, without training."""
    backbone, tokenizer = load_backbone(str(home / "backbone"))
    plan = blueprint(name, plugin, options or {}, ADAPTER, "here")
    model, _ = assemble(backbone, tokenizer, {name: plan}, RouterConfig())
    save_modality(model, name, plan, home / name, {})


def recipe(home: Path, run: Path, **changes: Any) -> Recipe:
    names = ("numbers", "letters")
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {name: {"path": str(home / name)} for name in names},
        "router": {"plugin": "learned", "options": {"modalities": list(names)}},
        "stages": [
            {
                "name": "gates",
                "train": {"router": {"learning_rate": 0.1}},
                "data": {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}},
                "steps": 1,
                "samples_per_step": 1,
            }
        ],
        "device": "cpu",
        **changes,
    }
    return build(Recipe, values, "recipe")


# What does not fit ------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """`make` damages copies under `there` and names a model and folders; `said` are parts of the error, in order."""

    make: Callable[[Path, Path], tuple[Path, list[Path]]]
    said: list[str]


def edited(folder: Path, there: Path, **changes: Any) -> Path:
    """A copy of a modality folder with other values in its modality.json; None takes a key out."""
    copy = Path(shutil.copytree(folder, there / folder.name))
    about = {**json.loads((copy / "modality.json").read_text()), **changes}
    (copy / "modality.json").write_text(json.dumps({key: value for key, value in about.items() if value is not None}))
    return copy


def copied_run(home: Path, there: Path, **changes: Any) -> Path:
    """A copy of the run and of its backbone, with other values in its molora.json."""
    shutil.copytree(home / "backbone", there / "backbone")
    run = Path(shutil.copytree(home / "run", there / "run"))
    about = {**json.loads((run / "molora.json").read_text()), **changes}
    (run / "molora.json").write_text(json.dumps(about))
    return run


def without(run: Path, path: str) -> Path:
    there = run / path
    if there.is_dir():
        shutil.rmtree(there)
    else:
        there.unlink()
    return run


def with_bytes(run: Path, path: str, value: bytes) -> Path:
    (run / path).write_bytes(value)
    return run


PACKAGE = "install the package that brings its plugin, in the version that made the folder"
WRONG: dict[str, Case] = {
    "another tokenizer": Case(
        lambda home, there: (home / "other_tokenizer", [home / "numbers"]),
        ["numbers/modality.json: trained with another tokenizer", "load it on the backbone it was trained on"],
    ),
    "two of one name": Case(
        lambda home, there: (home / "backbone", [home / "numbers", edited(home / "letters", there, name="numbers")]),
        ["letters: its modality 'numbers' is already loaded from", "/numbers; leave one out", '"name"'],
    ),
    "two of one part type": Case(
        lambda home, there: (home / "backbone", [home / "numbers", home / "counts"]),
        ["counts/modality.json", "type 'numbers', and so does 'numbers' (", "numbers/modality.json)", "keep one"],
    ),
    "a named plugin that is not installed": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, plugin="depth")]),
        ["numbers/modality.json: no modality is called 'depth'; there is audio, vision", PACKAGE],
    ),
    "a module that is not installed": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, plugin="acme:Depth")]),
        [
            "numbers/modality.json: ",
            "'acme:Depth': this code",
            "install its package and give --trust-plugin acme:Depth",
        ],
    ),
    "a plugin's file that is not here": Case(
        lambda home, there: (home / "backbone", [edited(home / "depth", there, plugin="plugins/gone.py:Depth")]),
        [
            "depth/modality.json: ",
            "'plugins/gone.py:Depth'",
            "get the file and give --trust-plugin path/to/gone.py:Depth",
        ],
    ),
    "a plugin's class that is gone": Case(
        lambda home, there: (home / "backbone", [edited(home / "depth", there, plugin=f"{home}/depth.py:Deep")]),
        ["depth/modality.json: ", "has no 'Deep'; did you mean 'Depth'?", "get the file that made this one"],
    ),
    "a plugin that lacks members": Case(
        lambda home, there: (home / "backbone", [edited(home / "depth", there, plugin=f"{home}/depth.py:Half")]),
        ["depth/modality.json: ", "class Half lacks load, prepare", "get the file that made this one"],
    ),
    "a plugin that lacks an option": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, options={"gain": 2.0})]),
        ["numbers/modality.json.options: gain: no such key", PACKAGE],
    ),
    "a plugin that lacks a projector": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, options={})]),
        ["numbers/modality.json: ", "projectors was ['beside', 'default'], is ['default']", PACKAGE],
    ),
    "a plugin of another width": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, frame_width=12)]),
        ["numbers/modality.json: plugin 'molora.testing:Numbers' has changed", "frame_width was 12, is 8", PACKAGE],
    ),
    "a plugin that answers to other parts": Case(
        lambda home, there: (home / "backbone", [edited(home / "depth", there, part_type="series")]),
        ["depth/modality.json: ", "part_type was 'series', is 'depth'", "get the file that made this one"],
    ),
    "a cut modality.json": Case(
        lambda home, there: (home / "backbone", [edited(home / "numbers", there, projectors=None, files=None)]),
        ["numbers/modality.json: lacks projectors, files; copy it again"],
    ),
    "a run as a modality": Case(
        lambda home, there: (home / "backbone", [home / "run"]),
        ["run: not a modality folder (no modality.json); give one that a run wrote as modalities/<name>"],
    ),
    "a modality as the model": Case(
        lambda home, there: (home / "numbers", []),
        ["numbers: neither a run (no molora.json) nor a backbone", "modality folders beside a backbone"],
    ),
    "a run of another format": Case(
        lambda home, there: (copied_run(home, there, format_version="2.0"), []),
        ["molora.json: format version '2.0', this molora reads 1.0; upgrade molora"],
    ),
    "a run without one of its folders": Case(
        lambda home, there: (without(copied_run(home, there), "modalities/letters"), []),
        ["molora.json: lists modality 'letters', whose folder", "letters is missing", "take it out of"],
    ),
    "a run without its backbone": Case(
        lambda home, there: (without(copied_run(home, there), "../backbone"), []),
        ["molora.json: its backbone is not in", "move the two together"],
    ),
    "a rule that names an absent adapter": Case(
        lambda home, there: (
            copied_run(home, there, router={"plugin": "table", "options": {"rules": {"letters+numbers": "depth"}}}),
            [],
        ),
        ["molora.json: rule 'letters+numbers' names adapter 'depth'", "['letters', 'numbers']; load that modality too"],
    ),
    "a router that is not installed": Case(
        lambda home, there: (copied_run(home, there, router={"plugin": "acme:Router", "options": {}}), []),
        ["molora.json: router 'acme:Router': this code", "install its package and give --trust-plugin acme:Router"],
    ),
    "a learned router that meets a stranger": Case(
        lambda home, there: (copied_run(home, there), [home / "depth"]),
        ["molora.json: ", "made for ['letters', 'numbers'], and this model also has ['depth']", "train a router for"],
    ),
    "a learned router without what it learned": Case(
        lambda home, there: (without(copied_run(home, there), "router.safetensors"), []),
        ["router.safetensors: missing, though the run's router learns; copy the whole run folder"],
    ),
    "what a router learned, not listed": Case(
        lambda home, there: (copied_run(home, there, files={}), []),
        ["router.safetensors: is not listed in ", "molora.json; copy the whole run folder again"],
    ),
    "what a router learned, changed": Case(
        lambda home, there: (with_bytes(copied_run(home, there), "router.safetensors", b"other"), []),
        ["router.safetensors: does not have the hash in ", "molora.json; it was changed"],
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_one_error_that_names_the_file_and_what_to_do(
    what: str, home: Path, tmp_path: Path
) -> None:
    model, folders = WRONG[what].make(home, tmp_path)
    with pytest.raises(ValueError) as caught:
        molora.load(
            model, folders, device="cpu", trust=[f"{home}/depth.py:{name}" for name in ("Depth", "Deep", "Half")]
        )
    told, place = str(caught.value), 0
    assert "\n" not in told
    for text in WRONG[what].said:
        place = told.find(text, place)
        assert place >= 0, f"{text!r} is not in its place in: {told}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"numbers": {"path": "nowhere/numbers"}}}, "nowhere/numbers: not a modality folder"),
        (
            {"router": {"plugin": "learned", "options": {"modalities": ["numbers"]}}},
            r"router: .*also has \['letters'\]",
        ),
        ({"router": {"options": {"rules": {"letters+numbers": "letter"}}}}, "router: rule .* names adapter 'letter'"),
        ({"router": {"path": "nowhere/run"}}, "nowhere/run: not a run folder"),
    ],
    ids=["path", "learned router", "rule", "router path"],
)
def test_a_recipe_that_puts_together_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(recipe(home, tmp_path / "run", **changes), show=False)
    assert not (tmp_path / "run" / "molora.json").exists()


# What fits --------------------------------------------------------------------------------------------------------


def test_the_order_in_which_folders_are_named_changes_no_bit(home: Path) -> None:
    folders = [home / name for name in ("numbers", "letters", "depth")]
    logits = []
    for named in (folders, folders[::-1]):
        loaded = molora.load(home / "backbone", named, device="cpu", trust=[f"{home}/depth.py:Depth"])
        samples = [
            loaded.encode([{"role": "user", "content": [part, {"type": "text", "text": "which?"}]}], name)
            for name in ("numbers", "letters", "depth")
            for part in loaded.model.modalities[name].examples()[:1]
        ]
        pack = loaded.processor.collate(samples)
        with torch.no_grad():
            logits.append(dict(zip(pack.ids, loaded.model.logits(pack).split(pack.lengths), strict=True)))
    assert logits[0].keys() == logits[1].keys()
    assert all(torch.equal(logits[0][id], logits[1][id]) for id in logits[0])


def test_a_folder_whose_plugin_is_a_file_moves_and_the_error_says_what_to_give(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder names the file without its path, and its hash; it never holds code."""
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(home)  # where the file lies, which is no reason to run it
    moved = Path(shutil.copytree(home / "depth", tmp_path / "depth"))
    about = json.loads((moved / "modality.json").read_text())
    assert about["plugin"] == "depth.py:Depth" and len(about["plugin_sha256"]) == 64
    assert {path.suffix for path in moved.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ConfigError, match="give --trust-plugin path/to/depth.py:Depth"):
        molora.load(home / "backbone", [moved], device="cpu")
    for trust in ([f"{home}/depth.py:Depth"], []):  # the word is remembered
        loaded = molora.load(home / "backbone", [moved], device="cpu", trust=trust)
        assert set(loaded.model.modalities) == {"depth"}


def test_a_recipe_may_call_a_folder_by_another_name(home: Path, tmp_path: Path) -> None:
    names = {"amounts": {"path": str(home / "counts")}, "letters": {"path": str(home / "letters")}}
    router = {"plugin": "learned", "options": {"modalities": ["amounts", "letters"]}}
    train(recipe(home, tmp_path / "run", modalities=names, router=router), show=False)
    loaded = molora.load(tmp_path / "run", device="cpu")
    assert set(loaded.model.modalities) == {"amounts", "letters"}
    about = json.loads((tmp_path / "run/modalities/amounts/modality.json").read_text())
    assert (about["name"], about["plugin"]) == ("amounts", "molora.testing:Numbers")


def test_verify_checks_a_combination_with_plugins_on_their_own_examples(home: Path) -> None:
    folders = [part for name in ("numbers", "letters", "depth") for part in ("--modality", str(home / name))]
    words = ["--trust-plugin", f"{home}/depth.py:Depth"]
    result = CliRunner().invoke(app, ["verify", str(home / "backbone"), *folders, *words])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    told = " ".join(result.output.replace("│", " ").split())
    assert "3 modality folders whole" in told and "not checked" not in told and "BROKEN" not in told
    for name in ("numbers", "letters", "depth"):
        assert f"{name}: PEFT opens the folder" in told


def test_verify_refuses_examples_of_another_kind(home: Path) -> None:
    """They would be samples of another modality, and this one would pass untried."""
    save(home, "lazy", f"{home}/depth.py:Lazy")
    words = ["--modality", str(home / "lazy"), "--trust-plugin", f"{home}/depth.py:Lazy"]
    result = CliRunner().invoke(app, ["verify", str(home / "backbone"), *words])
    assert result.exit_code == 1
    assert "examples() are 3 parts of types ['numbers']; it has to give some, of its own type 'lazy'" in str(
        result.exception
    )


def test_folders_on_the_command_line_are_told_which_adapter_answers_for_both(home: Path, tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text("[1.0]")
    (tmp_path / "letters.json").write_text('"ab"')
    names = ("numbers", "letters")

    def ask(*more: str) -> Any:
        parts = [f"--part={name}={tmp_path / name}.json" for name in names]
        folders = [f"--modality={home / name}" for name in names]
        return CliRunner().invoke(app, ["generate", str(home / "backbone"), *folders, *parts, *more, "?"])

    refused = str(ask().exception)
    assert "no routing rule for a sample with modalities 'letters+numbers'" in refused
    assert "--rule letters+numbers=<adapter or none>" in refused
    (row,) = (home / "rows.jsonl").read_text().splitlines()
    for adapter in (*names, None):
        router = RouterConfig(options={"rules": {"letters+numbers": adapter}})
        loaded = molora.load(home / "backbone", [home / name for name in names], router=router, device="cpu")
        (answer,) = loaded.answers([loaded.encode(json.loads(row)["messages"][:1], "x")])
        assert answer.adapters == (() if adapter is None else (adapter,))
        told = ask(f"--rule=numbers+letters={adapter or 'none'}")
        assert told.exit_code == 0 and told.stdout.strip() == visible(answer.text)
    assert "--rule 'numbers': write it as A+B=ADAPTER" in str(ask("--rule=numbers").exception)
    assert "names adapter 'smell'; the adapters here are" in str(ask("--rule=numbers+letters=smell").exception)


@pytest.mark.parametrize(
    ("configured", "told"),
    [
        ([256, 260], ""),
        (260, ""),
        (
            256,
            "stops at <|endoftext|> (256), but its chat template ends turns with <|end|> (260); answers end at either",
        ),
        ([], "stops at nothing, but its chat template ends turns with <|end|> (260)"),
        ([260, 999], "stops at [999], which its 261 tokens do not have"),
        (None, "stops at nothing"),
    ],
)
def test_answers_stop_at_the_end_of_turn_whatever_the_generation_config_says(
    home: Path, tmp_path: Path, configured: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "backbone", tmp_path / "backbone")
    path = tmp_path / "backbone/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": configured}))
    loaded = molora.load(tmp_path / "backbone")
    assert 260 in loaded.model.backbone.stop_ids
    warned = " ".join(capsys.readouterr().err.split())
    assert told in warned and bool(told) == ("warning" in warned)


def test_a_backbone_without_a_generation_config_stops_at_the_end_of_turn(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "backbone", tmp_path / "backbone")
    (tmp_path / "backbone/generation_config.json").unlink()
    assert molora.load(tmp_path / "backbone").model.backbone.stop_ids == {256, 260}


def test_a_token_without_an_embedding_is_named(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "backbone", tmp_path / "backbone")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "backbone")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|new {i}|>" for i in range(8)]})
    tokenizer.save_pretrained(tmp_path / "backbone")
    model = molora.load(tmp_path / "backbone")
    rows = model.model.backbone.num_embeddings
    ask = [{"role": "user", "content": "x"}]
    assert model.encode(ask), "a tokenizer may know more tokens than are used"
    tokenizer.chat_template = "<|new 7|>" + tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ValueError, match=rf"token '<\|new 7\|>', number {len(tokenizer) - 1}, and .* has {rows} embed"):
        molora.load(tmp_path / "backbone").encode(ask)


def test_a_run_opens_through_a_link_from_anywhere(home: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    link = tmp_path / "deep" / "er" / "latest"
    link.symlink_to(home / "run")
    assert Path(read_run(link).backbone_source()) == Path(read_run(home / "run").backbone_source())
    assert molora.load(link, device="cpu").model.modalities


def test_a_run_written_through_a_link_names_its_backbone_from_where_it_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "here").symlink_to("disk/runs")
    backbone, _ = load_backbone(str(home / "backbone"))
    write_run(tmp_path / "here" / "x", backbone.identity, [], RouterConfig())
    for run in (tmp_path / "here" / "x", tmp_path / "disk" / "runs" / "x"):
        assert Path(read_run(run).backbone_source()).samefile(home / "backbone")


def test_a_run_is_opened_and_verified_with_the_commit_that_it_was_trained_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, trained_on, main = tmp_path / "models--someone--tiny", "1" * 40, "2" * 40
    shutil.copytree(home / "backbone", repository / "snapshots" / trained_on)
    save_backbone(repository / "snapshots" / main, seed=1)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(main)
    (repository / "refs" / "v1").write_text(trained_on)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = train(recipe(home, tmp_path / "run", backbone={"path": "someone/tiny", "revision": "v1"}), show=False)
    assert read_run(run).backbone["revision"] == trained_on
    (repository / "refs" / "v1").unlink()
    loaded = molora.load(run, device="cpu")
    assert loaded.model.backbone.folder.name == trained_on
    assert verify(loaded, [], locate(run).folders)
    about = json.loads((run / "molora.json").read_text())
    about["backbone"]["revision"] = "../../../../etc"
    (run / "molora.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="revision is '../../../../etc', no commit; copy it again"):
        molora.load(run, device="cpu")
    del about["backbone"]["revision"]  # as an older molora wrote it
    about["backbone"]["source"] = str(home / "backbone")
    (run / "molora.json").write_text(json.dumps(about))
    assert molora.load(run, device="cpu").model.modalities


def test_a_run_without_modalities_is_checked_against_its_backbone(home: Path, tmp_path: Path) -> None:
    backbone, _ = load_backbone(str(home / "backbone"))
    write_run(tmp_path / "run", backbone.identity, [], RouterConfig())
    about = json.loads((tmp_path / "run" / "molora.json").read_text())
    about["backbone"]["settings"]["rms_norm_eps"] = 1.0
    (tmp_path / "run" / "molora.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="molora.json: .* rms_norm_eps was 1.0, is 1e-05"):
        molora.load(tmp_path / "run", device="cpu")


def test_a_run_from_before_settings_were_recorded_still_opens(home: Path, tmp_path: Path) -> None:
    run = copied_run(home, tmp_path)
    for path in (run / "molora.json", *run.glob("modalities/*/modality.json")):
        about = json.loads(path.read_text())
        del about["backbone"]["settings"]
        if path.name == "molora.json":
            del about["files"]
        path.write_text(json.dumps(about))
    assert molora.load(run, device="cpu").model.modalities


def test_a_model_opens_where_nothing_can_be_remembered(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "file" / "cache"))
    assert molora.load(home / "run", device="cpu").model.modalities
    told = capsys.readouterr().err
    assert "nothing can be kept there" in told and "MOLORA_CACHE" in told


def test_a_backbone_that_is_neither_here_nor_on_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"backbone 'runs/nothing': no such folder in .*the hub gives none"):
        load_backbone("runs/nothing")
