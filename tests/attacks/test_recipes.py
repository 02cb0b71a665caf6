"""Recipes that a stranger wrote: they read no secrets, fill no memory, run no code and wait for nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from molora.config import ConfigError, build, dump, options, plain, read
from molora.config.reading import MAX_BYTES
from molora.testing import save_backbone
from molora.train.loop import train
from molora.train.recipe import Recipe as WholeRecipe


@dataclass
class Recipe:
    a: Any = None
    b: Any = None
    rest: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HUB_TOKEN", "hf_verysecret")
    monkeypatch.delenv("MOLORA_RECIPE_ENV", raising=False)
    return "hf_verysecret"


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def laughs(levels: int, width: int) -> str:
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


def chained(levels: int, width: int, listed: bool) -> str:
    one = "[{}]" if listed else "'{}'"
    lines = ["a0: xxxxxxxxxxxxxxxx"]
    for level in range(1, levels):
        inner = (", " if listed else "").join(
            [f"'${{rest.a{level - 1}}}'" if listed else f"${{rest.a{level - 1}}}"] * width
        )
        lines.append(f"a{level}: {one.format(inner)}")
    return "rest:\n  " + "\n  ".join(lines)


def deep(levels: int, depth: int) -> str:
    """Mappings, each with the next at its bottom."""
    rows = ["{a: " * depth + f"'${{rest.k{level + 1}}}'" + "}" * depth for level in range(levels)]
    return "rest:\n" + "".join(f"  k{level}: {row}\n" for level, row in enumerate([*rows, "x"]))


# (what it tries, the file, what the message must say)
TEXTS = [
    ("an environment variable", "a: ${oc.env:HUB_TOKEN}", "MOLORA_RECIPE_ENV=HUB_TOKEN"),
    ("one with a default", "a: '${oc.env:HUB_TOKEN,x}'", "the environment variable HUB_TOKEN"),
    ("one inside a text", "a: 'https://x.example/?t=${oc.env:HUB_TOKEN}'", "the environment variable HUB_TOKEN"),
    ("one through another key", "a: ${b}\nb: ${oc.env:HUB_TOKEN}", "the environment variable HUB_TOKEN"),
    ("one whose name is put together", "a: '${oc.env:${b}}'\nb: HUB_TOKEN", "an interpolation inside another"),
    ("the resolver oc.decode", "a: '${oc.decode:\"1\"}'", "only ${key} and ${oc.env:NAME} are read"),
    ("the resolver oc.create", "a: '${oc.create:${b}}'\nb: {x: 1}", "an interpolation inside another"),
    ("the resolver oc.select", "a: ${oc.select:b}\nb: 1", "only ${key} and ${oc.env:NAME} are read"),
    ("a resolver of someone else", "a: ${eval:1+1}", "only ${key} and ${oc.env:NAME} are read"),
    ("a billion laughs", laughs(10, 10), "more than 10,000 values"),
    ("laughs by merge keys", "a: &m {x: [1, 2, 3]}\n" + laughs(7, 9), "more than 10,000 values"),
    ("an anchor in itself", "a: &x [*x]", "*x stands for nothing that ends before it"),
    ("an anchor that is nowhere", "a: *x", "*x stands for nothing that ends before it"),
    ("lists that interpolations double", chained(30, 2, True), "more than 10,000 values"),
    ("a text that interpolations double", chained(60, 2, False), "interpolations make more than"),
    (
        "a text that aliases repeat",
        "a: &x " + "x" * 1000 + "\nb: [" + "*x, " * 5000 + "]",
        "1,048,576 characters, aliases",
    ),
    ("a key that aliases repeat", "a: &x {" + "x" * 1000 + ": 1}\nb: [" + "*x, " * 3000 + "]", "characters, aliases"),
    (
        "a list that interpolations repeat",
        "a: [" + "x" * 1000 + "]\nb: [" + "'${a}', " * 3000 + "]",
        "interpolations make more than 1,048,576 characters",
    ),
    ("deep mappings, one in the other", deep(30, 28), "lies more than 32 deep"),
    ("brackets that nothing closes", "a: '${" + "[" * 500_000 + "}'", "there is no key"),
    ("brackets that one closes", "a: '${" + "[" * 500_000 + "]}'", "there is no key"),
    ("an interpolation of itself", "a: ${a}", "leads back to itself"),
    ("two interpolations of each other", "a: 'x${b}'\nb: 'x${a}'", "leads back to itself"),
    ("a list inside itself", "a: [1, '${a}']", "leads back to itself"),
    ("brackets, 100,000 deep", "a: " + "[" * 100_000, "more than 32 deep"),
    ("mappings, 100,000 deep", "a: " + "{a: " * 100_000, "more than 32 deep"),
    ("an interpolation, 100,000 deep", "a: '" + "${" * 100_000 + "'", "an interpolation without its end"),
    ("100,000 values", "a: [" + "1, " * 100_000 + "]", "more than 10,000 values"),
    ("2 MiB", "a: " + "x" * (2 * MAX_BYTES), f"more than {MAX_BYTES:,} bytes"),
    ("a call of Python's", "a: !!python/object/apply:os.system ['touch {canary}']", "python/object/apply:os.system"),
    ("a path by tag", "a: !!python/object/apply:pathlib.PosixPath [/etc/passwd]", "is not read; write plain values"),
    ("a tag of its own", "a: !include /etc/passwd", "the tag !include is not read"),
    ("bytes by tag", "a: !!binary aGk=", "is not read; write plain values"),
    ("a boolean by tag", "a: !!bool maybe", "is not read; write plain values"),
    ("a number by tag", "a: !!int ''", "is not read; write plain values"),
    ("a set by tag", "a: !!set {x}", "is not read; write plain values"),
    *[
        (f"a number by tag, {value}", f"a: !!{value}", "is not read; write plain values")
        for value in ("int foo", "int ''", "float ''", "float x", "bool maybe", "null x")
    ],
    ("a number of 5,000 digits", "a: " + "9" * 5000, "a whole number of 5000 characters"),
    ("one of 5,000 digits in hexadecimal", "a: 0x" + "f" * 5000, "a whole number of 5002 characters"),
    ("an index that no number is", "a: ${b.²}\nb: [1]", "there is no key 'b.²'"),
    ("an index of 5,000 digits", "a: ${b." + "9" * 5000 + "}\nb: [1]", "there is no key"),
    ("backslashes without end", "a: '" + "\\" * 1_000_000 + "x${c}'", "there is no key 'c'"),
    ("brackets in an interpolation", "a: ${x" + "[" * 1_000_000 + "}", "there is no key 'x'"),
    ("an interpolation of many steps", "a: ${x" + ".x" * 500_000 + "}", "there is no key 'x.x.x"),
    (
        "a key of many steps among many keys",
        "rest: ${b}\nb:\n  ? x" + ".x" * 400_000 + "\n  : {1: x}\n" + "".join(f"  k{i}: 1\n" for i in range(2000)),
        "expected keys that are text, got 1",
    ),
    ("keys that are no text", "rest: {1: {2: x}}", "expected keys that are text, got 1"),
    ("keys that are lists", "rest: {? [1, 2] : x}", "YAML"),
    ("control characters", b"a: \x00\x1b[2J", "YAML"),
    ("Latin-1", "a: é".encode("latin-1"), "not UTF-8 at byte 3"),
    ("two documents", "a: 1\n---\na: 2", "YAML"),
    ("one key twice", "a: 1\na: 2", "duplicate key a"),
]


@pytest.mark.parametrize(("text", "says"), [pytest.param(*rest, id=what) for what, *rest in TEXTS])
def test_a_file_that_does_more_than_say_values_is_refused(
    tmp_path: Path, canary: Path, secret: str, text: str | bytes, says: str
) -> None:
    text = text.replace("{canary}", str(canary)) if isinstance(text, str) else text
    with pytest.raises(ConfigError) as caught:
        read(Recipe, write(tmp_path, text))
    assert says in str(caught.value) and "recipe.yaml" in str(caught.value)
    assert secret not in str(caught.value)


def test_a_base_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for base in ("/dev/zero", str(tmp_path / "pipe")):
        with pytest.raises(ConfigError, match=f"{base} .*recipe.yaml.*: no regular file"):
            read(Recipe, write(tmp_path, f"base: {base}"))


def test_bases_without_end_are_refused(tmp_path: Path) -> None:
    for level in range(1, 100):
        write(tmp_path, f"base: {level + 1}.yaml", f"{level}.yaml")
    with pytest.raises(ConfigError, match="more than 16 bases"):
        read(Recipe, tmp_path / "1.yaml")


@pytest.mark.parametrize("given", ["a=${oc.env:HUB_TOKEN}", "a.${oc.env:HUB_TOKEN}.b=[1", "a=" + "[" * 10_000])
def test_what_the_command_line_says_is_read_no_other_way(tmp_path: Path, secret: str, given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(Recipe, write(tmp_path, "b: 1"), [given])
    assert secret not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        options([given])
    assert secret not in str(caught.value)


def whole(run: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": run,
        "backbone": {"path": "backbone"},
        "modalities": {"numbers": {"plugin": "molora.testing:Numbers"}},
        "stages": [
            {
                "name": "tune",
                "train": {"projectors": {"learning_rate": 1e-3}},
                "data": {"rows": {"kind": "messages", "options": {"path": "rows.jsonl"}}},
                "steps": 1,
                "samples_per_step": 1,
            }
        ],
        **changes,
    }


def test_an_allowed_variable_is_not_written_into_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("MOLORA_RECIPE_ENV", "OTHER, HUB_TOKEN")
    text = dump(build(WholeRecipe, whole("RUN"), "test")).replace("run: RUN", "run: x/${oc.env:HUB_TOKEN}\nseed: 3")
    text = text.replace("\nseed: 0", "").replace("path: rows.jsonl", "path: ${run}/rows.jsonl")
    recipe = read(WholeRecipe, write(tmp_path, text))
    assert recipe.run == f"x/{secret}"
    assert recipe.stages[0].data["rows"].options["path"] == f"x/{secret}/rows.jsonl"
    for written in (dump(recipe), str(plain(recipe))):
        assert secret not in written and "x/${oc.env:HUB_TOKEN}" in written
    assert read(WholeRecipe, write(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize("where", ["modalities.numbers.options.scale", "router.options.rules.a+b"])
def test_no_variable_gets_into_folders_that_are_given_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str, where: str
) -> None:
    monkeypatch.setenv("MOLORA_RECIPE_ENV", "HUB_TOKEN")
    path = write(tmp_path, dump(build(WholeRecipe, whole("run"), "test")))
    with pytest.raises(ConfigError, match=r"\$\{oc.env:HUB_TOKEN\} stands among the options of a modality or router"):
        read(WholeRecipe, path, [where + "=${oc.env:HUB_TOKEN}"])


NUMBERS = [
    ("stages.0.data.rows.weight", "9" * 400),
    ("stages.0.train.projectors.learning_rate", "-" + "9" * 400),
    ("stages.0.steps", "0"),
    ("stages.0.steps", "-5"),
    ("stages.0.samples_per_step", "0"),
    ("stages.0.tokens_per_pack", "0"),
    ("stages.0.evaluate_every_steps", "-1"),
    ("stages.0.data.rows.weight", ".nan"),
    ("stages.0.data.rows.weight", "-1.0"),
    ("stages.0.data.rows.weight", "0"),
    ("stages.0.data.rows.limit", "0"),
    ("stages.0.train.projectors.learning_rate", ".nan"),
    ("stages.0.train.projectors.learning_rate", ".inf"),
    ("stages.0.train.projectors.learning_rate", "-1e-3"),
    ("stages.0.train.projectors.beta2", "1.0"),
    ("stages.0.train.projectors.max_gradient_norm", "0"),
    ("stages.0.train.projectors.weight_decay", "-.inf"),
    ("stages.0.train.projectors.warmup_steps", "-1"),
    ("save_every_steps", "0"),
    ("log_every_steps", "0"),
    ("data_workers", "-1"),
    ("evaluations", "{t: {data: {kind: messages}, max_new_tokens: 0}}"),
    ("evaluations", "{t: {data: {kind: messages}, max_running_samples: 0}}"),
]


@pytest.mark.parametrize(("key", "value"), NUMBERS)
def test_a_number_that_cannot_be_is_refused_with_its_key(tmp_path: Path, key: str, value: str) -> None:
    path = write(tmp_path, dump(build(WholeRecipe, whole("run"), "test")))
    with pytest.raises(ConfigError) as caught:
        read(WholeRecipe, path, [f"{key}={value}"])
    above, _, name = key.rpartition(".")
    assert (above in str(caught.value) or key in str(caught.value)) and name.split("=")[0] in str(caught.value)


def test_names_in_a_recipe_do_not_talk_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tmp_path / "backbone")
    write(
        tmp_path,
        '{"messages": [{"role": "user", "content": [{"type": "numbers", "numbers": [1]}]}, '
        '{"role": "assistant", "content": "y"}]}\n',
        "rows.jsonl",
    )
    monkeypatch.chdir(tmp_path)
    values = whole("run\x1b[2J", device="cpu", evaluations={"e": {"data": None}})
    values["evaluations"]["e"]["data"] = values["stages"][0]["data"]["rows"]
    values["stages"][0]["name"] = "[red]tune"
    adapter = {"r": 2, "target_modules": ["qkv_proj"]}
    values["modalities"]["numbers"]["adapter"] = adapter
    recipe = build(WholeRecipe, values, "test")
    train(recipe)
    train(recipe)  # and as one that is trained already
    shown = "".join(capsys.readouterr())
    assert "[red]tune" in shown and "run\\x1b[2J: trained already" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("run", ["x\0y", "recipe.yaml", "recipe.yaml/inside", "/proc/nowhere/run", "x" * 300])
def test_a_run_folder_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
        "rows.jsonl",
    )
    write(tmp_path, "a: 1")
    with pytest.raises(ConfigError, match="run: .* cannot be made"):
        train(build(WholeRecipe, whole(run, device="cpu"), "test"), show=False)
