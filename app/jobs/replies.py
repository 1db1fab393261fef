"""Replies: the results of a job as what a client gets: one file with headers, OpenAI's JSON, or events of a stream.

All of it is plain computing, for the imaging threads. The OpenAPI document is made from the pydantic models.
"""

from __future__ import annotations

import binascii
import json
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, TypeAdapter

from app.cards.adapters import Lora
from app.cards.card import Refining
from app.imaging import Format, encode_image, grid, left_out
from app.jobs.body import SKIPPING, ignored
from app.jobs.facts import effective, facts
from app.jobs.job import Estimate, Job
from app.report import Preview, Progress, Result
from app.request import ClassLabel, Recipe

Answer = tuple[bytes, dict[str, str]]
"""The content and the headers of a whole answer."""

Effectless = tuple[str, object, str]
"""A field, whether it has no effect, and why."""

JSON = {"Content-Type": "application/json"}

TOKEN = 16
"""Pixels on a side of what `usage` counts as one image token: a VAE of scale 8 under patches of 2."""

SLICE = 3 * 2**16
"""Bytes of a file that become base64 in one call; a multiple of three, so that only the last is padded."""

MARK = secrets.token_hex(16)
"""Stands for a file in a reply, until `spliced` puts it there. Nobody outside this process can write one."""

_ANY: TypeAdapter[Any] = TypeAdapter(Any)
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


class Item(BaseModel):
    """One image. `seed` and the effective parameters of the reply make the same image again."""

    b64_json: str
    seed: int
    class_label: int | None = None
    revised_prompt: str | None = Field(default=None, description="The name of the class that was drawn")


class TokenDetails(BaseModel):
    """The kinds of the input tokens."""

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


class ImagesReply(BaseModel):
    """OpenAI's images reply, with the effective parameters, timings and warnings."""

    created: int
    data: list[Item]
    model: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    strength: float | None = Field(None, description="Where the images start from a picture")
    max_sequence_length: int | None = None
    true_cfg_scale: float | None = None
    skip_layer_guidance_scale: float | None = None
    skip_layer_guidance_start: float | None = None
    skip_layer_guidance_stop: float | None = None
    schedule: str | None = None
    clip_skip: int | None = None
    loras: list[Lora] | None = None
    refiner: Refining | None = None
    original_size: str | None = None
    crop: list[int] | None = None
    target_size: str | None = None
    size: str = Field(description="Of the file: of the whole sheet when a grid was asked for")
    output_format: str
    quality: str
    background: str
    usage: Usage
    timings: Stages
    warnings: list[str] | None = None


def answer(job: Job, results: Sequence[Result]) -> Answer:
    """The one file that these results make, where a job asks for it alone, else the whole JSON reply."""
    files, seconds = files_of(job, results)
    if job.raw:
        models, seed = job.request.recipe.models, results[0].seed
        return file_answer(files[0], job.format, models, seed, warnings(job, results))
    reply = ImagesReply(
        created=int(time.time()),
        data=[Item(b64_json=MARK, **_item(job, group[0])) for group in file_groups(job, results)],
        **_cost(job, results, seconds),
        **effective(job, len(results) if job.columns else 1),
    )
    return spliced(reply, files), JSON


def file_answer(file: bytes, format: Format, models: Iterable[str], seed: int, warnings: list[str]) -> Answer:
    """A file alone; headers name the models that drew it, the first seed and the warnings.

    NOTE: a warning may quote a prompt; JSON leaves nothing in it that ends a header.
    """
    headers = {"Content-Type": f"image/{format}", "X-Model": ", ".join(models), "X-Seed": str(seed)}
    if warnings:
        headers["X-Warning"] = json.dumps("; ".join(warnings)[:400])
    return file, headers


def file_groups(job: Job, results: Sequence[Result]) -> Sequence[Sequence[Result]]:
    """The results that make a file together: all as one sheet if the job asks for it, else each alone."""
    return [results] if job.columns else [[result] for result in results]


def files_of(job: Job, results: Sequence[Result]) -> tuple[list[bytes], float]:
    """The files of these results, and the seconds that they took, which are added to the job's."""
    started, files = time.perf_counter(), []
    for group in file_groups(job, results):
        pictures = [overlaid(job, result) for result in group]
        pixels = grid(pictures, job.columns) if job.columns else pictures[0]
        text = facts(job, [result.index for result in group])
        files.append(encode_image(pixels, job.format, job.body.output_compression, text))
    seconds = time.perf_counter() - started
    job.imaging += seconds
    return files, seconds


def overlaid(job: Job, image: Result | Preview) -> np.ndarray:
    """The pixels of an image, with those of the source where its mask keeps them, unless the body has no overlay.

    uint8 [height, width, 3]. A mask of 0 is exactly the source's pixel, of 255 exactly the image's; the soft edge
    between mixes them by mask / 255, rounded.
    """
    source, pixels = job.request.source, np.asarray(image.pixels)
    if source is None or source.mask is None or getattr(job.body, "overlay", None) is False:
        return pixels
    mask = np.frombuffer(source.mask, np.uint8).reshape(pixels.shape[:2])
    kept = np.frombuffer(source.pixels, np.uint8).reshape(pixels.shape)
    laid, soft = np.where(mask[..., None] > 0, pixels, kept), (mask > 0) & (mask < 255)
    share = mask[soft][:, None].astype(np.uint16)
    laid[soft] = (pixels[soft] * share + kept[soft] * (255 - share) + 127) // 255
    return laid


def accepted_event(job: Job) -> bytes:
    """What was expected of a job when it was accepted, as a server-sent event."""
    assert job.estimate
    return _event(job, "accepted", _expected(job.estimate))


def progress_event(job: Job, progress: Progress) -> bytes:
    """A step of one image as a server-sent event."""
    place = {"image_index": _place(job, progress.index)}
    return _event(job, "progress", {**place, "step": progress.step, "steps": progress.steps})


def partial_event(job: Job, preview: Preview) -> bytes:
    """A preview as a server-sent event. The file carries no facts: it is not the image that they make."""
    file = encode_image(overlaid(job, preview), job.format, job.body.output_compression, {})
    place = {"partial_image_index": preview.partial, "image_index": _place(job, preview.index)}
    return _event(job, "partial_image", place | effective(job, 1), file)


def completed_event(job: Job, results: Sequence[Result]) -> bytes:
    """A finished image (one result) or sheet (all of them) as a server-sent event."""
    (file,), seconds = files_of(job, results)
    place = None if job.columns else _place(job, results[0].index)
    image = {"image_index": place, **_item(job, results[0])}
    fields = image | _cost(job, results, seconds) | effective(job, len(results))
    return _event(job, "completed", fields, file)


def error_event(job: Job, error: dict[str, Any]) -> bytes:
    """The envelope of the error that ends a job, as a server-sent event without a name."""
    event = error if job.place is None else {**error, "request_index": job.place}
    return b"".join([b"data: ", spliced(event, []), b"\n\n"])


def _place(job: Job, index: int) -> int | None:
    """Which image of a stream it is, where the request has several."""
    return index if len(job.request.images) > 1 else None


def _event(job: Job, name: str, fields: dict[str, Any], *files: bytes) -> bytes:
    """One server-sent event, with its file if it has one. JSON has no newlines, so it is one data line."""
    kind = f"{'image_edit' if job.request.source else 'image_generation'}.{name}"
    image = {"b64_json": MARK, "created_at": int(time.time())} if files else {}
    event = {"type": kind, "request_index": job.place, **image, **fields}
    present = {name: value for name, value in event.items() if value is not None}
    return b"".join([f"event: {kind}\ndata: ".encode(), spliced(present, files), b"\n\n"])


def spliced(reply: object, files: Sequence[bytes]) -> bytes:
    """The JSON of a reply, without absent fields of its models, each mark replaced by the next file in base64.

    NOTE: it goes a slice at a time. A string of a whole file, and then of a whole reply, holds the interpreter's lock,
    and the event loop with it, for over 10 ms with eight large PNGs (tests/bench/encode.py).
    """
    first, *rest = _ANY.dump_json(reply, exclude_none=True).split(MARK.encode())
    parts = [first]
    for file, after in zip(files, rest, strict=True):
        slices = (file[start : start + SLICE] for start in range(0, len(file), SLICE))
        parts += [*(binascii.b2a_base64(part, newline=False) for part in slices), after]
    return b"".join(parts)


def usage(recipes: Sequence[Recipe]) -> Usage:
    """Tokens of images, by the recipe of each; a class label counts as one, a source as an image of its size."""
    text = sum(max(1, recipe.text_length) for recipe in recipes)
    pixels = [-(-recipe.width // TOKEN) * -(-recipe.height // TOKEN) for recipe in recipes]
    sources = sum(tokens for recipe, tokens in zip(recipes, pixels, strict=True) if recipe.source)
    made, details = sum(pixels), TokenDetails(text_tokens=text, image_tokens=sources)
    put = text + sources
    return Usage(input_tokens=put, output_tokens=made, total_tokens=put + made, input_tokens_details=details)


def stages(results: Sequence[Result], image_encode: float, estimate: Estimate | None = None) -> Stages:
    """Where the time went, rounded to 10 microseconds, and what was expected."""
    timings = [result.timings for result in results]
    seconds = {name: max(getattr(one, name) for one in timings) for name in ("queue", "encode", "denoise", "decode")}
    seconds["image_encode"] = image_encode
    return Stages(
        steps=max(one.steps for one in timings),
        shared=round(sum(one.shared for one in timings) / len(timings), 2),
        **{name: round(value, 5) for name, value in seconds.items()},
        **(_expected(estimate) if estimate else {}),
    )


def _expected(estimate: Estimate) -> dict[str, Any]:
    return {
        "queue_position": estimate.position,
        "estimated_wait": round(estimate.wait, 5),
        "cost": round(estimate.cost, 5),
    }


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


def warnings(job: Job, results: Sequence[Result]) -> list[str]:
    """All warnings for these results of one request, each once: of the body, the model, the engine and the files."""
    found = [*body_warnings(job), *model_warnings(job), *(text for result in results for text in result.warnings)]
    for group in file_groups(job, results):
        found += file_warnings(job.format, facts(job, [result.index for result in group]))
    return list(dict.fromkeys(found))


def body_warnings(job: Job) -> list[str]:
    """Warnings for fields that have no effect, whichever model draws."""
    body, png, masked = job.body, job.format == "png", job.request.recipe.masked
    table: list[Effectless] = [
        ("output_format", body.output_format not in (None, job.format), f"Accept asks for image/{job.format}"),
        ("output_compression", png and body.output_compression is not None, "png is lossless; jpeg and webp are not"),
        ("partial_images", body.partial_images and not body.stream, "previews come with stream"),
        ("progress", body.progress and not body.stream, "steps are shown with stream"),
        ("Accept", body.stream and job.raw, "stream answers with events"),
        ("mask_blur", not masked and getattr(body, "mask_blur", None) is not None, "there is no mask"),
        ("overlay", not masked and getattr(body, "overlay", None) is not None, "there is no mask"),
    ]
    found = [f"{field} is ignored: {why}" for field, holds, why in table if holds]
    for name, info in ignored(type(body)).items():
        if info.examples is not None and getattr(body, name) not in (None, *info.examples):
            found.append(f"{name} {info.description}")
    for field in ("prompt", "negative_prompt"):
        texts = getattr(body, field) or []
        for match in filter(None, map(_SYNTAX.search, [texts] if isinstance(texts, str) else texts)):
            lora = "lora:" in match[0].lower()
            why = "the field loras has LoRAs" if lora else "a prompt has no weights and no tags here"
            found.append(f'{field}: "{match[0][:40]}" is read as plain text: {why}')
    return found


def model_warnings(job: Job) -> list[str]:
    """Warnings for fields that have no effect with the model of the job, or for its key."""
    body, card, recipe, delivery = job.body, job.card, job.request.recipe, job.request.delivery
    guided_by = "true_cfg_scale" if card.guidance == "embedded" else "guidance_scale"
    scale, guidance = getattr(body, guided_by), recipe.guidance
    without = "" if scale is not None else f", and {card.id} draws without by default"
    in_vain = body.negative_prompt and not guidance.guided
    no_skip = guidance.skip is None or not guidance.skip.scale
    legs = card.legs(recipe)
    lines, steps = (
        sum(table.lines for table in legs.values()),
        recipe.steps - min(table.first for table in legs.values()),
    )
    alone = next(iter(legs)) if recipe.refiner and len(legs) == 1 else ""
    table: list[Effectless] = [
        ("prompt", card.draws_classes and body.class_label is not None and body.prompt, f"{card.id} draws class_label"),
        (guided_by, scale is not None and 0 < scale < 1, "1 or less draws without guidance"),
        ("negative_prompt", in_vain, f"it takes a {guided_by} over 1{without}"),
        (
            "max_sequence_length",
            not card.has("t5") and body.max_sequence_length not in (None, card.text_length),
            f"{card.id} reads {card.text_length} tokens",
        ),
        ("refiner", alone == card.model, f"none of {steps} steps comes after its switch_at"),
        *((field, no_skip and getattr(body, field) is not None, "it takes a scale") for field in SKIPPING[1:]),
    ]
    found = [f"{field} is ignored: {why}" for field, holds, why in table if holds]
    if job.refiner and alone == job.refiner.model:
        found.append(f"{card.id} draws no step: all {steps} come after switch_at of refiner")
    if delivery.previews >= lines:
        found.append(f"partial_images: at most {lines - 1} come before an image of {steps} steps")
    if body.priority is not None and body.priority > delivery.priority:
        found.append(f"priority is {delivery.priority}: more is not for this key")
    return found


def file_warnings(format: Format, facts: dict[str, Any]) -> list[str]:
    """A warning where a file has no room for all of these facts."""
    names = ", ".join(left_out(format, facts))
    words = f"the request in the file is without {names}: a jpeg has room for 64 kB of it, png and webp for all"
    return [words] if names else []
