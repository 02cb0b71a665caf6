"""/v1/audio/transcriptions and /v1/audio/translations: what is said in a sound, as text."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from fastapi import File, Form, UploadFile
from pydantic import BeforeValidator

from molora.inference.sampling import Decoding
from molora.serve.answers import Transcription
from molora.serve.fields import Seed, Temperature
from molora.serve.request import Refused, Request, refusal

Task = Literal["transcribe", "translate"]
Format = Literal["json", "text", "verbose_json"]

PART_TYPE = "audio"
_PROMPTS: dict[Task, str] = {
    "transcribe": "Transcribe the audio clip into text.",
    "translate": "Translate the audio to English.",
}
# Fields that would change what is written, which is not done here, each with the values that change nothing.
_CHANGES_NOTHING: dict[str, tuple[str, ...]] = {
    "chunking_strategy": ("",),
    "include[]": ("",),
    "known_speaker_names[]": ("",),
    "language": ("",),
    "prompt": ("",),
    "stream": ("", "false", "False", "0"),
    "timestamp_granularities[]": ("", "segment"),
}


def _format_of(given: Any) -> Any:
    """Refuses the formats that hold times, in words of their own."""
    if given in ("srt", "vtt"):
        raise ValueError("the model does not know when words are said; ask for json or text")
    return given


def _file_of(given: Any) -> Any:
    if isinstance(given, str):
        raise ValueError("is a text; send the sound as a file, with a name")
    return given


@dataclass(frozen=True)
class SpeechForm:
    """A sound, and how what is said in it is written down."""

    file: Annotated[UploadFile, BeforeValidator(_file_of), File()]
    model: Annotated[str, Form(min_length=1)]
    response_format: Annotated[Format, BeforeValidator(_format_of), Form()] = "json"
    temperature: Annotated[Temperature, Form()] = 0.0
    seed: Annotated[Seed, Form()] = 0


def check(request: Request, given: Sequence[tuple[str, Any]]) -> None:
    """Raises Refused for a model that does not hear, and for fields that are unknown, stand twice, or ask for what is
    not done here."""
    if PART_TYPE not in request.service.loaded.processor.part_types:
        told = f"{request.model} does not hear: it has no modality for parts of type {PART_TYPE!r}"
        raise Refused(told, "model")
    known = [field.name for field in fields(SpeechForm)]
    times = Counter(name for name, _ in given)
    for name, value in given:
        if name not in known and value not in _CHANGES_NOTHING.get(name, ()):
            raise Refused(f"the field {name[:80]!r} is not honoured here; leave it out", name[:80])
        if name in known and times[name] > 1:
            raise Refused(f"the field {name!r} is given {times[name]} times; give it once", name)


async def ask(request: Request, form: SpeechForm, data: bytes, task: Task) -> None:
    """Says what is to be written down. Raises Refused."""
    service = request.service
    try:
        decoding = Decoding(max_new_tokens=service.max_new_tokens, temperature=form.temperature, seed=form.seed)
    except ValueError as error:
        raise refusal(error, None) from error
    request.take_places(1)
    content = [{"type": PART_TYPE, "bytes": data}, {"type": "text", "text": _PROMPTS[task]}]
    try:
        sample = await service.preparation.sample([{"role": "user", "content": content}], request.id)
    except ValueError as error:
        raise refusal(error, "file") from error
    request.ask([sample], decoding, strip=True)


async def whole(request: Request, data: bytes, format: Format, task: Task) -> str | Transcription:
    """The text, in the form that is wanted."""
    (text,) = await request.texts()
    if format == "text":
        return text + "\n"
    usage = request.usage()
    told: Transcription = {
        "text": text,
        "usage": {
            "type": "tokens",
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        },
        "molora": request.about(),
    }
    if format == "verbose_json":
        # The model tells no times and no language, so there are no segments and no name of one.
        told["task"] = task
        told["language"] = None
        told["duration"] = _seconds(data)
        told["segments"] = []
    return told


def _seconds(data: bytes) -> float:
    import soundfile

    return soundfile.info(io.BytesIO(data)).duration
