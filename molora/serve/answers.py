"""What the bodies of answers hold, as OpenAI's clients read them, with `molora` for what is ours."""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class ErrorInside(TypedDict):
    """What is wrong: in words, of which kind, with which field, and a name for it where it has one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """An error."""

    error: ErrorInside


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> ErrorBody:
    """An error of a kind, where known with its name and the field that is wrong."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Health(TypedDict):
    """Whether the model works."""

    status: Literal["ok", "broken"]


class Readiness(TypedDict):
    """Whether new requests are welcome."""

    ready: bool


class Model(TypedDict):
    """A name to ask for, and the types of parts that it takes beside text."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["molora"]
    parts: list[str]


class Models(TypedDict):
    """All names to ask for."""

    object: Literal["list"]
    data: list[Model]


class PromptTokens(TypedDict):
    """Of a prompt's tokens, those that were not computed again, and those of sounds."""

    cached_tokens: int
    audio_tokens: int


class Usage(TypedDict):
    """The tokens of a request, and the adapters that ran."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    adapters: list[str]
    media_tokens: dict[str, int]


class About(TypedDict):
    """The adapters that ran, the seed, and the tokens of each medium."""

    adapters: list[str]
    seed: int
    media_tokens: dict[str, int]


class Answered(TypedDict):
    """What answers have in common."""

    id: str
    created: int
    model: str
    usage: Usage
    molora: About


class Token(TypedDict):
    """A token's text, its log probability, and its bytes if it is no part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class AnswerToken(Token):
    """A token of an answer, beside the likeliest in its place."""

    top_logprobs: list[Token]


class ChatLogprobs(TypedDict):
    """How likely an answer's tokens were."""

    content: list[AnswerToken]
    refusal: None


class CalledFunction(TypedDict):
    """A function's name, and its arguments as JSON."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class Chat(Answered):
    """The answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(TypedDict):
    """Tokens, how likely they were, the likeliest in their places, and where in the text they begin."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Answered):
    """What goes on with the texts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TranscriptionUsage(TypedDict):
    """The tokens of a transcription."""

    type: Literal["tokens"]
    input_tokens: int
    output_tokens: int
    total_tokens: int


class Transcription(TypedDict):
    """What is said in a sound; the last four fields with `verbose_json`. The model tells no language and no times."""

    text: str
    usage: TranscriptionUsage
    molora: About
    task: NotRequired[Literal["transcribe", "translate"]]
    language: NotRequired[None]
    duration: NotRequired[float]
    segments: NotRequired[list[Any]]
