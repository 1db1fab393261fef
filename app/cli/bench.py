"""`instep bench step | image | serve`: measurements as tables, and as one line of JSON at the end."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from app.cli.options import Folder, Model, body_flags, read_settings, with_flags
from app.cli.paint import facts_table, show_tables, table
from app.errors import InvalidValue
from app.jobs.body import ImageBody
from app.jobs.facts import recipe_facts

app = typer.Typer(help="Measure this machine: a step, an image, a server under load.", no_args_is_help=True)

Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each, after two that do not count")]
Random = Annotated[bool, typer.Option("--random-weights", help="Networks at true size with random weights")]
Json = Annotated[bool, typer.Option("--json", help="Print only the line of JSON")]
AtCapacity = Annotated[float, typer.Option(min=0.01, max=100, help="Mean rate of arrivals, times the capacity")]
Queued = Annotated[int, typer.Option(min=1, help="Requests of the closed loop that measures the capacity")]
Seconds = Annotated[float, typer.Option(min=0.1, max=86_400, help="Length of each round of arrivals")]
Loops = Annotated[int, typer.Option(min=1, help="Rounds of both loops")]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16 or float32 (INSTEP_DTYPE)")]
MixName = Annotated[Literal["mixed", "homogeneous"], typer.Option(help="Requests of 13 kinds of work, or of one")]
Seed = Annotated[int, typer.Option(help="Seed of the requests")]

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""How a table writes the rows of the JSON line: by the head of a column, the form of its cells."""

TIMES: Columns = {"ms": "{ms[median]:.2f}", "least": "{ms[least]:.2f}", "most": "{ms[most]:.2f}"}
STEPS: Columns = {
    "passes": "{passes}", **TIMES, "ms a pass": "{ms_a_pass:.2f}", "GFLOP": "{gflop:.3f}",
    "floor ms": "{floor_ms:.2f}", "share of floor": "{share_of_floor:.0%}",
}  # fmt: skip
LATENCIES: Columns = {
    "seconds": "{kind}", "n": "{count}", "alone": "{alone}", "p50": "{p50:.2f}", "p95": "{p95:.2f}",
    "p99": "{p99:.2f}", "mean": "{mean:.2f}", "in time": "{attainment:.0%}",
}  # fmt: skip


@app.command()
def step(
    model: Model = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels")] = None,
    passes: Annotated[str, typer.Option(help="Widths of a step to measure")] = "1,2,4,8,16",
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
) -> None:
    """Measure a step by its passes, next to the least time that its work can take on this machine."""
    widths = _widths(passes)
    settings = read_settings(models=models)
    # NOTE: imported late: torch and the model libraries take seconds.
    from app.bench.engine import ask, measure_steps
    from app.bench.machine import ceilings, facts
    from app.bench.subject import loaded

    with loaded(settings, model, random_weights=random_weights) as (_, family):
        recipe = ask(family.card, size=size).recipe
        most = ceilings(family.device, family.dtype)
        rows = measure_steps(family, recipe.width, recipe.height, widths, rounds, most)
    about: Row = {"model": recipe.model, "size": f"{recipe.width}x{recipe.height}", "random_weights": random_weights}
    line: Row = {"bench": "step", **about, **facts(settings), "rounds": rounds, **most, "steps": rows}
    show(line, formed(STEPS, rows), only_json=only_json)


@app.command()
@with_flags(body_flags(ImageBody))
def image(
    rounds: Rounds = 10,
    random_weights: Random = False,
    only_json: Json = False,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Measure one image, stage by stage and as a whole, with its prompt encoded again or cached."""
    settings = read_settings(models=models)
    from app.bench.engine import ask, measure_image
    from app.bench.machine import facts, milliseconds
    from app.bench.subject import loaded

    with loaded(settings, fields["model"], random_weights=random_weights) as (pool, family):
        request = ask(family.card, **fields)
        times, stages, _ = measure_image(pool, settings, request, rounds)
    found = {name: milliseconds(samples) for name, samples in stages.items()}
    ways = {name: milliseconds(samples) for name, samples in times.items()}
    line = {"bench": "image", **recipe_facts(request.recipe), **facts(settings), "random_weights": random_weights}
    line |= {"rounds": rounds, "ways": {name: {"ms": ms} for name, ms in ways.items()}, "stages": found}
    show(line, times_table("stage", found), times_table("one image", ways), only_json=only_json)


@app.command()
def serve(
    model: Model = None,
    models: Folder = None,
    at_capacity: AtCapacity = 0.9,
    queued: Queued = 200,
    seconds: Seconds = 60.0,
    rounds: Loops = 2,
    dtype: Dtype = None,
    random_weights: Random = False,
    mix: MixName = "mixed",
    seed: Seed = 0,
) -> None:
    """Measure a server under load: a closed loop for capacity, then an open loop at a share of it for latency."""
    settings = read_settings(models=models, dtype=dtype)
    from app.bench.machine import facts
    from app.bench.serve import measure
    from app.bench.subject import chosen

    plan = at_capacity, queued, seconds, rounds
    with chosen(settings, model, random_weights=random_weights) as (settings, card):
        found = measure(settings, card, mix, seed, plan, Console(stderr=True, highlight=False).print)
    line = {"bench": "serve", "model": card.id, **facts(settings), "random_weights": random_weights, **found}
    show(line, load_table("instep", found))


def show(line: Row, *tables: Table, only_json: bool = False) -> None:
    """Print the plain facts of a line, tables of the rest of it, and the line as JSON."""
    if not only_json:
        plain = {name.replace("_", " "): value for name, value in line.items() if not isinstance(value, Mapping | list)}
        show_tables(facts_table(plain), *tables)
    print(json.dumps(line))


def load_table(name: str, found: Row) -> Table:
    """The capacity and the latencies of one server under load."""
    alone = {kind: f"{seconds:.2f}" for kind, seconds in found["alone"].items()}
    rows = [{"kind": kind, "alone": alone.get(kind, ""), **row} for kind, row in found["latency"].items()]
    title = "{name}: {median:.2f} images/s ({least:.2f} to {most:.2f})".format(name=name, **found["capacity"])
    shared = f"{found['rows']:.2f} rows a forward; " if found["rows"] else ""
    late = f"the client at most {1e3 * found['client_late']:.0f} ms late"
    caption = f"{shared}answers by status: {found['statuses']}; {late}"
    return formed(LATENCIES, rows, title=title, title_justify="left", caption=caption, caption_justify="left")


def formed(columns: Columns, rows: Iterable[Row], **looks: Any) -> Table:
    """A table of rows of the JSON line."""
    cells = [{head: form.format(**row) for head, form in columns.items()} for row in rows]
    return table(cells, ("seconds", "stage", "one image", "class"), **looks)


def times_table(what: str, times: Mapping[str, Row]) -> Table:
    return formed({what: "{name}", **TIMES}, [{"name": name, "ms": ms} for name, ms in times.items()])


def _widths(text: str) -> list[int]:
    """Raises InvalidValue: the text is not a list of numbers from 1 to 1024."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,4}", word) and 1 <= int(word) <= 1024 for word in words):
        raise InvalidValue(f'passes: "{text}" is not numbers from 1 to 1024, like "1,2,4"', param="passes")
    return sorted(set(map(int, words)))
