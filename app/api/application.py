"""The FastAPI application: routes, error handlers and middleware around one Front.

Knows nothing of settings, cards or processes; `app/main.py` puts those together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from app import errors
from app.api import compare, docs, health, images, models
from app.api.access import Access
from app.api.cors import Cors, read_origins
from app.api.drain import Drain
from app.api.front import Front, record_of
from app.api.responses import error_response, http_error_response
from app.api.security import authorize

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
    )
    app.state.front = front
    app.state.documents = {}
    for part in (images, compare, models, health, docs):
        app.include_router(part.router)
    app.add_middleware(Access)
    if front.settings.cors_origins:
        app.add_middleware(Cors, origins=read_origins(front.settings.cors_origins))
    app.add_middleware(Drain)
    app.add_exception_handler(errors.InstepError, _ours)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(RequestValidationError, _invalid)
    return app


async def _ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.InstepError)
    record_of(request).facts.setdefault("error", error.code)
    return error_response(error)


async def _framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return http_error_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """A path or query parameter that FastAPI itself refused."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = str(first["loc"][-1])
    return error_response(errors.InvalidValue(f"{field}: {first['msg']}", param=field))
