"""Docs: the OpenAPI document and the page that shows it, as routes of our own, so that they take a key as all others.

The page needs no other host: Swagger UI's files come from the package fastapi-swagger, which has those of its releases.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

import fastapi_swagger  # type: ignore[import-untyped]
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from app.api.front import Front, front_of
from app.api.openapi import document

router = APIRouter(include_in_schema=False)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Instep</title>
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="page"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = b"""SwaggerUIBundle({ url: "openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null });
"""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing from elsewhere, nothing inline."""

TYPES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript",
}


@router.get("/")
async def home() -> RedirectResponse:
    """To the docs, until there is a page. NOTE: relative, so that it is right behind a proxy with a prefix too."""
    return RedirectResponse("docs")


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The document of the models that this key may use."""
    return Response(await written(request.app, front_of(request)), media_type="application/json")


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Swagger UI. NOTE: a browser sends no key to it: with keys, /openapi.json is for programs."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/docs/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    if name not in TYPES:
        raise HTTPException(404)
    data = START if name == "start.js" else _file(name)
    headers = {"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response(data, media_type=TYPES[name], headers=headers)


@cache
def _file(name: str) -> bytes:
    return files(fastapi_swagger).joinpath("resources", name).read_bytes()


async def written(app: FastAPI, front: Front) -> bytes:
    """The document as it is sent, made once for each set of models that a key may use."""
    kept: dict[tuple[str, ...], bytes] = app.state.documents
    models = tuple(front.registry.cards)

    async def make() -> bytes:
        if models not in kept:
            kept[models] = await front.in_thread(_written, app, front)
        return kept[models]

    return kept[models] if models in kept else await front.shared(("document", models), make)


def _written(app: FastAPI, front: Front) -> bytes:
    return json.dumps(document(app, front), ensure_ascii=False, separators=(",", ":")).encode()
