"""The OpenAPI document, every card's body in its own bounds, and the page that shows it, which needs no other host.

Both are routes of our own, so that they take a key as all others; Swagger UI's files come from fastapi-swagger.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from importlib.resources import files

import fastapi_swagger  # type: ignore[import-untyped]
from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

from app.api.access import ADMIN, OPEN
from app.api.errors import ErrorReply
from app.api.front import Front, front_of
from app.api.page import SAFE
from app.cards.catalog import Registry
from app.imaging import FORMATS
from app.jobs.batch import REQUESTS
from app.jobs.body import Json
from app.jobs.compare import CompareReply
from app.jobs.replies import ImagesReply
from app.jobs.schema import batch_schema, body_schema, edit_schema, example, place_comparison
from app.keys import Keyring
from app.source import PICTURES

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
TYPES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript",
}


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The document of the models that this key may use."""
    return Response(await written(request.app, front_of(request)), media_type="application/json")


@router.get("/docs")
async def docs() -> HTMLResponse:
    """Swagger UI. NOTE: a browser sends no key to it: with keys, /openapi.json is for programs."""
    return HTMLResponse(PAGE, headers=SAFE)


@router.get("/docs/{name}")
async def part(name: str) -> Response:
    """A file of the page."""
    if name not in TYPES:
        raise HTTPException(404)
    data = START if name == "start.js" else _file(name)
    return Response(data, media_type=TYPES[name], headers={**SAFE, "Cache-Control": "max-age=3600"})


@cache
def _file(name: str) -> bytes:
    return files(fastapi_swagger).joinpath("resources", name).read_bytes()


async def written(app: FastAPI, front: Front) -> bytes:
    """The document as it is sent, made once for each set of models and LoRAs that a key may use."""
    kept, models = front.documents, (tuple(front.registry.cards), tuple(front.registry.adapters or ()))

    def write() -> bytes:
        return json.dumps(document(app, front), ensure_ascii=False, separators=(",", ":")).encode()

    if models not in kept:
        kept[models] = asyncio.ensure_future(front.in_thread(write))
    return await asyncio.shield(kept[models])


_STATUSES = {
    400: "A field is unknown, of the wrong type or out of the model's range",
    404: "No model has this name, or none that this key may use",
    406: "Accept names only image formats that this server does not write",
    408: "The request did not arrive in time",
    413: "The body is too large",
    415: "The body has a Content-Encoding, such as gzip",
    429: "This key has more than its share in the queue; Retry-After says when to try again",
    431: "The headers are too large or too many",
    499: "Cancelled",
    500: "The server failed, or the network computed no finite image",
    503: "Overloaded, shutting down, no engine, or the model cannot be loaded; Retry-After says when to try again",
    504: "The deadline passed",
    507: "One image alone does not fit in the device's memory",
}


_FILES = [f"image/{name}" for name in FORMATS]


def _route(model: type[BaseModel], description: str, *media: str, form: bool = False) -> Json:
    """FastAPI's options of a route that draws: its JSON reply, the files that may come instead of it, its errors.

    form: whether the body may be a form, too.
    """
    content = {name: {"schema": {"type": "string", "format": "binary"}} for name in _FILES}
    content |= {name: {"schema": {}} for name in media}
    errors = {status: {"model": ErrorReply, "description": text} for status, text in _STATUSES.items()}
    kinds = ("application/json", "multipart/form-data") if form else ("application/json",)
    body = {"required": True, "content": {kind: {"schema": {"type": "object"}} for kind in kinds}}
    return {
        "tags": ["images"],
        "response_model": None,
        "responses": {200: {"model": model, "description": description, "content": content}, **errors},
        "openapi_extra": {"requestBody": body},
    }


_DRAWN = "JSON; the file itself for Accept: image/*; events for stream: true"
IMAGE_ROUTE = _route(ImagesReply, _DRAWN, "text/event-stream")
EDIT_ROUTE = _route(ImagesReply, _DRAWN, "text/event-stream", form=True)
BATCH_ROUTE = _route(ImagesReply, "") | {"response_class": Response}
BATCH_ROUTE["responses"][200] = {"description": "Events", "content": {"text/event-stream": {}}}
COMPARE_ROUTE = _route(CompareReply, "JSON; the panel itself for Accept: image/*")


def document(app: FastAPI, front: Front) -> Json:
    """FastAPI's document with the body of every card in place of a bare object, and the key that each route takes.

    A route says that it takes a key where some key would open it. It takes a tenth of a second.
    """
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _place_bodies(made, front.registry)
    _place_edits(made, front.registry)
    place_comparison(made, front.registry)
    _place_keys(made, front.keys)
    return made


def _place_bodies(document: Json, registry: Registry) -> None:
    schemas = document["components"]["schemas"]
    names = []
    for card in registry.cards.values():
        name = f"ImageBody.{card.id}"
        schemas[name] = body_schema(
            card, card.names, card.id == registry.default.id, registry.adapters, registry.refiners(card)
        )
        names.append({"$ref": f"#/components/schemas/{name}"})
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": names}
    several = document["paths"]["/v1/images/batch"]["post"]["requestBody"]["content"]["application/json"]
    several["schema"] = batch_schema(names)
    several["example"] = {"requests": [example(card) for card in registry.cards.values()][:REQUESTS]}
    content["examples"] = {
        card.id: {"summary": card.description or card.id, "value": example(card)} for card in registry.cards.values()
    }


def _place_edits(document: Json, registry: Registry) -> None:
    """The bodies of edits and variations, each as JSON and as a form."""
    for route, kind in (("edits", "Edit"), ("variations", "Variation")):
        content = document["paths"][f"/v1/images/{route}"]["post"]["requestBody"]["content"]
        for media, form in (("application/json", "Body"), ("multipart/form-data", "Form")):
            names = {card.id: f"{kind}{form}.{card.id}" for card in registry.cards.values()}
            for card in registry.cards.values():
                own, shape = card.id == registry.default.id, {"form": form == "Form", "variation": kind == "Variation"}
                document["components"]["schemas"][names[card.id]] = edit_schema(card, own, **shape)
            content[media]["schema"] = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in names.values()]}
        content["multipart/form-data"]["encoding"] = {name: {"contentType": ", ".join(_FILES)} for name in PICTURES}


def _place_keys(document: Json, keys: Keyring) -> None:
    schemes = {"key": "One of API_KEYS", "admin_key": "ADMIN_KEY"}
    document["components"]["securitySchemes"] = {
        name: {"type": "http", "scheme": "bearer", "description": text} for name, text in schemes.items()
    }
    reply = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for path, operations in document["paths"].items():
        refusals = {"401": "No key, or one that this server does not know"}
        if path in ADMIN:
            refusals["403"] = "Not the admin key, or this server has none"
        for operation in operations.values() if path not in OPEN else ():
            operation["responses"].pop("422", None)  # of FastAPI, for parameters that no request can have wrong here
            operation["responses"] |= {code: {"description": text, "content": reply} for code, text in refusals.items()}
            if keys.admin if path in ADMIN else keys.clients:
                operation["security"] = [{"admin_key" if path in ADMIN else "key": []}]
