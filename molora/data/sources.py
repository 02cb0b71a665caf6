"""Training data: sources of conversations, and their samples in order, encoded."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from molora.config import ConfigError, build, require
from molora.data.formats.choices import judged_by
from molora.data.formats.rows import JsonRows
from molora.data.formats.table import row_id
from molora.data.messages import conversation, media_parts, rooted
from molora.data.mixture import MixtureConfig, Weight, check_weight
from molora.data.order import Blocks, Order, even_blocks
from molora.data.processor import Processor, SampleTooLong
from molora.modality import MediaError, Prepared
from molora.pack import Sample
from molora.plugins import Finder, find
from molora.routing import RoutingError
from molora.seeding import seed_of

# A longer source is shuffled by blocks of this many rows: a table of all its rows would take too much memory.
_MAX_TABLE_ROWS, _ROWS_PER_BLOCK, _BLOCKS_PER_WINDOW = 2**24, 1024, 16

NO_REJECTED = (
    "has no rejected answer; preferences are learned from `kind: preferences`, or from a table with `rejected`"
)

# Rows of a source whose mean length stands for that of all.
_MEASURED_ROWS = 64


class Source(Protocol):
    """Conversations by row; built as `Plugin(config)`, with a recipe's options read into its `config_type`.

    A row is {"id", "messages"} and may have "tags", a list of names to report metrics by; "answers", the list of all
    that are accepted in place of the last message, which has the first; and "choices" with "choice", the texts of a
    question's options and the number of the right one, counted from 0. A preference has "rejected", the messages with
    the answer that was not chosen.

    A source may also have `where(row)`, the file and row for errors; `blocks`, by which its rows are shuffled;
    `will_read(ranges)`, which is told the ranges of rows that come next, in any order; where `blocks` has files,
    `will_fetch(rows)`, which is told the rows of the file behind them; and `provenance()`, which tells of its data for
    the card of a run: {"files": paths, "fingerprint": text, "licence": text}, or some of these."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class SourceConfig:
    """A source in a recipe: its `kind`, a built-in name or a plugin, and its `options`. `limit` keeps the first rows
    only. `licence` is what its owner allows, for the run's card.

    `weight` is its share of the samples, or a list of [step, share] from which steps on which share holds. After
    `max_epochs` it leaves the mixture, and the other sources go on. With `rows_per_block` blocks of consecutive rows
    are shuffled, and the rows of `blocks_per_window` of them mixed, so that what is read lies together; without, all
    rows are shuffled, unless the source is made of shards or has over 16,777,216 rows."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: Weight = 1.0
    limit: int | None = None
    licence: str | None = None
    max_epochs: int | None = None
    rows_per_block: int | None = None
    blocks_per_window: int | None = None

    def __post_init__(self) -> None:
        require(self, 1, "limit", "max_epochs", "rows_per_block", "blocks_per_window")
        check_weight(self.weight)


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
        return self.told(row, self.rows[row])

    def told(self, row: int, value: Mapping[str, Any]) -> dict[str, Any]:
        """What row number `row` tells if it says `value`."""
        where = self.rows.where(row)
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
    return source if config.limit is None else _FirstRows(source, min(config.limit, len(source)))


class _FirstRows:
    """The first rows of a source."""

    def __init__(self, source: Any, num_rows: int) -> None:
        self.source = source
        self.rows = range(num_rows)
        for name in ("where", "will_read", "will_fetch", "provenance"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        if blocks := getattr(source, "blocks", None):
            kept = np.searchsorted(blocks.ends, num_rows) + 1
            files = blocks.file_ends
            if files is not None:
                files = np.minimum(files[: np.searchsorted(files, num_rows) + 1], num_rows)
            self.blocks = Blocks(np.minimum(blocks.ends[:kept], num_rows), blocks.per_window, files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.source[self.rows[row]]


def mixed_order(
    configs: Iterable[SourceConfig],
    sources: Sequence[Source],
    mixture: MixtureConfig,
    *,
    seed: int,
    samples_per_step: int,
    mean_tokens: Sequence[float] = (),
    will_read: Callable[[int, list[range], range | None], None] | None = None,
) -> Order:
    """The order of a stage's samples. `mean_tokens` are the lengths of a source's samples, where weights are shares of
    tokens."""
    configs = list(configs)
    power = 0.0 if mixture.temperature is None else 1 / mixture.temperature
    factors = [
        len(source) ** power / tokens
        for source, tokens in zip(sources, mean_tokens or [1.0] * len(sources), strict=True)
    ]
    return Order(
        [len(source) for source in sources],
        [_times(config.weight, factor) for config, factor in zip(configs, factors, strict=True)],
        seed,
        samples_per_step=samples_per_step,
        max_epochs=[config.max_epochs for config in configs],
        blocks=[_blocks(config, source) for config, source in zip(configs, sources, strict=True)],
        one_source=mixture.batches == "one_source",
        will_read=will_read,
    )


def check_samples(order: Order, steps: int, samples_per_step: int, where: str) -> None:
    """Raises ConfigError if the sources of an order are used up before a stage ends."""
    wanted = steps * samples_per_step
    if (there := order.num_samples(wanted)) < wanted:
        raise ConfigError(
            f"{where}: the sources are used up after {there:,} samples ({there // samples_per_step:,} steps of "
            f"{samples_per_step}), as their max_epochs and weights say, but the stage has {steps:,} steps; lower steps "
            "to that, or raise max_epochs"
        )


def _times(weight: Weight, factor: float) -> Weight:
    return [(step, share * factor) for step, share in weight] if isinstance(weight, list) else weight * factor


def _blocks(config: SourceConfig, source: Source) -> Blocks | None:
    """The blocks that a source is shuffled by; None if all its rows are shuffled at once."""
    own: Blocks | None = getattr(source, "blocks", None)
    rows = config.rows_per_block
    if rows is None and own is None and len(source) > _MAX_TABLE_ROWS:
        rows = _ROWS_PER_BLOCK
    per_window = config.blocks_per_window or (_BLOCKS_PER_WINDOW if own is None else own.per_window)
    if rows is not None:
        if own is not None and own.file_ends is not None:
            raise ConfigError("rows_per_block: the blocks of a source that is fetched lie in its files; leave it out")
        return even_blocks(len(source), rows, per_window)
    return own and replace(own, per_window=per_window)


def rows_at_hand(source: Source) -> range:
    """The rows that can be looked at without fetching more than one file."""
    own: Blocks | None = getattr(source, "blocks", None)
    return range(len(source) if own is None or own.file_ends is None else int(own.file_ends[0]))


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
    the processor says is. Errors of the kinds in `skips` leave the sample out; any other stops. With `pairs` every
    sample has its rejected answer."""

    configs: Mapping[str, SourceConfig]
    processor: Processor
    _: KW_ONLY
    seed: int
    max_tokens: int
    skips: tuple[type[ValueError], ...]
    where: str
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    samples_per_step: int = 1
    pairs: bool = False

    def __post_init__(self) -> None:
        if not self.configs:
            raise ConfigError(f"{self.where}: no data source")
        self.names = list(self.configs)
        self.sources = [open_source(config, f"{self.where}.{name}") for name, config in self.configs.items()]
        by_tokens = self.mixture.weights_of == "tokens"
        self.order = mixed_order(
            self.configs.values(),
            self.sources,
            self.mixture,
            seed=self.seed,
            samples_per_step=self.samples_per_step,
            mean_tokens=[self._mean_tokens(source) for source in range(len(self.sources))] if by_tokens else (),
            will_read=self._will_read,
        )

    @property
    def num_rows(self) -> dict[str, int]:
        """The rows of each source, by its name."""
        return {name: len(source) for name, source in zip(self.names, self.sources, strict=True)}

    def __getitem__(self, k: int) -> Sample | Skipped:
        return self.encoded(k, {})

    def encoded(self, k: int, known: dict[Any, Prepared]) -> Sample | Skipped:
        """Sample number k. `known` is what `Processor.encode` keeps of a step's media."""
        return self._encoded(*self.order[k], known)

    def _encoded(self, source: int, row: int, epoch: int, known: dict[Any, Prepared]) -> Sample | Skipped:
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
            seed = seed_of(self.seed, id)
            return encode_row(self.processor, example, id, self.max_tokens, pairs=self.pairs, seed=seed, known=known)
        except self.skips as error:
            return Skipped(id, str(error))
        except ValueError as error:
            kind = type(error) if type(error) in (MediaError, SampleTooLong, RoutingError) else ValueError
            raise kind(f"{where}: {placed(error, self.sources[source], row)}") from error

    def _mean_tokens(self, source: int) -> float:
        """The mean length of some of a source's samples, the same whenever it is worked out. Raises ConfigError if none
        of them can be used."""
        num_rows = len(rows_at_hand(self.sources[source]))
        rows = sorted({number * num_rows // _MEASURED_ROWS for number in range(_MEASURED_ROWS)})
        samples = [self._encoded(source, row, 0, {}) for row in rows]
        lengths = [len(sample) for sample in samples if isinstance(sample, Sample)]
        if not lengths:
            raise ConfigError(
                f"{self.where}.{self.names[source]}: its share of the tokens needs the length of a sample, and none of "
                f"{len(rows)} rows can be used; mend them, or give weights as shares of the samples"
            )
        return sum(lengths) / len(lengths)

    def _will_read(self, source: int, rows: list[range], behind: range | None) -> None:
        opened: Any = self.sources[source]
        if hasattr(opened, "will_read"):
            opened.will_read(rows)
        if behind is not None:
            opened.will_fetch(behind)


def encode_row(
    processor: Processor,
    example: Mapping[str, Any],
    id: str,
    max_tokens: int,
    *,
    pairs: bool = False,
    seed: int | None = None,
    known: dict[Any, Prepared] | None = None,
) -> Sample:
    """A row of a source as a sample of a stage whose packs hold `max_tokens`; with `pairs` it has its rejected answer.
    Raises SampleTooLong, and what `Processor.encode` does."""
    sample = processor.encode(example["messages"], id, seed=seed, known=known)
    check_length(sample, max_tokens)
    if not pairs:
        return sample
    if "rejected" not in example:
        raise ValueError(f"sample {id}: {NO_REJECTED}")
    rejected = processor.encode(example["rejected"], f"{id}, rejected", seed=seed, known=known)
    check_length(rejected, max_tokens)
    if len(rejected.items) != len(sample.items):
        told = f"{len(sample.items)} media with the chosen answer and {len(rejected.items)} with the rejected one"
        raise ValueError(f"sample {id}: has {told}; the prompt shows media, write answers as text")
    return replace(sample, rejected=rejected)


def check_length(sample: Sample, max_tokens: int) -> None:
    """Raises SampleTooLong for a sample that no pack of a stage has room for."""
    if len(sample) > max_tokens:
        raise SampleTooLong(
            f"sample {sample.id}: has {len(sample)} tokens, but a pack of this stage holds {max_tokens}; raise "
            "tokens_per_pack, or leave such samples out with `too_long: skip`"
        )


def placed(error: ValueError, source: Any, row: int) -> str:
    """What an error says, behind the file and place of its row, if the source tells them and the error does not."""
    place = source.where(row) if hasattr(source, "where") else ""
    return str(error) if str(error).startswith(place) else f"{place}: {error}"
