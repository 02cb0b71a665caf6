"""easy-VQA as a data source: 5,000 drawn pictures of one shape each, 48,248 questions with 13 answers.

Source: PyPI package `easy-vqa` 1.0 (github.com/vzhou842/easy-VQA, MIT), which carries the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTION_QUESTION = "describe the picture."


@dataclass(kw_only=True)
class EasyVQAConfig:
    """`questions` are the dataset's; `captions` are made from the answers: "a red triangle"."""

    split: Literal["train", "test"]
    task: Literal["questions", "captions"] = "questions"


class EasyVQA:
    """Rows of one question each, or of one caption for each picture whose colour and shape its answers tell.

    Questions are tagged "yes/no" or "open" by their answer. Needs the `demo` extra.
    """

    config_type = EasyVQAConfig

    def __init__(self, config: EasyVQAConfig) -> None:
        questions, self.paths = read_split(config.split)
        if config.task == "questions":
            self.rows = [(q, a, image, "yes/no" if a in ("yes", "no") else "open") for q, a, image in questions]
        else:
            self.rows = [
                (CAPTION_QUESTION, caption(*about), image, "caption")
                for image, about in sorted(descriptions(questions).items())
            ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        question, answer, image, tag = self.rows[row]
        content = [{"type": "image", "path": self.paths[image]}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"id": f"{row}", "messages": messages, "tags": [tag]}


def caption(colour: str, shape: str) -> str:
    return f"a {colour} {shape}"


def read_split(split: str) -> tuple[list[tuple[str, str, int]], dict[int, str]]:
    """The (question, answer, image number) triples of a split and the path of each image."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is not installed: pip install 'molora[demo]'") from error
    train = split == "train"
    questions = easy_vqa.get_train_questions() if train else easy_vqa.get_test_questions()
    paths = easy_vqa.get_train_image_paths() if train else easy_vqa.get_test_image_paths()
    return list(zip(*questions, strict=True)), {int(image): str(path) for image, path in paths.items()}


def descriptions(questions: list[tuple[str, str, int]]) -> dict[int, tuple[str, str]]:
    """(colour, shape) of every image whose questions and answers tell both.

    "what is the red shape?" answered "triangle" tells both, as does a question with a yes.
    """
    told: dict[int, set[str]] = {}
    for question, answer, image in questions:
        words = set(question.rstrip("?").split())
        positive = (answer == "yes" and not words & {"not", "no"}) or (answer == "no" and words & {"not", "no"})
        if answer not in ("yes", "no") or positive:
            told.setdefault(image, set()).update(words | {answer})
    found = {}
    for image, words in told.items():
        colours, shapes = words & set(COLOURS), words & set(SHAPES)
        if len(colours) == len(shapes) == 1:
            found[image] = (colours.pop(), shapes.pop())
    return found
