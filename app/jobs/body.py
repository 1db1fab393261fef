"""The request body: OpenAI's image fields and ours, checked against a card and made into a Request."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cards.card import Card, Size, Sizes, parse_size
from app.cards.catalog import find_label
from app.errors import InvalidJSON, InvalidValue, UnknownField, Unsupported, first_problem
from app.imaging import FORMATS
from app.jobs.fields import SEEDS, Flag, Labels, Real, Text, Texts, Whole, bounds, first_seed, within
from app.jobs.other_names import hint
from app.keys import NOBODY, ApiKey
from app.request import ClassLabel, Condition, Delivery, Guidance, ImageSpec, Prompt, Recipe, Request, SkipGuidance
from app.samplers.table import valid_samplers

IGNORED = ("quality", "background", "moderation", "style", "user", "safety_identifier", "complexity")
_IGNORED = "Accepted for OpenAI's clients and ignored; the reply warns of what asks for something that is not done"


NOT_TAKEN = {
    "true_cfg_scale": "has no embedded guidance; its guidance_scale is classifier-free guidance",
    **dict.fromkeys(
        (f"skip_layer_guidance_{name}" for name in ("scale", "start", "stop")), "has no skip-layer guidance"
    ),
    "max_sequence_length": "draws classes and reads no text",
}
"""Fields of numbers that only some cards take, and why another refuses them."""


WORDS = {"extra_forbidden": "is an unknown field", "missing": "is required", "model_type": "expects a JSON object"}


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
    response_format: Text | None = Field(None, description='Only "b64_json"; send Accept: image/png for raw bytes')
    output_format: Text | None = Field(None, description="png (with the request in its text chunks), jpeg or webp")
    output_compression: Whole | None = Field(None, description="Quality of jpeg and webp, 0 to 100; default 90")
    stream: Flag | None = Field(None, description="Server-sent events instead of one reply")
    partial_images: Whole | None = Field(None, description="Previews of each image while it is drawn, with stream")
    negative_prompt: Text | None = Field(None, description="What guidance moves away from")
    num_inference_steps: Whole | None = Field(None, description="Denoising steps")
    guidance_scale: Real | None = Field(None, description="Classifier-free guidance; 1 or less draws without it")
    true_cfg_scale: Real | None = Field(
        None,
        description="Guidance away from negative_prompt, where the network is given guidance_scale (FLUX.1-dev)",
    )
    skip_layer_guidance_scale: Real | None = Field(None, description="Skip-layer guidance (SD3.5-medium); 0 is none")
    skip_layer_guidance_start: Real | None = Field(None, description="Share of the steps after which it acts")
    skip_layer_guidance_stop: Real | None = Field(None, description="Share of the steps before which it acts")
    seed: Whole | None = Field(
        None, description="Seed of the first image; the next ones count up. Drawn if absent or -1"
    )
    sampler: Text | None = Field(None, description="The solver; GET /v1/models lists those of a model")
    class_label: Labels | None = Field(None, description="A class id or name, or a list: one image for each")
    max_sequence_length: Whole | None = Field(None, description="Text length in tokens that T5 is padded to")
    priority: Whole | None = Field(
        None, description="Breaks ties among waiting requests, up to what the key may; higher goes first"
    )
    deadline: Real | None = Field(None, description="Seconds from now after which the image is of no use")
    grid: Grid | None = Field(None, description="Return all images as one sheet")
    quality: Any = Field(None, description=_IGNORED)
    background: Any = Field(None, description=_IGNORED)
    moderation: Any = Field(None, description=_IGNORED)
    style: Any = Field(None, description=_IGNORED)
    user: Any = Field(None, description=_IGNORED)
    safety_identifier: Any = Field(None, description=_IGNORED)
    complexity: Any = Field(None, description=_IGNORED)

    def to_request(self, card: Card, request_id: str, key: ApiKey = NOBODY, patience: float | None = None) -> Request:
        """The complete request for this card: every default and every limit is applied here, once.

        key: whose it is, with the highest priority that it may have. patience: seconds after which the client hangs up.
        Raises InvalidValue or Unsupported naming the field and its range.
        """
        self._check_formats()
        sampler = self._sampler(card)
        numbers = self._numbers(card, sampler)
        conditions = self._conditions(card, int(numbers["n"] or 1))
        first = first_seed(self.seed)
        width, height = self._size(card)
        recipe = Recipe(
            model=card.id,
            width=width,
            height=height,
            sampler=sampler,
            steps=int(numbers["num_inference_steps"] or 0),
            guidance=guidance_of(self, card, numbers),
            text_length=int(numbers.get("max_sequence_length") or 0),
        )
        delivery = Delivery(
            tenant=key.name,
            weight=key.weight,
            priority=min(int(numbers["priority"] or 0), key.priority),
            deadline=self._deadline(numbers["deadline"], patience),
            previews=int(numbers["partial_images"] or 0) if self.stream else 0,
        )
        images = tuple(ImageSpec(one, (first + i) % SEEDS) for i, one in enumerate(conditions))
        return Request(request_id, recipe, images, delivery)

    def _numbers(self, card: Card, sampler: str) -> dict[str, float | None]:
        """Every numeric field that the card takes, its default where it is absent. Raises InvalidValue."""
        spans = bounds(card, sampler)
        for field, reason in NOT_TAKEN.items():
            if field not in spans and getattr(self, field) is not None:
                raise InvalidValue(f"{field}: {card.id} {reason}", param=field)
        if self.grid is not None:
            within("grid.columns", self.grid.columns, spans["n"])
        return {field: within(field, getattr(self, field), span) for field, span in spans.items() if field != "seed"}

    def _deadline(self, asked: float | None, patience: float | None) -> float | None:
        """When the image is of no use any more, on the clock of `time.monotonic()`: the earlier of what is known.

        NOTE: a client's read timeout is no deadline of a stream, where pings keep it from running out.
        """
        known = [seconds for seconds in (asked, None if self.stream else patience) if seconds is not None]
        return time.monotonic() + min(known) if known else None

    def _check_formats(self) -> None:
        if self.response_format not in (None, "b64_json"):
            raise Unsupported(
                'response_format: only "b64_json" is served; send Accept: image/png for raw bytes',
                param="response_format",
            )
        if self.output_format is not None and self.output_format not in FORMATS:
            raise Unsupported(f"output_format: expects one of {', '.join(FORMATS)}", param="output_format")

    def _conditions(self, card: Card, n: int) -> list[Condition]:
        """One condition for each image, in order."""
        given, field = self._wanted(card)
        if not isinstance(given, list):
            return [self._condition(card, given)] * n
        if not 1 <= len(given) <= card.limits.n:
            raise InvalidValue(f"{field}: a list takes 1 to {card.limits.n} entries, not {len(given)}", param=field)
        if n != 1:
            raise InvalidValue(f"n: must be 1 when {field} is a list; repeat the entry instead", param="n")
        return [self._condition(card, one) for one in given]

    def _wanted(self, card: Card) -> tuple[int | str | list[int | str] | list[str], str]:
        """What to draw and the field that says so. A label model takes its label from `prompt` when that is all
        there is, so that a client which knows only prompts can use it."""
        if not card.draws_classes and self.class_label is not None:
            raise InvalidValue(f"class_label: {card.id} draws a prompt and has no classes", param="class_label")
        if self.class_label is not None:
            return self.class_label, "class_label"
        if self.prompt is None:
            field = "class_label" if card.draws_classes else "prompt"
            raise InvalidValue(f"{field}: is required by {card.id}", param=field)
        return self.prompt, "prompt"

    def _condition(self, card: Card, given: int | str) -> Condition:
        if card.draws_classes:
            if self.negative_prompt:
                raise InvalidValue(f"negative_prompt: {card.id} draws classes and takes none", param="negative_prompt")
            return ClassLabel(find_label(card, given, "prompt" if self.class_label is None else "class_label"))
        for field, words in (("prompt", str(given)), ("negative_prompt", self.negative_prompt or "")):
            if len(words) > card.limits.prompt:
                raise InvalidValue(
                    f"{field}: {len(words)} characters, {card.id} takes 0 to {card.limits.prompt}", param=field
                )
        return Prompt(str(given), self.negative_prompt)

    def _size(self, card: Card) -> Size:
        if self.size in (None, "auto"):
            return card.default_size
        try:
            width, height = parse_size(str(self.size))
        except ValueError:
            raise InvalidValue(f'size: expects "auto" or {describe_sizes(card.limits.sizes)}', param="size") from None
        if not allows(card.limits.sizes, width, height):
            message = f"size: {width}x{height} is not served by {card.id}; expects {describe_sizes(card.limits.sizes)}"
            raise InvalidValue(message, param="size")
        return width, height

    def _sampler(self, card: Card) -> str:
        names = valid_samplers(card.schedule)
        sampler = card.defaults.sampler if self.sampler is None else self.sampler
        if sampler not in names:
            raise InvalidValue(f"sampler: {card.id} takes one of {', '.join(names)}", param="sampler")
        return sampler


def given_fields(raw: object, known: Collection[str]) -> dict[str, Any]:
    """The fields of a parsed JSON body that are not null. Raises InvalidJSON, and UnknownField with what was meant."""
    if not isinstance(raw, dict):
        raise InvalidJSON("The body must be a JSON object")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in known:
            raise UnknownField(f'Unknown field "{key[:64]}"{hint(key, known)}', param=key[:64])
    return given


def read_body(raw: object) -> ImageBody:
    """A parsed JSON body as an ImageBody; types are checked here, bounds in `to_request`.

    Raises InvalidValue naming the field, or UnknownField with the name that was probably meant.
    """
    given = given_fields(raw, ImageBody.model_fields)
    try:
        return ImageBody(**given)
    except ValidationError as error:
        place, reason = first_problem(error.errors(include_url=False), WORDS)
        field = ".".join(place[:2])[:64]
        raise InvalidValue(f"{field}: {reason}", param=field) from None


def guidance_of(body: ImageBody, card: Card, numbers: Mapping[str, float | None]) -> Guidance:
    """The guidance of a body. numbers: its checked fields. Raises InvalidValue: skip-layer guidance that cannot act."""
    scale, embedded = float(numbers["guidance_scale"] or 0), None
    if card.guidance == "embedded":
        # As FluxPipeline: the network is given guidance_scale, and classifier-free guidance has a scale of its own.
        scale, embedded = float(numbers["true_cfg_scale"] or 1.0), scale
    facts = card.skip_layer_guidance
    if facts is None:
        return Guidance(scale, embedded)
    field = "skip_layer_guidance_scale"
    if body.skip_layer_guidance_scale and scale <= 1:
        raise InvalidValue(f"{field}: needs a guidance_scale over 1 beside it", param=field)
    skip = SkipGuidance(*(float(numbers[f"skip_layer_guidance_{name}"] or 0) for name in ("scale", "start", "stop")))
    if skip.start >= skip.stop:
        field = "skip_layer_guidance_" + ("stop" if body.skip_layer_guidance_start is None else "start")
        raise InvalidValue(f"{field}: {skip.start:g} to {skip.stop:g} is no share of the steps", param=field)
    # A scale of 0 is part of the facts only where the card's own is another.
    return Guidance(scale, embedded, skip if scale > 1 and (skip.scale or facts.scale) else None)


def guidance_facts(guidance: Guidance) -> dict[str, Any]:
    """The fields of a body that ask for this guidance."""
    told: dict[str, Any] = {"guidance_scale": guidance.scale if guidance.embedded is None else guidance.embedded}
    if guidance.embedded is not None and guidance.guided:
        told["true_cfg_scale"] = guidance.scale
    if guidance.skip is not None:
        told["skip_layer_guidance_scale"] = guidance.skip.scale
        told["skip_layer_guidance_start"] = guidance.skip.start
        told["skip_layer_guidance_stop"] = guidance.skip.stop
    return told


def allows(sizes: Sizes, width: int, height: int) -> bool:
    """Whether a card's sizes take this one."""
    fits = all(sizes.min <= side <= sizes.max and side % sizes.multiple == 0 for side in (width, height))
    return fits and (width == height or not sizes.square)


def describe_sizes(sizes: Sizes) -> str:
    """The range of sizes in words."""
    if sizes.min == sizes.max:
        return f'"{sizes.min}x{sizes.min}"'
    shape = "WxW" if sizes.square else "WxH"
    return f'"{shape}" with sides of {sizes.min} to {sizes.max} pixels, multiples of {sizes.multiple}'
