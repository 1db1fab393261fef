"""The OpenAPI document: the image body spelled out for each card, with its own bounds and examples.

Knows nothing of serving; `app/api/schemas.py` enforces what is written here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.api.classes import draws_classes
from app.api.front import Front
from app.api.registry import Registry
from app.api.responses import ErrorReply
from app.api.schemas import DEADLINE_LIMIT, PRIORITY_LIMIT, SEEDS, ImageBody, allows
from app.api.security import ADMIN, OPEN
from app.api.shapes import ImagesReply
from app.card import Card, Sizes
from app.imaging import FORMATS
from app.keys import Keyring
from app.samplers.table import valid_samplers

Json = dict[str, Any]

_STATUSES = {
    400: "A field is unknown, of the wrong type or out of the model's range",
    404: "No model has this name",
    408: "The request did not come whole in time",
    413: "The body is too large",
    429: "This key has more than its share in the queue; Retry-After tells when to come again",
    431: "The headers are too large or too many",
    499: "Cancelled",
    500: "The server, or the network for this image, failed",
    503: "Overloaded, draining, without an engine or the model cannot be loaded; Retry-After tells when to come again",
    504: "The deadline passed",
    507: "One image alone does not fit in the device's memory",
}
_REFUSALS = {
    "401": "No key, or one that this server does not know",
    "403": "This key may not do this",
}
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


def document(app: FastAPI, front: Front) -> Json:
    """FastAPI's document with the body of every card in place of a bare object, and the key that each route takes.

    Kept for each set of models that a key may use. A route says that it takes a key where some key would open it.
    """
    kept: dict[tuple[str, ...], Json] = app.state.documents
    models = tuple(front.registry.cards)
    if models not in kept:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _place_bodies(made, front.registry)
        _place_keys(made, front.keys)
        kept[models] = made
    return kept[models]


def body_schema(card: Card, names: tuple[str, ...], default: bool) -> Json:
    """JSON schema of the bodies that this card takes. default: the card also answers to no name at all."""
    properties = {**_common(card), "model": {"enum": [*names, *(["", None] if default else [])]}}
    properties |= _label_fields(card) if draws_classes(card) else _text_fields(card)
    for field, schema in properties.items():
        schema["description"] = ImageBody.model_fields[field].description
    what = "class_label" if draws_classes(card) else "prompt"
    one, many = properties[what]["anyOf"][:-1], properties[what]["anyOf"][-1]
    return {
        "title": card.id,
        "description": card.description,
        "type": "object",
        "additionalProperties": False,
        "required": [what] if default else [what, "model"],
        "properties": properties,
        "anyOf": [
            {"properties": {what: {"anyOf": one}}},
            {"properties": {what: many, "n": {"enum": [1, None]}}},
        ],
        "examples": [_example(card)],
    }


def _place_bodies(document: Json, registry: Registry) -> None:
    schemas = document["components"]["schemas"]
    names = []
    for card in registry.cards.values():
        name = f"ImageBody.{card.id}"
        schemas[name] = body_schema(card, registry.names(card), card.id == registry.default.id)
        names.append({"$ref": f"#/components/schemas/{name}"})
    content = document["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": names}
    content["examples"] = {
        card.id: {"summary": card.description or card.id, "value": _example(card)} for card in registry.cards.values()
    }


def _place_keys(document: Json, keys: Keyring) -> None:
    document["components"]["securitySchemes"] = _KEYS
    reply = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorReply"}}}
    refusals = {code: {"description": text, "content": reply} for code, text in _REFUSALS.items()}
    for path, operations in document["paths"].items():
        for operation in operations.values() if path not in OPEN else ():
            operation["responses"] |= refusals
            if path in ADMIN and keys.admin:
                operation["security"] = [{"admin_key": []}]
            elif path not in ADMIN and keys.clients:
                operation["security"] = [{"key": []}]


def _common(card: Card) -> Json:
    """Fields of both kinds of model."""
    limits = card.limits
    fields: Json = {
        "n": _whole(1, limits.n),
        "size": _size(limits.sizes, card.defaults.size),
        "response_format": {"enum": ["b64_json", None]},
        "output_format": {"enum": [*FORMATS, None]},
        "output_compression": _whole(0, 100),
        "stream": {"type": ["boolean", "null"]},
        "partial_images": _whole(0, 3),
        "num_inference_steps": _whole(1, limits.num_inference_steps, card.defaults.num_inference_steps),
        "guidance_scale": _real(0, limits.guidance_scale, card.defaults.guidance_scale),
        "seed": _whole(0, SEEDS - 1),
        "sampler": {"enum": [*valid_samplers(card.schedule), None], "default": card.defaults.sampler},
        "priority": _whole(-PRIORITY_LIMIT, PRIORITY_LIMIT),
        "deadline": _real(0.1, DEADLINE_LIMIT),
        "grid": {
            "type": ["object", "null"],
            "properties": {"columns": {"type": "integer", "minimum": 1, "maximum": limits.n}},
            "required": ["columns"],
            "additionalProperties": False,
        },
    }
    ignored = ("quality", "background", "moderation", "style", "user", "safety_identifier", "complexity")
    return fields | _guidance_fields(card) | {name: {} for name in ignored}


def _guidance_fields(card: Card) -> Json:
    """Of the kinds of guidance that only some models have."""
    most, skip = card.limits.guidance_scale, card.skip_layer_guidance
    fields: Json = {"true_cfg_scale": _real(0, most, 1.0)} if card.guidance == "embedded" else {}
    if skip is not None:
        fields["skip_layer_guidance_scale"] = _real(0, most, skip.scale)
        fields["skip_layer_guidance_start"] = _real(0, 1, skip.start)
        fields["skip_layer_guidance_stop"] = _real(0, 1, skip.stop)
    return fields


def _text_fields(card: Card) -> Json:
    text = {"type": "string", "maxLength": card.limits.prompt}
    return {
        "prompt": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": card.limits.n}]},
        "negative_prompt": {"type": ["string", "null"], "maxLength": card.limits.prompt},
        "max_sequence_length": _whole(1, card.text.t5, card.text.t5),
    }


def _label_fields(card: Card) -> Json:
    index = {"type": "integer", "minimum": 0, "maximum": max(0, len(card.labels) - 1)}
    # A name that two classes share is no way to name one.
    names = {"enum": [name for name in card.labels if card.labels.count(name) == 1]}
    either = {"anyOf": [index, names]}
    many = {"type": "array", "items": either, "minItems": 1, "maxItems": card.limits.n}
    words = {"type": "string"}
    return {
        "class_label": {"anyOf": [index, names, many]},
        "prompt": {"anyOf": [words, {"type": "array", "items": words}, {"type": "null"}]},
    }


def _example(card: Card) -> Json:
    field, value = ("class_label", next(iter(card.labels), 0)) if draws_classes(card) else ("prompt", "a red apple")
    return {"model": card.id, field: value, "num_inference_steps": card.defaults.num_inference_steps, "seed": 7}


def _size(sizes: Sizes, default: str) -> Json:
    sides = [side for side in range(sizes.min, sizes.max + 1) if side % sizes.multiple == 0]
    if sizes.square or len(sides) ** 2 <= 64:
        names = [f"{w}x{h}" for w in sides for h in sides if allows(sizes, w, h)]
        return {"enum": [*names, "auto", None], "default": default}
    side = "|".join(map(str, sides))
    return {"type": ["string", "null"], "pattern": f"^(auto|({side})x({side}))$", "default": default}


def _whole(low: int, high: int, default: int | None = None) -> Json:
    schema: Json = {"type": ["integer", "null"], "minimum": low, "maximum": high}
    return schema if default is None else {**schema, "default": default}


def _real(low: float, high: float, default: float | None = None) -> Json:
    schema: Json = {"type": ["number", "null"], "minimum": low, "maximum": high}
    return schema if default is None else {**schema, "default": default}
