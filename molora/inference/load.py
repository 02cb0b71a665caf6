"""Opening what was trained: a run, or a backbone with modality folders, as something that answers."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from molora.checkpoint.assembly import RouterConfig
from molora.checkpoint.opening import Layout, open_model, plan_model
from molora.convert.release import converted
from molora.data.messages import Message
from molora.data.processor import Processor
from molora.inference.frames import FrameMemory
from molora.inference.generate import Failed, GenerationConfig, Step, attempt, generate
from molora.media import MediaPolicy
from molora.model.molora import MoLoRA
from molora.pack import Sample
from molora.ranks import pick_device


@dataclass(frozen=True)
class Answer:
    """A finished answer, ended by the model ("stop"), by a limit ("length") or by an "error", and `error` says why."""

    id: str
    text: str
    adapters: tuple[str, ...]
    prompt_tokens: int
    answer_tokens: int
    finished: Literal["stop", "length", "error"]
    error: Exception | None = None


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

    def encode(self, messages: Sequence[Message], id: str = "0") -> Sample:
        """A conversation as a sample to answer."""
        return self.processor.encode(messages, id, generate=True)

    def answers(
        self, samples: Iterable[Sample | Failed], config: GenerationConfig | None = None, *, keep_going: bool = False
    ) -> Iterator[Answer]:
        """Answers in the order in which they finish. Sample ids must be unique. With `keep_going` a sample that fails
        is an answer with its error; else its error is raised."""
        known: dict[str, Sample] = {}

        def remembered() -> Iterator[Sample | Failed]:
            for sample in samples:
                if isinstance(sample, Sample):
                    if sample.id in known:
                        raise ValueError(f"two samples have the id {sample.id!r}; answers could not be told apart")
                    known[sample.id] = sample
                yield sample

        steps = generate(self.model, remembered(), config, keep_going=keep_going, frames=self.frames)
        for step, tokens in _gathered(steps):
            if step.finished:
                sample = known.pop(step.id, None)
                modalities = frozenset() if sample is None else sample.modalities
                adapters = () if sample is None else tuple(sorted(self.model.router.adapters(modalities)))
                text = self.processor.decode(tokens).strip()
                yield Answer(step.id, text, adapters, len(sample or ()), len(tokens), step.finished, step.error)

    def stream(self, messages: Sequence[Message], config: GenerationConfig | None = None) -> Iterator[str]:
        """Pieces of the answer to one conversation, as text that is final."""
        shown = ""
        for step, tokens in _gathered(generate(self.model, [self.encode(messages)], config, frames=self.frames)):
            text = self.processor.decode(tokens)
            # A character that spans several tokens shows as U+FFFD until its last one.
            if text.startswith(shown) and (step.finished or not text.endswith("\ufffd")):
                yield text[len(shown) :]
                shown = text


def _gathered(steps: Iterable[Step]) -> Iterator[tuple[Step, list[int]]]:
    """Every step with the tokens of its sample's answer so far, of which a stop token is none."""
    answers: dict[str, list[int]] = {}
    for step in steps:
        tokens = answers.setdefault(step.id, [])
        if step.finished in (None, "length"):
            tokens.append(step.token_id)
        if step.finished:
            del answers[step.id]
        yield step, tokens


def load(
    source: str | Path,
    modalities: Sequence[str | Path] = (),
    *,
    router: RouterConfig | None = None,
    dtype: str | None = None,
    device: str | None = None,
    allow_urls: bool = False,
    allow_private_addresses: bool = False,
    trust: Sequence[str] = (),
    deterministic_batch: bool = False,
) -> LoadedModel:
    """Opens a run folder, or a backbone (folder or hub id) with modality folders.

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
        media_policy=MediaPolicy(allow_urls=allow_urls, allow_private_addresses=allow_private_addresses),
        trust=trust,
    )
    model, processor = open_model(plan, pick_device(device))
    model.deterministic_batch = deterministic_batch
    return LoadedModel(model.eval(), processor, Layout(str(plan.backbone.path), dict(plan.folders), plan.run))
