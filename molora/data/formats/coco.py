"""COCO's captions and VQA's questions as conversations. Source: cocodataset.org/#format-data, visualqa.org/download."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from molora.config import ConfigError
from molora.data.formats.keyed_rows import KeyedRows
from molora.data.formats.opening import Needed
from molora.data.formats.table import Table, TableConfig


@dataclass(kw_only=True)
class CocoCaptionsConfig:
    """Captions as COCO has them: a JSON file of `images` and `annotations`. A row is a `caption`, or with `row: image`
    a picture whose captions are all accepted answers, and the first of them is learned. Paths of pictures start from
    `media_root`, which no path may leave, or from the file's own folder."""

    path: str
    prompt: str
    row: Literal["caption", "image"] = "caption"
    media_root: str | None = None


class CocoCaptions(Table):
    """Captions of a COCO file."""

    config_type = CocoCaptionsConfig

    def __init__(self, config: CocoCaptionsConfig) -> None:
        about = TableConfig(
            path=config.path,
            prompt=config.prompt,
            answer="{caption}" if config.row == "caption" else None,
            answers="captions" if config.row == "image" else None,
            media={"image": "{file_name}"},
            media_root=config.media_root,
        )
        path = Path(config.path)
        super().__init__(about, _Captions(path) if config.row == "caption" else _Pictures(path))


@dataclass(kw_only=True)
class VqaConfig:
    """Questions as VQA has them: a JSON file of `questions`, and one of `annotations` with ten answers to each. The one
    that most people gave is learned, and all are accepted answers, repeats included. `picture` is the template of a
    path, from `media_root` or the questions' own folder; without it, pictures are called as COCO's, such as
    COCO_val2014_000000262148.jpg."""

    questions: str
    annotations: str
    prompt: str = "{question}"
    answer: str = "{multiple_choice_answer}"
    picture: str = "{picture}"
    media_root: str | None = None


class Vqa(Table):
    """Questions of VQA with their answers, tagged by `answer_type` where that is there."""

    config_type = VqaConfig

    def __init__(self, config: VqaConfig) -> None:
        about = TableConfig(
            path=config.questions,
            prompt=config.prompt,
            answer=config.answer,
            answers="answers[*][answer]",
            media={"image": config.picture},
            tags=["answer_type"],
            media_root=config.media_root,
        )
        super().__init__(about, _Questions(Path(config.questions), Path(config.annotations)))


class _Captions:
    """Captions, each with the name of its picture's file."""

    def __init__(self, path: Path) -> None:
        self.rows = KeyedRows(path, "annotations", numbers_as_text=False)
        self.pictures = KeyedRows(path, "images", numbers_as_text=False, note="id")
        self.by_id = _by_id(self.pictures)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        caption = self.rows[row]
        picture = self.pictures[_named(caption.get("image_id"), self.by_id, self.pictures, self.where(row))]
        return {"id": caption.get("id"), "caption": caption.get("caption"), "file_name": picture.get("file_name")}

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def folder(self, row: int) -> Path:
        return self.rows.path.absolute().parent

    def columns(self, needed: Needed) -> list[str]:
        return ["id", "caption", "file_name"]


class _Pictures:
    """Pictures, each with its captions."""

    def __init__(self, path: Path) -> None:
        self.rows = KeyedRows(path, "images", numbers_as_text=False, note="id")
        self.captions = KeyedRows(path, "annotations", numbers_as_text=False, note="image_id")
        by_id = _by_id(self.rows)
        self.of_picture: list[list[int]] = [[] for _ in range(len(self.rows))]
        for row, image_id in enumerate(self.captions.noted):
            self.of_picture[_named(image_id, by_id, self.rows, self.captions.where(row))].append(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        picture = self.rows[row]
        captions = [self.captions[each].get("caption") for each in self.of_picture[row]]
        return {"id": picture.get("id"), "file_name": picture.get("file_name"), "captions": captions}

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def folder(self, row: int) -> Path:
        return self.rows.path.absolute().parent

    def columns(self, needed: Needed) -> list[str]:
        return ["id", "captions", "file_name"]


class _Questions:
    """Questions, each with its answers, and the name that COCO gives its picture."""

    def __init__(self, questions: Path, annotations: Path) -> None:
        self.rows = KeyedRows(questions, "questions", numbers_as_text=False)
        self.annotations = KeyedRows(annotations, "annotations", numbers_as_text=False, note="question_id")
        self.by_id = _by_id(self.annotations)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        question = self.rows[row]
        id = question.get("question_id")
        answered = self.annotations[_named(id, self.by_id, self.annotations, self.where(row))]
        number, split = question.get("image_id"), self.rows.beside.get("data_subtype")
        picture = f"COCO_{split}_{number:012d}.jpg" if type(number) is int and split else None
        return {"answer_type": None, **answered, **question, "id": id, "picture": picture}

    def where(self, row: int) -> str:
        return self.rows.where(row)

    def folder(self, row: int) -> Path:
        return self.rows.path.absolute().parent

    def columns(self, needed: Needed) -> list[str]:
        made = ("answer_type", "id", "picture")
        names = list(dict.fromkeys([*self.rows.columns(bool), *self.annotations.columns(bool), *made]))
        if "picture" in needed(names) and not self.rows.beside.get("data_subtype"):
            raise ConfigError(
                f"data source {self.rows.path}: has no data_subtype, by which COCO names pictures; say in picture how "
                'yours are called, such as "{image_id}.jpg"'
            )
        return names


def _by_id(rows: KeyedRows) -> dict[Any, int]:
    """Which row has each id. Raises ConfigError for one that stands twice."""
    found: dict[Any, int] = {}
    for row, id in enumerate(rows.noted):
        if found.setdefault(_id(id, rows.where(row)), row) != row:
            raise ConfigError(
                f"{rows.where(row)}: {rows.note} {id!r:.80} stands in row {found[id] + 1} too; take one out"
            )
    return found


def _named(id: Any, by_id: Mapping[Any, int], rows: KeyedRows, where: str) -> int:
    """The row of another list with an id. Raises ConfigError if there is none."""
    if (row := by_id.get(_id(id, where))) is None:
        raise ConfigError(
            f"{where}: {id!r:.80} is no {rows.note} among the {rows.key} of {rows.path}; take it out, or give the file "
            "of the same split"
        )
    return row


def _id(id: Any, where: str) -> int | str:
    if isinstance(id, bool) or not isinstance(id, (int, str)):
        raise ConfigError(f"{where}: its id is {id!r:.80}; write a number or a text")
    return id
