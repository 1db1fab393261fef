"""Docs: the OpenAPI document and the page that shows it, as routes of our own, so that they take a key as all others.

Knows nothing of what the document says.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from app.api.front import front_of
from app.api.openapi import document

router = APIRouter(include_in_schema=False)


@router.get("/openapi.json")
async def openapi(request: Request) -> JSONResponse:
    """The document of the models that this key may use."""
    return JSONResponse(document(request.app, front_of(request)))


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Swagger UI. NOTE: it comes from a CDN, and can send no key: with keys, /openapi.json is for programs."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="Instep")
