"""Replies: finished pixels as what a client gets: a file with headers, OpenAI's JSON, events of a stream.

It is all plain computing, for the imaging threads. The OpenAPI document is made from the pydantic models.
"""

from __future__ import annotations

import binascii
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from app.imaging import Format, encode_image, grid, sheet_size
from app.jobs.body import body_warnings, file_warnings, model_warnings, recipe_facts
from app.jobs.job import Estimate, Job
from app.report import Preview, Result
from app.request import ClassLabel, Condition, Prompt, Recipe

TOKEN = 16
"""Pixels on a side of what `usage` counts as one image token: a VAE of scale 8 under patches of 2."""

SLICE = 3 * 2**16
"""Bytes of a file that become base64 in one call; a multiple of three, so that only the last is padded."""

_MARK = secrets.token_hex(16)


class Item(BaseModel):
    """One image. `seed` and the effective parameters of the reply make the same image again."""

    b64_json: str
    seed: int
    class_label: int | None = None
    revised_prompt: str | None = Field(None, description="The name of the class that was drawn")


class TokenDetails(BaseModel):
    """What the input tokens were."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens as the network saw them: text padded to its length, 16 x 16 pixels for one image token."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Stages(BaseModel):
    """Seconds by stage, each of the image that needed longest; `steps` and `shared` (images a forward) as run."""

    queue: float
    encode: float
    denoise: float
    decode: float
    image_encode: float
    steps: int
    shared: float
    cost: float | None = Field(None, description="Device seconds of the whole request, as estimated when accepted")
    estimated_wait: float | None = Field(None, description="Seconds until its turn, as estimated when accepted")
    queue_position: int | None = Field(None, description="Requests on its device not yet answered when it was accepted")


class Effective(BaseModel):
    """What the server made of the request: fields that were absent are told here."""

    model: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    size: str = Field(description="Of the file: of the whole sheet when a grid was asked for")
    output_format: str
    quality: str = "auto"
    background: str = "opaque"


class ImagesReply(Effective):
    """OpenAI's images reply with the effective parameters, timings and warnings beside it."""

    created: int
    data: list[Item]
    usage: Usage
    timings: Stages
    warnings: list[str] | None = None


class PartialEvent(Effective):
    """What an image looks like so far."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    created_at: int
    partial_image_index: int
    image_index: int | None = None


class CompletedEvent(Effective, Item):
    """One finished image of a stream."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    created_at: int
    usage: Usage
    timings: Stages
    image_index: int | None = None
    warnings: list[str] | None = None


class Answer(NamedTuple):
    """A whole answer. seconds: of imaging."""

    content: bytes
    headers: dict[str, str]
    seconds: float


def answer(job: Job, results: Sequence[Result]) -> Answer:
    """The one file that these results make, where a job asks for it alone, else the whole JSON reply."""
    groups = file_groups(job, results)
    files, seconds = files_of(job, groups)
    if job.raw:
        return file_answer(files[0], job.format, [job.card.id], results[0].seed, warnings(job, results), seconds)
    reply = ImagesReply(
        created=int(time.time()),
        data=[Item(b64_json=mark(place), **_item(job, group[0])) for place, group in enumerate(groups)],
        **_cost(job, results, seconds),
        **effective(job, len(groups[0])),
    )
    return json_answer(reply, files, seconds)


def file_answer(
    file: bytes, format: Format, models: Iterable[str], seed: int, warnings: list[str], seconds: float
) -> Answer:
    """A file alone; headers say who drew it, the first seed and the warnings.

    NOTE: a warning may quote a prompt; JSON leaves nothing in it that ends a header.
    """
    headers = {"Content-Type": f"image/{format}", "X-Model": ", ".join(models), "X-Seed": str(seed)}
    if warnings:
        headers["X-Warning"] = json.dumps("; ".join(warnings)[:400])
    return Answer(file, headers, seconds)


def json_answer(reply: BaseModel, files: Sequence[bytes], seconds: float) -> Answer:
    """A reply with its files, as `spliced`."""
    return Answer(spliced(reply, files), {"Content-Type": "application/json"}, seconds)


def file_groups(job: Job, results: Sequence[Result]) -> Sequence[Sequence[Result]]:
    """The results that make a file together: all as one sheet if the job asks for it, else each alone."""
    return [results] if job.columns else [[result] for result in results]


def files_of(job: Job, groups: Sequence[Sequence[Result]]) -> tuple[list[bytes], float]:
    """A file of each group of results, as one sheet if the job asks for sheets, and the seconds they took."""
    started, files = time.perf_counter(), []
    for results in groups:
        pixels = grid([result.pixels for result in results], job.columns) if job.columns else results[0].pixels
        text = facts(job, [result.index for result in results])
        files.append(encode_image(np.asarray(pixels), job.format, job.body.output_compression, text))
    return files, time.perf_counter() - started


def partial_event(job: Job, preview: Preview) -> bytes:
    """A preview as a server-sent event. The file carries no facts: it is not the image that they make."""
    file = encode_image(preview.pixels, job.format, job.body.output_compression, {})
    event = PartialEvent(
        b64_json=mark(0),
        created_at=int(time.time()),
        partial_image_index=preview.partial,
        image_index=preview.index if len(job.request.images) > 1 else None,
        **effective(job, 1),
    )
    return _sse(event, file)


def completed_event(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """A finished image (one result) or sheet (all of them) as a server-sent event, and the seconds of encoding."""
    (file,), seconds = files_of(job, [results])
    event = CompletedEvent(
        b64_json=mark(0),
        created_at=int(time.time()),
        image_index=results[0].index if len(job.request.images) > 1 and not job.columns else None,
        **_cost(job, results, seconds),
        **_item(job, results[0]),
        **effective(job, len(results)),
    )
    return _sse(event, file), seconds


def warnings(job: Job, results: Sequence[Result]) -> list[str]:
    """All warnings for these results of one request, each once: of the body, the model, the engine and the files."""
    found = [*body_warnings(job.body, job.format, job.raw), *model_warnings(job.body, job.card, job.request)]
    found += [text for result in results for text in result.warnings]
    for group in file_groups(job, results):
        found += file_warnings(job.format, facts(job, [result.index for result in group]))
    return list(dict.fromkeys(found))


def facts(job: Job, indices: Sequence[int]) -> dict[str, Any]:
    """The body that makes these images again, for the text chunk of their file: complete, and valid to POST."""
    specs = [job.request.images[index] for index in indices]
    field, _ = shown(specs[0].condition)
    values = [shown(spec.condition)[1] for spec in specs]
    alike = len(set(values)) == 1
    told: dict[str, Any] = {"model": job.card.id, field: values[0] if alike else values}
    if isinstance(specs[0].condition, Prompt):
        told["negative_prompt"] = specs[0].condition.negative or ""
    if len(specs) > 1 and alike:
        told["n"] = len(specs)
    if job.columns:
        told["grid"] = {"columns": job.columns}
    return told | {"seed": specs[0].seed, **recipe_facts(job.request.recipe)}


def shown(condition: Condition) -> tuple[str, Any]:
    """The field of a body that asks for this condition, and its value."""
    return ("prompt", condition.text) if isinstance(condition, Prompt) else ("class_label", condition.index)


def effective(job: Job, images: int) -> dict[str, Any]:
    """The fields of Effective for a file that shows this many images, among all that the recipe says."""
    recipe = job.request.recipe
    width, height = sheet_size(images, job.columns or 1, recipe.width, recipe.height)
    return recipe_facts(recipe) | {"size": f"{width}x{height}", "output_format": job.format}


def usage(recipes: Sequence[Recipe]) -> Usage:
    """Tokens of images, by the recipe of each; a class label counts as one."""
    text = sum(max(1, recipe.text_length) for recipe in recipes)
    pixels = sum(-(-recipe.width // TOKEN) * -(-recipe.height // TOKEN) for recipe in recipes)
    details = TokenDetails(text_tokens=text)
    return Usage(input_tokens=text, output_tokens=pixels, total_tokens=text + pixels, input_tokens_details=details)


def stages(results: Sequence[Result], image_encode: float, estimate: Estimate | None = None) -> Stages:
    """Where the time went, rounded to 10 microseconds, and what was expected."""
    timings = [result.timings for result in results]
    phases = ("queue", "encode", "denoise", "decode")
    told: dict[str, Any] = {name: round(max(getattr(one, name) for one in timings), 5) for name in phases}
    if estimate:
        wait = round(estimate.wait, 5)
        told |= {"cost": round(estimate.cost, 5), "estimated_wait": wait, "queue_position": estimate.position}
    return Stages(
        **told,
        image_encode=round(image_encode, 5),
        steps=max(one.steps for one in timings),
        shared=round(sum(one.shared for one in timings) / len(timings), 2),
    )


def mark(place: int) -> str:
    """A text in a reply that stands for the file of this place. Nobody outside this process can write one."""
    return f"{_MARK}-{place}."


def spliced(reply: BaseModel, files: Sequence[bytes]) -> bytes:
    """The JSON of a reply, without absent fields, each mark replaced by its file in base64; marks stand in order.

    NOTE: it goes a slice at a time. A string of a whole file, and then of a whole reply, holds the interpreter's lock,
    and the event loop with it, for over 10 ms with eight large PNGs (tests/bench/encode.py).
    """
    rest, parts = reply.model_dump_json(exclude_none=True).encode(), []
    for place, file in enumerate(files):
        before, _, rest = rest.partition(mark(place).encode())
        parts.append(before)
        slices = (file[start : start + SLICE] for start in range(0, len(file), SLICE))
        parts += [binascii.b2a_base64(part, newline=False) for part in slices]
    return b"".join([*parts, rest])


def _sse(event: PartialEvent | CompletedEvent, file: bytes) -> bytes:
    """One server-sent event with its file; JSON has no newlines, so one data line holds it."""
    return b"".join([f"event: {event.type}\ndata: ".encode(), spliced(event, [file]), b"\n\n"])


def _cost(job: Job, results: Sequence[Result], imaging: float) -> dict[str, Any]:
    return {
        "usage": usage([job.request.recipe] * len(results)),
        "timings": stages(results, imaging, job.estimate),
        "warnings": warnings(job, results) or None,
    }


def _item(job: Job, result: Result) -> dict[str, Any]:
    condition = job.request.images[result.index].condition
    if isinstance(condition, ClassLabel):
        name = job.card.labels[condition.index]
        return {"seed": result.seed, "class_label": condition.index, "revised_prompt": name}
    return {"seed": result.seed}
