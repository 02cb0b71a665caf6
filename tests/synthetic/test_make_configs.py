"""The workflows in configs/make/: each runs from its first row to its last, and its rows are read where it says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import molora
from molora.config import ConfigError
from molora.data.preferences import Preferences
from molora.data.sources import Messages, MessagesConfig
from molora.evaluate.metrics import open_metrics
from molora.evaluate.normalise import words
from molora.inference.load import LoadedModel
from molora.plugins import available
from molora.synthetic.workflow import StepConfig, Workflow, open_workflow
from molora.testing import byte_tokenizer, tiny_model
from tests.scripted import serving

FOLDER = Path(__file__).parents[2] / "configs" / "make"
# Speech has a test of its own.
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "spoken_questions")

# Sentences that are all unlike each other.
FACTS = [
    f"The {animal} of {place} likes to {verb} near the {thing} when {number} friends come along in {month}."
    for number, (animal, place, verb, thing, month) in enumerate(
        [
            ("otter", "Norway", "swim", "harbour", "May"),
            ("parrot", "Brazil", "sing", "orchard", "June"),
            ("badger", "Wales", "dig", "quarry", "July"),
            ("camel", "Morocco", "rest", "fountain", "August"),
            ("falcon", "Chile", "hunt", "glacier", "March"),
            ("lemur", "Madagascar", "climb", "baobab", "April"),
        ],
        start=2,
    )
]


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Tables with the columns of the data that the configs name."""
    tables = {
        "wiki_mini": [{"text": " ".join(FACTS[n:] + FACTS[:n])} for n in range(6)],
        "self_instruct_seed": [
            {"instruction": f"Tell about {fact[4:30]}", "input": "", "output": " ".join([fact, fact.upper()])}
            for fact in FACTS
        ],
        "gsm8k": [{"question": f"{fact} How many friends?", "final": str(n)} for n, fact in enumerate(FACTS, start=2)],
        "tasks": [
            {"task": f"Write a function that adds {n}.", "test": f"assert add_{n}(1) == {n + 1}"} for n in range(2, 8)
        ],
        "caption_text": [{"captions": [" ".join(fact.split()[:10]), "x"]} for fact in FACTS],
    }
    for name, rows in tables.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, part in (
            ("train", rows),
            ("val", [{**rows[0], "question": "What else is there to be asked here?"}]),
        ):
            lines = "\n".join(map(json.dumps, part))
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(lines)
    return tmp_path / "data"


def scripted(body: dict[str, Any]) -> str:
    """What a model that understands the configs' prompts says."""
    said = body["messages"][-1]["content"]
    form = body.get("response_format", {})
    if (told := body["messages"][0])["role"] == "system" and (
        "curious" in told["content"] or "patient" in told["content"]
    ):
        return FACTS[(2 * len(body["messages"]) + ("patient" in told["content"])) % len(FACTS)]
    fact = next((fact for fact in FACTS if fact[:20] in said), FACTS[body["seed"] % len(FACTS)])
    if form.get("type") == "regex":
        letter = re.search(rf"^([A-D])\. {re.escape(fact[4:20])}$", said, re.MULTILINE)
        if form["pattern"] == "A|B":  # a draft is what was said with the smaller number
            first, second = (int(found) for found in re.findall(r"number (\d+)\.", said))
            return "B" if second > first else "A"
        return "yes" if form["pattern"] == "yes|no" else letter[1] if letter else "A"
    if form:
        wrong = [other[4:20] for other in FACTS if other != fact][:3]
        return json.dumps({"question": f"{fact[:-1]}, or who does?", "right": fact[4:20], "wrong": wrong})
    if "NUMBER" in said:
        number = re.search(r"when (\d) friends", said)
        return f"They are some. The answer is {number[1] if number else 0}."
    if "into French" in said:
        return f"Le {' '.join(reversed(words(re.findall('English: (.*)', said)[-1])))}"
    if "into English" in said:
        return " ".join(reversed(words(re.findall("French: Le (.*)", said)[-1])))
    if "function" in said:
        number = re.search(r"adds? (\d)|\+ (\d)", said)
        name = next(filter(None, number.groups())) if number else "0"
        if said.startswith("```"):
            return f"The function add_{name} takes a number, and adds {name}."
        wrong = body["seed"] % 3 == 0 and "pass this test" in said
        return f"```python\ndef add_{name}(x):\n    return x + {int(name) + wrong}\n```"
    if "question" in said and "answers" in said:
        return f"{fact[:-1]}, and why?"
    if "new task" in said:
        return f"2. Describe {' and '.join(words(fact)[body['seed'] % 7 :])}."
    if "in your own words" in said:
        return "Dear pupil: " + " ".join(said.partition("\n\n")[2].split()[:60])
    return f"{fact} So much is known, number {body['seed']}."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(scripted) as address:
        yield address


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", max_tokens=2048).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return molora.load(folder, device="cpu")


def opened(name: str, data_root: Path, *overrides: str, **more: Any) -> Workflow:
    given = [f"data_root={data_root}", f"output={data_root.parent / 'out'}", *overrides]
    return open_workflow(FOLDER / f"{name}.yaml", given, **more)


def skip_without_sandbox(name: str) -> None:
    """Programs are run where they can be confined alone."""
    if name == "code_round_trip":
        try:
            open_metrics(["unit_tests"], "here")
        except ConfigError as error:
            pytest.skip(str(error))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_workflow_makes_rows_that_are_read_where_it_says(name: str, data_root: Path, url: str) -> None:
    pytest.importorskip("sacrebleu")
    skip_without_sandbox(name)
    workflow = opened(name, data_root, "models.writer.local=null", f"models.writer.server={{url: '{url}', model: m}}")
    done = workflow.run()
    left_out = [(each.config.name, each.reasons) for each in done if each.dropped]
    assert done[-1].rows, left_out
    path = data_root.parent / "out" / "rows.jsonl"
    kinds = {"preferences": Preferences, "conversations": Messages}
    if kind := kinds.get(workflow.config.steps[-1].name):
        source = kind(MessagesConfig(path=str(path)))
        for number in range(len(source)):
            told = source[number]["messages"]
            assert [message["role"] for message in told] == ["user", "assistant"] * (len(told) // 2)
            assert all(message["content"] for message in told)
    else:
        assert name == "rewriting" and all(row.columns["text"] for row in done[-1].rows)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_workflow_runs_on_a_model_that_is_opened_here(name: str, data_root: Path, model: LoadedModel) -> None:
    """A random model's answers are left out sooner or later; all steps run, and what is left out is counted."""
    pytest.importorskip("llguidance")
    skip_without_sandbox(name)
    here = f"models.writer.local.path={model.layout.backbone}"
    workflow = opened(name, data_root, "budget_tokens=200_000", here, opener=lambda *_, **__: model)
    for step in workflow.steps:
        decoding = getattr(step.config, "decoding", None) if hasattr(step, "config") else None
        if decoding is not None:
            step.config.decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, 12))
            step.config.cut_off = "keep"
    done = workflow.run()
    assert sum(each.replies != [] for each in done) >= 1
    for before, each in itertools.pairwise(done):
        if each.config.after is None:
            assert each.num_before == len(before.rows)


def test_what_the_page_shows_runs(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (FOLDER.parents[1] / "docs" / "how_to" / "make_data.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', page, re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    for name, text in blocks.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("articles.jsonl").write_text("\n".join(json.dumps({"text": " ".join([*FACTS, *FACTS])}) for _ in range(2)))
    given = ["models.writer.local=null", f"models.writer.server={{url: '{url}', model: m}}"]
    config = open_workflow(Path("questions.yaml"), given).config
    config.steps.append(StepConfig(name="loud", kind="shout.py:Shout", options={"column": "answer"}, after=["answers"]))
    done = Workflow(config, "questions.yaml").run()
    assert done[-1].rows and all(row.columns["answer"].isupper() for row in done[-1].rows)
    assert {step.kind for step in config.steps} <= {"shout.py:Shout", *re.findall(r"`(\w+)`", page)}
    told = {plugin.name for plugin in available("step")}
    assert told <= {*re.findall(r"`(\w+)`", page)}, "every built-in step is on the page"
    configs = {path.name for path in FOLDER.glob("*.yaml")}
    assert configs == {*re.findall(r"^\| `(\w+\.yaml)`", page, re.MULTILINE)}


# A row of each dataset of the hub that the page names, with the columns that it has there.
PUBLISHED: dict[tuple[str, ...], dict[str, Any]] = {
    ("wikimedia/wikipedia", "20231101.simple"): {"id": "1", "url": "u", "title": "t", "text": " ".join(FACTS)},
    ("openai/gsm8k", "main"): {"question": FACTS[0], "answer": "It is <<2+2=4>>4.\n#### 4"},
    ("databricks/databricks-dolly-15k",): {
        "instruction": FACTS[0],
        "context": "",
        "response": FACTS[1],
        "category": "open_qa",
    },
    ("sentence-transformers/coco-captions", "pair"): {"caption1": FACTS[0], "caption2": FACTS[1]},
    ("google-research-datasets/mbpp", "full"): {
        "task_id": 1,
        "text": "Write a function that adds 2.",
        "code": "",
        "test_list": ["assert add_2(1) == 3", "assert add_2(2) == 4"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
}


def test_the_script_on_the_page_makes_the_tables_that_the_configs_read(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("sacrebleu")
    page = (FOLDER.parents[1] / "docs" / "how_to" / "make_data.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'^```python title="tables.py"\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: [PUBLISHED[names]])
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    read: dict[str, list[dict[str, Any]]] = {}
    for name in CONFIGS:
        try:
            workflow = opened(
                name,
                tmp_path / "data",
                "models.writer.local=null",
                f"models.writer.server={{url: '{url}', model: m}}",
            )
        except ConfigError:
            skip_without_sandbox(name)
            raise
        read[name] = [row.columns for row in workflow.steps[0].run([], None)]
        assert len(read[name]) == 1 and all(read[name][0].values()), name
    assert read["rewriting"][0]["text"] == " ".join(FACTS)
    assert read["reasoning_chains"] == [{"question": FACTS[0], "final": "4"}]
    assert read["code_round_trip"][0]["test"] == "assert add_2(1) == 3\nassert add_2(2) == 4"
