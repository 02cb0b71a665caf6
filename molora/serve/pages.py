"""The pages that people open in a browser. All that they need comes from here, and they keep nothing."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from molora.serve.examples import own_parts, read_examples
from molora.serve.replies import Json
from molora.serve.request import Service

_FOLDER = Path(__file__).parent / "web"
# Pages may load from this server alone, show media that they hold, and be framed by none. No text becomes HTML or code.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self)",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # A browser asks whether its copy still holds, so that a page and its scripts are of one version.
    "Cache-Control": "no-cache",
}


class _Files(StaticFiles):
    def file_response(self, *args: Any, **more: Any) -> Response:
        response = super().file_response(*args, **more)
        response.headers.update(_HEADERS)
        return response


def add_pages(app: FastAPI, service: Service) -> None:
    """The chat, what it is made of, and what it shows before a chat begins."""
    run = service.loaded.layout.run
    shown = {
        "examples": read_examples(run and run.folder),
        "parts": own_parts(service.loaded.processor),
    }

    @app.get("/", include_in_schema=False)
    async def chat() -> Any:
        return FileResponse(_FOLDER / "chat.html", headers=_HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Any:
        return FileResponse(_FOLDER / "docs.html", headers=_HEADERS)

    app.mount("/web", _Files(directory=_FOLDER))

    @app.get("/examples", include_in_schema=False)
    async def examples() -> Any:
        return Json(shown)
