"""Models that a workflow asks: one that is opened here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from molora.checkpoint.assembly import RouterConfig
from molora.config import ConfigError, plain, require
from molora.data.messages import Message
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.grammar import Grammar, Grammars
from molora.inference.load import LoadedModel, load
from molora.pack import Sample
from molora.received import stamps
from molora.synthetic.rows import DecodingConfig, Reply


@dataclass(kw_only=True)
class LocalConfig:
    """A model that is opened here: a run folder, or a backbone (a folder, hub id or package:NAME) with folders of
    `modalities`. `rules` say which adapter samples of several modalities take, as {audio+vision: vision}. At most
    `max_running_samples` answers are drawn at a time, and `answers_per_round` of them are kept together: a kill loses
    no more, and an answer has the same neighbours, and so the same bits, when the round is drawn again."""

    path: str
    modalities: list[str] = field(default_factory=list)
    rules: dict[str, str | None] = field(default_factory=dict)
    dtype: str | None = None
    max_running_samples: int = 64
    answers_per_round: int = 256

    def __post_init__(self) -> None:
        require(self, 1, "max_running_samples", "answers_per_round")


@dataclass(kw_only=True)
class ModelConfig:
    """A model by its name in a workflow."""

    local: LocalConfig | None = None

    def __post_init__(self) -> None:
        if self.local is None:
            raise ConfigError("names no model; give local, one that is opened here")


# The messages to answer, with the id that draws depend on.
Prompt = tuple[str, Sequence[Message]]


class Model(Protocol):
    """What answers. `identity` is all that its answers depend on; `per_round` of them are kept together."""

    identity: Any
    per_round: int

    def answer(
        self, prompts: Sequence[Prompt], how: DecodingConfig, seed: int, room: int | None, advance: Callable[[], object]
    ) -> list[Reply]:
        """Replies to the prompts, or to the first of them, as many as `room` tokens are enough for in any case."""
        ...


# Opens a local model by its path, with folders of modalities, a router and a dtype.
Opener = Callable[..., LoadedModel]


def open_models(configs: Mapping[str, ModelConfig], opener: Opener = load) -> dict[str, Model]:
    """The models of a workflow. One that is opened here is so when it is asked first."""
    return {name: LocalModel(config.local, opener) for name, config in configs.items() if config.local}


class LocalModel:
    """A model that is opened here, whose running batch answers."""

    def __init__(self, config: LocalConfig, opener: Opener) -> None:
        self.config = config
        self.opener = opener
        self.per_round = config.answers_per_round

    @cached_property
    def identity(self) -> Any:
        """The config, and the stamps of the files that it names."""
        folders = [Path(path).expanduser() for path in (self.config.path, *self.config.modalities)]
        files = [file for folder in folders if folder.is_dir() for file in _weights(folder)]
        return [plain(self.config), [list(stamp) for stamp in stamps(files)]]

    @cached_property
    def loaded(self) -> LoadedModel:
        config = self.config
        router = RouterConfig(options={"rules": config.rules}) if config.rules else None
        return self.opener(config.path, config.modalities, router=router, dtype=config.dtype)

    @cached_property
    def grammars(self) -> Grammars:
        backbone = self.loaded.model.backbone
        return Grammars(self.loaded.processor.tokenizer, backbone.stop_ids, backbone.vocab_size)

    def answer(
        self, prompts: Sequence[Prompt], how: DecodingConfig, seed: int, room: int | None, advance: Callable[[], object]
    ) -> list[Reply]:
        samples: list[Sample | Failed] = []
        for id, messages in prompts:
            sample = attempt(partial(self.loaded.encode, messages, id), id)
            if room is not None and isinstance(sample, Sample):
                room -= len(sample) + how.max_new_tokens
                if room < 0:
                    break
            samples.append(sample)
        config = GenerationConfig(
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=seed,
            stop=tuple(how.stop),
            max_running_samples=self.config.max_running_samples,
        )
        replies: dict[str, Reply] = {}
        for answer in self.loaded.answers(samples, config, keep_going=True, grammar=self.grammar(how)):
            error = "" if answer.error is None else str(answer.error)
            replies[answer.id] = Reply(answer.text, answer.finished, answer.prompt_tokens, answer.answer_tokens, error)
            advance()
        return [replies[sample.id] for sample in samples]

    def grammar(self, how: DecodingConfig) -> Grammar | None:
        if how.schema is not None:
            return self.grammars.of_json_schema(how.schema)
        return None if how.regex is None else self.grammars.of_regex(how.regex)


def _weights(folder: Path) -> list[Path]:
    """The files of a backbone, a run or a modality that answers depend on; not the states of a run."""
    names = ("*.safetensors", "*.json", "*.jinja", "modalities/*/*.safetensors", "modalities/*/*.json")
    return sorted(path for name in names for path in folder.glob(name) if path.is_file())
