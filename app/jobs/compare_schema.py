"""The OpenAPI document of POST /v1/images/compare: what may be compared, in the bounds of the models that are named.

Knows nothing of serving; `app/jobs/compare.py` enforces what is written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.jobs.body import ImageBody
from app.jobs.body_schema import Json, body_schema
from app.jobs.compare import MODELS, OWN, ROWS, SHARED, CompareBody
from app.jobs.presets import PRESETS, takes_preset

_ROW_FIELDS = ("prompt", "class_label")
_EXAMPLES: dict[str, list[Any]] = {"prompt": ["a red apple", "a blue car"], "class_label": [0]}


def place_comparison(document: Json, registry: Registry) -> None:
    """Put the bodies of comparisons into the document: of prompts, of classes, and by a preset."""
    kinds: Json = {}
    cards = list(registry.cards.values())
    for what, fitting in (
        ("prompt", [card for card in cards if not card.draws_classes]),
        ("class_label", [card for card in cards if card.draws_classes and card.labels]),
    ):
        if fitting:
            kinds[what] = compare_schema(registry, fitting, what)
    for name, preset in PRESETS.items():
        fitting = [card for card in cards if takes_preset(card, preset)]
        if fitting:
            kinds[name] = compare_schema(registry, fitting, None, name)
    schemas = document["components"]["schemas"]
    schemas |= {f"CompareBody.{kind}": schema for kind, schema in kinds.items()}
    content = document["paths"]["/v1/images/compare"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": [{"$ref": f"#/components/schemas/CompareBody.{kind}"} for kind in kinds]}
    content["examples"] = {kind: {"value": schema["examples"][0]} for kind, schema in kinds.items()}


def compare_schema(registry: Registry, cards: list[Card], what: str | None, preset: str | None = None) -> Json:
    """JSON schema of the comparisons of these cards by `what`, a field, or by a preset.

    The bounds of a card hold where it is named; without models, those of all.
    """
    bounds = {card.id: _bounds(card, what) for card in cards}
    every = dict.fromkeys(name for fields in bounds.values() for name in fields)
    models = {"type": "array", "items": {"enum": _names(registry, cards)}, "minItems": 1, "maxItems": MODELS}
    chosen = preset and 1 <= sum(ModelFolder(card, registry.all).here() for card in cards) <= MODELS
    own: Json = {"models": {"anyOf": [models, {"type": "null"}]} if chosen else models, "preset": {"enum": [preset]}}
    for field in OWN:
        own[field]["description"] = CompareBody.model_fields[field].description
    absent = {field: {"type": "null"} for field in _ROW_FIELDS if field != what}
    schema: Json = {
        "title": f"by {what or preset}",
        "type": "object",
        "additionalProperties": False,
        "required": [*([] if chosen else ["models"]), what or "preset"],
        "properties": {
            **(_described(every) if len(cards) > 1 else bounds[cards[0].id]),
            **absent,
            **own,
            "stream": {"enum": [False, None]},
        },
    }
    if len(cards) > 1:
        schema["allOf"] = [
            {
                "if": {"properties": {"models": {"contains": {"enum": _names(registry, [card])}}}},
                "then": {"properties": {name: bounds[card.id].get(name, {"type": "null"}) for name in every}},
            }
            for card in cards
        ]
    example = {"preset": preset} if what is None else {what: _EXAMPLES[what]}
    few = {} if chosen else {"models": [card.id for card in cards[:2]]}
    return {**schema, "examples": [{**few, **example, "seed": 7}]}


def _bounds(card: Card, what: str | None) -> Json:
    """The shared fields as this card takes them, by reference to its body; `what` may be a list of up to ROWS."""
    fields = body_schema(card, (card.id,), False)["properties"]
    place = f"#/components/schemas/ImageBody.{card.id}/properties"
    kept: Json = {name: {"$ref": f"{place}/{name}"} for name in SHARED if name in fields and name not in _ROW_FIELDS}
    if what:
        single = [{"$ref": f"{place}/{what}/anyOf/{index}"} for index in range(len(fields[what]["anyOf"]) - 1)]
        rows = {"type": "array", "items": {"anyOf": single}, "minItems": 1, "maxItems": ROWS}
        kept[what] = {"anyOf": [*single, rows], "description": "What the rows show: one, or a list"}
    return kept


def _described(fields: Iterable[str]) -> Json:
    """Fields of several cards: their descriptions alone, as their bounds are those of the cards that are named."""
    return {name: {"description": ImageBody.model_fields[name].description} for name in fields}


def _names(registry: Registry, cards: list[Card]) -> list[str]:
    return [name for card in cards for name in card.names]
