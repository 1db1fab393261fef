"""The FastAPI application: routes, error handlers and layers around one Front."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app.api import compare, docs, health, images, models
from app.api.access import Access, Drain
from app.api.auth import Cors, authorize, read_origins
from app.api.errors import error_response, on_error, on_http_error, on_invalid
from app.api.front import Front
from app.errors import InstepError

Application = FastAPI
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

_ABOUT = """Images from diffusion transformers, batched at every denoising step. The `openai` client works unmodified;
every bound below is the model's own."""


def build(front: Front, lifespan: Lifespan, version: str) -> Application:
    """The application that serves this front. NOTE: FastAPI's own pages for docs would stand beside `authorize`."""
    app = FastAPI(
        title="Instep",
        version=version,
        description=_ABOUT,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        dependencies=[Depends(authorize)],
        exception_handlers={
            InstepError: on_error,
            HTTPException: on_http_error,
            RequestValidationError: on_invalid,
        },
    )
    app.state.front = front
    app.state.documents = {}
    for part in (images, compare, models, health, docs):
        app.include_router(part.router)
    app.add_middleware(Access)
    if front.settings.cors_origins:
        app.add_middleware(Cors, origins=read_origins(front.settings.cors_origins))
    app.add_middleware(Drain)
    return app


def refuser(front: Front) -> Callable[[InstepError, bytes], Response]:
    """How a request is refused before there is a route: answered and counted as all errors, for the same pages."""
    setting = front.settings.cors_origins
    cors = Cors(None, read_origins(setting)) if setting else None

    def refuse(error: InstepError, origin: bytes) -> Response:
        front.metrics.rejected("", error.code)
        response = error_response(error)
        if cors:
            cors.mark(response, origin.decode("latin-1"))
        return response

    return refuse
