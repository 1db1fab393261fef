"""Comparison: the body of POST /v1/images/compare, made into one request for each cell of a panel; then the panel, as
the file alone or JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.errors import InvalidValue, RequestError
from app.imaging import Format, encode_image
from app.jobs.body import (
    IGNORED,
    ImageBody,
    body_warnings,
    checked,
    file_warnings,
    given_fields,
    model_warnings,
    read_body,
    recipe_facts,
)
from app.jobs.fields import Text, entries, first_seed, text
from app.jobs.job import Job
from app.jobs.replies import Answer, Stages, Usage, file_answer, json_answer, mark, shown, stages, usage
from app.panel import Heading, panel, unreadable
from app.report import Result

MODELS, ROWS = 8, 16
"""Columns and rows that a comparison has at most."""

PIXELS = 64 * 1024 * 1024
"""Pixels of all its pictures together, which are held until the last one is there."""

Complete = Callable[[ImageBody, Card], Job]

OWN = ("models", "preset")
SHARED = tuple(name for name in ImageBody.model_fields if name not in ("model", "n", "grid", "partial_images"))
"""Fields of an image's body that a comparison has too. `stream` is among them to be refused in words of its own."""

_ANY_MODEL = ("response_format", "output_format", "output_compression", "seed", "priority", "deadline")
"""Fields whose bounds are the server's: an error about one of them is no model's."""

_DELIVERY = {"prompt", "class_label", "stream", *_ANY_MODEL, *IGNORED}
"""Fields that do not say what the pictures look like, or that `facts` tells in its own way."""


@dataclass(frozen=True)
class Preset:
    """What fills the fields that a body leaves out."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float


PRESETS = {
    "two_prompts": Preset(
        prompts=(
            "A still life on a pale wooden table: three red pears to the left of a tall blue glass bottle, "
            "a yellow lemon in front of both, a folded green cloth beneath, soft window light",
            'The front of a small bakery on a rainy evening, its painted wooden sign reads "FRESH BREAD" in white '
            "letters, warm light behind the window, reflections on the wet street",
        ),
        steps=28,
        guidance=7.0,
    )
}
"""Prompts of our own: one asks for colours and places, one for writing in the picture."""


def takes_preset(card: Card, preset: Preset) -> bool:
    """Whether a model draws prompts and its limits hold the preset's."""
    limits, longest = card.limits, max(map(len, preset.prompts))
    enough = limits.num_inference_steps >= preset.steps and limits.guidance_scale >= preset.guidance
    return not card.draws_classes and enough and limits.prompt >= longest


def names(value: object) -> list[str]:
    """A list of names, none of them empty."""
    if not isinstance(value, list):
        raise ValueError("expects a list of model ids or aliases")
    found = [text(item) for item in entries(value)]
    if not all(found):
        raise ValueError("expects model ids or aliases, none of them empty")
    return found


class CompareBody(BaseModel):
    """The body: what is a comparison's own, and the shared fields of every cell, checked as an image's body is."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    models: Annotated[list[str], BeforeValidator(names)] | None = Field(
        None, description="Model ids or aliases, a column for each; they are put in order of their parameters"
    )
    preset: Text | None = Field(
        None,
        description='Fills what is absent; "two_prompts": two prompts, 28 steps, guidance 7, and without models every '
        "downloaded model that draws prompts and takes these",
    )
    shared: ImageBody


@dataclass(frozen=True)
class Comparison:
    """A valid comparison. cells[row][column]; rows: what each shows, in words; raw: the file alone is the answer."""

    body: ImageBody
    cards: tuple[Card, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Job, ...], ...]
    format: Format
    raw: bool

    @property
    def jobs(self) -> list[Job]:
        """All cells, row by row."""
        return [job for row in self.cells for job in row]

    @property
    def seed(self) -> int:
        return self.jobs[0].request.images[0].seed

    def facts(self) -> dict[str, Any]:
        """The body that makes the same panel again."""
        field, given = rows_of(self.body)
        looks = self.body.model_dump(exclude_none=True, exclude=_DELIVERY)
        return {"models": [card.id for card in self.cards], field: given, **looks, "seed": self.seed}


def read_comparison(raw: object) -> CompareBody:
    """A parsed JSON body as a CompareBody with its preset filled in; bounds are checked in `lay_out`.

    Raises RequestError naming the field, with the nearest name for an unknown one.
    """
    given = given_fields(raw, (*OWN, *SHARED))
    shared = read_body({key: value for key, value in given.items() if key not in OWN})
    body = checked(CompareBody, {**{key: given[key] for key in OWN if key in given}, "shared": shared})
    if shared.stream:
        raise RequestError(
            "stream: a comparison comes as a whole; leave it out", param="stream", code="unsupported_parameter"
        )
    if shared.prompt is not None and shared.class_label is not None:
        raise InvalidValue("class_label: the rows are prompts or classes, not both", param="class_label")
    return _filled(body)


def lay_out(body: CompareBody, registry: Registry, complete: Complete, wanted: Format | None = None) -> Comparison:
    """One complete request for each row and column, all with one seed.

    complete: makes the job of a cell by `ImageBody.to_request`. wanted: the format that the answer is alone in. It
    reads folders where the preset chooses the models. Raises ModelNotFound, and what `complete` raises, with the
    model before the field.
    """
    cards = _columns(body, registry)
    field, given = rows_of(body.shared)
    if not 1 <= len(given) <= ROWS:
        raise InvalidValue(f"{field}: a comparison has 1 to {ROWS} rows, not {len(given)}", param=field)
    seed = first_seed(body.shared.seed)
    shared = body.shared.model_copy(update={"seed": seed})
    format = wanted or cast(Format, shared.output_format or "png")

    def job(card: Card, one: int | str) -> Job:
        return _completed(shared.model_copy(update={"model": card.id, field: one}), card, complete)

    cells = tuple(tuple(job(card, one) for card in cards) for one in given)
    _check_pixels(cells)
    return Comparison(shared, cards, tuple(row[0].shows for row in cells), cells, format, wanted is not None)


def rows_of(body: ImageBody) -> tuple[str, list[int | str]]:
    """The field that names the rows, and their prompts or class labels as they were given."""
    field = "prompt" if body.class_label is None else "class_label"
    given: Any = getattr(body, field)
    if given is None:
        raise InvalidValue("prompt: is required, or class_label, or a preset", param="prompt")
    return field, given if isinstance(given, list) else [given]


def _filled(body: CompareBody) -> CompareBody:
    """The body with its preset in the place of what it leaves out."""
    if body.preset is None:
        return body
    shared, preset = body.shared, PRESETS.get(body.preset)
    if preset is None:
        raise InvalidValue(f"preset: expects one of {', '.join(PRESETS)}", param="preset")
    if shared.prompt is not None or shared.class_label is not None:
        field = "prompt" if shared.class_label is None else "class_label"
        raise InvalidValue(f"{field}: the preset {body.preset} brings its own prompts", param=field)
    filled: dict[str, Any] = {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance}
    filled = {name: value for name, value in filled.items() if getattr(shared, name) is None}
    return body.model_copy(update={"shared": shared.model_copy(update={"prompt": [*preset.prompts], **filled})})


def _columns(body: CompareBody, registry: Registry) -> tuple[Card, ...]:
    """The cards, by the number of their parameters; those that do not say come last. One named twice is one column."""
    if body.models is not None:
        if not 1 <= len(body.models) <= MODELS:
            raise InvalidValue(f"models: a comparison has 1 to {MODELS} models, not {len(body.models)}", param="models")
        cards = [registry.find(name) for name in body.models]
    elif body.preset is None:
        raise InvalidValue("models: is required", param="models")
    else:
        preset = PRESETS[body.preset]
        fitting = [card for card in registry.cards.values() if takes_preset(card, preset)]
        cards = [card for card in fitting if ModelFolder(card, registry.all).here()]
        if not 1 <= len(cards) <= MODELS:
            here = f"{len(cards)} models that take the preset {body.preset} are downloaded here"
            raise InvalidValue(f"models: {here}; name 1 to {MODELS}", param="models")
    unique = {card.id: card for card in cards}
    return tuple(sorted(unique.values(), key=lambda card: (card.parameters is None, card.parameters or 0)))


def _completed(body: ImageBody, card: Card, complete: Complete) -> Job:
    """One cell's job. An error says the model before the field, where the bounds are the model's."""
    try:
        if body.prompt is not None and card.draws_classes:
            raise InvalidValue("prompt: this model draws classes; compare it by class_label", param="prompt")
        return complete(body, card)
    except RequestError as error:
        if error.param in _ANY_MODEL:
            raise
        raise error.again(f"{card.id}: {error.message}") from None


def _check_pixels(cells: tuple[tuple[Job, ...], ...]) -> None:
    requests = [job.request for row in cells for job in row]
    pixels = sum(request.recipe.width * request.recipe.height for request in requests)
    if pixels > PIXELS:
        told = f"{len(requests)} pictures have {pixels / 1e6:.0f} megapixels together"
        raise InvalidValue(f"size: {told}; a comparison has at most {PIXELS / 1e6:.0f}", param="size")


class Panel(BaseModel):
    """The one picture of a comparison."""

    b64_json: str


class Cell(BaseModel):
    """One picture of a comparison, and the request that made it."""

    row: int
    column: int
    model: str
    parameters: int | None = Field(None, description="Of the model's denoising network, where its card says")
    prompt: str | None = None
    class_label: int | None = None
    seed: int
    size: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    timings: Stages


class CompareReply(BaseModel):
    """One labelled panel, and what is in each cell of it, row by row."""

    created: int
    data: list[Panel]
    models: list[str] = Field(description="Of the columns, by the number of their parameters")
    cells: list[Cell]
    size: str = Field(description="Of the whole panel")
    output_format: str
    usage: Usage
    timings: Stages
    warnings: list[str] | None = None


def panel_answer(comparison: Comparison, results: Sequence[Result]) -> Answer:
    """The panel alone, where a client asks for it, else the whole JSON reply. results: of each cell, row by row."""
    file, size, seconds = panel_file(comparison, results)
    models, told = [card.id for card in comparison.cards], panel_warnings(comparison, results)
    if comparison.raw:
        return file_answer(file, comparison.format, models, comparison.seed, told, seconds)
    cells = enumerate(zip(comparison.jobs, results, strict=True))
    reply = CompareReply(
        created=int(time.time()),
        data=[Panel(b64_json=mark(0))],
        models=models,
        cells=[_cell(divmod(place, len(models)), job, result) for place, (job, result) in cells],
        size=size,
        output_format=comparison.format,
        usage=usage([job.request.recipe for job in comparison.jobs]),
        timings=stages(results, seconds),
        warnings=told or None,
    )
    return json_answer(reply, [file], seconds)


def panel_file(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, str, float]:
    """The panel as a file, its size as "WxH", and the seconds it took."""
    started, columns = time.perf_counter(), len(comparison.cards)
    pictures: list[np.ndarray] = [result.pixels for result in results]
    cells = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    headings = [_heading(job) for job in comparison.cells[0]]
    pixels = panel(cells, comparison.rows, headings, f"seed {comparison.seed}")
    file = encode_image(pixels, comparison.format, comparison.body.output_compression, comparison.facts())
    return file, f"{pixels.shape[1]}x{pixels.shape[0]}", time.perf_counter() - started


def panel_warnings(comparison: Comparison, results: Sequence[Result]) -> list[str]:
    """The body's warnings, those of all cells, the model before each, and letters of the labels that show as boxes."""
    found = [*body_warnings(comparison.body, comparison.format, comparison.raw)]
    for job, result in zip(comparison.jobs, results, strict=True):
        told = (*model_warnings(job.body, job.card, job.request), *result.warnings)
        found += [f"{job.card.id}: {text}" for text in told]
    if missing := unreadable(comparison.rows):
        found.append(f"the panel shows boxes for letters that its font does not have: {missing[:40]}")
    found += file_warnings(comparison.format, comparison.facts())
    return list(dict.fromkeys(found))


def parameters_of(card: Card) -> str | None:
    """The number of a model's parameters as a person says it: "8.06 B", "675.1 M"; None where the card does not."""
    count = card.parameters
    if count is None:
        return None
    for unit, letter in ((1, ""), (10**3, "K"), (10**6, "M")):
        if round(count / unit, 1) < 1000:
            return f"{count / unit:.1f} {letter}" if letter else str(count)
    return f"{count / 10**9:.2f} B"


def _heading(job: Job) -> Heading:
    count, recipe = parameters_of(job.card), job.request.recipe
    settings = f"steps {recipe.steps}, guidance {recipe_facts(recipe)['guidance_scale']:g}"
    return Heading(job.card.id, (*([f"{count} parameters"] if count else []), settings))


def _cell(place: tuple[int, int], job: Job, result: Result) -> Cell:
    field, value = shown(job.request.images[0].condition)
    return Cell(
        row=place[0],
        column=place[1],
        parameters=job.card.parameters,
        seed=result.seed,
        timings=stages([result], 0.0, job.estimate),
        **{field: value},
        **recipe_facts(job.request.recipe),
    )
