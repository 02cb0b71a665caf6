"""Tables as conversations of one turn: files of rows, and datasets of the hub."""

import datetime
import decimal
import glob
import math
import os
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from molora.config import ConfigError, did_you_mean
from molora.data.formats.rows import CellRows, JsonRows, check_file
from molora.data.messages import media_list, rooted

# The columns to read, of those that there are; none if one is missing.
_Needed = Callable[[Iterable[str]], list[str]]


@dataclass(kw_only=True)
class TableConfig:
    """A table of one-turn conversations: a parquet, CSV, TSV, JSON or JSONL file (of text, also gzipped), a folder that
    `save_to_disk` of `datasets` made, or a dataset of the hub.

    `media` maps a part type to the column that holds it: a path, data URI, base64, URL, or what `datasets` stores; one
    or a list; nothing for a row of text. `prompt` and `answer` are templates over columns, such as "{question}",
    "{answers[0]}" and "{translation[en]}"; "{{" is a brace. Relative paths start from the file's own folder, or from
    `media_root`, which no path may leave. `split` may be a slice, such as "train[:90%]". `subset`, `split` by another
    name than train, and `revision` are a dataset's of the hub.
    """

    path: str
    prompt: str
    answer: str
    media: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    media_root: str | None = None


class Rows(Protocol):
    """Rows of a table by number, with the place of each for errors, and the folder that its paths start from."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...

    def where(self, row: int) -> str: ...

    def folder(self, row: int) -> Path | None: ...

    def columns(self, needed: _Needed) -> list[str]:
        """The names of the columns. Those that `needed` chooses of them are read."""
        ...


class Table:
    """Rows of a table as conversations. Parquet files and datasets of the hub need the `datasets` extra."""

    config_type = TableConfig

    def __init__(self, config: TableConfig, rows: Rows | None = None) -> None:
        """`rows` are those of the table, if they are open already."""
        self.where = f"data source {config.path}"
        self.prompt = _Template(config.prompt, f"{self.where}: prompt")
        self.answer = _Template(config.answer, f"{self.where}: answer")
        self.media = config.media
        self.media_root = Path(os.path.expanduser(config.media_root)) if config.media_root else None
        self.rows, self.range = _open(config, self._needed) if rows is None else (rows, range(len(rows)))
        names = self.rows.columns(self._needed)
        for key, template in (("prompt", self.prompt), ("answer", self.answer)):
            if template.text in names:
                raise ConfigError(
                    f"{self.where}: {key} is the text {template.text!r} in every row, and not what the column of that "
                    f"name holds; did you mean '{{{template.text}}}'?"
                )
            template.bind(names)
        for column in (*config.media.values(), *({"id"} & {*names})):
            _check_column(column, names, self.where)

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, row: int) -> dict[str, Any]:
        row = self.range[row]
        where = self.rows.where(row)
        values = self.rows[row]
        content = [part for kind, column in self.media.items() for part in media_list(kind, values.get(column))]
        prompt = self.prompt.fill(values, f"{where}: prompt")
        if not (prompt.strip() or content) and (self.prompt.fields or self.media):
            beside = f" and no medium in {', '.join(self.media.values())}" if self.media else ""
            raise ValueError(
                f"{where}: prompt: empty, from {self.prompt.text!r}{beside}; fill it in, or leave the row out"
            )
        content.append({"type": "text", "text": prompt})
        answer = self.answer.fill(values, f"{where}: answer")
        if not answer and self.answer.fields:
            raise ValueError(f"{where}: answer: empty, from {self.answer.text!r}; fill it in, or leave the row out")
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        messages = rooted(messages, self.rows.folder(row), self.media_root, where)
        return {"id": row_id(values.get("id"), row, where), "messages": messages, "tags": []}

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
        places = [_place(field, names) for field in (*self.prompt.fields, *self.answer.fields)]
        named = {*self.media.values(), *(place.column for place in places if place)}
        if None in places or not named.issubset(names):
            return []
        return [name for name in names if name in named or name == "id"] or names[:1]


def row_id(value: Any, row: int, where: str) -> str:
    """The id that a row says, text or a number; else its number. Raises ValueError."""
    if value is None or value == "":
        return str(row)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: id: expected text or a number, got {value!r:.80}")
    return str(value)


class _Place(NamedTuple):
    """A place in a template: what stands in its braces, the column, and the steps to take from there on."""

    name: str
    column: str
    steps: Sequence[str]


class _Template:
    """Text with columns in braces. It reads columns and their items, and nothing else of what a row holds."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.literals = [""]
        self.fields: list[str] = []
        self.places: list[_Place] = []
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ConfigError(f"{where}: {text!r}: {error}; write a brace that is text twice") from error
        for literal, name, form, conversion in pieces:
            self.literals[-1] += literal
            if name is not None:
                name += f"!{conversion}" if conversion else ""
                self.fields.append(name + (f":{form}" if form else ""))
                self.literals.append("")

    def bind(self, names: Sequence[str]) -> None:
        """Finds the column of each field. Raises ConfigError if there is none."""
        for name in self.fields:
            if not name:
                raise ConfigError(f"{self.where}: {{}} names no column; columns are {names}")
            place = _place(name, names)
            if not place:
                _check_column(re.sub(r"[.\[!:].*", "", name, flags=re.DOTALL) or name, names, self.where)
                raise ConfigError(
                    f"{self.where}: {{{name}}} is no column, nor an item of one, such as {{answers[0]}} or "
                    f"{{translation[en]}}; columns are {names}"
                )
            _check_column(place.column, names, self.where)
            self.places.append(place)

    def fill(self, values: Mapping[str, Any], where: str) -> str:
        """The text for a row. Raises ValueError for a column that holds no text."""
        filled = [_text(self._value(place, values, where), place.name, where) for place in self.places]
        return "".join(piece for pair in zip(self.literals, [*filled, ""], strict=True) for piece in pair)

    def _value(self, place: _Place, values: Mapping[str, Any], where: str) -> Any:
        value = values.get(place.column)
        for step in place.steps:
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, (list, tuple)) and step.isdecimal() and len(step) < 10 and int(step) < len(value):
                value = value[int(step)]
            else:
                raise ValueError(f"{where}: {{{place.name}}}: no item {step[:80]!r} in {_described(value)}")
        return value


def _place(name: str, names: Sequence[str]) -> _Place | None:
    """The place of a field, if its column is among the names."""
    if name in names:
        return _Place(name, name, ())
    # From the end, as otherwise each bracket would be tried as the first.
    steps = re.match(r"(?:\][^\[\]]+\[)*", name[::-1])
    start = len(name) - (steps.end() if steps else 0)
    if start < len(name) and name[:start] in names:
        return _Place(name, name[:start], re.findall(r"\[([^\[\]]+)\]", name[start:]))
    return None


def _check_column(column: str, names: Sequence[str], where: str) -> None:
    if (count := list(names).count(column)) > 1:
        raise ConfigError(f"{where}: {count} columns are called {column!r}; give each a name of its own")
    if not count:
        near = did_you_mean(column, names)
        raise ConfigError(f"{where}: no column {column!r}; {near}columns are {list(names)}")


def _text(value: Any, name: str, where: str) -> str:
    """A cell as text. Raises ValueError for a cell that is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"  # as in JSON
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)) and not is_nan:
        return str(value)
    advice = ""
    if isinstance(value, (list, tuple)):
        advice = f"write {{{name}[0]}} for the first of them, or "
    elif isinstance(value, Mapping) and value:
        advice = f"write {{{name}[{next(iter(value))}]}} for one of them, or "
    raise ValueError(f"{where}: {{{name}}} is {_described(value)}, not text; {advice}mend the row, or leave it out")


def _described(value: Any) -> str:
    if value is None or isinstance(value, float):
        return "empty"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a group of {', '.join(map(str, value))}"[:200]
    return f"text ({value[:40]!r})" if isinstance(value, str) else f"of type {type(value).__name__}"


class _TextFiles:
    """Rows of text files, one after the other, with the place of each for errors, and the folder that its paths start
    from."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files = [_text_file(path) for path in paths]
        self.ends = list(accumulate(map(len, self.files)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        file, row = self._find(row)
        return file[row]

    def where(self, row: int) -> str:
        file, row = self._find(row)
        return file.where(row)

    def folder(self, row: int) -> Path | None:
        return self._find(row)[0].path.absolute().parent

    def columns(self, needed: _Needed) -> list[str]:
        """Those of the first file. Raises ConfigError for another file that lacks one of them that is needed."""
        names = self.files[0].columns(needed)
        read = needed(names)
        for file in self.files[1:] if read else ():
            other = file.columns(set(read).issubset)
            for column in read:
                _check_column(column, other, f"data source {file.path}")
        return names

    def _find(self, row: int) -> tuple[CellRows | JsonRows, int]:
        index = bisect_right(self.ends, row)
        return self.files[index], row - (self.ends[index - 1] if index else 0)


class _Arrow:
    """A dataset of `datasets`. Only the columns that are needed are read, or one, and no medium is decoded."""

    def __init__(self, rows: Any, names: list[str], path: str, folder: Path | None) -> None:
        self.rows = rows.with_format("arrow")
        self.features = rows.features
        self.names = names
        self.path = path
        self.root = folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        (values,) = self.rows[row].to_pylist()
        return {name: named_value(value, self.features[name]) for name, value in values.items()}

    def where(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def folder(self, row: int) -> Path | None:
        return self.root

    def columns(self, needed: _Needed) -> list[str]:
        return self.names


def named_value(value: Any, feature: Any) -> Any:
    """A stored value with the names of its classes, and with no more digits than were stored."""
    if value is None:
        return None
    if names := getattr(feature, "names", None):
        return names[value] if 0 <= value < len(names) else None  # -1 is no class
    if getattr(feature, "dtype", "") in ("float16", "float32") and isinstance(value, float):
        return float(str(np.dtype(feature.dtype).type(value)))
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: named_value(item, feature.get(name)) for name, item in value.items()}
    if isinstance(value, list):
        inner = getattr(feature, "feature", feature)  # an array's own type is that of its cells
        return [named_value(item, inner) for item in value]
    return value


def _open(config: TableConfig, needed: _Needed) -> tuple[Rows, range]:
    """The rows of a table, and which of them the recipe asks for."""
    if not config.path:
        raise ConfigError("data source: path is empty; name a file, a folder or a dataset of the hub")
    path = Path(os.path.expanduser(config.path))
    where = f"data source {config.path}"
    split, *edges = _slice(config.split, where)
    if path.is_dir() or not (path.exists() or _suffix(path) in _TEXT | _PARQUET):
        rows = _dataset(config, path, split, needed)
    else:
        for key, given in (("subset", config.subset), ("revision", config.revision), ("split", split != "train")):
            if given:
                raise ConfigError(
                    f"{where}: {key} is for datasets, and this is one file; leave it out, and write a part of the file "
                    "as split: train[:90%]"
                )
        if _suffix(path) in _TEXT:
            rows = _TextFiles([path])
        elif _suffix(path) in _PARQUET:
            rows = _parquet(path, needed)
        else:
            formats = ", ".join(sorted(_TEXT | _PARQUET))
            raise ConfigError(f"{where}: its name does not say its format, which is one of {formats}")
    if not len(rows):
        raise ConfigError(f"{where}: no rows")
    first, last = (_bound_of(edge, len(rows)) for edge in edges)
    if first >= last:
        raise ConfigError(f"{where}: split {config.split} leaves none of its {len(rows)} rows")
    return rows, range(first, last)


def _text_file(path: Path) -> CellRows | JsonRows:
    suffix = _suffix(path)
    return JsonRows(path, numbers_as_text=True) if suffix in _JSON else CellRows(path, tabs=suffix != ".csv")


_JSON = {".json", ".jsonl", ".ndjson"}
_TEXT = {".csv", ".tsv", ".tab"} | _JSON
_PARQUET = {".parquet"}


def _suffix(path: Path) -> str:
    """The ending that tells the format, in small letters and without that of gzip."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _slice(split: str, where: str) -> tuple[str, str, str]:
    """A split's name, and the start and stop of its slice, as written."""
    found = re.fullmatch(r"([^\[\]+]+)(?:\[(-?\d{1,15}%?)?:(-?\d{1,15}%?)?\])?", split)
    if not found:
        raise ConfigError(f"{where}: split {split!r}: write a name, or a slice such as train[:1000] or train[90%:]")
    return found[1], found[2] or "0", found[3] or "100%"


def _bound_of(edge: str, length: int) -> int:
    """A row number of a slice, from a number or a percentage, which may count from the end."""
    number = round(int(edge[:-1]) * length / 100) if edge.endswith("%") else int(edge)
    return min(max(number + length if edge.startswith("-") else number, 0), length)


def _parquet(path: Path, needed: _Needed) -> _Arrow:
    datasets = _library()
    check_file(path)
    try:
        from pyarrow import parquet

        about = parquet.read_metadata(path)
        if not about.num_rows:
            raise ConfigError(f"data source {path}: no rows")
        names = about.schema.to_arrow_schema().names
        files = {"train": glob.escape(str(path))}
        rows = datasets.load_dataset("parquet", data_files=files, split="train", columns=needed(names) or names[:1])
    except ConfigError:
        raise
    except Exception as error:  # pyarrow's and datasets' own, of many kinds
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"data source {path}: cannot be read as parquet ({reason})") from error
    return _Arrow(rows, names, str(path), path.absolute().parent)


def _dataset(config: TableConfig, path: Path, split: str, needed: _Needed) -> _TextFiles | _Arrow:
    """A folder or a dataset of the hub. Text files that declare no types are read here, as `datasets` would guess."""
    datasets = _library()
    where = f"data source {config.path}"
    is_path = config.path.startswith((".", "/", "~")) or config.path.endswith("/") or config.path.count("/") > 1
    if is_path and not path.exists():
        raise ConfigError(f"{where}: no such file or folder{'' if path.is_absolute() else f' in {Path.cwd()}'}")
    folder = path.absolute() if path.is_dir() else None
    saved = folder and next((n for n in ("dataset_dict.json", "state.json") if (folder / n).is_file()), None)
    for key, given in (("subset", config.subset), ("revision", config.revision)) if saved else ():
        if given is not None:
            raise ConfigError(f"{where}: {key} is for datasets of the hub, and this one was saved; leave it out")
    try:
        if saved:
            rows = datasets.load_from_disk(str(folder))
            if saved == "dataset_dict.json":
                rows = rows[split]
            elif split not in ("train", str(rows.split)):
                raise ConfigError(
                    f"{where}: was saved as one split ({rows.split}), and {split} is another; leave it out"
                )
        else:
            name = config.path if folder is None else str(path)
            builder = datasets.load_dataset_builder(name, config.subset, revision=config.revision)
            if builder.name in ("csv", "json") and builder.config.features is None:
                files = builder.config.data_files[split]
                return _TextFiles([Path(file) for file in datasets.DownloadManager().download(list(files))])
            rows = datasets.load_dataset(name, config.subset, split=split, revision=config.revision)
    except KeyError as error:
        raise ConfigError(f"{where}: no split {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # those of datasets, pyarrow and the hub, of many kinds
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"{where}: cannot be opened by datasets ({type(error).__name__}: {reason})") from error
    names = rows.column_names
    return _Arrow(rows.select_columns(needed(names) or names[:1]), names, config.path, folder)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data source kind 'table' needs datasets: pip install 'molora[datasets]'") from error
    return datasets
