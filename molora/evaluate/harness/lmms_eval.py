"""molora as a model of lmms-eval, the harness for models that see and hear; found by `--model molora`."""

import math
import mimetypes
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

from molora.data.messages import media
from molora.evaluate.harness.asking import (
    Asked,
    generation_config,
    open_model,
    replies,
    warn_of_failed,
    warn_of_unread,
)
from molora.inference.generate import attempt
from molora.pack import Sample
from molora.terminal import progress

# For tasks that do not say how long answers are.
_MAX_NEW_TOKENS = 1024


class ChatModel(lmms):
    """A run, or a backbone with modality folders, asked by messages.

    Arguments: `run`, a run folder or a backbone; `modalities` and `trust`, names apart by colons; `dtype`, `device`.
    Samples of any mix decode together, as many as have room, so `--batch_size` says nothing.
    """

    is_simple = False

    def __init__(
        self,
        run: str,
        modalities: str | None = None,
        trust: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.loaded = open_model(run, modalities, trust, dtype, device)
        self.device = self.loaded.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        warn_of_unread(self._given(request.args) for request in requests)
        asked = []
        for index, request in enumerate(requests):
            id = f"{index} ({request.task_name}, document {request.doc_id})"
            config = generation_config(self._given(request.args), _MAX_NEW_TOKENS)
            asked.append(Asked(id, partial(self._sample, id, request.args), config))
        return [
            GenerationResult(reply.text, TokenCounts(reply.prompt_tokens, reply.answer_tokens))
            for reply in replies(self.loaded, asked)
        ]

    def _sample(self, id: str, args: Sequence[Any]) -> Sample:
        return self.loaded.encode(self._messages(args), id)

    def _given(self, args: Sequence[Any]) -> Mapping[str, Any]:
        """The settings in the arguments of a request."""
        return args[2]

    def _messages(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        """The conversation in the arguments of a request."""
        _, doc_to_messages, _, doc_id, task, split = args
        return [_message(message) for message in doc_to_messages(self.task_dict[task][split][doc_id])]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        raise NotImplementedError("lmms-eval asks chat models for answers only; give --force_simple for likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("molora answers one round; leave out tasks of output_type generate_until_multi_round")


class SimpleModel(ChatModel):
    """The same, asked by a text with the media before it; with `--force_simple`, for tasks that compare likelihoods."""

    is_simple = True

    def _given(self, args: Sequence[Any]) -> Mapping[str, Any]:
        return args[1]

    def _messages(self, args: Sequence[Any]) -> list[dict[str, Any]]:
        # An answer's likelihood without its question, which some tasks compare with, has no document.
        text, _, doc_to_visual, doc_id, task, split = args if len(args) == 6 else (*args, None, None, None, None)
        shown = (doc_to_visual(self.task_dict[task][split][doc_id]) or ()) if doc_to_visual else ()
        content = [media(_kind(medium), medium) for medium in shown]
        return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The likelihoods of answers, without the spaces around them: the chat template has its own."""
        ids = [f"{index} ({request.task_name}, document {request.doc_id})" for index, request in enumerate(requests)]
        samples = (
            attempt(partial(self._answered, id, request.args), id) for id, request in zip(ids, requests, strict=True)
        )
        found: list[Any] = []
        failed: list[str] = []
        with progress() as bars:
            bar = bars.add_task("loglikelihood", total=len(requests), note="")
            for scored in self.loaded.scored(samples, keep_going=True):
                if scored.likelihood is None:
                    failed.append(str(scored.error))
                    pair = (-math.inf, False)
                else:
                    pair = (scored.likelihood.log_probability, scored.likelihood.is_greedy)
                found.append(GenerationResult(pair))  # lmms-eval makes a text of a bare pair
                bars.advance(bar)
        warn_of_failed(failed, len(requests), "a likelihood of 0")
        return found

    def _answered(self, id: str, args: Sequence[Any]) -> Sample:
        answer = args[1]
        if callable(answer):
            _, _, _, doc_id, task, split = args
            answer = answer(self.task_dict[task][split][doc_id])
        turn = {"role": "assistant", "content": str(answer).strip()}
        return self.loaded.encode_answered([*self._messages(args), turn], id)


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message of lmms-eval, whose media stand under `url` in whatever form, as one of ours."""
    content = given["content"]
    if isinstance(content, str):
        return {"role": given["role"], "content": content}
    parts = [part if part["type"] == "text" else media(part["type"], part["url"]) for part in content]
    return {"role": given["role"], "content": parts}


def _kind(medium: Any) -> str:
    """The type of part that a medium is, by what tasks give: PIL images, arrays of sound with their rate, paths."""
    if isinstance(medium, str):
        return (mimetypes.guess_type(medium)[0] or "video").partition("/")[0]
    return "audio" if isinstance(medium, Mapping) else "image"
