"""Replies: finished pixels as the bodies that a client gets: a file, OpenAI's JSON, events of a stream.

It is all plain computing, for the imaging threads.
"""

from __future__ import annotations

import binascii
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from app.imaging import encode_image, grid
from app.jobs.body import guidance_facts
from app.jobs.job import Estimate, Job
from app.jobs.shapes import CompletedEvent, ImagesReply, Item, PartialEvent, Stages, TokenDetails, Usage
from app.jobs.warnings import of_body, of_file, of_model
from app.report import Preview, Result
from app.request import ClassLabel, Prompt

TOKEN = 16
"""Pixels on a side of what `usage` counts as one image token: a VAE of scale 8 under patches of 2."""

SLICE = 3 * 2**16
"""Bytes of a file that become base64 in one call; a multiple of three, so that only the last is padded."""

_MARK = secrets.token_hex(16)


def raw_image(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """The one file that these results make, and the seconds it took."""
    (file,), seconds = _files(job, [results])
    return file, seconds


def json_reply(job: Job, results: Sequence[Result]) -> tuple[bytes, float]:
    """The whole JSON reply, and the seconds of encoding the files."""
    groups = _groups(job, results)
    files, seconds = _files(job, groups)
    reply = ImagesReply(
        created=int(time.time()),
        data=[Item(b64_json=mark(place), **_item(job, group[0])) for place, group in enumerate(groups)],
        **_cost(job, results, seconds),
        **effective(job, len(groups[0])),
    )
    return spliced(reply, files), seconds


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
    (file,), seconds = _files(job, [results])
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
    found = [*of_body(job.body, job.format, job.raw), *of_model(job)]
    found += [text for result in results for text in result.warnings]
    for group in _groups(job, results):
        found += of_file(job.format, facts(job, [result.index for result in group]))
    return list(dict.fromkeys(found))


def facts(job: Job, indices: Sequence[int]) -> dict[str, Any]:
    """The body that makes these images again, for the text chunk of their file: complete, and valid to POST."""
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
    phases = ("queue", "encode", "denoise", "decode")
    slowest: dict[str, Any] = {name: round(max(getattr(one, name) for one in timings), 5) for name in phases}
    return Stages(
        **slowest,
        image_encode=round(image_encode, 5),
        steps=max(one.steps for one in timings),
        shared=round(sum(one.shared for one in timings) / len(timings), 2),
        cost=round(estimate.cost, 5) if estimate else None,
        estimated_wait=round(estimate.wait, 5) if estimate else None,
        queue_position=estimate.position if estimate else None,
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


def _groups(job: Job, results: Sequence[Result]) -> Sequence[Sequence[Result]]:
    """The results that make a file together: all as one sheet if the job asks for it, else each alone."""
    return [results] if job.columns else [[result] for result in results]


def _files(job: Job, groups: Sequence[Sequence[Result]]) -> tuple[list[bytes], float]:
    """A file of each group of results, as one sheet if the job asks for sheets, and the seconds they took."""
    started, files = time.perf_counter(), []
    for results in groups:
        pixels = grid([result.pixels for result in results], job.columns) if job.columns else results[0].pixels
        text = facts(job, [result.index for result in results])
        files.append(encode_image(np.asarray(pixels), job.format, job.body.output_compression, text))
    return files, time.perf_counter() - started


def _sse(event: PartialEvent | CompletedEvent, file: bytes) -> bytes:
    """One server-sent event with its file; JSON has no newlines, so one data line holds it."""
    return b"".join([f"event: {event.type}\ndata: ".encode(), spliced(event, [file]), b"\n\n"])


def _cost(job: Job, results: Sequence[Result], imaging: float) -> dict[str, Any]:
    return {
        "usage": usage(job, len(results)),
        "timings": stages(results, imaging, job.estimate),
        "warnings": warnings(job, results) or None,
    }


def _item(job: Job, result: Result) -> dict[str, Any]:
    condition = job.request.images[result.index].condition
    if isinstance(condition, ClassLabel):
        name = job.card.labels[condition.index]
        return {"seed": result.seed, "class_label": condition.index, "revised_prompt": name}
    return {"seed": result.seed}


def _one_or_list(values: list[Any]) -> object:
    return values[0] if len(set(values)) == 1 else values
