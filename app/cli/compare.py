"""`instep compare`: several models side by side, through an engine in this process, as one labelled panel."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cli.generate import Body, curl_of, kind_of, labels_of
from app.cli.options import Folder, Labels, Out, body_flags, open_registry, read_settings, with_flags
from app.cli.paint import bars_of, draw, follow, say
from app.errors import InstepError
from app.jobs.body import ImageBody
from app.jobs.compare import CompareBody, cells, panel_file, panel_warnings, read_comparison, with_model
from app.jobs.job import Job


@with_flags(body_flags(CompareBody, "model", "n"))
def compare(
    model: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Model ids or aliases, one for each column")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat it for another row")] = None,
    class_label: Labels = None,
    out: Out = None,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Draw the same prompts or classes with several models, as one panel with a column for each model."""
    settings = read_settings(models=models)
    registry = open_registry(settings)
    fields |= {"models": model or None, "prompt": prompt or None, "class_label": labels_of(class_label)}
    body: Body = {**fields, "output_format": out and kind_of(out)}
    comparison, jobs = plan(body, registry)
    out = out or Path(f"compare-{comparison.seed}.png")
    start = time.monotonic()
    try:
        drawn = draw(jobs, settings, registry.cards, bars(jobs, Console(stderr=True)))
    except InstepError as error:
        raise with_model(jobs, error) from None
    results = [result for (result,) in drawn]
    out.write_bytes(panel_file(comparison, jobs, results)[0])
    for warning in panel_warnings(comparison, jobs, results):
        print(f"instep: {warning}", file=sys.stderr)
    console, seconds = Console(), time.monotonic() - start
    say(console, f"{out}  seed {comparison.seed}  {len(results)} pictures  {seconds:.1f} s with loading")
    say(console, curl_of("images/compare", comparison.facts(), jobs[0].format, settings, out))


def plan(body: Body, registry: Registry) -> tuple[CompareBody, list[Job]]:
    """What a server would make of this body: complete, and the job of each cell. Raises InstepError as it would."""
    numbers, comparison = itertools.count(), read_comparison(body, registry)
    format = comparison.output_format or "png"

    def complete(card: Card, image: ImageBody) -> Job:
        request = image.to_request(card, f"compare-{next(numbers)}")
        return Job(replace(request, delivery=replace(request.delivery, progress=True)), card, image, format, raw=True)

    return comparison, cells(comparison, registry, complete)


def bars(jobs: list[Job], console: Console) -> Progress:
    """A bar for each model, and a line when all of its pictures are there."""
    made = bars_of(console)
    follow(jobs, lambda job, index: job.card.id, made)

    def tell(model: str, _: object) -> None:
        own = [job for job in jobs if job.card.id == model]
        if all(job.results for job in own):
            say(console, f"{model}: {'1 picture' if len(own) == 1 else f'{len(own)} pictures'}")

    for job in jobs:
        job.future.add_done_callback(partial(tell, job.card.id))
    return made
