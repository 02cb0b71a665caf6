"""The application: its paths, and what becomes of every error."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, UploadFile
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

import molora
from molora.serve import chat, completions, speech
from molora.serve.asking import Refused, Request, Service
from molora.serve.engine import Broken, Full, TooLate
from molora.serve.fields import ChatBody, CompletionBody, ErrorBody
from molora.serve.gate import Gate, error_body
from molora.serve.pages import add_pages
from molora.serve.replies import Events, Gone, Json, while_connected

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
        default_response_class=Json,
        responses=errors,
    )
    app.state.draining = False
    app.add_middleware(Gate, numbers=service.numbers, **gate)
    _add_errors(app)
    _add_answers(app, service)
    _add_speech(app, service)
    add_pages(app, service)

    @app.get("/v1/models")
    async def models() -> Any:
        """The model, and a name for each set of modalities that it takes."""
        about = {"object": "model", "created": 0, "owned_by": "molora"}
        parts = {name: part for part, name in service.loaded.processor.part_types.items()}
        listed = [
            {"id": name, **about, "parts": sorted(parts[each] for each in (parts if takes is None else takes))}
            for name, takes in service.names.items()
        ]
        return Json({"object": "list", "data": listed})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        """One of them."""
        if name not in service.names:
            raise Refused(f"there is no model {name[:80]!r} here", "model_not_found", "model", 404)
        return Json({"id": name, "object": "model", "created": 0, "owned_by": "molora"})

    @app.get("/health")
    async def health() -> Any:
        """Whether the model works."""
        broken = service.engine.failure is not None
        return Json({"status": "broken" if broken else "ok"}, status_code=503 if broken else 200)

    @app.get("/ready")
    async def ready() -> Any:
        """Whether new requests are welcome."""
        welcome = service.engine.failure is None and not app.state.draining
        return Json({"ready": welcome}, status_code=200 if welcome else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Any:
        """Counts and times, for Prometheus."""
        return Response(service.numbers.text(), media_type="text/plain; version=0.0.4")

    return app


def _id(http: HttpRequest, kind: str) -> str:
    return f"{kind}-{http.state.request_id}"


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Any:
        """Goes on with a conversation of text and media."""
        return await _answer(service, http, body, chat, "chatcmpl")

    @app.post("/v1/completions")
    async def text_completions(body: CompletionBody, http: HttpRequest) -> Any:
        """Goes on with texts."""
        return await _answer(service, http, body, completions, "cmpl")


async def _answer(service: Service, http: HttpRequest, body: Any, how: Any, kind: str) -> Response:
    request = Request(service, _id(http, kind), body.model, body.n or 1)
    try:
        await while_connected(http, how.ask(request, body, request.id))
        whole = None if body.stream else await while_connected(http, how.whole(request, body))
    except BaseException:
        request.close()
        raise
    if whole is None:
        return Events(how.events(request, body), request.close, _told)
    request.close()
    return whole


def _add_speech(app: FastAPI, service: Service) -> None:
    async def answer(http: HttpRequest, file: UploadFile, model: str, task: speech.Task) -> Response:
        form = {key: value for key, value in (await http.form()).multi_items() if key != "file"}
        request = Request(service, _id(http, "transcription"), model, 1)
        try:
            wanted = speech.check(request, form, task)
            data = await file.read()
            await while_connected(http, speech.ask(request, form, data, task, request.id))
            found = await while_connected(http, speech.whole(request, data, wanted, task))
        finally:
            request.close()
        return PlainTextResponse(found) if isinstance(found, str) else Json(found)

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(
        http: HttpRequest, file: Annotated[UploadFile, File()], model: Annotated[str, Form(min_length=1)]
    ) -> Any:
        """Writes down what is said in a sound."""
        return await answer(http, file, model, "transcribe")

    @app.post("/v1/audio/translations")
    async def translations(
        http: HttpRequest, file: Annotated[UploadFile, File()], model: Annotated[str, Form(min_length=1)]
    ) -> Any:
        """Writes down in English what is said in a sound."""
        return await answer(http, file, model, "translate")


def _told(error: Exception) -> dict[str, Any]:
    """The body of an error."""
    return json.loads(bytes(_response(error).body))


def _response(error: Exception) -> Response:
    """What a client gets for an error that is known, or of which it need not know more than that there is one."""
    match error:
        case Refused():
            body = error_body(str(error), "invalid_request_error", error.code, error.param)
            return Json(body, status_code=error.status)
        case Full():
            body = error_body(str(error), "rate_limit_error", "queue_full")
            return Json(body, status_code=429, headers={"retry-after": str(_RETRY_SECONDS)})
        case TooLate():
            return Json(error_body(str(error), "timeout_error", "deadline_exceeded"), status_code=504)
        case Broken():
            return Json(error_body(str(error), "server_error", "model_failed"), status_code=503)
        case Gone():
            return Json(error_body("the client has left", "server_error"), status_code=499)
        case RequestValidationError():
            return Json(_invalid(error), status_code=400)
        case HTTPException():
            body = error_body(str(error.detail), "invalid_request_error")
            return Json(body, status_code=error.status_code, headers=error.headers)
        case _:
            log.error("an error of the server", exc_info=error)
            return Json(error_body("an error of the server; its log says which", "server_error"), status_code=500)


def _invalid(error: RequestValidationError) -> dict[str, Any]:
    """The first of what is wrong with a body, with its place; its values are not repeated."""
    first = error.errors()[0]
    place = ".".join(str(each) for each in first["loc"] if each != "body")
    where = f"{place[:200]}: " if place else ""
    return error_body(
        f"{where}{first['msg'].removeprefix('Value error, ')}", "invalid_request_error", None, place[:200] or None
    )


def _add_errors(app: FastAPI) -> None:
    async def respond(http: HttpRequest, error: Exception) -> Response:
        return _response(error)

    for kind in (Refused, Full, TooLate, Broken, Gone, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
