"""What a table is opened from: text files, parquet files, saved datasets and datasets of the hub."""

import glob
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molora import hub
from molora.config import ConfigError
from molora.data.formats.keyed_rows import KeyedRows
from molora.data.formats.rows import CellRows, JsonRows, check_file
from molora.data.formats.templates import check_column

# The columns to read, of those that there are; none if one is missing.
Needed = Callable[[Iterable[str]], list[str]]


class Rows(Protocol):
    """Rows of a table by number, with the place of each for errors, and the folder that its paths start from."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...

    def where(self, row: int) -> str: ...

    def folder(self, row: int) -> Path | None: ...

    def columns(self, needed: Needed) -> list[str]:
        """The names of the columns. Those that `needed` chooses of them are read."""
        ...


class Opened(Protocol):
    """What a table is opened by; see `TableConfig`."""

    path: str
    rows_under: str | None
    subset: str | None
    split: str
    revision: str | None


class FileRows(Protocol):
    """The rows of one file."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...

    def where(self, row: int) -> str: ...

    def columns(self, wanted: Callable[[Iterable[str]], object]) -> list[str]: ...


class TextFiles:
    """Rows of text files, one after the other, with the place of each for errors, and the folder that its paths start
    from."""

    def __init__(self, files: Sequence[FileRows]) -> None:
        self.files = files
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

    def columns(self, needed: Needed) -> list[str]:
        """Those of the first file. Raises ConfigError for another file that lacks one of them that is needed."""
        names = self.files[0].columns(needed)
        read = needed(names)
        for file in self.files[1:] if read else ():
            other = file.columns(set(read).issubset)
            for column in read:
                check_column(column, other, f"data source {file.path}")
        return names

    def _find(self, row: int) -> tuple[FileRows, int]:
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

    def columns(self, needed: Needed) -> list[str]:
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


def open_rows(config: Opened, needed: Needed) -> tuple[Rows, range]:
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
            rows = TextFiles([_text_file(path, config.rows_under)])
        elif _suffix(path) in _PARQUET:
            rows = _parquet(path, needed)
        else:
            formats = ", ".join(sorted(_TEXT | _PARQUET))
            raise ConfigError(f"{where}: its name does not say its format, which is one of {formats}")
    if config.rows_under is not None and not isinstance(rows, TextFiles):
        raise ConfigError(f"{where}: rows_under is a key of a JSON file, and this is none; leave it out")
    if not len(rows):
        raise ConfigError(f"{where}: no rows")
    first, last = (_bound_of(edge, len(rows)) for edge in edges)
    if first >= last:
        raise ConfigError(f"{where}: split {config.split} leaves none of its {len(rows)} rows")
    return rows, range(first, last)


def _text_file(path: Path, rows_under: str | None) -> FileRows:
    suffix = _suffix(path)
    if rows_under is not None:
        if suffix not in _JSON:
            raise ConfigError(f"data source {path}: rows_under is a key of a JSON file, and this is none; leave it out")
        return KeyedRows(path, rows_under, numbers_as_text=True)
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


def _parquet(path: Path, needed: Needed) -> _Arrow:
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


def _dataset(config: Opened, path: Path, split: str, needed: Needed) -> TextFiles | _Arrow:
    """A folder or a dataset of the hub. Text files that declare no types are read here, as `datasets` would guess."""
    datasets = _library()
    where = f"data source {config.path}"
    is_path = config.path.startswith((".", "/", "~")) or config.path.endswith("/") or config.path.count("/") > 1
    if is_path and not path.exists():
        raise ConfigError(f"{where}: no such file or folder{'' if path.is_absolute() else f' in {Path.cwd()}'}")
    folder = path.absolute() if path.is_dir() else None
    away = hub.fault() if folder is None else None
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
            with _offline(datasets) if away else nullcontext():
                builder = datasets.load_dataset_builder(name, config.subset, revision=config.revision)
                if builder.name in ("csv", "json") and builder.config.features is None:
                    files = builder.config.data_files[split]
                    paths = datasets.DownloadManager().download(list(files))
                    return TextFiles([_text_file(Path(path), config.rows_under) for path in paths])
                rows = datasets.load_dataset(name, config.subset, split=split, revision=config.revision)
    except KeyError as error:
        raise ConfigError(f"{where}: no split {error}") from error
    except ConfigError:
        raise
    except Exception as error:  # those of datasets, pyarrow and the hub, of many kinds
        if away:
            told = f"{where}: no such file or folder in {Path.cwd()}; as a dataset of the hub it was not fetched before"
            raise ConfigError(f"{told}, and {away}; check the path and the network") from error
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ConfigError(f"{where}: cannot be opened by datasets ({type(error).__name__}: {reason})") from error
    names = rows.column_names
    return _Arrow(rows.select_columns(needed(names) or names[:1]), names, config.path, folder)


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """`datasets` opens what it has fetched before, and asks nobody."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data source kind 'table' needs datasets: pip install 'molora[datasets]'") from error
    return datasets
