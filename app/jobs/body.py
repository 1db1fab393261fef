"""The request body: OpenAI's image fields and ours, checked against a card, made into a Request.

Knows nothing of HTTP: no fastapi here, so the command line builds its requests through the same door.
"""

from __future__ import annotations

import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cards.card import Card, Size, Sizes, parse_size
from app.cards.catalog import find_label
from app.errors import InvalidJSON, InvalidValue, UnknownField, Unsupported
from app.imaging import FORMATS
from app.jobs.fields import SEEDS, Flag, Labels, Real, Text, Texts, Whole, first_seed, within
from app.jobs.guidance import guidance_of
from app.jobs.other_names import hint
from app.keys import NOBODY, ApiKey
from app.request import ClassLabel, Condition, Delivery, ImageSpec, Prompt, Recipe, Request
from app.samplers.table import valid_samplers

DEADLINE_LIMIT = 86_400
PRIORITY_LIMIT = 10


_IGNORED = "Accepted for OpenAI's clients and ignored; the reply warns of what asks for something that is not done"


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
        self._served()
        conditions = self._conditions(card)
        steps = within("num_inference_steps", self.num_inference_steps, 1, card.limits.num_inference_steps)
        first = first_seed(self.seed)
        previews = within("partial_images", self.partial_images, 0, 3)
        priority = int(within("priority", self.priority, -PRIORITY_LIMIT, PRIORITY_LIMIT) or 0)
        width, height = self._size(card)
        recipe = Recipe(
            model=card.id,
            width=width,
            height=height,
            sampler=self._sampler(card),
            steps=int(steps or card.defaults.num_inference_steps),
            guidance=guidance_of(self, card),
            text_length=self._text_length(card),
        )
        delivery = Delivery(
            tenant=key.name,
            weight=key.weight,
            priority=min(priority, key.priority),
            deadline=self._deadline(patience),
            previews=int(previews or 0) if self.stream else 0,
        )
        images = tuple(ImageSpec(one, (first + i) % SEEDS) for i, one in enumerate(conditions))
        return Request(request_id, recipe, images, delivery)

    def _deadline(self, patience: float | None) -> float | None:
        """When the image is of no use any more, on the clock of `time.monotonic()`: the earlier of what is known.

        NOTE: a client's read timeout is no deadline of a stream, where pings keep it from running out.
        """
        asked = within("deadline", self.deadline, 0.1, DEADLINE_LIMIT)
        known = [seconds for seconds in (asked, None if self.stream else patience) if seconds is not None]
        return time.monotonic() + min(known) if known else None

    def _served(self) -> None:
        """Fields whose bounds are the server's own, not a card's."""
        if self.response_format not in (None, "b64_json"):
            raise Unsupported(
                'response_format: only "b64_json" is served; send Accept: image/png for raw bytes',
                param="response_format",
            )
        if self.output_format is not None and self.output_format not in FORMATS:
            raise Unsupported(f"output_format: expects one of {', '.join(FORMATS)}", param="output_format")
        within("output_compression", self.output_compression, 0, 100)

    def _conditions(self, card: Card) -> list[Condition]:
        """One condition for each image, in order."""
        n = int(within("n", self.n, 1, card.limits.n) or 1)
        if self.grid is not None:
            within("grid.columns", self.grid.columns, 1, card.limits.n)
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

    def _text_length(self, card: Card) -> int:
        if not card.draws_classes:
            return int(within("max_sequence_length", self.max_sequence_length, 1, card.text.t5) or card.text.t5)
        if self.max_sequence_length is not None:
            message = f"max_sequence_length: {card.id} draws classes and reads no text"
            raise InvalidValue(message, param="max_sequence_length")
        return 0


def read_body(raw: object) -> ImageBody:
    """A parsed JSON body as an ImageBody; types are checked here, bounds in `to_request`.

    Raises InvalidValue naming the field, or UnknownField with the name that was probably meant.
    """
    if not isinstance(raw, dict):
        raise InvalidJSON("The body must be a JSON object")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in ImageBody.model_fields:
            raise UnknownField(f'Unknown field "{key[:64]}"{hint(key, ImageBody.model_fields)}', param=key[:64])
    try:
        return ImageBody(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"][:2])[:64]
        raise InvalidValue(f"{field}: {_reason(first['type'], first['msg'])}", param=field) from None


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


def _reason(kind: str, message: str) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    return {"extra_forbidden": "is an unknown field", "missing": "is required"}.get(kind, "expects a JSON object")
