"""Configs: what is read equals what was meant, and every mistake is one error that says where."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from molora.config import ConfigError, build, dump, options, read


@dataclass(frozen=True)
class Stage:
    name: str
    learning_rate: float = 1e-3
    trainable: list[str] = field(default_factory=list)
    schedule: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Optional[float] = None  # noqa: UP045 (both spellings are read)

    def __post_init__(self) -> None:
        if self.learning_rate < 0:
            raise ValueError(f"learning_rate must not be negative, got {self.learning_rate}")


@dataclass
class Plugin:
    plugin: str
    sizes: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    stages: list[Stage]
    modalities: dict[str, Plugin] = field(default_factory=dict)
    seed: int = 0
    shuffle: bool = True
    limit: Union[float, int, None] = None  # noqa: UP007
    last: Stage | None = None


@dataclass
class Schedules:
    schedule: Literal["cosine", "constant"]
    level: Literal[1, 2]


GOOD = """
stages:
  - {name: align, learning_rate: 1e-4, trainable: [projectors.vision]}
  - {name: tune}
modalities:
  vision: {plugin: vision, sizes: [1, 2], options: {crop: {size: 448}, names: [a, b]}}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_becomes_nested_dataclasses(write) -> None:
    recipe = read(Recipe, write(GOOD))
    assert recipe == Recipe(
        stages=[Stage("align", 1e-4, ["projectors.vision"]), Stage("tune")],
        modalities={"vision": Plugin("vision", (1, 2), {"crop": {"size": 448}, "names": ["a", "b"]})},
    )
    assert type(recipe.stages[0].learning_rate) is float and type(recipe.modalities["vision"].options) is dict


@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("3", 3.0), ("1.5E+3", 1500.0), (".inf", float("inf"))])
def test_floats_are_floats_however_they_are_written(write, text: str, value: float) -> None:
    rate = read(Recipe, write(f"stages: [{{name: a, learning_rate: {text}}}]")).stages[0].learning_rate
    assert type(rate) is float and rate == value


def test_overrides_come_last_and_reach_into_lists_and_free_sections(write) -> None:
    overrides = [
        "stages.1.learning_rate=3e-5",
        "stages[0].name=first",
        "modalities.vision.options.crop.size=224",
        "modalities.audio={plugin: audio}",
        "limit=0.5",
        "seed=7",
    ]
    recipe = read(Recipe, write(GOOD), overrides)
    assert [stage.name for stage in recipe.stages] == ["first", "tune"]
    assert recipe.stages[1].learning_rate == 3e-5
    assert recipe.modalities["vision"].options == {"crop": {"size": 224}, "names": ["a", "b"]}
    assert recipe.modalities["audio"] == Plugin("audio")
    assert recipe.limit == 0.5 and recipe.seed == 7
    assert read(Recipe, write(GOOD), ["stages=[{name: only}]"]).stages == [Stage("only")]
    assert read(Recipe, write(GOOD), ["modalities={}"]).modalities == {}
    assert set(read(Recipe, write(GOOD), ["modalities={audio: {plugin: audio}}"]).modalities) > {"audio"}


def test_an_override_finds_a_key_that_has_dots_of_its_own(write) -> None:
    adapters = "a.tide: {rate: 1, by: {b.c: 2}}, a: {tide: {rate: 3}}, a.tide.x: [{rate: 4}]"
    path = write(GOOD + f"  audio: {{plugin: p, options: {{{adapters}}}}}")
    where = "modalities.audio.options"
    overrides = [f"{where}.{key}" for key in ("a.tide.rate=10", "a.tide.by.b.c=20", "a.tide.x.0.rate=40", "a.new=5")]
    overrides.append("stages.0.trainable=[x]")
    recipe = read(Recipe, path, overrides)
    assert recipe.modalities["audio"].options == {
        "a.tide": {"rate": 10, "by": {"b.c": 20}},
        "a": {"tide": {"rate": 3}, "new": 5},
        "a.tide.x": [{"rate": 40}],
    }
    bracketed = read(Recipe, path, [f"{where}[n.m].rate=6", f"{where}.a.tide={{rate: 7}}"]).modalities["audio"].options
    assert bracketed["n.m"] == {"rate": 6} and bracketed["a.tide"] == {"rate": 7, "by": {"b.c": 2}}
    with pytest.raises(ConfigError, match=r"override 'modalities.v.w.plugn=x' of .*: modalities.v.w.plugn: no such"):
        read(Recipe, write(GOOD + "  v.w: {plugin: p}"), ["modalities.v.w.plugn=x"])


def test_a_child_merges_mappings_and_replaces_lists_of_its_base(write) -> None:
    write("base: deeper/grand.yaml\nseed: 2\nshuffle: false\nlimit: 9", "parent.yaml")
    write(GOOD + "seed: 1", "deeper/grand.yaml")
    child = write("base: parent.yaml\nlimit: null\nmodalities: {vision: {sizes: [3]}}\nstages: [{name: solo}]")
    recipe = read(Recipe, child)
    assert recipe.stages == [Stage("solo")]
    assert recipe.modalities["vision"].sizes == (3,)
    assert recipe.modalities["vision"].options["crop"] == {"size": 448}
    assert (recipe.seed, recipe.shuffle, recipe.limit) == (2, False, None)


def test_interpolation_refers_to_the_merged_config(write) -> None:
    path = write("stages: [{name: a, learning_rate: '${modalities.x.options.rate}'}]\nmodalities: {x: {plugin: p}}")
    assert read(Recipe, path, ["modalities.x.options.rate=0.5"]).stages[0].learning_rate == 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),
        ("12:30", "12:30"),
        ("2024-01-02", "2024-01-02"),
        ("+5", 5),
        ("1_000", 1000),
        ("0x1f", 31),
        ("0x_1_f", 31),
        ("0b_1_0", 2),
        ("0b_", "0b_"),
        ("-0x__", "-0x__"),
        ("9" * 1000, int("9" * 1000)),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("6.", 6.0),
        ("-.inf", float("-inf")),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("on", True),
        ("No", False),
        ("'no'", "no"),
        ("~", None),
        ("", None),
        ("!!str 3", "3"),
        ('"a\\tb"', "a\tb"),
    ],
)
def test_a_value_is_what_stands_in_the_file(write, text: str, value: Any) -> None:
    assert read(Recipe, write(GOOD + f"  audio: {{plugin: p, options: {{a: {text}}}}}")).modalities[
        "audio"
    ].options == {"a": value}
    assert options([f"a={text}"]) == {"a": value}


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read(Recipe, tmp_path / "recipe.yaml").stages[0].name == "align"


def test_interpolation_reaches_neighbours_and_lists_and_is_escaped(write) -> None:
    values = "{size: 4, twice: '${.size} ${.size}', first: '${stages.0.name}', all: '${stages[1]}', "
    values += "rest: ['\\${x}', '${..size}']}"
    read_options = read(Recipe, write(GOOD + f"  audio: {{plugin: p, options: {values}}}")).modalities["audio"].options
    assert read_options == {
        "size": 4,
        "twice": "4 4",
        "first": "align",
        "all": {"name": "tune"},
        "rest": ["${x}", 4],
    }


# (yaml, overrides, what the message must say); {file} is the path.
MISTAKES = [
    ("stages: [{name: a, lr_rate: 1}]", [], ["{file}: stages.0.lr_rate: no such key; did you mean 'learning_rate'?"]),
    ("stages: [{name: a, lr_rate: 1}]", [], ["Stage has: name, learning_rate, trainable"]),
    ("stages: [{name: a}]", ["stages.0.nam=b"], ["override 'stages.0.nam=b' of {file}: stages.0.nam:", "'name'"]),
    ("stages: [{name: a}]", ["sed=1"], ["override 'sed=1'", "did you mean 'seed'?"]),
    ("stages: [{name: a}]\nlast: {nme: x}", [], ["{file}: last.nme: no such key", "'name'"]),
    ("stages: [{name: a}]\nmodalities: {v: {plugn: x}}", [], ["{file}: modalities.v.plugn: no such key", "'plugin'"]),
    ("stages: [{name: a, learning_rate: fast}]", [], ["{file}: stages.0.learning_rate: expected float, got 'fast'"]),
    ("stages: [{name: a}]\nseed: 1.5", [], ["{file}: seed: expected int, got 1.5 (float)"]),
    ("stages: [{name: a}]\nseed: true", [], ["{file}: seed: expected int, got True (bool)"]),
    ("stages: [{name: a}]\nshuffle: 1", [], ["{file}: shuffle: expected bool, got 1 (int)"]),
    ("stages: [{name: 3}]", [], ["{file}: stages.0.name: expected str, got 3 (int); quote it"]),
    ("stages: [{name: null}]", [], ["{file}: stages.0.name: expected str, got None"]),
    ("stages: [{name: [a]}]", [], ["{file}: stages.0.name: expected str, got ['a'] (list); quote it"]),
    ("stages: [{name: a, trainable: x}]", [], ["{file}: stages.0.trainable: expected list[str], got 'x'"]),
    ("stages: [{name: a, trainable: [x, 1]}]", [], ["{file}: stages.0.trainable.1: expected str, got 1"]),
    ("stages: [{name: a, betas: [1, 2, 3]}]", [], ["{file}: stages.0.betas: expected 2 values, got 3"]),
    ("stages: [{name: a, schedule: cosin}]", [], ["stages.0.schedule:", "'cosine', 'constant'", "mean 'cosine'?"]),
    ("stages: [{name: a}]\nlimit: x", [], ["{file}: limit: expected float or int or null, got 'x'"]),
    ("stages: [{name: a}]\nlast: 3", [], ["{file}: last: expected a mapping with the keys of Stage, got 3"]),
    (
        "stages: [{name: a}]\nmodalities: {1: {plugin: x}}",
        [],
        ["modalities: expected keys that are text, got 1"],
    ),
    ("stages: [{learning_rate: 1}]", [], ["{file}: stages.0: missing 'name', which Stage requires"]),
    ("seed: 3", [], ["{file}: missing 'stages', which Recipe requires"]),
    ("", [], ["{file}: missing 'stages'"]),
    ("stages: [{name: a, learning_rate: -1}]", [], ["{file}: stages.0: learning_rate must not be negative"]),
    ("stages: [{name: a}]", ["stages.3.name=b"], ["override 'stages.3.name=b' of {file}:", "out of range"]),
    ("stages: [{name: a}]", ["seed"], ["override 'seed' of {file}: write it as key=value"]),
    ("stages: [{name: a}]", ["seed=["], ["override 'seed=[' of {file}:"]),
    ("stages: [{name: '${nothing}'}]", [], ["{file}: stages.0.name:", "'nothing'"]),
    ("stages: [{name: '???'}]", [], ["{file}: stages.0.name:", "issing"]),
    ("stages: [{name: [a}]\nseed: 1", [], ["{file}, line 1: not plain YAML"]),
    ("seed: 1\nstages: []\nseed: 2", [], ["{file}, line 3: not plain YAML:", "duplicate key seed"]),
    ("- a", [], ["{file}: a config is a mapping", "list"]),
    ("base: 3", [], ["{file}: base: expected the path of one file, got 3"]),
    ("base: nowhere.yaml", [], ["nowhere.yaml (the `base:` of {file}): cannot be read"]),
    ("base: recipe.yaml", [], ["{file}: its bases lead back to it"]),
]


@pytest.mark.parametrize("text, overrides, says", MISTAKES)
def test_a_mistake_is_an_error_that_says_where(write, text: str, overrides: list[str], says: list[str]) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read(Recipe, path, overrides)
    for words in says:
        assert words.format(file=path) in str(caught.value)


def test_a_missing_or_binary_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read: No such file"):
        read(Recipe, tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(ConfigError, match="binary.yaml: not YAML"):
        read(Recipe, tmp_path / "binary.yaml")


def test_an_error_names_the_file_that_made_it_not_the_one_that_was_read(write) -> None:
    write("stages: [{name: a}]\nsede: 3", "parent.yaml")
    with pytest.raises(ConfigError, match="parent.yaml: sede: no such key"):
        read(Recipe, write("base: parent.yaml\nseed: 1"))
    write("stages: [{name: a}]\nseed: x", "parent.yaml")
    with pytest.raises(ConfigError, match="recipe.yaml: seed: expected int, got 'y'"):
        read(Recipe, write("base: parent.yaml\nseed: y"))


def test_two_files_that_name_each_other_are_refused(write) -> None:
    write("base: recipe.yaml", "parent.yaml")
    with pytest.raises(ConfigError, match="lead back"):
        read(Recipe, write("base: parent.yaml"))


def test_build_takes_a_mapping_in_hand_and_says_where_it_was() -> None:
    assert build(Stage, {"name": "a", "learning_rate": 1}, "here") == Stage("a", 1.0)
    with pytest.raises(ConfigError, match="modality.json: options: nam: no such key; did you mean 'name'"):
        build(Stage, {"nam": "a"}, "modality.json: options")


def test_a_choice_may_come_from_the_environment(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_RECIPE_ENV", "CHOICE")
    monkeypatch.setenv("CHOICE", "constant")
    group = read(Schedules, write("schedule: ${oc.env:CHOICE}\nlevel: 1"))
    assert group == Schedules("constant", 1) and "${oc.env:CHOICE}" in dump(group)
    for text, got in (("schedule: ${oc.env:CHOICE}\nlevel: true", "got True"), ("schedule: 1\nlevel: 1", "got 1")):
        with pytest.raises(ConfigError, match=f"expected one of .*{got}"):
            read(Schedules, write(text))


NASTY = [
    "",
    "null",
    "yes",
    "1e-4",
    "0x10",
    "${seed}",
    "\\${x",
    "a: b",
    " x ",
    "é\n\t",
    "{}",
    "- a",
    "#",
    "=",
    "a\\",
    "???x",
]


def test_dump_is_read_back_equal(write) -> None:
    draw = random.Random(0)

    def text() -> str:
        return draw.choice(NASTY) + draw.choice(["", "x", "${", "'", '"'])

    for _ in range(50):
        recipe = Recipe(
            stages=[
                Stage(
                    text(), draw.uniform(0, 1e-6), [text() for _ in range(draw.randrange(3))], "constant", (0.1, 1e22)
                )
                for _ in range(draw.randrange(3))
            ],
            modalities={text(): Plugin(text(), (1, 2), {text(): [text(), 1e-9, {"n": None, "b": True}, -3]})},
            seed=draw.randrange(10**12),
            limit=draw.choice([None, 3, 2.5, 4.0]),
            last=draw.choice([None, Stage("z", clip_norm=1e-5)]),
        )
        again = read(Recipe, write(dump(recipe)))
        assert again == recipe
        assert type(again.limit) is type(recipe.limit)


def test_a_part_of_a_file_is_read_with_what_it_refers_to(write) -> None:
    @dataclass
    class Seeds:
        seed: int
        shuffle: bool = True

    path = write("first: 7\nstages: [{name: align}]\nseed: ${first}")
    assert read(Seeds, path, ["shuffle=false"], in_part=True) == Seeds(7, False)
    with pytest.raises(ConfigError, match="first: no such key"):
        read(Seeds, path)
    with pytest.raises(ConfigError, match="missing 'seed', which Seeds requires"):
        read(Seeds, write("sead: 7"), in_part=True)


def test_options_are_read_as_a_recipe_reads_them() -> None:
    given = ["tower.kind=convit", "tower.convit.width=8", "rules.audio+vision=vision", "names=[a, b]", "share=1e-3"]
    assert options(given) == {
        "tower": {"kind": "convit", "convit": {"width": 8}},
        "rules": {"audio+vision": "vision"},
        "names": ["a", "b"],
        "share": 1e-3,
    }
    assert options([]) == {}
    with pytest.raises(ConfigError, match="option 'share': write it as key=value"):
        options(["share"])
    with pytest.raises(ConfigError, match=r"option 'share=\[1': .*; if it is to be a text, quote it: share=\"'…'\""):
        options(["share=[1"])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("you are # no comment", "you are # no comment"),
        (" padded ", "padded"),
        ("'quoted' # a comment", "quoted"),
        ("Question: {question}\n- 5: right", "Question: {question}\n- 5: right"),
        ("one\ntwo\n", "one\ntwo\n"),
    ],
)
def test_an_option_that_is_a_text_is_not_cut(given: str, text: str) -> None:
    assert options([f"prompt={given}"]) == {"prompt": text}
