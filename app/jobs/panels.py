"""Panels: the finished pictures of a comparison as the body that a client gets: the file alone, or JSON."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from app.cards.card import Card
from app.imaging import encode_image
from app.jobs.body import guidance_facts
from app.jobs.compare import Comparison
from app.jobs.job import Job
from app.jobs.replies import effective, mark, spliced, stages, usage
from app.jobs.shapes import Cell, CompareReply, Panel, Usage
from app.jobs.warnings import of_body, of_file, of_model
from app.panel import Heading, panel, unreadable
from app.report import Result
from app.request import ClassLabel, Prompt


def raw_panel(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, float]:
    """The panel as a file, and the seconds it took. results: of each cell, row by row."""
    file, _, seconds = _drawn(comparison, results)
    return file, seconds


def json_panel(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, float]:
    """The whole JSON reply, and the seconds of imaging. results: of each cell, row by row."""
    file, size, seconds = _drawn(comparison, results)
    cells = enumerate(zip(comparison.jobs, results, strict=True))
    reply = CompareReply(
        created=int(time.time()),
        data=[Panel(b64_json=mark(0))],
        models=[card.id for card in comparison.cards],
        cells=[_cell(divmod(place, len(comparison.cards)), job, result) for place, (job, result) in cells],
        size=size,
        output_format=comparison.format,
        usage=_usage(comparison.jobs),
        timings=stages(results, seconds),
        warnings=panel_warnings(comparison, results) or None,
    )
    return spliced(reply, [file]), seconds


def panel_warnings(comparison: Comparison, results: Sequence[Result]) -> list[str]:
    """The body's warnings, those of all cells, the model before each, and letters of the labels that show as boxes."""
    found = [*of_body(comparison.body, comparison.format, comparison.raw)]
    for job, result in zip(comparison.jobs, results, strict=True):
        found += [f"{job.card.id}: {text}" for text in (*of_model(job), *result.warnings)]
    if missing := unreadable(comparison.rows):
        found.append(f"the panel shows boxes for letters that its font does not have: {missing[:40]}")
    found += of_file(comparison.format, comparison.facts())
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


def _drawn(comparison: Comparison, results: Sequence[Result]) -> tuple[bytes, str, float]:
    """The panel as a file, its size as "WxH", and the seconds it took."""
    started, columns = time.perf_counter(), len(comparison.cards)
    pictures: list[np.ndarray] = [result.pixels for result in results]
    cells = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    headings = [_heading(job) for job in comparison.cells[0]]
    pixels = panel(cells, comparison.rows, headings, f"seed {comparison.seed}")
    file = encode_image(pixels, comparison.format, comparison.body.output_compression, comparison.facts())
    return file, f"{pixels.shape[1]}x{pixels.shape[0]}", time.perf_counter() - started


def _heading(job: Job) -> Heading:
    count, recipe = parameters_of(job.card), job.request.recipe
    settings = f"steps {recipe.steps}, guidance {guidance_facts(recipe.guidance)['guidance_scale']:g}"
    return Heading(job.card.id, (*([f"{count} parameters"] if count else []), settings))


def _cell(place: tuple[int, int], job: Job, result: Result) -> Cell:
    condition, looks = job.request.images[0].condition, effective(job, 1)
    del looks["output_format"]
    return Cell(
        row=place[0],
        column=place[1],
        parameters=job.card.parameters,
        prompt=condition.text if isinstance(condition, Prompt) else None,
        class_label=condition.index if isinstance(condition, ClassLabel) else None,
        seed=result.seed,
        timings=stages([result], 0.0, job.estimate),
        **looks,
    )


def _usage(jobs: Sequence[Job]) -> Usage:
    """Tokens of all cells together."""
    each = [usage(job, 1) for job in jobs]
    text, pixels = (sum(getattr(one, name) for one in each) for name in ("input_tokens", "output_tokens"))
    details = each[0].input_tokens_details.model_copy(update={"text_tokens": text})
    return Usage(input_tokens=text, output_tokens=pixels, total_tokens=text + pixels, input_tokens_details=details)
