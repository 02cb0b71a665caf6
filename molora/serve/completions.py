"""/v1/completions: texts gone on with, without a template; with `echo` and `logprobs`, how likely texts are."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from molora.inference.sampling import TokenLikelihood
from molora.pack import Sample
from molora.serve.answers import Completion, CompletionChoice, CompletionLogprobs
from molora.serve.fields import CompletionBody
from molora.serve.replies import Json, finite
from molora.serve.request import Choice, Refused, Request, refusal


async def ask(request: Request, body: CompletionBody) -> None:
    """Reads a body and says what is to be gone on with. Raises Refused."""
    decoding = request.service.decoding(
        body,
        # An answer is a token at least, which `whole` leaves out where none is wanted.
        1 if body.max_tokens == 0 else body.max_tokens,
        num_likeliest=body.logprobs,
        score_prompt=bool(body.echo) and body.logprobs is not None,
    )
    prompts = _prompts(body)
    request.take_places(len(prompts))
    samples = []
    for index, prompt in enumerate(prompts):
        try:
            ids = await request.service.preparation.text_ids(prompt) if isinstance(prompt, str) else prompt
        except ValueError as error:
            raise refusal(error, "prompt") from error
        samples.append(_sample(request, f"{request.id}-{index}", ids))
    request.ask(samples, decoding, strip=False)


def _prompts(body: CompletionBody) -> Sequence[str | list[int]]:
    given: Any = body.prompt
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _sample(request: Request, id: str, ids: Sequence[int]) -> Sample:
    backbone = request.service.loaded.model.backbone
    if not ids:
        raise Refused("the prompt has no token; write some text", "prompt")
    if (highest := max(ids)) >= backbone.num_embeddings:
        raise Refused(f"the prompt holds the token {highest}, and there are {backbone.num_embeddings}", "prompt")
    if len(ids) > backbone.max_tokens:
        told = f"the prompt has {len(ids):,} tokens, and at most {backbone.max_tokens:,} fit; shorten it"
        raise Refused(told, "prompt", "context_length_exceeded")
    return Sample.of_text(id, ids)


async def whole(request: Request, body: CompletionBody) -> Json:
    """All answers, when they are there."""
    texts = await request.texts()
    if body.max_tokens == 0:
        for choice in request.choices:
            texts[choice.index] = ""
            choice.tokens.clear()
            choice.likelihoods.clear()
            choice.finished = "length"
    # Likelihoods make it long.
    return await asyncio.to_thread(_whole, request, body, texts)


def _whole(request: Request, body: CompletionBody, texts: Sequence[str]) -> Json:
    choices: list[CompletionChoice] = []
    for choice in request.choices:
        finished: Any = choice.finished
        echoed = choice.sample.token_ids_T.tolist() if body.echo else []
        choices.append(
            {
                "index": choice.index,
                "text": _text(request, echoed) + texts[choice.index],
                "logprobs": None if body.logprobs is None else _logprobs(request, choice, echoed),
                "finish_reason": finished,
            }
        )
    told: Completion = {"object": "text_completion", "choices": choices, **request.answered()}
    return Json(told)


async def events(request: Request, body: CompletionBody) -> AsyncGenerator[bytes, None]:
    """The answers as a client reads them: texts, each choice's last with what ended it, then, if it is asked for, what
    the request took."""
    told_characters = [0] * len(request.choices)
    async with aclosing(request.pieces()) as pieces:
        async for piece in pieces:
            choice = piece.choice
            if not (piece.text or choice.finished):
                continue
            logprobs = None
            if body.logprobs is not None:
                logprobs = _logprobs(request, choice, [], told_characters[choice.index])
                told_characters[choice.index] += sum(map(len, logprobs["tokens"]))
                choice.likelihoods.clear()
            shown = {"index": choice.index, "text": piece.text, "logprobs": logprobs, "finish_reason": choice.finished}
            yield request.chunk("text_completion", shown, body.stream_options)
    if body.stream_options and body.stream_options.include_usage:
        yield request.chunk("text_completion", None, body.stream_options)


def _text(request: Request, ids: Sequence[int]) -> str:
    return request.service.loaded.processor.tokenizer.decode(list(ids)) if ids else ""  # pyright: ignore[reportReturnType]


def _logprobs(request: Request, choice: Choice, echoed: Sequence[int], place: int = 0) -> CompletionLogprobs:
    """OpenAI's older form: lists of the same length, of texts that begin at `place`. The first token of all has no
    likelihood."""
    told: list[TokenLikelihood | None] = [None] * bool(echoed) + list(choice.prompt if echoed else ())
    told += choice.likelihoods
    tokens = [request.service.token_text(each.token_id if each else echoed[0]) for each in told]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(place)
        place += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if each is None else finite(each.log_probability) for each in told],
        "top_logprobs": [None if each is None else _top(request, each) for each in told],
        "text_offset": offsets,
    }


def _top(request: Request, each: TokenLikelihood) -> dict[str, float]:
    """The likeliest tokens by their text; of those with one text, the likeliest."""
    found: dict[str, float] = {}
    for token_id, log_probability in each.likeliest:
        found.setdefault(request.service.token_text(token_id), finite(log_probability))
    return found
