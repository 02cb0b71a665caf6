"""easy-VQA as data sources: 5,000 drawn pictures of one shape each, 48,248 questions, written or spoken, 13 answers.

Source: PyPI package `easy-vqa` 1.0 (github.com/vzhou842/easy-VQA, MIT), which carries the pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from molora.data.speech import HELD_OUT_VOICES, TRAINING_VOICES, clip, draw_utterance
from molora.seeding import seed_of

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTION_QUESTION = "describe the picture."
TRANSCRIPT_QUESTION = "transcribe the audio."
_PROVENANCE = {"files": [], "fingerprint": "easy-vqa 1.0", "licence": "MIT"}


@dataclass(kw_only=True)
class EasyVQAConfig:
    """`task`: `questions` are the dataset's, `captions` are made from the answers: "a red triangle". `split`: the
    dataset's own. `system`: the system message of every row; None leaves it to the chat template, whose own may be
    longer than all else in a prompt. `balanced`: questions about what is in their picture, which are rarer than
    those about what is not, come so often that each kind is half; so no question tells its answer without its picture.
    """

    split: Literal["train", "test"]
    task: Literal["questions", "captions"] = "questions"
    balanced: bool = False
    system: str | None = None


class EasyVQA:
    """Rows of one question each, or of one caption for each picture whose colour and shape its answers tell. Questions
    are tagged "yes/no" or "open" by their answer. Needs the `demo` extra."""

    config_type = EasyVQAConfig

    def __init__(self, config: EasyVQAConfig) -> None:
        self.system = config.system
        questions, self.paths = read_split(config.split)
        if config.task == "questions":
            if config.balanced:
                questions = _balanced(questions)
            self.rows = [(q, a, image, "yes/no" if a in ("yes", "no") else "open") for q, a, image in questions]
        else:
            told = sorted(descriptions(questions).items())
            self.rows = [(CAPTION_QUESTION, caption(*about), image, "caption") for image, about in told]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        question, answer, image, tag = self.rows[row]
        content = [{"type": "image", "path": self.paths[image]}, {"type": "text", "text": question}]
        return {"id": f"{row}", "messages": _conversation(self.system, content, answer), "tags": [tag]}

    def provenance(self) -> dict[str, Any]:
        """The package that the pictures and questions lie in, and its licence."""
        return _PROVENANCE


@dataclass(kw_only=True)
class SpokenEasyVQAConfig:
    """`task`: `transcripts` are a clip and the question that it says; `questions` a picture and a clip, and the answer.

    Every question of the dataset is spoken `takes` times, each in a voice, speed and pitch of its own, and with
    `acoustics` in noise and rooms. The test split has voices that the train split never uses. `folder` keeps the clips.
    `system` as in `EasyVQAConfig`.
    """

    split: Literal["train", "test"]
    task: Literal["transcripts", "questions"]
    folder: str
    takes: int = 30
    acoustics: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        if self.takes < 1:
            raise ValueError(f"takes is at least 1, got {self.takes}")


class SpokenEasyVQA:
    """Rows of one clip each. As in Phi-4-Multimodal's training, vision-speech data are vision questions spoken.
    Questions are tagged as those of `EasyVQA`. Clips are made when a row is first read. Needs the `demo` extra. Source:
    arXiv 2503.01743 §4."""

    config_type = SpokenEasyVQAConfig

    def __init__(self, config: SpokenEasyVQAConfig) -> None:
        self.config = config
        self.voices = TRAINING_VOICES if config.split == "train" else HELD_OUT_VOICES
        written = EasyVQA(EasyVQAConfig(split=config.split))
        if config.task == "transcripts":
            texts = sorted({question for question, _, _, _ in written.rows})
            self.rows = [_Spoken(text, take, None, text, []) for text in texts for take in range(config.takes)]
        else:
            self.rows = [
                _Spoken(question, seed_of("take", index) % config.takes, written.paths[image], answer, [tag])
                for index, (question, answer, image, tag) in enumerate(written.rows)
            ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        config, about = self.config, self.rows[row]
        utterance = draw_utterance(about.text, self.voices, config.acoustics, config.split, about.text, about.take)
        content = [{"type": "audio", "path": str(clip(utterance, Path(config.folder))), "transcript": about.text}]
        if about.picture is None:
            content.append({"type": "text", "text": TRANSCRIPT_QUESTION})
        else:
            content.insert(0, {"type": "image", "path": about.picture})
        return {"id": f"{row}", "messages": _conversation(config.system, content, about.answer), "tags": about.tags}

    def provenance(self) -> dict[str, Any]:
        """The package of the questions. The clips are not data to be hashed: they are made while others read them."""
        return _PROVENANCE


class _Spoken(NamedTuple):
    """What a row says, in which take, about which picture (None: the row asks for a transcript), and its answer."""

    text: str
    take: int
    picture: str | None
    answer: str
    tags: list[str]


def _conversation(system: str | None, content: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _balanced(questions: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """The questions, and once more those that ask about what is in their picture, until they are half of those that are
    answered yes or no."""
    there = [question for question in questions if question[1] in ("yes", "no") and _is_there(*question[:2])]
    num_others = sum(question[1] in ("yes", "no") for question in questions) - len(there)
    return questions + [there[index % len(there)] for index in range(num_others - len(there))]


def _is_there(question: str, answer: str) -> bool:
    """Whether a picture has what a question names, by an answer of yes or no."""
    negated = bool(set(question.rstrip("?").split()) & {"not", "no"})
    return negated == (answer == "no")


def caption(colour: str, shape: str) -> str:
    return f"a {colour} {shape}"


def read_split(split: str) -> tuple[list[tuple[str, str, int]], dict[int, str]]:
    """The (question, answer, image number) triples of a split and the path of each image."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is not installed: pip install 'molora[demo]'") from error
    questions = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    return list(zip(*questions, strict=True)), {int(image): str(path) for image, path in paths.items()}


def descriptions(questions: list[tuple[str, str, int]]) -> dict[int, tuple[str, str]]:
    """(colour, shape) of every image whose questions and answers tell both. "what is the red shape?" answered
    "triangle" tells both, as does a question with a yes."""
    told: dict[int, set[str]] = {}
    for question, answer, image in questions:
        if answer not in ("yes", "no") or _is_there(question, answer):
            told.setdefault(image, set()).update({*question.rstrip("?").split(), answer})
    found = {}
    for image, words in told.items():
        colours, shapes = words & set(COLOURS), words & set(SHAPES)
        if len(colours) == len(shapes) == 1:
            found[image] = (colours.pop(), shapes.pop())
    return found
