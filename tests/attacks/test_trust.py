"""Folders that name code, and models that bring some: naming it is not enough to run it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import py_compile
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import molora
from molora import plugins
from molora.checkpoint import trust
from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.checkpoint.run_folder import write_run
from molora.checkpoint.stock import open_stock
from molora.checkpoint.trust import Untrusted, find_received, remember
from molora.cli.commands import app
from molora.config import ConfigError, build
from molora.doctor.dry_run import on_meta
from molora.plugin_kit.scaffold import new_plugin
from molora.plugins import find
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe

ADAPTER = {"r": 2, "lora_alpha": 8, "target_modules": ["o_proj"]}
GOOD = """
from molora.testing import Numbers

class Depth(Numbers):
    part_type = "depth"
    def load(self, part): return list(part["depth"])
    def examples(self): return [{"type": "depth", "depth": [1.0]}]
"""
ROUTER = "from molora.routers.table import TableRouter\n\nclass Ferry(TableRouter):\n    pass\n"
REFUSED = "this code comes neither with molora nor with an installed package's entry points"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone; the modality `depth` and a run of it, both of a plugin that lies in a file."""
    folder = tmp_path_factory.mktemp("home")
    save_backbone(folder / "backbone")
    (folder / "depth.py").write_text(GOOD)
    turns = [{"role": "user", "content": [{"type": "depth", "depth": [1.0]}]}, {"role": "assistant", "content": "x"}]
    (folder / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    backbone, tokenizer = load_backbone(str(folder / "backbone"))
    plan = blueprint("depth", f"{folder}/depth.py:Depth", {}, ADAPTER, "here")
    model, _ = assemble(backbone, tokenizer, {"depth": plan}, RouterConfig())
    save_modality(model, "depth", plan, folder / "run/modalities/depth", {})
    write_run(folder / "run", backbone.identity, ["depth"], RouterConfig())
    return folder


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))


def evil(file: Path, canary: Path, code: str = GOOD) -> Path:
    """A plugin that keeps its contract, and does more."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\n{code}")
    return file


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def received(home: Path, there: Path, **says: Any) -> Path:
    """A modality folder as a stranger hands it out, with what its modality.json says."""
    folder = Path(shutil.copytree(home / "run/modalities/depth", there / "received"))
    about = {**json.loads((folder / "modality.json").read_text()), **says}
    (folder / "modality.json").write_text(json.dumps(about))
    return folder


def load(home: Path, folder: Path, *words: str) -> Any:
    return molora.load(home / "backbone", [folder], device="cpu", trust=words)


def test_the_users_word_is_asked_for_remembered_and_asked_for_again_on_the_command_line(home, tmp_path) -> None:
    file = Path(shutil.copy(home / "depth.py", tmp_path / "depth.py"))
    run = Path(shutil.copytree(home / "run", tmp_path / "run"))
    shutil.copytree(home / "backbone", tmp_path / "backbone")

    def say(*words: str) -> Any:
        return CliRunner().invoke(app, ["generate", str(run), "hello", "--max-new-tokens", "1", *words])

    word = ["--trust-plugin", f"{file}:Depth"]
    refused = say()
    assert refused.exit_code != 0 and REFUSED in str(refused.exception)
    assert "give --trust-plugin path/to/depth.py:Depth" in str(refused.exception)
    first = say(*word)
    assert first.exit_code == 0, first.output
    told = "".join(first.stderr.split())
    assert f"{file}, SHA-256 {digest(file)}".replace(" ", "") in told
    again = say()
    assert again.exit_code == 0, again.output

    file.write_text(f"{GOOD}    more = 1\n")
    edited = say()
    assert edited.exit_code != 0 and f"was changed since and has SHA-256 {digest(file)}" in str(edited.exception)
    trusted = say(*word)
    assert trusted.exit_code == 0, trusted.output
    assert f"madewithanotherversion,SHA-256{digest(home / 'depth.py')}" in "".join(trusted.stderr.split())


# What a folder's modality.json says ------------------------------------------------------------------------------

Attack = Callable[[Path, Path, pytest.MonkeyPatch], dict[str, Any]]


def _here(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    evil(there / "evil.py", canary)
    patch.chdir(there)
    return {"plugin": "evil.py:Depth", "plugin_sha256": None}


def _above(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    evil(there / "evil.py", canary)
    (there / "down").mkdir()
    patch.chdir(there / "down")
    return {"plugin": "../evil.py:Depth", "plugin_sha256": None}


def _module(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    evil(there / "site/evil_module.py", canary)
    patch.syspath_prepend(str(there / "site"))
    return {"plugin": "evil_module:Depth", "plugin_sha256": None}


def _package(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Even finding a module would run the packages above it."""
    evil(there / "site/evil_package/__init__.py", canary)
    inner = evil(there / "site/evil_package/inner.py", canary)
    patch.syspath_prepend(str(there / "site"))
    return {"plugin": "evil_package.inner:Depth", "plugin_sha256": digest(inner)}


def _installed(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Another class than the one that the installed package declares."""
    evil(there / "site/acme_evil.py", canary)
    _declare(there / "site", "acme", "depth = acme_evil:Declared")
    patch.syspath_prepend(str(there / "site"))
    return {"plugin": "acme_evil:Depth", "plugin_sha256": None}


def _declare(site: Path, distribution: str, entry: str) -> None:
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[molora.modalities]\n{entry}\n")


def _pipe(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    os.mkfifo(there / "pipe.py")
    return {"plugin": f"{there}/pipe.py:Depth", "plugin_sha256": None}


def _huge(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    with open(there / "huge.py", "wb") as file:
        file.truncate(2**33)
    return {"plugin": f"{there}/huge.py:Depth", "plugin_sha256": None}


def _hash_told(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    file = evil(there / "evil.py", canary)
    return {"plugin": f"{file}:Depth", "plugin_sha256": digest(file)}


def _planted(there: Path, canary: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hash that leads to a file of the folder, as if it were the user's memory."""
    file = evil(there / "evil.py", canary)
    (there / "planted.json").write_text(json.dumps({"places": [str(file)], "module": None}))
    return {"plugin": "evil.py:Depth", "plugin_sha256": "../../planted"}


SAYS: dict[str, tuple[Attack, str]] = {
    "a file in the working directory": (_here, REFUSED),
    "a file above": (_above, REFUSED),
    "a file with its hash": (_hash_told, REFUSED),
    "a module with effects": (_module, REFUSED),
    "a module in a package with effects": (_package, REFUSED),
    "another class of an installed package": (_installed, REFUSED),
    "a pipe, which would wait for ever": (_pipe, REFUSED),
    "a file of 8 GiB": (_huge, REFUSED),
    "a hash that is a path": (_planted, "no plugin's; copy the folder again"),
    "a function of the system": (lambda *_: {"plugin": "os:system", "plugin_sha256": None}, REFUSED),
    "a class of the system": (lambda *_: {"plugin": "subprocess:Popen", "plugin_sha256": None}, REFUSED),
    "a builtin": (lambda *_: {"plugin": "builtins:eval", "plugin_sha256": "0" * 64}, REFUSED),
    "no module at all": (lambda *_: {"plugin": "../evil:Depth", "plugin_sha256": None}, REFUSED),
    "nothing": (lambda *_: {"plugin": ":", "plugin_sha256": None}, REFUSED),
    "a name that is a path": (lambda *_: {"plugin": "../evil", "plugin_sha256": None}, "no modality is called"),
    "a list": (lambda *_: {"plugin": ["os:system"], "plugin_sha256": None}, "plugin is .*, expected a text"),
    "molora's own command line": (
        lambda *_: {"plugin": "molora.cli.commands:app", "plugin_sha256": None},
        "not a class",
    ),
    "a class of molora's that is no plugin": (
        lambda *_: {"plugin": "molora.model.molora:MoLoRA", "plugin_sha256": None},
        "class MoLoRA lacks config_type",
    ),
}


@pytest.mark.parametrize("attack", SAYS)
def test_a_folder_that_names_code_does_not_run_it(
    attack: str, home: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, told = SAYS[attack]
    folder = received(home, tmp_path, **make(tmp_path, canary, monkeypatch))
    with pytest.raises(ValueError, match=told) as caught:
        load(home, folder)
    assert str(folder / "modality.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_two_packages_claim_runs_neither(home, tmp_path, canary, monkeypatch) -> None:
    evil(tmp_path / "site/acme_evil.py", canary)
    _declare(tmp_path / "site", "acme", "vision = acme_evil:Depth")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(ConfigError, match=r"claimed by built-in .* and acme \(acme_evil:Depth\)"):
        load(home, received(home, tmp_path, plugin="vision", plugin_sha256=None))


def test_what_an_installed_package_declares_needs_no_word_by_name_or_by_place(home, tmp_path, monkeypatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/acme_good.py").write_text(GOOD)
    _declare(tmp_path / "site", "acme", "sonar = acme_good:Depth")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for number, plugin in enumerate(("sonar", "acme_good:Depth")):
        folder = received(home, tmp_path / str(number), plugin=plugin, plugin_sha256=None)
        assert set(load(home, folder).model.modalities) == {"depth"}


# The user's word, and what it does not cover ---------------------------------------------------------------------


def test_the_word_for_one_file_is_not_the_word_for_another(home, tmp_path, canary) -> None:
    file = evil(tmp_path / "evil.py", canary)
    folder = received(home, tmp_path, plugin=f"{file}:Depth", plugin_sha256=None)
    with pytest.raises(ConfigError, match=REFUSED):
        load(home, folder, f"{home}/depth.py:Depth")


def test_of_a_file_of_the_same_name_the_users_runs_and_not_the_folders(home, tmp_path, canary, capsys) -> None:
    file = evil(tmp_path / "depth.py", canary)
    folder = received(home, tmp_path, plugin=f"{file}:Depth", plugin_sha256=digest(file))
    loaded = load(home, folder, f"{home}/depth.py:Depth")
    assert type(loaded.model.modalities["depth"]).__module__.startswith("molora_plugin_depth")
    told = " ".join(capsys.readouterr().err.split())
    assert f"runs the code of {home}/depth.py, SHA-256 {digest(home / 'depth.py')}" in told
    assert f"made with another version, SHA-256 {digest(file)}" in told


def test_a_trusted_hash_does_not_lend_its_trust_to_the_file_beside_it(home, tmp_path, canary) -> None:
    """The folder tells the hash of trusted code, and a place where other code lies."""
    remember(find("modality", f"{home}/depth.py:Depth"))
    file = evil(tmp_path / "other/depth.py", canary)
    folder = received(home, tmp_path, plugin=f"{file}:Depth", plugin_sha256=digest(home / "depth.py"))
    assert set(load(home, folder).model.modalities) == {"depth"}


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    """A file of the user's that is trusted already."""
    file = tmp_path / "mine/depth.py"
    file.parent.mkdir()
    file.write_text(GOOD)
    remember(find("modality", f"{file}:Depth"))
    return file


def test_trusted_code_that_changed_since_does_not_run(home, tmp_path, canary, trusted) -> None:
    then = digest(trusted)
    evil(trusted, canary)
    folder = received(home, tmp_path, plugin="depth.py:Depth", plugin_sha256=then)
    with pytest.raises(ConfigError, match=f"SHA-256 {then}.*changed since and has SHA-256 {digest(trusted)}.*--trust"):
        load(home, folder)


def test_a_link_in_the_place_of_trusted_code_does_not_run(home, tmp_path, canary, trusted) -> None:
    then = digest(trusted)
    trusted.unlink()
    trusted.symlink_to(evil(tmp_path / "evil.py", canary))
    folder = received(home, tmp_path, plugin="depth.py:Depth", plugin_sha256=then)
    with pytest.raises(ConfigError, match="changed since"):
        load(home, folder)


def test_trusted_code_that_is_gone_is_said_to_be_gone(home, tmp_path, trusted) -> None:
    then = digest(trusted)
    trusted.unlink()
    folder = received(home, tmp_path, plugin="depth.py:Depth", plugin_sha256=then)
    with pytest.raises(ConfigError, match=f"the file is no longer in {trusted}.*--trust-plugin path/to/depth.py:Depth"):
        load(home, folder)


def test_of_trusted_code_that_lies_in_several_places_any_will_do(home, tmp_path, trusted) -> None:
    copy = tmp_path / "clone/depth.py"
    copy.parent.mkdir()
    copy.write_bytes(trusted.read_bytes())
    remember(find("modality", f"{copy}:Depth"))
    folder = received(home, tmp_path / "received", plugin="depth.py:Depth", plugin_sha256=digest(trusted))
    copy.unlink()
    load(home, folder)
    trusted.write_text(f"{GOOD}\n")
    with pytest.raises(ConfigError, match=rf"no longer in {copy}, {trusted} was changed since"):
        load(home, folder)


def test_what_was_hashed_is_what_runs_though_the_file_is_swapped_in_between(
    home, tmp_path, canary, trusted, monkeypatch
) -> None:
    def swapped(*arguments: Any) -> Any:
        evil(trusted, canary)
        return plugins.find_in_file(*arguments)

    monkeypatch.setattr(trust, "find_in_file", swapped)
    folder = received(home, tmp_path, plugin="depth.py:Depth", plugin_sha256=digest(trusted))
    assert set(load(home, folder).model.modalities) == {"depth"}
    assert str(canary) in trusted.read_text()


def test_compiled_code_beside_a_trusted_file_does_not_run(home, tmp_path, canary, trusted) -> None:
    """Python would take it for the file's, since size and time agree."""
    good, times = trusted.read_bytes(), trusted.stat()
    evil(trusted, canary)
    os.truncate(trusted, len(good)) if len(good) > trusted.stat().st_size else None
    size = max(len(good), trusted.stat().st_size)
    trusted.write_bytes(trusted.read_bytes().ljust(size))
    os.utime(trusted, ns=(times.st_atime_ns, times.st_mtime_ns))
    py_compile.compile(str(trusted), importlib.util.cache_from_source(str(trusted)))
    trusted.write_bytes(good.ljust(size))
    os.utime(trusted, ns=(times.st_atime_ns, times.st_mtime_ns))
    folder = received(home, tmp_path, plugin="depth.py:Depth", plugin_sha256=digest(trusted))
    assert set(load(home, folder, f"{trusted}:Depth").model.modalities) == {"depth"}


def test_a_trusted_module_that_changed_does_not_run(home, tmp_path, canary, monkeypatch) -> None:
    file = tmp_path / "site/acme_changed.py"
    file.parent.mkdir()
    file.write_text(GOOD)
    then = digest(file)
    text = json.dumps({"places": [str(file)], "module": "acme_changed"})
    (tmp_path / "cache/trusted").mkdir(parents=True)
    (tmp_path / f"cache/trusted/{then}.json").write_text(text)
    evil(file, canary)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name, sha256 in (("one", then), ("two", None), ("three", digest(file))):
        folder = received(home, tmp_path / name, plugin="acme_changed:Depth", plugin_sha256=sha256)
        with pytest.raises(ConfigError, match=REFUSED):
            load(home, folder)


def test_a_trusted_module_does_not_run_beside_other_files(home, tmp_path, canary, monkeypatch) -> None:
    """A copy of the very code, in a package of the same name that is found first and does more."""
    mine = tmp_path / "mine/acme_package"
    mine.mkdir(parents=True)
    (mine / "__init__.py").write_text("")
    (mine / "inner.py").write_text(GOOD)
    sha256 = digest(mine / "inner.py")
    (tmp_path / "cache/trusted").mkdir(parents=True)
    about = {"places": [str(mine / "inner.py")], "module": "acme_package.inner"}
    (tmp_path / f"cache/trusted/{sha256}.json").write_text(json.dumps(about))
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    theirs = evil(tmp_path / "theirs/acme_package/__init__.py", canary).parent
    shutil.copy(mine / "inner.py", theirs)
    folder = received(home, tmp_path, plugin="acme_package.inner:Depth", plugin_sha256=sha256)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / "theirs"))
        with pytest.raises(ConfigError, match=f"it was trusted in {mine}/inner.py, and is now in {theirs}/inner.py"):
            load(home, folder)
    assert set(load(home, folder).model.modalities) == {"depth"}


@pytest.mark.parametrize("spec", ["~nouser/x.py:C", "~/x.py:C", "a\0b.py:C", "\ud800.py:C", "x" * 5000 + ".py:C"])
@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_a_file_that_cannot_be_is_refused_as_any_other(home, tmp_path, spec: str, sha256: str | None) -> None:
    with pytest.raises(ConfigError, match=REFUSED):
        load(home, received(home, tmp_path, plugin=spec, plugin_sha256=sha256))
    with pytest.raises(ConfigError, match=r"x\.py|\\x00|\\ud800|xxx"):
        find("modality", spec)


# Routers, recipes and other commands -----------------------------------------------------------------------------


def routed(home: Path, there: Path, plugin: str, sha256: str | None = None) -> Path:
    """A received run whose molora.json names a router."""
    shutil.copytree(home / "backbone", there / "backbone")
    run = Path(shutil.copytree(home / "run", there / "run"))
    about = json.loads((run / "molora.json").read_text())
    about |= {"router": {"plugin": plugin, "options": {}}, "router_sha256": sha256}
    (run / "molora.json").write_text(json.dumps(about))
    return run


def test_a_run_that_names_its_router_does_not_run_it(home, tmp_path, canary, monkeypatch) -> None:
    file = evil(tmp_path / "site/evil_router.py", canary, ROUTER)
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.chdir(file.parent)
    names = ("evil_router.py:Ferry", f"{file}:Ferry", "evil_router:Ferry", "os:system")
    for number, plugin in enumerate(names):
        run = routed(home, tmp_path / str(number), plugin, digest(file) if number else None)
        with pytest.raises(ConfigError, match=f"molora.json: router .*{REFUSED}"):
            molora.load(run, device="cpu", trust=[f"{home}/depth.py:Depth"])
        with pytest.raises(ConfigError, match=REFUSED):
            on_meta(run, trust=[f"{home}/depth.py:Depth"])


def recipe(home: Path, run: Path, **changes: Any) -> Recipe:
    values = {
        "run": str(run),
        "backbone": {"path": str(home / "backbone")},
        "modalities": {"depth": {"path": str(home / "run/modalities/depth")}},
        "stages": [
            {
                "name": "only",
                "train": {"adapters.depth": {"learning_rate": 0.1}},
                "data": {"rows": {"kind": "messages", "options": {"path": str(home / "rows.jsonl")}}},
                "steps": 1,
                "samples_per_step": 1,
            }
        ],
        "device": "cpu",
        **changes,
    }
    return build(Recipe, values, "recipe")


def test_a_folder_that_a_recipe_names_is_received_all_the_same(home, tmp_path, canary) -> None:
    file = evil(tmp_path / "evil.py", canary, GOOD + ROUTER)
    folder = received(home, tmp_path, plugin=f"{file}:Depth", plugin_sha256=digest(file))
    with pytest.raises(ConfigError, match=REFUSED):
        train(recipe(home, tmp_path / "out", modalities={"depth": {"path": str(folder)}}), show=False)
    run = routed(home, tmp_path / "there", f"{file}:Ferry", digest(file))
    with pytest.raises(ConfigError, match=REFUSED):
        words = [f"{home}/depth.py:Depth"]
        train(recipe(home, tmp_path / "out", router={"path": str(run)}), show=False, trust=words)


def test_verify_opens_no_source_of_a_received_run_unless_asked(home, tmp_path, canary) -> None:
    """By default not even its recipe is read; if asked, a source that is code still needs the user's word."""
    run = routed(home, tmp_path, "table")
    file = evil(tmp_path / "evil.py", canary)
    rows = f"{{rows: {{kind: '{file}:Rows'}}}}"
    stage = f"{{name: a, train: {{}}, steps: 1, samples_per_step: 1, data: {rows}}}"
    head = f"run: x\nbackbone: {{path: {home}/backbone}}\nmodalities: {{}}\n"
    (run / "config.yaml").write_text(f"{head}stages: [{stage}]\n")
    words = ["--trust-plugin", f"{home}/depth.py:Depth"]
    told = CliRunner().invoke(app, ["verify", str(run), *words, "--recipe-data"])
    assert told.exit_code == 1 and REFUSED in str(told.exception) and "source" in str(told.exception)
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")  # who reads it waits for ever
    told = CliRunner().invoke(app, ["verify", str(run), *words])
    assert "4 tokens equal frames" in told.output


@pytest.mark.parametrize(
    "name", ["../up", "/absolute", "a/b", "a\\b", "..", ".hidden", "line\nbreak", "\x1b[2J", "", "x" * 300]
)
def test_a_name_that_would_lead_elsewhere_is_none(name: str, home: Path, tmp_path: Path) -> None:
    """Of a modality, a stage and an evaluation in a recipe, and of a plugin to write."""
    stage = {"name": name, "train": {}, "data": {}, "steps": 1, "samples_per_step": 1}
    evaluation = {"data": {"kind": "messages"}, "max_new_tokens": 1}
    for changes in (
        {"modalities": {name: {"plugin": "vision"}}},
        {"stages": [stage]},
        {"evaluations": {name: evaluation}},
    ):
        with pytest.raises(ConfigError, match="is no name"):
            recipe(home, tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match="cannot name a modality"):
        new_plugin("modality", name, tmp_path)
    assert not any(tmp_path.iterdir()) or [path.name for path in tmp_path.iterdir()] == ["cache"]


# Backbones that bring code ---------------------------------------------------------------------------------------


def backbone(home: Path, there: Path, file: str = "config.json", **says: Any) -> Path:
    """A copy of the backbone with other values in one of its JSON files."""
    folder = Path(shutil.copytree(home / "backbone", there / "backbone"))
    about = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**about, **says}))
    return folder


def test_a_backbone_with_code_of_its_own_opens_without_it(home, tmp_path, canary) -> None:
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    folder = backbone(home, tmp_path, auto_map=auto)
    evil(folder / "evil.py", canary, "class Config: pass\nclass Model: pass\nclass T: pass\n")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "auto_map": auto}))
    assert type(load_backbone(str(folder))[0].model).__module__.startswith("transformers.")


def test_a_backbone_of_an_unknown_kind_with_code_is_refused(home, tmp_path, canary) -> None:
    folder = backbone(home, tmp_path, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    evil(folder / "evil.py", canary, "class Config: pass\n")
    for open_it in (lambda: load_backbone(str(folder)), lambda: on_meta(folder)):
        with pytest.raises(ValueError, match="custom code|does not recognize|model type `evil`"):
            open_it()


def test_a_tokenizer_with_code_is_refused_or_opens_without_it(home, tmp_path, canary) -> None:
    says = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    folder = backbone(home, tmp_path, "tokenizer_config.json", **says)
    evil(folder / "evil.py", canary, "class EvilTokenizer: pass\n")
    try:
        tokenizer = load_backbone(str(folder))[1]
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "EvilTokenizer" in str(error)
    else:
        assert type(tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_backbone_names_are_not_fetched(key: str, home: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    folder = backbone(home, tmp_path, **{key: "kernels-community/flash-attn"})
    with pytest.raises(ValueError, match=f"{key} is 'kernels-community/flash-attn', code that would be fetched"):
        load_backbone(str(folder))
    with pytest.raises(ValueError, match="code that would be fetched"):
        on_meta(folder, dtype="float32")


def test_attention_that_would_be_fetched_if_it_is_not_installed_is_not_taken(home, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket.connect", _no_network)
    folder = backbone(home, tmp_path, _attn_implementation="flash_attention_2")
    assert open_stock(folder, "auto").config._attn_implementation == "eager"
    assert load_backbone(str(folder))[0].probe["differences"]


def _no_network(*_: Any) -> None:
    raise AssertionError("connects to the network")


def test_code_to_generate_with_does_not_run(home, tmp_path, canary) -> None:
    folder = backbone(home, tmp_path, "generation_config.json", custom_generate="evil", eos_token_id=0)
    evil(folder / "custom_generate/generate.py", canary, "def generate(*_, **__): pass\n")
    loaded = molora.load(folder, device="cpu")
    assert isinstance(
        loaded.generate([{"role": "user", "content": "?"}], molora.GenerationConfig(max_new_tokens=1)), str
    )


def test_pickled_weights_are_not_read(home, tmp_path, canary) -> None:
    folder = backbone(home, tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(ValueError, match="no pickles"):
        load_backbone(str(folder))


@pytest.mark.parametrize("method", ["evil", "bitsandbytes", "gptq", "awq", "quark", "torchao"])
def test_a_library_that_a_backbone_wants_to_be_unpacked_with_is_not_imported(method: str, home, tmp_path) -> None:
    folder = backbone(home, tmp_path, quantization_config={"quant_method": method, "modules_to_not_convert": None})
    with pytest.raises(ValueError, match="quantization_config"):
        load_backbone(str(folder))
    with pytest.raises(ValueError, match="quantization_config"):
        on_meta(folder, dtype="float32")


@pytest.mark.parametrize(
    "says",
    [
        {"auto_mapping": {"base_model_class": "Depth", "parent_library": "evil_peft"}},
        {"megatron_core": "evil_peft", "megatron_config": {"tensor_model_parallel_size": 1}},
        {"base_model_name_or_path": "nobody/evil", "revision": "main"},
        {"runtime_config": {"ephemeral_gpu_offload": True}, "task_type": "../evil"},
    ],
    ids=["auto_mapping", "megatron", "base model", "task"],
)
def test_an_adapter_that_names_a_library_imports_and_fetches_nothing(says, home, tmp_path, canary, monkeypatch) -> None:
    evil(tmp_path / "site/evil_peft.py", canary)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr("socket.socket.connect", _no_network)
    folder = received(home, tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **says}))
    about = json.loads((folder / "modality.json").read_text())
    about["files"]["adapter_config.json"] = digest(file)
    (folder / "modality.json").write_text(json.dumps(about))
    words = [f"--modality={folder}", "--trust-plugin", f"{home}/depth.py:Depth"]
    told = CliRunner().invoke(app, ["verify", str(home / "backbone"), *words])
    assert told.exception is None or isinstance(told.exception, (ValueError, SystemExit)), told.exception


def test_a_word_that_matches_nothing_is_said_to_match_nothing(tmp_path: Path, canary: Path) -> None:
    evil(tmp_path / "boards.py", canary)
    with pytest.raises(Untrusted, match=r"the word that was given is for another plugin: other.py:Depth"):
        find_received("modality", "boards.py:Depth", None, ["other.py:Depth"])
