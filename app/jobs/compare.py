"""Comparisons: the body of an image with several models and rows, an ordinary job for each cell, and one labelled panel
as the answer, with a row for each prompt or class and a column for each model.
"""

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, Strict

from app.cards.adapters import Lora
from app.cards.card import NO_REFINER, Card, Refining
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.errors import InstepError, InvalidValue, RequestError
from app.imaging import encode_image
from app.jobs import replies
from app.jobs.body import ImageBody, first_seed, ignored, read_as
from app.jobs.facts import recipe_facts, shown
from app.jobs.fields import LONGEST, Text, expects
from app.jobs.job import Job
from app.panel import panel, unreadable
from app.report import Result

MODELS, ROWS = 8, 16
"""Columns and rows that a comparison has at most."""

PIXELS = 64 * 1024 * 1024
"""Pixels of all its pictures together, which are kept until the last one is there."""

PRESETS: dict[str, dict[str, Any]] = {
    "two_prompts": {
        "prompt": [
            "A still life on a pale wooden table: three red pears to the left of a tall blue glass bottle, "
            "a yellow lemon in front of both, a folded green cloth beneath, soft window light",
            'The front of a small bakery on a rainy evening, its painted wooden sign reads "FRESH BREAD" in white '
            "letters, warm light behind the window, reflections on the wet street",
        ],
        "num_inference_steps": 28,
        "guidance_scale": 7.0,
    }
}
"""What a body leaves out, by preset. One prompt asks for colours and places, one for writing in the picture."""

_DELIVERY = {"response_format", "output_format", "output_compression", "priority", "deadline"}
_ASIDE = {"model", "preset", "stream", *_DELIVERY, *ignored(ImageBody)}
"""Fields that do not say what the panel shows."""

_Name = Annotated[str, Strict(), Field(min_length=1, max_length=LONGEST)]
_Names = Annotated[
    list[_Name],
    Field(min_length=1, max_length=MODELS),
    expects(f"a list of 1 to {MODELS} model ids or aliases, none of them empty"),
]


class CompareBody(ImageBody):
    """The body of POST /v1/images/compare: that of an image, with these in place of what makes one image or several."""

    models: _Names = Field(
        [], description="Model ids or aliases, a column for each; they are put in order of their parameters"
    )
    preset: Text | None = Field(
        None,
        description='Fills what is absent; "two_prompts": two prompts, 28 steps, guidance 7, and without models every '
        "downloaded model that draws prompts and takes these",
    )

    @property
    def rows(self) -> tuple[str, list[int | str]]:
        """The field that names the rows, and their prompts or class labels."""
        field = "prompt" if self.class_label is None else "class_label"
        rows = getattr(self, field)
        return field, rows if isinstance(rows, list) else [rows]

    def facts(self) -> dict[str, Any]:
        """The body that makes the same panel again, for the text of its file."""
        return self.model_dump(exclude_none=True, exclude=_ASIDE)


_ELSEWHERE = ("model", "n", "grid", "partial_images", "progress")
FIELDS = tuple(field for field in CompareBody.model_fields if field not in _ELSEWHERE)
"""Fields of a comparison. `stream` is among them, because it is refused in words of its own."""


def read_comparison(raw: object, registry: Registry) -> CompareBody:
    """A parsed JSON body with its preset, models and seed filled in; bounds are checked in `cells`.

    A preset without models looks at the disk. Raises RequestError naming the field, and ModelNotFound.
    """
    body = read_as(CompareBody, raw, FIELDS)
    if body.stream:
        message = "stream: a comparison comes as a whole; leave it out"
        raise RequestError(message, param="stream", code="unsupported_parameter")
    if body.preset is not None and body.preset not in PRESETS:
        raise InvalidValue(f"preset: expects one of {', '.join(PRESETS)}", param="preset")
    models = [card.id for card in _columns(body, registry)]
    asked = [field for field in ("prompt", "class_label") if getattr(body, field) is not None]
    if len(asked) + (body.preset is not None) != 1:
        field = asked[-1] if asked else "prompt"
        raise InvalidValue(f"{field}: a comparison has one of prompt, class_label and preset for its rows", param=field)
    preset = PRESETS.get(body.preset or "", {})
    filled = {name: value for name, value in preset.items() if getattr(body, name) is None}
    body = body.model_copy(update={**filled, "models": models, "seed": first_seed(body.seed)})
    field, rows = body.rows
    if not 1 <= len(rows) <= ROWS:
        raise InvalidValue(f"{field}: a comparison has 1 to {ROWS} rows, not {len(rows)}", param=field)
    return body


def takes_preset(card: Card, preset: str) -> bool:
    """Whether a model draws prompts and takes every prompt of the preset with its steps and guidance."""
    bodies = [ImageBody(**{**PRESETS[preset], "prompt": prompt}) for prompt in PRESETS[preset]["prompt"]]
    try:
        return not card.draws_classes and all(body.to_request(card, "") for body in bodies)
    except InvalidValue:
        return False


def _columns(body: CompareBody, registry: Registry) -> list[Card]:
    """The cards, by the number of their parameters; those that do not say come last. One named twice is one column."""
    if body.models:
        cards = [registry.find(name) for name in body.models]
    elif body.preset is None:
        raise InvalidValue("models: is required", param="models")
    else:
        refiner = body.refiner.model if body.refiner else ""  # which is no column of its own
        others = [card for card in registry.cards.models.values() if refiner not in card.names]
        fitting = [card for card in others if takes_preset(card, body.preset)]
        cards = [card for card in fitting if ModelFolder(card, registry.all).here()]
        if not 1 <= len(cards) <= MODELS:
            here = f"{len(cards)} models that take the preset {body.preset} are downloaded here"
            raise InvalidValue(f"models: {here}; name 1 to {MODELS}", param="models")
    unique = {card.id: card for card in cards}
    counts = {name: _parameters(card, _column(body, card, registry)[1]) for name, card in unique.items()}
    return sorted(unique.values(), key=lambda card: (counts[card.id] is None, counts[card.id] or 0))


def _column(body: CompareBody, card: Card, registry: Registry) -> tuple[CompareBody, Card | None]:
    """The body of one column, and the card of its refiner: none where the body's does not fit this model.

    Raises ModelNotFound; InvalidValue for the refiner of a card, which must fit.
    """
    try:
        return body, body.refined_by(card, registry)
    except InvalidValue:
        if body.refiner is None:
            raise
        return body.model_copy(update={"refiner": Refining(model=NO_REFINER)}), None


def _parameters(*cards: Card | None) -> int | None:
    """The number of parameters of a model and its refiner together; None where one does not say."""
    counts = [card.parameters for card in cards if card]
    return None if None in counts else sum(filter(None, counts))


def cells(body: CompareBody, registry: Registry, complete: Callable[[Card, ImageBody], Job]) -> list[Job]:
    """One job for each row and model, row by row.

    complete: makes the job of a cell by `ImageBody.to_request`. Raises as it, the model before a field with its bounds;
    InvalidValue for a refiner that fits none of the models.
    """
    field, rows = body.rows
    columns = [(card, *_column(body, card, registry)) for card in map(registry.find, body.models)]
    if body.refiner and not any(refiner for _, _, refiner in columns):
        body.refined_by(columns[0][0], registry)
    jobs = []
    for row in rows:
        for card, own, _ in columns:
            try:
                if field == "prompt" and card.draws_classes:
                    raise InvalidValue("prompt: this model draws classes; compare it by class_label", param="prompt")
                jobs.append(complete(card, own.model_copy(update={"model": card.id, field: row})))
            except RequestError as error:
                if error.param in {"seed", *_DELIVERY}:
                    raise
                raise error.again(f"{card.id}: {error.message}") from None
    return bounded(jobs, "a comparison", "size")


def bounded(jobs: list[Job], what: str, field: str) -> list[Job]:
    """These jobs. Raises InvalidValue, naming the field, where they have more than PIXELS."""
    recipes = [job.request.recipe for job in jobs for _ in job.request.images]
    pixels = sum(recipe.width * recipe.height for recipe in recipes)
    if pixels > PIXELS:
        message = f"{field}: {len(recipes)} pictures have {pixels / 1e6:.0f} megapixels together"
        raise InvalidValue(f"{message}; {what} has at most {PIXELS / 1e6:.0f}", param=field)
    return jobs


def with_model(jobs: Sequence[Job], error: InstepError) -> InstepError:
    """The error of one job, with its model in the message and as the field, where it has no field."""
    job = next((job for job in jobs if job.error is error), None)
    if job is None or error.param is not None:
        return error
    job.facts["model"], model = job.card.model, job.card.id
    message = error.message if model in error.message else f"{model}: {error.message}"
    return error.again(message, f"models.{model}")


class Cell(BaseModel):
    """One picture of a comparison, and the request that made it."""

    row: int
    column: int
    model: str
    parameters: int | None = Field(None, description="Of the denoising networks, where their cards say")
    prompt: str | None = None
    class_label: int | None = None
    seed: int
    size: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    loras: list[Lora] | None = None
    refiner: Refining | None = None
    original_size: str | None = None
    crop: list[int] | None = None
    target_size: str | None = None
    timings: replies.Stages


class CompareReply(BaseModel):
    """One labelled panel, and the cells of it, row by row."""

    created: int
    data: list[replies.Item] = Field(description="The panel alone")
    models: list[str] = Field(description="Of the columns, by the number of their parameters")
    cells: list[Cell]
    size: str = Field(description="Of the whole panel")
    output_format: str
    usage: replies.Usage
    timings: replies.Stages
    warnings: list[str] | None = None


def panel_answer(body: CompareBody, jobs: Sequence[Job], results: Sequence[Result]) -> replies.Answer:
    """The panel alone, where a client asks for it, else the whole JSON reply. results: of each cell, row by row."""
    file, size = panel_file(body, jobs, results)
    models, warnings, seed = body.models, panel_warnings(body, jobs, results), results[0].seed
    if jobs[0].raw:
        return replies.file_answer(file, jobs[0].format, models, seed, warnings)
    reply = CompareReply(
        created=int(time.time()),
        data=[replies.Item(b64_json=replies.MARK, seed=seed)],
        models=models,
        cells=[
            Cell(
                row=place // len(models),
                column=place % len(models),
                parameters=_parameters(job.card, job.refiner),
                seed=result.seed,
                timings=replies.stages([result], 0.0, job.estimate),
                **dict([shown(job.request.images[0].condition)]),
                **recipe_facts(job.request.recipe),
            )
            for place, (job, result) in enumerate(zip(jobs, results, strict=True))
        ],
        size=size,
        output_format=jobs[0].format,
        usage=replies.usage([job.request.recipe for job in jobs]),
        timings=replies.stages(results, sum(job.imaging for job in jobs)),
        warnings=warnings or None,
    )
    return replies.spliced(reply, [file]), replies.JSON


def panel_file(body: CompareBody, jobs: Sequence[Job], results: Sequence[Result]) -> tuple[bytes, str]:
    """The panel as a file, and its size as "WxH". Each job has an equal share of the seconds that it takes."""
    started, columns = time.perf_counter(), len(body.models)
    pictures: list[np.ndarray] = [result.pixels for result in results]
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    labels = [job.shows for job in jobs[::columns]]
    pixels = panel(rows, labels, [_heading(job) for job in jobs[:columns]], f"seed {body.seed}")
    file = encode_image(pixels, jobs[0].format, body.output_compression, body.facts())
    for job in jobs:
        job.imaging += (time.perf_counter() - started) / len(jobs)
    return file, f"{pixels.shape[1]}x{pixels.shape[0]}"


def panel_warnings(body: CompareBody, jobs: Sequence[Job], results: Sequence[Result]) -> list[str]:
    """The body's warnings, those of all cells, the model before each, and letters of the labels that show as boxes."""
    found = [text for job in jobs for text in replies.body_warnings(job)]
    for job, result in zip(jobs, results, strict=True):
        found += [f"{job.card.id}: {text}" for text in (*replies.model_warnings(job), *result.warnings)]
        if body.refiner and body.refiner.model != NO_REFINER and not job.refiner:
            found.append(f"{job.card.id}: refiner is left out: {body.refiner.model} does not fit")
    if missing := unreadable([job.shows for job in jobs]):
        found.append(f"the panel shows boxes for letters that its font does not have: {missing[:40]}")
    found += replies.file_warnings(jobs[0].format, body.facts())
    return list(dict.fromkeys(found))


def _heading(job: Job) -> list[str]:
    recipe, cards = job.request.recipe, [job.card, *([job.refiner] if job.refiner else [])]
    counts = [parameters_in_words(card.parameters) for card in cards]
    count = None if None in counts else " + ".join(filter(None, counts))
    settings = f"steps {recipe.steps}, guidance {recipe_facts(recipe)['guidance_scale']:g}"
    return [" + ".join(card.id for card in cards), *([f"{count} parameters"] if count else []), settings]


def parameters_in_words(count: int | None) -> str | None:
    """A number of parameters as a person says it: "8.06 B", "675.1 M"; None for None."""
    if count is None:
        return None
    return f"{count / 1e9:.2f} B" if count >= 999_950_000 else f"{count / 1e6:.1f} M"
