"""JSON schema of the bodies that a card takes, in its own bounds.

Knows nothing of routes; `app/jobs/body.py` enforces what is written here.
"""

from __future__ import annotations

from typing import Any

from app.cards.card import Card, Sizes
from app.imaging import FORMATS
from app.jobs.body import DEADLINE_LIMIT, PRIORITY_LIMIT, ImageBody, allows
from app.jobs.fields import ANY_SEED, SEEDS
from app.samplers.table import valid_samplers

Json = dict[str, Any]


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
        "examples": [example(card)],
    }


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
        "seed": _whole(ANY_SEED, SEEDS - 1),
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


def example(card: Card) -> Json:
    field, value = ("class_label", next(iter(card.labels), 0)) if card.draws_classes else ("prompt", "a red apple")
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
