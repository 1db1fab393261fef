"""JSON schemas of the bodies that each card takes, in its own bounds; an example, and the curl that posts one.

Names, types and descriptions come from the pydantic models, ranges from `bounds`, which also check a body.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from app.cards.adapters import MOST_LORAS, STRONGEST
from app.cards.card import NO_REFINER, Card
from app.cards.catalog import Adapters, Registry, fitting
from app.cards.folder import ModelFolder
from app.imaging import Format
from app.jobs.batch import REQUESTS, BatchBody
from app.jobs.body import ImageBody, Json, bounds, ignored, most_steps_of
from app.jobs.compare import FIELDS, MODELS, PRESETS, ROWS, CompareBody, takes_preset
from app.jobs.edit import EditBody
from app.samplers.table import valid_grids
from app.source import PICTURES

NULL: Json = {"type": "null"}
Files = Mapping[str, Path] | None

_KEY = '-H "Authorization: Bearer $INSTEP_KEY"'
"""Outside of quotes that would keep the shell from putting the key in: no key is ever printed."""

_ROWS: dict[str, Json] = {"prompt": {"prompt": ["a red apple", "a blue car"]}, "class_label": {"class_label": [0]}}
"""Examples of comparisons by the field that names their rows."""


def body_schema(
    card: Card, names: tuple[str, ...], default: bool, adapters: Adapters | None = None, refiners: Sequence[str] = ()
) -> Json:
    """JSON schema of the bodies that this card takes. default: the card also answers to no name at all. adapters,
    refiners: those that may be asked for."""
    what = "class_label" if card.draws_classes else "prompt"
    single = _single(card)
    many = {"type": "array", "items": {"anyOf": single}, "minItems": 1, "maxItems": card.limits.n}
    columns = {"type": "integer", "minimum": 1, "maximum": card.limits.n}
    spans = bounds(card)
    spans["num_inference_steps"]["maximum"] = max(most_steps_of(card).values())
    words = {"type": "string"}
    spans["prompt"] = {"anyOf": [words, {"type": "array", "items": words}, NULL]}
    spans[what] = {"anyOf": [*single, many]}
    spans["model"] = {"enum": [*names, *(["", None] if default else [])]}
    spans["loras"] = {"anyOf": [_loras(fitting(card, adapters or {})), NULL]}
    spans["refiner"] = {"anyOf": [_refiner(refiners), NULL]}
    spans["grid"] = {"anyOf": [_object({"columns": columns}, ["columns"]), NULL]}
    return {
        "title": card.id,
        "description": card.description,
        **_object(_properties(ImageBody, spans), [what] if default else [what, "model"]),
        "anyOf": [{"properties": {what: {"anyOf": single}}}, {"properties": {what: many, "n": {"enum": [1, None]}}}],
        **({"allOf": own} if (own := _by_sampler(card)) else {}),
        "examples": [example(card)],
    }


def edit_schema(card: Card, default: bool, *, form: bool, variation: bool) -> Json:
    """JSON schema of the bodies with a picture, by reference to `body_schema`; a variation needs no prompt."""
    place, spans = f"#/components/schemas/ImageBody.{card.id}", bounds(card, kind=EditBody)
    shared = {field: {"$ref": f"{place}/properties/{field}"} for field in spans if field in ImageBody.model_fields}
    own = _properties(EditBody, {field: span for field, span in spans.items() if field not in shared})
    text: Json = {"type": "string", "format": "byte"}
    several: Json = {"anyOf": [text, {"type": "array", "items": text, "minItems": 1, "maxItems": 1}]}
    files = dict.fromkeys(PICTURES, {"type": "string", "format": "binary"} if form else several)
    what = ["class_label"] if card.draws_classes else [] if variation else ["prompt"]
    return {
        **_object(files | shared | own, ["image", *what, *([] if default else ["model"])]),
        "anyOf": [{"$ref": f"{place}/anyOf/{index}"} for index in range(2)],
        **_by_reference(card),
    }


def fields_schema(card: Card, adapters: Adapters, refiners: Sequence[str]) -> dict[str, Json]:
    """The schema of every field with an effect that bodies for this card may have, those with a picture too, by name.

    A class name is any text there: a model may have thousands.
    """
    found = body_schema(card, card.names, False, adapters, refiners)["properties"]
    own = _properties(EditBody, {name: span for name, span in bounds(card, kind=EditBody).items() if name not in found})
    if card.draws_classes:
        single = [_single(card)[0], {"type": "string"}]
        found["class_label"] = _plain(ImageBody)["class_label"] | {
            "anyOf": [*single, {"type": "array", "items": {"anyOf": single}, "minItems": 1, "maxItems": card.limits.n}]
        }
    return {name: field for name, field in (found | own).items() if name not in ignored(EditBody)}


def batch_schema(bodies: list[Json]) -> Json:
    """JSON schema of batches of these bodies, which are references."""
    description = BatchBody.model_json_schema()["properties"]["requests"]["description"]
    requests = {"type": "array", "items": {"anyOf": bodies}, "minItems": 1, "maxItems": REQUESTS}
    return _object({"requests": {"description": description, **requests}}, ["requests"])


def _properties(kind: type[ImageBody], spans: Mapping[str, Json]) -> Json:
    """The schemas of these fields: types and descriptions of the model, ranges of the card."""
    return {field: _plain(kind)[field] | span for field, span in spans.items()}


@cache
def _plain(kind: type[ImageBody]) -> dict[str, Json]:
    """Types and descriptions of a model's fields. NOTE: pydantic takes tens of ms for them."""
    fields = kind.model_json_schema()["properties"].items()
    return {field: {name: one[name] for name in ("anyOf", "description") if name in one} for field, one in fields}


def _object(properties: Json, required: list[str]) -> Json:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _single(card: Card) -> list[Json]:
    """The schemas of one prompt or label. NOTE: a name that two classes share is no way to name one."""
    if not card.draws_classes:
        return [{"type": "string", "maxLength": card.limits.prompt}]
    names = [name for name, count in Counter(card.labels).items() if count == 1]
    return [{"type": "integer", "minimum": 0, "maximum": max(0, len(card.labels) - 1)}, {"enum": names}]


def _loras(names: list[str]) -> Json:
    weight = {"type": "number", "minimum": -STRONGEST, "maximum": STRONGEST, "default": 1}
    entry = _object({"name": {"enum": names}, "weight": weight}, ["name"])
    return {"type": "array", "items": entry, "maxItems": MOST_LORAS} if names else {"type": "array", "maxItems": 0}


def _refiner(names: Sequence[str]) -> Json:
    switch = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1, "default": 0.8}
    return _object({"model": {"enum": [*names, NO_REFINER]}, "switch_at": switch}, ["model"])


def _by_sampler(card: Card) -> list[Json]:
    """The rules for some samplers: fewer steps, or no schedule. Each holds unless the body has another sampler.

    NOTE: schemathesis fails at `if` beside files.
    """
    steps, own = most_steps_of(card), card.defaults.sampler
    rules: list[tuple[list[str], Json]] = [([one for one in steps if valid_grids(one)], {"schedule": NULL})]
    for sampler, most in steps.items():
        if most < max(steps.values()):
            rules.append(([one for one in steps if one != sampler], {"num_inference_steps": {"maximum": most}}))
    found = []
    for others, bound in rules:
        free = {"enum": [*others, *([None] if own in others else [])]}
        other: Json = {"properties": {"sampler": free}, "required": [] if own in others else ["sampler"]}
        found.append({"anyOf": [{"properties": bound}, other]})
    return found


def example(card: Card) -> Json:
    field, value = ("class_label", next(iter(card.labels), 0)) if card.draws_classes else ("prompt", "a red apple")
    return {"model": card.id, field: value, "num_inference_steps": card.defaults.num_inference_steps, "seed": 7}


def place_comparison(document: Json, registry: Registry) -> None:
    """Put the bodies of comparisons into the document: of prompts, of classes, and by a preset."""
    cards = list(registry.cards.values())
    takers = {
        "prompt": [card for card in cards if not card.draws_classes],
        "class_label": [card for card in cards if card.draws_classes and card.labels],
        **{preset: [card for card in cards if takes_preset(card, preset)] for preset in PRESETS},
    }
    kinds = {kind: compare_schema(registry, fitting, kind) for kind, fitting in takers.items() if fitting}
    document["components"]["schemas"] |= {f"CompareBody.{kind}": schema for kind, schema in kinds.items()}
    content = document["paths"]["/v1/images/compare"]["post"]["requestBody"]["content"]["application/json"]
    content["schema"] = {"anyOf": [{"$ref": f"#/components/schemas/CompareBody.{kind}"} for kind in kinds]}
    content["examples"] = {kind: {"value": schema["examples"][0]} for kind, schema in kinds.items()}


def compare_schema(registry: Registry, cards: list[Card], kind: str) -> Json:
    """JSON schema of the comparisons of these cards. kind: the field that names the rows, or a preset.

    The bounds of a card hold where it is named.
    """
    fields = CompareBody.model_json_schema()["properties"]
    names = [name for card in cards for name in card.names]
    models: Json = {"type": "array", "items": {"enum": names}, "minItems": 1, "maxItems": MODELS}
    optional = kind in PRESETS and 1 <= sum(ModelFolder(card, registry.all).here() for card in cards) <= MODELS
    own = {field: NULL for field in _ROWS if field != kind} | {"stream": {"enum": [False, None]}}
    own["models"] = {"anyOf": [models, NULL]} if optional else models
    takers = _takers(registry, cards)
    own["refiner"] = {"anyOf": [_refiner([*takers]), NULL]}
    own["preset"] = {"enum": [kind if kind in PRESETS else None]}
    conditions = [
        {"if": {"properties": {"models": {"contains": {"enum": [*card.names]}}}}, "then": _cells(card, kind)}
        for card in cards
    ]
    for refiner, names in takers.items():
        named: Json = {"type": "object", "required": ["model"], "properties": {"model": {"enum": [refiner]}}}
        asked: Json = {"required": ["refiner"], "properties": {"refiner": named}}
        conditions.append({"if": asked, "then": {"properties": {"models": {"contains": {"enum": names}}}}})
    return {
        "title": f"by {kind}",
        **_object(
            {field: {"description": fields[field]["description"], **own.get(field, {})} for field in FIELDS},
            [*([] if optional else ["models"]), "preset" if kind in PRESETS else kind],
        ),
        "allOf": conditions,
        "examples": [{"models": [card.id for card in cards[:2]], **_ROWS.get(kind, {"preset": kind}), "seed": 7}],
    }


def _takers(registry: Registry, cards: list[Card]) -> dict[str, list[str]]:
    """Every refiner of these cards, with the names of those that it fits."""
    found: dict[str, list[str]] = {}
    for card in cards:
        for refiner in registry.refiners(card):
            found.setdefault(refiner, []).extend(card.names)
    return found


def _cells(card: Card, kind: str) -> Json:
    """What a comparison with this model takes: what the body of the model takes, by reference, and up to ROWS rows."""
    place, taken = f"#/components/schemas/ImageBody.{card.id}", bounds(card)
    apart = (*_ROWS, "stream", "refiner")
    shared = [field for field in FIELDS if field in ImageBody.model_fields and field not in apart]
    fields = {field: {"$ref": f"{place}/properties/{field}"} if field in taken else NULL for field in shared}
    if kind in _ROWS:
        single = [{"$ref": f"{place}/properties/{kind}/anyOf/{index}"} for index in range(len(_single(card)))]
        rows = {"type": "array", "items": {"anyOf": single}, "minItems": 1, "maxItems": ROWS}
        fields[kind] = {"anyOf": [*single, rows]}
    return {"properties": fields, **_by_reference(card)}


def _by_reference(card: Card) -> Json:
    place = f"#/components/schemas/ImageBody.{card.id}/allOf"
    fewer = [{"$ref": f"{place}/{index}"} for index in range(len(_by_sampler(card)))]
    return {"allOf": fewer} if fewer else {}


def curl(
    server: str, route: str, body: Json, format: Format, out: Path | str, *, key: bool = False, files: Files = None
) -> str:
    """The command that posts this body to /v1/<route> of a server, with files as a form, and writes the file alone.

    server: its URL or host and port. key: whether it wants one, which the command takes from INSTEP_KEY.
    """
    asked = [] if files else ["-H", "Content-Type: application/json"]
    posted = _form(body, files) if files else ["-d", json.dumps(body, ensure_ascii=False)]
    options = shlex.join([*asked, "-H", f"Accept: image/{format}", *posted, "-o", str(out)])
    return " ".join([f"curl {shlex.quote(f'{server}/v1/{route}')}", *([_KEY] if key else []), options])


def _form(body: Json, files: Mapping[str, Path]) -> list[str]:
    """The options of curl that send a form; a list has an option for each entry."""
    found = [("-F", f"{name}=@{json.dumps(str(file), ensure_ascii=False)}") for name, file in files.items()]
    for name, value in body.items():
        name, values = (f"{name}[]", value) if isinstance(value, list) else (name, [value])
        found += [("--form-string", f"{name}={one if isinstance(one, str) else json.dumps(one)}") for one in values]
    return [word for pair in found for word in pair]


def first_curl(server: str, card: Card, *, key: bool) -> str:
    """The command for a first picture by this card, with nothing but what it needs."""
    body = {name: value for name, value in example(card).items() if name in ("model", "prompt", "class_label")}
    return curl(server, "images/generations", body, "png", "picture.png", key=key)


def url_of(host: str, port: int) -> str:
    """Where a client on this machine reaches what listens there; what listens on all addresses, on its own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
