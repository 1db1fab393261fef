"""`instep bench step | image | serve`: measurements as tables, and as one line of JSON at the end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from app.cli.bodies import Guidance, Model, SizeText, Steps, open_registry
from app.cli.serve import Folder, read_settings
from app.errors import InvalidValue
from app.jobs.body import size_of

if TYPE_CHECKING:
    from app.bench.machine import Ceilings
    from app.bench.subject import Subject
    from app.bench.trace import Trace
    from app.request import Request
    from app.settings import Settings

app = typer.Typer(help="Measure this machine: a step, an image, a server under load.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, in turns, after two that do not count")]
Random = Annotated[bool, typer.Option("--random-weights", help="The card's networks at true size, without files")]
Json = Annotated[bool, typer.Option("--json", help="The line of JSON alone")]

CEILINGS = "{gflops} GFLOP/s of a matrix product, {gbytes} GB/s of a copy"

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""How a table writes the rows of the JSON line: by the head of a column, the form of its cells."""

TIMES: Columns = {"ms": "{ms[median]:.2f}", "least": "{ms[least]:.2f}", "most": "{ms[most]:.2f}"}
STEPS: Columns = {
    "passes": "{passes}", "ms a step": TIMES["ms"], "least": TIMES["least"], "most": TIMES["most"],
    "ms a pass": "{ms_a_pass:.2f}", "GFLOP": "{gflop:.3f}", "floor ms": "{floor_ms:.2f}",
    "share of floor": "{share_of_floor:.0%}",
}  # fmt: skip
LATENCIES: Columns = {
    "seconds": "{kind}", "n": "{count}", "alone": "{alone}", "p50": "{p50:.2f}", "p95": "{p95:.2f}",
    "p99": "{p99:.2f}", "mean": "{mean:.2f}", "in time": "{attainment:.0%}",
}  # fmt: skip


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
        pixels = size_of(subject.card, size) if size else subject.card.default_size
        most = ceilings(subject.family.device, subject.family.dtype)
        found = measure_steps(subject.family, pixels, widths, rounds, most)
        size = f"{pixels[0]}x{pixels[1]}"
        facts = facts_of(subject, most, rounds, size=size, random_weights=random_weights)
    rows = [one.facts() for one in found]
    show("step", facts, {"steps": rows}, [make_table(STEPS, rows)], only_json)


@app.command()
def image(
    model: Model = None,
    steps: Steps = None,
    guidance: Guidance = None,
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
    ways, stages = ({name: time.ms() for name, time in times.items()} for times in (drawn.times, drawn.stages))
    line = {"ways": {name: {"ms": ms} for name, ms in ways.items()}, "stages": stages}
    show("image", facts, line, [times_table("stage", stages), times_table("one image", ways)], only_json)


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
    if record and trace:
        raise InvalidValue("record: a trace that is read is recorded already", param="record")
    drawn = open_trace(settings, model, trace, (mix, rate, seconds, seed))
    if record:
        drawn.write(record)
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


def open_trace(settings: Settings, model: str | None, file: Path | None, drawn: tuple[Any, float, float, int]) -> Trace:
    """Read the trace of a file, or draw one of (mix, rate, seconds, seed). Raises InstepError, OSError."""
    from app.bench import trace as traces

    if drawn[0] not in traces.KINDS:
        raise InvalidValue(f"mix: {drawn[0]}: there are {', '.join(traces.KINDS)}", param="mix")
    card = open_registry(settings).find(model)
    return traces.read(file) if file else traces.record(card, *drawn)


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
    return facts_of(
        subject, ceilings(subject.family.device, subject.family.dtype), rounds,
        size=f"{recipe.width}x{recipe.height}", sampler=recipe.sampler, steps=recipe.steps,
        guidance=recipe.guidance.scale if recipe.guidance.guided else 0.0, random_weights=random_weights,
    )  # fmt: skip


def facts_of(subject: Subject, most: Ceilings, rounds: int, **more: Any) -> dict[str, Any]:
    """What a figure of a model needs beside it."""
    from app.bench.machine import facts

    own = facts(subject.family.device, subject.family.dtype) | {"compiled": subject.settings.compile}
    rates = {"gflops": round(most.flops / 1e9, 1), "gbytes": round(most.bytes / 1e9, 2)}
    return {"model": subject.card.id, **more, **own, "rounds": rounds, "ceilings": rates}


def show(bench: str, facts: Row, found: Row, tables: Iterable[Table], only_json: bool = False) -> None:
    """Print the facts, the tables, and one line of JSON last."""
    if not only_json:
        console = Console() if Console().is_terminal else Console(width=160)
        head = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            head.add_row(name.replace("_", " "), CEILINGS.format(**value) if name == "ceilings" else str(value))
        for one in (head, *tables):
            console.print(one)
            console.print()
    print(json.dumps({"bench": bench, **facts, **found}))


def print_load(console: Console, name: str, found: Row) -> None:
    """Print what came of one server under load."""
    title = "{name}: {median:.2f} images/s ({least:.2f} to {most:.2f})".format(name=name, **found["capacity"])
    alone = {kind: f"{seconds:.2f}" for kind, seconds in found["alone"].items()}
    rows = [{"kind": kind, "alone": alone.get(kind, ""), **row} for kind, row in found["latency"].items()]
    console.print(make_table(LATENCIES, rows, title=title, title_justify="left", padding=(0, 1)))
    shared = f"{found['rows']:.2f} rows a forward; " if found["rows"] else ""
    late = f"the client at most {1e3 * found['client_late']:.0f} ms late"
    console.print(f"{shared}answers by status: {found['statuses']}; {late}", highlight=False)


def make_table(columns: Columns, rows: Iterable[Row], **looks: Any) -> Table:
    """A table of rows of the JSON line."""
    made = Table(box=None, **{"padding": (0, 2, 0, 0), **looks})
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place or column == "passes" else "left")
    for row in rows:
        made.add_row(*(cell.format(**row) for cell in columns.values()))
    return made


def times_table(what: str, times: Mapping[str, Row]) -> Table:
    """A table of milliseconds by name."""
    return make_table({what: "{name}", **TIMES}, [{"name": name, "ms": ms} for name, ms in times.items()])


def _widths(text: str) -> list[int]:
    """Raises InvalidValue: not numbers from 1 up."""
    found = {int(word) if re.fullmatch(r"\s*\d{1,4}\s*", word) else 0 for word in text.split(",")}
    if not 1 <= min(found) <= max(found) <= 1024:
        raise InvalidValue(f'passes: "{text}" is not numbers from 1 to 1024, like "1,2,4"', param="passes")
    return sorted(found)
