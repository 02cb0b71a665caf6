"""Opening what was trained: a run, or a backbone with modality folders, as something that answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.opening import Layout, open_model, plan_model
from molora.convert.release import converted
from molora.data.messages import Message
from molora.data.processor import Processor
from molora.data.prompt import Tools
from molora.inference.frames import FrameMemory
from molora.inference.generate import Failed, GenerationConfig, Step, attempt, generate
from molora.inference.grammar import Grammar
from molora.inference.likelihood import Scored, score
from molora.inference.text import FinalText, before, ends_at
from molora.media import MediaPolicy
from molora.modality import Prepared
from molora.model.molora import MoLoRA
from molora.model.quantization import Quantization
from molora.pack import Sample
from molora.ranks import pick_device

# What a likelihood is asked for: a prompt, which is a conversation, and how its answer begins.
Request = tuple[Sequence[Message], str]


@dataclass(frozen=True)
class Answer:
    """A finished answer, ended by the model ("stop"), by a limit ("length") or by an "error", and `error` says why.
    `text` is what its tokens say, without the spaces around it."""

    id: str
    text: str
    adapters: tuple[str, ...]
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finished: Literal["stop", "length", "error"]
    error: Exception | None = None

    @property
    def answer_tokens(self) -> int:
        return len(self.token_ids)


class LoadedModel:
    """A model with its processor. `generate` answers conversations; `stream` yields one answer as it comes. `layout`
    says where the parts of one that was loaded lie. Media that appear again, in the next turn of a chat or in other
    questions, are encoded once, as long as `frame_memory_mib` holds their frames."""

    def __init__(
        self, model: MoLoRA, processor: Processor, layout: Layout | None = None, *, frame_memory_mib: int = 256
    ) -> None:
        self.model = model
        self.processor = processor
        self.layout = layout or Layout("", {}, None)
        self.frames = FrameMemory(model, frame_memory_mib * 2**20)

    def generate(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        config: GenerationConfig | None = None,
        *,
        errors: Literal["raise", "return"] = "raise",
    ) -> Any:
        """The answer to a conversation as text, or to several, any mix, as a list in their order.

        A conversation that cannot be answered raises its error, which names it by its place. With `errors="return"` the
        error stands in its place in the list, and the others are answered.

        Raises what `Processor.encode` raises (such as MediaError), SampleFailed for a sample that an encoder fails on,
        NotFinite for one whose logits are NaN or infinite.
        """
        single = bool(conversations) and isinstance(conversations[0], Mapping)
        several: Any = [conversations] if single else conversations
        ids = [str(index) for index in range(len(several))]
        samples = (attempt(partial(self.encode, several[index], id), id) for index, id in enumerate(ids))
        answers = {answer.id: answer for answer in self.answers(samples, config, keep_going=errors == "return")}
        given = [answers[id].error or answers[id].text for id in ids]
        return given[0] if single else given

    def likelihoods(self, requests: Sequence[Request], *, errors: Literal["raise", "return"] = "raise") -> list[Any]:
        """How probable each request's continuation is as the answer to its prompt, a `Likelihood` each, in their order.

        What the model writes to end an answer is not counted, so that a continuation may be an answer's beginning.
        Media of a prompt that several requests share are encoded once. With `errors="return"` a request that cannot be
        scored has its error in its place; else the error is raised, and names the request by its place.

        Raises what `encode_answered` raises, SampleFailed and NotFinite as `generate` does.
        """
        known: dict[Any, Prepared] = {}

        def sample(index: int) -> Sample:
            prompt, continuation = requests[index]
            if index and prompt is not requests[index - 1][0]:
                known.clear()
            answered = [*prompt, {"role": "assistant", "content": continuation}]
            return self.encode_answered(answered, str(index), known)

        samples = (attempt(partial(sample, index), str(index)) for index in range(len(requests)))
        scored = self.scored(samples, keep_going=errors == "return")
        return [each.error or each.likelihood for each in scored]

    def encode(self, messages: Sequence[Message], id: str = "0", tools: Tools = ()) -> Sample:
        """A conversation as a sample to answer, with `tools` that the model may call."""
        return self.processor.encode(messages, id, generate=True, tools=tools)

    def encode_answered(
        self, messages: Sequence[Message], id: str = "0", known: dict[Any, Prepared] | None = None
    ) -> Sample:
        """A conversation as a sample whose targets are the tokens of its last message, an assistant's, as training has
        them, but for those that end it. `known` is what `Processor.encode` keeps of media.

        Raises what `Processor.encode` raises, and ValueError for a conversation that does not end with an answer."""
        if not messages or not isinstance(messages[-1], Mapping) or messages[-1].get("role") != "assistant":
            raise ValueError(f"sample {id}: does not end with an assistant message, the answer to score; add it")
        turns = [*map(_unlearned, messages[:-1]), {**messages[-1], "train": True}]
        sample = self.processor.encode(turns, id, known=known)
        stop_ids = self.model.backbone.stop_ids
        places = sample.targets_T.nonzero().squeeze(1).tolist()
        said = list(takewhile(lambda place: int(sample.token_ids_T[place]) not in stop_ids, places))
        if not said:
            raise ValueError(f"sample {id}: its answer is empty, which leaves nothing to score; write one")
        targets_T = torch.zeros_like(sample.targets_T)
        targets_T[said] = True
        return replace(sample, targets_T=targets_T)

    def scored(self, samples: Iterable[Sample | Failed], *, keep_going: bool = False) -> Iterator[Scored]:
        """The likelihoods of the targets of samples, in their order; see `molora.inference.likelihood.score`."""
        return score(self.model, samples, keep_going=keep_going, frames=self.frames)

    def answers(
        self,
        samples: Iterable[Sample | Failed],
        config: GenerationConfig | None = None,
        *,
        keep_going: bool = False,
        grammar: Grammar | None = None,
    ) -> Iterator[Answer]:
        """Answers in the order in which they finish, each held to `grammar`. Sample ids must be unique. With
        `keep_going` a sample that fails is an answer with its error; else its error is raised."""
        known: dict[str, Sample] = {}

        def remembered() -> Iterator[Sample | Failed]:
            for sample in samples:
                if isinstance(sample, Sample):
                    if sample.id in known:
                        raise ValueError(f"two samples have the id {sample.id!r}; answers could not be told apart")
                    known[sample.id] = sample
                yield sample

        for step, tokens in self._steps(remembered(), config, keep_going, grammar):
            if step.finished:
                sample = known.pop(step.id, None)
                modalities = frozenset() if sample is None else sample.modalities
                adapters = () if sample is None else tuple(sorted(self.model.router.adapters(modalities)))
                text = self.text(tokens, config).strip()
                yield Answer(step.id, text, adapters, len(sample or ()), tuple(tokens), step.finished, step.error)

    def stream(self, messages: Sequence[Message], config: GenerationConfig | None = None) -> Iterator[str]:
        """Pieces of the answer to one conversation, as text that is final."""
        text = FinalText(self.processor.decode, config.stop if config else ())
        for step, tokens in self._steps([self.encode(messages)], config, False):
            yield text.piece(tokens, step.finished is not None)

    def text(self, tokens: Sequence[int], config: GenerationConfig | None = None) -> str:
        """What an answer's tokens say, up to the first text of the config's `stop`."""
        return before(self.processor.decode(tokens), config.stop if config else ())

    def _steps(
        self,
        samples: Iterable[Sample | Failed],
        config: GenerationConfig | None,
        keep_going: bool,
        grammar: Grammar | None = None,
    ) -> Iterator[tuple[Step, list[int]]]:
        """Every step with the tokens of its sample's answer so far, of which a stop token is none."""
        config = config or GenerationConfig()
        is_over = ends_at(self.processor.decode, config.stop)
        answers: dict[str, list[int]] = {}
        steps = generate(
            self.model,
            samples,
            config,
            keep_going=keep_going,
            frames=self.frames,
            is_over=is_over,
            grammar=grammar,
        )
        for step in steps:
            tokens = answers.setdefault(step.id, [])
            stops = step.token_id in self.model.backbone.stop_ids and not config.ignore_stop_tokens
            if step.finished != "error" and not stops:
                tokens.append(step.token_id)
            if step.finished:
                del answers[step.id]
            yield step, tokens


def _unlearned(message: Any) -> Any:
    """An earlier turn, which is not scored; what is no message is refused later."""
    is_answer = isinstance(message, Mapping) and message.get("role") == "assistant"
    return {**message, "train": False} if is_answer else message


def load(
    source: str | Path,
    modalities: Sequence[str | Path] = (),
    *,
    router: RouterConfig | None = None,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    device: str | None = None,
    allow_urls: bool = False,
    allow_private_addresses: bool = False,
    trust: Sequence[str] = (),
    deterministic_batch: bool = False,
) -> LoadedModel:
    """Opens a run folder, or a backbone (folder or hub id) with modality folders.

    `dtype` and `quantization` of the backbone are by default those of a run, or none; see `BackboneConfig`.

    Folders name their plugins. Those that are neither molora's nor declared by an installed package run only if `trust`
    names them, as `path/to/file.py:Class` or `package.module:Class`, or did so before; see `molora.checkpoint.trust`.

    `allow_urls`: whether media may be fetched over HTTP, whatever the messages say; `allow_private_addresses`: from
    inside a network too (see `MediaPolicy`). `deterministic_batch`: whether answers are the same bits whatever batch
    they are in, which takes as long as each alone.

    Raises ConfigError or ValueError naming the file that does not fit; Untrusted for code that `trust` does not name;
    BackboneRefused for a backbone that cannot run.
    """
    plan = plan_model(
        converted(source),
        modalities,
        router=router,
        dtype=dtype,
        quantization=quantization,
        media_policy=MediaPolicy(allow_urls=allow_urls, allow_private_addresses=allow_private_addresses),
        trust=trust,
    )
    model, processor = open_model(plan, pick_device(device))
    model.deterministic_batch = deterministic_batch
    return LoadedModel(model.eval(), processor, Layout(str(plan.backbone.path), dict(plan.folders), plan.run))
