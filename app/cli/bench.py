"""`instep bench step | image | serve`: measurements as tables, and as one line of JSON at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cards.card import Card, Size, parse_size
from app.cli.bodies import open_registry
from app.cli.serve import Folder, read_settings
from app.errors import InvalidValue
from app.jobs.body import describe_sizes

if TYPE_CHECKING:
    from app.bench.machine import Ceilings, Spread
    from app.bench.subject import Subject
    from app.bench.trace import Trace
    from app.request import Request
    from app.settings import Settings

app = typer.Typer(help="Measure this machine: a step, an image, a server under load.", no_args_is_help=True)

Model = Annotated[str | None, typer.Option(help="A model id or alias")]
SizeText = Annotated[str | None, typer.Option(help="WxH in pixels")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, in turns, after two that do not count")]
Random = Annotated[bool, typer.Option("--random-weights", help="The card's networks at true size, without files")]
Json = Annotated[bool, typer.Option("--json", help="The line of JSON alone")]

CEILINGS = "{gflops} GFLOP/s of a matrix product, {gbytes} GB/s of a copy"


@app.command()
def step(
    model: Model = None,
    size: SizeText = None,
    passes: Annotated[str, typer.Option(help="Widths of a step to measure")] = "1,2,4,8,16",
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
) -> None:
    """Milliseconds a step against passes, beside the least that the counted work takes on this machine."""
    widths = _widths(passes)
    settings = read_settings(models=models)
    # NOTE: imported late: torch and the model libraries take seconds.
    from app.bench.machine import ceilings
    from app.bench.step import measure_steps
    from app.bench.subject import loaded

    with loaded(settings, model, random_weights=random_weights) as subject:
        pixels = _size(size, subject.card) if size else subject.card.default_size
        most = ceilings(subject.family.device, subject.family.dtype)
        found = measure_steps(subject.family, pixels, widths, rounds, most)
        facts = _facts(subject, most, rounds, size=f"{pixels[0]}x{pixels[1]}", random_weights=random_weights)
    rows = [
        {
            "passes": one.passes,
            "ms": ms(one.time),
            "ms_a_pass": round(one.time.median * 1e3 / one.passes, 4),
            "gflop": round(one.work.flops / 1e9, 4),
            "mbytes": round(one.work.bytes / 1e6, 3),
            "floor_ms": round(one.floor * 1e3, 4),
            "share_of_floor": round(one.share, 4),
        }
        for one in found
    ]
    table = make_table("passes", "ms a step", "least", "most", "ms a pass", "GFLOP", "floor ms", "share of floor")
    for one, row in zip(found, rows, strict=True):
        rest = f"{row['ms_a_pass']:.2f}", f"{row['gflop']:.3f}", f"{row['floor_ms']:.2f}"
        table.add_row(str(one.passes), *_cells(one.time), *rest, f"{row['share_of_floor']:.0%}")
    show({"bench": "step", **facts, "steps": rows}, facts, [table], only_json)


@app.command()
def image(
    model: Model = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less draws without")] = None,
    size: SizeText = None,
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
) -> None:
    """One image, stage by stage, and whole with its prompt encoded anew or not."""
    settings = read_settings(models=models)
    from app.bench.image import asked, measure_image
    from app.bench.subject import loaded

    with loaded(settings, model, random_weights=random_weights) as subject:
        request = asked(subject, steps=steps, guidance=guidance, size=size)
        drawn = measure_image(subject, request, rounds)
        facts = image_facts(subject, request, rounds, random_weights)
    ways = {name: {"ms": ms(time)} for name, time in drawn.times.items()}
    line = {"ways": ways, "stages": {name: ms(time) for name, time in drawn.stages.items()}}
    tables = [times_table("stage", drawn.stages), times_table("one image", drawn.times)]
    show({"bench": "image", **facts, **line}, facts, tables, only_json)


@app.command()
def serve(
    model: Model = None,
    models: Folder = None,
    trace: Annotated[Path | None, typer.Option(help="A recorded trace; without one, --mix is drawn anew")] = None,
    at_capacity: Annotated[float, typer.Option(min=0.01, help="Mean rate, in multiples of the capacity")] = 0.9,
    queued: Annotated[int, typer.Option(min=1, help="Requests of the closed loop that measures capacity")] = 200,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of arrivals: of each round, or of what is recorded")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of both loops")] = 2,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32 (INSTEP_DTYPE)")] = None,
    random_weights: Random = False,
    record: Annotated[Path | None, typer.Option(help="Only write a trace to this file")] = None,
    mix: Annotated[str, typer.Option(help="What is drawn: mixed (13 kinds of work) or homogeneous (one)")] = "mixed",
    rate: Annotated[float, typer.Option(min=1e-3, help="Requests a second of what is drawn")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn")] = 0,
) -> None:
    """Measure a server under load: a closed loop for capacity, then one open-loop trace for latency."""
    settings = read_settings(models=models, dtype=dtype)
    if not (math.isfinite(at_capacity) and math.isfinite(seconds)):
        raise InvalidValue("at-capacity, seconds: not a number that ends", param="seconds")
    drawn = open_trace(settings, model, trace, (mix, rate, seconds, seed), record)
    if record:
        Console().print(f"{record}: {len(drawn.arrivals)} requests in {seconds:g} s", highlight=False, markup=False)
        return
    from app.bench.serve import measure
    from app.bench.subject import chosen

    plan = (at_capacity, queued, seconds, rounds)
    with chosen(settings, model, random_weights=random_weights) as (settings, card):
        found = measure(settings, card.id, drawn.of(card.id), plan, say)
        line = {"bench": "serve", "random_weights": random_weights, **server_facts(settings), "model": card.id, **found}
    print_load(Console(), "instep", found)
    load = f"{found['rate']:.2f} requests/s, {at_capacity:g} of its capacity"
    Console().print(f"{card.id}, {load}, {rounds} rounds of {seconds:g} s", highlight=False)
    print(json.dumps(line))


def open_trace(
    settings: Settings, model: str | None, file: Path | None, drawn: tuple[str, float, float, int], record: Path | None
) -> Trace:
    """Read the trace of a file, or draw one of (mix, rate, seconds, seed), and write it to `record` if that is given.

    Raises InvalidValue, ModelNotFound, OSError.
    """
    from app.bench import trace as traces

    if drawn[0] not in traces.KINDS:
        raise InvalidValue(f"mix: {drawn[0]}: there are {', '.join(traces.KINDS)}", param="mix")
    card = open_registry(settings).find(model)
    if record and file:
        raise InvalidValue("record: a trace that is read is recorded already", param="record")
    found = traces.read(file) if file else traces.record(card, *drawn)  # type: ignore[arg-type]
    if record:
        traces.write(found, record)
    return found


def say(line: str) -> None:
    """Tell a person who waits what is going on."""
    Console(stderr=True).print(line, highlight=False)


def server_facts(settings: Settings) -> dict[str, Any]:
    """What a figure of a server with these settings needs beside it: machine, number format, threads, versions."""
    import torch

    from app.bench.machine import facts
    from app.worker import plan
    from app.worker.process import resolve_dtype

    device = plan.devices(settings.devices)[0]
    own = facts(torch.device(device), resolve_dtype(settings, device))
    return own | {"threads": plan.threads(settings), "compiled": settings.compile}


def image_facts(subject: Subject, request: Request, rounds: int, random_weights: bool) -> dict[str, Any]:
    """What a figure of one image needs beside it."""
    from app.bench.machine import ceilings

    recipe = request.recipe
    return _facts(
        subject, ceilings(subject.family.device, subject.family.dtype), rounds,
        size=f"{recipe.width}x{recipe.height}", sampler=recipe.sampler, steps=recipe.steps,
        guidance=recipe.guidance.scale if recipe.guidance.guided else 0.0, random_weights=random_weights,
    )  # fmt: skip


def _facts(subject: Subject, most: Ceilings, rounds: int, **more: Any) -> dict[str, Any]:
    from app.bench.machine import facts

    own = facts(subject.family.device, subject.family.dtype)
    rates = {"gflops": round(most.flops / 1e9, 1), "gbytes": round(most.bytes / 1e9, 2)}
    compiled = {"compiled": subject.settings.compile}
    return {"model": subject.card.id, **more, **own, **compiled, "rounds": rounds, "ceilings": rates}


def show(line: dict[str, Any], facts: dict[str, Any], tables: Sequence[Table], only_json: bool = False) -> None:
    """Print the facts, the tables, and one line of JSON last."""
    if not only_json:
        console = Console() if Console().is_terminal else Console(width=160)
        head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            head.add_row(name.replace("_", " "), CEILINGS.format(**value) if name == "ceilings" else str(value))
        for one in (head, *tables):
            console.print(one)
            console.print()
    print(json.dumps(line))


def print_load(console: Console, name: str, found: Mapping[str, Any]) -> None:
    """Print what came of one server under load."""
    capacity = found["capacity"]
    title = f"{name}: {capacity['median']:.2f} images/s ({capacity['least']:.2f} to {capacity['most']:.2f})"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("seconds", "n", "alone", "p50", "p95", "p99", "mean", "in time"):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    for kind, row in found["latency"].items():
        seconds = [f"{row[what]:.2f}" for what in ("p50", "p95", "p99", "mean")]
        alone = f"{found['alone'][kind]:.2f}" if kind in found["alone"] else ""
        table.add_row(kind, str(row["count"]), alone, *seconds, f"{row['attainment']:.0%}")
    console.print(table)
    shared = f"{found['rows']:.2f} rows a forward; " if found["rows"] else ""
    late = f"the client at most {1e3 * found['client_late']:.0f} ms late"
    console.print(f"{shared}answers by status: {found['statuses']}; {late}", highlight=False)


def make_table(*columns: str) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place or column == "passes" else "left")
    return made


def times_table(what: str, times: Mapping[str, Spread]) -> Table:
    table = make_table(what, "ms", "least", "most")
    for name, time in times.items():
        table.add_row(name, *_cells(time))
    return table


def _cells(time: Spread) -> list[str]:
    return [f"{value:.2f}" for value in ms(time).values()]


def ms(time: Spread) -> dict[str, float]:
    return {name: round(getattr(time, name) * 1e3, 4) for name in ("median", "least", "most")}


def _size(text: str, card: Card) -> Size:
    """Raises InvalidValue: no size, or not one of the card's."""
    try:
        width, height = parse_size(text)
    except ValueError as error:
        raise InvalidValue(f"size: {error}", param="size") from error
    sizes = card.limits.sizes
    if not all(sizes.min <= side <= sizes.max and side % sizes.multiple == 0 for side in (width, height)):
        raise InvalidValue(f"size: {describe_sizes(sizes)}", param="size")
    return width, height


def _widths(text: str) -> list[int]:
    """Raises InvalidValue: not numbers from 1 up."""
    words = [word.strip() for word in text.split(",")]
    found = sorted({int(word) for word in words if word.isdecimal() and len(word) < 5})
    if not all(word.isdecimal() and len(word) < 5 for word in words) or not 1 <= found[0] <= found[-1] <= 1024:
        raise InvalidValue(f'passes: "{text}" is not numbers from 1 to 1024, like "1,2,4"', param="passes")
    return found
