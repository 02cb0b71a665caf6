"""/v1/audio/transcriptions and /v1/audio/translations: what is said in a sound, as text."""

import io
from collections.abc import Mapping
from typing import Any, Literal

from molora.inference.sampling import Decoding
from molora.serve.answers import Transcription
from molora.serve.request import Refused, Request, refusal

Task = Literal["transcribe", "translate"]
Format = Literal["json", "text", "verbose_json"]

PART_TYPE = "audio"
_PROMPTS: dict[Task, str] = {
    "transcribe": "Transcribe the audio clip into text.",
    "translate": "Translate the audio to English.",
}
# Fields that would change what is written, which the model is not told; an empty one asks for nothing.
_NOT_HONOURED = (
    "language",
    "prompt",
    "chunking_strategy",
    "timestamp_granularities[]",
    "include[]",
    "known_speaker_names[]",
)


def format_of(given: Any) -> Any:
    """Refuses the formats that hold times, in words of their own."""
    if given in ("srt", "vtt"):
        raise ValueError("the model does not know when words are said; ask for json or text")
    return given


def check(request: Request, fields: Mapping[str, Any]) -> None:
    """Raises Refused for a model that does not hear, and for fields that ask for what is not done here."""
    if PART_TYPE not in request.service.loaded.processor.part_types:
        told = f"{request.model} does not hear: it has no modality for parts of type {PART_TYPE!r}"
        raise Refused(told, "model")
    for name, value in fields.items():
        if name in _NOT_HONOURED and value not in ("", "segment"):
            raise Refused(f"{name} is not honoured here: the model is not told of it; leave it out", name)
        if name not in (*_NOT_HONOURED, "stream"):
            raise Refused(f"the field {name[:80]!r} is not honoured here; leave it out", name[:80])
    if fields.get("stream") not in (None, "", "false", "False", "0"):
        raise Refused("stream is not honoured here; leave it out", "stream")


async def ask(request: Request, data: bytes, task: Task, temperature: float, seed: int) -> None:
    """Says what is to be written down. Raises Refused."""
    service = request.service
    content = [{"type": PART_TYPE, "bytes": data}, {"type": "text", "text": _PROMPTS[task]}]
    try:
        decoding = Decoding(max_new_tokens=service.max_new_tokens, temperature=temperature, seed=seed)
        request.take_places(1)
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
