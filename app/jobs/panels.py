"""Panels: from the finished pictures of a comparison to the body that a client gets: the file alone, or JSON.

Knows nothing of requests in flight. Everything here is plain computing: it runs in the imaging threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from app.cards.card import Card
from app.imaging import encode_image
from app.jobs.compare import Comparison
from app.jobs.guidance import guidance_facts
from app.jobs.job import Job
from app.jobs.replies import stages, usage
from app.jobs.shapes import Cell, CompareReply, Panel, Usage
from app.jobs.splice import mark, spliced
from app.jobs.warnings import of_body, of_model
from app.panel import Heading, panel, unreadable
from app.report import Result
from app.request import ClassLabel, Prompt


def raw_panel(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, float]:
    """The panel as a file, and the seconds it took. results: of each cell, row by row."""
    started = time.perf_counter()
    data = _file(comparison, draw_panel(comparison, results))
    return data, time.perf_counter() - started


def json_panel(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, float]:
    """The whole JSON reply, and the seconds of imaging. results: of each cell, row by row."""
    started = time.perf_counter()
    pixels = draw_panel(comparison, results)
    file = _file(comparison, pixels)
    seconds = time.perf_counter() - started
    reply = CompareReply(
        created=int(time.time()),
        data=[Panel(b64_json=mark(0))],
        models=[card.id for card in comparison.cards],
        cells=[_cell(comparison, place, job, results[place]) for place, job in enumerate(comparison.jobs)],
        size=f"{pixels.shape[1]}x{pixels.shape[0]}",
        output_format=comparison.format,
        usage=_usage(comparison.jobs),
        timings=stages(results, seconds),
        warnings=panel_warnings(comparison, results) or None,
    )
    return spliced(reply, [file]), seconds


def draw_panel(comparison: Comparison, results: Sequence[Result]) -> np.ndarray:
    """The panel's pixels, uint8 [height, width, 3]."""
    columns = len(comparison.cards)
    pixels = [result.pixels for result in results]
    cells = [pixels[start : start + columns] for start in range(0, len(pixels), columns)]
    headings = [_heading(job) for job in comparison.cells[0]]
    return panel(cells, comparison.rows, headings, f"seed {comparison.seed}")


def panel_warnings(comparison: Comparison, results: Sequence[Result]) -> list[str]:
    """The body's warnings, those of all cells, the model before each, and letters of the labels that show as boxes."""
    told = [*of_body(comparison.body, comparison.format, comparison.raw)]
    for job, result in zip(comparison.jobs, results, strict=True):
        told += [f"{job.card.id}: {text}" for text in (*of_model(job), *result.warnings)]
    if missing := unreadable(comparison.rows):
        told.append(f"the panel shows boxes for letters that its font does not have: {missing[:40]}")
    return list(dict.fromkeys(told))


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
    settings = f"steps {recipe.steps}, guidance {guidance_facts(recipe.guidance)['guidance_scale']:g}"
    return Heading(job.card.id, (*([f"{count} parameters"] if count else []), settings))


def _file(comparison: Comparison, pixels: np.ndarray) -> bytes:
    return encode_image(pixels, comparison.format, comparison.body.output_compression, comparison.facts())


def _cell(comparison: Comparison, place: int, job: Job, result: Result) -> Cell:
    recipe, condition = job.request.recipe, job.request.images[0].condition
    row, column = divmod(place, len(comparison.cards))
    return Cell(
        row=row,
        column=column,
        model=recipe.model,
        parameters=job.card.parameters,
        prompt=condition.text if isinstance(condition, Prompt) else None,
        class_label=condition.index if isinstance(condition, ClassLabel) else None,
        seed=result.seed,
        size=f"{recipe.width}x{recipe.height}",
        sampler=recipe.sampler,
        num_inference_steps=recipe.steps,
        guidance_scale=guidance_facts(recipe.guidance)["guidance_scale"],
        timings=stages([result], 0.0, job.estimate),
    )


def _usage(jobs: Sequence[Job]) -> Usage:
    """Tokens of all cells together."""
    each = [usage(job, 1) for job in jobs]
    text, pixels = (sum(getattr(one, name) for one in each) for name in ("input_tokens", "output_tokens"))
    details = each[0].input_tokens_details.model_copy(update={"text_tokens": text})
    return Usage(input_tokens=text, output_tokens=pixels, total_tokens=text + pixels, input_tokens_details=details)
