"""The request body: OpenAI's image fields and ours, checked against a card and made into a Request; what of it has no
effect, in words for the reply."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.cards.card import Card, Size, parse_size
from app.cards.catalog import find_label
from app.errors import InvalidValue, RequestError, first_problem
from app.imaging import FORMATS, Format, left_out
from app.jobs.fields import SEEDS, Flag, Labels, Real, Text, Texts, Whole, first_seed, numbers_of
from app.jobs.other_names import hint
from app.keys import NOBODY, ApiKey
from app.request import ClassLabel, Condition, Delivery, Guidance, ImageSpec, Prompt, Recipe, Request, SkipGuidance
from app.samplers.table import compile_table, valid_samplers

B = TypeVar("B", bound=BaseModel)

IGNORED = ("quality", "background", "moderation", "style", "user", "safety_identifier", "complexity")
_IGNORED = "Accepted for OpenAI's clients and ignored; the reply warns of what asks for something that is not done"

_OPENAI: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": (("auto", "opaque"), "pictures are opaque"),
    "quality": (("auto", "standard"), "num_inference_steps says how much work goes into a picture"),
    "style": ((), "write the style into the prompt"),
    "moderation": (("auto", "low"), "nothing is filtered here"),
    "complexity": (("auto",), "no model here has such a setting"),
}
"""OpenAI's fields that change nothing here: the values that ask for nothing else, and what a person should know."""

_SYNTAX = re.compile(
    r"""
      \( [^()]* (?: : \s*+ -?[0-9]*+\.[0-9]++ | [^()0-9] : \s*+ [0-9]++ ) \s*+ \)  # (word:1.3) as in A1111 and ComfyUI
    | \( [^()]+ \) (?: [0-9]?\.[0-9]+ | \+{1,9} | -{2,9} )                         # (word)1.3 as in InvokeAI and compel
    | \[ [^][:]*+ : (?: [^][:]*+ : )? \s*+ (?: [0-9]*+\. )? [0-9]++ \s*+ \]        # [a:b:0.5]   prompt editing
    | < (?: lora | lyco | hypernet ) : [^<>]* >                                    # <lora:name:0.8>
    | \b embedding : \w+                                                           # embedding:name
    """,
    re.VERBOSE | re.IGNORECASE,
)

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
        Raises RequestError naming the field and its range.
        """
        self._check_formats()
        sampler = self._sampler(card)
        numbers = numbers_of(
            card, sampler, lambda field: getattr(self, field), self.grid.columns if self.grid else None
        )
        conditions = self._conditions(card, int(numbers["n"] or 1))
        first = first_seed(self.seed)
        width, height = self._size(card)
        recipe = Recipe(
            model=card.id,
            width=width,
            height=height,
            sampler=sampler,
            steps=int(numbers["num_inference_steps"] or 0),
            guidance=self._guidance(card, numbers),
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

    def _guidance(self, card: Card, numbers: Mapping[str, float | None]) -> Guidance:
        """The guidance, of the checked fields. Raises InvalidValue: skip-layer guidance that cannot act."""
        scale, embedded = float(numbers["guidance_scale"] or 0), None
        if card.guidance == "embedded":
            # As FluxPipeline: the network is given guidance_scale, and classifier-free guidance has a scale of its own.
            scale, embedded = float(numbers["true_cfg_scale"] or 1.0), scale
        facts, name = card.skip_layer_guidance, "skip_layer_guidance"
        if facts is None:
            return Guidance(scale, embedded)
        if self.skip_layer_guidance_scale and scale <= 1:
            raise InvalidValue(f"{name}_scale: needs a guidance_scale over 1 beside it", param=f"{name}_scale")
        skip = SkipGuidance(*(float(numbers[f"{name}_{part}"] or 0) for part in ("scale", "start", "stop")))
        if skip.start >= skip.stop:
            field = f"{name}_{'stop' if self.skip_layer_guidance_start is None else 'start'}"
            raise InvalidValue(f"{field}: {skip.start:g} to {skip.stop:g} is no share of the steps", param=field)
        # A scale of 0 is part of the facts only where the card's own is another.
        return Guidance(scale, embedded, skip if scale > 1 and (skip.scale or facts.scale) else None)

    def _deadline(self, asked: float | None, patience: float | None) -> float | None:
        """When the image is of no use any more, on the clock of `time.monotonic()`: the earlier of what is known.

        NOTE: a client's read timeout is no deadline of a stream, where pings keep it from running out.
        """
        known = [seconds for seconds in (asked, None if self.stream else patience) if seconds is not None]
        return time.monotonic() + min(known) if known else None

    def _check_formats(self) -> None:
        if self.response_format not in (None, "b64_json"):
            raise RequestError(
                'response_format: only "b64_json" is served; send Accept: image/png for raw bytes',
                param="response_format",
                code="unsupported_parameter",
            )
        if self.output_format is not None and self.output_format not in FORMATS:
            raise RequestError(
                f"output_format: expects one of {', '.join(FORMATS)}",
                param="output_format",
                code="unsupported_parameter",
            )

    def _conditions(self, card: Card, n: int) -> list[Condition]:
        """One condition for each image, in order."""
        given, field = self._wanted(card)
        if not isinstance(given, list):
            return [self._condition(card, given, field)] * n
        if not 1 <= len(given) <= card.limits.n:
            raise InvalidValue(f"{field}: a list takes 1 to {card.limits.n} entries, not {len(given)}", param=field)
        if n != 1:
            raise InvalidValue(f"n: must be 1 when {field} is a list; repeat the entry instead", param="n")
        return [self._condition(card, one, field) for one in given]

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

    def _condition(self, card: Card, given: int | str, field: str) -> Condition:
        if card.draws_classes:
            if self.negative_prompt:
                raise InvalidValue(f"negative_prompt: {card.id} draws classes and takes none", param="negative_prompt")
            return ClassLabel(find_label(card, given, field))
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
            raise InvalidValue(f'size: expects "auto" or {card.limits.sizes}', param="size") from None
        if not card.limits.sizes.allows(width, height):
            message = f"size: {width}x{height} is not served by {card.id}; expects {card.limits.sizes}"
            raise InvalidValue(message, param="size")
        return width, height

    def _sampler(self, card: Card) -> str:
        names = valid_samplers(card.schedule)
        sampler = card.defaults.sampler if self.sampler is None else self.sampler
        if sampler not in names:
            raise InvalidValue(f"sampler: {card.id} takes one of {', '.join(names)}", param="sampler")
        return sampler


def given_fields(raw: object, known: Collection[str]) -> dict[str, Any]:
    """The fields of a parsed JSON body that are not null. Raises RequestError, which offers the nearest name for
    an unknown field."""
    if not isinstance(raw, dict):
        raise RequestError("The body must be a JSON object", code="invalid_json")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given:
        if key not in known:
            raise RequestError(
                f'Unknown field "{key[:64]}"{hint(key, known)}', param=key[:64], code="unknown_parameter"
            )
    return given


def read_body(raw: object) -> ImageBody:
    """A parsed JSON body as an ImageBody; types are checked here, bounds in `to_request`.

    Raises RequestError naming the field, with the nearest name for an unknown one.
    """
    return checked(ImageBody, given_fields(raw, ImageBody.model_fields))


def checked(kind: type[B], fields: Mapping[str, Any]) -> B:
    """A body of this kind. Raises InvalidValue naming the field."""
    try:
        return kind(**fields)
    except ValidationError as error:
        place, reason = first_problem(error.errors(include_url=False), WORDS)
        field = ".".join(place[:2])[:64]
        raise InvalidValue(f"{field}: {reason}", param=field) from None


def flags_of(kind: type[BaseModel]) -> Iterator[tuple[str, type, str]]:
    """Name, type of one value and description of every field of a body that a command line can take as a flag.

    The default of each is None: the default of the model. Objects and ignored fields are left out.
    """
    plain = {"string": str, "integer": int, "number": float, "boolean": bool}
    for name, schema in kind.model_json_schema()["properties"].items():
        types = {one.get("type") for one in schema.get("anyOf", [schema])}
        if one := next((plain[word] for word in plain if word in types), None):
            yield name, one, schema["description"]


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The fields of a body that ask for this recipe."""
    guidance = recipe.guidance
    told = {
        "model": recipe.model,
        "size": f"{recipe.width}x{recipe.height}",
        "sampler": recipe.sampler,
        "num_inference_steps": recipe.steps,
        "guidance_scale": guidance.scale if guidance.embedded is None else guidance.embedded,
    }
    if recipe.text_length:
        told["max_sequence_length"] = recipe.text_length
    if guidance.embedded is not None and guidance.guided:
        told["true_cfg_scale"] = guidance.scale
    if guidance.skip is not None:
        told |= {f"skip_layer_guidance_{name}": getattr(guidance.skip, name) for name in ("scale", "start", "stop")}
    return told


def body_warnings(body: ImageBody, format: Format, raw: bool) -> Iterator[str]:
    """What is without effect whichever model draws. format: of the answer; raw: Accept asks for bytes."""
    if body.output_format not in (None, format):
        yield f"output_format is ignored: Accept asks for image/{format}"
    if body.output_compression is not None and format == "png":
        yield "output_compression is ignored: png is lossless; jpeg and webp have a quality"
    if body.partial_images and not body.stream:
        yield "partial_images is ignored: previews come with stream"
    if body.stream and raw:
        yield f"Accept: image/{format} is not followed: stream answers with events"
    for field, (plain, why) in _OPENAI.items():
        value = getattr(body, field)
        if value is not None and value not in plain:
            yield f"{field} is ignored: {why}"
    for field in ("prompt", "negative_prompt"):
        texts = getattr(body, field) or []
        for found in map(_SYNTAX.search, [texts] if isinstance(texts, str) else texts):
            if found:
                yield f'{field}: "{found[0][:40]}" is read as plain text: a prompt has no weights and no tags here'


def model_warnings(body: ImageBody, card: Card, request: Request) -> Iterator[str]:
    """What is without effect with this model, or for this key."""
    recipe, delivery = request.recipe, request.delivery
    if card.draws_classes and body.class_label is not None and body.prompt:
        yield f"prompt is ignored: {card.id} draws class_label"
    yield from _guidance_warnings(body, card, recipe.guidance)
    if delivery.previews >= recipe.steps:  # else a sampler with two lines a step has more than are asked for
        most = compile_table(card.schedule, recipe.sampler, recipe.steps, tokens=1).lines - 1
        if delivery.previews > most:
            yield f"partial_images: at most {most} come before an image of {recipe.steps} steps"
    if body.priority is not None and body.priority > delivery.priority:
        yield f"priority is {delivery.priority}: more is not for this key"


def file_warnings(format: Format, facts: dict[str, Any]) -> Iterator[str]:
    """What the file of these facts has no room for."""
    if names := left_out(format, facts):
        yield f"the request in the file is without {', '.join(names)}: a jpeg holds 64 kB of it, png and webp hold all"


def _guidance_warnings(body: ImageBody, card: Card, guidance: Guidance) -> Iterator[str]:
    """Fields of guidance that guide nothing."""
    field = "true_cfg_scale" if card.guidance == "embedded" else "guidance_scale"
    scale = getattr(body, field)
    if scale is not None and 0 < scale < 1:
        yield f"{field} is ignored: 1 or less draws without guidance"
    if body.negative_prompt and not guidance.guided:
        default = "" if scale is not None else f", and {card.id} draws without by default"
        yield f"negative_prompt is ignored: it takes a {field} over 1{default}"
    span = [name for name in ("start", "stop") if getattr(body, f"skip_layer_guidance_{name}") is not None]
    if span and not (guidance.skip and guidance.skip.scale):
        yield f"skip_layer_guidance_{span[0]} is ignored: there is no skip-layer guidance without a scale"
