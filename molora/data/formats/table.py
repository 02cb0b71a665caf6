"""Tables as conversations of one turn: files of rows, and datasets of the hub."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molora.config import ConfigError
from molora.data.formats.choices import MADE, ChoiceConfig, Choices, texts_of
from molora.data.formats.opening import Rows, open_rows
from molora.data.formats.templates import Place, Template, check_column, find_place, place_in
from molora.data.messages import media_list, rooted


@dataclass(kw_only=True)
class SegmentConfig:
    """Which part of a row's clip is heard: columns with its `start` and its `end`, or `duration`, in seconds. Where a
    row has none of them, the whole clip is."""

    start: str | None = None
    end: str | None = None
    duration: str | None = None

    def __post_init__(self) -> None:
        if not self.fields or (self.end is not None and self.duration is not None):
            raise ConfigError("segment: name the columns of a start, of an end or a duration, or of both")

    @property
    def fields(self) -> list[str]:
        """The places that are read."""
        return [name for name in (self.start, self.end, self.duration) if name is not None]


@dataclass(kw_only=True)
class TableConfig:
    """A table of one-turn conversations: a parquet, CSV, TSV, JSON or JSONL file (of text, also gzipped), a folder that
    `save_to_disk` of `datasets` made, or a dataset of the hub.

    `media` maps a part type to the column that holds it, or a list of columns: a path, data URI, base64, URL, or what
    `datasets` stores; one or a list; nothing for a row of text. `prompt` and `answer` are templates over columns, such
    as "{question}", "{answers[0]}" and "{translation[en]}"; "{{" is a brace. Where `media` has braces, it is the
    template of a path, such as "train/{image_id}.jpg". Relative paths start from the file's own folder, or from
    `media_root`, which no path may leave. `segment` names the columns that say which part of a clip is heard.

    `answers` is the column of all accepted answers; without `answer`, the first is learned. "answers[*][text]" is the
    text of each item in a list. `choices` is the column of a question's options, or a column for each, and `choice`
    says which is right. Then `{choices}` in the prompt is a line for each option, as `choice_line` says, `{choice}` the
    right option and `{letter}` its letter, which is learned without `answer`; of two options `{other}` is the other
    one. In a row without options, `{choice}` and `{letter}` are what the column of `choice` says. `tags` are columns to
    report metrics by.

    With `rejected`, the template of the answer that was not chosen, rows are preferences.

    `rows_under` is the key of a JSON file under which its list of rows stands. `split` may be a slice, such as
    "train[:90%]". `subset`, `split` by another name than train, and `revision` are a dataset's of the hub.
    """

    path: str
    prompt: str
    answer: str | None = None
    rejected: str | None = None
    media: dict[str, str | list[str]] = field(default_factory=dict)
    segment: SegmentConfig | None = None
    answers: str | None = None
    choices: str | list[str] | None = None
    choice: ChoiceConfig | None = None
    choice_line: str = "{letter}. {choice}"
    tags: list[str] = field(default_factory=list)
    rows_under: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    media_root: str | None = None

    def __post_init__(self) -> None:
        if (self.choices is None) != (self.choice is None):
            raise ConfigError("give both choices, the column of the options, and choice, which says what is right")
        if self.answer is None and self.answers is None and self.choices is None:
            raise ConfigError("missing 'answer', a template of what is learned; or name a column of answers or choices")
        if self.segment is not None and not isinstance(self.media.get("audio"), str):
            raise ConfigError("segment is of the one clip that a row has; name its column as media.audio")


class Table:
    """Rows of a table as conversations. Parquet files and datasets of the hub need the `datasets` extra."""

    config_type = TableConfig

    def __init__(self, config: TableConfig, rows: Rows | None = None) -> None:
        """`rows` are those of the table, if they are open already."""
        self.label = f"data source {config.path}"
        self.choices: Choices | None = None
        learned = config.answer
        if config.choices is not None and config.choice is not None:
            self.choices = Choices(config.choices, config.choice, config.choice_line)
            learned = "{letter}" if learned is None else learned
        templates = {"prompt": config.prompt, "answer": learned, "rejected": config.rejected}
        self.templates = {
            key: Template(text, f"{self.label}: {key}") for key, text in templates.items() if text is not None
        }
        self.media = [
            _Medium(kind, column, self.label)
            for kind, columns in config.media.items()
            for column in ([columns] if isinstance(columns, str) else columns)
        ]
        self.config = config
        self.media_root = Path(os.path.expanduser(config.media_root)) if config.media_root else None
        self.rows, self.range = open_rows(config, self._needed) if rows is None else (rows, range(len(rows)))
        self._bind(self.rows.columns(self._needed))

    def __len__(self) -> int:
        return len(self.range)

    def where(self, row: int) -> str:
        """The file and row, for errors."""
        return self.rows.where(self.range[row])

    def __getitem__(self, row: int) -> dict[str, Any]:
        where = self.where(row)
        row = self.range[row]
        values = self.rows[row]
        judged: dict[str, Any] = {}
        if self.choices is not None:
            chosen = self.choices.read(values, where)
            values = {**values, **chosen.made, "choices": self.choices.lines(chosen)}
            judged = chosen.judged
        answers = self._answers(values, where)
        learned = self.templates.get("answer")
        answer = answers[0] if learned is None else learned.fill(values, f"{where}: answer")
        if not answer and (learned is None or learned.fields):
            source = self.config.answers if learned is None else learned.text
            raise ValueError(f"{where}: answer: empty, from {source!r}; fill it in, or leave the row out")
        if answers:
            # Sorting is stable: the answer that is learned comes first, and the others stay in their order.
            first = answers.index(answer) if answer in answers else 0
            judged["answers"] = [answers[first], *answers[:first], *answers[first + 1 :]]
        asked = [{"role": "user", "content": self._asked(values, where)}]
        asked = rooted(asked, self.rows.folder(row), self.media_root, where)
        if "rejected" in self.templates:
            rejected = self.templates["rejected"].fill(values, f"{where}: rejected")
            if rejected == answer:
                raise ValueError(f"{where}: rejected: is what was chosen too; leave the row out")
            judged["rejected"] = [*asked, {"role": "assistant", "content": rejected}]
        return {
            "id": row_id(values.get("id"), row, where),
            "messages": [*asked, {"role": "assistant", "content": answer}],
            "tags": [tag for place in self.tags if (tag := _tag(place, values, where))],
            **judged,
        }

    def _asked(self, values: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """The content of the user's message."""
        content = [part for medium in self.media for part in medium.read(values, where)]
        if self.segment:
            _cut(content, self.segment, values, where)
        template = self.templates["prompt"]
        prompt = template.fill(values, f"{where}: prompt")
        if not (prompt.strip() or content) and (template.fields or self.media):
            beside = f" and no medium in {', '.join(medium.name for medium in self.media)}" if self.media else ""
            raise ValueError(
                f"{where}: prompt: empty, from {template.text!r}{beside}; fill it in, or leave the row out"
            )
        return [*content, {"type": "text", "text": prompt}]

    def _answers(self, values: Mapping[str, Any], where: str) -> list[str]:
        """All answers that are accepted; none if the recipe names no column of them."""
        if self.answers is None:
            return []
        answers = texts_of(self.answers.value(values, f"{where}: answers"), self.answers.name, f"{where}: answers")
        if not answers:
            raise ValueError(f"{where}: answers: none in {self.answers.name!r}; fill it in, or leave the row out")
        return answers

    def _bind(self, names: list[str]) -> None:
        """Finds the columns of all that the recipe names. Raises ConfigError for one that is not there."""
        config = self.config
        if self.choices is not None:
            self.choices.bind(names, self.label)
        in_texts = names if self.choices is None else [*(name for name in names if name not in MADE), *MADE]
        for key, template in self.templates.items():
            if template.text in names:
                raise ConfigError(
                    f"{self.label}: {key} is the text {template.text!r} in every row, and not what the column of that "
                    f"name holds; did you mean '{{{template.text}}}'?"
                )
            template.bind(in_texts)
        for medium in self.media:
            medium.bind(names, self.label)
        self.answers = None if config.answers is None else find_place(config.answers, names, f"{self.label}: answers")
        self.tags = [find_place(column, names, f"{self.label}: tags") for column in config.tags]
        about = {} if config.segment is None else vars(config.segment)
        self.segment = {
            key: find_place(name, names, f"{self.label}: segment.{key}") for key, name in about.items() if name
        }
        if "id" in names:
            check_column("id", names, self.label)

    def provenance(self) -> dict[str, Any]:
        """Of a dataset of `datasets`: its licence, and its commits on the hub, as far as it tells them."""
        info = getattr(getattr(self.rows, "rows", None), "info", None)
        if info is None:
            return {}
        urls = " ".join(info.download_checksums or ())
        commits = sorted(set(re.findall(r"hf://datasets/(\S+?@[0-9a-f]{40})/", urls)))
        return {"fingerprint": ", ".join(commits) or None, "licence": info.license or None}

    def _needed(self, names: Iterable[str]) -> list[str]:
        """The columns to read, of these: those that the recipe names, and the id. None at all if one is missing."""
        names = list(names)
        config = self.config
        made = () if self.choices is None else MADE
        named = [name for text in self.templates.values() for name in text.fields if place_in(name, made) is None]
        named += [name for medium in self.media for name in medium.fields]
        named += [] if self.choices is None else self.choices.fields
        named += [] if config.segment is None else config.segment.fields
        named += [*config.tags, *([] if config.answers is None else [config.answers])]
        places = [place_in(name, names) for name in named]
        columns = {place.column for place in places if place}
        if None in places:
            return []
        return [name for name in names if name in columns or name == "id"] or names[:1]


class _Medium:
    """The media of one type that a row has in a column, or under a path made of columns."""

    def __init__(self, kind: str, name: str, where: str) -> None:
        self.kind = kind
        self.name = name
        self.path = Template(name, f"{where}: media.{kind}") if "{" in name else None
        self.place: Place | None = None

    @property
    def fields(self) -> list[str]:
        """The places that are read."""
        return [self.name] if self.path is None else self.path.fields

    def bind(self, names: list[str], where: str) -> None:
        if self.path is not None:
            self.path.bind(names)
        else:
            self.place = find_place(self.name, names, where)

    def read(self, values: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        """The parts of a row."""
        if self.path is not None:
            return [{"type": self.kind, "path": self.path.fill(values, f"{where}: media.{self.kind}")}]
        assert self.place is not None, "bind comes first"
        return media_list(self.kind, self.place.value(values, f"{where}: media.{self.kind}"))


def _cut(content: list[dict[str, Any]], segment: Mapping[str, Place], values: Mapping[str, Any], where: str) -> None:
    """Puts the seconds of a row's segment into its clip."""
    seconds = {
        key: _seconds(value, f"{where}: segment.{key}")
        for key, place in segment.items()
        if (value := place.value(values, f"{where}: segment.{key}")) is not None and value != ""
    }
    if not seconds:
        return
    clips = [part for part in content if part["type"] == "audio"]
    if len(clips) != 1:
        raise ValueError(f"{where}: segment: is of one clip, and the row has {len(clips)}; leave the row out")
    start = seconds.get("start", 0.0)
    clips[0]["start_seconds"] = start
    if "end" in seconds or "duration" in seconds:
        clips[0]["end_seconds"] = seconds["end"] if "end" in seconds else start + seconds["duration"]


def _seconds(value: Any, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {value!r:.80} is no number of seconds; mend the row, or leave it out") from None


def _tag(place: Place, values: Mapping[str, Any], where: str) -> str:
    """The tag that a row has in a column; an empty cell is none."""
    value = place.value(values, f"{where}: tags")
    return "" if value is None else place.text(values, f"{where}: tags")


def row_id(value: Any, row: int, where: str) -> str:
    """The id that a row says, text or a number; else its number. Raises ValueError."""
    if value is None or value == "":
        return str(row)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: id: expected text or a number, got {value!r:.80}")
    return str(value)
