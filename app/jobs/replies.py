"""Replies: from finished pixels to the bodies that a client gets: OpenAI's JSON, raw bytes, events of a stream.

Knows nothing of requests in flight. Everything here is plain computing: it runs in the imaging threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.imaging import encode_image, grid
from app.jobs.guidance import guidance_facts
from app.jobs.job import Estimate, Job
from app.jobs.shapes import CompletedEvent, ImagesReply, Item, PartialEvent, Stages, TokenDetails, Usage
from app.jobs.splice import mark, spliced
from app.jobs.warnings import warnings
from app.report import Preview, Result
from app.request import ClassLabel, Prompt

TOKEN = 16
"""Pixels on a side of what `usage` counts as one image token: a VAE of scale 8 under patches of 2."""


def raw_image(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """The one file that these results make, and the seconds it took."""
    started = time.perf_counter()
    data = _file(job, results)
    return data, time.perf_counter() - started


def json_reply(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """The whole JSON reply, and the seconds the encoding took."""
    started = time.perf_counter()
    groups = [results] if job.columns else [[result] for result in results]
    files = [_file(job, group) for group in groups]
    data = [Item(b64_json=mark(place), **_item(job, group[0])) for place, group in enumerate(groups)]
    seconds = time.perf_counter() - started
    reply = ImagesReply(
        created=int(time.time()),
        data=data,
        usage=usage(job, len(results)),
        timings=stages(results, seconds, job.estimate),
        warnings=warnings(job, results) or None,
        **effective(job, len(groups[0])),
    )
    return spliced(reply, files), seconds


def partial_event(job: Job, preview: Preview) -> bytes:
    """A preview as a server-sent event. It carries no facts: it is not the image that they make."""
    file = encode_image(preview.pixels, job.format, job.body.output_compression, {})
    event = PartialEvent(
        b64_json=mark(0),
        created_at=int(time.time()),
        partial_image_index=preview.partial,
        image_index=preview.index if len(job.request.images) > 1 else None,
        **effective(job, 1),
    )
    return sse(event, file)


def completed_event(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """A finished image (one result) or sheet (all of them) as a server-sent event, and the seconds of encoding."""
    started = time.perf_counter()
    file = _file(job, results)
    seconds = time.perf_counter() - started
    event = CompletedEvent(
        b64_json=mark(0),
        created_at=int(time.time()),
        usage=usage(job, len(results)),
        timings=stages(results, seconds, job.estimate),
        image_index=results[0].index if len(job.request.images) > 1 and not job.columns else None,
        warnings=warnings(job, results) or None,
        **_item(job, results[0]),
        **effective(job, len(results)),
    )
    return sse(event, file), seconds


def sse(event: PartialEvent | CompletedEvent, file: bytes) -> bytes:
    """One server-sent event with its file; JSON has no newlines, so one data line holds it."""
    return b"".join([f"event: {event.type}\ndata: ".encode(), spliced(event, [file]), b"\n\n"])


def facts(job: Job, indices: Sequence[int]) -> dict[str, Any]:
    """The body that makes these images again, as the file's text chunk tells it: complete, and valid to POST."""
    recipe, specs = job.request.recipe, [job.request.images[index] for index in indices]
    told: dict[str, Any] = {"model": recipe.model}
    conditions = [spec.condition for spec in specs]
    first = conditions[0]
    if isinstance(first, Prompt):
        told["prompt"] = _one_or_list([one.text for one in conditions if isinstance(one, Prompt)])
        told |= {"negative_prompt": first.negative or "", "max_sequence_length": recipe.text_length}
    else:
        told["class_label"] = _one_or_list([one.index for one in conditions if isinstance(one, ClassLabel)])
    if len(specs) > 1 and not isinstance(told.get("prompt", told.get("class_label")), list):
        told["n"] = len(specs)
    if job.columns:
        told["grid"] = {"columns": job.columns}
    return told | {
        "seed": specs[0].seed,
        "size": f"{recipe.width}x{recipe.height}",
        "sampler": recipe.sampler,
        "num_inference_steps": recipe.steps,
        **guidance_facts(recipe.guidance),
    }


def effective(job: Job, images: int) -> dict[str, Any]:
    """The fields of Effective for a file that shows this many images."""
    recipe, columns = job.request.recipe, min(job.columns or 1, images)
    return {
        "model": recipe.model,
        "sampler": recipe.sampler,
        "num_inference_steps": recipe.steps,
        "guidance_scale": guidance_facts(recipe.guidance)["guidance_scale"],
        "size": f"{recipe.width * columns}x{recipe.height * -(-images // columns)}",
        "output_format": job.format,
    }


def usage(job: Job, images: int) -> Usage:
    """Tokens of this many images of the request; a class label counts as one."""
    recipe = job.request.recipe
    text = max(1, recipe.text_length) * images
    pixels = -(-recipe.width // TOKEN) * -(-recipe.height // TOKEN) * images
    details = TokenDetails(text_tokens=text)
    return Usage(input_tokens=text, output_tokens=pixels, total_tokens=text + pixels, input_tokens_details=details)


def stages(results: Sequence[Result], image_encode: float, estimate: Estimate | None = None) -> Stages:
    """Where the time went, rounded to 10 microseconds, and what was expected."""
    timings = [result.timings for result in results]
    return Stages(
        queue=round(max(one.queue for one in timings), 5),
        encode=round(max(one.encode for one in timings), 5),
        denoise=round(max(one.denoise for one in timings), 5),
        decode=round(max(one.decode for one in timings), 5),
        image_encode=round(image_encode, 5),
        steps=max(one.steps for one in timings),
        shared=round(sum(one.shared for one in timings) / len(timings), 2),
        cost=round(estimate.cost, 5) if estimate else None,
        estimated_wait=round(estimate.wait, 5) if estimate else None,
        queue_position=estimate.position if estimate else None,
    )


def _file(job: Job, results: Sequence[Result]) -> bytes:
    pixels = results[0].pixels
    if job.columns:
        pixels = grid([result.pixels for result in results], job.columns)
    told = facts(job, [result.index for result in results])
    return encode_image(np.asarray(pixels), job.format, job.body.output_compression, told)


def _item(job: Job, result: Result) -> dict[str, Any]:
    condition = job.request.images[result.index].condition
    if isinstance(condition, ClassLabel):
        name = job.card.labels[condition.index]
        return {"seed": result.seed, "class_label": condition.index, "revised_prompt": name}
    return {"seed": result.seed}


def _one_or_list(values: list[Any]) -> object:
    return values[0] if len(set(values)) == 1 else values
