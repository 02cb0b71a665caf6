"""The application: its paths, and what becomes of every error."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

import molora
from molora.serve import chat, completions, speech
from molora.serve.answers import (
    Chat,
    Completion,
    ErrorBody,
    Health,
    Model,
    Models,
    Readiness,
    Transcription,
    error_body,
)
from molora.serve.engine import Broken, Full, TooLate
from molora.serve.fields import ChatBody, CompletionBody
from molora.serve.gate import Gate
from molora.serve.metrics import RequestMetrics
from molora.serve.pages import add_pages
from molora.serve.replies import Events, Gone, Json, while_connected
from molora.serve.request import Names, Refused, Request, Service

log = logging.getLogger("molora.serve")

# What a client that finds no room waits before it asks again.
_RETRY_SECONDS = 1


def make_app(service: Service, **gate: Any) -> FastAPI:
    """The application that serves a model, behind a `Gate` with these settings. The engine starts and ends with it."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await service.engine.stop()

    async def works() -> bool:
        return service.engine.failure is None

    app = begin_app(life, service.names, works, service.metrics, **gate)
    _add_answers(app, service)
    _add_speech(app, service)
    add_pages(app, service)
    return app


def begin_app(
    life: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    names: Names,
    works: Callable[[], Awaitable[bool]],
    metrics: RequestMetrics,
    **gate: Any,
) -> FastAPI:
    """An application that answers nothing yet: what becomes of errors, which names there are, and whether it works."""
    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is, or not now."},
        "5XX": {"model": ErrorBody, "description": "The server cannot answer."},
    }
    app = FastAPI(
        title="molora",
        version=molora.__version__,
        lifespan=life,
        docs_url=None,  # of this server's own, as FastAPI's is fetched from elsewhere
        redoc_url=None,
        # A redirect would lead who came through a proxy's TLS to plain HTTP.
        redirect_slashes=False,
        default_response_class=Json,
        responses=errors,
    )
    app.state.draining = False
    app.add_middleware(Gate, metrics=metrics, **gate)
    _add_errors(app)
    _add_models(app, names)
    _add_state(app, works, metrics)
    return app


def _add_models(app: FastAPI, names: Names) -> None:
    parts = {name: part for part, name in names.part_types.items()}

    def about(name: str) -> Model:
        takes = names.takes(name)
        types = sorted(parts[each] for each in (parts if takes is None else takes))
        return {"id": name, "object": "model", "created": 0, "owned_by": "molora", "parts": types}

    @app.get("/v1/models")
    async def models() -> Models:
        """The model, and a name for each set of modalities that it takes."""
        return {"object": "list", "data": [about(name) for name in names.known]}

    @app.get("/v1/models/{name:path}")  # which may have a slash, as those of hubs do
    async def model(name: str) -> Model:
        """One of them."""
        return about(name)


def _add_state(app: FastAPI, works: Callable[[], Awaitable[bool]], metrics: RequestMetrics) -> None:
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Json:
        """Whether the model works."""
        well = await works()
        told: Health = {"status": "ok" if well else "broken"}
        return Json(told, status_code=200 if well else 503)

    @app.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
    async def ready() -> Json:
        """Whether new requests are welcome."""
        told: Readiness = {"ready": not app.state.draining and await works()}
        return Json(told, status_code=200 if told["ready"] else 503)

    @app.get("/metrics", response_class=Response, responses=also("text/plain", {"type": "string"}))
    async def counts() -> Response:
        """Counts and times, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def also(media_type: str, schema: dict[str, str]) -> dict[int | str, dict[str, Any]]:
    """What the API's description says of an answer that may be no JSON."""
    return {200: {"content": {media_type: {"schema": schema}}}}


def _id(http: HttpRequest, kind: str) -> str:
    return f"{kind}-{http.state.request_id}"


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=Chat, responses=also("text/event-stream", {}))
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        """Goes on with a conversation of text and media."""
        return await _answer(service, http, body, chat, "chatcmpl")

    @app.post("/v1/completions", response_model=Completion, responses=also("text/event-stream", {}))
    async def text_completions(body: CompletionBody, http: HttpRequest) -> Response:
        """Goes on with texts."""
        return await _answer(service, http, body, completions, "cmpl")


async def _answer(service: Service, http: HttpRequest, body: Any, how: Any, kind: str) -> Response:
    """What the module `how` answers to a body, whole or as a stream."""
    request = Request(service, _id(http, kind), body.model, body.n or 1)
    try:
        await while_connected(http, how.ask(request, body))
        whole = None if body.stream else await while_connected(http, how.whole(request, body))
    except BaseException:
        request.close()
        raise
    if whole is None:
        return Events(how.events(request, body), request.close, lambda error: told_of(error)[1])
    request.close()
    return whole


def _add_speech(app: FastAPI, service: Service) -> None:
    def add(path: str, task: speech.Task, about: str) -> None:
        @app.post(
            path,
            name=task,
            description=about,
            response_model=Transcription,
            responses=also("text/plain", {"type": "string"}),
        )
        async def answer(http: HttpRequest, form: Annotated[speech.SpeechForm, Depends()]) -> Response:
            request = Request(service, _id(http, "transcription"), form.model, 1)
            try:
                speech.check(request, (await http.form()).multi_items())
                data = await form.file.read()
                await while_connected(http, speech.ask(request, form, data, task))
                found = await while_connected(http, speech.whole(request, data, form.response_format, task))
            finally:
                request.close()
            return PlainTextResponse(found) if isinstance(found, str) else Json(found)

    add("/v1/audio/transcriptions", "transcribe", "Writes down what is said in a sound.")
    add("/v1/audio/translations", "translate", "Writes down in English what is said in a sound.")


def told_of(error: Exception) -> tuple[int, ErrorBody]:
    """The status and the body for an error that is known, or of which a client need not know more than that it is."""
    match error:
        case Refused():
            return error.status, error_body(str(error), "invalid_request_error", error.code, error.param)
        case Full():
            return 429, error_body(str(error), "rate_limit_error", "queue_full")
        case TooLate():
            return 504, error_body(str(error), "timeout_error", "deadline_exceeded")
        case Broken():
            return 503, error_body(str(error), "server_error", "model_failed")
        case Gone():
            return 499, error_body("the client has left", "server_error")
        case RequestValidationError():
            return 400, _invalid(error)
        case HTTPException(status_code=404 | 405):
            told = f"{error.detail}: there is no such path or method here; /docs shows what there is"
            return error.status_code, error_body(told, "invalid_request_error")
        case HTTPException(__cause__=Exception() as cause):  # which FastAPI leaves out of what it tells
            told = f"the body cannot be read: {str(cause)[:200]}"
            return error.status_code, error_body(told, "invalid_request_error")
        case HTTPException():
            return error.status_code, error_body(str(error.detail), "invalid_request_error")
        case _:
            log.error("an error of the server", exc_info=error)
            return 500, error_body("an error of the server; its log says which", "server_error")


def _invalid(error: RequestValidationError) -> ErrorBody:
    """The first of what is wrong with a body, with its place; its values are not repeated."""
    first = _furthest(error.errors())
    if first["type"] == "json_invalid":
        told = f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
        return error_body(told, "invalid_request_error")
    if first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        told = "the body is no object in JSON; send one, with Content-Type: application/json"
        return error_body(told, "invalid_request_error")
    place = _place([each for each in first["loc"] if each != "body"], error.body)
    where = f"{place[:200]}: " if place else ""
    message = where + first["msg"].removeprefix("Value error, ")
    return error_body(message, "invalid_request_error", None, place[:200] or None)


def _furthest(errors: Sequence[Any]) -> Any:
    """Of what is wrong with the first field that is wrong, what is said by the form that the field is closest to: of
    `stop`, which is a text or a list, that the list is too long, and not that it is no text."""
    of_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    return min(of_field, key=lambda each: (each["type"].endswith("_type"), -len(each["loc"])))


def _place(steps: Sequence[int | str], body: Any) -> str:
    """The place that steps lead to in a body, without those that name a form that a field may have."""
    place: list[str] = []
    for number, step in enumerate(steps, 1):
        inside = _has(body, step)
        # The last may be what is missing.
        if inside or not place or (number == len(steps) and isinstance(body, Mapping)):
            place.append(str(step))
        if inside:
            body = body[step]
    return ".".join(place)


def _has(value: Any, step: int | str) -> bool:
    """Whether a step leads from an object or a list to what is in it."""
    return step in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(step, int)


def _add_errors(app: FastAPI) -> None:
    async def respond(http: HttpRequest, error: Exception) -> Response:
        status, body = told_of(error)
        headers = error.headers if isinstance(error, HTTPException) else None
        if isinstance(error, Full):
            headers = {"retry-after": str(_RETRY_SECONDS)}
        return Json(body, status_code=status, headers=headers)

    for kind in (Refused, Full, TooLate, Broken, Gone, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
