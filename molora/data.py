"""Training data: sources of conversations, and an order of samples that is a pure function of seed and position.

Because the order needs no state, training resumes anywhere and any rank or worker can compute its share.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from molora.config import ConfigError, build, require
from molora.messages import from_llava, from_openai, from_sharegpt
from molora.pack import Sample
from molora.plugins import resolve
from molora.processor import Processor, SampleTooLong
from molora.seeding import seed_of


class Source(Protocol):
    """Conversations by row; built as `Plugin(config)`, with a recipe's options read into its `config_type`.

    A row is {"id", "messages"} and may have "tags", a list of names to report metrics by.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class SourceConfig:
    """A source in a recipe. `weight` is its share of the samples; `limit` keeps the first rows only."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    limit: int | None = None

    def __post_init__(self) -> None:
        require(self, 0, "weight")
        require(self, 1, "limit")


@dataclass(kw_only=True)
class MessagesConfig:
    """A JSONL file of conversations in any format `molora.messages` reads; media paths are relative to `media_root`,
    by default the file's own folder."""

    path: str
    media_root: str | None = None


class Messages:
    """Conversations from a JSONL file, read by offset so that the file need not fit in memory."""

    config_type = MessagesConfig

    def __init__(self, config: MessagesConfig) -> None:
        self.path = Path(config.path)
        if not self.path.is_file():
            raise ConfigError(f"data source {self.path}: no such file")
        self.media_root = Path(config.media_root) if config.media_root else self.path.parent
        self.offsets: list[int] = []
        with open(self.path, "rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    self.offsets.append(offset)
                offset += len(line)
        if not self.offsets:
            raise ConfigError(f"data source {self.path}: no rows")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        where = f"{self.path}, row {row + 1}"
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            line = file.readline()
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        messages = _rooted(conversation(value, where), self.media_root)
        return {"id": str(value.get("id", row)), "messages": messages, "tags": value.get("tags", [])}


def conversation(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A row's messages, whichever format it is in: messages, OpenAI's, ShareGPT's or LLaVA's. Raises ValueError."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    if any(key in row for key in ("images", "audios", "videos")):
        return from_sharegpt(row, where)
    if "conversations" in row:
        return from_llava(row, where)
    if "messages" in row:
        return from_openai(row["messages"], where)
    raise ValueError(f"{where}: neither 'messages' nor 'conversations' among its keys {sorted(row)}")


@dataclass(kw_only=True)
class TableConfig:
    """A table of one-turn conversations: a parquet, CSV, TSV or JSONL file, or a dataset of the hub.

    `media` maps a part type to the column that holds it (a path, or what `datasets` stores); `prompt` and `answer` are
    templates over columns, such as "{question}". Relative paths start from `media_root`, by default the file's own
    folder. `subset`, `split` and `revision` are a dataset's of the hub.
    """

    path: str
    prompt: str
    answer: str
    media: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    media_root: str | None = None


# How `datasets` reads a file. Cells of text are taken at their word: `null` and `NA` are words, and empty is empty.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("parquet", {}),
    "csv": ("csv", {"na_filter": False}),
    # As Common Voice and CoVoST are written: no quotes, and a backslash before a tab that is no border.
    "tsv": ("csv", {"na_filter": False, "sep": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}),
    "jsonl": ("json", {}),
    "json": ("json", {}),
}


class Table:
    """Rows of a table as conversations. Needs the `datasets` extra."""

    config_type = TableConfig

    def __init__(self, config: TableConfig) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ImportError("data source kind 'table' needs datasets: pip install 'molora[datasets]'") from error
        self.config = config
        suffix = Path(config.path).suffix.lstrip(".")
        if suffix in _LOADERS:
            if not Path(config.path).is_file():
                raise ConfigError(f"data source {config.path}: no such file")
            loader, options = _LOADERS[suffix]
            rows = datasets.load_dataset(loader, data_files={"train": config.path}, split="train", **options)
        else:
            rows = datasets.load_dataset(config.path, config.subset, split=config.split, revision=config.revision)
        # Media are decoded by the modality, not by datasets.
        for column in config.media.values():
            if column not in rows.column_names:
                raise ConfigError(f"data source {config.path}: no column {column!r}; columns are {rows.column_names}")
            if hasattr(rows.features[column], "decode"):
                rows = rows.cast_column(column, type(rows.features[column])(decode=False))
        for key, template in (("prompt", config.prompt), ("answer", config.answer)):
            if template in rows.column_names:
                raise ConfigError(
                    f"data source {config.path}: {key} is the text {template!r} in every row, and not what the column "
                    f"of that name holds; did you mean '{{{template}}}'?"
                )
        self.rows = rows
        self.media_root = Path(config.media_root) if config.media_root else Path(config.path).parent

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        values = self.rows[row]
        content: list[dict[str, Any]] = []
        for part_type, column in self.config.media.items():
            media = values[column]
            if isinstance(media, Mapping):
                media = {key: media[key] for key in ("bytes", "path") if media.get(key) is not None}
                content.append({"type": part_type, **dict(list(media.items())[:1])})
            else:
                content.append({"type": part_type, "bytes" if isinstance(media, bytes) else "path": media})
        try:
            content.append({"type": "text", "text": self.config.prompt.format(**values)})
            answer = self.config.answer.format(**values)
        except KeyError as error:
            raise ConfigError(
                f"data source {self.config.path}: no column {error}; columns are {list(values)}"
            ) from error
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return {"id": str(values.get("id", row)), "messages": _rooted(messages, self.media_root), "tags": []}


def _rooted(messages: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    """Resolves relative media paths against `root`."""
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                {**part, "path": str(root / part["path"])} if isinstance(part.get("path"), str) else part
                for part in message["content"]
            ]
    return messages


def open_source(config: SourceConfig, where: str) -> Source:
    """Opens a source by its kind, a built-in name or a plugin's. Raises ConfigError."""
    try:
        source_class: Any = resolve("source", config.kind)
    except ConfigError as error:
        raise ConfigError(f"{where}.kind: {error}") from error
    source: Source = source_class(build(source_class.config_type, config.options, f"{where}.options"))
    return source if config.limit is None else _First(source, config.limit)


class _First:
    def __init__(self, source: Source, limit: int) -> None:
        self.source = source
        self.limit = min(limit, len(source))

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.source[row]


class Order:
    """Which row of which source is sample number k: sources by weight, each shuffled anew in every epoch."""

    BLOCK = 4096

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.lengths = tuple(lengths)
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.seed = seed
        self._blocks: list[torch.Tensor] = []  # the source of every sample of a block
        self._before: list[torch.Tensor] = [torch.zeros(len(self.lengths), dtype=torch.long)]
        self._shuffles: dict[tuple[int, int], torch.Tensor] = {}

    def __getitem__(self, k: int) -> tuple[int, int, int]:
        """Sample number k as (source, row, epoch of that source)."""
        block, place = divmod(k, self.BLOCK)
        while len(self._blocks) <= block:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "sources", len(self._blocks)))
            sources = torch.multinomial(self.weights, self.BLOCK, replacement=True, generator=generator)
            self._blocks.append(sources)
            self._before.append(self._before[-1] + torch.bincount(sources, minlength=len(self.lengths)))
        sources = self._blocks[block]
        source = int(sources[place])
        nth = int(self._before[block][source]) + int((sources[:place] == source).sum())
        epoch, position = divmod(nth, self.lengths[source])
        return source, int(self._shuffle(source, epoch)[position]), epoch

    def _shuffle(self, source: int, epoch: int) -> torch.Tensor:
        if (source, epoch) not in self._shuffles:
            self._shuffles = {key: value for key, value in self._shuffles.items() if key[0] != source}
            generator = torch.Generator().manual_seed(seed_of(self.seed, "rows", source, epoch))
            self._shuffles[source, epoch] = torch.randperm(self.lengths[source], generator=generator)
        return self._shuffles[source, epoch]


@dataclass(frozen=True)
class Skipped:
    """A sample left out because the recipe says so."""

    id: str
    reason: str


class EncodedSamples(Dataset[Sample | Skipped]):
    """Sample number k, encoded. Safe in data workers.

    A sample longer than `max_tokens` is too long, and so is one that the processor says is. Errors of the kinds in
    `skips` leave the sample out; any other stops.
    """

    def __init__(
        self,
        configs: Mapping[str, SourceConfig],
        processor: Processor,
        *,
        seed: int,
        max_tokens: int,
        skips: tuple[type[ValueError], ...],
        where: str,
    ) -> None:
        if not configs:
            raise ConfigError(f"{where}: no data source")
        self.names = list(configs)
        self.sources = [open_source(config, f"{where}.{name}") for name, config in configs.items()]
        self.order = Order([len(s) for s in self.sources], [c.weight for c in configs.values()], seed)
        self.processor = processor
        self.seed = seed
        self.max_tokens = max_tokens
        self.skips = skips

    def __getitem__(self, k: int) -> Sample | Skipped:
        source, row, epoch = self.order[k]
        example = self.sources[source][row]
        id = f"{self.names[source]}/{example['id']}@{epoch}"
        try:
            sample = self.processor.encode(example["messages"], id, seed=seed_of(self.seed, id))
            if len(sample) > self.max_tokens:
                raise SampleTooLong(
                    f"sample {id}: has {len(sample)} tokens, but a pack of this stage holds {self.max_tokens}; raise "
                    "tokens_per_pack, or leave such samples out with `too_long: skip`"
                )
            return sample
        except self.skips as error:
            return Skipped(id, str(error))
        except ValueError as error:
            raise type(error)(f"data source {self.names[source]!r}, row {row + 1}: {error}") from error


class _Steps:
    """The sample numbers of this rank, step by step."""

    def __init__(self, first_step: int, steps: int, samples_per_step: int, rank: int, ranks: int) -> None:
        self.first_step, self.steps, self.samples_per_step = first_step, steps, samples_per_step
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        for step in range(self.first_step, self.steps):
            yield list(range(step * self.samples_per_step + self.rank, (step + 1) * self.samples_per_step, self.ranks))

    def __len__(self) -> int:
        return self.steps - self.first_step


def step_loader(
    dataset: EncodedSamples, *, first_step: int, steps: int, samples_per_step: int, rank: int, ranks: int, workers: int
) -> Iterable[list[Sample | Skipped]]:
    """Yields this rank's samples of each step from `first_step` on."""
    return DataLoader(
        dataset,
        batch_sampler=_Steps(first_step, steps, samples_per_step, rank, ranks),
        collate_fn=list,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
