"""/v1/audio/transcriptions and /v1/audio/translations: what is said in a sound, as text."""

import io
from typing import Any, Literal

from molora.inference.sampling import Decoding
from molora.serve.asking import Refused, Request, refusal

Task = Literal["transcribe", "translate"]

FORMATS = ("json", "text", "verbose_json")
PART_TYPE = "audio"
# Fields that would change what is written, which the model is not told; an empty one asks for nothing.
_NOT_HONOURED = (
    "language",
    "prompt",
    "chunking_strategy",
    "timestamp_granularities[]",
    "include[]",
    "known_speaker_names[]",
)


def check(request: Request, form: dict[str, Any], task: Task) -> str:
    """The form that the text is wanted in. Raises Refused for what is not done here."""
    request.check_name()
    if PART_TYPE not in request.service.loaded.processor.part_types:
        raise Refused(
            f"{request.model} does not hear: it has no modality for parts of type {PART_TYPE!r}", None, "model"
        )
    for name, value in form.items():
        if name in _NOT_HONOURED and value not in ("", None, "segment"):
            raise Refused(f"{name} is not honoured here: the model is not told of it; leave it out", None, name)
        if name not in (*_NOT_HONOURED, "model", "file", "response_format", "temperature", "stream", "seed"):
            raise Refused(f"the field {name[:80]!r} is not honoured here; leave it out", None, name[:80])
    wanted = form.get("response_format") or "json"
    if wanted in ("srt", "vtt"):
        raise Refused(
            f"response_format {wanted}: the model does not know when words are said; ask for json or text",
            None,
            "response_format",
        )
    if wanted not in FORMATS:
        raise Refused(f"response_format {wanted[:80]!r} is none of {', '.join(FORMATS)}", None, "response_format")
    if form.get("stream") not in (None, "", "false", "False", "0"):
        raise Refused("stream is not honoured here; leave it out", None, "stream")
    return wanted


def number(form: dict[str, Any], name: str, kind: type[float] | type[int], default: Any) -> Any:
    """A field that holds a number. Raises Refused."""
    given = form.get(name)
    if given in (None, ""):
        return default
    try:
        return kind(given)
    except ValueError as error:
        raise Refused(f"{name} is {given[:80]!r}, and no number", None, name) from error


async def ask(request: Request, form: dict[str, Any], data: bytes, task: Task, id: str) -> None:
    """Says what is to be written down. Raises Refused."""
    service = request.service
    prompt = service.speech_prompt if task == "transcribe" else service.translation_prompt
    content = [{"type": PART_TYPE, "bytes": data}, {"type": "text", "text": prompt}]
    try:
        decoding = Decoding(
            max_new_tokens=service.max_new_tokens,
            temperature=number(form, "temperature", float, 0.0),
            seed=number(form, "seed", int, 0),
        )
        request.take_places(1)
        sample = await service.preparation.sample([{"role": "user", "content": content}], id)
    except ValueError as error:
        raise refusal(error, "file") from error
    request.ask([sample], decoding, strip=True)


async def whole(request: Request, data: bytes, wanted: str, task: Task) -> str | dict[str, Any]:
    """The text, in the form that is wanted."""
    (text,) = await request.texts()
    if wanted == "text":
        return text + "\n"
    usage = request.usage()
    tokens = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}
    told = {"text": text, "usage": {"type": "tokens", **tokens, "total_tokens": usage["total_tokens"]}}
    if wanted == "verbose_json":
        # The model tells no times and no language, so there are no segments and no name of one.
        told |= {"task": task, "language": None, "duration": _seconds(data), "segments": []}
    return {**told, "molora": request.about()}


def _seconds(data: bytes) -> float:
    import soundfile

    return soundfile.info(io.BytesIO(data)).duration
