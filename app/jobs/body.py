"""The body of a request for images. A field has one home: `ImageBody` has its name, type and description, `bounds` what
a card allows in it. The check of a body, its JSON schema and the flags of the command line are made from these two.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cards.card import NO_REFINER, Card, Refining, parse_size
from app.cards.catalog import Adapters, Registry, find_adapters, find_label
from app.errors import Code, InvalidValue, ModelNotFound, RequestError, first_problem
from app.imaging import DEFAULT_QUALITY
from app.jobs.fields import (
    WORDS,
    Base64,
    Corner,
    FileFormat,
    Flag,
    Labels,
    Loras,
    Real,
    Sides,
    Text,
    Texts,
    Whole,
    without_effect,
)
from app.jobs.other_names import hint, sampler_hint
from app.keys import NOBODY, ApiKey
from app.request import (
    ClassLabel,
    Condition,
    Delivery,
    Framing,
    Guidance,
    ImageSpec,
    Prompt,
    Recipe,
    Refiner,
    Request,
    SkipGuidance,
)
from app.samplers.grids import GRIDS
from app.samplers.table import most_steps, valid_samplers

Json = dict[str, Any]
B = TypeVar("B", bound=BaseModel)

SEEDS = 2**63
"""Seeds are 0 to SEEDS - 1; image i of a request uses (seed + i) mod SEEDS."""

ANY_SEED = -1
"""A seed that asks for any, as A1111 and those after it write it; the same as none."""

MOST_TOKENS = 512
"""The largest `max_sequence_length` where the field has no effect: the largest of any model."""

MOST_SKIPPED = 11
"""The most layers of a CLIP that can be left out: CLIP-L has 12."""

PRIORITY_LIMIT = 10

LEAST_STRENGTH, RESIZE, MASK_BLUR = 0.01, "crop", 4.0
"""Of a body with a picture (`app/jobs/edit.py`): the least `strength`, and the defaults of `resize` and `mask_blur`."""

_UNUSED = "is accepted for OpenAI's clients and not used"
FRAMING = ("original_size", "crop", "target_size")
SKIPPING = ("skip_layer_guidance_scale", "skip_layer_guidance_start", "skip_layer_guidance_stop")


class Grid(BaseModel):
    """One sheet of all images instead of one file each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: Whole = Field(description="Pictures in a row of the sheet")


class ImageBody(BaseModel):
    """The body of POST /v1/images/generations. An absent field and null are the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    prompt: Texts | None = Field(None, description="What to draw; a list draws one image for each entry")
    model: Text | None = Field(None, description="A model id or alias; absent or empty for the default model")
    n: Whole | None = Field(None, description="Images of one prompt or label; with a list it must be 1")
    size: Text | None = Field(None, description='"WxH" in pixels, or "auto" for the model\'s own size')
    response_format: Base64 | None = Field(None, description='Only "b64_json"; send Accept: image/png for raw bytes')
    output_format: FileFormat | None = Field(None, description="png (with the request in its text), jpeg or webp")
    output_compression: Whole | None = Field(None, description="Quality of jpeg and webp, 0 to 100")
    stream: Flag | None = Field(None, description="Server-sent events instead of one reply")
    partial_images: Whole | None = Field(None, description="Previews of each image while it is drawn, with stream")
    progress: Flag | None = Field(None, description="An event for every step of each image, with stream")
    negative_prompt: Text | None = Field(None, description="What guidance moves away from")
    num_inference_steps: Whole | None = Field(None, description="Denoising steps")
    guidance_scale: Real | None = Field(
        None, description="Guidance; 1 or less draws without it, but FLUX.1-dev takes any number as an input"
    )
    true_cfg_scale: Real | None = Field(
        None, description="Guidance away from negative_prompt, where guidance_scale is an input (FLUX.1-dev)"
    )
    skip_layer_guidance_scale: Real | None = Field(None, description="Skip-layer guidance (SD3.5-medium); 0 is none")
    skip_layer_guidance_start: Real | None = Field(None, description="Share of the steps after which it acts")
    skip_layer_guidance_stop: Real | None = Field(None, description="Share of the steps before which it acts")
    seed: Whole | None = Field(None, description="Seed of the first image; the next ones count up. -1 for any")
    sampler: Text | None = Field(None, description="The solver; GET /v1/models lists those of a model")
    schedule: Text | None = Field(
        None,
        description="The noise levels that the sampler walks: karras, exponential or sgm_uniform; else the model's",
    )
    class_label: Labels | None = Field(None, description="A class id or name, or a list: one image for each")
    max_sequence_length: Whole | None = Field(None, description="Text length in tokens that T5 is padded to")
    clip_skip: Whole | None = Field(
        None, description="Last layers of CLIP that are left out of the prompt; 0 is none, and A1111 counts one more"
    )
    loras: Loras | None = Field(
        None, description="LoRAs that change the model, each by its name and a weight of -2 to 2; GET /v1/loras"
    )
    refiner: Refining | None = Field(
        None, description='A model that draws the last part of the picture, from switch_at on; "none" draws without'
    )
    original_size: Sides | None = Field(
        None, description="SDXL: draw as if it were a photograph of this size, which was then cut; default: size"
    )
    crop: Corner | None = Field(None, description="SDXL: where it was cut, as [left, top] in pixels; default [0, 0]")
    target_size: Sides | None = Field(None, description="SDXL: the size that it was cut to; default: size")
    priority: Whole | None = Field(
        None, description="Breaks ties among waiting requests, up to what the key may; higher goes first"
    )
    deadline: Real | None = Field(None, description="Seconds from now after which the image is of no use")
    grid: Grid | None = Field(None, description="Return all images as one sheet")
    quality: Any = without_effect("num_inference_steps says how much work goes into a picture", "auto", "standard")
    background: Any = without_effect("pictures are opaque", "auto", "opaque")
    moderation: Any = without_effect("nothing is filtered here", "auto", "low")
    style: Any = without_effect("write the style into the prompt")
    complexity: Any = without_effect("no model here has such a setting", "auto")
    user: Any = Field(None, description=_UNUSED)
    safety_identifier: Any = Field(None, description=_UNUSED)

    def to_request(
        self,
        card: Card,
        request_id: str,
        key: ApiKey = NOBODY,
        patience: float | None = None,
        adapters: Adapters | None = None,
        refiner: Card | None = None,
    ) -> Request:
        """The complete request for this card: every default and every limit is applied here, once.

        key: its owner's name, share and highest priority. patience: seconds after which the client hangs up. adapters:
        those that it may ask for. refiner: as `refined_by` finds it. Raises InvalidValue naming the field and its
        range.
        """
        values = self._values(card)
        conditions = self._conditions(card, values["n"])
        first = first_seed(self.seed)
        width, height = card.default_size if values["size"] == "auto" else parse_size(values["size"])
        recipe = Recipe(
            model=card.model,
            width=width,
            height=height,
            sampler=values["sampler"],
            steps=values["num_inference_steps"],
            guidance=self._guidance(card, values),
            text_length=values["max_sequence_length"] if card.has("t5") else card.text_length,
            strength=values.get("strength"),
            adapters=find_adapters(card, self.loras or (), adapters or {}) if self.loras or card.loras else (),
            grid=values["schedule"] or "",
            clip_skip=values.get("clip_skip", 0),
            framing=self._framing(f"{width}x{height}"),
        )
        if refiner:
            recipe = replace(recipe, refiner=self._refiner(card, refiner, recipe))
        card.legs(recipe)  # raises where a strength leaves no step, or a sampler does not walk the schedule
        images = tuple(ImageSpec(one, (first + i) % SEEDS) for i, one in enumerate(conditions))
        return Request(request_id, recipe, images, self._delivery(values, key, patience))

    def _delivery(self, values: dict[str, Any], key: ApiKey, patience: float | None) -> Delivery:
        # NOTE: a client's read timeout is no deadline of a stream, where pings keep it from running out.
        limits = [seconds for seconds in (self.deadline, None if self.stream else patience) if seconds is not None]
        return Delivery(
            tenant=key.name,
            weight=key.weight,
            priority=min(values["priority"], key.priority),
            deadline=time.monotonic() + min(limits) if limits else None,
            previews=values["partial_images"] if self.stream else 0,
            progress=bool(self.stream and self.progress),
        )

    def refined_by(self, card: Card, registry: Registry) -> Card | None:
        """The card of the model that draws the last part of this card's pictures, if one does. registry: what the key
        may use. Raises as `Registry.refiner`."""
        asked = self.refiner or card.refiner
        if not asked or asked.model == NO_REFINER:
            return None
        try:
            return registry.refiner(card, asked.model)
        except (ModelNotFound, InvalidValue) as error:
            if self.refiner:
                raise
            # NOTE: a key that may not use the model must not read its name.
            why = (
                error.message if isinstance(error, InvalidValue) else f"refiner: this key may not use that of {card.id}"
            )
            raise error.again(f'{why}; {{"model": "{NO_REFINER}"}} draws without it', "refiner") from None

    def _refiner(self, card: Card, refiner: Card, recipe: Recipe) -> Refiner:
        """The refiner of a recipe. Raises InvalidValue: it does not draw this size, or has no skip-layer guidance."""
        _within(refiner, "refiner", f"{recipe.width}x{recipe.height}", {"pattern": refiner.limits.sizes.pattern})
        skip = recipe.guidance.skip
        if skip and skip.scale and refiner.skip_layer_guidance is None:
            raise InvalidValue(f"refiner: {refiner.id} has no skip-layer guidance", param="refiner")
        return Refiner(refiner.model, (self.refiner or card.refiner or Refining(model=refiner.id)).switch_at)

    def _framing(self, size: str) -> Framing | None:
        """The sizes that an SDXL network takes beside its text; None if the body has none of these fields."""
        if all(getattr(self, field) is None for field in FRAMING):
            return None
        (width, height), (left, top) = parse_size(self.original_size or size), self.crop or (0, 0)
        return Framing((height, width), (top, left), parse_size(self.target_size or size)[::-1])

    def _values(self, card: Card) -> dict[str, Any]:
        """Every field that the card takes, within its bounds, with the card's default where it is absent."""
        for field, (takes, reason) in _SOME_CARDS.items():
            value = getattr(self, field)
            asked = bool(value) if field == "negative_prompt" else value is not None
            if asked and not takes(card):
                raise InvalidValue(f"{field}: {card.id} {reason}", param=field)
        spans = bounds(card, self.sampler, type(self))
        if self.grid:
            _within(card, "grid.columns", self.grid.columns, spans["n"])
        return {field: _within(card, field, getattr(self, field), span) for field, span in spans.items()}

    def _guidance(self, card: Card, values: dict[str, Any]) -> Guidance:
        """The guidance of checked values. Raises InvalidValue: skip-layer guidance that cannot act."""
        scale, embedded = values["guidance_scale"], None
        if card.guidance == "embedded":
            # As in FluxPipeline: guidance_scale is an input, and classifier-free guidance has a scale of its own.
            scale, embedded = values["true_cfg_scale"], scale
        if card.skip_layer_guidance is None:
            return Guidance(scale, embedded)
        field, _, stop = SKIPPING
        if self.skip_layer_guidance_scale and scale <= 1:
            raise InvalidValue(f"{field}: needs a guidance_scale over 1 beside it", param=field)
        skip = SkipGuidance(*(values[name] for name in SKIPPING))
        if skip.start >= skip.stop:
            field = stop if self.skip_layer_guidance_start is None else SKIPPING[1]
            raise InvalidValue(f"{field}: {skip.start:g} to {skip.stop:g} is no share of the steps", param=field)
        # A scale of 0 is part of the facts only where the card's own is another.
        return Guidance(scale, embedded, skip if scale > 1 and (skip.scale or card.skip_layer_guidance.scale) else None)

    def _conditions(self, card: Card, n: int) -> Sequence[Condition]:
        """One condition for each image, in order.

        A model of classes takes its label from `prompt` when there is no other, for clients that know only prompts.
        """
        field = "prompt" if self.class_label is None else "class_label"
        asked = self.prompt if self.class_label is None else self.class_label
        if asked is None:
            field = "class_label" if card.draws_classes else "prompt"
            raise InvalidValue(f"{field}: is required by {card.id}", param=field)
        entries = asked if isinstance(asked, list) else [asked]
        if not 1 <= len(entries) <= card.limits.n:
            raise InvalidValue(f"{field}: a list takes 1 to {card.limits.n} entries, not {len(entries)}", param=field)
        if isinstance(asked, list) and n != 1:
            raise InvalidValue(f"n: must be 1 when {field} is a list; repeat the entry instead", param="n")
        if card.draws_classes:
            return [ClassLabel(find_label(card, one, field)) for one in entries] * n
        texts = [_within(card, "prompt", one, {"maxLength": card.limits.prompt}) for one in entries]
        return [Prompt(text, self.negative_prompt) for text in texts] * n


def ignored(kind: type[ImageBody]) -> Json:
    """The fields of a body that OpenAI's clients send and that have no effect, by name."""
    return {name: field for name, field in kind.model_fields.items() if field.annotation is Any}


_SOME_CARDS: dict[str, tuple[Callable[[Card], bool], str]] = {
    "class_label": (lambda card: card.draws_classes, "draws a prompt and has no classes"),
    "negative_prompt": (lambda card: not card.draws_classes, "draws classes and takes none"),
    "max_sequence_length": (lambda card: not card.draws_classes, "draws classes and reads no text"),
    "true_cfg_scale": (
        lambda card: card.guidance == "embedded",
        "has no embedded guidance; its guidance_scale is classifier-free guidance",
    ),
    "clip_skip": (lambda card: card.has("clip_skip"), "reads CLIP as it was trained to"),
    **dict.fromkeys(FRAMING, (lambda card: card.framing, "has no network that takes sizes, as those of SDXL do")),
    **dict.fromkeys(SKIPPING, (lambda card: card.skip_layer_guidance is not None, "has no skip-layer guidance")),
}
"""Fields that only some cards take: whether a card does, and why another refuses them."""


def bounds(card: Card, sampler: str | None = None, kind: type[ImageBody] = ImageBody) -> dict[str, Json]:
    """What this card allows in every field of a body that it takes, and its defaults, as keywords of JSON schema.

    sampler: that of the body, which bounds the steps; None for the card's own.
    """
    limits, defaults, samplers = card.limits, card.defaults, valid_samplers(card.schedule)
    chosen = sampler if sampler in samplers else defaults.sampler
    most = most_steps(card.schedule, chosen, limits.num_inference_steps)
    found: dict[str, Json] = {field: {} for field in kind.model_fields} | {
        "n": _span(1, limits.n, 1),
        "size": {"pattern": f"^auto$|{limits.sizes.pattern}", "default": defaults.size},
        "output_compression": _span(0, 100, DEFAULT_QUALITY),
        "partial_images": _span(0, 3, 0),
        "negative_prompt": {"maxLength": limits.prompt},
        "num_inference_steps": _span(1, most, min(most, defaults.num_inference_steps)),
        "guidance_scale": _span(0, limits.guidance_scale, defaults.guidance_scale),
        "true_cfg_scale": _span(0, limits.guidance_scale, 1.0),
        "seed": _span(ANY_SEED, SEEDS - 1),
        "sampler": {"enum": [*samplers, None], "default": defaults.sampler},
        "schedule": {"enum": [*GRIDS, None]},
        "clip_skip": _span(0, MOST_SKIPPED, 0),
        "max_sequence_length": _span(1, card.text.t5 if card.has("t5") else MOST_TOKENS, card.text_length),
        "priority": _span(-PRIORITY_LIMIT, PRIORITY_LIMIT, 0),
        "deadline": _span(0.1, 86_400),
        "strength": _span(LEAST_STRENGTH, 1, defaults.strength),
        "mask_blur": _span(0, 64, MASK_BLUR),
        "overlay": {"default": True},
        "resize": {"default": RESIZE},
    }
    if skip := card.skip_layer_guidance:
        spans = _span(0, limits.guidance_scale, skip.scale), _span(0, 1, skip.start), _span(0, 1, skip.stop)
        found |= zip(SKIPPING, spans, strict=True)
    taken = [name for name in kind.model_fields if name not in _SOME_CARDS or _SOME_CARDS[name][0](card)]
    return {name: found[name] for name in taken}


def _span(low: float, high: float, default: float | None = None) -> Json:
    return {"minimum": low, "maximum": high, **({} if default is None else {"default": default})}


def most_steps_of(card: Card) -> dict[str, int]:
    most = card.limits.num_inference_steps
    return {sampler: most_steps(card.schedule, sampler, most) for sampler in valid_samplers(card.schedule)}


def _within(card: Card, field: str, value: Any, bound: Json) -> Any:
    """The value, or the default of an absent one. Raises InvalidValue: it is not within the bound.

    NOTE: an int stays one: a seed is no float.
    """
    if value is None:
        return bound.get("default")
    if "minimum" in bound and not bound["minimum"] <= value <= bound["maximum"]:
        raise InvalidValue(f"{field}: expects {bound['minimum']} to {bound['maximum']}", param=field)
    if "enum" in bound and value not in bound["enum"]:
        valid = [*filter(None, bound["enum"])]
        meant = sampler_hint(value, valid) if field == "sampler" else ""
        raise InvalidValue(f"{field}: expects one of {', '.join(valid)}{meant}", param=field)
    if "pattern" in bound and not re.fullmatch(bound["pattern"], value):
        message = f'{field}: {card.id} has no size "{value[:32]}"; expects "auto" or {card.limits.sizes}'
        raise InvalidValue(message, param=field)
    if "maxLength" in bound and len(value) > bound["maxLength"]:
        message = f"{field}: {len(value)} characters, {card.id} takes 0 to {bound['maxLength']}"
        raise InvalidValue(message, param=field)
    return value


def first_seed(seed: int | None) -> int:
    """The seed of a request's first image; drawn where it is absent or ANY_SEED.

    NOTE: drawn below 2**32, so that a JavaScript client, whose numbers end at 2**53, can send it back.
    """
    return secrets.randbelow(2**32) if seed is None or seed == ANY_SEED else seed


def read_body(raw: object) -> ImageBody:
    """A parsed JSON body as an ImageBody; types are checked here, bounds in `to_request`. Raises as `read_as`."""
    return read_as(ImageBody, raw, ImageBody.model_fields)


def read_as(kind: type[B], raw: object, known: Collection[str]) -> B:
    """A parsed JSON body of this kind. known: the fields that it may have.

    Raises RequestError naming the field, and for an unknown one the name that was probably meant.
    """
    if not isinstance(raw, dict):
        raise RequestError("The body must be a JSON object", code="invalid_json")
    fields = {name: value for name, value in raw.items() if value is not None}
    for name in fields:
        if name not in known:
            message = f'Unknown field "{name[:64]}"{hint(name, known)}'
            raise RequestError(message, param=name[:64], code="unknown_parameter")
    try:
        return kind(**fields)
    except ValidationError as error:
        place, reason = first_problem(error.errors(include_url=False), WORDS)
        field = ".".join(place[:3])[:64]
        unserved = field in ("response_format", "output_format") and isinstance(fields[field], str)
        code: Code = "unsupported_parameter" if unserved else "invalid_value"
        raise InvalidValue(f"{field}: {reason}", param=field, code=code) from None
