"""JSON schemas of the bodies that each card takes, in its own bounds; an example, and the curl that posts one.

Names, types and words come from the pydantic models, ranges from `bounds`, which also check a body.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.cards.card import Card, Sizes
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.imaging import FORMATS, Format
from app.jobs.body import IGNORED, ImageBody
from app.jobs.compare import MODELS, OWN, PRESETS, ROWS, SHARED, CompareBody, takes_preset
from app.jobs.fields import Range, bounds, most_steps_of
from app.samplers.table import valid_samplers

Json = dict[str, Any]

_KEY = '-H "Authorization: Bearer $INSTEP_KEY"'
"""Outside of quotes that would keep the shell from putting the key in: no key is ever printed."""

_ROW_FIELDS = ("prompt", "class_label")
_EXAMPLES: dict[str, Json] = {"prompt": {"prompt": ["a red apple", "a blue car"]}, "class_label": {"class_label": [0]}}


def body_schema(card: Card, names: tuple[str, ...], default: bool) -> Json:
    """JSON schema of the bodies that this card takes. default: the card also answers to no name at all."""
    properties = {**_common(card), "model": {"enum": [*names, *(["", None] if default else [])]}}
    properties |= _label_fields(card) if card.draws_classes else _text_fields(card)
    for field, schema in properties.items():
        schema["description"] = ImageBody.model_fields[field].description
    what = "class_label" if card.draws_classes else "prompt"
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
        **({"allOf": fewer} if (fewer := _fewer_steps(card)) else {}),
        "examples": [example(card)],
    }


def _common(card: Card) -> Json:
    """Fields of both kinds of model."""
    spans = bounds(card)
    steps = max(most_steps_of(card).values())
    spans["num_inference_steps"] = spans["num_inference_steps"]._replace(high=steps)
    return {
        **{field: _number(field, span) for field, span in spans.items()},
        "size": _size(card.limits.sizes, card.defaults.size),
        "response_format": {"enum": ["b64_json", None]},
        "output_format": {"enum": [*FORMATS, None]},
        "stream": {"type": ["boolean", "null"]},
        "sampler": {"enum": [*valid_samplers(card.schedule), None], "default": card.defaults.sampler},
        "grid": {
            "type": ["object", "null"],
            "properties": {"columns": {"type": "integer", "minimum": 1, "maximum": card.limits.n}},
            "required": ["columns"],
            "additionalProperties": False,
        },
        **{name: {} for name in IGNORED},
    }


def _fewer_steps(card: Card) -> list[Json]:
    """The conditions that go with the samplers whose grids have room for fewer steps than those of others."""
    steps = most_steps_of(card)
    found = []
    for sampler, most in steps.items():
        if most < max(steps.values()):
            named: Json = {"properties": {"sampler": {"enum": [sampler]}}, "required": ["sampler"]}
            if sampler == card.defaults.sampler:
                named = {"properties": {"sampler": {"enum": [sampler, None]}}}
            found.append({"if": named, "then": {"properties": {"num_inference_steps": {"maximum": most}}}})
    return found


def _text_fields(card: Card) -> Json:
    text = {"type": "string", "maxLength": card.limits.prompt}
    return {
        "prompt": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": card.limits.n}]},
        "negative_prompt": {"type": ["string", "null"], "maxLength": card.limits.prompt},
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


def example(card: Card) -> Json:
    field, value = ("class_label", next(iter(card.labels), 0)) if card.draws_classes else ("prompt", "a red apple")
    return {"model": card.id, field: value, "num_inference_steps": card.defaults.num_inference_steps, "seed": 7}


def _size(sizes: Sizes, default: str) -> Json:
    sides = [side for side in range(sizes.min, sizes.max + 1) if side % sizes.multiple == 0]
    if sizes.square or len(sides) ** 2 <= 64:
        names = [f"{w}x{h}" for w in sides for h in sides if sizes.allows(w, h)]
        return {"enum": [*names, "auto", None], "default": default}
    side = "|".join(map(str, sides))
    return {"type": ["string", "null"], "pattern": f"^(auto|({side})x({side}))$", "default": default}


def _number(field: str, span: Range) -> Json:
    """A range as a schema; the body model says whether its numbers are whole."""
    whole = "int" in str(ImageBody.model_fields[field].annotation)
    schema: Json = {"type": ["integer" if whole else "number", "null"], "minimum": span.low, "maximum": span.high}
    return schema if span.default is None else {**schema, "default": span.default}


def place_comparison(document: Json, registry: Registry) -> None:
    """Put the bodies of comparisons into the document: of prompts, of classes, and by a preset."""
    cards = list(registry.cards.values())
    takers = {
        "prompt": [card for card in cards if not card.draws_classes],
        "class_label": [card for card in cards if card.draws_classes and card.labels],
        **{name: [card for card in cards if takes_preset(card, preset)] for name, preset in PRESETS.items()},
    }
    kinds = {kind: compare_schema(registry, fitting, kind) for kind, fitting in takers.items() if fitting}
    schemas = document["components"]["schemas"]
    schemas |= {f"CompareBody.{kind}": schema for kind, schema in kinds.items()}
    content = document["paths"]["/v1/images/compare"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": [{"$ref": f"#/components/schemas/CompareBody.{kind}"} for kind in kinds]}
    content["examples"] = {kind: {"value": schema["examples"][0]} for kind, schema in kinds.items()}


def compare_schema(registry: Registry, cards: list[Card], kind: str) -> Json:
    """JSON schema of the comparisons of these cards. kind: the field that names the rows, or a preset.

    The bounds of a card hold where it is named; without models, those of all.
    """
    what, preset = (kind, None) if kind in _ROW_FIELDS else (None, kind)
    shared = {card.id: _shared(card, what) for card in cards}
    every = dict.fromkeys(name for fields in shared.values() for name in fields)
    names = [name for card in cards for name in card.names]
    models = {"type": "array", "items": {"enum": names}, "minItems": 1, "maxItems": MODELS}
    chosen = preset and 1 <= sum(ModelFolder(card, registry.all).here() for card in cards) <= MODELS
    own: Json = {"models": {"anyOf": [models, {"type": "null"}]} if chosen else models, "preset": {"enum": [preset]}}
    for field in OWN:
        own[field]["description"] = CompareBody.model_fields[field].description
    # Of several cards the descriptions alone: their bounds are those of the cards that are named.
    alone = shared[cards[0].id] if len(cards) == 1 else None
    fields = alone or {name: {"description": ImageBody.model_fields[name].description} for name in every}
    absent = {field: {"type": "null"} for field in _ROW_FIELDS if field != what}
    schema: Json = {
        "title": f"by {kind}",
        "type": "object",
        "additionalProperties": False,
        "required": [*([] if chosen else ["models"]), what or "preset"],
        "properties": {**fields, **absent, **own, "stream": {"enum": [False, None]}},
    }
    if alone:
        schema |= _conditions(cards[0])
    else:
        schema["allOf"] = [
            {
                "if": {"properties": {"models": {"contains": {"enum": [*card.names]}}}},
                "then": {
                    "properties": {name: shared[card.id].get(name, {"type": "null"}) for name in every},
                    **_conditions(card),
                },
            }
            for card in cards
        ]
    few = {} if chosen else {"models": [card.id for card in cards[:2]]}
    return {**schema, "examples": [{**few, **_EXAMPLES.get(kind, {"preset": kind}), "seed": 7}]}


def _shared(card: Card, what: str | None) -> Json:
    """The shared fields as this card takes them, by reference to its body; `what` may be a list of up to ROWS."""
    fields = body_schema(card, (card.id,), False)["properties"]
    place = f"#/components/schemas/ImageBody.{card.id}/properties"
    kept: Json = {name: {"$ref": f"{place}/{name}"} for name in SHARED if name in fields and name not in _ROW_FIELDS}
    if what:
        single = [{"$ref": f"{place}/{what}/anyOf/{index}"} for index in range(len(fields[what]["anyOf"]) - 1)]
        rows = {"type": "array", "items": {"anyOf": single}, "minItems": 1, "maxItems": ROWS}
        kept[what] = {"anyOf": [*single, rows], "description": "What the rows show: one, or a list"}
    return kept


def _conditions(card: Card) -> Json:
    """The conditions of this card's body, by reference to it."""
    place = f"#/components/schemas/ImageBody.{card.id}/allOf"
    found = [{"$ref": f"{place}/{index}"} for index in range(len(_fewer_steps(card)))]
    return {"allOf": found} if found else {}


def curl(
    server: str, route: str, body: Mapping[str, Any], format: Format, out: Path | str, *, key: bool = False
) -> str:
    """The command that posts this body to /v1/<route> of a server and writes the file alone.

    server: its URL or host and port. key: whether it wants one, which the command takes from INSTEP_KEY.
    """
    asked = shlex.join(["-H", "Content-Type: application/json", "-H", f"Accept: image/{format}"])
    posted = shlex.join(["-d", json.dumps(body, ensure_ascii=False), "-o", str(out)])
    return " ".join([f"curl {shlex.quote(f'{server}/v1/{route}')}", *([_KEY] if key else []), asked, posted])


def first_curl(server: str, card: Card, *, key: bool) -> str:
    """The command for a first picture by this card, with nothing but what it needs."""
    body = {name: value for name, value in example(card).items() if name in ("model", "prompt", "class_label")}
    return curl(server, "images/generations", body, "png", "picture.png", key=key)


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens there; what listens on all addresses, on its own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
