"""The OpenAPI document: the bodies spelled out for each card, with its own bounds and examples.

Knows nothing of serving; `app/jobs/body.py` enforces what is written here.
"""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.auth import ADMIN, OPEN
from app.api.errors import ErrorReply
from app.api.front import Front
from app.cards.catalog import Registry
from app.imaging import FORMATS
from app.jobs.body_schema import Json, body_schema, example
from app.jobs.compare_schema import place_comparison
from app.jobs.shapes import CompareReply, ImagesReply
from app.keys import Keyring

_STATUSES = {
    400: "A field is unknown, of the wrong type or out of the model's range",
    404: "No model has this name, or none that this key may use",
    406: "Accept names images alone, and none that is written here",
    408: "The request did not come whole in time",
    413: "The body is too large",
    415: "The body has a Content-Encoding, such as gzip",
    429: "This key has more than its share in the queue; Retry-After tells when to come again",
    431: "The headers are too large or too many",
    499: "Cancelled",
    500: "The server, or the network for this image, failed",
    503: "Overloaded, draining, without an engine or the model cannot be loaded; Retry-After tells when to come again",
    504: "The deadline passed",
    507: "One image alone does not fit in the device's memory",
}
_REFUSALS = {"401": "No key, or one that this server does not know"}
_ADMIN_REFUSALS = {**_REFUSALS, "403": "Not the admin key, or this server has none"}
_KEYS = {
    "key": {"type": "http", "scheme": "bearer", "description": "One of API_KEYS"},
    "admin_key": {"type": "http", "scheme": "bearer", "description": "ADMIN_KEY"},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}

IMAGE_ROUTE: Json = {
    "tags": ["images"],
    "response_model": None,
    "responses": {
        200: {
            "model": ImagesReply,
            "description": "JSON; the file itself for Accept: image/*; events for stream: true",
            "content": {**{f"image/{name}": _BINARY for name in FORMATS}, "text/event-stream": {"schema": {}}},
        },
        **{status: {"model": ErrorReply, "description": text} for status, text in _STATUSES.items()},
    },
    "openapi_extra": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
    },
}

COMPARE_ROUTE: Json = {
    **IMAGE_ROUTE,
    "responses": {
        **IMAGE_ROUTE["responses"],
        200: {
            "model": CompareReply,
            "description": "JSON; the panel itself for Accept: image/*",
            "content": {f"image/{name}": _BINARY for name in FORMATS},
        },
    },
}


def document(app: FastAPI, front: Front) -> Json:
    """FastAPI's document with the body of every card in place of a bare object, and the key that each route takes.

    A route says that it takes a key where some key would open it. It takes a tenth of a second.
    """
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _place_bodies(made, front.registry)
    place_comparison(made, front.registry)
    _place_keys(made, front.keys)
    return made


def _place_bodies(document: Json, registry: Registry) -> None:
    schemas = document["components"]["schemas"]
    names = []
    for card in registry.cards.values():
        name = f"ImageBody.{card.id}"
        schemas[name] = body_schema(card, card.names, card.id == registry.default.id)
        names.append({"$ref": f"#/components/schemas/{name}"})
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": names}
    content["examples"] = {
        card.id: {"summary": card.description or card.id, "value": example(card)} for card in registry.cards.values()
    }


def _place_keys(document: Json, keys: Keyring) -> None:
    document["components"]["securitySchemes"] = _KEYS
    reply = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    for path, operations in document["paths"].items():
        refusals = _ADMIN_REFUSALS if path in ADMIN else _REFUSALS
        for operation in operations.values() if path not in OPEN else ():
            operation["responses"] |= {code: {"description": text, "content": reply} for code, text in refusals.items()}
            if path in ADMIN and keys.admin:
                operation["security"] = [{"admin_key": []}]
            elif path not in ADMIN and keys.clients:
                operation["security"] = [{"key": []}]
