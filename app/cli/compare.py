"""`instep compare`: several models side by side, through an engine in this process, as one labelled panel.

Knows nothing of defaults or limits, nor of how the panel looks: it sends the body that a server would be sent.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cli.bodies import Body, curl_of, kind_of, labels_of, open_registry
from app.cli.generate import say
from app.cli.serve import Folder, read_settings
from app.errors import InstepError
from app.jobs.body import ImageBody
from app.jobs.compare import Comparison, lay_out, read_comparison
from app.jobs.local import Local, loading
from app.jobs.panels import panel_warnings, raw_panel
from app.report import Failure, Report, Result
from app.report import Progress as Step
from app.request import Request
from app.settings import Settings


def compare(
    model: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL...", help="Model ids or aliases, a column each")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; again for another row")] = None,
    class_label: Annotated[
        list[str] | None, typer.Option(help="A class id or name; again for another row, or 162,247")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="two_prompts: two prompts, 28 steps, guidance 7")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; each model's own if absent")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; each model's own if absent")] = None,
    seed: Annotated[int | None, typer.Option(help="The one seed of all pictures; drawn if absent or -1")] = None,
    sampler: Annotated[str | None, typer.Option(help="The solver; each model's own if absent")] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels; each model's own if absent")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance moves away from")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write: .png, .jpg or .webp")] = None,
    models: Folder = None,
) -> None:
    """Draw the same prompts or classes by several models, one panel: rows prompts, columns models by parameters."""
    settings = read_settings(models=models)
    registry = open_registry(settings)
    body: Body = {
        "models": model or None, "prompt": prompt or None, "class_label": labels_of(class_label),
        "preset": preset, "num_inference_steps": steps, "guidance_scale": guidance, "seed": seed, "sampler": sampler,
        "size": size, "negative_prompt": negative, "output_format": kind_of(out) if out else None,
    }  # fmt: skip
    comparison = plan(body, registry)
    out = out or Path(f"compare-{comparison.seed}.png")
    start = time.monotonic()
    results = draw(comparison, settings, registry.cards)
    out.write_bytes(raw_panel(comparison, results)[0])
    for warning in panel_warnings(comparison, results):
        print(f"instep: {warning}", file=sys.stderr)
    console, seconds = Console(), time.monotonic() - start
    say(console, f"{out}  seed {comparison.seed}  {len(results)} pictures  {seconds:.1f} s with loading")
    say(console, curl_of("images/compare", comparison.facts(), comparison.format, settings, out))


def plan(body: Body, registry: Registry) -> Comparison:
    """What a server would make of this body. Raises InstepError as a server would answer it."""
    numbers = itertools.count()

    def complete(image: ImageBody, card: Card) -> Request:
        request = image.to_request(card, f"compare-{next(numbers)}")
        return replace(request, delivery=replace(request.delivery, progress=True))

    return lay_out(read_comparison(body), registry, complete)


def draw(comparison: Comparison, settings: Settings, cards: dict[str, Card]) -> list[Result]:
    """The result of every cell, row by row. Raises the error of the first that fails, with its model before it."""
    failed: dict[str, Failure] = {}

    def listen(report: Report) -> None:
        if isinstance(report, Failure):
            failed[report.request_id] = report

    with Local(settings, cards, listen=listen) as local:
        for ask in comparison.asks:
            local.submit(ask.request)
        try:
            return watch(local.reports(), comparison, Console(stderr=True))
        except InstepError as error:
            models = [ask.card.id for ask in comparison.asks if ask.request.id in failed]
            if not models or models[0] in error.message:
                raise
            raise type(error)(f"{models[0]}: {error.message}") from None


def watch(reports: Iterator[Report], comparison: Comparison, console: Console) -> list[Result]:
    """The result of every cell, row by row; a bar for each model, and a line when all of its pictures are there."""
    asks, rows = {ask.request.id: ask for ask in comparison.asks}, len(comparison.rows)
    results: dict[str, Result] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        steps = [asks[f"compare-{place}"].request.recipe.steps for place in range(len(comparison.cards))]
        totals = {card.id: rows * each for card, each in zip(comparison.cards, steps, strict=True)}
        tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
        for report in reports:
            if line := loading(report):
                say(console, line)
            elif isinstance(report, Step):
                task = tasks[asks[report.request_id].card.id]
                bars.update(task, advance=1, total=rows * report.steps)
            elif isinstance(report, Result):
                results[report.request_id] = report
                if line := finished(asks[report.request_id].card.id, comparison, results):
                    say(console, line)
                if len(results) == len(asks):
                    break
    return [results[name] for name in asks]


def finished(model: str, comparison: Comparison, results: dict[str, Any]) -> str | None:
    """A line when this model's last picture is there."""
    wanted = [ask.request.id for ask in comparison.asks if ask.card.id == model]
    done = sum(name in results for name in wanted)
    pictures = "1 picture" if done == 1 else f"{done} pictures"
    return f"{model}: {pictures}" if done == len(wanted) else None
