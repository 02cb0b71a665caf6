"""What the bodies of requests hold. A field that nobody honours is refused, unless its value changes nothing."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from molora.received import MAX_JSON_DEPTH, is_deep

# Fields of clients that ask for something that is not done here, each with the values that ask for what is done anyway.
CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
# Fields about the request, not about its answer.
ABOUT_THE_REQUEST = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
MOST_CHOICES = 64
MOST_LIKELIEST = 20
MOST_TOOLS = 128


def _told(*rules: tuple[dict[str, Any], dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    """What the schema of a body says beside its fields: that others are refused, which values of those that are not
    honoured change nothing, and rules across fields, each a condition and what has to hold then."""

    def tell(schema: dict[str, Any]) -> None:
        schema["additionalProperties"] = False
        schema["properties"] |= {name: {"enum": [*values, None]} for name, values in CHANGES_NOTHING.items()}
        schema["properties"] |= {name: {} for name in ABOUT_THE_REQUEST}
        schema["allOf"] = [{"if": _has(condition), "then": _has(needed)} for condition, needed in rules]

    return tell


def _has(fields: dict[str, Any]) -> dict[str, Any]:
    return {"properties": fields, "required": list(fields)}


def _whole(given: Any) -> Any:
    """In JSON 1.0 is a whole number too, and some languages know no other. This stands behind bounds, which would be
    missing in the schema else."""
    return int(given) if isinstance(given, float) and given.is_integer() else given


Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
# All of 64 bits, within bounds that stay what they are when OpenAPI tells them as floats.
Seed = Annotated[int, Field(ge=-(10**19), le=10**19), BeforeValidator(_whole)]


class StreamOptions(BaseModel):
    """What a stream tells beside the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Function(BaseModel):
    """A function by its name, with what it does, and a JSON schema of its parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """What the model may call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: Function

    def as_told(self) -> dict[str, Any]:
        """As chat templates take it."""
        of = self.function
        told = {"name": of.name, "description": of.description, "parameters": of.parameters}
        return {"type": self.type, "function": {key: value for key, value in told.items() if value is not None}}


class FunctionName(BaseModel):
    """One of the tools, by its name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str


class NamedTool(BaseModel):
    """The tool that the answer has to call."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["function"]
    function: FunctionName


_STREAMED = ({"stream_options": {"type": "object"}}, {"stream": {"const": True}})
_ECHOED = ({"max_tokens": {"const": 0}}, {"echo": {"const": True}})
_UNSTREAMED = ({"echo": {"const": True}, "stream": {"type": "boolean"}}, {"stream": {"const": False}})


class Body(BaseModel):
    """What requests have in common."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_deep(cls, given: Any) -> Any:
        if isinstance(given, dict) and is_deep(given):
            raise ValueError(f"the body is nested deeper than {MAX_JSON_DEPTH} levels; make it flatter")
        return given


class ConversationBody(Body):
    """What requests with messages have in common."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])]


class GenerationBody(Body):
    """What requests for answers have in common."""

    max_tokens: Annotated[int, Field(ge=1, le=2**31), BeforeValidator(_whole)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31), BeforeValidator(_whole)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(_whole)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _refuse_what_is_not_honoured(self) -> "GenerationBody":
        for name, value in (self.model_extra or {}).items():
            if value is None or name in ABOUT_THE_REQUEST:
                continue
            known = CHANGES_NOTHING.get(name, ())
            if not known:
                raise ValueError(f"the field {name[:80]!r} is not honoured here; leave it out")
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in known):
                other = " or ".join(repr(each) for each in known)
                raise ValueError(f"the field {name!r} is honoured only as {other}; leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for a stream; set stream, or leave them out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; an empty one ends none."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatBody(GenerationBody, ConversationBody):
    """A conversation to go on with. Messages are OpenAI's; parts of a message are `text`, `image_url`, `input_audio`,
    `audio_url`, and those of the model's own modalities."""

    model_config = ConfigDict(
        json_schema_extra=_told(
            _STREAMED,
            ({"top_logprobs": {"enum": list(range(1, MOST_LIKELIEST + 1))}}, {"logprobs": {"const": True}}),
        )
    )

    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31), BeforeValidator(_whole)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST), BeforeValidator(_whole)] | None = None
    response_format: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true; set it, or leave top_logprobs out")
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer has to call a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def callable_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        tools = [] if self.tool_choice == "none" else self.tools or []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in tools if tool.function.name == self.tool_choice.function.name]
        return tools

    @property
    def told_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.as_told() for tool in self.tools or ()]

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, by its older name, its newer, or both."""
        return min((each for each in (self.max_tokens, self.max_completion_tokens) if each is not None), default=None)


class CompletionBody(GenerationBody):
    """Texts to go on with, as they are or as token ids, without a template. With `echo` an answer begins with its
    prompt, and `max_tokens` may be 0."""

    model_config = ConfigDict(json_schema_extra=_told(_STREAMED, _ECHOED, _UNSTREAMED))

    prompt: Annotated[
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[int, Field(ge=0), BeforeValidator(_whole)]], Field(min_length=1)]
        | Annotated[list[list[Annotated[int, Field(ge=0), BeforeValidator(_whole)]]], Field(min_length=1)],
        Field(examples=["Once upon a time"]),
    ]
    max_tokens: Annotated[int, Field(ge=0, le=2**31), BeforeValidator(_whole)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELIEST), BeforeValidator(_whole)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0, which leaves nothing to answer without echo; ask for one or more")
        if self.echo and self.stream:
            raise ValueError("echo and stream do not go together here; leave one out")
        return self
