"""molora under lm-eval and lmms-eval: the scores of our own evaluation, and of the backbone without molora.

`make test-harness` brings both harnesses; without them these tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from molora.checkpoint.assembly import RouterConfig, assemble, blueprint
from molora.checkpoint.modality_folder import save_modality
from molora.checkpoint.pretrained import load_backbone
from molora.config import ConfigError, build
from molora.evaluate.judge import Evaluation, EvaluationConfig
from molora.inference.generate import GenerationConfig
from molora.inference.load import LoadedModel, load
from molora.testing import save_backbone
from molora.train import Recipe, train
from tests.serve.conftest import Folders, serving

lm_eval = pytest.importorskip("lm_eval")
lmms_eval = pytest.importorskip("lmms_eval")

ADAPTER = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
PLUGINS: dict[str, dict[str, Any]] = {
    "vision": {
        "crop_pixels": 16,
        "max_crops": 2,
        "pool": 1,
        "tower": {"kind": "convit", "pretrained": False, "convit": {"width": 16, "depth": 1, "heads": 2}},
    },
    "audio": {
        "tower": {
            "conformer": {"width": 16, "blocks": 1, "heads": 2, "mlp_width": 24, "subsampling_channels": 4},
        },
    },
}
WORDS = ("red", "a tree", "no", "seven or eight")
MAX_NEW_TOKENS = 8

# What tasks of lmms-eval hold beside their YAML.
HELPER = """
import numpy as np
from PIL import Image

def visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")] if doc["picture"] else []

def sound(doc):
    return {"array": np.load(doc["sound"]), "sampling_rate": 16_000}

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": picture} for picture in visual(doc)]
    content += [{"type": "audio", "url": sound(doc)}] if doc["sound"] else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": text(doc)}]}]
"""


class Home:
    """A backbone, a run of it that sees and hears, and questions of any mix whose answers the run gives in half."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_backbone(folder / "backbone", "llama")
        for name, options in PLUGINS.items():
            backbone, tokenizer = load_backbone(str(folder / "backbone"))
            plan = blueprint(name, name, options, ADAPTER, "here")
            model, _ = assemble(backbone, tokenizer, {name: plan}, RouterConfig())
            save_modality(model, name, plan, folder / name, {})
        draw = np.random.default_rng(0)
        for index in range(3):
            pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            np.save(folder / f"{index}.npy", 0.1 * draw.standard_normal(2000 + 700 * index).astype(np.float32))
        self._train()
        self.loaded = load(folder / "run", device="cpu")
        self._ask()

    def _train(self) -> None:
        picture = {"type": "image", "path": str(self.folder / "0.png")}
        row = {"messages": [{"role": "user", "content": [picture]}, {"role": "assistant", "content": "x"}]}
        (self.folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        stage = {
            "name": "one",
            "train": {"adapters.vision": {"learning_rate": 1e-3}},
            "data": {"rows": {"kind": "messages", "options": {"path": str(self.folder / "rows.jsonl")}}},
            "steps": 1,
            "samples_per_step": 1,
        }
        recipe = {
            "run": str(self.folder / "run"),
            "backbone": {"path": str(self.folder / "backbone")},
            "modalities": {name: {"path": str(self.folder / name)} for name in PLUGINS},
            "router": {"options": {"rules": {"audio+vision": "vision"}}},
            "stages": [stage],
            "device": "cpu",
        }
        train(build(Recipe, recipe, "recipe"), show=False)

    def _ask(self) -> None:
        """Every other question is answered as the run answers it, the others as it does not."""
        self.questions: list[dict[str, Any]] = []
        for index in range(12):
            picture = str(self.folder / f"{index % 3}.png") if index % 4 in (1, 3) else None
            sound = str(self.folder / f"{index % 3}.npy") if index % 4 in (2, 3) else None
            self.questions.append({"question": f"what is {index}?", "picture": picture, "sound": sound})
        config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
        answers = self.loaded.generate([self.messages(each) for each in self.questions], config)
        assert len(set(answers)) > 6, "the questions are too much alike to tell their answers apart"
        for index, (question, answer) in enumerate(zip(self.questions, answers, strict=True)):
            right = index % 4 == index // 4 or index % 3 == 0
            question |= {"answer": answer if right and answer else "never", "choices": list(WORDS), "right": index % 4}
            question["story"] = f"{question['question']} " * (1 + 4 * index) + "The end."
        lines = (json.dumps(question) + "\n" for question in self.questions)
        (self.folder / "questions.jsonl").write_text("".join(lines))

    def messages(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        picture = [{"type": "image", "path": question["picture"]}] if question["picture"] else []
        sound: list[dict[str, Any]] = []
        if question["sound"]:
            wave = np.load(question["sound"]).tolist()
            sound = [{"type": "audio", "array": wave, "sampling_rate": 16_000}]
        content = [*picture, *sound, {"type": "text", "text": question["question"]}]
        return [{"role": "user", "content": content}]

    def own_score(self, questions: Sequence[dict[str, Any]]) -> float:
        """The exact match of our own evaluation."""
        rows = self.folder / "evaluation.jsonl"
        with open(rows, "w") as file:
            for question in questions:
                answered = [*self.messages(question), {"role": "assistant", "content": question["answer"]}]
                file.write(json.dumps({"messages": answered}) + "\n")
        config = {"data": {"kind": "messages", "options": {"path": str(rows)}}, "max_new_tokens": MAX_NEW_TOKENS}
        evaluation = Evaluation("own", build(EvaluationConfig, config, "own"))
        return evaluation.scores(evaluation.run(self.loaded))["exact_match"]

    def tasks(self, name: str, **tasks: Any) -> Path:
        """A folder of tasks over the questions, with the same data."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        data = {"data_files": {"test": str(self.folder / "questions.jsonl")}}
        for task, settings in tasks.items():
            whole = {"task": task, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **settings}
            # lmms-eval names functions by a tag of its own.
            text = yaml.safe_dump(whole).replace("'!function ", "!function ").replace(".visual'", ".visual")
            for function in ("text", "messages"):
                text = text.replace(f".{function}'", f".{function}")
            (folder / f"{task}.yaml").write_text(text)
        (folder / "helper.py").write_text(HELPER)
        return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        return Home(tmp_path_factory.mktemp("harness"))


EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}


class TestLmEval:
    """Text alone."""

    def run(
        self, home: Home, model: str, arguments: dict[str, Any], tasks: Sequence[str], chat: bool = False
    ) -> dict[str, Any]:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        import molora.evaluate.harness.lm_eval  # noqa: F401 (makes the name known)

        folder = home.tasks(
            "lm_tasks",
            answer={
                "output_type": "generate_until",
                "doc_to_text": "{{question}}",
                "doc_to_target": "answer",
                "generation_kwargs": {"until": ["}"], "max_gen_toks": MAX_NEW_TOKENS, "do_sample": False},
                "metric_list": [EXACT],
            },
            choose={
                "output_type": "multiple_choice",
                "doc_to_text": "{{question}}",
                "doc_to_choice": "choices",
                "doc_to_target": "right",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}],
            },
            continue_story={
                "output_type": "generate_until",
                "doc_to_text": "{{story}}",
                "doc_to_target": "answer",
                "generation_kwargs": {"until": [], "max_gen_toks": MAX_NEW_TOKENS},
                "metric_list": [EXACT],
            },
            end_story={
                "output_type": "multiple_choice",
                "doc_to_text": "{{story}}",
                "doc_to_choice": "choices",
                "doc_to_target": "right",
                "metric_list": [{"metric": "acc"}],
            },
            read={
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "story",
                "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
            },
        )
        return lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=list(tasks),
            device="cpu",
            batch_size=1,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            apply_chat_template=chat,
            bootstrap_iters=0,
        )

    def test_the_backbones_scores_are_those_of_hf(self, home: Home) -> None:
        """Also where a text is longer than the context, so that its beginning is cut, or windows go over it."""
        lengths = [len(question["story"]) for question in home.questions]
        assert min(lengths) < 256 < max(lengths)
        tasks = ("answer", "continue_story", "choose", "end_story", "read")
        ours = self.run(home, "molora", {"run": str(home.folder / "run")}, tasks)
        theirs = self.run(home, "hf", {"pretrained": str(home.folder / "backbone"), "dtype": "float32"}, tasks)
        for task in tasks[:4]:
            assert ours["results"][task] == theirs["results"][task]
        for metric in ("word_perplexity,none", "bits_per_byte,none"):
            one, other = (results["results"]["read"][metric] for results in (ours, theirs))
            assert one == pytest.approx(other, rel=1e-4)
        for task in tasks:
            for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                assert one["doc"] == other["doc"]
                for (mine,), (its,) in zip(one["resps"], other["resps"], strict=True):
                    if task in tasks[:2]:
                        assert mine == its
                        continue
                    mine, its = (each if isinstance(each, tuple) else (each, None) for each in (mine, its))
                    assert float(mine[0]) == pytest.approx(float(its[0]), abs=1e-4 * max(1, abs(float(its[0]))))
                    assert mine[1] == its[1]

    def test_chat_scores_are_those_of_our_own_evaluation(self, home: Home) -> None:
        texts = [{**question, "picture": None, "sound": None} for question in home.questions]
        results = self.run(home, "molora", {"run": str(home.folder / "run")}, ("answer", "choose"), chat=True)[
            "results"
        ]
        assert results["answer"]["exact_match,none"] == home.own_score(texts)
        requests = [(home.messages(text), choice) for text in texts for choice in WORDS]
        found = [each.log_probability for each in home.loaded.likelihoods(requests)]
        chosen = [max(range(4), key=found[start : start + 4].__getitem__) for start in range(0, len(found), 4)]
        right = [choice == text["right"] for choice, text in zip(chosen, texts, strict=True)]
        assert results["choose"]["acc,none"] == sum(right) / len(right)

    def test_scores_over_http_are_those_of_our_own_evaluation(self, home: Home, tmp_path: Path) -> None:
        """By lm-eval's own models for OpenAI's paths, against a server of the run."""
        run = home.folder / "run"
        texts = [{**question, "picture": None, "sound": None} for question in home.questions]
        tasks = ("answer", "choose")
        with serving(Folders(run, ()), tmp_path / "log", ["--deterministic-batch"]) as served:
            path, common = f"{served.address}/v1", {"model": "tiny", "num_concurrent": 3, "max_retries": 1}
            given = {**common, "tokenizer": str(home.folder / "backbone"), "max_length": 256}
            theirs = self.run(home, "local-completions", {**given, "base_url": f"{path}/completions"}, tasks)
            chat = {**common, "base_url": f"{path}/chat/completions"}
            chatted = self.run(home, "local-chat-completions", chat, ["answer"], chat=True)
        ours = self.run(home, "molora", {"run": str(run)}, tasks)
        for task in tasks:
            assert theirs["results"][task] == ours["results"][task]
        for one, other in zip(ours["samples"]["choose"], theirs["samples"]["choose"], strict=True):
            for ((mine, _),), ((its, _),) in zip(one["resps"], other["resps"], strict=True):
                assert float(mine) == pytest.approx(float(its), abs=1e-4 * max(1, abs(float(its))))
        assert chatted["results"]["answer"]["exact_match,none"] == home.own_score(texts)


class TestLmmsEval:
    """Any mix."""

    def run(self, home: Home, task: str, **more: Any) -> dict[str, Any]:
        from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        asked = {
            "doc_to_visual": "!function helper.visual",
            "doc_to_text": "!function helper.text",
            "doc_to_messages": "!function helper.messages",
        }
        folder = home.tasks(
            "lmms_tasks",
            look={
                **asked,
                "output_type": "generate_until",
                "doc_to_target": "answer",
                "generation_kwargs": {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": 1, "do_sample": False},
                "metric_list": [EXACT],
            },
            pick={
                **asked,
                "output_type": "multiple_choice",
                "doc_to_choice": "choices",
                "doc_to_target": "right",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            },
        )
        return simple_evaluate(
            model="molora",
            model_args=f"run={home.folder / 'run'}",
            tasks=[task],
            task_manager=TaskManager("INFO", str(folder), include_defaults=False, model_name="molora"),
            bootstrap_iters=0,
            **more,
        )

    def test_scores_are_those_of_our_own_evaluation(self, home: Home) -> None:
        results = self.run(home, "look")["results"]["look"]
        own = home.own_score(home.questions)
        assert 0 < own < 1
        assert results["exact_match,none"] == own

    def test_choices_by_likelihood_are_those_of_the_model(self, home: Home) -> None:
        """Simple tasks show pictures only here."""
        results = self.run(home, "pick", force_simple=True)["results"]["pick"]
        shown = [{**question, "sound": None} for question in home.questions]
        requests = [(home.messages(each), choice) for each in shown for choice in WORDS]
        found = [each.log_probability for each in home.loaded.likelihoods(requests)]
        chosen = [max(range(4), key=found[start : start + 4].__getitem__) for start in range(0, len(found), 4)]
        right = [choice == each["right"] for choice, each in zip(chosen, shown, strict=True)]
        assert results["acc,none"] == sum(right) / len(right)

    def test_a_request_that_fails_is_told(self, home: Home, capsys: pytest.CaptureFixture[str]) -> None:
        from molora.evaluate.harness.asking import Asked, replies

        def encode(loaded: LoadedModel, messages: list[dict[str, Any]], id: str) -> Any:
            return lambda: loaded.encode(messages, id)

        config = GenerationConfig(max_new_tokens=2)
        broken = [{"role": "user", "content": [{"type": "image", "path": "none.png"}]}]
        good = home.messages(home.questions[1])
        asked = [Asked(id, encode(home.loaded, m, id), config) for id, m in (("a", good), ("b", broken), ("c", good))]
        given = replies(home.loaded, asked)
        assert given[0] == given[2] and given[0].answer_tokens and given[1].text == ""
        assert "1 of 3 requests failed, and an empty answer stands for each" in " ".join(
            capsys.readouterr().err.split()
        )


def test_settings_of_tasks_are_followed_or_told(capsys: pytest.CaptureFixture[str]) -> None:
    from molora.evaluate.harness.asking import generation_config, warn_of_unread

    greedy = generation_config({"until": "\n", "temperature": 0.7, "do_sample": False, "max_tokens": 3}, 9)
    assert greedy == GenerationConfig(max_new_tokens=3, stop=("\n",))
    drawn = generation_config({"until": ["a", "b"], "temperature": 0.5, "top_p": 0.9, "do_sample": True}, 9)
    assert drawn == GenerationConfig(max_new_tokens=9, temperature=0.5, top_p=0.9, stop=("a", "b"))
    warn_of_unread([{"num_beams": 1, "until": [], "top_k": None}])
    assert capsys.readouterr().err == ""
    warn_of_unread([{"num_beams": 4, "until": []}, {"image_aspect_ratio": "original"}])
    assert "image_aspect_ratio=original, num_beams=4" in " ".join(capsys.readouterr().err.split())


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from molora.evaluate.harness.asking import open_model

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2"):
        open_model("nowhere", None, None, None, None)
