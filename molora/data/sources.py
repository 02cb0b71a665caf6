"""Training data: sources of conversations, and their samples in order, encoded."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Dataset, Subset

from molora.config import ConfigError, build, require
from molora.data.formats.choices import judged_by
from molora.data.formats.rows import JsonRows
from molora.data.formats.table import row_id
from molora.data.messages import conversation, media_parts, rooted
from molora.data.order import Order
from molora.data.processor import Processor, SampleTooLong
from molora.modality import MediaError, Prepared
from molora.pack import Sample
from molora.plugins import Finder, find
from molora.routing import RoutingError
from molora.seeding import seed_of

_MAX_WEIGHT = 1e9


class Source(Protocol):
    """Conversations by row; built as `Plugin(config)`, with a recipe's options read into its `config_type`.

    A row is {"id", "messages"} and may have "tags", a list of names to report metrics by; "answers", the list of all
    that are accepted in place of the last message, which has the first; and "choices" with "choice", the texts of a
    question's options and the number of the right one, counted from 0."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class SourceConfig:
    """A source in a recipe: its `kind`, a built-in name or a plugin, and its `options`. `weight` is its share of the
    samples; `limit` keeps the first rows only."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "limit")
        if not 0 < self.weight <= _MAX_WEIGHT:
            raise ConfigError(
                f"weight is {self.weight}; give a share above 0, up to {_MAX_WEIGHT:g}, or take the source out"
            )


@dataclass(kw_only=True)
class MessagesConfig:
    """Conversations in any format that `molora.data.messages` reads: a file of JSON, one object a line or all in one
    list, also gzipped. Media paths start from the file's own folder, or from `media_root`, which no path may leave."""

    path: str
    media_root: str | None = None


class Messages:
    """Conversations from a file, read by offset so that the file need not fit in memory."""

    config_type = MessagesConfig

    def __init__(self, config: MessagesConfig) -> None:
        self.rows = JsonRows(Path(config.path), numbers_as_text=False)
        self.media_root = Path(os.path.expanduser(config.media_root)) if config.media_root else None

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> str:
        """The file and row, for errors."""
        return self.rows.where(row)

    def id_of(self, row: int) -> str:
        """The id of a row, whose conversation may be faulty. Raises ValueError where that cannot be read either."""
        return row_id(self.rows[row].get("id"), row, self.rows.where(row))

    def __getitem__(self, row: int) -> dict[str, Any]:
        where = self.rows.where(row)
        value = self.rows[row]
        messages = conversation(value, where)
        return {
            "id": row_id(value.get("id"), row, where),
            "messages": rooted(messages, self.rows.path.absolute().parent, self.media_root, where),
            "tags": read_tags(value.get("tags"), where),
            **judged_by(value, where),
        }


def read_tags(value: Any, where: str) -> list[str]:
    """The names that a row is counted under: a list of texts, one text, or null. Raises ValueError."""
    tags = [value] if isinstance(value, str) else value or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"{where}: tags: expected a list of texts, or one text, got {value!r:.80}")
    return [tag for tag in dict.fromkeys(tags) if tag]


def open_source(config: SourceConfig, where: str, find: Finder = find) -> Source:
    """Opens a source by its kind, a built-in name or a plugin's, which `find` finds. Raises ConfigError."""
    try:
        source_class: Any = find("source", config.kind).plugin
    except ConfigError as error:
        raise type(error)(f"{where}.kind: {error}") from error
    source: Any = source_class(build(source_class.config_type, config.options, f"{where}.options"))
    return source if config.limit is None else Subset(source, range(min(config.limit, len(source))))


def first_rows(configs: Iterable[SourceConfig], count: int, find: Finder = find) -> list[dict[str, Any]]:
    """Up to `count` rows of each source."""
    sources = [open_source(config, "data", find) for config in configs]
    return [source[row] for source in sources for row in range(min(len(source), count))]


def parts_for(modality: str, path: Path) -> list[Any]:
    """The content parts that a modality, named as in a recipe, answers to in a file of conversations. Raises
    ConfigError if there are none."""
    part_type = find("modality", modality).plugin.part_type  # pyright: ignore[reportAttributeAccessIssue]
    source = Messages(MessagesConfig(path=str(path)))
    parts = [part for row in range(len(source)) for _, part in media_parts(source[row]["messages"])]
    chosen = [part for part in parts if part["type"] == part_type]
    if not chosen:
        there = ", ".join(sorted({part["type"] for part in parts})) or "no media"
        raise ConfigError(f"{path}: no parts of type {part_type!r}, which {modality} answers to; there are {there}")
    return chosen


@dataclass(frozen=True)
class Skipped:
    """A sample left out because the recipe says so."""

    id: str
    reason: str


@dataclass(eq=False)
class EncodedSamples(Dataset[Sample | Skipped]):
    """Sample number k, encoded. Safe in data workers. A sample longer than `max_tokens` is too long, and so is one that
    the processor says is. Errors of the kinds in `skips` leave the sample out; any other stops."""

    configs: Mapping[str, SourceConfig]
    processor: Processor
    _: KW_ONLY
    seed: int
    max_tokens: int
    skips: tuple[type[ValueError], ...]
    where: str

    def __post_init__(self) -> None:
        if not self.configs:
            raise ConfigError(f"{self.where}: no data source")
        self.names = list(self.configs)
        self.sources = [open_source(config, f"{self.where}.{name}") for name, config in self.configs.items()]
        self.order = Order([len(s) for s in self.sources], [c.weight for c in self.configs.values()], self.seed)

    def __getitem__(self, k: int) -> Sample | Skipped:
        return self.encoded(k, {})

    def encoded(self, k: int, known: dict[Any, Prepared]) -> Sample | Skipped:
        """Sample number k. `known` is what `Processor.encode` keeps of a step's media."""
        source, row, epoch = self.order[k]
        where = f"data source {self.names[source]!r}, row {row + 1}"
        try:
            example = self.sources[source][row]
        except self.skips as error:
            return Skipped(f"{self.names[source]}/row {row + 1}@{epoch}", str(error))
        except ValueError:
            raise  # it says in which file
        except Exception as error:  # a plugin's source can fail in any way
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        id = f"{self.names[source]}/{example['id']}@{epoch}"
        try:
            sample = self.processor.encode(example["messages"], id, seed=seed_of(self.seed, id), known=known)
            check_length(sample, self.max_tokens)
            return sample
        except self.skips as error:
            return Skipped(id, str(error))
        except ValueError as error:
            kind = type(error) if type(error) in (MediaError, SampleTooLong, RoutingError) else ValueError
            raise kind(f"{where}: {error}") from error


def check_length(sample: Sample, max_tokens: int) -> None:
    """Raises SampleTooLong for a sample that no pack of a stage has room for."""
    if len(sample) > max_tokens:
        raise SampleTooLong(
            f"sample {sample.id}: has {len(sample)} tokens, but a pack of this stage holds {max_tokens}; raise "
            "tokens_per_pack, or leave such samples out with `too_long: skip`"
        )
