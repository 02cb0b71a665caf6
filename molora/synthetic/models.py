"""Models that a workflow asks: opened here, or at an OpenAI-compatible address."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.opening import locate
from molora.checkpoint.pretrained import fetch
from molora.config import ConfigError, plain, require
from molora.convert.release import converted
from molora.data.messages import Message, parts
from molora.inference.generate import Failed, GenerationConfig, attempt
from molora.inference.grammar import Grammar, Grammars, check_form
from molora.inference.load import LoadedModel
from molora.inference.remote import Refused, Server, ServerConfig, Silent
from molora.pack import Sample
from molora.received import stamps
from molora.seeding import seed_of
from molora.synthetic.rows import DecodingConfig, Reply

# Requests to a server that are kept together, for each that runs at a time.
_ROUNDS = 4
# Statuses that the next request would have too: the key, the place or the model is wrong.
_HOPELESS = (401, 402, 403, 404)
# Why an answer may end before its end, as servers say it.
_NOT_WHOLE = ("length", "content_filter")
_TOKENS_OF_MEDIUM, _TOKENS_OF_TURN = 8192, 16


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
    """A model of a workflow: `local`, one that is opened here, or `server`, one at an OpenAI-compatible address."""

    local: LocalConfig | None = None
    server: ServerConfig | None = None

    def __post_init__(self) -> None:
        if (self.local is None) == (self.server is None):
            raise ConfigError("give either local, a model that is opened here, or server, one at an address")


# The messages to answer, with the id that draws depend on.
Prompt = tuple[str, Sequence[Message]]


class Unanswered(ValueError):
    """A server does not answer the prompt number `place`, and what it says is no fault of that prompt alone."""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place = place


class Model(Protocol):
    """What answers. `identity` is all that its answers depend on; `per_round` prompts are given to it at a time."""

    identity: Any
    per_round: int

    def check(self, how: DecodingConfig) -> None:
        """Raises OSError, ValueError or ImportError for a model that cannot be opened, and for a form of answers that
        it cannot follow, as far as this is known without its weights."""
        ...

    def answer(
        self, prompts: Sequence[Prompt], how: DecodingConfig, seed: int, room: int | None, advance: Callable[[], object]
    ) -> Iterator[dict[int, Reply]]:
        """Yields replies as they come, by the numbers of their prompts; those that come together are kept together.
        There are replies to all prompts, or to the first of them, as many as `room` tokens are enough for in any case.
        Raises Unanswered, after all replies that there are."""
        ...


# Opens a local model by its path, with folders of modalities, a router and a dtype.
Opener = Callable[..., LoadedModel]


def open_models(configs: Mapping[str, ModelConfig], opener: Opener) -> dict[str, Model]:
    """The models of a workflow. One that is opened here is so when it is asked first. Raises ConfigError for a server
    whose key is not in the environment."""
    models: dict[str, Model] = {}
    for name, config in configs.items():
        try:
            models[name] = LocalModel(config.local, opener) if config.local else _server(config)
        except ValueError as error:
            raise ConfigError(f"models: {name}: {error}") from error
    return models


def _server(config: ModelConfig) -> ServerModel:
    assert config.server is not None, "a config names one of the two"
    return ServerModel(config.server)


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

    def check(self, how: DecodingConfig) -> None:
        layout = locate(converted(self.config.path), self.config.modalities)
        fetch(layout.backbone, layout.revision, weights=False)
        check_form(how.schema, how.regex)

    @cached_property
    def grammars(self) -> Grammars:
        backbone = self.loaded.model.backbone
        return Grammars(self.loaded.processor.tokenizer, backbone.stop_ids, backbone.vocab_size)

    def answer(
        self, prompts: Sequence[Prompt], how: DecodingConfig, seed: int, room: int | None, advance: Callable[[], object]
    ) -> Iterator[dict[int, Reply]]:
        samples: Iterable[Sample | Failed]
        samples = (attempt(partial(self.loaded.encode, messages, id), id) for id, messages in prompts)
        if room is not None:
            samples = _within(samples, room, how.max_new_tokens)
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
        yield {place: replies[id] for place, (id, _) in enumerate(prompts) if id in replies}

    def grammar(self, how: DecodingConfig) -> Grammar | None:
        if how.schema is not None:
            return self.grammars.of_json_schema(how.schema)
        return None if how.regex is None else self.grammars.of_regex(how.regex)


def _within(samples: Iterable[Sample | Failed], room: int, max_new_tokens: int) -> list[Sample | Failed]:
    """The first samples, as many as there is room for with the longest answers."""
    found: list[Sample | Failed] = []
    for sample in samples:
        if isinstance(sample, Sample):
            room -= len(sample) + max_new_tokens
        if room < 0:
            break
        found.append(sample)
    return found


class ServerModel:
    """A model at an OpenAI-compatible address. What it draws again is the same only if the server says so of its
    seeds; what it has answered is kept."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.server = Server(config)
        self.identity: Any = [config.url, config.model]
        self.per_round = _ROUNDS * config.parallel

    def check(self, how: DecodingConfig) -> None:
        """The server says what it cannot do."""

    def answer(
        self, prompts: Sequence[Prompt], how: DecodingConfig, seed: int, room: int | None, advance: Callable[[], object]
    ) -> Iterator[dict[int, Reply]]:
        asked: list[Prompt] = []
        for id, messages in prompts:
            if room is not None and (room := room - most_tokens(messages, how)) < 0:
                break
            asked.append((id, messages))
        failed: dict[int, str] = {}
        threads = ThreadPoolExecutor(self.config.parallel)
        try:
            places = {threads.submit(self.reply, *prompt, how, seed): place for place, prompt in enumerate(asked)}
            for answered in as_completed(places):
                try:
                    reply = answered.result()
                except (Refused, Silent) as error:
                    failed[places[answered]] = str(error)
                else:
                    advance()
                    yield {places[answered]: reply}
        finally:
            threads.shutdown(cancel_futures=True)
        if failed:
            raise Unanswered(min(failed), failed[min(failed)])

    def reply(self, id: str, messages: Sequence[Message], how: DecodingConfig, seed: int) -> Reply:
        """What the server replies, or why this prompt has no reply. Raises Refused and Silent for what others would
        have as well."""
        try:
            said = [{**message, "content": _content(message)} for message in messages]
        except (OSError, ValueError) as error:
            return Reply("", "error", error=str(error))
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": said,
            "max_tokens": how.max_new_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "seed": seed_of(seed, id) >> 32,  # as many bits as every server takes
        }
        if how.stop:
            body["stop"] = how.stop
        if how.schema is not None:
            form = {"name": "answer", "schema": how.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        if how.regex is not None:
            body["response_format"] = {"type": "regex", "pattern": how.regex}
        try:
            return _read(self.server.complete(body), most_tokens(messages, how))
        except Refused as error:
            if error.passing or error.status in _HOPELESS:
                raise
            return Reply("", "error", error=str(error))


def most_tokens(messages: Sequence[Message], how: DecodingConfig) -> int:
    """The most tokens that a prompt and its answer can have on any server: no token is less than a byte. What a medium
    takes is not known, and put high."""
    content = [part for message in messages for part in parts(message)]
    text = sum(len(part.get("text", "").encode(errors="replace")) for part in content)
    media = sum(part["type"] != "text" for part in content)
    return text + media * _TOKENS_OF_MEDIUM + len(messages) * _TOKENS_OF_TURN + how.max_new_tokens


def _content(message: Message) -> Any:
    """What a message says, in OpenAI's parts. Raises OSError for a file that cannot be read, ValueError for a part that
    no server takes."""
    if isinstance(message["content"], str):
        return message["content"]
    return [dict(part) if part["type"] == "text" else _medium(part) for part in message["content"]]


def _medium(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] not in ("image", "audio") or not isinstance(part.get("path"), str):
        raise ConfigError(f"a server is sent pictures and sounds by the path of a file, not {part!r:.80}")
    path = Path(part["path"])
    data = base64.b64encode(path.read_bytes()).decode()
    if part["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix.lstrip(".").lower()}}
    kind = mimetypes.guess_type(path.name)[0] or "image/*"
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def _read(reply: bytes, most: int) -> Reply:
    """A chat completion. Its tokens are those that the server counts; where it counts none, the prompt has `most`."""
    try:
        body = json.loads(reply)
        (choice,) = body["choices"]
        text = choice["message"]["content"] or ""
        ended = choice.get("finish_reason")
        used = body.get("usage") or {}
        prompt_tokens, answer_tokens = used.get("prompt_tokens"), used.get("completion_tokens")
        if prompt_tokens is None or answer_tokens is None:
            prompt_tokens, answer_tokens = most, 0
        return Reply(text.strip(), ended if ended in _NOT_WHOLE else "stop", int(prompt_tokens), int(answer_tokens))
    except (ValueError, LookupError, TypeError, AttributeError):
        return Reply("", "error", error=f"no chat completion: {reply[:100]!r}")


def _weights(folder: Path) -> list[Path]:
    """The files of a backbone, a run or a modality that answers depend on; not the states of a run."""
    names = ("*.safetensors", "*.json", "*.jinja", "modalities/*/*.safetensors", "modalities/*/*.json")
    return sorted(path for name in names for path in folder.glob(name) if path.is_file())
